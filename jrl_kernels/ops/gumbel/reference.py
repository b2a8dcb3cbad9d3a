"""The Gumbel ops in plain PyTorch, as the papers write them, with Philox in int64 arithmetic. Twice differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ASSIGN_STREAM, EMBED_STREAM = 0, 1
"""Each op draws from a stream of its own: one seed gives them unrelated noise."""

_WORD = 0xFFFFFFFF


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a b for 32-bit a (as int64) and b: the whole product would overflow int64."""
    low = (a & 0xFFFF) * b
    rest = (a >> 16) * b + (low >> 16)
    return rest >> 16, ((rest & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al. 2011): four random 32-bit words, each in an int64, for a counter of four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _product(c0, 0xD2511F53)
        high1, low1 = _product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def gumbel_noise(shape: tuple[int, ...], seed: Tensor, stream: int, dtype: torch.dtype) -> Tensor:
    """Gumbel(0, 1): -log(-log U). Element i (C order) takes word i % 4 of Philox at counter (i // 4, stream) under key `seed`."""
    count = 1
    for size in shape:
        count *= size
    block = torch.arange((count + 3) // 4, device=seed.device)
    zero = torch.zeros_like(block)
    words = philox((block & _WORD, block >> 32, zero + stream, zero), (seed & _WORD, (seed >> 32) & _WORD))
    bits = torch.stack(words, dim=-1).reshape(-1)[:count].reshape(shape)
    # The upper 23 bits and a half: inside (0, 1) at both ends, and exact in float32.
    uniform = ((bits >> 9).to(dtype) + 0.5) * 2.0**-23
    return -(-uniform.log()).log()


def gumbel_assign(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: Tensor,
    seed: Tensor | None,
    key_mask: Tensor | None,
    tau: float,
    eps: float,
    hard: bool,
) -> tuple[Tensor, Tensor]:
    """Means [B, G, E] of the values assigned to each group, and the group of each token [B, S]."""
    with torch.autocast(queries.device.type, enabled=False):
        wide = torch.promote_types(queries.dtype, torch.float32)
        logits = scale * (queries.to(wide) @ keys.to(wide).mT)
        if seed is not None:
            logits = logits + gumbel_noise(tuple(logits.shape), seed, ASSIGN_STREAM, wide)
        soft = torch.softmax(logits / tau, dim=1)
        index = logits.argmax(dim=1)
        assignment = soft
        if hard:
            one_hot = F.one_hot(index, logits.shape[1]).mT.to(wide)
            # In this order the difference is exactly zero, and NaN where the softmax is.
            assignment = one_hot + (soft - soft.detach())
        if key_mask is not None:
            assignment = torch.where(key_mask[:, None], assignment, 0.0)
            index = torch.where(key_mask, index, -1)
        share = assignment.sum(dim=2, keepdim=True) + eps
        empty = share == 0
        pooled = (assignment @ values.to(wide)) / torch.where(empty, 1.0, share)
        return torch.where(empty, 0.0, pooled).to(values.dtype), index


def soft_assignment(queries: Tensor, keys: Tensor, scale: Tensor, key_mask: Tensor | None) -> Tensor:
    """softmax over the groups of the logits, without noise and temperature: what GroupViT draws. [B, G, S]"""
    with torch.no_grad(), torch.autocast(queries.device.type, enabled=False):
        wide = torch.promote_types(queries.dtype, torch.float32)
        soft = torch.softmax(scale * (queries.to(wide) @ keys.to(wide).mT), dim=1)
        return soft if key_mask is None else torch.where(key_mask[:, None], soft, 0.0)


def gumbel_embed(
    logits: Tensor, codebook: Tensor, seed: Tensor | None, k: int, tau: float, hard: bool
) -> tuple[Tensor, Tensor]:
    """Embeddings [N, k, D] and indices [N, k] of k entries of the codebook for each row of logits [N, V]."""
    with torch.autocast(logits.device.type, enabled=False):
        wide = torch.promote_types(logits.dtype, torch.float32)
        perturbed = logits.to(wide)
        if seed is not None:
            perturbed = perturbed + gumbel_noise(tuple(logits.shape), seed, EMBED_STREAM, wide)
        soft = torch.softmax(perturbed / tau, dim=1)
        # A stable sort: equal entries come in the order of their index.
        index = perturbed.sort(dim=1, descending=True, stable=True).indices[:, :k]
        table = codebook.to(wide)
        if not hard:
            return (soft @ table)[:, None].to(codebook.dtype), index
        through = (soft - soft.detach()) @ table.detach()
        return (table[index] + through[:, None]).to(codebook.dtype), index
