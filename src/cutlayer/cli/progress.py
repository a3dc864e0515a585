"""Live progress of training, and what Ctrl-C says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from cutlayer.cli.application import out
from cutlayer.cli.printing import fail
from cutlayer.text import format_duration, format_score

if TYPE_CHECKING:
    from cutlayer.run import Record, Run


@contextmanager
def resumable(command: str) -> Iterator[None]:
    """On Ctrl-C, print the command that goes on."""
    try:
        yield
    except KeyboardInterrupt:
        fail(f"interrupted; go on with: {command}", 130)


def _score(run: Run) -> str:
    """The last evaluation's score."""
    task = run.training.task
    return format_score(task.leading, run.evaluations[-1].test_score, share=task.share)


def _times(run: Run) -> str:
    """How long training and evaluation have taken and, as far as that tells, what is left."""
    done, spent = run.evaluations[-1].round, run.seconds + run.evaluating
    text = f" ({format_duration(spent)}, evaluation {format_duration(run.evaluating)}"
    left = (run.rounds - done) * spent / done
    return text + (f"; {format_duration(left)} left)" if left else ")")


class Monitor:
    """Live progress: a bar for the present run, and one for all runs if there are several.

    Without a terminal it prints a line per evaluation instead. A context manager.
    """

    def __init__(self, runs: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=out,
            disable=not out.is_terminal,
        )
        self._all = self._progress.add_task("runs", total=runs, note="", visible=runs > 1)
        self._task: TaskID | None = None
        self._run: Run | None = None
        self._label = ""
        self._seen = 0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None and self._task is not None and self._run is not None:
            self._tell()
            self._progress.update(self._task, completed=self._run.rounds)
            self._progress.advance(self._all)
        self._progress.stop()

    def show(self, label: str, run: Run, record: Record) -> None:
        """Show one more record of `run`."""
        if run is not self._run:
            self._next(label, run)
        assert self._task is not None
        self._tell()
        test = f"  test {_score(run)}, evaluation {format_duration(run.evaluating)}" if run.evaluations else ""
        self._progress.update(self._task, completed=record.round, note=f"loss {record.loss:.3f}{test}")

    def _next(self, label: str, run: Run) -> None:
        """Replace the bar of the finished run."""
        self._tell()
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._progress.advance(self._all)
        self._run, self._label, self._seen = run, label, len(run.evaluations)
        self._task = self._progress.add_task(label, total=run.rounds, note="")

    def _tell(self) -> None:
        """Without a terminal, print a line if there was another evaluation."""
        if self._run is None or len(self._run.evaluations) == self._seen:
            return
        self._seen = len(self._run.evaluations)
        scores = self._run.evaluations[-1]
        if not out.is_terminal:
            text = (
                f"{self._label}: round {scores.round}/{self._run.rounds}, test {_score(self._run)}{_times(self._run)}"
            )
            out.print(text, highlight=False, soft_wrap=True)
