"""A run over TLS survives all kinds of faults of processes and connections, on a seeded schedule. One additional client
is hostile: it is excluded, and dials again and again.
"""

from __future__ import annotations

import itertools
import json
import random
import signal
import socket
import statistics
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from test_remote import remote  # type: ignore[import-not-found]
from trial import CONFIG, Trial  # type: ignore[import-not-found]

from cutlayer.options import RunConfig, read_toml

CLIENTS, CULPRIT = 4, 3
EVERY = 10  # rounds between evaluations, and between checkpoints
KEEPING = CONFIG.replace("clients = 3", f"clients = {CLIENTS}") + f"eval_every = {EVERY}\ncheckpoint_every = {EVERY}\n"
# Algorithm -> the lie of the hostile client, and from which answer on. The lies begin early, so it is excluded soon.
LIES = {
    "sglr": ("smashed data of 3e38", 20),
    "ssl": ("smashed data of 3e38", 20),
    "fl": ("a model times 1e37", 3),
    "sfl": ("a model times 1e37", 3),
    "sflv1": ("smashed data of 1e30", 20),
}
ROUNDS = {"sglr": 150, "ssl": 40, "fl": 40, "sfl": 40, "sflv1": 40}
# Differences of accuracy and loss that count as noise. In runs of few rounds, each round that a client misses has more
# effect.
LEAST, LEAST_OF_FEW = (0.02, 0.1), (0.05, 0.2)
AVERAGING = ("fl", "sfl", "sflv1")
WAY, LONG_WAY = 0.005, 0.05  # seconds that a proxy takes for each piece; LONG_WAY if a run is ahead of its faults
PATIENT = ("--keepalive", "1")
pytestmark = pytest.mark.network


class Proxy:
    """A proxy of the server's port that can cut connections, delay data and flip bits."""

    def __init__(self, port: int, seed: int) -> None:
        self.to, self._chance = port, random.Random(seed)
        self._ends: list[socket.socket] = []
        self._lock = threading.Lock()
        self._delay = WAY
        self._flips = 0
        self.flipped = 0
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._start(self._accept)

    def cut(self) -> None:
        """Break all connections."""
        with self._lock:
            ends, self._ends = self._ends, []
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def delay(self, seconds: float) -> None:
        """From now on, each piece arrives this many seconds late."""
        self._delay = seconds

    def flip(self) -> None:
        """Flip one bit of the next piece, in either direction."""
        with self._lock:
            self._flips += 1

    def close(self) -> None:
        """Stop, and wait until all threads have ended."""
        self._delay = 0.0
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def _start(self, what: Any, *args: Any) -> None:
        thread = threading.Thread(target=what, args=args)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self.to), timeout=5)
            except OSError:  # the server is not running
                near.close()
                continue
            far.settimeout(None)
            with self._lock:
                self._ends += [near, far]
            self._start(self._copy, near, far)
            self._start(self._copy, far, near)

    def _copy(self, a: socket.socket, b: socket.socket) -> None:
        with suppress(OSError):
            while data := a.recv(1 << 16):
                time.sleep(self._delay)
                b.sendall(self._damaged(data))
        for end in (a, b):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        a.close()  # the other socket is closed by the other direction, which reads from it

    def _damaged(self, data: bytes) -> bytes:
        with self._lock:
            if not self._flips:
                return data
            self._flips -= 1
            self.flipped += 1
        changed = bytearray(data)
        changed[self._chance.randrange(len(changed))] ^= 1 << self._chance.randrange(8)
        return bytes(changed)


