"""The attention critic: how well a set of locations and a set of words fit, for every image with every caption."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from jrl_kernels import distributed, word_region_scores

LENGTH_NORMS = ("none", "mean")


class AttentionCritic(nn.Module):
    """Scores of every picture with every caption; words look for their locations by attention.

        k_i, v_i = image_key(e_i), image_value(e_i)        q_j, w_j = word_query(g_j), word_value(g_j)
        s_ij = softmax_i(scale k_i·q_j)                    f = Σ_ij s_ij v_i·w_j

    US 2021/0056353 A1, equation 3. There `scale` is 1 and f a sum over the words, so long captions score higher in
    absolute value; `length_norm="mean"` divides by their number. With `per_word=True` it is the form of Gupta et
    al. 2020 (info-ground): a score for each word, for a softmax over the pictures.

    Args:
        image_key, image_value: networks from a location's features to its key and value, rows [n, W] to [n, D].
        word_query, word_value: the same for words; the widths of keys and queries agree, and those of the values.
        scale: factor of the attention's logits; 1/√D when None.
        length_norm: "none" or "mean".
        per_word: return a score for each word.
        backend: of the kernel; "auto" takes the fastest.

    Raises:
        TypeError: a network is no module.
        ValueError: another `length_norm`, a `scale` that is not positive and finite, or `length_norm` beside `per_word`.
    """

    def __init__(
        self,
        image_key: nn.Module,
        image_value: nn.Module,
        word_query: nn.Module,
        word_value: nn.Module,
        *,
        scale: float | None = 1.0,
        length_norm: str = "none",
        per_word: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if length_norm not in LENGTH_NORMS:
            raise ValueError(f"length_norm: expected one of {', '.join(LENGTH_NORMS)}, got {length_norm!r}")
        if per_word and length_norm != "none":
            raise ValueError("length_norm: has no meaning with per_word, which sums over no words")
        if scale is not None and not 0 < scale < math.inf:
            raise ValueError(f"scale: expected a positive finite number or None, got {scale}")
        networks = {
            "image_key": image_key,
            "image_value": image_value,
            "word_query": word_query,
            "word_value": word_value,
        }
        for name, network in networks.items():
            if not isinstance(network, nn.Module):
                raise TypeError(f"{name}: expected a module, got {type(network).__name__}")
        self.image_key, self.image_value = image_key, image_value
        self.word_query, self.word_value = word_query, word_value
        self.scale, self.length_norm, self.per_word, self.backend = scale, length_norm, per_word, backend

    def forward(
        self,
        locations: Tensor,
        words: Tensor,
        *,
        location_mask: Tensor | None = None,
        word_mask: Tensor | None = None,
        across_ranks: bool = False,
    ) -> Tensor:
        """Scores of B pictures with C captions.

        Args:
            locations: [B, R, We] float.
            words: [C, T, Wg] float.
            location_mask: [B, R] bool, true where a location counts; None for all.
            word_mask: [C, T] bool, true where a word is real; None for all.
            across_ranks: score this rank's pictures with the captions of all ranks; with `per_word`, the pictures of all
                ranks with this rank's captions. Every rank must call it.

        Returns:
            [B, C], or [B, C, T] with `per_word`, 0 at padding; with gradients to everything.

        Raises:
            TypeError, ValueError: shapes or dtypes do not fit, also of what the networks return.
        """
        with distributed.raise_together(locations, words, alone=not across_ranks):
            _check("locations", locations, "location_mask", location_mask, "B, R, We")
            _check("words", words, "word_mask", word_mask, "C, T, Wg")
        keys, values = (
            project(layers, locations, location_mask) for layers in (self.image_key, self.image_value)
        )
        queries, word_values = (
            project(layers, words, word_mask) for layers in (self.word_query, self.word_value)
        )
        scores = word_region_scores
        if across_ranks and self.per_word:
            keys, values = distributed.gather(keys), distributed.gather(values)
            location_mask = None if location_mask is None else distributed.gather(location_mask)
        elif across_ranks:
            scores = distributed.word_region_scores
        pool = "none" if self.per_word else "mean" if self.length_norm == "mean" else "sum"
        return scores(
            keys,
            queries,
            region_values=values,
            word_values=word_values,
            region_mask=location_mask,
            word_mask=word_mask,
            preset="mutual_information",
            attention_scale=self._scale(keys),
            pool=pool,
            backend=self.backend,
        )

    def attention(
        self,
        locations: Tensor,
        words: Tensor,
        *,
        location_mask: Tensor | None = None,
        word_mask: Tensor | None = None,
    ) -> Tensor:
        """s_ij of each picture with its own caption.

        Args:
            locations, location_mask: [B, R, We] and [B, R], as in `forward`.
            words, word_mask: [B, T, Wg] and [B, T].

        Returns:
            [B, T, R]: each real word's row sums to one over the locations that count; 0 at padding.

        Raises:
            TypeError, ValueError: as `forward`; ValueError also when there are not as many captions as pictures.
        """
        _check("locations", locations, "location_mask", location_mask, "B, R, We")
        _check("words", words, "word_mask", word_mask, "B, T, Wg")
        if len(locations) != len(words):
            raise ValueError(
                f"words: expected {len(locations)} captions as there are pictures, got {len(words)}"
            )
        keys = project(self.image_key, locations, location_mask)
        queries = project(self.word_query, words, word_mask)
        wide = torch.promote_types(keys.dtype, torch.float32)
        logits = self._scale(keys) * torch.einsum("btd,brd->btr", queries.to(wide), keys.to(wide))
        if location_mask is not None:
            some = location_mask.any(dim=1)[:, None, None]
            logits = logits.masked_fill(~location_mask[:, None] & some, float("-inf"))
        attention = logits.softmax(dim=-1)
        counts = torch.ones_like(attention, dtype=torch.bool)
        if location_mask is not None:
            counts = counts & location_mask[:, None]
        if word_mask is not None:
            counts = counts & word_mask[:, :, None]
        return attention.masked_fill(~counts, 0.0)

    def _scale(self, keys: Tensor) -> float:
        return float(keys.shape[-1] ** -0.5) if self.scale is None else self.scale


def project(layers: nn.Module, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """A network on every real token; padding reaches neither its batch statistics nor, but for zeros, the result.

    Args:
        layers: rows [n, W] to [n, D].
        tokens: [B, L, W].
        mask: [B, L] bool; None when all are real.

    Returns:
        [B, L, D].

    Raises:
        ValueError: a batch norm in training gets a single real token, which has no variance.
    """
    if mask is None:
        rows: Tensor = layers(tokens.flatten(0, 1))
        return rows.unflatten(0, tokens.shape[:2])
    real = tokens[mask]
    if len(real) == 1 and any(
        isinstance(part, nn.BatchNorm1d) and part.training for part in layers.modules()
    ):
        raise ValueError("tokens: a batch norm in training needs at least 2 real ones in a batch, got 1")
    rows = layers(real)
    return rows.new_zeros(*mask.shape, rows.shape[-1]).masked_scatter(mask[..., None], rows)


def _check(name: str, tokens: Tensor, mask_name: str, mask: Tensor | None, axes: str) -> None:
    if not isinstance(tokens, Tensor) or not tokens.is_floating_point():
        kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"{name}: expected a floating tensor, got {kind}")
    if tokens.ndim != 3:
        raise ValueError(f"{name}: expected [{axes}], got {list(tokens.shape)}")
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"{mask_name}: expected bool, got {mask.dtype}")
    if mask.shape != tokens.shape[:2]:
        raise ValueError(f"{mask_name}: expected {list(tokens.shape[:2])}, got {list(mask.shape)}")
