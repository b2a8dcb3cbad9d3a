"""Two encoders, critics between their layers and an estimator of the mutual information of pictures and captions."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jrl.encoders import (
    EncoderOutput,
    GridTokens,
    ImageEncoder,
    TextEncoder,
    WordRegions,
    encode_grids,
    encode_words,
    layer_width,
)
from jrl.encoders.layers import LAST, layer_widths
from jrl.encoders.pooling import mean_pool
from jrl.objectives import (
    AttentionCritic,
    DeepInfoMax,
    MaskedWords,
    MutualInformationEstimator,
    duplicate_text_ids,
)
from jrl.objectives.attention_critic import project
from jrl.objectives.contrastive import several_ranks
from jrl.systems.base import OptimizerSpec, System, _load_state, _read_weights
from jrl.systems.critics import CriticOptions, LayerPair, build_critic
from jrl.systems.mutual_information_checks import SIDES, check_kinds, check_options

_DISCRIMINATOR = "image_discriminator"


class MutualInformation(System):
    """Joint representations by maximal mutual information of a picture's locations and its caption's words.

        e_i = image_encoder(I),  g_j = text_encoder(C),  S = critic(e, g) for every picture with every caption
        loss = − joint_weight Σ_layers weight · I(S) + image_weight L_image + text_weight L_text

    US 2021/0056353 A1. The critic and the estimator are modules of their own; once trained, both may be thrown away.
    Each pair of `layers` has a critic of its own. Under data parallelism the pairs of all ranks are contrasted with each
    other; the statistics of batch norms, and the objectives of one modality, are of each rank's own batch.

    `encode_image` gives l2(mean_i v_i) and `encode_text` l2(mean_j w_j), the means of the last pair's values: for
    attention that is spread evenly their product is the critic's score, so they serve retrieval. With
    `embedding="encoder"` they are the encoders' own pooled vectors, of unit length, and no part of a critic is used.

    Args:
        image_encoder: pictures to locations on a grid (a convolutional network, or patches).
        text_encoder: texts to words.
        critic: how critics are made.
        estimator: the bound; nce in both directions when None (for critics per word: from text to image).
        layers: pairs of layers; the last ones when None. The first pair's critic serves `word_regions`,
            the last pair's `encode_*` and `critic_scores`.
        joint_weight: 0 leaves the critics untrained, and a side without an objective, as before joint training.
        image_objective: Deep InfoMax on the pictures alone.
        image_weight: of its losses.
        text_objective: masked words on the captions alone.
        text_weight: of its loss.
        freeze: "image", "text" or both: encoders that are not trained and stay in evaluation mode.
        image_weights, text_weights: folder of a run or of a saved system whose encoder to start from.
        embedding: "values" or "encoder".
        special_token_ids: tokens that are no words to the critic, such as [CLS].
        duplicate_captions: what two rows with the same caption are to each other: "negative", or "exclude" (nothing).

    Raises:
        TypeError: a part is of another type.
        ValueError: a value out of range, parts that do not fit each other, or nothing to train.
        FileNotFoundError: no weights where they should be.
    """

    def __init__(
        self,
        image_encoder: ImageEncoder,
        text_encoder: TextEncoder,
        critic: CriticOptions | None = None,
        estimator: MutualInformationEstimator | None = None,
        layers: Sequence[LayerPair] | None = None,
        joint_weight: float = 1.0,
        image_objective: DeepInfoMax | None = None,
        image_weight: float = 1.0,
        text_objective: MaskedWords | None = None,
        text_weight: float = 1.0,
        freeze: Sequence[str] = (),
        image_weights: str | None = None,
        text_weights: str | None = None,
        embedding: str = "values",
        special_token_ids: Sequence[int] = (),
        duplicate_captions: str = "negative",
    ) -> None:
        super().__init__()
        options = CriticOptions() if critic is None else critic
        if estimator is None:
            estimator = MutualInformationEstimator(direction="text_to_image" if options.per_word else "both")
        layers = [LayerPair()] if layers is None else list(layers)
        check_kinds(
            {
                "image_encoder": image_encoder,
                "text_encoder": text_encoder,
                "critic": options,
                "estimator": estimator,
                "image_objective": image_objective,
                "text_objective": text_objective,
            }
        )
        self.image_encoder, self.text_encoder, self.estimator = image_encoder, text_encoder, estimator
        self.image_objective, self.text_objective = image_objective, text_objective
        self.options, self.layers = options, layers
        self.joint_weight, self.image_weight, self.text_weight = joint_weight, image_weight, text_weight
        self.freeze, self.embedding = tuple(freeze), embedding
        self.special_token_ids, self.duplicate_captions = tuple(special_token_ids), duplicate_captions
        check_options(self)
        self.critics = nn.ModuleDict({pair.name: self._critic(pair) for pair in layers})
        for side, folder in (("image", image_weights), ("text", text_weights)):
            if folder is not None:
                _start_from(getattr(self, f"{side}_encoder"), Path(folder), f"{side}_encoder")
        # what no loss reads would wait for gradients that never come, which ends data parallelism
        unread = [side for side in SIDES if not self.joint_weight and self.objectives[side] is None]
        for side in (*self.freeze, *unread):
            getattr(self, f"{side}_encoder").requires_grad_(False)
        self.critics.requires_grad_(bool(self.joint_weight))
        self.train(self.training)

    @property
    def image_trunk(self) -> nn.Module:
        """The image encoder, without a critic."""
        return self.image_encoder

    @property
    def objectives(self) -> dict[str, nn.Module | None]:
        """Of each side alone."""
        return {"image": self.image_objective, "text": self.text_objective}

    @property
    def idle(self) -> str | None:
        """Weights that are trained but get no gradient in any step: those above the last layer that is read."""
        for side, objective in self.objectives.items():
            read = [getattr(pair, side) for pair in self.layers]
            last = max(read) if LAST not in read else LAST
            encoder = getattr(self, f"{side}_encoder")
            trained = self.joint_weight and side not in self.freeze and objective is None
            if trained and last != LAST and last < len(layer_widths(encoder.model)) - 1:
                return f"the {side} encoder's layers after {last}, which no pair of `layers` reads"
        return None

    def train(self, mode: bool = True) -> MutualInformation:
        """Training or evaluation mode; frozen encoders stay in evaluation mode."""
        super().train(mode)
        for side in self.freeze:
            getattr(self, f"{side}_encoder").eval()
        return self

    def encode_image(self, pixel_values: Tensor) -> EncoderOutput:
        """Pictures [B, 3, H, W] to unit vectors [B, D], with the trunk's tokens [B, L, W]."""
        pair = self.layers[-1]
        output, (grid,) = encode_grids(self.image_encoder, pixel_values, [pair.image])
        vector = output.global_
        if self.embedding == "values":
            locations = grid.pooled(pair.image_pool).tokens
            vector = mean_pool(project(self._critic_of(-1).image_value, locations, None), None)
        return EncoderOutput(F.normalize(vector, dim=-1), output.tokens)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> EncoderOutput:
        """Texts [C, L] to unit vectors [C, D], with the trunk's tokens [C, L, W] and mask [C, L]."""
        output, (tokens,) = encode_words(self.text_encoder, input_ids, attention_mask, [self.layers[-1].text])
        vector = output.global_
        if self.embedding == "values":
            words = self._words(input_ids, attention_mask)
            vector = mean_pool(project(self._critic_of(-1).word_value, tokens, words), words)
        return EncoderOutput(F.normalize(vector, dim=-1), output.tokens, output.mask)

    def forward(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The losses of a batch of pairs.

        Args:
            batch: `pixel_values` [N, 3, H, W]; `input_ids` and `attention_mask` [N, L].

        Returns:
            Losses "joint" (−joint_weight Σ weight · bound), "image_local", "image_global", "image_prior",
            "image_discriminator" and "masked_words", as far as the system has them; plots "bound" (the weighted sum
            over the layers), "ceiling" for nce, "bound_LAYER" of each layer, and those of the objectives.

        Raises:
            KeyError: `pixel_values` or `input_ids` is missing.
            ValueError: there are not as many captions as pictures.
        """
        pixel_values, input_ids = batch["pixel_values"], batch["input_ids"]
        attention_mask = batch.get("attention_mask")
        if len(pixel_values) != len(input_ids):
            raise ValueError(
                f"batch: expected as many captions as the {len(pixel_values)} pictures, got {len(input_ids)}"
            )
        losses: dict[str, Tensor] = {}
        plots: dict[str, Tensor] = {}
        if self.joint_weight or self.image_objective is not None:
            image, grids = self._grids(pixel_values)
        if self.joint_weight:
            total, plots = self._joint(grids, input_ids, attention_mask, several_ranks())
            losses["joint"] = self.joint_weight * total
        if self.image_objective is not None:
            found, more = self.image_objective(grids[-1].tokens, image.global_)
            for name, loss in found.items():
                # the discriminator learns by itself, however much the encoder listens to it
                weight = 1.0 if name == "discriminator" else self.image_weight
                losses[f"image_{name}"] = weight * loss
            plots.update({f"image_{name}": value for name, value in more.items()})
        if self.text_objective is not None:
            loss, more = self.text_objective(self.text_encoder, input_ids, attention_mask)
            losses["masked_words"] = self.text_weight * loss
            plots.update({f"masked_words_{name}": value for name, value in more.items()})
        return losses, plots

    @torch.no_grad()
    def compatibility(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The bounds of held-out pairs, for the stop rule: "bound", "ceiling" for nce, and "bound_LAYER" of each layer.

        Args:
            batch: as for `forward`.

        Returns:
            0-d tensors; nothing when the critics are not trained.
        """
        if not self.joint_weight:
            return {}
        _, grids = self._grids(batch["pixel_values"])
        return self._joint(grids, batch["input_ids"], batch.get("attention_mask"))[1]

    @torch.no_grad()
    def word_regions(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> WordRegions:
        """Where each word looks: the attention of the first critic, of each picture with its own caption.

        Args:
            pixel_values: [B, 3, H, W].
            input_ids, attention_mask: [B, T].

        Returns:
            Attention [B, T, R], its grid, and the mask [B, T] of real words (special tokens are none).
        """
        pair = self.layers[0]
        _, (grid,) = encode_grids(self.image_encoder, pixel_values, [pair.image], locate=True)
        _, (tokens,) = encode_words(self.text_encoder, input_ids, attention_mask, [pair.text])
        grid, words = grid.pooled(pair.image_pool), self._words(input_ids, attention_mask)
        attention = self._critic_of(0).attention(grid.tokens, tokens, word_mask=words)
        return WordRegions(attention, grid.grid, words, grid.shift)

    @torch.no_grad()
    def critic_scores(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """The last pair's scores of B pictures with C captions [B, C]; per word, the mean over the words."""
        pair = self.layers[-1]
        _, (grid,) = encode_grids(self.image_encoder, pixel_values, [pair.image])
        _, (tokens,) = encode_words(self.text_encoder, input_ids, attention_mask, [pair.text])
        words = self._words(input_ids, attention_mask)
        scores: Tensor = self._critic_of(-1)(grid.pooled(pair.image_pool).tokens, tokens, word_mask=words)
        return scores.sum(dim=2) / words.sum(dim=1).clamp(min=1) if self.options.per_word else scores

    def optimization(self) -> list[OptimizerSpec]:
        """One optimiser, and one for the discriminator of prior matching where there is one."""
        objective = self.image_objective
        if objective is None or objective.discriminator is None:
            return [OptimizerSpec(self.parameters())]
        apart = {id(parameter) for parameter in objective.discriminator.parameters()}
        names = ["joint"] if self.joint_weight else []
        names += [f"image_{name}" for name, weight in objective.weights.items() if weight]
        names += [] if self.text_objective is None else ["masked_words"]
        others = [parameter for parameter in self.parameters() if id(parameter) not in apart]
        return [
            OptimizerSpec(others, tuple(names)),
            OptimizerSpec(list(objective.discriminator.parameters()), (_DISCRIMINATOR,)),
        ]

    def to_config(self) -> dict[str, Any]:
        """Arguments of `from_config`, in JSON types."""
        return {
            "image_encoder": self.image_encoder.to_config(),
            "text_encoder": self.text_encoder.to_config(),
            "critic": asdict(self.options),
            "estimator": self.estimator.to_config(),
            "layers": [asdict(pair) for pair in self.layers],
            "joint_weight": self.joint_weight,
            "image_objective": None if self.image_objective is None else self.image_objective.to_config(),
            "text_objective": None if self.text_objective is None else self.text_objective.to_config(),
            "image_weight": self.image_weight,
            "text_weight": self.text_weight,
            "freeze": list(self.freeze),
            "embedding": self.embedding,
            "special_token_ids": list(self.special_token_ids),
            "duplicate_captions": self.duplicate_captions,
        }

    @classmethod
    def _assemble(cls, config: dict[str, Any]) -> MutualInformation:
        critic = CriticOptions(**config.pop("critic"))
        if not critic.projection.startswith("mlp"):
            # once accepted and ignored
            critic.hidden = None
        parts: dict[str, Any] = {
            "image_encoder": ImageEncoder(**config.pop("image_encoder")),
            "text_encoder": TextEncoder(**config.pop("text_encoder")),
            "critic": critic,
            "estimator": MutualInformationEstimator(**config.pop("estimator")),
            "layers": [LayerPair(**pair) for pair in config.pop("layers")],
        }
        for name, kind in (("image_objective", DeepInfoMax), ("text_objective", MaskedWords)):
            values = config.pop(name, None)
            parts[name] = None if values is None else kind(**values)
        return cls(**parts, **config)

    def _critic_of(self, pair: int) -> AttentionCritic:
        critic = self.critics[self.layers[pair].name]
        assert isinstance(critic, AttentionCritic)
        return critic

    def _grids(self, pixel_values: Tensor) -> tuple[EncoderOutput, list[GridTokens]]:
        """Locations at each pair's layer, and last those of the last layer."""
        with torch.no_grad() if "image" in self.freeze else nullcontext():
            return encode_grids(self.image_encoder, pixel_values, [*(pair.image for pair in self.layers), -1])

    def _joint(
        self,
        grids: Sequence[GridTokens],
        input_ids: Tensor,
        attention_mask: Tensor | None,
        across_ranks: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad() if "text" in self.freeze else nullcontext():
            texts = [pair.text for pair in self.layers]
            _, states = encode_words(self.text_encoder, input_ids, attention_mask, texts)
        real = self._words(input_ids, attention_mask)
        exclude = None
        if self.duplicate_captions == "exclude":
            exclude = duplicate_text_ids(input_ids, attention_mask)
        losses: list[Tensor] = []
        plots: dict[str, Tensor] = {}
        sums: dict[str, Tensor] = {}
        for pair, grid, tokens in zip(self.layers, grids, states, strict=False):
            words = real & ((real.long().cumsum(dim=1) - 1) % pair.text_stride == 0)
            locations = grid.pooled(pair.image_pool).tokens
            scores = self.critics[pair.name](locations, tokens, word_mask=words, across_ranks=across_ranks)
            masks = {"word_mask": words} if self.options.per_word else {"valid": words.any(dim=1)}
            loss, stats = self.estimator(scores, exclude=exclude, across_ranks=across_ranks, **masks)
            losses.append(pair.weight * loss)
            plots[f"bound_{pair.name}"] = stats["bound"]
            for name in ("bound", "ceiling"):
                if name in stats:
                    sums[name] = sums.get(name, 0.0) + pair.weight * stats[name]
        return torch.stack(losses).sum(), {**sums, **plots}

    def _words(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        words = (
            torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        )
        if self.special_token_ids:
            special = torch.tensor(self.special_token_ids, device=input_ids.device)
            words = words & torch.isin(input_ids, special, invert=True)
        return words

    def _critic(self, pair: LayerPair) -> AttentionCritic:
        image = layer_width(self.image_encoder.model, pair.image, "layers: image")
        text = layer_width(self.text_encoder.model, pair.text, "layers: text")
        return build_critic(self.options, image, text)


def _start_from(encoder: nn.Module, folder: Path, name: str) -> None:
    """Take the weights of the part `name` of a saved system."""
    folder = folder / "model" if (folder / "model").is_dir() else folder
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected a run or a saved system")
    state = {
        key.removeprefix(f"{name}."): value
        for key, value in _read_weights(folder, allow_pickle=False).items()
        if key.startswith(f"{name}.")
    }
    if not state:
        raise ValueError(f"{folder}: the system saved there has no {name}")
    _load_state(encoder, state, folder, strict=True)
