"""Several algorithms on the same data, partitions, initial models and batches; several seeds; one table."""

from __future__ import annotations

import json
import statistics
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Unpack

from torch import nn

from cutlayer.allocator import give_back
from cutlayer.build import Data, Model, Training, assemble, by_name, deal, load_source
from cutlayer.collective import world
from cutlayer.crew import News, checked, packed, turns
from cutlayer.effort import Effort
from cutlayer.engine.ways import Ways
from cutlayer.errors import ConfigError, CutlayerWarning, RunFolderError
from cutlayer.files import read_json, replace_file
from cutlayer.folder import (
    COMPARISON,
    CONFIG,
    OWN_FILES,
    RESULT,
    TRIALS,
    TUNING,
    Folder,
    stored_config,
)
from cutlayer.footprint import footprint, refuse_unless_fitting, room
from cutlayer.keywords import CompareKeywords
from cutlayer.loggers import Audience
from cutlayer.markup import html_table
from cutlayer.models.weights import renewed
from cutlayer.observations import Observations
from cutlayer.options import CompareConfig, RunConfig, by_reference, from_anywhere, overlaid
from cutlayer.plugins import label
from cutlayer.references import bibtex
from cutlayer.run import Record, Result, Run, Spent, Standing, overwritable, own_objective, own_things, without_own
from cutlayer.shown import ShownLine
from cutlayer.stored import reading, remade
from cutlayer.summary import mean_of_known, spread
from cutlayer.sweep import expanded
from cutlayer.tasks.own_loss import Loss
from cutlayer.text import attacked, format_bytes, format_figure, with_unit
from cutlayer.trials import LegJob, Reached, TrialNews, Trials, train_leg, trial_name
from cutlayer.tuned import Tuned, read_tuned


@dataclass(frozen=True)
class Row(Spent):
    """One line of the table: an entry over its seeds.

    Scores are values of `metric` (a `share` is in [0, 1]), with sample standard deviations. All other values are means
    over seeds. Bytes are those of training.
    """

    entry: str
    algorithm: str
    title: str
    seeds: tuple[int, ...]
    metric: str
    share: bool
    maximise: bool
    score_mean: float | None
    score_std: float | None
    best_score_mean: float | None
    best_score_std: float | None
    steps: float
    steps_per_second: float
    samples_per_second: float
    bytes_up: float
    bytes_down: float
    bytes_down_broadcast: float
    seconds: float


@dataclass(frozen=True)
class _Own:
    """The user's objects that cannot be found by name, for all runs; `work` is what a worker does for each run.
    `quiet`: without the warnings of building it, which were already given when the comparison was checked.
    """

    model: Model | None
    data: Data | None
    loss: Loss | None
    metrics: Mapping[str, Any] | None
    callbacks: Sequence[object]
    quiet: bool

    @property
    def objective(self) -> dict[str, Any]:
        """The loss and the metrics."""
        return {"loss": self.loss, "metrics": self.metrics}

    def made(self) -> Model | None:
        """The model, or a function that makes it anew for every seed, if its layers can draw their weights."""
        renewing = renewed(self.model) if isinstance(self.model, nn.Module) else None
        return self.model if renewing is None else renewing

    def run(self, config: RunConfig, where: Path | None, model: Model | None) -> Run:
        """The run, or the continuation of the one in `where`."""
        own = {**self.objective, "metrics": self.metrics or (), "callbacks": self.callbacks}
        if where is not None and world().first(lambda: (where / CONFIG).exists()):
            return Run.resume(where, model=model, data=self.data, **own)
        return Run(config, model=model, data=self.data, out=where, **own)

    def work(self, job: tuple[RunConfig, Path | None] | LegJob) -> Generator[Standing, None, Result | Reached]:
        """Train one run, or a leg of a trial: yields its progress, and returns its result."""
        with warnings.catch_warnings():
            if self.quiet:
                warnings.simplefilter("ignore", CutlayerWarning)
            if isinstance(job, LegJob):
                return (yield from self._leg(job, self.made()))
            run = self.run(*job, self.made())
        yield from run.standings()
        assert run.result is not None
        return run.result

    def _leg(self, job: LegJob, model: Model | None) -> Generator[Standing, None, Reached]:
        """Train a leg of a trial."""

        def make(config: RunConfig, ways: Ways | None) -> Training:
            return assemble(config, model, self.data, **self.objective, ways=ways)

        return (yield from train_leg(job, make, model, self.data))


