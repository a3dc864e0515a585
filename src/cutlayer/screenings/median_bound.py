"""Rows of at most a multiple of the median length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from cutlayer.plugins import option
from cutlayer.screenings.filtering import Screening, screening
from cutlayer.screenings.lengths import medians

if TYPE_CHECKING:
    from torch import Tensor


@screening("median_bound", title="Bound relative to the median")
class MedianBound(Screening):
    """Rows that are longer than a multiple of the step's median length are scaled down to it.

    The median of a step is the median of the clients' own medians (the lower one of an even number), so that a client
    does not gain weight by many rows. If it is zero, rows stay as they are. In the U-shaped split, the gradients that
    clients send are bounded in the same way.
    """

    compares: ClassVar[bool] = True

    row_multiple: float = option(2.0, gt=0, shared=False)
    """The bound as a multiple of the step's median length over all clients."""

    def bound(self, lengths: Tensor, sizes: Sequence[int]) -> float | None:
        """The multiple of the median."""
        return self.row_multiple * float(medians(lengths, sizes).median()) or None
