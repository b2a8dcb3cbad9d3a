"""Pages that exist, links that lead somewhere, Python blocks that compile, commands that parse: `make docs`."""

from __future__ import annotations

import ast
import re
import shlex
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def links(text: str) -> list[str]:
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r'(?:src|href)="([^"]+)"', prose)
    return [target for target in targets if not re.match(r"\w+:|#", target)]


def python_blocks(text: str) -> list[str]:
    return [
        textwrap.dedent(block)
        for block in re.findall(r"^ *```python\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    ]


def commands(text: str) -> list[list[str]]:
    """Arguments of the `jrl` commands in the shell blocks; of one in a loop, up to its first variable."""
    found = []
    for block in re.findall(r"^ *```sh\n(.*?)```", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            match = re.match(r"\s*(?:\.venv/bin/)?jrl\s+(.*)", line)
            if match:
                words = shlex.split(match[1].split("$")[0], comments=True)
                found.append(words)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_code(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    broken = [link for link in links(text) if not (page.parent / link.split("#")[0]).exists()]
    assert broken == []
    for block in python_blocks(text):
        ast.parse(block)


def test_every_op_has_a_page() -> None:
    ops = {path.parent.name for path in (ROOT / "jrl_kernels" / "ops").glob("*/op.py")}
    assert ops <= {path.stem for path in (ROOT / "docs").rglob("*.md")}


COMMANDS = [(page.name, words) for page in PAGES for words in commands(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("words", [words for _, words in COMMANDS], ids=lambda words: " ".join(words)[:60])
def test_commands_parse(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from jrl.cli import TRAINING, main

    monkeypatch.chdir(ROOT)
    # the configuration that a run would hold
    words = [word.replace("RUN/config.yaml", "configs/clip_scenes.yaml") for word in words]
    flag = "--print_config" if words[0] in TRAINING else "--help"
    with pytest.raises(SystemExit) as stop:
        main([*words, flag] if words[0] in TRAINING else [words[0], flag])
    assert stop.value.code == 0
    if words[0] not in TRAINING:
        known = re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out)
        assert {word.split("=")[0] for word in words if word.startswith("--")} <= set(known)


def test_the_check_sees_links_and_code() -> None:
    text = '[a](b.md) [c](https://d) <img src="e.png">\n```python\nx = \n```\n  ```python\n  y = 1\n  ```\n'
    assert links(text) == ["b.md", "e.png"]
    assert python_blocks(text) == ["x = \n", "y = 1\n"]
    with pytest.raises(SyntaxError):
        ast.parse(python_blocks(text)[0])
    text = "```sh\njrl embed --run R   # a comment\nfor x in 1; do\n  jrl fit --config a.yaml \\\n    --run r/$x\n```\n"
    assert commands(text) == [["embed", "--run", "R"], ["fit", "--config", "a.yaml", "--run", "r/"]]
