"""The content of a folder, in the form that pictures and page need: Report > ReportEntry > StoredRun.

A single run is a report of one entry with one run. Nothing here imports torch: a report must open at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from cutlayer import plugins
from cutlayer.errors import RunFolderError
from cutlayer.files import read_json, read_records
from cutlayer.folder import (
    ALGORITHM,
    CLASSES,
    CLIENTS,
    COMPARISON,
    CONFIG,
    DATA,
    EVALUATIONS,
    METRIC,
    RESULT,
    STEPS,
    TUNING,
    stored_config,
)
from cutlayer.stored import Amount, Count, Metric, Number, form_of, reading
from cutlayer.summary import mean_of_known, spread
from cutlayer.text import attacked, format_figure, spoken, with_unit
from cutlayer.tuned import Tuned, read_tuned


@dataclass(frozen=True)
class Measure:
    """The metric that scores are of. `share`: a fraction, shown in per cent; `maximise`: more is better."""

    name: str = "accuracy"
    share: bool = True
    maximise: bool = True

    @property
    def title(self) -> str:
        """Its name in a sentence."""
        return spoken(self.name)

    @property
    def label(self) -> str:
        """Its name with its unit."""
        return with_unit(self.name, share=self.share)

    def figure(self, mean: float | None, std: float | None = None) -> str:
        """A score without its unit."""
        return format_figure(mean, std, share=self.share)

    def text(self, score: float | None) -> str:
        """A score with its unit."""
        return self.figure(score) + (" %" if self.share and score is not None else "")

    def rank(self, score: float | None) -> tuple[bool, float]:
        """A value that is larger if the score is better; undefined scores are the worst."""
        if score is None or not math.isfinite(score):
            return False, 0.0
        return True, score if self.maximise else -score


@dataclass(frozen=True)
class StoredRun:
    """One run folder: evaluations and result as stored; for the steps the drawn values, one item per step."""

    seed: int
    config: dict[str, Any]
    evaluations: list[dict[str, Any]]
    losses: list[float]
    samples: list[int]
    seconds: float
    class_names: list[str]
    counts: list[list[int]]
    about: dict[str, Any]
    result: dict[str, Any] | None
    measure: Measure = Measure()
    scores: dict[str, dict[int, float]] = field(default_factory=dict)
    """Each client's score in the last evaluation, by the kind of test rows ("global", "own"), if it is defined."""
    meanings: dict[str, str] = field(default_factory=dict)
    """The meaning of the options of its chosen things."""
    client_names: list[str] = field(default_factory=list)
    account: str = ""

    def called(self, client: int) -> str:
        """The name of a client, where the data say it."""
        return self.client_names[client] if client < len(self.client_names) else str(client)

    @property
    def epochs(self) -> list[float]:
        """Epochs passed after each step."""
        # Scores.epochs = samples so far / training samples; the evaluation thus says what an epoch is.
        last = self.evaluations[-1]
        seen = sum(self.samples[: last["step"]])
        per_sample = last["epochs"] / seen if seen else 0.0
        passed, total = [], 0
        for samples in self.samples:
            total += samples
            passed.append(total * per_sample)
        return passed

    @property
    def best(self) -> dict[str, Any]:
        """The evaluation with the best validation score (the latest of equals), as in the run's own result."""
        return max(self.evaluations, key=lambda e: (*self.measure.rank(e["validation_score"]), e["round"]))


@dataclass(frozen=True)
class ResultRow:
    """One line of the result table. None: not known yet, or not defined. Scores and their spread over seeds; bytes are
    means over seeds.
    """

    title: str
    seeds: list[int]
    score: tuple[float | None, float | None]
    best_score: tuple[float | None, float | None]
    steps: float
    steps_per_second: float | None
    samples_per_second: float | None
    bytes_up: float
    bytes_down: float
    bytes_down_broadcast: float | None
    note: str = ""


@dataclass(frozen=True)
class ReportEntry:
    """One line of a comparison: an algorithm, or a variant with options of its own; `runs` have an evaluation."""

    name: str
    algorithm: str
    title: str
    runs: list[StoredRun]
    row: ResultRow

    @property
    def about(self) -> dict[str, Any]:
        """Title, summary and look of the algorithm."""
        return self.runs[0].about

    @property
    def measure(self) -> Measure:
        """The metric of its scores."""
        return self.runs[0].measure

    @property
    def note(self) -> str:
        """A remark on the row: that runs are not finished, or have stopped early."""
        early = [fact["stopped"] for fact in self.facts if fact.get("stopped")]
        if self.row.note or not early:
            return self.row.note
        return early[0] if len(self.runs) == 1 else f"{len(early)} of {len(self.runs)} runs stopped early (stop_after)"

    @property
    def facts(self) -> list[dict[str, Any]]:
        """The results of the runs that are done."""
        return [run.result for run in self.runs if run.result is not None]


