"""A malicious client among honest ones is named and excluded, and the others' run equals a run without that client."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from support import ALGORITHMS, difference, u_shaped  # type: ignore[import-not-found]
from test_remote import OWN, SMALL, Passing, remote  # type: ignore[import-not-found]

from cutlayer import Run
from cutlayer.errors import NonFiniteError, TrainingError
from cutlayer.options import RunConfig
from cutlayer.remote import announced
from cutlayer.wire import Frame, decode_named, described, encode, encode_named
from cutlayer.wire import messages as m

CULPRIT, HONEST = 1, (0, 2)
NAN = float("nan")
REMOTE = [a for a in ALGORITHMS if a != "cl"]
SENDS_ROWS = [a for a in REMOTE if a != "fl"]
AVERAGES = ["fl", "sfl", "sflv1", "sflv2"]


class Attacked:
    """A run of three clients. From its `begin`-th answer of type `kind` on, the culprit sends the result of `forge`."""

    def __init__(
        self, algorithm: str, kind: type[m.Message], forge: Callable[..., Any], begin: int = 1, **options: Any
    ):
        fields = {name: options.pop(name) for name in list(options) if name in RunConfig.model_fields}
        cuts = {"cut": "hidden1", "tail_cut": "hidden2"} if u_shaped(algorithm) else {}
        config = RunConfig.of({**SMALL, "algorithm": algorithm, **OWN.get(algorithm, cuts), "batch": 5, **fields})
        self.told: list[tuple[str, Mapping[str, Any]]] = []
        self.run: Run
        self.hub: Passing
        self.run, self.hub = remote(config, tell=lambda happened, facts: self.told.append((happened, facts)), **options)
        self.kind, self.forge, self.left = kind, forge, begin
        self.hub.tamper = self._answer

    def _answer(self, client: int, message: Any, body: Any) -> tuple[Any, Any]:
        if client != CULPRIT or not isinstance(message, self.kind):
            return message, body
        self.left -= 1
        return (message, body) if self.left > 0 else self.forge(self, message, body)

    def all(self, happened: str) -> list[int]:
        return [facts["client"] for word, facts in self.told if word == happened]

    def numbers(self) -> list[Any]:
        """All numbers that the run computes."""
        records = [(r.loss, r.clients, r.active, r.bytes_up, r.bytes_down, r.server_lr) for r in self.run]
        scores = [(s.test_score, s.test_loss, s.validation_loss) for s in self.run.evaluations]
        return [records, scores]

    def models(self) -> list[dict[str, Any]]:
        whose = [self.run.training.clients.holder] if self.run.training.clients.holder is not None else HONEST
        return [dict(self.hub.model(k)) for k in whose]


def rows_of(value: float) -> Callable[..., Any]:
    """Smashed data, or gradients of a tail, in which every number is this value."""

    def forge(attacked: Attacked, message: Any, body: Any) -> Any:
        duty = attacked.hub.workers[CULPRIT].duty
        u_shaped = attacked.run.training.algorithm.traits.u_shaped
        shapes = duty.returning if isinstance(message, m.TailUp) else duty.crossing
        rows = [torch.full((message.rows, *c.shape), value) for c in shapes]
        return message, encode(rows if u_shaped else [*rows, torch.zeros(message.rows, dtype=torch.int64)])

    return forge


def model_times(factor: float) -> Callable[..., Any]:
    """A model whose weights are multiplied by this factor."""

    def forge(attacked: Attacked, message: Any, body: Any) -> Any:
        module = attacked.hub.workers[CULPRIT].client.module
        found = decode_named(b"".join(body), described(module.state_dict()))
        return message, encode_named({name: t * factor for name, t in found.items()})

    return forge


def same(one: Attacked, other: Attacked) -> None:
    assert one.numbers() == other.numbers()
    for a, b in zip(one.models(), other.models(), strict=True):
        assert difference(a, b) == 0


@pytest.mark.parametrize(("algorithm", "begin"), [*((a, 3) for a in SENDS_ROWS), ("psl", 1), ("ssl", 1), ("sflv1", 1)])
def test_absurd_smashed_data(algorithm: str, begin: int) -> None:
    """Numbers that are finite but make a step impossible: the step is taken without them, and the run continues as if
    they had been NaN.
    """
    absurd = Attacked(algorithm, m.SmashedUp, rows_of(3e38), begin)
    same(absurd, Attacked(algorithm, m.SmashedUp, rows_of(NAN), begin))
    ((culprit, why),) = [(facts["client"], facts["why"]) for word, facts in absurd.told if word == "excluded"]
    assert culprit == CULPRIT
    assert "as large as 3e+38" in why
    assert absurd.run.result is not None


@pytest.mark.parametrize("algorithm", ["sglr", "sflv1"])
def test_the_step_is_that_of_a_run_without_the_client(algorithm: str) -> None:
    def hang_up(attacked: Attacked, message: Any, body: Any) -> Any:
        attacked.hub.gone.add(CULPRIT)
        attacked.hub.cut(CULPRIT)
        return message, body

    same(Attacked(algorithm, m.SmashedUp, rows_of(3e38), 2), Attacked(algorithm, m.SmashedUp, hang_up, 2))


@pytest.mark.parametrize(("value", "optimizer"), [(1e30, "adam"), (1e22, "adam"), (1e25, "sgd")])
def test_what_goes_wrong_only_on_the_way_back(value: float, optimizer: str) -> None:
    """The loss is finite, but the squares of gradients in the optimiser, or the losses after the step, are not."""
    attacked = Attacked("psl", m.SmashedUp, rows_of(value), 2, server_optimizer=optimizer)
    records = list(attacked.run)
    assert attacked.all("excluded") == [CULPRIT]
    assert records[0].clients == (0, 1, 2)
    assert {r.clients for r in records[1:]} == {HONEST}


@pytest.mark.parametrize("algorithm", [a for a in SENDS_ROWS if u_shaped(a)])
def test_gradients_of_a_tail(algorithm: str) -> None:
    absurd = Attacked(algorithm, m.TailUp, rows_of(3e38), 3)
    same(absurd, Attacked(algorithm, m.TailUp, rows_of(NAN), 3))
    assert absurd.all("excluded") == [CULPRIT]
    assert absurd.run.result is not None


def test_who_leaves_within_a_step_of_its_own() -> None:
    """Its turn is skipped, and the others continue."""

    def hang_up(attacked: Attacked, message: Any, body: Any) -> Any:
        attacked.hub.gone.add(CULPRIT)
        return message, [b"\x07" * 64]

    attacked = Attacked("ussl", m.TailUp, hang_up, 2)
    records = list(attacked.run)
    assert attacked.all("excluded") == [CULPRIT]
    assert [k for r in records for k in r.clients].count(CULPRIT) == 1
    assert {k for r in records for k in r.clients if r.round == 2} == set(HONEST)


def test_all_at_once_are_nobodys_fault() -> None:
    """The training has diverged, so the run ends with an error that says so, and no client is excluded."""
    attacked = Attacked("psl", m.SmashedUp, rows_of(3e38))
    attacked.hub.tamper = lambda client, message, body: (
        rows_of(3e38)(attacked, message, body) if isinstance(message, m.SmashedUp) else (message, body)
    )
    with pytest.raises(TrainingError, match=r"clients 0, 1, 2 sent .* training has diverged"):
        attacked.run.run()
    assert attacked.all("excluded") == []


def test_a_server_that_has_diverged_excludes_nobody() -> None:
    attacked = Attacked("psl", m.SmashedUp, rows_of(0.0), 10**6)
    steps = iter(attacked.run)
    next(steps)
    with torch.no_grad():
        for p in attacked.run.training.server.model.parameters():
            p.fill_(3e38)
    with pytest.raises(TrainingError):
        list(steps)
    assert attacked.all("excluded") == []


def test_all_clients_fail_at_once() -> None:
    """If no client can step with its gradients, the server is to blame."""
    attacked = Attacked("psl", m.SmashedUp, rows_of(0.0), 10**6)
    for worker in attacked.hub.workers.values():

        def step(rate: float, *, last: bool, k: int = worker.duty.index) -> None:
            raise NonFiniteError("weight gradient", (k,))

        worker.client.step = step  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError, match="clients 0, 1, 2"):
        attacked.run.run()
    assert attacked.all("excluded") == []


def test_one_that_may_come_back() -> None:
    attacked = Attacked("psl", m.SmashedUp, rows_of(3e38), 2, faulty="readmit")
    attacked.forge = lambda a, message, body: rows_of(3e38)(a, message, body) if a.left == 0 else (message, body)
    records = list(attacked.run)
    assert [r.clients for r in records[:3]] == [(0, 1, 2), HONEST, HONEST]
    assert records[-1].clients == (0, 1, 2)
    assert attacked.all("garbage") == [CULPRIT]
    assert attacked.all("excluded") == []


def test_a_run_that_is_to_stop_names_it() -> None:
    with pytest.raises(NonFiniteError, match="client 1"):
        Attacked("psl", m.SmashedUp, rows_of(3e38), 2, faulty="stop").run.run()


@pytest.mark.parametrize("algorithm", AVERAGES)
@pytest.mark.parametrize("begin", [2])
def test_a_poisoned_average(algorithm: str, begin: int) -> None:
    """The model and the average are finite. But no client could continue from this average, so none receives it."""
    poisoned = Attacked(algorithm, m.ModelUp, model_times(1e37), begin)
    same(poisoned, Attacked(algorithm, m.ModelUp, model_times(NAN), begin))
    assert poisoned.all("excluded") == [CULPRIT]
    assert poisoned.all("deviates") == [CULPRIT]
    assert poisoned.run.result is not None


def test_a_model_that_is_far_from_the_others_is_named() -> None:
    """It is reported, but nobody is excluded."""
    attacked = Attacked("sflv2", m.ModelUp, model_times(30.0), 3)
    attacked.run.run()
    assert attacked.all("deviates") == [CULPRIT]
    assert attacked.all("excluded") == []


def test_the_average_is_judged_by_the_server_where_a_client_says_it_is_no_number() -> None:
    """Here the client lies, and no other client is blamed."""

    def forge(attacked: Attacked, message: Any, body: Any) -> Any:
        return message, encode([torch.full((message.rows, 10), NAN)])

    attacked = Attacked("fl", m.EvaluationRows, forge)
    attacked.hub.tamper = lambda client, message, body: (
        forge(attacked, message, body) if client == 0 and isinstance(message, m.EvaluationRows) else (message, body)
    )
    attacked.run.run()
    assert attacked.all("excluded") == [0]


def test_nobody_is_excluded_for_an_average_that_cannot_be_judged() -> None:
    """The errors that follow are the average's fault, not the fault of the client that evaluates it."""
    attacked = Attacked("fl", m.EvaluationRows, rows_of(0.0), 10**6, eval_every=1)
    cohort: Any = attacked.run.training.clients
    while hasattr(cohort, "inner"):
        cohort = cohort.inner
    cohort.vet = None  # otherwise the average would be refused before

    def spoilt(client: int, message: Any, body: Any) -> tuple[Any, Any]:
        return model_times(1e37)(attacked, message, body) if isinstance(message, m.ModelUp) else (message, body)

    attacked.hub.tamper = spoilt
    with pytest.raises(NonFiniteError, match="average of the clients' models"):
        attacked.run.run()
    assert attacked.all("excluded") == []


