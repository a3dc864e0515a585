"""Server and clients on separate hosts over TLS: long cables, lost packets, cut cables, and hosts that die."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from namespaces import Network, lacking, long_cables  # type: ignore[import-not-found]
from trial import CONFIG, PATIENCE, Trial, finished, same_as_local, until  # type: ignore[import-not-found]

from cutlayer.errors import ExitCode

WHY_NOT = lacking()
pytestmark = [pytest.mark.network, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]
HOSTS = ("server", "client-0", "client-1", "client-2")
NOTICED = 60.0  # seconds in which a cut-off host is noticed on any machine; usually two


class Federation:
    """A network, and a trial that runs on it."""

    def __init__(self, network: Network, folder: Path, rounds: int, config: str = CONFIG, **cable: float) -> None:
        self.network = network
        for number, host in enumerate(HOSTS):
            network.add(host, **({**cable, "seed": number} if cable else {}))
        host = network.addresses["server"]
        self.trial = Trial(folder, "sglr", rounds, config=config, host=host, space=network.space)

    def start(self, *words: str, keepalive: int = 1) -> list[Any]:
        """Start the server and the clients."""
        return [self.trial.serve(*words, "--keepalive", str(keepalive)), *self.join(keepalive)]

    def join(self, keepalive: int = 1) -> list[Any]:
        """Start the clients."""
        return [self.trial.join(k, "--keepalive", str(keepalive)) for k in range(3)]

    def clients(self) -> list[list[int]]:
        """The participants of each step."""
        return [r["clients"] for r in self.trial.steps()]

    def step_with(self, clients: list[int], after: int) -> bool:
        return any(r["clients"] == clients and r["step"] > after for r in self.trial.steps())


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Callable[..., Federation]]:
    made: list[Federation] = []
    with Network() as network:

        def make(rounds: int, **options: Any) -> Federation:
            made.append(Federation(network, tmp_path, rounds, **options))
            return made[-1]

        try:
            yield make
        finally:
            for one in made:
                one.trial.stop()
    listed = [line for line in Path("/run/netns").iterdir() if line.name.startswith(network.space(""))]
    assert not listed


LARGE = """algorithm = "{algorithm}"
data = "digits"
model = "mlp"
clients = 3
samples_per_client = 392
rounds = {rounds}
batch = 196
test = 10
validation = 0
eval_every = {rounds}
"""  # smashed data and cut gradients of 196 x 128 x 4 = 100352 bytes
SERVER = """
import json, sys
from pathlib import Path
from cutlayer.options import RunConfig, read_toml
from cutlayer.remote.security import ServerSecurity
from cutlayer.remote.serve import Service, Serving

ca = Path("ca")
security = ServerSecurity(ca / "server.crt", ca / "server.key", ca / "ca.crt")
service = Service(RunConfig.of(read_toml(Path("c.toml"))), Serving(sys.argv[1], security), Path("run"))
with service.open() as run:
    run.run()
print(json.dumps({k: vars(t) for k, t in service.hub.traffic().items()}))
"""


def test_bytes_on_the_cables(federation: Callable[..., Federation], capsys: pytest.CaptureFixture[str]) -> None:
    """Compares the bytes of the ledger, of whole messages, and on the server's cable, in one run."""
    f = federation(rounds=20, config=LARGE)
    words = [*f.network.inside("server"), sys.executable, "-c", SERVER, f.trial.address]
    with (f.trial.folder / "traffic.json").open("wb") as file:
        f.trial.processes.append(subprocess.Popen(words, cwd=f.trial.folder, stdout=file))
    finished(f.trial, *f.join(), f.trial.processes[0])
    traffic = json.loads((f.trial.folder / "traffic.json").read_text()).values()
    same_as_local(f.trial)
    device = f.network.carried("server")
    rows = json.loads((f.trial.folder / "run" / "result.json").read_text())["bytes"]
    lines = []
    for way, message, carried, packets, evaluation in (
        ("up", "received", device.received, device.packets_received, 3 * 10 * 128 * 4),
        ("down", "sent", device.sent, device.packets_sent, 3 * 10 * 64 * 4),
    ):
        ledger = sum(r["wire-unicast"] for r in rows if r["direction"] == way and r["kind"] != "evaluation")
        tensors = sum(t[f"payload_{message}"] for t in traffic)  # each with a description of its shape
        assert 0 < tensors - evaluation - ledger < 100 * sum(t[f"messages_{message}"] for t in traffic)
        messages = sum(t[message] for t in traffic)
        assert carried / packets < 1600  # as on a real cable
        lines.append(
            f"{way}: ledger {ledger}, messages {messages} (+{messages / ledger - 1:.2%}), "
            f"on the cable {carried} (+{carried / ledger - 1:.2%}), in {packets} packets"
        )
        assert ledger < messages < 1.01 * ledger
        assert messages < carried < 1.1 * ledger
    with capsys.disabled():
        sys.stdout.write("\n".join(["", *lines, ""]))


