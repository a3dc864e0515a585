"""Train cells, several at once, each in a folder of its own; what is done is never done again."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from cutlayer.errors import NonFiniteError
from cutlayer.files import replace_file
from cutlayer.folder import CONFIG, RESULT
from cutlayer.reproduce.cells import Cell

Job = tuple[Cell, int]
DIVERGED = "diverged.txt"


def folder_of(out: Path, cell: Cell, seed: int) -> Path:
    """Where the run of `cell` with `seed` is."""
    return out / "runs" / cell.name / f"seed-{seed}"


def is_done(folder: Path) -> bool:
    """The run in `folder` has come to its end, or to numbers that are none."""
    return (folder / RESULT).exists() or (folder / DIVERGED).exists()


def train(out: Path, jobs: Sequence[Job], workers: int) -> Iterator[Job]:
    """Train what is not done yet, `workers` at once, in the order given; yields each as it ends.

    A run that was interrupted goes on from its checkpoint. A run whose numbers are no longer finite ends there: that is
    a result too. Raises UsageError as `Run` does.
    """
    waiting = [job for job in jobs if not is_done(folder_of(out, *job))]
    yield from (job for job in jobs if job not in waiting)
    if workers == 1:
        for job in waiting:
            _one(out, *job)
            yield job
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(threads,)) as pool:
        futures = {pool.submit(_one, out, *job): job for job in waiting}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _begin(threads: int) -> None:
    """In a worker, before its first run: its share of the cores; it ends when its parent does, however that ends."""
    import torch

    from cutlayer.allocator import keep_memory

    keep_memory()
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _one(out: Path, cell: Cell, seed: int) -> None:
    from cutlayer.run import Run

    folder, config = folder_of(out, cell, seed), cell.at(seed)
    if (folder / CONFIG).exists():
        run = Run.resume(folder, **config.model_dump(mode="json", include=config.model_fields_set))
    else:
        run = Run(config, out=folder)
    try:
        run.run()
    except NonFiniteError as error:
        replace_file(folder / DIVERGED, str(error).encode())
