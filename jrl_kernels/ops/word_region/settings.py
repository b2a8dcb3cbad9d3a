"""The settings of word-region attention: what each option may be, and the sets of them that published systems use."""

from __future__ import annotations

from typing import Any, NamedTuple

from ... import _checks

PRENORMALIZE = ("none", "softmax", "l2norm", "leakyrelu+l2norm", "leakyrelu", "l1norm", "leakyrelu+l1norm")
MATCH = ("cosine", "dot")
POOL = ("sum", "mean", "max", "logsumexp", "logsumexp_undivided", "none")
ATTEND = ("regions", "words")


INVERSE_ROOT = "1 / sqrt(D)"
"""An attention_scale that depends on the width."""


class Settings(NamedTuple):
    """The options of `word_region_scores`."""

    normalize: bool = True
    prenormalize: str = "none"
    attention_scale: Any = 5.0
    hard: bool = False
    match: str = "cosine"
    pool: str = "logsumexp"
    pool_scale: Any = 5.0
    attend: str = "regions"
    scale: Any = 1.0


_DOT = Settings(normalize=False, attention_scale=1.0, match="dot", pool="sum")
_SCAN = Settings(prenormalize="leakyrelu+l2norm")

PRESETS = {
    "xmc_gan": Settings(scale=50.0),
    "damsm": Settings(
        normalize=False, prenormalize="softmax", attention_scale=4.0, pool="logsumexp_undivided", scale=10.0
    ),
    "scan_t2i": _SCAN._replace(attention_scale=9.0, pool_scale=6.0),
    "scan_i2t": _SCAN._replace(attention_scale=4.0, pool_scale=5.0, attend="words"),
    "info_ground": _DOT._replace(attention_scale=INVERSE_ROOT, pool="none"),
    "mutual_information": _DOT,
    "dvsa": _DOT._replace(hard=True),
}


def resolve(op: str, preset: str | None, given: dict[str, Any]) -> Settings:
    """The preset's settings (or the defaults), with those that are not None in `given` in their place, checked."""
    chosen = Settings()
    if preset is not None:
        chosen = PRESETS[_checks.choice(op, "preset", preset, tuple(PRESETS))]
    chosen = chosen._replace(**{name: value for name, value in given.items() if value is not None})
    for name in ("normalize", "hard"):
        value = getattr(chosen, name)
        if not isinstance(value, bool):
            raise TypeError(f"{op}: {name} must be True or False, got {_checks.describe(value)}")
    choices = {"prenormalize": PRENORMALIZE, "match": MATCH, "pool": POOL, "attend": ATTEND}
    for name, allowed in choices.items():
        _checks.choice(op, name, getattr(chosen, name), allowed)
    return chosen
