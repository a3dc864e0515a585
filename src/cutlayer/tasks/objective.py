"""What a task is: the loss of each row, the weight of a row in the mean, and metrics. One task, one file.

    @task("counts", title="Counts", targets="numbers")
    class Counts(Task):
        def losses(self, outputs, targets): ...

The loss of a step is sum(w_i l_i) / sum(w_i) over its rows; a client's own mean loss is the same over its rows, so
everything that algorithms do with means also holds with weights. If all rows count equally, w_i = 1 and nothing is
multiplied.

Shape legend: R rows, K classes (or numbers that the model gives per row), t... the shape of one row's target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal, Self, TypeVar

import torch
from pydantic import PrivateAttr
from torch import Tensor

from cutlayer import plugins
from cutlayer.errors import ConfigError
from cutlayer.plugins import Thing, option
from cutlayer.tasks import measures
from cutlayer.tasks.judging import Judged, Metric, Value
from cutlayer.types import Rows

T = TypeVar("T", bound="type[Task]")

Targets = Literal["class", "classes", "numbers"]
"""What targets are: one class per row, which may have a name; integers of any shape, taken as they are; numbers."""

_OFFERED = {
    "class": frozenset({measures.CLASSES, measures.PROBABILITIES}),
    "classes": frozenset({measures.CLASSES}),
    "numbers": frozenset({measures.NUMBERS}),
}


class Task(Thing):
    """Base of all tasks. Options are fields made by `plugins.option`."""

    primary: ClassVar[str] = "loss"
    """The metric that chooses the best evaluation; "loss" is always there."""
    metrics: ClassVar[Mapping[str, Metric]] = {}
    """How predictions are judged, by name."""

    loss_options: ClassVar[frozenset[str]] = frozenset()
    """Options that only the loss reads: they have no effect with the user's own loss."""
    gives: ClassVar[frozenset[str] | None] = None
    """What it provides for metrics (`measures.CLASSES`, ...). None: what tasks with its targets usually provide."""

    wants_scores: ClassVar[bool] = False
    """Whether the softmax of the outputs are probabilities, so that a model must not apply the softmax itself."""

    _asked: dict[str, Metric] = PrivateAttr(default_factory=dict)
    _leading: str | None = PrivateAttr(default=None)

    auxiliary_weights: tuple[float, ...] = option(())
    """Weights of the losses of the model's further outputs (auxiliary heads), in order. Default: only the first output
    counts."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of each row: outputs [R, ...], targets [R, t...] -> [R]. The mean over what counts within a row."""
        raise ConfigError(f"{type(self).__name__} has no losses(): write what each row's loss is")

    def weights(self, targets: Tensor) -> Tensor | None:
        """The weight of each row in the mean: [R], not negative. None: all rows count equally."""
        return None

    def row_losses(self, outputs: Rows, targets: Tensor) -> Tensor:
        """The loss of each row from all outputs of the model, [R, ...] each: that of the first, and the weighted losses
        of the others.
        """
        if len(self.auxiliary_weights) >= len(outputs):
            raise ConfigError(
                f"auxiliary_weights has {len(self.auxiliary_weights)} numbers, but the model gives {len(outputs) - 1} "
                "outputs beside the first: give at most as many"
            )
        total = self.losses(outputs[0], targets)
        for weight, output in zip(self.auxiliary_weights, outputs[1:], strict=False):
            total = total + weight * self.losses(output, targets)
        return total

    def predictions(self, outputs: Tensor) -> Tensor:
        """The predictions for metrics: outputs [n, ...] -> [n, ...]. By default, the outputs themselves."""
        return outputs

    def counted(self, predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The predictions and targets that metrics use. By default, all of them."""
        return predictions, targets

    def told_apart(self, given: tuple[int, ...]) -> int:
        """The number of classes that a model distinguishes; `given` is the shape of its output for a row. 0: none."""
        return 0

    def occurrences(self, targets: Tensor, scored: int) -> Tensor | None:
        """The number of the targets [n] that count, for each of the `scored` classes: [K]. None: a row has no single
        class.
        """
        return None

    def mixable(self, outputs: Tensor) -> Tensor:
        """The values that an ensemble averages over models, from outputs. By default, the outputs themselves."""
        return outputs

    def unmixed(self, mean: Tensor) -> Tensor:
        """The outputs that belong to this average: the inverse of `mixable`."""
        return mean

    def probabilities(self, outputs: Tensor) -> Tensor | None:
        """The probability of every class (or label), for predictions: outputs [n, ...] -> [n, ...]. None: none."""
        return None

    def decided(self, outputs: Tensor) -> Tensor | None:
        """The class of every row or place, for predictions: outputs [n, ...] -> [n, t...]. None: no classes."""
        return None

    def scores(self, judged: Judged) -> dict[str, Value]:
        """The metrics that are reported for a model: the defaults and the requested ones."""
        return {
            name: metric.of(judged)
            for name, metric in self.all_metrics.items()
            if name in self._asked or metric.reported(judged) or name == self.leading
        }

    @property
    def all_metrics(self) -> Mapping[str, Metric]:
        """Its own metrics and the requested ones, by name."""
        return {**self.metrics, **self._asked}

    @property
    def leading(self) -> str:
        """The metric that chooses the best evaluation: the requested one, or the task's primary one."""
        return self._leading or self.primary

    @property
    def offered(self) -> frozenset[str]:
        """What it gives metrics."""
        return _OFFERED[self.targets] if self.gives is None else self.gives

    def asked(self, metrics: Mapping[str, Metric], leading: str | None = None) -> Self:
        """The task that reports these metrics, too, and chooses the best evaluation by `leading`."""
        made = self.model_copy()
        made._asked, made._leading = dict(metrics), leading
        return made

    @property
    def ignored(self) -> int | None:
        """The class whose rows do not count, if there is one."""
        return None

    @property
    def maximise(self) -> bool:
        """Whether larger values of the leading metric are better."""
        metric = self.all_metrics.get(self.leading)
        return metric is not None and metric.maximise

    @property
    def share(self) -> bool:
        """Whether the leading metric is a fraction, shown in per cent."""
        metric = self.all_metrics.get(self.leading)
        return metric is not None and metric.share

    def rank(self, score: float | None) -> tuple[bool, float]:
        """A score of the leading metric as a number that is larger if it is better. Undefined scores are the worst."""
        defined = score is not None and math.isfinite(score)
        return defined, (score or 0.0) * (1 if self.maximise else -1) if defined else 0.0

    def width(self, targets: Tensor, classes: int) -> int:
        """The number of outputs of a model per row (per place, if targets have places). A model that is made for the
        data receives it as `classes`.
        """
        return classes

    def fitted(self, targets: Tensor, classes: int) -> Self:
        """The task, fitted to these training targets (class weights by frequency). By default unchanged."""
        return self

    def check_outputs(self, outputs: Tensor, targets: Tensor, names: Sequence[str]) -> None:
        """Before training: do a model's outputs on a few rows fit their targets? `names` are those of the classes.

        Raises ConfigError with value, reason and remedy. By default the losses are tried out.
        """
        try:
            found = self.losses(outputs, targets)
        except (RuntimeError, ValueError, IndexError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"outputs of shape {tuple(outputs.shape)} do not fit targets of shape {tuple(targets.shape)} "
                f"({reason}): choose another model or task"
            ) from None
        if found.shape != (len(targets),):
            raise ConfigError(
                f"the losses of {len(targets)} rows have shape {tuple(found.shape)}, not [{len(targets)}]: return one "
                "number per row"
            )

    def foreign(self, targets: Tensor, given: tuple[int, ...]) -> str:
        """What is wrong with received targets [R, t...], as a clause; empty if nothing is wrong. `given` is the shape
        of the model's output for a row.
        """
        if targets.is_floating_point() and not bool(torch.isfinite(targets).all()):
            return "NaN or infinite numbers"
        return ""

    @property
    def targets(self) -> Targets:
        """The kind of its targets, as registered."""
        kind: Targets = self.entry.facts["targets"]
        return kind


def task(name: str, *, targets: Targets, title: str = "", summary: str = "") -> Callable[[T], T]:
    """Registers a `Task` under `name`. `targets`: how it reads a data set's targets."""
    return plugins.register("task", name, title=title, summary=summary, targets=targets)


def mean_of_counting(losses: Tensor, counts: Tensor) -> Tensor:
    """The mean of `losses` [R, t...], weighted by `counts` [R, t...], over each row: [R]. 0 if all weights are 0."""
    total = counts.flatten(1).sum(1)
    return (losses * counts).flatten(1).sum(1) / torch.where(total > 0, total, torch.ones_like(total))
