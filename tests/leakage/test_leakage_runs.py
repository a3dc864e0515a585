"""From a trained run to what it leaks: subjects, all measurements, the command and the reproduction's tables."""

from __future__ import annotations

import copy
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cutlayer import ConfigError, DataError, Run, leakage
from cutlayer.build import assemble, deal
from cutlayer.defences.watch import Watch
from cutlayer.errors import RunFolderError
from cutlayer.folder import CHECKPOINT
from cutlayer.leakage.active import Watched, _trained, hijack
from cutlayer.leakage.assess import Asked, _upper, check, comparisons, examine
from cutlayer.leakage.fitting import Budget
from cutlayer.leakage.reconstruct import reconstruct
from cutlayer.leakage.subject import Subject, moments, subjects
from cutlayer.options import RunConfig
from cutlayer.report import leakage as report
from cutlayer.reproduce.cells import SIZES, Study
from cutlayer.reproduce.claims import explained, explained_at_equal_accuracy
from cutlayer.reproduce.outcomes import Outcome, Outcomes
from cutlayer.reproduce.reproduction import Reproduction
from cutlayer.reproduce.tables import SECTIONS, cells_of, named, shown
from cutlayer.reproduce.train import EXAMINED, folder_of, is_done, is_trained

SMALL: dict[str, Any] = {
    "data": "digits",
    "model": "cnn",
    "clients": 3,
    "samples_per_client": 150,
    "validation": 300,
    "test": 700,
    "rounds": 2,
    "algorithm": "psl",
}


def trained(folder: Path, **options: Any) -> Path:
    Run(RunConfig.of({**SMALL, **options}), out=folder).run()
    return folder


def subject(folder: Path, **options: Any) -> Subject:
    return next(iter(subjects(moments(trained(folder, **options))[-1], 1, 150, 300, 0)))


def test_a_subject_is_what_the_run_left(tmp_path: Path) -> None:
    """The models are the trained ones, targets are the client's own, and the attacker's rows belong to no client."""
    run = Run(RunConfig.of(SMALL), out=tmp_path / "run")
    run.run()
    (moment,) = moments(tmp_path / "run")
    assert moment.accuracy == run.evaluations[-1].test_score
    rows, train = deal(run.config), run.training.source.train
    seen = []
    for s in subjects(moment, 3, 100, 300, 0):
        seen.append(s.name)
        own = {tuple(x.flatten().tolist()) for x in train.x[torch.from_numpy(rows[s.name])]}
        assert all(tuple(x.flatten().tolist()) in own for x in s.samples.x)
        held = {tuple(x.flatten().tolist()) for x in s.auxiliary.x}
        everyone = {tuple(x.flatten().tolist()) for x in train.x}
        assert len(held & everyone) < 3  # digits contains a few pictures twice
        state = run.training.clients.model_state(s.name)
        lower = run.training.parts.client
        lower.load_state_dict({n: t for n, t in state.items() if n in lower.state_dict()})
        with torch.no_grad():
            assert torch.equal(lower.eval()(s.samples.x)[0], s.z)
        assert s.server is not None
        with torch.no_grad():
            right = (s.server(s.z)[0].argmax(1) == s.samples.y).float().mean()
        assert right > 0.3
        assert s.statement is None
    assert seen == [0, 1, 2]


def test_what_is_sent_is_defended(tmp_path: Path) -> None:
    s = subject(tmp_path, clip=2.0, gaussian_noise=0.5, up_codec="int8")
    again = s.client(s.samples.x)
    assert not torch.equal(again, s.z)  # each call draws new noise
    noise = s.z - s.bare(s.samples.x)
    assert float(noise.std()) > 0.5
    assert s.statement is not None
    assert (s.statement.scale, s.statement.clip, s.statement.releases) == (1.0, 2.0, 2)
    finding = examine(s, Asked((), ())).finding
    assert [bound.kind for bound in finding.upper] == ["gaussian channel", "quantisation"]
    assert all(math.isfinite(bound.nats) for bound in finding.upper)


