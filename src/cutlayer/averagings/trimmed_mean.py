"""The coordinate-wise trimmed mean (Yin et al. 2018, arXiv 1803.01498, definition 2)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from cutlayer.averagings.rule import Averaging, averaging
from cutlayer.plugins import option

if TYPE_CHECKING:
    from torch import Tensor


@averaging("trimmed_mean", title="Trimmed mean", paper="arXiv 1803.01498")
class TrimmedMean(Averaging):
    """The mean of each number over the models, without the largest and smallest values; all clients count alike.

    As in the paper, numbers of samples are not used: a client could claim any, and would gain weight by it. The number
    of values dropped at each end, trim x K, is rounded up and leaves at least one value, so that a result lies within
    the range of the honest values as long as no more clients than that are hostile.
    """

    trim: float = option(0.2, ge=0, lt=0.5)
    """Fraction of the values that is left out at each end, rounded up to a whole number of models."""

    def dropped(self, models: int) -> int:
        """How many of this number of models are left out at each end."""
        return min(math.ceil(self.trim * models - 1e-9), (models - 1) // 2)

    def combine(self, models: Tensor, shares: Tensor, origin: Tensor | None) -> Tensor:
        """The mean of the values in the middle."""
        drop = self.dropped(len(models))
        kept = models.sort(0).values[drop : len(models) - drop] if drop else models
        return kept.mean(0)
