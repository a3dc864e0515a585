"""Searches: which values are tried, in which order, and what their scores lead to."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from cutlayer.errors import ConfigError
from cutlayer.searches import Leg, Search, Space
from cutlayer.searches.grid import Grid
from cutlayer.searches.halving import Halving
from cutlayer.searches.optuna import Optuna
from cutlayer.searches.random import RandomSearch

RATES = {"low": 1e-4, "high": 1e-1, "log": True}


def searched(
    search: Search, space: Mapping[str, Any], trials: int, score: Callable[[Leg], float | None], seed: int = 0
) -> list[list[Leg]]:
    """All turns of a search that is answered with `score` of each leg."""
    legs = search.legs(Space(space), trials, seed)
    turns = [next(legs)]
    while True:
        try:
            turns.append(legs.send([score(leg) for leg in turns[-1]]))
        except StopIteration:
            return turns


def test_a_grid_has_all_points_or_as_many_as_asked() -> None:
    space = {"client_lr": [0.1, 0.2, 0.3], "phi": [0.5, 1.0]}
    (everything,) = searched(Grid(), space, 6, lambda leg: 0.0)
    assert [tuple(leg.point.values()) for leg in everything] == [(a, b) for a in (0.1, 0.2, 0.3) for b in (0.5, 1.0)]
    assert Grid().trials_of(Space(space)) == 6
    (some,) = searched(Grid(), space, 4, lambda leg: 0.0)
    kept = [leg.point for leg in some]
    assert kept == [leg.point for leg in everything if leg.point in kept]
    assert len(kept) == 4
    with pytest.raises(ConfigError, match=r"tuning\.client_lr = .* is a range, of which a grid has no values"):
        Grid().check_space(Space({"client_lr": RATES}))


def test_random_points_are_those_of_the_seed_whatever_else_is_tuned() -> None:
    (alone,) = searched(RandomSearch(), {"client_lr": RATES}, 20, lambda leg: 0.0)
    (more,) = searched(RandomSearch(), {"client_lr": RATES, "phi": {"low": 0.0, "high": 1.0}}, 20, lambda leg: 0.0)
    rates = [leg.point["client_lr"] for leg in alone]
    assert rates == [leg.point["client_lr"] for leg in more]
    assert len(set(rates)) == 20
    assert all(1e-4 <= rate <= 1e-1 for rate in rates)
    assert 3 < sum(rate < 10**-2.5 for rate in rates) < 17  # half of them below the middle of the logarithms
    (other,) = searched(RandomSearch(), {"client_lr": RATES}, 20, lambda leg: 0.0, seed=1)
    assert rates != [leg.point["client_lr"] for leg in other]
    (listed,) = searched(RandomSearch(), {"batch": [4, 8, 16], "phi": [0.0, 1.0]}, 6, lambda leg: 0.0)
    assert len({tuple(leg.point.values()) for leg in listed}) == 6  # none twice


def test_halving_trains_a_third_of_the_trials_three_times_as_long() -> None:
    turns = searched(Halving(), {"client_lr": RATES}, 9, lambda leg: leg.point["client_lr"])
    assert [(len(turn), turn[0].share) for turn in turns] == [(9, 1 / 9), (3, 1 / 3), (1, 1.0)]
    best = sorted(turns[0], key=lambda leg: leg.point["client_lr"])
    assert {leg.trial for leg in turns[1]} == {leg.trial for leg in best[-3:]}
    assert turns[2][0].point == best[-1].point
    (drawn,) = searched(RandomSearch(), {"client_lr": RATES}, 9, lambda leg: 0.0)
    assert [leg.point for leg in turns[0]] == [leg.point for leg in drawn]


@pytest.mark.parametrize(("eta", "trials", "rungs"), [(3, 1, 1), (3, 2, 1), (3, 26, 3), (3, 27, 4), (2, 8, 4)])
def test_rungs(eta: int, trials: int, rungs: int) -> None:
    shares = Halving(eta=eta).shares(trials)
    assert len(shares) == rungs
    assert shares[-1] == 1.0
    assert all(math.isclose(eta * a, b) for a, b in itertools.pairwise(shares))


def test_halving_drops_what_has_diverged() -> None:
    turns = searched(Halving(), {"batch": list(range(1, 10))}, 9, lambda leg: 1.0 if leg.trial == 4 else None)
    assert [[leg.trial for leg in turn] for turn in turns[1:]] == [[4], [4]]
    assert len(searched(Halving(), {"batch": list(range(1, 10))}, 9, lambda leg: None)) == 1


def test_optuna_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package optuna, .*: pip install 'cutlayer\[tune\]'"):
        Optuna().check_space(Space({"client_lr": RATES}))


def test_optuna() -> None:
    pytest.importorskip("optuna")

    def score(leg: Leg) -> float | None:
        near = -abs(math.log10(leg.point["client_lr"]) + 2)
        return None if leg.point["client_lr"] > 0.05 else near

    space = {"client_lr": RATES, "client_optimizer": ["adam", "sgd"], "batch": {"low": 4, "high": 32}}
    Optuna().check_space(Space(space))
    turns = [leg for (leg,) in searched(Optuna(), space, 30, score)]
    assert turns == [leg for (leg,) in searched(Optuna(), space, 30, score)]  # it follows from seed and scores
    assert {leg.trial for leg in turns} == set(range(30))
    last = [[leg for leg in turns if leg.trial == number][-1] for number in range(30)]
    assert 2 < sum(leg.share == 1.0 for leg in last) < 20  # the others were not trained further
    ends = [score(leg) for leg in last]
    known = [value for value in ends if value is not None]
    assert max(known) > -0.1
    assert sum(known[-8:]) > sum(known[:8])
    whole = searched(Optuna(rungs=1), {"batch": [4, 8]}, 2, lambda leg: 0.5)
    assert [leg.point["batch"] for (leg,) in whole] in ([4, 8], [8, 4])  # none twice
    with pytest.raises(ConfigError, match=r"names \[1, 2\], which optuna cannot choose"):
        Optuna().check_space(Space({"client_memory": [[1, 2], [3, 4]]}))
