"""The run loop: rounds, records, evaluations, checkpoints. The composition root of the Python API."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, Unpack

import msgspec
import torch
from torch import Tensor, nn

from cutlayer import checkpoint, plugins
from cutlayer.algorithms import steps_of
from cutlayer.allocator import give_back
from cutlayer.build import Data, Model, Training, assemble, by_name
from cutlayer.citing import used_by
from cutlayer.collective import known, world
from cutlayer.costs.flops import ModelFlops
from cutlayer.costs.measured import Meter
from cutlayer.data.own import own_code
from cutlayer.engine.ways import Ways
from cutlayer.errors import (
    ConfigError,
    CutlayerWarning,
    NonFiniteError,
    RunFolderError,
    StepLostError,
    TrainingError,
    UsageError,
)
from cutlayer.features import KeptFeatures
from cutlayer.files import replace_file
from cutlayer.folder import (
    ALGORITHM,
    BEST,
    CHECKPOINT,
    CLASSES,
    CLIENTS,
    CONFIG,
    DATA,
    ENGINE,
    EVALUATIONS,
    LAST,
    LOGS,
    METRIC,
    RESULT,
    SNAPSHOTS,
    STEPS,
    Folder,
    refuse_used,
    stored_config,
)
from cutlayer.keywords import RunKeywords
from cutlayer.loggers import Audience, RunStart
from cutlayer.markup import html_table
from cutlayer.observations import Observations, flat
from cutlayer.options import RunConfig, by_reference, from_anywhere, normalised, overlaid
from cutlayer.references import Used, bibtex
from cutlayer.schedules import Schedule, WarmedUp
from cutlayer.scoring import RECALL, backward_transfer, fairness, judged, performance_gap, reported
from cutlayer.shown import ShownLine
from cutlayer.stored import Amount, Count, Digits, MalformedError, Metric, Stored, checked, parsed, reading, remade
from cutlayer.tasks.own_loss import Loss
from cutlayer.text import attacked, format_bytes, format_duration, format_figure, format_score, spoken
from cutlayer.trained import Predictions, TrainedModel, Whose, find_trained
from cutlayer.types import Evaluation, Round, Step
from cutlayer.verbs import LEARN

_ANYTIME = frozenset({"client_states"})  # options that may change when a run continues, since they change no number
_TOLD_EVERY = 0.1  # seconds between two reports of a run's progress


@dataclass(frozen=True)
class Record:
    """One training step, as written to steps.jsonl. Bytes are cumulative, only those of training, and count each
    message once per receiver.
    """

    step: int
    round: int
    loss: float
    clients: tuple[int, ...]
    active: tuple[int, ...]
    samples: int
    client_lr: float
    server_lr: float | None
    bytes_up: int
    bytes_down: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Modelled:
    """Virtual time, and modelled energy of all clients together and of the server, if the run has a client device.
    Means over the clients: `idle_seconds` that a client waits in the rounds in which it takes part; with a trace also
    `link_seconds`, the part of these for its link, and `reachable`, the fraction of the time in which it can be
    reached. None: not known.
    """

    virtual_seconds: float | None = None
    clients_joules: float | None = None
    clients_marginal_joules: float | None = None
    server_joules: float | None = None
    idle_seconds: float | None = None
    link_seconds: float | None = None
    reachable: float | None = None


@dataclass(frozen=True, kw_only=True)
class Spent(Modelled):
    """Also FLOPs of training, of a client in the mean and of the server, and the energy that this process's machine
    used. If clients work at their own pace: the mean age of a batch when it was used, in server steps, and of a model,
    in averagings. None: not known, not measured.
    """

    client_flops: float | None = None
    server_flops: float | None = None
    measured_joules: float | None = None
    batch_age: float | None = None
    model_age: float | None = None


@dataclass(frozen=True)
class Scores(Modelled):
    """One evaluation, as written to evaluations.jsonl, with time and energy so far.

    A score is the value of the run's primary metric (an accuracy is in [0, 1]), as the mean over the clients' models.
    It is None if the metric is not defined. `test_score_worst` is the score of the worst model,
    `test_score_worst_tenth` the mean over the worst tenth of the models, and `test_score_std` their standard deviation.
    `own_score` is the mean over the clients' own test rows, if they have any. `validation` and `test` contain all
    metrics, also as means.
    """

    round: int
    step: int
    epochs: float
    validation_score: float | None
    validation_loss: float | None
    test_score: float | None
    test_loss: float
    test_score_worst: float | None
    validation: dict[str, Any] | None
    test: dict[str, Any]
    bytes_up: int
    bytes_down: int
    bytes_down_broadcast: int
    seconds: float
    test_score_std: float | None = None
    test_score_worst_tenth: float | None = None
    own_score: float | None = None
    own: dict[str, Any] | None = None


@dataclass(frozen=True)
class Result(Spent):
    """The result of a finished run.

    `metric` is the primary metric, to which the scores belong. If `share` is true, it is a fraction in [0, 1]; if
    `maximise` is true, larger values are better. `test_score` is the score of the last evaluation. `best_test_score` is
    the score of the evaluation with the best validation score, which is what the paper reports. `test` contains all
    metrics at the end, as means over the clients' models; `own` contains those on each client's own test rows.
    `fairness` describes how the score differs between clients.

    `bytes` has one row per direction and kind, under every convention. `measured_by` says how the energy of this
    machine is measured, or why it is not. `attack` names what hostile clients did in a simulation; scores then leave
    these clients out. With a trace, `availability` says what it meant for each client, and for rounds in which no
    client could be reached. If clients work at their own pace, `staleness` says how old their batches and models were
    when the server used them, and how long each client waited. `rounds` is the number of trained rounds. `stopped` is a
    sentence that says why training ended before its last round (`stop_after`), and is empty if it did not. `used` lists
    what there is to cite.
    """

    algorithm: str
    engine: str
    metric: str
    share: bool
    maximise: bool
    test_score: float | None
    best_test_score: float | None
    best_round: int
    rounds: int
    steps: int
    samples: int
    seconds: float
    bytes_up: int
    bytes_down: int
    bytes_down_broadcast: int
    test: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] | None = None
    fairness: dict[str, Any] = field(default_factory=dict)
    evaluation_seconds: float = 0.0
    bytes: list[dict[str, Any]] = field(default_factory=list)
    measured_by: str = "not measured"
    attack: tuple[str, ...] = ()
    availability: dict[str, Any] | None = None
    staleness: dict[str, Any] | None = None
    stopped: str = ""
    used: list[Used] = field(default_factory=list, repr=False)

    def cite(self) -> str:
        """BibTeX of what the run used: methods, data, models and libraries, and comments about what has no entry."""
        return bibtex(self.used)

    @property
    def steps_per_second(self) -> float:
        """Training steps per second of training (evaluations and checkpoints apart)."""
        return self.steps / self.seconds

    @property
    def samples_per_second(self) -> float:
        """Training samples per second of training."""
        return self.samples / self.seconds

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        figure, unit = partial(format_figure, share=self.share), " %" if self.share else ""
        lines = [
            (f"test {spoken(self.metric)}{unit}", figure(self.test_score)),
            (f"at the best validation, round {self.best_round}", figure(self.best_test_score)),
            ("rounds", f"{self.rounds:,}"),
            ("steps", f"{self.steps:,}"),
            ("training time", format_duration(self.seconds)),
            ("sent by clients", format_bytes(self.bytes_up)),
            ("sent to clients", format_bytes(self.bytes_down)),
        ]
        lines += [("ended early", self.stopped)] if self.stopped else []
        return html_table(attacked(plugins.label(self.algorithm), self.attack), (), lines)


@dataclass(frozen=True)
class Standing:
    """How far a run is, in plain values that another process can send: `done` of its `rounds`, the loss of the last
    step, the last evaluation and how many there were, seconds of training and of evaluation. `metric` and `share` are
    the task's; `remarks` say what was read and chosen, a line each; `stopped` says why a run ended early.
    """

    done: int
    rounds: int
    loss: float | None
    latest: Scores | None
    evaluations: int
    seconds: float
    evaluating: float
    metric: str
    share: bool
    remarks: tuple[str, ...]
    stopped: str = ""

    @property
    def line(self) -> str:
        """How far it is, in words."""
        words = [f"round {self.done} of {self.rounds}"]
        words += [] if self.loss is None else [f"loss {self.loss:.3f}"]
        if self.latest is not None:
            words.append(f"test {format_score(self.metric, self.latest.test_score, share=self.share)}")
        if 0 < self.done < self.rounds and not self.stopped:
            left = (self.rounds - self.done) * (self.seconds + self.evaluating) / self.done
            words.append(f"{format_duration(left)} left")
        return ", ".join(words)


class RunState(Stored):
    """The content of a run's checkpoint."""

    config: dict[str, Any]
    fingerprint: dict[str, str]
    rounds: Count
    steps: Count
    samples: Count
    seconds: Amount
    measured: dict[str, Any]
    evaluations: list[dict[str, Any]]
    evaluating: Amount
    by_client: dict[Literal["global", "own"], dict[Digits, dict[str, Metric]]]
    offsets: dict[str, Count]
    server: dict[str, Any]
    clients: dict[str, Any]
    code: dict[str, str] = msgspec.field(default_factory=dict)
    served: tuple[Count, Count] | None = None


