"""The bars that a run must meet, as ratios within one run wherever that can be."""

from __future__ import annotations

from typing import Any, NamedTuple

Rows = list[dict[str, Any]]


class Bar(NamedTuple):
    """`measure` of ours, over that of the variant `against` where there is one, is at most `limit`.

    Ours is the fastest of our backends. Against "floor", the time is a multiple of the floor measured in the same run.
    """

    op: str
    shape: list[int]
    when: str  # "forward" or "forward+backward"
    measure: str  # "milliseconds" or "extra_bytes"
    against: str | None
    limit: float
    dtype: str | None = None  # None: any
    graph: bool = False  # timed under a CUDA graph
    device: str = ""  # what a device's name must hold for the bar to apply

    def rows(self, rows: Rows) -> Rows:
        """Those of the run that are of this case, refused ones included: they may lack a pass."""
        return [
            row
            for row in rows
            if row["op"] == self.op
            and row["shape"] == self.shape
            and row.get("pass", self.when) == self.when
            and self.dtype in (None, row.get("dtype"))
            and (bool(row.get("graph")) == self.graph or ("refused" in row and "graph" not in row))
        ]

    def ratio(self, rows: Rows) -> float | None:
        """What was measured; None where the run does not hold it."""
        found = [row for row in self.rows(rows) if "milliseconds" in row]
        ours = min(
            (row for row in found if row["variant"].startswith("jrl ")),
            key=lambda row: row["milliseconds"],
            default=None,
        )
        if ours is None or ours.get(self.measure) is None:
            return None
        if self.against is None:
            return float(ours[self.measure])
        if self.against == "floor":
            share = ours.get("share_of_floor")
            return 1 / float(share) if share else None
        peer = next((row for row in found if row["variant"] == self.against), None)
        if peer is None or not peer.get(self.measure):
            return None
        return float(ours[self.measure]) / float(peer[self.measure])

    def why_not_measured(self, rows: Rows) -> str:
        """The reason that the run gives where it gives one."""
        for row in self.rows(rows):
            if "refused" in row and (row["variant"] == self.against or row["variant"].startswith("jrl ")):
                return f"{row['variant']}: {row['refused']}"
        return ""

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
"""Those of a CPU."""


def _gpu_bars() -> tuple[Bar, ...]:
    both, time, extra, kind = "forward+backward", "milliseconds", "extra_bytes", "bfloat16"
    large, small = [65536, 65536, 768], [8192, 8192, 512]
    found = [
        Bar("info_nce", large, both, time, None, 45.0, kind, device="H200"),
        Bar("info_nce", large, both, time, "floor", 1 / 0.74, kind),
        Bar("info_nce", large, both, time, "inf_cl", 1 / 3, kind),
        Bar("info_nce", large, both, time, "eager", 1 / 1.5, kind),
        Bar("info_nce", large, both, time, "compile", 1 / 1.5, kind),
        Bar("info_nce", large, both, extra, None, 1e9, kind),
        Bar("info_nce", small, both, time, "eager", 1.0, kind),
        Bar("info_nce", small, both, time, "compile", 1.0, kind),
    ]
    for images, words, regions, width in ((128, 32, 36, 1024), (256, 32, 256, 256)):
        shape = [images, images, words, regions, width, 0]
        inputs = 2 * width * images * (words + regions)
        found += [
            Bar("word_region_scores", shape, both, time, "floor", 2.0, kind),
            Bar("word_region_scores", shape, both, time, "loop", 1 / 10, kind),
            Bar("word_region_scores", shape, both, extra, None, 4 * images * images + inputs, kind),
        ]
    for shape in ([1024, 1024, 128, 128, 128], [1024, 1024, 300, 32, 128]):
        for peer in ("flash_maxsim", "late_interaction_kernels"):
            found.append(Bar("max_sim", shape, "forward", time, peer, 1 / 1.2, kind))
            found.append(Bar("max_sim", shape, both, time, peer, 1 / 1.5, kind))
    stage = [256, 64, 196, 384, 384]
    ranks = [100000, 100000, 512]
    return (
        *found,
        Bar("gumbel_assign", stage, both, time, "floor", 3.0, kind, graph=True),
        Bar("gumbel_assign", stage, both, time, "transformers", 1 / 5, kind),
        Bar("retrieval_ranks", ranks, "forward", time, "products", 1.5, kind),
        Bar("retrieval_ranks", ranks, "forward", extra, None, 64 << 20, kind),
    )


GPU_BARS = _gpu_bars()


def of(device: str, name: str = "") -> tuple[Bar, ...]:
    """The bars of a kind of device ("cpu" or "cuda"); `name` is that of the device, which some apply to alone."""
    return BARS if device == "cpu" else tuple(bar for bar in GPU_BARS if bar.device in name)


def missed(rows: Rows, device: str = "cpu", name: str = "") -> list[str]:
    """Print every bar with what was measured; return those that are missed or were not measured."""
    problems = []
    for bar in of(device, name):
        ratio = bar.ratio(rows)
        if ratio is None:
            why = bar.why_not_measured(rows)
            problems.append(f"{bar}: not measured" + (f" ({why})" if why else ""))
            continue
        print(f"{bar} {ratio:.4g} (bar {bar.limit:.4g})")
        if ratio > bar.limit:
            problems.append(f"{bar} {ratio:.4g} is above {bar.limit:.4g}")
    return problems
