"""Turns columns with names into the inputs of a table: numbers, and one column of 0 and 1 for each category of text."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cutlayer.data.formats.reader import Columns
from cutlayer.data.unsplit import Array, Raw, Section, pick
from cutlayer.errors import ConfigError, DataError

Cells = Array | Sequence[str]
"""The cells of a column in one part: numbers (NaN: missing) or texts."""

_MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?", "-"})
_MOST_CATEGORIES, _FEW = 100, 20
_DECIMAL_COMMA = re.compile(r"[+-]?\d+(,\d+)?")
_FILL = "fill it in, leave the column out with ignore_columns, or pass impute (mean, median or zero)"


@dataclass
class Inputs:
    """The inputs of a table: `x` [n, columns] of each part, the names of the columns, which of them are `categories`,
    the changes to each column of the file, and remarks.
    """

    x: dict[str, Array]
    names: tuple[str, ...]
    categories: tuple[int, ...]
    columns: list[dict[str, Any]]
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Sheet:
    """The content of a file of columns: `cells` of a column in each part; `place` gives the position of a row of a part
    in the file called `name`. `decimal_comma`: whether 1,5 can be a number.
    """

    name: str
    cells: Callable[[str], Mapping[str, Cells]]
    place: Callable[[str, int], str]
    decimal_comma: bool = False


def features(
    names: Sequence[str], options: Columns, name: str, indices: Mapping[str, str] | None = None
) -> tuple[list[str], tuple[str, ...]]:
    """The columns among `names` that are inputs, and those that are left out. `indices`: columns that only count or
    name the rows, with their kind. Raises DataError for columns that are not there, ConfigError.
    """
    label, client = options.label_column, options.owner_among(names, name)
    pick("label column", label, names, f"set label_column to a column of {name}")
    for option in ("columns", "ignore_columns"):
        for column in getattr(options, option):
            pick("column", column, names, f"set {option} to columns of {name}")
            if column in (label, client):
                which = "label_column" if column == label else "client_column"
                raise ConfigError(f"{option} names {column!r}, which is the {which}: leave it out of {option}")
    if options.columns and options.ignore_columns:
        raise ConfigError("columns and ignore_columns exclude each other: name what to use, or what to leave out")
    if options.columns:
        return list(options.columns), ()
    index = {column: what for column, what in (indices or {}).items() if column not in (label, client)}
    unused = {label, client, *options.ignore_columns, *index}
    left_out = [f"the column {column!r} ({what})" for column, what in index.items()]
    if options.ignore_columns:
        left_out.append(columns_called(options.ignore_columns))
    return [column for column in names if column not in unused], tuple(left_out)


def columns_called(names: Sequence[str]) -> str:
    """ "the columns 'a' and 'b'", or how many there are."""
    if len(names) > 5:
        return f"{len(names)} columns"
    listed = ", ".join(map(repr, names))
    return f"the column{'s' if len(names) > 1 else ''} {listed}"


def table(sheet: Sheet, names: Sequence[str], impute: str | None, owner: Array | None) -> Inputs:
    """The columns called `names` as inputs. `owner` [n]: whose the rows of the training part are."""
    made = Inputs({}, (), (), [])
    pieces: dict[str, list[Array]] = {}
    categories: list[int] = []
    columns: list[str] = []
    gaps: list[str] = []
    for name in names:
        cells = dict(sheet.cells(name))
        numbers = _numbers(sheet, name, cells)
        if numbers is None:
            found = _categories(sheet, name, cells, impute)
            made.columns.append({"name": name, "categories": found})
            categories += range(len(columns), len(columns) + len(found))
            columns += [f"{name}={category}" for category in found]
            for part, texts in cells.items():
                pieces.setdefault(part, []).append(one_hot(texts, found))
        else:
            _refuse_missing(sheet, name, cells, impute)
            made.columns.append({"name": name})
            columns.append(name)
            for part, values in numbers.items():
                pieces.setdefault(part, []).append(values[:, None])
            _flag(made.remarks, name, numbers["train"], owner)
            if missing := sum(int(np.isnan(values).sum()) for values in numbers.values()):
                gaps.append(f"{name!r} ({missing})")
    made.x = {part: np.concatenate(arrays, axis=1) for part, arrays in pieces.items()}
    made.names, made.categories = tuple(columns), tuple(categories)
    if words := [f"{c['name']!r} ({len(c['categories'])})" for c in made.columns if "categories" in c]:
        made.remarks.insert(0, f"one column of 0 and 1 for each category of {', '.join(words)}")
    if gaps and impute is not None:
        filled = "zero" if impute == "zero" else f"the {impute} of their column"
        made.remarks.append(f"missing numbers become {filled}: {', '.join(gaps)}")
    return made


def raw_table(
    name: str,
    inputs: Inputs,
    labels: dict[str, Array],
    owners: dict[str, Array | None],
    options: Columns,
    left_out: tuple[str, ...],
    class_names: tuple[str, ...] | None = None,
) -> Raw:
    """The result for a file of columns."""
    parts = {part: Section(inputs.x[part], y) for part, y in labels.items()}
    return Raw(
        name,
        parts["train"],
        parts.get("validation"),
        parts.get("test"),
        client=owners.get("train"),
        validation_client=owners.get("validation"),
        test_client=owners.get("test"),
        class_names=class_names,
        columns=inputs.names,
        categories=inputs.categories,
        impute=options.impute,
        left_out=left_out,
        remarks=tuple(inputs.remarks),
        recipe={"kind": "table", "columns": inputs.columns, "label_column": options.label_column},
    )


def one_hot(texts: Cells, categories: Sequence[str]) -> Array:
    """[n, categories]: 1 if the text is the category; a missing or unknown text has none."""
    words = np.array([str(text).strip() for text in texts], dtype=np.str_)
    hot: Array = words[:, None] == np.array(list(categories), dtype=np.str_)[None]
    return hot.astype(np.float64)


def as_numbers(texts: Cells, *, decimal_comma: bool) -> Array | None:
    """The cells as numbers, NaN for missing ones; None if some are not numbers."""
    if isinstance(texts, np.ndarray) and texts.dtype.kind in "fiub":
        return texts.astype(np.float64)
    words = ["nan" if is_missing(text) else text.strip() for text in texts]
    if decimal_comma and all(w == "nan" or _DECIMAL_COMMA.fullmatch(w) for w in words):
        words = [word.replace(",", ".") for word in words]
    try:
        return None if any("_" in word for word in words) else np.array(words, dtype=np.float64)
    except ValueError:
        return None


def is_number(text: str) -> bool:
    """Whether a text is a number as people write it (Python also reads 1_000)."""
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text


def is_missing(text: str) -> bool:
    """Whether a text means a missing value."""
    return text.strip().lower() in _MISSING


def _numbers(sheet: Sheet, name: str, cells: Mapping[str, Cells]) -> dict[str, Array] | None:
    """The column's numbers in each part; None if it holds categories. Raises DataError if it is a mixture."""
    found = {part: as_numbers(texts, decimal_comma=sheet.decimal_comma) for part, texts in cells.items()}
    numbers = {part: values for part, values in found.items() if values is not None}
    if len(numbers) == len(found):
        return numbers
    places = [(part, row, str(text)) for part, texts in cells.items() for row, text in enumerate(texts)]
    present = [place for place in places if not is_missing(place[2])]
    odd = [place for place in present if not is_number(place[2])]
    if len(odd) * 2 > len(present) or not odd:
        return None
    part, row, text = odd[0]
    raise DataError(
        f"column {name!r} of {sheet.name} is not numeric: {sheet.place(part, row)} is {text.strip()!r}; correct it, or "
        "leave the column out with ignore_columns"
    )


