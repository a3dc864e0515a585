"""The operations whose weights differ from client to client: forward and backward, for all clients of a group at once.

The gradient of a linear layer's stacked weight is as large as the weight: at small batches, writing it and reading it
again costs more than computing it. Where the optimiser's rule allows it, a backward pass here leaves the two factors of
that gradient instead (`Factors`), and the step multiplies them right into the weight.

Shape legend: c clients in the group, b rows each, n = c * b, i inputs, o outputs, l positions of an image, k*k kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cutlayer.types import channels_last

Pair = tuple[int, int]

_NEAR = 1 << 20  # bytes that stay close to a core anyway


@dataclass(frozen=True)
class Factors:
    """A stacked weight's gradient [c, o, i] as a product: g^T x, with g [c, rows, o] and x [c, rows, i]."""

    g: Tensor
    x: Tensor

    @property
    def device(self) -> torch.device:
        """Where the factors are."""
        return self.g.device

    @property
    def bound(self) -> Tensor:
        """No less than the norm of the product, and far cheaper: the product of the factors' norms."""
        bound: Tensor = torch.linalg.vector_norm(self.g.detach()) * torch.linalg.vector_norm(self.x.detach())
        return bound

    def product(self) -> Tensor:
        """The gradient itself: [c, o, i]."""
        return torch.bmm(self.g.transpose(1, 2), self.x.detach())

    def add_to(self, weight: Tensor, keep: float, scale: float) -> None:
        """weight := keep * weight + scale * gradient, in place."""
        g, x = self.g.to(weight.dtype), self.x.to(weight.dtype)
        _fetch(weight)
        weight.baddbmm_(g.transpose(1, 2), x, beta=keep, alpha=scale)


Leave = Callable[[Tensor, Factors], None]
"""Takes the factors of the gradient of a stacked weight."""


class Linear(torch.autograd.Function):
    """x [c, rows, i], weight [c, o, i], bias [c, o] or None -> [c, rows, o].

    `alike`: all weights are equal, so that one product serves all rows. With `leave`, the weight's gradient is left
    there as factors.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, alike: bool, leave: Leave | None) -> Tensor:
        """One batched product."""
        if (narrow := _autocast(x)) is not None:
            x = x.to(narrow)
        ctx.x, ctx.weight, ctx.alike, ctx.leave = x, weight, alike, leave
        w, shift = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        if alike:
            return functional.linear(x, w[0], None if shift is None else shift[0])
        _fetch(w)
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
                _fetch(w)
                by_x = torch.bmm(g, w)
        if ctx.needs_input_grad[1]:
            if ctx.leave is not None:
                ctx.leave(weight, Factors(g, x))
            else:
                by_weight = torch.bmm(g.transpose(1, 2), x).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            by_bias = g.sum(1, dtype=weight.dtype)
        return by_x, by_weight, by_bias, None, None


@dataclass(frozen=True)
class Geometry:
    """Of a two-dimensional convolution; pairs are (vertical, horizontal)."""

    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int

    def columns(self, x: Tensor, clients: int, kernel: Pair) -> tuple[Tensor, Pair]:
        """The inputs under each element of the kernel: [n, i, h, w] -> [c, i*k*k, b*l], and the output's (h', w').

        Shifted copies of whole images: five times as quick as the library's `unfold`.
        """
        (n, inputs, *image), (top, left) = x.shape, self.padding
        size = [
            (image[d] + 2 * self.padding[d] - self.dilation[d] * (kernel[d] - 1) - 1) // self.stride[d] + 1
            for d in (0, 1)
        ]
        padded = functional.pad(x, (left, left, top, top))
        per_client = padded.view(clients, n // clients, inputs, *padded.shape[2:]).transpose(1, 2)
        columns = x.new_empty(clients, inputs, *kernel, n // clients, *size)
        for row in range(kernel[0]):
            for column in range(kernel[1]):
                first = (row * self.dilation[0], column * self.dilation[1])
                spans = [slice(f, f + s * (m - 1) + 1, s) for f, s, m in zip(first, self.stride, size, strict=True)]
                columns[:, :, row, column] = per_client[..., spans[0], spans[1]]
        return columns.view(clients, inputs * kernel[0] * kernel[1], -1), (size[0], size[1])


class ColumnConvolution(torch.autograd.Function):
    """A first layer's convolution, with few inputs and a small kernel, as a batched matrix product.

    x [n, i, h, w], weight [c, o, i, k, k], bias [c, o] or None -> [n, o, h', w'], its memory channels last.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        """Columns, then one product."""
        if (narrow := _autocast(x)) is not None:
            x = x.to(narrow)
        clients, outputs = weight.shape[:2]
        columns, size = geometry.columns(x, clients, (weight.shape[3], weight.shape[4]))
        ctx.columns, ctx.shape, ctx.dtype = columns, weight.shape, weight.dtype
        w = weight.reshape(clients, outputs, -1).transpose(1, 2).to(x.dtype)
        if bias is None:
            y = torch.bmm(columns.transpose(1, 2), w)
        else:
            y = torch.baddbmm(bias.unsqueeze(1).to(x.dtype), columns.transpose(1, 2), w)  # [c, b*l, o]
        return y.view(len(x), *size, outputs).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor | None, Tensor | None, None]:
        """The gradients of weight and bias; the input is data and needs none."""
        (gradient,) = gradients
        columns = ctx.columns
        ctx.columns = None
        g = gradient.permute(0, 2, 3, 1).reshape(len(columns), columns.shape[2], -1)  # [c, b*l, o]
        by_weight = by_bias = None
        if ctx.needs_input_grad[1]:  # this way round: four times as quick as g^T columns^T
            by_weight = torch.bmm(columns, g).transpose(1, 2).reshape(ctx.shape).to(ctx.dtype)
        if ctx.needs_input_grad[2]:
            by_bias = g.sum(1, dtype=ctx.dtype)
        return None, by_weight, by_bias, None


