"""Clients with their own data keep their own test rows, and the scores on these rows equal the simulation's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cutlayer import Run
from cutlayer.algorithms import Algorithm, algorithm
from cutlayer.algorithms.common import report
from cutlayer.build import own_source
from cutlayer.cohort import Cohort
from cutlayer.data.samples import AtClient
from cutlayer.defences.pipeline import Defences
from cutlayer.errors import ConfigError, DataError, RefusedError, TrainingError, WireError
from cutlayer.files import read_records
from cutlayer.options import RunConfig
from cutlayer.remote.sides import client_name, worker_of
from cutlayer.remote.transports.memory import MemoryCarrier
from cutlayer.remote.worker import Worker
from cutlayer.scoring import ROWS_PER_PASS, reported
from cutlayer.server import Server
from cutlayer.testing import in_memory
from cutlayer.types import CutGradients, Round, Step
from cutlayer.verbs import AVERAGE, BACKWARD, FORWARD
from cutlayer.wire import Frame, encode, pack, unpack
from cutlayer.wire import messages as m

SIZES, TESTED = (30, 24, 17), (9, 5, 7)
SMALL: dict[str, Any] = {
    "model": "mlp",
    "clients": 3,
    "rounds": 3,
    "batch": 8,
    "client_lr": 0.01,
    "class_names": ["a", "b", "c"],
    "eval_every": 1,
    "engine": "local",
}
USSL = {"cut": "hidden1", "tail_cut": "hidden2"}


def rows(count: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.array(["a", "b", "c"])
    return {"x": rng.normal(size=(count, 6)).astype(np.float32), "y": labels[rng.integers(0, 3, count)]}


class Sites:
    """The rows of three owners: all in one file for a simulation, and in a file for each owner; and the server's own
    rows. If `named`, the data say whose the test rows are.
    """

    def __init__(self, folder: Path, *, named: bool, sizes: tuple[int, ...] = SIZES) -> None:
        trained = [rows(n, k) for k, n in enumerate(sizes)]
        tested = [rows(n, 10 + k) for k, n in enumerate(TESTED)]
        chosen = rows(20, 20)
        held = {f"{name}_test": np.concatenate([one[name] for one in tested]) for name in ("x", "y")}
        held |= {f"{name}_validation": array for name, array in chosen.items()}
        whole = {name: np.concatenate([one[name] for one in trained]) for name in ("x", "y")}
        owners = {"client": np.repeat(np.arange(3), sizes)}
        owners |= {"client_test": np.repeat(np.arange(3), TESTED)} if named else {}
        self.all, self.server = str(folder / "all.npz"), str(folder / "server.npz")
        np.savez(self.all, **whole, **held, **owners)
        np.savez(self.server, **rows(40, 30), **held)
        self.own = [str(folder / f"own-{k}.npz") for k in range(3)]
        for path, mine, test in zip(self.own, trained, tested, strict=True):
            np.savez(path, **mine, **({f"{name}_test": array for name, array in test.items()} if named else {}))

    def simulated(self, **options: Any) -> RunConfig:
        return RunConfig.of({**SMALL, **options, "data": self.all, "partition": "column"})

    def deployed(self, **options: Any) -> RunConfig:
        return RunConfig.of({**SMALL, **options, "data": self.server})

    def workers(self, config: RunConfig) -> dict[int, Worker]:
        return {
            k: worker_of(config, k, name=client_name(k), own=own_source(config, path))
            for k, path in enumerate(self.own)
        }


class Listening(MemoryCarrier):
    """Records the messages of clients."""

    def __init__(self, workers: Mapping[int, Any]) -> None:
        super().__init__(workers)
        self.heard: list[tuple[m.Message, int]] = []
        self.tamper: Callable[[m.Message], m.Message] = lambda message: message

    def answer(self, client: int, frame: Frame) -> Any:
        if (answer := super().answer(client, frame)) is None:
            return None
        message, body = answer
        self.heard.append((message, sum(memoryview(part).nbytes for part in body)))
        return self.tamper(message), body


def deployed(sites: Sites, out: Path | None = None, **options: Any) -> tuple[Run, Listening]:
    config = sites.deployed(**options)
    workers = sites.workers(config)
    there = in_memory(config, workers=workers, carrier=Listening, folder=out)
    there.run.run()
    return there.run, there.carrier


CASES = [
    ("psl", {}),
    ("sglr", {}),
    ("sgl", {"participation": 0.7}),
    ("fl", {"participation": 0.7}),
    ("sflv1", {"participation": 0.7}),
    ("sflv3", {}),
    ("ssl", {}),
    ("ussl", USSL),
    ("psl", {"up_codec": "int8", "metrics": ["auroc"]}),
]


# Every case runs with both ways to evaluate: once with named test rows, once with drawn ones.
PLACES = [(("own", True), ("both", False)), (("both", True), ("own", False))]


@pytest.mark.parametrize(
    ("name", "more", "evaluate_on", "named"),
    [(*case, *place) for i, case in enumerate(CASES) for place in PLACES[i % 2]],
)
def test_own_scores_are_those_of_the_simulation(
    name: str, more: dict[str, Any], evaluate_on: str, named: bool, tmp_path: Path
) -> None:
    sites = Sites(tmp_path, named=named)
    options = {"algorithm": name, **more, "evaluate_on": evaluate_on}
    here = Run(sites.simulated(**options), out=tmp_path / "here")
    here.run()
    there, hub = deployed(sites, tmp_path / "there", **options)
    assert list(there.training.clients.samples) == list(here.training.clients.samples)
    assert list(there.training.clients.masses) == list(here.training.clients.masses)
    left = SIZES if named else tuple(n - round(0.2 * n) for n in SIZES)
    assert tuple(there.training.clients.samples) == left
    assert {k: len(test) for k, test in there.training.own_tests.items()} == {
        k: len(test) for k, test in here.training.own_tests.items()
    }
    near, far = here.by_client["own"], there.by_client["own"]
    assert {k: reported(scores) for k, scores in near.scores.items()} == far.scores
    assert near.samples == far.samples
    assert [e.own_score for e in here.evaluations] == [e.own_score for e in there.evaluations]
    assert [e.test_score for e in here.evaluations] == [e.test_score for e in there.evaluations]
    assert [e.validation_loss for e in here.evaluations] == [e.validation_loss for e in there.evaluations]
    lines = [read_records(folder / "clients.jsonl") for folder in (tmp_path / "here", tmp_path / "there/run")]
    assert [x["clients"] for x in lines[0] if x["on"] == "own"] == [x["clients"] for x in lines[1] if x["on"] == "own"]
    assert sum(isinstance(message, m.ScoresUp) for message, _ in hub.heard) == 3 * len(there.evaluations)


def test_targets_and_outputs_stay(tmp_path: Path) -> None:
    """With a whole model, only scores leave a client. With a cut model, smashed data without labels leave too."""
    sites = Sites(tmp_path, named=True)
    _, hub = deployed(sites, algorithm="fl", evaluate_on="own", rounds=1)
    scores = [(message, size) for message, size in hub.heard if isinstance(message, m.ScoresUp)]
    assert [size for _, size in scores] == [0, 0, 0]
    assert set(scores[0][0].scores) == {"loss", "accuracy", "majority", "balanced_accuracy", "macro_f1", "recall"}
    run, hub = deployed(sites, algorithm="psl", evaluate_on="own", rounds=1)
    sent = [size for message, size in hub.heard if isinstance(message, m.EvaluationRows)]
    kinds = run.training.parts.client(run.training.example)
    of_a_row = sum(r[:1].nbytes for r in kinds)
    headers = 64
    assert sent[-3:] == [pytest.approx(n * of_a_row, abs=headers) for n in TESTED]
    assert run.training.ledger.total("down", kind="evaluation") == sum(TESTED) * 3 * 4, "outputs of three classes"
    assert isinstance(run.training.own_tests[1], AtClient)
    with pytest.raises(DataError, match="own test rows of client 1 are on its machine"):
        run.training.own_tests[1][:1]


def test_many_rows_go_in_pieces(tmp_path: Path) -> None:
    sites = Sites(tmp_path, named=False, sizes=(2300, 24, 17))
    options = {"algorithm": "psl", "evaluate_on": "own", "own_test": 0.6, "rounds": 1}
    here = Run(sites.simulated(**options))
    here.run()
    there, hub = deployed(sites, **options)
    assert len(there.training.own_tests[0]) == 1380
    assert there.by_client["own"].each("loss") == here.by_client["own"].each("loss")
    assert [x.rows for x, _ in hub.heard if isinstance(x, m.EvaluationRows)][-4:-2] == [ROWS_PER_PASS, 356]


def test_too_few_rows_are_refused_at_once(tmp_path: Path) -> None:
    sites = Sites(tmp_path, named=False, sizes=(30, 1, 17))
    with pytest.raises(DataError, match=r"client 1 has 1 rows, too few .*: add rows to its data, at least two"):
        sites.workers(sites.deployed(algorithm="psl", evaluate_on="own"))


def test_names_of_any_length_can_be_refused(tmp_path: Path) -> None:
    sites = Sites(tmp_path, named=True)
    config = sites.deployed(algorithm="psl", evaluate_on="both")
    there = in_memory(config, workers=sites.workers(config))
    hello = there.workers[0].hello()
    hello.metrics = [f"{k:0256}" for k in range(256)]
    refused = there.greet(hello, 0)
    assert isinstance(refused, m.Refused)
    assert len(refused.sentence) < 2500
    assert unpack(pack(refused), "to client").message == refused


def test_metrics_are_compared_before_training(tmp_path: Path) -> None:
    sites = Sites(tmp_path, named=True)
    ours = sites.deployed(algorithm="psl", evaluate_on="both", metrics=["auroc"])
    theirs = sites.deployed(algorithm="psl", evaluate_on="both")
    with pytest.raises(RefusedError, match=r"metrics are accuracy, .* for the client and accuracy, auroc, .* same met"):
        in_memory(ours, workers=sites.workers(theirs)).run.run()


def test_an_ensemble_cannot_be_tested_on_rows_that_stay(tmp_path: Path) -> None:
    sites = Sites(tmp_path, named=True)
    options = {"algorithm": "psl", "evaluate_on": "own"}
    with pytest.raises(ConfigError, match="judge = 'ensemble' asks what all clients' models say"):
        sites.workers(sites.deployed(**options, judge="ensemble"))
    config = sites.deployed(**options, judge="ensemble")
    with pytest.raises(RefusedError, match="judge = 'ensemble' asks what all clients' models say"):
        in_memory(config, workers=sites.workers(sites.deployed(**options))).run.run()


@pytest.mark.parametrize("judge", ["average", "ensemble"])
@pytest.mark.parametrize("name", ["fl", "sfl", "ssl"])
def test_one_model_is_its_average_and_its_ensemble(name: str, judge: str, tmp_path: Path) -> None:
    sites = Sites(tmp_path, named=True)
    mean, other = (deployed(sites, algorithm=name, evaluate_on="both", judge=j)[0] for j in ("mean", judge))
    assert other.by_client["own"].scores == mean.by_client["own"].scores
    assert [e.test_loss for e in other.evaluations] == [e.test_loss for e in mean.evaluations]


def test_a_client_with_a_share_has_its_test_rows_at_the_server(tmp_path: Path) -> None:
    """One client has its own data; the others take their shares of the configured data."""
    sites = Sites(tmp_path, named=True)
    config = sites.deployed(algorithm="psl", evaluate_on="own")
    workers = {k: worker_of(config, k, name=client_name(k)) for k in range(3)}
    workers[1] = sites.workers(config)[1]
    there = in_memory(config, workers=workers)
    there.run.run()
    assert [isinstance(test, AtClient) for test in there.run.training.own_tests.values()] == [False, True, False]
    assert list(there.run.by_client["own"].scores) == [0, 1, 2]


def test_a_client_that_is_gone_is_left_out(tmp_path: Path) -> None:
    sites = Sites(tmp_path, named=True)
    config = sites.deployed(algorithm="psl", evaluate_on="both")
    gone: set[int] = set()
    there = in_memory(config, workers=sites.workers(config), gone=lambda: gone)
    for record in there.run:
        if record.round == 1 and not gone:
            gone.add(1)
            there.carrier.cut(1)
    assert list(there.run.by_client["own"].scores) == [0, 2]


def test_a_resumed_run_knows_who_has_test_rows(tmp_path: Path) -> None:
    sites = Sites(tmp_path, named=True)
    config = sites.deployed(algorithm="fl", evaluate_on="own", checkpoint_every=1)

    def workers() -> dict[int, Worker]:
        return {
            k: Worker(replace(worker.duty, folder=tmp_path / f"run/client-{k}"))
            for k, worker in sites.workers(config).items()
        }

    whole = in_memory(config, workers=workers(), folder=tmp_path / "run")
    steps = iter(whole.run)
    while next(steps).round < 2:
        pass
    steps.close()
    gone: set[int] = {1}
    again = in_memory(config, workers=workers(), folder=tmp_path / "run", resume=True, gone=lambda: gone)
    again.run.run()
    assert list(again.run.by_client["own"].scores) == [0, 2], "client 1 is not tested on rows of others"
    assert list(again.cohort.setup.tests) == list(TESTED)


LIES: list[tuple[str, Any]] = [
    ("accuracy", float("nan")),
    ("loss", None),
    ("accuracy", [0.5, 0.5, 0.5]),
    ("recall", 0.5),
    ("recall", [0.5, 0.5]),
    ("else", 0.5),
]


@pytest.mark.parametrize(("metric", "value"), LIES)
def test_scores_that_are_none_exclude_a_client(metric: str, value: Any, tmp_path: Path) -> None:
    sites = Sites(tmp_path, named=True)
    config = sites.deployed(algorithm="psl", evaluate_on="own", rounds=1)
    there = in_memory(config, workers=sites.workers(config), carrier=Listening)
    mass = TESTED[2]

    def lie(message: m.Message) -> m.Message:
        if isinstance(message, m.ScoresUp) and message.rows == mass:
            return m.ScoresUp(message.step, message.rows, {**message.scores, metric: value})
        return message

    there.carrier.tamper = lie
    there.run.run()
    assert set(there.cohort.excluded) == {2}
    assert list(there.run.by_client["own"].scores) == [0, 1]


def test_nobody_is_left_to_be_judged(tmp_path: Path) -> None:
    sites = Sites(tmp_path, named=True)
    config = sites.deployed(algorithm="psl", evaluate_on="own", rounds=1)
    there = in_memory(config, workers=sites.workers(config), carrier=Listening)
    there.carrier.tamper = lambda message: (
        m.ScoresUp(message.step, 1, message.scores) if isinstance(message, m.ScoresUp) else message
    )
    with pytest.raises(TrainingError, match=r"all clients that could continue are excluded|none of the clients whose"):
        there.run.run()


def test_what_a_client_refuses(tmp_path: Path) -> None:
    """It needs test rows of its own, which are requested in fixed pieces and in order; scores cover all of them."""
    sites = Sites(tmp_path, named=True)
    nothing = memoryview(b"")
    own = sites.workers(sites.deployed(algorithm="psl", evaluate_on="own"))[0]
    for request in (m.OwnForward(1, 4, 0), m.OwnForward(1, 9, 1), m.OwnForward(1, 9, 1024), m.OwnFinish(1, 10, 0)):
        with pytest.raises(WireError, match=r"they are asked about in pieces of 1024"):
            own.handle(Frame(request, nothing))
    with pytest.raises(WireError, match="asks for scores after 0 of 9 own test rows"):
        own.handle(Frame(m.GiveScores(1), nothing))
    outputs = memoryview(b"".join(encode([torch.zeros(9, 3)])))
    own.handle(Frame(m.OwnFinish(1, 9, 0), outputs))
    answer = own.handle(Frame(m.GiveScores(1), nothing))
    assert answer is not None
    assert answer[0].scores["loss"] == pytest.approx(np.log(3))
    with pytest.raises(WireError, match="asks for scores after 0 of 9"):
        own.handle(Frame(m.GiveScores(1), nothing))
    whole = sites.workers(sites.deployed(algorithm="fl", evaluate_on="own"))[0]
    with pytest.raises(WireError, match="OwnForward, but this client holds the whole model"):
        whole.handle(Frame(m.OwnForward(1, 9, 0), nothing))
    none = sites.workers(sites.deployed(algorithm="psl"))[0]
    for request in (m.OwnForward(1, 9, 0), m.OwnFinish(1, 9, 0), m.GiveScores(1)):
        with pytest.raises(WireError, match=r"of which this client has held out none"):
            none.handle(Frame(request, nothing))


def test_noise_does_not_come_off(tmp_path: Path) -> None:
    """A repeated row gets the same noise, but not the noise of the server's rows; after a step the noise is new."""
    sites = Sites(tmp_path, named=True)
    config = sites.deployed(algorithm="psl", evaluate_on="own", clip=1.0, gaussian_noise=1.0)
    own = sites.workers(config)[0]

    def noise() -> torch.Tensor:
        part = own.duty.own_test.samples[:]
        with torch.no_grad():
            clean = own.client.lower(part.rows)
            sent = own.duty.defences.own_test(clean, 0)
            clipped = Defences(0, own.duty.defences.in_order[:1]).evaluation(clean, [0], 0)
            others = own.duty.defences.evaluation(clean, [0], 0)
        again = own.duty.defences.own_test(clean, 0)
        assert torch.equal(sent[0], again[0])
        assert not torch.equal(sent[0], others[0])
        return sent[0] - clipped[0]

    before = noise()
    with torch.no_grad():
        for p in own.client.weights:
            p.add_(1e-3)
    after = noise()
    assert abs(float((before - after).std())) > 0.1


