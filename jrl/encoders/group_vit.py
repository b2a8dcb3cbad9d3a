"""GroupViT's image encoder: a vision transformer whose tokens are merged into fewer and fewer groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from jrl.encoders.group_vit_blocks import (
    NOISE_KINDS,
    EncoderLayer,
    GroupingBlock,
    GroupingOptions,
    GroupMap,
    TokenMLP,
)
from jrl.encoders.output import EncoderOutput


@dataclass
class Grouping:
    """What `GroupViTImageEncoder.group` returns.

    Attributes:
        output: as the encoder's forward.
        stages: the map of each stage that merges: S is the number of patches, then of the groups before.
        grid: (rows, columns) of the patches.
    """

    output: EncoderOutput
    stages: list[GroupMap]
    grid: tuple[int, int]


class Stage(nn.Module):
    """Transformer layers over tokens and group tokens, then the block that merges the tokens into groups.

    Args:
        options: of the blocks.
        drop_paths: one rate for each layer.
        previous: group tokens of the stage before, 0 for none.
        group_tokens: learned group tokens of this stage, 0 for a stage that merges nothing.
        output_groups: how many groups it merges into.
    """

    def __init__(
        self,
        options: GroupingOptions,
        drop_paths: Sequence[float],
        previous: int,
        group_tokens: int,
        output_groups: int,
    ) -> None:
        super().__init__()
        width = options.width
        self.layers = nn.ModuleList([EncoderLayer(options, rate) for rate in drop_paths])
        self.group_tokens = nn.Parameter(torch.zeros(1, group_tokens, width)) if group_tokens else None
        self.grouping = GroupingBlock(options, group_tokens, output_groups) if group_tokens else None
        self.projector = (
            nn.Sequential(
                nn.LayerNorm(width, eps=options.layer_norm_eps),
                TokenMLP(previous, width // 2, group_tokens, options.activation),
            )
            if previous and group_tokens
            else None
        )

    def forward(
        self, tokens: Tensor, previous: Tensor | None, *, soft: bool = False
    ) -> tuple[Tensor, Tensor | None, GroupMap | None]:
        """Tokens [B, S, W] and the group tokens of the stage before, to groups, group tokens and the map."""
        if self.group_tokens is None or self.grouping is None:
            for layer in self.layers:
                tokens = layer(tokens)
            return tokens, None, None
        groups = self.group_tokens.to(tokens.dtype).expand(len(tokens), -1, -1)
        if self.projector is not None:
            groups = groups + self.projector(previous)
        count = tokens.shape[1]
        joined = torch.cat([tokens, groups], dim=1)
        for layer in self.layers:
            joined = layer(joined)
        merged, map_ = self.grouping(joined[:, :count], joined[:, count:], soft=soft)
        return merged, joined[:, count:], map_


class GroupViTImageEncoder(nn.Module):
    """Pictures to segment tokens and one vector, by grouping patches in stages.

        x = LN(patches) + positions;  each stage: layers over [x; g], x ← GroupingBlock(x, g);
        tokens = LN(x),  global = mean over tokens

    Xu et al. 2022 (GroupViT); the defaults are its code's. Pictures of any size: positions are resized
    bicubically, and sides that are no multiple of the patch are continued by their border.

    Args:
        image_size: side of the pictures whose patches have positions of their own, a multiple of `patch_size`.
        patch_size: side of a patch.
        width: W of the tokens.
        heads: of the attention layers.
        depths: transformer layers in each stage.
        group_tokens: learned group tokens of each stage; 0, in the last ones, for a stage that merges nothing.
        output_groups: groups that each stage merges into; as many as `group_tokens` when None.
        mlp_width: hidden width of the layers' perceptrons; 4 W when None.
        token_mlp_width: of the perceptrons over tokens in the grouping blocks; W / 2 when None.
        channel_mlp_width: of the perceptrons over channels in the grouping blocks; 4 W when None.
        drop_path: rate of the last layer; the layers before rise to it from 0.
        channels: of the pictures.
        layer_norm_eps: of every LayerNorm.
        activation: transformers' name of the activation.
        assign_eps: added to a group's number of tokens; 1 (code) or 0 (patent).
        assign_scale: of the assignment's logits; None for W^-½ (code), 1 (patent).
        noise: in training, Gumbel noise for each group and token ("element", code), for each group ("group",
            patent) or "none".
        tau: temperature of the assignment.
        hard: one-hot assignment with the gradient of the softmax; False for the softmax in both passes.
        init_std: of the linear layers' first weights; None for Glorot's, with which narrow encoders learn faster.
        backend: of `jrl_kernels.gumbel_assign`.

    Raises:
        ValueError: a size that does not fit, another `noise` or `activation`.
    """

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        width: int = 384,
        heads: int = 6,
        depths: Sequence[int] = (6, 3, 3),
        group_tokens: Sequence[int] = (64, 8, 0),
        output_groups: Sequence[int] | None = None,
        mlp_width: int | None = None,
        token_mlp_width: int | None = None,
        channel_mlp_width: int | None = None,
        drop_path: float = 0.1,
        channels: int = 3,
        layer_norm_eps: float = 1e-5,
        activation: str = "gelu",
        assign_eps: float = 1.0,
        assign_scale: float | None = None,
        noise: str = "element",
        tau: float = 1.0,
        hard: bool = True,
        init_std: float | None = 0.02,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        depths, group_tokens = tuple(depths), tuple(group_tokens)
        outputs = group_tokens if output_groups is None else tuple(output_groups)
        self._config: dict[str, Any] = {
            "image_size": image_size,
            "patch_size": patch_size,
            "width": width,
            "heads": heads,
            "depths": list(depths),
            "group_tokens": list(group_tokens),
            "output_groups": list(outputs),
            "mlp_width": 4 * width if mlp_width is None else mlp_width,
            "token_mlp_width": width // 2 if token_mlp_width is None else token_mlp_width,
            "channel_mlp_width": 4 * width if channel_mlp_width is None else channel_mlp_width,
            "drop_path": drop_path,
            "channels": channels,
            "layer_norm_eps": layer_norm_eps,
            "activation": activation,
            "assign_eps": assign_eps,
            "assign_scale": assign_scale,
            "noise": noise,
            "tau": tau,
            "hard": hard,
            "init_std": init_std,
            "backend": backend,
        }
        _check(self._config)
        options = GroupingOptions(
            **{name: value for name, value in self._config.items() if name in GroupingOptions.__annotations__}
        )
        self.patch_size, self.width = patch_size, width
        self.grid = image_size // patch_size
        self.patch_embedding = nn.Conv2d(channels, width, patch_size, stride=patch_size)
        self.patch_norm = nn.LayerNorm(width, eps=layer_norm_eps)
        self.position_embedding = nn.Parameter(torch.empty(1, self.grid**2, width))
        rates = torch.linspace(0, drop_path, sum(depths)).tolist()
        self.stages = nn.ModuleList()
        for number, (depth, learned, merged) in enumerate(zip(depths, group_tokens, outputs, strict=True)):
            first = sum(depths[:number])
            before = group_tokens[number - 1] if number else 0
            self.stages.append(Stage(options, rates[first : first + depth], before, learned, merged))
        self.norm = nn.LayerNorm(width, eps=layer_norm_eps)
        self._initialise()

    def forward(self, pixel_values: Tensor) -> EncoderOutput:
        """Encode pictures.

        Args:
            pixel_values: [B, channels, H, W] float, any H and W of at least 1.

        Returns:
            global_ [B, W], tokens [B, G, W]: the segments of the last stage.

        Raises:
            TypeError: `pixel_values` is not floating point.
            ValueError: it is not [B, channels, H, W], or empty.
        """
        return self._encode(pixel_values, soft=False).output

    def group(self, pixel_values: Tensor) -> Grouping:
        """As the forward, with the maps of every stage, soft ones too (which are [B, S, G])."""
        return self._encode(pixel_values, soft=True)

    def to_config(self) -> dict[str, Any]:
        """Arguments that build this encoder again, without its weights, in JSON types."""
        return dict(self._config)

    def _encode(self, pixel_values: Tensor, *, soft: bool) -> Grouping:
        tokens, grid = self._patches(pixel_values)
        previous: Tensor | None = None
        maps = []
        for stage in self.stages:
            tokens, previous, map_ = stage(tokens, previous, soft=soft)
            if map_ is not None:
                maps.append(map_)
        tokens = self.norm(tokens)
        return Grouping(EncoderOutput(tokens.mean(dim=1), tokens), maps, grid)

    def _patches(self, pixel_values: Tensor) -> tuple[Tensor, tuple[int, int]]:
        if not pixel_values.is_floating_point():
            raise TypeError(f"pixel_values: expected a floating dtype, got {pixel_values.dtype}")
        channels = self._config["channels"]
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels or 0 in pixel_values.shape[2:]:
            raise ValueError(f"pixel_values: expected [B, {channels}, H, W], got {list(pixel_values.shape)}")
        down, right = (-side % self.patch_size for side in pixel_values.shape[2:])
        if down or right:
            pixel_values = F.pad(pixel_values, (0, right, 0, down), mode="replicate")
        embedded = self.patch_embedding(pixel_values)
        rows, columns = embedded.shape[2:]
        tokens = self.patch_norm(embedded.flatten(2).transpose(1, 2))
        return tokens + self._positions(rows, columns).to(tokens.dtype), (rows, columns)

    def _positions(self, rows: int, columns: int) -> Tensor:
        if rows == columns == self.grid:
            return self.position_embedding
        square = self.position_embedding.unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        resized = F.interpolate(square, (rows, columns), mode="bicubic", align_corners=False)
        return resized.flatten(2).transpose(1, 2)

    def _initialise(self) -> None:
        std = self._config["init_std"]
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if std is None:
                    nn.init.xavier_uniform_(module.weight)
                else:
                    nn.init.trunc_normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.position_embedding, std=0.02)
        # later stages get theirs from the stage before, so they begin as zeros
        first = self.stages[0].group_tokens
        assert isinstance(first, Tensor)
        nn.init.trunc_normal_(first, std=0.02)


def _check(config: dict[str, Any]) -> None:
    sizes = ("image_size", "patch_size", "width", "heads", "mlp_width", "token_mlp_width")
    for name in (*sizes, "channel_mlp_width", "channels"):
        if isinstance(config[name], bool) or not isinstance(config[name], int) or config[name] < 1:
            raise ValueError(f"{name}: expected a whole number of at least 1, got {config[name]!r}")
    if config["image_size"] % config["patch_size"]:
        raise ValueError(
            f"image_size: expected a multiple of patch_size {config['patch_size']}, got {config['image_size']}"
        )
    if config["width"] % config["heads"] or config["width"] < 2:
        raise ValueError(f"width: expected a multiple of heads {config['heads']}, got {config['width']}")
    depths, learned, merged = config["depths"], config["group_tokens"], config["output_groups"]
    if not len(depths) == len(learned) == len(merged):
        raise ValueError(
            f"depths, group_tokens, output_groups: expected one entry a stage, got {depths}, {learned}, {merged}"
        )
    if not depths or min(depths) < 1:
        raise ValueError(f"depths: expected at least one layer in each stage, got {depths}")
    merging = sum(count > 0 for count in learned)
    if min(learned) < 0 or not merging or any(count == 0 for count in learned[:merging]):
        raise ValueError(
            f"group_tokens: expected positive counts, then zeros for the stages that merge nothing, got {learned}"
        )
    if any(count < 1 for count in merged[:merging]):
        raise ValueError(f"output_groups: expected at least 1 in each stage that merges, got {merged}")
    if not 0 <= config["drop_path"] < 1:
        raise ValueError(f"drop_path: expected a rate in [0, 1), got {config['drop_path']}")
    if config["noise"] not in NOISE_KINDS:
        raise ValueError(f"noise: expected one of {', '.join(NOISE_KINDS)}, got {config['noise']!r}")
    if config["activation"] not in ACT2FN:
        raise ValueError(f"activation: transformers has none called {config['activation']!r}")
    for name, least in (
        ("tau", "above 0"),
        ("assign_scale", "above 0"),
        ("init_std", "above 0"),
        ("assign_eps", "of at least 0"),
    ):
        value = config[name]
        if value is not None and (value < 0 or (value == 0 and name != "assign_eps")):
            raise ValueError(f"{name}: expected a number {least}, got {value}")