@pytest.mark.long
def test_the_battery(tmp_path: Path) -> None:
    """Attack, information and tables distinguish an undefended run from one with strong noise."""
    bare = examine(subject(tmp_path / "bare"), Asked(("model", "smashed"), ("ksg",)))
    drowned = examine(subject(tmp_path / "drowned", clip=1.0, gaussian_noise=30.0), Asked(("model",), ("ksg",)))
    a, b = bare.finding, drowned.finding
    assert a.attacks["model"].explained > 0.5 > 0.15 > abs(b.attacks["model"].explained)
    assert a.attacks["model"].attack.mse < a.attacks["model"].nearest.mse
    assert math.isinf(a.upper[0].nats)
    assert b.upper[0].nats < 5
    assert a.dependence.distance_correlation > b.dependence.distance_correlation + 0.2
    assert [one.name for one in a.estimates] == ["ksg"]
    assert a.estimates[0].known
    sentences = comparisons([a, b])
    assert len(sentences) == 1
    assert "ksg" in sentences[0]
    assert sum(table.row_count for table in report.tables([a, b])) == 3 + 2 + 2
    assert any("infinite" in note for note in report.notes([a]))
    assert any("epsilon" in note for note in report.notes([b]))
    found = json.loads(report.as_json([a, b], sentences))
    assert found["findings"][0]["upper"][0]["nats"] is None
    png = report.pictures([bare, drowned])
    assert png is not None
    assert png.startswith(b"\x89PNG")


def test_raw_tensors_are_flagged(tmp_path: Path) -> None:
    """If there are too many dimensions for an estimator, the report says so and shows estimates of known answers."""
    s = subject(tmp_path, model="mlp", cut="hidden1")
    finding = examine(s, Asked(("model",), ("ksg",), view="raw")).finding
    (one,) = finding.estimates
    assert one.warning is not None
    (note,) = [note for note in report.notes([finding]) if note.startswith("ksg reads")]
    assert one.warning in note
    assert "where the truth is" in note


def test_labels_that_stay_private(tmp_path: Path) -> None:
    """In the U-shaped split, labels stay with the client, but gradients leak them."""
    s = subject(tmp_path, algorithm="ussl", model="mlp", cut="hidden1", tail_cut="hidden2")
    labels = examine(s, Asked(("model",), ())).finding.labels
    assert labels is not None
    assert labels.cosine_auc > 0.7


def test_snapshots(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", rounds=4, snapshot_every=1, eval_every=1)
    found = moments(run, snapshots=True)
    assert [m.rounds for m in found] == [1, 2, 3, 4]
    models = [m.models[0] for m in found]
    assert all(not torch.equal(next(iter(a.values())), next(iter(models[-1].values()))) for a in models[:-1])
    with pytest.raises(RunFolderError, match="snapshot_every"):
        moments(trained(tmp_path / "other"), snapshots=True)


def test_one_that_holds_the_model_is_examined(tmp_path: Path) -> None:
    (moment,) = moments(trained(tmp_path, algorithm="ssl"))
    assert list(moment.models) == [moment.training.clients.holder]


@pytest.mark.parametrize(("algorithm", "words"), [("fl", "whole models"), ("cl", "everybody's data")])
def test_what_sends_no_smashed_data(algorithm: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        moments(trained(tmp_path, algorithm=algorithm))


def test_what_cannot_be_examined(tmp_path: Path) -> None:
    run = trained(tmp_path / "run")
    (moment,) = moments(run)
    with pytest.raises(DataError, match="auxiliary = 5000, but the run held out 1000"):
        next(iter(subjects(moment, 1, 100, 5000, 0)))
    few = next(iter(subjects(moment, 1, 100, 50, 0)))
    with pytest.raises(DataError, match="50 samples are too few for an attacker's auxiliary data"):
        examine(few, Asked(("model",), ()))
    with pytest.raises(ConfigError, match="did you mean 'random'"):
        Asked(view="rando")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="did you mean 'infonce'"):
        Asked(estimators=("infonse",))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="attacked with 50 auxiliary samples, too few to train an attacker on"):
        check(few, Asked(("model",), ()))
    one = next(iter(subjects(moment, 1, 60, None, 0)))
    assert len(one.auxiliary) == 1000
    with pytest.raises(DataError, match="on 60 samples, too few for infonce and ksg: they take 100"):
        check(one, Asked(("model",), ("usable", "infonce", "ksg")))
    check(one, Asked(("model",), ("usable",)))  # left out later, with a note
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace("seed = 0", "seed = 1"))
    with pytest.raises(RunFolderError, match="was trained on other data"):
        moments(run)
    (run / "config.toml").write_text(config)
    (run / CHECKPOINT).unlink()
    with pytest.raises(RunFolderError, match="no stored client models"):
        moments(run)
    with pytest.raises(RunFolderError, match="not a run folder"):
        moments(tmp_path)


