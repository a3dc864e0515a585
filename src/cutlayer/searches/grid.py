"""Every combination of the values."""

from __future__ import annotations

import random

from cutlayer.errors import ConfigError
from cutlayer.searches.searching import Leg, Legs, Search, Space, search


@search("grid", title="Grid")
class Grid(Search):
    """All combinations of the values, or, if there are fewer trials, that number of them, drawn with the seed."""

    def check_space(self, space: Space) -> None:
        """Raises ConfigError for a range."""
        if ranges := space.ranges:
            raise ConfigError(
                f"tuning.{ranges[0]} = {space.values[ranges[0]]!r} is a range, of which a grid has no values: give a "
                "list of values, or choose how = 'random'"
            )

    def trials_of(self, space: Space) -> float | None:
        """One for each point."""
        return space.size

    def legs(self, space: Space, trials: int, seed: int) -> Legs:
        """All at once."""
        points = space.points()
        tried = sorted(random.Random(seed).sample(range(len(points)), trials))
        yield [Leg(number, points[at]) for number, at in enumerate(tried)]
