"""How a model is judged: what it gave for the held-out samples, and the metrics that look at it.

Shape legend: n samples (or places, where a task judges each pixel or token), K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from cutlayer.errors import ConfigError

Value = float | tuple["Value", ...] | None
"""What a metric says: a number, several (one per class, or a matrix), or None where it is not defined."""


@dataclass(frozen=True)
class Judged:
    """What one model gave for all held-out samples that count.

    `predictions` [n, ...] are what the task makes of the model's outputs (`Task.predictions`); `targets` [n, ...];
    `loss` is the weighted mean loss. `names` are those of the classes, where there are some; `classes` is how many the
    model tells apart (0: it does not).
    """

    predictions: Tensor
    targets: Tensor
    loss: float
    names: tuple[str, ...] = ()
    classes: int = 0

    @cached_property
    def decided(self) -> Tensor:
        """The class of each row: of the largest score, or 1 where a probability is above 0.5."""
        given = self.predictions
        if given.dim() > self.targets.dim():
            return given.argmax(1)
        return (given > 0.5).long() if given.is_floating_point() else given

    @cached_property
    def confusion(self) -> Tensor:
        """How many samples of class i were taken for class j: [K, K]."""
        true, said = self.targets.flatten().long(), self.decided.flatten()
        largest = int(torch.cat([true, said]).max()) + 1 if len(true) else 0
        kinds = max(self.classes, largest)
        return torch.bincount(true * kinds + said, minlength=kinds * kinds).view(kinds, kinds)


@dataclass(frozen=True)
class Metric:
    """A figure of merit. `maximise`: more is better. `share`: it is a fraction in [0, 1], shown in per cent. `default`:
    it is reported without being asked for, given at most `upto` classes (0: however many). `needs`: what a task must
    give it, one of these words (empty: any task will do). `several`: it says more than one number, so that it cannot
    choose the best evaluation.
    """

    of: Callable[[Judged], Value]
    maximise: bool = True
    share: bool = True
    default: bool = True
    upto: int = 0
    needs: tuple[str, ...] = ()
    several: bool = False

    def reported(self, judged: Judged) -> bool:
        """Whether it is reported of this without being asked for."""
        return self.default and (not self.upto or judged.classes <= self.upto)


def as_value(given: Any, name: str) -> Value:
    """What a metric of one's own gave, as a plain value; None for what is not finite. Raises ConfigError."""
    if isinstance(given, Tensor):
        given = given.detach().cpu()
    if not isinstance(given, bool | int | float | None) and hasattr(given, "tolist"):
        given = given.tolist()
    if given is None or isinstance(given, bool | int | float):
        return None if given is None or not math.isfinite(given) else float(given)
    if isinstance(given, Iterable) and not isinstance(given, str | dict):
        return tuple(as_value(one, name) for one in given)
    raise ConfigError(
        f"the metric {name!r} gave {type(given).__name__}: return a number, several numbers, or None where it is not "
        "defined"
    )
