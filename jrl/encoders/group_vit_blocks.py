"""Parts of GroupViT's image encoder: attention, perceptrons and the block that merges tokens into groups."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from jrl_kernels import gumbel_assign

NOISE_KINDS = ("element", "group", "none")


@dataclass(frozen=True)
class GroupingOptions:
    """What the blocks of one encoder share.

    Attributes:
        width: W of every token.
        heads: of the attention layers.
        mlp_width: hidden width of the perceptrons over channels in encoder layers.
        token_mlp_width: hidden width of the perceptrons over tokens in a grouping block.
        channel_mlp_width: hidden width of the perceptron over channels in a grouping block.
        layer_norm_eps: of every LayerNorm.
        activation: transformers' name of the perceptrons' activation.
        assign_eps: added to the number of tokens of a group; 1 in the code, 0 in the patent.
        assign_scale: of the assignment's logits; None for W^-½ (the code), 1 in the patent.
        noise: Gumbel noise in training, one a group and token ("element", the code), one a group ("group",
            the patent) or "none".
        tau: temperature of the assignment.
        hard: one-hot assignment in the forward; False for the soft one in both passes.
        backend: of `gumbel_assign`.
    """

    width: int
    heads: int
    mlp_width: int
    token_mlp_width: int
    channel_mlp_width: int
    layer_norm_eps: float = 1e-5
    activation: str = "gelu"
    assign_eps: float = 1.0
    assign_scale: float | None = None
    noise: str = "element"
    tau: float = 1.0
    hard: bool = True
    backend: str = "auto"


@dataclass
class GroupMap:
    """Which group each token of one stage belongs to.

    Attributes:
        soft: [B, S, G] probability of each group for a token, without noise; None unless asked for.
        index: [B, S] int64, the group the token was given to (with the noise that was drawn, in training).
        groups: G.
    """

    soft: Tensor | None
    index: Tensor
    groups: int

    @property
    def hard(self) -> Tensor:
        """[B, S, G] float, one-hot rows of `index`."""
        dtype = torch.float32 if self.soft is None else self.soft.dtype
        return F.one_hot(self.index, self.groups).to(dtype)


class DropPath(nn.Module):
    """Leave a residual branch out of some examples in training; the others are scaled so that the mean stays.

    Args:
        rate: probability of leaving it out, in [0, 1).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] to the same shape."""
        if not self.rate or not self.training:
            return x
        kept = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= self.rate
        return x * kept.to(x.dtype) / (1 - self.rate)


class Attention(nn.Module):
    """Multi-head attention of [B, L, W] over itself or over [B, S, W]."""

    def __init__(self, options: GroupingOptions) -> None:
        super().__init__()
        self.heads = options.heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(options.width, options.width) for _ in range(4)
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """[B, L, W]."""
        context = x if context is None else context
        query, key, value = (
            projection(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection, tokens in ((self.q_proj, x), (self.k_proj, context), (self.v_proj, context))
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Linear, activation, Linear over the last axis."""

    def __init__(self, in_features: int, hidden: int, out_features: int, activation: str) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(in_features, hidden), nn.Linear(hidden, out_features)
        self.activation = ACT2FN[activation]

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        return self.fc2(self.activation(self.fc1(x)))


