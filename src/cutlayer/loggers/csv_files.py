"""A run as two CSV files, `steps.csv` and `evaluations.csv`, in the folder `logs` of the run's own."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from cutlayer.loggers.listening import Logger, RunStart, logger, of_evaluation

if TYPE_CHECKING:
    from cutlayer.run import Record, Result, Scores

_STEPS = ("step", "round", "loss", "samples", "client_lr", "server_lr", "bytes_up", "bytes_down", "seconds")
_EVALUATIONS = ("round", "step", "epochs", "rows", "metric", "value")


@dataclass(frozen=True)
class _Open:
    """Both files, open."""

    steps: TextIO
    evaluations: TextIO


@logger("csv")
class CsvFiles(Logger):
    """Two CSV files: a row per step, and a row per evaluation, metric and kind of rows."""

    _open: _Open | None = None

    def on_begin(self, run: RunStart) -> None:
        """Open both files, without the lines of steps and rounds that are trained again."""
        place = run.place("the logger 'csv'")
        self._open = _Open(
            _opened(place / "steps.csv", _STEPS, lambda line: int(line["step"]) < run.steps),
            _opened(place / "evaluations.csv", _EVALUATIONS, lambda line: int(line["round"]) <= run.rounds),
        )

    def on_step(self, record: Record) -> None:
        """A line of steps.csv."""
        assert self._open is not None, "the run has begun"
        csv.writer(self._open.steps).writerow([getattr(record, name) for name in _STEPS])

    def on_evaluate(self, scores: Scores) -> None:
        """Write lines of evaluations.csv, and flush both files for readers."""
        assert self._open is not None, "the run has begun"
        write = csv.writer(self._open.evaluations).writerow
        for name, value in of_evaluation(scores).items():
            write([scores.round, scores.step, scores.epochs, *name.split("/", 1), value])
        self._open.steps.flush()
        self._open.evaluations.flush()

    def on_end(self, result: Result | None) -> None:
        """Close both files."""
        assert self._open is not None, "the run has begun"
        self._open.steps.close()
        self._open.evaluations.close()


def _opened(path: Path, columns: Sequence[str], keep: Callable[[Mapping[str, str]], bool]) -> TextIO:
    """The file at its end, after the lines of it that are kept."""
    lines: list[Mapping[str, str]] = []
    if path.exists():
        with path.open(encoding="utf-8", newline="") as before:
            whole = (line for line in csv.DictReader(before) if None not in line.values())  # the last may be cut off
            lines = [line for line in whole if keep(line)]
    file = path.open("w", encoding="utf-8", newline="")
    writer = csv.DictWriter(file, columns)
    writer.writeheader()
    writer.writerows(lines)
    return file