@algorithm("every-other", title="Every other", needs={FORWARD, BACKWARD, AVERAGE})
class EveryOther(Algorithm):
    """Averages the client models in every second round, so they differ at the evaluations in between."""

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        """Parallel steps, followed by an average in every second round."""
        while smashed := clients.forward():
            step = server.step(smashed)
            clients.backward(CutGradients(step.gradient, smashed.clients, smashed.sizes))
            yield report(step, smashed)
        if this.index % 2:
            clients.average({k: clients.masses[k] for k in this.clients})


def test_the_average_of_models_that_cross_anyway(tmp_path: Path) -> None:
    sites = Sites(tmp_path, named=True)
    options = {"algorithm": f"{__file__}:EveryOther", "judge": "average"}
    here = Run(sites.simulated(**options))
    here.run()
    there, _ = deployed(sites, **options)
    assert [e.test_loss for e in here.evaluations] == [e.test_loss for e in there.evaluations]
    assert here.by_client["global"] == there.by_client["global"]
    mean, _ = deployed(sites, **{**options, "judge": "mean"})
    assert [e.test_loss for e in mean.evaluations] != [e.test_loss for e in there.evaluations]
    with pytest.raises(TrainingError, match="judge = 'average' asks what all clients' models say of the test rows"):
        deployed(sites, **options, evaluate_on="own")


