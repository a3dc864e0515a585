"""Methods compared under label skew: equal tuning, the chosen rates, the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.image import imread
from test_reproduce import TINY, by_name, pretend

from cutlayer.errors import RunFolderError
from cutlayer.reproduce import tables
from cutlayer.reproduce.cells import SIZES, SKEW, SizeName, Study
from cutlayer.reproduce.claims import judge
from cutlayer.reproduce.contest import ContestSize, contest
from cutlayer.reproduce.outcomes import Outcomes, settled
from cutlayer.reproduce.reproduction import Reproduction
from cutlayer.reproduce.train import folder_of

FEW = ContestSize(
    samples_per_client=30,
    epochs=1,
    batch=10,
    rates=(0.001, 0.01),
    tuning_seed=7,
    seeds=(0, 1),
    tuned_in=(("2 shards", "iid"),),
    settings=("2 shards", "iid"),
    methods=("CL", "PSL", "PSL + client", "CSE-FSL"),
)


def study(extent: ContestSize = FEW) -> Study:
    return Study(TINY, "digits", extent=extent)


@pytest.mark.parametrize("size", list(SIZES))
def test_every_method_is_tuned_alike(size: SizeName) -> None:
    """The same rates, on a seed that is not reported. Every named method exists, and every run is possible."""
    described = contest(SKEW)
    extent = described.sizes[size]
    asked = Study(SIZES[size], "fashion-mnist", extent=extent)
    assert extent.tuning_seed not in extent.seeds
    for setting, methods in asked.contest().items():
        for method in methods:
            cell = asked.contestant(setting, method)
            assert tuple(t.config.client_lr for t in cell.trials) == extent.rates
            assert {t.seeds for t in cell.trials} == {(extent.tuning_seed,)}
            assert cell.seeds == extent.seeds
            assert all(t.turn < cell.turn for t in cell.trials)
    for claim in described.claims:
        for setting in claim.settings:
            assert {claim.more, claim.less} <= set(described.settings[setting].methods), claim.name
    assert {name for pair in extent.tuned_in for name in pair} <= set(described.settings)


def test_a_contest_differs_from_another_in_its_description_only() -> None:
    """Two methods of a setting train with the same options, except for those that the file states."""
    asked = study()
    first, second = (asked.contestant("2 shards", m).config.resolved() for m in ("PSL", "PSL + client"))
    assert {name for name in first if first[name] != second[name]} == {"logit_adjust"}
    first, second = (asked.contestant(s, "PSL").config.resolved() for s in ("2 shards", "iid"))
    assert {n for n in {*first, *second} if first.get(n) != second.get(n)} == {"partition", "shards_per_client"}


def test_the_rate_is_that_of_the_best_validation_accuracy(tmp_path: Path) -> None:
    """Test accuracies are not used, the smaller of equally good rates is chosen, and the choice needs all trials."""
    asked = study()
    low, high = asked.contestant("2 shards", "PSL").trials
    assert low.name == "skew/iid/psl/rate-0.001"  # tuning in that setting also counts for this one
    pretend(tmp_path, low, 7, test=90, validation=60)
    assert settled(tmp_path, asked.contestant("2 shards", "PSL")) is None
    pretend(tmp_path, high, 7, test=50, validation=61)
    chosen = settled(tmp_path, asked.contestant("2 shards", "PSL"))
    assert chosen is not None
    assert (chosen.config.client_lr, chosen.trials, chosen.seeds) == (0.01, (), (0, 1))
    for trial in asked.contestant("iid", "CL").trials:
        pretend(tmp_path, trial, 7, test=50, validation=60)
    equal = settled(tmp_path, asked.contestant("iid", "CL"))
    assert equal is not None
    assert equal.config.client_lr == 0.001


def test_tables_and_claims_of_made_up_runs(tmp_path: Path) -> None:
    """PSL + client is 5 points better. A diverged trial is never chosen. CL is trained once for all settings."""
    asked = study()
    cells = tables.cells_of(asked, [SKEW])
    for cell in cells.values():
        for seed in cell.seeds:
            lost = cell.name == "skew/iid/psl/rate-0.01"
            if not cell.trials:
                pretend(tmp_path, cell, seed, test=float("nan") if lost else 50)
    for cell in cells.values():
        chosen = settled(tmp_path, cell)
        assert chosen is not None
        if cell.trials:
            for seed in cell.seeds:
                pretend(tmp_path, chosen, seed, 60 + 10 * seed + 5 * (cell.config.logit_adjust == "client"))
    outcomes = Outcomes(asked, tmp_path, cells.values())
    accuracy, sent, tried = tables.skew(outcomes)
    assert accuracy.columns == ("2 shards", "iid")
    shown = {label: [tables.shown(v) for v in values] for label, values in accuracy.rows}
    assert shown["PSL + client"] == ["70.00 ± 7.07"] * 2
    assert shown["CL"][0] == shown["CL"][1]
    assert sum(cell.config.traits.central for cell in cells.values()) == 3  # two trials, one run at the chosen rate
    assert dict(tried.rows)["PSL"] == ("50.0, diverged: 0.001",)
    assert dict(sent.rows)["PSL"] == ("1.00 MB", "2.00 MB", "3.00 MB", "0 B", "2.00 MB")
    verdicts = by_name(judge(outcomes))
    assert verdicts["skew-adjusted-psl"].overall.mean == pytest.approx(5.0)
    assert verdicts["skew-adjusted-psl"].overall.cells == 1  # Dirichlet is not part of this contest
    assert verdicts["skew-sfl-psl"].overall.verdict == "not measured"


def test_a_contest_is_trained_in_turns_and_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All trials come first. Training can be continued, and the report covers the finished runs."""
    monkeypatch.setitem(SIZES, "smoke", TINY)
    few = replace(FEW, settings=("2 shards",), methods=("PSL", "PSL + client"), seeds=(0,))
    monkeypatch.setitem(contest(SKEW).sizes, "smoke", few)  # type: ignore[arg-type]
    work = Reproduction([SKEW], "smoke", tmp_path / "out", "digits")
    trained = work.train(1)
    first = [next(trained) for _ in range(5)]
    assert [cell.turn for cell, _ in first] == [0, 0, 0, 0, 1]
    trained.close()  # type: ignore[attr-defined]
    assert work.find().done == (5, 6)
    for cell, seed in [*first, *work.train(1)]:
        outcome = work.outcome((cell, seed))
        assert 0 <= outcome.best <= 100
    assert work.waiting() == []
    findings = work.find()
    written = {path.name: path for path in work.write(findings)}
    text = written["reproduction.md"].read_text()
    assert text.startswith(f"# {contest(SKEW).about}\n")
    assert "Not finished" not in text
    assert "paper" not in text.lower()
    data = json.loads(written["reproduction.json"].read_text())
    chosen = data["cells"]["skew/2-shards/psl"]["config"]["client_lr"]
    validation = {
        rate: data["cells"][f"skew/iid/psl/rate-{rate:g}"]["seeds"]["7"]["best_validation_score"] for rate in few.rates
    }
    assert chosen == max(sorted(validation), key=validation.__getitem__)
    assert imread(written["skew.png"]).shape[1] > 400
    assert "<title>Label skew" in written["reproduction.html"].read_text()


def test_runs_at_another_rate_are_not_reported(tmp_path: Path) -> None:
    """The chosen rate is one of the settings that a stored run must match."""
    asked = study()
    cell = asked.contestant("iid", "PSL")
    for trial, validation in zip(cell.trials, (60, 50), strict=True):
        pretend(tmp_path, trial, 7, test=50, validation=validation)
    other = replace(cell, config=cell.config.model_copy(update={"client_lr": 0.01}))
    pretend(tmp_path, other, 0, 80)
    assert folder_of(tmp_path, other, 0).is_dir()
    with pytest.raises(RunFolderError, match=r"client_lr = 0\.01, not 0\.001: remove it"):
        Outcomes(asked, tmp_path, [*cell.trials, cell])
