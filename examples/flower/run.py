"""A federation on this machine: one SuperLink, three SuperNodes and one run. Prints a table and stops everything.

    python run.py [--run-config "rounds=9"] [--folder FOLDER] [--nodes 3] [--timeout 300]

All processes listen on loopback at free ports and write their files to FOLDER (a new folder by default). Flower's
telemetry and its check for updates are disabled. The exit status is 0 if the run has completed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import tomli_w
from rich.console import Console
from rich.table import Table

APP = Path(__file__).parent
LOOPBACK = "127.0.0.1"
BIN = Path(sys.executable).parent
out = Console()


class Federation:
    """The processes of a federation. A context manager, which stops them at its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        (self.folder / "flwr").mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.processes: list[subprocess.Popen[bytes]] = []
        self.environment = {
            **os.environ,
            "FLWR_HOME": str(self.folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
        }

    def __enter__(self) -> Federation:
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self.processes):
            process.terminate()
        for process in reversed(self.processes):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        # An app would try forever to reach a node that is gone, so it is killed after some time to clean up.
        end = time.monotonic() + 15
        while any(map(group_lives, self.processes)) and time.monotonic() < end:
            time.sleep(0.2)
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        """Starts a process in the folder, with its output in `name`.log."""
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [BIN / command[0], *command[1:]],
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,  # includes all processes that it starts
            )
        self.processes.append(process)
        return process

    def superlink(self, until: float) -> None:
        """Starts the SuperLink, waits until it answers, and registers it in `flwr`'s configuration as "local"."""
        command = ("flower-superlink", "--insecure", "--disable-runtime-dependency-installation")
        process = self.start("superlink", *command, "--host", LOOPBACK, "--port", str(self.port))
        while not answers(f"http://{LOOPBACK}:{self.port}/health"):
            if process.poll() is not None or time.monotonic() > until:
                sys.exit(f"the SuperLink did not start:\n{(self.folder / 'superlink.log').read_text()}")
            time.sleep(0.2)
        link = {"local": {"address": f"{LOOPBACK}:{self.port}", "insecure": True}, "default": "local"}
        (self.folder / "flwr" / "config.toml").write_text(tomli_w.dumps({"superlink": link}))

    def supernode(self, number: int, config: str = "") -> None:
        """Starts a SuperNode with this `--node-config`. Its log includes the app that it runs."""
        where = ("--superlink", f"{LOOPBACK}:{self.port}", "--host", LOOPBACK, "--port", str(free_port()))
        own = ("--node-config", config) if config else ()
        self.start(f"supernode-{number}", "flower-supernode", "--insecure", *where, *own)

    def flwr(self, *words: str, until: float, quiet: bool = False) -> str:
        """Runs a `flwr` command until it ends. Returns its output if `quiet`."""
        process = subprocess.Popen(
            [BIN / "flwr", *words],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE if quiet else None,
            text=True,
        )
        try:
            said, _ = process.communicate(timeout=max(1.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            sys.exit(f"flwr {words[0]} has not ended in time: see the logs in {self.folder}")
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            sys.exit(f"flwr {words[0]} has failed")
        return said or ""


def main() -> None:
    """Starts the federation, runs the app, shows the result, and stops everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-config", action="append", default=[], help="options over those in pyproject.toml")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for everything")
    words = parser.parse_args()
    folder = (words.folder or Path(tempfile.mkdtemp(prefix="cutlayer-flower-"))).resolve()
    until = time.monotonic() + words.timeout
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops everything, like Ctrl-C
    with Federation(folder) as federation:
        federation.superlink(until)
        for number in range(words.nodes):
            federation.supernode(number)
        options = ["--run-config", f'serve.out="{folder / "run"}"']
        for given in words.run_config:
            options += ["--run-config", given]
        federation.flwr("run", str(APP), "local", "--stream", *options, until=until)
        (run,) = json.loads(federation.flwr("list", "local", "--format", "json", until=until, quiet=True))["runs"]
    out.print(f"all logs are in {folder}", soft_wrap=True)
    if run["status"] != "finished:completed":
        sys.exit(f"the run has ended as {run['status']}: {run['status-details']}")
    show(folder / "run")


def show(folder: Path) -> None:
    """Prints the result and a line for each client."""
    result = json.loads((folder / "result.json").read_text())
    clients = json.loads((folder / "clients.json").read_text())
    table = Table(title=f"{result['algorithm']}: test accuracy {result['test_score']:.2%} in {result['steps']} steps")
    for name in ("client", "node", "samples", "kB up", "kB down", "end"):
        table.add_column(name, justify="left" if name in ("client", "end") else "right")
    for c in clients:
        sizes = (f"{c['bytes_up'] / 1000:.1f}", f"{c['bytes_down'] / 1000:.1f}")
        table.add_row(c["client"], c["node"], str(c["samples"]), *sizes, c["reason"])
    (out if out.is_terminal else Console(width=120)).print(table)
    out.print(f"the run's folder: {folder}", soft_wrap=True)


def group_lives(process: subprocess.Popen[bytes]) -> bool:
    """Whether processes that `process` has started still exist."""
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def free_port() -> int:
    """A free port on loopback."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def answers(url: str) -> bool:
    """Whether a server answers there with status 200."""
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted: everything was stopped")
