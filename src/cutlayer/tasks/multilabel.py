"""Multi-label classification: several yes-or-no targets per row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from cutlayer.errors import ConfigError
from cutlayer.plugins import option
from cutlayer.tasks import measures
from cutlayer.tasks.objective import Task, task


@task("multilabel", title="Multi-label classification", targets="numbers")
class Multilabel(Task):
    """L labels per row, each 0 or 1: the mean of their binary cross entropies, from logits [R, L]."""

    primary: ClassVar = "accuracy"
    metrics: ClassVar = measures.chosen(
        measures.accuracy, measures.macro_f1, measures.auroc, measures.average_precision, measures.recall
    )
    loss_options: ClassVar = frozenset({"positive_weights"})
    gives: ClassVar = frozenset({measures.LABELS, measures.PROBABILITIES})

    positive_weights: tuple[float, ...] = option(())
    """Weight in the loss of labels that are 1: one number for all labels, or one for each."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean over a row's labels: [R]."""
        weight = outputs.new_tensor(self.positive_weights) if self.positive_weights else None
        each = functional.binary_cross_entropy_with_logits(outputs, targets, pos_weight=weight, reduction="none")
        return each.flatten(1).mean(1)

    def predictions(self, outputs: Tensor) -> Tensor:
        """The probability of each label: [n, L]."""
        return torch.sigmoid(outputs)

    def mixable(self, outputs: Tensor) -> Tensor:
        """The probabilities."""
        return torch.sigmoid(outputs)

    def unmixed(self, mean: Tensor) -> Tensor:
        """Their logits."""
        return torch.logit(mean, torch.finfo(mean.dtype).eps)

    def probabilities(self, outputs: Tensor) -> Tensor | None:
        """The probability of each label: [n, L]."""
        return self.predictions(outputs)

    def width(self, targets: Tensor, classes: int) -> int:
        """One score per label."""
        return targets[:1].numel()

    def check_outputs(self, outputs: Tensor, targets: Tensor, names: Sequence[str]) -> None:
        """Scores shaped as the targets, which are 0 or 1. Raises ConfigError."""
        if outputs.shape != targets.shape:
            raise ConfigError(
                f"the model gives {tuple(outputs.shape[1:])} per sample but there are {tuple(targets.shape[1:])} "
                "labels: return one score per label"
            )
        odd = targets[(targets != 0) & (targets != 1)]
        if odd.numel():
            raise ConfigError(f"the targets hold {odd[0].item():g}, but a label is 0 or 1: choose the task regression")
        if len(self.positive_weights) not in (0, 1, targets.shape[-1]):
            raise ConfigError(
                f"positive_weights has {len(self.positive_weights)} numbers but there are {targets.shape[-1]} labels: "
                "give one, or one for each"
            )
