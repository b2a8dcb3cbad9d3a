"""`python -m benchmarks.run --base REF`: our ops in this tree against those of a commit, in turns.

The commit is checked out into a temporary git worktree and built there. Two processes, one a tree, run the same cases of this
folder by turns (base, ours, base, ours), so that a slow phase of the machine meets both. `python -m benchmarks.compare` is one
such process: it reads a case a line and answers with its rows.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from .measure import Rates
from .store import ROOT, commit, git
from .table import shape_of, show

Rows = list[dict[str, Any]]
Key = tuple[str, tuple[int, ...], str, str, str, bool]  # op, shape, dtype, variant, pass, graph
CASE = ("op", "shape", "dtype")
SLOWER, LARGER, SLACK = 1.05, 1.1, 1 << 20
ROUNDS, QUICK_ROUNDS = 5, 3


class Side(NamedTuple):
    """One case on one side: the median over the rounds of their medians, and the lowest and highest of them."""

    milliseconds: float
    low: float
    high: float
    extra_bytes: float | None


class Line(NamedTuple):
    key: Key
    base: Side | None
    ours: Side | None
    verdict: str
    regression: bool


def compare(base: Rows, ours: Rows) -> list[Line]:
    """What changed from the rows of `base` to `ours`; each holds a case once for every round.

    A regression is a time whose lowest round lies above the base's highest and that is more than 1.05 times the base's, an extra
    memory of more than 1.1 times the base's and a MiB, or a refusal of what the base does.
    """
    before, after = _sides(base), _sides(ours)
    refused_before, refused_after = _refusals(base), _refusals(ours)
    lines = []
    for key in dict.fromkeys([*before, *after]):
        old, new = before.get(key), after.get(key)
        why = _refusal(refused_after, key)
        if old is None:
            reason = _refusal(refused_before, key)
            lines.append(Line(key, old, new, f"base: {reason or 'not measured'}", False))
        elif why is not None:
            lines.append(Line(key, old, None, f"refused: {why}", True))
        elif new is None:
            lines.append(Line(key, old, new, "not measured here", False))
        else:
            problems = _problems(old, new)
            lines.append(Line(key, old, new, " and ".join(problems), bool(problems)))
    return lines


def _problems(old: Side, new: Side) -> list[str]:
    problems = []
    if new.low > old.high and new.milliseconds > SLOWER * old.milliseconds:
        problems.append("slower")
    if (
        old.extra_bytes is not None
        and new.extra_bytes is not None
        and new.extra_bytes > LARGER * old.extra_bytes + SLACK
    ):
        problems.append("more memory")
    return problems


def _sides(rows: Rows) -> dict[Key, Side]:
    rounds: dict[Key, Rows] = {}
    for row in rows:
        if "refused" not in row:
            rounds.setdefault(_key(row), []).append(row)
    found = {}
    for key, each in rounds.items():
        times = [float(row["milliseconds"]) for row in each]
        memory = [row["extra_bytes"] for row in each if row.get("extra_bytes") is not None]
        extra = statistics.median(memory) if memory else None
        found[key] = Side(statistics.median(times), min(times), max(times), extra)
    return found


def _key(row: dict[str, Any]) -> Key:
    return row["op"], tuple(row["shape"]), row["dtype"], row["variant"], row["pass"], row.get("graph", False)


def _refusals(rows: Rows) -> dict[tuple[Any, ...], str]:
    """Why, by the whole key, or by op, shape, dtype and variant where no pass is named."""
    found: dict[tuple[Any, ...], str] = {}
    for row in rows:
        if "refused" in row:
            whole = row["op"], tuple(row["shape"]), row["dtype"], row["variant"]
            found[_key(row) if "pass" in row else whole] = row["refused"]
    return found


def _refusal(refused: dict[tuple[Any, ...], str], key: Key) -> str | None:
    return refused.get(key, refused.get(key[:4]))


@contextmanager
def checkout(ref: str, root: Path = ROOT) -> Iterator[Path]:
    """A temporary worktree of the commit, removed whatever happens."""
    name = git("rev-parse", "--verify", "--end-of-options", f"{ref}^{{commit}}", root=root)
    with tempfile.TemporaryDirectory(prefix="jrl-base-") as folder:
        tree = Path(folder) / "base"
        git("worktree", "add", "--detach", str(tree), name, root=root)
        try:
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree), root=root)


def build(tree: Path) -> None:
    """The tree's extension, in place."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise RuntimeError(f"{' '.join(command)} in the base failed:\n{tail}")


