"""An algorithm in its own package, installed or named by its file, works in every command like a built-in one."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
from support import ROOT

import cutlayer
from cutlayer import Run, RunConfig, plugins
from cutlayer.files import read_json, read_records
from cutlayer.folder import ALGORITHM, CHECKPOINT, COMPARISON, RESULT, STEPS
from cutlayer.report.collect import read
from cutlayer.report.curves import _looks

pytestmark = pytest.mark.long  # starts processes, and pip, which installs the example
PACKAGE = ROOT / "examples" / "own_algorithm"
FILE = f"{PACKAGE / 'echopsl.py'}:EchoPsl"
NAME, TITLE, COLOUR = "echopsl", "EchoPSL", "#8c564b"
OPTIONS: dict[str, Any] = {
    "model": "mlp", "clients": 3, "samples_per_client": 20, "batch": 5, "test": 40, "rounds": 2, "memory": 2,
}  # fmt: skip
PATIENCE = 100.0


def flags(**options: Any) -> list[str]:
    return [word for k, v in {**OPTIONS, **options}.items() for word in (f"--{k.replace('_', '-')}", str(v))]


FLAGS = flags()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the package is installed. pip writes next to sources, so it installs from a copy."""
    place = tmp_path_factory.mktemp("package")
    shutil.copytree(PACKAGE, place / "sources")
    how = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    pip = [sys.executable, "-m", "pip", "install", *how, "--target", str(place / "installed")]
    subprocess.run([*pip, str(place / "sources")], check=True, timeout=PATIENCE)
    return place / "installed"


Command = Callable[..., str]


@pytest.fixture
def command(installed: Path, tmp_path: Path) -> Iterator[Command]:
    """Runs `cutlayer WORDS` in a process that has the package, and returns its output. `start` does not wait."""
    started: list[processes.Process] = []

    def start(name: str, *words: str) -> processes.Process:
        with (tmp_path / f"{name}.log").open("wb") as log:
            process = processes.start(words, cwd=tmp_path, stdout=log, stderr=log, path=[installed])
        started.append(process)
        return process

    def run(*words: str, code: int = 0) -> str:
        process = start("command", *words)
        ended = process.wait(PATIENCE)
        said = (tmp_path / "command.log").read_text()
        assert ended == code, said
        return said

    run.start = start  # type: ignore[attr-defined]
    yield run
    for process in started:
        process.kill()


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_records(folder / STEPS)]


def expected(**options: Any) -> list[float]:
    """The losses of the same run in this process, with the algorithm named by its file."""
    return [record.loss for record in Run(RunConfig.of({**OPTIONS, "algorithm": FILE, **options}))]


def test_nothing_knows_its_name() -> None:
    files = [path for path in Path(cutlayer.__file__).parent.rglob("*") if path.suffix in (".py", ".json", ".j2")]
    assert len(files) > 100
    assert not [path for path in files if re.search(r"\becho(psl)?\b", path.read_text().lower())]
    assert NAME not in plugins.names("algorithm")


def test_it_is_listed(installed: Path) -> None:
    """Python has the package on its path from the start."""
    paths = os.pathsep.join([str(Path(cutlayer.__file__).parents[1]), str(installed)])
    done = subprocess.run(
        [sys.executable, "-m", "cutlayer", "list", "algorithms"],
        env={**os.environ, "PYTHONPATH": paths, "COLUMNS": "300"},
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE,
    )
    (row,) = [line for line in done.stdout.splitlines() if NAME in line]
    assert all(word in row for word in (TITLE, "memory, echoes", "arXiv 1811.11682"))


def test_it_runs_on_both_engines(command: Command, tmp_path: Path) -> None:
    for engine in ("local", "stacked"):
        command("run", "--algorithm", NAME, *FLAGS, "--engine", engine, "--precision", "float64", "--out", engine)
        assert losses(tmp_path / engine) == pytest.approx(expected(precision="float64"), rel=1e-9)
        result = read_json(tmp_path / engine / RESULT)
        assert result is not None
        assert (result["algorithm"], result["engine"]) == (NAME, engine)


def test_it_is_compared(command: Command, tmp_path: Path) -> None:
    """In both engines, bytes are those of PSL and the server computes twice as much. Title and colour are its own."""
    for engine in ("local", "stacked"):
        words = ["--algorithms", "psl", NAME, "--seeds", "0", *FLAGS, "--engine", engine, "--out", engine]
        said = command("compare", *words)
        psl, echo = (read_json(tmp_path / engine / COMPARISON) or {})["rows"]
        assert f"│ {TITLE} │" in said
        assert (echo["entry"], echo["title"]) == (NAME, TITLE)
        assert all(echo[cost] == psl[cost] for cost in ("bytes_up", "bytes_down", "client_flops"))
        assert echo["server_flops"] == 2 * psl["server_flops"]
    page = (tmp_path / "local" / "report.html").read_text()
    assert page.count(TITLE) > 3
    assert "<strong>EchoPSL</strong>: PSL whose server trains" in page
    assert (read_json(tmp_path / "local" / NAME / "seed-0" / ALGORITHM) or {})["colour"] == COLOUR
    looks = {entry.name: look for entry, _, look, _ in _looks(read(tmp_path / "local"))}
    assert looks[NAME] == (COLOUR, "-")
    assert looks["psl"] != looks[NAME]
    command("report", "local")
    assert TITLE in (tmp_path / "local" / "report.html").read_text()


