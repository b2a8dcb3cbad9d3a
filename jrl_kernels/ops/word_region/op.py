"""word_region_scores and attention_critic: every image against every caption by attention between their parts."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _checks, _dispatch
from . import autograd, reference  # noqa: F401  (autograd registers torch.ops.jrl.word_region_*)
from .backends import BACKENDS as BACKENDS
from .pooling import pooled
from .settings import INVERSE_ROOT, PRESETS, Settings, resolve


def word_region_scores(
    regions: Tensor,
    words: Tensor,
    *,
    region_values: Tensor | None = None,
    word_values: Tensor | None = None,
    region_mask: Tensor | None = None,
    word_mask: Tensor | None = None,
    normalize: bool | None = None,
    prenormalize: str | None = None,
    attention_scale: float | Tensor | None = None,
    hard: bool | None = None,
    match: str | None = None,
    pool: str | None = None,
    pool_scale: float | Tensor | None = None,
    attend: str | None = None,
    scale: float | Tensor | None = None,
    preset: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """Scores of all images with all captions (XMC-GAN, DAMSM, SCAN, DVSA, info-ground, ...) without their attention maps.

    For image b with regions r and caption c with words w_t, over the valid regions::

        a_tr = w_t . r          alpha_t = softmax_r(attention_scale * pre(a_tr))      context_t = sum_r alpha_tr region_value_r
        match_t = cos(word_value_t, context_t)   or their dot product       score_bc = scale * pool_t match_t

    `pre` normalises over the words for each region. attend="words" swaps the roles: each region attends over the words and the
    matches are pooled over regions. Sources: Zhang et al. 2021 and US 2023/0081171 (xmc_gan), Xu et al. 2018 (damsm), Lee et al.
    2018 (scan_t2i, scan_i2t), Karpathy & Fei-Fei 2015 (dvsa), US 2021/0056353 (mutual_information), Gupta et al. 2020
    (info_ground). Unlike their code, which loops over captions, every pair is computed at once and the maps and contexts are
    never stored: memory is O(B C T) and the inputs.

    Args:
        regions: [B, R, D], float32, bfloat16 or float16 (float64 on "reference" and "cpu").
        words: [C, T, D], like regions.
        region_values: [B, R, E], what contexts are made of; None = the regions.
        word_values: [C, T, E], what contexts are compared with; None = the words.
        region_mask: bool [B, R], True = valid; None = all.
        word_mask: bool [C, T], True = valid.
        normalize: divide regions, words and their values by their Euclidean norm first. Default True.
        prenormalize: "none" (default), "softmax", "l2norm", "l1norm", "leakyrelu", "leakyrelu+l2norm" or "leakyrelu+l1norm" over
            the valid words of a caption for each region (norms + 1e-8, slope 0.1).
        attention_scale: inverse temperature of the attention, a number or a 0-d tensor (with gradient). Default 5.
        hard: attend to the best region alone, the lowest index among ties. Default False.
        match: "cosine" (default; norms at least 1e-8) or "dot".
        pool: "sum", "mean", "max", "logsumexp" (default; (1/g) log sum_t exp(g match_t)), "logsumexp_undivided" (without the 1/g)
            or "none".
        pool_scale: g, positive; a number or a 0-d tensor (with gradient). Default 5.
        attend: what is attended over, "regions" (default) or "words".
        scale: factor of the scores, a number or a 0-d tensor (with gradient). Default 1.
        preset: "xmc_gan", "damsm", "scan_t2i", "scan_i2t", "info_ground", "mutual_information" or "dvsa": the options of that
            system; an option that is given has precedence.
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        [B, C] in float32 (float64); with pool="none" the matches times `scale`, [B, C, T] ([B, C, R] for attend="words"), 0 at
        padding. A pair whose image has no valid region or whose caption has no valid word scores exactly 0, without gradient.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, device or value.
        NotImplementedError: no backend takes these tensors here; a second derivative of a fused backward was asked for.

    Gradients: regions, words, region_values, word_values, attention_scale, pool_scale, scale; once differentiable, twice with
    backend="reference".
    """
    op = "word_region_scores"
    options = {
        "normalize": normalize,
        "prenormalize": prenormalize,
        "attention_scale": attention_scale,
        "hard": hard,
        "match": match,
        "pool": pool,
        "pool_scale": pool_scale,
        "attend": attend,
        "scale": scale,
    }
    settings = resolve(op, preset, options)
    image = _Side("regions", regions, "region_values", region_values, "region_mask", region_mask)
    caption = _Side("words", words, "word_values", word_values, "word_mask", word_mask)
    return _scores(op, image, caption, settings, backend)


def attention_critic(
    keys: Tensor,
    region_values: Tensor,
    queries: Tensor,
    word_values: Tensor,
    *,
    region_mask: Tensor | None = None,
    word_mask: Tensor | None = None,
    scale: float | Tensor = 1.0,
    backend: str = "auto",
) -> Tensor:
    """The attention critic of "Joint representation learning from images and text", of all images with all captions.

    With s_tr = softmax_r(scale * queries_t . keys_r) over the valid regions of image b::

        f_bc = sum_t sum_r s_tr word_values_t . region_values_r

    Source: US 2021/0056353 A1, equation 3; its `scale` is 1 (1 / sqrt(D) is common). f is a sum over words, so it grows with a
    caption's length. `word_region_scores(preset="mutual_information")` with its four projections under their own names.

    Args:
        keys: [B, R, D] of the image's locations, float32, bfloat16 or float16 (float64 on "reference" and "cpu").
        region_values: [B, R, E], like keys.
        queries: [C, T, D] of the caption's words, like keys.
        word_values: [C, T, E], like keys.
        region_mask: bool [B, R], True = valid; None = all.
        word_mask: bool [C, T], True = valid.
        scale: factor of the attention's logits, a number or a 0-d tensor (with gradient).
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        [B, C] in float32 (float64); 0 for an image without valid regions or a caption without valid words.

    Raises, Gradients: as in `word_region_scores`.
    """
    op = "attention_critic"
    settings = PRESETS["mutual_information"]._replace(attention_scale=scale)
    image = _Side("keys", keys, "region_values", region_values, "region_mask", region_mask)
    caption = _Side("queries", queries, "word_values", word_values, "word_mask", word_mask)
    for side in (image, caption):
        _checks.tensor(op, side.values_name, side.values)
    return _scores(op, image, caption, settings, backend, attention_scale="scale")


class _Side(NamedTuple):
    """What a user gave of the images or of the captions, under the names that messages use."""

    name: str
    items: Tensor
    values_name: str
    values: Tensor | None
    mask_name: str
    mask: Tensor | None

    def check(
        self, op: str, axes: str, width: str, sizes: dict[str, int], like_name: str, like: Tensor
    ) -> None:
        """Shapes, devices and mask. `axes` names those of the items, as "B R"; `width` that of the values, "E" or "D"."""
        _checks.shaped(op, self.name, self.items, f"{axes} D", sizes)
        _checks.same_device(op, self.name, self.items, like_name, like)
        if self.items.shape[1] == 0:
            raise ValueError(
                f"{op}: {self.name} must have at least one on axis {axes[-1]}, got {list(self.items.shape)}"
            )
        if self.values is not None:
            _checks.shaped(op, self.values_name, self.values, f"{axes} {width}", sizes)
            _checks.same_device(op, self.values_name, self.values, like_name, like)
        if self.mask is not None:
            _checks.mask(op, self.mask_name, self.mask, axes, sizes, like_name, like)

    def cleared(self, normalize: bool) -> _Side:
        """With zeros at padding, so that whatever stands there (NaN too) meets no other number; normalised if asked."""

        def clear(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            if self.mask is not None:
                tensor = tensor.masked_fill(~self.mask.unsqueeze(-1), 0.0)
            if not normalize:
                return tensor
            # In float16 the least norm, 1e-12, would be 0 and padding 0 / 0.
            wide = tensor.to(_checks.accumulation(tensor.dtype))
            return F.normalize(wide, dim=-1).to(tensor.dtype)

        items = clear(self.items)
        assert items is not None
        return self._replace(items=items, values=clear(self.values))


def _scores(
    op: str,
    image: _Side,
    caption: _Side,
    settings: Settings,
    backend: str,
    attention_scale: str = "attention_scale",
) -> Tensor:
    """What the public functions return; `attention_scale` is the name they have for that."""
    sizes: dict[str, int] = {}
    # Values that stand alone are compared with the other side's items.
    width = "D" if image.values is None or caption.values is None else "E"
    image.check(op, "B R", width, sizes, image.name, image.items)
    caption.check(op, "C T", width, sizes, image.name, image.items)
    image, caption = _in_one_dtype(op, image, caption)
    if settings.attention_scale is INVERSE_ROOT:
        inverse_temperature = _checks.scalar(op, attention_scale, sizes["D"] ** -0.5, image.name, image.items)
    else:
        inverse_temperature = _factor(op, attention_scale, settings.attention_scale, image)
    pool_scale = _factor(op, "pool_scale", settings.pool_scale, image, above=0.0)
    scale = _factor(op, "scale", settings.scale, image)
    chosen = _dispatch.select(op, backend, "word_region", image.items)
    image, caption = image.cleared(settings.normalize), caption.cleared(settings.normalize)
    keys, queries = (image, caption) if settings.attend == "regions" else (caption, image)
    matches = _matches(keys, queries, inverse_temperature, settings, chosen)
    if settings.attend == "words":
        matches = matches.transpose(0, 1)
    if settings.pool == "none":
        return scale * matches
    region_axes, word_axes = (slice(None), None), (None,)
    key_axes, query_axes = (region_axes, word_axes) if keys is image else (word_axes, region_axes)
    scores = pooled(
        matches, None if queries.mask is None else queries.mask[query_axes], settings.pool, pool_scale
    )
    if keys.mask is not None:
        scores = torch.where(keys.mask.any(1)[key_axes], scores, 0.0)
    return scale * scores


def _in_one_dtype(op: str, image: _Side, caption: _Side) -> tuple[_Side, _Side]:
    """The matrix operands as autocast wants them, which must then agree."""
    cast = _checks.autocast(image.items, image.values, caption.items, caption.values)
    first, region_values, words, word_values = cast
    assert first is not None and words is not None
    names = (image.values_name, caption.name, caption.values_name)
    for name, operand in zip(names, cast[1:], strict=True):
        if operand is not None:
            _checks.same_dtype(op, name, operand, image.name, first)
    image = image._replace(items=first, values=region_values)
    return image, caption._replace(items=words, values=word_values)


def _factor(op: str, name: str, value: Any, image: _Side, above: float | None = None) -> Tensor:
    factor = _checks.scalar(op, name, value, image.name, image.items)
    if not isinstance(value, Tensor):
        _checks.number(op, name, value, above=above)
    return factor


def _matches(
    keys: _Side, queries: _Side, attention_scale: Tensor, settings: Settings, backend: str
) -> Tensor:
    """How well every query's context fits it: [B, C, T], or [C, B, R] where regions are the queries."""
    cosine = settings.match == "cosine"
    key_values, query_values = keys.values, queries.values
    if key_values is not None or query_values is not None:
        key_values = keys.items if key_values is None else key_values
        query_values = queries.items if query_values is None else query_values
    operands = (keys.items, queries.items, key_values, query_values, keys.mask, queries.mask, attention_scale)
    if backend == "reference":
        return reference.match(*operands, settings.prenormalize, settings.hard, cosine)
    found: Tensor = torch.ops.jrl.word_region_forward(
        *operands, settings.prenormalize, settings.hard, settings.match, backend
    )[0]
    return found
