"""Runs in several processes: equal to runs one after another, also if processes end or are interrupted."""

from __future__ import annotations

import inspect
import multiprocessing
import os
import pickle
import signal
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from counting import counting
from safetensors.torch import load_file
from support import call, mlp
from torch import nn

from cutlayer import Comparison, errors
from cutlayer.compare import Progress
from cutlayer.crew import News, checked, side_by_side
from cutlayer.errors import ConfigError, CutlayerError, CutlayerWarning, NonFiniteError, RefusedError, TrainingError
from cutlayer.folder import LAST, RESULT, STEPS
from cutlayer.testing import random_source

TINY: dict[str, Any] = {"algorithms": ("psl", "fl"), "seeds": (1, 0), "clients": 3, "partition": "column", "cut": "3"}
TINY |= {"rounds": 3, "batch": 5}
LINE = ["compare", "--algorithms", "psl", "fl", "--seeds", "0", "--model", "mlp", "--clients", "2", "--data", "digits"]
TIMES = {"seconds", "evaluation_seconds", "steps_per_second", "samples_per_second"}


def things() -> dict[str, Any]:
    return {"model": mlp().float(), "data": random_source((7, 9, 8), (6,))}


@contextmanager
def one_thread() -> Iterator[None]:
    """Each of two processes on two cores has one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def timeless(row: Any) -> dict[str, Any]:
    return {k: v for k, v in vars(row).items() if k not in TIMES}


def lines(path: Path) -> list[str]:
    return [line.partition(', "seconds"')[0] for line in path.read_text(encoding="utf-8").splitlines()]


# ---- jobs that need no torch ----------------------------------------------------------------------------------------


def test_one_worker_is_this_process() -> None:
    news = list(side_by_side(counting, {"two": 2, "three": 3}, 1, "again"))
    me = os.getpid()
    assert news == [News("two", me), News("two", 4, True), News("three", me), News("three", 9, True)]


def test_several_jobs_in_two_processes() -> None:
    """All jobs end, in two other processes. A warning that all give is shown once."""
    with pytest.warns(CutlayerWarning, match="seven") as noted:
        news = list(side_by_side(counting, {"a": 7, "b": 7, "c": 3, "d": 4}, 2, "again"))
    assert {n.name: n.value for n in news if n.ended} == {"a": 49, "b": 49, "c": 9, "d": 16}
    assert len(noted) == 1
    where = {n.value for n in news if not n.ended}
    assert len(where) == 2
    assert os.getpid() not in where
    assert not multiprocessing.active_children()


def test_a_job_that_fails_and_a_process_that_is_killed() -> None:
    with pytest.raises(NonFiniteError, match="of clients 1, 2 is NaN or Inf at step 13") as failed:
        list(side_by_side(counting, {"good": 2, "bad": 13}, 2, "again"))
    assert failed.value.clients == (1, 2)
    assert "ValueError: thirteen" in str(failed.value.__cause__)
    said = r"the process that trained doomed was ended by signal 9: do it again to go on, with fewer jobs if memory"
    with pytest.raises(TrainingError, match=said):
        list(side_by_side(counting, {"doomed": 99, "fine": 1}, 2, "do it again"))
    assert not multiprocessing.active_children()


def test_what_another_process_cannot_find(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function of a module that exists only in this process."""
    ghost = ModuleType("ghost")
    exec("def work(job):\n    yield job\n    return job", ghost.__dict__)
    monkeypatch.setitem(sys.modules, "ghost", ghost)
    with pytest.raises(ConfigError, match=r"jobs > 1 trains in other processes.*No module named 'ghost'.*use jobs = 1"):
        list(side_by_side(ghost.work, {"a": 1, "b": 2}, 2, "again"))


@pytest.mark.parametrize("jobs", [0, -3])
def test_numbers_of_jobs(jobs: int) -> None:
    assert checked(3) == 3
    with pytest.raises(ConfigError, match=f"jobs = {jobs} is not possible"):
        Comparison(jobs=jobs)


def test_every_error_crosses_between_processes() -> None:
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, CutlayerError)]
    assert len(kinds) > 10
    for kind in kinds:
        error = kind("token", "one") if issubclass(kind, RefusedError) else kind("one")
        again = pickle.loads(pickle.dumps(error))  # noqa: S301 (of our own making)
        assert (type(again), str(again), vars(again)) == (kind, str(error), vars(error))
        assert again.exit_code == error.exit_code


