"""A frozen base in bfloat16: half the memory, with products in the type of the inputs.

A layer keeps its frozen weight in bfloat16 and converts it when it is used, in the forward pass and again in the
backward pass, so that no converted copy outlives a product. In mixed precision (`precision = "bfloat16"`) nothing is
converted at all. torch's own operations would keep a converted weight of every layer until the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

HALF = torch.bfloat16
_LINEAR, _ROWS = "cutlayer::half_linear", "cutlayer::half_rows"


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _rows(weight: Tensor, ids: Tensor) -> Tensor:
    found = functional.embedding(ids, weight)
    return found.float() if found.dtype == HALF else found


def _linear_shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _rows_shape(weight: Tensor, ids: Tensor) -> Tensor:
    return weight.new_empty(*ids.shape, weight.shape[1], dtype=torch.float32 if weight.dtype == HALF else weight.dtype)


def _keep(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _linear_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    (weight,) = ctx.saved_tensors
    return gradient @ weight.to(gradient.dtype), None, None


def _rows_backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
    return None, None


def _linear_vmap(info: Any, dims: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, int]:
    assert dims[1:] == (None, None), "what is frozen is one for all"
    return half_linear(x.movedim(dims[0], 0), weight, bias), 0


def _rows_vmap(info: Any, dims: Any, weight: Tensor, ids: Tensor) -> tuple[Tensor, int]:
    assert dims[0] is None, "what is frozen is one for all"
    return half_rows(weight, ids.movedim(dims[1], 0)), 0


def _flops(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """Of shapes: one multiply-add is two."""
    return 2 * math.prod(x) * weight[0]


@cache
def _operations() -> None:
    """Registers the two operations with torch: tracing, gradients, `vmap`, mixed precision and the counter of FLOPs."""
    from torch.utils.flop_counter import register_flop_formula

    library = torch.library
    library.define(_LINEAR, "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
    library.define(_ROWS, "(Tensor weight, Tensor ids) -> Tensor")
    library.impl(_LINEAR, "CompositeExplicitAutograd", _linear)
    library.impl(_ROWS, "CompositeExplicitAutograd", _rows)
    library.register_fake(_LINEAR, _linear_shape)
    library.register_fake(_ROWS, _rows_shape)
    library.register_autograd(_LINEAR, _linear_backward, setup_context=_keep)
    library.register_autograd(_ROWS, _rows_backward)
    library.register_vmap(_LINEAR, _linear_vmap)
    library.register_vmap(_ROWS, _rows_vmap)
    for device in ("cpu", "cuda"):
        library.register_autocast(_LINEAR, device, HALF)
    register_flop_formula(torch.ops.cutlayer.half_linear)(_flops)


def half_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x` [..., i] times the frozen `weight` [o, i], plus `bias` [o]: [..., o], in the type of `x`."""
    made: Tensor = torch.ops.cutlayer.half_linear(x, weight, bias)
    return made


def half_rows(weight: Tensor, ids: Tensor) -> Tensor:
    """The rows [..., d] of the frozen `weight` [n, d] at `ids` [...]; in float32, if they are stored in bfloat16."""
    made: Tensor = torch.ops.cutlayer.half_rows(weight, ids)
    return made


class Halved:
    """A mark of layers whose weight is kept in bfloat16."""


class _Linear(Halved, nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return half_linear(input, self.weight, self.bias)


class _Embedding(Halved, nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return half_rows(self.weight, input)


def halve(model: nn.Module) -> None:
    """Store the frozen weights of the model's linear layers and embeddings in bfloat16; everything else becomes
    float32.

    Layers with a frozen weight of another class stay in float32.
    """
    _operations()
    for module in model.modules():
        kind = _kind_of(module)
        if kind is not None and not any(p.requires_grad for p in module.parameters(recurse=False)):
            module.__class__ = kind
            module._apply(lambda t: t.to(HALF), recurse=False)
    single(model)


def single(model: nn.Module) -> nn.Module:
    """The model with its real numbers in float32, except those that `halve` stores in bfloat16."""
    for module in model.modules():
        if not isinstance(module, Halved):
            module._apply(lambda t: t.float() if t.is_floating_point() else t, recurse=False)
    return model


def _kind_of(module: nn.Module) -> type[nn.Module] | None:
    if type(module) is nn.Linear:
        return _Linear
    if type(module) is nn.Embedding and module.max_norm is None:
        return _Embedding
    return _conv1d(type(module)) if type(module).__name__ == "Conv1D" else None


def _conv1d(kind: type[nn.Module]) -> type[nn.Module]:
    """GPT-2's linear layer, whose weight is transposed."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return half_linear(x, self.weight.t(), self.bias)

    if kind not in _made:
        _made[kind] = type("Conv1D", (Halved, kind), {"forward": forward})
    return _made[kind]


_made: dict[type[nn.Module], type[nn.Module]] = {}
