"""The benchmark's loops written by hand train the same as the engines, for every model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cutlayer.types import Smashed

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

# Widths in these tests, for models that have a width. Loops by hand draw other numbers for dropout.
SMALL: dict[str, dict[str, Any]] = {
    "resnet18": {"width": 4},
    "mobilenet": {"width": 4},
    "unet": {"width": 4},
    "gru": {"width": 8},
    "vit": {"width": 16, "heads": 2, "layers": 2},
    "bert": {"width": 16, "heads": 2, "layers": 2, "dropout": 0.0},
}
MODELS = ["lenet5", "cnn", "mlp", "resnet16", "resnet18", "mobilenet", "cnn1d", "gru", "vit", "bert", "unet"]
CELLS = [
    *[(model, "sglr", "sgd") for model in MODELS],
    *[("mlp", algorithm, "sgd") for algorithm in ("psl", "sflv1", "sflv2", "fl", "ssl")],
    *[("mlp", algorithm, optimizer) for algorithm in ("sglr", "ssl") for optimizer in ("momentum", "adam")],
    *[("mobilenet", algorithm, "sgd") for algorithm in ("sflv1", "fl")],
]


@pytest.fixture(scope="module")
def engines() -> Any:
    """The module of the benchmark."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import engines
    finally:
        sys.path.remove(str(BENCHMARKS))
    return engines


def by_hand(loop: Any) -> dict[str, Tensor]:
    """The first client's model and the server's, with the names of the whole model."""
    return {**loop.uppers[0].state_dict(), **loop.lowers[0].state_dict()}


def by_engine(training: Any, steps: int) -> dict[str, Tensor]:
    """The same models after `steps` steps in whole rounds."""
    done = index = 0
    while done < steps:
        this = training.clients.begin_round(index, 10**9, 1.0)
        done += len(list(training.algorithm.round(training.server, training.clients, this)))
        index += 1
    assert done == steps
    client = training.clients.model_state(training.clients.holder or 0)
    return {**training.server.model.state_dict(), **client}


def test_every_model_is_tested(engines: Any) -> None:
    assert list(engines.NETS) == MODELS


@pytest.mark.parametrize(("model", "algorithm", "optimizer"), CELLS)
def test_by_hand_is_what_the_engine_does(
    engines: Any, monkeypatch: pytest.MonkeyPatch, model: str, algorithm: str, optimizer: str
) -> None:
    monkeypatch.setattr(engines, "RATE", 1e-3 if optimizer == "adam" else 0.05)
    w = engines.Workload(model, algorithm, 3, 2, optimizer, local_steps=2, batches=4)
    material = engines.Material.of(w, lambda: w.net.make(**SMALL.get(model, {})))
    start = {name: tensor.clone() for name, tensor in material.net.state_dict().items()}
    loop = material.contestant("loop")
    steps = len(loop.given.batches)
    loop(steps)
    hand, ours = by_hand(loop), by_engine(material.engine("local").training, steps)

    assert hand.keys() == ours.keys() == start.keys()
    for name, before in start.items():
        if before.is_floating_point():
            torch.testing.assert_close(ours[name] - before, hand[name] - before, rtol=1e-3, atol=3e-6, msg=name)
    assert max(float((hand[n] - b).abs().max()) for n, b in start.items() if b.is_floating_point()) > 1e-3


def test_a_cell_is_measured(engines: Any, tmp_path: Path) -> None:
    file = tmp_path / "before.jsonl"
    (row,) = engines.measured([engines.Workload("mlp", "sglr", 2, 2)], 0.0, file)
    assert "error" not in row
    assert set(row["times"]) == set(engines.CONTESTANTS)
    assert json.loads(file.read_text())["fast/loop"] == row["fast/loop"]
    lines = engines.compare(file, file)
    assert lines[2].startswith("| mlp sglr C=2 b=2 | ")


def test_the_worst_come_first(engines: Any) -> None:
    rows = [{"cell": str(v), "fast/loop": [0.0, v, 9.0]} for v in (2.0, 0.5, 1.0)] + [{"cell": "x", "error": "E: e"}]
    assert [r["cell"] for r in engines.worst_first(rows)] == ["x", "0.5", "1.0", "2.0"]


def test_cells_are_what_the_rule_says(engines: Any) -> None:
    cells = engines.cells()
    assert len({str(w) for w in cells}) == len(cells)
    assert {w.model for w in cells} == set(MODELS)
    assert {w.algorithm for w in cells} == set(engines.LOOPS)
    always = [w for w in cells if (w.clients, w.batch, w.algorithm, w.optimizer) == (10, 32, "sglr", "sgd")]
    assert [w.model for w in always] == MODELS
    assert all(w.gflop <= engines.LIMIT for w in cells if w not in always)


def test_averages_of_groups() -> None:
    """ByClass: the mean over all rows of a class. Similar: the mean over rows j of clients with similar labels."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from split_averages import ByClass, Similar
    finally:
        sys.path.remove(str(BENCHMARKS))
    smashed = Smashed((torch.zeros(6, 1),), torch.tensor([0, 1, 0, 1, 2, 2]), (0, 1, 2), (2, 2, 2))
    gradient = (torch.arange(6.0).view(6, 1) / 3,)  # of the mean loss of three clients: a third of their own
    for kind, expected in ((ByClass, [1.0, 2.0, 1.0, 2.0, 4.5, 4.5]), (Similar, [1.0, 2.0, 1.0, 2.0, 4.0, 5.0])):
        given = kind(phi=1.0).split_average(gradient, smashed, (0, 1, 2))
        assert given.own[0].flatten().tolist() == pytest.approx(expected)
        assert given.clients == (0, 1, 2)
