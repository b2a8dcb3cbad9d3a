"""Empty, degenerate, masked and extreme inputs of word-region attention."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from jrl_kernels import word_region_scores
from jrl_kernels.ops.word_region.cases import SETTINGS, SHAPES, Shape, make_inputs
from jrl_kernels.ops.word_region.settings import POOL
from tests.ops.conformance import BACKENDS, assert_close_to_truth, cast, leaves, value_and_gradients


def gradients(scores: Tensor, arguments: dict[str, Any]) -> dict[str, Tensor]:
    inputs = leaves(arguments)
    found = torch.autograd.grad(scores.sum(), list(inputs.values()), allow_unused=True)
    pairs = zip(inputs.items(), found, strict=True)
    return {name: torch.zeros_like(leaf) if g is None else g for (name, leaf), g in pairs}


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
class TestEdges:
    def test_one_of_everything(self, backend: str, device: str) -> None:
        """One region: the context is the region, whatever the attention."""
        arguments = make_inputs(Shape(1, 1, 1, 1, 6), device=device, factors=True)
        found = value_and_gradients(partial(word_region_scores, pool="sum", backend=backend), arguments)
        cosine = torch.cosine_similarity(arguments["regions"], arguments["words"], dim=2)
        torch.testing.assert_close(found["output 0"], 2 * cosine)
        assert abs(float(found["d attention_scale"])) < 1e-6

    @pytest.mark.parametrize(("images", "captions"), [(0, 0), (0, 3), (3, 0)])
    def test_no_images_or_captions(self, backend: str, device: str, images: int, captions: int) -> None:
        arguments = make_inputs(Shape(images, captions, 4, 5, 3, 2), device=device)
        for pool, match in itertools.product(POOL, ("cosine", "dot")):
            scores = word_region_scores(**arguments, pool=pool, match=match, backend=backend)
            assert scores.shape == (images, captions, 4)[: scores.dim()]
            assert not any(g.any() for g in gradients(scores, arguments).values())

    @pytest.mark.parametrize("setting", SETTINGS)
    def test_a_masked_image_and_caption_contribute_nothing(
        self, backend: str, device: str, setting: str, nan_filled_allocations: None
    ) -> None:
        """Their scores are 0, and nothing reaches their features, padding or another pair's gradient."""
        call = partial(word_region_scores, backend=backend, **SETTINGS[setting])
        for shape in (SHAPES["tiny"], SHAPES["values"]):
            arguments = make_inputs(shape, device=device, masks=True)
            scores = call(**arguments)
            assert not scores[1].any() and not scores[:, 1].any()
            found = gradients(scores, arguments)
            kept = [i for i in range(shape.images) if i != 1], [c for c in range(shape.captions) if c != 1]
            alone = {
                name: value.detach()[kept[name.startswith("word")]].requires_grad_(value.requires_grad)
                for name, value in arguments.items()
            }
            expected = call(**alone)
            torch.testing.assert_close(scores[kept[0]][:, kept[1]], expected, rtol=1e-5, atol=1e-5)
            for name, gradient in gradients(expected, alone).items():
                side = "word" if name.startswith("word") else "region"
                assert not found[name][~arguments[f"{side}_mask"]].any()
                torch.testing.assert_close(found[name][kept[side == "word"]], gradient, rtol=1e-4, atol=1e-4)

    def test_everything_masked(self, backend: str, device: str) -> None:
        for side, setting in itertools.product(("region", "word"), SETTINGS):
            arguments = make_inputs(SHAPES["tiny"], device=device, factors=True)
            shape = arguments[f"{side}s"].shape[:2]
            arguments[f"{side}_mask"] = torch.zeros(shape, dtype=torch.bool, device=device)
            options = {k: v for k, v in SETTINGS[setting].items() if k not in arguments}
            scores = word_region_scores(**arguments, **options, backend=backend)
            assert not scores.any()
            for name, gradient in gradients(scores, arguments).items():
                assert not gradient.any(), name

    def test_nan_in_padding_stays_there(self, backend: str, device: str) -> None:
        for setting in SETTINGS.values():
            arguments = make_inputs(SHAPES["values"], device=device, masks=True)
            clean = value_and_gradients(partial(word_region_scores, backend=backend, **setting), arguments)
            with torch.no_grad():
                for name in ("regions", "region_values"):
                    arguments[name][~arguments["region_mask"]] = math.nan
                for name in ("words", "word_values"):
                    arguments[name][~arguments["word_mask"]] = math.inf
            found = value_and_gradients(partial(word_region_scores, backend=backend, **setting), arguments)
            torch.testing.assert_close(found, clean, rtol=0, atol=0)

    def test_nan_reaches_the_output(self, backend: str, device: str) -> None:
        for setting in ("xmc_gan", "damsm", "scan_i2t", "dvsa", "mutual_information"):
            for name in ("regions", "words", "region_values", "word_values"):
                arguments = make_inputs(SHAPES["values"], device=device)
                with torch.no_grad():
                    arguments[name][2, 0, 0] = math.nan
                scores = word_region_scores(**arguments, **SETTINGS[setting], backend=backend)
                hit = scores[:, 2] if name.startswith("word") else scores[2]
                assert hit.isnan().all() and int(scores.isnan().sum()) == hit.numel(), (setting, name)
                # A dot product is linear in its values, and a hard choice has no gradient to what it was chosen by.
                if setting not in ("dvsa", "mutual_information"):
                    assert gradients(scores, arguments)[name].isnan().any()

    def test_a_nan_factor_reaches_the_output(self, backend: str, device: str) -> None:
        arguments = make_inputs(SHAPES["tiny"], device=device)
        for name in ("attention_scale", "pool_scale", "scale"):
            factor = torch.tensor(math.nan, device=device)
            assert word_region_scores(**arguments, **{name: factor}, backend=backend).isnan().all()

    def test_extreme_scales(self, backend: str, device: str) -> None:
        """Attention logits in the hundreds and thousands, of either sign, and none at all."""
        for scale, match in itertools.product((0.0, -7.0, 100.0, 1000.0), ("cosine", "dot")):
            arguments = make_inputs(SHAPES["ragged"], device=device, masks=True, factors=True)
            arguments["attention_scale"] = torch.tensor(scale, device=device, requires_grad=True)
            options = {"match": match, "normalize": match == "cosine"}
            call = partial(word_region_scores, **options)
            truth = value_and_gradients(partial(call, backend="reference"), cast(arguments, torch.float64))
            plain = value_and_gradients(partial(call, backend="reference"), arguments)
            found = value_and_gradients(partial(call, backend=backend), arguments)
            assert_close_to_truth(found, plain, truth, torch.float32)

    def test_large_features(self, backend: str, device: str) -> None:
        """Dots of several thousands: nothing overflows on the way to finite scores."""
        arguments = make_inputs(SHAPES["ragged"], device=device, masks=True)
        with torch.no_grad():
            for value in leaves(arguments).values():
                value *= 100
        for setting in ("damsm", "mutual_information", "dvsa", "scan_t2i"):
            call = partial(word_region_scores, **SETTINGS[setting])
            truth = value_and_gradients(partial(call, backend="reference"), cast(arguments, torch.float64))
            plain = value_and_gradients(partial(call, backend="reference"), arguments)
            found = value_and_gradients(partial(call, backend=backend), arguments)
            assert_close_to_truth(found, plain, truth, torch.float32)

    def test_ties_go_to_the_first_region(self, backend: str, device: str) -> None:
        # Whole numbers: their dots are exact, in whatever order they are summed.
        regions = torch.tensor([1.0, -2.0, 3.0, 1.0], device=device).repeat(1, 6, 1).requires_grad_()
        mask = torch.tensor([[False, True, True, False, True, True]], device=device)
        words = torch.arange(24.0, device=device).reshape(2, 3, 4) - 12
        scores = word_region_scores(regions, words, region_mask=mask, preset="dvsa", backend=backend)
        (gradient,) = torch.autograd.grad(scores.sum(), regions)
        torch.testing.assert_close(gradient[0, 1], words.sum((0, 1)))
        assert not gradient[0, [0, 2, 3, 4, 5]].any()

    def test_duplicate_regions_share_the_attention(self, backend: str, device: str) -> None:
        arguments = make_inputs(Shape(2, 3, 4, 5, 6), device=device)
        twice = {**arguments, "regions": torch.cat([arguments["regions"]] * 2, 1)}
        call = partial(word_region_scores, backend=backend)
        torch.testing.assert_close(call(**twice), call(**arguments), rtol=1e-5, atol=1e-5)

    def test_zero_vectors(self, backend: str, device: str) -> None:
        """A word or a whole image of zeros matches nothing: 0, and finite gradients elsewhere."""
        for setting in ("xmc_gan", "damsm", "scan_t2i", "scan_i2t"):
            arguments = make_inputs(SHAPES["tiny"], device=device)
            with torch.no_grad():
                arguments["words"][0, 2] = 0
                arguments["regions"][2] = 0
            options = {**SETTINGS[setting], "pool": "none", "scale": 1.0}
            matches = word_region_scores(**arguments, **options, backend=backend)
            assert matches.isfinite().all() and not matches[2].any()
            if options.get("preset") != "scan_i2t":
                assert not matches[:, 0, 2].any()
            found = gradients(matches[:2], arguments)
            assert all(g.isfinite().all() for g in found.values())
            # An item of length zero that is attended over does have one, of the size of 1 over the normalisation's least norm.
            if setting in ("xmc_gan", "scan_t2i"):
                assert all(float(g.abs().max()) < 1e3 for g in found.values())

    def test_opposite_values_cancel(self, backend: str, device: str) -> None:
        """A context of length zero: the cosine's least norm keeps it finite."""
        regions = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]], device=device, requires_grad=True)
        words = torch.tensor([[[0.0, 1.0]]], device=device, requires_grad=True)
        score = word_region_scores(regions, words, pool="sum", backend=backend)
        assert not score.any()
        assert all(g.isfinite().all() for g in torch.autograd.grad(score.sum(), (regions, words)))

    def test_strided_and_expanded_inputs(self, backend: str, device: str) -> None:
        regions = torch.randn(6, 20, 3, device=device).permute(2, 0, 1)[:, :, ::2]
        words = torch.randn(1, 4, 10, device=device).expand(5, 4, 10)
        region_mask = torch.rand(6, 3, device=device).T > 0.3
        word_mask = (torch.arange(4, device=device) < 3).expand(5, 4)
        call = partial(word_region_scores, backend=backend)
        expected = call(
            regions.contiguous(),
            words.contiguous(),
            region_mask=region_mask.contiguous(),
            word_mask=word_mask.contiguous(),
        )
        found = call(regions, words, region_mask=region_mask, word_mask=word_mask)
        # A BLAS may sum the reference's strided operands in another order.
        tolerance = 1e-5 if backend == "reference" else 0
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)

    def test_masks_that_leave_everything(self, backend: str, device: str) -> None:
        for setting in SETTINGS.values():
            arguments = make_inputs(SHAPES["ragged"], device=device)
            masks = {
                f"{side}_mask": torch.ones(arguments[f"{side}s"].shape[:2], dtype=torch.bool, device=device)
                for side in ("region", "word")
            }
            call = partial(word_region_scores, backend=backend, **setting)
            torch.testing.assert_close(call(**arguments, **masks), call(**arguments))
