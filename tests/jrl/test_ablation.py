"""`jrl ablate`: the variants' configurations, the table, going on where it stopped, refusals."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from jrl.cli import main
from jrl.downstream.ablation import VARIANTS, ablate, to_markdown, variant_config

SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
CONFIG: dict[str, Any] = {
    "seed_everything": 0,
    "trainer": {
        "callbacks": [
            {
                "class_path": "lightning.pytorch.callbacks.EarlyStopping",
                "init_args": {"monitor": "val/bound", "mode": "max"},
            }
        ],
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
    },
    "model": {
        "lr": 1e-3,
        "system": {
            "class_path": "jrl.systems.MutualInformation",
            "init_args": {
                "critic": {"dim": 8, "scale": None},
                "image_encoder": {
                    "class_path": "jrl.encoders.ImageEncoder",
                    "init_args": {
                        "model": {
                            "model_type": "resnet",
                            "embedding_size": 8,
                            "hidden_sizes": [8, 16],
                            "depths": [1, 1],
                            "layer_type": "basic",
                        }
                    },
                },
                "text_encoder": {
                    "class_path": "jrl.encoders.TextEncoder",
                    "init_args": {
                        "model": {
                            "model_type": "bert",
                            "vocab_size": 300,
                            "max_position_embeddings": 64,
                            **SMALL,
                        }
                    },
                },
            },
        },
    },
    "data": {
        "dataset": "scenes",
        "options": {
            "train": 32,
            "val": 8,
            "test": 2,
            "test_compositional": 2,
            "size": 32,
            "languages": ["en"],
        },
        "image_size": 32,
        "batch_size": 16,
        "vocab_size": 300,
        "max_length": 48,
    },
}


def test_variants_differ_in_what_they_say() -> None:
    systems = {name: variant_config(CONFIG, variant, 3, 1) for name, variant in VARIANTS.items()}
    arguments = {name: values["model"]["system"]["init_args"] for name, values in systems.items()}
    assert arguments["one_layer"] == {**CONFIG["model"]["system"]["init_args"], "layers": [{}]}
    assert arguments["deep_infomax"]["joint_weight"] == 0.0
    # what is embedded and what heads see is the same in every row
    assert not any("embedding" in values for values in arguments.values())
    assert len(arguments["several_with_both"]["layers"]) == 2
    for name, values in arguments.items():
        assert ("image_objective" in values) == (
            name in ("deep_infomax", "with_image", "with_both", "several_with_both")
        )
        assert ("text_objective" in values) == (name in ("with_text", "with_both", "several_with_both"))
    for side in ("image_to_text", "text_to_image"):
        assert arguments[side]["estimator"]["init_args"]["direction"] == side
    for values in systems.values():
        assert values["trainer"]["max_epochs"] == 3
        assert values["trainer"]["callbacks"] == []
        assert values["seed_everything"] == values["model"]["seed"] == 1
    assert CONFIG["trainer"]["callbacks"]


def test_masked_words_hide_no_special_token_of_ones_own_tokenizer(tmp_path: Path) -> None:
    def hidden(tokenizer: str | None) -> tuple[int, list[int]]:
        config = {**CONFIG, "data": {**CONFIG["data"], "tokenizer": tokenizer}}
        system = variant_config(config, VARIANTS["with_text"], None, 0)["model"]["system"]
        options = system["init_args"]["text_objective"]["init_args"]
        return options["mask_token_id"], options["special_token_ids"]

    assert hidden(None) == (4, [0, 1, 2, 3])
    words = ["[PAD]", "a", "red", "square", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    roles = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    for name, more in (("bert", {"mask_token": "[MASK]"}), ("none", {})):
        PreTrainedTokenizerFast(tokenizer_object=backend, **roles, **more).save_pretrained(tmp_path / name)
    assert hidden(str(tmp_path / "bert")) == (7, [0, 4, 5, 6])
    with pytest.raises(ValueError, match="need a mask token, and the tokenizer in"):
        hidden(str(tmp_path / "none"))


def test_encoders_of_two_widths(tmp_path: Path) -> None:
    """Without joint training nothing compares the two sides, so the table says nothing of retrieval."""
    config = deepcopy(CONFIG)
    text = config["model"]["system"]["init_args"]["text_encoder"]["init_args"]["model"]
    text["hidden_size"] = 24
    found = ablate(
        config, tmp_path, ["random", "deep_infomax"], ["classification", "retrieval"], scenes=8, head_epochs=1
    )
    assert set(found["random"]["scores"]) == {"classification", "retrieval"}
    assert set(found["deep_infomax"]["scores"]) == {"classification"}
    assert found["deep_infomax"]["grounding"] is None
    assert (tmp_path / "ablation.md").read_text().splitlines()[-1].endswith("| – | – | – | – |")


def test_trains_probes_and_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "config.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    arguments = [
        "ablate",
        "--traceback",
        "--config",
        str(path),
        "--out",
        str(out),
        "--scenes",
        "8",
        "--head-epochs",
        "1",
    ]
    arguments += ["--tasks", "classification,retrieval"]
    assert main([*arguments, "--variants", "random"]) == 0
    assert main([*arguments, "--variants", "random,several_with_both", "--minutes", "0.000001"]) == 0
    assert "several_with_both: left for another time" in capfd.readouterr().err
    assert set(json.loads((out / "ablation.json").read_text())) == {"random"}
    first = (out / "random" / "result.json").stat().st_mtime_ns
    assert main([*arguments, "--variants", "random,several_with_both"]) == 0
    assert (out / "random" / "result.json").stat().st_mtime_ns == first
    results = json.loads((out / "ablation.json").read_text())
    assert set(results) == {"random", "several_with_both"}
    assert results["random"]["bound"] is None
    assert isinstance(results["several_with_both"]["bound"], float)
    scores = results["several_with_both"]["scores"]
    assert set(scores) == {"classification", "retrieval"}
    grounding = results["several_with_both"]["grounding"]
    assert 0 <= grounding["pointing"] <= 1 and grounding["times_constant"] >= 0
    table = (out / "ablation.md").read_text()
    assert table.count("\n") == 4
    assert "| joint, two layers, both objectives |" in table
    # the result is gone but not the training: it is probed again, not trained again
    result, last = (out / "several_with_both" / name for name in ("result.json", "run/checkpoints/last.ckpt"))
    result.unlink()
    weights = last.stat().st_mtime_ns
    assert main([*arguments, "--variants", "several_with_both"]) == 0
    assert last.stat().st_mtime_ns == weights
    assert json.loads(result.read_text())["scores"] == scores
    # nor are results from before heads looked through the encoder alone
    older = json.loads(result.read_text())
    del older["settings"]["heads"]
    result.write_text(json.dumps(older))
    with pytest.raises(ValueError, match="holds the result of other settings"):
        main([*arguments, "--variants", "several_with_both"])
    # other settings would mix in one table what cannot be compared
    with pytest.raises(ValueError, match="holds the result of other settings"):
        main([*arguments, "--variants", "random", "--seed", "1"])


def test_table() -> None:
    def result(value: float, bound: float | None, found: dict[str, float] | None) -> dict[str, Any]:
        scores = {"vqa": {"metric": "accuracy", "scores": {"accuracy": value}}}
        return {"bound": bound, "scores": scores, "grounding": found}

    pointed = {"pointing": 0.421, "times_constant": 2.3}
    results = {"random": result(0.25, None, None), "one_layer": result(0.5, 1.234, pointed)}
    table = to_markdown(results, ["vqa"]).splitlines()
    assert table[0] == "| variant | vqa, accuracy | grounding, pointing | times the best constant | nats |"
    assert table[2:] == [
        "| random weights | 25.0 | – | – | – |",
        "| joint, one layer | **50.0** | 42.1 | 2.30 | 1.23 |",
    ]
    # a task that has no meaning for a variant, and one that has none for any
    results["deep_infomax"] = {**result(0.0, None, None), "scores": {}}
    assert to_markdown(results, ["retrieval", "vqa"]).splitlines()[:-1] == table
    assert to_markdown(results, ["vqa"]).splitlines()[-1] == "| Deep InfoMax alone | – | – | – | – |"


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="variants: expected some of random"):
        ablate(CONFIG, tmp_path, ["joint"])
    with pytest.raises(ValueError, match="tasks: expected some of"):
        ablate(CONFIG, tmp_path, ["random"], ["poetry"])
    with pytest.raises(ValueError, match="scenes: expected at least 8, got 7"):
        ablate(CONFIG, tmp_path, scenes=7)
    with pytest.raises(ValueError, match="minutes: expected a positive number, got 0"):
        ablate(CONFIG, tmp_path, minutes=0)
    with pytest.raises(ValueError, match=r"expected a MutualInformation system, got jrl.systems.CLIP"):
        ablate({"model": {"system": {"class_path": "jrl.systems.CLIP"}}}, tmp_path)
    with pytest.raises(ValueError, match="expected the configuration of a MutualInformation system"):
        ablate({}, tmp_path)
    with pytest.raises(FileNotFoundError, match="config: no file"):
        main(["ablate", "--traceback", "--config", str(tmp_path / "none.yaml")])
    (tmp_path / "random").mkdir()
    (tmp_path / "random" / "result.json").write_text("{")
    with pytest.raises(ValueError, match="not a result of this command"):
        ablate(CONFIG, tmp_path, ["random"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["random"]
