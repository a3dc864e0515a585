"""A chain of dense layers and activations of several clients as one node of autograd, with its own backward pass.

For small layers, autograd and the interception of operations take longer than the products. The numbers are those of
the layers one by one; the proof (`stackable.py`) checks this way like any other.

Shape legend: c clients in the group, b rows each, i inputs, o outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cutlayer.engine.kernels import Factors, Leave, fetch
from cutlayer.models.trace import chain_of

_Map = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]
# Activations in place, and their gradients from their outputs.
_MAPS: dict[type[nn.Module], _Map] = {
    nn.ReLU: (torch.relu_, lambda g, y: torch.ops.aten.threshold_backward(g, y, 0)),
    nn.Tanh: (torch.tanh_, lambda g, y: torch.ops.aten.tanh_backward(g, y)),
    nn.Sigmoid: (torch.sigmoid_, lambda g, y: torch.ops.aten.sigmoid_backward(g, y)),
}


@dataclass(frozen=True)
class Dense:
    """A linear layer: the names of its weight and of its bias, if it has one; the activations that follow."""

    weight: str
    bias: str
    maps: tuple[_Map, ...]


@dataclass(frozen=True)
class Chain:
    """Dense layers, one after another; `flattens`: each row is made one line first."""

    layers: tuple[Dense, ...]
    flattens: bool

    @classmethod
    def of(cls, part: nn.Module, trained: Sequence[str]) -> Chain | None:
        """The chain of a part that uses only the parameters `trained`; None if it is something else."""
        if getattr(part, "narrow_to", None) is not None or (chain := chain_of(part)) is None:
            return None
        layers: list[Dense] = []
        flattens = False
        for kind, name in chain:
            module = part.get_submodule(name) if name else None
            if kind is nn.Linear and isinstance(module, nn.Linear):
                layers.append(Dense(f"{name}.weight", "" if module.bias is None else f"{name}.bias", ()))
            elif kind in _MAPS and layers:
                layers[-1] = Dense(layers[-1].weight, layers[-1].bias, (*layers[-1].maps, _MAPS[kind]))
            elif kind is nn.Flatten and module is not None and _whole(module) and not layers:
                flattens = True
            else:
                return None
        names = [n for layer in layers for n in (layer.weight, layer.bias) if n]
        return cls(tuple(layers), flattens) if names and sorted(names) == sorted(trained) else None

    def takes(self, x: Tensor) -> bool:
        """Whether each row is one line: a dense layer treats several lines separately."""
        return self.flattens or x.dim() == 2

    def __call__(self, x: Tensor, parameters: Mapping[str, Tensor], leave: Leave | None) -> Tensor:
        """[c * b, ...] -> [c * b, o]; with `leave`, gradients of weights are left there as factors."""
        own = [parameters[n] for layer in self.layers for n in (layer.weight, layer.bias) if n]
        y: Tensor = _Chained.apply(x, self, leave, *own)  # type: ignore[no-untyped-call]
        return y


def _whole(module: nn.Module) -> bool:
    """Whether a flattening makes each row one line."""
    return getattr(module, "start_dim", None) == 1 and getattr(module, "end_dim", None) == -1


class _Chained(torch.autograd.Function):
    """x [c * b, ...], parameters [c, ...] in the order of the layers -> [c * b, o]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, chain: Chain, leave: Leave | None, *parameters: Tensor) -> Tensor:
        """One product per layer; activations in place."""
        clients, left = len(parameters[0]), iter(parameters)
        received: list[Tensor] = [x.view(clients, len(x) // clients, -1)]
        given: list[list[Tensor]] = []
        for layer in chain.layers:
            weight, bias = next(left), next(left) if layer.bias else None
            fetch(weight)
            turned = weight.transpose(1, 2)
            y = torch.bmm(received[-1], turned) if bias is None else torch.baddbmm(bias[:, None], received[-1], turned)
            steps = []
            for number, (apply, _) in enumerate(layer.maps):
                y = apply(y if number == 0 else y.clone())
                steps.append(y)
            given.append(steps)
            received.append(y)
        ctx.received, ctx.given, ctx.chain, ctx.leave, ctx.parameters = received[:-1], given, chain, leave, parameters
        ctx.shape = x.shape
        return received[-1].flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """From the last layer to the first."""
        chain, leave, parameters = ctx.chain, ctx.leave, list(ctx.parameters)
        received, given = ctx.received, ctx.given
        ctx.received = ctx.given = ctx.parameters = None  # the graph is walked once
        g = gradients[0].view(len(parameters[0]), -1, gradients[0].shape[-1])
        found: list[Tensor | None] = []
        for number in reversed(range(len(chain.layers))):
            layer, x = chain.layers[number], received[number]
            for (_, back), y in zip(reversed(layer.maps), reversed(given[number]), strict=True):
                g = back(g, y)
            bias = parameters.pop() if layer.bias else None
            weight = parameters.pop()
            if bias is not None:
                found.append(g.sum(1))
            if leave is None:
                found.append(torch.bmm(g.transpose(1, 2), x))
            else:
                leave(weight, Factors(g, x))
                found.append(None)
            if number or ctx.needs_input_grad[0]:
                fetch(weight)
                g = torch.bmm(g, weight)
        by_x = g.view(ctx.shape) if ctx.needs_input_grad[0] else None
        return (by_x, None, None, *reversed(found))
