"""No screening: the server uses rows as it receives them."""

from __future__ import annotations

from cutlayer.screenings.filtering import Screening, screening


@screening("none", title="None")
class NoScreening(Screening):
    """Rows are used as received."""
