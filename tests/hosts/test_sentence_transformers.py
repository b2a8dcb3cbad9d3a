"""Our ranking losses against sentence-transformers', on embeddings and through its Trainer."""

from __future__ import annotations

import copy
import functools
import itertools
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.hosts.compare import memory, numbers, same
from tests.hosts.tiny_sentence_transformers import checkpoint, sentences

pytest.importorskip("sentence_transformers", reason="needs sentence-transformers; make test installs it")
from datasets import Dataset
from sentence_transformers import (
    MultiVectorEncoder,
    MultiVectorEncoderTrainer,
    MultiVectorEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.multi_vector_encoder import losses as multi_vector
from sentence_transformers.multi_vector_encoder import scoring
from sentence_transformers.sentence_transformer import losses as theirs
from sentence_transformers.util import cos_sim, dot_score, euclidean_sim

from jrl_kernels.integrations import sentence_transformers as ours

NOTHING = nn.Sequential(nn.Identity())  # embeddings come in: never called
OTHERS = ("query_to_query", "doc_to_query", "doc_to_doc")
JOINT = [("query_to_doc", *chosen) for count in range(4) for chosen in itertools.combinations(OTHERS, count)]
CASES = [*((directions, "joint") for directions in JOINT)]
CASES += [(("query_to_doc",), "per_direction"), (("query_to_doc", "doc_to_query"), "per_direction")]
HARDNESS = [None, "in_batch_negatives", "hard_negatives", "all_negatives"]


def embeddings(rows: int, columns: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [numbers(seed, rows, 12, dtype=dtype) for seed in range(columns)]


def ranking(module: Any, **options: Any) -> Any:
    loss = module.MultipleNegativesRankingLoss(NOTHING, **options)
    return lambda *given: loss.compute_loss_from_embeddings(list(given), None)


@pytest.mark.parametrize("hardness", HARDNESS)
@pytest.mark.parametrize(("directions", "partition"), CASES)
def test_ranking(directions: tuple[str, ...], partition: str, hardness: str | None) -> None:
    options = {"directions": directions, "partition_mode": partition, "hardness_mode": hardness}
    for similarity, scale in ((cos_sim, 20.0), (dot_score, 1.5)):
        for rows, columns in ((7, 2), (6, 4), (2, 3), (1, 3)):
            given = {**options, "similarity_fct": similarity, "scale": scale, "hardness_strength": 3.0}
            same(ranking(ours, **given), ranking(theirs, **given), embeddings(rows, columns), 1e-9)


def test_a_learnable_scale_and_other_similarities() -> None:
    def scaled(module: Any) -> Any:
        loss = module.MultipleNegativesRankingLoss(NOTHING)

        def run(scale: Tensor, *columns: Tensor) -> Tensor:
            loss.scale = scale
            return loss.compute_loss_from_embeddings(list(columns), None)

        return run

    same(scaled(ours), scaled(theirs), [torch.tensor(9.0, dtype=torch.float64), *embeddings(5, 3)])
    given = {"similarity_fct": euclidean_sim, "directions": ("query_to_doc", "doc_to_query")}
    same(ranking(ours, **given), ranking(theirs, **given), embeddings(5, 3))
    assert ours.MultipleNegativesRankingLoss(NOTHING).get_config_dict() == (
        theirs.MultipleNegativesRankingLoss(NOTHING).get_config_dict()
    )


def test_scores_far_below_the_positive_keep_their_gradient() -> None:
    """Parts of the denominator are not got by taking the positive away again: float32 keeps them."""
    given = {
        "scale": 50.0,
        "directions": JOINT[-1],
        "hardness_mode": "all_negatives",
        "hardness_strength": 9.0,
    }
    base = embeddings(9, 3)
    base[1] = base[0] + 1e-3 * base[1]
    exact = ranking(theirs, **given)
    truth = [t.float() for t in _values(exact, base)]
    for found, host, wanted in zip(
        _values(ranking(ours, **given), [t.float() for t in base]),
        _values(exact, [t.float() for t in base]),
        truth,
        strict=True,
    ):
        assert (found - wanted).abs().max() <= 2 * (host - wanted).abs().max() + 1e-6


@pytest.mark.parametrize("partition", ["joint", "per_direction"])
def test_a_query_needs_its_positive(partition: str) -> None:
    options = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": partition}
    query, positive = embeddings(6, 2)
    with pytest.raises(IndexError):
        ranking(theirs, **options)(query, positive[:4])
    with pytest.raises(
        ValueError, match="queries and positives must have the same number of rows, got 6 and 4"
    ):
        ranking(ours, **options)(query, positive[:4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_the_truth_as_the_host(dtype: torch.dtype) -> None:
    given = [part.to(dtype) for part in embeddings(32, 2)]
    exact = _values(ranking(theirs), [part.double() for part in given])
    for found, host, truth in zip(
        _values(ranking(ours), given), _values(ranking(theirs), given), exact, strict=True
    ):
        floor = 1e-6 * float(truth.abs().max())
        assert (found.double() - truth).abs().max() <= 2 * (host.double() - truth).abs().max() + floor


def _values(loss: Any, given: list[Tensor]) -> list[Tensor]:
    given = [t.clone().requires_grad_() for t in given]
    found = loss(*given)
    return [found.detach(), *torch.autograd.grad(found, given)]


def test_memory() -> None:
    base = [F.normalize(numbers(seed, 1024, 32, dtype=torch.float32), dim=1) for seed in range(3)]
    matrix = 1024 * 1024 * 4
    for given in (
        {},
        {"directions": JOINT[-1], "hardness_mode": "all_negatives", "hardness_strength": 5.0},
    ):
        host, fused = memory(ranking(theirs, **given), *base), memory(ranking(ours, **given), *base)
        assert host > 4 * matrix and host > 5 * fused


def cached(module: Any, rows: int, **options: Any) -> Any:
    loss = module.CachedMultipleNegativesRankingLoss(NOTHING, mini_batch_size=3, **options)

    def run(*columns: Tensor) -> Tensor:
        reps = [[part.detach().requires_grad_() for part in column.split(rows)] for column in columns]
        value = loss.calculate_loss(reps, with_backward=True)
        assert not value.requires_grad
        parts = [torch.cat([part.grad for part in column]) for column in reps]
        # its value, with the gradients that were found
        return value + sum(((c - c.detach()) * g).sum() for c, g in zip(columns, parts, strict=True))

    return run


@pytest.mark.parametrize(("directions", "partition"), [CASES[0], CASES[7], CASES[9]])
@pytest.mark.parametrize("hardness", [None, "all_negatives"])
def test_cached_ranking(directions: Any, partition: str, hardness: str | None, monkeypatch: Any) -> None:
    module = "sentence_transformers.sentence_transformer.losses.cached_multiple_negatives_ranking"
    monkeypatch.setattr(f"{module}.has_static_embedding_input", lambda model: False)
    given = {"directions": directions, "partition_mode": partition, "hardness_mode": hardness}
    given["hardness_strength"] = 4.0
    same(cached(ours, 4, **given), cached(theirs, 4, **given), embeddings(7, 3), 1e-9)
    given["similarity_fct"] = euclidean_sim
    same(cached(ours, 4, **given), cached(theirs, 4, **given), embeddings(7, 3))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("tiny")
    return checkpoint(folder / "model", 0), checkpoint(folder / "guide", 1, dropout=0.0)


def test_copies_of_a_positive_are_sifted_as_by_the_host(folders: tuple[str, str]) -> None:
    """One answer to two questions is exactly as alike as the positive, and so no more than that."""
    model, guide = (SentenceTransformer(folder, device="cpu") for folder in folders)
    options = {"temperature": 0.1, "mini_batch_size": 3}
    for seed in range(12):
        given = [numbers(seed + place, 8, 16, dtype=torch.float32) for place in (0, 100)]
        guides = [numbers(seed + place, 8, 384, dtype=torch.float32) for place in (200, 300)]
        guides[1][1], guides[1][7] = guides[1][0], guides[1][5]
        found, truth = (
            module.CachedGISTEmbedLoss(model, guide, **options).calculate_loss(
                [[part] for part in given], [[part] for part in guides]
            )
            for module in (ours, theirs)
        )
        assert abs(float(found - truth)) < 1e-4


@pytest.mark.parametrize("anchors", [True, False])
@pytest.mark.parametrize(("strategy", "margin"), [("absolute", 0.0), ("absolute", 0.2), ("relative", 0.1)])
def test_guided(folders: tuple[str, str], strategy: str, margin: float, anchors: bool) -> None:
    model, guide = (SentenceTransformer(folder, device="cpu") for folder in folders)
    options = {"temperature": 0.3, "mini_batch_size": 3, "margin_strategy": strategy, "margin": margin}
    options |= {"contrast_anchors": anchors, "contrast_positives": not anchors or margin == 0.2}
    guides = [[part] for part in embeddings(7, 4)]
    sifted = []

    def run(module: Any) -> Any:
        loss = module.CachedGISTEmbedLoss(model, guide, **options)

        def total(*columns: Tensor) -> Tensor:
            reps = [[part.detach().requires_grad_() for part in column.split(4)] for column in columns]
            value = loss.calculate_loss(reps, guides, with_backward=True)
            assert torch.allclose(loss.calculate_loss(reps, guides), value)
            sifted.append(value)
            parts = [torch.cat([part.grad for part in column]) for column in reps]
            return value + sum(((c - c.detach()) * g).sum() for c, g in zip(columns, parts, strict=True))

        return total

    given = [numbers(10 + seed, 7, 12) for seed in range(4)]
    same(run(ours), run(theirs), given)
    # the guide does sift: without it the loss is larger
    loss = ours.CachedGISTEmbedLoss(
        model, guide, **{**options, "margin_strategy": "absolute", "margin": -9.0}
    )
    assert float(loss.calculate_loss([[c] for c in given], guides)) > float(sifted[0]) + 0.05


def test_guided_memory(folders: tuple[str, str]) -> None:
    model, guide = (SentenceTransformer(folder, device="cpu") for folder in folders)
    base = [numbers(seed, 128, 128, dtype=torch.float32) for seed in range(2)]
    needed = {}
    for module in (theirs, ours):
        loss = module.CachedGISTEmbedLoss(model, guide, mini_batch_size=32, contrast_positives=False)

        def run(*columns: Tensor, loss: Any = loss) -> Tensor:
            reps = [[column.detach().requires_grad_()] for column in columns]
            value = loss.calculate_loss(reps, [[column] for column in base], with_backward=True)
            return value + 0 * sum(column.sum() for column in columns)

        needed[module] = memory(run, *base)
    assert needed[theirs] > 8 * needed[ours]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("MultipleNegativesRankingLoss", {}),
        ("CachedMultipleNegativesRankingLoss", {"mini_batch_size": 3, "directions": JOINT[-1]}),
        ("CachedGISTEmbedLoss", {"mini_batch_size": 3, "temperature": 0.2}),
    ],
)
def test_the_trainer(
    name: str, options: dict[str, Any], folders: tuple[str, str], tmp_path: Path, monkeypatch: Any
) -> None:
    fused = {part: mock.Mock(wraps=getattr(ours, part)) for part in ("ranking_loss", "guided_loss")}
    for part, function in fused.items():
        monkeypatch.setattr(ours, part, function)
    pairs = {key: sentences(24, seed) for seed, key in enumerate(("anchor", "positive", "negative"))}
    logs, weights = {}, {}
    for label, module in (("theirs", theirs), ("ours", ours)):
        model, guide = (SentenceTransformer(folder, device="cpu") for folder in folders)
        loss = getattr(module, name)(model, *([guide] if "GIST" in name else []), **options)
        arguments = SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / label), per_device_train_batch_size=8, max_steps=3, logging_steps=1,
            learning_rate=1e-2, optim="sgd", report_to=[], save_strategy="no", use_cpu=True, seed=1, disable_tqdm=True,
        )  # fmt: skip
        trainer = SentenceTransformerTrainer(
            model=model, args=arguments, train_dataset=Dataset.from_dict(pairs), loss=loss
        )
        trainer.train()
        logs[label] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        weights[label] = copy.deepcopy(model.state_dict())
    assert len(set(logs["theirs"])) == 3
    assert sum(function.call_count for function in fused.values()) >= 3
    assert logs["ours"] == pytest.approx(logs["theirs"], rel=1e-3)
    for key, truth in weights["theirs"].items():
        assert torch.allclose(weights["ours"][key], truth, atol=1e-5), key


