"""Values and gradients of word-region attention: float64 truth, every setting, every gradient, tiles, properties."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jrl_kernels import attention_critic, word_region_scores
from jrl_kernels.ops.word_region import cpu, sweep
from jrl_kernels.ops.word_region.cases import BENCHMARK_SHAPES, SETTINGS, SHAPES, Shape, flops, make_inputs
from jrl_kernels.ops.word_region.settings import ATTEND, MATCH, POOL, PRENORMALIZE, PRESETS, resolve
from tests.ops.conformance import (
    BACKENDS,
    FUSED,
    FUSED_DTYPES,
    assert_close_to_truth,
    cast,
    leaves,
    value_and_gradients,
)


def judge(backend: str, dtype: torch.dtype, arguments: dict[str, Any], **options: Any) -> None:
    """`arguments` are in `dtype`; the truth is the reference on the same numbers in float64."""
    call = partial(word_region_scores, **options)
    fused = value_and_gradients(partial(call, backend=backend), arguments)
    plain = value_and_gradients(partial(call, backend="reference"), arguments)
    truth = value_and_gradients(partial(call, backend="reference"), cast(arguments, torch.float64))
    assert_close_to_truth(fused, plain, truth, dtype)


@pytest.mark.parametrize(("backend", "device", "dtype"), FUSED_DTYPES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_against_float64(backend: str, device: str, dtype: torch.dtype, setting: str) -> None:
    chosen = dict(SETTINGS[setting])
    by_norm = "norm" in resolve("test", chosen.pop("preset", None), chosen).prenormalize
    for shape, masks in itertools.product(SHAPES.values(), (False, True)):
        if masks and by_norm and dtype.itemsize == 2:
            # A word left alone in its caption is divided by itself: in half precision plain PyTorch's gradient is far off too.
            continue
        arguments = make_inputs(shape, dtype=dtype, device=device, masks=masks)
        judge(backend, dtype, arguments, **SETTINGS[setting])


@pytest.mark.parametrize(("backend", "device"), FUSED)
@pytest.mark.parametrize("prenormalize", PRENORMALIZE)
def test_every_option_with_every_other(
    backend: str, device: str, prenormalize: str, nan_filled_allocations: None
) -> None:
    """In float64 (float32 on a GPU), with 0-d tensors for the factors, which have gradients; in memory that starts as NaN."""
    dtype = torch.float64 if device == "cpu" else torch.float32
    for hard, match, attend, pool in itertools.product((False, True), MATCH, ATTEND, POOL):
        for shape in (SHAPES["tiny"], SHAPES["narrow values"]):
            arguments = make_inputs(shape, dtype=dtype, device=device, masks=True, factors=True)
            options = {"hard": hard, "match": match, "attend": attend, "pool": pool}
            judge(backend, dtype, arguments, prenormalize=prenormalize, normalize=False, **options)


@pytest.mark.parametrize(("backend", "device"), FUSED)
@pytest.mark.parametrize("given", ["region_values", "word_values"])
def test_values_of_one_side(backend: str, device: str, given: str) -> None:
    arguments = make_inputs(Shape(3, 4, 5, 6, 7, 7), device=device, masks=True)
    other = "word_values" if given == "region_values" else "region_values"
    alone = {name: value for name, value in arguments.items() if name != other}
    for match, attend in itertools.product(MATCH, ATTEND):
        judge(backend, torch.float32, alone, match=match, attend=attend)
        items = "words" if other == "word_values" else "regions"
        torch.testing.assert_close(
            word_region_scores(**alone, match=match, attend=attend, backend=backend),
            word_region_scores(**alone, **{other: alone[items]}, match=match, attend=attend, backend=backend),
        )


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_attention_critic(backend: str, device: str) -> None:
    arguments = make_inputs(SHAPES["values"], device=device, masks=True)
    renamed = {"regions": "keys", "words": "queries"}
    critic = {renamed.get(name, name): value for name, value in arguments.items()}
    for scale in (1.0, 0.3):
        expected = word_region_scores(
            **arguments, preset="mutual_information", attention_scale=scale, backend=backend
        )
        found = attention_critic(**critic, scale=scale, backend=backend)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        truth = value_and_gradients(
            partial(attention_critic, scale=scale, backend="reference"), cast(critic, torch.float64)
        )
        fused = value_and_gradients(partial(attention_critic, scale=scale, backend=backend), critic)
        assert_close_to_truth(fused, fused, truth, torch.float32)


@pytest.mark.parametrize("bytes_of_a_tile", [64, 3000])
def test_many_tiles_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, nan_filled_allocations: None, bytes_of_a_tile: int
) -> None:
    """Tiles of one caption with one image, and of all captions with two images."""
    monkeypatch.setattr(cpu, "TILE_BYTES", bytes_of_a_tile)
    for shape, masks, setting in itertools.product(
        (SHAPES["tiny"], SHAPES["narrow values"]),
        (False, True),
        ("xmc_gan", "damsm", "scan_i2t", "info_ground"),
    ):
        judge("cpu", torch.float32, make_inputs(shape, masks=masks), **SETTINGS[setting])


@pytest.mark.parametrize(("backend", "device"), FUSED)
@pytest.mark.parametrize("matrices", [False, True])
def test_norms_through_matrices_and_through_contexts(
    monkeypatch: pytest.MonkeyPatch, backend: str, device: str, matrices: bool
) -> None:
    monkeypatch.setattr(sweep, "sums_matrices", lambda *sizes: matrices)
    if backend == "cpu":
        monkeypatch.setattr(cpu, "through_matrices", lambda *sizes: matrices)
    for shape, hard in itertools.product(SHAPES.values(), (False, True)):
        judge(backend, torch.float32, make_inputs(shape, device=device, masks=True), hard=hard)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_gradcheck(backend: str, setting: str) -> None:
    arguments = make_inputs(Shape(3, 3, 3, 4, 3, 2), dtype=torch.float64, masks=True, factors=True, seed=3)
    inputs = leaves(arguments)

    def scores(*values: torch.Tensor) -> torch.Tensor:
        given = dict(zip(inputs, values, strict=True))
        return word_region_scores(**{**arguments, **SETTINGS[setting], **given}, backend=backend)

    assert torch.autograd.gradcheck(scores, tuple(inputs.values()), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_each_gradient_alone(backend: str, device: str) -> None:
    for shape, setting in itertools.product((SHAPES["values"], SHAPES["ragged"]), ("default", "damsm")):
        arguments = make_inputs(shape, device=device, masks=True, factors=True)
        call = partial(word_region_scores, backend=backend, **SETTINGS[setting])
        everything = value_and_gradients(call, arguments)
        inputs = leaves(arguments)
        for name in inputs:
            alone = {k: v.detach() if k in inputs and k != name else v for k, v in arguments.items()}
            found = value_and_gradients(call, alone)
            torch.testing.assert_close(found[f"d {name}"], everything[f"d {name}"], rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
class TestProperties:
    sizes = st.integers(1, 9)
    settings = st.sampled_from(list(SETTINGS))

    @staticmethod
    def close(found: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)

    @given(images=sizes, captions=sizes, words=sizes, regions=sizes, setting=settings, seed=sizes)
    def test_permuting_everything(
        self, backend: str, images: int, captions: int, words: int, regions: int, setting: str, seed: int
    ) -> None:
        arguments = make_inputs(
            Shape(images, captions, words, regions, 5), dtype=torch.float64, masks=True, seed=seed
        )
        call = partial(word_region_scores, backend=backend, **SETTINGS[setting])
        generator = torch.Generator().manual_seed(seed)
        order = [torch.randperm(n, generator=generator) for n in (images, captions, words, regions)]
        permuted = {
            "regions": arguments["regions"][order[0]][:, order[3]],
            "region_mask": arguments["region_mask"][order[0]][:, order[3]],
            "words": arguments["words"][order[1]][:, order[2]],
            "word_mask": arguments["word_mask"][order[1]][:, order[2]],
        }
        expected = call(**arguments)[order[0]][:, order[1]]
        if expected.dim() == 3:
            expected = expected[:, :, order[3 if SETTINGS[setting].get("attend") == "words" else 2]]
        self.close(call(**permuted), expected)

    @given(words=sizes, regions=sizes, setting=settings, seed=sizes)
    def test_padding_does_not_matter(
        self, backend: str, words: int, regions: int, setting: str, seed: int
    ) -> None:
        arguments = make_inputs(Shape(3, 2, words, regions, 5), dtype=torch.float64, seed=seed)
        call = partial(word_region_scores, backend=backend, **SETTINGS[setting])
        expected = call(**arguments)
        padded = {
            name: torch.cat([value, torch.full((value.shape[0], 3, 5), torch.nan)], 1)
            for name, value in arguments.items()
        }
        masks = {
            "region_mask": (torch.arange(regions + 3) < regions).expand(3, -1),
            "word_mask": (torch.arange(words + 3) < words).expand(2, -1),
        }
        found = call(**padded, **masks)
        self.close(found if found.dim() == 2 else found[:, :, : expected.shape[2]], expected)

    @given(
        images=sizes, captions=sizes, words=sizes, regions=sizes, pool=st.sampled_from(POOL[:-1]), seed=sizes
    )
    def test_swapping_the_sides(
        self, backend: str, images: int, captions: int, words: int, regions: int, pool: str, seed: int
    ) -> None:
        arguments = make_inputs(
            Shape(images, captions, words, regions, 5, 3), dtype=torch.float64, masks=True, seed=seed
        )
        swapped = {
            "regions": arguments["words"],
            "words": arguments["regions"],
            "region_values": arguments["word_values"],
            "word_values": arguments["region_values"],
            "region_mask": arguments["word_mask"],
            "word_mask": arguments["region_mask"],
        }
        call = partial(word_region_scores, prenormalize="leakyrelu+l2norm", pool=pool, backend=backend)
        self.close(call(**swapped, attend="regions"), call(**arguments, attend="words").T)

    @given(setting=st.sampled_from(["xmc_gan", "scan_t2i", "scan_i2t", "default"]), seed=sizes)
    def test_normalised_inputs_have_no_size(self, backend: str, setting: str, seed: int) -> None:
        arguments = make_inputs(SHAPES["tiny"], dtype=torch.float64, masks=True, seed=seed)
        call = partial(word_region_scores, backend=backend, **SETTINGS[setting])
        larger = {**arguments, "regions": 3 * arguments["regions"], "words": 0.2 * arguments["words"]}
        self.close(call(**larger), call(**arguments))

    @given(seed=sizes)
    def test_a_large_pool_scale_is_the_maximum(self, backend: str, seed: int) -> None:
        arguments = make_inputs(SHAPES["ragged"], dtype=torch.float64, masks=True, seed=seed)
        call = partial(word_region_scores, **arguments, backend=backend)
        torch.testing.assert_close(
            call(pool="logsumexp", pool_scale=1e4), call(pool="max"), rtol=1e-3, atol=1e-3
        )

    @given(seed=sizes)
    def test_a_large_attention_scale_is_hard(self, backend: str, seed: int) -> None:
        arguments = make_inputs(SHAPES["ragged"], dtype=torch.float64, masks=True, seed=seed)
        call = partial(word_region_scores, **arguments, pool="none", backend=backend)
        torch.testing.assert_close(call(attention_scale=1e9), call(hard=True), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_a_context_by_hand(backend: str, device: str) -> None:
    """Two regions at right angles; a word along the first, attention e^g : 1."""
    regions = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], device=device)
    words = torch.tensor([[[2.0, 0.0]]], device=device)
    share = float(torch.sigmoid(torch.tensor(3.0)))
    cosine = share / (share**2 + (1 - share) ** 2) ** 0.5
    call = partial(word_region_scores, regions, words, attention_scale=3.0, pool="sum", backend=backend)
    assert float(call()) == pytest.approx(cosine, rel=1e-5)
    assert float(call(match="dot")) == pytest.approx(share, rel=1e-5)
    assert float(call(match="dot", normalize=False, attention_scale=1.5)) == pytest.approx(
        2 * share, rel=1e-5
    )
    assert float(call(hard=True, match="dot", normalize=False)) == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_are_float32(backend: str, device: str, dtype: torch.dtype) -> None:
    arguments = make_inputs(SHAPES["values"], dtype=dtype, device=device)
    for pool in ("logsumexp", "none"):
        scores = word_region_scores(**arguments, pool=pool, backend=backend)
        assert scores.dtype == torch.float32
        found = torch.autograd.grad(scores.sum(), list(leaves(arguments).values()))
        assert all(gradient.dtype == dtype for gradient in found)


class TestPresets:
    def test_an_option_overrides_the_preset(self) -> None:
        arguments = make_inputs(SHAPES["tiny"], masks=True)
        explicit = {
            "normalize": False, "prenormalize": "softmax", "attention_scale": 3.0, "match": "cosine",
            "pool": "logsumexp", "pool_scale": 7.0, "scale": 10.0,
        }  # fmt: skip
        found = word_region_scores(
            **arguments, preset="damsm", attention_scale=3.0, pool="logsumexp", pool_scale=7.0
        )
        torch.testing.assert_close(found, word_region_scores(**arguments, **explicit), rtol=0, atol=0)
        plain = word_region_scores(**arguments, preset="scan_t2i", prenormalize="none")
        torch.testing.assert_close(
            plain, word_region_scores(**arguments, attention_scale=9.0, pool_scale=6.0)
        )

    def test_the_two_ways_to_pool_by_logsumexp(self) -> None:
        arguments = make_inputs(SHAPES["tiny"])
        call = partial(word_region_scores, **arguments, pool_scale=4.0)
        torch.testing.assert_close(call(pool="logsumexp_undivided"), 4 * call(pool="logsumexp"))

    def test_info_ground_divides_by_the_root_of_the_width(self) -> None:
        arguments = make_inputs(SHAPES["values"])
        torch.testing.assert_close(
            word_region_scores(**arguments, preset="info_ground"),
            word_region_scores(
                **arguments, preset="mutual_information", pool="none", attention_scale=7**-0.5
            ),
        )

    def test_every_preset_has_a_setting(self) -> None:
        assert set(PRESETS) <= set(SETTINGS)


def test_costs_are_those_of_the_floors() -> None:
    """150 + 51 microseconds at 790 TFLOP/s for 128 pairs of 32 words with 36 regions of width 1024."""
    shape = BENCHMARK_SHAPES["cuda"][0]
    assert flops(shape, backward=False) == 2 * 128 * 128 * 32 * 36 * (1024 + 36)
    assert flops(shape, backward=True) / 790e12 == pytest.approx(201e-6, rel=0.01)
