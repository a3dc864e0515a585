"""Segmentation: one class per pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from cutlayer.errors import ConfigError
from cutlayer.tasks import measures
from cutlayer.tasks.classification import OfClasses
from cutlayer.tasks.objective import mean_of_counting, task


@task("segmentation", title="Segmentation", targets="classes")
class Segmentation(OfClasses):
    """One class per pixel (or voxel): the mean cross entropy of scores [R, K, h, w...] with targets [R, h, w...].

    A row counts as many as its pixels that count, so that the loss is the mean over all pixels.
    """

    primary: ClassVar = "miou"
    metrics: ClassVar = measures.chosen(
        measures.accuracy, measures.majority, measures.miou, measures.dice, measures.iou, measures.confusion
    )
    gives: ClassVar = frozenset({measures.CLASSES, measures.ENTROPY})

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean over a row's pixels that count: [R]."""
        each, counts = self.entropies(outputs, targets), self.counts(targets)
        return each.flatten(1).mean(1) if counts is None else mean_of_counting(each, counts.to(each.dtype))

    def weights(self, targets: Tensor) -> Tensor | None:
        """The total weight of a row's pixels: [R]."""
        counts = self.counts(targets)
        return None if counts is None else counts.flatten(1).sum(1)

    def predictions(self, outputs: Tensor) -> Tensor:
        """The class with the largest score: [n, h, w...]."""
        return outputs.argmax(1)

    def check_outputs(self, outputs: Tensor, targets: Tensor, names: Sequence[str]) -> None:
        """Scores [R, K, h, w...] for targets [R, h, w...]. Raises ConfigError."""
        if outputs.dim() < 3 or (len(outputs), *outputs.shape[2:]) != tuple(targets.shape):
            raise ConfigError(
                f"the model gives {tuple(outputs.shape[1:])} per sample but its target is {tuple(targets.shape[1:])}: "
                "return scores [classes, height, width] of the target's size"
            )
        self.check_classes(outputs.shape[1], targets, names)