def test_losses_of_local_training() -> None:
    def forge(attacked: Attacked, message: Any, body: Any) -> Any:
        return m.Fitted(message.step, [(float("inf"), rows, mass) for _, rows, mass in message.losses]), body

    attacked = Attacked("fl", m.Fitted, forge, 2)
    records = list(attacked.run)
    assert attacked.all("excluded") == [CULPRIT]
    assert {r.clients for r in records if r.round} == {HONEST}


@pytest.mark.parametrize("mass", [4.0, 1e300])
@pytest.mark.parametrize(("algorithm", "kind"), [("fl", m.Fitted), ("ussl", m.TailUp)])
def test_rows_count_what_was_announced(algorithm: str, kind: Any, mass: float) -> None:
    def forge(attacked: Attacked, message: Any, body: Any) -> Any:
        if isinstance(message, m.Fitted):
            return m.Fitted(message.step, [(loss, rows, mass) for loss, rows, _ in message.losses]), body
        return m.TailUp(message.step, message.rows, message.loss, mass), body

    attacked = Attacked(algorithm, kind, forge)
    attacked.run.run()
    assert attacked.all("excluded") == [CULPRIT]
    assert "count" in attacked.hub.refused[CULPRIT]


def claiming(algorithm: str, samples: int, mass: float | None = None, **options: Any) -> Attacked:
    """A run in which the culprit claims this number of samples."""
    attacked = Attacked(algorithm, m.Hello, lambda a, message, body: (message, body), **options)
    worker = attacked.hub.workers[CULPRIT]
    own = worker.hello
    mass = float(samples) if mass is None else mass
    worker.hello = lambda: msgspec.structs.replace(own(), samples=samples, mass=mass)  # type: ignore[method-assign]
    return attacked


