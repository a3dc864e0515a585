"""torch's elementwise optimisers applied to stacked tensors directly, without an optimiser object for each step.

The numbers are torch's own: from its fused kernels if they exist on this device, otherwise from its formulas. A
gradient that was left as two factors is multiplied out for a few clients at a time, so that it is used while it is in
the cache. Writing it to memory and reading it again would cost more than the step itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cutlayer.engine.kernels import Factors
from cutlayer.optim import MakeOptimizer, Rule, laid_as
from cutlayer.types import as_real

_BLOCK = 1 << 20  # bytes of weights whose gradient is multiplied out at a time (measured: 0.25 to 1 MiB are alike)

Moments = Mapping[str, Tensor]
"""An optimiser's state of a parameter: kind -> tensor in the parameter's shape, [c, ...]."""
Step = Callable[[Tensor, Tensor, Moments, float, float, int], None]
"""(weights, gradients, moments, rate, weight decay, steps taken before): one step, in place."""


@dataclass(frozen=True)
class Descent:
    """How an optimiser steps: its state's `kinds`, all zero at the start, and the `step` itself.

    `clocked`: its state counts steps.
    """

    kinds: tuple[str, ...]
    step: Step
    clocked: bool

    def take(
        self, weight: Tensor, gradient: Tensor | None, factors: Sequence[Factors], moments: Moments, lr: float,
        decay: float, taken: int,
    ) -> None:  # fmt: skip
        """One step of stacked weights [c, ...], in place, from the sum of their gradient and of gradients left as
        factors.
        """
        if not factors:
            assert gradient is not None, "what is stepped has a gradient"
            self.step(weight, laid_as(gradient, weight), moments, lr, decay, taken)
            return
        clients, few = len(weight), len(weight)
        if weight.device.type == "cpu":
            few = max(1, min(clients, _BLOCK // max(1, weight[0].nbytes)))
        if few == clients:
            self.step(weight, _total(gradient, factors, weight), moments, lr, decay, taken)
            return
        room = torch.empty_like(weight[:few])
        for first in range(0, clients, few):
            span = slice(first, min(first + few, clients))
            block = room[: span.stop - first]
            for number, part in enumerate(factors):
                part.product_of(span, block, add=number > 0)
            if gradient is not None:
                block += gradient[span]
            own = {kind: t[span] for kind, t in moments.items()}
            self.step(weight[span], block, own, lr, decay, taken)


def _total(gradient: Tensor | None, factors: Sequence[Factors], weight: Tensor) -> Tensor:
    """The sum of the gradient and the products of factors, in the memory layout of the weight."""
    total = factors[0].product()
    for part in factors[1:]:
        total += part.product()
    if gradient is not None:
        total += gradient
    return laid_as(total.to(weight.dtype), weight)


class DirectSteps:
    """The steps of one model's optimiser, taken directly; its state stays where torch keeps it."""

    def __init__(
        self, how: Descent, optimizer: torch.optim.Optimizer, named: Sequence[tuple[str, Tensor]], rule: Rule
    ) -> None:
        self._how, self._optimizer = how, optimizer
        self._named = [(p, *rule.rates_of(name)) for name, p in named if p.requires_grad]
        self._taken: dict[Tensor, tuple[Moments, int]] = {}  # steps by parameter, as long as it has this state

    def __call__(self, lr: float) -> None:
        """One step at this rate."""
        with torch.no_grad():
            for p, factor, decay in self._named:
                if p.grad is None:
                    continue
                state, taken = self._state_of(p)
                self._how.step(p.detach(), laid_as(p.grad, p), state, lr * factor, decay, taken)
                if self._how.clocked:
                    state["step"] += 1
                self._taken[p] = (state, taken + 1)

    def _state_of(self, p: Tensor) -> tuple[dict[str, Tensor], int]:
        """A parameter's state, and the steps that it has taken; a number in a tensor is read once."""
        state: dict[str, Tensor] = self._optimizer.state[p]
        if not state:
            state.update({kind: torch.zeros_like(p) for kind in self._how.kinds})
            if self._how.clocked:
                state["step"] = torch.zeros((), dtype=torch.float32)
            return state, 0
        known, taken = self._taken.get(p, ({}, 0))
        if known is state:
            return state, taken
        return state, int(state["step"]) if self._how.clocked else 1


