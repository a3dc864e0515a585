"""Server and clients as processes of their own, over TLS on this machine: the simulation's numbers, faults included."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cutlayer import Run
from cutlayer.options import RunConfig, read_toml
from cutlayer.remote.certs import make_ca, make_certificate

CUTLAYER = [sys.executable, "-m", "cutlayer"]
PATIENCE = 100.0  # seconds for anything here
CONFIG = """algorithm = "{algorithm}"
data = "digits"
model = "mlp"
clients = 3
samples_per_client = 60
rounds = {rounds}
batch = 10
"""


class Trial:
    """A folder with certificates and a configuration, and the processes started in it. `config`: the run's, as TOML;
    `host`: the server's, this machine unless told; `where`: words to put before a process's own, by its name.
    """

    def __init__(
        self,
        folder: Path,
        algorithm: str,
        rounds: int,
        *,
        config: str = CONFIG,
        host: str = "127.0.0.1",
        where: Callable[[str], list[str]] = lambda name: [],
    ) -> None:
        self.folder, self.where = folder, where
        folder.mkdir(exist_ok=True)
        (folder / "c.toml").write_text(config.format(algorithm=algorithm, rounds=rounds))
        make_ca(folder / "ca")
        make_certificate(folder / "ca", "server", "server", hosts=[host])
        for k in range(3):
            make_certificate(folder / "ca", f"client-{k}")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = self.reached = f"{host}:{probe.getsockname()[1]}"
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, *words: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [*self.where(name), *CUTLAYER, *words, "--config", "c.toml"],
                cwd=self.folder,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self.processes.append(process)
        return process

    def serve(self, *more: str) -> subprocess.Popen[bytes]:
        tls = ["--certificate", "ca/server.crt", "--key", "ca/server.key", "--ca", "ca/ca.crt"]
        return self.start("server", "serve", "--listen", self.address, *tls, "--out", "run", *more)

    def join(self, k: int, *more: str) -> subprocess.Popen[bytes]:
        tls = ["--certificate", f"ca/client-{k}.crt", "--key", f"ca/client-{k}.key", "--ca", "ca/ca.crt"]
        return self.start(f"client-{k}", "join", self.reached, "--client", f"client-{k}", *tls, *more, "--folder", "c")

    def steps(self) -> list[dict[str, Any]]:
        path = self.folder / "run" / "steps.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def stop(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()


@pytest.fixture
def trial(tmp_path: Path) -> Iterator[Callable[..., Trial]]:
    made: list[Trial] = []

    def make(algorithm: str, rounds: int = 3) -> Trial:
        made.append(Trial(tmp_path, algorithm, rounds))
        return made[-1]

    yield make
    for one in made:
        one.stop()


def until(condition: Callable[[], bool], what: str, trial: Trial) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"{what}\n{trial.log('server')[-3000:]}"
        time.sleep(0.05)


def finished(trial: Trial, *processes: subprocess.Popen[bytes]) -> None:
    for process in processes:
        assert process.wait(PATIENCE) == 0, trial.log("server")[-3000:]


def same_as_local(trial: Trial) -> None:
    config = RunConfig.of({**read_toml(trial.folder / "c.toml"), "engine": "local"})
    local = Run(config)
    records = list(local)
    remote = trial.steps()
    assert [r["loss"] for r in remote] == [r.loss for r in records]
    assert [(r["bytes_up"], r["bytes_down"]) for r in remote] == [(r.bytes_up, r.bytes_down) for r in records]
    result = json.loads((trial.folder / "run" / "result.json").read_text())
    assert local.result is not None
    assert result["test_accuracy"] == local.result.test_accuracy
    assert result["bytes"] == local.result.bytes


@pytest.mark.parametrize("algorithm", ["sglr", "fl"])
def test_processes_over_tls_give_the_simulations_numbers(algorithm: str, trial: Callable[..., Trial]) -> None:
    t = trial(algorithm)
    finished(t, t.serve(), *(t.join(k) for k in range(3)))
    same_as_local(t)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_server_ends_and_comes_back(how: signal.Signals, trial: Callable[..., Trial]) -> None:
    """Killed or stopped: clients go back to the round of its checkpoint; the end is that of a run without any fault."""
    t = trial("sglr", rounds=60)
    server = t.serve()
    clients = [t.join(k) for k in range(3)]
    until(lambda: len(t.steps()) > 40, "forty steps", t)
    server.send_signal(how)
    server.wait(PATIENCE)
    assert all(client.poll() is None for client in clients)
    finished(t, t.serve(), *clients)
    same_as_local(t)


def test_a_client_is_killed_and_comes_back(trial: Callable[..., Trial]) -> None:
    """The others go on without it; it takes part again, as a new process with the state that it kept."""
    t = trial("sglr", rounds=150)
    server = t.serve("--deadline", "20", "--quorum", "0.6")
    clients = [t.join(k) for k in range(3)]
    until(lambda: len(t.steps()) > 20, "twenty steps", t)
    clients[1].kill()
    clients[1].wait()
    until(lambda: any(r["clients"] == [0, 2] for r in t.steps()), "a step without the client that is gone", t)
    clients[1] = t.join(1)
    lonely = max(r["step"] for r in t.steps() if r["clients"] == [0, 2])
    until(lambda: any(r["clients"] == [0, 1, 2] and r["step"] > lonely for r in t.steps()), "a step with all again", t)
    finished(t, server, *clients)
    assert [r["step"] for r in t.steps()] == list(range(900))


def test_wrong_hands(trial: Callable[..., Trial]) -> None:
    """Another's certificate, another authority's, no encryption, another configuration: refused with a reason."""
    t = trial("sglr")
    server = t.serve()
    until(lambda: "listening" in t.log("server"), "listening", t)
    make_ca(t.folder / "rogue")
    make_certificate(t.folder / "rogue", "client-0")
    tls = ["--ca", "ca/ca.crt"]
    (t.folder / "other.toml").write_text(CONFIG.format(algorithm="psl", rounds=3).replace("batch = 10", "batch = 5"))
    attempts = {
        "another": (["--certificate", "ca/client-1.crt", "--key", "ca/client-1.key", *tls], "made for 'client-1'"),
        "rogue": (["--certificate", "rogue/client-0.crt", "--key", "rogue/client-0.key", *tls], "certificate"),
        "plain": (["--insecure"], "TLS"),
    }
    for name, (words, said) in attempts.items():
        process = t.start(name, "join", t.address, "--client", "client-0", *words, "--give-up-after", "5")
        assert process.wait(PATIENCE) != 0
        assert said in t.log(name), t.log(name)
        assert "Traceback" not in t.log(name)
    own = ["--certificate", "ca/client-0.crt", "--key", "ca/client-0.key", *tls]
    process = subprocess.run(
        [*CUTLAYER, "join", t.address, "--client", "client-0", *own, "--config", "other.toml"],
        cwd=t.folder, capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert process.returncode == 2
    assert "'psl'" in process.stderr or "psl" in process.stderr
    assert server.poll() is None
    server.send_signal(signal.SIGTERM)
    assert server.wait(PATIENCE) == 130


def test_a_clients_folder_is_held_while_it_works(trial: Callable[..., Trial]) -> None:
    t = trial("sglr")
    first = t.join(0)  # there is no server: it dials again and again
    until(lambda: "dialling again" in t.log("client-0"), "dialling", t)
    second = t.join(0)
    assert second.wait(PATIENCE) == 2
    assert first.poll() is None
    assert "in use by process" in t.log("client-0").replace("\n", " "), t.log("client-0")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("serve", "connections are encrypted"),
        ("serve --insecure --listen 0.0.0.0:0", "without TLS"),
        ("serve --insecure --quorum 2", "quorum = 2 is not possible"),
        ("serve --insecure --algorithm cl", "cl has no clients"),
        ("serve --ca ca.crt", "certificate"),
        ("serve --insecure --keepalive 0.5", "keepalive = 0.5"),
        ("join localhost:1 --client hospital --insecure", "client-0, client-1"),
        ("join localhost --client client-0 --insecure", "host:port"),
        ("join localhost:1 --client client-99 --insecure", "none of the"),
        ("join localhost:1 --client client-0 --insecure --keepalive nan", "keepalive = nan"),
        ("certs there --clients -1", "0 or greater"),
    ],
)
def test_wrong_words(words: str, said: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [*CUTLAYER, *words.split()], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 2, done.stderr
    assert said in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr


def test_tokens_that_were_made_let_clients_in(trial: Callable[..., Trial]) -> None:
    """`cutlayer certs --tokens`: the server has hashes, each client its token; whoever shows another's is refused."""
    t = trial("psl", 2)
    made = subprocess.run(
        [*CUTLAYER, "certs", "tk", "--clients", "3", "--tokens"],
        cwd=t.folder,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (t.folder / "tk" / "client-2.token").stat().st_mode & 0o077 == 0
    token = (t.folder / "tk" / "client-0.token").read_text().strip()
    assert token not in (t.folder / "tk" / "tokens.toml").read_text()
    assert "tk/tokens.toml" in made.stdout
    tls = ["--certificate", "tk/server.crt", "--key", "tk/server.key", "--tokens", "tk/tokens.toml"]
    server = t.start("server", "serve", "--listen", t.address, *tls, "--out", "run", "--message-limit", "10")

    def join(k: int, whose: int) -> subprocess.Popen[bytes]:
        shows = ["--ca", "tk/ca.crt", "--token-file", f"tk/client-{whose}.token", "--message-limit", "10"]
        return t.start(f"client-{k}", "join", t.reached, "--client", f"client-{k}", *shows)

    wrong = join(0, 1)
    assert wrong.wait(PATIENCE) == 2
    assert "there is no client 'client-0' with this token" in t.log("client-0")
    finished(t, *[join(k, k) for k in range(3)], server)
    assert token not in t.log("server") + t.log("client-0")


def test_a_dead_client_does_not_hold_up_a_server_that_restarts(trial: Callable[..., Trial]) -> None:
    """It had gone on without the client before: once it is back it waits for all, but not for ever."""
    t = trial("sglr", rounds=40)
    server = t.serve()
    clients = [t.join(k) for k in range(3)]
    until(lambda: len(t.steps()) > 20, "twenty steps", t)
    clients[2].kill()
    until(lambda: bool(t.steps()) and t.steps()[-1]["clients"] == [0, 1], "steps without it", t)
    server.kill()
    server.wait(PATIENCE)
    finished(t, t.serve("--patience", "20"), *clients[:2])
    assert t.steps()[-1]["clients"] == [0, 1]
