"""What a MutualInformation system can be made of."""

from __future__ import annotations

import math
import warnings
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
    if any(
        not 0 < pair.weight < math.inf or min(pair.image_pool, pair.text_stride) < 1 for pair in system.layers
    ):
        raise ValueError(
            "layers: expected positive finite weights, and image_pool and text_stride of at least 1, "
            f"got {system.layers}"
        )
    weights = system.joint_weight, system.image_weight, system.text_weight
    if not all(0 <= weight < math.inf for weight in weights):
        raise ValueError(
            f"joint_weight, image_weight, text_weight: expected 0 or more and finite, got {weights}"
        )
    if system.options.per_word and (estimator.bound, estimator.direction) != ("nce", "text_to_image"):
        raise ValueError(
            "estimator: critics per word need bound 'nce' and direction 'text_to_image', "
            f"got {estimator.bound!r} and {estimator.direction!r}"
        )
    if system.duplicate_captions == "exclude" and estimator.bound != "nce":
        raise ValueError(f"duplicate_captions: the bound {estimator.bound!r} cannot leave pairs out")
    known = math.inf if text.vocab_size is None else text.vocab_size
    for token in system.special_token_ids:
        if not isinstance(token, int) or not 0 <= token < known:
            raise ValueError(f"special_token_ids: expected whole numbers in [0, {known}), got {token!r}")
    local = system.image_objective
    if local is not None and (local.local_width, local.global_width) != (image.width, image.width):
        raise ValueError(
            f"image_objective: expected local_width and global_width {image.width} as the image encoder, "
            f"got {local.local_width} and {local.global_width}"
        )
    hidden = system.text_objective
    if hidden is not None:
        free = sorted(set(system.special_token_ids) - {hidden.mask_token_id, *hidden.special_token_ids})
        if free:
            # no error, for there are runs that were trained so
            warnings.warn(
                f"text_objective: hides and draws the tokens {free}, which special_token_ids says are no words; "
                "give them as its special_token_ids too",
                stacklevel=3,
            )
    for side, objective in system.objectives.items():
        if side in system.freeze and objective is not None:
            raise ValueError(f"freeze: a frozen {side} encoder cannot learn by {side}_objective")
    if not system.joint_weight and not any(system.objectives.values()):
        raise ValueError("joint_weight: is 0 and there is no other objective, so there is nothing to train")
