"""The generated blocks of README.md and docs/performance.md: tables and pictures of results, and nothing but results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from . import bars
from . import rows as of_result
from .plots import pictures
from .rows import Headline, Result, Row, Rows, is_ours, memory, milliseconds, times

Results = dict[Path, Result]  # by the folder that holds results.json
NOTHING = "–"


def table(header: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table whose first `left` columns are words and whose others are figures."""
    rule = ["---" if place < left else "---:" for place in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def about(result: Result) -> str:
    """Device, versions and commit."""
    parts = [of_result.name(result), f"torch {result['torch']}"]
    if of_result.kind(result) == "cuda" and result.get("triton"):
        parts.append(f"triton {result['triton']}")
    parts.append(f"commit `{of_result.short(result.get('commit'))}`")
    return ", ".join(parts)


def prose(text: str) -> str:
    """What somebody's exception said, as one line of code in a page."""
    return "`" + " ".join(text.replace("`", "'").replace("|", "/").replace("](", "] (").split()) + "`"


def picture(folder: Path, page: Path, result: Result, file: str, alternative: str) -> list[str]:
    """A link to a picture, where there is one."""
    if file not in pictures(result):
        return []
    return [f"![{alternative}]({_relative(folder, page)}/{file})"]


def _relative(folder: Path, page: Path) -> str:
    return "/".join([".."] * (len(page.parts) - 1) + [*folder.parts])


def readme(results: Results, page: Path) -> str:
    """One shape of each op, ours beside eager PyTorch and the best of the others."""
    parts = []
    for folder, result in results.items():
        headlines = of_result.headlines(result)
        if not headlines:
            continue
        parts.append(f"**{about(result)}**; {_common(headlines)}.")
        header = (
            "op",
            "shape",
            "jrl",
            "eager PyTorch",
            "best other",
            "extra memory: jrl",
            "extra memory: eager",
            "of the floor",
        )
        parts.append(table(header, [_headline(headline) for headline in headlines], left=2))
        parts += picture(folder, page, result, "overview.png", f"Time and memory saved on {result['device']}")
    return "\n\n".join(parts) or "Nothing has been measured yet."


def _common(headlines: list[Headline]) -> str:
    kinds = " or ".join(dict.fromkeys(headline.dtype for headline in headlines))
    searches = [f"`{headline.op}`" for headline in headlines if headline.when == "forward"]
    passes = "forward and backward"
    if searches:
        passes += f" ({', '.join(searches)}: forward, there is no backward)"
    return f"{kinds}, {passes}"


def _headline(headline: Headline) -> list[str]:
    ours, eager, other = headline.ours, headline.eager, headline.other

    def against(row: Row | None, named: bool = False) -> str:
        if row is None:
            return NOTHING
        ratio = times(row["milliseconds"] / ours["milliseconds"])
        return f"{_plain(row['variant']) + ' ' if named else ''}{milliseconds(row['milliseconds'])} ({ratio})"

    return [
        f"`{headline.op}`",
        of_result.label(headline.op, headline.shape),
        f"**{milliseconds(ours['milliseconds'])}**",
        against(eager),
        against(other, named=True),
        memory(ours.get("extra_bytes")),
        memory(eager.get("extra_bytes") if eager else None),
        of_result.share(ours["share_of_floor"]),
    ]


def _plain(variant: str) -> str:
    return variant.replace("_", "\\_")


def op_tables(results: Results, page: Path) -> str:
    """Every row of every device: op by op, its picture, its figures, and who was refused and why."""
    parts = []
    for folder, result in results.items():
        if not result.get("rows"):
            continue
        parts += [f"### {of_result.name(result)}", _device(result)]
        alternative = f"on {of_result.name(result)}"
        parts += picture(folder, page, result, "overview.png", f"Time and memory saved {alternative}")
        for dtype in of_result.dtypes(result["rows"]):
            parts += picture(
                folder, page, result, f"roofline_{dtype}.png", f"Roofline in {dtype} {alternative}"
            )
        for op in of_result.ops(result["rows"]):
            rows = [row for row in result["rows"] if row["op"] == op]
            parts.append(f"#### `{op}` on {result['device']}")
            figures = [row for row in rows if "milliseconds" in row]
            for dtype in of_result.dtypes(figures):
                parts += picture(folder, page, result, f"{op}_{dtype}.png", f"{op} in {dtype} {alternative}")
            if figures:
                parts.append(_figures(op, figures))
            parts += _notes(op, rows)
    return "\n\n".join(parts) or "Nothing has been measured yet."


def _device(result: Result) -> str:
    lines = [f"{about(result)}, Python {result['python']}."]
    for dtype, rate in result.get("rates", {}).items():
        name = dtype.removeprefix("torch.")
        lines.append(
            f"Measured rates that set the floors, {name}: matrix product {rate['flops'] / 1e12:.3g} TFLOP/s, "
            f"copy {rate['bytes'] / 1e9:.3g} GB/s."
        )
    if result.get("libraries"):
        versions = ", ".join(f"{name} {version}" for name, version in sorted(result["libraries"].items()))
        lines.append(f"Peers: {versions}.")
    return "\n".join(lines)


def _figures(op: str, rows: Rows) -> str:
    several = len(of_result.dtypes(rows)) > 1
    header = [
        "shape",
        "pass",
        "variant",
        "ms",
        "spread",
        "of ours",
        "TFLOP/s",
        "of the floor",
        "extra memory",
        "error",
    ]
    lines = []
    before: tuple[str, ...] = ()
    for row in sorted(rows, key=lambda row: _case(rows, row)):
        shape = of_result.label(op, row["shape"]) + (f", {row['dtype']}" if several else "")
        case = (shape, row["pass"])
        ours = _ours(rows, row)
        lines.append(
            [
                *(case if case != before else ("", "")),
                _variant(row),
                of_result.significant(row["milliseconds"]),
                f"{of_result.significant(row['low'])}–{of_result.significant(row['high'])}",
                times(row["milliseconds"] / ours["milliseconds"]) if ours else NOTHING,
                f"{row['tflops']:.3g}" if row.get("tflops") else NOTHING,
                of_result.share(row["share_of_floor"]),
                memory(row.get("extra_bytes")),
                NOTHING if row.get("error") is None else f"{row['error']:.0e}" if row["error"] else "0",
            ]
        )
        before = case
    return table(header, lines, left=3)


def _case(rows: Rows, row: Row) -> tuple[Any, ...]:
    """Order of a table: as measured, but the variants of one case together."""
    shapes = list(dict.fromkeys((other["dtype"], tuple(other["shape"])) for other in rows))
    return shapes.index((row["dtype"], tuple(row["shape"]))), row["pass"], bool(row.get("graph"))


def _variant(row: Row) -> str:
    name = _plain(row["variant"]) + (", CUDA graph" if row.get("graph") else "")
    return f"**{name}**" if is_ours(row) else name


def _ours(rows: Rows, row: Row) -> Row | None:
    same = ("op", "shape", "dtype", "pass")
    found = [
        other
        for other in rows
        if is_ours(other)
        and all(other[key] == row[key] for key in same)
        and bool(other.get("graph")) == bool(row.get("graph"))
    ]
    return min(found, key=lambda other: float(other["milliseconds"]), default=None)


def _notes(op: str, rows: Rows) -> list[str]:
    """What differs in a peer, and who was refused: one line for each variant and reason."""
    differs = {row["variant"]: row["why"] for row in rows if row.get("why")}
    reasons: dict[tuple[str, str], list[str]] = {}
    shapes = {(tuple(row["shape"]), row["dtype"]) for row in rows}
    for row in rows:
        if "refused" in row:
            where = f"{of_result.label(op, row['shape'])}, {row['dtype']}"
            where += f", {row['pass']}" if row.get("pass") else ""
            where += ", CUDA graph" if row.get("graph") else ""
            reasons.setdefault((row["variant"], row["refused"]), []).append(where)
    lines = [f"- {_plain(variant)}: {why}" for variant, why in differs.items()]
    for (variant, reason), places in reasons.items():
        everywhere = len(places) >= len(shapes) and not any(
            row["variant"] == variant and "milliseconds" in row for row in rows
        )
        cases = "" if everywhere else f" ({'; '.join(places)})"
        lines.append(f"- {_plain(variant)} was not timed{cases}: {prose(reason)}")
    return ["\n".join(lines)] if lines else []


def bar_tables(results: Results) -> str:
    """Every bar of a device with what was measured."""
    parts = []
    for result in results.values():
        rows = result.get("rows", [])
        if not rows:
            continue
        lines = [bar_line(bar, rows) for bar in bars.of(of_result.kind(result), result["device"])]
        header = ("op and shape", "pass", "measure", "bar", "measured", "result")
        parts += [f"### Bars on {of_result.name(result)}", table(header, lines, left=3)]
    return "\n\n".join(parts) or "No bar has been measured yet."


def bar_line(bar: bars.Bar, rows: Rows) -> list[str]:
    """One bar: what must hold, what was found, and whether it is met."""
    ratio = bar.ratio(rows)
    if ratio is None:
        why = bar.why_not_measured(rows)
        outcome = "not measured" + (f": {prose(why)}" if why else "")
    else:
        outcome = "met" if ratio <= bar.limit else "**missed**"
    what = {"milliseconds": "time", "extra_bytes": "extra memory"}[bar.measure]
    if bar.against is not None:
        what += f" ÷ {'the floor' if bar.against == 'floor' else _plain(bar.against)}"
    what += ", CUDA graph" if bar.graph else ""
    figure = _absolute(bar) if bar.against is None else (lambda value: f"{value:.3g}")
    return [
        f"`{bar.op}` {of_result.label(bar.op, bar.shape)}",
        bar.when,
        what,
        f"≤ {figure(bar.limit)}",
        NOTHING if ratio is None else figure(ratio),
        outcome,
    ]


def _absolute(bar: bars.Bar) -> Any:
    return memory if bar.measure == "extra_bytes" else milliseconds
