"""Leakage of runs of all tasks: numeric targets, classes of pixels, one score per sample, rows that do not count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cutlayer import DataError, Run
from cutlayer.data.samples import Samples
from cutlayer.leakage.active import check_hijackable, hijack
from cutlayer.leakage.assess import Asked, Examined, check, examine
from cutlayer.leakage.fitting import Budget
from cutlayer.leakage.hijack import Hijack
from cutlayer.leakage.reconstruct import Knowledge, reconstruct, score
from cutlayer.leakage.subject import Subject, moments, subjects
from cutlayer.options import RunConfig
from cutlayer.report import leakage as report
from cutlayer.tasks.binary import Binary
from cutlayer.tasks.regression import Regression

MODELS = """
from torch import nn

def vectors(): return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, WIDTH))
def pixels(): return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1))
def words(): return nn.Sequential(nn.Embedding(9, 8), nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 2))

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.out = nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(8, 1)
        self.join = nn.ReLU()
    def forward(self, left, right):
        return self.out(self.join(self.left(left) + self.right(right)))
"""
PAIRS = """
import torch
from cutlayer.data.samples import Samples, Source

def load():
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    every = Samples((x[:, :3], x[:, 3:]), x[:, 0])
    return Source("pairs", every[:300], every[300:400], every[400:], ())
"""
FEW = Budget(steps=60, batch=32, check_every=20)


def trained(folder: Path, task: str, x: np.ndarray, y: np.ndarray, model: str, width: int = 1, **options: Any) -> Path:
    """The folder of a small trained run."""
    np.savez(folder / "data.npz", x=x, y=y)
    (folder / "models.py").write_text(MODELS.replace("WIDTH", str(width)))
    given: dict[str, Any] = {
        "data": str(folder / "data.npz"),
        "model": f"{folder / 'models.py'}:{model}",
        "task": task,
        "clients": 2,
        "rounds": 2,
        "algorithm": "psl",
        "cut": "1",
        "validation": 100,
        "test": 100,
    }
    given = {name: value for name, value in {**given, **options}.items() if value is not None}
    Run(RunConfig.of(given), out=folder / "run").run()
    return folder / "run"


def vectors(n: int = 500) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, 6)).astype("float32")


def numbers(folder: Path, **options: Any) -> Path:
    x = vectors()
    return trained(folder, "regression", x, (x[:, 0] - x[:, 1]).astype("float32"), "vectors", **options)


def pictures() -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(0).normal(size=(500, 1, 6, 6)).astype("float32").cumsum(2).cumsum(3) / 6
    return x, (x[:, 0] > 0).astype("int64") + (x[:, 0] > 0.5)


def first(folder: Path) -> Subject:
    (moment,) = moments(folder)
    return next(iter(subjects(moment, 1, 150, 150, 0)))


def examined(folder: Path, *knowledge: Knowledge) -> Examined:
    return examine(first(folder), Asked(knowledge, ()))


@pytest.mark.long
@pytest.mark.parametrize("task", ["regression", "segmentation"])
def test_inputs_are_attacked_whatever_the_task(task: str, tmp_path: Path) -> None:
    """Reconstruction is measured. Tables, JSON and notes say that measures of classes are missing."""
    run = numbers(tmp_path) if task == "regression" else trained(tmp_path, task, *pictures(), "pixels")
    made = examined(run, "model", "smashed")
    finding = made.finding
    assert finding.attacks["model"].explained > 0.8
    assert finding.attacks["model"].attack.accuracy is finding.attacks["smashed"].true_accuracy is None
    assert (finding.metric, finding.accuracy) == ({"regression": "rmse", "segmentation": "miou"}[task], None)
    assert finding.score == json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])["test_score"]
    assert set(finding.not_measured) == {"classified"}
    kind = {"regression": "numbers", "segmentation": "several classes per sample"}[task]
    assert any("classified not measured: a classifier" in n and f"are {kind}." in n for n in report.notes([finding]))
    cells = [list(column.cells) for column in report.tables([finding])[0].columns]
    assert cells[-1] == cells[-2] == ["not measured"] * 2
    assert cells[1][0].startswith(finding.metric)
    found = json.loads(report.as_json([finding], []))["findings"][0]
    assert found["attacks"]["model"]["true_accuracy"] is None
    assert "classified" in found["not_measured"]
    assert (report.pictures([made]) is None) == (task == "regression")


def test_labels_that_are_numbers_stay(tmp_path: Path) -> None:
    """In the U-shaped split, label leakage is not measured for numbers, with a note; for classes it is."""
    options: dict[str, Any] = {"algorithm": "ussl", "tail_cut": "3"}
    finding = examined(numbers(tmp_path, **options)).finding
    assert finding.labels is None
    assert any("labels not measured: label leakage tells classes apart" in note for note in report.notes([finding]))
    classes = tmp_path / "classes"
    classes.mkdir()
    x = vectors()
    found = examined(trained(classes, "classification", x, (x[:, 0] > 0).astype("int64"), "vectors", 2, **options))
    assert found.finding.labels is not None
    assert found.finding.not_measured == {}


def test_a_class_with_one_sample_ends_no_examination(tmp_path: Path) -> None:
    y = np.zeros(500, "int64")
    y[:3] = 1  # too few for two attacked samples of this class
    run = trained(tmp_path, "classification", vectors(), y, "vectors", 2, algorithm="ussl", tail_cut="3")
    finding = examined(run).finding
    assert finding.labels is None
    assert "two classes" in finding.not_measured["labels"]


def test_one_score_and_rows_that_do_not_count(tmp_path: Path) -> None:
    """The attack uses the task's losses for a server part with one score and for labels below 0."""
    x = vectors()
    finding = examined(trained(tmp_path, "binary", x, (x[:, 0] > 0).astype("int64"), "vectors"), "smashed").finding
    assert finding.attacks["smashed"].true_accuracy is not None
    assert finding.attacks["smashed"].true_accuracy > 0.8
    ignoring = tmp_path / "ignoring"
    ignoring.mkdir()
    y = np.where(np.arange(500) % 4 == 0, -7, (x[:, 0] > 0).astype("int64"))
    run = trained(ignoring, "classification", x, y, "vectors", 2, ignore_index=-7)
    found = examined(run, "model").finding
    assert found.attacks["model"].true_accuracy is not None
    assert found.attacks["model"].true_accuracy > 0.8  # at most 0.75 if rows that do not count were judged


