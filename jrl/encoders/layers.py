"""Token features of chosen layers of an encoder: a picture's locations on their grid, a text's words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from jrl.encoders.image import ImageEncoder, backbone_width
from jrl.encoders.output import EncoderOutput
from jrl.encoders.text import TextEncoder

LAST = -1


@dataclass
class GridTokens:
    """Locations of B pictures on a grid.

    Attributes:
        tokens: [B, R, W], row by row; class and register tokens are left out.
        grid: rows and columns, whose product is R.
        shift: rows and columns, in locations, by which the centre of what each location sees lies beyond the middle of its
            share of the picture; (0, 0) unless it was asked for.
    """

    tokens: Tensor
    grid: tuple[int, int]
    shift: tuple[float, float] = (0.0, 0.0)

    def pooled(self, factor: int) -> GridTokens:
        """Means over squares of factor × factor locations; those at the edges may hold fewer.

        Raises:
            ValueError: `factor` is below 1.
        """
        if factor < 1:
            raise ValueError(f"factor: expected at least 1, got {factor}")
        if factor == 1:
            return self
        map_ = self.tokens.transpose(1, 2).unflatten(2, self.grid)
        map_ = F.avg_pool2d(map_, factor, ceil_mode=True, count_include_pad=False)
        shift = (self.shift[0] / factor, self.shift[1] / factor)
        return GridTokens(map_.flatten(2).transpose(1, 2), (map_.shape[2], map_.shape[3]), shift)


def layer_widths(model: nn.Module) -> list[int]:
    """Widths of the hidden states of a transformers model: of the embedding, then of every layer or stage.

    Raises:
        ValueError: the config says neither `hidden_sizes` nor `hidden_size` and `num_hidden_layers`.
    """
    config: Any = getattr(model, "config", None)
    sizes = getattr(config, "hidden_sizes", None)
    if sizes:
        return [getattr(config, "embedding_size", sizes[0]), *sizes]
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(layers, int):
        raise ValueError(
            f"model: the config of {type(model).__name__} does not say how many layers there are"
        )
    return [backbone_width(model)] * (layers + 1)


def layer_width(model: nn.Module, layer: int, argument: str) -> int:
    """Width of one layer: −1 is the model's last output, 0 its embedding, n the output of layer or stage n.

    Raises:
        ValueError: the model has no such layer.
    """
    if layer == LAST:
        return backbone_width(model)
    widths = layer_widths(model)
    if not 0 <= layer < len(widths):
        raise ValueError(f"{argument}: expected -1 for the last layer or 0 to {len(widths) - 1}, got {layer}")
    return widths[layer]


def encode_grids(
    encoder: ImageEncoder, pixel_values: Tensor, layers: Sequence[int] = (LAST,), *, locate: bool = False
) -> tuple[EncoderOutput, list[GridTokens]]:
    """Encode pictures once and keep what chosen layers say of each location.

    Args:
        encoder: any.
        pixel_values: [B, 3, H, W].
        layers: numbers as in `layer_width`.
        locate: find the `shift` of each grid: a convolution of odd width and stride 2 sees, at its first place, what lies
            around the first pixel, not the middle of the first two.

    Returns:
        What the encoder returns, and the locations at each of `layers`, all with their gradients.

    Raises:
        TypeError, ValueError: as the encoder; ValueError also for tokens that lie on no grid.
    """
    with _hidden_states(encoder.model, layers) as found, _strides(encoder.model, locate) as strides:
        output = encoder(pixel_values)
    size = pixel_values.shape[2], pixel_values.shape[3]
    grids = [_on_grid(state, encoder.model, size) for state in found]
    if locate:
        for grid in grids:
            grid.shift = (
                _shift([stride[0] for stride in strides], size[0], grid.grid[0]),
                _shift([stride[1] for stride in strides], size[1], grid.grid[1]),
            )
    return output, grids


def encode_words(
    encoder: TextEncoder,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    layers: Sequence[int] = (LAST,),
) -> tuple[EncoderOutput, list[Tensor]]:
    """Encode texts once and keep what chosen layers say of each token.

    Args:
        encoder: any.
        input_ids, attention_mask: [B, L] as the encoder takes them.
        layers: numbers as in `layer_width`.

    Returns:
        What the encoder returns, and tokens [B, L, W] at each of `layers`, all with their gradients.

    Raises:
        TypeError, ValueError: as the encoder.
    """
    with _hidden_states(encoder.model, layers) as found:
        output = encoder(input_ids, attention_mask)
    return output, found


@contextmanager
def _hidden_states(model: nn.Module, layers: Sequence[int]) -> Iterator[list[Tensor]]:
    """A list that holds the states of `layers` once the model has run inside the context."""
    found: list[Tensor] = []

    def ask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "output_hidden_states": True}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found[:] = [
            output.last_hidden_state if layer == LAST else output.hidden_states[layer] for layer in layers
        ]

    handles = [model.register_forward_hook(keep)]
    if any(layer != LAST for layer in layers):
        handles.append(model.register_forward_pre_hook(ask, with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Stride:
    """One side of a convolution or pooling that makes maps smaller: out place i sees `before + step * i` at its middle."""

    size: int  # of its input
    out: int
    step: int
    before: float


@contextmanager
def _strides(model: nn.Module, wanted: bool) -> Iterator[list[tuple[_Stride, _Stride]]]:
    """A list that holds the strided convolutions and poolings of the model, as they were called inside the context."""
    found: list[tuple[_Stride, _Stride]] = []

    def keep(module: Any, args: tuple[Tensor, ...], output: Any) -> None:
        sides = []
        for axis in (0, 1):
            kernel, step, padding, dilation = (
                value if isinstance(value, int) else value[axis]
                for value in (
                    module.kernel_size,
                    module.stride,
                    module.padding,
                    getattr(module, "dilation", 1),
                )
            )
            middle = dilation * (kernel - 1) / 2 - padding
            sides.append(_Stride(args[0].shape[axis - 2], output.shape[axis - 2], step, middle))
        if any(side.step > 1 for side in sides):
            found.append((sides[0], sides[1]))

    kinds = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
    parts = [part for part in model.modules() if wanted and isinstance(part, kinds)]
    handles = [part.register_forward_hook(keep) for part in parts]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _shift(strides: Sequence[_Stride], size: int, count: int) -> float:
    """How far the mean of the `count` centres on a side lies beyond the picture's middle, in count-ths of the side.

    Branches beside each other, as a residual block's, halve the same map and agree on the middle; the first one counts.
    """
    first, step, now = 0.5, 1, size
    for stride in strides:
        if stride.size == now > count and stride.out >= count:
            first, step, now = first + step * stride.before, step * stride.step, stride.out
    if now != count:
        # no strided convolution or pooling leads there, so nothing is known
        return 0.0
    return (first + step * (count - 1) / 2 - size / 2) * count / size


def _on_grid(state: Tensor, model: nn.Module, size: tuple[int, int]) -> GridTokens:
    if state.ndim == 4:
        return GridTokens(state.flatten(2).transpose(1, 2), (state.shape[2], state.shape[3]))
    patch: Any = getattr(getattr(model, "config", None), "patch_size", None)
    sides = (patch, patch) if isinstance(patch, int) else patch
    rows, columns = (size[0] // sides[0], size[1] // sides[1]) if sides else (0, 0)
    before = state.shape[1] - rows * columns
    # hierarchical models merge patches, so their states are shorter than the first grid
    if not rows or not columns or before < 0:
        raise ValueError(
            f"layers: {type(model).__name__} gives {state.shape[1]} tokens of a {size[0]} × {size[1]} picture, "
            f"which lie on no grid of patches of {patch}"
        )
    return GridTokens(state[:, before:], (rows, columns))
