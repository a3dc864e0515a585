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
from cutlayer.gradients import row_losses
from cutlayer.types import Evaluation

ROWS_PER_PASS = 1024
"""Samples per forward pass: bounds memory, changes no result."""

Scores = dict[int, tuple[float, float]]
"""(accuracy, mean loss) of each client's model."""

Outputs = tuple[Sequence[int], Tensor]
"""The clients that gave outputs, and their outputs [C * n, K], one client after another."""

OutputsOf = Callable[[Sequence[int], Samples, int], Outputs]
"""(clients, n samples, number of the first of these samples) -> the outputs of these clients' models."""


class Tally:
    """Adds up the scores of several models over chunks of samples. A model that misses a chunk is dropped."""

    def __init__(self, models: Iterable[int]) -> None:
        self._totals: dict[int, tuple[int, float]] = dict.fromkeys(models, (0, 0.0))  # (right, sum of losses)
        self._samples = 0

    @property
    def models(self) -> list[int]:
        """The clients whose models have given outputs for all chunks so far."""
        return list(self._totals)

    def add(self, models: Sequence[int], outputs: Tensor, labels: Tensor) -> None:
        """Score the outputs [C * n, K] of C models, one after another, for the same n samples."""
        count = len(models)
        self._samples += len(labels)
        if not count:
            self._totals = {}
            return
        everyones = labels.repeat(count)
        right = (outputs.argmax(1) == everyones).view(count, -1).sum(1).tolist()
        losses = row_losses(outputs, everyones).view(count, -1).sum(1).tolist()
        before = self._totals
        self._totals = {
            k: (before[k][0] + r, before[k][1] + loss) for k, r, loss in zip(models, right, losses, strict=True)
        }

    def scores(self) -> Scores:
        """Accuracy and mean loss over all samples."""
        n = self._samples
        return {k: (right / n, loss / n) for k, (right, loss) in self._totals.items()}


def evaluate(
    samples: Samples,
    models: Sequence[int],
    outputs_of: OutputsOf,
    *,
    at_once: int | None = None,
    rows_per_pass: int = ROWS_PER_PASS,
) -> Scores:
    """Score the models of the clients `models` on `samples`, `at_once` models (None: all) at a time.

    Clients that give no outputs for a chunk are missing from the result.
    """
    found: Scores = {}
    step = max(1, at_once or len(models))
    for first in range(0, len(models), step):
        tally = Tally(models[first : first + step])
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


def evaluation(found: Mapping[int, tuple[float, float]], everyone: Sequence[int], samples: int) -> Evaluation:
    """The scores of `everyone`, where `found` holds those of the models looked at. Models known to be equal are looked
    at once: a client that is not in `found` has the first model's scores.
    """
    only = next(iter(found.values()))
    result = {k: found.get(k, only) for k in everyone}
    return Evaluation({k: a for k, (a, _) in result.items()}, {k: x for k, (_, x) in result.items()}, samples)
