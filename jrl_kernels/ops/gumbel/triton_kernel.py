"""The Triton backend: launches the kernels of triton_assign and triton_embed on NVIDIA GPUs.

No launch reads the GPU's memory or depends on what it holds, so every function here can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ... import _dispatch, _triton
from ..._positives import group
from .entries import drawn
from .triton_assign import (
    gumbel_assign_center_kernel,
    gumbel_assign_gradient_kernel,
    gumbel_assign_pool_kernel,
    gumbel_assign_spread_kernel,
    gumbel_assign_statistics_kernel,
)
from .triton_embed import (
    gumbel_embed_codebook_kernel,
    gumbel_embed_gradient_kernel,
    gumbel_embed_mixture_kernel,
    gumbel_embed_segments_kernel,
    gumbel_embed_statistics_kernel,
)


class Tile(NamedTuple):
    """How a matrix kernel cuts the problem."""

    groups: int  # at most; rows of logits in gumbel_embed
    tokens: int  # codes in gumbel_embed
    depth: int
    width: int
    warps: int


# By what multiplies (_triton.precision), and whether the noise comes by quads (triton_noise): by single words it keeps four times
# as many in registers, which must not spill on any chip.
TILES = {
    ("half", True): Tile(64, 64, 64, 64, 8),
    ("half", False): Tile(64, 16, 64, 128, 8),
    ("tf32", True): Tile(64, 32, 32, 64, 8),
    ("tf32", False): Tile(64, 16, 32, 64, 8),
    ("ieee", True): Tile(32, 32, 16, 32, 8),
    ("ieee", False): Tile(32, 16, 16, 32, 8),
}
INTERPRETER_TILE = Tile(16, 16, 16, 16, 1)
STAGES = 3
# The longest run of codes that one program of gumbel_embed searches.
CHUNK = 8192
INTERPRETER_CHUNK = 16
CENTER = {"BLOCK_ROWS": 16, "BLOCK_E": 128, "num_warps": 4}
SEGMENTS = {"BLOCK_R": 32, "BLOCK_D": 64, "num_warps": 4}
# The gradient of so many images' logits at a time lies in memory, for the products that take it.
GRADIENT_BYTES = 64 << 20
# In elements: cuBLAS moves whole vectors only where every row begins at a multiple of one.
GRADIENT_ALIGNMENT = 16


def _tile(dtype: torch.dtype, columns: int) -> Tile:
    if _dispatch.interpreting():
        return INTERPRETER_TILE
    return TILES[_triton.precision(dtype), columns % 4 == 0]


def _matrix(dtype: torch.dtype, tile: Tile) -> dict[str, Any]:
    return {
        "PRECISION": "tf32" if _triton.precision(dtype) == "tf32" else "ieee",
        "num_warps": tile.warps,
        "num_stages": STAGES,
    }


class _Assign:
    """The operands of gumbel_assign and what its kernels are launched with."""

    def __init__(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: Tensor,
        seed: Tensor | None,
        key_mask: Tensor | None,
        tau: float,
        hard: bool,
    ) -> None:
        self.queries, self.keys, self.values = queries.contiguous(), keys.contiguous(), values.contiguous()
        self.images, self.groups, depth = queries.shape
        self.tokens, self.width = values.shape[1:]
        tile = _tile(queries.dtype, self.tokens)
        block_g = min(tile.groups, max(16, triton.next_power_of_2(self.groups)))
        self.token_tiles = triton.cdiv(self.tokens, tile.tokens)
        self.group_tiles = triton.cdiv(self.groups, block_g)
        self.width_tiles = triton.cdiv(self.width, tile.width)
        self.pointers = {
            "queries_ptr": self.queries,
            "keys_ptr": self.keys,
            "scale_ptr": scale,
            "seed_ptr": seed,
            "mask_ptr": None if key_mask is None else key_mask.contiguous(),
        }
        self.sizes = {
            "groups": self.groups,
            "tokens": self.tokens,
            "depth": depth,
            "inverse_tau": 1 / tau,
        }
        self.meta = {
            "NOISE": seed is not None,
            "MASK": key_mask is not None,
            "QUADS": self.tokens % 4 == 0,
            "EVEN_D": depth % tile.depth == 0,
            "BLOCK_G": block_g,
            "BLOCK_S": tile.tokens,
            "BLOCK_D": tile.depth,
            **_matrix(queries.dtype, tile),
        }
        self.even_e = self.width % tile.depth == 0
        self.weighting = {
            "HARD": hard,
            "WIDE": not hard and queries.dtype == torch.float16,
            "BLOCK_E": tile.width,
        }

    def float32(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.queries.device)


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
    problem = _Assign(queries, keys, values, scale, seed, key_mask, tau, hard)
    images, groups, tokens, width = problem.images, problem.groups, problem.tokens, problem.width
    index = torch.empty(images, tokens, dtype=torch.int64, device=queries.device)
    log_sum_exp, share = problem.float32(images, tokens), problem.float32(images, groups)
    pooled = torch.empty(images, groups, width, dtype=values.dtype, device=values.device)
    means = problem.float32(images, groups, width)
    with torch.cuda.device_of(queries):
        if index.numel() > 0:
            gumbel_assign_statistics_kernel[(images * problem.token_tiles,)](
                **problem.pointers,
                index_ptr=index,
                log_sum_exp_ptr=log_sum_exp,
                **problem.sizes,
                **problem.meta,
            )
        if images > 0:
            gumbel_assign_pool_kernel[(images * problem.group_tiles * max(problem.width_tiles, 1),)](
                **problem.pointers,
                values_ptr=problem.values,
                index_ptr=index,
                log_sum_exp_ptr=log_sum_exp,
                pooled_ptr=pooled,
                means_ptr=means,
                share_ptr=share,
                width=width,
                eps=eps,
                **problem.sizes,
                **problem.weighting,
                **problem.meta,
            )
    return pooled, index, log_sum_exp, share, means


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
    problem = _Assign(queries, keys, values, scale, seed, key_mask, tau, hard)
    images, groups, tokens = problem.images, problem.groups, problem.tokens
    du = grad.contiguous()
    inverse, center = problem.float32(images, groups), problem.float32(images, groups)
    if index.numel() == 0:
        return tuple(torch.zeros_like(tensor) for tensor in (queries, keys, values, scale))
    dq = torch.empty_like(problem.queries) if wanted[0] else None
    dk = torch.empty_like(problem.keys) if wanted[1] else None
    dv = torch.empty_like(problem.values) if wanted[2] else None
    with torch.cuda.device_of(queries):
        gumbel_assign_center_kernel[(triton.cdiv(images * groups, CENTER["BLOCK_ROWS"]),)](
            grad_ptr=du,
            means_ptr=means,
            share_ptr=share,
            inverse_ptr=inverse,
            center_ptr=center,
            rows=images * groups,
            width=problem.width,
            eps=eps,
            **CENTER,
        )
        if dv is not None and dv.numel() > 0:
            gumbel_assign_spread_kernel[(images * problem.token_tiles * problem.width_tiles,)](
                **problem.pointers,
                grad_ptr=du,
                index_ptr=index,
                log_sum_exp_ptr=log_sum_exp,
                inverse_ptr=inverse,
                out_ptr=dv,
                width=problem.width,
                **problem.sizes,
                **problem.weighting,
                **problem.meta,
            )
        dscale = None
        if wanted[0] or wanted[1] or wanted[3]:
            parts = problem.float32(images * problem.token_tiles)
            # float16 would lose the small entries of dl: its products are float32's.
            dtype = torch.bfloat16 if queries.dtype == torch.bfloat16 else torch.float32
            stride = triton.cdiv(tokens, GRADIENT_ALIGNMENT) * GRADIENT_ALIGNMENT
            step = min(images, max(1, GRADIENT_BYTES // (groups * stride * dtype.itemsize)))
            buffer = torch.empty(step, groups, stride, dtype=dtype, device=queries.device)
            for b0 in range(0, images, step):
                b1 = min(b0 + step, images)
                gumbel_assign_gradient_kernel[((b1 - b0) * problem.token_tiles,)](
                    **problem.pointers,
                    values_ptr=problem.values,
                    grad_ptr=du,
                    log_sum_exp_ptr=log_sum_exp,
                    inverse_ptr=inverse,
                    center_ptr=center,
                    out_ptr=buffer,
                    dscale_ptr=parts,
                    first_image=b0,
                    width=problem.width,
                    out_stride=stride,
                    EVEN_E=problem.even_e,
                    ONE=problem.group_tiles == 1,
                    **problem.sizes,
                    **problem.meta,
                )
                dl = buffer[: b1 - b0, :, :tokens]
                if dq is not None:
                    _multiply(dl, problem.keys[b0:b1], dq[b0:b1])
                if dk is not None:
                    _multiply(dl.mT, problem.queries[b0:b1], dk[b0:b1])
            dscale = parts.sum() if wanted[3] else None
    return dq, dk, dv, dscale


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, computed in the dtype of a."""
    if a.dtype == out.dtype:
        torch.bmm(a, b, out=out)
    else:
        out.copy_(torch.bmm(a, b.to(a.dtype)))


