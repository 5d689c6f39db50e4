"""Writes a document of text, tables and images as Markdown or as a single HTML file."""

import base64
import csv
import html
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Heading(NamedTuple):
    text: str


class Paragraph(NamedTuple):
    text: str


class WarningBlock(NamedTuple):
    """A paragraph that readers must not overlook."""

    text: str


class Bullets(NamedTuple):
    items: Sequence[str]


class Table(NamedTuple):
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Code(NamedTuple):
    text: str


class Image(NamedTuple):
    path: Path
    text: str  # The alt text.


Block = Heading | Paragraph | WarningBlock | Bullets | Table | Code | Image


class Document(NamedTuple):
    title: str
    blocks: Sequence[Block]


def to_markdown(document: Document) -> str:
    """Returns Markdown that refers to images by file name; the images must be in the document's folder."""
    return "\n\n".join([f"# {document.title}", *map(_markdown, document.blocks)]) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(text):
            return f"## {_one_line(text)}"
        case Paragraph(text):
            return _one_line(text)
        case WarningBlock(text):
            return f"> **Warning: {_one_line(text)}**"
        case Bullets(items):
            return "\n".join(f"- {_one_line(item)}" for item in items)
        case Code(text):
            return f"    {text}"
        case Table(header, rows):
            lines = [header, ["---"] * len(header), *rows]
            return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)
        case Image(path, text):
            return f"![{text}]({path.name})"


def _one_line(text: str) -> str:
    """Replaces line breaks and escapes HTML, because the error messages of failed runs may contain arbitrary text."""
    return text.replace("<", "&lt;").replace("\n", " ")


def _cell(text: str) -> str:
    return _one_line(text).replace("|", "\\|")


STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid #8888; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.warning { border: 2px solid #c22; padding: .5rem 1rem; font-weight: 600; }
img { max-width: 100%; background: white; }
"""


def to_html(document: Document) -> str:
    """Returns a self-contained HTML page. All text is escaped."""
    title = html.escape(document.title)
    body = "\n".join(map(_html, document.blocks))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{html.escape(text)}</h2>"
        case Paragraph(text):
            return f"<p>{html.escape(text)}</p>"
        case WarningBlock(text):
            return f'<p class="warning" role="alert">Warning: {html.escape(text)}</p>'
        case Bullets(items):
            return "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in items) + "</ul>"
        case Table(header, rows):
            head = "".join(f'<th scope="col">{html.escape(x)}</th>' for x in header)
            body = "".join(
                "<tr>" + "".join(f"<td>{html.escape(x)}</td>" for x in row) + "</tr>\n"
                for row in rows
            )
            # On narrow screens, the table can be scrolled, including by keyboard.
            return (
                f'<div class="wide" tabindex="0" role="region" aria-label="table: {html.escape(header[0])}">'
                f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>"
            )
        case Code(text):
            return f'<pre class="wide" tabindex="0"><code>{html.escape(text)}</code></pre>'
        case Image(path, text):
            data = base64.b64encode(path.read_bytes()).decode()
            return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{data}">'


def write_csv(path: Path, table: Table) -> None:
    """Writes a table as a CSV file."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([table.header, *table.rows])
