"""Points that are drawn at random (Bergstra and Bengio 2012)."""

from __future__ import annotations

from cutlayer.searches.searching import Leg, Legs, Search, Space, search


@search("random", title="Random search")
class RandomSearch(Search):
    """Points drawn with the seed, from lists or from ranges (uniform, or uniform in the logarithm)."""

    def legs(self, space: Space, trials: int, seed: int) -> Legs:
        """All at once."""
        yield [Leg(number, point) for number, point in enumerate(space.drawn(trials, seed))]
