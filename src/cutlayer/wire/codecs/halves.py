"""Numbers in two bytes: bfloat16 and float16.

A number x is received with an error of about |x| / 2^8 (bfloat16) or |x| / 2^11 (float16). A finite number beyond the
largest one (65504 in float16) becomes that one. NaN stays where it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from cutlayer.wire.codecs.writing import Codec, as_tensor, codec


class Half(Codec):
    """Numbers of 4 bytes or more, written in a type of 2 bytes."""

    half: ClassVar[torch.dtype]

    def applies(self, dtype: torch.dtype) -> bool:
        """To floating point types of 4 bytes and more."""
        return dtype.is_floating_point and dtype.itemsize >= 4

    def row_by_row(self, dimensions: int) -> bool:
        """Always: each number is written by itself."""
        return True

    def size(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """2 bytes per number."""
        return 2 * math.prod(shape)

    def write(self, x: Tensor) -> list[Tensor]:
        """x in 2 bytes; a finite number beyond the largest one becomes that one, not Inf."""
        y, largest = x.to(self.half), torch.finfo(self.half).max
        if torch.isfinite(y.sum(dtype=torch.float32)):  # the usual case, and fast to check
            return [y]
        return [torch.where(torch.isfinite(x), x.clamp(-largest, largest), x).to(self.half)]

    def read(self, payload: memoryview, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Converted back to the type that was sent."""
        return as_tensor(payload, shape, self.half).to(dtype)

    def bound(self, x: Tensor) -> Tensor:
        """Half a unit in the last place, or the distance to the largest number."""
        size, half = x.double().abs(), torch.finfo(self.half)
        rounding = size * (half.eps / 2 * 1.01) + max(half.tiny * half.eps, torch.finfo(torch.float32).tiny)
        return torch.where(size > half.max, size - half.max, rounding)


@codec("bfloat16")
class BFloat16(Half):
    """2 bytes per number, with the range of float32: error about 0.4 %."""

    code = 1
    half = torch.bfloat16


@codec("float16")
class Float16(Half):
    """2 bytes per number, up to 65504: error about 0.05 %."""

    code = 2
    half = torch.float16