# ---- comparisons ----------------------------------------------------------------------------------------------------


def test_a_comparison_side_by_side(tmp_path: Path) -> None:
    """The table, the steps and the weights are equal bit for bit, and every run reports its beginning and its end."""
    own = things()
    with one_thread():
        alone = Comparison(**own, **TINY, out=tmp_path / "alone").run()
    comparison = Comparison(**own, **TINY, out=tmp_path / "beside", jobs=2)
    with pytest.raises(ConfigError, match="jobs = 2 trains in other processes"):
        next(iter(comparison))
    heard: list[Progress] = list(comparison.progress())
    assert list(map(timeless, comparison.table())) == list(map(timeless, alone))
    assert [row.seeds for row in alone] == [(1, 0)] * 2
    for entry in ("psl", "fl"):
        for seed in (1, 0):
            a, b = (tmp_path / name / entry / f"seed-{seed}" for name in ("alone", "beside"))
            assert lines(a / STEPS) == lines(b / STEPS)
            mine, theirs = load_file(a / LAST), load_file(b / LAST)
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)
            told = [p for p in heard if (p.entry, p.seed) == (entry, seed)]
            assert [p.ended for p in told] == [False] * (len(told) - 1) + [True]
            assert (told[-1].standing.done, told[-1].standing.rounds) == (3, 3)
            assert told[-1].standing.latest is not None


def test_interrupted_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while both runs train: no process is left, one sentence is printed, and the command in it resumes."""
    from cutlayer.cli.progress import Monitor

    show = Monitor.show

    def interrupted(monitor: Monitor, name: str, standing: Any) -> None:
        show(monitor, name, standing)
        monkeypatch.undo()
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Monitor, "show", interrupted)
    ended = call(*LINE, "--epochs", "400", "--out", "out", "--jobs", "2", cwd=tmp_path, code=130)
    assert ended.stderr == "error: interrupted; continue with: cutlayer resume out --jobs 2\n"
    assert not multiprocessing.active_children()
    assert not list(tmp_path.glob("out/*/*/" + RESULT))
    begun = next(tmp_path.glob("out/*/seed-0/config.toml")).parent  # the other run may not have begun
    refused = call("resume", str(begun), "--jobs", "2", cwd=tmp_path, code=2)
    assert f"jobs = 2 has no effect here: {str(begun)!r} is a single run" in refused.stderr
    for config in tmp_path.glob("out/**/config.toml"):
        config.write_text(config.read_text().replace("epochs = 400", "epochs = 1"))
    for state in tmp_path.glob("out/*/*/checkpoint.safetensors"):
        state.unlink()
    done = call("resume", "out", cwd=tmp_path)
    assert "2/2 runs\n" in done.stdout
    assert len(list(tmp_path.glob("out/*/*/" + RESULT))) == 2


def test_what_cannot_be_sent(tmp_path: Path) -> None:
    """Nothing is written, and one job still works."""

    def local() -> nn.Module:
        return mlp().float()

    own = {**things(), "model": local}
    with pytest.raises(ConfigError, match=r"^jobs = 2 trains in other processes, .*local.*, or use jobs = 1$"):
        Comparison(**own, **TINY, out=tmp_path / "out", jobs=2).run()
    assert not (tmp_path / "out").exists()
    assert len(Comparison(**own, **TINY, out=tmp_path / "out").run()) == 2


def test_runs_that_may_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything is written. Free memory is measured after everything is built."""
    monkeypatch.setattr("cutlayer.compare.room", lambda device: 1_000_000_000 if device == "cpu" else None)
    said = r"jobs = 4 may need more memory than is free: 1\.2\d GB for 4 runs .* 1\.00 GB are free; use jobs = 3"
    with pytest.raises(ConfigError, match=said):
        Comparison(**things(), **TINY, out=tmp_path / "out", jobs=5).run()
    assert not (tmp_path / "out").exists()


@pytest.mark.network
def test_a_script_without_a_guard(tmp_path: Path) -> None:
    """Its processes would run the script again. They end, and the error says what to do."""
    import subprocess

    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
            import cutlayer
            cutlayer.Comparison(data="digits", model="mlp", seeds=(0,), epochs=1, jobs=2).run()
        """)
    )
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert ended.stderr.rstrip().endswith("or use jobs = 1")
    assert "if __name__ == '__main__':" in ended.stderr
    assert ended.stderr.count("Traceback") == 1
