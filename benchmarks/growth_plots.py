"""Pictures of what grows: cost against each axis with its fitted exponent, and whole training steps against the batch."""

from __future__ import annotations

from pathlib import Path

from . import rows as of_result
from . import style
from .rows import Result, Rows


def time_growth(result: Result, path: Path) -> None:
    """A panel for each op and axis."""
    _growth(result, "milliseconds", 1.0, "exponent", "expected", "Time, ms, against each axis", path)


def memory_growth(result: Result, path: Path) -> None:
    """A panel for each op, against the batch."""
    title = "Extra memory, MiB, against the batch"
    _growth(result, "extra_bytes", 2.0**-20, "memory_exponent", "memory_expected", title, path)


def _growth(
    result: Result, field: str, factor: float, fitted: str, expected: str, title: str, path: Path
) -> None:
    entries = [entry for entry in result["scaling"] if fitted in entry]
    panels = list(dict.fromkeys((entry["op"], entry["axis"]) for entry in entries))
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    pyplot = style.pyplot()
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(3.6 * columns + 0.4, 3.1 * lines + 0.5), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (op, letter) in zip(axes.flat, panels, strict=False):
        for entry in entries:
            if (entry["op"], entry["axis"]) != (op, letter):
                continue
            look = style.of(entry["variant"])
            axis.plot(
                entry["values"],
                [value * factor for value in entry[field]],
                marker=look.marker,
                color=look.colour,
                linewidth=2.2 if of_result.is_ours(entry) else 1.5,
                label=f"{entry['variant']}: {entry[fitted]:.2f} ({entry[expected]:.2g})",
            )
        style.plain(
            axis,
            "x",
            sorted({value for e in entries if (e["op"], e["axis"]) == (op, letter) for value in e["values"]}),
        )
        style.plain(axis, "y")
        axis.margins(y=0.2)
        axis.set_title(f"{op}, {letter}", fontsize=10)
        axis.grid(True, alpha=0.3)
        # Costs rise to the right: the upper left corner stays free.
        axis.legend(fontsize=7.5, loc="upper left", frameon=False)
    figure.suptitle(f"{title}: fitted exponent (expected) — {of_result.name(result)}", fontsize=12)
    style.save(figure, path)


def models(result: Result, path: Path) -> None:
    """Time and peak memory of one training step, a row of panels for each model."""
    entries: Rows = [entry for entry in result["models"] if "milliseconds" in entry]
    names = list(dict.fromkeys(entry["model"] for entry in entries))
    pyplot = style.pyplot()
    figure, axes = pyplot.subplots(
        len(names), 2, figsize=(10, 3.6 * len(names) + 0.5), layout="constrained", squeeze=False
    )
    ours = "jrl cpu" if of_result.kind(result) == "cpu" else "jrl triton"
    for name, pair in zip(names, axes, strict=True):
        chosen = [entry for entry in entries if entry["model"] == name]
        for axis, (title, field, factor) in zip(
            pair,
            (("time of a step, ms", "milliseconds", 1.0), ("peak memory, MiB", "peak_bytes", 2.0**-20)),
            strict=True,
        ):
            for variant in dict.fromkeys(entry["variant"] for entry in chosen):
                look = style.of(ours if variant == "fused" else variant)
                points = sorted(
                    (entry["batch"], entry[field] * factor)
                    for entry in chosen
                    if entry["variant"] == variant and entry.get(field)
                )
                axis.plot(
                    [x for x, _ in points],
                    [y for _, y in points],
                    marker=look.marker,
                    color=look.colour,
                    label=variant,
                )
            style.plain(axis, "x", sorted({float(entry["batch"]) for entry in chosen}))
            style.plain(axis, "y")
            axis.set_title(f"{name}: {title}", fontsize=11)
            axis.set_xlabel("batch")
            axis.grid(True, alpha=0.3)
            axis.legend(frameon=False)
    figure.suptitle(f"One training step — {of_result.name(result)}", fontsize=12)
    style.save(figure, path)
