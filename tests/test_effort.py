"""The tuned options of a comparison: equal effort for all methods, and options that cannot be tuned."""

from __future__ import annotations

from typing import Any

import pytest

from cutlayer import CompareConfig, Comparison
from cutlayer.effort import Effort
from cutlayer.errors import ConfigError

BOTH = {"algorithms": ["psl", "sglr"], "seeds": [0, 1]}


def effort(tuning: dict[str, Any], **options: Any) -> Effort:
    return Effort.of(CompareConfig.of({**BOTH, "tuning": tuning, **options}))


def test_each_entry_is_tuned_over_the_options_that_it_has() -> None:
    found = effort({"client_lr": [0.1, 0.2], "phi": [0.5, 1.0], "trials": 2}, algorithms=["psl", "sglr", "cl"])
    assert {name: list(space.values) for name, space in found.spaces.items()} == {
        "psl": ["client_lr"],
        "sglr": ["client_lr", "phi"],
        "cl": ["client_lr"],
    }
    assert (found.trials, found.seed, found.by, found.how) == (2, 2, "last", "grid")
    assert "2 trials of each method (client_lr; sglr also phi), grid, on seed 2" in found.remarks[0]
    alone = effort({"phi": [0.5, 1.0]})
    assert alone.untuned == ("psl",)
    assert alone.remarks[1] == "Not tuned, since none of these options is left to choose: psl"
    own = {"fixed": {"algorithm": "sglr", "client_lr": 0.3}}
    assert effort({"client_lr": [0.1, 0.2]}, variant=own).untuned == ("fixed",)


def test_a_trial_has_the_values_over_the_others() -> None:
    tuning = {"client_lr": [0.1, 0.2], "client-optimizer-options": {"momentum": [0.5, 0.9]}}
    found = effort(tuning, client_lr=0.7, client_optimizer="sgd", client_optimizer_options={"nesterov": True})
    point = {"client_lr": 0.2, "client_optimizer_options.momentum": 0.9}
    run = found.run("sglr", point)
    assert (run.client_lr, run.seed, run.client_optimizer_options) == (0.2, 2, {"nesterov": True, "momentum": 0.9})
    runs = found.chosen({"sglr": point}).runs(frozenset({"client_lr", "client_optimizer", "client_optimizer_options"}))
    assert list(runs) == ["psl", "sglr"]
    assert list(runs["psl"]) == [0, 1]
    assert (runs["psl"][0].client_lr, runs["sglr"][1].client_lr) == (0.7, 0.2)
    quiet = effort({"client_lr": [0.1, 0.2]}, stop_after=2, log_to=["csv"], snapshot_every=1).run("psl", {})
    assert (quiet.stop_after, quiet.log_to, quiet.snapshot_every, quiet.keep_best) == (None, (), None, False)


def test_a_sweep_is_tuned_at_each_of_its_points() -> None:
    swept = Comparison(**BOTH, sweep={"clients": [2, 4]}, tuning={"client_lr": [0.1, 0.2]})
    assert swept.effort is not None
    assert list(swept.effort.spaces) == ["psl, clients 2", "psl, clients 4", "sglr, clients 2", "sglr, clients 4"]
    assert swept.effort.run("sglr, clients 4", {"client_lr": 0.2}).clients == 4


@pytest.mark.parametrize(
    ("values", "chosen", "edge"),
    [
        ([0.1, 0.2, 0.4], 0.2, False),
        ([0.4, 0.1, 0.2], 0.4, True),
        ([0.1, 0.2, 0.4], 0.1, True),
        ([0.1], 0.1, False),
        ({"low": 1e-4, "high": 1e-1, "log": True}, 1.05e-4, True),
        ({"low": 1e-4, "high": 1e-1, "log": True}, 1.5e-4, False),
        ({"low": 1e-4, "high": 1e-1, "log": True}, 9.5e-2, True),
        ({"low": 1.0, "high": 2.0}, 1.99, True),
        ({"low": 1.0, "high": 2.0}, 1.9, False),
    ],
)
def test_edges(values: Any, chosen: float, edge: bool) -> None:
    found = effort({"how": "random", "trials": 1, "client_lr": values})
    assert found.at_the_edge("psl", {"client_lr": chosen}) == ["client_lr"] * edge


