"""What each rank does in test_refusals.py: it refuses arguments, or it hears that another one did.

Every case is followed by the next one in the same process group, so ranks that are left out of step show.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from jrl.objectives import AttentionCritic, ContrastiveObjective, MutualInformationEstimator
from jrl.objectives.generation import pair_contrastive, word_contrastive
from jrl.objectives.multi_label import MultiLabelObjective
from jrl.objectives.segment_text import SegmentTextObjective
from jrl_kernels import distributed

SIZE, ROWS, DEPTH, REGIONS, WORDS = 2, 3, 4, 5, 2
"""SIZE ranks refuse each argument in turn, with scores that are made for their columns; more of them disagree too."""
Case = tuple[str, Callable[[int], Any]]
"""What the last rank's own error says, and a call whose argument is 1 where this rank is to refuse it, else 0."""


@contextmanager
def refuses(*words: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        for word in words:
            if word not in str(error):
                raise AssertionError(f"expected {word!r} in {error}") from error
    else:
        raise AssertionError(f"did not refuse: {words}")


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def pair() -> tuple[Tensor, Tensor]:
    return rows(ROWS, DEPTH), rows(ROWS, DEPTH)


def ids(bad: int) -> tuple[Tensor, Tensor]:
    own = torch.arange(ROWS, dtype=torch.int32 if bad else torch.int64)
    return own, own


def losses() -> list[Case]:
    softmax, sigmoid = distributed.info_nce, distributed.sigmoid_contrastive
    short = {False: ROWS, True: ROWS - 1}
    half = {False: torch.float32, True: torch.bfloat16}
    sparse = torch.eye(ROWS, SIZE * ROWS).bool().to_sparse_csr
    return [
        ("positives[0] must be int64", lambda bad: softmax(*pair(), positives=ids(bad))),
        (
            "positives[0] must be int64",
            lambda bad: sigmoid(*pair(), scale=1.0, bias=0.0, positives=ids(bad)),
        ),
        (
            "positives[0] must have shape [3]",
            lambda bad: softmax(*pair(), positives=(torch.arange(short[bad]),) * 2),
        ),
        ("exclude[0] must have shape [3]", lambda bad: softmax(*pair(), exclude=torch.arange(short[bad]))),
        ("weights must have shape [3]", lambda bad: softmax(*pair(), weights=torch.ones(short[bad]))),
        ("the same number of rows", lambda bad: softmax(rows(ROWS, DEPTH), rows(short[bad], DEPTH))),
        ("y must have shape [rows, 4]", lambda bad: softmax(rows(ROWS, DEPTH), rows(ROWS, DEPTH + bad))),
        (
            "y must be torch.float32",
            lambda bad: softmax(rows(ROWS, DEPTH), rows(ROWS, DEPTH, dtype=half[bad])),
        ),
        ("x must have shape [rows, columns]", lambda bad: softmax(*(t[..., None] if bad else t for t in pair()))),
        ("x must be a tensor", lambda bad: softmax(1.0 if bad else rows(ROWS, DEPTH), rows(ROWS, DEPTH))),
        ("direction must be one of", lambda bad: softmax(*pair(), direction="x2y" if bad else "both")),
        ("gradients must be one of", lambda bad: softmax(*pair(), gradients="max" if bad else "mean")),
        ("form must be one of", lambda bad: softmax(*pair(), form="tree" if bad else "ring")),
        ("form must be one of", lambda bad: sigmoid(*pair(), scale=1.0, bias=0.0, form="x" if bad else "ring")),
        ("backend must be 'auto'", lambda bad: softmax(*pair(), backend="fast" if bad else "auto")),
        ("scale must be a 0-d tensor", lambda bad: softmax(*pair(), scale=torch.ones(1 + bad))),
        ("bias must be a 0-d tensor", lambda bad: softmax(*pair(), bias=torch.ones(1 + bad))),
        (
            "takes neither negatives",
            lambda bad: softmax(*pair(), negatives=rows(2, DEPTH) if bad else None, backend="reference"),
        ),
        (
            "negatives must have shape",
            lambda bad: softmax(*pair(), negatives=rows(2, DEPTH + bad)),
        ),
        (
            "weights need positives=None",
            lambda bad: softmax(*pair(), positives=torch.arange(ROWS) if bad else None, weights=torch.ones(ROWS)),
        ),
        # what only all ranks together know is judged by all of them, in the same words
        (
            "which are 6; those of rank 1 have at least 100",
            lambda bad: softmax(*pair(), positives=torch.tensor([0, 1, 99 if bad else 2])),
        ),
        ("positives must hold row indices", lambda bad: softmax(*pair(), positives=torch.arange(ROWS) - bad)),
        ("are 6; those of rank 1 have 5", lambda bad: distributed.info_nce_from_scores(rows(ROWS, 6 - bad))),
        (
            "6; those of rank 1 have 5",
            lambda bad: softmax(*pair(), positives=sparse().to_dense()[:, bad:].to_sparse_csr()),
        ),
        ("tensor must have shape [b, ...]", lambda bad: distributed.gather(torch.ones([1] * (not bad)))),
        ("tensor must be a tensor", lambda bad: distributed.gather(1 if bad else torch.ones(1))),
        ("values must have shape [b]", lambda bad: distributed.mean(torch.ones(3, 2) if bad else torch.ones(3))),
    ]  # fmt: skip


def critics() -> list[Case]:
    regions, words = rows(ROWS, REGIONS, DEPTH), rows(ROWS, WORDS, DEPTH)
    max_sim, scores = distributed.max_sim, distributed.word_region_scores
    values = {"region_values": rows(ROWS, REGIONS, 6)}
    return [
        (
            "word_mask must have shape",
            lambda bad: max_sim(regions, words, word_mask=torch.ones(ROWS, WORDS + bad).bool()),
        ),
        ("words must have shape", lambda bad: max_sim(rows(ROWS, REGIONS, DEPTH + bad), words)),
        (
            "region_mask must have shape",
            lambda bad: max_sim(regions, words, region_mask=torch.ones(ROWS, REGIONS + bad).bool()),
        ),
        ("reduce must be one of", lambda bad: max_sim(regions, words, reduce="max" if bad else "sum")),
        ("unexpected keyword", lambda bad: max_sim(regions, words, **({"pool": "sum"} if bad else {}))),
        (
            "region_values must be torch.float32",
            lambda bad: scores(
                regions, words, word_values=rows(ROWS, WORDS, 6), region_values=values["region_values"].to(
                    torch.float64 if bad else torch.float32
                ),
            ),
        ),
        (
            "different options or shapes",
            lambda bad: scores(
                regions, words, word_values=rows(ROWS, WORDS, 6 + bad), region_values=rows(ROWS, REGIONS, 6 + bad)
            ),
        ),
        ("different options or shapes", lambda bad: max_sim(regions, words, reduce="mean" if bad else "sum")),
        (
            "different options or shapes",
            lambda bad: max_sim(regions, rows(ROWS, WORDS + bad, DEPTH), direction="regions", mask_mode="zero"),
        ),
        ("different options or shapes", lambda bad: scores(regions, words, pool="sum" if bad else "mean")),
        ("different options or shapes", lambda bad: distributed.gather(torch.ones(2, 2, 2, 2, 3 + bad))),
    ]  # fmt: skip


def objectives() -> list[Case]:
    x, y = pair()
    owners = torch.arange(ROWS)
    segments = rows(ROWS, REGIONS, DEPTH)
    critic = AttentionCritic(*(torch.nn.Identity() for _ in range(4)))
    labels, excluding = MultiLabelObjective(), MultiLabelObjective("exclude")
    nce, jsd = MutualInformationEstimator(), MutualInformationEstimator("jsd")
    words = rows(ROWS, WORDS, DEPTH)
    per_word = MutualInformationEstimator(direction="text_to_image")
    scores = rows(SIZE * ROWS, ROWS, WORDS)
    return [
        ("x, y: expected the same number", lambda bad: ContrastiveObjective()(x, y[bad:])),
        ("x, y: expected the same number", lambda bad: ContrastiveObjective("sigmoid")(x, y[bad:])),
        (
            "negatives: the sigmoid loss",
            lambda bad: ContrastiveObjective("sigmoid")(x, y, negatives=y if bad else None),
        ),
        ("positives: expected rows of y in [0, 3)", lambda bad: ContrastiveObjective()(x, y, positives=owners + bad)),
        ("owners: expected int64", lambda bad: labels(x, y, owners.int() if bad else owners)),
        ("text_ids: duplicate_texts", lambda bad: excluding(x, y, owners, text_ids=None if bad else owners)),
        ("shapes cannot be multiplied", lambda bad: excluding(rows(ROWS, DEPTH + bad), y, owners, text_ids=owners)),
        (
            "The size of tensor a",
            lambda bad: excluding.of_scores(rows(ROWS, 6 + bad), owners, text_ids=owners),
        ),
        ("queries must have shape", lambda bad: SegmentTextObjective()(rows(ROWS, REGIONS, DEPTH + bad), y, owners)),
        ("owners: expected [3]", lambda bad: SegmentTextObjective()(segments, y, owners[bad:])),
        (
            "word_mask: expected [3, 2]",
            lambda bad: critic(segments, words, word_mask=torch.ones(ROWS, WORDS + bad).bool(), across_ranks=True),
        ),
        (
            "scores: expected a floating dtype",
            lambda bad: nce(torch.ones(ROWS, 6, dtype=torch.int64) if bad else rows(ROWS, 6), across_ranks=True),
        ),
        ("scores: expected [3, 6]", lambda bad: jsd(rows(ROWS, 6 + bad), across_ranks=True)),
        (
            "word_mask: expected bool [3, 2]",
            lambda bad: per_word(scores, word_mask=torch.ones(ROWS, WORDS + bad).bool(), across_ranks=True),
        ),
        ("positives[0] must have shape", lambda bad: per_word(scores[bad:], across_ranks=True)),
        ("temperature: expected a positive", lambda bad: pair_contrastive(x, y, temperature=0.0 if bad else 1.0)),
        ("directions: expected", lambda bad: word_contrastive(segments, words, directions="x" if bad else "one")),
    ]  # fmt: skip


def one_rank_refuses(rank: int) -> None:
    """Only the last rank is wrong; the others raise too, and whatever comes next works."""
    last = SIZE - 1
    for words, call in (*losses(), *critics(), *objectives()):
        judged_by_all = "; those of rank" in words or "different options" in words
        with refuses(words if judged_by_all or rank == last else f"rank {last} refused its arguments"):
            call(int(rank == last))
        distributed.mean(torch.ones(ROWS))


def nobody_waits_for_even_batches(rank: int) -> None:
    """even=True compares nothing, so a rank raises alone and meets nobody."""
    if rank == dist.get_world_size() - 1:
        with refuses("direction must be one of"):
            distributed.info_nce(*pair(), direction="x2y", even=True)
    distributed.mean(torch.ones(ROWS))


def disagreements(rank: int) -> None:
    x = rows(ROWS, DEPTH).detach()
    end = dist.get_world_size() - 1
    last = rank == end
    other = rows(ROWS, DEPTH + last)
    with refuses(
        "distributed.info_nce: ranks disagree in shape",
        f"rank 0 has [{DEPTH}], rank {end} has [{DEPTH + 1}]",
    ):
        distributed.info_nce(other, other)
    other = x.to(torch.bfloat16 if last else torch.float32)
    with refuses("ranks disagree in dtype", "rank 0 has torch.float32", f"rank {end} has torch.bfloat16"):
        distributed.sigmoid_contrastive(other, other, scale=1.0, bias=0.0)
    for options in (
        {"direction": "x_to_y" if last else "both"},
        {"weights": torch.ones(ROWS) if last else None},
        {"return_stats": last},
        {"normalize": last},
        {"backend": "reference" if last else "auto"},
    ):
        with refuses(f"ranks 0 and {end} were called with different options"):
            distributed.info_nce(x, x, **options)
    words = rows(ROWS, WORDS, DEPTH)
    with refuses("distributed.word_region_scores", "were called with different options"):
        distributed.word_region_scores(words, words, word_values=words if last else None)


CHECKS: tuple[Callable[[int], None], ...] = (nobody_waits_for_even_batches, disagreements)


def main(rank: int, size: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    options: dict[str, Any] = {"rank": rank, "world_size": size, "timeout": timedelta(seconds=20)}
    dist.init_process_group("gloo", init_method=f"file://{store}", **options)
    problems = []
    for function in (one_rank_refuses, *CHECKS) if size == SIZE else CHECKS:
        try:
            function(rank)
        except Exception:
            problems.append(f"{function.__name__}: {traceback.format_exc(limit=-3)}")
            break  # ranks may be out of step
    Path(out, f"{rank}.txt").write_text("\n".join(problems))
    dist.destroy_process_group()
