"""Human rankings from a file to shares of first places, mean ranks and intervals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jrl.cli import main
from jrl.evaluation.rankings import Judgement, human_rankings, read_rankings

CSV = """item,annotator,criterion,system,rank
1,ann,realism,full,1
1,ann,realism,none,2
1,bob,realism,full,2
1,bob,realism,none,1
2,ann,realism,full,1
2,ann,realism,none,2
2,ann,alignment,full,1
2,ann,alignment,none,1
"""


def test_shares_and_mean_ranks_by_hand(tmp_path: Path) -> None:
    (tmp_path / "rankings.csv").write_text(CSV)
    found = human_rankings(read_rankings(tmp_path / "rankings.csv"))
    realism = found["realism"]
    assert list(realism) == ["full", "none"]
    assert realism["full"].first.mean == pytest.approx(2 / 3)
    assert realism["full"].mean_rank.mean == pytest.approx(4 / 3)
    assert realism["none"].mean_rank.mean == pytest.approx(5 / 3)
    # items 1, 1: ½; 1, 2: 2 of 3; 2, 2: 1
    assert (realism["full"].first.low, realism["full"].first.high) == (0.5, 1.0)
    # a shared first place is half of one, at place 1½
    assert found["alignment"]["full"].first.mean == 0.5
    assert found["alignment"]["none"].mean_rank.mean == 1.5


def test_ties_below_the_first_place() -> None:
    (standings,) = human_rankings([Judgement("1", "ann", "", {"a": 7, "b": 2, "c": 7, "d": 9})]).values()
    assert {name: one.mean_rank.mean for name, one in standings.items()} == {
        "b": 1,
        "a": 2.5,
        "c": 2.5,
        "d": 4,
    }
    assert {name: one.first.mean for name, one in standings.items()} == {"b": 1, "a": 0, "c": 0, "d": 0}


def test_the_interval_covers_what_it_should() -> None:
    """60% of the items prefer a, each by five annotators who agree: as wide as 100 items make it, not 500."""
    judgements = [
        Judgement(str(item), str(annotator), "realism", {"a": 1, "b": 2} if item < 60 else {"a": 2, "b": 1})
        for item in range(100)
        for annotator in range(5)
    ]
    first = human_rankings(judgements, seed=1)["realism"]["a"].first
    assert first.mean == pytest.approx(0.6)
    half = 1.96 * np.sqrt(0.24 / 100)
    assert (first.low, first.high) == (
        pytest.approx(0.6 - half, abs=0.015),
        pytest.approx(0.6 + half, abs=0.015),
    )
    assert human_rankings(judgements, seed=1) == human_rankings(judgements, seed=1)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"item": item, "annotator": "ann", "system": system, "rank": rank}
        for item in range(3)
        for rank, system in enumerate(("full", "none"), start=1)
    ]
    (tmp_path / "rankings.json").write_text(json.dumps(rows))
    out = tmp_path / "out"
    assert main(["human-rankings", "--file", str(tmp_path / "rankings.json"), "--out", str(out)]) == 0
    assert (
        "| overall | full | 100.0 (100.0 to 100.0) | 1.00 (1.00 to 1.00) |"
        in (out / "rankings.md").read_text()
    )
    values = json.loads((out / "rankings.json").read_text())
    assert (values["judgements"], values["items"], values["annotators"]) == (3, 3, 1)
    assert values["standings"]["overall"]["none"]["mean_rank"]["mean"] == 2
    assert main(["human-rankings", "--file", str(tmp_path / "none.csv"), "--out", str(out)]) == 2
    assert "rankings: no file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("item,annotator,system,rank\n", "expected rows with item, annotator"),
        ("item,annotator,system\n1,ann,a\n", "row 1: has no rank"),
        ("item,annotator,system,rank\n1,ann,a,0\n", "rank: expected a number of 1 or more, got '0'"),
        ("item,annotator,system,rank\n1,ann,a,nan\n", "rank: expected a number of 1 or more, got 'nan'"),
        ("item,annotator,system,rank\n1,ann,a,1\n1,ann,a,2\n", "row 2: ann ranks a twice for '1'"),
        ("item,annotator,system,rank\n1,ann,a,1\n", "expected at least 2 systems, got a"),
        (
            "item,annotator,system,rank\n1,ann,a,1\n1,ann,b,2\n2,bob,a,1\n",
            "bob does not rank b for '2' by overall",
        ),
    ],
)
def test_files_that_do_not_hold_rankings(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "rankings.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_rankings(tmp_path / "rankings.csv")
    with pytest.raises(ValueError, match="judgements: expected at least one, got none"):
        human_rankings([])
