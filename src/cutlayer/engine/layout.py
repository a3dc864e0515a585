"""The same model in other layouts, some of them faster on the CPU.

    plain    as it was made
    pooled   max pooling before `relu`: they commute, gradients included; behind it `relu` has a quarter of the work;
             pooling by two as elementwise maxima (`pooling.py`)
    last     that, and images with their channels last in memory, as torch's CPU library likes them best, mostly

All are exact except for the order of sums. A layout is used only if both parts give the same results with it, on a few
rows in training mode (some models rely on their inputs' memory layout: `view`). `CUTLAYER_LAYOUT=plain` leaves all
models as they are.
"""

from __future__ import annotations

import os

import torch
from torch import nn

from cutlayer.copies import deep_copy
from cutlayer.eager import backward
from cutlayer.engine.pooling import pool_by_two
from cutlayer.engine.stackable import close, exact, jittered, run_alone
from cutlayer.engine.ways import Layout
from cutlayer.gradients import gradient_of
from cutlayer.models.parts import Part
from cutlayer.models.trace import pool_first
from cutlayer.types import Rows, as_tuple, channels_last

_MANY = 12  # number of channels from which channels last is faster (measured)


def layouts(part: nn.Module) -> tuple[Layout, ...]:
    """The layouts that can be tried for a part, the usually fastest first."""
    if os.environ.get("CUTLAYER_LAYOUT") == "plain" or not isinstance(part, Part):
        return ("plain",)
    images = [m for m in part.modules() if isinstance(m, nn.Conv2d)]
    if images:
        few = images[0].out_channels < _MANY
        return ("pooled", "last", "plain") if few else ("last", "pooled", "plain")
    pools = any(isinstance(m, nn.MaxPool1d | nn.MaxPool2d) for m in part.modules())
    return ("pooled", "plain") if pools else ("plain",)


def in_layout(part: nn.Module, layout: Layout) -> nn.Module:
    """The part in that layout: a copy, unless it is the plain one."""
    if layout == "plain":
        return part
    assert isinstance(part, Part), "only parts have layouts"
    changed = pool_first(part, pool_by_two)
    if layout == "last":
        changed.images_channels_last = True
        for module in changed.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return changed


def same(client: nn.Module, server: nn.Module, changed: tuple[nn.Module, nn.Module], example: Rows) -> bool:
    """Whether both parts give the same results when they are `changed`; `example`, each [n, ...], is a batch of the
    client's. The server receives the rows in the layout of the changed client part, possibly with channels last.
    """
    lower, upper = changed
    if lower is not client and not _same(client, lower, example, example):
        return False
    sent, laid_out = smashed(client, example), smashed(lower, example)
    arriving = tuple(
        s.contiguous(memory_format=torch.channels_last) if channels_last(t) else s
        for s, t in zip(sent, laid_out, strict=True)
    )
    return (upper is server and lower is client) or _same(server, upper, sent, arriving)


def smashed(client: nn.Module, example: Rows) -> Rows:
    """The outputs of the client part for `example`, without draws and without updating statistics."""
    with torch.no_grad():
        return as_tuple(deep_copy(client).eval()(example))


def _same(part: nn.Module, changed: nn.Module, rows: Rows, changed_rows: Rows) -> bool:
    """Whether both give the same in training mode, in double precision: outputs and all gradients."""
    results = []
    for module, received in ((part, rows), (changed, changed_rows)):
        twin = exact(module).train()
        mine = tuple(r.requires_grad_(r.is_floating_point()) for r in jittered(received))
        try:
            given = [g for g in run_alone(twin, mine, 0) if g.requires_grad]
            weights = [torch.linspace(0.5, 1.5, g.numel(), dtype=g.dtype).view(g.shape) for g in given]
            backward(given, weights)
        except RuntimeError:
            return False
        results.append([*given, *(gradient_of(t) for t in (*mine, *twin.parameters())), *twin.buffers()])
    return close(list(zip(*results, strict=True)))
