"""Golden values of the ranking loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from jrl_kernels import ranking_loss, ranking_loss_from_scores
from tests.ops.conformance import BACKENDS, det

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-9}
PRECISE = [
    pytest.param((*case.values, dtype), id=f"{case.id}-{dtype}".replace("torch.", ""), marks=case.marks)
    for case in BACKENDS
    for dtype in TOLERANCE
    if not (case.id == "triton" and dtype == torch.float64)
]

DVSA = [
    [12.74680145, 10.33750721, 5.76387411],
    [13.72352479, 9.33008119, 5.75864809],
    [12.27860086, 8.92894857, 4.95169404],
]
SCAN = [
    [1.21491621, 1.15782077, 1.07749928],
    [1.22012316, 1.09911988, 1.07215921],
    [1.22574044, 1.09046595, 1.05478274],
]


def unit(*shape: int, a: float) -> torch.Tensor:
    return F.normalize(det(*shape, a=a), dim=-1)


def checker(backend: str, device: str, dtype: torch.dtype) -> Any:
    """Compares a loss over embeddings or scores with a number known to `digits`, if not to all of the dtype's."""

    def check(
        golden: float, *tensors: torch.Tensor, divisor: float = 1.0, digits: float = 0.0, **options: Any
    ) -> None:
        def move(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.to(device, dtype if value.is_floating_point() else None)
            return value

        function = ranking_loss if len(tensors) == 2 else ranking_loss_from_scores
        options = {name: move(value) for name, value in options.items()}
        loss = float(function(*map(move, tensors), backend=backend, **options)) / divisor
        assert loss == pytest.approx(golden, rel=max(TOLERANCE[dtype], digits))

    return check


class TestGolden:
    """Numbers of the original codes and of the documents' formulas."""

    @pytest.fixture(params=PRECISE)
    def check(self, request: pytest.FixtureRequest) -> Any:
        return checker(*request.param)

    def test_vse(self, check: Any) -> None:
        check(18.2112177883, det(4, 6, a=0.37), det(4, 6, a=0.53))
        check(18.2112177883, unit(4, 6, a=0.37), unit(4, 6, a=0.53), metric="dot")

    def test_order_embeddings(self, check: Any) -> None:
        images, sentences = unit(4, 6, a=0.37).abs(), unit(4, 6, a=0.53).abs()
        check(1.9510441988, images, sentences, margin=0.05, metric="order")

    def test_structured_joint_embedding(self, check: Any) -> None:
        """Unnormalised dot products; the code divides by the number of pairs."""
        pair = det(4, 6, a=0.37), det(4, 6, a=0.53)
        check(1.8924201005, *pair, margin=1.0, metric="dot", direction="x_to_y", divisor=16)
        check(3.9254790694, *pair, margin=1.0, metric="dot", divisor=16)

    def test_queue(self, check: Any) -> None:
        """J_ic of multimodal contrastive training: the positive against a queue, no negatives from the batch."""
        check(
            4.3533981180,
            unit(4, 6, a=0.37),
            unit(4, 6, a=0.53),
            margin=0.2,
            negatives=unit(7, 6, a=0.71),
            exclude=torch.zeros(4, dtype=torch.int64),
            direction="x_to_y",
            reduction="mean",
        )

    def test_alignment_scores(self, check: Any) -> None:
        """The region-word scores of DVSA, known to eight decimals."""
        check(27.4315552325, torch.tensor(DVSA, dtype=torch.float64), margin=1.0, digits=1e-7)

    def test_stacked_cross_attention_scores(self, check: Any) -> None:
        """The text-to-image scores of SCAN, known to eight decimals, with both of its losses."""
        scores = torch.tensor(SCAN, dtype=torch.float64)
        check(2.6123422865, scores, digits=1e-7)
        check(1.5271071940, scores, hardest=True, digits=1e-7)
