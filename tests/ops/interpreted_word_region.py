"""The Triton kernels of word-region attention on CPU tensors, in Triton's interpreter, where 32 keys fit a tile and no more.

Run by test_word_region_triton.py, in processes that set TRITON_INTERPRET=1 before anything imports triton.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from jrl_kernels import attention_critic, word_region_scores
from jrl_kernels.ops.word_region import triton_kernel, triton_launch
from jrl_kernels.ops.word_region.cases import SETTINGS, Shape, make_inputs
from jrl_kernels.ops.word_region.reference import match as dense_match
from jrl_kernels.ops.word_region.sweep import EPS, Numbers, Problem, Wanted, gradients
from tests.ops import word_region_golden as golden
from tests.ops.conformance import assert_close_to_truth, cast, value_and_gradients

pytestmark = pytest.mark.usefixtures("nan_filled_allocations")

# Several tiles of queries, not one of them full; keys in one tile, and in several.
FUSED, STREAMED = Shape(3, 3, 7, 21, 19), Shape(3, 2, 9, 35, 18)
SHAPES = [FUSED, STREAMED]
# In float32 every shape with and without the cosine; of the halves each pair of dtype, shape and cosine once.
PRODUCTS = [
    *((torch.float32, shape, cosine) for shape in SHAPES for cosine in (True, False)),
    *((torch.bfloat16, shape, shape == FUSED) for shape in SHAPES),
    *((torch.float16, shape, shape != FUSED) for shape in SHAPES),
]
PRENORMALIZE = ["softmax", "l2norm", "l1norm", "leakyrelu", "leakyrelu+l2norm", "leakyrelu+l1norm"]
EVERYTHING = Wanted(True, True, True, True, True)


def problem_of(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    prenormalize: str = "none",
    hard: bool = False,
    cosine: bool = True,
    masks: bool = True,
    scale: float = 3.0,
) -> Problem:
    given = make_inputs(shape, dtype=dtype, masks=masks, seed=sum(shape))
    names = ("regions", "words", "region_values", "word_values", "region_mask", "word_mask")
    keys, queries, key_values, query_values, key_mask, query_mask = (
        None if given.get(name) is None else given[name].detach() for name in names
    )
    assert keys is not None
    assert queries is not None
    return Problem(
        keys,
        queries,
        key_values,
        query_values,
        key_mask,
        query_mask,
        torch.tensor(scale),
        prenormalize,
        hard,
        cosine,
    )


def found(problem: Problem, grad: Tensor) -> dict[str, Tensor]:
    """The match and every gradient of sum(match * grad), of the backend through the driver of its tiles."""
    match, log_sum_exp, norm = triton_kernel.forward(problem)
    assert match.dtype == log_sum_exp.dtype == norm.dtype == torch.float32
    assert log_sum_exp.isfinite().all()
    assert norm.isfinite().all()
    total = gradients(problem, triton_kernel, Numbers(grad, match, log_sum_exp, norm), EVERYTHING)
    results = {f"d {name}": value for name, value in total._asdict().items() if value is not None}
    return {"match": match, **results}


def expected(problem: Problem, grad: Tensor) -> dict[str, Tensor]:
    """The same from dense float64 attention: its cosine times the norm of the query's value, as constants of the operator."""
    operands = {
        name: getattr(problem, name).double().requires_grad_()
        for name in ("keys", "queries", "key_values", "query_values", "attention_scale")
        if getattr(problem, name) is not None
    }
    match = dense_match(
        operands["keys"],
        operands["queries"],
        operands.get("key_values"),
        operands.get("query_values"),
        problem.key_mask,
        problem.query_mask,
        operands["attention_scale"],
        problem.prenormalize,
        problem.hard,
        problem.cosine,
    )
    if problem.cosine:
        compared = operands.get("query_values", operands["queries"])
        match = match * torch.linalg.vector_norm(compared, dim=-1).clamp(min=EPS)
    found = torch.autograd.grad((match * grad).sum(), list(operands.values()), allow_unused=True)
    results = {"match": match.detach()}
    for (name, operand), gradient in zip(operands.items(), found, strict=True):
        results[f"d {name}"] = torch.zeros_like(operand) if gradient is None else gradient
    return results


