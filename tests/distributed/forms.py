"""Checks of what the two forms promise beyond equal numbers, and of sides of different lengths; registered with ranks.py."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

import jrl_kernels
from jrl.objectives import ContrastiveObjective
from jrl_kernels import distributed
from jrl_kernels.distributed.ranks import Ranks

from .ranks import DEPTH, FORMS, check, close, compare, numbers, parts
from .refusals import refuses


@check
def several_columns_a_row(rows: list[int], rank: int, dtype: torch.dtype) -> None:
    """Twice as many columns as rows on rank 0, three times on rank 1, ...; the whole of y in the order of the ranks."""
    total, here = sum(rows), parts(rows, rank)
    owners = torch.cat([torch.arange(total)[parts(rows, r)].repeat(2 + r) for r in range(len(rows))])
    mine = torch.arange(total)[here].repeat(2 + rank)
    own = torch.arange(total)
    shift = numbers(40, total, 6, DEPTH, dtype=dtype)

    def columns(y: Tensor, of: Tensor, count: int) -> Tensor:
        return torch.cat([y + shift[of, k] for k in range(count)])

    def everywhere(y: Tensor) -> Tensor:
        pieces = [columns(y[parts(rows, r)], own[parts(rows, r)], 2 + r) for r in range(len(rows))]
        return torch.cat(pieces)

    first = torch.tensor([int((owners == i).nonzero()[0]) for i in range(total)], dtype=torch.int64)
    for name, whole, ours in (
        ("ids", (own, owners), (own[here], mine)),
        ("index", first, first[here]),
        ("sparse", (own[:, None] == owners).to_sparse_csr(), (own[here, None] == owners).to_sparse_csr()),
    ):
        for form, backend in (("gather", "auto"), ("ring", "auto"), ("gather", "reference")):
            if name == "sparse" and backend == "reference":
                continue

            def alone(x: Tensor, y: Tensor, scale: Tensor, which: Any = whole) -> Tensor:
                loss: Tensor = jrl_kernels.info_nce(x, everywhere(y), scale=scale, positives=which)
                return loss

            def together(
                x: Tensor,
                y: Tensor,
                scale: Tensor,
                which: Any = ours,
                form: str = form,
                backend: str = backend,
            ) -> Tensor:
                texts = columns(y, own[here], 2 + rank)
                options = {"form": form, "backend": backend, "positives": which}
                loss: Tensor = distributed.info_nce(x, texts, scale=scale, **options)
                return loss

            compare(f"{name}, {form}, {backend}", rows, rank, dtype, alone, together)

    def scored(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        scores = x @ distributed.gather(columns(y, own[here], 2 + rank)).T
        loss: Tensor = distributed.info_nce_from_scores(
            scores, scale=scale, positives=(own[here], mine), columns=len(mine)
        )
        return loss

    def dense(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        loss: Tensor = jrl_kernels.info_nce(x, everywhere(y), scale=scale, positives=(own, owners))
        return loss

    compare("scores", rows, rank, dtype, dense, scored)
    with refuses("x and y must have the same number of rows"):
        distributed.info_nce(shift[:2, 0], shift[0, :3])


@check
def frozen_sides(rows: list[int], rank: int, dtype: torch.dtype) -> None:
    """Locked-image tuning and its like: one side has no gradient, on every rank."""
    for form in FORMS:
        for x_learns, y_learns in ((True, False), (False, True), (False, False)):

            def prepared(
                x: Tensor, y: Tensor, x_learns: bool = x_learns, y_learns: bool = y_learns
            ) -> tuple[Tensor, Tensor]:
                return x if x_learns else x.detach(), y if y_learns else y.detach()

            compare(
                f"{form}, {x_learns}, {y_learns}",
                rows,
                rank,
                dtype,
                lambda x, y, scale, p=prepared: jrl_kernels.info_nce(*p(x, y), scale=scale),  # type: ignore[misc]
                lambda x, y, scale, p=prepared, f=form: distributed.info_nce(*p(x, y), scale=scale, form=f),  # type: ignore[misc]
            )


@check
def half_precision(rows: list[int], rank: int, dtype: torch.dtype) -> None:
    """bfloat16 gradients, summed in float32 over ranks and blocks and rounded once: no worse than one process's."""
    if dtype != torch.float64:
        return
    here = parts(rows, rank)
    x, y = (numbers(seed, sum(rows), DEPTH, dtype=torch.bfloat16) for seed in (41, 42))

    def found(a: Tensor, b: Tensor, place: slice, loss: Any) -> list[Tensor]:
        a, b = a[place].clone().requires_grad_(), b[place].clone().requires_grad_()
        return list(torch.autograd.grad(loss(a, b, scale=3.0), (a, b)))

    everything = slice(0, sum(rows))
    exact = found(x.double(), y.double(), everything, jrl_kernels.info_nce)
    one = found(x, y, everything, jrl_kernels.info_nce)
    for form in FORMS:

        def ours(a: Tensor, b: Tensor, scale: float, form: str = form) -> Tensor:
            loss: Tensor = distributed.info_nce(a, b, scale=scale, gradients="sum", form=form)
            return loss

        for side, got, single, truth in zip("xy", found(x, y, here, ours), one, exact, strict=True):
            assert got.dtype == torch.bfloat16
            allowed = 1.01 * float((single.double() - truth).abs().max()) + 1e-9
            error = float((got.double() - truth[here]).abs().max()) if len(got) else 0.0
            # each entry is a rounded sum whose own rounding is at most half a unit in the last place
            if error > allowed + 2**-9 * float(truth.abs().max()):
                raise AssertionError(f"{form}, {side}: error {error:.3g}, one process has {allowed:.3g}")


