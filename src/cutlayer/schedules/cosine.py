"""Rates that fall along half a cosine."""

from __future__ import annotations

import math

from cutlayer.plugins import register
from cutlayer.schedules.schedule import Schedule


@register(
    "schedule",
    "cosine",
    title="cosine",
    summary="half a cosine, from the base rate to zero",
    paper="arXiv 1608.03983",
)
class CosineSchedule(Schedule):
    """Rates fall along half a cosine."""

    def factor(self, progress: float) -> float:
        """From 1 to 0."""
        return 0.5 * (1 + math.cos(math.pi * progress))
