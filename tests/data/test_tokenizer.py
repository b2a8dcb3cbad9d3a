from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from jrl.data.tokenizer import SPECIAL_TOKENS, load_tokenizer, save_tokenizer, train_tokenizer

CAPTIONS = [
    "a red flag",
    "a red circle above a blue square",
    "drapeau rouge",
    "eine rote Fahne",
    "красный флаг",
    "赤い旗",
    "علم أحمر",
] * 5


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(CAPTIONS, vocabulary_size=400)


def test_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]
    assert tokenizer.pad_token_id == 0
    assert tokenizer.bos_token_id == tokenizer.cls_token_id == 2
    assert tokenizer.eos_token_id == tokenizer.sep_token_id == 3
    assert tokenizer.mask_token_id == 4
    batch = tokenizer(["a red flag", "a"], padding=True, return_tensors="pt")
    assert batch["input_ids"][:, 0].tolist() == [2, 2]
    assert batch["input_ids"][0, -1] == 3
    assert batch["input_ids"][1, -1] == 0
    assert batch["attention_mask"][1].sum() == 3
    pair = tokenizer("a", "red")
    assert pair["input_ids"].count(3) == 2


def test_frequent_words_are_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer("a red flag")["input_ids"]) == 5
    assert (
        tokenizer.decode(tokenizer("a red flag")["input_ids"], skip_special_tokens=True).strip()
        == "a red flag"
    )


