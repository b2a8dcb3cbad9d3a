"""All of it at once, as numbers and as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from jrl.evaluation.retrieval import chance_recall, retrieval_metrics, retrieval_ranks
from jrl_kernels import info_nce

DIRECTIONS = {"i2t": "image to text", "t2i": "text to image"}


@torch.no_grad()
def info_nce_bound(image: Tensor, text: Tensor, scale: float) -> dict[str, float]:
    """Lower bound log N − loss of the mutual information of N pairs, in nats.

    Args:
        image: [N, D] float of unit length, row i paired with row i of `text`.
        text: [N, D] float of unit length.
        scale: of the logits.

    Returns:
        The mean of both directions, and the ceiling log N that it cannot pass.
    """
    loss = info_nce(image, text, scale=scale)
    ceiling = math.log(len(image))
    return {"bound_nats": ceiling - float(loss), "bound_ceiling": ceiling}


@torch.no_grad()
def evaluate(
    image: Tensor, text: Tensor, caption_image: Tensor | None = None, *, scale: float | None = None
) -> dict[str, float]:
    """Retrieval both ways and the InfoNCE bound of one set of pictures and captions.

    Args:
        image: [N, D] embeddings of unit length.
        text: [C, D] embeddings of unit length.
        caption_image: [C] int64, the picture of each caption; caption i belongs to picture i when None.
        scale: temperature of the bound, over the first caption of each picture; no bound when None.

    Returns:
        `{i2t,t2i}_{r1,r5,r10,median_rank,mean_rank}`, `mean_recall` (mean of the six), `pictures`,
        `captions`, `bound_nats` and `bound_ceiling`.

    Raises:
        TypeError, ValueError: see `retrieval_ranks`.
    """
    ranks = retrieval_ranks(image, text, caption_image)
    result: dict[str, float] = {}
    for direction, values in (("i2t", ranks.image_to_text), ("t2i", ranks.text_to_image)):
        result.update({f"{direction}_{name}": value for name, value in retrieval_metrics(values).items()})
    result["mean_recall"] = sum(result[f"{d}_r{k}"] for d in DIRECTIONS for k in (1, 5, 10)) / 6
    result["pictures"], result["captions"] = float(len(image)), float(len(text))
    if scale is not None:
        result.update(info_nce_bound(image, text[_first_captions(caption_image, len(image))], scale))
    return result


def to_markdown(results: Mapping[str, Mapping[str, float]]) -> str:
    """A table of retrieval results beside chance, one row for each part and direction.

    Args:
        results: what `evaluate` returned, by the name of the part.
    """
    lines = [
        "| part | direction | R@1 | R@5 | R@10 | median rank | mean rank | chance R@1 / R@10 | nats |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for part, result in results.items():
        for direction, words in DIRECTIONS.items():
            recalls = " | ".join(f"{100 * result[f'{direction}_r{k}']:.1f}%" for k in (1, 5, 10))
            chance = " / ".join(f"{100 * _chance(result, direction, k):.1f}%" for k in (1, 10))
            bound = "–"
            if "bound_nats" in result:
                bound = f"{result['bound_nats']:.2f}"
            if "bound_ceiling" in result:
                bound += f" of at most {result['bound_ceiling']:.2f}"
            lines.append(
                f"| {part} | {words} | {recalls} | {result[f'{direction}_median_rank']:.0f} "
                f"| {result[f'{direction}_mean_rank']:.1f} | {chance} | {bound} |"
            )
    return "\n".join(lines)


def _chance(result: Mapping[str, float], direction: str, k: int) -> float:
    pictures, captions = int(result["pictures"]), int(result["captions"])
    if direction == "t2i":
        return chance_recall(k, pictures)
    # exact when every picture has as many captions as the others
    return chance_recall(k, captions, max(1, round(captions / pictures)))


def _first_captions(caption_image: Tensor | None, pictures: int) -> Tensor:
    if caption_image is None:
        return torch.arange(pictures)
    first = torch.full((pictures,), len(caption_image), dtype=torch.int64, device=caption_image.device)
    positions = torch.arange(len(caption_image), device=caption_image.device)
    return first.scatter_reduce(0, caption_image, positions, reduce="amin")