class _Embed:
    """The operands of gumbel_embed's kernels over tiles of rows and codes."""

    def __init__(
        self, logits: Tensor, codebook: Tensor, seed: Tensor | None, log_sum_exp: Tensor, tau: float
    ) -> None:
        self.tile = _tile(codebook.dtype, logits.shape[1])
        self.logits, self.codebook = logits.contiguous(), codebook.contiguous()
        self.pointers = {"logits_ptr": self.logits, "seed_ptr": seed, "log_sum_exp_ptr": log_sum_exp}
        self.rows, self.codes = logits.shape
        self.width = codebook.shape[1]
        self.sizes = {"rows": self.rows, "codes": self.codes, "width": self.width, "inverse_tau": 1 / tau}
        self.row_tiles = triton.cdiv(self.rows, self.tile.groups)
        self.code_tiles = triton.cdiv(self.codes, self.tile.tokens)
        self.width_tiles = triton.cdiv(self.width, self.tile.width)
        self.meta = {
            "NOISE": seed is not None,
            "QUADS": self.codes % 4 == 0,
            "BLOCK_M": self.tile.groups,
            "BLOCK_V": self.tile.tokens,
            **_matrix(codebook.dtype, self.tile),
        }
        self.weighting = {"WIDE": codebook.dtype == torch.float16, "BLOCK_D": self.tile.width}


