"""Averaging rules: equal in all engines, exact by hand where possible, and a bound on a client's influence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import client_state, difference, make, mlp, server_state, source, train
from torch import Tensor

from cutlayer import ConfigError, Run, RunConfig, plugins
from cutlayer.averaging import average, combined
from cutlayer.averagings import Averaging
from cutlayer.testing import check_algorithm
from cutlayer.testing.deployed import in_memory
from cutlayer.types import as_tuple

RULES: list[tuple[str, dict[str, Any]]] = [
    ("mean", {}),
    ("norm_bound", {"norm_multiple": 0.7}),
    ("norm_bound", {"norm_limit": 0.02}),
    ("trimmed_mean", {"trim": 0.2}),
    ("median", {}),
]
ROBUST = [("trimmed_mean", {"trim": 0.2}), ("median", {})]
SIZES = (10, 6, 7, 9, 5)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


def rule(name: str, **options: Any) -> Averaging:
    made: Averaging = plugins.load("averaging", name).of(options)
    return made


def config(algorithm: str, **options: Any) -> RunConfig:
    values: dict[str, Any] = {"batch": 4, "client_lr": 0.05, "rounds": 3, "participation": 0.8, "partition": "column"}
    return RunConfig(algorithm=algorithm, clients=len(SIZES), precision="float64", **{**values, **options})


@pytest.mark.parametrize("algorithm", ["fl", "sfl", "sflv1", "sflv2", "sflv3"])
@pytest.mark.parametrize(("name", "options"), RULES)
def test_all_engines_average_alike(algorithm: str, name: str, options: dict[str, Any]) -> None:
    """Clients of unequal sizes, four of five per round. SplitFed also averages the server's copies."""
    cut = {} if algorithm == "fl" else {"cut": "2"}
    run: dict[str, Any] = {"model": make(mlp), "data": source(SIZES, (6,))}
    found = []
    for engine in ("local", "stacked", "remote"):
        c = config(algorithm, averaging=name, engine="local" if engine == "remote" else engine, **cut, **options)
        there = in_memory(c, **run) if engine == "remote" else None
        one = Run(c, **run) if there is None else there.run
        assert one.training.engine == engine
        one.run()
        models = [client_state(one, k) if there is None else there.model(k) for k in range(len(SIZES))]
        found.append((models, server_state(one), one.evaluations[-1].test_loss))
    models, server, loss = found[0]
    for theirs, theirs_of_server, their_loss in found[1:]:
        assert max(difference(a, b) for a, b in zip(models, theirs, strict=True)) < 1e-12
        assert difference(server, theirs_of_server) < 1e-12
        assert their_loss == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize("algorithm", ["fl", "sflv1"])
def test_a_rule_changes_what_comes_out(algorithm: str) -> None:
    ends = {}
    for name, options in RULES:
        run = train(algorithm, make(mlp), SIZES, (6,), cut="2", averaging=name, **options)
        ends[name, *options] = run.evaluations[-1].test_loss
    assert len(set(ends.values())) == len(RULES)


@pytest.mark.parametrize("name", ["norm_bound", "trimmed_mean"])
def test_a_run_is_resumed_exactly(name: str) -> None:
    check_algorithm("sfl", one_client_is_sgd=False, averaging=name)


def test_what_models_came_from_is_kept_with_the_run(tmp_path: Path) -> None:
    """If clients start from different models, there is no last average before the first averaging."""
    c = config("sfl", averaging="norm_bound", start="independent", rounds=4, checkpoint_every=1, cut="2")
    quiet = Run(c, model=mlp_of, data=source(SIZES, (6,)))
    quiet.run()
    broken = Run(c, model=mlp_of, data=source(SIZES, (6,)), out=tmp_path / "run")
    for record in broken:
        if record.round == 2:
            break
    resumed = Run.resume(tmp_path / "run", model=mlp_of, data=source(SIZES, (6,)))
    resumed.run()
    assert difference(client_state(quiet), client_state(resumed)) == 0


def mlp_of() -> torch.nn.Module:
    return mlp().double()


