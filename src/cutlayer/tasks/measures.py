"""Measures that tasks share: of classes, of labels, of probabilities and of numbers. A task names its default measures.
Any other that suits the task can be requested with `metrics`.

A measure is None if it is not defined, such as the area under the curve of a class without samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from cutlayer import plugins
from cutlayer.tasks.judging import Judged, Metric, Value

T = TypeVar("T", bound=Callable[..., Any])

CLASSES, LABELS, PROBABILITIES, NUMBERS, ENTROPY = "classes", "labels", "probabilities", "numbers", "entropy"
"""What tasks provide: one class per row, several labels per row, probabilities, numbers, a loss that is an entropy."""


def metric(
    name: str,
    *,
    needs: Sequence[str] = (),
    maximise: bool = True,
    share: bool = True,
    title: str = "",
    upto: int = 0,
    several: bool = False,
    library: str = "",
) -> Callable[[T], T]:
    """Registers a function of a model's results (`Judged`) under `name`; the rest is as in `Metric`."""
    facts: dict[str, Any] = {
        "needs": list(needs),
        "maximise": maximise,
        "share": share,
        "upto": upto,
        "several": several,
        "library": library,
    }
    return plugins.register("metric", name, title=title, **facts)


def chosen(*measures: Callable[[Judged], Value], default: bool = True) -> dict[str, Metric]:
    """Registered measures as the metrics of a task, by their names."""
    return {entry_of(of).name: as_metric(of, default=default) for of in measures}


def as_metric(of: Callable[[Judged], Value], *, default: bool = True) -> Metric:
    """A registered measure as a metric."""
    facts = entry_of(of).facts
    upto, needs = facts["upto"], tuple(facts["needs"])
    return Metric(of, facts["maximise"], facts["share"], default, upto, needs, facts["several"])


def entry_of(of: Any) -> plugins.Entry:
    """The facts with which a measure was registered."""
    found: plugins.Entry = of.entry
    return found


@metric("accuracy", needs=(CLASSES, LABELS), title="Accuracy")
def accuracy(judged: Judged) -> float | None:
    """Fraction of the samples (labels, pixels, tokens) that are right."""
    count = judged.targets.numel()
    return (judged.decided == judged.targets).sum().item() / count if count else None


@metric("majority", needs=(CLASSES,), title="Majority share", upto=1000)
def majority(judged: Judged) -> float | None:
    """Share of the most frequent class: the accuracy of always answering the same."""
    count = judged.targets.numel()
    return judged.targets.flatten().long().bincount().max().item() / count if count else None


@metric("recall", needs=(CLASSES, LABELS), title="Recall per class", upto=20, several=True)
def recall(judged: Judged) -> Value:
    """Fraction of each class's samples that are found; None for a class without samples."""
    hits, true, _ = _counts(judged)
    return _quotients(hits, true)


@metric("balanced_accuracy", needs=(CLASSES,), title="Balanced accuracy", upto=1000)
def balanced_accuracy(judged: Judged) -> float | None:
    """Mean of the recall of the classes that have samples."""
    return _mean_defined(recall(judged))


@metric("class_gap", needs=(CLASSES,), maximise=False, title="Gap between classes", upto=1000)
def class_gap(judged: Judged) -> float | None:
    """How far the classes are behind the best one, in recall: the mean over the classes that have samples."""
    found, mean = recall(judged), balanced_accuracy(judged)
    assert isinstance(found, tuple), "one number per class"
    return None if mean is None else max(value for value in found if isinstance(value, float)) - mean


@metric("macro_f1", needs=(CLASSES, LABELS), title="Macro F1", upto=1000)
def macro_f1(judged: Judged) -> float | None:
    """Mean of the F1 score of the classes (labels) that occur in targets or predictions."""
    return _mean_defined(_f1(judged))


@metric("confusion", needs=(CLASSES,), title="Confusion matrix", share=False, upto=20, several=True)
def confusion(judged: Judged) -> Value:
    """How many samples of each class (rows) were assigned to each class (columns)."""
    return tuple(tuple(map(float, row)) for row in judged.confusion.tolist())


@metric("iou", needs=(CLASSES,), title="IoU per class", upto=20, several=True)
def iou(judged: Judged) -> Value:
    """Intersection over union of each class; None for a class that occurs neither in targets nor in predictions."""
    hits, true, said = _counts(judged)
    return _quotients(hits, true + said - hits)


@metric("miou", needs=(CLASSES,), title="Mean IoU")
def miou(judged: Judged) -> float | None:
    """Mean of the intersection over union of the classes that occur."""
    return _mean_defined(iou(judged))


@metric("dice", needs=(CLASSES,), title="Dice")
def dice(judged: Judged) -> float | None:
    """Mean of the Dice coefficient of the classes that occur."""
    return _mean_defined(_f1(judged))


