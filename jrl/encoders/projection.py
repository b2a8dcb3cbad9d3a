"""Projection heads from an encoder's width to the joint space."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

PROJECTION_KINDS = ("linear", "mlp", "mlp_bn")


class ProjectionHead(nn.Module):
    """A linear map, or two with a ReLU between.

    "linear": x W; "mlp": Linear-ReLU-Linear; "mlp_bn": Linear-BatchNorm-ReLU-Linear.

    Args:
        in_features: width of the encoder.
        out_features: width of the joint space.
        kind: "linear", "mlp" or "mlp_bn".
        hidden_features: width between the two layers of an MLP; `in_features` when None.
        bias: whether the last layer has one (CLIP's linear projection has none).

    Raises:
        ValueError: a size below 1, another `kind`, or `hidden_features` for "linear".
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kind: str = "linear",
        *,
        hidden_features: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if kind not in PROJECTION_KINDS:
            raise ValueError(f"kind: expected one of {', '.join(PROJECTION_KINDS)}, got {kind!r}")
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if kind == "linear" and hidden_features is not None:
            raise ValueError("hidden_features: has a meaning only for kind 'mlp' and 'mlp_bn'")
        if hidden_features is not None and hidden_features < 1:
            raise ValueError(f"hidden_features: expected at least 1, got {hidden_features}")
        layers: list[nn.Module] = []
        width = in_features
        if kind != "linear":
            width = hidden_features or in_features
            # the normalisation subtracts the mean, so a bias before it would be a dead parameter
            layers.append(nn.Linear(in_features, width, bias=kind == "mlp"))
            if kind == "mlp_bn":
                layers.append(nn.BatchNorm1d(width))
            layers.append(nn.ReLU())
        self.layers = nn.Sequential(*layers)
        self.output = nn.Linear(width, out_features, bias=bias)
        # rows of unit expected length, as CLIP initialises its projections
        nn.init.normal_(self.output.weight, std=width**-0.5)
        self.kind, self.hidden_features = kind, hidden_features

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_features] to [B, out_features]."""
        return self.output(self.layers(x))

    def to_config(self) -> dict[str, Any]:
        """Arguments beside the two sizes that build this head again."""
        return {
            "kind": self.kind,
            "hidden_features": self.hidden_features,
            "bias": self.output.bias is not None,
        }
