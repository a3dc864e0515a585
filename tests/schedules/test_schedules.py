"""Schedules: their factors of the learning rates, warm-up, and the user's own functions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from cutlayer import ConfigError, Run, plugins
from cutlayer.run import rate_factors
from cutlayer.schedules import WarmedUp
from cutlayer.testing.deployed import train_in_memory
from cutlayer.testing.material import random_source, smooth

ROUNDS = 10


def run_of(**options: Any) -> Run:
    common: dict[str, Any] = {"algorithm": "psl", "cut": "1", "clients": 2, "partition": "column", "batch": 4}
    return Run(model=smooth, data=random_source((4, 4)), **{**common, "rounds": ROUNDS, **options})


def factors(**options: Any) -> list[tuple[float, float]]:
    """The factors of the clients and of the server, round by round."""
    training = run_of(**options).training
    return [rate_factors(training, index) for index in range(training.rounds)]


def clients(**options: Any) -> list[float]:
    return [c for c, _ in factors(**options)]


def test_linear_falls_to_its_end() -> None:
    assert clients(lr_schedule="linear") == pytest.approx([1 - i / 10 for i in range(10)])
    assert clients(lr_schedule="linear", lr_end=0.5) == pytest.approx([1 - i / 20 for i in range(10)])


def test_onecycle_is_torchs() -> None:
    """torch's OneCycleLR with the same parameters gives the same rates at the same progress."""
    made = plugins.load("schedule", "onecycle")()
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=1001, pct_start=0.3, cycle_momentum=False
    )
    for i in range(1000):
        # torch counts to total_steps - 1, so its peak comes one step early.
        mine = made.factor(i / 1000)
        assert mine == pytest.approx(theirs.get_last_lr()[0], abs=6e-3)
        optimizer.step()
        theirs.step()
    assert made.factor(0.0) == pytest.approx(1 / 25)
    assert made.factor(0.3) == pytest.approx(1.0)
    assert made.factor(1.0) == pytest.approx(1 / 25 / 1e4)


def test_warmup_rises_and_leaves_the_rest_to_the_schedule() -> None:
    """The usual schedule of transformers: a linear rise, then a linear fall over the remaining rounds."""
    expected = [1 / 5, 2 / 5, 3 / 5, 4 / 5, *(1 - i / 6 for i in range(6))]
    assert clients(lr_schedule="linear", lr_warmup=0.4) == pytest.approx(expected)
    cosine = [1 / 3, 2 / 3, *(0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8))]
    assert clients(lr_schedule="cosine", lr_warmup=0.2) == pytest.approx(cosine)
    assert clients(lr_schedule="constant", lr_warmup=0.1) == pytest.approx([0.5, *[1.0] * 9])


def test_both_sides_warm_up() -> None:
    found = factors(lr_schedule="constant", server_lr_schedule="linear", lr_warmup=0.2)
    assert [s for _, s in found] == pytest.approx([1 / 3, 2 / 3, *(1 - i / 8 for i in range(8))])


@pytest.mark.parametrize("rounds", [1, 3, 7, 97])
def test_warmup_never_passes_the_base_rate(rounds: int) -> None:
    for warmup in (0.01, 0.1, 0.33, 0.5, 0.99):
        then = plugins.load("schedule", "constant")()
        pace = [WarmedUp(then=then, warmup=warmup, rounds=rounds).factor(i / rounds) for i in range(rounds)]
        assert all(0 < a <= b <= 1 for a, b in zip(pace, [*pace[1:], 1.0], strict=True))


def test_onecycle_has_its_own_warmup() -> None:
    with pytest.raises(ConfigError, match="lr_warmup has no effect on the schedule onecycle"):
        run_of(lr_schedule="onecycle", lr_warmup=0.1)


OWN = """
def half(progress, *, share: float = 0.5):
    return 1.0 if progress < share else 0.25

def stairs(round):
    return 0.5 ** (round // 4)

def broken(progress):
    return 1 / abs(progress - 0.5)

def negative(progress):
    return -progress
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def test_a_function_is_a_schedule(place: Path) -> None:
    """Its argument is the progress or the number of the round. Its keywords are options."""
    assert clients(lr_schedule=f"{place}:half") == [1.0] * 5 + [0.25] * 5
    assert clients(lr_schedule=f"{place}:half", share=0.2) == [1.0] * 2 + [0.25] * 8
    assert clients(lr_schedule=f"{place}:stairs") == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25]


def test_a_function_from_python() -> None:
    def third(progress: float) -> float:
        return 1 / 3

    assert clients(lr_schedule=third) == [1 / 3] * 10


def test_what_a_function_gives_is_checked_first(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"fails at 0\.5 \(ZeroDivisionError"):
        run_of(lr_schedule=f"{place}:broken")
    with pytest.raises(ConfigError, match=r"gives -0\.1 at 0\.1: return a finite factor"):
        run_of(lr_schedule=f"{place}:negative")


def test_in_a_deployment_both_sides_read_their_own_file(place: Path) -> None:
    """The deployment's results are those of the simulation."""
    options: dict[str, Any] = {"lr_schedule": f"{place}:stairs", "lr_warmup": 0.2, "client_optimizer": "sgd"}
    there = run_of(**options)
    remote = train_in_memory(there.config, model=smooth, data=random_source((4, 4)))
    local = there.run()
    assert remote.result is not None
    assert remote.result.test_score == local.test_score
    assert remote.evaluations[-1].test_loss == pytest.approx(there.evaluations[-1].test_loss, rel=1e-5)
