"""Flipped labels (as in Fang et al. 2019, arXiv 1911.11815)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cutlayer.attacks.behaviour import Attack, attack
from cutlayer.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@attack("labels", title="Flipped labels", paper="arXiv 1911.11815")
class Labels(Attack):
    """Of K classes, class k becomes K - 1 - k in the client's training rows, or in a fraction of them.

    The parameter is that fraction. Targets that are not one class per sample are shuffled among these rows instead.
    """

    def check(self) -> None:
        """It is a fraction. Raises ConfigError."""
        if not 0 < self.parameter <= 1:
            raise ConfigError(f"the parameter {self.parameter:g} is not a fraction of its rows: give one up to 1")

    def targets(self, targets: Tensor, classes: int, draw: torch.Generator) -> Tensor:
        """Flipped, or shuffled."""
        changed = targets.clone()
        count = max(1, round(self.parameter * len(targets)))
        at = torch.randperm(len(targets), generator=draw)[:count].to(targets.device)
        if not classes:
            changed[at.sort().values] = targets[at]
            return changed
        chosen = targets[at]
        inside = (chosen >= 0) & (chosen < classes)  # what is ignored stays so
        changed[at] = torch.where(inside, classes - 1 - chosen, chosen)
        return changed
