"""Regression: one or several quantities per row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import functional

from cutlayer.errors import ConfigError
from cutlayer.plugins import option
from cutlayer.tasks import measures
from cutlayer.tasks.objective import Task, task


def _flat(rows: Tensor) -> Tensor:
    """[n, t...] -> [n, numbers of a row]; single numbers may be [n] or [n, 1]."""
    return rows.reshape(len(rows), -1)


@task("regression", title="Regression", targets="numbers")
class Regression(Task):
    """Quantities: the mean over a row's numbers of their losses, outputs [R, t...] shaped as the targets."""

    primary: ClassVar = "rmse"
    metrics: ClassVar = measures.chosen(measures.mae, measures.rmse, measures.r2)
    loss_options: ClassVar = frozenset({"loss", "huber_delta"})
    gives: ClassVar = frozenset({measures.NUMBERS})

    loss: Literal["mse", "l1", "huber", "poisson"] = option("mse")
    """Loss per number: squared error (mse), absolute error (l1), Huber's (quadratic below huber_delta), or Poisson's
    (the model outputs the logarithm of a count)."""
    huber_delta: float = option(1.0, gt=0)
    """The error above which Huber's loss is linear."""

    def check(self, given: frozenset[str]) -> None:
        """huber_delta belongs to Huber's loss. Raises ConfigError."""
        if "huber_delta" in given and self.loss != "huber":
            raise ConfigError(
                f"huber_delta = {self.huber_delta:g} has no effect with loss = {self.loss!r}: choose loss = huber, or "
                "leave it out"
            )

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean over a row's numbers: [R]."""
        outputs, targets = _flat(outputs), _flat(targets)
        if self.loss == "mse":
            each = functional.mse_loss(outputs, targets, reduction="none")
        elif self.loss == "l1":
            each = functional.l1_loss(outputs, targets, reduction="none")
        elif self.loss == "huber":
            each = functional.huber_loss(outputs, targets, reduction="none", delta=self.huber_delta)
        else:
            each = functional.poisson_nll_loss(outputs, targets, log_input=True, reduction="none")
        return each.mean(1)

    def predictions(self, outputs: Tensor) -> Tensor:
        """The quantities themselves."""
        return outputs.exp() if self.loss == "poisson" else outputs

    def mixable(self, outputs: Tensor) -> Tensor:
        """The quantities themselves."""
        return self.predictions(outputs)

    def unmixed(self, mean: Tensor) -> Tensor:
        """The outputs of the model that belong to them."""
        return mean.log() if self.loss == "poisson" else mean

    def width(self, targets: Tensor, classes: int) -> int:
        """One number per quantity."""
        return targets[:1].numel()

    def check_outputs(self, outputs: Tensor, targets: Tensor, names: Sequence[str]) -> None:
        """Outputs shaped as targets. Raises ConfigError."""
        if _flat(outputs).shape != _flat(targets).shape:
            raise ConfigError(
                f"the model gives {tuple(outputs.shape[1:])} per sample but there are {tuple(targets.shape[1:])} "
                "quantities: return one number for each"
            )
        if self.loss == "poisson" and (targets < 0).any():
            raise ConfigError(f"the targets hold {targets.min().item():g}, but a count is 0 or more: choose loss = mse")
