"""Running C copies of a module, each with its own parameters, as one module on the merged batch.

The module runs ONCE, on the rows of all clients (client after client, b each). Only the operations that touch a
parameter are replaced: a linear layer with stacked weights [c, out, in] becomes a batched matrix product, a convolution
a grouped one, and so on; everything else runs at its native speed on all rows. An operation on a stacked tensor that is
not known here raises NotStackableError, and the caller takes another way.

A module that mixes rows by hand (`x.mean(0)`) would run without an error and wrongly: callers compare with the plain
loop before they trust (`agrees` in `stack.py`).

Shape legend: c clients in the group, b rows each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from cutlayer.engine.pooling import MaxPool2x2, quick

_FEW_CHANNELS = 3  # input channels up to which a convolution is quicker as a matrix product (measured)


class NotStackableError(Exception):
    """An operation that has no stacked form here."""


class Lowered(TorchFunctionMode):
    """While active, operations on the stacked tensors run for all clients at once.

    `stacked` are the parameters and buffers, each [c, ...]; `generators` gives client i's random stream (dropout).
    """

    def __init__(self, clients: int, stacked: Iterable[Tensor], generators: Callable[[int], torch.Generator]) -> None:
        super().__init__()
        self.clients = clients
        self._stacked = {id(t) for t in stacked}
        self._generators = generators
        self._drawn: dict[int, torch.Generator] = {}

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Replace what touches a stacked tensor, or what must differ per client."""
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        touches = any(id(a) in self._stacked for a in (*args, *kwargs.values()))
        if handler is not None and (touches or handler in _ALWAYS):
            return handler(self, *args, **kwargs)
        if quick(func, args, kwargs):
            return MaxPool2x2.apply(args[0])  # type: ignore[no-untyped-call]
        if touches and func not in _HARMLESS:
            raise NotStackableError(f"{getattr(func, '__name__', func)} on a parameter or buffer")
        return func(*args, **kwargs)

    def generator(self, client: int) -> torch.Generator:
        """Client number `client`'s random stream of this forward pass."""
        if client not in self._drawn:
            self._drawn[client] = self._generators(client)
        return self._drawn[client]

    def per_client(self, x: Tensor) -> Tensor:
        """[c * b, ...] -> [c, b, ...]."""
        return x.reshape(self.clients, -1, *x.shape[1:])


def _linear(mode: Lowered, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    x = input.reshape(mode.clients, -1, input.shape[-1])
    if bias is None:
        y = torch.bmm(x, weight.transpose(1, 2))
    else:
        y = torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))
    return y.view(*input.shape[:-1], weight.shape[1])