@pytest.mark.parametrize("name", ["psl", "sglr", "sflv3"])
def test_models_that_stay_are_not_averaged(name: str, tmp_path: Path) -> None:
    sites = Sites(tmp_path, named=True)
    with pytest.raises(ConfigError, match=rf"but with {name} they never leave their clients' machines"):
        deployed(sites, algorithm=name, judge="average")


def test_lines_of_clients_are_plain(tmp_path: Path) -> None:
    sites = Sites(tmp_path, named=True)
    deployed(sites, tmp_path / "there", algorithm="psl", evaluate_on="own", rounds=1)
    result = json.loads((tmp_path / "there/run/result.json").read_text("utf-8"))
    assert result["test"].keys() >= {"loss", "accuracy", "recall"}
    assert "confusion" not in result["test"]


def test_lending_the_travelling_model_is_counted(tmp_path: Path) -> None:
    """In the evaluation it goes from its holder to the two others. In training it moves as in a simulation."""
    sites = Sites(tmp_path, named=True)
    run, _ = deployed(sites, algorithm="ssl", evaluate_on="own", rounds=1)
    here = Run(sites.simulated(algorithm="ssl", evaluate_on="own", rounds=1))
    here.run()
    assert run.training.clients.holder is not None
    size, outputs = run.training.clients.footprint(0).model, sum(TESTED) * 3 * 4
    assert run.training.ledger.total("down", kind="evaluation") == outputs + 2 * size
    assert run.training.ledger.total("down") == here.training.ledger.total("down")
