"""Inputs of several arrays per sample (a dictionary or a tuple). Readers number the rows, which are then checked, dealt
and split like other inputs. At the end, the arrays' rows replace the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cutlayer.data.arrays import as_array
from cutlayer.data.samples import Inputs
from cutlayer.data.unsplit import Array
from cutlayer.errors import DataError

Arrays = Mapping[str, Array] | tuple[Array, ...]


def is_several(x: object) -> bool:
    """Whether these are inputs of several arrays: by name, or a tuple of arrays."""
    return isinstance(x, Mapping) or (isinstance(x, tuple) and len(x) > 0 and all(hasattr(v, "shape") for v in x))


def numbered(x: Any, what: str) -> tuple[Array, Arrays]:
    """The numbers of the rows of inputs called `what`, [n, 1], and their arrays, each [n, ...]. Raises DataError."""
    named = {str(k): v for k, v in (x.items() if isinstance(x, Mapping) else enumerate(x))}
    arrays = {name: as_array(values, f"{what} {name!r}") for name, values in named.items()}
    for name, array in arrays.items():
        if array.ndim == 0 or array.dtype.kind not in "fiub":
            raise DataError(f"{what} {name!r} are of type {array.dtype} and shape {array.shape}: give numbers [n, ...]")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise DataError(f"{what} {name!r} hold NaN or infinite numbers: fill them in or remove those rows")
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) != 1:
        raise DataError(f"{what} have rows {lengths}: give each array the same number")
    rows = np.arange(next(iter(lengths.values())), dtype=np.int64)[:, None]
    return rows, arrays if isinstance(x, Mapping) else tuple(arrays.values())


def stacked(items: list[Any], what: str) -> Any:
    """The inputs of all items, which have several arrays each, in the same form with rows first."""
    first = items[0]
    keys = list(first) if isinstance(first, Mapping) else list(range(len(first)))
    found = []
    for key in keys:
        try:
            arrays = [as_array(item[key], f"x of item {row} of the {what}") for row, item in enumerate(items)]
            found.append(np.stack(arrays))
        except (KeyError, IndexError, ValueError) as error:
            raise DataError(
                f"the items of the {what} do not have {key!r} in one shape ({error}): give all of them the same "
                "tensors; pad sequences to one length"
            ) from None
    return dict(zip(keys, found, strict=True)) if isinstance(first, Mapping) else tuple(found)


def taken(arrays: Arrays, rows: Array) -> Inputs:
    """The rows with these numbers [m, 1] as tensors: floating point ones as float32, whole numbers as they are."""

    def tensor(array: Array) -> Tensor:
        wanted = np.float32 if array.dtype.kind in "fb" else np.int64
        return torch.from_numpy(np.array(array[rows[:, 0]], dtype=wanted, order="C"))

    if isinstance(arrays, Mapping):
        return {name: tensor(array) for name, array in arrays.items()}
    return tuple(tensor(array) for array in arrays)
