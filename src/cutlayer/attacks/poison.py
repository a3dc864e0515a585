"""Model updates are replaced: by noise or negated (as in Blanchard et al. 2017, arXiv 1703.02757)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from cutlayer.attacks.behaviour import Attack, attack
from cutlayer.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@attack("poison", title="Poisoned updates", paper="arXiv 1703.02757")
class Poison(Attack):
    """The model's update is replaced by Gaussian noise, or by itself times a negative number.

    With a parameter above 0, the noise is as many times as long as the update. With a parameter below 0, the update is
    multiplied by it, which undoes what the other clients have learnt.
    """

    default: ClassVar[float] = 10.0

    def check(self) -> None:
        """0 would be no attack. Raises ConfigError."""
        if not self.parameter:
            raise ConfigError(
                "the parameter 0 is not possible: give a number above 0 (noise) or below 0 (negated update)"
            )

    def update(self, update: Tensor, draw: torch.Generator) -> Tensor:
        """Noise, or the update negated."""
        if self.parameter < 0:
            return update * self.parameter
        noise = torch.randn(len(update), generator=draw, dtype=torch.float64).to(update.device)
        longer: Tensor = torch.linalg.vector_norm(update) / torch.linalg.vector_norm(noise)
        return noise * (self.parameter * longer)
