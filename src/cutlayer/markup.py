"""Small tables as HTML, for notebooks, which show an object by its `_repr_html_`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def html_table(caption: str, heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table whose first column names the lines; all texts are escaped."""
    top = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    rows = [
        f'<tr><th scope="row" style="text-align: left">{escape(first)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in lines
    ]
    style = "caption-side: top; text-align: left"
    head = f"<thead><tr>{top}</tr></thead>" if heads else ""
    return f'<table><caption style="{style}">{escape(caption)}</caption>{head}<tbody>{"".join(rows)}</tbody></table>'