def descent(make: MakeOptimizer, device: torch.device) -> Descent | None:
    """How the optimisers from `make` step; None for those that only torch's own objects can compute."""
    if make.own:
        return None
    optimizer = make([("", torch.zeros(1, requires_grad=True))])
    assert optimizer is not None, "a parameter that is trained has an optimiser"
    known = _KNOWN.get(make.kind)
    found = None if known is None else known(optimizer.defaults, device)
    return None if found is None else replace(found, step=_in_parts(found.step))


def _in_parts(step: Step) -> Step:
    """The same step, which takes complex numbers as pairs of real ones, as torch's optimisers do."""

    def stepped(w: Tensor, g: Tensor, moments: Moments, lr: float, decay: float, taken: int) -> None:
        if w.is_complex():
            w, g, moments = as_real(w), as_real(g), {kind: as_real(t) for kind, t in moments.items()}
        step(w, g, moments, lr, decay, taken)

    return stepped


def _momentum(d: dict[str, Any], device: torch.device) -> Descent | None:
    """SGD with momentum, plain or Nesterov's."""
    if not d["momentum"]:
        return None  # no state: this is gradient descent, which has its own way

    def step(w: Tensor, g: Tensor, moments: Moments, lr: float, decay: float, taken: int) -> None:
        torch._fused_sgd_(
            [w], [g], [moments["momentum_buffer"]], weight_decay=decay, momentum=d["momentum"], lr=lr,
            dampening=d["dampening"], nesterov=d["nesterov"], maximize=d["maximize"], is_first_step=not taken,
        )  # fmt: skip

    return Descent(("momentum_buffer",), step, clocked=False) if device.type in _FUSED else None


def _adam(d: dict[str, Any], device: torch.device) -> Descent | None:
    """Adam, and AdamW."""
    if d["amsgrad"] or device.type not in _FUSED:
        return None
    kernel = torch._fused_adamw_ if d.get("decoupled_weight_decay") else torch._fused_adam_
    beta1, beta2 = map(float, d["betas"])
    clock = torch.zeros((), device=device)

    def step(w: Tensor, g: Tensor, moments: Moments, lr: float, decay: float, taken: int) -> None:
        clock.fill_(taken + 1)
        kernel(
            [w], [g], [moments["exp_avg"]], [moments["exp_avg_sq"]], [], [clock], lr=lr, beta1=beta1, beta2=beta2,
            weight_decay=decay, eps=d["eps"], amsgrad=False, maximize=d["maximize"],
        )  # fmt: skip

    return Descent(("exp_avg", "exp_avg_sq"), step, clocked=True)


def _rmsprop(d: dict[str, Any], device: torch.device) -> Descent | None:
    """RMSprop, with momentum too."""
    if d["centered"]:
        return None

    def step(w: Tensor, g: Tensor, moments: Moments, lr: float, decay: float, taken: int) -> None:
        g = -g if d["maximize"] else g
        if decay:
            g = g.add(w, alpha=decay)
        square = moments["square_avg"].mul_(d["alpha"]).addcmul_(g, g, value=1 - d["alpha"])
        root = square.sqrt().add_(d["eps"])
        if d["momentum"] > 0:
            w.add_(moments["momentum_buffer"].mul_(d["momentum"]).addcdiv_(g, root), alpha=-lr)
        else:
            w.addcdiv_(g, root, value=-lr)

    kinds = ("square_avg", "momentum_buffer") if d["momentum"] > 0 else ("square_avg",)
    return Descent(kinds, step, clocked=True)


_FUSED = {"cpu", "cuda"}  # where torch has fused steps
_KNOWN: dict[Callable[..., torch.optim.Optimizer], Callable[[dict[str, Any], torch.device], Descent | None]] = {
    torch.optim.SGD: _momentum,
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    torch.optim.RMSprop: _rmsprop,
}
