"""What a schedule is: a factor of the base rates that depends on the progress of the training."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

from cutlayer.errors import ConfigError
from cutlayer.plugins import Thing

_COUNTING = {"round", "step", "epoch"}  # names of a function's first parameter that ask for the number of the round


class Schedule(Thing):
    """Base of schedules, whose factor multiplies the base rates. A schedule declares its own options."""

    @property
    def called(self) -> str:
        """Its name in messages."""
        return self.entry.name

    def factor(self, progress: float) -> float:
        """The factor at `progress` in [0, 1), the fraction of the rounds that are done."""
        return 1.0

    def over(self, rounds: int) -> Schedule:
        """The same schedule for a run of `rounds` rounds."""
        return self


class FunctionSchedule(Schedule):
    """A schedule that is a plain function, progress -> factor; or round -> factor, if its first parameter is called
    `round`, `step` or `epoch`: then it receives the number of completed rounds.
    """

    function: Callable[..., Any]
    name: str
    rounds: int = 1

    @property
    def called(self) -> str:
        """The name of the function."""
        return self.name

    def factor(self, progress: float) -> float:
        """The function's result. Raises ConfigError unless it is a number of at least 0."""
        first = next(iter(inspect.signature(self.function).parameters), "")
        done: float = round(progress * self.rounds) if first in _COUNTING else progress
        try:
            factor = float(self.function(done))
        except Exception as error:  # the user's function: any error is possible
            raise ConfigError(
                f"the schedule {self.name!r} fails at {done} ({type(error).__name__}: {error}): correct the function"
            ) from None
        if not (math.isfinite(factor) and factor >= 0):
            raise ConfigError(
                f"the schedule {self.name!r} gives {factor} at {done}: return a finite factor of at least 0"
            )
        return factor

    def over(self, rounds: int) -> Schedule:
        """Knows how many rounds there are. Raises ConfigError if the function fails in one of them."""
        known = self.model_copy(update={"rounds": rounds})
        for index in range(rounds):
            known.factor(index / rounds)
        return known


class WarmedUp(Schedule):
    """Rates rise in equal steps during the first rounds (a fraction `warmup` of them); `then` is applied to the rounds
    after that, as if they were the whole training.
    """

    then: Schedule
    warmup: float
    rounds: int

    @property
    def called(self) -> str:
        """That of the schedule after the warm-up."""
        return self.then.called

    def factor(self, progress: float) -> float:
        """The rise, then the schedule's own factor."""
        if round(progress, 9) < round(self.warmup, 9):
            rising = self.warmup * self.rounds
            return self.then.factor(0.0) * (progress * self.rounds + 1) / (rising + 1)
        return self.then.factor(max(0.0, (progress - self.warmup) / (1 - self.warmup)))
