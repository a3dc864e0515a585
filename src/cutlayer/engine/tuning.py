"""Finds the fastest of several equal ways, by trying them on the model's real shapes when a run is built, in bounded
time.

A way must be faster than the rule's choice by a margin, so that noise does not decide.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cutlayer.copies import deep_copy
from cutlayer.engine.convolutions import Form
from cutlayer.engine.stack import Stack
from cutlayer.engine.ways import Stacking
from cutlayer.optim import MakeOptimizer
from cutlayer.types import Rows, as_tuple, select

MARGIN = 0.93  # of the rule's time, below which another way is used
_REPEATS, _ENOUGH = 4, 0.2  # number of trials, at least one; seconds that are enough
_FEW_CLIENTS = 8  # copies that are tried together
_FEW_ROWS = 256  # rows of a model that is tried alone


class Timed(NamedTuple):
    """Seconds of a step, and how it was computed."""

    seconds: float
    how: Stacking


class Tuner:
    """Tries ways until `budget` seconds are over; later ways count as slow."""

    def __init__(self, budget: float, device: torch.device) -> None:
        self._device = device
        alone = device.type == "cpu" and torch.get_num_threads() == 1
        self._clock = time.process_time if alone else time.perf_counter  # other processes do not affect CPU time
        self._began = time.perf_counter()
        self._until = self._began + budget

    @property
    def late(self) -> bool:
        """Whether the time is over."""
        return time.perf_counter() > self._until

    @property
    def spent(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self._began

    def seconds(self, work: Callable[[], object], repeats: int = _REPEATS) -> float:
        """The shortest of a few times of `work`; infinite after the time is over."""
        if self.late:
            return float("inf")
        warm_up, times = self._once(work), list[float]()
        while not times or (len(times) < repeats and sum(times, warm_up) < _ENOUGH and not self.late):
            times.append(self._once(work))
        return min(times)

    def alone(self, part: nn.Module, rows: Rows, wanted: int, *, data: bool, repeats: int = _REPEATS) -> float:
        """Seconds of a forward and a backward pass of a model on `wanted` rows like `rows`."""
        tried = min(wanted, _FEW_ROWS)
        twin, batches = deep_copy(part).train(), _batches(rows, tried, data=data)

        def work() -> None:
            _back(as_tuple(twin(next(batches))))

        return self.seconds(work, repeats) * wanted / tried

    def copies(
        self, part: nn.Module, rows: Rows, batch: int, clients: int, make: MakeOptimizer, how: Stacking, *, data: bool
    ) -> Timed:
        """Seconds of a step of `clients` copies with `batch` rows each, computed as `how` says; with the quickest forms
        of its operations, where there are several.
        """
        if self.late:
            return Timed(float("inf"), how)
        few = min(clients, how.chunk or clients, _FEW_CLIENTS)
        choose = self._form if how.way == "lowered" else None
        stack = Stack(part, few, make, replace(how, chunk=None), choose)
        (group,) = stack.groups(range(few), np.full(few, batch))
        batches, none_last = _batches(rows, few * batch, data=data), np.zeros(few, bool)

        def work() -> None:
            _back(stack.forward(group, next(batches), lambda k: torch.Generator(self._device).manual_seed(k)))
            stack.step(group, 1e-6, last=none_last)

        if choose is not None:
            work()  # in which forms are tried
        seconds = self.seconds(work) * clients / few
        return Timed(seconds, replace(how, forms=dict(stack.forms)))

    def _form(
        self, possible: Mapping[str, Form], otherwise: str, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> str:
        """The fastest form of an operation, forward and backward."""
        if len(possible) < 2:
            return otherwise
        leaves = [None if t is None else t.detach().requires_grad_(t.requires_grad) for t in (x, weight, bias)]
        layout = torch.channels_last if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) else None

        def work(form: Form) -> None:
            y = form(*leaves)  # type: ignore[arg-type]
            _back((y if layout is None else y.contiguous(memory_format=layout),))

        times = {name: self.seconds(partial(work, form), repeats=2) for name, form in possible.items()}
        best = min(times, key=times.__getitem__)
        return best if times[best] < MARGIN * times[otherwise] else otherwise

    def _once(self, work: Callable[[], object]) -> float:
        self._await()
        began = self._clock()
        work()
        self._await()
        return self._clock() - began

    def _await(self) -> None:
        if self._device.type != "cpu":
            torch.get_device_module(self._device.type).synchronize()


def _batches(rows: Rows, count: int, *, data: bool) -> Iterator[Rows]:
    """Endless batches of `count` rows, each continuing where the one before ended, since a processor predicts values
    that it has seen before. The memory layout of each row stays.
    """
    first = 0
    while True:
        order = torch.arange(first, first + count) % len(rows[0])
        first += count
        own = (select(r.detach(), order.to(r.device)) for r in rows)
        yield tuple(r.requires_grad_(r.is_floating_point() and not data) for r in own)


def _back(given: Iterable[Tensor]) -> None:
    """A backward pass from a model's outputs, if it can be trained."""
    pairs = [(g, torch.full_like(g, 1e-3)) for g in given if g.requires_grad]
    if pairs:
        torch.autograd.backward([g for g, _ in pairs], [w for _, w in pairs])
