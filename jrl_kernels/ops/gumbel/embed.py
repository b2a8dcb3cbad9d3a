"""gumbel_embed: entries of a codebook drawn by their logits, with a straight-through gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _checks, _dispatch, _operators
from . import reference, seeds
from .backends import BACKENDS


def gumbel_embed(
    logits: Tensor,
    codebook: Tensor,
    *,
    tau: float = 1.0,
    hard: bool = True,
    k: int = 1,
    noise: bool = True,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Draw k entries of a codebook without replacement: the Gumbel-softmax of a dVAE, Vx2Text's differentiable tokens.

    With Gumbel noise n_v and p = softmax((logits + n) / tau) over all V entries::

        index = the k largest of logits + n                  (descending; lowest index among ties)
        embedding_j = codebook[index_j]                      (hard: dlogits is as if each of the k were p @ codebook)
        embedding = p @ codebook                             (hard=False, k = 1; its true gradients)

    Adding Gumbel noise and taking the k largest draws k entries without replacement from softmax(logits) (Gumbel top-k). Sources:
    Jang et al. 2017; Ramesh et al. 2021 (DALL·E's dVAE); Lin et al. 2021 (Vx2Text). Unlike theirs, neither the noise nor the
    one-hot rows are stored.

    Args:
        logits: [..., V], float32, bfloat16 or float16 (float64 on "reference" and "cpu"); torch.autocast leaves them alone.
        codebook: [V, D], of any of these dtypes, float64 where logits is.
        tau: temperature of the softmax, greater than 0; the indices do not depend on it.
        hard: entries forward and the softmax's gradient backward; False for the soft mixture in both.
        k: how many entries, 1 to V; 1 with hard=False.
        noise: draw it; False takes the k largest logits.
        seed: of the noise: an int in [0, 2**63), an int64 tensor of one element on the device of logits which the host
            never reads, or None to draw one from PyTorch's generator.
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        (embedding [..., k, D] in the dtype of codebook, index int64 [..., k]).

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, device or value.
        NotImplementedError: no backend takes these tensors here; a second derivative of a fused backward was asked for.

    Gradients: logits and codebook (hard: of the entries drawn, not of the mixture); once differentiable, twice with
    backend="reference".
    """
    op = "gumbel_embed"
    sizes: dict[str, int] = {}
    _checks.shaped(op, "codebook", codebook, "V D", sizes)
    _checks.tensor(op, "logits", logits)
    if logits.dtype not in _checks.FLOATS:
        raise TypeError(f"{op}: logits must be float32, bfloat16, float16 or float64, got {logits.dtype}")
    if logits.dim() == 0 or logits.shape[-1] != sizes["V"]:
        raise ValueError(
            f"{op}: logits must have shape [..., V] with V = {sizes['V']}, got {list(logits.shape)}"
        )
    _checks.same_device(op, "codebook", codebook, "logits", logits)
    (codebook,) = _checks.autocast(codebook)  # type: ignore[assignment]
    if (codebook.dtype == torch.float64) != (logits.dtype == torch.float64):
        raise TypeError(
            f"{op}: codebook must be float64 where logits is, got {codebook.dtype} and {logits.dtype}"
        )
    tau = _checks.number(op, "tau", tau, above=0.0)
    _checks.integer(op, "k", k, 1)
    if k > sizes["V"]:
        raise ValueError(f"{op}: k must be at most V = {sizes['V']}, got {k}")
    if k > 1 and not hard:
        raise ValueError(f"{op}: k must be 1 with hard=False, got {k}")
    drawn = seeds.parse(op, noise, seed, "logits", logits)
    name = _dispatch.select(op, backend, "gumbel", logits)
    rows = logits.reshape(-1, sizes["V"])
    if name == "reference":
        embedding, index = reference.gumbel_embed(rows, codebook, drawn, k, tau, bool(hard))
    else:
        embedding, index, _ = torch.ops.jrl.gumbel_embed_forward(
            rows, codebook, drawn, k, tau, bool(hard), name
        )
    leading = logits.shape[:-1]
    return embedding.reshape(*leading, k, sizes["D"]), index.reshape(*leading, k)


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    *operands, backend = arguments
    implementation: Any = BACKENDS[backend].load()
    return tuple(implementation.embed_forward(*operands))


def _fake(logits: Tensor, codebook: Tensor, seed: Tensor | None, k: int, *rest: Any) -> tuple[Tensor, ...]:
    rows = logits.shape[0]
    return (
        codebook.new_empty(rows, k, codebook.shape[1]),
        logits.new_empty(rows, k, dtype=torch.int64),
        logits.new_empty(rows, dtype=_checks.accumulation(logits.dtype)),
    )


def _backward(grad: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
    *operands, backend = arguments
    implementation: Any = BACKENDS[backend].load()
    return tuple(implementation.embed_backward(grad, *operands))


_operators.register(
    "gumbel_embed",
    inputs="Tensor logits, Tensor codebook, Tensor? seed",
    options="int k, float tau, bool hard, str backend",
    outputs=("embedding", "index", "log_sum_exp"),
    gradients=("logits", "codebook"),
    forward=_forward,
    fake=_fake,
    backward=_backward,
)
