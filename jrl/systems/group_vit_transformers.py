"""GroupViT from and to the weights and the config of transformers' `GroupViTModel`."""

from __future__ import annotations

import math
from typing import Any

from transformers import CLIPTextConfig, GroupViTConfig, GroupViTModel

from jrl.encoders import TextEncoder
from jrl.encoders.group_vit import GroupViTImageEncoder
from jrl.objectives import ContrastiveObjective
from jrl.systems.group_vit import GroupViT

_PARTS = (
    ("vision_model.embeddings.patch_embeddings.projection.", "image_encoder.patch_embedding."),
    ("vision_model.embeddings.position_embeddings", "image_encoder.position_embedding"),
    ("vision_model.embeddings.layernorm.", "image_encoder.patch_norm."),
    ("vision_model.encoder.stages.", "image_encoder.stages."),
    ("vision_model.layernorm.", "image_encoder.norm."),
    ("text_model.", "text_encoder.model."),
    ("visual_projection.", "image_projection."),
    ("text_projection.", "text_projection."),
    ("logit_scale", "objective.log_scale"),
)
_INSIDE_A_STAGE = (
    (".group_token", ".group_tokens"),
    (".downsample.", ".grouping."),
    (".group_projector.", ".projector."),
)
_TEXT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
# what the encoder has under another name
_VISION = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_size": "width",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_width",
    "num_channels": "channels",
    "hidden_act": "activation",
    "layer_norm_eps": "layer_norm_eps",
    "assign_eps": "assign_eps",
}


def from_transformers(model: GroupViTModel, *, drop_path: float = 0.0, backend: str = "auto") -> GroupViT:
    """The system that gives the same numbers as a transformers model, with a copy of its weights.

    The temperature has no upper bound, as in transformers; `multi_label`, which transformers lacks, is new.

    Args:
        model: the model; `GroupViTModel.from_pretrained(folder)` reads one.
        drop_path: see `GroupViTImageEncoder`; transformers has none.
        backend: of the kernels.

    Returns:
        The system, in evaluation mode.

    Raises:
        TypeError: `model` is no `GroupViTModel`.
        ValueError: its config asks for what the system does not have.
    """
    if not isinstance(model, GroupViTModel):
        raise TypeError(f"model: expected GroupViTModel, got {type(model).__name__}")
    config = model.config
    system = GroupViT(
        _image_encoder(config.vision_config, drop_path, backend),
        TextEncoder(
            CLIPTextConfig(**{name: getattr(config.text_config, name) for name in _TEXT}), pooling="pooler"
        ),
        projection_dim=config.projection_dim,
        projection_hidden=config.projection_intermediate_dim,
        objective=ContrastiveObjective(
            init_scale=math.exp(config.logit_scale_init_value), max_scale=None, backend=backend
        ),
    )
    theirs = model.state_dict()
    names = _names(system)
    missing, unknown = sorted(set(names.values()) - set(theirs)), sorted(set(theirs) - set(names.values()))
    if missing or unknown:
        raise ValueError(f"model: its weights do not fit its config: missing {missing}, unknown {unknown}")
    own = system.state_dict()
    own.update({name: theirs[their_name].detach().clone() for name, their_name in names.items()})
    system.load_state_dict(own)
    return system.eval()


def to_transformers(system: GroupViT) -> GroupViTModel:
    """The transformers model with a copy of the weights, in evaluation mode; `save_pretrained` writes it.

    What transformers has no place for is left behind: the temperature of the prompts and the rate of
    `drop_path`; in training its model draws noise for each element.

    Args:
        system: one whose text encoder is a `CLIPTextModel` pooled by its end-of-text token.

    Raises:
        TypeError: `system` is no `GroupViT`.
        ValueError: transformers' model cannot give the same numbers.
    """
    if not isinstance(system, GroupViT):
        raise TypeError(f"system: expected GroupViT, got {type(system).__name__}")
    model = GroupViTModel(_config(system))
    state, names = system.state_dict(), _names(system)
    # strictly: a name that transformers has and this table lacks must not stay random
    model.load_state_dict({theirs: state[ours].detach().clone() for ours, theirs in names.items()})
    return model.eval()


