"""`torchrun` starts ranks; one of them is killed, or hangs; the others end with a sentence, and the run goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cutlayer.files import read_json

PATIENCE = 100.0
NOTICED = 20.0
"""Seconds in which ranks have ended after one of them was killed."""
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
pytestmark = [pytest.mark.network, pytest.mark.timeout(300)]


@contextmanager
def torchrun(folder: Path, ranks: int, *argv: str) -> Iterator[subprocess.Popen[str]]:
    """`torchrun -m cutlayer ARGV`, killed at the end."""
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
    """The processes of the ranks, in their order."""
    path = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    children = path.read_text(encoding="utf-8").split() if path.exists() else []
    return sorted(map(int, children), key=rank_of)


def rank_of(process: int) -> int:
    found = re.search(rb"\0RANK=(\d+)", Path(f"/proc/{process}/environ").read_bytes())
    return int(found.group(1)) if found else -1


def said(output: str) -> str:
    """What Cutlayer said, on one line."""
    return " ".join(output.split())


def until_it_trains(folder: Path) -> None:
    end = time.monotonic() + PATIENCE
    while not (folder / "checkpoint.safetensors").exists():
        assert time.monotonic() < end, "it does not train"
        time.sleep(0.05)


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
