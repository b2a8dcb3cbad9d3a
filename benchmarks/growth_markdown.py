"""The generated blocks on what grows, whole training steps, and what nobody has measured."""

from __future__ import annotations

from pathlib import Path

from . import bars
from . import rows as of_result
from .markdown import NOTHING, Results, bar_line, picture, prose, table
from .rows import Result, is_ours, memory, milliseconds, times


def scaling(results: Results, page: Path) -> str:
    """Fitted exponents beside the expected ones."""
    parts = []
    for folder, result in results.items():
        entries = [entry for entry in result.get("scaling", []) if "exponent" in entry]
        if not entries:
            continue
        commits = ", ".join(dict.fromkeys(f"`{of_result.short(entry.get('commit'))}`" for entry in entries))
        parts.append(f"### Growth on {of_result.name(result)}")
        parts.append(f"Commit {commits}, {', '.join(dict.fromkeys(entry['dtype'] for entry in entries))}.")
        header = (
            "op",
            "axis",
            "around",
            "pass",
            "variant",
            "sizes",
            "time: fitted",
            "expected",
            "memory: fitted",
            "at most",
        )
        lines = []
        for entry in entries:
            name = entry["variant"].replace("_", "\\_")
            lines.append(
                [
                    f"`{entry['op']}`",
                    entry["axis"],
                    of_result.label(entry["op"], entry["shape"]),
                    entry["pass"],
                    f"**{name}**" if is_ours(entry) else name,
                    ", ".join(f"{value:,}" for value in entry["values"]),
                    f"{entry['exponent']:.2f}",
                    f"{entry['expected']:.2f}",
                    f"{entry['memory_exponent']:.2f}" if "memory_exponent" in entry else NOTHING,
                    f"{entry['memory_expected']:g}" if "memory_expected" in entry else NOTHING,
                ]
            )
        parts.append(table(header, lines, left=6))
        refused = [entry for entry in result["scaling"] if "refused" in entry]
        if refused:
            parts.append(
                "\n".join(
                    f"- `{entry['op']}`, {entry['axis']}, {entry['variant']}: {prose(entry['refused'])}"
                    for entry in refused
                )
            )
        parts += picture(folder, page, result, "scaling.png", f"Time against each axis on {result['device']}")
        parts += picture(
            folder, page, result, "scaling_memory.png", f"Memory against the batch on {result['device']}"
        )
    return "\n\n".join(parts) or "Growth has not been measured yet."


def models(results: Results, page: Path) -> str:
    """One training step of whole models, and the largest batch that fits."""
    parts = []
    for folder, result in results.items():
        entries = result.get("models", [])
        if not entries:
            continue
        parts.append(f"### Training steps on {of_result.name(result)}")
        steps = [entry for entry in entries if "milliseconds" in entry]
        if steps:
            header = (
                "model",
                "batch",
                "dtype",
                "variant",
                "time",
                "spread",
                "eager over fused",
                "peak memory",
            )
            parts.append(table(header, [_step(entry, steps) for entry in steps], left=1))
        largest = [entry for entry in entries if "largest_batch" in entry]
        if largest:
            lines = [
                [
                    entry["model"],
                    entry["variant"],
                    f"{entry['largest_batch']:,}" if entry["largest_batch"] is not None else NOTHING,
                    memory(entry.get("limit_bytes")),
                ]
                for entry in largest
            ]
            parts.append(
                table(("model", "variant", "largest batch that fits", "memory limit"), lines, left=2)
            )
        refused = [
            f"- {entry['model']}, {entry['variant']}"
            + (f", batch {entry['batch']:,}" if entry.get("batch") else "")
            + f": {prose(entry['refused'])}"
            for entry in entries
            if "refused" in entry
        ]
        if refused:
            parts.append("\n".join(refused))
        parts += picture(folder, page, result, "models.png", f"One training step on {result['device']}")
    return "\n\n".join(parts) or "Whole models have not been measured yet."


def _step(entry: of_result.Row, steps: of_result.Rows) -> list[str]:
    same = ("model", "batch", "dtype")
    fused = [s for s in steps if s["variant"] == "fused" and all(s.get(k) == entry.get(k) for k in same)]
    ratio = (
        times(entry["milliseconds"] / fused[0]["milliseconds"]) if fused and entry not in fused else NOTHING
    )
    return [
        entry["model"],
        f"{entry['batch']:,}",
        entry["dtype"],
        entry["variant"],
        milliseconds(entry["milliseconds"]),
        f"{of_result.significant(entry['low'])}–{of_result.significant(entry['high'])}",
        ratio,
        memory(entry.get("peak_bytes")),
    ]


def not_measured(results: Results) -> str:
    """What the results do not hold."""
    lines = []
    if not any(of_result.kind(result) == "cuda" for result in results.values()):
        lines.append(
            "- **No GPU figure exists yet**: `benchmarks/results/` has no folder of a run on one, so no speed there is claimed. "
            "Tiles of the GPU kernels are those that compile without spilling registers, not the fastest of several that were "
            "timed. What a run must reach is below."
        )
    everything: list[tuple[str, Result]] = [(of_result.name(result), result) for result in results.values()]
    measured = {row["op"] for _, result in everything for row in of_result.timed(result) if is_ours(row)}
    missing = [f"`{op}`" for op in of_result.AXES if op not in measured]
    if missing:
        lines.append(f"- Ops without a figure on any device: {', '.join(missing)}.")
    for name, result in everything:
        here = {row["op"] for row in of_result.timed(result) if is_ours(row)}
        elsewhere = [f"`{op}`" for op in of_result.AXES if op in measured and op not in here]
        if elsewhere:
            lines.append(f"- Not on {name}: {', '.join(elsewhere)}.")
        absent = [
            f"{what} (`python -m benchmarks.{module}`)"
            for key, what, module in (
                ("scaling", "growth against each axis", "scaling"),
                ("models", "training steps of whole models", "models"),
            )
            if not result.get(key)
        ]
        if absent:
            lines.append(f"- Not on {name}: {' and '.join(absent)}.")
        beaten = list(
            dict.fromkeys(
                f"`{r['op']}`" for r in of_result.timed(result) if not of_result.is_floor(r["share_of_floor"])
            )
        )
        if beaten:
            lines.append(
                f"- A share of the floor on {name} for {', '.join(beaten)}: what was measured beats it, so it counts work "
                "that is not done and is no floor."
            )
    parts = ["\n".join(lines)] if lines else []
    if not any(of_result.kind(result) == "cuda" for result in results.values()):
        wanted = [bar_line(bar, [])[:4] for bar in bars.GPU_BARS]
        parts.append(table(("op and shape", "pass", "measure", "bar"), wanted, left=3))
    return "\n\n".join(parts) or "Nothing that the suite knows of."
