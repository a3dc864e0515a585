"""Map-style torch data sets of pairs (x, label)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from cutlayer.data.arrays import as_array
from cutlayer.data.formats._pictures import stack_pictures
from cutlayer.data.own import own_code
from cutlayer.data.several import numbered, stacked
from cutlayer.data.unsplit import Raw, Section
from cutlayer.errors import DataError


def from_pairs(parts: Mapping[str, Any], name: str) -> Raw:
    """All pairs (x, label) of a map-style Dataset for each part. x: a tensor, an array, a number or a picture (PIL)."""
    items = {part: _items(dataset, _called(part)) for part, dataset in parts.items()}
    labels = {part: as_array(ys, f"the labels of the {_called(part)}") for part, (_, ys) in items.items()}
    if all(hasattr(x, "getbands") for xs, _ in items.values() for x in xs):
        named = {part: [(f"{_called(part)}[{n}]", x) for n, x in enumerate(xs)] for part, (xs, _) in items.items()}
        pictures = stack_pictures(named)
        sections = {part: Section(x, labels[part]) for part, x in pictures.x.items()}
        raw = _raw(name, sections)
        return dataclasses.replace(raw, rows="pictures", remarks=pictures.remarks, recipe=pictures.recipe)
    if all(isinstance(x, Mapping | tuple) for xs, _ in items.values() for x in xs):
        found = {part: numbered(stacked(xs, _called(part)), _called(part)) for part, (xs, _) in items.items()}
        raw = _raw(name, {part: Section(rows, labels[part]) for part, (rows, _) in found.items()})
        return dataclasses.replace(raw, several={part: arrays for part, (_, arrays) in found.items()})
    return _raw(name, {part: _section(xs, labels[part], _called(part)) for part, (xs, _) in items.items()})


def _raw(name: str, sections: Mapping[str, Section]) -> Raw:
    return Raw(name, sections["train"], sections.get("validation"), sections.get("test"))


def _called(part: str) -> str:
    return "data set" if part == "train" else f"{part} data set"


def _items(dataset: Any, what: str) -> tuple[list[Any], list[Any]]:
    """The inputs and the labels of all items."""
    try:
        size = len(dataset)
    except TypeError:
        raise DataError(
            f"the {what} has no length: give a map-style Dataset (with __len__ and __getitem__), or use from_arrays"
        ) from None
    if size == 0:
        raise DataError(f"the {what} has no rows: add samples")
    xs, ys = [], []
    for row in range(size):
        with own_code(dataset, f"item {row} of the {what}"):
            item = dataset[row]
        item = _pair(item)
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise DataError(
                f"item {row} of the {what} is not a pair (x, label) but a {type(item).__name__}: return pairs, or "
                "dictionaries of tensors with the target under 'labels' or 'label'"
            )
        xs.append(item[0])
        ys.append(item[1].item() if hasattr(item[1], "item") and np.ndim(item[1]) == 0 else item[1])
    return xs, ys


def _pair(item: Any) -> Any:
    """An item that is a dictionary as (its tensors, its labels)."""
    label = next((key for key in ("labels", "label") if isinstance(item, Mapping) and key in item), None)
    return item if label is None else ({k: v for k, v in item.items() if k != label}, item[label])


def _section(xs: list[Any], labels: Any, what: str) -> Section:
    arrays = [as_array(x, f"x of item {row} of the {what}") for row, x in enumerate(xs)]
    for row, array in enumerate(arrays):
        if array.shape != arrays[0].shape:
            raise DataError(
                f"x of item {row} of the {what} has shape {array.shape}, item 0 has {arrays[0].shape}: make them equal"
            )
    return Section(np.stack(arrays), labels)
