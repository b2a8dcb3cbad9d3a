"""The bars that a CPU run must meet, as ratios within one run."""

from __future__ import annotations

from typing import Any, NamedTuple

Rows = list[dict[str, Any]]


class Bar(NamedTuple):
    """`measure` of ours, over that of the variant `against` where there is one, is at most `limit`."""

    op: str
    shape: list[int]
    when: str  # "forward" or "forward+backward"
    measure: str  # "milliseconds" or "extra_bytes"
    against: str | None
    limit: float

    def ratio(self, rows: Rows) -> float | None:
        """What was measured; None where the run does not hold it."""
        found = {
            row["variant"]: row
            for row in rows
            if row["op"] == self.op and row["shape"] == self.shape and row.get("pass") == self.when
        }
        if "jrl cpu" not in found or (self.against is not None and self.against not in found):
            return None
        ours = float(found["jrl cpu"][self.measure])
        return ours if self.against is None else ours / float(found[self.against][self.measure])

    def __str__(self) -> str:
        unit = {"milliseconds": "time", "extra_bytes": "extra memory"}[self.measure]
        than = "" if self.against is None else f" against {self.against}"
        return f"{self.op} {'x'.join(map(str, self.shape))} {self.when}: {unit}{than}"


BARS = (
    Bar("info_nce", [8192, 8192, 512], "forward+backward", "milliseconds", "eager", 0.45),
    Bar("info_nce", [8192, 8192, 512], "forward+backward", "milliseconds", "products", 1.1),
    Bar("info_nce", [8192, 8192, 512], "forward+backward", "extra_bytes", "eager", 1 / 16),
    Bar("word_region_scores", [64, 64, 20, 64, 256, 0], "forward+backward", "milliseconds", "eager", 0.4),
    Bar("word_region_scores", [64, 64, 20, 64, 256, 0], "forward+backward", "extra_bytes", "eager", 1 / 10),
    Bar("retrieval_ranks", [25000, 5000, 512], "forward", "milliseconds", "products", 1.5),
    Bar("retrieval_ranks", [25000, 5000, 512], "forward", "extra_bytes", None, 64 << 20),
)


def missed(rows: Rows) -> list[str]:
    """Print every bar with what was measured; return those that are missed or were not measured."""
    problems = []
    for bar in BARS:
        ratio = bar.ratio(rows)
        if ratio is None:
            problems.append(f"{bar}: not measured")
            continue
        print(f"{bar} {ratio:.4g} (bar {bar.limit:.4g})")
        if ratio > bar.limit:
            problems.append(f"{bar} {ratio:.4g} is above {bar.limit:.4g}")
    return problems
