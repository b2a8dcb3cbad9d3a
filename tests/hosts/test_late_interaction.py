"""Our PyLate scores and late-interaction-kernels' calls against theirs."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jrl_kernels.integrations import late_interaction_kernels as our_kernels
from jrl_kernels.integrations import pylate as our_pylate
from tests.hosts.compare import memory, numbers, same, same_training, train
from tests.hosts.tiny_sentence_transformers import checkpoint, sentences

kernels = pytest.importorskip("late_interaction_kernels", reason="needs it; make test installs it")
pytest.importorskip("pylate", reason="needs pylate; make test installs it")
from late_interaction_kernels import reference  # noqa: E402
from pylate import losses, scores  # noqa: E402

QUERIES, DOCUMENTS = numbers(1, 4, 5, 6), numbers(2, 3, 7, 6)
QUERY_MASK = torch.arange(5) < torch.tensor([5, 3, 1, 0])[:, None]
DOCUMENT_MASK = torch.arange(7) < torch.tensor([7, 0, 3])[:, None]
MASKS = {
    "none": (None, None),
    "queries": (QUERY_MASK, None),
    "documents": (None, DOCUMENT_MASK),
    "both": (QUERY_MASK, DOCUMENT_MASK),
}


def weighed(score: Any, *shape: int, **options: Any) -> Any:
    weights = numbers(9, *shape)

    def run(*tensors: Tensor) -> Tensor:
        found = score(*tensors, **options)
        assert list(found.shape) == list(shape)
        return (found.double() * weights).sum()

    return run


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("kind", [torch.bool, torch.float64, torch.int64])
def test_pylate(masks: str, kind: torch.dtype) -> None:
    query_mask, document_mask = (None if m is None else m.to(kind) for m in MASKS[masks])
    given = {"queries_mask": query_mask, "documents_mask": document_mask}
    same(
        weighed(our_pylate.colbert_scores, 4, 3, **given),
        weighed(scores.colbert_scores, 4, 3, **given),
        (QUERIES, DOCUMENTS),
    )
    stacked = numbers(3, 3, 2, 7, 6)
    if document_mask is not None:
        given["documents_mask"] = torch.stack([document_mask, document_mask.flip(1)], 1)
    same(
        weighed(our_pylate.ColBERTScores(), 4, 6, **given),
        weighed(scores.ColBERTScores(), 4, 6, **given),
        (QUERIES, stacked),
    )
    candidates = numbers(4, 4, 2, 7, 6)
    if document_mask is not None:
        given["documents_mask"] = torch.cat(
            [torch.stack([document_mask, document_mask.flip(1)], 1), torch.ones(1, 2, 7, dtype=kind)]
        )
    same(
        weighed(our_pylate.colbert_kd_scores, 4, 2, **given),
        weighed(scores.colbert_kd_scores, 4, 2, **given),
        (QUERIES, candidates),
    )


def test_pylate_pairs_and_lists() -> None:
    documents = numbers(2, 4, 7, 6)
    same(
        weighed(our_pylate.colbert_scores_pairwise, 4),
        weighed(scores.colbert_scores_pairwise, 4),
        (QUERIES, documents),
    )
    found = our_pylate.colbert_scores(list(QUERIES.numpy()), list(documents), backend="torch")
    assert torch.allclose(found, scores.colbert_scores(list(QUERIES), list(documents)))


def test_the_two_meanings_of_a_masked_token() -> None:
    """All similarities negative: multiplied by 0 a masked token wins, excluded it does not."""
    queries, documents = torch.ones(1, 2, 3), -torch.ones(1, 4, 3)
    mask = torch.tensor([[True, True, False, False]])
    given = {"documents_mask": mask}
    assert our_pylate.colbert_scores(queries, documents, **given).item() == 0
    assert scores.colbert_scores(queries, documents, **given).item() == 0
    excluded = our_pylate.colbert_scores(queries, documents, **given, masked_documents="exclude")
    assert excluded.item() == -6 == our_pylate.ColBERTScores("exclude")(queries, documents, **given).item()
    candidates = our_pylate.colbert_kd_scores(
        queries, documents[None], documents_mask=mask[None], masked_documents="exclude"
    )
    assert candidates.item() == -6


class ColBERT(nn.Module):
    """What PyLate's losses ask of a model, over a tiny BERT."""

    skiplist: list[int] = []  # noqa: RUF012
    do_query_expansion = False

    def __init__(self, folder: str) -> None:
        super().__init__()
        import transformers

        self.bert = transformers.AutoModel.from_pretrained(folder)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        return dict(self.tokenizer(texts, padding="max_length", max_length=9, return_tensors="pt"))

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"token_embeddings": self.bert(**features).last_hidden_state}


