"""GroupViT: text teaches an image encoder to group pixels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jrl.encoders import EncoderOutput, TextEncoder
from jrl.encoders.group_vit import GroupViTImageEncoder
from jrl.encoders.word_regions import WordRegions
from jrl.objectives import ContrastiveObjective, duplicate_text_ids
from jrl.objectives.multi_label import DUPLICATES, MultiLabelObjective
from jrl.objectives.segment_text import SegmentTextObjective
from jrl.systems.group_vit_segmentation import (
    MODES,
    PRODUCTS,
    GroupMaps,
    Segmentation,
    as_segmentation,
    class_scores,
    compose,
    slide,
    upsample,
)
from jrl.systems.zero_shot import ZeroShotSystem

DIRECTIONS = ("mean", "sum")


class GroupViT(ZeroShotSystem):
    """Grouping vision transformer, trained by texts alone and segmenting by their words.

        z_I = l2(MLP(mean of segment tokens)),  z_T = l2(MLP(end-of-text token))
        loss = L(z_I, z_caption) + L(z_I, {z_prompt 1…K}),  each ½ (I→T + T→I) at a temperature of its own
        and, with `segment_text`, + L({z_segment 1…G}, {z_prompt 1…K})

    Xu et al. 2022. Switches to its patent: `directions="sum"` (I→T + T→I), `multi_label=
    MultiLabelObjective(multi_positive="sum")`, and `assign_eps=0`, `assign_scale=1`, `noise="group"` of the
    image encoder; `segment(mode="patent")`. Under data parallelism captions, prompts and segments are
    contrasted with those of all ranks.

    Args:
        image_encoder: pictures to segment tokens.
        text_encoder: texts to vectors; the published one is a causal transformer pooled at the end of the text.
        projection_dim: D, width of the joint space.
        projection_hidden: width inside both projections (Linear-BatchNorm-ReLU-Linear).
        objective: the loss of the captions; InfoNCE at 1/0.07 when None.
        multi_label: the loss of the prompts; GroupViT's code when None.
        segment_text: a loss of single segments with the prompts, not in the paper; none when None.
        multi_label_weight: factor of the prompts' loss; 1 in the paper, 0 leaves it out.
        directions: "mean" of the two directions (code), or their "sum" (patent).
        duplicate_captions: what two pictures with the same caption are to each other's: "negative" (as in the
            paper), "exclude" (nothing) or "positive".

    Raises:
        TypeError: a part is of another type.
        ValueError: a value outside those named, or a size below 1.
    """

    def __init__(
        self,
        image_encoder: GroupViTImageEncoder,
        text_encoder: TextEncoder,
        projection_dim: int = 256,
        projection_hidden: int = 4096,
        objective: ContrastiveObjective | None = None,
        multi_label: MultiLabelObjective | None = None,
        segment_text: SegmentTextObjective | None = None,
        multi_label_weight: float = 1.0,
        directions: str = "mean",
        duplicate_captions: str = "negative",
    ) -> None:
        super().__init__()
        objective = ContrastiveObjective() if objective is None else objective
        multi_label = MultiLabelObjective() if multi_label is None else multi_label
        for name, value, kind in (
            ("image_encoder", image_encoder, GroupViTImageEncoder),
            ("text_encoder", text_encoder, TextEncoder),
            ("objective", objective, ContrastiveObjective),
            ("multi_label", multi_label, MultiLabelObjective),
        ):
            if not isinstance(value, kind):
                raise TypeError(f"{name}: expected {kind.__name__}, got {type(value).__name__}")
        if segment_text is not None and not isinstance(segment_text, SegmentTextObjective):
            raise TypeError(f"segment_text: expected SegmentTextObjective, got {type(segment_text).__name__}")
        if objective.loss != "info_nce":
            raise ValueError(f"objective: expected the loss 'info_nce', got {objective.loss!r}")
        for name, chosen, choices in (
            ("directions", directions, DIRECTIONS),
            ("duplicate_captions", duplicate_captions, DUPLICATES),
        ):
            if chosen not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {chosen!r}")
        for name, size in (("projection_dim", projection_dim), ("projection_hidden", projection_hidden)):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        self.image_encoder, self.text_encoder = image_encoder, text_encoder
        self.objective, self.multi_label, self.segment_text = objective, multi_label, segment_text
        if not multi_label_weight >= 0:
            raise ValueError(f"multi_label_weight: expected 0 or more, got {multi_label_weight}")
        self.multi_label_weight = multi_label_weight
        self.projection_dim, self.projection_hidden = projection_dim, projection_hidden
        self.directions, self.duplicate_captions = directions, duplicate_captions
        self.image_projection = _projection(image_encoder.width, projection_hidden, projection_dim)
        self.text_projection = _projection(text_encoder.width, projection_hidden, projection_dim)

    @property
    def image_trunk(self) -> nn.Module:
        """The image encoder, without its projection."""
        return self.image_encoder

    def encode_image(self, pixel_values: Tensor) -> EncoderOutput:
        """Pictures [B, 3, H, W] to unit vectors [B, D], with the segment tokens [B, G, W]."""
        output = self.image_encoder(pixel_values)
        return EncoderOutput(_unit(self.image_projection, output.global_), output.tokens)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> EncoderOutput:
        """Texts [C, L] to unit vectors [C, D], with the trunk's tokens [C, L, W] and mask [C, L]."""
        output = self.text_encoder(input_ids, attention_mask)
        return EncoderOutput(_unit(self.text_projection, output.global_), output.tokens, output.mask)

    def forward(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The losses of a batch.

        Captions and prompts go through the text projection together, as in the code, so that its batch norm sees
        both.

        Args:
            batch: `pixel_values` [B, 3, H, W]; `input_ids` and `attention_mask` [B, L]; optionally `prompt_ids`
                [B, K, L'] and `prompt_mask` [B, K, L'], nonzero where a token is real. A prompt without a real
                token is replaced by the caption.

        Returns:
            {"contrastive": 0-d loss}, with prompts "multi_label" too, with both prompts and that objective
            "segment_text", and the statistics of each objective.

        Raises:
            KeyError: `pixel_values` or `input_ids` is missing.
            ValueError: shapes do not fit.
        """
        pixel_values, captions = batch["pixel_values"], batch["input_ids"]
        mask, prompts = batch.get("attention_mask"), batch.get("prompt_ids")
        if len(captions) != len(pixel_values):
            raise ValueError(
                f"input_ids: expected one caption for each of {len(pixel_values)} pictures, got {len(captions)}"
            )
        image, segments = self._image_vectors(pixel_values)
        text, texts = self._text_vectors(captions, mask, prompts, batch.get("prompt_mask"))
        options: dict[str, Any] = {}
        if self.duplicate_captions != "negative":
            role = "exclude" if self.duplicate_captions == "exclude" else "positives"
            options[role] = (texts[:, 0], texts[:, 0])
        factor = 2.0 if self.directions == "sum" else 1.0
        loss, plots = self.objective(image, text[:, 0], **options)
        losses = {"contrastive": factor * loss}
        if prompts is not None:
            rows, count = prompts.shape[:2]
            owners = torch.arange(rows, device=image.device).repeat_interleave(count)
            prompt, ids = text[:, 1:].flatten(0, 1), texts[:, 1:].flatten()
            if self.multi_label_weight:
                found, stats = self.multi_label(image, prompt, owners, text_ids=ids)
                losses["multi_label"] = self.multi_label_weight * factor * found
                plots = {**plots, **{f"multi_label_{name}": value for name, value in stats.items()}}
            if self.segment_text is not None and segments is not None:
                # the caption itself, where it stands in for a missing prompt, has no segment of its own
                phrases = (texts[:, 1:] != texts[:, :1]).flatten()
                found, stats = self.segment_text(
                    segments, prompt[phrases], owners[phrases], text_ids=ids[phrases]
                )
                losses["segment_text"] = factor * found
                plots = {**plots, **{f"segment_text_{name}": value for name, value in stats.items()}}
        return losses, plots

    @torch.no_grad()
    def group_maps(self, pixel_values: Tensor) -> GroupMaps:
        """Which group each patch of [B, 3, H, W] belongs to, without noise: see `GroupMaps`."""
        with self._evaluating():
            grouping = self.image_encoder.group(pixel_values)
        return compose(grouping.stages, grouping.grid)

    @torch.no_grad()
    def segmentation_logits(
        self, pixel_values: Tensor, classes: Tensor, *, product: str = "soft", squared_scale: bool = False
    ) -> Tensor:
        """Logit of each class at each pixel: scale Σ_g cos(segment g, class) map_g(pixel).

        Args:
            pixel_values: [B, 3, H, W].
            classes: [C, D] unit vectors, such as those of `encode_text`.
            product: of the "soft" or "hard" maps, resized bilinearly.
            squared_scale: multiply by the scale twice, as transformers does.

        Returns:
            [B, C, H, W].

        Raises:
            ValueError: `classes` is not [C, D], or another `product`.
        """
        self._check_segmentation(classes, product)
        segments, _, pixels = self._segments(pixel_values, product)
        scale = self.objective.scale
        logits = (scale**2 if squared_scale else scale) * (segments @ classes.T)
        return torch.einsum("bgc,bghw->bchw", logits, pixels)

    @torch.no_grad()
    def segment(
        self,
        pixel_values: Tensor,
        classes: Tensor,
        *,
        mode: str = "code",
        product: str | None = None,
        top_k: int | None = 5,
        background_threshold: float | None = None,
        window: int | None = None,
        stride: int | None = None,
    ) -> Segmentation:
        """The class of every pixel, zero-shot.

        Every pixel takes the class scores of the group that it belongs to most. With a the scaled cosines of a
        group with the classes, "code" scores p₀ p₁: the softmax of a, and the softmax of a among the `top_k`
        classes nearest to the whole picture. "patent" scores the cosines.

        Args:
            pixel_values: [B, 3, H, W] of any size.
            classes: [C, D] unit vectors, such as those of `encode_text`.
            mode: "code" or "patent".
            product: of the "soft" maps (code) or the "hard" ones (patent); the mode's when None.
            top_k: for "code"; None for all classes.
            background_threshold: for "code", the score below which a pixel is background (0.95 on VOC and COCO,
                0.35 on Context), at most the best score of the picture's groups; None for no background.
            window: side of the square windows that a larger picture is cut into; None to take it whole.
            stride: from one window to the next; half a window when None.

        Raises:
            ValueError: a value out of range, or a threshold in patent mode.
        """
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
        chosen = ("soft" if mode == "code" else "hard") if product is None else product
        self._check_segmentation(classes, chosen)
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k: expected at least 1 or None, got {top_k}")
        if background_threshold is not None and (mode == "patent" or not 0 <= background_threshold <= 1):
            raise ValueError(
                "background_threshold: expected a value in [0, 1] and mode 'code', "
                f"got {background_threshold} and {mode!r}"
            )
        if window is None and stride is not None:
            raise ValueError("stride: has a meaning only with a window")
        for name, value in (("window", window), ("stride", stride)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if window is not None and stride is not None and stride > window:
            raise ValueError(
                f"stride: expected at most the window of {window}, got {stride}: pixels would be left out"
            )

        def score(pictures: Tensor) -> Tensor:
            segments, image, pixels = self._segments(pictures, chosen)
            return class_scores(
                segments,
                image,
                classes,
                pixels,
                scale=self.objective.scale,
                mode=mode,
                top_k=top_k,
                background_threshold=background_threshold,
            )

        if window is None:
            scores = score(pixel_values)
        else:
            scores = slide(score, pixel_values, window, max(1, window // 2) if stride is None else stride)
        return as_segmentation(scores, background_threshold is not None)

    @torch.no_grad()
    def word_regions(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> WordRegions:
        """Where in each picture the words of its text lie.

            α_tg = softmax_g(scale cos(word t, segment g)),  attention_tr = Σ_g α_tg m_rg / Σ_r' m_r'g

        with m the product of the soft maps; words are the text encoder's tokens, projected like the whole text.

        Args:
            pixel_values: [B, 3, H, W].
            input_ids: [B, T], the text of each picture.
            attention_mask: [B, T], nonzero where a token is real; None when all are.

        Returns:
            attention [B, T, R] over the patches, whose rows sum to 1 (0 for padding), their grid, and the mask.

        Raises:
            ValueError: not one text a picture.
        """
        if len(input_ids) != len(pixel_values):
            raise ValueError(
                f"input_ids: expected one text for each of {len(pixel_values)} pictures, got {len(input_ids)}"
            )
        with self._evaluating():
            grouping = self.image_encoder.group(pixel_values)
            text = self.text_encoder(input_ids, attention_mask)
            segments = _unit(self.image_projection, grouping.output.tokens)
            words = _unit(self.text_projection, text.tokens)
        map_ = compose(grouping.stages, grouping.grid).product
        # a soft map is positive, but a group's share of every patch may round to zero
        shares = map_ / map_.sum(dim=1, keepdim=True).clamp(min=torch.finfo(map_.dtype).tiny)
        choice = (self.objective.scale * (words @ segments.mT)).softmax(dim=-1)
        mask = torch.ones_like(input_ids, dtype=torch.bool) if text.mask is None else text.mask
        attention = (choice @ shares.mT.to(choice.dtype)).masked_fill(~mask[:, :, None], 0.0)
        return WordRegions(attention, grouping.grid, mask)

    def to_config(self) -> dict[str, Any]:
        """Arguments of `from_config`, in JSON types."""
        return {
            "image_encoder": self.image_encoder.to_config(),
            "text_encoder": self.text_encoder.to_config(),
            "projection_dim": self.projection_dim,
            "projection_hidden": self.projection_hidden,
            "objective": self.objective.to_config(),
            "multi_label": self.multi_label.to_config(),
            "segment_text": None if self.segment_text is None else self.segment_text.to_config(),
            "multi_label_weight": self.multi_label_weight,
            "directions": self.directions,
            "duplicate_captions": self.duplicate_captions,
        }

    @classmethod
    def _assemble(cls, config: dict[str, Any]) -> GroupViT:
        # runs from before this objective say nothing of it
        segment_text = config.pop("segment_text", None)
        return cls(
            GroupViTImageEncoder(**config.pop("image_encoder")),
            TextEncoder(**config.pop("text_encoder")),
            objective=ContrastiveObjective(**config.pop("objective")),
            multi_label=MultiLabelObjective(**config.pop("multi_label")),
            segment_text=None if segment_text is None else SegmentTextObjective(**segment_text),
            **config,
        )

    def _image_vectors(self, pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Unit vectors of the pictures [B, D], and of their segments [B, G, D] when an objective needs them."""
        output = self.image_encoder(pixel_values)
        if self.segment_text is None:
            return _unit(self.image_projection, output.global_), None
        # together, so that the batch norm of the projection knows single segments too
        both = _unit(self.image_projection, torch.cat([output.global_[:, None], output.tokens], dim=1))
        return both[:, 0], both[:, 1:]

    def _text_vectors(
        self, captions: Tensor, mask: Tensor | None, prompts: Tensor | None, prompt_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Unit vectors [B, 1 + K, D] of each caption and its prompts, and one id for each distinct text [B, 1 + K]."""
        pooled = self.text_encoder(captions, mask).global_[:, None]
        ids = duplicate_text_ids(captions, mask)[:, None]
        if prompts is not None:
            real = _real_prompts(captions, prompts, prompt_mask)
            rows = prompts[real], None if prompt_mask is None else prompt_mask[real]
            # the trunk sees them apart, as prompts are much shorter; what is no prompt is the caption
            pooled, ids = pooled.repeat(1, 1 + prompts.shape[1], 1), ids.repeat(1, 1 + prompts.shape[1])
            if len(rows[0]):
                pooled[:, 1:][real] = self.text_encoder(*rows).global_.to(pooled.dtype)
                ids[:, 1:][real] = duplicate_text_ids(*rows)
        return _unit(self.text_projection, pooled), ids

    def _segments(self, pixel_values: Tensor, product: str) -> tuple[Tensor, Tensor, Tensor]:
        """Unit vectors of the segments [B, G, D] and the picture [B, D], and the map [B, G, H, W]."""
        with self._evaluating():
            grouping = self.image_encoder.group(pixel_values)
            segments = _unit(self.image_projection, grouping.output.tokens)
            image = _unit(self.image_projection, grouping.output.global_)
        maps = compose(grouping.stages, grouping.grid)
        map_ = maps.product if product == "soft" else maps.hard_product
        height, width = pixel_values.shape[2:]
        return segments, image, upsample(map_, grouping.grid, self.image_encoder.patch_size, (height, width))

    def _check_segmentation(self, classes: Tensor, product: str) -> None:
        if classes.ndim != 2 or classes.shape[1] != self.projection_dim or not len(classes):
            raise ValueError(f"classes: expected [C, {self.projection_dim}], got {list(classes.shape)}")
        if product not in PRODUCTS:
            raise ValueError(f"product: expected one of {', '.join(PRODUCTS)}, got {product!r}")


def _projection(width: int, hidden: int, out: int) -> nn.Sequential:
    # the bias before the batch norm is the published model's: without it a checkpoint would not come back exactly
    return nn.Sequential(
        nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, out)
    )


def _unit(projection: nn.Module, x: Tensor) -> Tensor:
    """Project [..., W] to unit vectors [..., D]."""
    projected: Tensor = projection(x.flatten(0, -2))
    return F.normalize(projected, dim=-1).unflatten(0, x.shape[:-1])


def _real_prompts(captions: Tensor, prompts: Tensor, mask: Tensor | None) -> Tensor:
    """[B, K] bool: the prompts that have a real token."""
    if prompts.ndim != 3 or len(prompts) != len(captions) or not prompts.shape[1]:
        raise ValueError(f"prompt_ids: expected [{len(captions)}, K, L], got {list(prompts.shape)}")
    if mask is None:
        return torch.ones(prompts.shape[:2], dtype=torch.bool, device=prompts.device)
    if mask.shape != prompts.shape:
        raise ValueError(f"prompt_mask: expected {list(prompts.shape)}, got {list(mask.shape)}")
    return mask.bool().any(dim=-1)