class TokenMLP(MLP):
    """The same over the axis of the tokens: [B, S, W] to [B, out_features, W]."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_features, W] to [B, out_features, W]."""
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class EncoderLayer(nn.Module):
    """x + Attention(LN x), then x + MLP(LN x)."""

    def __init__(self, options: GroupingOptions, drop_path: float) -> None:
        super().__init__()
        width, eps = options.width, options.layer_norm_eps
        self.self_attn = Attention(options)
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, options.mlp_width, width, options.activation)
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, W] to the same shape."""
        x = x + self.drop_path(self.self_attn(self.layer_norm1(x)))
        return x + self.drop_path(self.mlp(self.layer_norm2(x)))


class CrossAttentionLayer(nn.Module):
    """Groups look at the tokens: p + Attention(p, x), then p + MLP(LN p), then LN. Queries are not normalised."""

    def __init__(self, options: GroupingOptions) -> None:
        super().__init__()
        width, eps = options.width, options.layer_norm_eps
        self.attn = Attention(options)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, options.mlp_width, width, options.activation)
        self.norm_post = nn.LayerNorm(width, eps=eps)

    def forward(self, groups: Tensor, tokens: Tensor) -> Tensor:
        """[B, G, W] and [B, S, W] to [B, G, W]."""
        groups = groups + self.attn(groups, tokens)
        return self.norm_post(groups + self.mlp(self.norm2(groups)))


class AssignAttention(nn.Module):
    """Give each token to one group and average what each group got, without storing who got what.

        l = scale (W_q g)(W_k x)ᵀ,  Â = one-hot over groups of l + noise (softmax's gradient),
        u_g = W_o (Σ_s Â_gs W_v x_s) / (Σ_s Â_gs + eps)

    Xu et al. 2022 (code: eps 1, scale W^-½, noise for each group and token; patent: eps 0, scale 1, noise for
    each group). With eps 0 an empty group yields W_o's bias.
    """

    def __init__(self, options: GroupingOptions) -> None:
        super().__init__()
        width = options.width
        self.q_proj, self.k_proj, self.v_proj, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.options = options
        self.scale = width**-0.5 if options.assign_scale is None else options.assign_scale

    def forward(self, groups: Tensor, tokens: Tensor, *, soft: bool = False) -> tuple[Tensor, GroupMap]:
        """Assign.

        Args:
            groups: [B, G, W].
            tokens: [B, S, W].
            soft: also give the noise-free soft map.

        Returns:
            [B, G, W], and the map.
        """
        options = self.options
        query, key, value = self.q_proj(groups), self.k_proj(tokens), self.v_proj(tokens)
        kind = options.noise if self.training else "none"
        noisy_query, noisy_key = self._with_group_noise(query, key) if kind == "group" else (query, key)
        found = gumbel_assign(
            noisy_query,
            noisy_key,
            value,
            tau=options.tau,
            scale=self.scale,
            hard=options.hard,
            noise=kind == "element",
            eps=options.assign_eps,
            return_soft=soft and kind != "group",
            backend=options.backend,
        )
        probabilities = found.soft
        if soft and probabilities is None:
            with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
                probabilities = torch.softmax(self.scale * (query.float() @ key.float().mT), dim=1)
        map_ = None if probabilities is None else probabilities.mT
        return self.proj(found.pooled), GroupMap(map_, found.index, groups.shape[1])

    def _with_group_noise(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """One more channel, noise / scale in the queries and 1 in the keys: each group's logits shift by its noise.

        The op draws noise for each element only; this way it still never sees a matrix of logits.
        """
        uniform = torch.rand(*query.shape[:2], 1, device=query.device)
        tiny = torch.finfo(uniform.dtype).tiny
        noise = -(-uniform.clamp(min=tiny).log()).log()
        ones = key.new_ones(*key.shape[:2], 1)
        return torch.cat([query, (noise / self.scale).to(query.dtype)], -1), torch.cat([key, ones], -1)


class GroupingBlock(nn.Module):
    """Merge S tokens into G groups.

        p = CrossAttention(LN(TokenMLP(LN_g g)), LN_x x),  y = AssignAttention(p, LN_x x) + p,  y + MLP(LN y)

    Args:
        options: see `GroupingOptions`.
        group_tokens: how many group tokens come in.
        output_groups: G.
    """

    def __init__(self, options: GroupingOptions, group_tokens: int, output_groups: int) -> None:
        super().__init__()
        width, eps = options.width, options.layer_norm_eps
        self.norm_tokens = nn.LayerNorm(width, eps=eps)
        self.mlp_inter = TokenMLP(group_tokens, options.token_mlp_width, output_groups, options.activation)
        self.norm_post_tokens = nn.LayerNorm(width, eps=eps)
        self.norm_x = nn.LayerNorm(width, eps=eps)
        self.pre_assign_attn = CrossAttentionLayer(options)
        self.assign = AssignAttention(options)
        self.norm_new_x = nn.LayerNorm(width, eps=eps)
        self.mlp_channels = MLP(width, options.channel_mlp_width, width, options.activation)

    def forward(self, tokens: Tensor, group_tokens: Tensor, *, soft: bool = False) -> tuple[Tensor, GroupMap]:
        """[B, S, W] and the group tokens to the groups [B, G, W] and the map of tokens to groups."""
        tokens = self.norm_x(tokens)
        groups = self.norm_post_tokens(self.mlp_inter(self.norm_tokens(group_tokens)))
        groups = self.pre_assign_attn(groups, tokens)
        merged, map_ = self.assign(groups, tokens, soft=soft)
        merged = merged + groups
        return merged + self.mlp_channels(self.norm_new_x(merged)), map_
