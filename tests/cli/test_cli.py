"""The command line: what it writes and prints, and that nothing is lost if its process is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import processes
import pytest
from processes import Process
from support import call
from test_resume import assert_same_runs

from cutlayer import Run, RunFolderError, __version__, checkpoint
from cutlayer.files import read_records
from cutlayer.folder import CHECKPOINT, COMPARISON, EVALUATIONS, RESULT, STEPS

CUTLAYER = [sys.executable, "-m", "cutlayer"]
TINY = ["--model", "mlp", "--clients", "3", "--samples-per-client", "20"]
TIMEOUT = 120

# 75 steps between two checkpoints do not fit in a buffer, so records reach the disk before the next checkpoint.
LONG = {"rounds": 75, "checkpoint_every": 25, "eval_every": 25}


def flags(options: dict[str, Any]) -> list[str]:
    return [part for name, value in options.items() for part in ("--" + name.replace("_", "-"), str(value))]


@contextmanager
def started(*argv: str, cwd: Path) -> Iterator[Process]:
    """A running command line, which ends with the test at the latest. Its standard error goes to the file `said`."""
    with (cwd / "said").open("wb") as said:
        process = processes.start(argv, cwd=cwd, stderr=said)
    try:
        yield process
    finally:
        process.kill()
        process.wait(TIMEOUT)


def stopped_when(process: Process, ready: Callable[[], bool]) -> None:
    """Freeze the process as soon as `ready` is true."""
    deadline = time.monotonic() + TIMEOUT
    while not ready():
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)


def between_checkpoints(folder: Path) -> bool:
    """Whether there is a checkpoint, and records after it."""
    if not (folder / CHECKPOINT).exists():
        return False
    return (folder / STEPS).stat().st_size > checkpoint.read(folder / CHECKPOINT)["offsets"][STEPS]


# ---- run ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run, and its output."""
    cwd = tmp_path_factory.mktemp("first")
    return cwd, call("run", *TINY, "--epochs", "2", "--out", "a", cwd=cwd).stdout


def test_run_writes_its_folder(first: tuple[Path, str]) -> None:
    cwd, printed = first
    expected = (
        "config.toml steps.jsonl evaluations.jsonl clients.jsonl algorithm.json classes.json data.json metric.json "
        "engine.json checkpoint.safetensors last.safetensors best.safetensors result.json"
    )
    pictures = ["curves.png", "classes.png", "report.html"]
    assert {p.name for p in (cwd / "a").iterdir()} == {*expected.split(), *pictures, ".lock"}
    result = json.loads((cwd / "a" / RESULT).read_text())
    assert len(list(read_records(cwd / "a" / STEPS))) == result["steps"] == 2 * 3  # 20 samples in batches of 8
    assert len(list(read_records(cwd / "a" / EVALUATIONS))) == result["rounds"] == 2
    counts = json.loads((cwd / "a" / "classes.json").read_text())["counts"]
    assert [sum(row) for row in counts] == [20, 20, 20]
    assert "round 1/2" in printed
    account = json.loads((cwd / "a" / "data.json").read_text("utf-8"))["account"]
    assert account.startswith("digits: 1797 rows (1x8x8) in 10 classes")
    assert printed.startswith(f"Data: {account}\n")
    assert f"{result['test_score']:.2%}" in printed
    assert all(f"a/{name}" in printed for name in pictures)


def test_the_stored_configuration_reproduces_the_run(first: tuple[Path, str]) -> None:
    cwd, _ = first
    call("run", "--config", "a/config.toml", "--out", "b", cwd=cwd)
    assert_same_runs(cwd / "a", cwd / "b")
    assert (cwd / "a" / "config.toml").read_text() == (cwd / "b" / "config.toml").read_text()


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    """Keys have dashes or underscores, optimiser options are numbers, and a folder gets a name if none is given."""
    (tmp_path / "mine.toml").write_text(
        "algorithm = 'psl'\nmodel = 'mlp'\nsamples-per-client = 9\nclients = 3\nepochs = 9\nclient_lr = 0.5\n"
        "batch = 4\nclient-optimizer = 'sgd'\nclient_optimizer_options = {momentum = 0.5, nesterov = true}\n"
    )
    line = "run --config mine.toml --clients 2 --rounds 1 --client-optimizer-options.momentum 0.9"
    call(*line.split(), cwd=tmp_path)
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"psl-digits-\d{8}-\d{6}", folder.name)
    stored = tomllib.loads((folder / "config.toml").read_text())
    assert "epochs" not in stored
    assert {name: stored[name] for name in ("clients", "rounds", "samples_per_client", "client_lr", "batch")} == {
        "clients": 2,
        "rounds": 1,
        "samples_per_client": 9,
        "client_lr": 0.5,
        "batch": 4,
    }
    assert stored["client_optimizer_options"] == {"momentum": 0.9}


