"""Server and clients on hosts of their own, over TLS: cables that are long, lose packets, are cut; hosts that die."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from namespaces import Network, lacking, long_cables  # type: ignore[import-not-found]
from test_network import Trial, finished, same_as_local, until  # type: ignore[import-not-found]

WHY_NOT = lacking()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
HOSTS = ("server", "client-0", "client-1", "client-2")
KEEPALIVE = ("--keepalive", "1")


class Federation:
    """A network with a trial on it."""

    def __init__(self, network: Network, folder: Path, rounds: int, own: str = "", **cable: float) -> None:
        self.network = network
        for number, host in enumerate(HOSTS):
            network.add(host, **({**cable, "seed": number} if cable else {}))
        host = network.addresses["server"]
        self.trial = Trial(folder, "sglr", rounds, own=own, host=host, where=network.inside)

    def start(self, *words: str) -> list[Any]:
        """Server and clients."""
        server = self.trial.serve(*words, *KEEPALIVE)
        return [server, *(self.trial.join(k, *KEEPALIVE) for k in range(3))]

    def clients(self) -> list[list[int]]:
        """Who took part, by step."""
        return [r["clients"] for r in self.trial.steps()]

    def step_with(self, clients: list[int], after: int) -> bool:
        return any(r["clients"] == clients and r["step"] > after for r in self.trial.steps())


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Callable[..., Federation]]:
    made: list[Federation] = []
    with Network() as network:

        def make(rounds: int, own: str = "", **cable: float) -> Federation:
            made.append(Federation(network, tmp_path, rounds, own, **cable))
            return made[-1]

        try:
            yield make
        finally:
            for one in made:
                one.trial.stop()
    listed = [line for line in Path("/run/netns").iterdir() if line.name.startswith(network.space(""))]
    assert not listed


def test_hosts_of_their_own_give_the_simulations_numbers(federation: Callable[..., Federation]) -> None:
    f = federation(rounds=3)
    finished(f.trial, *f.start())
    same_as_local(f.trial)


@pytest.mark.skipif(long_cables() is not None, reason=str(long_cables()))
def test_long_cables_that_lose_packets(federation: Callable[..., Federation]) -> None:
    """10 ms each way, and one packet in fifty is lost: slower, and the same numbers to the last bit."""
    f = federation(rounds=3, delay=0.01, loss=0.02)
    finished(f.trial, *f.start())
    cables = [f.network.end_cable(host) for host in HOSTS]
    assert all(lost > 0 for _, lost in cables), cables
    same_as_local(f.trial)


def test_a_cut_cable(federation: Callable[..., Federation]) -> None:
    """The others go on at the deadline, then without asking; the client that was cut off comes back by itself."""
    f = federation(rounds=150)
    processes = f.start("--deadline", "1", "--quorum", "0.6")
    until(lambda: len(f.clients()) > 10, "ten steps", f.trial)
    f.network.cut("client-1")
    begin, before = time.monotonic(), len(f.clients())
    until(lambda: f.step_with([0, 2], before), "a step without the client that is cut off", f.trial)
    assert time.monotonic() - begin < 10
    time.sleep(3)  # longer than both sides are patient: they give the connection up
    f.network.mend("client-1")
    lonely = len(f.clients())
    until(lambda: f.step_with([0, 1, 2], lonely), "a step with all again", f.trial)
    assert "dialling again" in f.trial.log("client-1")
    finished(f.trial, *processes)
    assert [r["step"] for r in f.trial.steps()] == list(range(900))


def test_a_dead_host(federation: Callable[..., Federation]) -> None:
    """Neither the client nor its machine says a last word. There is no deadline: pings find out."""
    f = federation(rounds=60)
    processes = f.start()
    until(lambda: len(f.clients()) > 10, "ten steps", f.trial)
    f.network.cut("client-1")
    processes[2].send_signal(signal.SIGKILL)
    processes[2].wait()
    begin, before = time.monotonic(), len(f.clients())
    until(lambda: f.step_with([0, 2], before), "a step without the host that is dead", f.trial)
    assert time.monotonic() - begin < 10
    finished(f.trial, processes[0], processes[1], processes[3])
    assert [r["step"] for r in f.trial.steps()] == list(range(360))
    assert json.loads((f.trial.folder / "run" / "result.json").read_text())["steps"] == 360
