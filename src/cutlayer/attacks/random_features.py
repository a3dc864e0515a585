"""Random features: smashed data that say nothing of the labels that come with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cutlayer.attacks.behaviour import Attack, attack

if TYPE_CHECKING:
    from cutlayer.types import Rows


@attack("features", title="Random features")
class Features(Attack):
    """Smashed data are replaced by Gaussian numbers with the mean and standard deviation of the batch's real ones.

    The standard deviation is multiplied by the parameter. With the default of 1, a bound on lengths does not notice it.
    """

    def rows(self, rows: Rows, draw: torch.Generator) -> Rows:
        """Drawn anew in each step."""
        found = []
        for r in rows:
            wide = r.double()
            noise = torch.randn(r.shape, generator=draw, dtype=torch.float64).to(r.device)
            found.append(wide.mean() + noise * self.parameter * wide.std(correction=0))
        return tuple(found)
