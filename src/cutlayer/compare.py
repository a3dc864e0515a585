"""Several algorithms on the same data, partitions, initial models and batches; several seeds; one table."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Unpack

from torch import nn

from cutlayer.build import Data, Model, assemble, by_name, deal
from cutlayer.errors import ConfigError, CutlayerWarning, RunFolderError
from cutlayer.files import read_json
from cutlayer.folder import COMPARISON, CONFIG, OWN_FILES, RESULT, Folder, refuse_used, stored_config
from cutlayer.keywords import CompareKeywords
from cutlayer.models.weights import renewed
from cutlayer.options import CompareConfig, RunConfig, by_reference, from_anywhere, overlaid
from cutlayer.plugins import label
from cutlayer.run import Record, Result, Run, Spent, own_objective, own_things, without_own
from cutlayer.stored import reading, remade
from cutlayer.summary import mean_of_known, spread
from cutlayer.tasks.own_loss import Loss
from cutlayer.text import attacked


@dataclass(frozen=True)
class Row(Spent):
    """One line of the table: an entry over its seeds. Scores are of `metric` (a `share` is in [0, 1]), with sample
    standard deviations; all else are means over seeds, bytes those of training.
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


class Comparison:
    """All runs of a comparison, one after another: iterate over (entry, seed, run, record), or call `run()`.

    With `out` every run has a folder `out/<entry>/seed-<n>`, and an interrupted comparison can be resumed.
    Raises UsageError before anything is trained or written.
    """

    def __init__(
        self,
        config: CompareConfig | None = None,
        *,
        model: Model | str | None = None,
        data: Data | str | None = None,
        loss: Loss | str | None = None,
        metrics: Mapping[str, Any] | Sequence[str] = (),
        out: str | Path | None = None,
        **options: Unpack[CompareKeywords],
    ) -> None:
        base = {} if config is None else config.model_dump(include=config.model_fields_set)
        self._model, self._data, names = by_name(model, data)
        self._make_anew()
        own_loss, own_metrics, asked = own_objective(loss, metrics)
        self._objective: dict[str, Any] = {"loss": own_loss, "metrics": own_metrics}
        self.config = CompareConfig.of(overlaid(base, by_reference({**options, **names, **asked})))
        self.plan = self.config.runs(frozenset(self.config.model_fields_set))
        self.out = None if out is None else Path(out)
        self._resumed = False
        self.results: dict[str, dict[int, Result]] = {entry: {} for entry in self.plan}
        if self.out is not None:
            _refuse_path_names(self.plan)
            refuse_used(self.out)

    @classmethod
    def resume(
        cls,
        out: str | Path,
        *,
        model: Model | None = None,
        data: Data | None = None,
        loss: Loss | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> Comparison:
        """A comparison that goes on where the one in `out` stopped. Raises RunFolderError where it can't."""
        own: dict[str, Any] = {"model": model, "data": data, "loss": loss, "metrics": metrics}
        config = CompareConfig.of(without_own(stored_config(Path(out)), Path(out), **own))
        comparison = cls(config, model=model, data=data, loss=loss, metrics=metrics or ())
        comparison.out, comparison._resumed = Path(out), True
        return comparison

    def _make_anew(self) -> None:
        """A module from Python is made anew for every seed, if its layers can draw their weights. Warns otherwise."""
        if not isinstance(self._model, nn.Module):
            return
        if (make := renewed(self._model)) is not None:
            self._model = make
        else:
            warnings.warn(
                "all seeds start from the same weights, those of the model that was given: some of its layers have no "
                "reset_parameters; give a function that makes it instead",
                CutlayerWarning,
                stacklevel=3,
            )

    def check(self) -> None:
        """Build every entry once, so that what is wrong is found before the first is trained. Raises UsageError."""
        judged: dict[str, str] = {}
        for entry, seeds in self.plan.items():
            first, *others = seeds.values()
            training = assemble(first, self._model, self._data, **self._objective)
            judged.setdefault(training.task.leading, entry)
            for config in others:
                deal(config, self._data)  # with another seed a client may stay without samples
        if len(judged) > 1:
            (metric, one), (other, two) = list(judged.items())[:2]
            raise ConfigError(
                f"{one!r} is judged by {metric} and {two!r} by {other}, which cannot stand in one column: give all the "
                "same primary_metric, or compare them apart"
            )

    def run(self) -> list[Row]:
        """Train everything and return the table."""
        for _ in self:
            pass
        return self.table()

    def __iter__(self) -> Iterator[tuple[str, int, Run, Record]]:
        self.check()
        if self.out is None:
            yield from self._train()
            return
        stored = {
            **from_anywhere(self.config.resolved()),
            **own_things(model=self._model, data=self._data, **self._objective),
        }
        with Folder.reopen(self.out) if self._resumed else Folder.create(self.out, stored) as folder:
            yield from self._train()
            folder.write_json(COMPARISON, {"rows": [asdict(row) for row in self.table()]})

    def table(self) -> list[Row]:
        """One row per entry that has a result."""
        return [_row(entry, self.plan[entry], results) for entry, results in self.results.items() if results]

    def _train(self) -> Iterator[tuple[str, int, Run, Record]]:
        # Seed by seed, not entry by entry: an interrupted comparison then has all entries on the seeds it got to.
        for seed in self.config.seeds:
            for entry, runs in self.plan.items():
                where = None if self.out is None else self.out / entry / f"seed-{seed}"
                done = _finished(where)
                if done is None:
                    run = self._one(runs[seed], where)
                    for record in run:
                        yield entry, seed, run, record
                    assert run.result is not None
                    done = run.result
                self.results[entry][seed] = done

    def _one(self, config: RunConfig, where: Path | None) -> Run:
        own = {**self._objective, "metrics": self._objective["metrics"] or ()}
        if where is not None and (where / CONFIG).exists():
            return Run.resume(where, model=self._model, data=self._data, **own)
        return Run(config, model=self._model, data=self._data, out=where, **own)


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