@pytest.mark.parametrize("loss", ["Contrastive", "CachedContrastive", "Distillation"])
def test_pylate_training(loss: str, tmp_path: Path) -> None:
    model = ColBERT(checkpoint(tmp_path, 0))

    def step(metric: Any) -> Any:
        def run(model: Any, number: int) -> Tensor:
            criterion = getattr(losses, loss)(model, score_metric=metric)
            columns = [model.tokenize(sentences(6, 10 * number + seed)) for seed in range(3)]
            labels = None
            if loss == "Distillation":
                columns = [columns[0], {k: torch.cat([c[k] for c in columns[1:]]) for k in columns[0]}]
                labels = torch.randn(6, 2, generator=torch.Generator().manual_seed(number)).softmax(1)
            found: Tensor = criterion(columns, labels)
            return found

        return run

    metrics: tuple[Any, Any] = our_pylate.ColBERTScores(), scores.ColBERTScores()
    if loss == "Distillation":
        metrics = our_pylate.colbert_kd_scores, scores.colbert_kd_scores
    found, truth = (train(model, step(metric), 3) for metric in metrics)
    same_training(found, truth, 1e-3)


def test_pylate_memory() -> None:
    queries, documents = (
        numbers(1, 32, 32, 32, dtype=torch.float32),
        numbers(2, 32, 128, 32, dtype=torch.float32),
    )
    mask = torch.ones(32, 128, dtype=torch.bool)
    host, fused = (
        memory(lambda q, d, s=s: s(q, d, documents_mask=mask).sum(), queries, documents)
        for s in (scores.colbert_scores, our_pylate.colbert_scores)
    )
    assert host > 32 * 32 * 32 * 128 * 4 > 4 * fused


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("masks", MASKS)
def test_kernels(masks: str, normalize: bool) -> None:
    query_mask, document_mask = MASKS[masks]
    given: dict[str, Any] = {"normalize": normalize}
    pairs = [
        ((4, 3), QUERIES, DOCUMENTS, query_mask, document_mask),
        ((3,), QUERIES[1], DOCUMENTS, *(None if query_mask is None else query_mask[1],), document_mask),
        ((4,), QUERIES, DOCUMENTS[2], query_mask, *(None if document_mask is None else document_mask[2],)),
    ]
    for shape, q, d, q_mask, d_mask in pairs:
        options = {**given, "q_mask": q_mask, "d_mask": d_mask}
        same(
            weighed(our_kernels.maxsim, *shape, **options),
            weighed(reference.maxsim_reference, *shape, **options),
            (q, d),
        )
    one = our_kernels.maxsim(QUERIES[0], DOCUMENTS[0], backward="lowmem", **given)
    assert one.shape == () and torch.allclose(
        one, reference.maxsim_reference(QUERIES[0], DOCUMENTS[0], **given)
    )

    def each(q: Tensor, d: Tensor, q_mask: Any, d_mask: Any) -> Tensor:
        """The host's pairs are a GPU's alone; its reference, pair by pair."""
        rows = []
        for i in range(q.shape[0]):
            masks = {
                "q_mask": None if q_mask is None else q_mask[i],
                "d_mask": None if d_mask is None else d_mask[i],
            }
            rows.append(reference.maxsim_reference(q[i], d[i], **masks, **given).reshape(-1))
        return torch.stack(rows)

    candidates = numbers(4, 4, 2, 7, 6)
    d_mask = None if document_mask is None else torch.stack([document_mask[[0, 2]]] * 4)
    options = {"q_mask": query_mask, "d_mask": d_mask}
    same(
        weighed(functools.partial(our_kernels.maxsim, **given), 4, 2, **options),
        weighed(each, 4, 2, **options),
        (QUERIES, candidates),
    )
    options["d_mask"] = None if d_mask is None else d_mask[:, 0]
    same(
        weighed(lambda q, d: our_kernels.maxsim_pairs(q, d, **options, **given)[:, None], 4, 1),
        weighed(each, 4, 1, **options),
        (QUERIES, candidates[:, 0]),
    )


