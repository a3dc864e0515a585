"""Rates that fall along a line; with `lr_warmup`, the usual schedule of transformers."""

from __future__ import annotations

from cutlayer.plugins import option, register
from cutlayer.schedules.schedule import Schedule


@register("schedule", "linear", title="linear", summary="a straight line, from the base rate to lr_end times it")
class LinearSchedule(Schedule):
    """Rates fall along a line."""

    lr_end: float = option(0.0, ge=0, le=1)
    """The rate at the end of the training, as a fraction of the base rate."""

    def factor(self, progress: float) -> float:
        """From 1 to lr_end."""
        return 1.0 - (1.0 - self.lr_end) * progress
