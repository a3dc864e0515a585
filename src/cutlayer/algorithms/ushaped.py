"""U-shaped split learning: labels stay private (Vepakomma et al., arXiv 1812.00564, "boomerang" configuration).

The network is cut twice; the client runs the first and the last part. One step of the clients i that take part in it:
    1. every client i: s_i = f(w_lower,i, x_i); upload s_i                    (no labels)
    2. server: h = g(w_s, s) on the concatenated rows; send h_i down
    3. every client i: loss of its tail on h_i; upload dLoss_i/dh_i
    4. server: w_s <- w_s - eta_s dLoss/dw_s, Loss = sum_i (b_i / R) Loss_i; send dLoss/ds down
    5. every client i: back-propagate dLoss/ds_i; step lower part and tail

ussl   clients take turns, as in ssl: with the same rates it computes exactly what ssl computes
upsl   as psl: all clients in one step
usfl   as sfl: lower parts and tails are averaged, every step or every round
usglr  as sglr: SplitLr sets eta_s in 4, SplitAvg averages the gradients of 5
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import Literal

from cutlayer.algorithms.common import LocalWork, Scaled, Tour, report, sample_weights
from cutlayer.algorithms.contract import algorithm
from cutlayer.algorithms.sglr import SplitAvg, SplitLr
from cutlayer.cohort import Cohort
from cutlayer.gradients import own, spread
from cutlayer.plugins import option
from cutlayer.server import Server, ServerStep
from cutlayer.traffic import Epoch, Traffic
from cutlayer.types import Round, Smashed, Spread, Step, TailGradients
from cutlayer.verbs import AVERAGE, BACKWARD, FORWARD, HAND_OVER, TAIL


@algorithm(
    "ussl",
    title="U-shaped SSL",
    summary="sequential split learning that keeps labels private: the last layers stay with the client too",
    paper="arXiv 1812.00564",
    needs={FORWARD, TAIL, BACKWARD, HAND_OVER},
    colour="orange",
    line="--",
)
class UShapedSsl(Tour):
    """U-shaped sequential split learning."""

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        """One round of U-shaped SSL."""
        for client in self.visits(this):
            clients.hand_over(client, optimizer=self.hand_over_optimizer)
            if smashed := clients.forward([client], labels=False):
                smashed, step = through_tails(server, clients, smashed)
                clients.backward(own(step.gradient, smashed))
                yield report(step, smashed)

    def traffic(self, epoch: Epoch) -> Traffic:
        """As SSL, with the features and their gradients instead of labels."""
        return Traffic("relay", labels=False, tails=True, moved=epoch.client_model)


@algorithm(
    "upsl",
    title="U-shaped PSL",
    summary="parallel split learning that keeps labels private: the last layers stay with the clients too",
    paper="arXiv 1812.00564",
    needs={FORWARD, TAIL, BACKWARD},
    spreads="apart",
    colour="blue",
    line="--",
)
class UShapedPsl(Scaled):
    """U-shaped parallel split learning."""

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        """One round (a local epoch) of U-shaped PSL."""
        while smashed := clients.forward(labels=False):
            smashed, step = through_tails(server, clients, smashed)
            clients.backward(own(step.gradient, smashed, self.gradient_scale))
            yield report(step, smashed)

    def traffic(self, epoch: Epoch) -> Traffic:
        """As PSL, with the features and their gradients instead of labels."""
        return Traffic("steps", labels=False, tails=True)


@algorithm(
    "usfl",
    title="U-shaped SFL",
    summary="U-shaped PSL plus averaging of the client models, both ends, every step or round",
    paper="arXiv 1812.00564",
    needs={FORWARD, TAIL, BACKWARD, AVERAGE},
    spreads="apart",
    colour="purple",
    line="--",
)
class UShapedSfl(Scaled, LocalWork):
    """U-shaped SplitFed."""

    average_every: Literal["step", "round"] = option("round")
    """When client models are averaged: after each step, or at the end of each round."""

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        """One round of U-shaped SFL."""
        trained: set[int] = set()
        while smashed := clients.forward(labels=False):
            smashed, step = through_tails(server, clients, smashed)
            clients.backward(own(step.gradient, smashed, self.gradient_scale))
            trained |= set(smashed.clients)
            if self.average_every == "step":
                clients.average(sample_weights(clients, smashed.clients))
            yield report(step, smashed)
        if self.average_every == "round":
            clients.average(sample_weights(clients, trained))

    @property
    def averages_every_step(self) -> bool:
        """As the option says."""
        return self.average_every == "step"

    def traffic(self, epoch: Epoch) -> Traffic:
        """As U-shaped PSL, and the client models up and down, once a round."""
        return Traffic("steps", labels=False, tails=True, averaged=epoch.client_model)


@algorithm(
    "usglr",
    title="U-shaped SGLR",
    summary="SGLR that keeps labels private: the last layers stay with the clients too",
    paper="arXiv 2112.05929",
    needs={FORWARD, TAIL, BACKWARD},
    spreads="apart",
    client_part="SplitAvg averages the gradients that reach the lower parts",
    server_part="SplitLr accelerates the server model",
    colour="vermillion",
    line="--",
)
class UShapedSglr(SplitAvg, SplitLr):
    """U-shaped SGLR."""

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        """One round (a local epoch) of U-shaped SGLR."""
        for turn in count():
            if not (smashed := clients.forward(labels=False)):
                return
            factor = self.split_lr(smashed, enrolled=len(clients.samples))
            smashed, step = through_tails(server, clients, smashed, factor)
            active = self.draw_active(smashed.clients, this, turn)
            clients.backward(self.split_average(step.gradient, smashed, active))
            yield report(step, smashed, active)

    def traffic(self, epoch: Epoch) -> Traffic:
        """As U-shaped PSL, with one cut gradient for the active clients."""
        return replace(super().traffic(epoch), labels=False, tails=True)


def through_tails(server: Server, clients: Cohort, smashed: Smashed, factor: float = 1.0) -> tuple[Smashed, ServerStep]:
    """Steps 2 to 4: the part of `smashed` that its clients have finished, and the server's step on it."""
    features = replace(smashed, rows=server.forward(smashed))
    tail = clients.tail(features)
    return _finished(smashed, tail), server.backward(smashed, tail, factor)


def _finished(smashed: Smashed, tail: TailGradients) -> Smashed:
    """The smashed data of the clients whose tails have answered. Their total weights are known by now, but not the
    weight of each row, so all rows of a client count equally.
    """
    alike = not tail.masses or tail.masses == tail.sizes
    if alike and tail.clients == smashed.clients:
        return smashed
    if isinstance(smashed, Spread):
        return smashed.counted(tail.masses)
    rows = smashed.take(smashed.rows, tail.clients)
    each = [mass / size for mass, size in zip(tail.masses, tail.sizes, strict=True)]
    weights = None if alike else spread(each, tail.sizes)
    return Smashed(rows, smashed.labels[: len(rows[0])], tail.clients, tail.sizes, weights=weights)