@check
def the_ring_never_gathers(rows: list[int], rank: int, dtype: torch.dtype) -> None:
    """Neither rows nor gradients of all ranks are ever on one of them; and two runs give the same bits."""
    here = parts(rows, rank)
    x, y = (numbers(seed, sum(rows), DEPTH, dtype=dtype)[here].requires_grad_() for seed in (43, 44))
    ids = torch.arange(sum(rows)) // 2
    scale = torch.tensor(2.0, dtype=dtype, requires_grad=True)

    def run() -> list[Tensor]:
        softmax = distributed.info_nce(x, y, scale=scale, positives=(ids[here], ids[here]), form="ring")
        sigmoid = distributed.sigmoid_contrastive(x, y, scale=scale, bias=-1.0, form="ring")
        return [softmax.detach(), sigmoid.detach(), *torch.autograd.grad(softmax + sigmoid, (x, y, scale))]

    forbidden = mock.Mock(side_effect=AssertionError("gathered"))
    with mock.patch.multiple(Ranks, gather=forbidden, scatter_sum=forbidden, deliver=forbidden):
        once, again = run(), run()
    for first, second in zip(once, again, strict=True):
        assert torch.equal(first, second)
    everyone = [torch.empty_like(once[0]) for _ in rows]
    dist.all_gather(everyone, once[0])
    assert all(torch.equal(loss, once[0]) for loss in everyone)
    with refuses("form must be one of", "'tree'"):
        distributed.info_nce(x, y, form="tree")
    with refuses("form 'ring' needs a fused backend"):
        distributed.info_nce(x, y, form="ring", backend="reference")


@check
def queues_of_all_ranks(rows: list[int], rank: int, dtype: torch.dtype) -> None:
    """MoCo across ranks: gathered keys make the same queue everywhere, and the loss is that of one process's queue."""
    here = parts(rows, rank)
    queue = numbers(45, 2, DEPTH, dtype=dtype)
    keys = numbers(46, sum(rows), DEPTH, dtype=dtype)
    for step in range(2):
        for form in FORMS:

            def alone(x: Tensor, y: Tensor, scale: Tensor, queue: Tensor = queue) -> Tensor:
                loss: Tensor = jrl_kernels.info_nce(x, y, scale=scale, negatives=queue, direction="x_to_y")
                return loss

            def together(
                x: Tensor, y: Tensor, scale: Tensor, queue: Tensor = queue, form: str = form
            ) -> Tensor:
                options = {"negatives": queue, "direction": "x_to_y", "form": form}
                loss: Tensor = distributed.info_nce(x, y, scale=scale, **options)
                return loss

            compare(f"step {step}, {form}", rows, rank, dtype, alone, together)
        # each rank enqueues the keys of all
        gathered = distributed.gather(keys[here])
        close(f"step {step}: keys", gathered, keys, dtype)
        queue, keys = torch.cat([queue, gathered]), keys.roll(1, 0)


