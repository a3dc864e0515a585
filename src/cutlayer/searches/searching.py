"""What a search is: it chooses the next values to try, given the scores of the values tried so far.

A search of your own is a subclass of `Search` under `@search("name")`, in a file that the configuration names:
`how = "path/to/file.py:Name"` below [tuning]. It is a generator: it yields the legs to train next, all of which may be
trained at once, and is sent one score for each of them. It ends when it has nothing more to try.

A search must depend only on its arguments and on the scores. An interrupted comparison runs it again from the beginning
and sends it the scores of the legs that are already trained, so a search has no state to store.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from cutlayer import plugins
from cutlayer.errors import ConfigError
from cutlayer.sweep import Point, drawn_value

_LISTED = 100_000  # points of a finite space that are drawn from a list of them all


@dataclass(frozen=True)
class Leg:
    """A part of a trial's training: up to that `share` of its rounds, in (0, 1], with the values of `point`. A trial
    continues where its last leg ended; legs of one trial have the same point.
    """

    trial: int
    point: Point
    share: float = 1.0


Answers = Sequence[float | None]
"""A score for each leg, larger is better; None if training diverged."""
Legs = Generator[list[Leg], Answers, None]


@dataclass(frozen=True)
class Space:
    """What may be tried: for each option a list of values, or a range {low, high, log}."""

    values: Mapping[str, Sequence[Any] | Mapping[str, Any]] = field(default_factory=dict)

    @property
    def ranges(self) -> list[str]:
        """The options that have a range."""
        return [name for name, values in self.values.items() if isinstance(values, Mapping)]

    @property
    def size(self) -> float:
        """Number of points; infinite with a range of real numbers."""
        return math.prod(_number(values) for values in self.values.values())

    def points(self) -> list[Point]:
        """All points in order, the last option's values changing first; without ranges."""
        lists = [v for v in self.values.values() if not isinstance(v, Mapping)]
        return [dict(zip(self.values, values, strict=True)) for values in itertools.product(*lists)]

    def drawn(self, count: int, seed: int) -> list[Point]:
        """This number of different points. Each option's values depend only on the seed and the option's name, so
        methods with the same options try the same values.
        """
        if not self.ranges and self.size <= _LISTED:
            points = self.points()
            return [points[at] for at in random.Random(seed).sample(range(len(points)), count)]
        chances = {name: random.Random(f"{seed} {name}") for name in self.values}
        found: list[Point] = []
        for _ in range(100 * count):
            point = {name: drawn_value(values, chances[name]) for name, values in self.values.items()}
            if point not in found:
                found.append(point)
            if len(found) == count:
                break
        return found


def _number(values: Sequence[Any] | Mapping[str, Any]) -> float:
    """How many values an option has."""
    if not isinstance(values, Mapping):
        return len(values)
    whole = isinstance(values["low"], int) and isinstance(values["high"], int)
    return values["high"] - values["low"] + 1 if whole else math.inf


class Search(plugins.Thing):
    """Base of searches."""

    def legs(self, space: Space, trials: int, seed: int) -> Legs:
        """Yields the legs to train, and is sent their scores. `trials` points are tried, numbered from 0.

        `seed` is the one of the tuning. Raises ConfigError for a space that cannot be searched this way.
        """
        raise ConfigError(f"the search {self.entry.name!r} has no legs(): write the generator that yields legs")

    def check_space(self, space: Space) -> None:
        """Raises ConfigError for a space that cannot be searched this way."""

    def trials_of(self, space: Space) -> float | None:
        """The number of trials that the space itself determines; None if it must be given."""
        return None


S = TypeVar("S", bound=type[Search])


def search(name: str, *, title: str = "", paper: str = "") -> Callable[[S], S]:
    """A decorator that registers a subclass of `Search`."""
    return plugins.register("search", name, title=title, paper=paper)
