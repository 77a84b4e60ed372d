"""Pieces of the page: everything that comes from outside is escaped here, so that nowhere else has to think of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

__all__ = [
    "Safe",
    "Section",
    "details",
    "document",
    "esc",
    "figure",
    "paragraph",
    "percent",
    "points",
    "subheading",
    "table",
]


class Safe(str):
    """HTML that was built here; any other string is text and gets escaped."""

    __slots__ = ()


def esc(value: object) -> Safe:
    """`value` as HTML text; Safe stays as it is."""
    return value if isinstance(value, Safe) else Safe(escape(str(value)))


@dataclass(frozen=True)
class Section:
    """A part of the page: its `key` in links, its `title`, and its `body`."""

    key: str
    title: str
    body: Safe


def paragraph(text: object, kind: str = "") -> Safe:
    """A paragraph, of the class `kind`."""
    return Safe(f'<p class="{kind}">{esc(text)}</p>' if kind else f"<p>{esc(text)}</p>")


def table(
    headings: Sequence[object], rows: Sequence[Sequence[object]], *, text_columns: int = 1, last_is_total: bool = False
) -> Safe:
    """A table that scrolls by itself on a narrow screen; the first `text_columns` are text, the rest numbers."""
    head = "".join(
        f'<th scope="col" class="{"text" if place < text_columns else "number"}">{esc(heading)}</th>'
        for place, heading in enumerate(headings)
    )
    body = []
    for number, row in enumerate(rows):
        total = ' class="total"' if last_is_total and number == len(rows) - 1 else ""
        cells = [f'<th scope="row">{esc(row[0])}</th>'] + [
            f'<td class="{"text" if place < text_columns else "number"}">{esc(cell)}</td>'
            for place, cell in enumerate(row[1:], start=1)
        ]
        body.append(f"<tr{total}>{''.join(cells)}</tr>")
    content = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return Safe(f'<div class="scroll" tabindex="0">{content}</div>')


def figure(content: Safe, caption: object, *, wide: bool = False) -> Safe:
    """A figure with its caption; a `wide` one scrolls where others shrink; on a phone all do."""
    kind = "scroll wide" if wide else "fit"
    below = f"<figcaption>{esc(caption)}</figcaption>"
    return Safe(f'<figure><div class="{kind}" tabindex=0>{content}</div>{below}</figure>')


def subheading(text: object) -> Safe:
    """A heading inside a section."""
    return Safe(f"<h3>{esc(text)}</h3>")


def details(summary: object, body: Safe) -> Safe:
    """Something to unfold; in print it is open."""
    return Safe(f"<details><summary>{esc(summary)}</summary>{body}</details>")


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction as a percentage; a dash for None."""
    return "–" if value is None else f"{100 * value:.{digits}f}\u202f%"


def points(value: float) -> str:
    """A difference of fractions in percentage points, with its sign."""
    return f"{100 * value:+.1f}".replace("-", "−")


def document(title: str, lead: Safe, sections: Sequence[Section], foot: Safe) -> str:
    """The whole page; nothing in it is fetched from anywhere."""
    style = (files("poemerge.report") / "page.css").read_text(encoding="utf-8")
    links = "".join(f'<a href="#{section.key}">{esc(section.title)}</a>' for section in sections)
    body = "".join(
        f'<section id="{section.key}"><h2>{esc(section.title)}</h2>{section.body}</section>' for section in sections
    )
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{esc(title)}</title><style>{style}</style></head>\n"
        f'<body><header>{lead}<nav aria-label="Contents">{links}</nav></header>\n<main>{body}</main>\n'
        f"<footer>{foot}</footer></body></html>\n"
    )