@dataclass(frozen=True)
class Report:
    """The whole content of a report."""

    folder: Path
    config: dict[str, Any]
    entries: list[ReportEntry]
    comparison: bool
    unfinished: str
    """What is still missing, in a sentence; empty if everything is done."""
    tuned: Tuned | None = None
    """How the comparison was tuned, if it was."""

    @property
    def measure(self) -> Measure:
        """The metric of its scores; a plain score if entries differ in it."""
        found = {entry.measure for entry in self.entries}
        return found.pop() if len(found) == 1 else Measure("score", share=False)


class _Evaluation(msgspec.Struct):
    """What is read of a line of evaluations.jsonl; other versions of Cutlayer may write more."""

    round: Count
    step: Count
    epochs: Amount
    validation_score: Number
    test_score: Number
    validation_loss: Number = None
    test_loss: Number = None
    validation: dict[str, Metric] | None = None
    test: dict[str, Metric] | None = None
    own: dict[str, Metric] | None = None
    bytes_up: Count = 0
    bytes_down: Count = 0
    bytes_down_broadcast: Count = 0
    seconds: Amount = 0.0
    virtual_seconds: Amount | None = None


class _Step(msgspec.Struct):
    loss: float
    samples: Count
    seconds: Amount


class _Classes(msgspec.Struct):
    class_names: list[str]
    counts: list[list[Count]]
    client_names: list[str] = msgspec.field(default_factory=list)


class _Availability(msgspec.Struct):
    reachable: list[Amount]
    idle_seconds: list[Amount]
    link_seconds: list[Amount]
    rounds: list[Count]
    late_rounds: Count
    late_seconds: Amount


class _Staleness(msgspec.Struct):
    batches: list[Count]
    models: list[Count]
    batches_mean: list[Number]
    models_mean: list[Number]
    batches_most: list[Count | None]
    models_most: list[Count | None]
    batch_age: Number = None
    model_age: Number = None
    idle_seconds: list[Amount] | None = None


class _Result(msgspec.Struct):
    steps: Count
    samples: Count
    seconds: Amount
    bytes_up: Count
    bytes_down: Count
    test_score: Number
    best_test_score: Number
    fairness: dict[str, dict[str, Number]] = msgspec.field(default_factory=dict)
    bytes: list[dict[str, Any]] = msgspec.field(default_factory=list)
    availability: _Availability | None = None
    stopped: str = ""
    staleness: _Staleness | None = None


def read(folder: Path) -> Report:
    """Read a run or comparison folder. Raises RunFolderError if there is nothing to report."""
    config = stored_config(folder)
    with reading(folder):
        comparison = "algorithms" in config or any(folder.glob(f"*/seed-*/{CONFIG}"))
        report = _comparison(folder, config) if comparison else _single(folder, config)
    if not report.entries:
        raise RunFolderError(
            f"{str(folder)!r} has no evaluation yet, so there is nothing to draw: wait until the first one is done, or "
            f"go on with `cutlayer resume {folder}`"
        )
    return report


def _single(folder: Path, config: dict[str, Any]) -> Report:
    run = _run(folder)
    algorithm = str(config.get("algorithm", ""))
    if run is None:
        return Report(folder, config, [], False, "")
    title = attacked(_title(plugins.label(algorithm), algorithm, run.about), config.get("attack", []))
    entry = ReportEntry(plugins.label(algorithm), algorithm, title, [run], _measured(title, [run]))
    last = run.evaluations[-1]
    missing = f"it was last evaluated after {last['epochs']:.3g} epochs (step {last['step']:,})"
    return Report(folder, config, [entry], False, "" if run.result else missing)


def _comparison(folder: Path, config: dict[str, Any]) -> Report:
    algorithms = (plugins.label(str(name)) for name in config.get("algorithms", []))
    planned = [*algorithms, *map(str, config.get("variant", {}))]
    found = sorted({path.parent.parent.name for path in folder.glob(f"*/seed-*/{CONFIG}")})
    stored = read_json(folder / COMPARISON) or {"rows": []}
    rows = {str(row["entry"]): row for row in stored["rows"]}
    entries, absent, done, expected = [], [], 0, 0
    for name in dict.fromkeys([*planned, *found]):
        paths = list((folder / name).glob("seed-*"))
        runs = sorted(filter(None, map(_run, paths)), key=lambda run: run.seed)
        expected += max(len(config.get("seeds", [])), len(paths))
        done += sum(run.result is not None for run in runs)
        if not runs:
            absent.append(name)
            continue
        algorithm = str(runs[0].config.get("algorithm", name))
        found_title = attacked(_title(name, algorithm, runs[0].about), runs[0].config.get("attack", []))
        title = str(rows[name]["title"]) if name in rows else found_title
        row = _stored(rows[name]) if name in rows else _measured(title, runs)
        entries.append(ReportEntry(name, algorithm, title, runs, row))
    unfinished = ""
    if done < expected:
        waiting = f"; not evaluated yet: {', '.join(absent)}" if absent else ""
        unfinished = f"{done} of its {expected} runs are done{waiting}"
    return Report(folder, config, entries, True, unfinished, read_tuned(folder / TUNING))


