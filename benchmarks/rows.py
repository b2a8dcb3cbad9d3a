"""What results.json says: which rows are ours, which shape stands for an op, how a shape and a figure are written."""

from __future__ import annotations

from typing import Any, NamedTuple

from . import bars

Row = dict[str, Any]
Rows = list[Row]
Result = dict[str, Any]


class Axes(NamedTuple):
    """Letters of an op's shape in order; the first `batch` of them grow with the batch."""

    letters: str
    batch: int


AXES = {
    "info_nce": Axes("MND", 2),
    "sigmoid_contrastive": Axes("MND", 2),
    "ranking_loss": Axes("MNDQ", 2),
    "mutual_information": Axes("NLMD", 1),
    "partition_nce": Axes("BNDKQ", 1),
    "retrieval_ranks": Axes("MND", 2),
    "similarity_topk": Axes("MND", 2),
    "agreement_topk": Axes("MND", 2),
    "word_region_scores": Axes("BCTRDE", 2),
    "word_region_damsm": Axes("BCTRDE", 2),
    "word_region_scan": Axes("BCTRDE", 2),
    "max_sim": Axes("BCRTD", 2),
    "word_context": Axes("BRTD", 1),
    "gumbel_assign": Axes("BGSDE", 1),
    "gumbel_embed": Axes("MVDk", 1),
}


def label(op: str, shape: list[int]) -> str:
    """`M=N=8192, D=512`: equal leading sizes of a square problem share one, and what is absent (0) is left out."""
    axes = AXES.get(op)
    if axes is None or len(axes.letters) != len(shape):
        return "x".join(map(str, shape))
    parts = [f"{letter}={size}" for letter, size in zip(axes.letters, shape, strict=True) if size]
    if axes.batch == 2 and shape[0] == shape[1]:
        parts[:2] = [f"{axes.letters[0]}={axes.letters[1]}={shape[0]}"]
    return ", ".join(parts)


def batch_alone_differs(op: str, shapes: list[tuple[int, ...]]) -> bool:
    batch = AXES[op].batch if op in AXES else 1
    return len({shape[0] for shape in shapes}) > 1 and len({shape[batch:] for shape in shapes}) == 1


def is_ours(row: Row) -> bool:
    return str(row["variant"]).startswith("jrl ")


def timed(result: Result) -> Rows:
    return [row for row in result.get("rows", []) if "milliseconds" in row]


def refused(result: Result) -> Rows:
    return [row for row in result.get("rows", []) if "refused" in row]


def ops(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["op"] for row in rows))


def kind(result: Result) -> str:
    """ "cpu" or "cuda": threads are counted on a CPU alone."""
    return "cpu" if result.get("threads") else "cuda"


def name(result: Result) -> str:
    threads = result.get("threads")
    return f"{result['device']}, {threads} threads" if threads else str(result["device"])


def short(commit: str | None) -> str:
    """A commit as people write it; sources that differ from it stay visible."""
    if not commit:
        return "unknown"
    number, *dirty = commit.split("-", 1)
    return "-".join([number[:7], *dirty])


def dtypes(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["dtype"] for row in rows))


class Headline(NamedTuple):
    """One shape of an op: the whole of what it does (forward and backward where it has one), outside any CUDA graph."""

    op: str
    dtype: str
    shape: list[int]
    when: str
    ours: Row
    eager: Row | None
    other: Row | None  # the fastest of the rest


def headlines(result: Result) -> list[Headline]:
    """One for each op: the shape of a bar where one is measured, else the shape that takes ours longest.

    In bfloat16 where it is measured in it, since that is what is trained in on a GPU.
    """
    rows = [row for row in timed(result) if not row.get("graph")]
    found = []
    for op in ops(rows):
        of_op = [row for row in rows if row["op"] == op]
        dtype = "bfloat16" if "bfloat16" in dtypes(of_op) else of_op[0]["dtype"]
        when = "forward+backward" if any(row["pass"] == "forward+backward" for row in of_op) else "forward"
        of_op = [row for row in of_op if row["dtype"] == dtype and row["pass"] == when]
        ours = [row for row in of_op if is_ours(row)]
        if not ours:
            continue
        barred = [bar.shape for bar in bars.of(kind(result), result["device"]) if bar.op == op]
        shape = max(ours, key=lambda row: (row["shape"] in barred, row["milliseconds"]))["shape"]
        here = [row for row in of_op if row["shape"] == shape]
        rest = [row for row in here if not is_ours(row) and row["variant"] not in ("eager", "products")]
        found.append(
            Headline(
                op,
                dtype,
                shape,
                when,
                min((row for row in here if is_ours(row)), key=_milliseconds),
                next((row for row in here if row["variant"] == "eager"), None),
                min(rest, key=_milliseconds, default=None),
            )
        )
    return found


def _milliseconds(row: Row) -> float:
    return float(row["milliseconds"])


def milliseconds(value: float) -> str:
    return f"{significant(value)} ms"


def significant(value: float) -> str:
    """Three significant digits, thousands separated, never an exponent above a millionth."""
    if value >= 100:
        return f"{value:,.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def memory(value: float | None) -> str:
    if value is None:
        return "–"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 999.5 * size else f"{value / size:,.0f} {unit}"
    return f"{value:.0f} B"


def times(value: float) -> str:
    return f"{value:,.0f}×" if value >= 10 else f"{value:.2f}×"


def is_floor(share: float) -> bool:
    """Whether a share can be one: what is far below its floor shows that the floor counts work which is not done."""
    return share <= 1.15


def share(value: float) -> str:
    return f"{value:.0%}" if is_floor(value) else "–"
