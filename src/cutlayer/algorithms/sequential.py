"""SSL: sequential ("vanilla") split learning (Gupta & Raskar, arXiv 1810.06060).

One round: clients take turns; in client k's turn
    0. the client model moves on from the previous client to k    (with its optimiser's state, if asked)
    1. client k: s = f(w_c, x); upload (s, y)
    2. server: loss; w_s <- w_s - eta_s dLoss/dw_s
    3. client k: back-propagate dLoss/ds; w_c <- w_c - eta_c dLoss/dw_c
A turn is one batch or a whole local epoch. There is one client model; evaluation uses its holder.
"""

from __future__ import annotations

from collections.abc import Iterator

from cutlayer.algorithms.common import Tour, report
from cutlayer.algorithms.contract import algorithm
from cutlayer.cohort import Cohort
from cutlayer.gradients import own
from cutlayer.server import Server
from cutlayer.traffic import Epoch, Traffic
from cutlayer.types import Round, Step
from cutlayer.verbs import BACKWARD, FORWARD, HAND_OVER


@algorithm(
    "ssl",
    title="SSL",
    summary="sequential split learning: one client at a time, its model handed to the next",
    paper="arXiv 1810.06060",
    needs={FORWARD, BACKWARD, HAND_OVER},
    colour="orange",
)
class Ssl(Tour):
    """Sequential split learning."""

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        """One round of SSL."""
        for client in self.visits(this):
            clients.hand_over(client, optimizer=self.hand_over_optimizer)
            if smashed := clients.forward([client]):
                step = server.step(smashed)
                clients.backward(own(step.gradient, smashed))
                yield report(step, smashed)

    def traffic(self, epoch: Epoch) -> Traffic:
        """As PSL, and the client model from each client to the next, once an epoch."""
        return Traffic("relay", moved=epoch.client_model)
