"""`torchrun` starts ranks. One of them is killed or hangs: the others end with an error, and the run can be resumed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cutlayer import Run
from cutlayer.files import read_json

PATIENCE = 100.0
NOTICED = 20.0
"""Seconds in which the ranks end after one of them was killed."""
LONG = [
    "--algorithm",
    "sglr",
    "--model",
    "mlp",
    "--clients",
    "5",
    "--rounds",
    "15",
    "--checkpoint-every",
    "1",
    "--alpha",
    "0.5",
    "--tune",
    "off",
]
PATIENT = 10
"""Seconds that ranks wait for one that hangs."""
pytestmark = [pytest.mark.network, pytest.mark.timeout(300)]


@contextmanager
def torchrun(folder: Path, ranks: int, *argv: str) -> Iterator[subprocess.Popen[str]]:
    """Run `torchrun -m cutlayer ARGV`, and kill it at the end."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    paths = os.pathsep.join(path for path in sys.path if path)
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "400", "PYTHONPATH": paths}
    started = subprocess.Popen([*launcher, "-m", "cutlayer", *argv], cwd=folder, env=environ, **pipes)
    try:
        yield started
    finally:
        for rank in rank_ids(started):
            os.kill(rank, signal.SIGKILL)
        started.kill()
        started.wait()


def rank_ids(launcher: subprocess.Popen[str]) -> list[int]:
    """The ranks' processes, in the order of ranks."""
    path = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    children = path.read_text(encoding="utf-8").split() if path.exists() else []
    return sorted(map(int, children), key=rank_of)


def rank_of(process: int) -> int:
    found = re.search(rb"\0RANK=(\d+)", Path(f"/proc/{process}/environ").read_bytes())
    return int(found.group(1)) if found else -1


def said(output: str) -> str:
    """Cutlayer's output as one line."""
    return " ".join(output.split())


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, "it does not train"
        time.sleep(0.05)


def until_it_trains(folder: Path) -> None:
    until((folder / "checkpoint.safetensors").exists)


def records(folder: Path) -> Sequence[str]:
    return (folder / "steps.jsonl").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank(victim: int, tmp_path: Path) -> None:
    with torchrun(tmp_path, 2, "run", *LONG, "--out", "it") as started:
        until_it_trains(tmp_path / "it")
        os.kill(rank_ids(started)[victim], signal.SIGKILL)
        killed = time.monotonic()
        output, _ = started.communicate(timeout=PATIENCE)
        assert time.monotonic() < killed + NOTICED
        assert started.returncode != 0
    assert f"error: rank {1 - victim} of 2" in said(output), output[-3000:]
    assert "start the ranks again, with any number of them: cutlayer resume it" in said(output)

    with torchrun(tmp_path, 3, "resume", "it") as again:
        output, _ = again.communicate(timeout=PATIENCE)
        assert again.returncode == 0, output[-3000:]
    result = read_json(tmp_path / "it" / "result.json")
    assert result is not None
    assert result["rounds"] == 15
    assert result["steps"] == len(records(tmp_path / "it"))


def test_a_hung_rank(tmp_path: Path) -> None:
    """Rank 0 waits for a rank that pauses, and names a rank that hangs. The resumed run ends as if nothing happened."""
    exact = [*LONG, "--precision", "float64"]
    with torchrun(tmp_path, 2, "run", *exact, "--out", "it", "--rank-timeout", str(PATIENT)) as started:
        until_it_trains(tmp_path / "it")
        victim = rank_ids(started)[1]
        os.kill(victim, signal.SIGSTOP)
        time.sleep(PATIENT / 3)  # long enough that the other rank notices the missing sign of life
        trained = len(records(tmp_path / "it"))
        os.kill(victim, signal.SIGCONT)
        until(lambda: len(records(tmp_path / "it")) > trained)
        os.kill(victim, signal.SIGSTOP)
        stopped = time.monotonic()
        output = ""
        assert started.stdout is not None
        while "closing signal" not in output:  # until torchrun has seen that rank 0 has ended
            assert time.monotonic() < stopped + 30, output[-3000:]
            output += started.stdout.readline()
        os.kill(victim, signal.SIGKILL)  # otherwise torchrun asks it to end, and waits for half a minute
        rest, _ = started.communicate(timeout=PATIENCE)
    sentence = f"error: rank 0 of 2 has had no answer from rank 1 for {PATIENT} seconds (a process that hangs, or a "
    assert sentence in said(output)
    assert "end what is left of all ranks, and start them again, with any number of them: cutlayer resume it" in said(
        output
    )
    assert re.search(r"exitcode *: 75 \(pid", rest), rest[-3000:]

    with torchrun(tmp_path, 2, "resume", "it") as again:
        output, _ = again.communicate(timeout=PATIENCE)
        assert again.returncode == 0, output[-3000:]
    alone = Run(
        algorithm="sglr", model="mlp", clients=5, rounds=15, checkpoint_every=1, alpha=0.5, tune="off",
        precision="float64",
    )  # fmt: skip
    losses = [record.loss for record in alone]
    found = [json.loads(line)["loss"] for line in records(tmp_path / "it")]
    assert found == pytest.approx(losses, abs=1e-10)
    result = read_json(tmp_path / "it" / "result.json")
    assert result is not None
    assert alone.result is not None
    assert result["test_score"] == alone.result.test_score


def test_a_comparison(tmp_path: Path) -> None:
    few = [
        "--algorithms",
        "psl",
        "fl",
        "--seeds",
        "0",
        "1",
        "--model",
        "mlp",
        "--clients",
        "4",
        "--rounds",
        "1",
        "--tune",
        "off",
    ]
    with torchrun(tmp_path, 2, "compare", *few, "--out", "it") as started:
        output, _ = started.communicate(timeout=PATIENCE)
    assert started.returncode == 0, output[-3000:]
    assert output.count("Test accuracy: mean") == 1
    found = read_json(tmp_path / "it" / "comparison.json")
    assert found is not None
    assert [row["seeds"] for row in found["rows"]] == [[0, 1], [0, 1]]