@pytest.mark.parametrize("algorithm", ["fl", "sfl", "psl"])
def test_invented_numbers_of_samples(algorithm: str) -> None:
    """From the start, the run equals the one without the client. The record names each client's share of the run."""
    attacked = claiming(algorithm, 10**12)
    without = Attacked(algorithm, m.Hello, lambda a, message, body: (message, body))
    without.hub.gone.add(CULPRIT)
    assert attacked.numbers() == without.numbers()
    assert attacked.all("excluded") == [CULPRIT]
    assert "more than 10000 times the median of the others, 20: " in attacked.hub.refused[CULPRIT]
    (shares,) = [facts for word, facts in attacked.told if word == "shares"]
    assert {k: one["share"] for k, one in shares["clients"].items()} == {"0": 0.5, "2": 0.5}


def test_as_many_samples_as_are_allowed() -> None:
    """If the study states the allowed number of samples, only that number counts."""
    attacked = claiming("psl", 21, most_samples=20)
    attacked.run.run()
    assert "of at most 20" in attacked.hub.refused[CULPRIT]
    allowed = claiming("psl", 20, most_samples=20)
    assert {r.clients for r in allowed.run} == {(0, 1, 2)}


@pytest.mark.parametrize(
    ("samples", "mass", "why"), [(0, 0.0, "no training samples"), (20, 1e9, "count"), (20, 0.0, "count")]
)
def test_numbers_that_contradict_themselves(samples: int, mass: float, why: str) -> None:
    attacked = claiming("fl", samples, mass)
    attacked.run.run()
    assert why in attacked.hub.refused[CULPRIT]


