"""U-shaped split learning: labels stay private (Vepakomma et al., arXiv 1812.00564, "boomerang" configuration).

The network is cut twice; the client runs the first and the last part. One round is that of SSL; in client k's turn
    1. client k: s = f(w_lower, x); upload s                        (no labels)
    2. server: h = g(w_s, s); send h down
    3. client k: loss of its tail on h; upload dLoss/dh
    4. server: w_s <- w_s - eta_s dLoss/dw_s; send dLoss/ds down
    5. client k: back-propagate dLoss/ds; step lower part and tail
With the same rates this computes exactly what vanilla split learning computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from cutlayer.algorithms.common import Tour, report
from cutlayer.algorithms.contract import algorithm
from cutlayer.cohort import Cohort
from cutlayer.gradients import own
from cutlayer.server import Server
from cutlayer.types import Round, Step
from cutlayer.verbs import BACKWARD, FORWARD, HAND_OVER, TAIL


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
                features = replace(smashed, rows=server.forward(smashed))
                step = server.backward(smashed, clients.tail(features))
                clients.backward(own(step.gradient, smashed))
                yield report(step, smashed)
