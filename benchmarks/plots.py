"""Pictures of results.json: time and extra memory against the batch, a line a variant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """One PNG for each op and dtype: forward, forward+backward and memory, all on log axes.

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
        figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.5), constrained_layout=True)
        for axis, which in zip(axes[:2], ("forward", "forward+backward"), strict=True):
            _lines(axis, [row for row in rows if row["pass"] == which], "milliseconds", 1.0)
            axis.set(title=which, ylabel="milliseconds")
        backward = [row for row in rows if row["pass"] == "forward+backward" and row.get("extra_bytes")]
        _lines(axes[2], backward, "extra_bytes", 2.0**-20)
        axes[2].set(title="extra memory at its peak", ylabel="MiB")
        for axis in axes:
            axis.set(xscale="log", yscale="log", xlabel="rows")
            axis.grid(True, which="both", alpha=0.3)
        handles, labels = axes[1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        figure.suptitle(f"{op}, {dtype}, {result['device']}, torch {result['torch']}")
        path = folder / f"{op}_{dtype}.png"
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
        written.append(path)
    return written


def _lines(axis: Any, rows: Rows, field: str, factor: float) -> None:
    for variant in dict.fromkeys(row["variant"] for row in rows):
        points = sorted((row["shape"][0], row[field] * factor) for row in rows if row["variant"] == variant)
        axis.plot([x for x, _ in points], [y for _, y in points], marker="o", label=variant)
