"""The common form of codecs with one byte per number: scales, then the numbers in units of their scale.

Scales are float32 (float64 for float64 tensors). A group of numbers has one scale, computed from the largest of them.
If that is below 2^10 times the smallest normal number (1.2e-35 in float32), zeros are sent. NaN and Inf go through the
group.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from cutlayer.wire.codecs.writing import Codec, as_tensor

_NEGLIGIBLE = 1024  # in smallest normal numbers: scales from smaller numbers would lose digits, or be flushed to zero


class ScaledCodec(Codec):
    """Scales, then one byte per number: one scale per row, or one in all for a tensor of one dimension."""

    largest: ClassVar[float]
    """Slightly more than the largest code: the largest number divided by its scale must not round up beyond it, and the
    product on the other side must not overflow.
    """

    def row_by_row(self, dimensions: int) -> bool:
        """If each row has a scale."""
        return dimensions > 1

    def groups(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the scales, which broadcasts to that of the tensor."""
        rows = shape[:1] if len(shape) > 1 else (1,) * len(shape)
        return (*rows, *[1] * (len(shape) - len(rows)))

    def size(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Scales, then 1 byte per number."""
        return math.prod(self.groups(shape)) * computed_in(dtype).itemsize + math.prod(shape)

    def write(self, x: Tensor) -> list[Tensor]:
        """Scales, and numbers in units of them."""
        x = x.to(computed_in(x.dtype))
        scale = self.scale(x)
        return [scale, self.coded(x / torch.where(scale == 0, 1, scale), scale)]

    def read(self, payload: memoryview, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Numbers times their scales."""
        groups, computed = self.groups(shape), computed_in(dtype)
        stop = math.prod(groups) * computed.itemsize
        scale = as_tensor(payload[:stop], groups, computed)
        return self.decoded(as_tensor(payload[stop:], shape, torch.int8), scale).to(dtype)

    def scale(self, x: Tensor) -> Tensor:
        """Scales: NaN or Inf if one of the numbers is, 0 if all are negligible."""
        largest = self.maxima(x.abs())
        scale = largest / self.largest
        return scale.masked_fill_(largest < _NEGLIGIBLE * torch.finfo(x.dtype).tiny, 0)

    def maxima(self, sizes: Tensor) -> Tensor:
        """The largest number of each group, in the shape of the scales."""
        largest = sizes.flatten(1).amax(1) if sizes.dim() > 1 else sizes.amax()
        return largest.view(self.groups(sizes.shape))

    def bound(self, x: Tensor) -> Tensor:
        """The error of the coding, plus that of rounding to the tensor's own type."""
        computed = computed_in(x.dtype)
        own, info = torch.finfo(x.dtype), torch.finfo(computed)
        size, scale = x.double().abs(), self.scale(x.to(computed)).double()
        return self.coding_error(size, scale) + size * own.eps * 2 + own.tiny * own.eps + _NEGLIGIBLE * info.tiny

    @abstractmethod
    def coded(self, q: Tensor, scale: Tensor) -> Tensor:
        """Numbers q in units of their scale, in one byte each; q may be changed in place."""

    @abstractmethod
    def decoded(self, q: Tensor, scale: Tensor) -> Tensor:
        """Bytes q times their scales, which may be changed in place."""

    @abstractmethod
    def coding_error(self, size: Tensor, scale: Tensor) -> Tensor:
        """An upper bound on the distance of a number of this size from the value of its byte."""


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The type of a tensor's scales."""
    return torch.float64 if dtype == torch.float64 else torch.float32
