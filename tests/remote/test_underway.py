"""Clients that work at their own pace, over gRPC: batches are taken in the order of their arrival, and nobody waits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from test_transport import QUICK, SOON  # type: ignore[import-not-found]

from cutlayer.options import FaultConfig, RunConfig
from cutlayer.remote.dial import dial
from cutlayer.remote.security import ClientSecurity, ServerSecurity
from cutlayer.remote.serve import Service, Serving
from cutlayer.remote.sides import client_name, worker_of
from cutlayer.run import Run
from cutlayer.wire import Frame
from cutlayer.wire import messages as m

SLOW = 2
STUDY: dict[str, Any] = {
    "algorithm": "gas", "data": "digits", "model": "mlp", "clients": 3, "samples_per_client": 20, "test": 30,
    "batch": 5, "local_steps": 2, "working": 3, "buffer_batches": 1, "generate": "seen",
}  # fmt: skip
Before = Callable[[int, m.Message], None]


@contextmanager
def served(out: Path, before: Before, faults: Mapping[str, Any], **options: Any) -> Iterator[Run]:
    """A run over gRPC on this machine, with a thread for each client: `before` is called before it answers."""
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
    """The slow client's first batch comes once each other client has sent three; these then wait for it."""

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
    """Its first batch is taken when it comes, several steps and averagings later, and it goes on with its old model."""
    with served(tmp_path / "run", Pace(), {}, rounds=12, buffer_models=1) as run:
        order = [record.clients[0] for record in run]
    assert run.result is not None
    assert run.result.staleness is not None
    ages = run.result.staleness
    first = order.index(SLOW)
    assert first >= 4  # of the six batches of the others, at most two are under way when the slow client answers
    assert set(order[:first]) == {0, 1}
    assert ages["batches_most"][SLOW] == first
    assert ages["averagings"] == 12
    assert run.result.rounds == 12
    assert sum(ages["batches"]) == len(order) == ages["server_steps"]
    assert ages["models_most"][SLOW] is None or ages["models_most"][SLOW] >= 2


def test_rounds_end_without_a_client_that_hangs(tmp_path: Path) -> None:
    """After the deadline what is there is averaged; the client is late, and not excluded."""
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
