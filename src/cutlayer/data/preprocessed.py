"""Preprocesses new rows like the training data, as described in `Source.preprocessing` (and a run's data.json)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from cutlayer.data.arrays import as_array
from cutlayer.data.conversion import Conversion
from cutlayer.data.formats._pictures import one_picture
from cutlayer.data.formats._tables import Cells, as_numbers, is_missing, one_hot
from cutlayer.data.formats.csv import read_columns
from cutlayer.data.formats.images import opened, picture_files
from cutlayer.data.formats.npz import Npz, channels_first
from cutlayer.data.unsplit import Array, pick
from cutlayer.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image


def preprocessed(preprocessing: Mapping[str, Any], data: Any) -> Tensor:
    """The inputs [n, ...] of new rows, as a model takes them that was trained on data with this `preprocessing`.

    `data`: for a table the path of a CSV file, or a mapping of columns to their cells (labels and other columns are
    ignored); for pictures a path, a folder, or PIL pictures; otherwise an array [n, ...] or the path of an .npz file.
    Raises DataError for rows that do not fit the training data, with the value, the reason and the remedy.
    """
    kind = preprocessing.get("kind", "arrays")
    read = {"table": _table, "pictures": _pictures}.get(kind, _arrays)
    x = read(preprocessing, data)
    expected = tuple(preprocessing["shape"])
    if x.shape[1:] != expected:
        raise DataError(f"the inputs have shape {x.shape[1:]} per row, those of training {expected}: make them equal")
    return Conversion.from_plain(preprocessing["conversion"])(x)


def _table(preprocessing: Mapping[str, Any], data: Any) -> Array:
    name, decimal_comma = str(data) if isinstance(data, str | Path) else "the data", False
    if isinstance(data, str | Path):
        data, decimal_comma = read_columns(Path(data))
    columns = []
    for column in preprocessing["columns"]:
        pick("column", column["name"], list(data), f"{name} lacks a column that was trained on")
        cells = data[column["name"]]
        if "categories" in column:
            columns.append(_categories(name, column, cells, missing="fill" in preprocessing["conversion"]))
        else:
            columns.append(_numbers(name, column["name"], cells, decimal_comma, preprocessing)[:, None])
    return np.concatenate(columns, axis=1)


def _categories(name: str, column: Mapping[str, Any], cells: Cells, *, missing: bool) -> Array:
    for row, cell in enumerate(cells):
        if str(cell).strip() not in column["categories"] and not (missing and is_missing(str(cell))):
            raise DataError(
                f"column {column['name']!r} of {name} has {str(cell)!r} in row {row} (from 0), which is not one of the "
                f"categories in training ({', '.join(column['categories'])}): correct it or remove the row"
            )
    return one_hot(cells, column["categories"])


def _numbers(name: str, column: str, cells: Any, decimal_comma: bool, preprocessing: Mapping[str, Any]) -> Array:
    texts = list(cells) if not isinstance(cells, np.ndarray) else cells
    if not (isinstance(texts, np.ndarray) and texts.dtype.kind in "fiub"):
        texts = ["" if cell is None else str(cell) for cell in texts]
    values = as_numbers(texts, decimal_comma=decimal_comma)
    if values is None:
        raise DataError(f"column {column!r} of {name} is not numeric, as it was in training: correct it")
    bad = ~np.isfinite(values) & ~(np.isnan(values) & ("fill" in preprocessing["conversion"]))
    if bad.any():
        raise DataError(
            f"column {column!r} of {name} has no finite number in row {int(bad.argmax())} (from 0): fill it in, or "
            "train with impute"
        )
    return values


def _pictures(preprocessing: Mapping[str, Any], data: Any) -> Array:
    with ExitStack() as stack:
        named = _named_pictures(data)
        if hasattr(named, "close"):
            stack.callback(named.close)
        found = [one_picture(name, picture, preprocessing) for name, picture in named]
    if not found:
        raise DataError(f"{data!r} holds no pictures: name a picture or a folder of them")
    return np.stack(found)


def _named_pictures(data: Any) -> Iterator[tuple[str, Image]]:
    if isinstance(data, str | Path):
        return opened(picture_files(Path(data)))
    if isinstance(data, Sequence) and all(isinstance(file, str | Path) for file in data):
        return opened(map(Path, data))
    pictures: Iterable[Image] = [data] if hasattr(data, "getbands") else data
    return ((f"number {n}", picture) for n, picture in enumerate(pictures))


def _arrays(preprocessing: Mapping[str, Any], data: Any) -> Array:
    if isinstance(data, str | Path):
        return Npz().inputs(Path(data))
    x = as_array(data, "the data")
    return channels_first(x) if x.shape[1:] != tuple(preprocessing["shape"]) else x
