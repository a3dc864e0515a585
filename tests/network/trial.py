"""A server and three clients as separate processes over TLS, for the tests of the network."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes

from cutlayer import Run
from cutlayer.options import RunConfig, read_toml
from cutlayer.remote.certs import make_ca, make_certificate

PATHS = [Path(__file__).parents[1] / "hostile"]  # programs that are not part of Cutlayer
PATIENCE = 100.0  # seconds for any one thing
CONFIG = """algorithm = "{algorithm}"
data = "digits"
model = "mlp"
clients = 3
samples_per_client = 60
rounds = {rounds}
batch = 10
"""


class Trial:
    """A folder with certificates and a configuration, and the processes started in it.

    `config`: the run's configuration as TOML. `clients`: how many clients have a certificate. `host`: the server's
    address, this machine by default. `space`: the network namespace of a process, by the process's name. `forked`:
    whether to fork the processes, which is quick; otherwise each starts its own Python.
    """

    def __init__(
        self,
        folder: Path,
        algorithm: str,
        rounds: int,
        *,
        config: str = CONFIG,
        clients: int = 3,
        host: str = "127.0.0.1",
        space: Callable[[str], str | None] = lambda name: None,
        forked: bool = True,
    ) -> None:
        self.folder, self.space, self.forked = folder, space, forked
        folder.mkdir(exist_ok=True)
        (folder / "c.toml").write_text(config.format(algorithm=algorithm, rounds=rounds))
        make_ca(folder / "ca")
        make_certificate(folder / "ca", "server", "server", hosts=[host])
        for k in range(clients):
            make_certificate(folder / "ca", f"client-{k}")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = self.reached = f"{host}:{probe.getsockname()[1]}"
        self.processes: list[Any] = []

    def start(self, name: str, *words: str) -> Any:
        """Start a process that runs `cutlayer WORDS` with the configuration."""
        argv = [*words, "--config", "c.toml"]
        with (self.folder / f"{name}.log").open("ab") as log:
            if self.forked:
                process = processes.start(argv, cwd=self.folder, stdout=log, stderr=log, namespace=self.space(name))
            else:
                process = subprocess.Popen(
                    [sys.executable, "-m", "cutlayer", *argv], cwd=self.folder, stdout=log, stderr=log
                )
        self.processes.append(process)
        return process

    def serve(self, *more: str) -> Any:
        tls = ["--certificate", "ca/server.crt", "--key", "ca/server.key", "--ca", "ca/ca.crt"]
        return self.start("server", "serve", "--listen", self.address, *tls, "--out", "run", *more)

    def join(self, k: int, *more: str) -> Any:
        tls = ["--certificate", f"ca/client-{k}.crt", "--key", f"ca/client-{k}.key", "--ca", "ca/ca.crt"]
        return self.start(f"client-{k}", "join", self.reached, "--client", f"client-{k}", *tls, *more, "--folder", "c")

    def attack(self, *words: str, name: str = "hostile") -> Any:
        """Start a hostile client with its own certificate: the program `hostile_clients` with these words."""
        with (self.folder / f"{name}.log").open("ab") as log, (self.folder / f"{name}.out").open("ab") as out:
            argv = [self.address, "c.toml", "ca", *words]
            process = processes.start(
                argv, cwd=self.folder, stdout=out, stderr=log, path=PATHS, program="hostile_clients"
            )
        self.processes.append(process)
        return process

    def events(self, *happened: str) -> list[dict[str, Any]]:
        """Events of these kinds from the server's record, in order, or all events if no kind is given."""
        path = self.folder / "run" / "events.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        found = [json.loads(line) for line in lines if line.endswith("\n")]
        return [event for event in found if not happened or event["event"] in happened]

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


def until(condition: Callable[[], bool], what: str, trial: Trial) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"{what}\n{trial.log('server')[-3000:]}"
        time.sleep(0.05)


def finished(trial: Trial, *ended: Any) -> None:
    for process in ended:
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
    assert result["test_score"] == local.result.test_score
    assert result["bytes"] == local.result.bytes