@metric("auroc", needs=(PROBABILITIES,), title="AUROC", upto=2, library="scikit-learn")
def auroc(judged: Judged) -> float | None:
    """Area under the ROC curve: of the second of two classes, else the mean of one class against the rest."""
    from sklearn.metrics import roc_auc_score  # type: ignore[import-untyped]

    return _mean_over(judged, roc_auc_score)


@metric("average_precision", needs=(PROBABILITIES,), title="Average precision", upto=2, library="scikit-learn")
def average_precision(judged: Judged) -> float | None:
    """Average precision: of the second of two classes, else the mean of one class against the rest."""
    from sklearn.metrics import average_precision_score

    return _mean_over(judged, average_precision_score)


@metric("mae", needs=(NUMBERS,), maximise=False, share=False, title="Mean absolute error")
def mae(judged: Judged) -> float:
    """Mean absolute error."""
    return _errors(judged).abs().mean().item()


@metric("rmse", needs=(NUMBERS,), maximise=False, share=False, title="Root mean squared error")
def rmse(judged: Judged) -> float:
    """Root of the mean squared error."""
    return _errors(judged).square().mean().sqrt().item()


@metric("r2", needs=(NUMBERS,), share=False, title="R squared")
def r2(judged: Judged) -> float | None:
    """1 - squared error / squared deviation from the mean, the mean over the quantities; None where one is constant."""
    wanted = _flat(judged.targets).double()
    around = (wanted - wanted.mean(0)).square().sum(0)
    if not (around > 0).all():
        return None
    left = (wanted - _flat(judged.predictions).double()).square().sum(0)
    return float((1 - left / around).mean())


@metric("perplexity", needs=(ENTROPY,), maximise=False, share=False, title="Perplexity")
def perplexity(judged: Judged) -> float | None:
    """exp of the mean loss of a token; None where it overflows."""
    return math.exp(judged.loss) if judged.loss < 700 else None


def _flat(rows: Tensor) -> Tensor:
    """[n, t...] -> [n, numbers of a row]; single numbers may be [n] or [n, 1]."""
    return rows.reshape(len(rows), -1)


def _errors(judged: Judged) -> Tensor:
    return _flat(judged.predictions).double() - _flat(judged.targets).double()


def _labelled(judged: Judged) -> bool:
    """Whether a row has several labels, each with a probability."""
    return judged.targets.dim() > 1 and judged.predictions.is_floating_point()


def _counts(judged: Judged) -> tuple[Tensor, Tensor, Tensor]:
    """Per class (or label): how many samples are correctly predicted, have it, and are predicted to have it."""
    if _labelled(judged):
        said, true = judged.predictions.flatten(1) > 0.5, judged.targets.flatten(1) > 0.5
        return (said & true).sum(0), true.sum(0), said.sum(0)
    counts = judged.confusion
    return counts.diagonal(), counts.sum(1), counts.sum(0)


def _f1(judged: Judged) -> Value:
    hits, true, said = _counts(judged)
    return _quotients(2 * hits, true + said)


def _quotients(above: Tensor, below: Tensor) -> tuple[float | None, ...]:
    return tuple(a / b if b else None for a, b in zip(above.tolist(), below.tolist(), strict=True))


def _mean_defined(values: Value) -> float | None:
    assert isinstance(values, tuple), "one number per class"
    defined = [value for value in values if isinstance(value, float)]
    return sum(defined) / len(defined) if defined else None


def _mean_over(judged: Judged, score: Callable[..., Any]) -> float | None:
    """The mean of scikit-learn's `score` over all questions; None if a question has only one answer."""
    if not bool(torch.isfinite(judged.predictions).all()):
        return None
    found = []
    for true, said in _questions(judged):
        if true.all() or not true.any():
            return None
        found.append(float(score(true.cpu().numpy(), said.double().cpu().numpy())))
    return sum(found) / len(found) if found else None


def _questions(judged: Judged) -> Iterator[tuple[Tensor, Tensor]]:
    """Yes-or-no questions, (answers [n], scores [n]) each: is it the second class, or this one; has it this label."""
    given, targets = judged.predictions, judged.targets
    if given.dim() == targets.dim():
        yield from zip((targets > 0.5).view(len(targets), -1).T, given.view(len(given), -1).T, strict=True)
    elif given.shape[1] == 2:
        yield targets == 1, given[:, 1].double() - given[:, 0].double()
    else:
        shares = given.double().softmax(1)
        yield from ((targets == k, shares[:, k]) for k in range(given.shape[1]))


OF_ROWS = chosen(accuracy, majority, balanced_accuracy, macro_f1, auroc, average_precision, recall, confusion)
"""The default metrics if every row has one class."""
