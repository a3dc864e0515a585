"""Trials: runs with which a comparison tunes its methods. Nothing is trained twice.

A trial is a run with the tuning's own seed, whose test rows are its validation rows. The study's test rows are not
used. Its folder has `trial.json` with its result at the end of each leg. An interrupted search runs again from its
beginning and is answered from these files; an interrupted leg continues from its checkpoint.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from cutlayer.build import Data, Model, Training
from cutlayer.crew import News
from cutlayer.data import Source
from cutlayer.data.own import own_code
from cutlayer.effort import By, Effort
from cutlayer.engine.ways import Ways
from cutlayer.errors import ConfigError, NonFiniteError, RunFolderError, TrainingError
from cutlayer.files import STATES, read_json, replace_file
from cutlayer.folder import CHECKPOINT, CONFIG, LAST
from cutlayer.options import RunConfig
from cutlayer.run import Run, Standing, ways_in
from cutlayer.searches import Leg
from cutlayer.stored import Amount, Count, Number
from cutlayer.sweep import Point, shown_value
from cutlayer.text import format_score
from cutlayer.tuned import Trial, Tuned, TunedEntry

TRIAL = "trial.json"
_HEAVY = (CHECKPOINT, LAST, STATES)  # files that a trial no longer needs when it is over


@dataclass(frozen=True)
class Reached:
    """The result of a trial at the end of a leg: its score on the validation rows (None: not defined), and the rounds,
    epochs and rows so far; or, `diverged`, that its numbers were no longer finite.
    """

    score: float | None
    rounds: int
    epochs: float
    samples: int
    metric: str
    share: bool
    maximise: bool
    diverged: bool = False

    @property
    def answer(self) -> float | None:
        """The score for a search: larger is better."""
        if self.score is None:
            return None
        return self.score if self.maximise else -self.score


@dataclass(frozen=True)
class LegJob:
    """A leg to train: the configuration of the trial, its folder, the share of its rounds, and how it is judged."""

    config: RunConfig
    where: Path
    share: float
    by: By


class _Leg(msgspec.Struct):
    score: Number
    rounds: Count
    epochs: Amount
    samples: Count
    metric: str
    share: bool
    maximise: bool
    diverged: bool = False


class _Kept(msgspec.Struct):
    values: dict[str, Any]
    legs: dict[str, _Leg]


@dataclass
class _Course:
    """The search of one entry: its present requests, and the results of all legs so far."""

    entry: str
    legs: Generator[list[Leg], Any, None]
    asked: list[Leg] = field(default_factory=list)
    points: dict[int, Point] = field(default_factory=dict)
    reached: dict[int, dict[str, Reached]] = field(default_factory=dict)

    def missing(self) -> list[Leg]:
        """Those legs that have not been trained yet."""
        return [leg for leg in self.asked if _key(leg.share) not in self.reached.get(leg.trial, {})]


@dataclass(frozen=True)
class TrialNews:
    """The progress of trial `number` of `entry`, its result (`came`) at the end of a leg, or that it is over."""

    entry: str
    number: int
    standing: Standing
    ended: bool = False
    came: str = ""


class Trials:
    """All trials of a comparison, in a folder each below `where`."""

    def __init__(self, effort: Effort, where: Path) -> None:
        self._effort, self._where = effort, where
        self._standings: dict[str, Standing] = {}  # of the trials that were trained here and are not over
        self._told = set[tuple[str, int]]()  # entry and number of those that are over

    def train(self, through: Callable[[Mapping[str, Any]], Iterator[News]]) -> Generator[TrialNews, None, Tuned]:
        """Train the legs that the searches request, and yield the progress of each trial. `through` does jobs and
        yields their results.

        Raises TrainingError if all trials of an entry diverged, RunFolderError for folders of another tuning.
        """
        effort = self._effort
        courses = [
            _Course(entry, effort.search.legs(space, effort.trials, effort.seed))
            for entry, space in effort.spaces.items()
        ]
        under_way = [course for course in courses if self._advance(course, None)]
        while under_way:
            jobs = {trial_name(c.entry, leg.trial): (c, leg) for c in under_way for leg in c.missing()}
            yield from self._turn(through, jobs)
            for course in list(under_way):
                before = {leg.trial for leg in course.asked}
                answers = [course.reached[leg.trial][_key(leg.share)].answer for leg in course.asked]
                if not self._advance(course, answers):
                    under_way.remove(course)
                for number in sorted(before - {leg.trial for leg in course.asked}):
                    yield from self._over(course, number)
        return self._tuned(courses)

    def _turn(
        self, through: Callable[[Mapping[str, Any]], Iterator[News]], jobs: Mapping[str, tuple[_Course, Leg]]
    ) -> Iterator[TrialNews]:
        """Train these legs."""
        for news in through({name: self._job(course, leg) for name, (course, leg) in jobs.items()}):
            course, leg = jobs[news.name]
            if news.ended:
                course.reached.setdefault(leg.trial, {})[_key(leg.share)] = news.value
                self._keep(course, leg.trial)
                standing = self._standings.get(news.name)
                if standing is not None:
                    came = _said(news.value, leg.point)
                    yield TrialNews(course.entry, leg.trial, standing, came=came)
                if leg.share == 1 or news.value.diverged:
                    yield from self._over(course, leg.trial)
            else:
                self._standings[news.name] = replace(news.value, latest=None, evaluations=0)
                yield TrialNews(course.entry, leg.trial, self._standings[news.name])

    def _over(self, course: _Course, number: int) -> Iterator[TrialNews]:
        """A trial is over: its model is not needed any more."""
        for name in _HEAVY:
            path = self._folder(course.entry, number) / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if (course.entry, number) in self._told:
            return
        self._told.add((course.entry, number))
        standing = self._standings.pop(trial_name(course.entry, number), None)
        if standing is None:  # it was trained before
            standing = _ended(list(course.reached[number].values())[-1])
            yield TrialNews(course.entry, number, standing)
        yield TrialNews(course.entry, number, standing, ended=True)

    def _advance(self, course: _Course, answers: list[float | None] | None) -> bool:
        """Ask the search for the next legs; False if it has no more. Raises ConfigError."""
        search = self._effort.search
        with own_code(search, f"the search {self._effort.how!r}"):
            try:
                course.asked = next(course.legs) if answers is None else course.legs.send(answers)
            except StopIteration:
                course.asked = []
                return False
        for leg in course.asked:
            if not (isinstance(leg, Leg) and 0 < leg.share <= 1 and 0 <= leg.trial < self._effort.trials):
                raise ConfigError(
                    f"the search {self._effort.how!r} asks for {leg!r}: yield legs with a share in (0, 1] of the "
                    f"trials 0 to {self._effort.trials - 1}"
                )
            if course.points.setdefault(leg.trial, leg.point) != leg.point:
                raise ConfigError(
                    f"the search {self._effort.how!r} asks for trial {leg.trial} with other values than before: give "
                    "each trial one point"
                )
            if leg.trial not in course.reached:
                course.reached[leg.trial] = self._kept(course.entry, leg)
        return True

    def _job(self, course: _Course, leg: Leg) -> LegJob:
        config = self._effort.run(course.entry, leg.point)
        return LegJob(config, self._folder(course.entry, leg.trial), leg.share, self._effort.by)

    def _folder(self, entry: str, number: int) -> Path:
        return self._where / entry / f"trial-{number}"

    def _kept(self, entry: str, leg: Leg) -> dict[str, Reached]:
        """The stored results of a trial. Raises RunFolderError if it had other values."""
        path = self._folder(entry, leg.trial) / TRIAL
        kept = read_json(path, _Kept)
        if kept is None:
            return {}
        if kept["values"] != leg.point:
            raise RunFolderError(
                f"{str(path)!r} has the values {kept['values']}, where the tuning asks for {leg.point}: restore that "
                "file, or start anew in another folder"
            )
        return {share: Reached(**reached) for share, reached in kept["legs"].items()}

    def _keep(self, course: _Course, number: int) -> None:
        legs = {share: asdict(reached) for share, reached in course.reached[number].items()}
        kept = {"values": course.points[number], "legs": legs}
        replace_file(self._folder(course.entry, number) / TRIAL, json.dumps(kept, indent=1).encode())

    def _tuned(self, courses: list[_Course]) -> Tuned:
        effort = self._effort
        entries = {course.entry: self._chosen(course) for course in courses}
        some = next(r for c in courses for legs in c.reached.values() for r in legs.values() if not r.diverged)
        return Tuned(
            effort.how,
            effort.trials,
            effort.seed,
            effort.by,
            some.metric,
            some.share,
            some.maximise,
            entries,
            effort.untuned,
            overlap=effort.overlap,
        )

    def _chosen(self, course: _Course) -> TunedEntry:
        """The best of the trials that were trained the longest, the first among equals. Raises TrainingError."""
        last = {number: list(legs.values())[-1] for number, legs in sorted(course.reached.items())}
        fit = {number: reached for number, reached in last.items() if reached.answer is not None}
        if not fit:
            raise TrainingError(
                f"all {len(last)} trials of {course.entry!r} have diverged: tune it over other values, such as smaller "
                "learning rates"
            )
        shares = {number: max(map(float, course.reached[number])) for number in fit}
        best = max(fit, key=lambda number: (shares[number], fit[number].answer or 0.0, -number))
        values = course.points[best]
        return TunedEntry(
            tuple(
                Trial(n, course.points[n], r.score, r.rounds, r.epochs, r.samples, r.diverged) for n, r in last.items()
            ),
            best,
            values,
            tuple(self._effort.at_the_edge(course.entry, values)),
            sum(r.epochs for r in last.values()),
            sum(r.samples for r in last.values()),
        )


def trial_name(entry: str, number: int) -> str:
    """The name of a trial."""
    return f"{entry}, trial {number + 1}"


def train_leg(
    job: LegJob, make: Callable[[RunConfig, Ways | None], Training], model: Model | None, data: Data | None
) -> Generator[Standing, None, Reached]:
    """Train a trial to the end of a leg, from its present state: yields its progress, and returns its result. `make`
    builds it.
    """
    begun = (job.where / CONFIG).exists()
    training = make(job.config, ways_in(job.where) if begun else None)
    training = replace(training, source=_without_test(training.source))
    if begun:
        run = Run.resume(job.where, model=model, data=data, training=training)
    else:
        run = Run(job.config, model=model, data=data, training=training, out=job.where)
    task = training.task
    judged = (task.leading, task.share, task.maximise)
    try:
        yield from run.standings(max(1, math.ceil(job.share * run.rounds)))
    except NonFiniteError:
        epochs = run.samples / max(1, sum(training.clients.samples))
        return Reached(None, run.standing.done, epochs, run.samples, *judged, diverged=True)
    last = run.evaluations[-1]
    best = max(run.evaluations, key=lambda scores: task.rank(scores.validation_score))
    score = (last if job.by == "last" else best).validation_score
    score = None if score is None or not math.isfinite(score) else score
    return Reached(score, last.round, last.epochs, run.samples, *judged)


def _ended(reached: Reached) -> Standing:
    """The progress of a trial that was over before."""
    rounds = max(1, reached.rounds)
    return Standing(rounds, rounds, None, None, 0, 0.0, 0.0, reached.metric, reached.share, ())


def _without_test(source: Source) -> Source:
    """The same data set with the validation rows in the place of the test rows."""
    return replace(source, test=source.validation, test_clients=source.validation_clients)


def _key(share: float) -> str:
    return repr(float(share))


def _said(reached: Reached, point: Point) -> str:
    """The result of a trial, for a line of progress."""
    values = ", ".join(f"{name} {shown_value(value)}" for name, value in point.items())
    if reached.diverged:
        return f"diverged ({values})"
    score = format_score(reached.metric, reached.score, share=reached.share)
    return f"validation {score} after round {reached.rounds} ({values})"
