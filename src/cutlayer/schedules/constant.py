"""Rates that do not change."""

from __future__ import annotations

from cutlayer.plugins import register
from cutlayer.schedules.schedule import Schedule


@register("schedule", "constant", title="constant", summary="the base rate throughout")
class ConstantSchedule(Schedule):
    """Rates stay as they are."""
