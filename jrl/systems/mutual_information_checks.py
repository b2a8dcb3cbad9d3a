"""What a MutualInformation system can be made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jrl.encoders import ImageEncoder, TextEncoder
from jrl.objectives import DeepInfoMax, MaskedWords, MutualInformationEstimator
from jrl.systems.critics import CriticOptions

if TYPE_CHECKING:
    from jrl.systems.mutual_information import MutualInformation

SIDES = ("image", "text")
EMBEDDINGS = ("values", "encoder")
DUPLICATES = ("negative", "exclude")
_KINDS: dict[str, type | tuple[type, type]] = {
    "image_encoder": ImageEncoder,
    "text_encoder": TextEncoder,
    "critic": CriticOptions,
    "estimator": MutualInformationEstimator,
    "image_objective": (DeepInfoMax, type(None)),
    "text_objective": (MaskedWords, type(None)),
}


def check_kinds(parts: Mapping[str, Any]) -> None:
    """Whether each part is what its name says.

    Raises:
        TypeError: a part is of another type.
    """
    for name, part in parts.items():
        kind = _KINDS[name]
        if not isinstance(part, kind):
            expected = kind[0] if isinstance(kind, tuple) else kind
            raise TypeError(f"{name}: expected {expected.__name__}, got {type(part).__name__}")


def check_options(system: MutualInformation) -> None:
    """Whether the options of a system are in range and its parts fit each other.

    Raises:
        ValueError: they are not, or there is nothing to train.
    """
    for name, value, allowed in (
        ("embedding", system.embedding, EMBEDDINGS),
        ("duplicate_captions", system.duplicate_captions, DUPLICATES),
        *(("freeze", side, SIDES) for side in system.freeze),
    ):
        if value not in allowed:
            raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
    image, text = system.image_encoder, system.text_encoder
    if system.embedding == "encoder" and image.width != text.width:
        raise ValueError(
            f"embedding: 'encoder' compares vectors of one width, got {image.width} of pictures and {text.width} of texts; "
            "use 'values'"
        )
    estimator, names = system.estimator, [pair.name for pair in system.layers]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"layers: expected one pair or more, each once, got {names}")
    if any(pair.weight <= 0 or min(pair.image_pool, pair.text_stride) < 1 for pair in system.layers):
        raise ValueError(
            "layers: expected positive weights, and image_pool and text_stride of at least 1, "
            f"got {system.layers}"
        )
    if min(system.joint_weight, system.image_weight, system.text_weight) < 0:
        raise ValueError("joint_weight, image_weight, text_weight: expected 0 or more")
    if system.options.per_word and (estimator.bound, estimator.direction) != ("nce", "text_to_image"):
        raise ValueError(
            "estimator: critics per word need bound 'nce' and direction 'text_to_image', "
            f"got {estimator.bound!r} and {estimator.direction!r}"
        )
    if system.duplicate_captions == "exclude" and estimator.bound != "nce":
        raise ValueError(f"duplicate_captions: the bound {estimator.bound!r} cannot leave pairs out")
    for side, objective in system.objectives.items():
        if side in system.freeze and objective is not None:
            raise ValueError(f"freeze: a frozen {side} encoder cannot learn by {side}_objective")
    if not system.joint_weight and not any(system.objectives.values()):
        raise ValueError("joint_weight: is 0 and there is no other objective, so there is nothing to train")
