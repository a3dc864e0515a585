"""Remote clients give the same numbers as the simulation, bit for bit; here with frames in memory."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from support import ALGORITHMS, difference  # type: ignore[import-not-found]

from cutlayer import Run, checkpoint
from cutlayer.algorithms import Algorithm, algorithm
from cutlayer.algorithms.common import report
from cutlayer.build import assemble, own_source
from cutlayer.cohort import Cohort, draw_participants
from cutlayer.data import load_whole
from cutlayer.errors import (
    DataError,
    DistrustError,
    NonFiniteError,
    RefusedError,
    RunFolderError,
    TrainingError,
    WireError,
)
from cutlayer.leakage.hijack import Hijack, HijackingServer
from cutlayer.options import RunConfig
from cutlayer.remote.carrier import Answer, Lost, Request
from cutlayer.remote.join import _secret
from cutlayer.remote.logs import _TextLines
from cutlayer.remote.sides import Greet, remote_training, worker_of
from cutlayer.remote.transports.memory import MemoryCarrier
from cutlayer.remote.worker import Worker
from cutlayer.server import Server
from cutlayer.testing import in_memory
from cutlayer.types import Round, Step
from cutlayer.verbs import (
    ALIGN,
    ARRIVALS,
    AVERAGE,
    BACKWARD,
    BACKWARD_TOGETHER,
    CLIENT_VERBS,
    FIT,
    FORWARD,
    HAND_OVER,
    LEARN,
    TAIL,
)
from cutlayer.wire import Frame, encode
from cutlayer.wire import messages as m

SMALL: dict[str, Any] = {
    "data": "digits",
    "model": "mlp",
    "clients": 3,
    "samples_per_client": 20,
    "test": 30,
    "rounds": 3,
    "engine": "local",
}
OWN: dict[str, dict[str, Any]] = {
    **{a: {"cut": "hidden1", "tail_cut": "hidden2"} for a in ("ussl", "upsl", "usfl", "usglr")},
    "ssl": {"hand_over": "batch", "hand_over_optimizer": True, "visit_order": "random"},
    "sfl": {"average_every": "step"},
    "fl": {"local_steps": 2},
    "gas": {"working": 3},
}


class Passing(MemoryCarrier):
    """Clients in this process, with faults on demand."""

    def __init__(self, workers: Mapping[int, Worker]) -> None:
        super().__init__(workers)
        self.workers: dict[int, Worker] = dict(workers)  # type: ignore[assignment]
        self.gone: set[int] = set()  # these do not join
        self.tamper: Callable[[int, Any, Any], tuple[Any, Any]] = lambda client, message, body: (message, body)
        self.refused: dict[int, str] = {}
        self.greet: Callable[[Any, int], Any] = lambda hello, client: None
        self.model_of: Callable[[int], dict[str, torch.Tensor]] = lambda client: {}
        self.breaks_at: type[m.Message] | None = None  # all connections break before this is sent
        self.loses: type[m.Message] | None = None  # the first answer to this is lost, and all connections break

    def cut_all(self) -> None:
        for client in self.present:
            self.cut(client)

    def exchange(self, requests: Mapping[int, Sequence[Request]], **options: Any) -> dict[int, list[Any] | Lost]:
        if self.breaks_at and any(isinstance(x, self.breaks_at) for asked in requests.values() for x, _ in asked):
            self.breaks_at = None
            self.cut_all()
        return super().exchange(requests, **options)

    def answer(self, client: int, frame: Frame) -> Answer | None:
        answer = super().answer(client, frame)
        if self.loses is type(frame.message):
            self.loses = None
            self.cut_all()
        return None if answer is None else self.tamper(client, *answer)

    def join(self, client: int, greet: Greet) -> m.Refused | None:
        """Records a refusal. The server continues without that client."""
        if refused := super().join(client, greet):
            self.refused[client] = refused.sentence
        return None

    def model(self, client: int) -> dict[str, torch.Tensor]:
        """A client's own model under the names of the whole model, after everything that was posted to it."""
        return self.model_of(client)


def remote(
    config: RunConfig,
    folder: Path | None = None,
    *,
    resume: bool = False,
    workers: Mapping[int, Worker] | None = None,
    **options: Any,
) -> tuple[Run, Passing]:
    """A run with remote clients, which keep their states in `folder`. `workers` may be those of an earlier run."""
    hubs: list[Passing] = []

    def carrier(workers: Mapping[int, Worker]) -> Passing:
        hubs.append(Passing(workers))
        return hubs[0]

    options |= {"carrier": carrier, "gone": lambda: hubs[0].gone}
    there = in_memory(config, folder=folder, resume=resume, workers=workers, **options)
    hub = hubs[0]
    hub.greet, hub.model_of = there.greet, there.model
    return there.run, hub


REMOTE = [a for a in ALGORITHMS if a != "cl"]
EIGHT = ["fl", "sglr", "sflv2"]  # one algorithm of each kind


def same(config: RunConfig) -> Passing:
    """Train in a simulation and remotely, and compare everything."""
    here = Run(config)
    there, hub = remote(config)
    for a, b in zip(here, there, strict=True):
        assert (a.loss, a.clients, a.active, a.bytes_up, a.bytes_down) == (
            b.loss,
            b.clients,
            b.active,
            b.bytes_up,
            b.bytes_down,
        )
    assert [e.test_score for e in here.evaluations] == [e.test_score for e in there.evaluations]
    assert [e.test_loss for e in here.evaluations] == [e.test_loss for e in there.evaluations]
    assert here.training.ledger.state() == there.training.ledger.state()
    assert difference(here.training.server.model.state_dict(), there.training.server.model.state_dict()) == 0
    holder = there.training.clients.holder
    for k in range(config.clients) if holder is None else [holder]:
        assert difference(here.training.clients.model_state(k), hub.model(k)) == 0
    # At least as many bytes cross the wire as the ledger counts.
    crossed = sum(t.sent + t.received for t in hub.traffic().values())
    assert crossed >= here.training.ledger.total("up") + here.training.ledger.total("down")
    return hub


