"""The same model, quicker on the CPU: images with their channels last in memory, activations after the pooling.

`relu` and max pooling commute, gradients included; behind the pooling it has a quarter of the work. The convolutions
and poolings of torch's CPU library are much quicker with the channels last. Both are exact but for the order of sums; a
module is changed only if it then gives what it gave (some take their inputs' memory for granted: `view`), else left as
it is. `CUTLAYER_LAYOUT=plain` leaves all as they are.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from cutlayer.engine.proof import close, exact, jittered, run_alone
from cutlayer.models.parts import Part
from cutlayer.models.trace import pool_first
from cutlayer.types import Rows


def quicker(part: nn.Module, rows: Rows) -> nn.Module:
    """`part`, changed where that helps and changes no result; `rows` are an example of what it is called with."""
    images = any(isinstance(m, nn.Conv2d) for m in part.modules())
    if os.environ.get("CUTLAYER_LAYOUT") == "plain" or not isinstance(part, Part) or not images:
        return part
    changed = pool_first(part)
    changed.channels_last = True
    for module in changed.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return changed if _same(part, changed, rows) else part


def _same(part: nn.Module, changed: nn.Module, rows: Rows) -> bool:
    """Whether both give the same in training mode, in double precision: outputs and all gradients."""
    results = []
    for module in (part, changed):
        twin = exact(module).train()
        mine = tuple(r.requires_grad_(r.is_floating_point()) for r in jittered(rows))
        try:
            given = [g for g in run_alone(twin, mine, 0) if g.requires_grad]
            weights = [torch.linspace(0.5, 1.5, g.numel(), dtype=g.dtype).view(g.shape) for g in given]
            torch.autograd.backward(given, weights)
        except RuntimeError:
            return False
        results.append([*given, *(_grad(t) for t in (*mine, *twin.parameters())), *twin.buffers()])
    return close(list(zip(*results, strict=True)))


def _grad(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