@dataclass(frozen=True)
class Progress:
    """The progress of the run of `entry` with `seed`, and whether it has `ended`; or of a trial with which the entry is
    tuned, counted from 0, with what it `came` to when a part of its training is done.
    """

    entry: str
    seed: int
    standing: Standing
    ended: bool = False
    trial: int | None = None
    came: str = ""

    @property
    def name(self) -> str:
        """The name of the run or trial."""
        return run_name(self.entry, self.seed) if self.trial is None else trial_name(self.entry, self.trial)


class Comparison:
    """All runs of a comparison. Call `run()`, or iterate over (entry, seed, run, record), or over `progress()`.

    With `out`, every run has a folder `out/<entry>/seed-<n>`, and an interrupted comparison can be resumed. With
    `overwrite`, that folder may hold an earlier run or comparison, which is deleted when this one begins. With `jobs`,
    that number of runs is trained at the same time, each in its own process with its share of the cores; there are then
    no records to iterate over. `callbacks` are called for all runs, one after another. With `tuning`, each entry is
    tuned first (`tuned` has the results); then all seeds are trained with the chosen values. Raises UsageError before
    anything is trained or written.
    """

    def __init__(
        self,
        config: CompareConfig | None = None,
        *,
        model: Model | str | None = None,
        data: Data | str | None = None,
        loss: Loss | str | None = None,
        metrics: Mapping[str, Any] | Sequence[str] = (),
        callbacks: Sequence[object] = (),
        out: str | Path | None = None,
        overwrite: bool = False,
        jobs: int = 1,
        **options: Unpack[CompareKeywords],
    ) -> None:
        base = {} if config is None else config.model_dump(include=config.model_fields_set)
        own_model, own_data, names = by_name(model, data)
        own_loss, own_metrics, asked = own_objective(loss, metrics)
        self.jobs = checked(jobs)
        self._own = _Own(own_model, own_data, own_loss, own_metrics, callbacks, quiet=jobs > 1)
        if callbacks and jobs > 1:
            raise ConfigError(
                f"callbacks are called in this process, and jobs = {jobs} trains in others: use jobs = 1, or a logger "
                "that is found by name (log_to)"
            )
        self._model = self._own.made()
        self._warn_of_equal_starts()
        self.config = expanded(CompareConfig.of(overlaid(base, by_reference({**options, **names, **asked}))))
        self.effort = Effort.of(self.config) if self.config.tuning else None
        self.tuned: Tuned | None = None
        self.plan = self.config.runs(frozenset(self.config.model_fields_set))
        self._resumed, self._replaces = False, overwrite  # until the folder is this comparison's
        self.results: dict[str, dict[int, Result]] = {entry: {} for entry in self.plan}
        if jobs > 1 and world().several:
            raise ConfigError(
                f"jobs = {jobs} is not possible with {world().size} ranks, which train each run together: use jobs = 1"
            )
        if out is not None:
            _refuse_path_names(self.plan)
        self.out = overwritable(out, overwrite)

    @classmethod
    def resume(
        cls,
        out: str | Path,
        *,
        model: Model | None = None,
        data: Data | None = None,
        loss: Loss | None = None,
        metrics: Mapping[str, Any] | None = None,
        callbacks: Sequence[object] = (),
        jobs: int = 1,
    ) -> Comparison:
        """Continue the comparison in `out` where it stopped. Raises RunFolderError if that is not possible."""
        own: dict[str, Any] = {"model": model, "data": data, "loss": loss, "metrics": metrics}
        stored = world().first(lambda: stored_config(Path(out)))
        config = CompareConfig.of(without_own(stored, Path(out), **own))
        comparison = cls(
            config, model=model, data=data, loss=loss, metrics=metrics or (), callbacks=callbacks, jobs=jobs
        )
        comparison.out, comparison._resumed = Path(out), True
        if (
            comparison.effort is not None
            and (tuned := world().first(lambda: read_tuned(Path(out) / TUNING))) is not None
        ):
            comparison._settle(comparison.effort, tuned)
        return comparison

    def _warn_of_equal_starts(self) -> None:
        """Warns of a module from Python that cannot be initialised again for every seed."""
        if isinstance(self._model, nn.Module):
            warnings.warn(
                "all seeds start from the same weights, those of the model that was given: some of its layers have no "
                "reset_parameters; give a function that makes it instead",
                CutlayerWarning,
                stacklevel=3,
            )

    def check(self) -> None:
        """Build every entry once, so that errors are found before anything is trained. Raises UsageError."""
        self._check_tuning()
        judged: dict[str, str] = {}
        needs: dict[str, int] = {}
        for entry, seeds in self.plan.items():
            first, *others = seeds.values()
            training, dealt = self._built(entry, first), [*others, first] if self.waiting_trials else others
            judged.setdefault(training.task.leading, entry)
            Audience.of(first, self._own.callbacks)
            for config in dealt:
                deal(config, self._own.data)  # with another seed, a client may get no samples
            if self.jobs > 1:
                bytes_of_it = footprint(training, first, self.jobs)
                needs |= {run_name(e, seed): bytes_of_it for e, seed in self.waiting if e == entry}
            del training
        if len(judged) > 1:
            (metric, one), (other, two) = list(judged.items())[:2]
            raise ConfigError(
                f"{one!r} is scored by {metric} and {two!r} by {other}, which cannot share a column: give all entries "
                "the same primary_metric, or compare them separately"
            )
        if self.jobs > 1:
            packed(self._own.work, self.jobs)
            give_back()
            refuse_unless_fitting(needs, self.jobs, room(next(iter(self.plan[entry].values())).device))

    @property
    def waiting(self) -> list[tuple[str, int]]:
        """(entry, seed) of the runs that are not done yet, in their order. The order goes seed by seed, not entry by
        entry, so that an interrupted comparison has results of all entries for the seeds that it reached.
        """
        runs = [(entry, seed) for seed in self.config.seeds for entry in self.plan]
        return world().first(lambda: [(entry, seed) for entry, seed in runs if not self._has_ended(entry, seed)])

    def run(self, *, progress: bool = False) -> Observations[Row]:
        """Train everything and return the table. With `progress` a line says how far it is, in a notebook too."""
        with ShownLine() as line:
            for now in self.progress():
                if progress:
                    done = sum(map(len, self.results.values()))
                    name = run_name(now.entry, now.seed)
                    runs = f"{done} of {sum(map(len, self.plan.values()))} runs done"
                    line.show(f"{runs}; {name}: {now.standing.line}", keep=now.ended)
        return self.table()

    def __iter__(self) -> Iterator[tuple[str, int, Run, Record]]:
        if self.jobs > 1:
            raise ConfigError(
                f"jobs = {self.jobs} trains in other processes, whose records are not handed on: iterate over "
                "progress(), or use jobs = 1"
            )
        self.check()
        with self._held(), turns(self._own.work, 1, "") as through:
            for _ in self._tune(through):
                pass
            for entry, seed in self.waiting:
                run = self._own.run(*self._job(entry, seed), self._model)
                for record in run:
                    yield entry, seed, run, record
                assert run.result is not None
                self._take(entry, seed, run.result)

    def progress(self) -> Iterator[Progress]:
        """Train everything, the trials of a tuning first, and yield the progress of each run a few times a second, at
        every evaluation and at its end.
        """
        self.check()
        again = "start it again" if self.out is None else f"resume {str(self.out)!r}"
        standings: dict[str, Standing] = {}
        with self._held(), turns(self._own.work, self.jobs, again) as through:
            yield from self._tune(through)
            runs = {run_name(*which): which for which in self.waiting}
            jobs = {name: self._job(*which) for name, which in runs.items()}
            for news in through(jobs):
                if news.ended:
                    self._take(*runs[news.name], news.value)
                else:
                    standings[news.name] = news.value
                yield Progress(*runs[news.name], standings[news.name], news.ended)

    @property
    def waiting_trials(self) -> list[tuple[str, int]]:
        """(entry, number) of all trials, if the comparison is still to be tuned."""
        if self.effort is None or self.tuned is not None:
            return []
        return [(entry, number) for entry in self.effort.spaces for number in range(self.effort.trials)]

    def _check_tuning(self) -> None:
        """Raises UsageError for a tuning that cannot be made."""
        self._share_test_rows()
        if self.effort is None or self.tuned is not None:
            return
        if world().several:
            raise ConfigError(
                f"tuning is not possible with {world().size} ranks: tune in one process, without torchrun or srun; "
                f"once {TUNING} is there, ranks can go on with `cutlayer resume`"
            )

    def _built(self, entry: str, first: RunConfig) -> Training:
        """What the first run of an entry trains, or if the entry is still to be tuned, one of its trials; every kind of
        trial is built. Raises UsageError.
        """
        tuned = self.effort is not None and self.tuned is None and entry in self.effort.spaces
        if self.effort is None or not tuned:
            return assemble(first, self._model, self._own.data, **self._own.objective)
        for point in self.effort.kinds(entry):
            trial = self.effort.run(entry, point)
            training = assemble(trial, self._model, self._own.data, **self._own.objective)
            if not len(training.source.validation):
                raise ConfigError(
                    "tuning needs validation rows to choose by, and there are none: hold some out, such as "
                    "validation = 0.1"
                )
        return training

    def _share_test_rows(self) -> None:
        """If test rows are drawn by a seed, all runs use those of the trials. Otherwise a trial could be trained on
        rows on which a run is tested.
        """
        drawn: dict[tuple[str, str], bool] = {}
        for entry, runs in self.plan.items() if self.effort is not None else ():
            first = next(iter(runs.values()))
            read = first.data, first.data_format
            if first.test_seed is None and read not in drawn:
                drawn[read] = load_source(first, self._own.data).test_drawn
            if self.effort is not None and first.test_seed is None and drawn[read]:
                shared = {"test_seed": self.effort.seed}
                self.plan[entry] = {seed: run.model_copy(update=shared) for seed, run in runs.items()}

    @property
    def _shared_test_seed(self) -> int | None:
        """The seed that has drawn the test rows of all entries and seeds; None if none has, or not of all."""
        found = {run.test_seed for runs in self.plan.values() for run in runs.values()}
        return found.pop() if len(found) == 1 else None

    def _tune(self, through: Callable[[Mapping[str, Any]], Iterator[News]]) -> Iterator[Progress]:
        """Tune all entries, unless this is done; yields the progress of the trials."""
        if self.effort is None or self.tuned is not None:
            return
        with ExitStack() as stack:
            where = self.out / TRIALS if self.out is not None else Path(stack.enter_context(TemporaryDirectory()))
            trials = Trials(self.effort, where).train(through)
            tuned = yield from self._told(trials)
        tuned = replace(tuned, test_seed=self._shared_test_seed)
        self._settle(self.effort, tuned)
        self._share_test_rows()
        for warning in tuned.warnings:
            warnings.warn(warning, CutlayerWarning, stacklevel=2)
        if self.out is not None:
            replace_file(self.out / TUNING, json.dumps(asdict(tuned), indent=1).encode())

    def _told(self, trials: Generator[TrialNews, None, Tuned]) -> Generator[Progress, None, Tuned]:
        """The progress of trials as progress of the comparison."""
        assert self.effort is not None
        while True:
            try:
                news = next(trials)
            except StopIteration as end:
                tuned: Tuned = end.value
                return tuned
            yield Progress(news.entry, self.effort.seed, news.standing, news.ended, news.number, news.came)

    def _settle(self, effort: Effort, tuned: Tuned) -> None:
        """Use the chosen values."""
        self.tuned = tuned
        chosen = effort.chosen({entry: found.values for entry, found in tuned.entries.items()})
        self.plan = chosen.runs(frozenset(chosen.model_fields_set))

    def _repr_html_(self) -> str:
        """What a notebook shows: a line for each entry that has a result."""
        lines = [
            (
                row.title,
                f"{with_unit(row.metric, share=row.share)}: "
                + format_figure(row.score_mean, row.score_std, share=row.share),
                f"{len(row.seeds)} of {len(self.config.seeds)}",
                format_bytes(round(row.bytes_up)),
                format_bytes(round(row.bytes_down)),
            )
            for row in self.table()
        ]
        heads = ("", "test score", "seeds", "sent by clients", "sent to clients")
        return html_table(f"{len(lines)} of {len(self.plan)} entries have results", heads, lines)

    def cite(self) -> str:
        """BibTeX of what the runs used that have a result: methods, data, models and libraries."""
        done = [result for results in self.results.values() for result in results.values()]
        return bibtex(used for result in done for used in result.used)

    def table(self) -> Observations[Row]:
        """One row per entry that has a result; `table().to_pandas()` has the columns of table.csv."""
        rows = (_row(entry, self.plan[entry], results) for entry, results in self.results.items() if results)
        return Observations(rows, _plain)

    @contextmanager
    def _held(self) -> Iterator[None]:
        """The folder, if there is one, locked against other processes during the training."""
        for (entry, seed), result in world().first(self._finished).items():
            self._take(entry, seed, result)
        if self.out is None:
            yield
            return
        own = self._own
        stored = {
            **from_anywhere(self.config.resolved()),
            **own_things(model=own.model, data=own.data, **own.objective),
        }
        with Folder.held(self.out, stored, again=self._resumed, overwrite=self._replaces) as folder:
            self._replaces = False
            yield
            folder.write_json(COMPARISON, {"rows": [asdict(row) for row in self.table()]})

    def _finished(self) -> dict[tuple[str, int], Result]:
        """The results of the runs that are done already."""
        runs = [(entry, seed) for entry, seeds in self.plan.items() for seed in seeds if not self._replaces]
        found = {(entry, seed): _finished(self._where(entry, seed)) for entry, seed in runs}
        return {which: result for which, result in found.items() if result is not None}

    def _where(self, entry: str, seed: int) -> Path | None:
        return None if self.out is None else self.out / entry / f"seed-{seed}"

    def _job(self, entry: str, seed: int) -> tuple[RunConfig, Path | None]:
        return self.plan[entry][seed], self._where(entry, seed)

    def _has_ended(self, entry: str, seed: int) -> bool:
        where = None if self._replaces else self._where(entry, seed)
        return seed in self.results[entry] or (where is not None and (where / RESULT).exists())

    def _take(self, entry: str, seed: int, result: Result) -> None:
        """Note a result; the seeds keep their order, whichever ends first."""
        found = {**self.results[entry], seed: result}
        self.results[entry] = {s: found[s] for s in self.config.seeds if s in found}


