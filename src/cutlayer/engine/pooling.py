"""Max pooling by two as elementwise maxima: the library's result and gradient, ties included, two or three times as
quick on the CPU where channels come first, or are few.

The library compares number by number, and the processor guesses wrongly half of the time; it keeps 8 bytes of an index
for every output, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cutlayer.types import channels_last

_MANY = 12  # channels from which the library is quicker where they come last (measured)


def pool_by_two(x: Tensor) -> Tensor:
    """`max_pool1d(x, 2)` of [n, i, l], or `max_pool2d(x, 2)` of [n, i, h, w]."""
    if x.dim() == 3 and x.device.type == "cpu":
        line: Tensor = PoolPairs.apply(x, -1)  # type: ignore[no-untyped-call]
        return line
    if x.dim() == 4 and x.device.type == "cpu" and not (channels_last(x) and x.shape[1] >= _MANY):
        wide = PoolPairs.apply(x, -1)  # type: ignore[no-untyped-call]
        pooled: Tensor = PoolPairs.apply(wide, -2)  # type: ignore[no-untyped-call]
        return pooled
    return (functional.max_pool1d if x.dim() == 3 else functional.max_pool2d)(x, 2)


class PoolPairs(torch.autograd.Function):
    """The larger of two neighbours in a dimension, the last of an odd number left out. Of equal ones the first gets the
    gradient: along rows and then along columns, that is the first in reading order, as in the library.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        """[..., l, ...] -> [..., l // 2, ...]."""
        first, second = _pairs(x, dim)
        y = torch.maximum(first, second)
        ctx.x, ctx.y, ctx.dim = x, y, dim
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """To the larger one."""
        (g,) = gradients
        x, y, dim = ctx.x, ctx.y, ctx.dim
        ctx.x = ctx.y = None  # the graph is walked once
        by_x = torch.empty_like(x) if x.shape[dim] % 2 == 0 else torch.zeros_like(x)
        first, second = _pairs(by_x, dim)
        torch.mul(g, _pairs(x, dim)[0] == y, out=first)
        torch.sub(g, first, out=second)
        return by_x, None


def _pairs(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The numbers at even and at odd places."""
    length = x.shape[dim] // 2 * 2
    if dim == -1:
        return x[..., 0:length:2], x[..., 1:length:2]
    return x[..., 0:length:2, :], x[..., 1:length:2, :]