def _refuse_missing(sheet: Sheet, name: str, cells: Mapping[str, Cells], impute: str | None) -> None:
    """A text that means a missing value, in a column of numbers or categories."""
    if impute is not None:
        return
    for part, texts in cells.items():
        if isinstance(texts, np.ndarray) and texts.dtype.kind in "fiub":
            continue  # NaN: found by the check of all numbers
        for row, text in enumerate(texts):
            if is_missing(text) and text.strip().lower() != "nan":
                what = "empty" if not text.strip() else f"{text.strip()!r}, which stands for a missing value"
                raise DataError(f"column {name!r} of {sheet.name}: {sheet.place(part, row)} is {what}; {_FILL}")


def _categories(sheet: Sheet, name: str, cells: Mapping[str, Cells], impute: str | None) -> list[str]:
    """The texts of a column, each once, in order. Raises DataError if they are too many."""
    _refuse_missing(sheet, name, cells, impute)
    words = [str(text).strip() for texts in cells.values() for text in texts if not is_missing(str(text))]
    found = sorted(set(words))
    if len(found) > _MOST_CATEGORIES or (len(found) > _FEW and 2 * len(found) > len(words)):
        raise DataError(
            f"column {name!r} of {sheet.name} is text with {len(found)} different values in {len(words)} rows, such as "
            f"{words[0][:40]!r}: too many for categories; leave it out with ignore_columns, or write it as numbers"
        )
    return found


def _flag(remarks: list[str], name: str, values: Array, owner: Array | None) -> None:
    """Remark on a column that looks like an identifier: it counts the rows, or it names their owners."""
    if len(values) < _FEW or not (np.isfinite(values).all() and (values == np.round(values)).all()):
        return
    distinct = len(np.unique(values))
    advice = "if it is an identifier, leave it out with ignore_columns"
    if distinct == len(values):
        remarks.append(f"{name!r} has another whole number in every row: {advice}")
    elif owner is not None and distinct > 1:
        whose = np.unique(owner, return_inverse=True)[1]
        pairs = len(np.unique(np.stack([whose.astype(np.float64), values]), axis=1).T)
        if 1 < int(whose.max()) + 1 == pairs:
            remarks.append(f"{name!r} is the same in all rows of an owner: {advice}")
