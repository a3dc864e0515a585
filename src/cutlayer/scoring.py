"""Evaluation: whose models are looked at, and how their outputs on held-out samples are scored.

Every engine evaluates through `evaluate` and only says how it gets the outputs of some clients' models for a chunk of
samples. What a good output is, is decided here alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from cutlayer import seeds
from cutlayer.data.samples import Samples
from cutlayer.tasks import Judged, Task, Value
from cutlayer.types import Evaluation

ROWS_PER_PASS = 1024
"""Samples per forward pass: bounds memory, changes no result."""

Scores = dict[int, dict[str, Value]]
"""The metrics of each client's model, by name; "loss" is the mean loss."""

Outputs = tuple[Sequence[int], Tensor]
"""The clients that gave outputs, and their outputs [C * n, ...], one client after another."""

OutputsOf = Callable[[Sequence[int], Samples, int], Outputs]
"""(clients, n samples, number of the first of these samples) -> the outputs of these clients' models."""


class Tally:
    """Gathers what several models give over chunks of samples. A model that misses a chunk is dropped.

    `names` are those of the classes.
    """

    def __init__(self, task: Task, models: Iterable[int], names: tuple[str, ...] = ()) -> None:
        self._task, self._names = task, names
        self._losses: dict[int, float] = dict.fromkeys(models, 0.0)  # sum of w_i l_i
        self._predictions: dict[int, list[Tensor]] = {k: [] for k in self._losses}
        self._targets: list[Tensor] = []
        self._mass = 0.0  # sum of w_i

    @property
    def models(self) -> list[int]:
        """The clients whose models have given outputs for all chunks so far."""
        return list(self._losses)

    def add(self, models: Sequence[int], outputs: Tensor, targets: Tensor) -> None:
        """Take the outputs [C * n, ...] of C models, one after another, for the same n samples."""
        count = len(models)
        weights = self._task.weights(targets)
        self._mass += len(targets) if weights is None else weights.double().sum().item()
        self._targets.append(targets)
        if not count:
            self._losses = {}
            return
        everyones = targets.repeat(count, *[1] * (targets.dim() - 1))
        losses = self._task.losses(outputs, everyones).view(count, -1)
        sums = losses.sum(1) if weights is None else (losses * weights.to(losses.dtype)).sum(1)
        self._losses = {k: self._losses[k] + loss for k, loss in zip(models, sums.tolist(), strict=True)}
        for k, own in zip(models, self._task.predictions(outputs).chunk(count), strict=True):
            self._predictions[k].append(own)

    def scores(self) -> Scores:
        """The task's metrics over all samples."""
        targets = torch.cat(self._targets)
        found: Scores = {}
        for k, total in self._losses.items():
            loss = total / (self._mass or 1)
            judged = Judged(torch.cat(self._predictions[k]), targets, loss, self._names)
            found[k] = {"loss": loss, **self._task.scores(judged)}
        return found


def evaluate(
    task: Task,
    samples: Samples,
    models: Sequence[int],
    outputs_of: OutputsOf,
    *,
    at_once: int | None = None,
    rows_per_pass: int = ROWS_PER_PASS,
    names: tuple[str, ...] = (),
) -> Scores:
    """Judge the models of the clients `models` on `samples`, `at_once` models (None: all) at a time. `names` are those
    of the classes.

    Clients that give no outputs for a chunk are missing from the result.
    """
    found: Scores = {}
    step = max(1, at_once or len(models))
    for first in range(0, len(models), step):
        tally = Tally(task, models[first : first + step], names)
        for start in range(0, len(samples), rows_per_pass):
            part = samples[start : start + rows_per_pass]
            with torch.no_grad():
                who, outputs = outputs_of(tally.models, part, start)
                tally.add(who, outputs, part.y)
        found.update(tally.scores())
    return found


def judged(clients: int, count: int | None, seed: int) -> list[int]:
    """The clients whose models are evaluated: `count` of them, drawn once, or all (None)."""
    if count is None or count >= clients:
        return list(range(clients))
    drawn = seeds.generator(seed, "evaluated clients").choice(clients, count, replace=False)
    return sorted(drawn.tolist())


def evaluation(found: Mapping[int, Mapping[str, Value]], everyone: Sequence[int], samples: int) -> Evaluation:
    """The scores of `everyone`, where `found` holds those of the models looked at. Models known to be equal are looked
    at once: a client that is not in `found` has the first model's scores.
    """
    only = next(iter(found.values()))
    return Evaluation({k: found.get(k, only) for k in everyone}, samples)