def upstream(problem: Problem, size: float = 1.0) -> Tensor:
    images, captions, words = problem.keys.shape[0], *problem.queries.shape[:2]
    count = images * captions * words
    return size * torch.linspace(-1.0, 1.5, count).reshape(images, captions, words)


# Of the largest entry: rounding of the operands of the matrix products, and for the halves of the gradient tiles too.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2, torch.float16: 4e-3}


def assert_matches_dense(problem: Problem, size: float = 1.0, slack: float = 1.0) -> None:
    grad = upstream(problem, size)
    got, truth = found(problem, grad), expected(problem, grad)
    assert got.keys() == truth.keys()
    # A sum of terms of both signs over every score: its error is that of its largest terms, not of itself.
    weight = float(grad.abs().sum()) / 8
    for name, exact in truth.items():
        top = float(exact.abs().max())
        top = max(top, weight * 0.02) if name == "d attention_scale" else top
        error = float((got[name].double() - exact).abs().max())
        assert error <= slack * TOLERANCE[problem.keys.dtype] * top + 1e-30, (
            f"{name}: error {error:.3g} of {top:.3g}"
        )


class TestKernels:
    @pytest.mark.parametrize(("dtype", "shape", "cosine"), PRODUCTS)
    def test_soft_and_hard(self, shape: Shape, dtype: torch.dtype, cosine: bool) -> None:
        for hard in (False, True) if dtype == torch.float32 else (False,):
            assert_matches_dense(problem_of(shape, dtype, hard=hard, cosine=cosine))

    @pytest.mark.parametrize(("dtype", "shape", "cosine"), PRODUCTS)
    def test_values(self, shape: Shape, dtype: torch.dtype, cosine: bool) -> None:
        for hard in (False, True) if dtype == torch.float32 else (False,):
            assert_matches_dense(problem_of(shape._replace(value_width=23), dtype, hard=hard, cosine=cosine))

    @pytest.mark.parametrize(
        "shape", [Shape(1, 1, 1, 1, 1), Shape(2, 1, 40, 3, 16), Shape(1, 3, 1, 64, 2, 3)]
    )
    def test_shapes(self, shape: Shape) -> None:
        assert_matches_dense(problem_of(shape, masks=False))
        assert_matches_dense(problem_of(shape, masks=False, cosine=False))

    @pytest.mark.parametrize("scale", [-2.0, 0.0, 100.0])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_scales(self, shape: Shape, scale: float) -> None:
        problem = problem_of(shape, scale=scale)
        grad = upstream(problem)
        got, truth = found(problem, grad), expected(problem, grad)
        for name in ("match", "d keys", "d queries"):
            torch.testing.assert_close(
                got[name].double(), truth[name], rtol=1e-3, atol=3e-4 * max(1, abs(scale)) / 10
            )

    @pytest.mark.parametrize("cosine", [True, False])
    @pytest.mark.parametrize("shape", [FUSED, STREAMED._replace(value_width=11)])
    def test_several_tiles(self, shape: Shape, cosine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        problem = problem_of(shape, cosine=cosine)
        monkeypatch.setattr(triton_launch, "TILE_BYTES", 1 << 12)
        some_images, some_captions = triton_kernel.block(problem)
        assert some_images < shape.images or some_captions < shape.captions
        assert_matches_dense(problem._replace(prenormalize="l2norm"))

    @pytest.mark.parametrize("shape", SHAPES)
    def test_small_gradients_in_float16(self, shape: Shape) -> None:
        """The gradient of a mean over many pairs lies below what float16 holds."""
        assert_matches_dense(problem_of(shape, torch.float16), size=1e-9)

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_long_values(self, shape: Shape, dtype: torch.dtype) -> None:
        """Their products leave the range of float16, cosines do not."""
        problem = problem_of(shape._replace(value_width=23), dtype)
        assert problem.key_values is not None
        problem = problem._replace(key_values=problem.key_values * 300)
        # The gradients of long values are short: near the end of float16's range they keep fewer digits.
        assert_matches_dense(problem, slack=4.0)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_same_bits_twice(self, shape: Shape) -> None:
        problem = problem_of(shape, torch.bfloat16)
        first, second = (found(problem, upstream(problem)) for _ in range(2))
        for name, value in first.items():
            assert torch.equal(value, second[name]), name


class TestPrenormalization:
    @pytest.mark.parametrize("prenormalize", PRENORMALIZE)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_every_kind(self, shape: Shape, prenormalize: str) -> None:
        # "none" is what TestKernels has. A cosine hides the sums that the streamed kernels take first; it has tests below.
        for cosine in (True, False) if shape == FUSED else (False,):
            assert_matches_dense(problem_of(shape, prenormalize=prenormalize, cosine=cosine))

    @pytest.mark.parametrize("prenormalize", ["softmax", "leakyrelu+l2norm"])
    def test_captions_longer_than_a_tile(self, prenormalize: str) -> None:
        for shape in (Shape(2, 2, 35, 5, 8), Shape(1, 2, 35, 40, 8, 5)):
            assert_matches_dense(problem_of(shape, prenormalize=prenormalize))

    def test_hard(self) -> None:
        for shape in SHAPES:
            assert_matches_dense(problem_of(shape, prenormalize="softmax", hard=True))

    @pytest.mark.parametrize("prenormalize", ["l2norm", "leakyrelu+l1norm", "softmax"])
    def test_words_that_are_zero(self, prenormalize: str) -> None:
        """A column of zeros has no direction; its gradient is that of a_tr / eps, and no NaN."""
        for shape in SHAPES:
            problem = problem_of(shape, prenormalize=prenormalize, cosine=False, masks=False)
            problem.keys[0, 1] = 0.0
            got = found(problem, upstream(problem))
            for name, value in got.items():
                assert value.isfinite().all(), name

    def test_too_many_words(self) -> None:
        problem = problem_of(Shape(1, 1, 5000, 1, 1), prenormalize="l2norm", masks=False)
        with pytest.raises(NotImplementedError, match="at most 4096 queries together, got 5000"):
            triton_kernel.forward(problem)


class TestEdges:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_ties_go_to_the_lowest_index(self, shape: Shape) -> None:
        problem = problem_of(shape, hard=True, cosine=False)
        # Small integers: products with them are exact whatever the order of the sum.
        problem.keys[:] = 1.0
        problem.queries.mul_(4.0).round_()
        assert problem.key_mask is not None
        numbers = triton_kernel.forward(problem)
        grad = upstream(problem)
        dkeys = gradients(problem, triton_kernel, Numbers(grad, *numbers), EVERYTHING).keys
        assert dkeys is not None
        for image in range(shape.images):
            touched = (dkeys[image] != 0).any(1)
            first = problem.key_mask[image].nonzero()[:1, 0]
            assert touched.nonzero()[:, 0].tolist() == first.tolist()

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("hard", [False, True])
    @pytest.mark.parametrize("cosine", [True, False])
    def test_nan_reaches_what_attends_to_it_alone(self, shape: Shape, hard: bool, cosine: bool) -> None:
        problem = problem_of(shape, hard=hard, cosine=cosine, masks=False)
        key_mask = torch.ones(problem.keys.shape[:2], dtype=torch.bool)
        key_mask[1, 0] = False
        problem = problem._replace(key_mask=key_mask)
        problem.keys[0, 3, 1] = math.nan
        match = triton_kernel.forward(problem)[0]
        assert match[0].isnan().all()
        assert match[1:].isfinite().all()
        if cosine:
            return
        problem.keys[0, 3, 1] = 0.0
        problem.queries[1, 2, 0] = math.nan
        match = triton_kernel.forward(problem)[0]
        assert match[:, 1, 2].isnan().all()
        assert int(match.isnan().sum()) == match.shape[0]

    @pytest.mark.parametrize("shape", SHAPES)
    def test_contexts_of_length_zero(self, shape: Shape) -> None:
        problem = problem_of(shape._replace(value_width=5), masks=False)
        assert problem.key_values is not None
        problem.key_values[0] = 0.0
        assert_matches_dense(problem)

    def test_a_query_of_zeros_in_float16(self) -> None:
        """The glue divides its slope by EPS: nobody else's gradient may be lost next to it."""
        for shape in SHAPES:
            problem = problem_of(shape, torch.float16, masks=False)
            problem.queries[0, 0] = 0.0
            grad = upstream(problem)
            truth = expected(problem, grad)["d keys"]
            grad[:, 0, 0] *= 1e8
            got = found(problem, grad)
            assert got["d keys"].isfinite().all()
            torch.testing.assert_close(
                got["d keys"].double(), truth, rtol=0.0, atol=4e-3 * float(truth.abs().max())
            )

    def test_no_images_or_captions(self) -> None:
        for shape in (Shape(0, 2, 3, 4, 5), Shape(2, 0, 3, 4, 5)):
            scores = word_region_scores(**make_inputs(shape), backend="triton")
            assert scores.shape == shape[:2]


class TestPublic:
    """Through the public functions: what surrounds the kernels knows nothing of the backend, but must agree with it."""

    @pytest.mark.parametrize("settings", list(SETTINGS))
    def test_settings(self, settings: str) -> None:
        self.compare(FUSED, torch.float32, SETTINGS[settings])

    @pytest.mark.parametrize(
        "settings", ["xmc_gan", "damsm", "scan_i2t", "mutual_information", "hard cosine"]
    )
    def test_settings_with_many_keys(self, settings: str) -> None:
        self.compare(STREAMED, torch.float32, SETTINGS[settings])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("shape", [FUSED, STREAMED])
    def test_halves(self, shape: Shape, dtype: torch.dtype) -> None:
        either = (shape == FUSED) == (dtype == torch.bfloat16)
        self.compare(shape, dtype, SETTINGS["scan_t2i" if either else "dvsa"])

    def compare(self, shape: Shape, dtype: torch.dtype, settings: dict[str, Any]) -> None:
        # Of the halves, the gradient of a factor is what little is left of many terms of both signs: their rounding, mostly.
        arguments = make_inputs(shape, dtype=dtype, masks=True, factors=dtype == torch.float32) | settings
        results = [
            value_and_gradients(partial(word_region_scores, backend=backend), cast(arguments, precision))
            for backend, precision in (("triton", dtype), ("reference", dtype), ("reference", torch.float64))
        ]
        assert_close_to_truth(results[0], results[1], results[2], dtype)

    def test_critic_with_padding_of_nan(self) -> None:
        given = make_inputs(FUSED._replace(value_width=5), masks=True)
        names = ("regions", "region_values", "words", "word_values")
        operands = [given[name].detach() for name in names]
        masks = {"region_mask": given["region_mask"], "word_mask": given["word_mask"]}
        plain = attention_critic(*operands, **masks, backend="reference")
        for tensor, mask in zip(
            operands, ("region_mask", "region_mask", "word_mask", "word_mask"), strict=True
        ):
            tensor[~masks[mask]] = math.nan
            tensor.requires_grad_()
        scores = attention_critic(*operands, **masks, backend="triton")
        torch.testing.assert_close(scores, plain, rtol=1e-5, atol=1e-5)
        for gradient in torch.autograd.grad(scores.sum(), operands):
            assert gradient.isfinite().all()


class TestGolden:
    @pytest.mark.parametrize("case", golden.CASES, ids=lambda case: case.__name__)
    def test_values(self, case: golden.Case) -> None:
        golden.check(case, "triton", "cpu", torch.float32)