def embed_forward(
    logits: Tensor, codebook: Tensor, seed: Tensor | None, k: int, tau: float, hard: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, codes = logits.shape
    longest = INTERPRETER_CHUNK if _dispatch.interpreting() else CHUNK
    block = min(longest, max(16, triton.next_power_of_2(codes)))
    chunks, slots = triton.cdiv(codes, block), min(k, block)
    values = torch.empty(rows, chunks * slots, dtype=torch.float32, device=logits.device)
    index = torch.empty(rows, chunks * slots, dtype=torch.int64, device=logits.device)
    parts = torch.empty(rows, chunks, dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        if rows > 0:
            gumbel_embed_statistics_kernel[(rows * chunks,)](
                logits_ptr=logits.contiguous(),
                seed_ptr=seed,
                values_ptr=values,
                index_ptr=index,
                log_sum_exp_ptr=parts,
                codes=codes,
                chunks=chunks,
                slots=slots,
                inverse_tau=1 / tau,
                NOISE=seed is not None,
                QUADS=codes % 4 == 0,
                BLOCK_V=block,
                num_warps=max(1, min(16, block // 512)),
            )
        if chunks > 1:
            # Candidates lie in the order of their codes where they are equal, and a stable sort keeps it.
            order = values.sort(dim=1, descending=True, stable=True).indices[:, :k]
            index = index.gather(1, order)
        log_sum_exp = parts.logsumexp(1) if chunks > 1 else parts.reshape(rows)
        if hard:
            return drawn(codebook, index, log_sum_exp), index, log_sum_exp
        problem = _Embed(logits, codebook, seed, log_sum_exp, tau)
        embedding = torch.empty(rows, 1, problem.width, dtype=codebook.dtype, device=codebook.device)
        if embedding.numel() > 0:
            gumbel_embed_mixture_kernel[(problem.row_tiles * problem.width_tiles,)](
                **problem.pointers,
                codebook_ptr=problem.codebook,
                out_ptr=embedding,
                **problem.sizes,
                **problem.meta,
                **problem.weighting,
            )
    return embedding, index, log_sum_exp


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
    problem = _Embed(logits, codebook, seed, log_sum_exp, tau)
    rows, width = problem.rows, problem.width
    with torch.cuda.device_of(logits):
        # Every slot has the same probabilities: their gradients are one product.
        total = grad.contiguous()[:, 0] if k == 1 else grad.sum(1, dtype=torch.float32).to(codebook.dtype)
        dlogits = torch.empty_like(problem.logits) if wanted[0] else None
        if dlogits is not None and rows > 0:
            parts = torch.empty(problem.code_tiles, rows, dtype=torch.float32, device=logits.device)

            def sweep(mean: Tensor, sums: bool) -> None:
                gumbel_embed_gradient_kernel[(problem.row_tiles * problem.code_tiles,)](
                    **problem.pointers,
                    grad_ptr=total,
                    codebook_ptr=problem.codebook,
                    mean_ptr=mean,
                    out_ptr=dlogits,
                    SUMS=sums,
                    EVEN_D=width % problem.tile.depth == 0,
                    BLOCK_D=problem.tile.depth,
                    **problem.sizes,
                    **problem.meta,
                )

            sweep(parts, True)
            sweep(parts.sum(0), False)
        return dlogits, _codebook_gradient(problem, grad, total, index, hard) if wanted[1] else None


def _codebook_gradient(problem: _Embed, grad: Tensor, total: Tensor, index: Tensor, hard: bool) -> Tensor:
    out = torch.empty_like(problem.codebook)
    if out.numel() == 0:
        return out
    if not hard:
        gumbel_embed_codebook_kernel[(problem.code_tiles * problem.width_tiles,)](
            **problem.pointers,
            grad_ptr=total,
            out_ptr=out,
            **problem.sizes,
            **problem.meta,
            **problem.weighting,
        )
        return out
    segments = group(index.reshape(-1), problem.codes, in_order=False)
    gumbel_embed_segments_kernel[(problem.codes * triton.cdiv(problem.width, SEGMENTS["BLOCK_D"]),)](
        grad_ptr=grad.contiguous(),
        order_ptr=segments.order,
        offsets_ptr=segments.offsets,
        out_ptr=out,
        width=problem.width,
        **SEGMENTS,
    )
    return out
