"""The results of the trained cells, read from their folders. Imports no torch and needs no steps.jsonl."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from cutlayer.errors import RunFolderError
from cutlayer.files import read_json, read_records
from cutlayer.folder import CLASSES, EVALUATIONS, RESULT, stored_config
from cutlayer.options import RunConfig
from cutlayer.reproduce.cells import Cell, Study
from cutlayer.reproduce.train import DIVERGED, EXAMINED, folder_of, is_trained
from cutlayer.stored import reading
from cutlayer.summary import spread


@dataclass(frozen=True)
class Outcome:
    """One finished run; accuracies in percent.

    `best` is the test accuracy at the evaluation with the best validation accuracy (`validation`), which is what the
    paper reports; `last` that at the end; `chance` is 100 over the number of classes. A run that diverged counts as
    chance.
    `result` is the run's result.json, None if it diverged; `leakage` are the results of its examinations, at each
    examined moment, the end being the last.
    """

    best: float
    last: float
    validation: float
    diverged: bool
    chance: float
    evaluations: list[dict[str, Any]]
    result: dict[str, Any] | None
    leakage: tuple[dict[str, Any], ...] = ()

    @property
    def explained(self) -> float | None:
        """Percent of the inputs' variance that the attacker explains at the end; None if it was not examined."""
        return _explained(self.leakage[-1]) if self.leakage else None

    @property
    def mse(self) -> float:
        """Mean squared error of the reconstruction at the end, in squared units of the inputs."""
        return float(self.leakage[-1]["attacks"]["model"]["attack"]["mse"])

    @property
    def reached(self) -> float | None:
        """The highest test accuracy, in percent, at the examined moments."""
        return max((100 * found["accuracy"] for found in self.leakage), default=None)

    def explained_at(self, accuracy: float) -> float | None:
        """The same at the time when the run first reached that test accuracy: linear between the examined moments. None
        if it never reached it, or had exceeded it by more than half a point before the first examination.
        """
        before: tuple[float, float] | None = None
        for found in self.leakage:
            now = 100 * float(found["accuracy"]), _explained(found)
            if now[0] >= accuracy:
                if before is None:
                    return now[1] if now[0] <= accuracy + _NEAR else None
                return before[1] + (now[1] - before[1]) * (accuracy - before[0]) / (now[0] - before[0])
            before = now
        return None


_NEAR = 0.5  # points of accuracy that count as no difference


def _explained(found: dict[str, Any]) -> float:
    return 100 * float(found["attacks"]["model"]["explained"])


@dataclass(frozen=True)
class Score:
    """An accuracy in percent over the seeds that are done: mean, sample standard deviation (None below two seeds), how
    many seeds of how many, how many of them diverged; beside it the paper's number, where it has one.
    """

    mean: float | None
    std: float | None
    seeds: int
    planned: int
    diverged: int = 0
    paper: float | None = None


class Outcomes:
    """All finished parts of `study` in the folder `out`.

    Raises RunFolderError if a run is damaged, or was made with another configuration than the study's.
    """

    def __init__(self, study: Study, out: Path, cells: Iterable[Cell]) -> None:
        self.study, self.out = study, out
        self.cells = {cell.name: settled(out, cell) or cell for cell in cells}
        self._of: dict[str, dict[int, Outcome]] = {}
        for name, cell in self.cells.items():
            folders = {} if cell.trials else {seed: folder_of(out, cell, seed) for seed in cell.seeds}
            self._of[name] = {s: read(folder, cell.at(s)) for s, folder in folders.items() if is_trained(folder)}

    def of(self, cell: Cell) -> dict[int, Outcome]:
        """Seed -> outcome of the finished runs of `cell`."""
        return self._of.get(cell.name, {})

    def score(
        self, cell: Cell, paper: float | None = None, by: Callable[[Outcome], float] = attrgetter("best")
    ) -> Score:
        """The cell's test accuracy at the best validation accuracy, or the value of `by`, over seeds."""
        done = self.of(cell).values()
        mean, std = spread([by(o) for o in done])
        return Score(mean, std, len(done), len(cell.seeds), sum(o.diverged for o in done), paper)

    def chosen_rate(self, algorithm: str) -> float | None:
        """The rate of Table 4 for a method: that with the highest best validation accuracy, mean over the seeds that
        all rates have (the smaller of equals). None while there is no such seed.
        """
        sweep = {rate: self.of(self.study.method(algorithm, rate)) for rate in self.study.size.rates}
        seeds = frozenset.intersection(*(frozenset(done) for done in sweep.values()))
        if not seeds:
            return None
        means = {rate: statistics.fmean(done[s].validation for s in seeds) for rate, done in sweep.items()}
        return max(sorted(means), key=means.__getitem__)

    def chosen(self, algorithm: str) -> Cell | None:
        """The cell of Table 4 for a method at its chosen rate."""
        rate = self.chosen_rate(algorithm)
        return None if rate is None else self.study.method(algorithm, rate)


def settled(out: Path, cell: Cell) -> Cell | None:
    """The cell at the rate of its trial with the best validation accuracy (the smaller of equals), without trials; None
    while one of them is not done. Raises RunFolderError if a trial is damaged.
    """
    if not cell.trials:
        return cell
    runs = [(trial, seed) for trial in cell.trials for seed in trial.seeds]
    if not all(is_trained(folder_of(out, *run)) for run in runs):
        return None
    found = {trial.config.client_lr: read(folder_of(out, trial, s), trial.at(s)).validation for trial, s in runs}
    rate = max(sorted(found), key=found.__getitem__)
    return replace(cell, config=cell.config.model_copy(update={"client_lr": rate}), trials=())


def read(folder: Path, config: RunConfig) -> Outcome:
    """The outcome of a finished run. Raises RunFolderError if it is damaged, or was not made with `config`."""
    with reading(folder, "remove that folder to have its run trained anew"):
        return _read(folder, config)


def _read(folder: Path, config: RunConfig) -> Outcome:
    stored, asked = RunConfig.of(stored_config(folder)).resolved(), config.resolved()
    for name, value in asked.items():
        if stored.get(name) != value:
            raise RunFolderError(
                f"the run in {str(folder)!r} was made with {name} = {stored.get(name)!r}, not {value!r}: remove it to "
                "have it trained anew, or choose another --out"
            )
    evaluations = list(read_records(folder / EVALUATIONS))
    classes = read_json(folder / CLASSES)
    if not classes:
        raise RunFolderError(f"{str(folder)!r} lacks {CLASSES}: remove that folder to have its run trained anew")
    chance = 100 / len(classes["class_names"])
    if (folder / DIVERGED).exists():
        return Outcome(chance, chance, chance, True, chance, evaluations, None)
    result = read_json(folder / RESULT)
    if not evaluations or not {"best_test_score", "test_score"} <= set(result):
        raise RunFolderError(f"{str(folder)!r} is damaged: remove that folder to have its run trained anew")
    return Outcome(
        best=100 * result["best_test_score"],
        last=100 * result["test_score"],
        validation=100 * max(e["validation_score"] or 0.0 for e in evaluations),
        diverged=False,
        chance=chance,
        evaluations=evaluations,
        result=result,
        leakage=tuple(read_json(folder / EXAMINED) or ()),
    )