def test_the_reproductions_cells_are_examined(tmp_path: Path) -> None:
    """One cell of the reproduction is trained and attacked. Its results are in the tables; the others have a dash."""
    from cutlayer.reproduce.train import train

    study = Study(SIZES["smoke"], "digits")
    cell = study.by_phi(0.5)
    small = cell.config.model_copy(update={"validation": 300, "samples_per_client": 100})
    one = type(cell)(cell.name, small, examined=True)
    assert list(train(tmp_path, [(one, 0)], 1)) == [(one, 0)]
    folder = folder_of(tmp_path, one, 0)
    assert is_done(tmp_path, one, 0)
    (folder / EXAMINED).unlink()
    assert is_trained(folder)
    assert not is_done(tmp_path, one, 0)
    assert list(train(tmp_path, [(one, 0)], 1)) == [(one, 0)]  # already trained, so it is only attacked
    outcomes = Outcomes(study, tmp_path, [])
    outcomes.cells = {one.name: one}
    from cutlayer.reproduce.outcomes import read

    outcomes._of = {one.name: {0: read(folder, one.at(0))}}
    for name in ("table5", "leakage"):
        for table in SECTIONS[name].tables(outcomes):
            lines = {label: [shown(v) for v in values] for label, values in table.rows}
            done = [label for label, values in lines.items() if values[1] != "\N{EN DASH}"]
            assert set(done) <= {"phi 0.5", "SGLR"}
            assert all(lines[label][-2 if name == "leakage" else -3] == "infinite" for label in done)


def test_without_its_libraries_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The error is raised before anything is trained or attacked."""
    monkeypatch.setattr(leakage, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs dcor: install the extra, pip install 'cutlayer\[leakage\]'"):
        leakage.check_installed()
    with pytest.raises(ConfigError, match="needs dcor"):
        Reproduction(["table5"], "smoke", tmp_path / "r", "digits").check()
    assert not (tmp_path / "r").exists()


def test_attacks_are_asked_for_by_name() -> None:
    assert not {"table5", "leakage"} & set(named([]))
    assert named(["leakage", "table5"]) == ("table5", "leakage")
    cells = cells_of(Study(SIZES["smoke"], "digits"), ["table5", "leakage"])
    assert all(cell.examined for cell in cells.values())
    assert len(cells) == 5 + 3 + 2 + 16
    followed = ["slr", *(f"sglr-phi-{phi:g}" for phi in (0.25, 0.5, 0.75, 1)), "psl", "sfl", "ssl"]
    assert [c.name.removeprefix("leakage/") for c in cells.values() if c.config.snapshot_every] == followed


def _scores(watched: Sequence[Watched]) -> list[float]:
    scores = [w.score for w in watched if w.score is not None]
    assert len(scores) == len(watched)
    return scores


@pytest.mark.long
def test_an_active_server(tmp_path: Path) -> None:
    """Hijackers with and without labels are compared with an honest server. The run's folder does not change."""
    run = trained(tmp_path / "run", rounds=8, cut="hidden")
    before = (run / CHECKPOINT).read_bytes()
    (moment,) = moments(run)
    said: list[str] = []
    (plain, _), (labelled, kept) = hijack(moment, 100, 300, 0, said.append)
    assert (run / CHECKPOINT).read_bytes() == before
    assert [line.split("rounds under ")[1] for line in said] == [
        "an honest server",
        "a hijacking server that ignores labels",
        "a hijacking server that knows labels",
    ]
    assert (plain.labelled, labelled.labelled, plain.samples, plain.auxiliary, plain.rounds) == (0, 1, 100, 300, 8)
    assert plain.honest == labelled.honest
    honest, ignoring, knowing = (_scores(w) for w in (plain.honest, plain.hijacked, labelled.hijacked))
    # Over three seeds and all vector instruction sets: 0.96 to 1.00 under an honest server, 0.57 to 0.67 under one that
    # ignores labels (means 0.60 to 0.64), 0.74 to 0.92 under one that knows them.
    assert min(honest) > 0.8
    assert all(a - b > 0.15 for a, b in zip(honest, ignoring, strict=True))
    assert statistics.mean(ignoring) < 0.7
    assert statistics.mean(knowing) - statistics.mean(ignoring) > 0.1  # its gradients also depend on labels
    assert all(w.suspicious == (w.score < Watch().least) for w in (*plain.honest, *plain.hijacked, *labelled.hijacked))
    assert any(w.suspicious for w in plain.hijacked)
    assert kept["inputs"].shape == kept["reconstructions"].shape
    table = report.active([plain, labelled])
    assert table.row_count == 2
    assert json.loads(report.as_json([], [], [plain]))["hijacked"][0]["labelled"] is False


def test_an_honest_server_is_the_runs_own(tmp_path: Path) -> None:
    """The training under an honest server equals that of the run bit for bit."""
    run = Run(RunConfig.of(SMALL), out=tmp_path / "run")
    run.run()
    (moment,) = moments(tmp_path / "run")
    training = assemble(run.config)
    watched = _trained(moment, training, training.server)
    for k, model in moment.models.items():
        assert all(torch.equal(t, model[name]) for name, t in training.clients.model_state(k).items())
    assert [w.client for w in watched] == [0, 1, 2]
    assert all(w.batches > 20 for w in watched)


