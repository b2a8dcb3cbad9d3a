"""A short document, written as Markdown and as one HTML page from the same blocks."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2937; --soft: #6b7280; --line: #e5e7eb; --paper: #fff; --tint: #f3f4f6;
  --good: #15803d; --bad: #b91c1c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e5e7eb; --soft: #9ca3af; --line: #374151; --paper: #111827; --tint: #1f2937;
    --good: #4ade80; --bad: #f87171; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.3rem; margin: 2.75rem 0 .75rem; padding-top: 1.25rem; border-top: 1px solid var(--line); }
p { max-width: 48rem; margin: .6rem 0; }
table { border-collapse: collapse; margin: 1rem 0; font-size: .94rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem 0 .4rem 1.1rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
th.words, td.words { text-align: left; }
th:first-child, td:first-child { padding-left: 0; }
.scroll { overflow-x: auto; }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
img { display: block; max-width: 100%; height: auto; margin: 1rem 0; border-radius: 10px; border: 1px solid var(--line);
  background: #fff; }
code, pre { font: .88em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: var(--tint);
  border-radius: 5px; }
code { padding: .1em .35em; } pre { padding: .9rem 1.1rem; overflow-x: auto; } pre code { padding: 0; background: none; }
"""


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Text; `code` and **bold** mean what they mean in Markdown."""

    text: str


@dataclass(frozen=True)
class Table:
    """Cells that start with "met" or "missed" are coloured on the page; `words` columns are set left."""

    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    words: int = 1


@dataclass(frozen=True)
class Picture:
    path: Path
    description: str


@dataclass(frozen=True)
class Code:
    text: str


Block = Heading | Paragraph | Table | Picture | Code


def to_markdown(blocks: Sequence[Block]) -> str:
    """Markdown that shows the pictures from files beside it."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def to_html(blocks: Sequence[Block], title: str) -> str:
    """One page with the pictures inside it.

    Raises:
        OSError: a picture cannot be read.
    """
    body = "\n".join(_html(block) for block in blocks)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {block.text}"
    if isinstance(block, Table):
        sides = [":--" if i < block.words else "--:" for i in range(len(block.headings))]
        lines = [block.headings, sides, *block.rows]
        return "\n".join(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
        )
    if isinstance(block, Picture):
        return f"![{block.description}]({block.path.name})"
    if isinstance(block, Code):
        return f"```\n{block.text}\n```"
    return block.text


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{_inline(block.text)}</h{block.level}>"
    if isinstance(block, Table):
        head = "".join(_cell("th", text, i < block.words) for i, text in enumerate(block.headings))
        rows = "\n".join(
            "<tr>" + "".join(_cell("td", text, i < block.words) for i, text in enumerate(row)) + "</tr>"
            for row in block.rows
        )
        return f'<div class="scroll"><table>\n<tr>{head}</tr>\n{rows}\n</table></div>'
    if isinstance(block, Picture):
        data = base64.b64encode(block.path.read_bytes()).decode()
        return f'<img alt="{html.escape(block.description)}" src="data:image/png;base64,{data}">'
    if isinstance(block, Code):
        return f"<pre><code>{html.escape(block.text)}</code></pre>"
    return f"<p>{_inline(block.text)}</p>"


def _cell(tag: str, text: str, words: bool) -> str:
    classes = ["words"] if words else []
    if tag == "td" and text.startswith(("met", "missed")):
        classes.append("good" if text.startswith("met") else "bad")
    attribute = f' class="{" ".join(classes)}"' if classes else ""
    return f"<{tag}{attribute}>{_inline(text)}</{tag}>"


def _inline(text: str) -> str:
    text = html.escape(text, quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)
