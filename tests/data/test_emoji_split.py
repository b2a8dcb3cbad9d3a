from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from jrl.data.emoji_concepts import Concept
from jrl.data.emoji_split import SplitSizes, split_emoji


def _grid(bases: int, tones: int) -> dict[str, Concept]:
    return {
        f"{base}.{tone}": Concept(f"base {base}", (("tone", str(tone)),))
        for base in range(bases)
        for tone in range(tones)
    }


def _noise(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


def test_split_asks_for_enough() -> None:
    concepts = _grid(10, 8)
    sizes = SplitSizes(test_compositional=30, test_unseen=0, val_compositional=10, val_unseen=0)
    parts = split_emoji(concepts, _noise(80), sizes=sizes)
    assert Counter(parts.values()) == {"train": 40, "test_compositional": 30, "val_compositional": 10}
    with pytest.raises(ValueError, match=r"val_compositional: expected 20 pictures, .* allow only 10"):
        split_emoji(concepts, _noise(80), sizes=SplitSizes(30, 0, 20, 0))
    with pytest.raises(ValueError, match=r"test_unseen: expected 1 concept groups, .* allow only 0"):
        split_emoji(concepts, _noise(80), sizes=SplitSizes(0, 1, 0, 0))
    with pytest.raises(ValueError, match=r"thumbnails: expected \[80, H, W, 3\]"):
        split_emoji(concepts, _noise(79))
    with pytest.raises(ValueError, match="test_unseen: expected a count of at least 0"):
        SplitSizes(test_unseen=-1)
    with pytest.raises(TypeError, match="val_unseen: expected an int"):
        SplitSizes(val_unseen=1.5)


def test_unseen_groups_leave_as_a_whole() -> None:
    concepts = _grid(20, 3)
    parts = split_emoji(concepts, _noise(60), sizes=SplitSizes(0, 5, 0, 0))
    gone = {concepts[s].base for s, part in parts.items() if part == "test_unseen"}
    assert len(gone) == 5
    assert Counter(parts.values()) == {"train": 45, "held_out": 10, "test_unseen": 5}
    assert all((parts[s] == "train") == (concepts[s].base not in gone) for s in concepts)


def test_near_duplicates_are_never_unseen() -> None:
    concepts = _grid(12, 1)
    thumbnails = _noise(12)
    thumbnails[1] = np.clip(thumbnails[0].astype(int) + 3, 0, 255)
    sizes = SplitSizes(0, 10, 0, 0)
    parts = split_emoji(concepts, thumbnails, sizes=sizes)
    assert parts["0.0"] == parts["1.0"] == "train"
    with pytest.raises(ValueError, match="test_unseen"):
        split_emoji(concepts, thumbnails, sizes=sizes, never_test=["5.0"])
