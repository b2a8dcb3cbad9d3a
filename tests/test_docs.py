"""Pages that exist, links that lead somewhere, Python blocks that compile: `make docs`."""

from __future__ import annotations

import ast
import re
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


def test_the_check_sees_links_and_code() -> None:
    text = '[a](b.md) [c](https://d) <img src="e.png">\n```python\nx = \n```\n  ```python\n  y = 1\n  ```\n'
    assert links(text) == ["b.md", "e.png"]
    assert python_blocks(text) == ["x = \n", "y = 1\n"]
    with pytest.raises(SyntaxError):
        ast.parse(python_blocks(text)[0])
