"""Pictures of results.json: time and extra memory of every variant, against the batch or shape by shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """One PNG for each op and dtype: a panel a pass and one for memory, on log axes.

    Shapes that differ in their batch alone give lines against the batch; any others stand side by side as bars.

    Args:
        result: what `benchmarks.run` writes to results.json.
        folder: where the PNGs go.

    Returns:
        The paths written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    timed = [row for row in result["rows"] if "milliseconds" in row]
    for op, dtype in sorted({(row["op"], row["dtype"]) for row in timed}):
        rows = [row for row in timed if (row["op"], row["dtype"]) == (op, dtype)]
        passes = list(dict.fromkeys(row["pass"] for row in rows))
        panels = [(which, "milliseconds", 1.0, _of(rows, which)) for which in passes]
        weighed = [row for row in _of(rows, passes[-1]) if row.get("extra_bytes")]
        panels.append(("extra memory at its peak", "extra_bytes", 2.0**-20, weighed))
        figure, axes = pyplot.subplots(
            1, len(panels), figsize=(5 * len(panels), 4.5), constrained_layout=True
        )
        variants = list(dict.fromkeys(row["variant"] for row in rows))
        shapes = list(dict.fromkeys(tuple(row["shape"]) for row in rows))
        growing = len(shapes) > 1 and len({shape[2:] for shape in shapes}) == 1
        for axis, (title, field, factor, chosen) in zip(axes, panels, strict=True):
            plot = _lines if growing else _bars
            plot(axis, chosen, field, factor, variants, shapes)
            axis.set(title=title, yscale="log", ylabel="MiB" if field == "extra_bytes" else "milliseconds")
            axis.grid(True, which="both", axis="y", alpha=0.3)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        figure.suptitle(f"{op}, {dtype}, {result['device']}, torch {result['torch']}")
        path = folder / f"{op}_{dtype}.png"
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
        written.append(path)
    return written


def _of(rows: Rows, which: str) -> Rows:
    return [row for row in rows if row["pass"] == which]


def _lines(
    axis: Any, rows: Rows, field: str, factor: float, variants: list[str], shapes: list[tuple[int, ...]]
) -> None:
    for place, variant in enumerate(variants):
        points = sorted((row["shape"][0], row[field] * factor) for row in rows if row["variant"] == variant)
        axis.plot(
            [x for x, _ in points], [y for _, y in points], marker="o", color=f"C{place}", label=variant
        )
    axis.set(xscale="log", xlabel="rows")


def _bars(
    axis: Any, rows: Rows, field: str, factor: float, variants: list[str], shapes: list[tuple[int, ...]]
) -> None:
    width = 0.8 / len(variants)
    for place, variant in enumerate(variants):
        points = [
            (shapes.index(tuple(row["shape"])) + (place + 0.5) * width - 0.4, row[field] * factor)
            for row in rows
            if row["variant"] == variant
        ]
        axis.bar([x for x, _ in points], [y for _, y in points], width, color=f"C{place}", label=variant)
    axis.set_xticks(range(len(shapes)), ["x".join(map(str, shape)) for shape in shapes], fontsize=7)
