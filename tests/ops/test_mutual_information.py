"""Values and gradients of the bounds of the mutual information: golden values, float64 truth, edges, properties."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jrl_kernels import info_nce, mutual_information
from jrl_kernels.ops.mutual_information import sweep
from jrl_kernels.ops.mutual_information.cases import SHAPES, Shape, bytes_moved, flops, make_inputs
from tests.ops.conformance import (
    BACKENDS,
    FUSED,
    FUSED_DTYPES,
    assert_close_to_truth,
    cast,
    det,
    value_and_gradients,
)

VARIANTS: list[dict[str, Any]] = [
    {"bound": "nce"},
    {"bound": "nce", "direction": "y_to_x", "own_logit": -1.0},
    {"bound": "nce", "direction": "both"},
    {"bound": "nce", "direction": "both", "own_logit": -10.0},
    {"bound": "jsd"},
    {"bound": "dv"},
]
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-9}
PRECISE = [
    pytest.param(*case.values, dtype, id=f"{case.id}-{dtype}".replace("torch.", ""), marks=case.marks)
    for case in BACKENDS
    for dtype in TOLERANCE
    if not (case.id == "triton" and dtype == torch.float64)
]


def variants(shape: Shape) -> list[dict[str, Any]]:
    return [v for v in VARIANTS if v["bound"] == "nce" or shape.images > 1]


def judge(backend: str, dtype: torch.dtype, arguments: dict[str, Any]) -> None:
    """`arguments` are in `dtype`; the truth is the reference on the same numbers in float64."""
    fused, plain = (
        value_and_gradients(partial(mutual_information, backend=name), arguments)
        for name in (backend, "reference")
    )
    truth = value_and_gradients(
        partial(mutual_information, backend="reference"), cast(arguments, torch.float64)
    )
    assert_close_to_truth(fused, plain, truth, dtype)


@pytest.mark.parametrize(("backend", "device", "dtype"), PRECISE)
class TestGolden:
    """Deep InfoMax's official code (nce, jsd) and formula (dv), on locations against a global vector."""

    def test_deep_infomax(self, backend: str, device: str, dtype: torch.dtype) -> None:
        local, summary = (
            features.mT.contiguous().to(device, dtype)
            for features in (det(3, 5, 4, a=0.37), det(3, 5, 1, a=0.53))
        )
        tolerance = TOLERANCE[dtype]
        call = partial(mutual_information, backend=backend)
        candidates = math.log(1 + 2 * 4)
        nce = call(summary, local, own_logit=-10.0)
        assert candidates - float(nce) == pytest.approx(1.9420820162, rel=tolerance)
        turned = call(local, summary, own_logit=-10.0, direction="y_to_x")
        assert candidates - float(turned) == pytest.approx(1.9420820162, rel=tolerance)
        assert float(call(local, summary, bound="jsd")) == pytest.approx(0.1413780092, rel=tolerance)
        assert float(call(local, summary, bound="dv")) == pytest.approx(0.3107091438, rel=tolerance)

    def test_without_its_own_locations(self, backend: str, device: str, dtype: torch.dtype) -> None:
        """The formula of the paper, written out pair by pair: no constant of the image's own locations."""
        x, y = det(3, 2, 5, a=0.37).to(device, dtype), det(3, 4, 5, a=0.53).to(device, dtype)
        total, dots = 0.0, torch.einsum("nld,kmd->nlkm", x.double(), y.double())
        for n in range(3):
            for location in range(2):
                others = sum(math.exp(dots[n, location, k, m]) for k in range(3) if k != n for m in range(4))
                for m in range(4):
                    own = math.exp(dots[n, location, n, m])
                    total += math.log(9) + math.log(own / (own + others))
        found = mutual_information(x, y, backend=backend)
        assert float(found) == pytest.approx(total / 24, rel=TOLERANCE[dtype])


