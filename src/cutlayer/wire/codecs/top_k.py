"""Only the largest numbers of each row: top-k:FRACTION.

Of m numbers per row, k = ceil(FRACTION m) are sent with their positions; the others are received as zeros. No dropped
number is larger than a kept one; NaN and Inf count as the largest.

The gradient of the rows comes back in full. With top-k:FRACTION:support it is set to zero where nothing, or a zero, was
received.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from cutlayer.errors import ConfigError, WireError
from cutlayer.wire.codecs.writing import Codec, as_tensor, codec

SUPPORT = ":support"
"""Behind a codec's numbers: the gradient comes back only where a number was received."""


def fraction_of(text: str, example: str) -> float:
    """The kept fraction of a row, above 0 and at most 1. Raises ConfigError."""
    try:
        fraction = float(text)
    except ValueError:
        fraction = math.nan
    if not 0 < fraction <= 1:
        raise ConfigError(f"{text!r} is not a fraction above 0 and up to 1: give e.g. {example}")
    return fraction


@codec("top-k")
@dataclass(frozen=True)
class TopK(Codec):
    """The largest numbers of each row and their positions; top-k:0.1 keeps a tenth of them."""

    code = 5
    example = "0.1"
    fraction: float = 1.0
    support: bool = field(default=False, kw_only=True)

    @classmethod
    def of(cls, argument: str | None) -> Self:
        """Raises ConfigError unless `argument` is a fraction, with :support or without."""
        if argument is None:
            raise ConfigError("top-k needs the fraction that is kept, e.g. top-k:0.1")
        text = argument.removesuffix(SUPPORT)
        return cls(fraction_of(text, "top-k:0.1"), support=text != argument)

    @property
    def argument(self) -> str:
        """The fraction, with :support or without."""
        return repr(self.fraction) + SUPPORT * self.support

    @property
    def gradient_on_support(self) -> bool:
        """As asked for."""
        return self.support

    def row_by_row(self, dimensions: int) -> bool:
        """Always."""
        return True

    def size(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """k numbers and k positions per row."""
        rows, k, position = self._kept(shape)
        return rows * k * (dtype.itemsize + position.itemsize)

    def write(self, x: Tensor) -> list[Tensor]:
        """Values [n, k] and their positions [n, k], ascending; NaN and Inf are larger than all numbers."""
        rows, k, position = self._kept(x.shape)
        flat = x.reshape(rows, -1)
        chosen = self.chosen(flat, k)
        # Marking the positions and reading the marks gives them in order, which is faster than sorting.
        mark = torch.zeros(flat.shape, dtype=torch.bool, device=x.device).scatter_(1, chosen, True)
        at = mark.nonzero()[:, 1].view(rows, k)
        return [flat.gather(1, at), at.to(position)]

    def chosen(self, flat: Tensor, k: int) -> Tensor:
        """The positions [n, k], in any order, of the numbers of the rows [n, m] that are sent."""
        return flat.abs().topk(k, sorted=False).indices

    def read(self, payload: memoryview, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The inverse of `write`: dropped numbers are zero."""
        rows, k, position = self._kept(shape)
        m, stop = math.prod(shape[1:]), rows * k * dtype.itemsize
        values = as_tensor(payload[:stop], (rows, k), dtype)
        at = as_tensor(payload[stop:], (rows, k), position).long()
        if int(at.min()) < 0 or int(at.max()) >= m or not bool((at.diff(dim=1) > 0).all()):
            raise WireError(
                f"positions of a {self} tensor are not in order or beyond a row's {m} numbers: the message was damaged "
                "on its way"
            )
        return torch.zeros(rows, m, dtype=dtype).scatter_(1, at, values).view(tuple(shape))

    def bound(self, x: Tensor) -> Tensor:
        """The smallest kept number: dropped numbers are not larger."""
        rows, k, _ = self._kept(x.shape)
        flat = x.double().abs().view(rows, -1)
        kept = flat.topk(k).values[:, -1:] if k < flat.shape[1] else torch.zeros(rows, 1, dtype=torch.float64)
        return kept.view(rows, *[1] * (x.dim() - 1)) if x.dim() else kept.view(())

    def _kept(self, shape: Sequence[int]) -> tuple[int, int, torch.dtype]:
        """(rows, k, the type of a position). A tensor without dimensions is one row; a row has at least one number."""
        rows = shape[0] if shape else 1
        m = math.prod(shape[1:])
        return rows, min(m, math.ceil(self.fraction * m)), torch.uint16 if m <= 1 << 16 else torch.int32