# ---- what needs no training -----------------------------------------------------------------------------------------


def test_the_console_script_is_the_module(tmp_path: Path) -> None:
    script = [str(Path(sys.executable).with_name("cutlayer"))]
    for argv in (["--version"], ["list"], ["run", "--alhpa", "1"]):
        a, b = (
            subprocess.run([*how, *argv], cwd=tmp_path, timeout=TIMEOUT, capture_output=True, text=True, check=False)
            for how in (script, CUTLAYER)
        )
        assert (a.returncode, a.stdout, a.stderr) == (b.returncode, b.stdout, b.stderr)
        assert a.returncode == (2 if "--alhpa" in argv else 0)
        if argv == ["--version"]:
            assert a.stdout == f"{__version__}\n"
        if argv == ["list"]:
            assert all(
                name in a.stdout
                for name in ("sglr", "ussl", "fashion-mnist", "resnet16", "hidden2", "npz", "jetson-orin-nano", "lte")
            )
    assert not list(tmp_path.iterdir())


def test_help_answers_at_once(tmp_path: Path) -> None:
    """Every command has help, and no help waits for torch, matplotlib or scikit-learn."""
    code = """
import sys
from cutlayer.cli import main
for command in ([], ["run"], ["compare"], ["resume"], ["report"], ["plan"], ["list"], ["run", "-all"]):
    sys.argv = ["cutlayer", *command[:1], "--help" + "".join(command[1:])]
    try:
        main()
    except SystemExit as end:
        assert end.code == 0, command
heavy = {"torch", "matplotlib", "sklearn", "numpy", "datasets"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, timeout=TIMEOUT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("--algorithms", "--config", "--out", "FOLDER", "Exit codes"):
        assert words in done.stdout
    _, short, whole = done.stdout.split("Usage: cutlayer run")
    flags_of_both = [set(re.findall(r"│ (--[a-z-]+)", text.split("Usage:")[0])) for text in (short, whole)]
    assert len(flags_of_both[0]) <= 18
    assert {"--data", "--model", "--client-lr", "--config"} <= flags_of_both[0] < flags_of_both[1]
    assert {"--alpha", "--up-codec"} <= flags_of_both[1]
    more = re.search(r"--help-all shows (\d+) more options", short)
    assert more is not None
    assert len(flags_of_both[1] - flags_of_both[0]) == int(more[1])
    assert not list(tmp_path.iterdir())


# ---- killed and interrupted -----------------------------------------------------------------------------------------


@pytest.mark.network
def test_killed_between_checkpoints_and_resumed(tmp_path: Path) -> None:
    """After kill -9, the resumed run ends like an uninterrupted run in this process."""
    with started("run", *TINY, *flags(LONG), "--out", "killed", cwd=tmp_path) as process:
        stopped_when(process, lambda: between_checkpoints(tmp_path / "killed"))
        process.kill()
        assert process.wait(TIMEOUT) == -signal.SIGKILL
    killed = tmp_path / "killed"
    assert between_checkpoints(killed)
    assert not (killed / RESULT).exists()
    call("resume", "killed", cwd=tmp_path)
    Run(model="mlp", clients=3, samples_per_client=20, out=tmp_path / "quiet", **LONG).run()
    assert_same_runs(tmp_path / "quiet", killed)
    times = ("seconds", "evaluation_seconds", "steps_per_second", "samples_per_second")
    a, b = (json.loads((tmp_path / name / RESULT).read_text()) for name in ("quiet", "killed"))
    assert {k: v for k, v in a.items() if k not in times} == {k: v for k, v in b.items() if k not in times}
    assert (killed / "report.html").exists()


@pytest.mark.network
def test_interrupted_while_others_look(tmp_path: Path) -> None:
    """Other processes may write the report of a run at work, but not use its folder. Ctrl-C names the next command."""
    folder = tmp_path / "run"
    with started("run", *TINY, "--algorithm", "psl", *flags(LONG), "--out", "run", cwd=tmp_path) as process:
        stopped_when(process, lambda: between_checkpoints(folder))
        try:
            before = {p.name: p.read_bytes() for p in folder.iterdir()}
            refused = call("run", *TINY, "--out", "run", cwd=tmp_path, code=75)
            assert re.fullmatch(rf"error: 'run' is in use by process {process.pid}: wait .*--out\n", refused.stderr)
            with pytest.raises(RunFolderError, match=f"in use by process {process.pid}"):
                Run.resume(folder).run()
            assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
            call("report", "run", cwd=tmp_path)
            assert {p.name for p in folder.iterdir()} == {*before, "curves.png", "classes.png", "report.html"}
        finally:
            process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT) == 130
    assert (tmp_path / "said").read_text() == "error: interrupted; continue with: cutlayer resume run\n"
    call("resume", "run", "--clients", "3", cwd=tmp_path)
    assert json.loads((folder / RESULT).read_text())["rounds"] == LONG["rounds"]
    steps = [record["step"] for record in read_records(folder / STEPS)]
    assert steps == list(range(3 * LONG["rounds"]))


@pytest.mark.network
def test_comparison_and_the_same_killed_and_resumed(tmp_path: Path) -> None:
    """Killed in the third of four runs: the first two stay as they are, and the results are the same."""
    line = ["compare", *TINY, "--algorithms", "psl", "sglr", "--seeds", "0", "1", *flags(LONG)]
    printed = call(*line, "--out", "quiet", cwd=tmp_path).stdout
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    stored = json.loads((quiet / COMPARISON).read_text())["rows"]
    assert [(row["entry"], row["seeds"]) for row in stored] == [("psl", [0, 1]), ("sglr", [0, 1])]
    for row in stored:
        shown = f"{100 * row['score_mean']:.2f} ± {100 * row['score_std']:.2f}"
        assert any(row["title"] in text and shown in text for text in printed.splitlines())
    pictures = ["curves.png", "classes.png", "report.html"]
    assert {p.name for p in quiet.iterdir()} == {"psl", "sglr", "config.toml", COMPARISON, ".lock", *pictures}
    with started(*line, "--out", "killed", cwd=tmp_path) as process:
        stopped_when(process, lambda: between_checkpoints(killed / "psl" / "seed-1"))
        process.kill()
    done = [killed / entry / "seed-0" / RESULT for entry in ("psl", "sglr")]
    before = [path.read_bytes() for path in done]
    assert not (killed / COMPARISON).exists()
    call("resume", "killed", cwd=tmp_path)
    assert [path.read_bytes() for path in done] == before
    for entry in ("psl", "sglr"):
        for seed in (0, 1):
            assert_same_runs(quiet / entry / f"seed-{seed}", killed / entry / f"seed-{seed}")
    times = {"seconds", "steps_per_second", "samples_per_second"}
    again = json.loads((killed / COMPARISON).read_text())["rows"]
    assert [{k: v for k, v in row.items() if k not in times} for row in again] == [
        {k: v for k, v in row.items() if k not in times} for row in stored
    ]


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    refused = call("run", *TINY, "--out", "mine", cwd=tmp_path, code=2)
    assert refused.stderr == "error: 'mine' already holds files: choose another --out\n"
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_a_training_that_fails_says_where(tmp_path: Path) -> None:
    """With too high learning rates: exit code 1, the step and the clients, and no traceback."""
    failed = call(
        "run", *TINY, "--epochs", "9", "--client-optimizer", "sgd", "--client-lr", "1e9", cwd=tmp_path, code=1
    )
    assert re.search(r"NaN or Inf at step \d+: try lower rates", failed.stderr)
    assert failed.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["runs"]