def test_one_union_step_is_for_the_mean_alone() -> None:
    for name, engine in (("mean", "union"), ("median", "stacked")):
        c = config("fl", local_steps=1, client_optimizer="sgd", averaging=name)
        assert Run(c, model=make(mlp), data=source(SIZES, (6,))).training.engine == engine


def test_the_average_is_judged_by_the_rule() -> None:
    """The rule is also used between two averagings. The judged model is the rule's average of the client models."""
    for engine in ("local", "stacked"):
        c = config("sflv3", averaging="median", judge="average", engine=engine, cut="2", participation=1.0, rounds=1)
        run = Run(c, model=make(mlp), data=source(SIZES, (6,)))
        run.run()
        states = [client_state(run, k) for k in range(len(SIZES))]
        median = average(states, [1] * len(SIZES), rule("median"))
        parts = run.training.parts
        parts.client.load_state_dict(median)
        parts.server.load_state_dict(server_state(run))
        test = run.training.source.test
        loss = torch.nn.functional.cross_entropy(as_tuple(parts.server(parts.client(test.rows)))[0], test.y)
        assert run.evaluations[-1].test_loss == pytest.approx(loss.item(), rel=1e-12)


# By hand

numbers = st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3)


@given(models=st.lists(numbers, min_size=1, max_size=7))
def test_nothing_trimmed_is_the_unweighted_mean(models: list[list[float]]) -> None:
    matrix = torch.tensor(models, dtype=torch.float64)
    shares = torch.rand(len(models), dtype=torch.float64)
    assert torch.equal(rule("trimmed_mean", trim=0.0).combine(matrix, shares, None), matrix.mean(0))


@given(models=st.lists(numbers, min_size=1, max_size=7))
def test_the_median_is_numpys(models: list[list[float]]) -> None:
    found = rule("median").combine(torch.tensor(models, dtype=torch.float64), torch.ones(len(models)), None)
    np.testing.assert_allclose(found, np.median(np.array(models), 0), rtol=1e-15, atol=1e-300)


def test_how_many_are_trimmed() -> None:
    """The number is rounded up, but at least one model remains: one of five at 0.1, four of ten at 0.49."""
    dropped = [(n, [rule("trimmed_mean", trim=t).dropped(n) for t in (0.0, 0.1, 0.2, 0.49)]) for n in (1, 2, 5, 10)]
    assert dropped == [(1, [0, 0, 0, 0]), (2, [0, 0, 0, 0]), (5, [0, 1, 1, 2]), (10, [0, 1, 2, 4])]
    models = torch.tensor([[5.0], [1.0], [2.0], [3.0], [1e30]])
    assert rule("trimmed_mean", trim=0.2).combine(models, torch.ones(5), None).item() == pytest.approx(10 / 3)


@given(
    honest=st.lists(numbers, min_size=4, max_size=4),
    hostile=st.lists(FINITE, min_size=3, max_size=3),
    weight=st.floats(1, 1e12),
)
@pytest.mark.parametrize(("name", "options"), ROBUST)
def test_one_of_five_moves_the_result_within_the_honest_range(
    name: str, options: dict[str, Any], honest: list[list[float]], hostile: list[float], weight: float
) -> None:
    """For any values that the client sends and any number of samples that it claims."""
    models = {"w": torch.tensor([hostile, *honest], dtype=torch.float32)}
    found = combined(models, [weight, 1, 1, 1, 1], rule(name, **options))["w"]
    low, high = models["w"][1:].amin(0), models["w"][1:].amax(0)
    slack = 1e-6 * models["w"][1:].abs().amax(0)
    assert bool(((found >= low - slack) & (found <= high + slack)).all())


@given(hostile=st.lists(FINITE, min_size=3, max_size=3))
def test_one_of_five_moves_a_bounded_mean_by_its_share_of_the_bound(hostile: list[float]) -> None:
    """The mean of the other four moves by at most a fifth of the median length."""
    steps = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [-1, 0, 0]])
    origin = {"w": torch.tensor([5.0, 6.0, 7.0])}
    models = {"w": torch.cat([torch.tensor([hostile]), origin["w"] + steps])}
    found = combined(models, [1] * 5, rule("norm_bound"), origin)["w"]
    assert torch.linalg.vector_norm(found - origin["w"] - steps.sum(0) / 5).item() <= 0.2 + 1e-5


