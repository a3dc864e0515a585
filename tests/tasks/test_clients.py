"""Which models are judged, on which rows and how often, and how clients differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cutlayer import ConfigError, DataError, Run, from_arrays
from cutlayer.files import read_records
from cutlayer.scoring import backward_transfer, fairness, performance_gap
from cutlayer.testing.deployed import train_in_memory
from cutlayer.types import as_tuple

SMALL: dict[str, Any] = {
    "algorithm": "psl",
    "model": "mlp",
    "clients": 3,
    "samples_per_client": 40,
    "rounds": 2,
    "batch": 10,
    "validation": 40,
    "test": 60,
    "client_lr": 0.01,
    "partition": "dirichlet",
    "precision": "float64",
}
ENGINES = ["local", "stacked"]


def done(**options: Any) -> Run:
    run = Run(**{**SMALL, **options})
    run.run()
    return run


def test_how_clients_differ() -> None:
    found = fairness([0.1 * k for k in range(1, 21)] + [None], maximise=True)
    assert (found.clients, found.worst, found.best) == (20, pytest.approx(0.1), pytest.approx(2.0))
    assert found.worst_tenth == pytest.approx(0.15)
    assert found.std == pytest.approx(np.std([0.1 * k for k in range(1, 21)], ddof=1))
    assert fairness([1.0, 3.0], maximise=False).worst == 3.0
    assert fairness([None], maximise=True).worst is None


def test_how_clients_differ_over_the_classes() -> None:
    """Means are 0.4, 0.5 and 0.2. The best clients are 0.5, 0.4 and 0.0 better. No client has the last class."""
    recalls = [(0.1, 0.9, 0.2, None), (0.9, 0.3, None, None), (0.2, 0.3, None, None)]
    assert performance_gap(recalls) == pytest.approx((0.5 + 0.4 + 0.0) / 3)
    assert performance_gap([(0.3, 0.5)] * 4) == 0
    assert performance_gap([]) is None
    assert performance_gap([None, (None,)]) is None


def test_what_is_forgotten() -> None:
    """The first class has lost 0.5 since its best, and the second has gained 0.2. The others have one value each."""
    history = [(0.4, 0.1, None, 0.3), (0.9, 0.5, None, None), (0.4, 0.7, 0.8, None)]
    assert backward_transfer(history) == pytest.approx((-0.5 + 0.2) / 2)
    assert backward_transfer(history[:1]) is None
    assert backward_transfer([None, *history[:1]]) is None
    assert backward_transfer([]) is None


def test_a_result_says_how_classes_fare() -> None:
    run = done(rounds=3, eval_every=1, evaluate_on="both")
    assert run.result is not None
    recalls = [found.test["recall"] for found in run.evaluations]
    each = [run.by_client["global"].each("recall")[k] for k in range(3)]  # type: ignore[union-attr]
    assert run.result.fairness["global"]["performance_gap"] == performance_gap(each) > 0
    assert run.result.fairness["global"]["backward_transfer"] == backward_transfer(recalls)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_clients_metrics_are_kept(engine: str, tmp_path: Path) -> None:
    run = done(engine=engine, eval_every=1, out=tmp_path / "run")
    lines = list(read_records(tmp_path / "run/clients.jsonl"))
    assert [(line["round"], line["on"]) for line in lines] == [(1, "global"), (2, "global")]
    last = lines[-1]["clients"]
    assert run.result is not None
    assert np.mean([own["accuracy"] for own in last.values()]) == pytest.approx(run.result.test_score)
    assert len(last["0"]["recall"]) == 10
    assert "confusion" not in last["0"]
    scores = [own["accuracy"] for own in last.values()]
    assert run.result.fairness["global"]["std"] == pytest.approx(np.std(scores, ddof=1))
    assert run.evaluations[-1].test_score_worst == min(scores)


@pytest.mark.parametrize("algorithm", ["psl", "fl", "sflv1", "cl", "ssl"])
def test_rows_of_ones_own(algorithm: str) -> None:
    """Own test rows are held out from training, and every client's model is judged on its own."""
    found = {}
    for engine in ENGINES if algorithm not in ("cl", "ssl") else ["local"]:
        run = done(algorithm=algorithm, engine=engine, evaluate_on="both")
        t = run.training
        assert sorted(t.own_tests) == [0, 1, 2]
        dealt = sum(map(len, t.own_tests.values()))
        assert dealt + int(t.counts.sum()) == 120
        own = run.by_client["own"]
        assert own is not None
        assert list(own.scores) == [0, 1, 2]
        assert run.evaluations[-1].own_score == pytest.approx(np.mean(list(own.each("accuracy").values())))
        found[engine] = {k: s["loss"] for k, s in own.scores.items()}
        held = run.training.own_tests[1]
        outputs = run.training.clients.evaluate(held, run.training.server.predict)
        if algorithm == "psl":
            assert own.scores[1]["loss"] == pytest.approx(outputs.scores[1]["loss"])
    assert found["local"] == pytest.approx(found[engine], rel=1e-9)


def test_own_alone_is_the_score() -> None:
    both, own = done(evaluate_on="both"), done(evaluate_on="own")
    assert own.result is not None
    assert both.result is not None
    assert own.result.test_score == both.evaluations[-1].own_score
    assert own.result.test == both.result.own
    assert "Held out 20% of each client's rows" in own.training.remarks[0]


