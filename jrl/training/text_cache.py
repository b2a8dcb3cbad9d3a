"""Embeddings of captions by a frozen text encoder, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from jrl.encoders import TextEncoder
from jrl.training.files import write_atomically

WORDS, GLOBALS, KEY = "words.npy", "globals.npy", "key.json"
_WHOSE = {
    "encoder": "another text encoder",
    "tokenizer": "another tokenizer",
    "captions": "other captions",
}


class TextCache:
    """What a text encoder says of N tokenised captions: words [N, T, E] and vectors [N, E], float32, read as they are needed.

    The folder also holds the digests (SHA-256) of the encoder's config and weights, of the tokenizer, of the captions and of the
    two files: embeddings of anything else are refused, and so are files that have changed.

    Args:
        folder: what `write` filled.
        expected: what `key_of` says of the encoder, the tokenizer and the captions now.

    Raises:
        FileNotFoundError: the folder holds no cache, or one that was not finished.
        ValueError: it is the cache of something else, or its files are damaged.
    """

    def __init__(self, folder: str | Path, expected: dict[str, str]) -> None:
        self.folder = Path(folder)
        try:
            key = json.loads((self.folder / KEY).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(f"text_cache: {self.folder} holds none") from None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"text_cache: {self.folder / KEY} is unreadable: {error}") from error
        stale = [_WHOSE[name] for name, digest in expected.items() if key.get(name) != digest]
        if stale:
            raise ValueError(
                f"text_cache: {self.folder} holds the embeddings of {', '.join(stale)}; "
                "delete it, or name another folder"
            )
        for name in (WORDS, GLOBALS):
            if not (self.folder / name).is_file() or key.get(name) != _digest_of_file(self.folder / name):
                raise ValueError(
                    f"text_cache: {self.folder / name} is missing or damaged; delete {self.folder}"
                )
        self._open()

    def rows(self, rows: Tensor, columns: slice) -> dict[str, Tensor]:
        """`word_features` [B, T', E] of these captions at these places, and `text_features` [B, E]."""
        at = rows.numpy()
        return {
            "word_features": torch.from_numpy(self._words[at, columns]),
            "text_features": torch.from_numpy(self._globals[at]),
        }

    def __getstate__(self) -> dict[str, Any]:
        # a memory map would travel to another process by value
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.folder = state["folder"]
        self._open()

    def _open(self) -> None:
        self._words = np.load(self.folder / WORDS, mmap_mode="r")
        self._globals = np.load(self.folder / GLOBALS, mmap_mode="r")


def key_of(
    encoder: TextEncoder,
    tokenizer: PreTrainedTokenizerBase,
    captions: Sequence[str],
    input_ids: Tensor,
    attention_mask: Tensor,
) -> dict[str, str]:
    """Digests of everything that the embeddings depend on."""
    weights = hashlib.sha256(json.dumps(encoder.to_config(), sort_keys=True).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        weights.update(name.encode())
        weights.update(_bytes(tensor))
    words = hashlib.sha256(json.dumps(list(captions)).encode())
    words.update(_bytes(input_ids))
    words.update(_bytes(attention_mask))
    fast = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.dumps(sorted(tokenizer.get_vocab().items())) if fast is None else fast.to_str()
    return {
        "encoder": weights.hexdigest(),
        "tokenizer": hashlib.sha256(rules.encode()).hexdigest(),
        "captions": words.hexdigest(),
    }


@torch.no_grad()
def write(
    folder: str | Path,
    encoder: TextEncoder,
    key: dict[str, str],
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    batch_size: int = 256,
) -> None:
    """Encode the captions into a folder; the key is written last, so a cache that was not finished counts as none.

    Args:
        folder: made when missing.
        encoder: in evaluation mode meanwhile; runs where it is.
        key: of `key_of`.
        input_ids, attention_mask: [N, T].
        batch_size: captions encoded together.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    count, length = input_ids.shape
    asides = {name: folder / f".{name}.writing" for name in (WORDS, GLOBALS)}
    was_training, device = encoder.training, next(encoder.parameters()).device
    encoder.eval()
    try:
        words = _new(asides[WORDS], (count, length, encoder.width))
        globals_ = _new(asides[GLOBALS], (count, encoder.width))
        for rows in torch.arange(count).split(batch_size):
            encoded = encoder(input_ids[rows].to(device), attention_mask[rows].to(device))
            words[rows.numpy()] = encoded.tokens.float().cpu().numpy()
            globals_[rows.numpy()] = encoded.global_.float().cpu().numpy()
        words.flush()
        globals_.flush()
        for name, aside in asides.items():
            os.replace(aside, folder / name)
    finally:
        encoder.train(was_training)
        for aside in asides.values():
            aside.unlink(missing_ok=True)
    digests = {name: _digest_of_file(folder / name) for name in asides}
    write_atomically(folder / KEY, json.dumps({**key, **digests}, indent=2).encode())


def _new(path: Path, shape: tuple[int, ...]) -> np.memmap[Any, np.dtype[np.float32]]:
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().flatten()
    return str((tensor.dtype, tuple(tensor.shape))).encode() + flat.view(torch.uint8).numpy().tobytes()


def _digest_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