def test_updates_are_scaled_down_to_the_bound() -> None:
    """Updates of lengths 3, 1 and 10 with median 3, and weights 1, 2 and 1."""
    origin = {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor(2.0)}
    updates = [torch.tensor([3.0, 0, 0]), torch.tensor([0.0, 1, 0]), torch.tensor([0.0, 6, 8])]
    models = {
        "a": torch.stack([origin["a"] + u[:2] for u in updates]),
        "b": torch.stack([origin["b"] + u[2] for u in updates]),
    }

    def moved(**options: Any) -> list[float]:
        found = combined(models, [1, 2, 1], rule("norm_bound", **options), origin)
        return [*(found["a"] - origin["a"]).tolist(), (found["b"] - origin["b"]).item()]

    assert moved() == pytest.approx([0.75, 0.5 + 0.45, 0.6])
    assert moved(norm_multiple=2.0) == pytest.approx([0.75, 0.5 + 0.9, 1.2])
    assert moved(norm_limit=0.5) == pytest.approx([0.125, 0.25 + 0.075, 0.1])
    alone = combined({"w": torch.ones(3, 2)}, [1, 1, 1], rule("norm_bound"), {"w": torch.ones(2)})
    assert alone["w"].tolist() == [1, 1]  # no client has moved


def test_complex_numbers_and_counters() -> None:
    models = {"z": torch.tensor([1 + 1j, 2 + 5j, 3 + 2j]), "n": torch.tensor([4, 10**9, 6])}
    found = combined(models, [1, 1, 1], rule("median"))
    assert (found["z"].item(), found["n"].item()) == (2 + 2j, 6)
    assert found["z"].dtype == torch.complex64
    assert combined({"n": models["n"]}, [1, 1, 1], rule("median"))["n"].item() == 6


def test_mixed_types_keep_theirs() -> None:
    models = {"a": torch.ones(3, 2, dtype=torch.bfloat16), "b": torch.full((3,), 0.1, dtype=torch.float64)}
    found = combined(models, [1, 2, 3], rule("trimmed_mean"))
    assert [t.dtype for t in found.values()] == [torch.bfloat16, torch.float64]
    assert found["b"].item() == pytest.approx(0.1, rel=1e-15)


# Errors


@pytest.mark.parametrize(
    ("algorithm", "options", "words"),
    [
        ("psl", {"averaging": "median"}, "averaging = 'median' has no effect on psl: it belongs to "),
        ("fl", {"averaging": "median", "trim": 0.1}, "trim = 0.1 has no effect on the averaging rule median"),
        ("fl", {"averaging": "trimmed_mean", "trim": 0.5}, "trim = 0.5 is not possible: it must be less than 0.5"),
        ("fl", {"averaging": "mode"}, "unknown averaging rule 'mode': did you mean 'mean'? known: mean, median, "),
        (
            "fl",
            {"averaging": "norm_bound", "norm_limit": 1.0, "norm_multiple": 2.0},
            "norm_multiple = 2.0 and norm_limit = 1.0 exclude each other",
        ),
    ],
)
def test_errors(algorithm: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Run(algorithm=algorithm, model="mlp", **options)
    assert words in str(raised.value)


class Halves(Averaging):
    """Returns half of a model."""

    entry = plugins.Entry("averaging", "halves", "", "halves")

    def combine(self, models: Tensor, shares: Tensor, origin: Tensor | None) -> Tensor:
        """[k, d] -> [d/2]."""
        return models[0, : models.shape[1] // 2]


class Fails(Halves):
    """Raises an error."""

    def combine(self, models: Tensor, shares: Tensor, origin: Tensor | None) -> Tensor:
        """Raises IndexError."""
        return models[len(models)]


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (Halves(), r"of the shape \(1,\) for models \(2, 3\): return one model, \(3,\)"),
        (Fails(), "failed at .*test_averagings.py:[0-9]+ .*IndexError.*: correct its code"),
    ],
)
def test_a_rule_that_does_not_give_a_model(broken: Averaging, words: str) -> None:
    with pytest.raises(ConfigError, match=f"`combine` of the averaging rule 'halves' .*{words}"):
        combined({"w": torch.ones(2, 3)}, [1, 1], broken)
