"""Clients that work at their own pace, over gRPC: the server takes batches as they arrive, and no client waits."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support import difference
from test_remote import remote  # type: ignore[import-not-found]
from test_transport import QUICK, SOON  # type: ignore[import-not-found]

from cutlayer import checkpoint
from cutlayer.options import FaultConfig, RunConfig
from cutlayer.remote.dial import dial
from cutlayer.remote.security import ClientSecurity, ServerSecurity
from cutlayer.remote.serve import Service, Serving
from cutlayer.remote.sides import client_name, worker_of
from cutlayer.remote.transports.memory import MemoryCarrier
from cutlayer.run import Run
from cutlayer.testing import in_memory
from cutlayer.wire import Frame, encode
from cutlayer.wire import messages as m

SLOW = 2
STUDY: dict[str, Any] = {
    "algorithm": "gas", "data": "digits", "model": "mlp", "clients": 3, "samples_per_client": 20, "test": 30,
    "batch": 5, "local_steps": 2, "working": 3, "buffer_batches": 1, "generate": "seen",
}  # fmt: skip
Fault = Callable[[Any, Any], tuple[Any, Any]]
Before = Callable[[int, m.Message], None]


@contextmanager
def served(out: Path, before: Before, faults: Mapping[str, Any], **options: Any) -> Iterator[Run]:
    """A run over gRPC on this machine with a thread for each client, which calls `before` ahead of each answer."""
    config = RunConfig.of({**STUDY, **options})
    stop, threads = threading.Event(), []

    def work(client: int, port: int) -> None:
        worker = worker_of(config, client, name=client_name(client), run=config.algorithm)
        answer = worker.handle

        def handle(frame: Frame) -> Any:
            before(client, frame.message)
            return answer(frame)

        worker.handle = handle  # type: ignore[method-assign]
        dial(f"localhost:{port}", ClientSecurity(), worker, backoff=QUICK, stop=stop)

    def come(port: int) -> None:
        threads.extend(threading.Thread(target=work, args=(k, port)) for k in range(config.clients))
        for thread in threads:
            thread.start()

    serving = Serving("localhost:0", ServerSecurity(), FaultConfig.of({"patience": SOON, **faults}))
    service = Service(config, serving, out, listening=come)
    try:
        with service.open() as run:
            yield run
    finally:
        stop.set()
        for thread in threads:
            thread.join(SOON)
            assert not thread.is_alive()


class Pace:
    """The slow client sends its first batch after each other client has sent three; these then wait for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sent = [0, 0, 0]
        self._late, self._there = threading.Event(), threading.Event()

    def __call__(self, client: int, message: m.Message) -> None:
        if client == SLOW and isinstance(message, m.Backward):
            self._there.set()
        if not isinstance(message, m.Forward):
            return
        with self._lock:
            self._sent[client] += 1
            sent = self._sent[client]
            if min(self._sent[:SLOW]) >= 3:
                self._late.set()
        if client == SLOW and sent == 1:
            assert self._late.wait(SOON)
        elif client != SLOW and sent > 3:
            assert self._there.wait(SOON)


def test_a_slow_client_holds_nobody_up(tmp_path: Path) -> None:
    """Its first batch is taken when it arrives, some steps and averagings later, and the client keeps its old model."""
    with served(tmp_path / "run", Pace(), {}, rounds=12, buffer_models=1) as run:
        order = [record.clients[0] for record in run]
    assert run.result is not None
    assert run.result.staleness is not None
    ages = run.result.staleness
    first = order.index(SLOW)
    assert first >= 4  # the others have six batches, of which at most two are in transit when the slow client answers
    assert set(order[:first]) == {0, 1}
    assert ages["batches_most"][SLOW] == first
    assert ages["averagings"] == 12
    assert run.result.rounds == 12
    assert sum(ages["batches"]) == len(order) == ages["server_steps"]
    assert ages["models_most"][SLOW] is None or ages["models_most"][SLOW] >= 2


def test_rounds_end_without_a_client_that_hangs(tmp_path: Path) -> None:
    """After the deadline, the models that have arrived are averaged. The client is late, but not excluded."""
    over = threading.Event()

    def hang(client: int, message: m.Message) -> None:
        if client == SLOW and isinstance(message, m.Forward):
            assert over.wait(SOON)

    with served(tmp_path / "run", hang, {"deadline": 0.5}, rounds=2, buffer_models=3) as run:
        run.run()
        over.set()
    assert run.result is not None
    assert run.result.rounds == 2
    assert run.result.staleness is not None
    assert run.result.staleness["models"] == [2, 2, 0]
    events = (tmp_path / "run" / "events.jsonl").read_text()
    assert '"event": "late", "client": 2' in events
    assert '"excluded"' not in events


def _rows(value: float, width: int = 128) -> Fault:
    def fault(message: Any, body: Any) -> tuple[Any, Any]:
        rows = torch.full((message.rows, width), value), torch.zeros(message.rows, dtype=torch.int64)
        return message, encode(rows)

    return fault


def _model(value: float) -> Fault:
    def fault(message: Any, body: Any) -> tuple[Any, Any]:
        spoilt = torch.frombuffer(bytearray(b"".join(body)), dtype=torch.uint8).clone()
        spoilt[-4:] = torch.tensor([value]).view(torch.uint8)
        return message, [spoilt.numpy().tobytes()]

    return fault