def test_sizes_that_are_unequal_in_earnest() -> None:
    """Ten rows against ten thousand are not a reason to refuse a client."""
    assert announced.excessive(1, {0: 10.0, 1: 10_000.0}, {0: 10, 1: 10_000}) is None
    assert announced.excessive(1, {0: 10.0, 1: 100_001.0}, {0: 10, 1: 100_001}) is not None
    assert announced.excessive(0, {0: 1e12}, {0: 10**12}) is None  # there is no other client to compare with


@pytest.mark.parametrize(("faulty", "error"), [("stop", "median"), ("readmit", "")])
def test_what_becomes_of_an_inventor(faulty: str, error: str) -> None:
    attacked = claiming("psl", 10**12, faulty=faulty)
    if error:
        with pytest.raises(TrainingError, match=error):
            attacked.run.run()
    else:
        attacked.run.run()
        assert "median" in attacked.hub.refused[CULPRIT]  # it came back and was refused
    assert attacked.all("excluded") == []


def test_the_travelling_model_moves_on_as_an_excluded_holder_received_it() -> None:
    """The others continue with the model that they had trained so far, as in a run without that client."""
    attacked = Attacked("ssl", m.SmashedUp, rows_of(3e38))
    without = Attacked("ssl", m.Hello, lambda a, message, body: (message, body))
    without.hub.gone.add(CULPRIT)
    assert [(r.loss, r.clients) for r in attacked.run] == [(r.loss, r.clients) for r in without.run]
    ((mine,), (other,)) = attacked.models(), without.models()
    assert difference(mine, other) == 0
    assert attacked.all("excluded") == [CULPRIT]


def test_the_travelling_model_outlives_its_holder_and_the_server(tmp_path: Path) -> None:
    """The checkpoint contains the model that the excluded holder received."""
    attacked = Attacked("ssl", m.SmashedUp, rows_of(3e38), 5, folder=tmp_path, checkpoint_every=1)
    steps = iter(attacked.run)
    for record in steps:
        if record.round == 2:
            break
    steps.close()  # type: ignore[attr-defined]
    again = Attacked("ssl", m.Hello, lambda a, message, body: (message, body), folder=tmp_path, resume=True)
    assert {k for r in again.run for k in r.clients} == set(HONEST)


def test_a_frame_is_a_frame() -> None:
    """The attacks above pass the rules of both sides: the culprit changes the real answers of a worker."""
    attacked = Attacked("psl", m.SmashedUp, lambda a, message, body: (message, body))
    seen: list[Frame] = []
    own = attacked.hub.workers[CULPRIT].handle
    attacked.hub.workers[CULPRIT].handle = lambda frame: (seen.append(frame), own(frame))[1]  # type: ignore[method-assign]
    attacked.run.run()
    assert seen