@pytest.mark.parametrize(("backend", "device", "dtype"), FUSED_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_option_against_float64(backend: str, device: str, dtype: torch.dtype, shape: str) -> None:
    for options in variants(SHAPES[shape]):
        for masks, scale in ((False, 4.0), (True, 4.0), (False, 100.0)):
            arguments = make_inputs(SHAPES[shape], dtype=dtype, device=device, masks=masks, scale=scale)
            judge(backend, dtype, {**arguments, **options})


@pytest.mark.parametrize(("backend", "device"), FUSED)
@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(map(str, o.values())))
def test_many_tiles(
    backend: str,
    device: str,
    options: dict[str, Any],
    nan_filled_allocations: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More than one tile each way, none whole, and own blocks in several parts; in memory that starts as NaN."""
    monkeypatch.setattr(sweep, "OWN_ELEMENTS", 200)
    for masks in (False, True):
        arguments = make_inputs(Shape(53, 21, 23, 9), device=device, masks=masks)
        judge(backend, torch.float32, {**arguments, **options})


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(map(str, o.values())))
def test_gradcheck(backend: str, options: dict[str, Any]) -> None:
    names = ("x", "y", "scale")
    for masks in (False, True):
        arguments = make_inputs(Shape(3, 2, 3, 3), dtype=torch.float64, masks=masks) | options

        def bound(*values: torch.Tensor, given: dict[str, Any] = arguments) -> torch.Tensor:
            return mutual_information(**{**given, **dict(zip(names, values, strict=True))}, backend=backend)

        assert torch.autograd.gradcheck(bound, tuple(arguments[name] for name in names))
        if backend == "reference" and masks:
            assert torch.autograd.gradgradcheck(bound, tuple(arguments[name] for name in names))


@pytest.mark.parametrize(("backend", "device"), FUSED)
@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(map(str, o.values())))
def test_each_gradient_alone(backend: str, device: str, options: dict[str, Any]) -> None:
    arguments = make_inputs(SHAPES["local"], device=device) | options
    call = partial(mutual_information, backend=backend)
    everything = value_and_gradients(call, arguments)
    for name in ("x", "y", "scale"):
        alone = {k: v.detach() if k in ("x", "y", "scale") and k != name else v for k, v in arguments.items()}
        found = value_and_gradients(call, alone)
        torch.testing.assert_close(found[f"d {name}"], everything[f"d {name}"], rtol=0, atol=0)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
class TestEdges:
    def test_one_image(self, backend: str, device: str) -> None:
        """No other image: K = 1, and nce is 0 with no gradient."""
        for shape in (SHAPES["one"], SHAPES["single image"]):
            found = value_and_gradients(
                partial(mutual_information, direction="both", backend=backend),
                make_inputs(shape, device=device),
            )
            assert all(float(v.abs().max()) == 0 for v in found.values())

    @pytest.mark.parametrize(("images", "locations"), [(0, 3), (3, 0), (0, 0)])
    def test_empty(self, backend: str, device: str, images: int, locations: int) -> None:
        x = torch.randn(images, locations, 4, device=device, requires_grad=True)
        y = torch.randn(images, 2, 4, device=device, requires_grad=True)
        for options in variants(Shape(images, locations, 2, 4)):
            value = mutual_information(x, y, **options, backend=backend)
            dx, dy = torch.autograd.grad(value, (x, y))
            if options["bound"] == "nce" or locations == 0:
                assert float(value) == 0 and not dx.any() and not dy.any()

    def test_everything_masked(self, backend: str, device: str) -> None:
        for side in ("x_mask", "y_mask"):
            for options in VARIANTS:
                arguments = make_inputs(SHAPES["local"], device=device, masks=True) | options
                arguments[side] = torch.zeros_like(arguments[side])
                found = value_and_gradients(partial(mutual_information, backend=backend), arguments)
                assert all(not v.any() for v in found.values()), options

    def test_all_images_but_one_masked(self, backend: str, device: str) -> None:
        """Own pairs without any other: jsd and dv keep their first term alone, nce is 0."""
        for options in VARIANTS:
            arguments = make_inputs(SHAPES["local"], device=device, masks=True) | options
            for side in ("x_mask", "y_mask"):
                arguments[side] = torch.zeros_like(arguments[side])
                arguments[side][1] = True
            found = value_and_gradients(partial(mutual_information, backend=backend), arguments)
            assert all(v.isfinite().all() for v in found.values())
            assert not found["d x"][0].any() and not found["d y"][2:].any()
            truth = value_and_gradients(
                partial(mutual_information, backend="reference"), cast(arguments, torch.float64)
            )
            assert_close_to_truth(found, found, truth, torch.float32)

    def test_masked_locations_never_count(self, backend: str, device: str) -> None:
        """Not even where they hold NaN; and leaving them out by hand gives the same."""
        for options in VARIANTS:
            arguments = make_inputs(Shape(3, 4, 5, 6), device=device) | options
            kept = value_and_gradients(
                partial(mutual_information, backend=backend),
                {
                    k: v[:, :3].detach().requires_grad_() if k in ("x", "y") else v
                    for k, v in arguments.items()
                },
            )
            with torch.no_grad():
                arguments["x"][:, 3:] = math.nan
                arguments["y"][:, 3:] = math.inf
            for name, length in (("x", 4), ("y", 5)):
                arguments[f"{name}_mask"] = (torch.arange(length, device=device) < 3).expand(3, -1)
            found = value_and_gradients(partial(mutual_information, backend=backend), arguments)
            torch.testing.assert_close(found["output 0"], kept["output 0"], rtol=2e-5, atol=1e-6)
            for name in ("d x", "d y"):
                assert not found[name][:, 3:].any()
                torch.testing.assert_close(found[name][:, :3], kept[name], rtol=2e-4, atol=1e-6)

    def test_nan_reaches_the_output(self, backend: str, device: str) -> None:
        for options in VARIANTS:
            for where in ("x", "y", "scale"):
                arguments = make_inputs(SHAPES["local"], device=device) | options
                with torch.no_grad():
                    arguments[where].view(-1)[0] = math.nan
                found = value_and_gradients(partial(mutual_information, backend=backend), arguments)
                assert all(v.isnan().any() for v in found.values()), (options, where)

    def test_scores_of_thousands_and_duplicates(self, backend: str, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        x, y = (torch.randn(6, n, 16, generator=generator).to(device) for n in (5, 7))
        x[1] = x[0]
        y[3] = y[2]
        for options in VARIANTS:
            arguments = {
                "x": x.clone().requires_grad_(),
                "y": y.clone().requires_grad_(),
                "scale": torch.tensor(100.0, device=device, requires_grad=True),
                **options,
            }
            judge(backend, torch.float32, arguments)

    def test_zero_and_negative_scale(self, backend: str, device: str) -> None:
        for options in VARIANTS:
            for scale in (0.0, -7.0):
                judge(
                    backend,
                    torch.float32,
                    make_inputs(SHAPES["local"], device=device, scale=scale) | options,
                )

    def test_strided_and_expanded_inputs(self, backend: str, device: str) -> None:
        x = torch.randn(4, 6, 3, device=device).mT[..., ::2]
        y = torch.randn(1, 1, 3, device=device).expand(4, 5, 3)
        x_mask = torch.ones(3, 4, dtype=torch.bool, device=device).T
        for options in VARIANTS:
            given = {"x_mask": x_mask, "backend": backend, **options}
            expected = mutual_information(x.contiguous(), y.contiguous(), **given)
            tolerance = 1e-5 if backend == "reference" else 0
            found = mutual_information(x, y, **given)
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
class TestProperties:
    sizes = st.integers(2, 9)

    @given(images=sizes, left=sizes, right=sizes, width=sizes, options=st.sampled_from(VARIANTS))
    def test_swapping_sides(
        self, backend: str, images: int, left: int, right: int, width: int, options: dict[str, Any]
    ) -> None:
        arguments = make_inputs(Shape(images, left, right, width), masks=True, seed=left) | options
        swapped = arguments | {"x": arguments["y"], "y": arguments["x"]}
        swapped |= {"x_mask": arguments["y_mask"], "y_mask": arguments["x_mask"]}
        turn = {"x_to_y": "y_to_x", "y_to_x": "x_to_y", "both": "both"}
        swapped["direction"] = turn[options.get("direction", "x_to_y")]
        torch.testing.assert_close(
            mutual_information(**swapped, backend=backend),
            mutual_information(**arguments, backend=backend),
            rtol=2e-5,
            atol=2e-5,
        )

    @given(images=sizes, left=sizes, right=sizes, options=st.sampled_from(VARIANTS))
    def test_permuting_images_and_locations(
        self, backend: str, images: int, left: int, right: int, options: dict[str, Any]
    ) -> None:
        arguments = make_inputs(Shape(images, left, right, 4), masks=True, seed=right) | options
        generator = torch.Generator().manual_seed(images)
        order = torch.randperm(images, generator=generator)
        places = torch.randperm(left, generator=generator)
        permuted = arguments | {k: arguments[k][order] for k in ("x", "y", "x_mask", "y_mask")}
        permuted |= {k: permuted[k][:, places] for k in ("x", "x_mask")}
        torch.testing.assert_close(
            mutual_information(**permuted, backend=backend),
            mutual_information(**arguments, backend=backend),
            rtol=2e-5,
            atol=2e-5,
        )

    @given(images=st.integers(1, 9), seed=sizes, direction=st.sampled_from(["x_to_y", "y_to_x", "both"]))
    def test_global_nce_is_log_n_less_info_nce(
        self, backend: str, images: int, seed: int, direction: str
    ) -> None:
        arguments = make_inputs(Shape(images, 1, 1, 5), dtype=torch.float64, seed=seed)
        loss = info_nce(**arguments, direction=direction, backend=backend)
        found = mutual_information(**arguments, direction=direction, backend=backend)
        torch.testing.assert_close(found, math.log(images) - loss)

    @given(images=sizes, left=sizes, right=sizes)
    def test_nce_stays_below_its_ceiling(self, backend: str, images: int, left: int, right: int) -> None:
        arguments = make_inputs(Shape(images, left, right, 4), scale=50.0)
        ceiling = math.log(1 + (images - 1) * right)
        assert float(mutual_information(**arguments, backend=backend)) <= ceiling + 1e-5
        # Candidates at a constant logit join the denominator and not K: the bound only falls.
        lower = mutual_information(**arguments, own_logit=-10.0, backend=backend)
        assert float(lower) <= float(mutual_information(**arguments, backend=backend)) + 1e-5


@pytest.mark.gpu
def test_more_scores_than_32_bits_count() -> None:
    """66,000 x 66,000 scores exceed 2^31 and 2^32; with one location an image the bound is log N less InfoNCE's loss."""
    x = torch.randn(66_000, 32, device="cuda", dtype=torch.bfloat16)
    loss = info_nce(x, x, scale=0.3, direction="x_to_y", backend="triton")
    found = mutual_information(x, x, scale=0.3, backend="triton")
    torch.testing.assert_close(found, math.log(66_000) - loss, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_gradients_have_their_inputs_dtype(backend: str, device: str) -> None:
    arguments = make_inputs(SHAPES["local"], dtype=torch.bfloat16, device=device)
    found = value_and_gradients(partial(mutual_information, backend=backend), arguments)
    assert found["output 0"].dtype == found["d scale"].dtype == torch.float32
    assert found["d x"].dtype == found["d y"].dtype == torch.bfloat16


def test_costs() -> None:
    shape = Shape(2, 3, 5, 7)
    assert flops(shape, backward=False) == 2 * (2 * 3) * (2 * 5) * 7
    assert flops(shape, backward=True) == 4 * flops(shape, backward=False)
    assert bytes_moved(shape, torch.bfloat16, backward=True) == 3 * 2 * (2 * 3 + 2 * 5) * 7