def _names(system: GroupViT) -> dict[str, str]:
    """Our name of each tensor of the transformers model, and its name there."""
    names: dict[str, str] = {}
    for name in system.state_dict():
        if name.startswith("multi_label."):
            continue
        theirs, ours = next(pair for pair in _PARTS if name.startswith(pair[1]))
        rest = name[len(ours) :].removeprefix("text_model.")
        if ours == "image_encoder.stages.":
            for their_part, our_part in _INSIDE_A_STAGE:
                rest = rest.replace(our_part, their_part)
        names[name] = theirs + rest
    return names


def _image_encoder(config: Any, drop_path: float, backend: str) -> GroupViTImageEncoder:
    for name in ("dropout", "attention_dropout"):
        if getattr(config, name):
            raise ValueError(f"model: vision_config has {name} {getattr(config, name)}, expected 0")
    for name in ("image_size", "patch_size"):
        if not isinstance(getattr(config, name), int):
            raise ValueError(
                f"model: vision_config has {name} {getattr(config, name)}, expected one whole number"
            )
    token_ratio, channel_ratio = config.assign_mlp_ratio
    return GroupViTImageEncoder(
        **{ours: getattr(config, theirs) for theirs, ours in _VISION.items()},
        depths=config.depths,
        group_tokens=config.num_group_tokens,
        # the last entry of the published config is 8, where nothing is merged
        output_groups=[
            merged if learned else 0
            for learned, merged in zip(config.num_group_tokens, config.num_output_groups, strict=True)
        ],
        token_mlp_width=int(token_ratio * config.hidden_size),
        channel_mlp_width=int(channel_ratio * config.hidden_size),
        drop_path=drop_path,
        backend=backend,
    )


def _config(system: GroupViT) -> GroupViTConfig:
    image, text = system.image_encoder.to_config(), system.text_encoder
    for name, same in (("assign_scale", None), ("tau", 1.0), ("hard", True)):
        if image[name] != same:
            raise ValueError(f"system: transformers has no {name}, expected {same}, got {image[name]}")
    if not isinstance(text.model.config, CLIPTextConfig):
        raise ValueError(f"system: expected a CLIPTextModel as text encoder, got {type(text.model).__name__}")
    eos = text.model.config.eos_token_id
    # there the id 2 means the largest id, as in CLIP's first checkpoints
    if text.pooling != "pooler" and not (text.pooling == "eos" and text.eos_token_id == eos != 2):
        raise ValueError(
            f"system: expected a text encoder pooled at the end of the text, got {text.pooling!r}"
        )
    width, learned, merged = image["width"], image["group_tokens"], image["output_groups"]
    if any(later and a != b for a, b, later in zip(learned, merged, learned[1:], strict=False)):
        raise ValueError(
            "system: transformers takes as many groups as group tokens from one stage to the next, "
            f"got {merged} and {learned}"
        )
    last = [count for count in merged if count][-1]
    vision = {theirs: image[ours] for theirs, ours in _VISION.items()}
    vision |= {
        "depths": image["depths"],
        "num_hidden_layers": sum(image["depths"]),
        "num_group_tokens": learned,
        "num_output_groups": [count or last for count in merged],
        "assign_mlp_ratio": [_ratio(image[f"{kind}_mlp_width"], width) for kind in ("token", "channel")],
    }
    values = {name: getattr(text.model.config, name) for name in _TEXT}
    return GroupViTConfig(
        text_config=values,
        vision_config=vision,
        projection_dim=system.projection_dim,
        projection_intermediate_dim=system.projection_hidden,
        logit_scale_init_value=math.log(system.objective.to_config()["init_scale"]),
    )


def _ratio(hidden: int, width: int) -> float:
    """A ratio from which transformers computes `hidden` again, by truncation."""
    ratio = hidden / width
    return ratio if int(ratio * width) == hidden else math.nextafter(ratio, math.inf)
