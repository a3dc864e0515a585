"""Train cells, several at once, each in a folder of its own; what is done is never done again."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NoReturn

from cutlayer.errors import CutlayerError, CutlayerWarning, NonFiniteError, TrainingError
from cutlayer.files import replace_file
from cutlayer.folder import CONFIG, RESULT
from cutlayer.reproduce.cells import Cell

Job = tuple[Cell, int]
DIVERGED, EXAMINED, PICTURES = "diverged.txt", "leakage.json", "leakage.safetensors"
SHOWN = 10  # pictures that are kept
_PATIENCE = 10.0  # seconds that a process has to end by itself


def folder_of(out: Path, cell: Cell, seed: int) -> Path:
    """Where the run of `cell` with `seed` is."""
    return out / "runs" / cell.name / f"seed-{seed}"


def is_trained(folder: Path) -> bool:
    """The run in `folder` has come to its end, or to numbers that are none."""
    return (folder / RESULT).exists() or (folder / DIVERGED).exists()


def is_done(out: Path, cell: Cell, seed: int) -> bool:
    """The run of `cell` with `seed` is trained, and examined where that is asked for."""
    folder = folder_of(out, cell, seed)
    return is_trained(folder) and (not cell.examined or (folder / EXAMINED).exists() or (folder / DIVERGED).exists())


def train(out: Path, jobs: Sequence[Job], workers: int) -> Iterator[Job]:
    """Train those of `jobs` that are not done yet, `workers` at once, begun in the order given; yields each as it ends.

    A run that was interrupted goes on from its checkpoint. A run whose numbers are no longer finite ends there: that is
    a result too. However this ends, no process stays behind. Raises UsageError as `Run` does, TrainingError where a
    process was ended from outside.
    """
    waiting = deque(job for job in jobs if not is_done(out, *job))
    if workers == 1:
        for job in waiting:
            _one(out, *job)
            yield job
        return
    if any(cell.examined for cell, _ in waiting):
        from cutlayer.leakage.ranks import dcor_library

        dcor_library()  # what it compiles on the first use ever is spoiled where two processes do so at once
    threads = max(1, (os.cpu_count() or 1) // workers)
    crew: list[_Worker] = []
    try:
        with _deaf():
            crew.extend(_Worker(out, threads) for _ in range(min(workers, len(waiting))))
        for worker in crew:
            worker.begin(waiting.popleft())
        while busy := {worker.pipe: worker for worker in crew if worker.job is not None}:
            for pipe in wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]
                yield worker.ended()
                if waiting:
                    worker.begin(waiting.popleft())
    finally:
        for worker in crew:
            worker.process.terminate()
        for worker in crew:
            worker.process.join(_PATIENCE)
            worker.process.kill()
            worker.process.join()


class _Worker:
    """A process that trains one run after another. (An executor of the standard library would let the run at work go
    on after Ctrl-C; its pool would wait for ever for a process that was killed.)
    """

    def __init__(self, out: Path, threads: int) -> None:
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, out, threads), daemon=True)
        self.process.start()
        theirs.close()  # else its end would not be noticed here
        self.job: Job | None = None

    def begin(self, job: Job) -> None:
        """Have `job` trained."""
        self.job = job
        try:
            self.pipe.send(job)
        except BrokenPipeError:
            self._lost()

    def ended(self) -> Job:
        """The job that has come to its end. Raises what its training raised."""
        try:
            error = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self._lost()
        if error is not None:
            raise error
        assert self.job is not None
        job, self.job = self.job, None
        return job

    def _lost(self) -> None:
        assert self.job is not None
        self.process.join()
        code = self.process.exitcode or 0
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise TrainingError(
            f"the process that trained {self.job[0].name} with seed {self.job[1]} {how}: call the same command again "
            "to go on, with fewer --jobs if memory was short"
        )


@contextmanager
def _deaf() -> Iterator[None]:
    """Processes started in here ignore Ctrl-C, from their first moment: it is their parent that ends them."""
    if threading.current_thread() is not threading.main_thread():  # where Python doesn't let us, and no Ctrl-C arrives
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work(pipe: Connection, out: Path, threads: int) -> None:
    """A worker's life: jobs in, None or the error out. It ends when its parent does, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_PATIENCE)
        os._exit(1)

    ending = threading.Event()

    def end(*_: object) -> NoReturn:
        ending.set()
        sys.exit(1)

    # An orderly end gives back what libraries hold in the system, such as semaphores.
    signal.signal(signal.SIGTERM, end)
    threading.Thread(target=watch, daemon=True).start()
    import torch

    from cutlayer.allocator import keep_memory

    keep_memory()
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore", CutlayerWarning)  # the same note from every process; result.json has the engine
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            _one(out, *job)
        except Exception as error:
            if ending.is_set():  # a library has made another exception of the one that ends this process
                sys.exit(1)
            if not isinstance(error, CutlayerError):
                raise
            pipe.send(error)
        else:
            pipe.send(None)


def _one(out: Path, cell: Cell, seed: int) -> None:
    from cutlayer.run import Run

    folder, config = folder_of(out, cell, seed), cell.at(seed)
    if is_trained(folder):
        _examine(folder, cell)
        return
    if (folder / CONFIG).exists():
        run = Run.resume(folder, **config.model_dump(mode="json", include=config.model_fields_set))
    else:
        run = Run(config, out=folder)
    try:
        run.run()
    except NonFiniteError as error:
        replace_file(folder / DIVERGED, f"{error}\n".encode())
    else:
        _examine(folder, cell)


def _examine(folder: Path, cell: Cell) -> None:
    """Attack one client of the run, at its end and at its snapshots, where that is asked for. The first pictures of the
    end are kept.
    """
    if not cell.examined:
        return
    from safetensors.torch import save

    from cutlayer.leakage.assess import Asked, examine
    from cutlayer.leakage.subject import moments, subjects

    samples = cell.config.samples_per_client or 1000
    found = []
    for moment in moments(folder, snapshots=cell.config.snapshot_every is not None):
        subject = next(iter(subjects(moment, 1, samples, min(1000, samples), 0)))
        examined = examine(subject, Asked(("model",), ()))
        found.append(examined.finding.plain)
    made = examined.pictures["model"]
    shown = {"inputs": made.inputs[:SHOWN], "reconstructions": made.reconstructions[:SHOWN]}
    replace_file(folder / PICTURES, save({name: x.contiguous() for name, x in shown.items()}))
    replace_file(folder / EXAMINED, (json.dumps(found, indent=1) + "\n").encode())
