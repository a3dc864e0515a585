"""Several jobs at the same time, each in its own process. Their progress and their results arrive here.

With one worker, the jobs run in this process, one after another, and the caller sees no difference.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn, TypeVar

from cutlayer.allocator import keep_memory, share_with
from cutlayer.errors import ConfigError, CutlayerError, CutlayerWarning, TrainingError

J = TypeVar("J")
Work = Callable[[J], Generator[object, None, object]]
"""Does a job: yields its progress, and returns its result. Both are sent between processes."""

_PATIENCE = 10.0  # seconds in which a process must end by itself
_READY, _TOLD, _NOTED, _ENDED, _FAILED = "ready", "told", "noted", "ended", "failed"


class ElsewhereError(Exception):
    """The traceback of an error in another process."""


@dataclass(frozen=True)
class News:
    """The progress of the job called `name` or, if it has `ended`, its result."""

    name: str
    value: Any
    ended: bool = False


def side_by_side(work: Work[J], jobs: Mapping[str, J], workers: int, again: str) -> Iterator[News]:
    """Do `jobs`, `workers` at once, started in the given order. `again` says how to continue after an interruption.

    No process remains, however this ends. Raises the error of a job, ConfigError for work that cannot be sent to
    another process, TrainingError if a process was ended from outside.
    """
    with turns(work, min(workers, len(jobs)), again) as through:
        yield from through(jobs)


@contextmanager
def turns(work: Work[J], workers: int, again: str) -> Iterator[Callable[[Mapping[str, J]], Iterator[News]]]:
    """The same for several turns: a function that does jobs, `workers` at once. The processes begin with the first turn
    and stay until the last.
    """
    crew: _Crew | None = None

    def through(jobs: Mapping[str, J]) -> Iterator[News]:
        nonlocal crew
        if workers <= 1:
            for name, job in jobs.items():
                came = yield from _told(name, work(job))
                yield News(name, came, ended=True)
        elif jobs:
            crew = crew or _Crew(packed(work, workers), workers, again)
            yield from crew.through(deque(jobs.items()))

    try:
        yield through
    finally:
        if crew is not None:
            crew.end()


def checked(jobs: int) -> int:
    """`jobs`, a number of runs to train at once. Raises ConfigError. Ends this process if it belongs to a crew and is
    only importing the script that started the crew.
    """
    if jobs < 1:
        raise ConfigError(f"jobs = {jobs} is not possible: give how many runs to train at once, 1 or more")
    if jobs > 1 and getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.exit(1)  # the parent says why
    return jobs


def packed(work: Work[J], jobs: int) -> bytes:
    """`work` as bytes for another process. Raises ConfigError if it contains something that cannot be sent."""
    try:
        return pickle.dumps(work)
    except Exception as error:  # a user's object: any error is possible
        raise ConfigError(_unsendable(f"jobs = {jobs}", error)) from None


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _unsendable(what: str, error: Exception) -> str:
    reason = " ".join(str(error).split())
    return (
        f"{what} trains in other processes, which cannot be given this model, data, loss or metric ({reason}): define "
        "its class or function at the top level of a module, or use jobs = 1"
    )


def _told(name: str, steps: Generator[object, None, object]) -> Generator[News, None, object]:
    while True:
        try:
            told = next(steps)
        except StopIteration as end:
            return end.value
        yield News(name, told)


class _Crew:
    """The processes and their jobs."""

    def __init__(self, work: bytes, size: int, again: str) -> None:
        self._again, self._members = again, list[_Member]()
        self._noted = set[str]()
        threads = max(1, cores() // size)
        atexit.register(self.end)  # before Python waits for remaining processes
        try:
            with _deaf():
                self._members.extend(_Member(threads, size) for _ in range(size))
            for member in self._members:  # all import meanwhile
                member.send(work)
        except BaseException:
            self.end()
            raise

    def through(self, waiting: deque[tuple[str, Any]]) -> Iterator[News]:
        """Hand out waiting jobs, and yield their messages as they arrive."""
        for member in self._members[: len(waiting)]:
            member.begin(*waiting.popleft())
        while busy := {member.pipe: member for member in self._members if member.job is not None}:
            for pipe in wait(list(busy)):
                member = busy[pipe]  # type: ignore[index]
                kind, value = member.heard(self._again)
                if kind == _NOTED:
                    self._note(value)
                elif kind != _READY:
                    assert member.job is not None
                    yield News(member.job, value, ended=kind == _ENDED)
                if kind == _ENDED:
                    member.job = None
                    if waiting:
                        member.begin(*waiting.popleft())

    def _note(self, text: str) -> None:
        """Pass a warning on, once from all processes."""
        if text not in self._noted:
            self._noted.add(text)
            warnings.warn(text, CutlayerWarning, stacklevel=4)

    def end(self) -> None:
        """End all processes, whatever they are doing."""
        for member in self._members:
            member.process.terminate()
        deadline = time.monotonic() + _PATIENCE
        for member in self._members:
            member.process.join(max(0.0, deadline - time.monotonic()))
            member.process.kill()
            member.process.join()
        self._members.clear()
        atexit.unregister(self.end)


class _Member:
    """A process that does one job after another. (An executor of the standard library would let the present job
    continue after Ctrl-C; its pool would wait without end for a process that was killed.)
    """

    def __init__(self, threads: int, size: int) -> None:
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        self.pipe, theirs = context.Pipe()
        # Not a daemon: daemons may not have child processes, which read lazy data.
        self.process = context.Process(target=_live, args=(theirs, threads, size))
        self.process.start()
        theirs.close()  # otherwise its end would not be noticed here
        self.job: str | None = None
        self._ready = False

    def send(self, packed: bytes) -> None:
        """Send the work for all jobs, or a job. If the process is gone, `heard` notices it, after its earlier
        messages.
        """
        with suppress(OSError):
            self.pipe.send_bytes(packed)

    def begin(self, name: str, job: Any) -> None:
        """Have a job done."""
        self.job = name
        self.send(pickle.dumps(job))

    def heard(self, again: str) -> tuple[str, Any]:
        """The next message, with its kind. Raises the error of the job."""
        try:
            kind, value = self.pipe.recv()
        except (EOFError, OSError):
            self._lost(again)
        self._ready = True
        if kind == _FAILED:
            error, cause = value
            raise error from cause and ElsewhereError(cause)
        return kind, value

    def _lost(self, again: str) -> NoReturn:
        self.process.join(_PATIENCE)
        code = self.process.exitcode or 0
        if code == 1 and not self._ready:
            raise TrainingError(
                "a process that was to train could not begin: if this is a script, put what it does under "
                "`if __name__ == '__main__':`, or use jobs = 1"
            ) from None
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise TrainingError(
            f"the process that trained {self.job} {how}: {again} to go on, with fewer jobs if memory was short"
        ) from None


@contextmanager
def _deaf() -> Iterator[None]:
    """Processes started in here ignore Ctrl-C from their first moment, since their parent ends them."""
    if threading.current_thread() is not threading.main_thread():  # where Python doesn't let us, and no Ctrl-C arrives
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _live(pipe: Connection, threads: int, size: int) -> None:
    """A process's life: jobs in, news out. It ends when its parent does, however that ends."""
    ending = _end_in_order()
    keep_memory()
    share_with(size)
    _bound(threads)
    warnings.showwarning = lambda message, *_, **__: pipe.send((_NOTED, str(message)))
    work = _unpacked(pipe)
    while True:
        try:
            job = pickle.loads(pipe.recv_bytes())  # noqa: S301 (from our own parent)
        except EOFError:
            return
        try:
            came = _passed_on(pipe, work(job))
        except Exception as error:
            if ending.is_set():  # a library has converted the exception that ends this process
                sys.exit(1)
            if not isinstance(error, CutlayerError):
                raise
            cause = "".join(traceback.format_exception(error)) if error.__cause__ is not None else None
            pipe.send((_FAILED, (error, cause)))
        else:
            pipe.send((_ENDED, came))


