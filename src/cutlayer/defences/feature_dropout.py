"""Features are dropped at random."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from cutlayer.defences.protection import Defence, defence, drawn
from cutlayer.plugins import option
from cutlayer.types import Rows


@defence("feature-dropout", title="Feature dropout")
class FeatureDropout(Defence):
    """Sets random numbers of the smashed data to zero and scales up the others, so that the mean stays the same."""

    order = 10

    feature_dropout: float = option(
        0.0, ge=0, lt=1, help="Set each number of the smashed data to zero with this probability, also in evaluation."
    )

    @property
    def exact(self) -> bool:
        """The kept features are exact."""
        return True

    @property
    def active(self) -> bool:
        """With a probability above 0."""
        return self.feature_dropout > 0

    def protect(self, rows: Rows, sizes: Sequence[int], draws: Sequence[torch.Generator]) -> Rows:
        """Rows times random factors."""
        return tuple(r * drawn(partial(_kept, self.feature_dropout), r, sizes, draws) for r in rows)


def _kept(probability: float, shape: Sequence[int], draw: torch.Generator) -> Tensor:
    """Factors: 0 with this probability, otherwise the factor that preserves the mean."""
    return (torch.rand(tuple(shape), generator=draw) >= probability) / (1 - probability)
