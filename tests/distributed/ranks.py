"""What each rank of the distributed tests does; run by test_losses.py in real processes that talk through gloo.

The truth is one process with the whole batch, computed on every rank: its loss, and its gradients of two encoders' weights and of
the scale. Ours, after averaging over the ranks as data parallelism does, must be the same.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import jrl_kernels
from jrl.objectives import ContrastiveObjective
from jrl_kernels import distributed

FORMS = ("gather", "ring")
WIDTH, DEPTH = 7, 5
ROWS = {1: [[9]], 2: [[4, 4], [5, 3], [6, 0]], 3: [[3, 3, 3], [4, 1, 2]], 4: [[2, 2, 2, 2], [3, 1, 0, 4]]}
"""Rows of each rank, by the number of ranks."""

Check = Callable[[list[int], int, torch.dtype], None]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


def parts(rows: list[int], rank: int) -> slice:
    return slice(sum(rows[:rank]), sum(rows[: rank + 1]))


def numbers(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Towers(nn.Module):
    """Two linear encoders and a scale."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.x = nn.Parameter(numbers(1, WIDTH, DEPTH, dtype=dtype))
        self.y = nn.Parameter(numbers(2, WIDTH, DEPTH, dtype=dtype))
        self.scale = nn.Parameter(torch.tensor(1.7, dtype=dtype))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a @ self.x, b @ self.y


def gradients(loss: Tensor, towers: Towers) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(towers.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, towers.parameters(), strict=True)]


def averaged(found: list[Tensor]) -> list[Tensor]:
    for tensor in found:
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return found


EXACT: dict[tuple[Any, ...], Tensor] = {}
"""What one process has in float64, by check, rows and name; float64 comes first."""
CURRENT: list[Any] = []


