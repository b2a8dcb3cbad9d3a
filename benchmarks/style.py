"""One colour and marker a variant, the same in every picture, and the axes that all of them share."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple


class Style(NamedTuple):
    colour: str
    marker: str
    line: str = "-"


# Ours are blue, what no method can avoid is grey and dashed.
STYLES = {
    "jrl cpu": Style("#1f5fbf", "o"),
    "jrl triton": Style("#1f5fbf", "o"),
    "jrl cuda": Style("#0b2a5c", "o"),
    "products": Style("#666666", "x", "--"),
    "eager": Style("#e8871e", "s"),
    "compile": Style("#c0392b", "D"),
    "chunked": Style("#2e9e5b", "^"),
    "loop": Style("#8e5fc0", "v"),
    "open_clip": Style("#17a2b8", "P"),
    "inf_cl": Style("#d6408f", "X"),
    "cut_cross_entropy": Style("#8c6d31", "<"),
    "liger": Style("#a3b51c", ">"),
    "liger_sm90": Style("#6b7a0f", "p"),
    "torch_linear_cross_entropy": Style("#f2b701", "h"),
    "quack": Style("#4d7c8a", "d"),
    "flash_maxsim": Style("#b5651d", "P"),
    "late_interaction_kernels": Style("#5b2333", "X"),
    "pylate": Style("#008080", "<"),
    "sentence_transformers": Style("#ad85ba", ">"),
    "transformers": Style("#3c9d9b", "p"),
    "lightly": Style("#7d8b33", "h"),
}
OTHERS = (Style("#9c755f", "*"), Style("#bab0ac", "8"), Style("#76448a", "H"), Style("#196f3d", "d"))

# Of ops, where the colour already says the variant.
MARKERS = "os^vDPX*<>phd8H"


def of(variant: str) -> Style:
    """Its own, or, for a name that is not listed, one that depends on the name alone."""
    return STYLES.get(variant) or OTHERS[zlib.crc32(variant.encode()) % len(OTHERS)]


def series(variant: str, graph: bool) -> str:
    return f"{variant}, CUDA graph" if graph else variant


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plain(axis: Any, which: str, values: list[float] | None = None) -> None:
    """Log axis with figures as people write them, at the given places; call it when the axis has its limits."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    axis.set(**{f"{which}scale": "log"})
    low, high = axis.get_xlim() if which == "x" else axis.get_ylim()
    # Between the powers of ten too where there are few of them.
    between = (1, 2, 5) if high / low < 200 else (1,)
    side = getattr(axis, f"{which}axis")
    side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))
    side.set_minor_locator(NullLocator())
    side.set_major_locator(LogLocator(subs=between) if values is None else FixedLocator(values))


def save(figure: Any, path: Any) -> None:
    figure.savefig(path, dpi=110)
    pyplot().close(figure)
