"""Adds to `torch.func.vmap` what it lacks: dropout, with the masks that each client would draw alone, and embeddings'
padding.

Inside `torch.func.vmap`, nothing may be drawn. So the masks are drawn before, in the order and the layout in which the
module would draw them. One run of a single client finds out which they are, and is remembered for batches of the same
shape.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_ALPHA = 1.7580993408473766  # of SELU, as torch's alpha dropout has it


@dataclass(frozen=True)
class Draw:
    """One mask that a module draws: its sizes and layout, and the probability to drop."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    p: float

    def by(self, generator: torch.Generator) -> Tensor:
        """A mask of zeros and ones from `generator`."""
        mask = torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)
        return mask.bernoulli_(1 - self.p, generator=generator)


class _Replaced(TorchFunctionMode):
    """While active, dropout multiplies with masks from `mask`, and the padding of embeddings is not trained (which vmap
    would do).
    """

    def mask(self, like: Tensor, size: Sequence[int], p: float) -> Tensor:
        """Zeros and ones of this size, for a tensor that loses numbers with probability `p`."""
        raise NotImplementedError

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Replace dropout, also inside torch's attention."""
        handler = _HANDLERS.get(func)
        return func(*args, **(kwargs or {})) if handler is None else handler(self, *args, **(kwargs or {}))


class Listening(_Replaced):
    """Records which masks are drawn, without dropping anything."""

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[Draw] = []

    def mask(self, like: Tensor, size: Sequence[int], p: float) -> Tensor:
        """Ones."""
        own = tuple(size) == tuple(like.shape)
        mask = torch.ones_like(like) if own else like.new_ones(size)
        self.draws.append(Draw(tuple(mask.shape), mask.stride(), mask.dtype, mask.device, p))
        return mask


class Masked(_Replaced):
    """Drops with masks that were drawn before, one after another."""

    def __init__(self, masks: Sequence[Tensor]) -> None:
        super().__init__()
        self._masks: Iterator[Tensor] = iter(masks)

    def mask(self, like: Tensor, size: Sequence[int], p: float) -> Tensor:
        """The next mask."""
        return next(self._masks)


def drawn(draws: Sequence[Draw], generators: Sequence[Callable[[], torch.Generator]]) -> tuple[Tensor, ...]:
    """The masks of all clients, each [c, ...]: client after client, each from its own generator."""
    if not draws:
        return ()
    each = []
    for make in generators:
        generator = make()
        each.append([draw.by(generator) for draw in draws])
    return tuple(torch.stack(masks) for masks in zip(*each, strict=True))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    drop: Callable[[Tensor], Tensor],
) -> Tensor:
    """torch's scaled dot product attention, step by step, with `drop` for its dropout."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    root = math.sqrt(1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)
    weights = (query * root) @ (key.transpose(-2, -1) * root)
    if is_causal:
        attn_mask = torch.ones(weights.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=weights.dtype).masked_fill(~attn_mask, -math.inf)
        weights = weights + attn_mask
    return drop(weights.softmax(-1)) @ value


def _dropout(mode: _Replaced, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or not 0 < p < 1:
        return functional.dropout(input, p, training, inplace)
    return _times(input, mode.mask(input, input.shape, p) / (1 - p), inplace)


def _channels(mode: _Replaced, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or not 0 < p < 1:
        return functional.dropout(input, p, training, inplace)
    size = (*input.shape[:2], *[1] * (input.dim() - 2))
    return _times(input, mode.mask(input, size, p) / (1 - p), inplace)


def _alpha(mode: _Replaced, input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False) -> Tensor:
    if not training or not 0 < p < 1:
        return functional.alpha_dropout(input, p, training, inplace)
    mask = mode.mask(input, input.shape, p)
    a = 1.0 / math.sqrt((_ALPHA * _ALPHA * p + 1) * (1 - p))
    dropped = input * (mask * a) + ((mask - 1) * (_ALPHA * a) + _ALPHA * a * p)
    return input.copy_(dropped) if inplace else dropped


def _times(input: Tensor, factor: Tensor, inplace: bool) -> Tensor:
    return input.mul_(factor) if inplace else input * factor


def _attention(
    mode: _Replaced,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if not dropout_p and query.device.type != "cpu":  # on the CPU, vmap takes its kernel client by client
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    drop: Callable[[Tensor], Tensor] = lambda weights: _dropout(mode, weights, dropout_p)  # noqa: E731
    return attention(query, key, value, attn_mask, is_causal, scale, enable_gqa, drop)


def _embedding(
    mode: _Replaced, input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    found = functional.embedding(input, weight, None, *args, **kwargs)
    if padding_idx is None:
        return found
    return torch.where((input == padding_idx % len(weight)).unsqueeze(-1), found.detach(), found)


_inside = dict(vars(functional))
_inside["has_torch_function"] = lambda tensors: False
_many_heads = types.FunctionType(
    functional.multi_head_attention_forward.__code__,
    _inside,
    argdefs=functional.multi_head_attention_forward.__defaults__,
)


def _attention_of_many_heads(mode: _Replaced, *args: Any, **kwargs: Any) -> Any:
    """torch's own function, whose inner operations this mode also intercepts."""
    with mode:
        return _many_heads(*args, **kwargs)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    functional.dropout: _dropout,
    torch.dropout: _dropout,
    functional.dropout1d: _channels,
    functional.dropout2d: _channels,
    functional.dropout3d: _channels,
    functional.alpha_dropout: _alpha,
    functional.scaled_dot_product_attention: _attention,
    functional.embedding: _embedding,
    functional.multi_head_attention_forward: _attention_of_many_heads,
}
