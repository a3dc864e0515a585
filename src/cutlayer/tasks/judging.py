"""How a model is judged: what it gave for the held-out samples, and the metrics that look at it.

Shape legend: n samples, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Value = float | tuple["Value", ...] | None
"""What a metric says: a number, several (one per class, or a matrix), or None where it is not defined."""


@dataclass(frozen=True)
class Judged:
    """What one model gave for all held-out samples.

    `predictions` [n, ...] are what the task makes of the model's outputs (`Task.predictions`); `targets` [n, ...];
    `loss` is the weighted mean loss. `names` are those of the classes, where there are some.
    """

    predictions: Tensor
    targets: Tensor
    loss: float
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Metric:
    """A figure of merit. `maximise`: more is better. `share`: it is a fraction in [0, 1], shown in per cent. `default`:
    it is reported without being asked for.
    """

    of: Callable[[Judged], Value]
    maximise: bool = True
    share: bool = True
    default: bool = True