def run_name(entry: str, seed: int) -> str:
    """The name of a run of a comparison."""
    return f"{entry}, seed {seed}"


def _finished(where: Path | None) -> Result | None:
    """The result of a run that is done already."""
    stored = None if where is None else read_json(where / RESULT)
    if where is None or stored is None:
        return None
    with reading(where / RESULT):
        return remade(Result, stored)


def _refuse_path_names(plan: Mapping[str, object]) -> None:
    """Entries become folder names. Raises RunFolderError for those that can't."""
    for entry in plan:
        if "/" in entry or entry.startswith(".") or not entry.strip() or entry in OWN_FILES:
            raise RunFolderError(f"variant {entry!r} cannot name a folder: use letters, digits, spaces and dashes")


def _plain(row: Row) -> dict[str, Any]:
    """A line of the table as in table.csv."""
    return {
        "entry": row.entry,
        "algorithm": row.algorithm,
        "seeds": len(row.seeds),
        "metric": row.metric,
        "score": row.score_mean,
        "score_std": row.score_std,
        "best_score": row.best_score_mean,
        "best_score_std": row.best_score_std,
        "steps": row.steps,
        "samples_per_second": row.samples_per_second,
        "bytes_up": row.bytes_up,
        "bytes_down": row.bytes_down,
        "bytes_down_broadcast": row.bytes_down_broadcast,
    }


