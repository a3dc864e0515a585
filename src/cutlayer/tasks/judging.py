"""How a model is judged: its outputs for the held-out samples, and the metrics that use them.

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
"""The value of a metric: a number, several (one per class, or a matrix), or None if it is not defined."""


@dataclass(frozen=True)
class Judged:
    """The results of one model for all held-out samples that count.

    `predictions` [n, ...] are computed by the task from the model's outputs (`Task.predictions`); `targets` [n, ...];
    `loss` is the weighted mean loss. `names` are those of the classes, if there are any; `classes` is the number of
    classes that the model distinguishes (0: none).
    """

    predictions: Tensor
    targets: Tensor
    loss: float
    names: tuple[str, ...] = ()
    classes: int = 0

    @cached_property
    def decided(self) -> Tensor:
        """The class of each row: that of the largest score, or 1 if a probability is above 0.5."""
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
    """A metric. `maximise`: larger is better. `share`: it is a fraction in [0, 1], shown in percent. `default`: it is
    reported by default, for at most `upto` classes (0: any number). `needs`: what a task must provide for it, one of
    these words (empty: any task is suitable). `several`: it has more than one number, so it cannot choose the best
    evaluation.
    """

    of: Callable[[Judged], Value]
    maximise: bool = True
    share: bool = True
    default: bool = True
    upto: int = 0
    needs: tuple[str, ...] = ()
    several: bool = False

    def reported(self, judged: Judged) -> bool:
        """Whether it is reported by default for these results."""
        return self.default and (not self.upto or judged.classes <= self.upto)


def as_value(given: Any, name: str) -> Value:
    """The result of a user's metric, as a plain value; None if it is not finite. Raises ConfigError."""
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
