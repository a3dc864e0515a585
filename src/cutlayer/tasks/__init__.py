"""What is learnt: the loss of a row, what a row counts, and how predictions are judged. One task, one file."""

from cutlayer.tasks.judging import Judged, Metric, Value
from cutlayer.tasks.measures import metric
from cutlayer.tasks.objective import Task, task

__all__ = ["Judged", "Metric", "Task", "Value", "metric", "task"]
