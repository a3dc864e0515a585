"""How a run reports: the hooks of a callback, and what a logger adds to them.

A callback is any object with some of the methods `on_begin`, `on_step`, `on_evaluate` and `on_end`. A logger is a
callback with a name: a subclass of `Logger` under `@logger("name")`, whose options are declared with `plugins.option`,
or a plain class with these methods. Each run has its own logger.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cutlayer import plugins
from cutlayer.errors import ConfigError

if TYPE_CHECKING:
    from cutlayer.run import Record, Result, Scores


@dataclass(frozen=True)
class RunStart:
    """What a callback is told first.

    `name` distinguishes the run from others, `group` is the name of a comparison's folder (empty for other runs);
    `config` are its options, and `metric` is its primary metric. `folder` is where loggers keep files, in the run's own
    folder; None if the run has none. `steps` and `rounds` are those that are already done: 0, or those of the
    checkpoint from which a resumed run continues. Later ones are reported again.
    """

    name: str
    group: str
    config: Mapping[str, Any]
    metric: str
    folder: Path | None
    steps: int = 0
    rounds: int = 0

    def place(self, who: str) -> Path:
        """`folder`, made. Raises ConfigError if the run has none; `who` needs it."""
        if self.folder is None:
            raise ConfigError(f"{who} writes files, and this run has no folder for them: give it one, out=...")
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder

    def kept(self, name: str, fresh: Callable[[], str]) -> str:
        """A short text that stays with the run when it is resumed, in the file `name` of its folder; `fresh` makes it
        the first time. Used for the names that services give to a run.
        """
        if self.folder is None:
            return fresh()
        path = self.place(name) / name
        if not path.exists():
            path.write_text(fresh(), encoding="utf-8")
        return path.read_text(encoding="utf-8")


class Callback:
    """An optional base of callbacks, whose hooks do nothing."""

    def on_begin(self, run: RunStart) -> None:
        """Training begins, or continues. An exception here ends the run. After a later exception, the run continues
        without this callback.
        """

    def on_step(self, record: Record) -> None:
        """A training step is done."""

    def on_evaluate(self, scores: Scores) -> None:
        """The model was evaluated."""

    def on_end(self, result: Result | None) -> None:
        """The run is done; None if it was interrupted or has failed."""


class Logger(Callback, plugins.Thing):
    """Base of loggers. State during a run belongs in attributes that begin with an underscore."""

    log_every: int = plugins.option(1, ge=1, shared=False)
    """Write every n-th step to the loggers. Evaluations are always written."""


L = TypeVar("L", bound=type[Logger])


def logger(name: str, *, title: str = "") -> Callable[[L], L]:
    """A decorator that registers a subclass of `Logger`."""
    return plugins.register("logger", name, title=title)


def need(module: str, name: str, package: str = "", extra: str = "") -> None:
    """Raises ConfigError if the `module` that the logger called `name` needs is not installed."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:  # without a file: a folder of that name, such as one with logs
        raise ConfigError(
            f"the logger {name!r} needs the package {package or module}, which is not installed: pip install "
            f"'cutlayer[{extra or name}]'"
        )


_OF_STEPS = ("loss", "samples", "client_lr", "server_lr", "bytes_up", "bytes_down", "seconds")
_OF_RUNS = (
    "epochs", "bytes_up", "bytes_down", "bytes_down_broadcast", "seconds", "virtual_seconds", "clients_joules",
    "clients_marginal_joules", "server_joules",
)  # fmt: skip


def of_step(record: Record) -> dict[str, float]:
    """The figures of a step, by names such as train/loss; missing ones are left out."""
    return _known("train", {name: getattr(record, name) for name in _OF_STEPS})


def of_evaluation(scores: Scores) -> dict[str, float]:
    """The figures of an evaluation, by names such as test/accuracy, validation/loss and run/bytes_up. Metrics with
    several numbers, such as a confusion matrix, and undefined metrics are left out.
    """
    found = _known("run", {name: getattr(scores, name) for name in _OF_RUNS})
    for rows in ("validation", "test", "own"):
        found |= _known(rows, getattr(scores, rows) or {})
    return found


def _known(group: str, values: Mapping[str, Any]) -> dict[str, float]:
    single = {name: float(v) for name, v in values.items() if isinstance(v, int | float)}
    return {f"{group}/{name}": v for name, v in single.items() if math.isfinite(v)}
