"""The Triton backend: launches the kernels of triton_attention and triton_streamed on NVIDIA GPUs.

No launch reads the GPU's memory or depends on what it holds, so every function here can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .sweep import EPS, Problem, Tile
from .triton_attention import (
    word_region_forward_kernel,
    word_region_gradient_kernel,
    word_region_gram_kernel,
)
from .triton_launch import Launch, block, fused
from .triton_streamed import word_region_statistics_kernel, word_region_tile_kernel

__all__ = ["block", "forward", "gradient_tile", "prepare"]


def prepare(tensor: Tensor) -> Tensor:
    """Matrix operands as they are, rows contiguous."""
    return tensor.contiguous()


def forward(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """match, log-sum-exp and norm [B, C, T] of every query with every image."""
    with torch.cuda.device_of(problem.keys):
        shape = (problem.keys.shape[0], *problem.queries.shape[:2])
        match, log_sum_exp, norm = (problem.attention_scale.new_empty(shape) for _ in range(3))
        if match.numel() > 0:
            (_fused_forward if fused(problem) else _streamed_forward)(problem, match, log_sum_exp, norm)
    return match, log_sum_exp, norm


def gradient_tile(
    problem: Problem,
    grad: Tensor,
    match: Tensor,
    log_sum_exp: Tensor,
    norm: Tensor,
    b0: int,
    b1: int,
    c0: int,
    c1: int,
) -> Tile:
    """Gradients of the scores of images b0:b1 with captions c0:c1, in the operands' dtype."""
    with torch.cuda.device_of(problem.keys):
        operands = problem.keys
        shape = ((c1 - c0) * problem.queries.shape[1], b1 - b0, operands.shape[1])
        wanted = (True, problem.key_values is not None, problem.cosine, problem.cosine)
        da, du, alpha, weighted = (operands.new_empty(shape) if each else None for each in wanted)
        unit = _unit(problem, grad, norm)
        arguments = {
            "grad_ptr": grad.contiguous(),
            "match_ptr": match.contiguous(),
            "log_sum_exp_ptr": log_sum_exp.contiguous(),
            "norm_ptr": norm.contiguous(),
            "unit_ptr": unit,
            "da_ptr": da,
            "du_ptr": du,
            "alpha_ptr": alpha,
            "weighted_ptr": weighted,
            "UNIT": unit is not None,
        }
        gradient = _fused_gradient if fused(problem) else _streamed_gradient
        dscale = gradient(problem, arguments, b0, b1, c0, c1)
    assert da is not None
    return Tile(da, du, alpha, weighted, dscale if unit is None else dscale * unit, unit)


def _unit(problem: Problem, grad: Tensor, norm: Tensor) -> Tensor | None:
    """What a tile in float16 is divided by, lest the gradient of a mean over many pairs be lost: the largest slope dL/dn.

    Not of contexts or queries that are 0: a cosine divides them by EPS, and next to their slopes all others would be lost.
    """
    if problem.keys.dtype != torch.float16:
        return None
    counts = norm > EPS
    if problem.query_mask is not None:
        counts &= problem.query_mask
    if problem.cosine:
        compared = problem.queries if problem.query_values is None else problem.query_values
        counts &= (compared != 0).any(-1)
    slope = torch.where(counts, grad / norm, 0.0).abs().amax()
    return torch.where((slope > 0) & slope.isfinite(), slope, 1.0)


def _area(b0: int, b1: int, c0: int, c1: int) -> dict[str, int]:
    return {"image_start": b0, "images": b1 - b0, "caption_start": c0, "caption_end": c1}


