"""Map-style torch data sets of pairs (x, label)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np

from cutlayer.data.formats._pictures import stack_pictures
from cutlayer.data.unsplit import Section
from cutlayer.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image


def from_pairs(dataset: Any, what: str) -> Section:
    """All pairs (x, label) of a map-style Dataset. x: a tensor, an array, a number, or a picture (PIL)."""
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
        item = dataset[row]
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise DataError(
                f"item {row} of the {what} is not a pair (x, label) but a {type(item).__name__}: return pairs"
            )
        xs.append(item[0])
        ys.append(item[1].item() if hasattr(item[1], "item") and np.ndim(item[1]) == 0 else item[1])
    if hasattr(xs[0], "getbands"):
        named = ((f"{what}[{row}]", picture) for row, picture in enumerate(cast("list[Image]", xs)))
        return Section(stack_pictures(named)[0], np.array(ys))
    arrays = [np.asarray(x) for x in xs]
    for row, array in enumerate(arrays):
        if array.shape != arrays[0].shape:
            raise DataError(
                f"x of item {row} of the {what} has shape {array.shape}, item 0 has {arrays[0].shape}: make them equal"
            )
    return Section(np.stack(arrays), np.array(ys))
