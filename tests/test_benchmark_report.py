"""From results to pages: what the report writes, what it refuses to leave stale, and the bars that it judges."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bars, plots, report, rows, style
from benchmarks.markdown import bar_line, prose
from benchmarks.workloads import WORKLOADS

BOTH = "forward+backward"
CPU = {
    "device": "Slow CPU",
    "threads": 2,
    "python": "3.11.0",
    "torch": "2.13.0",
    "cuda": None,
    "commit": "0123456789abcdef",
    "rates": {"torch.float32": {"flops": 2e11, "bytes": 4e10}},
}
GPU = {
    **CPU,
    "device": "NVIDIA H200",
    "threads": None,
    "commit": "fedcba9876543210-dirty",
    "libraries": {"inf_cl": "1.3"},
    "rates": {"torch.bfloat16": {"flops": 7.9e14, "bytes": 4.3e12}},
}


def row(op: str, shape: list[int], variant: str, milliseconds: float, **other: Any) -> dict[str, Any]:
    about = {"op": op, "shape": shape, "dtype": "float32", "variant": variant, "pass": BOTH, "graph": False}
    figures = {"milliseconds": milliseconds, "low": milliseconds / 2, "high": milliseconds * 2, "repeats": 5}
    work = {"flops": 4e9, "bytes": 2e7, "tflops": 4 / milliseconds, "share_of_floor": 20 / milliseconds}
    return {**about, **figures, **work, "extra_bytes": 3 << 20, "error": 2e-7, **other}


def growth(op: str, axis: str, variant: str, **other: Any) -> dict[str, Any]:
    about = {
        "op": op,
        "axis": axis,
        "variant": variant,
        "pass": BOTH,
        "dtype": "float32",
        "shape": [64, 64, 32],
    }
    fit = {"values": [64, 128, 256], "milliseconds": [1.0, 4.0, 16.0], "exponent": 2.0, "expected": 2.0}
    return {**about, **fit, "commit": CPU["commit"], **other}


def step(variant: str, batch: int, milliseconds: float) -> dict[str, Any]:
    about = {
        "model": "CLIP",
        "variant": variant,
        "batch": batch,
        "dtype": "float32",
        "peak_bytes": batch << 20,
    }
    return {**about, "milliseconds": milliseconds, "low": milliseconds, "high": milliseconds}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with the results of a CPU and of a GPU, whose pages are still empty."""
    square, large = [8192, 8192, 512], [16384, 16384, 512]
    memory = {"extra_bytes": [1 << 20, 2 << 20, 4 << 20], "memory_exponent": 1.0, "memory_expected": 1}
    cpu = {
        **CPU,
        "rows": [
            row("info_nce", square, "jrl cpu", 50.0),
            row("info_nce", square, "eager", 100.0, extra_bytes=96 << 20),
            row("info_nce", square, "chunked", 150.0, why="recomputes | everything"),
            row("info_nce", square, "compile", 75.0),
            row("info_nce", square, "products", 40.0, extra_bytes=None, error=None),
            row("info_nce", large, "jrl cpu", 400.0),
            {
                "op": "info_nce",
                "shape": square,
                "dtype": "float32",
                "variant": "liger",
                "refused": "no `wheel` here",
            },
            {
                "op": "info_nce",
                "shape": large,
                "dtype": "float32",
                "variant": "liger",
                "refused": "no `wheel` here",
            },
            row("retrieval_ranks", [25000, 5000, 512], "jrl cpu", 7.0, **{"pass": "forward"}),
        ],
        "scaling": [
            growth("info_nce", "B", "jrl cpu", **memory),
            growth("info_nce", "B", "eager", exponent=2.25),
            {"op": "info_nce", "axis": "D", "variant": "eager", "refused": "D=512: out of memory"},
        ],
        "models": [
            step("fused", 256, 40.0),
            step("eager", 256, 50.0),
            {"model": "CLIP", "variant": "eager", "batch": 4096, "refused": "out of memory"},
            {"model": "CLIP", "variant": "fused", "largest_batch": 1536, "limit_bytes": 4 << 30},
        ],
    }
    gpu = {
        **GPU,
        "rows": [
            row("info_nce", [65536, 65536, 768], "jrl triton", 44.0, dtype="bfloat16"),
            row("info_nce", [65536, 65536, 768], "eager", 99.0, dtype="bfloat16"),
            row("info_nce", [65536, 65536, 1024], "jrl triton", 60.0, dtype="bfloat16"),
            row("info_nce", [65536, 65536, 768], "jrl triton", 700.0),
            row("info_nce", [65536, 65536, 768], "inf_cl", 1, dtype="bfloat16", graph=True, extra_bytes=None),
        ],
    }
    for name, result in (("cpu-slow", cpu), ("a-gpu", gpu)):
        folder = tmp_path / "benchmarks" / "results" / name
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(result))
    (tmp_path / "docs").mkdir()
    for page, blocks in report.PAGES.items():
        marks = "\n\n".join(f"<!-- generated: {name} -->\n<!-- end of generated -->" for name in blocks)
        (tmp_path / page).write_text(f"# Title\n\n{marks}\n\nThe end.\n")
    return tmp_path


