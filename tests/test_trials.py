"""A comparison that tunes: trials without test rows, equal effort for all methods, nothing trained twice."""

from __future__ import annotations

import csv
import io
import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support import call

from cutlayer import Comparison, Run, RunConfig
from cutlayer.build import load_source
from cutlayer.compare import Progress
from cutlayer.errors import ConfigError, CutError, CutlayerWarning, RunFolderError, TrainingError
from cutlayer.folder import stored_config
from cutlayer.report import collect, html, paper, tidy
from cutlayer.report.cited import cite

SMALL: dict[str, Any] = {
    "data": "digits",
    "model": "mlp",
    "clients": 2,
    "samples_per_client": 24,
    "rounds": 4,
    "eval_every": 4,
    "checkpoint_every": 4,
    "engine": "local",
}
HALVED = {"how": "halving", "trials": 2, "eta": 2, "client_lr": [0.0001, 0.001, 0.01, 0.02, 0.03], "phi": [0.5, 1.0]}
BOTH: dict[str, Any] = {"algorithms": ["psl", "sglr"], "seeds": [0], "tuning": HALVED, **SMALL}
AT_THE_EDGE = pytest.mark.filterwarnings("ignore:.*at the edge of the values")


def scores(comparison: Comparison) -> list[tuple[str, float | None]]:
    return [(row.entry, row.score_mean) for row in comparison.table()]


def left(told: Iterator[Progress], out: Path) -> dict[Path, bytes]:
    """Stops the comparison in the middle of a trial of the second rung. Returns the trials' records at that time."""
    legs = 0
    for news in told:
        legs = max(legs, sum(path.read_text().count('"score"') for path in out.glob("tuning/*/*/trial.json")))
        if legs == 4 and not news.ended and not news.came:
            break
    told.close()  # type: ignore[attr-defined]
    assert not (out / "tuning.json").exists()
    return {path: path.read_bytes() for path in out.glob("tuning/*/*/steps.jsonl")}


@dataclass(frozen=True)
class Done:
    """A comparison that was stopped while it tuned, and resumed, with its records at the stop and later progress."""

    comparison: Comparison
    out: Path
    before: dict[Path, bytes]
    told: list[Progress]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Done:
    out = tmp_path_factory.mktemp("tuned") / "a"
    before = left(Comparison(**BOTH, out=out).progress(), out)
    again = Comparison.resume(out)
    assert len(again.waiting_trials) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CutlayerWarning)  # the best value is at the edge
        return Done(again, out, before, list(again.progress()))


def test_every_method_has_the_same_effort(tuned: Done) -> None:
    found = tuned.comparison.tuned
    assert found is not None
    assert tuned.comparison.waiting_trials == []
    assert (found.trials, found.seed, found.metric, found.test_seed) == (2, 1, "accuracy", 1)
    for entry, each in found.entries.items():
        assert sorted(trial.rounds for trial in each.trials) == [2, 4]  # half of the rounds, and all of them
        assert math.isclose(each.epochs, 6)
        assert each.samples == 6 * 48
        assert each.trials[each.chosen].rounds == 4
        rates = {run.client_lr for run in tuned.comparison.plan[entry].values()}
        assert rates == {each.values["client_lr"], stored_config(tuned.out / entry / "seed-0")["client_lr"]}
    assert "phi" in found.entries["sglr"].values
    assert "phi" not in found.entries["psl"].values
    assert not list(tuned.out.glob("tuning/*/*/*.safetensors"))  # finished trials keep no models


def test_nothing_is_trained_twice(tuned: Done) -> None:
    """Earlier records remain, and every step is recorded once. The stopped trial repeats steps after its checkpoint."""
    longer = 0
    for path, content in tuned.before.items():
        kept = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["step"] for line in kept] == list(range(len(kept)))
        was = [json.loads(line) for line in content.decode().splitlines()]
        common = [line for line in was if line["round"] < 2]  # before the checkpoint of the stopped trial
        assert kept[: len(common)] == common
        longer += len(kept) > len(was)
    ended = [p.name for p in tuned.told if p.ended]
    assert len(tuned.before) == 4
    assert longer <= 2
    assert ended[-2:] == ["psl, seed 0", "sglr, seed 0"]
    assert sorted(ended[:-2]) == [f"{entry}, trial {n}" for entry in ("psl", "sglr") for n in (1, 2)]
    came = [p.came for p in tuned.told if p.came]
    assert 1 <= len(came) <= 2
    assert all(words.startswith("validation accuracy") for words in came)