def test_shared_gradients_are_not_watched(tmp_path: Path) -> None:
    """With phi = 1, clients receive no gradients of their own, so the watch has no result."""
    run = trained(tmp_path / "run", algorithm="sglr", phi=1.0)
    (moment,) = moments(run)
    training = assemble(moment.config)
    assert [(w.score, w.batches, w.suspicious) for w in _trained(moment, training, training.server)] == [
        (None, 0, False)
    ] * 3


def test_what_cannot_be_hijacked(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", algorithm="ussl", model="mlp", cut="hidden1", tail_cut="hidden2")
    with pytest.raises(ConfigError, match=r"cannot be hijacked: .* labels stay with the clients: leave hijack out"):
        hijack(moments(run)[-1], 100, 300, 0)


def test_equal_accuracy() -> None:
    """Runs are compared when they first reached an accuracy that both reach, by linear interpolation."""

    def outcome(*found: tuple[float, float]) -> Outcome:
        leaks = tuple({"accuracy": a, "attacks": {"model": {"explained": e}}} for a, e in found)
        return Outcome(80.0, 80.0, 80.0, False, 10.0, [], {}, leaks)

    fast, slow = outcome((0.6, 0.9), (0.8, 0.7), (0.9, 0.6)), outcome((0.5, 0.8), (0.7, 0.5))
    assert (fast.reached, slow.reached, fast.explained, slow.explained) == (90.0, 70.0, 60.0, 50.0)
    assert fast.explained_at(70.0) == pytest.approx(80.0)
    assert fast.explained_at(30.0) is None  # exceeded before the first moment
    assert fast.explained_at(59.8) == pytest.approx(90.0)
    assert slow.explained_at(80.0) is None
    assert explained(fast, slow) == pytest.approx(10.0)
    assert explained_at_equal_accuracy(fast, slow) == pytest.approx(80.0 - 50.0)
    assert explained_at_equal_accuracy(outcome(), slow) is None


@pytest.mark.parametrize(
    ("options", "releases"),
    [
        ({"algorithm": "psl", "rounds": 3}, 3),
        ({"algorithm": "sfl", "rounds": 2, "local_epochs": 4}, 8),
        ({"algorithm": "sfl", "rounds": 3, "local_steps": 5, "batch": 10}, 1),  # 15 of 15 batches
        ({"algorithm": "sfl", "rounds": 4, "local_steps": 5, "batch": 10}, 2),  # a second pass has begun
        ({"algorithm": "ssl", "rounds": 2}, 2),
    ],
)
def test_how_often_a_sample_was_sent(options: dict[str, Any], releases: int, tmp_path: Path) -> None:
    """Releases in the privacy statement: passes through the client's data, with an incomplete pass counted as one."""
    s = subject(tmp_path, clip=1.0, gaussian_noise=5.0, model="mlp", cut="hidden1", **options)
    assert s.statement is not None
    assert (s.releases, s.statement.releases) == (releases, releases)
    assert s.statement.epsilon > s.statement.once or releases == 1


def test_private_labels_are_no_help(tmp_path: Path) -> None:
    """In the U-shaped split, an attacker that has only smashed data makes no use of labels."""
    options: dict[str, Any] = {"model": "mlp", "cut": "hidden1", "tail_cut": "hidden2", "algorithm": "ussl"}
    s = subject(tmp_path, **options)
    few = Budget(steps=40, batch=32, check_every=20)

    def attack(y: torch.Tensor, labelled: bool) -> float:
        found = reconstruct(
            s.samples.x, s.z, y, s.auxiliary, surrogate=copy.deepcopy(s.fresh), knowledge="smashed", labelled=labelled,
            budget=few,
        )  # fmt: skip
        return found.report.attack.mse

    y, other = s.samples.y, (s.samples.y + 3) % 10
    assert attack(y, labelled=False) == attack(other, labelled=False)
    assert attack(y, labelled=True) != attack(other, labelled=True)


def test_the_upper_bound_counts_dropout(tmp_path: Path) -> None:
    """Dropout scales up the remaining features, so the channel carries more information."""
    bare = subject(tmp_path / "a", model="mlp", cut="hidden1", clip=50.0, gaussian_noise=0.02)
    dropped = subject(tmp_path / "b", model="mlp", cut="hidden1", clip=50.0, gaussian_noise=0.02, feature_dropout=0.5)
    a, b = (next(iter(_upper(s, 0))).nats for s in (bare, dropped))
    assert b > a
    only = subject(tmp_path / "c", model="mlp", cut="hidden1", feature_dropout=0.5)
    assert "keeps some features exactly" in next(iter(_upper(only, 0))).reason
