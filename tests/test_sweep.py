"""A sweep is a comparison with a variant for each algorithm and point."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cutlayer import CompareConfig, Comparison
from cutlayer.errors import ConfigError
from cutlayer.options import read_toml
from cutlayer.sweep import expanded, points_of

SMALL: dict[str, Any] = {
    "data": "digits",
    "model": "mlp",
    "clients": 2,
    "samples_per_client": 8,
    "rounds": 1,
    "test": 20,
}


def variants(sweep: dict[str, Any], **options: Any) -> dict[str, Any]:
    return expanded(CompareConfig.of({"sweep": sweep, **options})).variant


def test_all_combinations_of_what_each_algorithm_has() -> None:
    """PSL has no phi, so its entries differ only in the rate, and each occurs once."""
    found = variants({"phi": [0.25, 0.5], "client-lr": [0.1, 0.2]}, algorithms=["psl", "sglr"])
    assert list(found) == [
        "psl, client_lr 0.1",
        "psl, client_lr 0.2",
        "sglr, phi 0.25, client_lr 0.1",
        "sglr, phi 0.25, client_lr 0.2",
        "sglr, phi 0.5, client_lr 0.1",
        "sglr, phi 0.5, client_lr 0.2",
    ]
    assert found["sglr, phi 0.5, client_lr 0.1"] == {"algorithm": "sglr", "phi": 0.5, "client_lr": 0.1}


def test_who_has_nothing_of_it_stays_as_it_is() -> None:
    config = expanded(CompareConfig(algorithms=["psl", "sglr"], sweep={"phi": [0.25, 0.5]}))
    assert config.algorithms == ("psl",)
    assert list(config.variant) == ["sglr, phi 0.25", "sglr, phi 0.5"]
    assert config.sweep == {}


def test_one_after_another() -> None:
    sweep = {"how": "zip", "clients": [2, 4], "batch": [8, 4]}
    assert [(v["clients"], v["batch"]) for v in variants(sweep, algorithms=["psl"]).values()] == [(2, 8), (4, 4)]


def test_drawn_points_are_the_same_each_time_and_for_all() -> None:
    sweep = {"how": "random", "draws": 12, "client_lr": {"low": 1e-3, "high": 0.1, "log": True}, "batch": [4, 8]}
    sweep["local_epochs"] = {"low": 1, "high": 9}
    points = points_of(sweep)
    assert points == points_of(sweep) != points_of({**sweep, "draw_seed": 1})
    assert len(points) == 12
    rates = [p["client_lr"] for p in points]
    assert all(1e-3 <= rate <= 0.1 for rate in rates)
    assert sum(rate < 1e-2 for rate in rates) >= 3  # half of all on the logarithmic scale, a tenth on the linear scale
    assert {type(p["local_epochs"]) for p in points} == {int}
    assert {p["batch"] for p in points} == {4, 8}
    found = variants({"how": "random", "draws": 3, "client_lr": sweep["client_lr"]}, algorithms=["psl", "sglr"])
    rates_of = {a: [v["client_lr"] for v in found.values() if v["algorithm"] == a] for a in ("psl", "sglr")}
    assert rates_of["psl"] == rates_of["sglr"]


def test_a_variant_keeps_what_it_says_itself() -> None:
    found = variants(
        {"phi": [0.25], "batch": [4, 8]},
        algorithms=["sglr"],
        variant={"mine": {"algorithm": "sglr", "phi": 1.0}, "other": {"algorithm": "psl", "batch": 2}},
    )
    assert list(found)[2:] == ["mine, batch 4", "mine, batch 8", "other"]
    assert found["mine, batch 4"] == {"algorithm": "sglr", "phi": 1.0, "batch": 4}


def test_options_of_what_is_swept_fall_away_where_it_is_not_chosen() -> None:
    found = variants({"partition": ["iid", "dirichlet"], "dirichlet_alpha": [0.1, 1.0]}, algorithms=["psl"])
    assert list(found) == [
        "psl, partition iid",
        "psl, partition dirichlet, dirichlet_alpha 0.1",
        "psl, partition dirichlet, dirichlet_alpha 1.0",
    ]


def test_rounds_take_the_place_of_epochs() -> None:
    found = expanded(CompareConfig(algorithms=["psl"], epochs=3, sweep={"rounds": [5, 7]}))
    runs = found.runs(frozenset(found.model_fields_set))
    assert [run[0].rounds for run in runs.values()] == [5, 7]


def test_paths_do_not_become_folders(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("x,label\n" + "".join(f"{k},{k % 2}\n" for k in range(40)))
    found = variants({"data": [str(tmp_path / "a.csv"), str(tmp_path / "b.csv")]}, algorithms=["psl"])
    assert list(found) == ["psl, data a", "psl, data b"]


def test_it_is_trained_stored_and_resumed_as_written_out(tmp_path: Path) -> None:
    """Each point equals the same variant written by hand."""
    sweep = {"phi": [0.5, 1.0]}
    swept = Comparison(algorithms=["sglr"], seeds=[0], sweep=sweep, out=tmp_path / "a", **SMALL)
    hand = {f"phi {phi}": {"algorithm": "sglr", "phi": phi} for phi in sweep["phi"]}
    by_hand = Comparison(algorithms=[], seeds=[0], variant=hand, **SMALL)
    scores = [[row.score_mean for row in comparison.run()] for comparison in (swept, by_hand)]
    assert scores[0] == scores[1]
    stored = read_toml(tmp_path / "a/config.toml")
    assert "sweep" not in stored
    assert list(stored["variant"]) == ["sglr, phi 0.5", "sglr, phi 1.0"]
    (tmp_path / "a/sglr, phi 1.0/seed-0/result.json").unlink()
    assert [which for which, _ in Comparison.resume(tmp_path / "a").waiting] == ["sglr, phi 1.0"]


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ({"phy": [1]}, "unknown option 'phy' in sweep: did you mean 'phi'"),
        ({"how": "zop", "phi": [0.5]}, "unknown sweep.how 'zop': did you mean 'zip'"),
        ({"seeds": [0, 1]}, "list them as seeds, which all entries share"),
        ({"algorithm": ["psl"]}, "list them as algorithms, and variants"),
        ({"phi": []}, "sweep.phi is an empty list"),
        ({}, None),
        ({"how": "grid"}, "sweep names no option"),
        ({"phi": [0.5, 0.5]}, "sweep.phi names 0.5 twice"),
        ({"phi": [0.5], "draws": 3}, "sweep.draws has no effect on how = 'grid'"),
        ({"phi": {"low": 0.1, "high": 0.5}}, "is a range, which only how = 'random' can draw from"),
        ({"how": "random", "phi": [0.1, 0.5]}, "needs draws"),
        ({"how": "random", "phi": [0.1, 0.5], "draws": 3}, "sweep.draws = 3 is more than the 2 possible points"),
        ({"how": "random", "phi": [0.1, 0.5], "draws": 0}, "at least 1"),
        ({"how": "random", "phi": {"low": 0.5, "high": 0.1}, "draws": 3}, "low below high"),
        ({"how": "random", "phi": {"low": 0, "high": 0.1, "log": True}, "draws": 3}, "has no logarithm"),
        ({"how": "zip", "phi": [0.1, 0.5], "batch": [4]}, "lists of one length, but there are phi 2, batch 1"),
        ({"trim": [0.1, 0.2]}, "has no effect on any entry of this comparison (sglr): it belongs to trimmed_mean"),
        ({"phi": [0.5, 2.0]}, "variant 'sglr, phi 2.0': phi = 2.0 is not possible"),
    ],
)  # fmt: skip
def test_wrong_sweeps(sweep: dict[str, Any], words: str | None) -> None:
    if words is None:
        assert Comparison(algorithms=["sglr"], sweep=sweep).config.algorithms == ("sglr",)
        return
    with pytest.raises(ConfigError) as caught:
        Comparison(algorithms=["sglr"], sweep=sweep)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
