"""A command that a launcher starts twice: rank 0 writes and prints, and both ranks end with the same code."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import NamedTuple

import processes
import pytest
from support import call

from cutlayer.files import read_json

PATIENCE = 100.0
SMALL = [
    "--model",
    "mlp",
    "--clients",
    "4",
    "--rounds",
    "2",
    "--samples-per-client",
    "20",
    "--batch",
    "10",
    "--tune",
    "off",
]


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def launched(folder: Path, *argv: str, size: int = 2) -> list[Ended]:
    """Start the ranks of a command like torchrun, and return their exit codes and outputs."""
    port = str(free_port())
    ranks, files = [], []
    for rank in range(size):
        environ = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
        texts = {name: str(value) for name, value in environ.items()} | {"MASTER_ADDR": "127.0.0.1", "COLUMNS": "200"}
        paths = folder / f"out-{rank}", folder / f"err-{rank}"
        with paths[0].open("w") as out, paths[1].open("w") as err:
            ranks.append(processes.start(argv, cwd=folder, stdout=out, stderr=err, env=texts))
        files.append(paths)
    try:
        codes = [rank.wait(PATIENCE) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [Ended(code, *(path.read_text() for path in paths)) for code, paths in zip(codes, files, strict=True)]


@pytest.mark.network
def test_rank_0_writes_and_prints(tmp_path: Path) -> None:
    first, second = launched(tmp_path, "run", "--algorithm", "sglr", *SMALL, "--out", "it")
    assert first.code == second.code == 0, first.err + second.err
    assert "2 ranks simulate 2 clients each (stacked engine); the server: data-parallel" in first.out
    assert "SGLR (distributed engine): test accuracy" in first.out
    assert second.out == second.err == ""
    result = read_json(tmp_path / "it" / "result.json")
    assert result is not None
    assert (result["engine"], result["steps"]) == ("distributed", 4)


@pytest.mark.network
def test_both_refuse_and_one_says_why(tmp_path: Path) -> None:
    first, second = launched(tmp_path, "run", "--algorithm", "ssl", *SMALL, "--out", "it")
    assert first.code == second.code == 2
    assert "2 ranks cannot train this: the clients of ssl take turns" in first.err
    assert first.out == second.out == second.err == ""
    assert not (tmp_path / "it").exists()


def test_what_all_ranks_are_told_one_of_them_says(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = "run", "--algoritm", "psl"
    assert "Did you mean --algorithm?" in call(*wrong, code=2).stderr
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert call(*wrong, code=2).stderr == ""
    assert "Did you mean" in call("plan", "--algoritms", "psl", code=2).stderr  # `plan` is not shared by ranks


@pytest.mark.parametrize(
    ("seconds", "why"),
    [
        ("5", "rank_timeout = 5 has no effect on a single process: leave it out, or start several ranks"),
        ("0", "rank_timeout = 0.0 is not possible: it must be greater than 0"),
    ],
)
def test_a_time_that_ranks_cannot_have(seconds: str, why: str) -> None:
    assert why in call("run", "--rank-timeout", seconds, code=2).stderr