def _conv(dims: int) -> Callable[..., Tensor]:
    conv = (functional.conv1d, functional.conv2d, functional.conv3d)[dims - 1]

    def handler(
        mode: Lowered,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        if dims == 2 and groups == 1 and weight.shape[2] <= _FEW_CHANNELS and not isinstance(padding, str):
            return _conv_by_columns(mode, input, weight, bias, stride, padding, dilation)
        x = mode.per_client(input).transpose(0, 1)  # [b, c, in, ...]
        merged = x.reshape(x.shape[0], -1, *x.shape[3:])
        y = conv(
            merged,
            weight.reshape(-1, *weight.shape[2:]),
            None if bias is None else bias.reshape(-1),
            stride,
            padding,
            dilation,
            groups * mode.clients,
        )
        y = y.view(x.shape[0], mode.clients, -1, *y.shape[2:])
        return y.transpose(0, 1).reshape(len(input), *y.shape[2:])

    return handler


def _conv_by_columns(
    mode: Lowered, input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any
) -> Tensor:
    """A first layer's convolution as a batched matrix product: faster than a grouped one while columns are short."""
    kernel = weight.shape[3:]
    columns = functional.unfold(input, kernel, dilation, padding, stride)  # [c * b, in * kernel, positions]
    product = torch.matmul(weight.flatten(2).unsqueeze(1), mode.per_client(columns))  # [c, b, out, positions]
    if bias is not None:
        product = product + bias.view(mode.clients, 1, -1, 1)
    sides = [_pair(v) for v in (stride, padding, dilation)]
    size = [
        (input.shape[2 + i] + 2 * sides[1][i] - sides[2][i] * (kernel[i] - 1) - 1) // sides[0][i] + 1 for i in (0, 1)
    ]
    return product.view(len(input), weight.shape[1], *size)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _batch_norm(
    mode: Lowered,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    x = mode.per_client(input).transpose(0, 1)  # [b, c, channels, ...]
    mean, var, scale, shift = (None if t is None else t.reshape(-1) for t in (running_mean, running_var, weight, bias))
    merged = x.reshape(x.shape[0], -1, *x.shape[3:])
    if training and merged.numel() == merged.shape[1]:
        raise ValueError("Expected more than 1 value per channel when training")  # as the layer itself says
    y = functional.batch_norm(merged, mean, var, scale, shift, training, momentum, eps)
    return y.view(x.shape).transpose(0, 1).reshape(input.shape)


def _group_norm(
    mode: Lowered,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    y = functional.group_norm(input, num_groups, None, None, eps)
    return _affine(mode, y, weight, bias, (-1, *[1] * (input.dim() - 2)))


def _layer_norm(
    mode: Lowered,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    y = functional.layer_norm(input, list(normalized_shape), None, None, eps)
    lead = [1] * (input.dim() - len(normalized_shape) - 1)
    return _affine(mode, y, weight, bias, (*lead, *normalized_shape))


def _affine(mode: Lowered, y: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    """y * weight + bias, with each client's own; `shape` is how they broadcast to one row."""
    out = mode.per_client(y)
    if weight is not None:
        out = out * weight.view(mode.clients, 1, *shape)
    if bias is not None:
        out = out + bias.view(mode.clients, 1, *shape)
    return out.view(y.shape)


def _embedding(mode: Lowered, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if any(a not in (None, False, 2.0) for a in (*args, *kwargs.values())):
        raise NotStackableError("embedding with padding, norms or sparse gradients")
    first = torch.arange(mode.clients, device=input.device) * weight.shape[1]
    tokens = mode.per_client(input)
    shifted = tokens + first.view(-1, *[1] * (tokens.dim() - 1))
    return functional.embedding(shifted.view(input.shape), weight.reshape(-1, weight.shape[2]))


def _dropout(mode: Lowered, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Every client draws its own mask, the one that it would draw alone."""
    if not training or p == 0.0:
        return input
    if inplace:
        raise NotStackableError("dropout in place")
    x = mode.per_client(input)
    keep = torch.empty_like(x, memory_format=torch.contiguous_format)
    for client in range(mode.clients):
        keep[client].bernoulli_(1 - p, generator=mode.generator(client))
    return (x * keep.div_(1 - p)).view(input.shape)


_HANDLERS: dict[Any, Callable[..., Tensor]] = {
    functional.linear: _linear,
    functional.conv1d: _conv(1),
    functional.conv2d: _conv(2),
    functional.conv3d: _conv(3),
    functional.batch_norm: _batch_norm,
    functional.group_norm: _group_norm,
    functional.layer_norm: _layer_norm,
    functional.embedding: _embedding,
    functional.dropout: _dropout,
}
_ALWAYS = {_dropout, _batch_norm}  # these mix rows or draw: they must know the clients even without parameters

_Tensor: Any = torch.Tensor  # typed loosely: its properties are asked for as functions

# Reading a property of a stacked tensor, and batch normalisation's counter, which is one number per client.
_HARMLESS = {
    torch.Tensor.add_,
    _Tensor.requires_grad.__get__,
    _Tensor.dtype.__get__,
    _Tensor.device.__get__,
    _Tensor.is_cuda.__get__,
}