def close(name: str, found: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """In float64 equal to its rounding; in float32 at most twice as far from float64 as one process is, plus 1e-6."""
    key = (*CURRENT, name)
    if dtype == torch.float64:
        EXACT[key] = truth
    exact = EXACT[key]
    scale = max(float(exact.abs().max()), 1e-3) if exact.numel() else 1.0

    def error(of: Tensor) -> float:
        return float((of.double() - exact).abs().max()) / scale if exact.numel() else 0.0

    limit = 4e-12 if dtype == torch.float64 else 2 * error(truth) + 1e-6
    if not error(found) <= limit:
        raise AssertionError(f"{name}: error {error(found):.2g} of {scale:.3g}, allowed {limit:.2g}")


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def compare(name: str, rows: list[int], rank: int, dtype: torch.dtype, whole: Loss, ours: Loss) -> None:
    """`whole` of the whole batch against `ours` of this rank's rows."""
    towers = Towers(dtype)
    a, b = (numbers(seed, sum(rows), WIDTH, dtype=dtype) for seed in (3, 4))
    x, y = towers(a, b)
    truth = whole(x, y, towers.scale)
    here = parts(rows, rank)
    x, y = towers(a[here], b[here])
    found = ours(x, y, towers.scale)
    close(f"{name}: loss", found.detach(), truth.detach(), dtype)
    for parameter, g, t in zip(
        ("x", "y", "scale"), averaged(gradients(found, towers)), gradients(truth, towers), strict=True
    ):
        close(f"{name}: gradient of {parameter}", g, t, dtype)


def both(
    name: str,
    rows: list[int],
    rank: int,
    dtype: torch.dtype,
    whole: dict[str, Any],
    ours: dict[str, Any],
    **same: Any,
) -> None:
    """The loss of one process against both forms."""
    for form in ("gather",) if ours.get("backend") == "reference" else FORMS:
        compare(
            f"{name}, {form}",
            rows,
            rank,
            dtype,
            lambda x, y, scale: jrl_kernels.info_nce(x, y, scale=scale, **whole, **same),
            lambda x, y, scale, form=form: distributed.info_nce(x, y, scale=scale, form=form, **ours, **same),  # type: ignore[misc]
        )


@check
def pairs(rows: list[int], rank: int, dtype: torch.dtype) -> None:
    for direction in ("both", "x_to_y", "y_to_x"):
        both(direction, rows, rank, dtype, {}, {}, direction=direction)
    both("cosine and bias", rows, rank, dtype, {}, {}, normalize=True, bias=torch.tensor(-3.0, dtype=dtype))
    both("reference", rows, rank, dtype, {}, {"backend": "reference"})
    weights = numbers(5, sum(rows), dtype=dtype).abs()
    here = parts(rows, rank)
    both("weights", rows, rank, dtype, {"weights": weights}, {"weights": weights[here]})
    if len(set(rows)) == 1:
        both("even", rows, rank, dtype, {}, {"even": True})


@check
def positives_across_ranks(rows: list[int], rank: int, dtype: torch.dtype) -> None:
    total, here = sum(rows), parts(rows, rank)
    source = torch.Generator().manual_seed(6)
    # four ids over all ranks: several positives a row, and some on one side alone
    x_ids, y_ids = (torch.randint(4, (total,), generator=source) for _ in range(2))
    index = torch.randperm(total, generator=source)
    mask = torch.rand(total, total, generator=source) < 0.3
    for kind in ("mean", "sum"):
        for backend in ("auto", "reference"):
            both(f"ids, {kind}, {backend}", rows, rank, dtype, {"positives": (x_ids, y_ids)},
                 {"positives": (x_ids[here], y_ids[here]), "backend": backend}, multi_positive=kind)  # fmt: skip
        both(
            f"index, {kind}",
            rows,
            rank,
            dtype,
            {"positives": index},
            {"positives": index[here]},
            multi_positive=kind,
        )
        both(f"sparse, {kind}", rows, rank, dtype, {"positives": mask.to_sparse_csr()},
             {"positives": mask[here].to_sparse_csr()}, multi_positive=kind)  # fmt: skip


@check
def exclusions_and_queues(rows: list[int], rank: int, dtype: torch.dtype) -> None:
    total, here = sum(rows), parts(rows, rank)
    ids = torch.randint(4, (total,), generator=torch.Generator().manual_seed(7))
    queue = numbers(8, 6, DEPTH, dtype=dtype)
    queue_ids = torch.arange(6) % 4
    both("excluded", rows, rank, dtype, {"exclude": ids}, {"exclude": ids[here]})
    both("a queue", rows, rank, dtype, {"negatives": queue}, {"negatives": queue})
    both("an excluded queue", rows, rank, dtype, {"negatives": queue, "exclude": (ids, ids, queue_ids)},
         {"negatives": queue, "exclude": (ids[here], ids[here], queue_ids)})  # fmt: skip


@check
def statistics(rows: list[int], rank: int, dtype: torch.dtype) -> None:
    total, here = sum(rows), parts(rows, rank)
    x, y = (numbers(seed, total, DEPTH, dtype=dtype) for seed in (9, 10))
    ids = torch.randint(4, (total,), generator=torch.Generator().manual_seed(11))
    y = torch.where(torch.arange(total)[:, None] % 2 == 0, x, y)  # some accuracy
    # rows of small whole numbers tie: the first of the largest counts, be it on another rank or in the queue
    ties = y.sign()
    for name, a, b, whole, ours in (
        ("pairs", x, y, {}, {}),
        ("ids", x, y, {"positives": (ids, ids)}, {"positives": (ids[here], ids[here])}),
        ("excluded", x, y, {"exclude": ids}, {"exclude": ids[here]}),
        ("ties", ties, ties.flip(0), {"positives": (ids, ids)}, {"positives": (ids[here], ids[here])}),
        ("ties of a queue", ties, ties, {"negatives": ties}, {"negatives": ties}),
    ):
        _, truth = jrl_kernels.info_nce(a, b, scale=0.5, return_stats=True, **whole)
        for form in FORMS:
            _, found = distributed.info_nce(a[here], b[here], scale=0.5, return_stats=True, form=form, **ours)
            for field in truth._fields:
                close(f"{name}, {form}: {field}", getattr(found, field), getattr(truth, field), dtype)


@check
def sums_of_gradients(rows: list[int], rank: int, dtype: torch.dtype) -> None:
    towers, here = Towers(dtype), parts(rows, rank)
    a, b = (numbers(seed, sum(rows), WIDTH, dtype=dtype) for seed in (3, 4))
    truth = gradients(jrl_kernels.info_nce(*towers(a, b), scale=towers.scale), towers)
    for backend in ("auto", "reference"):
        x, y = towers(a[here], b[here])
        loss = distributed.info_nce(x, y, scale=towers.scale, gradients="sum", backend=backend)
        for place, (g, t) in enumerate(zip(gradients(loss, towers), truth, strict=True)):
            dist.all_reduce(g)
            close(f"sum, {backend}, {place}", g, t, dtype)


@check
def sigmoid(rows: list[int], rank: int, dtype: torch.dtype) -> None:
    here = parts(rows, rank)
    ids = torch.randint(4, (sum(rows),), generator=torch.Generator().manual_seed(12))

    def compared(name: str, whole: Any, ours: Any) -> None:
        for form, backend in (("gather", "auto"), ("ring", "auto"), ("gather", "reference")):

            def alone(x: Tensor, y: Tensor, scale: Tensor, backend: str = backend) -> Tensor:
                options = {"positives": whole, "backend": backend}
                return jrl_kernels.sigmoid_contrastive(x, y, scale=scale, bias=scale - 3, **options)

            def together(
                x: Tensor, y: Tensor, scale: Tensor, form: str = form, backend: str = backend
            ) -> Tensor:
                options = {"positives": ours, "form": form, "backend": backend}
                return distributed.sigmoid_contrastive(x, y, scale=scale, bias=scale - 3, **options)

            compare(f"{name}, {form}, {backend}", rows, rank, dtype, alone, together)

    compared("pairs", None, None)
    compared("ids", (ids, ids), (ids[here], ids[here]))
    index = ids.flip(0) % max(1, sum(rows))
    compared("index", index, index[here])
    mask = torch.rand(len(ids), len(ids), generator=torch.Generator().manual_seed(31)) < 0.3
    compared("sparse", mask.to_sparse_csr(), mask[here].to_sparse_csr())


@check
def critics(rows: list[int], rank: int, dtype: torch.dtype) -> None:
    """Words of every rank padded to a length of its own."""
    total, here, longest = sum(rows), parts(rows, rank), 6
    shift = numbers(13, longest, WIDTH, dtype=dtype)
    lengths = torch.randint(1, 4, (total,), generator=torch.Generator().manual_seed(14))
    mask = torch.arange(longest) < lengths[:, None]
    own = mask[here, : 4 + rank % 3]

    def regions(x: Tensor) -> Tensor:
        return torch.stack([x, x.roll(1, -1), -x.square()], 1)

    def words(y: Tensor, count: int) -> Tensor:
        return y[:, None] * shift[:count, :DEPTH] + y[:, None].roll(2, -1)

    factor = numbers(19, 1, dtype=dtype)[0].abs() + 1  # of the attention, with a gradient through the scale

    def compared(
        name: str, scores_of: Callable[..., Tensor], scores_here: Callable[..., Tensor], **options: Any
    ) -> None:
        def arguments(x: Tensor, y: Tensor, scale: Tensor, count: int) -> dict[str, Any]:
            given = {"regions": regions(x), "words": words(y, count), **options}
            if "attention_scale" in options:
                values = {"region_values": regions(x).flip(2), "word_values": words(y, count).tanh()}
                given.update(attention_scale=factor * scale, **values)
            return given

        def whole(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
            scores = scores_of(**arguments(x, y, scale, longest), word_mask=mask)
            return jrl_kernels.info_nce_from_scores(scores, scale=scale)

        for form in FORMS:

            def ours(x: Tensor, y: Tensor, scale: Tensor, form: str = form) -> Tensor:
                scores = scores_here(**arguments(x, y, scale, own.shape[1]), word_mask=own, form=form)
                loss: Tensor = distributed.info_nce_from_scores(scores, scale=scale)
                return loss

            compare(f"{name}, {form}", rows, rank, dtype, whole, ours)

    one, several = jrl_kernels.word_region_scores, distributed.word_region_scores
    compared("max_sim", jrl_kernels.max_sim, distributed.max_sim)
    compared("xmc_gan", one, several, preset="xmc_gan", scale=3.0)
    compared("attention", one, several, preset="mutual_information", attention_scale=None)


@check
def objective(rows: list[int], rank: int, dtype: torch.dtype) -> None:
    """The module of `jrl` finds the ranks by itself."""
    for kind, bias in (("info_nce", None), ("sigmoid", -3.0)):
        module = ContrastiveObjective(kind, init_scale=1.5, init_bias=bias, learnable=False)

        def whole(x: Tensor, y: Tensor, scale: Tensor, kind: str = kind, bias: float | None = bias) -> Tensor:
            if bias is None:
                return jrl_kernels.info_nce(x * scale, y, scale=1.5)
            return jrl_kernels.sigmoid_contrastive(x * scale, y, scale=1.5, bias=bias)

        def ours(x: Tensor, y: Tensor, scale: Tensor, module: nn.Module = module) -> Tensor:
            loss: Tensor = module(x * scale, y)[0]
            return loss

        compare(kind, rows, rank, dtype, whole, ours)


@check
def data_parallel(rows: list[int], rank: int, dtype: torch.dtype) -> None:
    """torch's own DistributedDataParallel, three steps, against one process."""
    here = parts(rows, rank)
    towers, alone = Towers(dtype), Towers(dtype)
    wrapped = nn.parallel.DistributedDataParallel(towers)
    ours = torch.optim.SGD(towers.parameters(), lr=0.1)
    theirs = torch.optim.SGD(alone.parameters(), lr=0.1)
    for step in range(3):
        a, b = (numbers(20 + 2 * step + k, sum(rows), WIDTH, dtype=dtype) for k in range(2))
        ours.zero_grad()
        theirs.zero_grad()
        # the scale is used outside of the wrapper's forward, which averages its gradient all the same
        distributed.info_nce(*wrapped(a[here], b[here]), scale=towers.scale, normalize=True).backward()
        jrl_kernels.info_nce(*alone(a, b), scale=alone.scale, normalize=True).backward()
        ours.step()
        theirs.step()
    for name, truth in alone.named_parameters():
        close(f"{name} after three steps", getattr(towers, name).detach(), truth.detach(), dtype)


def main(rank: int, size: int, store: str, out: str, end: str | None) -> None:
    """`end` is how the last rank fails, "death" or "hang"; None for the checks."""
    from . import forms  # noqa: F401  (registers its checks)

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=120 if end is None else 8),
    )
    if end is not None:
        mourn(rank, Path(out), end)
        return
    problems = []
    for name, function in CHECKS.items():
        for rows in ROWS[size]:
            for dtype in (torch.float64, torch.float32) if rows is ROWS[size][0] else (torch.float64,):
                try:
                    CURRENT[:] = name, *rows
                    function(rows, rank, dtype)
                except Exception:
                    problems.append(f"{name} {rows} {dtype}: {traceback.format_exc(limit=-3)}")
                dist.barrier()
    Path(out, f"{rank}.txt").write_text("\n".join(problems))
    dist.destroy_process_group()


def mourn(rank: int, out: Path, end: str) -> None:
    """The last rank dies, or stops, after a first step; the others must end with words about it, and soon.

    A death meets the gather, a hang the ring, whose first messages are then already its columns.
    """
    x = torch.randn(2, DEPTH)
    options: dict[str, Any] = {} if end == "death" else {"form": "ring", "even": True}
    distributed.info_nce(x, x, **options)
    if rank == dist.get_world_size() - 1:
        if end == "hang":
            time.sleep(25)
        os._exit(9)
    start = time.monotonic()
    try:
        distributed.info_nce(x, x, **options)
    except RuntimeError as error:
        Path(out, f"{rank}.txt").write_text(f"{time.monotonic() - start:.1f} {error}")
    sys.stdout.flush()
    os._exit(0)
