"""Whole numbers of one byte: int8.

There is one scale per channel for [n, c, ...] with more than two dimensions, one per row for [n, m], one in all for
[n]. A number is received with an error of half a scale: max |x| / 254 over its group. NaN and Inf go through the group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cutlayer.wire.codecs.scaled import ScaledCodec
from cutlayer.wire.codecs.writing import codec


@codec("int8")
class Int8(ScaledCodec):
    """1 byte per number and a scale per channel: error at most max |x| / 254 over the channel."""

    code = 3
    largest = 127.0001

    def row_by_row(self, dimensions: int) -> bool:
        """For [n, m]; more dimensions have a scale per channel, which all rows share."""
        return dimensions == 2

    def groups(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Channels, if there are more than two dimensions."""
        return (1, shape[1], *[1] * (len(shape) - 2)) if len(shape) > 2 else super().groups(shape)

    def maxima(self, sizes: Tensor) -> Tensor:
        """Over all dimensions but the channels'."""
        if sizes.dim() <= 2:
            return super().maxima(sizes)
        return sizes.amax([d for d in range(sizes.dim()) if d != 1], keepdim=True)

    def coded(self, q: Tensor, scale: Tensor) -> Tensor:
        """Rounded."""
        q = q if torch.isfinite(scale).all() else q.nan_to_num(0, 0, 0)  # there is no integer for NaN
        return q.round_().to(torch.int8)

    def decoded(self, q: Tensor, scale: Tensor) -> Tensor:
        """The product."""
        return q.to(scale.dtype).mul_(scale)

    def coding_error(self, size: Tensor, scale: Tensor) -> Tensor:
        """Half a scale."""
        return 0.5001 * scale
