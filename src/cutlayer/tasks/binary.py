"""Binary classification: one score per row, the logit of the second class."""

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


@task("binary", title="Binary classification", targets="class")
class Binary(Task):
    """Two classes and one score per row: cross entropy of the logit [R, 1] (or [R]) of the second class."""

    primary: ClassVar = "accuracy"
    metrics: ClassVar = measures.OF_ROWS
    loss_options: ClassVar = frozenset({"positive_weight"})
    gives: ClassVar = frozenset({measures.CLASSES, measures.PROBABILITIES, measures.ENTROPY})

    positive_weight: float = option(1.0, gt=0)
    """Weight of rows of the second class in the loss."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy of each row: [R]."""
        return functional.binary_cross_entropy_with_logits(
            outputs.view(len(targets)),
            targets.to(outputs.dtype),
            pos_weight=outputs.new_tensor(self.positive_weight) if self.positive_weight != 1 else None,
            reduction="none",
        )

    def predictions(self, outputs: Tensor) -> Tensor:
        """The probability of the second class: [n]."""
        return torch.sigmoid(outputs.flatten())

    def told_apart(self, given: tuple[int, ...]) -> int:
        """The two classes."""
        return 2

    def mixable(self, outputs: Tensor) -> Tensor:
        """The probabilities."""
        return torch.sigmoid(outputs)

    def unmixed(self, mean: Tensor) -> Tensor:
        """Their logits."""
        return torch.logit(mean, torch.finfo(mean.dtype).eps)

    def probabilities(self, outputs: Tensor) -> Tensor | None:
        """Those of both classes: [n, 2]."""
        second = self.predictions(outputs)
        return torch.stack([1 - second, second], 1)

    def decided(self, outputs: Tensor) -> Tensor | None:
        """The second class where its probability is more than 0.5: [n]."""
        return (self.predictions(outputs) > 0.5).long()

    def foreign(self, targets: Tensor, given: tuple[int, ...]) -> str:
        """Other classes than the two."""
        return "" if bool(((targets == 0) | (targets == 1)).all()) else "other classes than 0 and 1"

    def width(self, targets: Tensor, classes: int) -> int:
        """One score."""
        return 1

    def check_outputs(self, outputs: Tensor, targets: Tensor, names: Sequence[str]) -> None:
        """Two classes, one score per row. Raises ConfigError."""
        if len(names) != 2:
            raise ConfigError(
                f"the task binary needs two classes but the data have {len(names)}: choose the task classification"
            )
        if outputs.numel() != len(targets):
            raise ConfigError(
                f"the model turns {len(targets)} samples into {tuple(outputs.shape)}, not into [{len(targets)}, 1]: "
                "return one score per sample, or choose the task classification"
            )