def test_multi_vector_scores() -> None:
    queries, documents = numbers(1, 4, 5, 6), numbers(2, 3, 2, 7, 6)
    query_mask = torch.arange(5) < torch.tensor([5, 3, 1, 4])[:, None]
    document_mask = torch.arange(7) < torch.tensor([[7, 2], [0, 4], [1, 6]])[..., None]
    for masks in ((None, None), (query_mask, document_mask), (query_mask.float(), document_mask.float())):
        for name in ("colbert_scores", "mean_colbert_scores"):
            weights = numbers(3, 4, 6) * (document_mask.any(-1).flatten() if masks[0] is not None else 1)

            def total(q: Tensor, d: Tensor, score: Any) -> Tensor:
                return (score(q, d, queries_mask=masks[0], documents_mask=masks[1]) * weights).sum()  # noqa: B023

            # the host's sums are in float32
            same(
                functools.partial(total, score=getattr(ours, name)),
                functools.partial(total, score=getattr(scoring, name)),
                (queries, documents),
                1e-6,
            )
    found = ours.colbert_scores(queries, documents, query_mask, document_mask)
    host = scoring.colbert_scores(queries, documents, query_mask, document_mask)
    assert (found[:, 2] == -1e9).all() and (host[:, 2] == -1e9).all()
    documents[0, 1] = 0.0  # padding without a mask
    assert torch.allclose(
        ours.colbert_scores(queries, documents),
        scoring.colbert_scores(queries, documents).double(),
        rtol=1e-6,
    )


