"""Lines, tables and errors on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import NoReturn

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cutlayer.cli.application import err, out
from cutlayer.text import plain, plain_lines


def say(what: str) -> None:
    """Print a line, or lines; quoted text cannot control the terminal."""
    out.print(plain_lines(what), highlight=False, soft_wrap=True)


def print_exactly(text: str) -> None:
    """Print the text unchanged, for a pipe."""
    out.print(text, end="", markup=False, highlight=False, soft_wrap=True)


def print_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print a table whose cells are folded if the terminal is narrow."""
    table = Table(title=title, title_justify="left", show_lines=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(plain_lines(cell)) for cell in row))
    out.print(table)


def wide(width: int) -> Console:
    """A console for tables. If the output is piped or logged, it has this width, so that no number is cut off."""
    return out if out.is_terminal else Console(width=width, markup=False)


def show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning as a note on stderr; stands in for `warnings.showwarning`."""
    err.print(Text.assemble(("note: ", "bold yellow"), plain_lines(message)), soft_wrap=True, highlight=False)


def fail(sentence: str, code: int) -> NoReturn:
    """Print the error on stderr and exit with the code."""
    err.print(Text.assemble(("error:", "bold red"), " ", plain(" ".join(sentence.splitlines()))), soft_wrap=True)
    sys.exit(code)