@pytest.mark.skipif(long_cables() is not None, reason=str(long_cables()))
def test_long_cables_that_lose_packets(federation: Callable[..., Federation]) -> None:
    """With 10 ms in each direction and 2 % of packets lost, the run is slower but gives exactly the same numbers."""
    f = federation(rounds=3, delay=0.01, loss=0.02)
    finished(f.trial, *f.start(keepalive=10))  # the usual interval, so lost pings end no connection
    cables = [f.network.end_cable(host) for host in HOSTS]
    assert all(lost > 0 for _, lost in cables), cables
    same_as_local(f.trial)


def test_a_cut_cable_and_a_dead_host(federation: Callable[..., Federation]) -> None:
    """The others continue at the deadline, and the client that was cut off comes back by itself. Then a client and its
    machine die without a message.
    """
    f = federation(rounds=200)
    processes = f.start("--deadline", "1", "--quorum", "0.6")
    until(lambda: len(f.clients()) > 10, "ten steps", f.trial)
    f.network.cut("client-1")
    begin, before = time.monotonic(), len(f.clients())
    until(lambda: f.step_with([0, 2], before), "a step without the client that is cut off", f.trial)
    assert time.monotonic() - begin < NOTICED
    time.sleep(3)  # longer than both sides wait before they give up the connection
    f.network.reconnect("client-1")
    lonely = len(f.clients())
    until(lambda: f.step_with([0, 1, 2], lonely), "a step with all again", f.trial)
    assert "dialling again" in f.trial.log("client-1")

    f.network.cut("client-0")
    processes[1].send_signal(signal.SIGKILL)
    processes[1].wait()
    begin, before = time.monotonic(), len(f.clients())
    until(lambda: f.step_with([1, 2], before), "a step without the host that is dead", f.trial)
    assert time.monotonic() - begin < NOTICED
    finished(f.trial, processes[0], *processes[2:])
    assert [r["step"] for r in f.trial.steps()] == list(range(1200))


def test_a_dead_host_is_noticed_without_a_deadline(federation: Callable[..., Federation]) -> None:
    """It dies in the middle of a step, and only pings notice. When a second one dies, the server reports: no quorum."""
    f = federation(rounds=100)
    server, *clients = f.start("--patience", "2", "--quorum", "0.6")
    until(lambda: len(f.clients()) > 10, "ten steps", f.trial)
    for k in (1, 0):
        f.network.cut(f"client-{k}")
        clients[k].send_signal(signal.SIGKILL)
        clients[k].wait()
        begin, before = time.monotonic(), len(f.clients())
        if k:
            until(lambda before=before: f.step_with([0, 2], before), "a step without the host that is dead", f.trial)
        else:
            assert server.wait(PATIENCE) == ExitCode.TRY_AGAIN
        assert time.monotonic() - begin < NOTICED
    said = " ".join(f.trial.log("server").split())
    assert "1 of 3 clients are connected after 2 seconds, 2 are needed" in said
    assert clients[2].poll() is None  # it waits for the server
    clients[2].send_signal(signal.SIGTERM)
    assert clients[2].wait(PATIENCE) == 0