@AT_THE_EDGE
def test_in_memory_and_uninterrupted_it_comes_to_the_same(tuned: Done) -> None:
    comparison = Comparison(**BOTH)
    assert {(entry, seed) for entry, seed, *_ in comparison} == {("psl", 0), ("sglr", 0)}
    assert comparison.tuned == tuned.comparison.tuned
    assert scores(comparison) == scores(tuned.comparison)
    assert comparison.tuned is not None
    assert comparison.effort is not None
    best = comparison.tuned.entries["sglr"]
    run = Run(comparison.effort.run("sglr", best.values))
    run.run()  # a trial continued from rung to rung equals one run
    assert run.evaluations[-1].validation_score == best.trials[best.chosen].score


def test_no_trial_sees_a_test_row(tuned: Done) -> None:
    assert tuned.comparison.effort is not None
    trial = load_source(tuned.comparison.effort.run("psl", {"client_lr": 0.01}), None)
    run = load_source(tuned.comparison.plan["psl"][0], None)
    assert torch.equal(run.test.rows[0], trial.test.rows[0])
    assert not torch.equal(run.train.rows[0], trial.train.rows[0])  # training rows differ between seeds
    for path in tuned.out.glob("tuning/*/*/evaluations.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            assert line["test"] == line["validation"]
            assert line["test_loss"] == line["validation_loss"]


def test_page_tables_and_files_tell_it(tuned: Done) -> None:
    assert tuned.comparison.tuned is not None
    report = collect.read(tuned.out)
    rows = list(csv.DictReader(io.StringIO(tidy.tables(report)["trials.csv"].decode())))
    assert len(rows) == 4
    assert sum(row["chosen"] == "True" for row in rows) == 2
    assert {row["entry"]: row["phi"] for row in rows}["psl"] == ""
    page, latex = html.render(report, [b""] * 3, b""), paper.latex(report, None)
    rate = tuned.comparison.tuned.entries["psl"].values["client_lr"]
    sentence = "2 trials of each method (halving), on seed 1, which is not reported, by the accuracy on the validation"
    for text in (page, latex):
        assert sentence in text
        assert f"lr {rate}" in text.replace("\\_", "_")
        assert "288" in text
    assert "chosen by tuning" in page
    assert f"at rate {rate}" in page.replace(" or ", f", at rate {rate}")
    assert "jamieson2016halving" in cite(tuned.out)
    stored = json.loads((tuned.out / "tuning.json").read_text())
    assert stored["entries"]["psl"]["values"] == {"client_lr": rate}
    assert Comparison.resume(tuned.out).tuned == tuned.comparison.tuned


def test_what_diverges_is_not_chosen() -> None:
    options = {**SMALL, "algorithms": ["psl"], "seeds": [0], "client_optimizer": "sgd", "rounds": 1}
    comparison = Comparison(**options, tuning={"client_lr": [1e30, 0.1], "by": "best"})
    with pytest.warns(CutlayerWarning, match=r"psl: the chosen client_lr = 0.1 is at the edge of the values"):
        comparison.run()
    assert comparison.tuned is not None
    first, second = comparison.tuned.entries["psl"].trials
    assert first.diverged
    assert first.score is None
    assert not second.diverged
    assert comparison.tuned.entries["psl"].edges == ("client_lr",)
    worst = Comparison(**options, tuning={"client_lr": [1e30]})
    with pytest.raises(TrainingError, match=r"all 1 trials of 'psl' have diverged: tune it over other values"):
        worst.run()


OWN = '''
from cutlayer.plugins import option
from cutlayer.searches import Leg, Search, search


@search("climbing")
class Climbing(Search):
    """One value after another, as long as it becomes better."""

    step: int = option(1, ge=1)

    def legs(self, space, trials, seed):
        best = float("-inf")
        for number, point in enumerate(space.points()[:: self.step][:trials]):
            (score,) = yield [Leg(number, point)]
            if score is None or score <= best:
                return
            best = score


@search("wrong")
class Wrong(Search):
    """Legs of trials that there are not."""

    def legs(self, space, trials, seed):
        yield [Leg(trials, space.points()[0])]


@search("failing")
class Failing(Search):
    def legs(self, space, trials, seed):
        yield [Leg(0, space.points()[7])]
'''


def test_a_search_of_your_own(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    options = {**SMALL, "algorithms": ["psl"], "seeds": [0], "rounds": 1}

    def how(name: str, **more: Any) -> Comparison:
        tuning = {"how": f"{tmp_path / 'own.py'}:{name}", "trials": 2, "client_lr": [1e-5, 0.005, 0.01, 0.1], **more}
        return Comparison(**options, tuning=tuning)

    climbed = how("Climbing", step=2)
    climbed.run()
    assert climbed.tuned is not None
    assert [trial.values["client_lr"] for trial in climbed.tuned.entries["psl"].trials] == [1e-5, 0.01]
    with pytest.raises(ConfigError, match=r"asks for Leg\(trial=2, .* of the trials 0 to 1"):
        how("Wrong").run()
    with pytest.raises(ConfigError, match=r"own\.py:Failing' failed at .*own\.py:32 \(IndexError"):
        how("Failing").run()


def test_what_cannot_be_tuned(tmp_path: Path) -> None:
    options = {**SMALL, "algorithms": ["psl"], "seeds": [0]}
    with pytest.raises(ConfigError, match=r"tuning needs validation rows to choose by"):
        Comparison(**options, validation=0, tuning={"client_lr": [0.1, 0.2]}).check()
    with pytest.raises(CutError, match=r"unknown module 'hidden9'"):
        Comparison(**options, tuning={"cut": ["hidden1", "hidden9"]}).check()
    needed = {"algorithms": ["psl"], "seeds": [0], "screening": "length_bound", "tuning": {"row_limit": [5.0, 9.0]}}
    Comparison(**SMALL, **needed).check()  # the screening needs a limit, which the trials set
    out = tmp_path / "a"
    comparison = Comparison(**options, tuning={"client_lr": [0.01, 0.02]}, out=out)
    told = comparison.progress()
    next(news for news in told if news.ended)
    told.close()  # type: ignore[attr-defined]
    path = out / "tuning/psl/trial-0/trial.json"
    path.write_text(path.read_text().replace("0.01", "0.03"))
    with pytest.raises(RunFolderError, match=r"has the values .*0\.03.*, where the tuning asks for .*0\.01"):
        Comparison.resume(out).run()
    path.write_text("{}")
    with pytest.raises(RunFolderError, match=r"trial\.json' is damaged"):
        Comparison.resume(out).run()


def test_test_rows_by_a_seed_of_their_own() -> None:
    options = {**SMALL, "algorithm": "psl"}
    own, shared = (load_source(RunConfig(**options, seed=3, test_seed=s), None) for s in (None, 5))
    theirs = load_source(RunConfig(**options, seed=5), None)
    assert torch.equal(shared.test.rows[0], theirs.test.rows[0])
    assert not torch.equal(own.test.rows[0], theirs.test.rows[0])
    x, y, few = torch.rand(40, 3), torch.arange(40) % 3, {"samples_per_client": 10}
    with pytest.raises(ConfigError, match=r"test_seed = 5 has no effect on arrays, which has its own test set"):
        Run(**{**options, "data": (x, y, x[:9], y[:9]), **few}, test_seed=5)
    comparison = Comparison(
        algorithms=["psl"], seeds=[0], tuning={"client_lr": [0.1]}, **{**SMALL, "data": (x, y, x[:9], y[:9]), **few}
    )
    comparison.check()
    assert comparison.plan["psl"][0].test_seed is None


@AT_THE_EDGE
def test_flags(tmp_path: Path) -> None:
    flags = "--tuning.client-lr.low 1e-3 --tuning.client-lr.high 0.1 --tuning.client-lr.log true --tuning.trials 2"
    few = "--algorithms psl --seeds 0 --model mlp --clients 2 --samples-per-client 24 --rounds 1 --engine local"
    words = ("compare", *flags.split(), "--tuning.how", "random", *few.split(), "--out", str(tmp_path / "a"))
    told = " ".join(call(*words).stdout.split())
    assert "Tuning: 2 trials of each method (client_lr), random, on seed 1, by the score on the validation rows" in told
    assert "psl, trial 2: validation accuracy" in told
    assert "Tuning, before the seeds were trained" in told
    assert "The data bring no test rows: those that seed 1 draws are the test of all seeds (test_seed)." in told
    assert stored_config(tmp_path / "a")["tuning"]["client_lr"] == {"low": 0.001, "high": 0.1, "log": True}


@pytest.mark.long
@AT_THE_EDGE
def test_optuna_is_resumed(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    tuning = {"how": "optuna", "trials": 3, "rungs": 2, "client_lr": {"low": 1e-4, "high": 0.1, "log": True}}
    options: dict[str, Any] = {**BOTH, "algorithms": ["psl"], "tuning": tuning}
    told = Comparison(**options, out=tmp_path / "a").progress()
    next(news for news in told if news.trial == 1)
    told.close()  # type: ignore[attr-defined]
    again = Comparison.resume(tmp_path / "a")
    again.run()
    whole = Comparison(**options)
    whole.run()
    assert again.tuned == whole.tuned
    assert scores(again) == scores(whole)


@pytest.mark.long
@AT_THE_EDGE
def test_side_by_side(tmp_path: Path, tuned: Done) -> None:
    comparison = Comparison(**BOTH, out=tmp_path / "a", jobs=2)
    comparison.run()
    assert comparison.tuned == tuned.comparison.tuned
    assert scores(comparison) == scores(tuned.comparison)