class Snapshot(Stored):
    """The models of some clients after a round."""

    rounds: Count
    steps: Count
    models: dict[Digits, dict[str, Tensor]]


class Run:
    """One training run. Iterate over it to get its records, or call `run()`.

    Options are keywords (see docs/options.md) or a ready `config`. In place of a name you can pass an object: a class
    or a configured instance of an algorithm, partition, schedule or defence. `model` can be a module or a function that
    makes one. `data` can be tensors (x, y), a dataset or a Source. `loss` is a function of outputs and targets that
    replaces the task's loss; it returns the loss of each row, or their mean. `metrics` are names of additional metrics,
    or a dictionary of functions of predictions and targets, or of objects with update, compute and reset. `callbacks`
    are objects with some of the methods of `loggers.Callback`.

    With `out`, the run is written to that folder and can be resumed. With `overwrite`, the folder may hold an earlier
    run or comparison, which is deleted when this one begins. `training` replaces the simulation that is built from all
    this (for clients on other machines, see `remote`).

    Raises UsageError before anything is trained or written, and NonFiniteError (with step and client) during training.
    """

    def __init__(
        self,
        config: RunConfig | None = None,
        *,
        model: Model | str | None = None,
        data: Data | str | None = None,
        loss: Loss | str | None = None,
        metrics: Mapping[str, Any] | Sequence[str] = (),
        callbacks: Sequence[object] = (),
        out: str | Path | None = None,
        overwrite: bool = False,
        training: Training | None = None,
        **options: Unpack[RunKeywords],
    ) -> None:
        self._model, self._data, names = by_name(model, data)
        self._loss, self._metrics, asked = own_objective(loss, metrics)
        self.config = _merged(config, by_reference({**options, **names, **asked}))
        self.out, self._overwrite = overwritable(out, overwrite), overwrite
        if training is not None and (self._loss is not None or self._metrics):
            raise UsageError("a training that is given has its loss and metrics already: leave loss and metrics out")
        if training is None:
            training = assemble(self.config, self._model, self._data, loss=self._loss, metrics=self._metrics)
        _refuse_blind(self.config, training)
        told = Audience.of(self.config, callbacks)
        self._audience = told if world().leads else Audience({})
        self.training = training
        self.result: Result | None = None
        self.evaluations: Observations[Scores] = self._observed(())
        self._start_round = 0
        self._step = self._samples = 0
        self._served = self._pooled = 0  # rows of the server's steps; those of them that no client sent for the step
        self._last: Record | None = None
        self._seconds = 0.0
        self.evaluating = 0.0
        self.by_client: dict[str, Evaluation | None] = {}
        self._meter = Meter()
        self._resumed = self._begun = False
        self._until: int | None = None  # rounds after which the run pauses

    @classmethod
    def resume(
        cls,
        out: str | Path,
        *,
        model: Model | str | None = None,
        data: Data | str | None = None,
        loss: Loss | str | None = None,
        metrics: Mapping[str, Any] | Sequence[str] = (),
        callbacks: Sequence[object] = (),
        training: Training | None = None,
        **options: Unpack[RunKeywords],
    ) -> Run:
        """Continue from the last checkpoint in `out`, or from the beginning if there is none yet.

        A model, data, loss or metrics that are not found by name must be passed again; callbacks may be. Raises
        RunFolderError if the folder is not a run, or if its checkpoint is damaged or belongs to another configuration.
        """
        out = Path(out)
        stored = world().first(lambda: stored_config(out))
        model, data, names = by_name(model, data)
        own_loss, own_metrics, asked = own_objective(loss, metrics)
        config = RunConfig.of(without_own(stored, out, model=model, data=data, loss=own_loss, metrics=own_metrics))
        _refuse_other(config, normalised(by_reference({**options, **names, **asked})), out)
        config = _merged(config, {name: value for name, value in options.items() if name in _ANYTIME})
        if training is None:
            ways = world().first(lambda: ways_in(out))
            run = cls(
                config,
                callbacks=callbacks,
                training=assemble(config, model, data, loss=own_loss, metrics=own_metrics, ways=ways),
            )
            run._model, run._data, run._loss, run._metrics = model, data, own_loss, own_metrics
        else:
            run = cls(
                config,
                model=model,
                data=data,
                loss=own_loss,
                metrics=own_metrics or (),
                callbacks=callbacks,
                training=training,
            )
        run.out, run._resumed = out, True
        return run

    @property
    def seconds(self) -> float:
        """Seconds of training so far; `evaluating` are those of evaluations."""
        return self._seconds

    @property
    def client_names(self) -> list[str]:
        """The clients' names, if the data have owners and each client is an owner."""
        return list(self.training.source.owner_names) if self.config.partition == "column" else []

    @property
    def _own(self) -> dict[str, object]:
        """The user's objects that cannot be found by name."""
        return {"model": self._model, "data": self._data, "loss": self._loss, "metrics": self._metrics}

    def _observed(self, evaluations: Iterable[Scores]) -> Observations[Scores]:
        """Evaluations with the columns of evaluations.csv."""
        which = {"entry": plugins.label(self.config.algorithm), "seed": self.config.seed}
        return Observations(evaluations, lambda scores: {**which, **flat(asdict(scores))})

    @property
    def used(self) -> list[Used]:
        """The parts of the run that have something to cite."""
        t, latest = self.training, self.evaluations[-1].test if self.evaluations else {}
        given = {"model": self._model, "data": self._data}
        own = {name: _called(thing) for name, thing in given.items() if thing is not None}
        return used_by(self.config, [t.task.leading, *self.config.metrics, *latest], t.source.cited, own)

    def cite(self) -> str:
        """BibTeX of what the run uses: methods, data, models and libraries, and comments about what has no entry."""
        return bibtex(self.used)

    @property
    def rounds(self) -> int:
        """Number of rounds of the whole run."""
        return self.training.rounds

    @property
    def steps(self) -> int:
        """Training steps so far."""
        return self._step

    @property
    def samples(self) -> int:
        """Rows that training steps have used so far."""
        return self._samples

    @property
    def standing(self) -> Standing:
        """The progress of the run."""
        t, last = self.training, self._last
        account = (f"Data: {t.source.account}",) if t.source.account else ()
        return Standing(
            self.result.rounds if self.result is not None else self._start_round if last is None else last.round,
            t.rounds,
            None if last is None else last.loss,
            self.evaluations[-1] if self.evaluations else None,
            len(self.evaluations),
            self._seconds,
            self.evaluating,
            t.task.leading,
            t.task.share,
            (*account, *t.remarks),
            "" if self.result is None else self.result.stopped,
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: the result, or how far the run is."""
        if self.result is not None:
            return self.result._repr_html_()
        now = self.standing
        lines = [("rounds done", f"{now.done:,} of {now.rounds:,}"), ("engine", self.training.engine)]
        if now.latest is not None:
            lines.append((f"test {spoken(now.metric)}", format_figure(now.latest.test_score, share=now.share)))
        return html_table(f"{plugins.label(self.config.algorithm)}: not finished", (), lines)

    def standings(self, until: int | None = None) -> Iterator[Standing]:
        """Train to the end, and yield the progress a few times a second, at every evaluation and at the end.

        With `until`, stop after this number of rounds, evaluate, and write a checkpoint; `resume` continues from there.
        """
        self._until = until
        told, evaluations = -math.inf, 0
        for _ in self:
            now = time.monotonic()
            if now >= told + _TOLD_EVERY or len(self.evaluations) > evaluations:
                told, evaluations = now, len(self.evaluations)
                yield self.standing
        yield self.standing

    def run(self, *, progress: bool = False) -> Result:
        """Train to the end and return the result. With `progress` a line says how far it is, in a notebook too."""
        if progress:
            self._show()
        for _ in self:
            pass
        assert self.result is not None
        return self.result

    def _show(self) -> None:
        """Train to the end, and show how far it is."""
        title, told = attacked(plugins.label(self.config.algorithm), self.config.attack), 0
        with ShownLine() as line:
            for standing in self.standings():
                line.show(f"{title}: {standing.line}", keep=standing.evaluations > told)
                told = standing.evaluations

    def __iter__(self) -> Iterator[Record]:
        if self.result is not None:
            return
        if self._begun:
            raise UsageError(
                "this run has begun already: go on with the iterator that you have, or give out=... and resume it"
            )
        self._begun = True
        with closing(self.training.source):
            yield from self._rounds()
        give_back()

    def _rounds(self) -> Iterator[Record]:
        if self.out is None:
            yield from self._train(None)
            return
        stored = {**from_anywhere(self.config.resolved()), **own_things(**self._own)}
        with Folder.held(self.out, stored, again=self._resumed, overwrite=self._overwrite) as folder:
            self._restore(folder)
            yield from self._train(folder)

    def _train(self, folder: Folder | None) -> Iterator[Record]:
        try:
            world().agreed(lambda: self._audience.begin(self._start()))
            yield from self._trained_on(folder)
        finally:
            self._audience.end(self.result)

    def _start(self) -> RunStart:
        """What callbacks and loggers are told first."""
        config, out = self.config, None if self.out is None else self.out.absolute()
        alone = out is None or not (out.parent.parent / CONFIG).exists()  # otherwise a comparison's folder/entry/seed-0
        short = f"{plugins.label(config.algorithm)}-seed-{config.seed}" if out is None else out.name
        return RunStart(
            name=short if out is None or alone else f"{out.parent.name}-{out.name}",
            group="" if out is None or alone else out.parent.parent.name,
            config=from_anywhere(config.resolved()),
            metric=self.training.task.leading,
            folder=None if out is None else out / LOGS,
            steps=self._step,
            rounds=self._start_round,
        )

    def _trained_on(self, folder: Folder | None) -> Iterator[Record]:
        t = self.training
        if folder is not None:
            names = list(t.source.class_names)
            entry = t.algorithm.entry
            meanings = {option.name: option.help for thing in self.config.chosen() for option in thing.options}
            about = {"title": entry.title, "summary": entry.summary, **entry.facts}
            folder.write_json(ALGORITHM, {**about, "meanings": meanings, "used": self.used})
            about_clients = {"client_names": self.client_names, "counts": t.counts.tolist()}
            folder.write_json(CLASSES, {"class_names": names, **about_clients})
            folder.write_json(DATA, t.source.described())
            folder.write_json(ENGINE, t.ways.stored())
            folder.write_json(METRIC, {"name": t.task.leading, "share": t.task.share, "maximise": t.task.maximise})
        end = t.rounds if self._until is None else min(t.rounds, self._until)
        for index in range(self._start_round, self._start_round if self._idle else end):
            with self._meter:
                for record in self._round(index):
                    if folder is not None:
                        folder.append(STEPS, asdict(record))
                    self._audience.step(record)
                    yield record
            last, paused = index + 1 == t.rounds, index + 1 == self._until
            if last and not self._step:
                raise known(
                    ConfigError(
                        f"the algorithm {self.config.algorithm!r} has yielded no step in {t.rounds} rounds, so nothing "
                        "was trained: have its round() yield a Step per training step"
                    )
                )
            if last or paused or (index + 1) % t.eval_every == 0:
                self._evaluate(index + 1, folder, last=last)
            if not last and self._idle:
                last = True
                if self._whose_at_the_end() is not None:  # as many models are judged as at the end of a whole run
                    self._evaluate(index + 1, folder, last=True)
            if folder is not None and self.config.snapshot_every and (index + 1) % self.config.snapshot_every == 0:
                self._snapshot(index + 1, folder)
            due = (index + 1) % (self.config.checkpoint_every or t.rounds_per_epoch) == 0
            if folder is not None and (last or paused or due):
                state = self._state(index + 1, folder)
                if folder.written:
                    checkpoint.write(folder.path / CHECKPOINT, state)
            if last:
                break
        if end < t.rounds and not self._idle:
            return
        self.result = self._result()
        if folder is not None:
            self._write_model(folder, LAST)
            folder.write_json(RESULT, asdict(self.result))

    def count_again(self) -> None:
        """Write the result again, with the traffic since the end."""
        assert self.result is not None, "the run is finished"
        self.result = replace(self.result, bytes=self.training.ledger.table())
        if self.out is not None:
            replace_file(self.out / RESULT, json.dumps(asdict(self.result), indent=1).encode())

    def _write_model(self, folder: Folder, name: str) -> None:
        trained = self.trained()
        if folder.written:
            trained.write(folder.path / name)

    def _snapshot(self, rounds: int, folder: Folder) -> None:
        """Keep the models of those clients whose models are evaluated."""
        clients, holder = self.training.clients, self.training.clients.holder
        everyone = judged(len(clients.samples), self.training.eval_clients, self.config.seed)
        whose = everyone if holder is None else [holder]
        models = {str(k): dict(clients.model_state(k)) for k in whose}
        if not folder.written:
            return
        place = folder.path / SNAPSHOTS
        place.mkdir(exist_ok=True)
        checkpoint.write(
            place / f"round-{rounds:06}.safetensors", {"rounds": rounds, "steps": self._step, "models": models}
        )

    def _round(self, index: int) -> Iterator[Record]:
        """Train one round. The clock runs while the algorithm works, not while the caller looks at a record."""
        t, c = self.training, self.config
        client_factor, _ = rate_factors(t, index)
        started = time.perf_counter()
        steps = round_of(t, index)
        while True:
            try:
                step = next(steps, None)
            except NonFiniteError as error:
                raise error.at(self._step + (error.step or 0)) from None
            self._seconds += time.perf_counter() - started
            if step is None:
                return
            yield self._record(step, index, c.client_lr * client_factor)
            started = time.perf_counter()

    def _record(self, step: Step, index: int, client_lr: float) -> Record:
        if not math.isfinite(step.loss):  # if the engine did not check, because that would have made the device wait
            bad = tuple(k for k, x in zip(step.clients, step.losses, strict=True) if not math.isfinite(x))
            raise known(NonFiniteError("loss", bad).at(self._step))
        ledger = self.training.ledger
        record = Record(
            self._step,
            index,
            step.loss,
            step.clients,
            step.active,
            step.samples,
            client_lr,
            step.server_lr,
            ledger.total("up"),
            ledger.total("down"),
            round(self._seconds, 4),
        )
        self._step += 1
        self._samples += step.samples
        self._served += step.samples if step.server_lr is not None else 0
        self._pooled += step.samples if not step.clients else 0
        self._last = record
        return record

    def _evaluate(self, done: int, folder: Folder | None, *, last: bool) -> None:
        t = self.training
        whose = self._whose_at_the_end() if last else None
        started = time.perf_counter()
        held_out = t.source.validation
        validation = t.clients.evaluate(held_out, t.server.predict, whose) if len(held_out) else None
        own = self._on_own_rows(whose)
        everyones = (
            None
            if self.config.evaluate_on == "own"
            else validation
            if t.source.test is held_out  # a trial sees no test rows
            else t.clients.evaluate(t.source.test, t.server.predict, whose)
        )
        test = everyones or own
        if test is None:
            raise TrainingError(
                "evaluate_on = 'own' finds no rows to judge by: none of the clients whose models are judged has test "
                "rows of its own and is there; judge more of them (eval_clients), or choose evaluate_on = both"
            )
        scores = self._scores(done, validation, test, own)
        best = self._is_best(scores)
        self.evaluations.append(scores)
        self.evaluating += time.perf_counter() - started
        self.by_client = {"global": everyones, "own": own}
        if best and folder is not None:
            self._write_model(folder, BEST)
        if folder is not None:
            folder.append(EVALUATIONS, asdict(scores))
            for where, found in self.by_client.items():
                if found is not None:
                    folder.append(CLIENTS, self._line(scores, where, found))
        self._audience.evaluate(scores)

    @property
    def _idle(self) -> bool:
        """Whether training stops, because enough evaluations in a row were not better than the best before them. This
        depends only on the evaluations, so a resumed run stops where the uninterrupted one does.
        """
        if self.config.stop_after is None or not self.evaluations:
            return False
        ranks = [self.training.task.rank(scores.validation_score) for scores in self.evaluations]
        return len(ranks) - 1 - ranks.index(max(ranks)) >= self.config.stop_after

    @property
    def _stopped(self) -> str:
        """Why training ended before its last round; empty if it did not."""
        done, planned, task = self.evaluations[-1].round, self.training.rounds, self.training.task
        if done >= planned:
            return ""
        best = max(self.evaluations, key=lambda s: (*task.rank(s.validation_score), -s.round))
        return (
            f"stopped early, after round {done} of {planned}: the {spoken(task.leading)} on the validation rows has "
            f"not become better since round {best.round} (stop_after = {self.config.stop_after})"
        )

    def _whose_at_the_end(self) -> list[int] | None:
        """The clients whose models the last evaluation judges, if they are more than in earlier ones."""
        t = self.training
        if t.eval_last == t.eval_clients or t.clients.holder is not None:
            return None
        return judged(len(t.clients.samples), t.eval_last, self.config.seed)

    def _is_best(self, scores: Scores) -> bool:
        """Whether the model of this evaluation is to be kept as the best so far (the last among equals)."""
        if not self.config.keep_best or scores.validation_score is None or self.training.engine == "remote":
            return False
        rank = self.training.task.rank
        return all(rank(scores.validation_score) >= rank(s.validation_score) for s in self.evaluations)

    def trained(self, *, best: bool = False) -> TrainedModel:
        """The model as it is now, separate from the training, or with `best` the model of the best evaluation, which a
        run with a folder keeps. For a resumed run that has not continued yet, it is the model of the last checkpoint.
        """
        if best:
            if self.out is None:
                raise UsageError("the best model is kept in the folder of a run: give the run one, out=...")
            return find_trained(self.out, best=True)
        if self._resumed and not self._begun and self.out is not None and _has_checkpoint(self.out):
            self._take(self.out)
        last = asdict(self.evaluations[-1]) if self.evaluations else {}
        return TrainedModel.of(self.config, self.training, own=self._model is not None, evaluation=last)

    def model(self, client: Whose = None, *, best: bool = False) -> nn.Module:
        """The whole trained model in evaluation mode: client number k's part and the server's part. `client` can also
        be "average", for the average of the clients' parts. It is not needed if all clients have the same part or one
        part travels.
        """
        return self.trained(best=best).model(client, model=self._model)

    def predict(self, x: Any, client: Whose = None, *, best: bool = False) -> Predictions:
        """Predictions of that model for new rows, given in the form of the run's data: arrays or tensors, or a table's
        columns by name. They are scaled and encoded as in training; `Samples` are used without changes.
        """
        trained = self.trained(best=best)
        return trained.predict(x, client, model=self._model, device=self.config.device)

    def _on_own_rows(self, whose: list[int] | None) -> Evaluation | None:
        """Every judged client's model on the client's own rows. Clients without own rows, or that are gone, are left
        out. None if all are.
        """
        t, everyone = self.training, sorted(self.training.own_tests)
        whose = whose or judged(len(t.clients.samples), t.eval_clients, self.config.seed)
        if t.algorithm.traits.central or t.clients.holder is not None:
            whose = everyone
        found: dict[int, Mapping[str, Any]] = {}
        for k in whose:
            if k not in t.own_tests:
                continue
            asked = [k] if self.config.judge == "mean" and not t.algorithm.traits.central else None
            each = t.clients.evaluate(t.own_tests[k], t.server.predict, asked).scores
            if each:
                found[k] = next(iter(each.values()))
        if not found:
            return None
        # A client that judges its own rows reports no matrices: those of the others are left out, too.
        common = set.intersection(*(set(scores) for scores in found.values()))
        found = {k: {name: value for name, value in scores.items() if name in common} for k, scores in found.items()}
        return Evaluation(found, sum(len(t.own_tests[k]) for k in found))

    def _line(self, scores: Scores, where: str, found: Evaluation) -> dict[str, Any]:
        """One evaluation of every client, for the file: without matrices."""
        each = {k: reported(own) for k, own in found.scores.items()}
        return {"round": scores.round, "step": scores.step, "on": where, "clients": each}

    def _scores(self, done: int, validation: Evaluation | None, test: Evaluation, own: Evaluation | None) -> Scores:
        ledger, task = self.training.ledger, self.training.task
        fair = fairness(test.each(task.leading).values(), maximise=task.maximise)
        return Scores(
            done,
            self._step,
            self._trained / sum(self.training.clients.samples),
            validation.mean(task.leading) if validation else None,
            validation.loss if validation else None,
            test.mean(task.leading),
            test.loss,
            fair.worst,
            _means(validation) if validation else None,
            _means(test),
            ledger.total("up"),
            ledger.total("down"),
            ledger.total("down", "wire-broadcast"),
            round(self._seconds, 4),
            test_score_std=fair.std,
            test_score_worst_tenth=fair.worst_tenth,
            own_score=own.mean(task.leading) if own else None,
            own=_means(own) if own else None,
            **self._virtual(),
        )

    def _virtual(self) -> dict[str, float | None]:
        """The values of the clock."""
        if self.training.clock is None:
            return {}
        now = self.training.clock.read()
        return {
            "virtual_seconds": now.seconds,
            "clients_joules": now.clients.total,
            "clients_marginal_joules": now.clients.marginal,
            "server_joules": now.server_joules,
            "idle_seconds": statistics.fmean(now.idle),
            **self._of_links(now.seconds),
        }

    def _of_links(self, seconds: float) -> dict[str, float | None]:
        """The effect of the trace so far, as the mean over the clients."""
        found = None if self.training.clock is None else self.training.clock.attendance
        if found is None:
            return {}
        return {"link_seconds": float(found.waited.mean()), "reachable": float(found.trace.share(seconds).mean())}

    def _availability(self) -> dict[str, Any] | None:
        """The effect of the trace on each client."""
        clock = self.training.clock
        if clock is None or clock.attendance is None:
            return None
        now = clock.read()
        return clock.attendance.summary(now.seconds, now.idle)

    def _staleness(self) -> dict[str, Any] | None:
        """How old each client's work was when it was used, and how long each client has waited, if that is known."""
        found = self.training.algorithm.staleness(self.training.server)
        if found is None or self.training.clock is None:
            return found
        return {**found, "idle_seconds": list(self.training.clock.read().idle)}

    def _result(self) -> Result:
        ledger = self.training.ledger
        best = max(self.evaluations, key=lambda s: (*self.training.task.rank(s.validation_score), s.round))
        return Result(
            algorithm=self.config.algorithm,
            engine="distributed" if world().several else self.training.engine,
            metric=self.training.task.leading,
            share=self.training.task.share,
            maximise=self.training.task.maximise,
            test_score=self.evaluations[-1].test_score,
            best_test_score=best.test_score,
            best_round=best.round,
            rounds=self.evaluations[-1].round,
            steps=self._step,
            samples=self._samples,
            seconds=self._seconds,
            bytes_up=ledger.total("up"),
            bytes_down=ledger.total("down"),
            bytes_down_broadcast=ledger.total("down", "wire-broadcast"),
            test=self.evaluations[-1].test,
            own=self.evaluations[-1].own,
            fairness=self._fairness(),
            evaluation_seconds=self.evaluating,
            bytes=ledger.table(),
            **self._computed(),
            **self._virtual(),
            measured_joules=self._meter.joules,
            measured_by=self._meter.method,
            attack=self.config.attack,
            availability=self._availability(),
            stopped=self._stopped,
            staleness=(staleness := self._staleness()),
            batch_age=None if staleness is None else staleness.get("batch_age"),
            model_age=None if staleness is None else staleness.get("model_age"),
            used=self.used,
        )

    def _fairness(self) -> dict[str, Any]:
        """How the clients differ at the end, on each kind of test rows."""
        task, found = self.training.task, {}
        for where, evaluation in self.by_client.items():
            if evaluation is not None:
                scores = evaluation.each(task.leading).values()
                found[where] = asdict(fairness(scores, maximise=task.maximise)) | self._by_class(where, evaluation)
        return found

    def _by_class(self, where: str, evaluation: Evaluation) -> dict[str, float | None]:
        """How the clients differ over the classes, and how much of these was forgotten."""
        each = evaluation.each(RECALL).values() if RECALL in evaluation.metrics else ()
        judged_on = [s.own if where == "own" else s.test for s in self.evaluations]
        history = [(found or {}).get(RECALL) for found in judged_on]
        return {"performance_gap": performance_gap(each), "backward_transfer": backward_transfer(history)}

    @property
    def _trained(self) -> int:
        """Rows used for training: by clients, if they train by themselves, otherwise in steps with them."""
        learnt = self.training.ledger.learnt
        return learnt + self._pooled if learnt else self._samples

    def _computed(self) -> dict[str, float]:
        """FLOPs of a client, in the mean, and of the server."""
        flops, traits = self.training.flops, self.training.algorithm.traits
        each = self._samples / self.config.clients
        if traits.central:
            return {"client_flops": 0.0, "server_flops": self._samples * flops.whole.training}
        if traits.whole:
            own = self._of_ranks(lambda f: f.whole.training) or flops.whole.training
            return {"client_flops": each * own, "server_flops": 0.0}
        if LEARN in traits.needs:
            ledger, clients = self.training.ledger, self.config.clients
            alone = ledger.learnt * (flops.client.backward + flops.head.training)
            return {
                "client_flops": (ledger.passed * flops.client.forward + alone) / clients,
                "server_flops": self._served * self.training.server_flops,
            }
        if self.training.flops_each and not self.training.adapter_ranks:
            return self._computed_at_own_cuts(self.training.flops_each)
        # Rows that other algorithms generate belong to a step, and are stated with it.
        made_up = self.training.server.rows_made_up if traits.asynchronous else 0
        return {
            "client_flops": self._at_clients()
            * (self._of_ranks(lambda f: f.at_client.training) or flops.at_client.training),
            "server_flops": self._samples * self.training.server_flops + made_up * flops.server.training,
        }

    def _computed_at_own_cuts(self, each: Sequence[ModelFlops]) -> dict[str, float]:
        """The same if clients have different cuts, at which a sample takes `each` [C] FLOPs."""
        training, deepest = self.training, self.training.flops.server.training
        labels = training.ledger.of_clients("up", "labels")  # the smashed data of every row came with its client
        rows = (labels / training.source.train.y[:1].nbytes).tolist()
        between = sum(n * (own.server.training - deepest) for n, own in zip(rows, each, strict=True))
        return {
            "client_flops": sum(n * own.client.training for n, own in zip(rows, each, strict=True)) / len(each),
            "server_flops": self._samples * training.server_flops + between,
        }

    def _of_ranks(self, figure: Callable[[ModelFlops], float]) -> float:
        """The mean of a figure over the rows of clients whose adapters have ranks of their own, by the samples that
        they have; 0 where all have the same rank.
        """
        each, samples = self.training.flops_each, self.training.clients.samples
        if not self.training.adapter_ranks:
            return 0.0
        return math.fsum(n * figure(own) for n, own in zip(samples, each, strict=True)) / (sum(samples) or 1)

    def _at_clients(self) -> float:
        """The mean number of rows that a client has computed; rows that the server has kept count once."""
        clients = self.training.clients
        computed = clients.computed if isinstance(clients, KeptFeatures) else self._samples
        return computed / self.config.clients

    def _state(self, rounds: int, folder: Folder) -> dict[str, Any]:
        return {
            "config": from_anywhere(self.config.resolved()),
            "fingerprint": self._fingerprint,
            "code": digests(self.config),
            "rounds": rounds,
            "steps": self._step,
            "samples": self._samples,
            "served": [self._served, self._pooled],
            "seconds": self._seconds,
            "measured": self._meter.state(),
            "evaluations": [asdict(s) for s in self.evaluations],
            "evaluating": self.evaluating,
            "by_client": {
                where: {str(k): dict(own) for k, own in found.scores.items()}
                for where, found in self.by_client.items()
                if found is not None
            },
            "offsets": folder.offsets(),
            "server": self.training.server.state(),
            "clients": self.training.clients.state(),
        }

    @cached_property
    def _fingerprint(self) -> dict[str, str]:
        """The values by which checkpoints are compared, which do not change when a run continues."""
        return fingerprint(self.training)

    def _restore(self, folder: Folder) -> None:
        """Take the last checkpoint, if there is one, and remove records that were written after it."""
        if not _has_checkpoint(folder.path):
            if self.training.place is not None:
                self.training.place.settle(folder.path, begin=True)
            folder.truncate({})
            return
        offsets = world().agreed(lambda: self._take(folder.path))
        world().first(lambda: folder.truncate(offsets))

    def _take(self, out: Path) -> dict[str, int]:
        """Take the last checkpoint in the folder `out`. Returns the lengths of the records at that time."""
        path = out / CHECKPOINT
        if self.training.place is not None:
            self.training.place.settle(out, begin=False)
        state = world().first(lambda: _checkpoint(path))
        _refuse_other(RunConfig.of(state.config), self.config.resolved(), out)
        mine, theirs = self._fingerprint, state.fingerprint
        if different := [what for what in {**mine, **theirs} if mine.get(what) != theirs.get(what)]:
            raise RunFolderError(
                f"the run in {str(out)!r} was made with another {' and '.join(different)} than now: give what "
                "it was made with, or start a new run in another folder"
            )
        for name, digest in digests(self.config).items():
            if digest != state.code.get(name, digest):
                warnings.warn(
                    f"the file of {name!r} has changed since the checkpoint: the run continues with the new code",
                    CutlayerWarning,
                    stacklevel=2,
                )
        with reading(path):
            self._load(state)
        return state.offsets

    def _load(self, state: RunState) -> None:
        """Continue from a stored state. Raises MalformedError."""
        if state.rounds > self.training.rounds:
            raise MalformedError(f"{state.rounds} of {self.training.rounds} rounds are done")
        self._start_round, self._step = state.rounds, state.steps
        self._samples, self._seconds = state.samples, state.seconds
        self._served, self._pooled = state.served or (self._samples, 0)
        self._meter.load(state.measured)
        self.evaluations = self._observed(remade(Scores, scores, "evaluations") for scores in state.evaluations)
        for scores in self.evaluations:
            for found in (scores.validation, scores.test, scores.own):
                checked(found or {}, dict[str, Metric], "evaluations")
        self.evaluating = state.evaluating
        self.by_client = {
            where: Evaluation({int(k): own for k, own in found.items()}, 0) for where, found in state.by_client.items()
        }
        self.training.server.load(state.server)
        self.training.clients.load(state.clients)


def _refuse_blind(config: RunConfig, training: Training) -> None:
    """Raises ConfigError for early stopping without validation rows: test rows must not decide when to stop."""
    if config.stop_after is not None and not len(training.source.validation):
        raise ConfigError(
            f"stop_after = {config.stop_after} needs validation rows, and there are none: hold some out (validation = "
            "0.1), or leave stop_after out"
        )


def _has_checkpoint(out: Path) -> bool:
    return world().first(lambda: (out / CHECKPOINT).exists())


def _checkpoint(path: Path) -> RunState:
    """The content of that file. Raises RunFolderError."""
    with reading(path):
        return checked(checkpoint.read(path), RunState)


def rate_factors(training: Training, index: int) -> tuple[float, float]:
    """The factors of the clients' and the server's base rates in round `index`. Raises ConfigError."""
    clients, server = training.schedules
    return _factor(clients, index / training.rounds), _factor(server, index / training.rounds)


def _factor(schedule: Schedule, progress: float) -> float:
    """The schedule's factor. Raises ConfigError if it is not a valid factor of a rate."""
    what = f"the schedule {schedule.called!r}"
    with own_code(schedule.then if isinstance(schedule, WarmedUp) else schedule, what):
        factor = schedule.factor(progress)
        possible = math.isfinite(factor) and factor >= 0
    if not possible:
        raise ConfigError(
            f"{what} gives the factor {factor} after {progress:.3g} of the rounds: return a finite number of 0 or more"
        )
    return factor


def round_of(training: Training, index: int) -> Iterator[Step]:
    """Begin round `index`; its steps."""
    t = training
    factor, t.server.lr_factor = rate_factors(t, index)
    this = t.clients.begin_round(index, t.rounds, factor)
    return _to_the_end(t, this)


def _to_the_end(training: Training, this: Round) -> Iterator[Step]:
    """The steps of a round; the server is told its end. After a step in which all clients were lost, the round begins
    again with the remaining batches.
    """
    t, left = training, dict(zip(this.clients, this.batches, strict=True))
    while True:
        try:
            for step in steps_of(t.algorithm, t.server, t.clients, this):
                for k in step.clients:
                    left[k] -= 1
                yield step
        except StepLostError as lost:
            for k in lost.clients:
                left[k] -= 1
            this = replace(this, batches=tuple(max(0, n) for n in left.values()))
        else:
            t.server.end_round()
            return


def overwritable(out: str | Path | None, overwrite: bool) -> Path | None:
    """The folder `out`, which a new run or comparison may take. Raises ConfigError and RunFolderError."""
    if out is None:
        if overwrite:
            raise ConfigError("overwrite has no effect without out: name the folder to replace, or leave it out")
        return None
    where = Path(out)
    world().first(lambda: refuse_used(where, overwrite=overwrite))
    return where


def _called(thing: object) -> str:
    """The name of an object from Python: that of a function or class, or of the object's class."""
    return str(getattr(thing, "__name__", type(thing).__name__))


def own_things(**given: object) -> dict[str, bool]:
    """The text in a stored configuration for objects that cannot be found by name (model, data, loss, metrics)."""
    return {f"own_{name}": True for name, thing in given.items() if thing is not None}


def without_own(stored: Mapping[str, Any], out: Path, **given: object) -> dict[str, Any]:
    """The options in `stored`. Raises RunFolderError if it needs a user's object that is not given."""
    for name, thing in given.items():
        if stored.get(f"own_{name}") and thing is None:
            what, them = (name, "them") if name == "metrics" else (f"a {name}", "it")
            raise RunFolderError(
                f"{str(out)!r} was made with {what} of your own: continue from Python and give {them} again, "
                f"resume(out, {name}=...)"
            )
    return {k: v for k, v in stored.items() if not k.startswith("own_")}


def own_objective(
    loss: Loss | str | None, metrics: Mapping[str, Any] | Sequence[str]
) -> tuple[Loss | None, Mapping[str, Any] | None, dict[str, Any]]:
    """(own loss, own metrics by their names, options): a text for `loss`, and names of metrics, are options."""
    asked: dict[str, Any] = {"loss": loss} if isinstance(loss, str) else {}
    own = dict(metrics) if isinstance(metrics, Mapping) else {}
    if metrics and not own:
        asked["metrics"] = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    return None if isinstance(loss, str) else loss, own or None, asked


def fingerprint(training: Training) -> dict[str, str]:
    """What a checkpoint must agree with: model (names and shapes), training data, engine."""
    models = {name: tensor for part in training.parts.all for name, tensor in part.state_dict().items()}
    shapes = [(name, tuple(tensor.shape)) for name, tensor in sorted(models.items())]
    train = training.source.train
    seen = train if train.in_memory else train[torch.tensor([0, len(train) // 2, len(train) - 1])]
    shapes_of = [(len(train), *x.shape[1:]) for x in seen.rows]
    sums = [x.double().sum().item() for x in seen.rows]
    one = (shapes_of[0], sums[0]) if len(sums) == 1 else (shapes_of, sums)
    data = (*one, training.counts.tolist())
    digest = hashlib.sha256(repr((data, train.y.tolist())).encode()).hexdigest()
    found = {"model": repr(shapes), "data set": digest, "engine": training.engine}
    if training.clock is not None and training.clock.fleet.trace is not None:
        found["trace"] = training.clock.fleet.trace.digest
    return found if train.in_memory else {**found, "data_in_memory": "never"}


def _means(found: Evaluation) -> dict[str, Any]:
    """All metrics, means over the clients."""
    return {metric: found.mean(metric) for metric in found.metrics}


def digests(config: RunConfig) -> dict[str, str]:
    """Digests of the files of the user's own classes and functions in a run, by their names."""
    found = {plugins.absolute(e.name): plugins.fingerprint(e.kind, e.name) for e in config.chosen()}
    return {name: digest for name, digest in found.items() if digest}


def _merged(config: RunConfig | None, options: dict[str, Any]) -> RunConfig:
    """`config` with `options` over it, checked. Raises ConfigError."""
    base = {} if config is None else config.model_dump(include=config.model_fields_set)
    merged = RunConfig.of(overlaid(base, options))
    merged.check(frozenset(merged.model_fields_set))
    return merged


def ways_in(out: Path) -> Ways | None:
    """How a run in that folder is computed; None if it had not begun."""
    if not (out / ENGINE).exists():
        return None
    with reading(out / ENGINE, "it says how the run is computed; restore the file, or start a new run"):
        return Ways.of(parsed((out / ENGINE).read_text(encoding="utf-8")))


def refuse_other(out: Path, asked: RunConfig) -> None:
    """Raises RunFolderError if the complete configuration `asked` is not that of the run in the folder `out`.

    The path of the data may have changed if there is a checkpoint, which compares their content.
    """
    stored = RunConfig.of(without_own(stored_config(out), out))
    have, want = from_anywhere(stored.resolved()), from_anywhere(asked.resolved())
    paths = all(Path(str(options["data"])).is_absolute() for options in (have, want))
    moved = _ANYTIME | (frozenset({"data"}) if paths and (out / CHECKPOINT).exists() else frozenset[str]())
    for name in dict.fromkeys([*have, *want]):
        was, now = (repr(options[name]) if name in options else "not set" for options in (have, want))
        if was != now and name not in moved:
            raise RunFolderError(
                f"the run in {str(out)!r} was begun with {name} = {was}, not {now}: go on with the configuration "
                f"that it was begun with ({str(out / CONFIG)!r}), or begin a new run with another --out"
            )


def _refuse_other(stored: RunConfig, asked: dict[str, Any], out: Path) -> None:
    """Raises RunFolderError if one of the options `asked` differs from that of the run in `out`."""
    have = from_anywhere(stored.model_dump(mode="json"))
    for name, value in from_anywhere(asked).items():
        if name not in have:
            raise ConfigError(f"unknown option {name!r}")
        same = list(value) == have[name] if isinstance(value, tuple) else value == have[name]
        if not same and name not in _ANYTIME:
            raise RunFolderError(
                f"the run in {str(out)!r} was made with {name} = {have[name]!r}, not {value!r}: resume without it, or "
                "start a new run in another folder"
            )
