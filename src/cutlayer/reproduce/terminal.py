"""What a reproduction shows in the terminal: progress with the time left, then tables and verdicts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as Grid
from rich.text import Text

from cutlayer.reproduce.cells import Study
from cutlayer.reproduce.claims import ClaimVerdict, points
from cutlayer.reproduce.findings import Findings
from cutlayer.reproduce.outcomes import Outcome
from cutlayer.reproduce.page import setting
from cutlayer.reproduce.table6 import Fact
from cutlayer.reproduce.tables import Table, paper_of, shown
from cutlayer.reproduce.train import Job

_WIDTH = 160  # where no terminal listens: cut-off numbers help nobody
_STYLES = {"holds": "green", "does not hold": "red", "within noise": "yellow", "not measured": "dim"}


class ProgressBar:
    """Live progress, with runs weighted by what they cost. Without a terminal it prints a line per run instead.

    A context manager.
    """

    def __init__(self, console: Console, jobs: Sequence[Job], waiting: Sequence[Job]) -> None:
        self._console, self._jobs = console, len(jobs)
        self._done = len(jobs) - len(waiting)
        self._left = sum(cell.weight for cell, _ in waiting)
        self._weighed, self._started = 0, time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[runs]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        total = sum(cell.weight for cell, _ in jobs)
        self._task = self._progress.add_task(
            "runs", total=total, completed=total - self._left, runs=self._runs, note=""
        )

    @property
    def _runs(self) -> str:
        return f"{self._done}/{self._jobs}"

    def __enter__(self) -> Self:
        if self._done and not self._console.is_terminal:
            self._say(f"{self._runs} runs are done already")
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def tell(self, job: Job, outcome: Outcome) -> None:
        """One more run is done."""
        cell, seed = job
        self._done += 1
        self._left -= cell.weight
        self._weighed += cell.weight
        elapsed = time.monotonic() - self._started
        came = "diverged" if outcome.diverged else f"test accuracy {outcome.best:.1f} %"
        left = f", {remaining(elapsed * self._left / max(self._weighed, 1))} left" if self._done < self._jobs else ""
        text = f"{cell.name} seed {seed}: {came}{left}"
        self._progress.update(self._task, advance=cell.weight, runs=self._runs, note=text)
        if not self._console.is_terminal:
            self._say(f"{self._runs} runs, {text}")

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)


def remaining(seconds: float) -> str:
    """A rough time: about 41 minutes."""
    if seconds < 60:
        return "less than a minute"
    for name, length, most in (("minute", 60, 100), ("hour", 3600, 48)):
        count = round(seconds / length)
        if count < most:
            return f"about {count} {name}{'s' * (count > 1)}"
    return f"about {round(seconds / 86400)} days"


def show(findings: Findings, size: str, console: Console) -> None:
    """Print the tables, the verdicts and the five lines."""
    wide = console if console.is_terminal else Console(width=_WIDTH)
    done, planned = findings.done
    wide.print(f"\n{setting(findings, size)}" + (f" {done} of {planned} runs are done." if done < planned else ""))
    for table in findings.tables:
        wide.print(_grid(table))
    wide.print(_claims(findings.verdicts, findings.outcomes.study))
    wide.print(_facts(findings.facts, findings.outcomes.study))
    for line in findings.lines:
        wide.print(f"- {line}", highlight=False)


def _grid(table: Table) -> Grid:
    """Ours, and below it the paper's."""
    grid = Grid(title=table.title)
    grid.add_column(table.head)
    for column in table.columns:
        grid.add_column(column, justify="right")
    with_paper = any(paper_of(v) for _, values in table.rows for v in values)
    for label, values in table.rows:
        theirs = [f"paper {paper_of(v)}" if paper_of(v) else "" for v in values] if with_paper else [""] * len(values)
        cells = [
            Text(shown(v)) + Text(f"\n{p}" if with_paper else "", "dim") for v, p in zip(values, theirs, strict=True)
        ]
        grid.add_row(Text(label), *cells)
    return grid


def _word(word: str, study: Study) -> Text:
    """A verdict. One about another model has no colour: it is neither good nor bad for the paper."""
    return Text(study.verdict(word), "" if study.another_model else _STYLES.get(word, "dim"))


def _facts(facts: Sequence[Fact], study: Study) -> Grid:
    grid = Grid(title="What counting settles")
    for name in ("claim", "verdict", "counted"):
        grid.add_column(name, no_wrap=name == "verdict")
    for f in facts:
        grid.add_row(Text(f.title), _word(f.word, study), Text(f.evidence))
    return grid


def _claims(verdicts: Sequence[ClaimVerdict], study: Study) -> Grid:
    grid = Grid(title="The claims: differences in points with their 95 % intervals")
    for name in ("claim", "verdict", "difference", "seeds", "pairs"):
        grid.add_column(name, justify="left" if name in ("claim", "verdict") else "right", no_wrap=name == "verdict")
    for v in verdicts:
        d = v.overall
        grid.add_row(
            Text(v.claim.title),
            _word(d.verdict, study),
            "loss " * (v.claim.loss and d.mean is not None) + points(d),
            str(d.seeds),
            str(d.cells),
        )
    return grid