class Chaos:
    """A run whose honest clients are each behind a proxy. `done` counts the faults by kind."""

    KINDS = ("kill client", "stall client", "cut", "delay", "flip", "stall server", "kill server")

    def __init__(self, folder: Path, algorithm: str, rounds: int, seed: int) -> None:
        self.algorithm, self.rounds, self.way = algorithm, rounds, WAY
        self.trial = Trial(folder, algorithm, rounds, config=KEEPING, clients=CLIENTS)
        self.chance = random.Random(seed)
        port = int(self.trial.address.rpartition(":")[2])
        self.proxies = [Proxy(port, seed + k) for k in range(3)]
        self.server = self._serve()
        self.clients = [self._join(k) for k in range(3)]
        self.hostile = self.trial.attack("answers", json.dumps({CULPRIT: LIES[algorithm]}))
        self.done: dict[str, int] = dict.fromkeys(self.KINDS, 0)

    def _serve(self) -> Any:
        return self.trial.serve("--deadline", "2", "--quorum", "0.5", *PATIENT)

    def _join(self, k: int) -> Any:
        self.trial.reached = f"127.0.0.1:{self.proxies[k].port}"
        return self.trial.join(k, *PATIENT)

    @property
    def over(self) -> bool:
        """Whether the server has ended."""
        return self.server.poll() is not None

    def happen(self, kind: str) -> None:
        """Cause one fault, and return when it is over."""
        k = self.chance.randrange(3)
        self.done[kind] += 1
        if kind == "kill client":
            self.clients[k].kill()
            self.clients[k].wait()
            self.clients[k] = self._join(k)
        elif kind == "kill server":
            self.server.kill()
            self.server.wait()
            self.server = self._serve()
        elif kind.startswith("stall"):
            process = self.server if kind == "stall server" else self.clients[k]
            process.send_signal(signal.SIGSTOP)
            time.sleep(self.chance.uniform(0.5, 3))
            process.send_signal(signal.SIGCONT)
        elif kind == "cut":
            self.proxies[k].cut()
        elif kind == "flip":
            self.proxies[k].flip()
        else:
            self.proxies[k].delay(0.05)
            time.sleep(self.chance.uniform(0.5, 2))
            self.proxies[k].delay(self.way)

    def steps(self) -> int:
        return len(self.trial.steps())

    def hold_back(self, share: float) -> None:
        """Slow the proxies down if the run has done more than this share of its rounds. Faults and rounds then end
        together, however fast the machine is.
        """
        steps = self.trial.steps()
        self.way = LONG_WAY if steps and steps[-1]["round"] > share * self.rounds else WAY
        for proxy in self.proxies:
            proxy.delay(self.way)

    def ends(self) -> str:
        """The exit code and the last log lines of every process."""
        named = {"server": self.server, **{f"client-{k}": process for k, process in enumerate(self.clients)}}
        return "\n".join(f"{n} {p.poll()}: {self.trial.log(n)[-1000:]}" for n, p in named.items())

    def stop(self) -> None:
        for process in self.trial.processes:
            with suppress(OSError):
                process.send_signal(signal.SIGCONT)
        self.trial.stop()
        for proxy in self.proxies:
            proxy.close()


def run_chaos(
    folder: Path, algorithm: str, rounds: int, seed: int, kinds: list[str], pause: float, limit: float
) -> Chaos:
    """Run under the faults of `kinds`, in this order, from the first steps on. The run has to end within `limit`."""
    end = time.monotonic() + limit
    chaos = Chaos(folder, algorithm, rounds, seed)

    def wait(condition: Any, what: str) -> None:
        while not condition():
            assert time.monotonic() < end, f"{what}: {chaos.done}\n{chaos.ends()}"
            time.sleep(0.05)

    try:
        for number, kind in enumerate(kinds, start=1):
            chaos.hold_back(number / (len(kinds) + 1))
            begun = chaos.steps()
            wait(lambda begun=begun: chaos.steps() != begun or chaos.over, "a step")
            assert not chaos.over, f"the run is over before {kind}, fault {number} of {len(kinds)}\n{chaos.ends()}"
            chaos.happen(kind)
            time.sleep(chaos.chance.uniform(0, pause))
        chaos.hold_back(1.0)
        wait(lambda: chaos.over, "the end")
        for process in (chaos.server, *chaos.clients):
            assert process.wait(max(1.0, end - time.monotonic())) == 0, chaos.ends()
    finally:
        chaos.stop()
    return chaos


def check(chaos: Chaos, quiet: list[tuple[float, float]], differences: tuple[float, float] = LEAST) -> None:
    """Steps and rounds occur once; records, ledger and result agree; scores are as good as in quiet runs."""
    records = chaos.trial.steps()
    result = json.loads((chaos.trial.folder / "run" / "result.json").read_text())
    config = RunConfig.of(read_toml(chaos.trial.folder / "c.toml"))
    assert [r["step"] for r in records] == list(range(result["steps"]))
    rounds = [r["round"] for r in records]
    assert rounds == sorted(rounds)
    assert set(rounds) == set(range(result["rounds"]))
    assert sum(r["samples"] for r in records) == result["samples"]
    assert all(r["samples"] == config.batch * len(r["clients"]) for r in records)
    check_bytes(chaos, records, result)
    for name in ("server", "client-0", "client-1", "client-2"):
        assert "Traceback" not in chaos.trial.log(name), chaos.trial.log(name)[-3000:]
    evaluations = (chaos.trial.folder / "run" / "evaluations.jsonl").read_text().splitlines()
    found = (result["test_score"], json.loads(evaluations[-1])["test_loss"])
    for value, values, least in zip(found, zip(*quiet, strict=True), differences, strict=True):
        noise = max(least, 4 * statistics.stdev(values))
        assert abs(value - statistics.mean(values)) < noise, (value, values)


