"""How learning rates change over the rounds: one file per schedule."""

from cutlayer.schedules.schedule import FunctionSchedule, Schedule, WarmedUp

__all__ = ["FunctionSchedule", "Schedule", "WarmedUp"]
