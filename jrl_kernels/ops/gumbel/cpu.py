"""The CPU backend: a BLAS multiplies tiles of a few images or rows, C++ loops of the extension do everything else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ... import _extension
from ..._checks import accumulation
from ..._extension import pointer
from .entries import drawn

TILE_BYTES = 4 << 20


def _prepare(tensor: Tensor) -> Tensor:
    return tensor.to(accumulation(tensor.dtype)).contiguous()


def _launch(name: str, like: Tensor, *arguments: int | float) -> None:
    suffix = "f64" if like.dtype == torch.float64 else "f32"
    _extension.launch(f"gumbel_{name}_{suffix}_cpu", *arguments)


def _parts(count: int, elements: int, like: Tensor) -> Iterator[tuple[int, int]]:
    """Ranges of `count` items of so many elements each that fill a tile."""
    step = max(1, TILE_BYTES // max(1, elements * like.element_size()))
    for start in range(0, count, step):
        yield start, min(start + step, count)


def assign_forward(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: Tensor,
    seed: Tensor | None,
    key_mask: Tensor | None,
    tau: float,
    eps: float,
    hard: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    scaled, k, v = _prepare(queries) * scale, _prepare(keys), _prepare(values)
    mask = None if key_mask is None else key_mask.contiguous()
    images, groups, _ = queries.shape
    tokens, width = values.shape[1:]
    index = torch.empty(images, tokens, dtype=torch.int64)
    log_sum_exp = v.new_empty(images, tokens)
    share, means = v.new_zeros(images, groups), v.new_zeros(images, groups, width)
    for b0, b1 in _parts(images, groups * tokens, v):
        count = b1 - b0
        z = torch.bmm(scaled[b0:b1], k[b0:b1].mT)
        scratch = v.new_empty(count, 2, tokens)
        found = pointer(index, b0 * tokens), pointer(log_sum_exp, b0 * tokens)
        masked = pointer(mask, b0 * tokens)
        size = count, groups, tokens
        _launch(
            "assign_statistics",
            v,
            pointer(z),
            *size,
            b0,
            pointer(seed),
            tau,
            masked,
            *found,
            pointer(scratch),
        )
        at = pointer(share, b0 * groups)
        if hard:
            total = pointer(means, b0 * groups * width)
            _launch("assign_sums", v, pointer(v, b0 * tokens * width), *size, width, *found, at, total)
        else:
            _launch("assign_probabilities", v, pointer(z), *size, tau, masked, found[1], at)
            torch.bmm(z, v[b0:b1], out=means[b0:b1])
    weight = share + eps
    means *= torch.where(weight == 0, 0.0, 1 / weight)[:, :, None]
    return means.to(values.dtype, copy=True), index, log_sum_exp, share, means


def assign_backward(
    grad: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: Tensor,
    seed: Tensor | None,
    key_mask: Tensor | None,
    index: Tensor,
    log_sum_exp: Tensor,
    share: Tensor,
    means: Tensor,
    wanted: Sequence[bool],
    tau: float,
    eps: float,
    hard: bool,
) -> tuple[Tensor | None, ...]:
    q, k, v, du = _prepare(queries), _prepare(keys), _prepare(values), _prepare(grad)
    scaled = q * scale
    mask = None if key_mask is None else key_mask.contiguous()
    images, groups, _ = queries.shape
    tokens, width = values.shape[1:]
    weight = share + eps
    inverse = torch.where(weight == 0, 0.0, 1 / weight)
    center = (du * means).sum(2)
    dq = torch.empty_like(q) if wanted[0] or wanted[3] else None
    dk = torch.empty_like(k) if wanted[1] else None
    dv = torch.empty_like(v) if wanted[2] else None
    through = dq is not None or dk is not None or not hard
    for b0, b1 in _parts(images, groups * tokens, v) if through else ():
        count = b1 - b0
        z, dots = torch.bmm(scaled[b0:b1], k[b0:b1].mT), torch.bmm(du[b0:b1], v[b0:b1].mT)
        masked, sums = pointer(mask, b0 * tokens), pointer(log_sum_exp, b0 * tokens)
        sides = pointer(inverse, b0 * groups), pointer(center, b0 * groups)
        size = count, groups, tokens
        scratch = v.new_empty(count, tokens)
        tiles = pointer(z), pointer(dots)
        _launch(
            "assign_gradient",
            v,
            *tiles,
            *size,
            b0,
            pointer(seed),
            tau,
            masked,
            sums,
            *sides,
            pointer(scratch),
        )
        if dq is not None:
            torch.bmm(dots, k[b0:b1], out=dq[b0:b1])
        if dk is not None:
            torch.bmm(dots.mT, scaled[b0:b1], out=dk[b0:b1])
        if dv is not None and not hard:
            torch.bmm(z.mT, du[b0:b1], out=dv[b0:b1])
    if dv is not None and hard:
        size = images, groups, tokens
        _launch("assign_spread", v, pointer(du), *size, width, pointer(index), pointer(inverse), pointer(dv))
    dscale = None
    if dq is not None:
        dscale = (dq * q).sum() if wanted[3] else None
        dq *= scale
    return dq, dk, dv, dscale


def embed_forward(
    logits: Tensor, codebook: Tensor, seed: Tensor | None, k: int, tau: float, hard: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, codes = logits.shape
    wide = accumulation(logits.dtype)
    index = torch.empty(rows, k, dtype=torch.int64)
    log_sum_exp = torch.empty(rows, dtype=wide)
    table = codebook if hard else _prepare(codebook)
    embedding = table.new_empty(rows, k, table.shape[1])
    for r0, r1 in _parts(rows, codes, log_sum_exp):
        z = logits[r0:r1].to(wide, copy=True, memory_format=torch.contiguous_format)
        size = r1 - r0, codes, r0
        found = pointer(index, r0 * k), pointer(log_sum_exp, r0)
        _launch("embed_statistics", z, pointer(z), *size, pointer(seed), tau, k, *found)
        if not hard:
            # The noise is in z already.
            _launch("embed_probabilities", z, pointer(z), *size, 0, tau, found[1])
            torch.mm(z, table, out=embedding[r0:r1, 0])
    if hard:
        return drawn(codebook, index, log_sum_exp), index, log_sum_exp
    return embedding.to(codebook.dtype), index, log_sum_exp


def embed_backward(
    grad: Tensor,
    logits: Tensor,
    codebook: Tensor,
    seed: Tensor | None,
    index: Tensor,
    log_sum_exp: Tensor,
    wanted: Sequence[bool],
    k: int,
    tau: float,
    hard: bool,
) -> tuple[Tensor | None, ...]:
    rows, codes = logits.shape
    table, de = _prepare(codebook), _prepare(grad)
    dlogits = torch.empty(logits.shape, dtype=logits.dtype) if wanted[0] else None
    dtable = torch.zeros_like(table) if wanted[1] else None
    total = de.sum(1)
    soft_table = dtable is not None and not hard
    for r0, r1 in _parts(rows, codes, table) if wanted[0] or soft_table else ():
        p = logits[r0:r1].to(table.dtype, copy=True, memory_format=torch.contiguous_format)
        size = r1 - r0, codes
        _launch("embed_probabilities", p, pointer(p), *size, r0, pointer(seed), tau, pointer(log_sum_exp, r0))
        if soft_table:
            assert dtable is not None
            dtable.addmm_(p.T, total[r0:r1])
        if dlogits is not None:
            da = torch.mm(total[r0:r1], table.T)
            _launch("embed_gradient", p, pointer(p), pointer(da), *size, tau)
            dlogits[r0:r1] = da
    if dtable is not None and hard:
        entries = rows * k, table.shape[1]
        _launch("embed_scatter", table, pointer(de), *entries, pointer(index), pointer(dtable))
    return dlogits, dtable
