"""Floating point numbers of one byte: float8, with 4 bits of exponent and 3 of mantissa (e4m3).

There is one scale per row, one in all for [n]. A number is received with an error of about |x| / 2^4 + max |x| / 2^19
over its row. NaN and Inf go through the row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cutlayer.wire.codecs.scaled import ScaledCodec
from cutlayer.wire.codecs.writing import codec


@codec("float8", paper="arXiv 2209.05433")
class Float8(ScaledCodec):
    """1 byte per number (e4m3) and a scale per row: error about 6 %."""

    code = 4
    largest = 448.001

    def coded(self, q: Tensor, scale: Tensor) -> Tensor:
        """In torch's own type."""
        return q.to(torch.float8_e4m3fn)

    def decoded(self, q: Tensor, scale: Tensor) -> Tensor:
        """The sign, 4 bits of exponent and 3 of mantissa, put where float16 has them: 2^-8 of the number. (The types'
        own conversion takes many times as long.)
        """
        bits = q.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~(1 << 14))
        return bits.view(torch.float16).to(scale.dtype).mul_(scale.mul_(256))

    def coding_error(self, size: Tensor, scale: Tensor) -> Tensor:
        """Half a unit in the last place, or half the smallest step."""
        return size * (1.001 / 16) + scale * (1.001 / 1024)