def _gram(problem: Problem, launch: Launch, b0: int, b1: int) -> dict[str, Any]:
    """Cosines between the values of each image and their lengths, from which the norms of contexts come."""
    if not problem.cosine:
        return {"gram_ptr": None, "length_ptr": None, "COSINE": False, "NORM_PRECISION": "ieee"}
    values, mask, size = launch.values[b0:b1], launch.operands["key_mask_ptr"], launch.keys
    exact = _exact(problem)
    gram = values.new_empty(b1 - b0, size, size, dtype=exact)
    length = values.new_empty(b1 - b0, size, dtype=torch.float32)
    word_region_gram_kernel[(b1 - b0,)](
        value_ptr=values,
        mask_ptr=None if mask is None else mask[b0:b1],
        gram_ptr=gram,
        length_ptr=length,
        regions=launch.regions,
        depth=values.shape[2],
        MASKED=mask is not None,
        EVEN_D=launch.operands["EVEN_E"],
        BLOCK_R=size,
        **launch.steps,
    )
    # Three TF32 products have float32's digits, at a matrix unit's speed.
    precision = "tf32" if launch.operands["PRECISION"] == "tf32" else "tf32x3"
    return {
        "gram_ptr": gram,
        "length_ptr": length,
        "COSINE": True,
        "NORM_PRECISION": precision if exact == torch.float32 else "ieee",
    }


def _fused_forward(problem: Problem, match: Tensor, log_sum_exp: Tensor, norm: Tensor) -> None:
    launch = Launch(problem, "fused forward")
    images, captions, _ = match.shape
    tiles = launch.row_tiles(captions)
    word_region_forward_kernel[(images * tiles,)](
        **launch.operands,
        **_gram(problem, launch, 0, images),
        match_ptr=match,
        log_sum_exp_ptr=log_sum_exp,
        norm_ptr=norm,
        row_tiles=tiles,
    )


def _fused_gradient(
    problem: Problem, arguments: dict[str, Any], b0: int, b1: int, c0: int, c1: int
) -> Tensor:
    launch = Launch(problem, "fused gradient")
    tiles = launch.row_tiles(c1 - c0)
    dscale = problem.attention_scale.new_zeros(b1 - b0, (c1 - c0) * launch.words)
    word_region_gradient_kernel[((b1 - b0) * tiles,)](
        **launch.operands,
        **_gram(problem, launch, b0, b1),
        **arguments,
        **_area(b0, b1, c0, c1),
        dscale_ptr=dscale,
        row_tiles=tiles,
    )
    return dscale


def _statistics(
    problem: Problem, match: Tensor | None, log_sum_exp: Tensor | None, area: dict[str, int]
) -> Tensor | None:
    """Fills match and log_sum_exp where they are given; the index attended to [B, C, T] if `hard`."""
    launch = Launch(problem, "statistics")
    index = None
    if problem.hard:
        shape = (problem.keys.shape[0], *problem.queries.shape[:2])
        index = torch.empty(shape, dtype=torch.int32, device=problem.keys.device)
    if index is not None or log_sum_exp is not None:
        tiles = launch.row_tiles(area["caption_end"] - area["caption_start"])
        word_region_statistics_kernel[(area["images"] * tiles,)](
            **launch.operands,
            match_ptr=match,
            log_sum_exp_ptr=log_sum_exp,
            index_ptr=index,
            row_tiles=tiles,
            **{name: value for name, value in area.items() if name != "images"},
        )
    return index


def _streamed_forward(problem: Problem, match: Tensor, log_sum_exp: Tensor, norm: Tensor) -> None:
    images, captions, words = match.shape
    everything = _area(0, images, 0, captions)
    index = _statistics(problem, None if problem.cosine else match, log_sum_exp, everything)
    if not problem.cosine:
        norm.fill_(1.0)
        return
    some_images, some_captions = block(problem)
    for b0 in range(0, images, some_images):
        b1 = min(b0 + some_images, images)
        values, length = _unit_values(problem, b0, b1)
        for c0 in range(0, captions, some_captions):
            c1 = min(c0 + some_captions, captions)
            mean, contexts = _contexts(problem, values, log_sum_exp, index, b0, b1, c0, c1)
            size = torch.linalg.vector_norm(contexts, dim=2, dtype=norm.dtype) * length
            size = size.clamp(min=EPS)
            norm[b0:b1, c0:c1] = size.view(b1 - b0, c1 - c0, words)
            match[b0:b1, c0:c1] = (mean / size).view(b1 - b0, c1 - c0, words)