def _run(folder: Path) -> StoredRun | None:
    """The run in `folder`; None if it has no evaluation yet."""
    evaluations = list(read_records(folder / EVALUATIONS, _Evaluation))
    if not evaluations:
        return None
    config = stored_config(folder)
    losses, samples, seconds = [], [], 0.0
    for record in read_records(folder / STEPS, _Step):
        losses.append(float(record["loss"]))
        samples.append(int(record["samples"]))
        seconds = float(record["seconds"])
    classes = read_json(folder / CLASSES, _Classes)
    if classes is None:
        raise RunFolderError(f"{str(folder)!r} lacks classes.json: restore that file, or run anew in another folder")
    measure = Measure(**(read_json(folder / METRIC, form_of(Measure, whole=True)) or {}))
    return StoredRun(
        seed=int(config.get("seed", 0)),
        config=config,
        evaluations=evaluations,
        losses=losses,
        samples=samples,
        seconds=seconds,
        class_names=list(map(str, classes["class_names"])),
        counts=classes["counts"],
        client_names=list(map(str, classes.get("client_names", ()))),
        account=str((read_json(folder / DATA) or {}).get("account", "")),
        about=_about(folder, str(config.get("algorithm", ""))),
        result=read_json(folder / RESULT, _Result),
        measure=measure,
        scores=_last_scores(folder, measure.name),
        meanings=(read_json(folder / ALGORITHM) or {}).get("meanings", {}),
    )


def _last_scores(folder: Path, metric: str) -> dict[str, dict[int, float]]:
    """Each client's score in the last evaluation."""
    found: dict[str, dict[int, float]] = {}
    for line in read_records(folder / CLIENTS):
        each = {int(k): own[metric] for k, own in line["clients"].items() if own.get(metric) is not None}
        found[str(line["on"])] = each
    return {where: each for where, each in found.items() if each}


def _stored(row: dict[str, Any]) -> ResultRow:
    """A row of comparison.json."""
    return ResultRow(
        title=str(row["title"]),
        seeds=list(row["seeds"]),
        score=_either(row, "score", "accuracy"),
        best_score=_either(row, "best_score", "best_accuracy"),
        steps=row["steps"],
        steps_per_second=row["steps_per_second"],
        samples_per_second=row["samples_per_second"],
        bytes_up=row["bytes_up"],
        bytes_down=row["bytes_down"],
        bytes_down_broadcast=row["bytes_down_broadcast"],
    )


def _either(row: dict[str, Any], name: str, before: str) -> tuple[float | None, float | None]:
    """Mean and spread under their name, or under the one that version 0.1.0 gave them."""
    found = name if f"{name}_mean" in row else before
    return row[f"{found}_mean"], row[f"{found}_std"]


def _measured(title: str, runs: list[StoredRun]) -> ResultRow:
    """The row from the runs themselves: from those that are done or, if none is, from all as far as they got."""
    done = [run for run in runs if run.result is not None]
    used = done or runs
    facts = [_facts(run) for run in used]

    def mean(name: str) -> float | None:
        return mean_of_known(fact[name] for fact in facts)

    def score(of: Callable[[StoredRun], Any]) -> tuple[float | None, float | None]:
        found = [of(run) for run in used]
        return (None, None) if None in found else spread(map(float, found))

    reached = min(run.evaluations[-1]["epochs"] for run in used)
    return ResultRow(
        title=title,
        seeds=[run.seed for run in used],
        score=score(lambda run: run.evaluations[-1]["test_score"]),
        best_score=score(lambda run: run.best["test_score"]),
        steps=mean("steps") or 0.0,
        steps_per_second=mean("steps_per_second"),
        samples_per_second=mean("samples_per_second"),
        bytes_up=mean("bytes_up") or 0.0,
        bytes_down=mean("bytes_down") or 0.0,
        bytes_down_broadcast=mean("bytes_down_broadcast"),
        note="" if done else f"not finished: after {reached:.3g} epochs",
    )


def _facts(run: StoredRun) -> dict[str, float | None]:
    """Costs of one run: of the whole if it is done, otherwise up to its last evaluation."""
    last = run.evaluations[-1]
    whole = run.result or {**last, "steps": last["step"], "samples": sum(run.samples[: last["step"]])}
    seconds = whole["seconds"]
    return {
        "steps": whole["steps"],
        "steps_per_second": whole["steps"] / seconds if seconds else None,
        "samples_per_second": whole["samples"] / seconds if seconds else None,
        "bytes_up": whole["bytes_up"],
        "bytes_down": whole["bytes_down"],
        "bytes_down_broadcast": whole.get("bytes_down_broadcast"),
    }


def _title(name: str, algorithm: str, about: dict[str, Any]) -> str:
    """An algorithm's title, or a variant's own name."""
    return str(about.get("title", name)) if name == plugins.label(algorithm) else name


def _about(folder: Path, algorithm: str) -> dict[str, Any]:
    """Title, summary and look of a run's algorithm: this package's own, or as the run has noted them. Nothing is
    imported for that.
    """
    own = plugins.index("algorithm").get(algorithm)
    if own is not None:
        return {"title": own.title, "summary": own.summary, **own.facts}
    return read_json(folder / ALGORITHM) or {}
