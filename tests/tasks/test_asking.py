"""Requested metrics and losses: by name, from a file, and from Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cutlayer import ConfigError, Run, RunFolderError, UsageError
from cutlayer.tasks import Judged, metric
from cutlayer.tasks.classification import Classification
from cutlayer.tasks.own_loss import RowLoss

SMALL: dict[str, Any] = {
    "algorithm": "sglr",
    "model": "mlp",
    "clients": 2,
    "samples_per_client": 30,
    "rounds": 2,
    "batch": 10,
    "validation": 40,
    "test": 40,
}


def brier(predictions: Tensor, targets: Tensor) -> Tensor:
    return (predictions.softmax(1) - functional.one_hot(targets, 10)).square().sum(1).mean()


class Largest:
    """A metric like those of torchmetrics, with an update for each batch and then the result."""

    higher_is_better = False

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.largest = torch.tensor(0.0)

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        self.largest = torch.maximum(self.largest, predictions.abs().max())

    def compute(self) -> Tensor:
        return self.largest


@metric("halves", share=False)
def halves(judged: Judged) -> float:
    return 0.5


def test_further_metrics_by_name_and_from_python() -> None:
    result = Run(**SMALL, metrics={"brier": brier, "largest": Largest(), "halves": halves}).run()
    assert 0 < result.test["brier"] < 2
    assert result.test["largest"] > 0
    assert result.test["halves"] == 0.5
    assert result.metric == "accuracy"
    named = Run(**SMALL, metrics=["auroc", "average_precision"], primary_metric="balanced_accuracy").run()
    assert 0 < named.test["auroc"] < 1
    assert named.metric == "balanced_accuracy"
    assert named.test_score == named.test["balanced_accuracy"]


def test_a_metric_of_ones_own_chooses_the_best_evaluation() -> None:
    run = Run(**{**SMALL, "rounds": 4}, eval_every=1, metrics={"largest": Largest()}, primary_metric="largest")
    result = run.run()
    best = min(run.evaluations, key=lambda s: s.validation["largest"])  # type: ignore[index]
    assert result.best_round == best.round
    assert not result.share


def test_metrics_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def wrong(predictions, targets):\n    return (predictions.argmax(1) != targets).sum()\n")
    out = tmp_path / "run"
    result = Run(**SMALL, metrics=[f"{file}:wrong"], out=out).run()
    assert result.test["wrong"] == pytest.approx(40 * (1 - result.test["accuracy"]))
    assert json.loads((out / "result.json").read_text())["test"]["wrong"] == result.test["wrong"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["acuracy"]}, "did you mean 'accuracy'"),
        ({"metrics": ["rmse"]}, "needs numbers, but the task 'classification' gives"),
        ({"primary_metric": "confusion"}, "is several numbers"),
        ({"metrics": {"odd": 3}}, "give a function"),
        ({"metrics": {"broken": lambda p, t: p[999]}}, "the metric 'broken' failed"),
        ({"metrics": {"pair": lambda p, t: (1, 2)}, "primary_metric": "pair"}, "must give one number"),
        ({"metrics": {"words": lambda p, t: "good"}}, "gave str"),
        ({"loss": lambda o, t: 3.0}, "return a tensor"),
        ({"loss": lambda o, t: functional.cross_entropy(o, t, reduction="sum")}, "not a mean over rows"),
        ({"loss": lambda o, t: o}, "return one number per row"),
        ({"loss": lambda o, t: o.detach().mean()}, "no gradient"),
        ({"loss": lambda o, t: o[:, 99].mean()}, "cannot be computed"),
        ({"loss": nn.CrossEntropyLoss(), "label_smoothing": 0.1}, "no effect with a loss of your own"),
    ],
)
def test_what_is_wrong_is_found_before_training(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        Run(**SMALL, **options, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def losses(**options: Any) -> list[float]:
    return [record.loss for record in Run(**SMALL, **options)]


@pytest.mark.parametrize("engine", ["local", "stacked"])
def test_a_loss_of_ones_own_that_is_the_tasks_trains_alike(engine: str) -> None:
    """The user's loss may return a loss per row, or a mean, which is then computed row by row."""
    known = losses(engine=engine)
    assert losses(engine=engine, loss=nn.CrossEntropyLoss(reduction="none")) == pytest.approx(known, rel=1e-5)
    assert losses(engine=engine, loss=nn.CrossEntropyLoss()) == pytest.approx(known, rel=1e-5)


@pytest.mark.parametrize("algorithm", ["fl", "ussl", "cl"])
def test_a_loss_of_ones_own_wherever_the_loss_is_computed(algorithm: str) -> None:
    def twice(outputs: Tensor, targets: Tensor) -> Tensor:
        return 2 * functional.cross_entropy(outputs, targets, reduction="none")

    options = {**SMALL, "algorithm": algorithm, "rounds": 1, "epochs": 1}
    options |= {"tail_cut": "hidden2", "cut": "hidden1"} if algorithm == "ussl" else {}
    del options["epochs"]
    first = [next(iter(Run(**options, **more))).loss for more in ({}, {"loss": twice})]
    assert first[1] == pytest.approx(2 * first[0], rel=1e-5)


def test_a_mean_that_branches_on_values_is_taken_row_by_row() -> None:
    def clipped(outputs: Tensor, targets: Tensor) -> Tensor:
        loss = functional.cross_entropy(outputs, targets)
        return loss if loss.item() < 1e9 else loss * 0

    rows = RowLoss(clipped)
    outputs, targets = torch.randn(6, 3), torch.arange(6) % 3
    rows.prove(outputs[:3], targets[:3])
    assert torch.allclose(rows(outputs, targets), Classification().losses(outputs, targets))


def test_resuming_asks_for_what_was_ones_own(tmp_path: Path) -> None:
    out = tmp_path / "run"
    own: dict[str, Any] = {"loss": nn.CrossEntropyLoss(), "metrics": {"brier": brier}}
    whole = Run(**SMALL, **own).run()
    for record in (run := Run(**SMALL, checkpoint_every=1, **own, out=out)):
        if record.round == 1:
            break
    del run
    with pytest.raises(RunFolderError, match=r"with a loss of your own.*loss=\.\.\."):
        Run.resume(out)
    with pytest.raises(RunFolderError, match=r"with metrics of your own.*metrics=\.\.\."):
        Run.resume(out, loss=own["loss"])
    assert Run.resume(out, **own).run().test == whole.test


def test_a_training_that_is_given_has_its_own_loss() -> None:
    training = Run(**SMALL).training
    with pytest.raises(UsageError, match="leave loss and metrics out"):
        Run(**SMALL, training=training, metrics={"brier": brier})
