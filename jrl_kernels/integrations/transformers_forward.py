"""What `jrl_kernels.integrations.transformers` puts in the place of the host's forwards."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import gumbel_assign, info_nce, sigmoid_contrastive
from ._softmax import same_rows

Forward = Callable[..., Any]
Given = dict[str, Any]

TEXT = ("input_ids", "attention_mask", "position_ids", "token_type_ids")
RAGGED = ("pixel_attention_mask", "spatial_shapes")
VISION = ("pixel_values", "interpolate_pos_encoding", *RAGGED)
FLAGS = ("output_attentions", "output_hidden_states")
OWN = ("return_loss", "return_dict", "output_segmentation")


class Host(NamedTuple):
    """A forward of transformers and how it is called."""

    names: tuple[str, ...]  # of its parameters but self
    takes_more: bool  # whether it takes keywords that it does not name
    calls: frozenset[str]  # names of the attributes that its code reads

    @staticmethod
    def of(forward: Forward) -> Host:
        parameters = list(inspect.signature(forward).parameters.values())[1:]
        names = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
        code = getattr(inspect.unwrap(forward), "__code__", None)
        return Host(names, len(names) < len(parameters), frozenset(code.co_names if code else ()))

    def arguments(self, args: tuple[Any, ...], kwargs: Given) -> Given:
        """Every argument by its name; TypeError where a call of the host would raise one."""
        if len(args) > len(self.names):
            raise TypeError(f"forward: takes at most {len(self.names)} positional arguments, got {len(args)}")
        given = dict(zip(self.names, args, strict=False))
        twice = sorted(given.keys() & kwargs.keys())
        if twice:
            raise TypeError(f"forward: got more than one value for {', '.join(twice)}")
        unknown = sorted(kwargs.keys() - {*self.names, "return_dict"})
        if unknown and not self.takes_more:
            raise TypeError(f"forward: takes no {', '.join(unknown)}")
        return {**given, **kwargs}


class Embedded(NamedTuple):
    """Rows of one modality before their norm is divided out, and the whole output of their tower."""

    rows: Tensor
    output: Any


class Family(NamedTuple):
    """Models whose forwards agree."""

    models: tuple[str, ...]  # names in transformers
    output: str  # name of the class of outputs; "{}" for the model's own prefix
    embed: Callable[[Any, Host, Given], tuple[Embedded, Embedded]]  # texts and images
    loss: Callable[[Any, Tensor, Tensor], Tensor]


def _texts(given: Given) -> Given:
    return {"input_ids": None, **{name: given[name] for name in TEXT if name in given}}


def _images(given: Given) -> Given:
    return {"pixel_values": None, **{name: given[name] for name in VISION if name in given}}


def _rest(given: Given, leave: tuple[str, ...] = ()) -> Given:
    return {name: value for name, value in given.items() if name not in (*TEXT, *VISION, *OWN, *leave)}


def _flags(model: Any, host: Host, given: Given) -> Given:
    """What the joint config answers for; where a host leaves the flags to its towers it does not name them."""
    named = [name for name in FLAGS if name in host.names]
    return {name: getattr(model.config, name) if given.get(name) is None else given[name] for name in named}


def _embed_clip(model: Any, host: Host, given: Given) -> tuple[Embedded, Embedded]:
    shared = {**_rest(given), **_flags(model, host, given)}
    images, texts = {**_images(given), **shared}, {**_texts(given), **shared}
    if "get_image_features" in host.calls:
        # transformers 5: the pooled output of each tower is replaced by its projection, in what the user gets too.
        image, text = model.get_image_features(**images), model.get_text_features(**texts)
        return Embedded(text.pooler_output, text), Embedded(image.pooler_output, image)
    image, text = model.vision_model(**images), model.text_model(**texts)
    return (
        Embedded(model.text_projection(text.pooler_output), text),
        Embedded(model.visual_projection(image.pooler_output), image),
    )


def _embed_siglip(model: Any, host: Host, given: Given) -> tuple[Embedded, Embedded]:
    shared = {**_rest(given), **_flags(model, host, given)}
    images = _images(given)
    # By position: the second argument of SigLIP 2's vision tower has another name in transformers 4 than in 5.
    first = ("pixel_values", *(name for name in RAGGED if name in host.names))
    positional = [images.pop(name, None) for name in first]
    image = model.vision_model(*positional, **images, **shared)
    text = model.text_model(**_texts(given), **shared)
    return Embedded(text.pooler_output, text), Embedded(image.pooler_output, image)


def _embed_group_vit(model: Any, host: Host, given: Given) -> tuple[Embedded, Embedded]:
    flags = _flags(model, host, given)
    image = model.vision_model(given.get("pixel_values"), **flags, return_dict=True)
    # transformers 5 gives the flags to the vision tower alone, and further keywords to the text tower alone.
    further = _rest(given, FLAGS) if "return_dict" not in host.names else {**flags, "return_dict": True}
    text = model.text_model(**_texts(given), **further)
    return (
        Embedded(model.text_projection(text.pooler_output), text),
        Embedded(model.visual_projection(image.pooler_output), image),
    )


def _embed_dual_encoder(model: Any, host: Host, given: Given) -> tuple[Embedded, Embedded]:
    flags = {name: given.get(name) for name in FLAGS}
    image = model.vision_model(pixel_values=given.get("pixel_values"), **flags, return_dict=True)
    text = model.text_model(**{name: given.get(name) for name in TEXT}, **flags, return_dict=True)
    # By position, as the host: the pooled output of some towers has another name.
    return (
        Embedded(model.text_projection(text[1]), text),
        Embedded(model.visual_projection(image[1]), image),
    )


def _softmax_loss(model: Any, text: Tensor, image: Tensor) -> Tensor:
    loss: Tensor = info_nce(text, image, scale=model.logit_scale.exp().to(text.device))
    return loss


def _sigmoid_loss(model: Any, text: Tensor, image: Tensor) -> Tensor:
    scale, bias = model.logit_scale.to(text.device).exp(), model.logit_bias.to(text.device)
    return sigmoid_contrastive(text, image, scale=scale, bias=bias)


FAMILIES = {
    "clip": Family(("CLIPModel",), "CLIPOutput", _embed_clip, _softmax_loss),
    "siglip": Family(("SiglipModel", "Siglip2Model"), "{}Output", _embed_siglip, _sigmoid_loss),
    "group_vit": Family(("GroupViTModel",), "GroupViTModelOutput", _embed_group_vit, _softmax_loss),
    "vision_text_dual_encoder": Family(
        ("VisionTextDualEncoderModel",), "CLIPOutput", _embed_dual_encoder, _softmax_loss
    ),
}


def model_forward(forward: Forward, family: Family, output_class: Callable[..., Any]) -> Forward:
    """The training forward of a dual encoder without its logits; everything else is left to the host's `forward`."""
    host = Host.of(forward)
    signature = inspect.signature(forward)

    @functools.wraps(forward)
    def fused(self: Any, *args: Any, output_logits: bool | None = None, **kwargs: Any) -> Any:
        given = host.arguments(args, kwargs)
        return_loss = given.get("return_loss")
        if output_logits is None:
            output_logits = not (self.training and return_loss)
        segmentation = given.get("output_segmentation")
        if segmentation is None:
            segmentation = getattr(self.config, "output_segmentation", False)
        # Maps of every text over every image dwarf the logits.
        if output_logits or segmentation:
            return forward(self, **given)
        texts, images = family.embed(self, host, given)
        text, image = _unit(texts.rows), _unit(images.rows).to(texts.rows.device)
        if return_loss:
            same_rows("forward", "texts", text, "images", image)
        output = output_class(
            loss=family.loss(self, text, image) if return_loss else None,
            text_embeds=text,
            image_embeds=image,
            text_model_output=texts.output,
            vision_model_output=images.output,
        )
        return_dict = given.get("return_dict")
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()

    # What Trainer reads to learn which columns of a data set the model takes.
    option = inspect.Parameter("output_logits", inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = list(signature.parameters.values())
    at = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), len(parameters))
    parameters.insert(at, option)
    fused.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return fused


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(p=2, dim=-1, keepdim=True)