@check
def gradients_on_some_ranks_only(rows: list[int], rank: int, dtype: torch.dtype) -> None:
    """The backward would hang; every rank is told in the forward."""
    if len(rows) == 1:
        return
    x = numbers(47, 2, DEPTH, dtype=dtype).requires_grad_(rank == 0)
    for y in (x, x.detach()):
        with refuses("were called with different options"):
            distributed.info_nce(x, y)
        with refuses("were called with different options"):
            distributed.sigmoid_contrastive(x, y, scale=1.0, bias=0.0)
    # the reference gathers x too, so that a gradient of the scale on every rank is not enough
    scale = torch.ones((), dtype=dtype, requires_grad=True)
    with refuses("were called with different options"):
        distributed.info_nce(x, x.detach(), scale=scale, backend="reference")


@check
def gradients_of_weights(rows: list[int], rank: int, dtype: torch.dtype) -> None:
    """A weight divides the loss too, so what it gains depends on the losses of all ranks."""
    here, size = parts(rows, rank), len(rows)
    x, y = (numbers(seed, sum(rows), DEPTH, dtype=dtype) for seed in (48, 49))
    weights = numbers(50, sum(rows), dtype=dtype).abs() + 0.5

    def found(loss: Any, place: slice, **options: Any) -> Tensor:
        own = weights[place].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(x[place], y[place], scale=2.0, weights=own, **options), own)
        return gradient

    truth = found(jrl_kernels.info_nce, slice(0, sum(rows)))
    for options in ({"form": "gather"}, {"form": "ring"}, {"backend": "reference"}, {"direction": "y_to_x"}):
        wanted = (
            found(jrl_kernels.info_nce, slice(0, sum(rows)), **options) if "direction" in options else truth
        )
        close(f"{options}", found(distributed.info_nce, here, **options) / size, wanted[here], dtype)


@check
def a_bias_under_data_parallel(rows: list[int], rank: int, dtype: torch.dtype) -> None:
    """It changes no softmax, but data parallelism waits for its gradient, which is zero."""
    for backend in ("auto", "reference"):
        module = ContrastiveObjective(init_bias=-1.0, backend=backend).to(dtype)
        wrapped = nn.parallel.DistributedDataParallel(module)
        for _ in range(2):
            x, y = (numbers(seed, rows[rank], DEPTH, dtype=dtype) for seed in (51, 52))
            wrapped(x, y)[0].backward()
        assert (
            module.bias is not None and module.bias.grad is not None and abs(float(module.bias.grad)) < 1e-6
        )


@check
def an_index_of_an_objective_is_of_this_rank(rows: list[int], rank: int, dtype: torch.dtype) -> None:
    """As in one process, where there is no other."""
    swapped = [torch.arange(count).flip(0) for count in rows]
    whole = torch.cat([own + sum(rows[:place]) for place, own in enumerate(swapped)])
    for kind, bias in (("info_nce", None), ("sigmoid", -3.0)):
        module = ContrastiveObjective(kind, init_scale=1.5, init_bias=bias, learnable=False)

        def alone(x: Tensor, y: Tensor, scale: Tensor, bias: float | None = bias) -> Tensor:
            if bias is None:
                loss: Tensor = jrl_kernels.info_nce(x * scale, y, scale=1.5, positives=whole)
                return loss
            return jrl_kernels.sigmoid_contrastive(x * scale, y, scale=1.5, bias=bias, positives=whole)

        def ours(x: Tensor, y: Tensor, scale: Tensor, module: nn.Module = module) -> Tensor:
            loss: Tensor = module(x * scale, y, positives=swapped[rank])[0]
            return loss

        compare(kind, rows, rank, dtype, alone, ours)


@check
def a_region_mask_on_one_rank(rows: list[int], rank: int, dtype: torch.dtype) -> None:
    """It is of the rank's own pictures, so the others need not have one."""
    regions, words = (numbers(seed, 2, 3, DEPTH, dtype=dtype) for seed in (54, 55))
    mask = torch.ones(2, 3, dtype=torch.bool) if rank == 0 else None
    for form in FORMS:
        for critic in (distributed.max_sim, distributed.word_region_scores):
            close(
                f"{form} {critic.__name__}",
                critic(regions, words, region_mask=mask, form=form),
                critic(regions, words, form=form),
                dtype,
            )


@check
def critics_without_captions(rows: list[int], rank: int, dtype: torch.dtype) -> None:
    regions = numbers(53, 2, 3, DEPTH, dtype=dtype).requires_grad_()
    for form in FORMS:
        for words in (regions.new_empty(0, 0, DEPTH), regions.new_empty(0, 2, DEPTH)):
            for critic in (distributed.max_sim, distributed.word_region_scores):
                scores = critic(regions, words.detach().requires_grad_(), form=form)
                assert scores.shape == (2, 0)
                scores.sum().backward()
