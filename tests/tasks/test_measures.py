"""Metrics equal scikit-learn's and are None if they are not defined."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torch import Tensor

from cutlayer import plugins
from cutlayer.data.samples import Samples
from cutlayer.scoring import evaluate
from cutlayer.tasks import Task
from cutlayer.tasks.binary import Binary
from cutlayer.tasks.classification import Classification
from cutlayer.tasks.judging import Judged, as_value
from cutlayer.tasks.measures import as_metric
from cutlayer.tasks.multilabel import Multilabel
from cutlayer.tasks.regression import Regression
from cutlayer.tasks.segmentation import Segmentation
from cutlayer.tasks.tokens import TokenPrediction


def judge(task: Task, outputs: Tensor, targets: Tensor, *more: str) -> dict:
    """The task's metrics of one model's outputs, computed in chunks of seven rows."""
    further = {name: as_metric(plugins.load("metric", name)) for name in more}
    samples = Samples(torch.zeros(len(targets), 1), targets)

    def outputs_of(clients, part, start):  # type: ignore[no-untyped-def]
        return clients, outputs[start : start + len(part)]

    return evaluate(task.asked(further), samples, [0], outputs_of, rows_per_pass=7)[0]


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def classes(*shape: int, k: int, seed: int = 1) -> Tensor:
    return torch.randint(k, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", [2, 5])
def test_classes_as_scikit_learn_has_them(k: int) -> None:
    outputs, y = some(200, k), classes(200, k=k)
    said = outputs.argmax(1)
    found = judge(Classification(), outputs, y, "auroc", "average_precision")
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(y, said))
    assert found["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(y, said))
    assert found["macro_f1"] == pytest.approx(sk.f1_score(y, said, average="macro"))
    assert found["recall"] == pytest.approx(sk.recall_score(y, said, average=None))
    assert np.array_equal(found["confusion"], sk.confusion_matrix(y, said))
    assert found["majority"] == pytest.approx(y.bincount().max().item() / 200)
    shares = outputs.double().softmax(1).numpy()
    given = shares[:, 1] if k == 2 else shares
    assert found["auroc"] == pytest.approx(sk.roc_auc_score(y, given, multi_class="ovr"))
    assert found["average_precision"] == pytest.approx(sk.average_precision_score(y, given))


def test_how_far_classes_are_behind_the_best() -> None:
    """Recalls are 3 of 4, 1 of 2 and 0 of 1, so they are 0, 0.25 and 0.75 below the best. One class has no rows."""
    said, y = torch.tensor([0, 0, 0, 1, 1, 0, 0]), torch.tensor([0, 0, 0, 0, 1, 1, 2])
    outputs = torch.nn.functional.one_hot(said, 4).float()
    assert judge(Classification(), outputs, y, "class_gap")["class_gap"] == pytest.approx((0.25 + 0.75) / 3)


def test_areas_are_reported_by_default_of_two_classes_only() -> None:
    assert "auroc" in judge(Classification(), some(20, 2), classes(20, k=2))
    found = judge(Classification(), some(50, 3), classes(50, k=3))
    assert "auroc" not in found
    assert "confusion" in found
    assert "confusion" not in judge(Classification(), some(50, 30), classes(50, k=30))


def test_a_class_without_samples() -> None:
    outputs, y = some(40, 3), classes(40, k=2)
    found = judge(Classification(), outputs, y, "auroc", "average_precision")
    assert found["auroc"] is None
    assert found["average_precision"] is None
    assert found["recall"][2] is None
    assert found["balanced_accuracy"] == pytest.approx(sum(found["recall"][:2]) / 2)
    assert judge(Binary(), some(9, 1), torch.ones(9, dtype=torch.long))["auroc"] is None


def test_a_model_that_has_diverged() -> None:
    found = judge(Classification(), torch.full((9, 2), math.nan), classes(9, k=2))
    assert found["auroc"] is None
    assert math.isnan(found["loss"])


def test_rows_that_do_not_count() -> None:
    outputs, y = some(60, 3), classes(60, k=3)
    ignored = torch.where(torch.arange(60) % 3 == 0, torch.tensor(-100), y)
    kept = ignored != -100
    found = judge(Classification(ignore_index=-100), outputs, ignored)
    alone = judge(Classification(), outputs[kept], y[kept])
    assert {k: v for k, v in found.items() if k != "loss"} == {k: v for k, v in alone.items() if k != "loss"}
    assert found["loss"] == pytest.approx(alone["loss"])
    nothing = judge(Classification(ignore_index=-100), outputs, torch.full((60,), -100))
    assert nothing["accuracy"] is None
    assert nothing["macro_f1"] is None


def test_binary() -> None:
    outputs, y = some(80, 1), classes(80, k=2)
    found = judge(Binary(), outputs, y)
    shares = torch.sigmoid(outputs[:, 0])
    said = shares > 0.5
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(y, said))
    assert found["auroc"] == pytest.approx(sk.roc_auc_score(y, shares))
    assert found["average_precision"] == pytest.approx(sk.average_precision_score(y, shares))
    assert found["macro_f1"] == pytest.approx(sk.f1_score(y, said, average="macro"))
    assert np.array_equal(found["confusion"], sk.confusion_matrix(y, said))


def test_labels() -> None:
    outputs, y = some(90, 4), classes(90, 4, k=2).float()
    found = judge(Multilabel(), outputs, y)
    shares = torch.sigmoid(outputs)
    said = shares > 0.5
    assert found["accuracy"] == pytest.approx((said == y).float().mean().item())
    assert found["macro_f1"] == pytest.approx(sk.f1_score(y, said, average="macro"))
    assert found["recall"] == pytest.approx(sk.recall_score(y, said, average=None))
    assert found["auroc"] == pytest.approx(sk.roc_auc_score(y, shares, average="macro"))
    assert found["average_precision"] == pytest.approx(sk.average_precision_score(y, shares, average="macro"))
    y[:, 2] = 0
    assert judge(Multilabel(), outputs, y)["auroc"] is None


def test_numbers() -> None:
    outputs, y = some(50, 3), some(50, 3, seed=2)
    found = judge(Regression(), outputs, y)
    assert found["mae"] == pytest.approx(sk.mean_absolute_error(y, outputs), rel=1e-5)
    assert found["rmse"] == pytest.approx(math.sqrt(sk.mean_squared_error(y, outputs)), rel=1e-5)
    assert found["r2"] == pytest.approx(sk.r2_score(y, outputs), rel=1e-5)
    assert judge(Regression(), outputs, torch.ones(50, 3))["r2"] is None


@pytest.mark.parametrize("ignore", [None, 255])
def test_pixels(ignore: int | None) -> None:
    outputs, y = some(12, 4, 6, 5), classes(12, 6, 5, k=3)
    if ignore is not None:
        y[:, :2] = ignore
    found = judge(Segmentation(ignore_index=ignore), outputs, y)
    kept = y.flatten() != (ignore or -1)
    true, said = y.flatten()[kept], outputs.argmax(1).flatten()[kept]
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(true, said))
    assert found["miou"] == pytest.approx(sk.jaccard_score(true, said, average="macro"))
    assert found["iou"] == pytest.approx(sk.jaccard_score(true, said, average=None))
    assert found["dice"] == pytest.approx(sk.f1_score(true, said, average="macro"))
    assert Segmentation().leading == "miou"
    assert Segmentation().maximise


def test_tokens_and_the_token_after_each() -> None:
    outputs, y = some(9, 6, 5), classes(9, 6, k=5)
    y[:, 4:] = -100
    found = judge(TokenPrediction(), outputs, y)
    assert found["accuracy"] == pytest.approx((outputs.argmax(2) == y)[:, :4].double().mean().item())
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    shifted = judge(TokenPrediction(next_token=True), outputs, y)
    right = (outputs[:, :-1].argmax(2) == y[:, 1:])[:, :3]
    assert shifted["accuracy"] == pytest.approx(right.double().mean().item())


def test_what_a_metric_of_ones_own_may_give() -> None:
    assert as_value(torch.tensor(0.5), "m") == 0.5
    assert as_value(np.array([1, math.nan]), "m") == (1.0, None)
    assert as_value(None, "m") is None
    with pytest.raises(plugins.ConfigError, match="'m' gave str"):
        as_value("much", "m")


def test_what_is_judged_knows_its_classes() -> None:
    judged = Judged(torch.tensor([0, 2]), torch.tensor([0, 1]), 0.0, classes=4)
    assert judged.confusion.shape == (4, 4)
