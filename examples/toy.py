"""What the examples share: pictures and captions made here, a tiny BERT, and the flags."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}
SHAPES = ("square", "disc", "cross", "frame")
WORDS = ["<pad>", "<start>", *COLOURS, *SHAPES, "<end>"]


class Progress:
    """The flags of an example, and a line every so many steps."""

    def __init__(self, description: str | None, steps: int, batch: int) -> None:
        parser = argparse.ArgumentParser(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("--steps", type=int, default=steps)
        parser.add_argument("--batch", type=int, default=batch)
        parser.add_argument("--host", action="store_true", help="train with the library's own loss")
        given = parser.parse_args()
        if given.steps < 1 or given.batch < 2:
            parser.error("expected --steps of at least 1 and --batch of at least 2")
        self.steps, self.batch, self.host = given.steps, given.batch, given.host
        self.start = time.perf_counter()
        torch.manual_seed(0)

    def __call__(self, step: int, loss: Tensor) -> None:
        if step == 1 or step % 25 == 0:
            print(f"step {step:4d}  loss {loss.item():.4f}  {time.perf_counter() - self.start:.1f} s")


def pictures(count: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """Coloured shapes near the middle, on noise: [count, 3, size, size], and which of 16 each is."""
    kinds = torch.cat([torch.randperm(16) for _ in range(1 + count // 16)])[:count]
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    images = 0.2 * torch.randn(count, 3, size, size)
    for image, kind in zip(images, kinds.tolist(), strict=True):
        across, down = torch.randint(size // 2 - 2, size // 2 + 3, (2,))
        dx, dy = (x - across).abs(), (y - down).abs()
        inside = torch.maximum(dx, dy) <= 6
        shape = SHAPES[kind % 4]
        if shape == "disc":
            inside = dx**2 + dy**2 <= 36
        elif shape == "cross":
            inside = inside & (torch.minimum(dx, dy) <= 2)
        elif shape == "frame":
            inside = inside & (torch.maximum(dx, dy) >= 4)
        colour = torch.tensor(list(COLOURS.values())[kind // 4], dtype=torch.float32)
        image[:, inside] += colour[:, None]
    return images, kinds


def words(kinds: Tensor) -> Tensor:
    """[count, 4]: start, colour, shape, end."""
    ends = torch.ones_like(kinds), torch.full_like(kinds, len(WORDS) - 1)
    return torch.stack([ends[0], 2 + kinds // 4, 6 + kinds % 4, ends[1]], 1)


def sentences(kinds: Tensor) -> tuple[list[str], list[str]]:
    """Two ways to say what is seen."""
    pairs = [(list(COLOURS)[kind // 4], SHAPES[kind % 4]) for kind in kinds.tolist()]
    return [f"a {c} {s} in the middle" for c, s in pairs], [f"the {s} that is {c}" for c, s in pairs]


def tiny_bert(folder: Path) -> str:
    """A BERT with random weights and its tokenizer, saved to a folder, for libraries that load by name."""
    from transformers import BertConfig, BertModel, BertTokenizer

    known = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *COLOURS,
        *SHAPES,
        "a",
        "in",
        "the",
        "middle",
        "that",
        "is",
    ]
    (folder / "vocab.txt").write_text("\n".join(known))
    config = BertConfig(
        vocab_size=len(known),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


def matched(scores: Tensor) -> None:
    """How often row i of 16 likes column i best."""
    correct = (scores.argmax(dim=1) == torch.arange(len(scores))).float().mean()
    print(f"of {len(scores)}, matched: {correct:.0%}")