@pytest.mark.parametrize(
    ("kind", "fault", "said"),
    [
        (m.SmashedUp, _rows(float("nan")), "smashed data of client 1 hold NaN"),
        (m.SmashedUp, _rows(0.0, width=127), "127"),
        (m.SmashedUp, _rows(3e38), "smashed data of client 1"),
        (m.SmashedUp, _rows(1e20), "smashed data of client 1"),
        (m.ModelUp, _model(float("nan")), "model of client 1"),
        (m.ModelUp, _model(1e37), "model of client 1"),
    ],
)
def test_who_sends_nonsense_is_named_and_excluded(kind: type[m.Message], fault: Fault, said: str) -> None:
    """Its data are in no buffer and no average, and the others continue to the last round."""
    told: list[tuple[str, Mapping[str, Any]]] = []
    config = RunConfig.of({**STUDY, "rounds": 4, "batch": 8})
    run, hub = remote(config, tell=lambda happened, facts: told.append((happened, facts)))
    hub.tamper = lambda client, message, body: (
        fault(message, body) if client == 1 and isinstance(message, kind) else (message, body)
    )
    records = list(run)
    assert run.result is not None
    assert run.result.rounds == 4
    excluded = [facts for happened, facts in told if happened == "excluded"]
    assert [facts["client"] for facts in excluded] == [1]
    assert said in excluded[0]["why"]
    assert all(math.isfinite(record.loss) for record in records)
    assert run.result.staleness is not None
    assert run.result.staleness["models"][1] == 0
    assert min(run.result.staleness["models"][k] for k in (0, 2)) >= 3
    if kind is m.SmashedUp:
        assert {k for record in records for k in record.clients} == {0, 2}


@pytest.mark.parametrize("living", [True, False])
def test_a_server_comes_back_to_clients_at_work(living: bool, tmp_path: Path) -> None:
    """The clients are running processes, or new ones with saved states. In both cases all rounds end."""
    config = RunConfig.of({**STUDY, "rounds": 5, "checkpoint_every": 1, "buffer_models": 1, "buffer_batches": 2})
    run, hub = remote(config, tmp_path)
    steps = iter(run)
    while next(steps).round < 2:
        pass
    steps.close()  # type: ignore[attr-defined]
    again, hub = remote(config, tmp_path, resume=True, workers=hub.workers if living else None)
    again.run()
    assert again.result is not None
    assert again.result.rounds == 5
    assert again.result.staleness is not None
    assert again.result.staleness["averagings"] == 5
    assert hub.refused == {}


def test_the_average_is_judged_where_all_that_have_it_are_gone() -> None:
    """The server uses its own copy while the connected clients are at work."""
    config = RunConfig.of({**STUDY, "rounds": 1, "buffer_models": 1})
    there = in_memory(config)
    training, cohort = there.run.training, there.cohort
    this = training.clients.begin_round(0, 1, 1.0)
    list(training.algorithm.round(training.server, training.clients, this))
    before = cohort.evaluate(training.source.test, training.server.predict)
    at_work = set(training.server.kept["queue"].tolist())
    assert len(at_work) == 2
    for k in set(range(3)) - at_work:
        there.carrier.cut(k)
    after = cohort.evaluate(training.source.test, training.server.predict)
    assert after.mean("loss") == pytest.approx(before.mean("loss"))


def test_another_begins_where_the_one_at_work_is_gone() -> None:
    run, hub = remote(RunConfig.of({**STUDY, "rounds": 1, "working": 1, "buffer_models": 1}))
    gone: list[int] = []

    def cut(client: int, message: Any, body: Any) -> tuple[Any, Any]:
        if isinstance(message, m.SmashedUp) and not gone:
            gone.append(client)
            hub.cut(client)
        return message, body

    hub.tamper = cut
    clients = {k for record in run for k in record.clients}
    assert len(clients) == 1
    assert clients.isdisjoint(gone)
    assert run.result is not None
    assert run.result.staleness is not None
    assert sum(run.result.staleness["models"]) == 1


class Noting(MemoryCarrier):
    """Records the models that clients join with, the batches of their first round, and who receives another model."""

    def __init__(self, workers: Mapping[int, Any]) -> None:
        super().__init__(workers)
        self.joined: dict[int, dict[str, torch.Tensor]] = {}
        self.begun: dict[int, int] = {}
        self.replaced: set[int] = set()

    def join(self, client: int, greet: Any) -> m.Refused | None:
        refused = super().join(client, greet)
        module = self.workers[client].client.module  # type: ignore[attr-defined]
        self.joined[client] = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        return refused

    def answer(self, client: int, frame: Frame) -> Any:
        if isinstance(frame.message, m.BeginRound):
            self.begun.setdefault(client, frame.message.batches)
        if isinstance(frame.message, m.TakeModel):
            self.replaced.add(client)
        return super().answer(client, frame)


def test_clients_at_work_go_on_where_they_were_after_a_restart(tmp_path: Path) -> None:
    """They continue with the model that they saved and the batches that were left, not with the last average."""
    config = RunConfig.of(
        {
            **STUDY,
            "clients": 6,
            "working": 4,
            "batch": 2,
            "local_steps": 6,
            "rounds": 14,
            "checkpoint_every": 1,
            "buffer_models": 1,
        }
    )
    there = in_memory(config, folder=tmp_path)
    for record in (steps := iter(there.run)):
        if record.round == 9:
            break
    steps.close()  # type: ignore[attr-defined]
    again = in_memory(config, folder=tmp_path, resume=True, carrier=Noting)
    next(iter(again.run))
    going_on = {k for k, batches in again.carrier.begun.items() if batches < 6}
    assert going_on
    assert going_on <= set(again.carrier.joined)
    average = again.carrier.joined[next(k for k in range(6) if k not in going_on)]
    for k in going_on:
        own = again.carrier.joined[k]
        states = [checkpoint.read(path) for path in (tmp_path / f"client-{k}").glob("*.safetensors")]
        assert any(difference(state["model"], own) == 0 for state in states)
        assert difference(average, own) > 0
        assert not again.carrier.replaced & going_on
