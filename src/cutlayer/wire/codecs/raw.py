"""Tensors as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cutlayer.wire.codecs.writing import Codec, as_it_is, codec


@codec("raw")
class AsIs(Codec):
    """The numbers as they are in memory, without loss."""

    code = 0
    lossy = False

    def applies(self, dtype: torch.dtype) -> bool:
        """To nothing: every tensor is written as it is."""
        return False

    def row_by_row(self, dimensions: int) -> bool:
        """Always."""
        return True

    def size(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """The tensor's own bytes."""
        return torch.Size(shape).numel() * dtype.itemsize

    def write(self, x: Tensor) -> list[Tensor]:
        """The tensor itself."""
        return [x]

    def read(self, payload: memoryview, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The tensor itself."""
        return as_it_is(payload, shape, dtype)

    def bound(self, x: Tensor) -> Tensor:
        """No error."""
        return torch.zeros((), dtype=torch.float64)


RAW: Codec = AsIs()