def check_bytes(chaos: Chaos, records: list[dict[str, Any]], result: dict[str, Any]) -> None:
    """Records and ledger count the same bytes, in each step or up to the last average."""
    averages, batch = chaos.algorithm in AVERAGING, RunConfig.of(read_toml(chaos.trial.folder / "c.toml")).batch
    for way in ("up", "down"):
        counted = [r[f"bytes_{way}"] for r in records]
        assert all(a < b or (averages and a == b) for a, b in itertools.pairwise(counted))
        rows = [r for r in result["bytes"] if r["direction"] == way and r["kind"] != "evaluation"]
        whole = sum(r["wire-unicast"] for r in rows)
        assert whole == result[f"bytes_{way}"]
        assert counted[-1] < whole if averages else counted[-1] == whole
    smashed = 0 if chaos.algorithm == "fl" else sum(len(r["clients"]) for r in records) * batch * 128 * 4
    assert sum(r["wire-unicast"] for r in result["bytes"] if r["kind"] == "smashed data") == smashed


def check_culprit(chaos: Chaos) -> None:
    """Only the hostile client is ever excluded, and from then on it is in no step. A server that was killed soon after
    the exclusion may have to exclude it again.
    """
    excluded = chaos.trial.events("excluded", "garbage")
    assert {event["client"] for event in excluded} == {CULPRIT}
    assert {event["event"] for event in excluded} == {"excluded", "garbage"}
    last = max(event["step"] for event in excluded)
    assert not [r for r in chaos.trial.steps() if r["step"] > last and CULPRIT in r["clients"]]


def quiet_runs(chaos: Chaos, seeds: int = 4) -> list[tuple[float, float]]:
    """Test accuracy and loss of the same training without faults and without the hostile client, from several seeds.
    Faults may not change them by more than the noise between seeds.
    """
    config = read_toml(chaos.trial.folder / "c.toml")
    found = []
    for seed in range(seeds):
        run, hub = remote(RunConfig.of({**config, "seed": seed, "eval_every": config["rounds"]}))
        hub.gone.add(CULPRIT)
        run.run()
        found.append((run.evaluations[-1].test_score, run.evaluations[-1].test_loss))
    return found


@pytest.mark.timeout(300)
def test_one_of_each(tmp_path: Path) -> None:
    chance = random.Random(5)
    kinds = list(Chaos.KINDS)
    chance.shuffle(kinds)
    chaos = run_chaos(tmp_path, "sglr", rounds=150, seed=5, kinds=kinds, pause=0.3, limit=240)
    assert set(chaos.done.values()) == {1}
    assert sum(proxy.flipped for proxy in chaos.proxies) == 1
    check(chaos, quiet_runs(chaos))
    check_culprit(chaos)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("algorithm", [a for a in LIES if a != "sglr"])
def test_some_with_other_algorithms(algorithm: str, tmp_path: Path) -> None:
    """Methods with a travelling model and with averaged models: clients die, connections break, the server dies."""
    kinds = ["kill client", "cut", "kill server"]
    random.Random(algorithm).shuffle(kinds)
    chaos = run_chaos(tmp_path, algorithm, rounds=ROUNDS[algorithm], seed=3, kinds=kinds, pause=0.2, limit=150)
    check(chaos, quiet_runs(chaos, seeds=3), LEAST_OF_FEW)
    check_culprit(chaos)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("algorithm", "seed"), [("sglr", 1), ("sglr", 2), *((a, 1) for a in LIES if a != "sglr")])
def test_many_of_each(algorithm: str, seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    kinds = list(Chaos.KINDS) * (6 if algorithm == "sglr" else 3)
    chance.shuffle(kinds)
    rounds = 16 * ROUNDS[algorithm]
    chaos = run_chaos(tmp_path, algorithm, rounds=rounds, seed=seed, kinds=kinds, pause=2, limit=1500)
    check(chaos, quiet_runs(chaos))
    check_culprit(chaos)