def _bound(threads: int) -> None:
    """Make torch compute with at most this number of threads, whether it is imported already or later."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    os.environ["OMP_NUM_THREADS"] = str(min(threads, int(asked)) if asked.isdigit() else threads)
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(min(torch.get_num_threads(), threads))


def _end_in_order() -> threading.Event:
    """Make this process end on SIGTERM, and when its parent is gone; the event is set when it is ending."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    ending = threading.Event()

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_PATIENCE)
        os._exit(1)

    def end(*_: object) -> NoReturn:
        ending.set()
        sys.exit(1)

    # An orderly end releases system resources of libraries, such as semaphores.
    signal.signal(signal.SIGTERM, end)
    threading.Thread(target=watch, daemon=True).start()
    return ending


def _unpacked(pipe: Connection) -> Work[Any]:
    """The work that the parent sends. If it cannot be loaded here, the parent is told."""
    try:
        work: Work[Any] = pickle.loads(pipe.recv_bytes())  # noqa: S301 (from our own parent)
    except EOFError:
        sys.exit(0)
    except Exception as error:  # a user's module: any error is possible
        pipe.send((_FAILED, (ConfigError(_unsendable("jobs > 1", error)), None)))
        sys.exit(1)
    pipe.send((_READY, None))
    return work


def _passed_on(pipe: Connection, steps: Generator[object, None, object]) -> object:
    """Send the progress of a job; returns its result."""
    while True:
        try:
            told = next(steps)
        except StopIteration as end:
            return end.value
        pipe.send((_TOLD, told))