def test_multi_vector_training(folders: tuple[str, str], tmp_path: Path) -> None:
    pairs = {key: sentences(12, seed) for seed, key in enumerate(("query", "positive", "negative"))}
    logs = {}
    for label, score in (("theirs", None), ("ours", ours.colbert_scores)):
        torch.manual_seed(0)
        model = MultiVectorEncoder(folders[0], device="cpu")
        loss = multi_vector.MultiVectorMultipleNegativesRankingLoss(model, similarity_fct=score)
        arguments = MultiVectorEncoderTrainingArguments(
            output_dir=str(tmp_path / label), per_device_train_batch_size=4, max_steps=3, logging_steps=1,
            learning_rate=1e-2, optim="sgd", report_to=[], save_strategy="no", use_cpu=True, seed=1, disable_tqdm=True,
        )  # fmt: skip
        trainer = MultiVectorEncoderTrainer(
            model=model, args=arguments, train_dataset=Dataset.from_dict(pairs), loss=loss
        )
        trainer.train()
        logs[label] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(set(logs["theirs"])) == 3
    assert logs["ours"] == pytest.approx(logs["theirs"], rel=1e-3)


def test_multi_vector_memory() -> None:
    queries, documents = (
        numbers(1, 32, 32, 32, dtype=torch.float32),
        numbers(2, 32, 1, 128, 32, dtype=torch.float32),
    )
    host = memory(lambda q, d: scoring.colbert_scores(q, d).sum(), queries, documents)
    fused = memory(lambda q, d: ours.colbert_scores(q, d).sum(), queries, documents)
    assert host > 32 * 32 * 32 * 128 * 4 > 4 * fused