class Worker:
    """A process that runs cases of this folder with the jrl_kernels of another."""

    def __init__(self, tree: Path, benchmarks: Path, device: str) -> None:
        """`benchmarks` is a folder that holds this package and no jrl_kernels."""
        path = [str(benchmarks), str(tree), *filter(None, [os.environ.get("PYTHONPATH")])]
        variables = {"PYTHONPATH": os.pathsep.join(path), "JRL_BENCHMARKS_OF_OLDER": "1"}
        self.tree = tree
        answers, end = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.compare", device, str(end)],
            cwd=benchmarks,
            env={**os.environ, **variables},
            stdin=subprocess.PIPE,
            stdout=2,  # what libraries print is not an answer
            pass_fds=(end,),
            text=True,
        )
        os.close(end)
        self.answers = os.fdopen(answers)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.answers.close()

    def hello(self) -> dict[str, Any]:
        """What it can run; RuntimeError where it found another jrl_kernels than the tree's."""
        said = self._answer()
        if not Path(said["jrl_kernels"]).resolve().is_relative_to(self.tree.resolve()):
            raise RuntimeError(f"{self.tree}: jrl_kernels came from {said['jrl_kernels']}")
        return said

    def run(self, case: dict[str, Any]) -> Rows:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        rows: Rows = self._answer()
        return rows

    def _answer(self) -> Any:
        line = self.answers.readline()
        if not line:
            raise RuntimeError(f"the benchmarks of {self.tree} ended with exit {self.process.wait()}")
        return json.loads(line)


def work(device: str, answers: int) -> None:
    """The other end of a Worker: a case a line in, its rows a line out, into the file descriptor `answers`."""
    import jrl_kernels

    from .case import ALL_DTYPES, run_case
    from .workloads import LACKING, WORKLOADS

    def answer(value: Any) -> None:
        os.write(answers, (json.dumps(value) + "\n").encode())

    shapes = {op: workload.cases.BENCHMARK_SHAPES[device] for op, workload in WORKLOADS.items()}
    answer({"jrl_kernels": jrl_kernels.__file__, "shapes": shapes, "lacking": LACKING})
    checked: dict[tuple[str, str], dict[str, float | str]] = {}
    for line in sys.stdin:
        case = json.loads(line)
        op, dtype = case["op"], ALL_DTYPES[case["dtype"]]
        (shape,) = [each for each in shapes[op] if list(each) == case["shape"]]
        answer(
            run_case(
                op,
                WORKLOADS[op]._replace(products=None),
                shape,
                dtype,
                device,
                against=(),
                rates=Rates(1.0, 1.0),  # floors play no part
                quick=True,
                checked=checked.setdefault((op, case["dtype"]), {}),
            )
        )


def measured(base: Path, ops: list[str], device: str, dtypes: list[str], quick: bool) -> tuple[Rows, Rows]:
    """The rows of the base and of this tree, every case once a round, and what only one of them has is printed."""
    with ExitStack() as stack:
        alone = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jrl-benchmarks-")))
        (alone / "benchmarks").symlink_to(ROOT / "benchmarks", target_is_directory=True)
        workers = [stack.enter_context(Worker(tree, alone, device)) for tree in (base, ROOT)]
        theirs, own = [worker.hello() for worker in workers]
        for module, why in theirs["lacking"].items():
            print(f"the base lacks what benchmarks/workloads/{module}.py needs: {why}")
        found: tuple[Rows, Rows] = ([], [])
        for op in ops:
            for shape in own["shapes"][op][: 1 if quick else None]:
                if shape not in theirs["shapes"].get(op, []):
                    print(f"the base lacks {op} {shape_of(shape)}")
                    continue
                for dtype in dtypes:
                    for _ in range(QUICK_ROUNDS if quick else ROUNDS):
                        for worker, rows in zip(workers, found, strict=True):
                            rows += worker.run({"op": op, "shape": shape, "dtype": dtype})
    return found


def report(lines: list[Line], title: str) -> None:
    sides = ("op", "dtype", "variant", "pass", "verdict")
    names = (
        "op",
        "shape",
        "dtype",
        "variant",
        "pass",
        "base ms",
        "ours ms",
        "ratio",
        "base MiB",
        "ours MiB",
        "verdict",
    )
    show(title, {name: "left" if name in sides else "right" for name in names}, map(_cells, lines))


def _cells(line: Line) -> list[str]:
    op, shape, dtype, variant, which, graph = line.key
    base, ours = line.base, line.ours

    def time(side: Side | None) -> str:
        return "" if side is None else f"{side.milliseconds:.4g} ({side.low:.4g}-{side.high:.4g})"

    def memory(side: Side | None) -> str:
        return "" if side is None or side.extra_bytes is None else f"{side.extra_bytes / 2**20:.1f}"

    ratio = "" if base is None or ours is None else f"{ours.milliseconds / base.milliseconds:.3f}"
    where = [op, shape_of(shape), dtype, variant, which + (", graph" if graph else "")]
    return [*where, time(base), time(ours), ratio, memory(base), memory(ours), line.verdict]


def main(ref: str, ops: list[str], device: str, dtypes: list[str], quick: bool) -> int:
    """1 on a regression, 2 where the comparison could not be made."""
    # Ended by a signal, the worktree goes too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with checkout(ref) as tree:
            name = git("rev-parse", "HEAD", root=tree)
            build(tree)
            lines = compare(*measured(tree, ops, device, dtypes, quick))
    except RuntimeError as problem:
        print(f"--base {ref}: {problem}", file=sys.stderr)
        return 2
    report(lines, f"base {name[:12]}, this tree {(commit() or 'without git')}")
    worse = [line for line in lines if line.regression]
    for line in worse:
        where = " ".join([line.key[0], shape_of(line.key[1]), *line.key[2:5]])
        print(f"regression: {where}: {line.verdict}", file=sys.stderr)
    return 1 if worse else 0


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]))
