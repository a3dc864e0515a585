"""Map-style torch data sets of pairs (x, label)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from cutlayer.data.arrays import as_array
from cutlayer.data.formats._pictures import stack_pictures
from cutlayer.data.lazy import ItemReading, Items, called, pair, too_large
from cutlayer.data.own import own_code
from cutlayer.data.several import numbered, stacked
from cutlayer.data.unsplit import Raw, Section
from cutlayer.errors import DataError


def from_pairs(parts: Mapping[str, Any], name: str, reading: ItemReading | None = None) -> Raw:
    """The pairs (x, label) of a map-style Dataset for each part. x: a tensor, an array, a number or a picture (PIL).
    All items are read now, unless `reading` says otherwise.
    """
    for part, dataset in parts.items():
        _check_length(dataset, called(part))
    if reading is not None and reading.in_memory != "always":
        items = Items(parts, reading)
        if reading.in_memory == "never" or too_large(items):
            return _unread(parts, name, reading, items)
    return _read(parts, name)


def _unread(parts: Mapping[str, Any], name: str, reading: ItemReading, items: Items) -> Raw:
    """Pairs whose inputs are read on demand: here, the inputs are the numbers of items."""
    sections, taken = {}, ""
    for part, dataset in parts.items():
        labels, taken = items.labels(part)
        rows = np.arange(len(dataset), dtype=np.int64)[:, None]
        sections[part] = Section(rows, as_array(labels, f"the labels of the {called(part)}"))
    remarks = [
        "items are read again for each batch"
        if reading.in_memory == "never"
        else f"items are read again for each batch, as all would take {items.nbytes / 1e9:.3g} GB of the free memory; "
        "data_in_memory = 'always' keeps them"
    ]
    if taken:
        remarks.append(f"targets are those of its attribute {taken!r}")
    raw = _raw(name, sections)
    rows_are = "pictures" if items.recipe else "rows"
    several = dict.fromkeys(parts, items)
    return dataclasses.replace(raw, rows=rows_are, remarks=tuple(remarks), recipe=items.recipe, several=several)


def _read(parts: Mapping[str, Any], name: str) -> Raw:
    """All pairs, in memory."""
    items = {part: _items(dataset, called(part)) for part, dataset in parts.items()}
    labels = {part: as_array(ys, f"the labels of the {called(part)}") for part, (_, ys) in items.items()}
    if all(hasattr(x, "getbands") for xs, _ in items.values() for x in xs):
        named = {part: [(f"{called(part)}[{n}]", x) for n, x in enumerate(xs)] for part, (xs, _) in items.items()}
        pictures = stack_pictures(named)
        sections = {part: Section(x, labels[part]) for part, x in pictures.x.items()}
        raw = _raw(name, sections)
        return dataclasses.replace(raw, rows="pictures", remarks=pictures.remarks, recipe=pictures.recipe)
    if all(isinstance(x, Mapping | tuple) for xs, _ in items.values() for x in xs):
        found = {part: numbered(stacked(xs, called(part)), called(part)) for part, (xs, _) in items.items()}
        raw = _raw(name, {part: Section(rows, labels[part]) for part, (rows, _) in found.items()})
        return dataclasses.replace(raw, several={part: arrays for part, (_, arrays) in found.items()})
    return _raw(name, {part: _section(xs, labels[part], called(part)) for part, (xs, _) in items.items()})


def _raw(name: str, sections: Mapping[str, Section]) -> Raw:
    return Raw(name, sections["train"], sections.get("validation"), sections.get("test"))


def _check_length(dataset: Any, what: str) -> None:
    try:
        size = len(dataset)
    except TypeError:
        raise DataError(
            f"the {what} has no length: give a map-style Dataset (with __len__ and __getitem__), or use from_arrays"
        ) from None
    if size == 0:
        raise DataError(f"the {what} has no rows: add samples")


def _items(dataset: Any, what: str) -> tuple[list[Any], list[Any]]:
    """The inputs and the labels of all items."""
    xs, ys = [], []
    for row in range(len(dataset)):
        with own_code(dataset, f"item {row} of the {what}"):
            item = dataset[row]
        x, y = pair(item, f"item {row} of the {what}")
        xs.append(x)
        ys.append(y)
    return xs, ys


def _section(xs: list[Any], labels: Any, what: str) -> Section:
    arrays = [as_array(x, f"x of item {row} of the {what}") for row, x in enumerate(xs)]
    for row, array in enumerate(arrays):
        if array.shape != arrays[0].shape:
            raise DataError(
                f"x of item {row} of the {what} has shape {array.shape}, item 0 has {arrays[0].shape}: make them equal"
            )
    return Section(np.stack(arrays), labels)