def test_it_is_planned(command: Command) -> None:
    machines = ["--client-device", "raspberry-pi-4", "--server-device", "h100", "--link", "lte"]
    words = ["plan", "--algorithms", "psl", NAME, "--clients", "4", *machines]
    psl, echo = json.loads(command(*words, "--json"))["algorithms"]
    assert echo["algorithm"] == NAME
    assert echo["server_flops"] == 2 * psl["server_flops"]
    assert echo["seconds"] > psl["seconds"]
    assert TITLE in command(*words)
    file = [FILE if word == NAME else word for word in words]
    assert TITLE in command(*file, "--out", "plan")


def test_the_plan_is_what_a_run_counts() -> None:
    """Including virtual time, FLOPs and the server's energy."""
    machines = {"client_device": "raspberry-pi-4", "server_device": "h100", "link": "lte"}
    run = Run(RunConfig.of({**OPTIONS, "algorithm": FILE, **machines}))
    result = run.run()
    t = run.training
    assert t.clock is not None
    from cutlayer.costs.expect import Workload, expect

    stated = expect(t.algorithm, Workload(**vars(t.epoch), flops=t.flops, epochs=2), t.clock.fleet)
    assert (stated.up, stated.down) == (result.bytes_up, result.bytes_down)
    assert stated.server_flops == result.server_flops
    assert stated.seconds == pytest.approx(result.virtual_seconds, rel=1e-9)
    assert stated.server_joules == pytest.approx(result.server_joules, rel=1e-9)


def test_it_is_deployed(command: Any, tmp_path: Path) -> None:
    """The server has the package installed and clients name the file. The losses are those of the simulation."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    common = [*FLAGS, "--insecure"]
    server = command.start("server", "serve", "--algorithm", NAME, *common, "--listen", address, "--out", "run")
    who = ["--client", "client-0", "client-1", "client-2"]
    clients = command.start("clients", "join", address, "--algorithm", FILE, *common, *who)
    for process in (clients, server):
        assert process.wait(PATIENCE) == 0, "".join((tmp_path / f"{n}.log").read_text() for n in ("server", "clients"))
    assert losses(tmp_path / "run") == expected(engine="local")


def test_it_is_resumed(command: Any, tmp_path: Path) -> None:
    """Interrupted by Ctrl-C after the first checkpoint."""
    more = {"rounds": 60, "eval_every": 60, "checkpoint_every": 2}
    process = command.start("run", "run", "--algorithm", NAME, *flags(**more), "--out", "run")
    end = time.monotonic() + PATIENCE
    while not (tmp_path / "run" / CHECKPOINT).exists():
        assert time.monotonic() < end, (tmp_path / "run.log").read_text()
        assert process.poll() is None, (tmp_path / "run.log").read_text()
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 130
    assert not (tmp_path / "run" / RESULT).exists()
    command("resume", "run")
    assert losses(tmp_path / "run") == expected(**more)


def test_its_file_can_be_named(command: Command, tmp_path: Path) -> None:
    """Without installation, on the command line and in a file. Folders are named after the algorithm, not its path."""
    said = command("run", "--algorithm", FILE, *FLAGS)
    (made,) = (tmp_path / "runs").iterdir()
    assert made.name.startswith("EchoPsl-digits-")
    assert "EchoPsl: round 2/2" in said
    assert losses(made) == expected()
    (tmp_path / "c.toml").write_text(f'algorithms = ["psl", "{FILE}"]\nseeds = [0]\nmemory = 2\n')
    command("compare", "--config", "c.toml", *FLAGS[:-2], "--out", "c")
    assert [row["title"] for row in (read_json(tmp_path / "c" / COMPARISON) or {})["rows"]] == ["PSL", TITLE]
    assert losses(tmp_path / "c" / "EchoPsl" / "seed-0") == expected()
    looks = {entry.name: look for entry, _, look, _ in _looks(read(tmp_path / "c"))}
    assert looks["EchoPsl"] == (COLOUR, "-")


def test_its_options_are_checked(command: Command) -> None:
    words = ["run", "--algorithm", NAME, "--model", "mlp"]
    assert "memory = 0" in command(*words, "--memory", "0", code=2)
    assert "phi = 0.5 has no effect on echopsl" in command(*words, "--phi", "0.5", code=2)
    assert "memory" in command("run", "--algorithm", "psl", "--memory", "3", code=2)


def test_options_of_an_installed_package_have_owners(command: Command) -> None:
    """Also if the algorithm is not chosen."""
    said = command("run", "--memory", "2", code=2)
    assert f"--memory has no effect here: it belongs to {NAME}; leave it out or choose" in said
    tail = command("run", "--algorithm", "fl", "--server-lr", "0.1", code=2)
    assert NAME in tail
    assert "server_lr = 0.1 has no effect on fl: it belongs to " in tail
