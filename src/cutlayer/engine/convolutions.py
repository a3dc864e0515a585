"""Convolutions whose kernels differ from client to client: several ways to compute the same for a group of clients.

The fastest depends on shapes, on the memory layout of images and on the processor: `tuning.py` tries them.

Shape legend: c clients in the group, b rows each, n = c * b, i inputs, o outputs, s... the size of an image (1, 2 or 3
numbers), s'... that of the output, l its positions, k... the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cutlayer.engine.kernels import autocast
from cutlayer.types import channels_last

Form = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""One way to compute a convolution: x [n, i, s...], weight [c, o, i/groups, k...], bias [c, o] or None ->
[n, o, s'...]."""

# Measured on the CPU: as a matrix product, a convolution of so few inputs under a kernel and so many outputs is the
# quickest where channels come last.
_FEW_INPUTS, _MANY_OUTPUTS = 9, 12


@dataclass(frozen=True)
class Geometry:
    """Of a convolution; one number for each dimension of an image."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, dims: int, stride: Any, padding: Any, dilation: Any, groups: int) -> Geometry:
        """From the arguments of torch's functions: one number applies to all dimensions."""
        one, two, three = (
            (v,) * dims if isinstance(v, int) else (*v,) * (dims // len(v)) for v in (stride, padding, dilation)
        )
        return cls(one, two, three, groups)

    def columns(self, x: Tensor, clients: int, kernel: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
        """The inputs under each element of the kernel: [n, i, h, w] -> [c, i*k*k, b*l], and the output's (h', w').

        Shifted copies of whole images: five times as fast as the library's `unfold`.
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


def forms(
    x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int, *, alike: bool = False
) -> Mapping[str, Form]:
    """The ways, by name, in which this convolution can be computed here; `alike`: all clients' kernels are equal."""
    dims = weight.dim() - 3
    grouped = partial(_grouped, dims=dims, how=(stride, padding, dilation), groups=groups)
    if x.device.type != "cpu" or isinstance(padding, str):
        return {"grouped": grouped}
    geometry = Geometry.of(dims, stride, padding, dilation, groups)
    found: dict[str, Form] = {"dense": partial(_dense, geometry=geometry, alike=alike), "grouped": grouped}
    if dims == 2 and groups == 1 and not x.requires_grad:
        found["columns"] = partial(_columns, geometry=geometry)
    return found


def rule(possible: Mapping[str, Form], weight: Tensor, last: bool) -> str:
    """The form that is used if none was measured; `last`: images have their channels last in memory."""
    inputs, outputs = weight[0, 0].numel(), weight.shape[1]
    if "columns" in possible and last and inputs <= _FEW_INPUTS and outputs >= _MANY_OUTPUTS:
        return "columns"
    return "dense" if "dense" in possible else "grouped"


def _columns(x: Tensor, weight: Tensor, bias: Tensor | None, *, geometry: Geometry) -> Tensor:
    made: Tensor = ColumnConvolution.apply(x, weight, bias, geometry)  # type: ignore[no-untyped-call]
    return made


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None, *, geometry: Geometry, alike: bool) -> Tensor:
    made: Tensor = DenseConvolution.apply(x, weight, bias, geometry, alike)  # type: ignore[no-untyped-call]
    return made


def _grouped(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, dims: int, how: tuple[Any, Any, Any], groups: int
) -> Tensor:
    """All clients' channels beside each other, as groups of one convolution."""
    clients = len(weight)
    conv = (functional.conv1d, functional.conv2d, functional.conv3d)[dims - 1]
    apart = x.reshape(clients, -1, *x.shape[1:]).transpose(0, 1)  # [b, c, i, s...]
    merged = apart.reshape(apart.shape[0], -1, *apart.shape[3:])
    shift = None if bias is None else bias.reshape(-1)
    y = conv(merged, weight.reshape(-1, *weight.shape[2:]), shift, *how, groups * clients)
    y = y.view(apart.shape[0], clients, -1, *y.shape[2:])
    return y.transpose(0, 1).reshape(len(x), *y.shape[2:])


class ColumnConvolution(torch.autograd.Function):
    """A first layer's convolution, with few inputs and a small kernel, as a batched matrix product.

    x [n, i, h, w], weight [c, o, i, k, k], bias [c, o] or None -> [n, o, h', w'], its memory channels last.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        """Columns, then one product."""
        if (narrow := autocast(x)) is not None:
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
        if ctx.needs_input_grad[1]:  # in this order: four times as fast as g^T columns^T
            by_weight = torch.bmm(columns, g).transpose(1, 2).reshape(ctx.shape).to(ctx.dtype)
        if ctx.needs_input_grad[2]:
            by_bias = g.sum(1, dtype=ctx.dtype)
        return None, by_weight, by_bias, None


class DenseConvolution(torch.autograd.Function):
    """A convolution as the library's own, client by client.

    x [n, i, s...], weight [c, o, i/groups, k...], bias [c, o] or None -> [n, o, s'...]. `alike`: all weights are equal,
    so one convolution computes all rows, and also the input's gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, alike: bool) -> Tensor:
        """The library's convolution."""
        if (narrow := autocast(x)) is not None:
            x = x.to(narrow)
        ctx.x, ctx.weight, ctx.geometry, ctx.alike, ctx.biased = x, weight, geometry, alike, bias is not None
        w, shift = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        if alike:
            return _convolution(x, w[0], None if shift is None else shift[0], geometry)
        size = len(x) // len(weight)
        shifts = [None] * len(weight) if shift is None else shift.unbind(0)
        each = zip(x.split(size), w.unbind(0), shifts, strict=True)
        return torch.cat([_convolution(xi, wi, si, geometry) for xi, wi, si in each])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        """Client by client; the input's gradient in one convolution if the weights are equal."""
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
        by_weight = _stacked_as([parts[1] for parts in each], weight) if by_weights else None
        by_bias = torch.stack([parts[2] for parts in each]).to(weight.dtype) if by_biases else None
        return by_x, by_weight, by_bias, None, None


def _stacked_as(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """[...] each -> [c, ...], in the type and memory layout of `like`."""
    if parts[0].dtype != like.dtype:
        parts = [part.to(like.dtype) for part in parts]
    return torch.stack(list(parts), out=torch.empty_like(like))


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The library's convolution of one client's rows."""
    g = geometry
    return torch.convolution(x, weight, bias, g.stride, g.padding, g.dilation, False, (0,) * len(g.stride), g.groups)


def _convolution_backward(
    g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The library's gradients of input, weight and bias (only the needed ones)."""
    shape = [len(weight)] if needs[2] else None
    stride, padding, dilation = (list(v) for v in (geometry.stride, geometry.padding, geometry.dilation))
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        g, x, weight, shape, stride, padding, dilation, False, [0] * len(stride), geometry.groups, list(needs)
    )
    return found
