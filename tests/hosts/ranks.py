"""What each rank of test_ranks.py does, in real processes that talk through gloo.

The truth is one process with the whole batch. Averaged over the ranks, as DDP does, our gradients must be its, and the mean over
the ranks of our losses its loss. The hosts run beside us: where they are right we agree, and where they are not it shows here.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tests.hosts.compare import numbers

ROWS, WIDTH = 4, 6  # of each rank
Loss = Callable[..., Any]
CHECKS: list[Callable[[int, int], None]] = []


def check(function: Callable[[int, int], None]) -> Callable[[int, int], None]:
    CHECKS.append(function)
    return function


def embeddings(size: int, count: int) -> list[Tensor]:
    return [F.normalize(numbers(seed, size * ROWS, WIDTH), dim=1) for seed in range(count)]


def whole(loss: Loss, tensors: list[Tensor], scalars: list[float]) -> list[Tensor]:
    """Loss and gradients in one process."""
    given = [t.clone().requires_grad_() for t in (*tensors, *(torch.tensor(s).double() for s in scalars))]
    value = loss(*given)
    return [value.detach(), *torch.autograd.grad(value, given)]


def averaged(loss: Loss, tensors: list[Tensor], scalars: list[float], rank: int, size: int) -> list[Tensor]:
    """The mean over the ranks of the loss and of the gradients of what all ranks share."""
    given = [t.clone().requires_grad_() for t in (*tensors, *(torch.tensor(s).double() for s in scalars))]
    here = slice(rank * ROWS, (rank + 1) * ROWS)
    value = loss(*(t[here] if t.dim() else t for t in given))
    found = [value.detach(), *torch.autograd.grad(value, given)]
    for tensor in found:
        dist.all_reduce(tensor)
        tensor /= size
    return found


def close(name: str, found: list[Tensor], truth: list[Tensor]) -> None:
    for place, (f, t) in enumerate(zip(found, truth, strict=True)):
        error = float((f - t).abs().max())
        if not error <= 1e-9 * max(1.0, float(t.abs().max())):
            raise AssertionError(
                f"{name}, {'loss' if place == 0 else f'gradient {place}'}: error {error:.3g}"
            )


@check
def open_clip_softmax(rank: int, size: int) -> None:
    from open_clip.loss import ClipLoss as Theirs

    from jrl_kernels.integrations.open_clip import ClipLoss as Ours

    pair, scale = embeddings(size, 2), [12.0]
    truth = whole(Theirs(), pair, scale)
    ranks = {"rank": rank, "world_size": size}
    for local in (False, True):
        for gather in (False, True):
            options = {**ranks, "local_loss": local, "gather_with_grad": gather}
            close(f"ClipLoss {local} {gather}", averaged(Ours(**options), pair, scale, rank, size), truth)
            host = averaged(Theirs(**options), pair, scale, rank, size)
            if gather:
                close(f"open_clip's ClipLoss {local}", host, truth)
            elif not local:
                # open_clip #616: without gradients through the gathering the features' are divided by the number of ranks
                features = [size * g for g in host[1:3]]
                close("open_clip's gradients of the features", features, truth[1:3])
                close("open_clip's loss and gradient of the scale", [host[0], host[3]], [truth[0], truth[3]])
            elif size > 1 and torch.allclose(host[1], truth[1], atol=1e-3):
                raise AssertionError("open_clip's local loss without gathered gradients is exact: say so")


@check
def open_clip_sigmoid(rank: int, size: int) -> None:
    from open_clip.loss import SigLipLoss as Theirs

    from jrl_kernels.integrations.open_clip import SigLipLoss as Ours

    pair, scalars = embeddings(size, 2), [12.0, -4.0]
    truth = whole(Theirs(), pair, scalars)
    for way in ("bidir", "shift", "gather"):
        options = {"rank": rank, "world_size": size, "dist_impl": way}
        close(f"SigLipLoss {way}", averaged(Ours(**options), pair, scalars, rank, size), truth)
        close(f"open_clip's SigLipLoss {way}", averaged(Theirs(**options), pair, scalars, rank, size), truth)


@check
def open_clip_messages(rank: int, size: int) -> None:
    from jrl_kernels.integrations.open_clip import ClipLoss

    x = numbers(1, 3, 4)
    try:
        ClipLoss(rank=rank, world_size=size + 1)(x, x, 1.0)
    except ValueError as error:
        if f"must be torch.distributed's, {rank} and {size}, got {rank} and {size + 1}" not in str(error):
            raise
    else:
        raise AssertionError("another world_size was taken")


@check
def sentence_transformers(rank: int, size: int) -> None:
    """Hard negatives of every rank among the candidates, and positives where they belong (sentence-transformers #3453)."""
    from sentence_transformers.sentence_transformer import losses as theirs

    from jrl_kernels.integrations import sentence_transformers as ours

    nothing = nn.Sequential(nn.Identity())
    columns = embeddings(size, 4)
    every = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
    for options in (
        {},
        {"directions": every, "hardness_mode": "all_negatives", "hardness_strength": 2.0},
        {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
    ):

        def run(module: Any, gather: bool, options: Any = options) -> Loss:
            loss = module.MultipleNegativesRankingLoss(nothing, gather_across_devices=gather, **options)
            return lambda *given: loss.compute_loss_from_embeddings(list(given), None)

        truth = whole(run(theirs, False), columns, [])
        for module in (ours, theirs):
            found = averaged(run(module, True), columns, [], rank, size)
            close(f"{module.__name__} {options}", found, truth)


@check
def guided(rank: int, size: int) -> None:
    from types import SimpleNamespace

    from sentence_transformers.sentence_transformer import losses as theirs

    from jrl_kernels.integrations import sentence_transformers as ours

    columns, guides = embeddings(size, 3), [numbers(10 + seed, size * ROWS, 5) for seed in range(3)]
    here = slice(rank * ROWS, (rank + 1) * ROWS)

    def run(module: Any) -> Loss:
        loss = SimpleNamespace(
            gather_across_devices=True, margin_strategy="absolute", margin=0.1, temperature=0.2, mini_batch_size=3,
            contrast_anchors=True, contrast_positives=True, similarity_fct=nn.CosineSimilarity(dim=-1),
            cross_entropy_loss=nn.CrossEntropyLoss(), show_progress_bar=False,
        )  # fmt: skip
        loss.sim_matrix = lambda a, b: theirs.CachedGISTEmbedLoss.sim_matrix(loss, a, b)

        def total(*given: Tensor) -> Tensor:
            reps = [[column] for column in given]
            found: Tensor = module.CachedGISTEmbedLoss.calculate_loss(loss, reps, [[g[here]] for g in guides])
            return found

        return total

    truth, found = (averaged(run(module), columns, [], rank, size) for module in (theirs, ours))
    close("CachedGISTEmbedLoss", found, truth)


@check
def lightly(rank: int, size: int) -> None:
    from lightly.loss import NTXentLoss as Theirs

    from jrl_kernels.integrations.lightly import NTXentLoss as Ours

    pair = embeddings(size, 2)
    truth = whole(Theirs(0.2), pair, [])
    for loss in (Ours, Theirs):
        close(loss.__module__, averaged(loss(0.2, gather_distributed=True), pair, [], rank, size), truth)
    ours, theirs = (
        loss(memory_bank_size=(3 * size * ROWS - 1, WIDTH), gather_distributed=True)
        for loss in (Ours, Theirs)
    )
    ours.bank.copy_(theirs.memory_bank.bank)
    here = [t[rank * ROWS : (rank + 1) * ROWS].float().requires_grad_() for t in pair]
    for _ in range(4):
        found, wanted = ours(*here), theirs(*here)
        assert torch.allclose(found, wanted, rtol=1e-5)
        assert torch.allclose(ours.bank, theirs.memory_bank.bank)


@check
def lightly_with_uneven_batches(rank: int, size: int) -> None:
    """Which the host does not take. A rank without rows has its place too."""
    from jrl_kernels.integrations.lightly import NTXentLoss

    bank = F.normalize(numbers(20, 11, WIDTH), dim=1)
    for rows in ([6, 2], [8, 0]):
        pair = embeddings(size, 2)
        place = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
        for entries in (0, (11, WIDTH)):
            ours, one = NTXentLoss(0.2, entries, gather_distributed=True), NTXentLoss(0.2, entries)
            for loss in (ours, one):
                if entries:
                    loss.bank = bank.clone()
            given = [part.clone().requires_grad_() for part in pair]
            value = ours(*(part[place] for part in given))
            found = [value.detach(), *torch.autograd.grad(value, given)]
            for tensor in found:
                dist.all_reduce(tensor)
                tensor /= size
            close(f"NTXentLoss {rows} {entries}", found, whole(one, pair, []))


@check
def lightly_messages(rank: int, size: int) -> None:
    from jrl_kernels.integrations.lightly import NTXentLoss

    loss, last = NTXentLoss(gather_distributed=True), rank == size - 1
    x, y = numbers(1, 3, 4), numbers(2, 3, 4)
    for words, given in (
        ("must have the same shape" if last else "refused its arguments", (x, y[last:])),
        ("different options", (x.requires_grad_(last), y)),
    ):
        try:
            loss(*given)
        except ValueError as error:
            if words not in str(error):
                raise
        else:
            raise AssertionError(f"was taken: {words}")


@check
def torchmultimodal(rank: int, size: int) -> None:
    from torchmultimodal.modules.losses import contrastive_loss_with_temperature as theirs

    from jrl_kernels.integrations import torchmultimodal as ours

    pair, scale = embeddings(size, 2), [2.0]

    def run(module: Any, **options: Any) -> Loss:
        def loss(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
            head = module.ContrastiveLossWithTemperature().double()
            del head.logit_scale
            head.logit_scale = scale
            found: Tensor = head(a, b, **options)
            return found

        return loss

    # one process: no gathering, though torch.distributed runs
    whole_loss = whole(lambda a, b, s: _clip(a, b, s.exp()), pair, scale)
    for module in (ours, theirs):
        close(module.__name__, averaged(run(module), pair, scale, rank, size), whole_loss)
    if size > 1:
        try:
            run(ours, backprop_type=theirs.BackpropType.LOCAL)(*pair, torch.tensor(2.0).double())
        except NotImplementedError as error:
            if "only BackpropType.GLOBAL" not in str(error):
                raise
        else:
            raise AssertionError("LOCAL was taken")


def _clip(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    logits, labels = scale * a @ b.T, torch.arange(len(a))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def main(rank: int, size: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=200)
    )
    problems = []
    for function in CHECKS:
        try:
            function(rank, size)
        except Exception:
            problems.append(f"{function.__name__}: {traceback.format_exc(limit=-4)}")
        dist.barrier()
    Path(out, f"{rank}.txt").write_text("\n".join(problems))
    dist.destroy_process_group()
