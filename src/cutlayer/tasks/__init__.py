"""Tasks: the loss of a row, the weight of a row, and the metrics of predictions. One task, one file."""

from cutlayer.tasks.judging import Judged, Metric, Value
from cutlayer.tasks.measures import metric
from cutlayer.tasks.objective import Task, task

__all__ = ["Judged", "Metric", "Task", "Value", "metric", "task"]
