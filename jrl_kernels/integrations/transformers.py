"""Fused losses and grouping inside models of transformers: CLIP, SigLIP, GroupViT and VisionTextDualEncoder.

    model = apply_to_clip(CLIPModel(config))
    model(**batch, return_loss=True).loss.backward()

While a patched model trains and is asked for its loss, the loss comes from `info_nce` or `sigmoid_contrastive` and the logits
[B, B] are never made: `logits_per_image` and `logits_per_text` are None (and absent from a tuple). Everything else is the host's:
evaluation, calls without `return_loss`, parameters, names, configs. The forward takes one argument more, `output_logits`: True
leaves a training call to the host, False omits the logits anywhere.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

try:
    import transformers
except ImportError as error:
    raise ImportError(
        "jrl_kernels.integrations.transformers needs transformers: pip install 'transformers>=4.57'"
    ) from error

from .transformers_forward import FAMILIES, GROUPING, build

__all__ = [
    "ReturnLossCollator",
    "apply_to_clip",
    "apply_to_group_vit",
    "apply_to_siglip",
    "apply_to_vision_text_dual_encoder",
    "undo",
]

T = TypeVar("T")

GROUPED = ("GroupViTModel", "GroupViTVisionModel", *GROUPING)

_EVERY = frozenset(name for family in FAMILIES.values() for name in family.models) | GROUPING.keys()


def apply_to_clip(model_or_class: T) -> T:
    """CLIPModel with a training loss from `info_nce`.

        loss = ½ (CE over rows + CE over columns) of exp(logit_scale) T Iᵀ, T and I of unit rows

    Radford et al. 2021, as `CLIPModel.forward` computes it, without the matrix.

    Args:
        model_or_class: a CLIPModel, any module that contains one, or the class: then every CLIPModel of this process, those
            that exist included.

    Returns:
        What was given, changed in place; `undo` takes it back. A model that is patched already stays as it is. A patched model
        pickles and copies as one; its class has the name of the host's.

    Raises:
        TypeError: neither a module nor a class of that family, or a subclass with a forward of its own.
        ValueError: nothing in the module is of that family, or a forward was replaced on the instance (accelerate's hooks).

    Gradients: as the host's, of every parameter.
    """
    return _apply(model_or_class, "clip")


def apply_to_siglip(model_or_class: T) -> T:
    """SiglipModel or Siglip2Model with a training loss from `sigmoid_contrastive`.

        loss = -(1/B) sum_ij log sigmoid(z_ij (exp(logit_scale) t_i . v_j + logit_bias)),  z_ij = 1 for i = j, else -1

    Zhai et al. 2023. Arguments, returns, raises and gradients: as `apply_to_clip`.
    """
    return _apply(model_or_class, "siglip")


def apply_to_group_vit(model_or_class: T) -> T:
    """GroupViTModel with a training loss from `info_nce`, and every grouping block through `gumbel_assign`.

        pooled_g = sum_s Â_gs v_s / (sum_s Â_gs + assign_eps)
        Â_gs = 1[g = argmax_g (q_g . k_s * scale + noise)], straight-through

    Xu et al. 2022, as `GroupViTAssignAttention.forward` computes it: noise in training only, the normaliser differentiated. The
    noise is Philox's under a seed from PyTorch's generator, so a seeded run draws other noise than the host's. The soft
    attention is made only where attentions are asked for, and has the host's gradient.

    A GroupViTVisionModel, which has no loss, gets the grouping alone. Given a class, the grouping blocks of every GroupViT of
    this process change. Arguments, returns, raises and gradients: as `apply_to_clip`.
    """
    return _apply(model_or_class, "group_vit")


def apply_to_vision_text_dual_encoder(model_or_class: T) -> T:
    """VisionTextDualEncoderModel with a training loss from `info_nce`.

    The loss, arguments, returns, raises and gradients of `apply_to_clip`, over any two towers.
    """
    return _apply(model_or_class, "vision_text_dual_encoder")


def undo(model_or_class: T) -> T:
    """Take back what an `apply_to_...` did to a model or a class: the host's classes and functions are there again.

    Args:
        model_or_class: what was given to `apply_to_...`, or a module that contains it.

    Returns:
        What was given, changed in place.

    Raises:
        TypeError: neither a module nor a class.
        ValueError: nothing in it was patched, or it was wrapped since, by a class of another library (FSDP) or by a forward on
            the instance (accelerate's prepare).
    """
    if isinstance(model_or_class, type):
        classes: list[type] = [model_or_class, *_grouping_classes(model_or_class)]
        restored = [_restore(c) for c in classes]
        if not any(restored):
            raise ValueError(f"undo: {model_or_class.__name__} is not patched")
        return model_or_class
    patched = [m for m in _modules("undo", model_or_class) if hasattr(type(m), "_jrl_host")]
    if not patched:
        raise ValueError(
            f"undo: nothing in this {type(model_or_class).__name__} is patched; "
            "what was applied to a class is undone on the class"
        )
    for module in patched:
        if "_jrl_host" not in vars(type(module)):
            raise ValueError(
                f"undo: {type(module).__name__} wraps a patched model; undo before it is wrapped"
            )
        if "forward" in vars(module):
            raise ValueError(
                f"undo: this {type(module).__name__} has a forward of its own, which keeps the fused one (accelerate's prepare); "
                "undo before that, or after unwrap_model(model, keep_fp32_wrapper=False)"
            )
    for module in patched:
        module.__class__ = vars(type(module))["_jrl_host"]
    return model_or_class


class ReturnLossCollator:
    """A collator that adds `return_loss=True` to its batches.

    transformers' dual encoders compute no loss without it, and their Trainer does not ask: it reports that the model returned
    no loss.

    Args:
        collator: makes the batch; transformers' `default_data_collator` when None.

    Raises:
        TypeError: `collator` is not callable.
    """

    def __init__(self, collator: Callable[[Any], Any] | None = None) -> None:
        if collator is not None and not callable(collator):
            raise TypeError(f"collator: expected a callable, got {type(collator).__name__}")
        self.collator = transformers.default_data_collator if collator is None else collator

    def __call__(self, features: list[Any]) -> Any:
        batch = self.collator(features)
        batch["return_loss"] = True
        return batch


def _apply(target: T, family: str) -> T:
    names = FAMILIES[family].models
    wanted = {*names, *(GROUPING if family == "group_vit" else ())}
    if isinstance(target, type):
        hosts = [*_grouping_classes(target)] if family == "group_vit" else []
        base = _base(target)
        if base is not None and base.__name__ in names:
            _check_owner(target, base)
            hosts.append(target)
        if not hosts:
            known = GROUPED[:2] if family == "group_vit" else names
            raise TypeError(f"apply_to_{family}: expected {' or '.join(known)}, got {target.__name__}")
        for host in hosts:
            _patch(host)
        return target
    found = []
    for module in _modules(f"apply_to_{family}", target):
        host = type(module)
        base = _base(host)
        if base is None or base.__name__ not in wanted or hasattr(host, "_jrl_host"):
            continue
        _check_owner(host, base)
        if "forward" in vars(module):
            raise ValueError(
                f"apply_to_{family}: this {host.__name__} has a forward of its own (a hook of accelerate?); "
                f"apply before that, or to the class"
            )
        found.append(module)
    if not found and not any(_is_patched(type(m), wanted) for m in _modules("", target)):
        raise ValueError(
            f"apply_to_{family}: nothing was patched: {type(target).__name__} has no {' or '.join(names)}"
        )
    for module in found:
        own: Any = type(module)
        module.__class__ = _fused_class(own)
    return target


def _modules(function: str, target: Any) -> list[nn.Module]:
    if not isinstance(target, nn.Module):
        raise TypeError(f"{function}: expected a module or a class, got {type(target).__name__}")
    return list(target.modules())


def _base(host: type) -> type | None:
    """The class of transformers that a class is or descends from."""
    return next(
        (c for c in host.__mro__ if c.__name__ in _EVERY and c.__module__.startswith("transformers.models.")),
        None,
    )


def _is_patched(host: type, names: set[str]) -> bool:
    base = _base(host)
    return base is not None and base.__name__ in names and hasattr(host, "_jrl_host")


def _grouping_classes(host: type) -> list[type]:
    """The blocks of the module of transformers that defines `host` or what it descends from, where pictures are grouped in it."""
    for ancestor in host.__mro__:
        if ancestor.__module__.startswith("transformers.models.groupvit.") and ancestor.__name__ in GROUPED:
            module = sys.modules[ancestor.__module__]
            return [getattr(module, name) for name in GROUPING]
    return []


def _check_owner(host: type, base: type) -> None:
    owner = next(c for c in host.__mro__ if "forward" in vars(c))
    if owner is not base and not hasattr(vars(owner)["forward"], "_jrl_host"):
        raise TypeError(
            f"{owner.__name__} has a forward of its own, which the fused one would replace; "
            f"apply to the class {base.__name__}, whose forward it may call"
        )


def _unpatched(host: type) -> Callable[..., Any]:
    forward: Any = vars(host)["forward"]
    return getattr(forward, "_jrl_host", forward)


def _fused_forward(host: type) -> Callable[..., Any]:
    base = _base(host)
    assert base is not None
    return build(base, _unpatched(base))


def _patch(host: type) -> None:
    forward: Any = vars(host).get("forward")
    if hasattr(forward, "_jrl_host"):
        return
    fused: Any = _fused_forward(host)
    fused._jrl_host = forward  # None where it was inherited
    host.forward = fused  # type: ignore[attr-defined]


def _restore(host: type) -> bool:
    forward: Any = vars(host).get("forward")
    if not hasattr(forward, "_jrl_host"):
        return False
    if forward._jrl_host is None:
        del host.forward  # type: ignore[attr-defined]
    else:
        host.forward = forward._jrl_host  # type: ignore[attr-defined]
    return True


@functools.cache
def _fused_class(host: type) -> type:
    """A subclass that differs in its forward alone, under the name of `host`: saved configs name the architecture after it."""
    body = {
        "forward": _fused_forward(host),
        "_jrl_host": host,
        "__reduce_ex__": _reduce,
        "__module__": host.__module__,
        "__qualname__": host.__qualname__,
        "__doc__": host.__doc__,
    }
    return type(host)(host.__name__, (host,), body)


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    """Pickle by the host's name: the class itself has none of its own."""
    state = object.__reduce_ex__(self, max(int(protocol), 2))[2]
    return _rebuild, (type(self)._jrl_host,), state


def _rebuild(host: type) -> Any:
    fused = _fused_class(host)
    return fused.__new__(fused)  # type: ignore[call-overload]
