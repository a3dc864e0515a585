"""Rows of at most a fixed length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cutlayer.errors import ConfigError
from cutlayer.plugins import option
from cutlayer.screenings.filtering import Screening, screening

if TYPE_CHECKING:
    from torch import Tensor


@screening("length_bound", title="Fixed bound")
class LengthBound(Screening):
    """Rows that are longer than a fixed length are scaled down to it. This also works if clients take turns."""

    row_limit: float | None = option(None, gt=0, shared=False)
    """The largest length that a row may have. Required."""

    def check(self, given: frozenset[str]) -> None:
        """Raises ConfigError without a length."""
        if self.row_limit is None:
            raise ConfigError(
                "the screening length_bound needs a length: give row_limit, such as 50, or choose median_bound"
            )

    def bound(self, lengths: Tensor, sizes: Sequence[int]) -> float | None:
        """The length."""
        return self.row_limit
