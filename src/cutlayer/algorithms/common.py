"""Common parts of several algorithms: options, weights of an averaging, and the order of visits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import ClassVar, Literal

from cutlayer import seeds
from cutlayer.algorithms.contract import Algorithm
from cutlayer.cohort import Cohort
from cutlayer.plugins import option
from cutlayer.server import ServerStep
from cutlayer.types import Round, Smashed, Step


class Scaled(Algorithm):
    """Algorithms whose server has one loss on the rows of all clients."""

    gradient_scale: Literal["own", "union"] = option("own")
    """Whether a client's cut gradient is that of its own mean loss (own) or that of the mean loss over the rows of all
    clients (union)."""


class LocalWork(Algorithm):
    """Algorithms whose clients train for several epochs or steps between two averagings."""

    exclusive: ClassVar = (("local_epochs", "local_steps"),)

    local_epochs: int = option(1, ge=1)
    """Local epochs per round."""
    local_steps: int | None = option(None, ge=1)
    """Local steps per round, instead of epochs. With fl, 1 is FedSGD."""

    @property
    def part_of_round(self) -> tuple[int, int | None]:
        """(local epochs, local steps) of a round."""
        return self.local_epochs, self.local_steps


class Tour(Algorithm):
    """Sequential learning: clients take turns, and the one client model travels."""

    hand_over: Literal["batch", "epoch"] = option("epoch")
    """When the client model moves to the next client: after each batch, or after a local epoch."""
    hand_over_optimizer: bool = option(False)
    """Also hand over the optimiser's state together with the client model."""
    visit_order: Literal["fixed", "random"] = option("fixed")
    """The order in which clients take turns in a round: always the same (fixed), or drawn anew each round (random)."""

    @property
    def moves_optimizer(self) -> bool:
        """As the option says."""
        return self.hand_over_optimizer

    def visits(self, this: Round) -> Iterator[int]:
        """Which client's turn each step of the round is.

        With `hand_over="epoch"`, a client trains on all its batches, then the next client does. With `"batch"`, each
        client trains on one batch in turn; clients with fewer batches drop out of later turns.
        """
        batches = dict(zip(this.clients, this.batches, strict=True))
        order = list(this.clients)
        if self.visit_order == "random":
            seeds.generator(this.seed, "visits", this.index).shuffle(order)
        if self.hand_over == "epoch":
            yield from (k for k in order for _ in range(batches[k]))
        else:
            yield from (k for turn in range(this.steps) for k in order if turn < batches[k])


def sample_weights(clients: Cohort, who: Iterable[int]) -> dict[int, float]:
    """FedAvg's weights: n_k for each client of `who` (averaging divides by their sum). If samples have different
    weights, the total weight of the client's samples.
    """
    masses = clients.masses
    return {k: masses[k] for k in sorted(who)}


def report(step: ServerStep, smashed: Smashed, active: tuple[int, ...] = ()) -> Step:
    """The record of one server step."""
    return Step(step.means, smashed.clients, len(smashed), active, step.lr)
