"""Rates that fall at given moments."""

from __future__ import annotations

from cutlayer.errors import ConfigError
from cutlayer.plugins import option, register
from cutlayer.schedules.schedule import Schedule


@register("schedule", "step", title="step", summary="multiplied by lr_decay at each of lr_decay_at (as in the paper)")
class StepSchedule(Schedule):
    """Rates fall by a factor at given fractions of the rounds. The paper: by 0.1 at 0.8."""

    lr_decay: float = option(0.1, gt=0, le=1)
    """Factor of the rate at each point of lr_decay_at."""
    lr_decay_at: tuple[float, ...] = option((0.8,))
    """Fractions of the rounds after which the rate falls."""

    def check(self, given: frozenset[str]) -> None:
        """Raises ConfigError for a fraction outside (0, 1)."""
        for fraction in self.lr_decay_at:
            if not 0 < fraction < 1:
                raise ConfigError(
                    f"lr_decay_at = {fraction} is not a fraction of the rounds: give values between 0 and 1, e.g. 0.8"
                )

    def factor(self, progress: float) -> float:
        """lr_decay to the number of fractions that have passed."""
        return float(self.lr_decay ** sum(progress >= at for at in self.lr_decay_at))