@pytest.mark.parametrize(
    ("algorithm", "clients"), [*((a, c) for a in REMOTE for c in (1, 3)), *((a, 8) for a in EIGHT)]
)
def test_remote_is_local_bit_for_bit(algorithm: str, clients: int) -> None:
    same(RunConfig.of({**SMALL, **OWN.get(algorithm, {}), "clients": clients, "algorithm": algorithm}))


def test_servers_that_go_client_by_client() -> None:
    same(RunConfig.of({**SMALL, "algorithm": "sflv2", "server_order": "sequential", "batch": 8}))


@pytest.mark.parametrize(
    ("algorithm", "up", "down"),
    [
        ("sglr", "bfloat16", "float16"),
        ("sglr", "int8", "int8"),
        ("sglr", "float8", "top-k:0.3"),
        ("sglr", "raw+zstd", "int8+zstd"),
        ("sglr", "int8+zstd", "raw"),
        ("ussl", "int8", "int8"),
        ("ussl", "float8", "top-k:0.3"),
        ("sflv2", "bfloat16", "float16"),
        ("sflv2", "raw+zstd", "int8+zstd"),
        ("psl", "rand-top-k:0.2:0.3:support", "top-k:0.2"),
        ("sglr", "rand-top-k:0.2:0.3:support+zstd", "raw"),
    ],
)
def test_codecs_do_the_same_in_a_simulation(algorithm: str, up: str, down: str) -> None:
    same(RunConfig.of({**SMALL, **OWN.get(algorithm, {}), "algorithm": algorithm, "up_codec": up, "down_codec": down}))


OWN_CODEC = f"{Path(__file__).parents[1] / 'own.py'}:Grid:0.01"


@pytest.mark.parametrize("algorithm", ["sglr", "ussl"])
@pytest.mark.parametrize(("up", "down"), [(OWN_CODEC, "raw"), ("int8", OWN_CODEC), (f"{OWN_CODEC}+zstd", OWN_CODEC)])
def test_codecs_of_ones_own_do_the_same_in_a_simulation(algorithm: str, up: str, down: str) -> None:
    same(RunConfig.of({**SMALL, **OWN.get(algorithm, {}), "algorithm": algorithm, "up_codec": up, "down_codec": down}))


def test_bytes_of_a_codec_of_ones_own() -> None:
    """Three rounds, one batch of 20 rows with 128 features: 8 bytes for each client's mean, 2 for each number."""
    config = RunConfig.of({**SMALL, "algorithm": "psl", "batch": 20, "up_codec": OWN_CODEC})
    same(config)
    run = Run(config)
    run.run()
    assert run.training.ledger.total("up", kind="smashed data") == 3 * 3 * (8 + 2 * 20 * 128)


def test_codecs_of_pictures() -> None:
    """The scales of int8 belong to one client's channels, whichever other clients there are, and also if stacked."""
    codecs = {"up_codec": "int8", "down_codec": "int8+zstd"}
    config = RunConfig.of({**SMALL, "model": "cnn", "algorithm": "sglr", **codecs})
    same(config)
    stacked = Run(config.model_copy(update={"engine": "stacked"}))
    assert [r.loss for r in stacked] == pytest.approx([r.loss for r in Run(config)], rel=1e-3)


def test_participation_and_independent_starts() -> None:
    for options in ({"algorithm": "sfl", "participation": 0.4, "clients": 5}, {"algorithm": "psl"}):
        config = RunConfig.of(
            {**SMALL, **options, "start": "independent" if "participation" not in options else "equal"}
        )
        here, (there, hub) = Run(config), remote(config)
        assert [r.loss for r in here] == [r.loss for r in there]
        assert [e.test_loss for e in here.evaluations] == [e.test_loss for e in there.evaluations]
        for k in range(config.clients):
            assert difference(here.training.clients.model_state(k), hub.model(k)) == 0
        assert here.training.ledger.state() == there.training.ledger.state()


