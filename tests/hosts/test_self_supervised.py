"""Our NTXentLoss of lightly and of pytorch-metric-learning, and torchmultimodal's loss, against theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jrl_kernels.integrations import lightly as our_lightly
from jrl_kernels.integrations import torchmultimodal as our_torchmultimodal
from tests.hosts.compare import memory, numbers, same, same_training, train

lightly = pytest.importorskip("lightly.loss", reason="needs lightly; make test installs it")
from lightly.models.modules import SimCLRProjectionHead  # noqa: E402

metric = pytest.importorskip(
    "pytorch_metric_learning", reason="needs pytorch-metric-learning; make test installs it"
)
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers  # noqa: E402

from jrl_kernels.integrations import pytorch_metric_learning as our_metric  # noqa: E402

multimodal = pytest.importorskip(
    "torchmultimodal.modules.losses.contrastive_loss_with_temperature",
    reason="needs torchmultimodal; make test installs it",
)


class Encoder(nn.Module):
    """A backbone under lightly's projection head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 16))
        self.head = SimCLRProjectionHead(16, 16, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.backbone(x))
        return out


def images(step: int) -> tuple[Tensor, Tensor]:
    clean = numbers(step, 12, 3, 8, 8, dtype=torch.float32)
    noise = (0.3 * numbers(100 + step + k, 12, 3, 8, 8, dtype=torch.float32) for k in range(2))
    first, second = (clean + n for n in noise)
    return first, second


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_lightly(temperature: float) -> None:
    pair = numbers(1, 9, 6), numbers(2, 9, 6)
    same(our_lightly.NTXentLoss(temperature), lightly.NTXentLoss(temperature), pair)
    assert our_lightly.NTXentLoss().state_dict() == lightly.NTXentLoss().state_dict() == {}


def test_lightly_with_a_memory_bank() -> None:
    """Three batches of 4 fill a bank of 10, of the last one only two rows."""
    ours, theirs = (module.NTXentLoss(memory_bank_size=(10, 6)) for module in (our_lightly, lightly))
    ours.bank.copy_(theirs.memory_bank.bank)
    for step in range(4):
        pair = numbers(2 * step, 4, 6, dtype=torch.float32), numbers(2 * step + 1, 4, 6, dtype=torch.float32)
        same(ours, theirs, pair, 1e-5)
        assert torch.allclose(ours.bank, theirs.memory_bank.bank)
        with torch.no_grad():
            ours(*pair)
        assert torch.allclose(ours.bank, theirs.memory_bank.bank), "no gradient, no update"
    assert int(ours.bank_ptr) == int(theirs.memory_bank.bank_ptr) == 4


@pytest.mark.parametrize("bank", [0, (20, 8)])
def test_lightly_training(bank: Any) -> None:
    torch.manual_seed(3)
    theirs = lightly.NTXentLoss(memory_bank_size=bank)
    ours = our_lightly.NTXentLoss(memory_bank_size=bank)
    if bank:
        ours.bank.copy_(theirs.memory_bank.bank)

    def step(loss: Any) -> Any:
        return lambda model, number: loss(*(model(view) for view in images(number)))

    same_training(train(Encoder(), step(ours)), train(Encoder(), step(theirs)), 1e-4)


def test_lightly_memory() -> None:
    pair = numbers(1, 1024, 32, dtype=torch.float32), numbers(2, 1024, 32, dtype=torch.float32)
    host, fused = memory(lightly.NTXentLoss(), *pair), memory(our_lightly.NTXentLoss(), *pair)
    assert host > 3 * 2048 * 2048 * 4 > 8 * fused


def labelled(module: Any, labels: Tensor, ref_labels: Tensor | None = None, **options: Any) -> Any:
    loss = module.NTXentLoss(**options)

    def run(embeddings: Tensor, others: Tensor | None = None) -> Tensor:
        found: Tensor = loss(embeddings, labels, ref_emb=others, ref_labels=ref_labels)
        return found

    return run


LABELS = {
    "two views": torch.arange(6).repeat(2),
    "classes": torch.tensor([3, 1, 3, 3, 0, 1, 3, 7, 0, 3]),
    "alone": torch.tensor([5, 5, 2, 9, 5]),
    "one class": torch.tensor([4, 4, 4, 4]),
    "no positives": torch.arange(5),
    "negative numbers": torch.tensor([-1, -1, 0, -2, 0]),
}


@pytest.mark.parametrize("name", LABELS)
def test_metric_learning(name: str) -> None:
    labels = LABELS[name]
    embeddings = numbers(1, len(labels), 6)
    for options in (
        {},
        {"temperature": 0.5, "distance": distances.DotProductSimilarity(normalize_embeddings=False)},
    ):
        same(labelled(our_metric, labels, **options), labelled(losses, labels, **options), [embeddings])
    others, ref_labels = numbers(2, 8, 6), torch.tensor([3, 5, 4, -1, 0, 2, 9, 5])
    same(labelled(our_metric, labels, ref_labels), labelled(losses, labels, ref_labels), [embeddings, others])


