"""Pictures of results.json, each variant in one colour throughout."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from . import rows as of_result
from . import style
from .growth_plots import memory_growth, models, time_growth
from .rows import Headline, Result, Row, Rows, is_ours, timed

MEMORY = "extra_bytes"


def pictures(result: Result) -> dict[str, Callable[[Path], None]]:
    """File name -> what draws it, for everything that the result holds."""
    rows = timed(result)
    found: dict[str, Callable[[Path], None]] = {}
    headlines = [headline for headline in of_result.headlines(result) if headline.eager]
    if headlines:
        found["overview.png"] = partial(_overview, result, headlines)
    for op in of_result.ops(rows):
        of_op = [row for row in rows if row["op"] == op]
        for dtype in of_result.dtypes(of_op):
            chosen = [row for row in of_op if row["dtype"] == dtype]
            found[f"{op}_{dtype}.png"] = partial(_op, result, op, dtype, chosen)
    for dtype in of_result.dtypes(rows):
        placed = [
            row
            for row in rows
            if row["dtype"] == dtype and not row.get("graph") and row.get("flops") and row.get("bytes")
        ]
        if any(is_ours(row) for row in placed) and f"torch.{dtype}" in result.get("rates", {}):
            found[f"roofline_{dtype}.png"] = partial(_roofline, result, dtype, placed)
    if any("exponent" in entry for entry in result.get("scaling", [])):
        found["scaling.png"] = partial(time_growth, result)
    if any("memory_exponent" in entry for entry in result.get("scaling", [])):
        found["scaling_memory.png"] = partial(memory_growth, result)
    if any("milliseconds" in entry for entry in result.get("models", [])):
        found["models.png"] = partial(models, result)
    return found


def draw(result: Result, folder: Path) -> list[Path]:
    """Write every picture of a result.

    Args:
        result: what `benchmarks.run` and its sisters write to results.json.
        folder: where the PNGs go.

    Returns:
        The paths written: `overview`, one for each op and dtype, `roofline` for each dtype; `scaling`, `scaling_memory` and
        `models` where there are such figures.
    """
    for file, write in (found := pictures(result)).items():
        write(folder / file)
    return [folder / file for file in found]


def _op(result: Result, op: str, dtype: str, rows: Rows, path: Path) -> None:
    """A panel a pass and one for memory: lines where the batch alone grows, bars otherwise."""
    passes = [which for which in ("forward", "forward+backward") if any(row["pass"] == which for row in rows)]
    panels: list[tuple[str, str, float, Rows]] = [
        (
            f"{which.replace('+', ' + ')}, ms",
            "milliseconds",
            1.0,
            [row for row in rows if row["pass"] == which],
        )
        for which in passes
    ]
    weighed = [row for row in panels[-1][3] if row.get(MEMORY) and not row.get("graph")]
    if weighed:
        panels.append(("extra memory at its peak, MiB", MEMORY, 2.0**-20, weighed))
    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in rows))
    names = list(dict.fromkeys((row["variant"], bool(row.get("graph"))) for row in rows))
    names.sort(key=lambda pair: (not pair[0].startswith("jrl "), pair[0] == "products"))
    growing = of_result.batch_alone_differs(op, shapes)
    height = 4.6 if growing else 1.7 + 0.26 * max(2, len(shapes)) * (len(names) + 1)
    pyplot = style.pyplot()
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.6 * len(panels) + 0.6, height), layout="constrained", squeeze=False
    )
    for place, (axis, (title, field, factor, chosen)) in enumerate(zip(axes[0], panels, strict=True)):
        axis.set_title(title, fontsize=11)
        if growing:
            _lines(axis, op, chosen, field, factor, names)
        else:
            _bars(axis, op, chosen, field, factor, names, shapes, named=place == 0)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False)
    figure.suptitle(f"{op}, {dtype} — {of_result.name(result)}", fontsize=12)
    style.save(figure, path)


def _lines(axis: Any, op: str, rows: Rows, field: str, factor: float, names: list[tuple[str, bool]]) -> None:
    for variant, graph in names:
        points = sorted(
            (row["shape"][0], row[field] * factor)
            for row in rows
            if row["variant"] == variant and bool(row.get("graph")) == graph
        )
        look = style.of(variant)
        axis.plot(
            [x for x, _ in points],
            [y for _, y in points],
            marker=look.marker,
            color=look.colour,
            linestyle=":" if graph else look.line,
            linewidth=2.4 if variant.startswith("jrl ") else 1.5,
            label=style.series(variant, graph),
        )
    style.plain(axis, "x", sorted({row["shape"][0] for row in rows}))
    style.plain(axis, "y")
    axis.set_xlabel("batch")
    axis.grid(True, alpha=0.3)


def _bars(
    axis: Any,
    op: str,
    rows: Rows,
    field: str,
    factor: float,
    names: list[tuple[str, bool]],
    shapes: list[tuple[int, ...]],
    named: bool,
) -> None:
    """Lying bars, a group a shape, each with its figure at its end: nothing overlaps however many variants there are."""
    step = len(names) + 1
    for place, (variant, graph) in enumerate(names):
        found = {
            tuple(row["shape"]): row[field] * factor
            for row in rows
            if row["variant"] == variant and bool(row.get("graph")) == graph
        }
        heights = [index * step + place for index, shape in enumerate(shapes) if shape in found]
        values = [found[shape] for shape in shapes if shape in found]
        bars = axis.barh(
            heights,
            values,
            0.86,
            color=style.of(variant).colour,
            alpha=0.55 if graph else 1.0,
            hatch="//" if graph else None,
            label=style.series(variant, graph),
        )
        axis.bar_label(bars, [of_result.significant(value) for value in values], padding=3, fontsize=8)
    figures = [row[field] * factor for row in rows]
    axis.set_xlim(min(figures) / 3, max(figures) * 4)
    style.plain(axis, "x")
    axis.set_ylim(len(shapes) * step - 1, -1)
    ticks = [index * step + (step - 2) / 2 for index in range(len(shapes))]
    axis.set_yticks(
        ticks, [_folded(op, shape) for shape in shapes] if named else [""] * len(shapes), fontsize=9
    )
    axis.tick_params(axis="y", length=0)
    axis.grid(True, axis="x", alpha=0.3)
    axis.set_axisbelow(True)


def _folded(op: str, shape: Any) -> str:
    parts = of_result.label(op, list(shape)).split(", ")
    return "\n".join(", ".join(parts[start : start + 2]) for start in range(0, len(parts), 2))


def _roofline(result: Result, dtype: str, rows: Rows, path: Path) -> None:
    """Ours (filled) and eager PyTorch under the roofs of this run, its matrix product and its copy: a shape for each op."""
    rates = result["rates"][f"torch.{dtype}"]
    shape_of = {headline.op: headline.shape for headline in of_result.headlines(result)}
    shown = [
        row
        for row in rows
        if (is_ours(row) or row["variant"] == "eager") and row["shape"] == shape_of.get(row["op"])
    ]
    ops = of_result.ops(shown)
    passes = [
        which for which in ("forward", "forward+backward") if any(row["pass"] == which for row in shown)
    ]
    intensities = [row["flops"] / row["bytes"] for row in shown]
    ridge = rates["flops"] / rates["bytes"]
    low, high = min([*intensities, ridge]) / 2, max([*intensities, ridge]) * 2
    pyplot = style.pyplot()
    figure, axes = pyplot.subplots(
        1, len(passes), figsize=(5.2 * len(passes) + 2.4, 5), layout="constrained", sharey=True, squeeze=False
    )
    for axis, which in zip(axes[0], passes, strict=True):
        roof = [low, ridge, high]
        heights = [min(rates["flops"], x * rates["bytes"]) / 1e12 for x in roof]
        axis.plot(roof, heights, color="black", linewidth=1.5)
        for row in shown:
            if row["pass"] == which:
                axis.plot(
                    row["flops"] / row["bytes"],
                    row["flops"] / row["milliseconds"] / 1e9,
                    marker=style.MARKERS[ops.index(row["op"]) % len(style.MARKERS)],
                    color=style.of(row["variant"]).colour,
                    fillstyle="full" if is_ours(row) else "none",
                    markersize=8,
                    linestyle="",
                )
        axis.set_xlim(low, high)
        style.plain(axis, "x")
        style.plain(axis, "y")
        axis.set_title(which.replace("+", " + "), fontsize=11)
        axis.set_xlabel("operations a byte that must move")
        axis.grid(True, alpha=0.3)
    axes[0][0].set_ylabel("TFLOP/s")
    empty: dict[str, Any] = {"xdata": [], "ydata": []}
    line = pyplot.Line2D
    handles = [
        line(
            **empty,
            color="black",
            label=f"matrix product {rates['flops'] / 1e12:.3g} TFLOP/s,\ncopy"
            f" {rates['bytes'] / 1e9:,.0f} GB/s (measured)",
        ),
        *(
            line(**empty, color=style.of(name).colour, linewidth=6, label=name)
            for name in dict.fromkeys(row["variant"] for row in shown)
        ),
        *(
            line(
                **empty,
                color="grey",
                linestyle="",
                marker=style.MARKERS[place % len(style.MARKERS)],
                label=op,
            )
            for place, op in enumerate(ops)
        ),
    ]
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle(f"Roofline, {dtype} — {of_result.name(result)}", fontsize=12)
    style.save(figure, path)


def _overview(result: Result, headlines: list[Headline], path: Path) -> None:
    """How many times eager PyTorch's time and extra memory ours and the best of the others save, op by op."""
    pyplot = style.pyplot()
    figure, axes = pyplot.subplots(
        1, 2, figsize=(11, 1.6 + 0.55 * len(headlines)), layout="constrained", sharey=True
    )
    seen: dict[str, Any] = {}
    for axis, (title, field) in zip(
        axes,
        (("time: eager's over its own", "milliseconds"), ("extra memory: eager's over its own", MEMORY)),
        strict=True,
    ):
        ratios = []
        for place, headline in enumerate(headlines):
            pair = [row for row in (headline.ours, headline.other) if row is not None]
            for row, offset in zip(pair, (-0.19, 0.19), strict=False):
                ratio = _saved(headline.eager, row, field)
                if ratio is None:
                    continue
                ratios.append(ratio)
                bar = axis.barh(
                    place + offset, ratio - 1, 0.36, left=1, color=style.of(row["variant"]).colour
                )
                # On the outer side of the bar, whichever way it goes.
                axis.annotate(
                    of_result.times(ratio),
                    (ratio, place + offset),
                    xytext=(4 if ratio >= 1 else -4, 0),
                    textcoords="offset points",
                    ha="left" if ratio >= 1 else "right",
                    va="center",
                    fontsize=8,
                )
                seen.setdefault(row["variant"], bar)
        axis.set_xlim(min([*ratios, 1.0]) / 2.5, max([*ratios, 1.0]) * 2.5)
        style.plain(axis, "x")
        axis.axvline(1, color=style.of("eager").colour, linewidth=2)
        axis.set_title(title, fontsize=11)
        axis.grid(True, axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    names = [f"{headline.op}\n{of_result.label(headline.op, headline.shape)}" for headline in headlines]
    axes[0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    figure.legend(
        seen.values(), seen.keys(), loc="outside lower center", ncols=min(6, len(seen)), frameon=False
    )
    figure.suptitle(
        f"{of_result.name(result)}: how many times better than eager PyTorch (the line)", fontsize=12
    )
    style.save(figure, path)


def _saved(eager: Row | None, row: Row, field: str) -> float | None:
    if eager is None or not eager.get(field) or not row.get(field):
        return None
    return float(eager[field]) / float(row[field])
