"""The coordinate-wise median (Yin et al. 2018, arXiv 1803.01498, definition 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cutlayer.averagings.rule import Averaging, averaging

if TYPE_CHECKING:
    from torch import Tensor


@averaging("median", title="Median", paper="arXiv 1803.01498")
class CoordinateMedian(Averaging):
    """The median of each number over the models; for an even number of models, the mean of the two in the middle.

    As in the paper, numbers of samples are not used.
    """

    def combine(self, models: Tensor, shares: Tensor, origin: Tensor | None) -> Tensor:
        """The value in the middle."""
        ordered, count = models.sort(0).values, len(models)
        return ordered[(count - 1) // 2] / 2 + ordered[count // 2] / 2  # halves: their sum does not overflow