def assign_forward(forward: Forward) -> Forward:
    """GroupViTAssignAttention's forward through `gumbel_assign`: no matrix of groups and tokens is kept for the backward."""

    @functools.wraps(forward)
    def fused(self: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor | None]:
        groups, tokens, values = self.q_proj(query), self.k_proj(key), self.v_proj(key)
        pooled = gumbel_assign(
            groups, tokens, values, scale=self.scale, noise=self.training, eps=self.assign_eps
        ).pooled
        soft = None
        if getattr(self, "soft_attention_asked", True):
            # With its gradient, as the host's; `Assignment.soft` has none.
            soft = torch.softmax((groups @ tokens.mT) * self.scale, dim=-2)
        return self.proj(pooled), soft

    return fused


def stage_forward(forward: Forward) -> Forward:
    """GroupViTStage's forward, which tells its grouping block whether anybody wants the soft attention."""

    @functools.wraps(forward)
    def fused(
        self: Any, hidden_states: Tensor, prev_group_token: Any = None, output_attentions: Any = False
    ) -> Any:
        block = getattr(self.downsample, "assign", None)
        if block is None or output_attentions:
            return forward(self, hidden_states, prev_group_token, output_attentions)
        block.soft_attention_asked = False
        try:
            return forward(self, hidden_states, prev_group_token, output_attentions)
        finally:
            del block.soft_attention_asked

    return fused


GROUPING = {"GroupViTAssignAttention": assign_forward, "GroupViTStage": stage_forward}


def build(host: type, forward: Forward) -> Forward:
    """The fused forward for a class of transformers, which is known by its name."""
    name = host.__name__
    if name in GROUPING:
        return GROUPING[name](forward)
    family = next(family for family in FAMILIES.values() if name in family.models)
    output = family.output.format(name.removesuffix("Model"))
    return model_forward(forward, family, getattr(sys.modules[host.__module__], output))
