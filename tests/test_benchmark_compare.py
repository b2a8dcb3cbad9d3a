"""`--base REF`: what counts as a regression, and that the base is another tree, built, asked by turns and removed."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare
from benchmarks.compare import Line, Worker, checkout
from benchmarks.store import ROOT

MIB = 1 << 20


def row(milliseconds: float = 10.0, extra_bytes: int | None = 0, **more: Any) -> dict[str, Any]:
    about = {
        "op": "info_nce",
        "shape": [8, 8, 2],
        "dtype": "float32",
        "variant": "jrl cpu",
        "pass": "forward",
    }
    return {**about, "graph": False, "milliseconds": milliseconds, "extra_bytes": extra_bytes, **more}


def refused(why: str, **more: Any) -> dict[str, Any]:
    kept = {name: value for name, value in row(**more).items() if name not in ("milliseconds", "extra_bytes")}
    return {**kept, "refused": why}


def rounds(*times: float, **more: Any) -> list[dict[str, Any]]:
    return [row(time, **more) for time in times]


def the_only(base: list[dict[str, Any]], ours: list[dict[str, Any]]) -> Line:
    (line,) = compare.compare(base, ours)
    return line


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ((10, 11, 12), ""),
        ((12.1, 12.5, 13), "slower"),  # its lowest lies above the base's highest
        ((12, 13, 14), ""),  # within the spread
        ((5, 5, 5), ""),
    ],
)
def test_slower_beyond_the_spread(ours: tuple[float, ...], verdict: str) -> None:
    line = the_only(rounds(10, 11, 12), rounds(*ours))
    assert (line.verdict, line.regression) == (verdict, verdict != "")


@pytest.mark.parametrize(("ours", "verdict"), [(10.4, ""), (10.6, "slower")])
def test_slower_by_more_than_a_twentieth(ours: float, verdict: str) -> None:
    assert the_only(rounds(10, 10), rounds(ours, ours)).verdict == verdict


@pytest.mark.parametrize(
    ("base", "ours", "verdict"),
    [
        (0, MIB, ""),
        (0, MIB + 1, "more memory"),
        (100 * MIB, 111 * MIB, ""),
        (100 * MIB, 112 * MIB, "more memory"),
        (None, 112 * MIB, ""),
        (100 * MIB, None, ""),
    ],
)
def test_more_memory(base: int | None, ours: int | None, verdict: str) -> None:
    line = the_only([row(extra_bytes=base)], [row(extra_bytes=ours)])
    assert (line.verdict, line.regression) == (verdict, verdict != "")


def test_slower_and_larger() -> None:
    line = the_only(rounds(10, 10), rounds(20, 20, extra_bytes=2 * MIB))
    assert line.verdict == "slower and more memory"
    assert line.base is not None and line.ours is not None
    assert (line.base.milliseconds, line.ours.milliseconds) == (10, 20)


def test_rounds_are_joined_by_their_median() -> None:
    line = the_only(rounds(10, 30, 11), rounds(12, 10, 90))
    assert line.base is not None and line.ours is not None
    assert line.base[:3] == (11, 10, 30) and line.ours[:3] == (12, 10, 90)


def test_cases_are_told_apart() -> None:
    other = ({"pass": "forward+backward"}, {"graph": True}, {"dtype": "bfloat16"}, {"variant": "jrl triton"})
    more = [{"shape": [9, 9, 2]}, {"op": "max_sim"}, *other]
    base = [row(10), *(row(10, **each) for each in more)]
    ours = [row(10), *(row(20, **each) for each in more)]
    assert [line.regression for line in compare.compare(base, ours)] == [False] + [True] * len(more)


def test_what_only_one_of_them_does() -> None:
    line = the_only([row()], [row(), refused("out of memory")])
    assert (line.verdict, line.regression) == ("refused: out of memory", True)
    whole = refused("disagrees with float64 by 2")
    del whole["pass"], whole["graph"]
    line = the_only([row()], [whole])
    assert (line.verdict, line.regression) == ("refused: disagrees with float64 by 2", True)
    for base, verdict in (([refused("no such option")], "base: no such option"), ([], "base: not measured")):
        line = the_only(base, [row()])
        assert (line.verdict, line.regression) == (verdict, False)
    assert the_only([row()], []).regression is False
    assert compare.compare([refused("both")], [refused("both")]) == []


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """One commit with a setup.py that builds, and one, named broken, whose setup.py fails."""

    def git(*arguments: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    git("init", "-q")
    for text, tag in (("open('built', 'w')", "good"), ("raise SystemExit('no compiler')", "broken")):
        (tmp_path / "setup.py").write_text(text)
        git("add", "setup.py")
        git("commit", "-q", "-m", tag)
        git("tag", tag)
    return tmp_path


def worktrees(repository: Path) -> list[str]:
    done = subprocess.run(
        ["git", "-C", str(repository), "worktree", "list"], check=True, capture_output=True, text=True
    )
    return done.stdout.splitlines()


def test_the_base_is_built_in_a_worktree_that_goes(repository: Path) -> None:
    with checkout("good", repository) as tree:
        compare.build(tree)
        assert (tree / "built").is_file() and len(worktrees(repository)) == 2
        assert (tree / "setup.py").read_text() != (repository / "setup.py").read_text()
    assert not tree.exists() and len(worktrees(repository)) == 1
    with pytest.raises(RuntimeError, match="no compiler"), checkout("broken", repository) as tree:
        compare.build(tree)
    assert not tree.exists() and len(worktrees(repository)) == 1


def test_an_unknown_base(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main("no-such-ref", ["info_nce"], "cpu", ["float32"], True) == 2
    assert "--base no-such-ref: fatal" in capsys.readouterr().err


@pytest.mark.parametrize(("ours", "code"), [(10.0, 0), (20.0, 1)])
def test_a_regression_is_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ours: float, code: int
) -> None:
    @contextmanager
    def here(ref: str) -> Iterator[Path]:
        yield ROOT

    monkeypatch.setattr(compare, "checkout", here)
    monkeypatch.setattr(compare, "build", lambda tree: None)
    monkeypatch.setattr(compare, "git", lambda *arguments, root: "0123456789abcdef")
    monkeypatch.setattr(compare, "measured", lambda *arguments: (rounds(10, 10), rounds(ours, ours)))
    assert compare.main("good", ["info_nce"], "cpu", ["float32"], True) == code
    out, err = capsys.readouterr()
    assert "base 0123456789ab" in out and f"{ours / 10:.3f}" in out
    assert err == ("regression: info_nce 8x8x2 float32 jrl cpu forward: slower\n" if code else "")


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    """This package without the jrl_kernels beside it."""
    folder = tmp_path / "alone"
    folder.mkdir()
    (folder / "benchmarks").symlink_to(ROOT / "benchmarks", target_is_directory=True)
    return folder


def test_two_trees_take_turns(
    alone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On this tree twice: rows of each round from each side, of our variants alone; a shape of one side is listed."""
    asked: list[str] = []

    class Recorded(Worker):
        def __init__(self, tree: Path, benchmarks: Path, device: str) -> None:
            super().__init__(tree, benchmarks, device)
            self.name = "ab"[len(started)]
            started.append(self)

        def hello(self) -> dict[str, Any]:
            said = super().hello()
            if self.name == "a":
                said["shapes"]["ranking_loss"] = said["shapes"]["ranking_loss"][:1]
            return said

        def run(self, case: dict[str, Any]) -> list[dict[str, Any]]:
            asked.append(self.name)
            return super().run(case)

    started: list[Recorded] = []
    monkeypatch.setattr(compare, "Worker", Recorded)
    monkeypatch.setattr(compare, "ROUNDS", 2)
    base, ours = compare.measured(ROOT, ["ranking_loss"], "cpu", ["float32"], False)
    assert asked == ["a", "b", "a", "b"]
    for rows in (base, ours):
        assert [(r["variant"], r["pass"]) for r in rows] == [
            ("jrl cpu", "forward"),
            ("jrl cpu", "forward+backward"),
        ] * 2
        assert all(r["milliseconds"] > 0 and r["error"] < 1e-5 for r in rows)
    assert "the base lacks ranking_loss 4096x4096x512x0" in capsys.readouterr().out
    assert all(worker.process.poll() is not None for worker in started)


def test_an_older_base(alone: Path, tmp_path: Path) -> None:
    """What it lacks is said, and what it prints is not taken for an answer."""
    package = tmp_path / "old" / "jrl_kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("print('not an answer')\n")
    with Worker(package.parent, alone, "cpu") as worker:
        said = worker.hello()
        assert said["shapes"] == {} and "info_nce" in said["lacking"]["contrastive"]
        assert Path(said["jrl_kernels"]).parent == package
        with pytest.raises(RuntimeError, match="old ended with exit 1"):
            worker.run({"op": "info_nce", "shape": [1, 1, 1], "dtype": "float32"})


def test_a_base_that_another_tree_stands_in_for(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with (
        Worker(tmp_path / "empty", alone, "cpu") as worker,
        pytest.raises(RuntimeError, match="empty: jrl_kernels came from"),
    ):
        worker.hello()
