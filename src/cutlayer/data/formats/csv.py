"""Tables as text."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from cutlayer.data.formats._tables import Sheet, features, is_number, raw_table, table
from cutlayer.data.formats.reader import Columns, data_format
from cutlayer.data.unsplit import Array, Raw, pick
from cutlayer.errors import DataError

_SEPARATORS = ",;\t"
_SAMPLE = 1 << 16  # characters from which the separator is recognised
_NAMES = (".csv", ".tsv")


@data_format(
    "csv",
    title="CSV",
    summary="a .csv or .tsv file (or .gz of one) with columns of numbers and categories and a label column",
)
class Csv(Columns):
    """A table: columns of numbers and of categories, a label, and perhaps an owner."""

    @classmethod
    def fits(cls, path: Path) -> bool:
        """A file named .csv or .tsv, gzipped or not."""
        return path.is_file() and _plain_name(path).lower().endswith(_NAMES)

    def read(self, path: Path) -> Raw:
        """Feature columns, a label column and, if named, a client column. The first line names the columns.

        The separator is the tab in a .tsv file; otherwise the comma, the semicolon or the tab, whichever divides the
        first lines alike. Text becomes one column of 0 and 1 for each category. An index that pandas or R saved, a
        first column without a name, is left out.
        """
        file = _read(path)
        hint = f"set label_column (the first line of {path} names the columns)"
        pick("label column", self.label_column, file.header, hint)
        names, left_out = features(file.header, self, str(path), file.indices())
        if not names:
            raise DataError(f"{path} has no feature column beside {self.label_column!r}: add columns")
        client = self.owner_among(file.header, str(path))
        owner = None if client is None else _identifiers(file, client)
        y = _labels(file, self.label_column)
        inputs = table(file.sheet(), names, self.impute, owner)
        return raw_table(Path(_plain_name(path)).stem, inputs, {"train": y}, {"train": owner}, self, left_out)


@dataclass(frozen=True)
class File:
    """A CSV file: the names of its columns, and the line number (from 1) and the fields of every non-empty row."""

    path: Path
    separator: str
    header: list[str]
    lines: list[int]
    rows: list[list[str]]

    def cells(self, column: str) -> list[str]:
        """The fields of a column."""
        at = self.header.index(column)
        return [row[at] for row in self.rows]

    def sheet(self) -> Sheet:
        """The file as `table` reads it."""
        return Sheet(
            str(self.path),
            lambda column: {"train": self.cells(column)},
            lambda part, row: f"line {self.lines[row]}",
            decimal_comma=self.separator != ",",
        )

    def indices(self) -> dict[str, str]:
        """The index that pandas or R saved, a first column without a name; and a last column without any content."""
        found = {}
        if self.header[0] == "" or (self.header[0].startswith("Unnamed: 0") and _counts(self.cells(self.header[0]))):
            found[self.header[0]] = "a saved index"
        for number, name in enumerate(self.header[1:], 2):
            if name == "" and any(row[number - 1].strip() for row in self.rows):
                raise DataError(f"column {number} of {self.path} has no name: name it in the first line")
            if name == "":
                found[name] = "empty"
        return found


def _counts(words: Sequence[str]) -> bool:
    """Whether a column only counts the rows."""
    return words == [str(int(words[0]) + row) for row in range(len(words))] if words[0].isdigit() else False


def read_columns(path: Path) -> tuple[dict[str, list[str]], bool]:
    """The fields of a CSV file, by column, and whether 1,5 can be a number there."""
    file = _read(path)
    return {name: file.cells(name) for name in file.header}, file.separator != ","


def _read(path: Path) -> File:
    try:
        with _opened(path) as file:
            separator = _separator(path, file)
            file.seek(0)
            header, lines, rows = _rows(path, file, separator)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as CSV text in UTF-8 ({error}): convert it") from None
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path} is not a valid gzip file ({error}): copy it again") from None
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{path} names the column {twice[0]!r} twice: rename one of them")
    if not rows:
        raise DataError(f"{path} has no rows below the line of column names: add samples")
    return File(path, separator, header, lines, rows)


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    if path.suffix.lower() == ".gz":
        with gzip.open(path, "rt", newline="", encoding="utf-8-sig") as packed:
            assert isinstance(packed, io.TextIOWrapper)
            yield packed
    else:
        with path.open(newline="", encoding="utf-8-sig") as file:
            yield file


def _plain_name(path: Path) -> str:
    """The file's name without .gz."""
    return path.stem if path.suffix.lower() == ".gz" else path.name


def _separator(path: Path, file: TextIO) -> str:
    """The separator that divides the first lines into equal and most fields; separators within quotes do not count."""
    if _plain_name(path).lower().endswith(".tsv"):
        return "\t"
    sample = file.read(_SAMPLE)

    def divides(separator: str) -> tuple[bool, int]:
        read = csv.reader(io.StringIO(sample, newline=""), delimiter=separator)
        rows = [row for row in itertools.islice(read, 20) if row]
        rows = rows[:-1] if len(sample) == _SAMPLE and len(rows) < 20 else rows  # the last may be cut
        widths = {len(row) for row in rows}
        first = len(rows[0]) if rows else 0
        return first > 1 and len(widths) == 1, first

    return max(_SEPARATORS, key=divides)


def _rows(path: Path, file: TextIO, separator: str) -> tuple[list[str], list[int], list[list[str]]]:
    """The header, the line number (from 1) and the fields of every non-empty row."""
    lines, rows = [], []
    reader = csv.reader(file, delimiter=separator)
    header = [field.strip() for field in next(reader, [])]
    for row in reader:
        if not row:
            continue
        if len(row) != len(header):
            raise DataError(
                f"line {reader.line_num} of {path} has {len(row)} fields, the first line {len(header)}: fix that line "
                "(quote fields that hold the separator)"
            )
        lines.append(reader.line_num)
        rows.append(row)
    return header, lines, rows


def _words(file: File, column: str) -> list[str]:
    words = [value.strip() for value in file.cells(column)]
    if "" in words:
        line = file.lines[words.index("")]
        raise DataError(f"column {column!r} of {file.path} is empty in line {line}: fill it in")
    return words


def _identifiers(file: File, column: str) -> Array:
    """Owners: integers if all are written as such ("10" sorts after "9"), otherwise texts: 01 is not 1."""
    words = _words(file, column)
    return np.array(words, dtype=np.int64 if all(map(_is_integer, words)) else np.str_)


def _labels(file: File, column: str) -> Array:
    """Labels: integers or numbers if all are written as such, otherwise texts."""
    words = _words(file, column)
    if all(map(_is_integer, words)):
        return np.array(words, dtype=np.int64)
    if all(map(is_number, words)):
        numbers = np.array(words, dtype=np.float64)
        if len(set(numbers.tolist())) == len(set(words)):  # otherwise 01 and 1 are two names
            return numbers
    return np.array(words, dtype=np.str_)


def _is_integer(word: str) -> bool:
    try:
        return str(int(word)) == word and abs(int(word)) < 2**63
    except ValueError:
        return False
