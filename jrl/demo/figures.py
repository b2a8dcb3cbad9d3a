"""The plots of the report: training curves, time and memory of the loss."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jrl.demo.files import write_bytes

_BLUE, _ORANGE, _GREEN, _GREY = "#2563eb", "#ea580c", "#16a34a", "#9ca3af"
Curve = list[tuple[int, float]]


def read_curves(folder: Path) -> dict[str, Curve]:
    """Logged values by name, as (step, value) in order; of a step logged twice the later value counts.

    A resumed training repeats the steps between its last checkpoint and the interruption.

    Raises:
        ValueError: the folder has no events.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = sorted(folder.glob("events.out.tfevents.*"))
    if not files:
        raise ValueError(f"{folder}: has no TensorBoard events")
    found: dict[str, list[tuple[float, int, float]]] = {}
    for file in files:
        # each file on its own: over a folder, the reader drops the steps that were repeated and some others
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        for name in events.Tags()["scalars"]:
            values = found.setdefault(name, [])
            values.extend((event.wall_time, event.step, event.value) for event in events.Scalars(name))
    return {
        name: sorted({step: value for _, step, value in sorted(values)}.items())
        for name, values in found.items()
    }


def save_curves(curves: Mapping[str, Curve], path: Path, *, batch_size: int) -> None:
    """Loss, accuracy, bound and learning rate against the step.

    Args:
        curves: what `read_curves` returned.
        path: of the PNG.
        batch_size: whose logarithm is the ceiling of the bound.
    """
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    (loss, accuracy), (bound, rate) = figure.subplots(2, 2)

    _panel(loss, "Loss (nats)")
    _line(loss, curves.get("train/contrastive", []), _BLUE, "batch", smooth=True)

    _panel(accuracy, "R@1")
    _line(accuracy, _mean(curves, "train/accuracy"), _BLUE, f"within a batch of {batch_size}", smooth=True)
    parts = [name.split("/")[1] for name in curves if name.startswith("val/") and name.endswith("/i2t_r1")]
    for part, colour in zip(parts, (_ORANGE, _GREEN), strict=False):
        ends = [curves.get(f"val/{part}/{direction}_r1", []) for direction in ("i2t", "t2i")]
        label = part.replace("_", ", ").replace("val", "validation")
        _line(accuracy, _averaged(ends), colour, label, marker="o")
    accuracy.set_ylim(0, 1)
    accuracy.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")

    _panel(bound, "InfoNCE bound (nats)")
    _line(bound, _mean(curves, "train/bound"), _BLUE, "batch", smooth=True)
    ceiling = math.log(batch_size)
    bound.axhline(ceiling, color=_GREY, linestyle="--", linewidth=1.2, label=f"ceiling log {batch_size}")

    _panel(rate, "Learning rate")
    _line(rate, curves.get("train/lr", []), _BLUE, "learning rate")
    scale = rate.twinx()
    _line(scale, curves.get("train/scale", []), _ORANGE, "1 / temperature")
    scale.spines[["top"]].set_visible(False)
    scale.tick_params(colors=_ORANGE, labelsize=9)
    scale.set_ylim(bottom=0)

    for axes in (loss, accuracy, bound):
        _legend([axes])
    _legend([rate, scale])
    for axes in (bound, rate):
        axes.set_xlabel("step")
    _save(figure, path)


def save_loss_cost(cost: Mapping[str, Any], path: Path) -> None:
    """Time and extra memory of both losses against the batch size.

    Args:
        cost: what `loss_cost.measure` returned.
        path: of the PNG.
    """
    rows = cost["rows"]
    told = bool(rows) and all(
        row[name]["extra_bytes"] is not None for row in rows for name in ("fused", "eager")
    )
    figure = Figure(figsize=(11 if told else 6, 4.4), layout="constrained")
    panels = figure.subplots(1, 2 if told else 1, squeeze=False)[0]
    kinds = [("seconds", 1e3, "ms", "Time, forward + backward (ms)")]
    if told:
        kinds.append(("extra_bytes", 2**-20, "MiB", "Peak extra memory (MiB)"))
    sizes = [row["batch"] for row in rows]
    for axes, (key, factor, unit, title) in zip(panels, kinds, strict=True):
        _panel(axes, title)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for name, colour, label in (
            ("eager", _ORANGE, "eager: logits and two cross-entropies"),
            ("fused", _BLUE, f"jrl_kernels.info_nce ({cost['backend']})"),
        ):
            values = [factor * row[name][key] for row in rows]
            axes.plot(sizes, values, color=colour, marker="o", markersize=5, linewidth=2, label=label)
            if values:
                other = rows[-1]["fused" if name == "eager" else "eager"][key] * factor
                # ends that nearly meet would write over each other
                shift = 6 if 1 / 1.6 < values[-1] / other < 1.6 else 0
                axes.annotate(
                    f"{_number(values[-1])} {unit}",
                    (sizes[-1], values[-1]),
                    xytext=(9, shift if values[-1] >= other else -shift),
                    textcoords="offset points",
                    va="center",
                    color=colour,
                    fontsize=10,
                    fontweight="bold",
                )
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        axes.margins(y=0.12)
        if sizes:
            # room for the labels at the right ends
            axes.set_xlim(sizes[0] / 1.3, sizes[-1] * (sizes[-1] / sizes[0]) ** 0.2 * 1.2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("pairs in the batch")
        _legend([axes])
    _save(figure, path)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _panel(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)


def _line(
    axes: Axes, curve: Curve, colour: str, label: str, *, smooth: bool = False, marker: str = ""
) -> None:
    if not curve:
        return
    steps, values = zip(*curve, strict=True)
    if smooth and len(curve) >= 10:
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
        values = _smoothed(values)
    if len(curve) < 2:
        marker = "o"
    axes.plot(steps, values, color=colour, linewidth=2, marker=marker, markersize=5, label=label)


def _smoothed(values: Sequence[float], reach: int = 2) -> tuple[float, ...]:
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return tuple(sum(window) / len(window) for window in windows)


def _mean(curves: Mapping[str, Curve], name: str) -> Curve:
    return _averaged([curves.get(f"{name}_{side}", []) for side in ("x_to_y", "y_to_x")])


def _averaged(two: Iterable[Curve]) -> Curve:
    first, second = (dict(curve) for curve in two)
    return [(step, (first[step] + second[step]) / 2) for step in sorted(first.keys() & second.keys())]


def _legend(panels: Sequence[Axes]) -> None:
    handles, labels = [], []
    for axes in panels:
        more = axes.get_legend_handles_labels()
        handles += more[0]
        labels += more[1]
    if handles:
        panels[-1].legend(handles, labels, fontsize=9, frameon=False, loc="best")


def _save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_bytes(path, buffer.getvalue())
