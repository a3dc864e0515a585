"""Successive halving: many points for a short time, the better ones for longer (Jamieson and Talwalkar 2016)."""

from __future__ import annotations

from cutlayer.plugins import option
from cutlayer.searches.searching import Leg, Legs, Search, Space, search


@search("halving", title="Successive halving", paper="arXiv 1502.07943")
class Halving(Search):
    """Many points for a short time, the best third of them for three times as long, and so on to the last round.

    The points are those that a random search would try.
    """

    eta: int = option(3, ge=2)
    """One in this many trials continues to the next rung, which is this many times as long."""

    def legs(self, space: Space, trials: int, seed: int) -> Legs:
        """Rung by rung."""
        alive = dict(enumerate(space.drawn(trials, seed)))
        for share in self.shares(trials):
            answers = yield [Leg(number, point, share) for number, point in alive.items()]
            scores = dict(zip(alive, answers, strict=True))
            ranked = sorted((n for n in alive if scores[n] is not None), key=lambda n: -(scores[n] or 0.0))
            kept = ranked[: max(1, len(alive) // self.eta)]
            alive = {number: alive[number] for number in sorted(kept)}
            if not alive:  # all have diverged
                return

    def shares(self, trials: int) -> list[float]:
        """The part of the rounds that each rung is trained to; of 9 trials and eta 3: a ninth, a third, all."""
        rungs = 1
        while self.eta**rungs <= trials:
            rungs += 1
        return [float(self.eta) ** (rung + 1 - rungs) for rung in range(rungs)]