def _exact(problem: Problem) -> torch.dtype:
    """What holds numbers up to 1 best among the dtypes that matrix units multiply as fast as the operands'."""
    return torch.float32 if problem.keys.dtype == torch.float32 else torch.float16


def _unit_values(problem: Problem, b0: int, b1: int) -> tuple[Tensor, Tensor]:
    """The values of images b0:b1 over the length of each image's longest, and those lengths [images, 1]."""
    values = problem.values[b0:b1]
    length = torch.linalg.vector_norm(values, dim=2, dtype=torch.float32).amax(1, keepdim=True)
    length = length.masked_fill(length == 0.0, 1.0)
    return (values / length.unsqueeze(2)).to(_exact(problem)), length


def _tile(
    problem: Problem, work: str, arguments: dict[str, Any], b0: int, b1: int, c0: int, c1: int
) -> Tensor:
    """One launch; returns parts [tiles of keys, images, queries] of each query's match or dL/dattention_scale."""
    launch = Launch(problem, work)
    tiles = launch.row_tiles(c1 - c0)
    programs = (b1 - b0) * tiles * launch.key_tiles
    parts = problem.attention_scale.new_zeros(launch.key_tiles, b1 - b0, (c1 - c0) * launch.words)
    names = (
        "grad_ptr",
        "match_ptr",
        "norm_ptr",
        "spread_ptr",
        "length_ptr",
        "unit_ptr",
        "da_ptr",
        "du_ptr",
        "weighted_ptr",
    )
    word_region_tile_kernel[(programs,)](
        **launch.operands,
        **{**dict.fromkeys(names), "UNIT": False, **arguments},
        **_area(b0, b1, c0, c1),
        part_ptr=parts,
        row_tiles=tiles,
        GRADIENT=work == "gradient",
        COSINE=problem.cosine,
    )
    return parts


def _contexts(
    problem: Problem,
    values: Tensor,
    log_sum_exp: Tensor,
    index: Tensor | None,
    b0: int,
    b1: int,
    c0: int,
    c1: int,
) -> tuple[Tensor, Tensor]:
    """The attention's mean of u [images, queries] and of `values` [images, queries, E] for a tile."""
    shape = ((c1 - c0) * problem.queries.shape[1], b1 - b0, problem.keys.shape[1])
    alpha = values.new_empty(shape)
    arguments = {"log_sum_exp_ptr": log_sum_exp, "index_ptr": index, "alpha_ptr": alpha}
    parts = _tile(problem, "attention", arguments, b0, b1, c0, c1)
    return parts.sum(0), torch.bmm(alpha.transpose(0, 1), values)


def _streamed_gradient(
    problem: Problem, arguments: dict[str, Any], b0: int, b1: int, c0: int, c1: int
) -> Tensor:
    index = _statistics(problem, None, None, _area(b0, b1, c0, c1))
    arguments = {**arguments, "index_ptr": index}
    if problem.cosine:
        values, length = _unit_values(problem, b0, b1)
        _, contexts = _contexts(problem, values, arguments["log_sum_exp_ptr"], index, b0, b1, c0, c1)
        # Along the contexts, but of length 1: its products with the values are at most 1 as well.
        contexts *= (length / arguments["norm_ptr"][b0:b1, c0:c1].flatten(1)).unsqueeze(2)
        spread = values.new_empty(arguments["da_ptr"].shape)
        torch.bmm(contexts, values.mT, out=spread.transpose(0, 1))
        arguments |= {"spread_ptr": spread, "length_ptr": length}
    return _tile(problem, "gradient", arguments, b0, b1, c0, c1)