class LoopedConvolution(torch.autograd.Function):
    """A convolution as one dense convolution per client: on the CPU faster than a grouped one of all clients.

    x [n, i, h, w], weight [c, o, i/groups, k, k], bias [c, o] or None -> [n, o, h', w']. `alike`: all weights are
    equal, so that one convolution serves all rows, and the input's gradient too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, alike: bool) -> Tensor:
        """The library's convolution."""
        if (narrow := _autocast(x)) is not None:
            x = x.to(narrow)
        ctx.x, ctx.weight, ctx.geometry, ctx.alike, ctx.biased = x, weight, geometry, alike, bias is not None
        how = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
        w, shift = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        if alike:
            return functional.conv2d(x, w[0], None if shift is None else shift[0], *how)
        size = len(x) // len(weight)
        shifts = [None] * len(weight) if shift is None else shift.unbind(0)
        each = zip(x.split(size), w.unbind(0), shifts, strict=True)
        return torch.cat([functional.conv2d(xi, wi, si, *how) for xi, wi, si in each])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        """Client by client; the input's in one where the weights are alike."""
        x, weight = ctx.x, ctx.weight
        ctx.x = ctx.weight = None
        g = gradients[0].contiguous(memory_format=torch.channels_last if channels_last(x) else torch.contiguous_format)
        w, size = weight.to(x.dtype), len(x) // len(weight)
        at_once = ctx.alike and ctx.needs_input_grad[0]
        by_weights, by_biases = ctx.needs_input_grad[1], ctx.biased and ctx.needs_input_grad[2]
        needs = (ctx.needs_input_grad[0] and not at_once, by_weights, by_biases)
        each = [
            _convolution_backward(gi, xi, wi, ctx.geometry, needs)
            for gi, xi, wi in zip(g.split(size), x.split(size), w.unbind(0), strict=True)
        ]
        by_x = None
        if at_once:
            by_x = _convolution_backward(g, x, w[0], ctx.geometry, (True, False, False))[0]
        elif ctx.needs_input_grad[0]:
            by_x = torch.cat([parts[0] for parts in each])
        by_weight = torch.stack([parts[1] for parts in each]).to(weight.dtype) if by_weights else None
        by_bias = torch.stack([parts[2] for parts in each]).to(weight.dtype) if by_biases else None
        return by_x, by_weight, by_bias, None, None


def _convolution_backward(
    g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The library's gradients of input, weight and bias (those that are needed)."""
    shape = [len(weight)] if needs[2] else None
    stride, padding, dilation = (list(v) for v in (geometry.stride, geometry.padding, geometry.dilation))
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        g, x, weight, shape, stride, padding, dilation, False, [0, 0], geometry.groups, list(needs)
    )
    return found


def _fetch(weight: Tensor) -> None:
    """Bring weights that have left the cache back in one quick sweep: products of small matrices fetch them slowly."""
    if weight.nbytes > _NEAR and weight.device.type == "cpu":
        weight.sum()


def _autocast(x: Tensor) -> torch.dtype | None:
    """The type that automatic mixed precision computes products in here; None where it is off."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
