"""The attention of the words of captions over the regions of their pictures, from any system that can say it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import PIL.Image
import torch
from torch import Tensor

from jrl.downstream.features import token_map
from jrl.encoders import WordRegions
from jrl.systems import CLIP, System
from jrl.training.run import Run

# half-precision attention sums to one only so far
_SUM_TOLERANCE = 1e-2


class Grounder(Protocol):
    """What can say which regions each word attends to."""

    def word_regions(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> WordRegions:
        """Attention of B captions over their own pictures."""


class ProjectedTokens:
    """The parts that image tokens and word tokens have in the cosine of a CLIP that pools by the mean.

        cos = (mean_r x_r) · (mean_t y_t) / (|mean_r x_r| |mean_t y_t|) = mean_tr a_tr
        a_tr = x_r · y_t / (|mean_r x_r| |mean_t y_t|),  attention_tr = softmax over r of a_tr

    x_r and y_t are the tokens after the linear projections. Both equalities need that the pooled vector is the mean of
    the tokens and the projection is linear, so no other CLIP can be asked in this way: its tokens were never
    compared in training. A class token in front of the patches takes part in the mean but is no region.

    Args:
        system: a CLIP.

    Raises:
        ValueError: it pools otherwise, or a projection is not linear.
    """

    def __init__(self, system: CLIP) -> None:
        poolings = system.image_encoder.pooling, system.text_encoder.pooling
        kinds = system.image_projection.kind, system.text_projection.kind
        if poolings != ("mean", "mean") or kinds != ("linear", "linear"):
            raise ValueError(
                "system: only a CLIP with pooling 'mean' on both sides and linear projections compares its tokens, "
                f"got pooling {poolings[0]!r} and {poolings[1]!r}, projections {kinds[0]!r} and {kinds[1]!r}"
            )
        self.system = system

    def word_regions(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> WordRegions:
        """Attention [B, T, R] of all tokens that `attention_mask` [B, T] keeps."""
        image = self.system.image_encoder(pixel_values)
        text = self.system.text_encoder(input_ids, attention_mask)
        cells = token_map(image.tokens)
        rows, columns = cells.shape[2:]
        x = self.system.image_projection(cells.flatten(2).transpose(1, 2)).float()
        y = self.system.text_projection(text.tokens).float()
        x_mean = self.system.image_projection(image.global_).float()
        y_mean = self.system.text_projection(text.global_).float()
        norms = (x_mean.norm(dim=-1) * y_mean.norm(dim=-1)).clamp(min=1e-12)
        parts = torch.einsum("btd,brd->btr", y, x) / norms[:, None, None]
        return WordRegions(parts.softmax(dim=-1), (rows, columns), attention_mask.bool())


def grounder(system: System) -> Grounder:
    """What says which regions the words of a system attend to: the system itself, or its projected tokens.

    Raises:
        TypeError: the system has no `word_regions` and is no CLIP.
        ValueError: it is a CLIP whose tokens are not compared, see `ProjectedTokens`.
    """
    if callable(getattr(system, "word_regions", None)):
        return system  # type: ignore[return-value]
    if isinstance(system, CLIP):
        return ProjectedTokens(system)
    raise TypeError(
        f"system: {type(system).__name__} cannot ground words: it has no "
        "word_regions(pixel_values, input_ids, attention_mask)"
    )


@dataclass(frozen=True)
class WordMaps:
    """The words of one caption, each with its attention.

    Attributes:
        caption: the text.
        spans: characters of each token that has some.
        attention: [T, R] float64 of those tokens.
        grid: rows and columns of the regions.
        shift: of their centres, see `WordRegions`.
    """

    caption: str
    spans: tuple[tuple[int, int], ...]
    attention: Tensor
    grid: tuple[int, int]
    shift: tuple[float, float] = (0.0, 0.0)

    def phrase(self, start: int, end: int) -> Tensor | None:
        """[rows, columns]: the most that any token of the characters `start:end` attends; None without a token.

        A token belongs to the characters that it shares at least one with, white space apart.
        """
        own = [i for i, (first, last) in enumerate(self.spans) if first < end and last > start]
        return self.attention[own].amax(dim=0).reshape(self.grid) if own else None


@torch.no_grad()
def attend(
    run: Run, system: Grounder, pictures: Sequence[PIL.Image.Image], captions: Sequence[str]
) -> list[WordMaps]:
    """Let the words of some captions attend to their pictures.

    Args:
        run: its tokenizer, preprocessing and device.
        system: of the run, or its twin.
        pictures, captions: B of each.

    Raises:
        TypeError: the system returns something else than `WordRegions`.
        ValueError: a caption has no word after tokenisation, the tokenizer does not say which characters a token
            covers, or the attention does not fit.
    """
    if not run.tokenizer.is_fast:
        raise ValueError(
            f"tokenizer: expected one that says which characters a token covers (a fast one), "
            f"got {type(run.tokenizer).__name__}"
        )
    tokens = run.tokenizer(
        list(captions),
        padding=True,
        truncation=True,
        max_length=run.max_length,
        return_tensors="pt",
        return_offsets_mapping=True,
    )
    pixels = torch.stack([run.transform(picture) for picture in pictures]).to(run.device)
    input_ids, attention_mask = tokens["input_ids"], tokens["attention_mask"]
    said = system.word_regions(pixels, input_ids.to(run.device), attention_mask.to(run.device))
    attention, mask = _checked(said, input_ids)
    found = []
    for row, caption in enumerate(captions):
        spans = [_trim(caption, *span) for span in tokens["offset_mapping"][row].tolist()]
        kept = [i for i, (first, last) in enumerate(spans) if first < last and mask[row, i]]
        if not kept:
            raise ValueError(f"caption: expected words, none is left of {caption!r} after tokenisation")
        own = attention[row, kept].double()
        found.append(WordMaps(caption, tuple(spans[i] for i in kept), own, said.grid, said.shift))
    return found


def _trim(caption: str, start: int, end: int) -> tuple[int, int]:
    """The span without the white space at its ends, which tokenizers count to the word that follows."""
    words = caption[start:end]
    return start + len(words) - len(words.lstrip()), start + len(words.rstrip())


def _checked(said: WordRegions, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(said, WordRegions):
        raise TypeError(f"word_regions: expected it to return WordRegions, got {type(said).__name__}")
    attention, mask = said.attention.float().cpu(), said.mask.bool().cpu()
    rows, columns = said.grid
    if not all(abs(by) <= 1 for by in said.shift):
        raise ValueError(f"word_regions: expected a shift of no more than one region, got {said.shift}")
    expected = [*input_ids.shape, rows * columns]
    if list(attention.shape) != expected or mask.shape != input_ids.shape:
        raise ValueError(
            f"word_regions: expected attention {expected} on a grid of {rows}x{columns} and a mask {expected[:2]}, "
            f"got {list(attention.shape)} and {list(mask.shape)}"
        )
    real = attention[mask]
    if not bool((real >= 0).all()) or not bool(((real.sum(dim=-1) - 1).abs() < _SUM_TOLERANCE).all()):
        raise ValueError(
            "word_regions: expected the attention of each real word to sum to one, got otherwise"
        )
    return attention, mask