def test_the_end_of_what_is_possible_is_no_edge() -> None:
    found = effort({"phi": [0.0, 0.5, 1.0], "client_optimizer_options": {"weight_decay": [0.0, 0.1]}, "trials": 2})
    weight_decay = "client_optimizer_options.weight_decay"
    assert found.at_the_edge("sglr", {"phi": 1.0, weight_decay: 0.0}) == []
    assert found.at_the_edge("sglr", {"phi": 0.0, weight_decay: 0.1}) == [weight_decay]
    words = effort({"client_optimizer": ["adam", "sgd"]})
    assert words.at_the_edge("psl", {"client_optimizer": "adam"}) == []
    assert [p["client_optimizer"] for p in words.kinds("psl")] == ["adam", "sgd"]


@pytest.mark.parametrize(
    ("tuning", "words"),
    [
        ({"how": "grid"}, "tuning names no option"),
        ({"phy": [1]}, "unknown option 'phy' in tuning: did you mean 'phi'"),
        ({"how": "gird", "phi": [1]}, r"unknown tuning\.how 'gird': did you mean 'grid'"),
        ({"by": "first", "phi": [1]}, r"unknown tuning\.by 'first'"),
        ({"client_lr": []}, r"tuning\.client_lr is an empty list"),
        ({"client_lr": [1, 1]}, r"tuning\.client_lr names 1 twice"),
        ({"client_lr": {"low": 1, "high": 0.1}}, r"tuning\.client_lr = .* low below high"),
        ({"client_lr": [0.1, -1]}, r"tuning\.client_lr: .*-1"),
        ({"how": "random", "trials": 2, "phi": {"low": 0, "high": 1.5}}, r"tuning\.phi: .*1\.5"),
        ({"client_lr": {"low": 0.1, "high": 0.2}}, "is a range, of which a grid has no values"),
        ({"client_lr": [0.1], "trials": 0}, r"tuning\.trials = 0 .* at least 1"),
        ({"client_lr": [0.1, 0.2], "trials": 3}, r"trials = 3 is more than the 2 points that there are for 'psl'"),
        ({"client_lr": [0.1, 0.2], "phi": [0, 1]}, r"different numbers of trials \(psl 2, sglr 4\): .* trials = 2"),
        ({"how": "random", "client_lr": [0.1, 0.2]}, r"how = 'random' needs trials"),
        ({"client_lr": [0.1], "seed": 1}, r"tuning\.seed = 1 is one of seeds = \[0, 1\], whose scores are reported"),
        ({"client_lr": [0.1], "seed": -1}, r"tuning\.seed = -1"),
        ({"client_lr": [0.1], "eta": 3}, r"tuning\.eta has no effect on how = 'grid'"),
        ({"how": "halving", "client_lr": [0.1], "eta": 1, "trials": 1}, "eta"),
        ({"trim": [0.1]}, r"tuning\.trim = \[0\.1\] has no effect on any entry of this comparison \(psl, sglr\)"),
        ({"epochs": [1, 2]}, r"tuning\.epochs is not possible, since trials would be trained for different times"),
        ({"data": ["digits"]}, r"tuning\.data is not possible, since it is what all methods are compared on"),
        ({"dirichlet_alpha": [0.1]}, r"tuning\.dirichlet_alpha is not possible, since it is what"),
        ({"seed": 5, "clients": [2]}, r"tuning\.clients is not possible"),
        ({"algorithm": ["psl"]}, r"tuning\.algorithm is not possible: list them as algorithms"),
    ],
)
def test_wrong_tunings(tuning: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        effort(tuning)
    assert len(str(caught.value)) < 260


def test_trials_may_see_the_own_test_rows_of_another_seed() -> None:
    found = effort({"client_lr": [0.1, 0.2]}, evaluate_on="both")
    assert "no trial is trained" not in found.remarks[0]
    assert found.remarks[1] == found.overlap
    assert found.overlap.startswith("Each seed tests clients on rows of their own (evaluate_on), some of which trials")
    assert effort({"client_lr": [0.1, 0.2]}, evaluate_on="own", partition="column").overlap == ""


def test_the_table_is_not_called_tune() -> None:
    with pytest.raises(ConfigError, match=r"tune is not a table, .* below \[tuning\]"):
        CompareConfig.of({"tune": {"client_lr": [0.1]}})
