"""Evaluation: the choice of models, and the scores of their outputs on held-out samples.

Every engine evaluates through `evaluate` and only provides the outputs of some clients' models for a chunk of samples.
The quality of outputs is only judged here.
"""

from __future__ import annotations

import copy
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cutlayer import plugins, seeds
from cutlayer.data.own import own_code
from cutlayer.data.samples import Samples
from cutlayer.errors import ConfigError, unknown
from cutlayer.tasks import Judged, Metric, Task, Value
from cutlayer.tasks.judging import as_value
from cutlayer.tasks.measures import as_metric
from cutlayer.types import Evaluation

ROWS_PER_PASS = 1024
"""Samples per forward pass: bounds memory, changes no result."""

_READ = 256_000_000  # bytes of inputs that are read at a time if they are not in memory
_TRIED = 2_000_000  # numbers of outputs for trying metrics

RECALL = "recall"
"""The metric with the recall of each class."""

Scores = dict[int, dict[str, Value]]
"""The metrics of each client's model, by name; "loss" is the mean loss."""

Outputs = tuple[Sequence[int], Tensor]
"""The clients with outputs, and their outputs [C * n, ...], one client after another."""

OutputsOf = Callable[[Sequence[int], Samples, int], Outputs]
"""(clients, n samples, number of the first of these samples) -> the outputs of these clients' models."""