def test_the_attacker_uses_the_tasks_losses() -> None:
    """Targets help to train a surrogate, so other targets change the attack, unless targets stay with the client."""
    x = torch.from_numpy(vectors(400))
    y, auxiliary = x[:200, 0] - x[:200, 1], Samples(x[200:], x[200:, 0] - x[200:, 1])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        client, server = nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, 1)

    def attack(known: Samples, labelled: bool = True) -> float:
        found = reconstruct(
            x[:200], client(x[:200]).detach(), y, known, server=server, task=Regression(), knowledge="smashed",
            labelled=labelled, budget=FEW,
        )  # fmt: skip
        return found.report.attack.mse

    other = Samples(auxiliary.x, auxiliary.y * 3)
    assert attack(auxiliary) != attack(other)
    assert attack(auxiliary, labelled=False) == attack(other, labelled=False)


def test_the_judge_knows_what_labels_are() -> None:
    x = torch.from_numpy(vectors(300))
    known = Samples(x, (x[:, 0] > 0).long())
    assert score(x, known.y, x, known, 0, Binary())[0].accuracy is not None
    assert score(x, x[:, 0], x, Samples(x, x[:, 0]), 0, Regression())[0].accuracy is None


def test_an_active_server_without_classes(tmp_path: Path) -> None:
    """The hijacker ignores labels and no client watches. Notes say both."""
    (moment,) = moments(numbers(tmp_path))
    check_hijackable(moment)
    ((found, kept),) = hijack(moment, 50, 150, 0)
    assert (found.labelled, found.honest, found.hijacked) == (False, (), ())
    assert kept["inputs"].shape == kept["reconstructions"].shape
    assert found.attack.accuracy is None
    columns = report.active([found]).columns
    assert [next(iter(c.cells)) for c in columns[5:]] == ["not measured"] * 4
    notes = report.active_notes([found])
    assert any("watch not measured: it sorts gradients by class" in note for note in notes)
    assert any("hijacker that knows labels not measured" in note for note in notes)


def test_a_hijacker_that_knows_labels_takes_those_that_do_not_count() -> None:
    x = torch.from_numpy(vectors(200))
    attacker = Hijack(Samples(x, torch.arange(200) % 3 - 1), (8,), labelled=True, ahead=2)
    assert attacker.gradients(torch.randn(4, 8), torch.tensor([-1, 0, 1, -1])).shape == (4, 8)


def test_tokens_in_one_vector_and_several_tensors_are_refused(tmp_path: Path) -> None:
    """The error is raised before anything is measured."""
    words = np.random.default_rng(0).integers(0, 9, (500, 6))
    run = trained(tmp_path, "classification", words, words[:, 0] % 2, "words")
    (moment,) = moments(run)
    with pytest.raises(DataError, match=r"run' sends smashed data of shape \(48,\) for 6 tokens, .* cut where each"):
        check(next(iter(subjects(moment, 1, 50, None, 0))), Asked())
    (tmp_path / "pairs.py").write_text(PAIRS)
    both = tmp_path / "both"
    both.mkdir()
    source: dict[str, Any] = {"data": f"{tmp_path / 'pairs.py'}:load", "validation": None, "test": None, "cut": "join"}
    run = trained(both, "regression", vectors(), vectors()[:, 0], "Two", **source)
    with pytest.raises(DataError, match=r"run' has 2 tensors of inputs per sample: .* name runs with such data"):
        moments(run)
