"""The user's own loss, a Python function of (outputs, targets), in place of a task's loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cutlayer.errors import ConfigError
from cutlayer.tasks.objective import Task

Loss = Callable[[Tensor, Tensor], Tensor]
"""Outputs [R, ...], targets [R, t...] -> the loss of each row [R], or their mean."""


class RowLoss:
    """The loss of each row, from a function that returns them, or only their mean; then it is called row by row."""

    def __init__(self, loss: Loss) -> None:
        self._loss = loss
        self._mean = self._at_once = False

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of each row: [R]."""
        if self._at_once:
            return torch.vmap(self._one, randomness="different")(outputs, targets)
        if self._mean:
            return torch.stack([self._one(output, target) for output, target in zip(outputs, targets, strict=True)])
        return self._loss(outputs, targets)

    def _one(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss of one row: a number."""
        return self._loss(output[None], target[None]).reshape(())

    def prove(self, outputs: Tensor, targets: Tensor) -> None:
        """Find out what the function returns, from a few rows. Raises ConfigError with value, reason and remedy."""
        rows = outputs.detach().clone().requires_grad_()
        with torch.enable_grad():
            found = self._tried(rows, targets)
        if not found.requires_grad:
            raise ConfigError("the loss has no gradient with respect to the outputs: compute it with torch throughout")
        if found.shape == (len(targets),) and len(targets) > 1:
            return
        if found.dim():
            raise ConfigError(
                f"the loss of {len(targets)} rows has shape {tuple(found.shape)}: return one number per row, "
                f"[{len(targets)}], or their mean"
            )
        self._mean = True
        singly = self(rows, targets)
        if not torch.allclose(singly.mean(), found, rtol=1e-4, atol=1e-6, equal_nan=True):
            raise ConfigError(
                f"the loss of {len(targets)} rows is {found.item():.6g}, but the mean of their losses one by one is "
                f"{singly.mean().item():.6g}: it is not a mean over rows, so return one number per row "
                f"[{len(targets)}] (reduction='none')"
            )
        self._at_once = self._batched(rows, targets, singly)

    def _tried(self, outputs: Tensor, targets: Tensor) -> Tensor:
        try:
            found = self._loss(outputs, targets)
        except Exception as error:  # the user's function: any error is possible
            reason = (str(error).strip().splitlines() or [""])[0]
            raise ConfigError(
                f"the loss cannot be computed from outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} "
                f"({type(error).__name__}: {reason}): correct it, or choose another task or model"
            ) from error
        if not isinstance(found, Tensor):
            raise ConfigError(
                f"the loss gives {type(found).__name__}: return a tensor, one number per row or their mean"
            )
        return found

    def _batched(self, outputs: Tensor, targets: Tensor, singly: Tensor) -> bool:
        """Whether all rows can be computed at once (by vmap), with the same result."""
        try:
            found = torch.vmap(self._one, randomness="different")(outputs, targets)
        except Exception:  # it branches on its values, say
            return False
        return torch.allclose(found, singly, rtol=1e-5, atol=1e-7, equal_nan=True)


def with_loss(task: Task, loss: Loss, given: frozenset[str]) -> Task:
    """The task with this loss in place of its own. Raises ConfigError for options `given` that only the task's own loss
    reads.
    """
    if not callable(loss):
        raise ConfigError(f"loss = {loss!r} cannot be called: give a function of (outputs, targets)")
    if idle := sorted(given & task.loss_options):
        raise ConfigError(
            f"{idle[0]} = {getattr(task, idle[0])!r} has no effect with a loss of your own: leave it out, or leave out "
            "the loss"
        )
    base: Any = type(task)
    rows = RowLoss(loss)

    class OwnLoss(base):  # type: ignore[misc]  # the base is known when a run is made
        """A task whose loss a user gave."""

        def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
            """The loss of each row: [R]."""
            return rows(outputs, targets)

        def check_outputs(self, outputs: Tensor, targets: Tensor, names: Sequence[str]) -> None:
            """Checks what the task checks, and what the loss returns. Raises ConfigError."""
            if type(task).check_outputs is not Task.check_outputs:
                super().check_outputs(outputs, targets, names)
            rows.prove(outputs, targets)

    made: Task = OwnLoss(**task.model_dump())
    return made
