"""Trains cells, several at once, each in its own folder; finished runs are never trained again."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from cutlayer.crew import side_by_side
from cutlayer.errors import NonFiniteError
from cutlayer.files import replace_file
from cutlayer.folder import CONFIG, RESULT
from cutlayer.reproduce.cells import Cell

if TYPE_CHECKING:
    from cutlayer.run import Standing

Job = tuple[Cell, int]
Tell = Callable[[Job, "Standing"], None]
DIVERGED, EXAMINED, PICTURES = "diverged.txt", "leakage.json", "leakage.safetensors"
SHOWN = 10  # pictures that are kept


def folder_of(out: Path, cell: Cell, seed: int) -> Path:
    """The folder of the run of `cell` with `seed`."""
    return out / "runs" / cell.name / f"seed-{seed}"


def is_trained(folder: Path) -> bool:
    """Whether the run in `folder` has reached its end, or its numbers are no longer finite."""
    return (folder / RESULT).exists() or (folder / DIVERGED).exists()


def is_done(out: Path, cell: Cell, seed: int) -> bool:
    """Whether the run of `cell` with `seed` is trained, and examined if requested."""
    folder = folder_of(out, cell, seed)
    return is_trained(folder) and (not cell.examined or (folder / EXAMINED).exists() or (folder / DIVERGED).exists())


def name_of(job: Job) -> str:
    """The name of a job."""
    cell, seed = job
    return f"{cell.name} with seed {seed}"


def train(out: Path, jobs: Sequence[Job], workers: int, tell: Tell | None = None) -> Iterator[Job]:
    """Train those of `jobs` that are not done yet, `workers` at once, started in the given order; yields each as it
    ends. `tell` is called with the progress of each. The jobs of a turn begin when those of the turn before have ended.

    An interrupted run continues from its checkpoint. A run whose numbers are no longer finite ends there: this is a
    result, too. No process remains, however this ends. Raises UsageError as `Run` does, TrainingError if a process was
    ended from outside.
    """
    waiting = {name_of(job): job for job in jobs if not is_done(out, *job)}
    if workers > 1 and any(cell.examined for cell, _ in waiting.values()):
        from cutlayer.leakage.ranks import dcor_library

        dcor_library()  # its compilation on the very first use fails if two processes do it at once
    for _, turn in groupby(waiting.items(), key=lambda named: named[1][0].turn):
        for news in side_by_side(partial(_one, out), dict(turn), workers, "call the same command again"):
            if news.ended:
                yield waiting[news.name]
            elif tell is not None:
                tell(waiting[news.name], news.value)


def _one(out: Path, job: Job) -> Generator[Standing, None, None]:
    from cutlayer.reproduce.outcomes import settled
    from cutlayer.run import Run

    asked, seed = job
    cell = settled(out, asked)
    assert cell is not None  # the trials had an earlier turn
    folder, config = folder_of(out, cell, seed), cell.at(seed)
    if is_trained(folder):
        _examine(folder, cell)
        return
    if (folder / CONFIG).exists():
        run = Run.resume(folder, **config.model_dump(mode="json", include=config.model_fields_set))
    else:
        run = Run(config, out=folder)
    try:
        yield from run.standings()
    except NonFiniteError as error:
        replace_file(folder / DIVERGED, f"{error}\n".encode())
    else:
        _examine(folder, cell)


def _examine(folder: Path, cell: Cell) -> None:
    """Attack one client of the run, at its end and at its snapshots, if requested. The first pictures of the end are
    stored.
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