def test_owners_are_tested_on_their_own_test_rows() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 4)).astype(np.float32), rng.integers(0, 2, 200)
    owner = np.repeat(["north", "south"], [120, 80])
    data = from_arrays(x, y, client=owner)
    options = {**SMALL, "clients": 2, "partition": "column", "samples_per_client": None, "evaluate_on": "own"}
    run = Run(**options, data=data)
    run.run()
    assert data.test_clients is not None
    assert {k: len(s) for k, s in run.training.own_tests.items()} == {
        k: int((data.test_clients == k).sum()) for k in (0, 1)
    }
    assert run.client_names == ["north", "south"]


def test_too_few_rows_to_hold_some_out() -> None:
    with pytest.raises(DataError, match="too few to hold out"):
        Run(**{**SMALL, "samples_per_client": 1, "partition": "iid"}, evaluate_on="own")


@pytest.mark.parametrize("engine", ENGINES)
def test_the_average_and_the_ensemble(engine: str) -> None:
    """The score of the mean model, and the score of the mean probabilities of the same models."""
    average, together = done(engine=engine, judge="average"), done(engine=engine, judge="ensemble")
    t = together.training
    states = [{n: v.clone() for n, v in t.clients.model_state(k).items()} for k in range(3)]
    masses = [int(n) for n in t.counts.sum(1)]
    parts = [t.parts.client, t.server.model]
    shares = []
    x, y = t.source.test.rows, t.source.test.y
    with torch.no_grad():
        for state in states:
            parts[0].load_state_dict(state)
            shares.append(as_tuple(parts[1].eval()(parts[0].eval()(x)))[0].softmax(1))
        mean = sum(shares) / 3
        parts[0].load_state_dict(
            {n: sum(m * s[n] for m, s in zip(masses, states, strict=True)) / sum(masses) for n in states[0]}
        )
        one = as_tuple(parts[1](parts[0](x)))[0]
    assert together.result is not None
    assert average.result is not None
    assert together.result.test["loss"] == pytest.approx(-mean[range(60), y].log().mean().item(), rel=1e-9)
    assert average.result.test["loss"] == pytest.approx(torch.nn.functional.cross_entropy(one, y).item(), rel=1e-9)
    assert average.evaluations[-1].test_score_std in (0.0, pytest.approx(0.0))


def test_judging_changes_no_training() -> None:
    losses = [[r.loss for r in Run(**SMALL, eval_every=1, engine="stacked", judge=j)] for j in ("mean", "average")]
    assert losses[0] == losses[1]


def test_clients_on_other_machines() -> None:
    for more in ({"evaluate_on": "both"}, {"judge": "ensemble"}):
        near = done(engine="local", **more)
        far = train_in_memory(near.config)
        assert far.evaluations[-1].test_loss == pytest.approx(near.evaluations[-1].test_loss, rel=1e-12)
        assert far.evaluations[-1].own_score == near.evaluations[-1].own_score
    with pytest.raises(ConfigError, match="judge = 'average' needs all client models"):
        train_in_memory(done(judge="average").config)


def test_evaluation_does_not_dwarf_training() -> None:
    x = torch.zeros(2200, 3)
    y = torch.arange(2200) % 2
    options: dict[str, Any] = {"algorithm": "psl", "model": "mlp", "data": (x, y), "test": 2000, "validation": 0}
    options |= {"clients": 20, "epochs": 200}
    run = Run(**options)
    assert run.training.eval_clients == 5
    assert run.training.eval_every > 1
    assert "5 of 20 clients' models" in run.training.remarks[0]
    rows = 2000 * 5 * -(-run.rounds // run.training.eval_every)
    assert rows <= 500_000
    asked = Run(**options, eval_every=1)
    assert (asked.training.eval_every, asked.training.eval_clients, asked.training.remarks) == (1, None, ())
    small = Run(**{**options, "epochs": 5})
    assert (small.training.eval_every, small.training.eval_clients) == (1, None)


def test_the_last_evaluation_is_of_all_models() -> None:
    x, y = torch.randn(1260, 1, 28, 28), torch.arange(1260) % 3
    options: dict[str, Any] = {"algorithm": "psl", "model": "mlp", "data": (x, y), "test": 1200, "validation": 0}
    run = Run(**options, clients=20, rounds=2, eval_clients=None)
    paced = run.training
    assert (paced.eval_every, paced.eval_last) == (1, None), "a small model's evaluation is never too much"
    run = Run(**options, clients=20, rounds=40, batch=1)
    paced = run.training
    assert paced.eval_clients == 5
    assert paced.eval_last == 20
    assert paced.remarks[0].endswith("and all 20 models at the end (eval_clients, eval_every)")
    run.run()
    assert len(run.evaluations) == -(-run.rounds // paced.eval_every)
    assert len(run.by_client["global"].scores) == 20
    everyone = Run(**options, clients=20, rounds=40, batch=1, eval_every=40)
    everyone.run()
    assert run.evaluations[-1].test == everyone.evaluations[-1].test


def test_very_many_models_are_not_all_judged_at_the_end() -> None:
    x, y = torch.zeros(7000, 1, 28, 28), torch.arange(7000) % 3
    options: dict[str, Any] = {"algorithm": "psl", "model": "mlp", "data": (x, y), "test": 6000, "validation": 0}
    paced = Run(**options, clients=100, epochs=1).training
    assert paced.eval_last == 300_000 // 6000
    assert paced.remarks[0].startswith("Evaluating 50 of 100 clients' models at the end only")
    asked = Run(**options, clients=100, epochs=1, eval_clients=4).training
    assert (asked.eval_clients, asked.eval_last) == (4, 4)


def test_a_finished_run_says_how_long_evaluation_took(tmp_path: Path) -> None:
    done(out=tmp_path / "run")
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["evaluation_seconds"] > 0
