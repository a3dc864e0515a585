"""torch's optimisers, its backward pass and its counter of FLOPs, without torch's compiler.

Every method that torch.compile must not trace imports the whole compiler at its first call. This costs half a second of
CPU time and tens of MB in a process that compiles nothing. The subclasses made here have the same methods without that
decorator. torch's own classes are not changed, so programs that compile are not affected.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

# It is not part of torch's interface, so that it may be missing.
_engine: Callable[..., Any] | None = getattr(torch.autograd.graph, "_engine_run_backward", None)
_DECORATED = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")


@functools.cache
def eager(kind: Callable[..., torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """A class of torch.optim whose steps, numbers, states and hooks are those of `kind`, and that loads no compiler.
    Returns `kind` itself if torch has changed so that this is not possible.
    """
    plain = {name: getattr(getattr(kind, name, None), "__wrapped__", None) for name in _DECORATED}
    decorated = getattr(kind, "step", None)
    step = None if decorated is None else inspect.unwrap(decorated)
    if not isinstance(kind, type) or step is None or step is decorated or None in plain.values():
        return kind
    own = {**plain, "step": _without_gradients(step), "__doc__": kind.__doc__, "__module__": kind.__module__}
    made: Callable[..., torch.optim.Optimizer] = type(kind.__name__, (kind,), own)
    return made


def _without_gradients(step: Callable[..., Any]) -> Callable[..., Any]:
    """The effect of torch's decorator of a step if nothing is compiled."""

    @functools.wraps(step)
    def stepped(self: torch.optim.Optimizer, closure: Callable[[], float] | None = None) -> float | None:
        with torch.set_grad_enabled(self.defaults.get("differentiable", False)):
            loss: float | None = step(self, closure)
        return loss

    return stepped


def backward(tensors: Sequence[Tensor], gradients: Sequence[Tensor], inputs: Sequence[Tensor] = ()) -> None:
    """`torch.autograd.backward(tensors, gradients)` for gradients of the tensors' own shapes, of all leaves or only of
    `inputs`. torch compares shapes with the means of its compiler, which loads sympy, and takes microseconds per
    tensor.
    """
    if _engine is None or not _alike(tensors, gradients):
        torch.autograd.backward(tensors, gradients, inputs=inputs or None)
        return
    keep_graph = create_graph = False
    given = (tuple(tensors), tuple(gradients), keep_graph, create_graph, tuple(inputs))
    _engine(*given, allow_unreachable=True, accumulate_grad=True)


def gradients_of(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], gradients: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad(outputs, inputs, gradients)` likewise. The graph is kept, and inputs may be unused."""
    if _engine is None or not _alike(outputs, gradients):
        return torch.autograd.grad(outputs, inputs, gradients, retain_graph=True, allow_unused=True)
    keep_graph, create_graph = True, False
    found: tuple[Tensor | None, ...] = _engine(
        tuple(outputs), tuple(gradients), keep_graph, create_graph, tuple(inputs), True, accumulate_grad=False
    )
    return found


def _alike(tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> bool:
    return all(t.shape == g.shape and t.dtype == g.dtype for t, g in zip(tensors, gradients, strict=True))


class FlopCount(FlopCounterMode):
    """torch's counter of FLOPs, with the same counts, but without loading the compiler."""

    def __enter__(self) -> Self:
        """Start to count."""
        super().__enter__()  # type: ignore[no-untyped-call]
        mode: Any = self.mode
        mode.__class__ = _untraced(mode.__class__)
        return self


@functools.cache
def _untraced(mode: Any) -> Any:
    """`mode` with what it does to an operation undecorated; itself where it is not decorated."""
    dispatch = getattr(mode.__torch_dispatch__, "__wrapped__", None)
    if dispatch is None:
        return mode
    own = {"__torch_dispatch__": dispatch, "_should_skip_dynamo": classmethod(lambda _: False)}
    return type(mode.__name__, (mode,), own)
