"""HTML tables."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; cells that start like numbers are right aligned."""
    head = "".join(f"<th>{escape(h)}</th>" for h in headers)
    body = "".join("<tr>" + "".join(cell(c) for c in row) + "</tr>\n" for row in rows)
    return f"<table><tr>{head}</tr>\n{body}</table>"


def cell(text: str) -> str:
    """A table cell."""
    number = text[:1].isdigit() or text[:1] in "+-"
    return f"<td{' class=n' if number else ''}>{escape(text)}</td>"
