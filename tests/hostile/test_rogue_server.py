"""A server asks for what it should not get, over real connections: the client leaves without sending it anything."""

from __future__ import annotations

import json
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import grpc
import processes
import pytest
import rogue_server
from rogue_server import ATTACKS, ESCAPES, PATIENCE, ROUND, Attack, Rogue, asking

from cutlayer import errors
from cutlayer.build import load_source
from cutlayer.options import RunConfig
from cutlayer.remote.carrier import Lost
from cutlayer.remote.dial import STOPPED, Backoff, dial
from cutlayer.remote.security import ClientSecurity
from cutlayer.remote.sides import worker_of
from cutlayer.text import plain
from cutlayer.wire import messages as m

CONFIG: dict[str, Any] = {
    "algorithm": "psl",
    "data": "digits",
    "model": "mlp",
    "clients": 2,
    "samples_per_client": 12,
    "batch": 4,
    "test": 10,
    "rounds": 2,
}


@cache
def source() -> Any:
    return load_source(RunConfig.of(CONFIG), None)


@pytest.fixture
def rogue() -> Iterator[Rogue]:
    made = Rogue()
    yield made
    made.close()


class Dialling(threading.Thread):
    """A client that dials the rogue server from its own thread."""

    def __init__(self, port: int, folder: Path | None = None) -> None:
        super().__init__(daemon=True)
        self.worker = worker_of(RunConfig.of(CONFIG), 0, name="client-0", data=source(), folder=folder)
        self.port = port
        self._ends: queue.Queue[Any] = queue.Queue()
        self.start()

    def run(self) -> None:
        quick = Backoff(first=0.05, most=0.2)
        try:
            self._ends.put(dial(f"localhost:{self.port}", ClientSecurity(), self.worker, backoff=quick))
        except BaseException as error:
            self._ends.put(error)

    def end(self) -> Any:
        """The result of dialling."""
        return self._ends.get(timeout=PATIENCE)

    @property
    def rounds(self) -> int:
        """Number of rounds that it has begun, in all its processes."""
        assert self.worker.duty.purse is not None
        return self.worker.duty.purse.spent.rounds


@pytest.mark.parametrize("name", ATTACKS)
def test_a_client_leaves_a_server_that_asks_for_what_it_should_not_get(rogue: Rogue, name: str) -> None:
    attack = ATTACKS[name]
    client = Dialling(rogue.port)
    lost, end = rogue.attack(attack), client.end()
    assert isinstance(end, getattr(errors, attack.kind))
    assert attack.said in str(end)
    assert isinstance(lost, Lost)
    assert (lost.kind, lost.reason) == (attack.kind, "failed")
    assert attack.said in lost.sentence


def test_what_a_server_says_at_the_end_is_text_alone(rogue: Rogue) -> None:
    client = Dialling(rogue.port)
    rogue.hub.wait_for(1, PATIENCE)
    rogue.hub.arrivals()
    rogue.close()
    assert client.end() == plain(ESCAPES)


def test_what_a_server_refuses_with_is_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rogue, "_admit", lambda self, hello, identity: m.Refused("run", ESCAPES))
    rogue = Rogue()
    end = Dialling(rogue.port).end()
    rogue.close()
    assert isinstance(end, errors.RefusedError)
    assert str(end) == plain(ESCAPES)


def test_a_client_that_comes_back_has_not_forgotten_what_it_spent(rogue: Rogue, tmp_path: Path) -> None:
    """A server that cuts the connection or makes the client restart does not get a second budget."""
    first = Dialling(rogue.port, tmp_path)
    rogue.attack(Attack((*[ROUND] * 5, *asking(m.Settle(1))), "", ""))
    assert first.rounds == 5
    rogue.hub.call(rogue.hub._cut, rogue.hub._links[0], Lost("gone", "x"), grpc.StatusCode.ABORTED)
    while rogue.hub.present:
        time.sleep(0.01)
    attack = ATTACKS["rounds again and again"]
    assert isinstance(rogue.attack(attack), Lost)
    assert isinstance(first.end(), errors.BudgetError)
    second = Dialling(rogue.port, tmp_path)  # as another process with the same folder
    assert isinstance(rogue.attack(attack), Lost)
    assert isinstance(second.end(), errors.BudgetError)
    assert second.rounds == first.rounds == 9


def test_a_signal_is_heard_within_local_training(rogue: Rogue) -> None:
    """The client ends between two batches, and sends nothing more."""
    config = RunConfig.of({**CONFIG, "algorithm": "fl", "local_epochs": 100})
    worker = worker_of(config, 0, name="client-0", data=source())
    worker.stop = threading.Event()
    taken = 0

    def learn(*inputs: Any, own: Any = worker.client.learn, **options: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == 2:
            worker.stop.set()
        return own(*inputs, **options)

    worker.client.learn = learn  # type: ignore[method-assign]
    ends: queue.Queue[Any] = queue.Queue()
    address = f"localhost:{rogue.port}"
    thread = threading.Thread(target=lambda: ends.put(dial(address, ClientSecurity(), worker)), daemon=True)
    thread.start()
    lost = rogue.attack(Attack(((m.BeginRound(0, 2, 1.0, 300), ()), *asking(m.Fit(1))), "", ""))
    assert isinstance(lost, Lost)
    assert lost.reason == "gone"
    assert ends.get(timeout=PATIENCE) == STOPPED
    assert taken == 2


@pytest.mark.network
def test_a_rogue_server_and_a_client_as_processes(tmp_path: Path) -> None:
    """The client ends with exit code 2 and a line in its log and its record. Only its owner can read the record."""
    names = ["its model", "beyond the round", "endless rounds"]
    (tmp_path / "c.toml").write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in CONFIG.items()))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = [sys.executable, rogue_server.__file__, str(port), *names]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        for name in names:
            argv = ["join", f"localhost:{port}", "--client", "client-0", "--config", "c.toml", "--insecure"]
            with (tmp_path / "log").open("wb") as log:
                client = processes.start([*argv, "--folder", name], cwd=tmp_path, stdout=log, stderr=log)
            assert client.wait(PATIENCE) == 2
            said = json.loads(server.stdout.readline())
            assert (said["attack"], said["kind"]) == (name, ATTACKS[name].kind)
            assert ATTACKS[name].said in (tmp_path / "log").read_text()
            folder = tmp_path / name / "client-0"
            refused = json.loads((folder / "audit.jsonl").read_text().splitlines()[-2])
            assert refused["refused"] == ATTACKS[name].kind
            assert {p.stat().st_mode & 0o777 for p in (folder, *folder.iterdir())} == {0o700, 0o600}
        assert server.wait(PATIENCE) == 0
