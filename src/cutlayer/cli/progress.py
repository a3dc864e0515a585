"""Live progress of training, and the message after Ctrl-C."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cutlayer.cli.application import out
from cutlayer.cli.printing import fail
from cutlayer.errors import LostRankError
from cutlayer.text import format_duration, format_score, remaining

if TYPE_CHECKING:
    from cutlayer.run import Standing


@contextmanager
def resumable(command: str) -> Iterator[None]:
    """On Ctrl-C, or where another rank is lost, print the command that goes on."""
    try:
        yield
    except KeyboardInterrupt:
        fail(f"interrupted; continue with: {command}", 130)
    except LostRankError as error:
        fail(f"{error}, with any number of them: {command}", error.exit_code)


class Monitor:
    """Live progress: a bar for each run under way and, if there are several runs, one for all with the time left.

    Without a terminal it prints a line per evaluation instead (unless `evaluations` is false) and, if there are
    several runs, one per run that ends. `weights` say what the runs that are still to be done cost, by their names;
    `done` is how many are done already. A context manager.
    """

    def __init__(self, weights: Mapping[str, float] | None = None, *, done: int = 0, evaluations: bool = True) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=out,
            disable=not out.is_terminal,
        )
        self._weights = dict(weights or {})
        self._done, self._runs = done, done + len(self._weights)
        self._lines, self._started = evaluations, time.monotonic()
        self._began, self._reached = dict[str, float](), dict[str, float]()  # fractions of each run
        self._tasks, self._seen = dict[str, TaskID](), dict[str, int]()
        total = sum(self._weights.values()) or 1.0
        self._all = self._progress.add_task("runs", total=total, count=self._count, note="", visible=self._runs > 1)

    @property
    def _count(self) -> str:
        return f"{self._done}/{self._runs}"

    def __enter__(self) -> Self:
        if self._done:
            _line(f"{self._count} runs are done already")
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, name: str, standing: Standing) -> None:
        """Show how far the run of that name is."""
        share = standing.done / standing.rounds
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=standing.rounds, count="", note="")
            self._began[name] = share
        self._reached[name] = share
        if standing.evaluations != self._seen.setdefault(name, standing.evaluations):
            self._seen[name] = standing.evaluations
            self._tell(name, standing)
        note = "" if standing.loss is None else f"loss {standing.loss:.3f}"
        if standing.latest is not None:
            note += f"  test {_score(standing)}, evaluation {format_duration(standing.evaluating)}"
        count = f"{standing.done}/{standing.rounds}"
        self._progress.update(self._tasks[name], completed=standing.done, count=count, note=note)
        self._show_all()

    def note(self, name: str, text: str) -> None:
        """Without a terminal, print a line about the run of that name."""
        _line(f"{name}: {text}")

    def ended(self, name: str, came: str = "") -> None:
        """The run of that name is done; `came` says to what, if there is more to say than its evaluations did."""
        self._reached[name] = 1.0
        self._done += 1
        if (task := self._tasks.pop(name, None)) is not None:
            self._progress.remove_task(task)
        self._show_all()
        if self._runs > 1:
            words = [f"{name}: {came}" if came else "", f"{self._left} left" if self._left else ""]
            _line(", ".join([f"{self._count} runs", *filter(None, words)]))

    @property
    def _left(self) -> str:
        """The remaining time for all runs, as far as it can be estimated."""
        made = sum(
            w * (self._reached[n] - self._began.get(n, 0.0)) for n, w in self._weights.items() if n in self._reached
        )
        left = sum(w * (1 - self._reached.get(n, 0.0)) for n, w in self._weights.items())
        if not made or not left:
            return ""
        return remaining((time.monotonic() - self._started) * left / made)

    def _show_all(self) -> None:
        reached = sum(w * self._reached.get(n, 0.0) for n, w in self._weights.items())
        self._progress.update(self._all, completed=reached, count=self._count)

    def _tell(self, name: str, standing: Standing) -> None:
        """Without a terminal, print a line about the last evaluation."""
        if self._lines and standing.latest is not None:
            at = f"round {standing.latest.round}/{standing.rounds}"
            _line(f"{name}: {at}, test {_score(standing)}{_times(standing)}")


def _line(text: str) -> None:
    """A line of progress, with the time of day, if there is no terminal for bars: for the log of a batch job."""
    if not out.is_terminal:
        out.print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", highlight=False, soft_wrap=True)


def _score(standing: Standing) -> str:
    """The last evaluation's score."""
    assert standing.latest is not None
    return format_score(standing.metric, standing.latest.test_score, share=standing.share)


def _times(standing: Standing) -> str:
    """The time of training and evaluation so far, and an estimate of the remaining time."""
    assert standing.latest is not None
    done, spent = standing.latest.round, standing.seconds + standing.evaluating
    text = f" ({format_duration(spent)}, evaluation {format_duration(standing.evaluating)}"
    left = (standing.rounds - done) * spent / done
    return text + (f"; {format_duration(left)} left)" if left else ")")
