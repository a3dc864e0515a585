"""Rates that rise once and fall once."""

from __future__ import annotations

import math

from cutlayer.errors import ConfigError
from cutlayer.plugins import option, register
from cutlayer.schedules.schedule import Schedule


@register(
    "schedule",
    "onecycle",
    title="onecycle",
    summary="up to the base rate and down again, along cosines",
    paper="arXiv 1708.07120",
)
class OneCycleSchedule(Schedule):
    """Rates rise to the base rate and fall to almost nothing. Defaults are those of torch's OneCycleLR."""

    lr_peak_at: float = option(0.3, gt=0, lt=1)
    """Fraction of the rounds after which the rate reaches its peak, the base rate."""
    lr_first: float = option(1 / 25, gt=0, le=1)
    """The initial rate, as a fraction of the base rate."""
    lr_last: float = option(4e-6, ge=0, le=1)
    """The final rate, as a fraction of the base rate."""

    def check(self, given: frozenset[str]) -> None:
        """It has a warm-up of its own. Raises ConfigError for another one."""
        if "lr_warmup" in given:
            raise ConfigError(
                "lr_warmup has no effect on the schedule onecycle, which rises by itself: set lr_peak_at, or choose "
                "another schedule"
            )

    def factor(self, progress: float) -> float:
        """Half a cosine up, half a cosine down."""
        if progress < self.lr_peak_at:
            return _between(self.lr_first, 1.0, progress / self.lr_peak_at)
        return _between(1.0, self.lr_last, (progress - self.lr_peak_at) / (1 - self.lr_peak_at))


def _between(start: float, end: float, done: float) -> float:
    """The value on half a cosine from `start` to `end`, after the fraction `done` of it."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))
