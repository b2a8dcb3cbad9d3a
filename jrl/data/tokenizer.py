"""A small byte-level BPE tokenizer trained on captions, and the loading of any saved one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, UNK, CLS, EOS, MASK = "[PAD]", "[UNK]", "[CLS]", "[EOS]", "[MASK]"
SPECIAL_TOKENS = (PAD, UNK, CLS, EOS, MASK)
_SMALLEST = len(SPECIAL_TOKENS) + 256


def train_tokenizer(
    captions: Iterable[str],
    *,
    vocabulary_size: int = 4096,
    min_frequency: int = 2,
    max_length: int = 64,
    lowercase: bool = True,
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which encodes any text in any script without an unknown token.

    Text is normalised with NFKC and, by default, lower-cased. A caption becomes ``[CLS] tokens [EOS]``;
    padding is ``[PAD]`` (id 0) on the right. The result depends on the captions alone, not on their order.

    Args:
        captions: the texts to learn from; training captions only, so that nothing of a test set is seen.
        vocabulary_size: the most tokens, counting the 5 special ones and the 256 bytes.
        min_frequency: a merge must occur at least so often.
        max_length: tokens at which ``truncation=True`` cuts, counting ``[CLS]`` and ``[EOS]``.
        lowercase: fold case.

    Returns:
        A fast tokenizer of transformers.

    Raises:
        TypeError: a caption that is no string, or one string in place of several.
        ValueError: no caption, or a size out of range.
    """
    _check_count("vocabulary_size", vocabulary_size, _SMALLEST)
    _check_count("min_frequency", min_frequency, 1)
    _check_count("max_length", max_length, 3)
    texts = sorted(_checked(captions))
    if not texts:
        raise ValueError("captions: expected at least one that is not blank, got none")

    tokenizer = Tokenizer(models.BPE())
    steps: list[normalizers.Normalizer] = [normalizers.NFKC()]
    if lowercase:
        steps.append(normalizers.Lowercase())
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=min_frequency,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A {EOS}",
        pair=f"{CLS} $A {EOS} $B:1 {EOS}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (CLS, EOS)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        pad_token=PAD,
        unk_token=UNK,
        bos_token=CLS,
        cls_token=CLS,
        eos_token=EOS,
        sep_token=EOS,
        mask_token=MASK,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | os.PathLike[str]) -> Path:
    """Write a tokenizer to a folder, aside first and then renamed, so that a half-written one never stays.

    Args:
        tokenizer: any tokenizer of transformers.
        folder: where to write; a tokenizer that is there already is replaced.

    Returns:
        The path of the folder.

    Raises:
        ValueError: ``folder`` exists and holds something other than a tokenizer.
        OSError: the disk is full or the place not writable; ``folder`` is then as it was.
    """
    target = Path(folder).expanduser()
    if target.exists() and not (target.is_dir() and (not any(target.iterdir()) or _is_tokenizer(target))):
        raise ValueError(
            f"folder: expected a new path or a saved tokenizer, got {target}, which holds other files"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        tokenizer.save_pretrained(str(aside))
        # mkdtemp's folder is its owner's alone; a file of the tokenizer shows what the user's umask gives others
        mode = next(aside.iterdir()).stat().st_mode & 0o777
        aside.chmod(mode | (mode & 0o444) >> 2)
        old = aside.with_name(aside.name + ".old")
        if target.exists():
            target.rename(old)
        try:
            aside.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Load a tokenizer saved by ``save_tokenizer``, by transformers, or as a lone ``tokenizer.json``.

    Nothing is fetched from a network and no code from the folder is run.

    Args:
        path: the folder or the ``tokenizer.json``.

    Returns:
        The tokenizer; one without a padding token gets ``[PAD]`` only if its vocabulary holds it.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: no tokenizer there, an unreadable one, or one that cannot pad.
    """
    source = Path(path).expanduser()
    if not source.exists():
        raise FileNotFoundError(
            f"tokenizer: expected a folder or a tokenizer.json, found nothing at {source}"
        )
    if source.is_dir() and not _is_tokenizer(source):
        held = sorted(entry.name for entry in source.iterdir())[:5]
        raise ValueError(
            f"tokenizer: expected a saved tokenizer in {source}, which holds {held or 'no file'}"
        )
    try:
        tokenizer = _load(source)
    except Exception as error:  # the readers below raise bare Exception for a broken file
        raise ValueError(f"tokenizer: cannot read {source}: {type(error).__name__}: {error}") from error
    if tokenizer.pad_token is None:
        if PAD not in tokenizer.get_vocab():
            raise ValueError(f"tokenizer: expected one with a padding token, {source} has none")
        tokenizer.pad_token = PAD
    return tokenizer


def _load(source: Path) -> PreTrainedTokenizerBase:
    if source.is_dir():
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(source), local_files_only=True, trust_remote_code=False
        )
        return loaded
    backend = Tokenizer.from_file(str(source))
    vocabulary = backend.get_vocab()
    roles = {"pad_token": PAD, "unk_token": UNK, "cls_token": CLS, "bos_token": CLS, "eos_token": EOS}
    present: dict[str, Any] = {role: token for role, token in roles.items() if token in vocabulary}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **present)


def _is_tokenizer(folder: Path) -> bool:
    known = (
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
        "vocab.json",
        "spiece.model",
        "tokenizer.model",
    )
    return any((folder / name).is_file() for name in known)


def _checked(captions: Iterable[str]) -> Iterator[str]:
    if isinstance(captions, (str, bytes)):
        raise TypeError("captions: expected several strings, got a single one")
    for index, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise TypeError(f"captions: expected strings, got {type(caption).__name__} at position {index}")
        if caption.strip():
            yield caption


def _check_count(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
