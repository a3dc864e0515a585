"""Rows of what was observed, as plain values of one type per column, for CSV files and pandas."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from cutlayer.errors import ConfigError
from cutlayer.markup import html_table

T = TypeVar("T")
_SHOWN = 20  # rows, in a notebook


class Observations(list[T]):
    """A list whose items are the rows of a table; `row` makes plain values of an item, by their columns."""

    def __init__(self, items: Iterable[T], row: Callable[[T], Mapping[str, Any]]) -> None:
        super().__init__(items)
        self._row = row

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows, each with every column that one of them has; None where a row has no value."""
        found = [dict(self._row(item)) for item in self]
        columns = dict.fromkeys(name for row in found for name in row)
        return [{name: row.get(name) for name in columns} for row in found]

    def _repr_html_(self) -> str:
        """The display in a notebook: the first rows."""
        rows = self.rows
        caption = f"{len(rows):,} rows" + (f", of which {_SHOWN} are shown" if len(rows) > _SHOWN else "")
        return html_table(
            caption, list(rows[0]) if rows else [], [[*map(_cell, row.values())] for row in rows[:_SHOWN]]
        )

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with the content of the CSV file. Raises ConfigError if pandas is not installed."""
        try:
            pandas = importlib.import_module("pandas")
        except ImportError:
            raise ConfigError(
                "to_pandas needs the package pandas, which is not installed: pip install 'cutlayer[pandas]'"
            ) from None
        frame = pandas.DataFrame(self.rows)
        unknown = [name for name in frame.columns if frame[name].isna().all()]
        return frame.astype(dict.fromkeys(unknown, float))  # as if it were read from the file: NaN, not objects


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) and abs(value) < 1e5 else str(value)


def flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The plain values of a record; those of a table in it under both names. A list is left out, but for those of
    clients, of which the number is given.
    """
    found: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        elif not isinstance(value, list | tuple):
            found[f"{prefix}{name}"] = value
        elif name in ("clients", "active"):
            found[f"{prefix}{name}"] = len(value)
    return found