def test_metric_learning_with_the_hosts_parts() -> None:
    labels, embeddings = LABELS["classes"], numbers(1, 10, 6)
    options: list[dict[str, Any]] = [
        {"reducer": reducers.AvgNonZeroReducer()},
        {"reducer": reducers.PerAnchorReducer()},
        {"embedding_regularizer": regularizers.LpRegularizer()},
        {"distance": distances.LpDistance()},  # the host's own code
    ]
    for given in options:
        same(labelled(our_metric, labels, **given), labelled(losses, labels, **given), [embeddings])

    def mined(module: Any, miner: Any) -> Any:
        loss = module.NTXentLoss(0.3)
        return lambda x: loss(x, labels, miner(x.detach(), labels))

    for miner in (miners.MultiSimilarityMiner(), miners.TripletMarginMiner(), miners.BatchHardMiner()):
        same(mined(our_metric, miner), mined(losses, miner), [embeddings])

    def wrapped(module: Any) -> Any:
        loss = losses.SelfSupervisedLoss(module.NTXentLoss())
        return lambda x, y: loss(x, y)

    same(wrapped(our_metric), wrapped(losses), [embeddings, numbers(2, 10, 6)])

    def remembered(module: Any) -> Any:
        loss = losses.CrossBatchMemory(module.NTXentLoss(), embedding_size=6, memory_size=16)
        return lambda x, y: loss(x, labels) + loss(y, labels.flip(0))

    pair = [embeddings.float(), numbers(2, 10, 6, dtype=torch.float32)]
    same(remembered(our_metric), remembered(losses), pair, 1e-4)


def test_metric_learning_training() -> None:
    labels = torch.arange(12).repeat(2) % 5

    def step(loss: Any) -> Any:
        return lambda model, number: loss(model(torch.cat(images(number))), labels)

    same_training(
        train(Encoder(), step(our_metric.NTXentLoss(0.2))),
        train(Encoder(), step(losses.NTXentLoss(0.2))),
        1e-4,
    )


def test_metric_learning_memory() -> None:
    labels = torch.arange(80).repeat(2)
    embeddings = numbers(1, 160, 32, dtype=torch.float32)
    host, fused = (memory(labelled(m, labels), embeddings) for m in (losses, our_metric))
    assert host > 10 * fused


def test_pairs_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, embeddings = LABELS["classes"], numbers(1, 10, 6)
    monkeypatch.setattr("jrl_kernels.integrations._softmax.PAIRS_AT_A_TIME", 7)
    same(labelled(our_metric, labels), labelled(losses, labels), [embeddings])


@pytest.mark.parametrize("start", [1.5, -1.0, 9.0])
def test_torchmultimodal(start: float) -> None:
    """Scales below and above the bounds too: clamped, and still learned."""
    mask = torch.arange(9) % 3 > 0

    def run(module: Any, **options: Any) -> Any:
        def loss(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
            head = module.ContrastiveLossWithTemperature().double()
            head.logit_scale.data.fill_(float(scale))
            value: Tensor = head(a, b, **options)
            (gradient,) = torch.autograd.grad(value, head.logit_scale, retain_graph=True)
            return value + (scale - scale.detach()) * gradient

        return loss

    given = [
        *(F.normalize(numbers(seed, 9, 6), dim=1) for seed in (1, 2)),
        torch.tensor(start, dtype=torch.float64),
    ]
    for options in ({}, {"mask": mask}):
        same(run(our_torchmultimodal, **options), run(multimodal, **options), given)
    head = our_torchmultimodal.ContrastiveLossWithTemperature(nn.Parameter(torch.tensor(start)), None, 2.0)
    head(*(t.float() for t in given[:2]), multimodal.BackpropType.GLOBAL)
    assert float(head.logit_scale.detach()) == min(start, 2.0)
    names = multimodal.ContrastiveLossWithTemperature().state_dict().keys()
    assert our_torchmultimodal.ContrastiveLossWithTemperature().state_dict().keys() == names


def test_torchmultimodal_training_and_memory() -> None:
    class Both(nn.Module):
        def __init__(self, module: Any) -> None:
            super().__init__()
            self.encoder = Encoder()
            self.loss = module.ContrastiveLossWithTemperature()

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            found: Tensor = self.loss(*(F.normalize(self.encoder(x), dim=1) for x in (first, second)))
            return found

    def step(model: nn.Module, number: int) -> Tensor:
        found: Tensor = model(*images(number))
        return found

    same_training(train(Both(our_torchmultimodal), step), train(Both(multimodal), step), 1e-4)
    pair = [F.normalize(numbers(seed, 2048, 32, dtype=torch.float32), dim=1) for seed in (1, 2)]
    heads = (module.ContrastiveLossWithTemperature() for module in (multimodal, our_torchmultimodal))
    host, fused = (memory(lambda a, b, h=head: h(a, b), *pair) for head in heads)
    assert host > 3 * 2048 * 2048 * 4 > 6 * fused


def test_messages() -> None:
    with pytest.raises(ValueError, match="temperature must not be 0"):
        our_lightly.NTXentLoss(0.0)
    for size in (5, (5,), (-1, 2)):
        with pytest.raises(ValueError, match=r"memory_bank_size must be 0 or \(entries, width\)"):
            our_lightly.NTXentLoss(memory_bank_size=size)
    head = our_torchmultimodal.ContrastiveLossWithTemperature()
    with pytest.raises(
        NotImplementedError, match=r"cross_entropy_kwargs are not supported, got \['label_smoothing'\]"
    ):
        head(torch.eye(2), torch.eye(2), cross_entropy_kwargs={"label_smoothing": 0.1})
    with pytest.raises(
        ValueError, match="embeddings_a and embeddings_b must have the same number of rows, got 3 and 2"
    ):
        head(torch.eye(3), torch.eye(3)[:2])
    with pytest.raises(TypeError, match="mask must be boolean"):
        head(torch.eye(2), torch.eye(2), mask=torch.tensor([1, 0]))
    for loss in (our_lightly.NTXentLoss(), our_lightly.NTXentLoss(memory_bank_size=(4, 3))):
        with pytest.raises(ValueError, match="out0 and out1 must have the same shape"):
            loss(torch.eye(3), torch.eye(3)[:2])
    with pytest.raises(ValueError, match="cannot both be None"):
        our_torchmultimodal.ContrastiveLossWithTemperature(1.0, None, None)
