"""Simulated clients answer the same as clients on other machines: only the verbs that the algorithm needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from cutlayer.cohort import Cohort, CohortAround, Summed
from cutlayer.errors import ConfigError
from cutlayer.types import CutGradients, Smashed, Step, TailGradients
from cutlayer.verbs import (
    ALIGN,
    ARRIVALS,
    AVERAGE,
    BACKWARD,
    BACKWARD_TOGETHER,
    FIT,
    FORWARD,
    HAND_OVER,
    LEARN,
    TAIL,
    undeclared,
)


class BoundedCohort(CohortAround):
    """A cohort that refuses verbs that the algorithm called `name` does not state among its `needs`, since the choice
    of the engine and the checks before training depend on them.
    """

    def __init__(self, inner: Cohort, name: str, needs: frozenset[str]) -> None:
        super().__init__(inner)
        self.name, self.needs = name, needs

    def _check(self, verb: str) -> None:
        if verb not in self.needs:
            raise ConfigError(undeclared(self.name, f"clients.{verb}", verb, self.needs))

    def forward(self, clients: Sequence[int] | None = None, *, labels: bool = True) -> Smashed:
        """Raises ConfigError if it is not needed."""
        self._check(FORWARD)
        return self.inner.forward(clients, labels=labels)

    def arrivals(self, clients: Sequence[int], count: int) -> tuple[int, ...]:
        """Raises ConfigError if it is not needed."""
        self._check(ARRIVALS)
        return self.inner.arrivals(clients, count)

    def tail(self, features: Smashed) -> TailGradients:
        """Raises ConfigError if it is not needed."""
        self._check(TAIL)
        return self.inner.tail(features)

    def backward(self, gradients: CutGradients) -> None:
        """Raises ConfigError if it is not needed."""
        self._check(BACKWARD)
        self.inner.backward(gradients)

    def backward_together(self, gradients: CutGradients) -> Summed:
        """Raises ConfigError if it is not needed."""
        self._check(BACKWARD_TOGETHER)
        return self.inner.backward_together(gradients)

    def learn(self, steps: int) -> list[Step]:
        """Raises ConfigError if it is not needed."""
        self._check(LEARN)
        return self.inner.learn(steps)

    def align(self, heads: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Raises ConfigError if it is not needed."""
        self._check(ALIGN)
        self.inner.align(heads)

    def fit(self) -> list[Step]:
        """Raises ConfigError if it is not needed."""
        self._check(FIT)
        return self.inner.fit()

    def average(self, weights: Mapping[int, float]) -> tuple[int, ...]:
        """Raises ConfigError if it is not needed."""
        self._check(AVERAGE)
        return self.inner.average(weights)

    def hand_over(self, client: int, *, optimizer: bool) -> None:
        """Raises ConfigError if it is not needed."""
        self._check(HAND_OVER)
        self.inner.hand_over(client, optimizer=optimizer)

    def state(self) -> dict[str, Any]:
        """The inner cohort's."""
        return self.inner.state()

    def load(self, state: Mapping[str, Any]) -> None:
        """Take a state that `state()` returned."""
        self.inner.load(state)
