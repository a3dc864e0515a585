"""During training, the server of a run is told which clients to admit."""

from __future__ import annotations

import json
import os
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_transport import QUICK, SOON, until  # type: ignore[import-not-found]

from cutlayer.errors import RefusedError, TrainingError
from cutlayer.options import FaultConfig, RunConfig
from cutlayer.remote import hub as hubs
from cutlayer.remote.dial import dial
from cutlayer.remote.security import ClientSecurity, ServerSecurity
from cutlayer.remote.serve import Service, Serving
from cutlayer.remote.sides import client_name, worker_of
from cutlayer.remote.worker import Worker

STUDY = {"data": "digits", "model": "mlp", "clients": 3, "samples_per_client": 20}
CONFIG = RunConfig.of({**STUDY, "algorithm": "psl", "rounds": 6})


@pytest.fixture(autouse=True)
def _quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hubs, "_LOOK", 0.02)


class Deployment:
    """A server that trains in this thread, with a list of denied clients; the clients have their own threads."""

    def __init__(self, out: Path, quorum: float, config: RunConfig) -> None:
        self.config = config
        self.deny = out.with_name("deny.txt")
        self.deny.write_text("")
        self._states = out.with_name("states")
        self.ends: dict[int, BaseException | str | None] = {}
        self._stops: dict[int, threading.Event] = {}
        self._workers: dict[int, Worker] = {}
        self._threads: list[threading.Thread] = []
        faults = FaultConfig.of({"quorum": quorum, "patience": SOON})
        serving = Serving("localhost:0", ServerSecurity(deny=self.deny), faults, metrics="0")
        self.service = Service(config, serving, out, listening=self._come)

    def say(self, text: str) -> None:
        fresh = self.deny.with_name("fresh")
        fresh.write_text(text)
        os.replace(fresh, self.deny)

    def come(self, client: int) -> None:
        """Start a client with its saved state, as a new process would."""
        folder = self._states / str(client)
        folder.mkdir(parents=True, exist_ok=True)
        config = self.config
        self._workers[client] = worker_of(config, client, name=client_name(client), run=config.algorithm, folder=folder)
        self.dial(client)

    def dial(self, client: int) -> None:
        """Connect a client again, in its present state."""
        self.ends.pop(client, None)
        self._stops[client] = threading.Event()
        self._threads.append(threading.Thread(target=self._work, args=(client, self._workers[client])))
        self._threads[-1].start()

    def cut(self, client: int) -> None:
        """End the client's connection; the client does not dial again by itself."""
        self._stops[client].set()
        until(lambda: client in self.ends and client not in self.service.hub.present)

    def _come(self, port: int) -> None:
        self.port = port
        for client in range(3):
            self.come(client)

    def _work(self, client: int, worker: Worker) -> None:
        address = f"localhost:{self.port}"
        try:
            self.ends[client] = dial(address, ClientSecurity(), worker, backoff=QUICK, stop=self._stops[client])
        except BaseException as error:
            self.ends[client] = error

    def metrics(self) -> str:
        address = f"http://127.0.0.1:{self.service.hub.metrics_port}/metrics"
        with urllib.request.urlopen(address, timeout=SOON) as page:
            return str(page.read().decode())

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        lines = (self.service.out / "events.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] in kinds]

    def end(self) -> None:
        for stop in self._stops.values():
            stop.set()
        for thread in self._threads:
            thread.join(SOON)
            assert not thread.is_alive()


@contextmanager
def deployment(out: Path, quorum: float, config: RunConfig = CONFIG) -> Iterator[Deployment]:
    made = Deployment(out, quorum, config)
    try:
        yield made
    finally:
        made.end()


def test_a_client_is_denied_while_a_run_trains(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with deployment(tmp_path / "run", 0.6) as d, d.service.open() as run:
        records = iter(run)
        next(records)
        d.say("client-2\nclient-9\n")
        until(lambda: isinstance(d.ends.get(2), RefusedError))
        rounds = run.training.rounds
        while len(d.events("round")) < rounds - 2:
            next(records)
        text = d.metrics()
        d.say("")
        until(lambda: "cutlayer_clients_denied 0.0" in d.metrics())
        d.come(2)
        until(lambda: d.service.hub.present == {0, 1, 2})
        for _ in records:
            pass
    took_part = [event["participants"] for event in d.events("round")]
    assert took_part[0] == [0, 1, 2]
    assert [0, 1] in took_part
    assert took_part[-1] == [0, 1, 2]
    (denied,) = d.events("denied")
    assert (denied["client"], denied["name"]) == (2, "client-2")
    assert [event["reason"] for event in d.events("refused")] == ["excluded"]
    assert [event["name"] for event in d.events("connected")].count("client-2") == 2
    assert d.ends == dict.fromkeys(range(3), "the run is done")
    assert "has 1 names that no client of this run has, such as 'client-9'" in caplog.text
    for line in (
        "cutlayer_clients_expected 3.0",
        "cutlayer_clients_denied 1.0",
        "cutlayer_clients_excluded 0.0",
        f"cutlayer_rounds_begun {float(rounds - 2)}",
        f"cutlayer_rounds_planned {float(rounds)}",
        'cutlayer_refused_total{reason="excluded"} 1.0',
    ):
        assert line in text, text


def test_a_run_that_needs_who_is_denied_ends(tmp_path: Path) -> None:
    def train() -> None:
        with d.service.open() as run:
            for _ in run:
                d.say("client-1")
                until(lambda: isinstance(d.ends.get(1), RefusedError))

    with deployment(tmp_path / "run", 1.0) as d, pytest.raises(TrainingError, match="1 of 3 clients are denied, 3 are"):
        train()


def test_the_holder_of_the_model_has_time_to_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others make up a quorum, but only the holder has the model: the server waits, and the holder dials in."""
    config = RunConfig.of({**STUDY, "algorithm": "ssl", "rounds": 2})
    with deployment(tmp_path / "run", 0.6, config) as d, d.service.open() as run:
        records = iter(run)
        holder = next(records).clients[0]
        wait_for, waited = d.service.hub.wait_for, list[frozenset[int]]()

        def called(clients: Any, timeout: float | None = None) -> frozenset[int]:
            if isinstance(clients, frozenset) and not waited:
                waited.append(clients)
                d.dial(holder)
            return wait_for(clients, timeout)

        monkeypatch.setattr(d.service.hub, "wait_for", called)
        d.cut(holder)
        steps = 1 + sum(1 for _ in records)
    assert waited == [frozenset({holder})]
    assert run.result is not None
    assert steps == run.result.steps
    assert d.ends == dict.fromkeys(range(3), "the run is done")