def test_padding_may_hold_anything() -> None:
    queries, documents = QUERIES.clone(), numbers(4, 4, 2, 7, 6)
    mask = torch.ones(4, 2, 7, dtype=torch.bool)
    mask[..., 5:] = False
    clean = [t.clone().requires_grad_() for t in (queries, documents)]
    dirty = [t.clone() for t in (queries, documents)]
    dirty[0][~QUERY_MASK] = torch.nan
    dirty[1][~mask] = torch.nan
    dirty = [t.requires_grad_() for t in dirty]
    for q, d in (clean, dirty):
        our_kernels.maxsim(q, d, q_mask=QUERY_MASK, d_mask=mask).sum().backward()
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a.grad, b.grad)


def test_packed_sequences() -> None:
    cu_q, cu_d = (
        torch.tensor([0, 3, 3, 8], dtype=torch.int32),
        torch.tensor([0, 4, 9, 9, 11], dtype=torch.int32),
    )
    rows = numbers(1, 8, 6, dtype=torch.float32), numbers(2, 11, 6, dtype=torch.float32)

    def run(score: Any, **options: Any) -> Any:
        return weighed(lambda q, d: score(q, d, cu_q, cu_d, **options), 3, 4)

    for options in ({}, {"max_seqlen_q": 5, "max_seqlen_d": 6}):
        same(run(our_kernels.maxsim_varlen, **options), run(reference.maxsim_reference_varlen), rows, 1e-5)


def test_the_scorer_trains_alike() -> None:
    """late-interaction-kernels' MaxSimScorer, and the same model with our call in its place."""

    class Model(nn.Module):
        def __init__(self, score: Any) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words, self.pieces = nn.Embedding(30, 16), nn.Embedding(30, 16)
            self.score = score

        def forward(self, number: int) -> Tensor:
            source = torch.Generator().manual_seed(number)
            ids = torch.randint(30, (8, 6), generator=source)
            mask = torch.rand(8, 6, generator=source) < 0.7
            scores = self.score(self.words(ids), self.pieces(ids.flip(1)), q_mask=mask, d_mask=mask.flip(1))
            return F.cross_entropy(scores / 0.5, torch.arange(8))

    def step(model: nn.Module, number: int) -> Tensor:
        found: Tensor = model(number)
        return found

    ours = functools.partial(our_kernels.maxsim, normalize=True)
    same_training(train(Model(ours), step), train(Model(kernels.MaxSimScorer()), step), 1e-4)
    queries, documents = (
        numbers(1, 32, 32, 32, dtype=torch.float32),
        numbers(2, 32, 128, 32, dtype=torch.float32),
    )
    host, fused = (
        memory(lambda q, d, s=s: s(q, d).sum(), queries, documents) for s in (kernels.MaxSimScorer(), ours)
    )
    assert host > 32 * 32 * 32 * 128 * 4 > 4 * fused


def test_messages() -> None:
    with pytest.raises(ValueError, match=r"masked_documents must be one of \['zero', 'exclude'\], got 'max'"):
        our_pylate.ColBERTScores("max")
    with pytest.raises(ValueError, match="backend must be one of PyLate's"):
        our_pylate.colbert_scores(QUERIES, DOCUMENTS, backend="cuda")
    with pytest.raises(ValueError, match="backward must be one of"):
        our_kernels.maxsim(QUERIES, DOCUMENTS, backward="fast")
    with pytest.raises(ValueError, match="Q must have 2 or 3 axes"):
        our_kernels.maxsim(QUERIES[None], DOCUMENTS)
    with pytest.raises(ValueError, match="needs a list of documents for each of 4 queries"):
        our_kernels.maxsim(QUERIES, DOCUMENTS[:, None])
    with pytest.raises(ValueError, match=r"Q and D must be \[B, L, d\] with one B"):
        our_kernels.maxsim_pairs(QUERIES, DOCUMENTS)