def test_normalisation(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = tokenizer("red flag")["input_ids"]
    assert tokenizer("RED Flag")["input_ids"] == plain
    assert tokenizer("ｒｅｄ ﬂag")["input_ids"] == plain
    cased = train_tokenizer(CAPTIONS, vocabulary_size=400, lowercase=False)
    assert cased("RED flag")["input_ids"] != cased("red flag")["input_ids"]


@given(st.text(max_size=60))
def test_any_text_is_encoded_without_unknowns(text: str) -> None:
    tokenizer = _shared()
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == 2
    assert ids[-1] == 3
    literal = any(token in text for token in SPECIAL_TOKENS)
    assert literal or 1 not in ids
    assert max(ids) < len(tokenizer)


_TOKENIZERS: list[PreTrainedTokenizerFast] = []


def _shared() -> PreTrainedTokenizerFast:
    if not _TOKENIZERS:
        _TOKENIZERS.append(train_tokenizer(CAPTIONS, vocabulary_size=300))
    return _TOKENIZERS[0]


@pytest.mark.parametrize("text", ["", "   ", "\U0001f9ff\u200d\ufe0f", "\x00\x07", "ｆ" * 500, "́", "क्षि"])
def test_odd_texts(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert 1 not in ids


def test_truncation_keeps_the_end_token() -> None:
    tokenizer = train_tokenizer(CAPTIONS, vocabulary_size=300, max_length=8)
    ids = tokenizer("a red circle above a blue square and more and more", truncation=True)["input_ids"]
    assert len(ids) == 8
    assert ids[-1] == 3


def test_vocabulary_size() -> None:
    assert len(train_tokenizer(CAPTIONS, vocabulary_size=290)) == 290
    assert len(train_tokenizer(CAPTIONS, vocabulary_size=10_000)) < 1000
    rare = train_tokenizer(["zebra"], vocabulary_size=300, min_frequency=2)
    assert len(rare) == 261


def test_same_captions_same_tokenizer(tmp_path: Path) -> None:
    script = (
        "import sys; from jrl.data.tokenizer import train_tokenizer; "
        "captions = [f'word{i % 37} and thing{i % 11} ß{i % 5}' for i in range(400)]; "
        "captions = captions[::-1] if sys.argv[1] == '1' else captions; "
        "print(train_tokenizer(captions, vocabulary_size=420).backend_tokenizer.to_str())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script, turn],
            capture_output=True,
            text=True,
            check=True,
            env={
                **os.environ,
                "PYTHONHASHSEED": turn,
                "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            },
        ).stdout
        for turn in ("0", "1")
    }
    assert len(outputs) == 1


def test_save_and_load(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    folder = save_tokenizer(tokenizer, tmp_path / "deep" / "tokenizer")
    loaded = load_tokenizer(folder)
    for text in ("a RED flag", "赤い旗 x", "\U0001f9ff"):
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.model_max_length == tokenizer.model_max_length
    assert (loaded.pad_token, loaded.eos_token, loaded.mask_token) == ("[PAD]", "[EOS]", "[MASK]")
    assert loaded(["a", "a red flag"], padding=True)["input_ids"][0][-1] == 0

    save_tokenizer(train_tokenizer(["other words"], vocabulary_size=262), folder)
    assert len(load_tokenizer(folder)) < len(loaded)
    assert [p.name for p in folder.parent.iterdir()] == ["tokenizer"]


def test_a_lone_file_loads(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    folder = save_tokenizer(tokenizer, tmp_path / "tokenizer")
    loaded = load_tokenizer(folder / "tokenizer.json")
    assert loaded("a red flag")["input_ids"] == tokenizer("a red flag")["input_ids"]
    assert loaded.pad_token_id == 0


def test_nothing_half_written(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tokenizer(tokenizer, tmp_path / "tokenizer")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(self: PreTrainedTokenizerBase, path: str) -> None:
        (Path(path) / "tokenizer.json").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        save_tokenizer(tokenizer, folder)
    with pytest.raises(OSError, match="No space left"):
        save_tokenizer(tokenizer, tmp_path / "fresh")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer"]


def test_a_failed_replacement_puts_the_old_one_back(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tokenizer(tokenizer, tmp_path / "tokenizer")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    rename, calls = Path.rename, iter([True, False, True])

    def second_fails(self: Path, target: Path) -> Path:
        if not next(calls):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(OSError, match="Input/output error"):
        save_tokenizer(train_tokenizer(["other words"], vocabulary_size=262), folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer"]


def test_other_files_are_never_replaced(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds other files"):
        save_tokenizer(tokenizer, tmp_path)
    with pytest.raises(ValueError, match="holds other files"):
        save_tokenizer(tokenizer, tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_loading_says_what_is_wrong(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"expected a saved tokenizer in .* which holds no file"):
        load_tokenizer(tmp_path)
    broken = tmp_path / "tokenizer.json"
    broken.write_text("{")
    for path in (broken, tmp_path):
        with pytest.raises(ValueError, match=r"tokenizer: cannot read .*"):
            load_tokenizer(path)
    folder = save_tokenizer(tokenizer, tmp_path / "good")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["type"] = "Nonsense"
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="cannot read"):
        load_tokenizer(folder)


def test_a_tokenizer_without_padding_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(
        str(tmp_path / "tokenizer.json")
    )
    with pytest.raises(ValueError, match="padding token"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_tokenizers_of_transformers_load(tmp_path: Path) -> None:
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "flag"]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(str(tmp_path / "bert"))
    loaded = load_tokenizer(tmp_path / "bert")
    assert loaded("red flag")["input_ids"] == [2, 5, 6, 3]


@pytest.mark.parametrize(
    ("captions", "options", "error", "message"),
    [
        ([], {}, ValueError, "captions: expected at least one"),
        (["", "  "], {}, ValueError, "captions: expected at least one"),
        ("a red flag", {}, TypeError, "captions: expected several strings"),
        (["a", 3], {}, TypeError, "got int at position 1"),
        (["a"], {"vocabulary_size": 100}, ValueError, "vocabulary_size: expected at least 261, got 100"),
        (["a"], {"vocabulary_size": 1e3}, TypeError, "vocabulary_size: expected an int, got float"),
        (["a"], {"min_frequency": 0}, ValueError, "min_frequency: expected at least 1"),
        (["a"], {"max_length": 2}, ValueError, "max_length: expected at least 3"),
        (["a"], {"max_length": True}, TypeError, "max_length: expected an int, got bool"),
    ],
)
def test_argument_checks(
    captions: list[str], options: dict[str, int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train_tokenizer(captions, **options)