def _row(entry: str, configs: Mapping[int, RunConfig], results: Mapping[int, Result]) -> Row:
    first = next(iter(configs.values()))
    algorithm = first.algorithm

    def mean(name: str) -> float:
        return statistics.fmean(getattr(r, name) for r in results.values())

    def scores(name: str) -> tuple[float | None, float | None]:
        found = [getattr(r, name) for r in results.values()]
        return (None, None) if None in found else spread(found)

    last, best = scores("test_score"), scores("best_test_score")
    result = next(iter(results.values()))
    return Row(
        entry=entry,
        algorithm=algorithm,
        title=attacked(first.title if entry == label(algorithm) else entry, first.attack),
        seeds=tuple(results),
        metric=result.metric,
        share=result.share,
        maximise=result.maximise,
        score_mean=last[0],
        score_std=last[1],
        best_score_mean=best[0],
        best_score_std=best[1],
        steps=mean("steps"),
        steps_per_second=mean("steps_per_second"),
        samples_per_second=mean("samples_per_second"),
        bytes_up=mean("bytes_up"),
        bytes_down=mean("bytes_down"),
        bytes_down_broadcast=mean("bytes_down_broadcast"),
        seconds=mean("seconds"),
        **{f.name: mean_of_known(getattr(r, f.name) for r in results.values()) for f in fields(Spent)},
    )
