"""Linear layers whose weights differ from client to client: forward and backward, for all clients of a group at once.

The gradient of a linear layer's stacked weight is as large as the weight: at small batches, writing and reading it
costs more than computing it. If the optimiser's rule allows it, a backward pass here leaves the two factors of that
gradient instead (`Factors`), and the step multiplies them directly into the weight.

Shape legend: c clients in the group, b rows each, i inputs, o outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_NEAR = 1 << 20  # bytes that stay in a core's cache anyway


@dataclass(frozen=True)
class Factors:
    """A stacked weight's gradient [c, o, i] as a product: g^T x, with g [c, rows, o] and x [c, rows, i]."""

    g: Tensor
    x: Tensor

    @property
    def device(self) -> torch.device:
        """The device of the factors."""
        return self.g.device

    @property
    def bound(self) -> Tensor:
        """The product of the factors' norms: an upper bound of the norm of the product that is much cheaper."""
        bound: Tensor = torch.linalg.vector_norm(self.g.detach()) * torch.linalg.vector_norm(self.x.detach())
        return bound

    def product(self) -> Tensor:
        """The gradient itself: [c, o, i]."""
        return torch.bmm(self.g.transpose(1, 2), self.x.detach())

    def product_of(self, clients: slice, into: Tensor, *, add: bool = False) -> None:
        """The gradient of these clients, written to (or added to) `into` [c', o, i], which is contiguous."""
        g, x = self.g[clients].to(into.dtype), self.x[clients].detach().to(into.dtype)
        if add:
            into.baddbmm_(g.transpose(1, 2), x)
        else:
            torch.bmm(g.transpose(1, 2), x, out=into)

    def add_to(self, weight: Tensor, keep: float, scale: float) -> None:
        """weight := keep * weight + scale * gradient, in place."""
        g, x = self.g.to(weight.dtype), self.x.to(weight.dtype)
        fetch(weight)
        weight.baddbmm_(g.transpose(1, 2), x, beta=keep, alpha=scale)


Leave = Callable[[Tensor, Factors], None]
"""Takes the factors of the gradient of a stacked weight."""


class Linear(torch.autograd.Function):
    """x [c, rows, i], weight [c, o, i], bias [c, o] or None -> [c, rows, o].

    `alike`: all weights are equal, so one product computes all rows. With `leave`, the weight's gradient is left there
    as factors.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, alike: bool, leave: Leave | None) -> Tensor:
        """One batched product."""
        if (narrow := autocast(x)) is not None:
            x = x.to(narrow)
        ctx.x, ctx.weight, ctx.alike, ctx.leave = x, weight, alike, leave
        w, shift = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        if alike:
            return functional.linear(x, w[0], None if shift is None else shift[0])
        fetch(w)
        if shift is None:
            return torch.bmm(x, w.transpose(1, 2))
        return torch.baddbmm(shift.unsqueeze(1), x, w.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        """Gradients of the input, of the weight (or its factors), of the bias."""
        (g,) = gradients
        x, weight = ctx.x, ctx.weight
        ctx.x = ctx.weight = None  # the graph is walked once
        by_x = by_weight = by_bias = None
        if ctx.needs_input_grad[0]:
            w = weight.to(g.dtype)
            if ctx.alike:
                by_x = torch.matmul(g, w[0])
            else:
                fetch(w)
                by_x = torch.bmm(g, w)
        if ctx.needs_input_grad[1]:
            if ctx.leave is not None:
                ctx.leave(weight, Factors(g, x))
            else:
                by_weight = torch.bmm(g.transpose(1, 2), x).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            by_bias = g.sum(1, dtype=weight.dtype)
        return by_x, by_weight, by_bias, None, None


def fetch(weight: Tensor) -> None:
    """Read weights that have left the cache once in order, since products of small matrices fetch them slowly."""
    if weight.nbytes > _NEAR and weight.device.type == "cpu":
        weight.sum()


def autocast(x: Tensor) -> torch.dtype | None:
    """The type in which automatic mixed precision computes products here; None if it is off."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