class Tally:
    """Gathers the outputs of several models over chunks of samples. A model that misses a chunk is dropped.

    `names` are those of the classes.
    """

    def __init__(self, task: Task, models: Iterable[int], names: tuple[str, ...] = ()) -> None:
        self._task, self._names = task, names
        self._losses: dict[int, float] = dict.fromkeys(models, 0.0)  # sum of w_i l_i
        self._predictions: dict[int, list[Tensor]] = {k: [] for k in self._losses}
        self._targets: list[Tensor] = []
        self._mass = 0.0  # sum of w_i
        self._classes = 0

    @property
    def models(self) -> list[int]:
        """The clients whose models have outputs for all chunks so far."""
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
        self._classes = self._task.told_apart(tuple(outputs.shape[1:]))
        for k, own in zip(models, self._task.predictions(outputs).chunk(count), strict=True):
            self._predictions[k].append(own)

    def scores(self) -> Scores:
        """The task's metrics over all samples."""
        targets, task = torch.cat(self._targets), self._task
        found: Scores = {}
        for k, total in self._losses.items():
            loss = total / (self._mass or 1)
            counted = task.counted(torch.cat(self._predictions[k]), targets)
            found[k] = {"loss": loss, **task.scores(Judged(*counted, loss, self._names, self._classes))}
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
    groups = [Tally(task, models[first : first + step], names) for first in range(0, len(models), step)]
    if not samples.in_memory:  # data that must be read are read once for all models
        rows_per_pass = max(1, min(rows_per_pass, _READ // max(1, sum(x.nbytes for x in samples.form.rows))))
    for together in [[tally] for tally in groups] if samples.in_memory else [groups]:
        for start in range(0, len(samples), rows_per_pass):
            part = samples[start : start + rows_per_pass]
            for tally in together:
                with torch.no_grad():
                    who, outputs = outputs_of(tally.models, part, start)
                    tally.add(who, outputs, part.y)
        for tally in together:
            found.update(tally.scores())
    return found


def evaluate_together(
    task: Task,
    samples: Samples,
    models: Sequence[int],
    outputs_of: OutputsOf,
    *,
    at_once: int | None = None,
    rows_per_pass: int = ROWS_PER_PASS,
    names: tuple[str, ...] = (),
) -> Scores:
    """Judge the ensemble of the clients' models `models`: the mean of their predictions for a sample is judged. A
    client without outputs for a chunk is left out of it. All have the same scores, so those of the first are returned.
    """
    sums: dict[int, Tensor] = {}
    counts: Counter[int] = Counter()
    step = max(1, at_once or len(models))
    for first in range(0, len(models), step):
        for start in range(0, len(samples), rows_per_pass):
            with torch.no_grad():
                who, outputs = outputs_of(models[first : first + step], samples[start : start + rows_per_pass], start)
                for one in outputs.chunk(len(who)) if len(who) else ():
                    given = task.mixable(one)
                    sums[start] = sums[start] + given if start in sums else given
                    counts[start] += 1
    tally = Tally(task, models[:1], names)
    for start in range(0, len(samples), rows_per_pass):
        part = samples[start : start + rows_per_pass]
        if start not in sums:
            return {}
        with torch.no_grad():
            tally.add(models[:1], task.unmixed(sums[start] / counts[start]), part.y)
    return tally.scores()


def reported(scores: Mapping[str, Value]) -> dict[str, Value]:
    """Scores as they are stored for each client: without matrices."""
    return {name: value for name, value in scores.items() if not _matrix(value)}


def _matrix(value: Value) -> bool:
    return isinstance(value, tuple) and any(isinstance(row, tuple) for row in value)


def judged(clients: int, count: int | None, seed: int) -> list[int]:
    """The clients whose models are evaluated: `count` of them, drawn once, or all (None)."""
    if count is None or count >= clients:
        return list(range(clients))
    drawn = seeds.generator(seed, "evaluated clients").choice(clients, count, replace=False)
    return sorted(drawn.tolist())


def evaluation(found: Mapping[int, Mapping[str, Value]], everyone: Sequence[int], samples: int) -> Evaluation:
    """The scores of `everyone`, if `found` has those of the judged models. Models known to be equal are judged once: a
    client that is not in `found` has the first model's scores.
    """
    only = next(iter(found.values()))
    return Evaluation({k: found.get(k, only) for k in everyone}, samples)


@dataclass(frozen=True)
class Fairness:
    """How the clients' scores differ: how many there are, their sample standard deviation, the best, the worst, and the
    mean of the worst tenth (of one client at least). None: too few are defined.
    """

    clients: int
    std: float | None
    best: float | None
    worst: float | None
    worst_tenth: float | None


def fairness(scores: Iterable[float | None], *, maximise: bool) -> Fairness:
    """How scores of clients differ; those that are not defined are left out."""
    found = sorted((s for s in scores if s is not None), reverse=not maximise)  # the worst first
    if not found:
        return Fairness(0, None, None, None, None)
    tenth = found[: max(1, round(len(found) / 10))]
    std = statistics.stdev(found) if len(found) > 1 else None
    return Fairness(len(found), std, found[-1], found[0], statistics.fmean(tenth))


def performance_gap(recalls: Iterable[Value]) -> float | None:
    """How far the clients' models differ over the classes: mean over classes l of max over clients k of
    |min(0, A_l - A_kl)|, A_kl being the recall of class l by client k's model and A_l its mean over the clients. None
    if no recall is defined.
    """
    found = []
    for each in zip(*(several for several in recalls if isinstance(several, tuple | list)), strict=True):
        defined = [value for value in each if isinstance(value, float)]
        if defined:
            found.append(max(defined) - statistics.fmean(defined))
    return statistics.fmean(found) if found else None


def backward_transfer(recalls: Sequence[Value]) -> float | None:
    """The effect of later training on earlier knowledge: mean over classes of the recall in the last evaluation minus
    the highest in those before it. Less than 0: forgotten. None before the second evaluation.
    """
    known = [several for several in recalls if isinstance(several, tuple | list)]
    found = []
    for *before, now in zip(*known, strict=True):
        defined = [value for value in before if isinstance(value, float)]
        if isinstance(now, float) and defined:
            found.append(now - max(defined))
    return statistics.fmean(found) if found else None


def asking(
    task: Task,
    names: Sequence[str],
    leading: str | None = None,
    own: Mapping[str, Any] | None = None,
    options_of: Callable[[plugins.Entry], Mapping[str, Any]] = lambda entry: entry.defaults,
) -> Task:
    """The task with the requested metrics: by name or as file.py:name, and a user's `own` by their names; `leading`
    chooses the best evaluation. Raises ConfigError for a name that is unknown or that the task cannot give.
    """
    wanted = [*names, *([leading] if leading and leading not in (own or {}) and leading not in _labels(names) else [])]
    found: dict[str, Metric] = {}
    for name in dict.fromkeys(wanted):
        if name != "loss":
            found[plugins.label(name)] = _found(task, name, options_of)
    for name, thing in (own or {}).items():
        if name in found or name == "loss":
            raise ConfigError(f"two metrics are called {name!r}: call yours something else")
        found[name] = _own(name, thing)
    if leading and leading != "loss" and found[plugins.label(leading)].several:
        raise ConfigError(
            f"primary_metric = {leading!r} is several numbers, so it cannot choose the best evaluation: "
            "give a metric of one number, such as "
            f"{task.primary}"
        )
    return task.asked(found, None if leading is None else plugins.label(leading))


def _labels(names: Iterable[str]) -> list[str]:
    return [plugins.label(name) for name in names if plugins.is_reference(name)]


def _found(task: Task, name: str, options_of: Callable[[plugins.Entry], Mapping[str, Any]]) -> Metric:
    """The metric of that name or reference: the task's own, or one that suits the task. Raises ConfigError."""
    if name in task.metrics:
        return task.metrics[name]
    if not plugins.known("metric", name) and not plugins.is_reference(name):
        fitting = [known for known in plugins.names("metric") if _fits(task, known)]
        raise ConfigError(
            f"{unknown('metric', name, dict.fromkeys([*task.metrics, *fitting]))}; or your own: path/to/file.py:name"
        )
    thing = plugins.load("metric", name)
    options = dict(options_of(plugins.find("metric", name)))
    metric = _own(plugins.label(name), partial(thing, **options) if options else thing)
    if metric.needs and not task.offered & set(metric.needs):
        fitting = [known for known in plugins.index("metric") if _fits(task, known)]
        raise ConfigError(
            f"the metric {name!r} needs {' or '.join(metric.needs)}, but the task {task.entry.name!r} gives "
            f"{' and '.join(sorted(task.offered))}: choose {', '.join(fitting)}"
        )
    return metric


def _fits(task: Task, name: str) -> bool:
    needs = plugins.find("metric", name).facts.get("needs", ())
    return not needs or bool(task.offered & set(needs))


def _own(name: str, thing: Any) -> Metric:
    """A metric from what a user gave: a `Metric`, a registered one, an object with update, compute and reset (as
    torchmetrics has them), or a function of predictions and targets. Raises ConfigError.
    """
    if isinstance(thing, Metric):
        return thing
    if isinstance(getattr(thing, "entry", None), plugins.Entry):
        return as_metric(thing)
    better = getattr(thing, "higher_is_better", None)
    keeps = all(callable(getattr(thing, part, None)) for part in ("update", "compute", "reset"))
    if isinstance(thing, type) or not (keeps or callable(thing)):
        raise ConfigError(
            f"the metric {name!r} is {thing!r}: give a function of (predictions, targets), or an object with update, "
            "compute and reset"
        )

    def of(judged: Judged) -> Value:
        with own_code(thing, f"the metric {name!r}"):
            return as_value(_computed(thing, judged) if keeps else thing(judged.predictions, judged.targets), name)

    return Metric(of, maximise=better is not False, share=False)


def _computed(thing: Any, judged: Judged) -> Any:
    """The result of an object that gathers batches, over all of them."""
    fresh = copy.deepcopy(thing)
    fresh.reset()
    fresh.update(judged.predictions, judged.targets)
    return fresh.compute()


def try_metrics(task: Task, outputs: Tensor, targets: Tensor, names: tuple[str, ...]) -> dict[str, Value]:
    """Compute all metrics of held-out targets [n, ...] and a few rows' outputs, repeated: so that errors occur before
    anything is trained. Returns the metrics. Raises ConfigError.
    """
    count = max(len(outputs), min(len(targets), 1000, _TRIED // max(1, outputs[0].numel())))
    tried = targets[torch.linspace(0, len(targets) - 1, min(count, len(targets))).long()]
    tally = Tally(task, [0], names)
    with torch.no_grad():
        tally.add([0], outputs[torch.arange(len(tried)) % len(outputs)], tried)
    found = tally.scores()[0]
    if isinstance(found[task.leading], tuple):
        raise ConfigError(f"the metric {task.leading!r} gave several numbers: the primary one must give one number")
    return found