def test_a_client_that_is_gone_takes_no_part() -> None:
    config = RunConfig.of({**SMALL, "algorithm": "sglr", "rounds": 2})
    run, hub = remote(config)
    seen = []
    for record in run:
        seen.append(record.clients)
        if record.step == 1:
            hub.cut(1)
            hub.gone.add(1)
    assert seen[:2] == [(0, 1, 2), (0, 1, 2)]
    assert all(clients == (0, 2) for clients in seen[2:])
    assert run.result is not None


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_fault_in_a_last_backward_pass_is_heard_of(rounds: int) -> None:
    """A client has finished its round but not its last step, and receives no requests in between."""
    config = RunConfig.of({**SMALL, "algorithm": "psl", "partition": "quantity", "rounds": rounds, "batch": 4})
    run, hub = remote(config, faulty="stop")
    sizes = [len(hub.workers[k].duty.samples.y) for k in range(3)]
    first = min(range(3), key=sizes.__getitem__)
    assert -(-sizes[first] // 4) < max(-(-n // 4) for n in sizes)
    client, left = hub.workers[first].client, [rounds * -(-sizes[first] // 4)]

    def step(rate: float, *, last: bool, own: Callable[..., None] = client.step) -> None:
        own(rate, last=last)
        left[0] -= 1
        if not left[0]:
            raise NonFiniteError("weight gradient or loss", (first,))

    client.step = step  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError, match=f"client {first}"):
        run.run()


@pytest.mark.parametrize("algorithm", ["fl", "sfl"])
def test_who_is_lost_within_an_averaging_is_not_counted(algorithm: str) -> None:
    config = RunConfig.of({**SMALL, "algorithm": algorithm, "rounds": 2})
    run, hub = remote(config)

    def tamper(client: int, message: Any, body: Any) -> tuple[Any, Any]:
        if client == 1 and isinstance(message, m.ModelUp):
            raise WireError("it breaks off")
        return message, body

    hub.tamper = tamper
    hub.gone.add(1)
    run.run()
    assert run.result is not None
    ledger = run.training.ledger
    size = run.training.clients.footprint(0).model
    for direction in ("up", "down"):
        assert ledger.of_clients(direction, "models").tolist() == [2 * size, 0, 2 * size]


@pytest.mark.parametrize("algorithm", ["fl", "sglr"])
def test_not_a_number_ends_the_run_where_it_should(algorithm: str) -> None:
    run, hub = remote(RunConfig.of({**SMALL, "algorithm": algorithm}), faulty="stop")
    hub.workers[2].duty.samples.x[:] = float("nan")
    with pytest.raises((NonFiniteError, WireError), match="client 2"):
        run.run()


WATCHED = {**SMALL, "algorithm": "psl", "samples_per_client": 60, "batch": 20, "rounds": 8}


@pytest.mark.parametrize("watch", ["warn", "leave"])
def test_a_client_that_watches_notices_a_hijacker(watch: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The algorithm runs as usual, but an attacker computes the gradients."""
    config = RunConfig.of(WATCHED)
    workers = {k: worker_of(config, k, name=f"client-{k}", watch=watch) for k in range(3)}
    run, _ = remote(config, workers=workers)
    known = assemble(RunConfig.of({**WATCHED, "test": 300})).source.test
    attacker = Hijack(known, (128,), nonnegative=True)
    run.training = replace(run.training, server=HijackingServer(attacker))
    if watch == "leave":
        with pytest.raises(DistrustError, match="do not look like those of the task: over 10 batches"):
            run.run()
        return
    for _ in run:
        pass
    warned = [r.message for r in caplog.records if "do not look like" in r.message]
    assert {sentence.split(":")[0] for sentence in warned} == {"client-0", "client-1", "client-2"}
    assert len(warned) == 3  # once for each client


def test_a_client_that_watches_trusts_an_honest_server(caplog: pytest.LogCaptureFixture) -> None:
    """It does not change the results either."""
    config = RunConfig.of(WATCHED)
    workers = {k: worker_of(config, k, name=f"client-{k}", watch="leave") for k in range(3)}
    run, _ = remote(config, workers=workers)
    assert [r.loss for r in run] == [r.loss for r in Run(config)]
    assert all(w.watch.observed > 10 and w.watch.score > 0.85 for w in workers.values())
    assert not caplog.records


def test_a_server_cannot_evade_the_watch_by_sharing() -> None:
    """In PSL no gradient is shared, so a gradient that claims to be shared is refused."""
    config = RunConfig.of(WATCHED)
    worker = worker_of(config, 0, name="client-0")
    assert not worker.duty.shares
    begun(worker).handle(Frame(m.Forward(1, True), memoryview(b"")))
    body = b"".join(bytes(part) for part in encode([torch.zeros(20, 128)]))
    with pytest.raises(WireError, match="a gradient came that clients share"):
        worker.handle(Frame(m.Backward(1, "common", 20), memoryview(body)))


NEEDS = {
    **{a: {FORWARD, BACKWARD} for a in ("psl", "slr", "sgl", "sglr", "sflv3")},
    **{a: {FORWARD, BACKWARD} for a in ("cyclepsl", "cyclesglr")},
    **{a: {FORWARD, BACKWARD, AVERAGE} for a in ("sfl", "sflv1", "sflv2", "smofi", "scala", "gscala", "cyclesfl")},
    "gpsl": {FORWARD, BACKWARD_TOGETHER},
    **{a: {FORWARD, TAIL, BACKWARD} for a in ("upsl", "usglr")},
    "gas": {FORWARD, ARRIVALS, BACKWARD, AVERAGE},
    "usfl": {FORWARD, TAIL, BACKWARD, AVERAGE},
    "ssl": {FORWARD, BACKWARD, HAND_OVER},
    "ussl": {FORWARD, TAIL, BACKWARD, HAND_OVER},
    "fl": {FIT, AVERAGE},
    **{a: {FORWARD, LEARN, AVERAGE} for a in ("ampere", "cse-fsl")},
    "fsl-sage": {FORWARD, LEARN, ALIGN, AVERAGE},
}


def begun(worker: Worker) -> Worker:
    """The same client, after the start of a round with one batch."""
    worker.handle(Frame(m.BeginRound(0, 1, 1.0, 1), memoryview(b"")))
    return worker


def bound_to(needs: Collection[str], worker: Worker) -> Worker:
    """The same client, which now answers only what an algorithm with these `needs` requests."""
    worker.duty = replace(worker.duty, needs=frozenset(needs))
    return worker


@pytest.mark.parametrize("algorithm", REMOTE)
def test_an_algorithm_needs_nothing_that_its_clients_refuse(algorithm: str) -> None:
    """The run has checkpoints, and if models are averaged, one client misses an averaging and catches up."""
    config = RunConfig.of({**SMALL, **OWN.get(algorithm, {}), "algorithm": algorithm, "eval_every": 1})
    workers = {k: bound_to(NEEDS[algorithm], worker_of(config, k, name=f"client-{k}")) for k in range(3)}
    run, hub = remote(config, workers=workers)
    for record in run:
        run.training.clients.state()
        if record.round == 0 and 2 in hub.connected and run.training.clients.holder is None:
            hub.cut(2)  # it joins again before the next round
    assert hub.connected == {0, 1, 2}
    assert run.result is not None
    if AVERAGE in NEEDS[algorithm]:
        assert hub.traffic()[2].connections == 2
        own = (
            "auxiliary." if ALIGN in NEEDS[algorithm] else "none."
        )  # the server fits each client's head to that client
        a, b = ({n: t for n, t in hub.model(k).items() if not n.startswith(own)} for k in (0, 2))
        assert difference(a, b) == 0


def complaint(worker: Worker, request: m.Message) -> str:
    """The client's reason against a request, or an empty string if it answers."""
    try:
        worker.handle(Frame(request, memoryview(b"")))
    except WireError as error:
        return str(error)
    return ""


REQUESTS: list[tuple[m.Message, set[str]]] = [
    (m.Forward(1), {FORWARD}),
    (m.Tail(1, 1), {TAIL}),
    (m.Backward(1, "own", 1), {BACKWARD, BACKWARD_TOGETHER}),
    (m.GiveGradient(1), {BACKWARD_TOGETHER}),
    (m.TakeGradient(1, 1.0, False), {BACKWARD_TOGETHER}),
    (m.Fit(1), {FIT}),
    (m.Learn(1, 1), {LEARN}),
    (m.GiveModel(1), {AVERAGE, HAND_OVER}),
    (m.TakeHead(1), {ALIGN}),
    (m.TakeModel(1), {AVERAGE, HAND_OVER, BACKWARD_TOGETHER}),
    (m.GiveOptimizer(1), {HAND_OVER}),
    (m.TakeOptimizer(1), {HAND_OVER, BACKWARD_TOGETHER}),
]


@pytest.mark.parametrize(("request_", "serves"), REQUESTS)
def test_a_client_refuses_what_its_algorithm_does_not_need(request_: m.Message, serves: set[str]) -> None:
    """It also stays unchanged, and the server learns the reason."""
    name = type(request_).__name__
    config = RunConfig.of({**SMALL, "algorithm": "psl"})
    worker = bound_to(CLIENT_VERBS - serves, worker_of(config, 0, name="client-0"))
    before = {n: t.clone() for n, t in worker.client.module.state_dict().items()}
    with pytest.raises(WireError, match=f"asks for {name}, which psl does not need") as error:
        worker.handle(Frame(request_, memoryview(b"")))
    assert all(verb in str(error.value) for verb in CLIENT_VERBS - serves)
    assert difference(before, dict(worker.client.module.state_dict())) == 0
    for verb in serves:  # one of the verbs is enough; then only the empty body can be wrong
        worker = bound_to({verb}, worker_of(config, 0, name="client-0"))
        assert "does not need" not in complaint(worker, request_)


def test_every_request_is_served_or_refused() -> None:
    """Some requests are permitted for every algorithm. None of them trains or gives the model away."""
    requests = set(get_args(m.FromServer)) - {m.Welcome, m.Refused, m.Bye}
    worker = bound_to((), worker_of(RunConfig.of({**SMALL, "algorithm": "psl"}), 0, name="client-0"))
    always = [m.BeginRound(0, 1, 1.0, 1), m.Settle(1), m.Save(1, "prepare"), m.Save(1, "commit")]
    assert not any(complaint(worker, request) for request in always)
    with pytest.raises(WireError, match="a tail, which only clients of a U-shaped split have"):
        worker.handle(Frame(m.Evaluate(1, "tail", 1), memoryview(b"")))
    with pytest.raises(WireError, match="which this client's configuration does not want"):
        worker.handle(Frame(m.TakeServer(1, 1), memoryview(b"")))
    own = [m.OwnForward(1, 4, 0), m.OwnFinish(1, 4, 0), m.GiveScores(1)]
    assert all("of which this client has held out none" in complaint(worker, request) for request in own)
    others = {m.Evaluate, m.TakeServer} | {type(r) for r in own}
    assert requests == {type(r) for r in always} | {type(r) for r, _ in REQUESTS} | others
    with pytest.raises(WireError, match="Bye is not a request that a client answers"):
        worker.handle(Frame(m.Bye("the end"), memoryview(b"")))


def test_a_refusal_reaches_the_server() -> None:
    """A server that requests a client's model in PSL loses that client and learns the reason."""
    told: list[tuple[str, Mapping[str, Any]]] = []
    config = RunConfig.of({**SMALL, "algorithm": "psl"})
    workers = {k: bound_to(NEEDS["psl"], worker_of(config, k, name=f"client-{k}")) for k in range(3)}
    run, hub = remote(config, workers=workers, tell=lambda happened, facts: told.append((happened, facts)))
    next(iter(run))
    with pytest.raises(TrainingError, match="client 1 is not connected"):
        run.training.clients.model_state(1)
    assert hub.connected == {0, 2}
    ((_, facts),) = [one for one in told if one[0] == "failed"]
    assert "asks for GiveModel, which psl does not need (it needs backward, forward)" in facts["why"]


def test_a_watch_that_sees_nothing_says_so(caplog: pytest.LogCaptureFixture) -> None:
    config = RunConfig.of({**WATCHED, "algorithm": "sglr", "phi": 1.0, "batch": 4, "rounds": 8})
    workers = {k: worker_of(config, k, name=f"client-{k}", watch="leave") for k in range(3)}
    run, _ = remote(config, workers=workers)
    run.run()
    assert [r.message.split(":")[0] for r in caplog.records] == ["client-0", "client-1", "client-2"]
    assert "has seen nothing in 100 batches" in caplog.records[0].message


def test_noise_is_the_clients_secret(tmp_path: Path) -> None:
    """A client draws its noise from a seed that only the client has, and that stays the same after a restart."""
    options = {**SMALL, "algorithm": "psl", "clip": 1.0, "gaussian_noise": 1.0}
    config = RunConfig.of(options)

    def sent(noise_seed: int | None) -> bytes:
        worker = worker_of(config, 0, name="client-0", noise_seed=noise_seed)
        answer = begun(worker).handle(Frame(m.Forward(1, True), memoryview(b"")))
        assert answer is not None
        return b"".join(bytes(part) for part in answer[1])

    secret = _secret(tmp_path)
    assert secret == _secret(tmp_path) != config.seed
    assert (tmp_path / "noise.seed").stat().st_mode & 0o077 == 0
    assert sent(None) == sent(None)  # the server can draw this noise too
    assert sent(secret) == sent(secret) != sent(None)
    assert _secret(None) != _secret(None)
    (tmp_path / "noise.seed").write_text("none")
    with pytest.raises(RunFolderError, match=r"noise.seed' is damaged"):
        _secret(tmp_path)


@pytest.mark.parametrize(
    ("option", "value", "shown"),
    [
        ("client_lr", 0.5, "client_lr is 0.5 for the client and 0.001 for the server"),
        ("seed", 7, "seed is 7 for the client and 0 for the server"),
        ("client_optimizer", "sgd", "client_optimizer is sgd"),
        ("start", "independent", "start is independent"),
        ("phi", 0.25, "phi is 0.25"),
    ],
)
def test_both_sides_train_by_the_same_options(option: str, value: Any, shown: str) -> None:
    config = RunConfig.of({**SMALL, "algorithm": "sglr"})
    other = config.model_copy(update={option: value})
    run, hub = remote(config, workers={k: worker_of(other if k else config, k, name=f"client-{k}") for k in range(3)})
    next(iter(run))
    assert set(hub.refused) == {1, 2}
    assert hub.refused[1].startswith(shown)


def test_a_client_may_come_with_other_data_before_training() -> None:
    """It joined with the wrong file and joins again. Once training has begun, its number of samples is fixed."""
    config = RunConfig.of({**SMALL, "algorithm": "psl"})
    run, hub = remote(config)
    worker = hub.workers[1]

    def greeted(samples: int) -> Any:
        hello = m.Hello(client="client-1", terms=worker.duty.terms, samples=samples, mass=samples)
        return hub.greet(hello, 1)

    assert isinstance(greeted(300), m.Welcome)
    assert isinstance(greeted(20), m.Welcome)
    assert run.training.clients.samples[1] == 20
    next(iter(run))
    refused = greeted(300)
    assert isinstance(refused, m.Refused)
    assert "300 samples, 20 were announced" in refused.sentence


def test_what_is_ones_own_may_differ() -> None:
    """The server does not compare how a client protects its data."""
    config = RunConfig.of({**SMALL, "algorithm": "sglr"})
    own = config.model_copy(update={"clip": 1.0, "gaussian_noise": 0.1, "eval_every": 2, "server_lr": 0.1})
    run, hub = remote(config, workers={k: worker_of(own, k, name=f"client-{k}") for k in range(3)})
    next(iter(run))
    assert not hub.refused


def test_a_state_of_another_run_is_not_overwritten(tmp_path: Path) -> None:
    """The server starts with an empty folder, the client with a saved state. The client refuses and keeps its state."""
    config = RunConfig.of({**SMALL, "algorithm": "psl"})
    run, _ = remote(config, tmp_path)
    run.run()
    kept = (tmp_path / "client-0" / "client.safetensors").read_bytes()
    worker = worker_of(config, 0, name="client-0", folder=tmp_path / "client-0")
    refused = worker.welcome(m.Welcome(0, 3, 0, worker.duty.terms))
    assert refused is not None
    assert refused.sentence.startswith(f"{str(tmp_path / 'client-0')!r} holds the state of client-0 after step ")
    assert (tmp_path / "client-0" / "client.safetensors").read_bytes() == kept


@pytest.mark.parametrize("algorithm", ["ssl", "ussl"])
def test_who_is_gone_misses_its_turn(algorithm: str) -> None:
    """The model stays with its holder, and then goes to the next client that is connected."""
    run, hub = remote(
        RunConfig.of(
            {
                **SMALL,
                **(OWN["ussl"] if algorithm == "ussl" else {}),
                "algorithm": algorithm,
                "eval_every": 3,
                "visit_order": "fixed",
            }
        )
    )
    seen = []
    for record in run:
        seen.append(record.clients)
        if len(seen) == 1:
            hub.cut(1)
            hub.gone.add(1)
    assert (1,) not in seen
    assert {(0,), (2,)} == set(seen)
    assert run.training.clients.holder in (0, 2)
    sent = run.training.ledger.table()
    assert not any("client 1" in str(row) for row in sent)


def test_a_holder_that_gives_garbage_is_the_one_that_is_blamed() -> None:
    config = RunConfig.of({**SMALL, "algorithm": "ssl", "hand_over_optimizer": True, "client_optimizer": "adam"})
    run, hub = remote(config, faulty="stop")

    def tamper(client: int, message: Any, body: Any) -> tuple[Any, Any]:
        return (message, [b"\0" * 40]) if client == 0 and isinstance(message, m.OptimizerUp) else (message, body)

    hub.tamper = tamper
    with pytest.raises(WireError, match="client 0"):
        run.run()


def test_nobody_trained() -> None:
    """The drawn client leaves before its first batch: nothing is averaged, and others train in the next rounds."""
    config = RunConfig.of({**SMALL, "algorithm": "sfl", "participation": 0.3, "rounds": 6, "eval_every": 6})
    (drawn,) = draw_participants(config.seed, 0, 3, config.participation)
    run, hub = remote(config)
    hub.loses, hub.gone = m.Forward, set()
    hub.gone.add(drawn)
    hub.join(drawn, hub.greet)
    records = list(run)
    assert hub.loses is None
    assert run.result is not None
    assert records
    assert drawn not in {k for record in records for k in record.clients}


def test_numbers_that_are_none_in_evaluation() -> None:
    run, hub = remote(RunConfig.of({**SMALL, "algorithm": "fl"}), faulty="stop")

    def tamper(client: int, message: Any, body: Any) -> tuple[Any, Any]:
        if isinstance(message, m.EvaluationRows):
            return message, encode([torch.full((message.rows, 10), float("nan"))])
        return message, body

    hub.tamper = tamper
    with pytest.raises(WireError, match="results in evaluation of client 0"):
        run.run()


def test_strangers_write_no_lines_of_the_log() -> None:
    record = logging.LogRecord(
        "x", logging.INFO, "", 0, "%s is refused", ("a\nINFO client 2 has joined\x1b[31m",), None
    )
    assert _TextLines("%(message)s").format(record) == "a\\nINFO client 2 has joined\\x1b[31m is refused"


def _nan(message: Any, body: Any) -> tuple[Any, Any]:
    return message, encode(
        [torch.full((message.rows, 128), float("nan")), torch.zeros(message.rows, dtype=torch.int64)]
    )


def _wrong_shape(message: Any, body: Any) -> tuple[Any, Any]:
    return message, encode([torch.zeros(message.rows, 127), torch.zeros(message.rows, dtype=torch.int64)])


def _wrong_label(message: Any, body: Any) -> tuple[Any, Any]:
    return message, encode([torch.zeros(message.rows, 128), torch.full((message.rows,), 10)])


def _negative_label(message: Any, body: Any) -> tuple[Any, Any]:
    return message, encode([torch.zeros(message.rows, 128), torch.full((message.rows,), -1)])


def _many_rows(message: Any, body: Any) -> tuple[Any, Any]:
    return m.SmashedUp(message.step, 9), encode([torch.zeros(9, 128), torch.zeros(9, dtype=torch.int64)])


def _no_tensors(message: Any, body: Any) -> tuple[Any, Any]:
    return message, [b"\x07" * 64]


@pytest.mark.parametrize("faulty", [_nan, _wrong_shape, _wrong_label, _negative_label, _many_rows, _no_tensors])
def test_a_faulty_client_is_excluded(faulty: Callable[[Any, Any], tuple[Any, Any]]) -> None:
    """Its data are in no step, and the others continue. It cannot come back, and the record names the reason."""
    told: list[tuple[str, Mapping[str, Any]]] = []
    config = RunConfig.of({**SMALL, "algorithm": "sglr"})
    run, hub = remote(config, tell=lambda happened, facts: told.append((happened, facts)))
    seen = []
    for record in run:
        seen.append(record.clients)
        if record.step == 1:
            hub.tamper = lambda client, message, body: (
                faulty(message, body) if client == 1 and isinstance(message, m.SmashedUp) else (message, body)
            )
    assert seen[:2] == [(0, 1, 2)] * 2
    assert seen[2:] == [(0, 2)] * (len(seen) - 2)
    assert [facts["client"] for happened, facts in told if happened == "excluded"] == [1]
    assert [facts["participants"] for happened, facts in told if happened == "round"] == [[0, 1, 2], [0, 2], [0, 2]]
    assert "client 1 is excluded" in hub.refused[1]
    assert run.result is not None


def test_exclusions_outlive_the_server(tmp_path: Path) -> None:
    config = RunConfig.of({**SMALL, "algorithm": "sglr", "rounds": 4})
    run, hub = remote(config, tmp_path)
    hub.tamper = lambda client, message, body: (
        _nan(message, body) if client == 1 and isinstance(message, m.SmashedUp) else (message, body)
    )
    steps = iter(run)
    for record in steps:
        if record.round == 2:
            break
    steps.close()  # type: ignore[attr-defined]
    again, hub = remote(config, tmp_path, resume=True)
    assert {r.clients for r in again} == {(0, 2)}
    assert "NaN" in hub.refused[1]


def test_a_model_that_is_not_a_number_is_not_averaged() -> None:
    config = RunConfig.of({**SMALL, "algorithm": "sfl"})
    run, hub = remote(config)

    def spoilt(client: int, message: Any, body: Any) -> tuple[Any, Any]:
        if client == 0 and isinstance(message, m.ModelUp):
            return message, [bytes(b"".join(body))[:-4] + b"\xff\xff\xff\x7f"]
        return message, body

    hub.tamper = spoilt
    run.run()
    assert run.result is not None
    assert 0 not in hub.connected
    for name, tensor in run.training.clients.model_state(1).items():
        assert torch.isfinite(tensor).all(), name


def test_a_client_with_data_of_its_own(tmp_path: Path) -> None:
    """Three files train like the one data set they were taken from, whichever classes they lack."""
    names = [str(k) for k in range(10)]
    config = RunConfig.of({**SMALL, "algorithm": "sglr", "class_names": names})
    shares = {k: worker_of(config, k, name=f"client-{k}").duty.samples for k in range(3)}
    own = {}
    for k, share in shares.items():
        np.savez(tmp_path / f"{k}.npz", x=share.x.numpy(), y=share.y.numpy())
        own[k] = load_whole(str(tmp_path / f"{k}.npz"), class_names=names)
        assert torch.equal(own[k].train.x, share.x)
        assert torch.equal(own[k].train.y, share.y)
    assert any(len(share.y.unique()) < 10 for share in shares.values())
    hub = Passing({k: worker_of(config, k, name=f"client-{k}", own=own[k]) for k in own})

    hub.greet = lambda hello, k: greet(hello, k)

    def ready(wanted: frozenset[int]) -> None:
        for k in set(hub.workers) - hub.connected:
            hub.join(k, lambda hello, k=k: greet(hello, k))

    training, _, greet = remote_training(config, hub, [0] * 3, ready=ready)
    assert [r.loss for r in Run(config, training=training)] == [r.loss for r in Run(config)]


def test_classes_and_columns_are_compared_by_name(tmp_path: Path) -> None:
    """Otherwise a file that lacks a class would number the others differently, and columns would be mixed up."""

    def write(name: str, header: str, labels: str) -> str:
        rows = "".join(f"{n}.5,{n % 7}.25,{labels[n % len(labels)]}\n" for n in range(60))
        (tmp_path / name).write_text(f"{header},label\n{rows}", encoding="utf-8")
        return str(tmp_path / name)

    path = write("all.csv", "age,weight", "abc")
    options = {"algorithm": "psl", "model": "mlp", "data": path, "clients": 2, "test": 6, "validation": 6}
    config = RunConfig.of({**SMALL, **options})

    def answer(config: RunConfig, path: str) -> m.Welcome | m.Refused:
        worker = worker_of(config, 1, name="client-1", own=own_source(config, path))
        _, _, greet = remote_training(config, Passing({}), [0] * 2)
        return greet(worker.hello(), 1)

    few = write("few.csv", "age,weight", "bc")
    refused = answer(config, few)
    assert isinstance(refused, m.Refused)
    assert refused.reason == "data"
    assert "is 'b', 'c' for the client and 'a', 'b', 'c' for the server: set class_names" in refused.sentence
    named = RunConfig.of({**config.model_dump(include=set(config.given)), "class_names": ["a", "b", "c"]})
    assert isinstance(answer(named, few), m.Welcome)
    refused = answer(config, write("other.csv", "weight,age", "abc"))
    assert isinstance(refused, m.Refused)
    assert "is 'weight', 'age' for the client and 'age', 'weight' for the server" in refused.sentence
    assert "ignore_columns" in refused.sentence


def test_a_client_whose_disk_is_full_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It says so, and no half-written file remains. The results do not change, but after a restart it can only return
    to the last state that it saved.
    """
    config = RunConfig.of({**SMALL, "algorithm": "sglr", "checkpoint_every": 1})
    told, asked, put = list[tuple[str, Any]](), list[int](), os.pwrite

    def full(file: int, data: bytes, at: int) -> int:
        if at + len(data) > os.fstat(file).st_size:
            raise OSError(errno.ENOSPC, "No space left on device")
        return put(file, data, at)

    class Crowded(MemoryCarrier):
        """From the second checkpoint on, the disk of client 1 is full."""

        def answer(self, client: int, frame: Frame) -> Answer | None:
            with pytest.MonkeyPatch.context() as patch:
                if client == 1 and isinstance(frame.message, m.Save) and frame.message.phase == "prepare":
                    asked.append(frame.message.step)
                    if len(asked) > 1:
                        patch.setattr("os.pwrite", full)
                return super().answer(client, frame)

    made = in_memory(config, folder=tmp_path, carrier=Crowded, tell=lambda what, facts: told.append((what, facts)))
    assert [record.loss for record in made.run] == [record.loss for record in Run(config)]
    assert [facts["client"] for what, facts in told if what == "not kept"] == [1, 1]
    assert "is full (No space left on device); make room" in caplog.text
    assert {path.name for path in (tmp_path / "client-1").iterdir()} == {"client.safetensors", "spent.json"}
    again = worker_of(config, 1, name="client-1", folder=tmp_path / "client-1")
    assert again.welcome(m.Welcome(1, 3, asked[-1], again.duty.terms)) is None
    assert again.steps == asked[0]


def test_labels_that_nobody_knows(tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", x=np.zeros((4, 3), np.float32), y=np.array([0, 1, 7, 1]))
    with pytest.raises(DataError, match="label '7', which is not in"):
        load_whole(str(tmp_path / "own.npz"), class_names=["0", "1"])


def test_too_few_are_left() -> None:
    """If all clients are faulty, the run ends with an error."""
    run, hub = remote(RunConfig.of({**SMALL, "algorithm": "sglr"}))
    hub.tamper = lambda client, message, body: (
        _nan(message, body) if isinstance(message, m.SmashedUp) else (message, body)
    )
    with pytest.raises(TrainingError, match="are excluded"):
        run.run()


def test_twice_the_same_weights() -> None:
    """A client starts with the same weights as in the simulation."""
    config = RunConfig.of({**SMALL, "algorithm": "psl", "start": "independent"})
    local = assemble(config).clients
    for k in range(3):
        own = {n.split(".", 1)[1]: t for n, t in worker_of(config, k, name="x").client.module.state_dict().items()}
        assert difference(local.model_state(k), own) == 0
    assert torch.is_tensor(next(iter(own.values())))


@pytest.mark.parametrize("algorithm", ["sfl", "sglr", "ssl"])
@pytest.mark.parametrize("committed", [True, False])
def test_all_go_on_from_the_same_round(algorithm: str, committed: bool, tmp_path: Path) -> None:
    """Server and clients are killed in the third round, or after the second was saved but before its commit. All
    restart from what they saved, and end with the numbers of an uninterrupted run.
    """
    config = RunConfig.of({**SMALL, **OWN.get(algorithm, {}), "algorithm": algorithm, "rounds": 4})
    whole = Run(config)
    whole.run()
    broken, hub = remote(config, tmp_path)
    steps = iter(broken)
    for record in steps:
        if record.round == 2:
            break
    steps.close()  # type: ignore[attr-defined]
    if not committed:
        for k in hub.workers:
            place = tmp_path / f"client-{k}"
            (place / "client.safetensors").rename(place / "client-next.safetensors")
    again, hub = remote(config, tmp_path, resume=True)
    again.run()
    assert again.result is not None
    assert whole.result is not None
    assert again.result.test_score == whole.result.test_score
    assert again.result.bytes == whole.result.bytes
    assert difference(whole.training.server.model.state_dict(), again.training.server.model.state_dict()) == 0
    for k in range(3) if algorithm != "ssl" else [whole.training.clients.holder]:
        assert difference(whole.training.clients.model_state(k), hub.model(k)) == 0


@pytest.mark.parametrize(
    ("algorithm", "verb"),
    [("fl", m.Fit), ("fl", m.GiveModel), ("fl", m.Evaluate), ("sfl", m.GiveModel)],
)
def test_all_clients_are_gone_for_a_while(algorithm: str, verb: type[m.Message]) -> None:
    """The server's own network fails. Whatever the server was requesting, it waits for its clients and asks again, and
    the results are those of a run without faults.
    """
    config = RunConfig.of({**SMALL, "algorithm": algorithm})
    whole = Run(config)
    expected = whole.run()
    run, hub = remote(config)
    for record in run:
        if record.round == 0:
            hub.breaks_at = verb
    assert hub.breaks_at is None
    assert run.result is not None
    assert (run.result.steps, run.result.test_score) == (expected.steps, expected.test_score)
    for k in range(3):
        assert difference(whole.training.clients.model_state(k), hub.model(k)) == 0


def test_no_client_trains_twice_for_an_answer_that_was_lost() -> None:
    """The client has trained when the connection breaks. Asked again, it repeats its answer without training."""
    config = RunConfig.of({**SMALL, "algorithm": "fl"})
    whole = Run(config)
    losses = [record.loss for record in whole]
    run, hub = remote(config)
    hub.loses = m.Fit
    assert [record.loss for record in run] == losses
    assert hub.loses is None
    for k in range(3):
        assert difference(whole.training.clients.model_state(k), hub.model(k)) == 0


@algorithm("own-losses", title="Own losses", needs={FORWARD, LEARN})
class OwnLosses(Algorithm):
    """Clients learn from the loss of their heads, and the server from their smashed data."""

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        while smashed := clients.forward():
            step = server.step(smashed)
            clients.learn(1)
            yield report(step, smashed)


def test_no_client_learns_twice_for_an_answer_that_was_lost() -> None:
    """The same holds for the loss of a head: asked again for the same step, the client repeats its answer."""
    there = in_memory(Run(**{**SMALL, "algorithm": OwnLosses}).config)
    next(iter(there.run))
    worker = there.workers[0]
    again = Frame(m.Learn(there.cohort._step, 1), memoryview(b""))
    before = {name: t.clone() for name, t in worker.client.module.state_dict().items()}
    first, second = worker.handle(again), worker.handle(again)
    assert first is not None
    assert second is not None
    assert first[0] == second[0]
    assert difference(before, dict(worker.client.module.state_dict())) == 0


def test_all_clients_are_gone_in_the_midst_of_a_round() -> None:
    """The run continues with the next step. Only the backward pass in progress is lost."""
    run, hub = remote(RunConfig.of({**SMALL, "algorithm": "sglr"}))
    rounds = []
    for record in run:
        rounds.append(record.round)
        assert record.clients == (0, 1, 2)
        if len(rounds) == 4:
            hub.breaks_at = m.Forward
    assert hub.breaks_at is None
    assert rounds == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_nobody_can_stand_in_for_who_is_gone() -> None:
    """If the client that has the model does not come back, the run ends with an error instead of waiting for ever."""
    run, hub = remote(RunConfig.of({**SMALL, "algorithm": "ssl", "eval_every": 1}))
    records = iter(run)
    next(records)
    hub.breaks_at = m.Evaluate
    hub.gone = set(range(3))
    with pytest.raises(TrainingError, match="are lost"):
        list(records)


def crash(run: Run, steps: int) -> None:
    """Train for this number of steps, and stop in the middle of the run."""
    records = iter(run)
    for _ in range(steps):
        next(records)
    records.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("steps", [3, 9])
def test_the_server_goes_back_and_the_clients_live_on(steps: int, tmp_path: Path) -> None:
    """The server is killed in the second round, before its first checkpoint, or in the fourth; the clients return."""
    config = RunConfig.of({**SMALL, "algorithm": "sglr", "rounds": 5, "batch": 8, "checkpoint_every": 2})
    whole = Run(config)
    whole.run()
    broken, hub = remote(config, tmp_path)
    crash(broken, steps)
    again, hub = remote(config, tmp_path, resume=True, workers=hub.workers)
    again.run()
    assert again.result is not None
    assert whole.result is not None
    assert again.result.steps == whole.result.steps == 15
    assert difference(whole.training.server.model.state_dict(), again.training.server.model.state_dict()) == 0
    for k in range(3):
        assert difference(whole.training.clients.model_state(k), hub.model(k)) == 0


def test_a_server_that_begins_anew_is_not_met_with_another_model(tmp_path: Path) -> None:
    """A client without a folder cannot go back: it says so instead of continuing with its present model."""
    config = RunConfig.of({**SMALL, "algorithm": "sglr", "rounds": 5})
    broken, hub = remote(config)
    crash(broken, 2)
    again, _ = remote(config, workers=hub.workers)
    with pytest.raises(RefusedError, match="after step 0, but client-0 kept no state"):
        again.run()


def test_killed_again_before_anybody_was_told_of_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All processes die after a checkpoint was written but before its commit, and again when the clients have prepared
    the next state but the server has not written its checkpoint.
    """
    config = RunConfig.of({**SMALL, "algorithm": "sglr", "rounds": 5, "batch": 8, "checkpoint_every": 2})
    whole = Run(config)
    whole.run()
    crash(remote(config, tmp_path)[0], 7)
    for k in range(3):
        place = tmp_path / f"client-{k}"
        (place / "client.safetensors").rename(place / "client-next.safetensors")
    again, _ = remote(config, tmp_path, resume=True)
    write = checkpoint.write

    def die(path: Path, state: Mapping[str, Any]) -> None:
        if path.name == "checkpoint.safetensors":
            raise KeyboardInterrupt
        write(path, state)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write", die)
        with pytest.raises(KeyboardInterrupt):
            again.run()
    last, hub = remote(config, tmp_path, resume=True)
    last.run()
    assert difference(whole.training.server.model.state_dict(), last.training.server.model.state_dict()) == 0
    for k in range(3):
        assert difference(whole.training.clients.model_state(k), hub.model(k)) == 0


def test_a_client_without_its_state_is_refused(tmp_path: Path) -> None:
    config = RunConfig.of({**SMALL, "algorithm": "psl"})
    run, _ = remote(config, tmp_path)
    for record in run:
        if record.round == 2:
            break
    (tmp_path / "client-1" / "client.safetensors").unlink()
    again, hub = remote(config, tmp_path, resume=True)
    with pytest.raises(RefusedError, match="kept no state"):
        again.run()
    assert 1 not in hub.connected
