"""Tables as text."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cutlayer.data.formats.reader import Columns, data_format
from cutlayer.data.unsplit import Array, Raw, Section, pick
from cutlayer.errors import DataError


@data_format(
    "csv",
    title="CSV",
    summary="a .csv file of numeric features with a label column",
)
class Csv(Columns):
    """A table: numeric columns, a label, and perhaps an owner."""

    @classmethod
    def fits(cls, path: Path) -> bool:
        """A file named .csv."""
        return path.is_file() and path.suffix.lower() == ".csv"

    def read(self, path: Path) -> Raw:
        """Numeric feature columns, a label column and, if named, a client column. The first line names the columns.

        The separator is the comma, the semicolon or the tab, whichever the first line holds most often.
        """
        header, lines, rows = _csv_rows(path)
        label = pick(
            "label column", self.label_column, header, f"set label_column (the first line of {path} names the columns)"
        )
        client = None
        if self.client_column is not None:
            client = pick("client column", self.client_column, header, f"set client_column to a column of {path}")
        features = [at for at in range(len(header)) if at not in (label, client)]
        if not features:
            raise DataError(f"{path} has no feature column beside {self.label_column!r}: add numeric columns")
        y = _csv_words(path, header[label], lines, [row[label] for row in rows])
        owner = None if client is None else _csv_words(path, header[client], lines, [row[client] for row in rows])
        x = np.stack([_csv_floats(path, header[at], lines, [row[at] for row in rows]) for at in features], axis=1)
        return Raw(path.stem, Section(x, y), client=owner, columns=tuple(header[at] for at in features))


def _csv_rows(path: Path) -> tuple[list[str], list[int], list[list[str]]]:
    """The header, the line number (from 1) and the fields of every non-empty row."""
    lines, rows = [], []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=max(",;\t", key=first.count))
            header = [field.strip() for field in next(reader, [])]
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise DataError(
                        f"line {reader.line_num} of {path} has {len(row)} fields, the first line {len(header)}: fix "
                        "that line (quote fields that hold the separator)"
                    )
                lines.append(reader.line_num)
                rows.append(row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as CSV text in UTF-8 ({error}): convert it") from None
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{path} names the column {twice[0]!r} twice: rename one of them")
    if not rows:
        raise DataError(f"{path} has no rows below the line of column names: add samples")
    return header, lines, rows


def _csv_floats(path: Path, column: str, lines: Sequence[int], values: list[str]) -> Array:
    try:
        return np.array(values, dtype=np.float64)
    except ValueError:
        for line, value in zip(lines, values, strict=True):
            if not _is_float(value):
                found = repr(value) if value.strip() else "empty"
                raise DataError(
                    f"column {column!r} of {path} is not numeric: line {line} is {found}; fill it in, encode the "
                    "column as numbers, or remove it"
                ) from None
        raise


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _csv_words(path: Path, column: str, lines: Sequence[int], values: list[str]) -> Array:
    """Labels or owners: integers where all are ("10" sorts after "9"), strings otherwise."""
    words = [value.strip() for value in values]
    if "" in words:
        raise DataError(f"column {column!r} of {path} is empty in line {lines[words.index('')]}: fill it in")
    if not all(_is_float(word) for word in words):
        return np.array(words, dtype=np.str_)
    numbers = np.array(words, dtype=np.float64)
    whole = (numbers == np.round(numbers)) & (np.abs(numbers) < 2**53)  # beyond, floats skip integers
    if not whole.all():
        raise DataError(
            f"column {column!r} of {path} holds {words[int(whole.argmin())]!r} in line {lines[int(whole.argmin())]}, "
            "which is not a whole number: name a column of integers or words"
        )
    return numbers.astype(np.int64)
