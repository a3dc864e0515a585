"""Optuna's tree-structured Parzen estimator, with its pruner. Needs the extra `tune`."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from cutlayer.errors import ConfigError
from cutlayer.plugins import option
from cutlayer.searches.searching import Leg, Legs, Search, Space, search
from cutlayer.sweep import Point, rounded

_ASKED = 50  # attempts to get another point if the sampler repeats one


@search("optuna", title="Optuna (TPE)", paper="arXiv 1907.10902")
class Optuna(Search):
    """Values chosen from the results of earlier trials (TPE); poor trials end early. Needs the extra `tune`.

    A trial that is worse than most at the end of a rung is not trained further (asynchronous successive halving).
    """

    eta: int = option(3, ge=2)
    """One in this many trials continues to the next rung, which is this many times as long."""
    rungs: int = option(3, ge=1)
    """Number of rungs. With eta 3, three rungs are a ninth, a third and all of the rounds. 1: every trial is trained to
    the end."""

    def check_space(self, space: Space) -> None:
        """Raises ConfigError if the package is missing, or if Optuna cannot choose a value of this type."""
        if importlib.util.find_spec("optuna") is None:
            raise ConfigError(
                "how = 'optuna' needs the package optuna, which is not installed: pip install 'cutlayer[tune]'"
            )
        for name, values in space.values.items():
            for value in () if isinstance(values, Mapping) else values:
                if not isinstance(value, bool | int | float | str):
                    raise ConfigError(
                        f"tuning.{name} names {value!r}, which optuna cannot choose: give numbers or words, or choose "
                        "how = 'random'"
                    )

    def legs(self, space: Space, trials: int, seed: int) -> Legs:
        """One trial after another, each rung by rung."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(1, min(10, trials // 2)))
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=self.eta)
        study = optuna.create_study(sampler=sampler, pruner=pruner, direction="maximize")
        tried: list[tuple[Point, float | None]] = []
        for number in range(trials):
            trial, point = _asked(study, space, tried)
            score = None
            for rung in range(self.rungs):
                step = self.eta**rung
                (score,) = yield [Leg(number, point, step / self.eta ** (self.rungs - 1))]
                if score is not None:
                    trial.report(score, step)
                if rung + 1 == self.rungs or score is None or trial.should_prune():
                    break
            tried.append((point, score))
            done = rung + 1 == self.rungs and score is not None
            study.tell(trial, score if done else None, state=None if done else _pruned())


def _asked(study: Any, space: Space, tried: list[tuple[Point, float | None]]) -> tuple[Any, Point]:
    """A trial and its point: one that has not been tried, if the sampler finds one."""
    for attempt in range(1, _ASKED + 1):
        trial = study.ask()
        point = {name: _suggested(trial, name, values) for name, values in space.values.items()}
        known = [score for other, score in tried if other == point]
        if not known or attempt == _ASKED:
            return trial, point
        study.tell(trial, known[0], state=None if known[0] is not None else _pruned())
    raise AssertionError("the last attempt returns")


def _pruned() -> Any:
    import optuna

    return optuna.trial.TrialState.PRUNED


def _suggested(trial: Any, name: str, values: Any) -> Any:
    if not isinstance(values, Mapping):
        return trial.suggest_categorical(name, list(values))
    low, high, log = values["low"], values["high"], bool(values.get("log"))
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(name, low, high, log=log)
    return rounded(trial.suggest_float(name, low, high, log=log), values)
