"""Converts arrays to tensors, as described at the top of `sources`. The conversion is stored, so that it can be applied
to new rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cutlayer.data.unsplit import Array, Raw
from cutlayer.errors import DataError

_FILL: dict[str, Callable[[Array], Array]] = {
    "mean": lambda x: np.nanmean(x, axis=0),
    "median": lambda x: np.nanmedian(x, axis=0),
    "zero": lambda x: np.zeros(x.shape[1]),
}
IMPUTE = tuple(_FILL)
"""The replacements for missing values, column by column: figures of the training part."""


@dataclass(frozen=True)
class Conversion:
    """The conversion of inputs [n, ...]. `divisor`: of whole-number pixels (255 or 65535; None: they are not scaled);
    `symmetric`: then from [0, 1] to [-1, 1]. `real`: other whole numbers become float32 too. A table has a `mean` and a
    deviation `std` for each column, and a value to `fill` in for missing ones, if requested.
    """

    divisor: int | None = None
    symmetric: bool = False
    real: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    fill: tuple[float, ...] | None = None

    @classmethod
    def of(cls, raw: Raw, rows: npt.NDArray[np.int64]) -> Self:
        """The conversion of `raw`. The figures of a table come from its training rows `rows`."""
        if not raw.columns:
            return cls(divisor=divisor(raw.train.x), symmetric=raw.symmetric)
        train = raw.train.x[rows].astype(np.float64)  # [n, columns]
        fill = None if raw.impute is None else _fill(raw, train)
        train = train if fill is None else _filled(train, fill)
        mean, std = train.mean(0), train.std(0)
        # The mean and deviation of a constant column have rounding errors, which the division would enlarge.
        constant = train.min(0) == train.max(0)
        mean[constant], std[constant] = train[0, constant], 1
        mean[list(raw.categories)], std[list(raw.categories)] = 0, 1
        return cls(mean=_plain(mean), std=_plain(std), fill=None if fill is None else _plain(fill))

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Self:
        """From the result of `plain`, possibly read from JSON."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in plain.items()}
        return cls(**values)

    def plain(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if v not in (None, False)}

    def __call__(self, x: Array) -> Tensor:
        """The tensor of inputs [n, ...]. The caller keeps their array."""
        if self.mean is not None:
            x = x if self.fill is None else _filled(x, np.array(self.fill))
            return torch.from_numpy(((x - np.array(self.mean)) / np.array(self.std)).astype(np.float32))
        if self.divisor is not None:
            unit = torch.from_numpy(x.astype(np.float32, order="C")).div_(self.divisor)
            return unit.sub_(0.5).div_(0.5) if self.symmetric else unit
        wanted = np.float32 if self.real or x.dtype.kind in "fb" else np.int64
        return torch.from_numpy(np.array(x, dtype=wanted, order="C"))


def divisor(x: Array) -> int | None:
    """The largest value of 8-bit inputs and of 16-bit pictures; other whole numbers are not scaled."""
    if x.dtype == np.uint8:
        return 255
    return 65535 if x.dtype == np.uint16 and x.ndim > 2 else None


def _fill(raw: Raw, train: Array) -> Array:
    empty = np.isnan(train).all(0)
    if empty.any():
        raise DataError(
            f"the column {raw.columns[int(empty.argmax())]!r} of {raw.name} has no value in the training part from "
            f"which impute = {raw.impute!r} could fill it in: leave it out with ignore_columns"
        )
    assert raw.impute is not None
    values: Array = _FILL[raw.impute](train)
    return values


def _filled(x: Array, fill: Array) -> Array:
    return np.where(np.isnan(x), fill, x) if x.dtype.kind == "f" else x


def _plain(values: Array) -> tuple[float, ...]:
    return tuple(map(float, values))
