"""`python -m benchmarks.report [--results benchmarks/results] [--check]`

Rebuilds everything that follows from the results.json of each device: the pictures and results.csv beside it, and the generated
blocks of README.md and docs/performance.md. `--check` writes nothing and fails where the pages or a CSV do not follow from the
results (pictures are not compared: a PNG's bytes depend on the version that drew it).
"""

from __future__ import annotations

import argparse
import csv
import difflib
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from . import growth_markdown, markdown
from .markdown import Results
from .rows import Result, kind

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("benchmarks/results")
COLUMNS = (
    "op", "shape", "dtype", "variant", "pass", "graph", "milliseconds", "low", "high", "repeats", "flops", "bytes", "tflops",
    "share_of_floor", "extra_bytes", "error", "refused",
)  # fmt: skip

Block = Callable[[Results, Path], str]
PAGES: dict[Path, dict[str, Block]] = {
    Path("README.md"): {"performance": markdown.readme},
    Path("docs/performance.md"): {
        "not measured": lambda results, _: growth_markdown.not_measured(results),
        "bars": lambda results, _: markdown.bar_tables(results),
        "ops": markdown.op_tables,
        "scaling": growth_markdown.scaling,
        "models": growth_markdown.models,
    },
}
MARKED = re.compile(
    r"^<!-- generated: (?P<name>[\w ]+) -->\n(?P<text>.*?)^<!-- end of generated -->$",
    re.DOTALL | re.MULTILINE,
)


def load(folder: Path, root: Path = ROOT) -> Results:
    """The results of every device, GPUs first, by their folder as the pages name it.

    Args:
        folder: holds one folder with a results.json for each device.
        root: what the paths are relative to.

    Returns:
        The parsed results by folder.

    Raises:
        ValueError: where a results.json cannot be parsed.
    """
    found = []
    for path in sorted(folder.glob("*/results.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: expected JSON, got {error}") from error
        found.append((Path(path.parent.resolve().relative_to(root.resolve())), result))
    return dict(sorted(found, key=lambda pair: (kind(pair[1]) == "cpu", pair[0])))


def table(result: Result) -> str:
    """All rows as CSV, those that were refused too; columns that a row brings of its own come last."""
    rows = result.get("rows", [])
    own = [key for row in rows for key in row if key not in COLUMNS]
    out = io.StringIO()
    writer = csv.DictWriter(out, [*COLUMNS, *dict.fromkeys(own)], restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({**row, "shape": "x".join(map(str, row["shape"]))})
    return out.getvalue()


def rewritten(page: Path, text: str, blocks: dict[str, Block], results: Results) -> str:
    """The page with its generated blocks made anew.

    Raises:
        ValueError: where the page's markers are not exactly those of `blocks`.
    """
    names = MARKED.findall(text)
    if sorted(name for name, _ in names) != sorted(blocks) or text.count("<!-- generated:") != len(blocks):
        got = ", ".join(name for name, _ in names) or "none"
        raise ValueError(f"{page}: expected generated blocks {', '.join(blocks)}, got {got}")

    def made(found: re.Match[str]) -> str:
        body = blocks[found["name"]](results, page)
        return f"<!-- generated: {found['name']} -->\n\n{body}\n\n<!-- end of generated -->"

    return MARKED.sub(made, text)


def files(results: Results, root: Path = ROOT) -> dict[Path, str]:
    """Every text that follows from the results: path relative to `root` -> what it must hold."""
    found = {folder / "results.csv": table(result) for folder, result in results.items()}
    for page, blocks in PAGES.items():
        found[page] = rewritten(page, (root / page).read_text(encoding="utf-8"), blocks, results)
    return found


def stale(results: Results, root: Path = ROOT) -> list[str]:
    """What does not follow from the results, each with the first lines that differ."""
    problems = []
    for path, expected in files(results, root).items():
        present = (root / path).read_text(encoding="utf-8") if (root / path).is_file() else ""
        if present != expected:
            lines = difflib.unified_diff(
                present.splitlines(),
                expected.splitlines(),
                str(path),
                f"{path} from the results",
                lineterm="",
                n=0,
            )
            shown = [line if len(line) <= 200 else line[:200] + " ..." for line in lines]
            problems.append(
                "\n".join(shown[:12] + ["..."] * (len(shown) > 12)) or f"{path}: line ends differ"
            )
    return problems


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description="Rebuild pictures, CSV and pages from results alone."
    )
    parser.add_argument(
        "--root", type=Path, default=ROOT, help="holds README.md and docs/performance.md: %(default)s"
    )
    parser.add_argument(
        "--results", type=Path, help="holds a folder for each device: ROOT/benchmarks/results"
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where a page or CSV is stale"
    )
    given = parser.parse_args(argv)
    folder = given.results or given.root / RESULTS
    if not folder.resolve().is_relative_to(given.root.resolve()):
        parser.error(
            f"--results: expected a folder under {given.root}, where the pages can link it, got {folder}"
        )
    results = load(folder, given.root)
    if given.check:
        problems = stale(results, given.root)
        for problem in problems:
            print(problem, file=sys.stderr)
        if problems:
            print("run `python -m benchmarks.report` and keep what it writes", file=sys.stderr)
        return 1 if problems else 0
    from .plots import draw

    for path, text in files(results, given.root).items():
        (given.root / path).write_text(text, encoding="utf-8", newline="\n")
        print(path)
    for place, result in results.items():
        for picture in draw(result, given.root / place):
            print(picture.relative_to(given.root))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