def run(root: Path, *options: str) -> int:
    return report.main(["--root", str(root), *options])


@pytest.fixture
def unpictured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages alone: pictures are the slow part."""
    monkeypatch.setattr(plots, "draw", lambda result, folder: [])


def test_the_pages_of_this_repository_follow_from_its_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--check"]) == 0, capsys.readouterr().err


def test_everything_is_rebuilt(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(root, "--check") == 1
    assert run(root) == 0
    assert run(root, "--check") == 0
    written = {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    for page in report.PAGES:
        text = (root / page).read_text()
        assert text.startswith("# Title\n") and text.endswith("\nThe end.\n")
        links = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
        assert links
        for link in links:
            assert ((root / page).parent / link).read_bytes().startswith(b"\x89PNG"), link
    cpu = {path.name for path in (root / "benchmarks/results/cpu-slow").glob("*.png")}
    names = ("info_nce", "retrieval_ranks", "roofline")
    kinds = ("overview", "scaling", "scaling_memory", "models", *(f"{name}_float32" for name in names))
    assert cpu == {f"{kind}.png" for kind in kinds}
    monkeypatch.setattr(plots, "draw", lambda result, folder: [])
    run(root)
    again = {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert again == written


def test_the_readme_table(root: Path, unpictured: None) -> None:
    run(root)
    text = (root / "README.md").read_text()
    # The bar's shape, although another takes longer; the fastest of the others, not the products; ratios over ours.
    assert (
        "| `info_nce` | M=N=8192, D=512 | **50.0 ms** | 100 ms (2.00×) | compile 75.0 ms (1.50×) | 3 MiB | 96 MiB | 40% |"
    ) in text
    assert "| `retrieval_ranks` | M=25000, N=5000, D=512 | **7.00 ms** | – | – | 3 MiB | – | – |" in text
    # bfloat16 on a GPU, outside a graph; GPUs come first; sources that differ from the commit are named.
    assert (
        "| `info_nce` | M=N=65536, D=768 | **44.0 ms** | 99.0 ms (2.25×) | – | 3 MiB | 3 MiB | 45% |" in text
    )
    assert text.index(
        "**NVIDIA H200, torch 2.13.0, commit `fedcba9-dirty`**; bfloat16, forward and backward."
    ) < text.index("**Slow CPU, 2 threads, torch 2.13.0, commit `0123456`**; float32")
    assert "liger" not in text


def test_the_page_has_every_row(root: Path, unpictured: None) -> None:
    run(root)
    text = (root / "docs/performance.md").read_text()
    assert "|  |  | chunked | 150 | 75.0–300 | 3.00× | 0.0267 | 13% | 3 MiB | 2e-07 |" in text
    assert "|  |  | products | 40.0 | 20.0–80.0 | 0.80× | 0.1 | 50% | – | – |" in text
    assert "inf\\_cl, CUDA graph" in text and "Peers: inf_cl 1.3." in text
    # One line for a reason that holds everywhere; code marks within it would end it.
    assert text.count("- liger was not timed: `no 'wheel' here`") == 1
    assert "- chunked: recomputes | everything" in text
    assert (
        "| `info_nce` | B | M=N=64, D=32 | forward+backward | **jrl cpu** | 64, 128, 256 | 2.00 | 2.00 | 1.00 | 1 |"
        in text
    )
    assert "- `info_nce`, D, eager: `D=512: out of memory`" in text
    assert "| CLIP | 256 | float32 | eager | 50.0 ms | 50.0–50.0 | 1.25× | 256 MiB |" in text
    assert "| CLIP | fused | 1,536 | 4 GiB |" in text
    assert "- CLIP, eager, batch 4,096: `out of memory`" in text
    assert (
        "| `info_nce` M=N=8192, D=512 | forward+backward | time ÷ eager | ≤ 0.45 | 0.5 | **missed** |" in text
    )
    assert "| time ÷ products | ≤ 1.1 | 1.25 | **missed** |" in text
    assert "| extra memory ÷ eager | ≤ 0.0625 | 0.0312 | met |" in text
    assert "| `info_nce` M=N=65536, D=768 | forward+backward | time | ≤ 45.0 ms | 44.0 ms | met |" in text


def test_what_is_not_measured(root: Path, unpictured: None) -> None:
    def block() -> str:
        run(root)
        text = (root / "docs/performance.md").read_text()
        return text.split("<!-- generated: not measured -->")[1].split("<!-- end of generated -->")[0]

    with_gpu = block()
    assert "No GPU figure" not in with_gpu and "≤ 45.0 ms" not in with_gpu
    assert "- Not on NVIDIA H200: `retrieval_ranks`." in with_gpu
    assert (
        "- Not on NVIDIA H200: growth against each axis (`python -m benchmarks.scaling`) and training steps"
        in with_gpu
    )
    assert "- A share of the floor on Slow CPU, 2 threads for `retrieval_ranks`" in with_gpu
    (missing,) = [line for line in with_gpu.splitlines() if line.startswith("- Ops without a figure")]
    assert "`max_sim`" in missing and "`info_nce`" not in missing
    (root / "benchmarks/results/a-gpu/results.json").unlink()
    without = block()
    assert "- **No GPU figure exists yet**" in without
    assert "| `info_nce` M=N=65536, D=768 | forward+backward | time | ≤ 45.0 ms |" in without


def test_the_csv_has_every_row(root: Path, unpictured: None) -> None:
    run(root)
    with (root / "benchmarks/results/cpu-slow/results.csv").open() as file:
        found = list(csv.DictReader(file))
    assert len(found) == 9
    assert found[0]["shape"] == "8192x8192x512" and float(found[0]["milliseconds"]) == 50.0
    assert found[2]["why"] == "recomputes | everything" and found[0]["why"] == ""
    assert found[6]["refused"] == "no `wheel` here" and found[6]["milliseconds"] == ""


@pytest.mark.parametrize(
    ("file", "old", "new", "shown"),
    [
        ("README.md", "**50.0 ms**", "**5.00 ms**", "+| `info_nce` | M=N=8192, D=512 | **50.0 ms**"),
        ("docs/performance.md", "0.0312 | met", "0.0112 | met", "| 0.0312 | met |"),
        ("benchmarks/results/cpu-slow/results.csv", ",50.0,", ",5.0,", "results.csv from the results"),
        (
            "benchmarks/results/cpu-slow/results.json",
            '"milliseconds": 50.0',
            '"milliseconds": 49.0',
            "49.0 ms",
        ),
    ],
)
def test_a_stale_figure_is_caught(
    root: Path,
    unpictured: None,
    capsys: pytest.CaptureFixture[str],
    file: str,
    old: str,
    new: str,
    shown: str,
) -> None:
    run(root)
    text = (root / file).read_text()
    assert old in text
    (root / file).write_text(text.replace(old, new, 1))
    kept = (root / file).read_bytes()
    assert run(root, "--check") == 1
    assert shown in capsys.readouterr().err
    assert (root / file).read_bytes() == kept, "a check writes nothing"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<!-- generated: bars -->\n<!-- end of generated -->", ""),
        ("<!-- generated: bars -->", "<!-- generated: bar -->"),
        ("<!-- generated: bars -->\n<!-- end of generated -->", "<!-- generated: bars -->"),
    ],
)
def test_a_page_without_its_marks_is_refused(root: Path, old: str, new: str) -> None:
    page = root / "docs/performance.md"
    page.write_text(page.read_text().replace(old, new))
    with pytest.raises(
        ValueError, match=r"docs/performance.md: expected generated blocks not measured, bars, ops"
    ):
        run(root)


def test_results_that_cannot_be_linked_or_read(
    root: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(root, "--results", str(tmp_path_factory.mktemp("elsewhere")))
    assert "--results: expected a folder under" in capsys.readouterr().err
    (root / "benchmarks/results/a-gpu/results.json").write_text("{")
    with pytest.raises(ValueError, match=r"a-gpu/results.json: expected JSON"):
        run(root)


def test_letters_are_those_of_the_shapes() -> None:
    for op, workload in WORKLOADS.items():
        for shape in workload.cases.BENCHMARK_SHAPES["cpu"]:
            assert len(rows.AXES[op].letters) == len(shape)
            assert "x" not in rows.label(op, list(shape))
    assert rows.label("word_region_scores", [64, 64, 20, 36, 256, 0]) == "B=C=64, T=20, R=36, D=256"
    assert rows.label("info_nce", [8, 4, 2]) == "M=8, N=4, D=2"
    assert rows.label("new_op", [8, 4]) == "8x4"
    assert rows.batch_alone_differs("info_nce", [(8, 8, 2), (16, 16, 2)])
    assert not rows.batch_alone_differs("info_nce", [(8, 8, 2), (16, 16, 4)])
    assert not rows.batch_alone_differs("mutual_information", [(8, 1, 1, 2), (8, 4, 1, 2)])


def test_figures_as_people_write_them() -> None:
    assert [rows.significant(v) for v in (1234.5, 123.4, 12.34, 1.234, 0.1234)] == [
        "1,234",
        "123",
        "12.3",
        "1.23",
        "0.123",
    ]
    assert [rows.memory(v) for v in (3 << 29, 1023 << 20, 5 << 20, 900 << 10, 12, None)] == [
        "1.5 GiB", "1,023 MiB", "5 MiB", "900 KiB", "12 B", "–",
    ]  # fmt: skip
    assert [rows.share(v) for v in (0.456, 1.02, 2.5)] == ["46%", "102%", "–"]
    assert rows.short("0123456789-dirty") == "0123456-dirty" and rows.short(None) == "unknown"
    assert prose("a `b` | c\n [d](e)") == "`a 'b' / c [d] (e)`"


def test_gpu_bars_are_of_shapes_that_are_measured() -> None:
    for bar in bars.GPU_BARS:
        assert bar.shape in [list(shape) for shape in WORKLOADS[bar.op].cases.BENCHMARK_SHAPES["cuda"]]
        assert bar.dtype == "bfloat16"
    assert bars.of("cuda", "NVIDIA H200") == bars.GPU_BARS
    elsewhere = bars.of("cuda", "NVIDIA A100")
    assert len(elsewhere) == len(bars.GPU_BARS) - 1 and all(bar.limit != 45.0 for bar in elsewhere)
    assert bars.of("cpu") == bars.BARS


def test_bars_on_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    case = "gumbel_assign", [2, 3], BOTH
    floor = bars.Bar(*case, "milliseconds", "floor", 3.0, "bfloat16", graph=True)
    peer = bars.Bar(*case, "milliseconds", "transformers", 0.5, "bfloat16")
    memory = bars.Bar(*case, "extra_bytes", None, 1000, "bfloat16")
    monkeypatch.setattr(bars, "GPU_BARS", (floor, peer, memory))

    def ours(backend: str, milliseconds: float, **other: Any) -> dict[str, Any]:
        return row("gumbel_assign", [2, 3], f"jrl {backend}", milliseconds, dtype="bfloat16", **other)

    found = [
        ours("triton", 4.0, extra_bytes=999),
        ours("cuda", 9.0, extra_bytes=5000),
        ours("triton", 1.0, graph=True, share_of_floor=0.5, extra_bytes=None),
        row("gumbel_assign", [2, 3], "transformers", 10.0, dtype="bfloat16"),
        row("gumbel_assign", [2, 3], "transformers", 1.0),  # another dtype
    ]
    # The faster backend, its own memory, and under a graph only what was timed under one.
    assert [bar.ratio(found) for bar in (floor, peer, memory)] == [2.0, 0.4, 999]
    assert bars.missed(found, "cuda") == []
    assert "gumbel_assign 2x3 forward+backward: time against floor 2 (bar 3)" in capsys.readouterr().out
    assert floor.ratio(found[:2]) is None
    absent = {
        "op": case[0],
        "shape": case[1],
        "dtype": "bfloat16",
        "variant": "transformers",
        "refused": "not here",
    }
    slow = [
        ours("triton", 4.0, graph=True, share_of_floor=0.25),
        ours("triton", 4.0, extra_bytes=1001),
        absent,
    ]
    assert bars.missed(slow, "cuda") == [
        "gumbel_assign 2x3 forward+backward: time against floor 4 is above 3",
        "gumbel_assign 2x3 forward+backward: time against transformers: not measured (transformers: not here)",
        "gumbel_assign 2x3 forward+backward: extra memory 1001 is above 1000",
    ]
    assert bar_line(peer, slow)[3:] == ["≤ 0.5", "–", "not measured: `transformers: not here`"]
    assert bar_line(floor, slow)[2:] == ["time ÷ the floor, CUDA graph", "≤ 3", "4", "**missed**"]


def test_variants_can_be_told_apart() -> None:
    # Ours for a CPU and for Triton never share a picture.
    looks = [look for variant, look in style.STYLES.items() if variant != "jrl cpu"]
    assert len({look.colour for look in looks}) == len(looks)
    assert style.of("somebody's own") == style.of("somebody's own")
    assert style.of("somebody's own").colour not in {look.colour for look in looks}
    assert len(style.MARKERS) >= len(rows.AXES)


def test_a_picture_that_has_nothing_to_show_is_not_linked() -> None:
    bare = {**CPU, "rates": {}, "rows": [row("info_nce", [8, 8, 2], "jrl cpu", 1.0)]}
    assert set(plots.pictures(bare)) == {"info_nce_float32.png"}
    assert set(plots.pictures({**CPU, "rows": []})) == set()
