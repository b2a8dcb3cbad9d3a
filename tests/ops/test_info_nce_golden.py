"""Golden values of the softmax contrastive losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from jrl_kernels import info_nce
from tests.ops.conformance import BACKENDS, det

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-9}
PRECISE = [
    pytest.param((*case.values, dtype), id=f"{case.id}-{dtype}".replace("torch.", ""), marks=case.marks)
    for case in BACKENDS
    for dtype in TOLERANCE
    if not (case.id == "triton" and dtype == torch.float64)
]


def unit(*shape: int, a: float) -> torch.Tensor:
    return F.normalize(det(*shape, a=a), dim=-1)


class TestGolden:
    """Numbers of the original codes and of the documents' formulas."""

    @pytest.fixture(params=PRECISE)
    def check(self, request: pytest.FixtureRequest) -> Any:
        backend, device, dtype = request.param

        def call(golden: float, x: torch.Tensor, y: torch.Tensor, **options: Any) -> None:
            def move(value: Any) -> Any:
                if isinstance(value, tuple):
                    return tuple(move(v) for v in value)
                if isinstance(value, torch.Tensor):
                    return value.to(device, dtype if value.is_floating_point() else None)
                return value

            options = {name: move(value) for name, value in options.items()}
            loss = float(info_nce(move(x), move(y), backend=backend, **options))
            assert loss == pytest.approx(golden, rel=TOLERANCE[dtype])

        return call

    def test_clip(self, check: Any) -> None:
        check(14.5379491598, det(4, 6, a=0.37), det(4, 6, a=0.53), scale=1 / 0.07, normalize=True)

    @pytest.mark.parametrize(
        ("multi_positive", "direction", "golden"),
        [
            ("mean", "x_to_y", 11.4005142996),
            ("mean", "y_to_x", 9.8665282039),
            ("mean", "both", 10.6335212517),
            ("sum", "x_to_y", 2.2739793301),
            ("sum", "y_to_x", 9.8665282039),
            ("sum", "both", 12.1405075340 / 2),
        ],
    )
    @pytest.mark.parametrize("form", ["ids", "sparse"])
    def test_group_vit_prompts(
        self,
        check: Any,
        form: str,
        multi_positive: str,
        direction: str,
        golden: float,
    ) -> None:
        """Three prompts an image, "mean" as the code has it and "sum" as the patent's equation 7 (which adds directions)."""
        owner = torch.arange(4).repeat_interleave(3)
        positives: Any = (torch.arange(4), owner)
        if form == "sparse":
            positives = (torch.arange(4)[:, None] == owner[None]).to_sparse_csr()
        texts = unit(4, 3, 6, a=0.71).reshape(12, 6)
        check(
            golden,
            unit(4, 6, a=0.37),
            texts,
            scale=1 / 0.07,
            positives=positives,
            multi_positive=multi_positive,
            direction=direction,
        )

    def test_queue(self, check: Any) -> None:
        """J_ii of multimodal contrastive training: the positive against a queue, no negatives from the batch."""
        check(
            12.8673491350,
            unit(4, 6, a=0.37),
            unit(4, 6, a=0.53),
            scale=1 / 0.07,
            negatives=unit(7, 6, a=0.71),
            exclude=torch.zeros(4, dtype=torch.int64),
            direction="x_to_y",
        )

    def test_tags(self, check: Any) -> None:
        """J_tag of multimodal contrastive training: several positives in a queue of nine."""
        mask = torch.zeros(4, 9, dtype=torch.bool)
        mask[[0, 0, 1, 2, 2, 2, 3], [0, 3, 1, 2, 4, 5, 8]] = True
        check(
            13.6240630408,
            unit(4, 6, a=0.37),
            unit(9, 6, a=0.71),
            scale=1 / 0.07,
            positives=mask.to_sparse_csr(),
            direction="x_to_y",
        )

    @pytest.mark.parametrize("backend", ["reference", "cpu"])
    def test_xmc_gan_contrastive(self, backend: str) -> None:
        """The code's loss adds the two directions, and reports accuracy over both."""
        loss, stats = info_nce(
            det(4, 6, a=0.37),
            det(4, 6, a=0.53),
            scale=10.0,
            normalize=True,
            return_stats=True,
            backend=backend,
        )
        assert 2 * float(loss) == pytest.approx(20.6409361870, rel=1e-9)
        assert (float(stats.accuracy_x_to_y) + float(stats.accuracy_y_to_x)) / 2 == 0.25
