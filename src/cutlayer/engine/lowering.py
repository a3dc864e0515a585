"""Running C copies of a module, each with its own parameters, as one module on the merged batch.

The module runs ONCE, on the rows of all clients (client after client, b each). Only the operations that touch a
parameter are replaced: a linear layer with stacked weights [c, out, in] becomes a batched matrix product, and so on
(`kernels.py`); everything else runs at its native speed on all rows. An operation on a stacked tensor that is not known
here raises NotStackableError, and the caller uses another way.

A module that mixes rows itself (`x.mean(0)`) would run without an error but give wrong results, so callers first
compare it with the plain loop (`proof.py`).

Shape legend: c clients in the group, b rows each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from cutlayer.engine.convolutions import Form, forms, rule
from cutlayer.engine.kernels import Leave, Linear
from cutlayer.engine.mapping import attention

# Measured on the CPU: from so many numbers per client on, batch normalisation is quicker client by client than merged
# (no transposed copy).
_LARGE_INPUT = 1 << 14


EMBEDDING = "an embedding with norms, frequencies or sparse gradients"


Choose = Callable[[Mapping[str, Form], str, Tensor, Tensor, Tensor | None], str]
"""(possible forms, the default, x, weight, bias) -> the form to use."""


class NotStackableError(Exception):
    """An operation that has no stacked form here; `name` is the parameter or buffer that it uses, if any."""

    def __init__(self, operation: str, name: str = "") -> None:
        super().__init__(operation)
        self.operation, self.name = operation, name


class Lowered(TorchFunctionMode):
    """While active, operations on the stacked tensors run for all clients at once.

    `stacked` are the parameters and buffers by name, each [c, ...]; `generators` gives client i's random stream
    (dropout); `alike` says that all clients' parameters are equal; `frozen` are those that all clients share, which are
    not stacked; `channels_last` is the memory layout of images; `leave` receives gradients as factors. `chosen` are the
    forms of operations, by the name of their weight; `choose` decides missing ones.
    """

    def __init__(
        self,
        clients: int,
        stacked: Mapping[str, Tensor],
        generators: Callable[[int], torch.Generator],
        *,
        alike: bool = False,
        frozen: Sequence[Tensor] = (),
        channels_last: bool = False,
        leave: Leave | None = None,
        chosen: dict[str, str] | None = None,
        choose: Choose | None = None,
    ) -> None:
        super().__init__()
        self.clients, self.alike, self.leave = clients, alike, leave
        self._chosen, self._choose = {} if chosen is None else chosen, choose
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self._stacked = {id(t): name for name, t in stacked.items()}
        self._frozen = {id(t) for t in frozen}
        self._generators = generators
        self._drawn: dict[int, torch.Generator] = {}

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Replace operations that use a stacked tensor, or that must differ per client."""
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None and handler in _ALWAYS:
            return self._handled(handler, args, kwargs)
        if func in _VALUES:
            raise NotStackableError("control flow that depends on values")
        if (touched := self._touched(args, kwargs)) and func not in _HARMLESS:
            if handler is not None:
                return self._handled(handler, args, kwargs)
            raise NotStackableError(getattr(func, "__name__", str(func)), touched)
        return func(*args, **kwargs)

    def _handled(self, handler: Callable[..., Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """The result of a handler; a frozen tensor beside stacked ones is the same for every client."""

        def spread(a: Any) -> Any:
            return a.unsqueeze(0).expand(self.clients, *a.shape) if id(a) in self._frozen else a

        return handler(self, *map(spread, args), **{name: spread(a) for name, a in kwargs.items()})

    def _touched(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """The name of a stacked tensor among the arguments, also in lists (an LSTM's weights); empty if there
        is none.
        """
        for a in (*args, *kwargs.values()):
            if id(a) in self._stacked:
                return self._stacked[id(a)]
            if isinstance(a, (list, tuple)) and (name := self._touched(a, {})):
                return name
        return ""

    def generator(self, client: int) -> torch.Generator:
        """Client number `client`'s random stream of this forward pass."""
        if client not in self._drawn:
            self._drawn[client] = self._generators(client)
        return self._drawn[client]

    def computed(
        self, possible: Mapping[str, Form], otherwise: str, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """The operation on `weight` in its chosen form, or in the form `otherwise` if none was chosen."""
        name = self._stacked.get(id(weight), "")
        if self._choose is not None and name and name not in self._chosen:
            self._chosen[name] = self._choose(possible, otherwise, x, weight, bias)
        chosen = self._chosen.get(name, otherwise)
        return possible.get(chosen, possible[otherwise])(x, weight, bias)

    def per_client(self, x: Tensor) -> Tensor:
        """[c * b, ...] -> [c, b, ...]."""
        return x.reshape(self.clients, -1, *x.shape[1:])


def _linear(mode: Lowered, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    x = input.reshape(mode.clients, -1, input.shape[-1])
    y: Tensor = Linear.apply(x, weight, bias, mode.alike, mode.leave)  # type: ignore[no-untyped-call]
    return y.view(*input.shape[:-1], weight.shape[1])


def _conv(
    mode: Lowered,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    x = input.contiguous(memory_format=mode.layout) if input.dim() == 4 else input
    possible = forms(x, weight, stride, padding, dilation, groups, alike=mode.alike)
    last = mode.layout is torch.channels_last
    y = mode.computed(possible, rule(possible, weight, last), x, weight, bias)
    return y.contiguous(memory_format=mode.layout) if y.dim() == 4 else y


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
    channels = input.shape[1]
    if training and mode.clients * channels == input.numel():
        raise ValueError("Expected more than 1 value per channel when training")  # as the layer itself says
    stacked = (running_mean, running_var, weight, bias)
    if input.device.type == "cpu" and input.numel() >= _LARGE_INPUT * mode.clients:
        rows = input.split(len(input) // mode.clients)
        each = zip(rows, *(_each(t, mode.clients) for t in stacked), strict=True)
        return torch.cat([functional.batch_norm(x, m, v, w, b, training, momentum, eps) for x, m, v, w, b in each])
    x = mode.per_client(input).transpose(0, 1)  # [b, c, channels, ...]
    mean, var, scale, shift = (None if t is None else t.reshape(-1) for t in stacked)
    merged = x.reshape(x.shape[0], -1, *x.shape[3:])
    y = functional.batch_norm(merged, mean, var, scale, shift, training, momentum, eps)
    return y.view(x.shape).transpose(0, 1).reshape(input.shape)


def _each(stacked: Tensor | None, clients: int) -> Sequence[Tensor | None]:
    """Every client's own."""
    return [None] * clients if stacked is None else stacked.unbind(0)


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
    return out.reshape(y.shape)


def _embedding(
    mode: Lowered,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise NotStackableError(EMBEDDING)
    first = torch.arange(mode.clients, device=input.device) * weight.shape[1]
    tokens = mode.per_client(input)
    shifted = tokens + first.view(-1, *[1] * (tokens.dim() - 1))
    found = functional.embedding(shifted.view(input.shape), weight.reshape(-1, weight.shape[2]))
    if padding_idx is None:
        return found
    padding = (input == padding_idx % weight.shape[1]).unsqueeze(-1)
    return torch.where(padding, found.detach(), found)  # padding is not trained


def _dropout(mode: Lowered, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Every client draws its own mask, the same as it would draw alone."""
    if not training or p == 0.0:
        return input
    return _drop(mode, input, input.shape, p, inplace)


def _channel_dropout(
    mode: Lowered, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """The same for whole channels."""
    if not training or p == 0.0:
        return input
    return _drop(mode, input, (*input.shape[:2], *[1] * (input.dim() - 2)), p, inplace)


def _drop(mode: Lowered, input: Tensor, mask: Sequence[int], p: float, inplace: bool) -> Tensor:
    if inplace:
        raise NotStackableError("dropout in place")
    keep = torch.empty(mask, dtype=input.dtype, device=input.device)
    for client, mine in enumerate(mode.per_client(keep)):
        mine.bernoulli_(1 - p, generator=mode.generator(client))
    return input * keep.div_(1 - p)


def _attention(
    mode: Lowered,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention has no parameters here; only its dropout must know the clients."""
    if not dropout_p:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    drop: Callable[[Tensor], Tensor] = lambda weights: _drop(mode, weights, weights.shape, dropout_p, False)  # noqa: E731
    return attention(query, key, value, attn_mask, is_causal, scale, enable_gqa, drop)


_HANDLERS: dict[Any, Callable[..., Tensor]] = {
    functional.linear: _linear,
    functional.conv1d: _conv,
    functional.conv2d: _conv,
    functional.conv3d: _conv,
    functional.batch_norm: _batch_norm,
    functional.group_norm: _group_norm,
    functional.layer_norm: _layer_norm,
    functional.embedding: _embedding,
    functional.dropout: _dropout,
    functional.dropout1d: _channel_dropout,
    functional.dropout2d: _channel_dropout,
    functional.dropout3d: _channel_dropout,
    functional.scaled_dot_product_attention: _attention,
}
_ALWAYS = {
    _dropout,
    _channel_dropout,
    _batch_norm,
    _attention,
}  # these mix rows or draw: they must know the clients even without parameters

_Tensor: Any = torch.Tensor  # typed loosely: its properties are asked for as functions

# Turning values into Python's numbers: what follows depends on them, and clients differ.
_VALUES = {_Tensor.__bool__, _Tensor.__int__, _Tensor.__float__, _Tensor.__index__, _Tensor.item, _Tensor.tolist}

# Reading a property of a stacked tensor, and batch normalisation's counter, which is one number per client.
_HARMLESS = {
    torch.Tensor.add_,
    _Tensor.requires_grad.__get__,
    _Tensor.dtype.__get__,
    _Tensor.device.__get__,
    _Tensor.is_cuda.__get__,
}
