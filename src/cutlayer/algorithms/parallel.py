"""PSL: parallel split learning.

One step:
    1. every client i, in parallel: s_i = f(w_ci, x_i); upload (s_i, y_i)
    2. server: ONE loss on the concatenated rows; w_s <- w_s - eta_s dLoss/dw_s
    3. every client i: back-propagate its own cut gradient; w_ci <- w_ci - eta_c g_ci
Client models are never exchanged.

Paper: arXiv 2112.05929, baseline "PSL".
"""

from __future__ import annotations

from collections.abc import Iterator

from cutlayer.algorithms.common import Scaled, report
from cutlayer.algorithms.contract import algorithm
from cutlayer.cohort import Cohort
from cutlayer.gradients import own
from cutlayer.server import Server
from cutlayer.traffic import Epoch, Traffic
from cutlayer.types import Round, Step
from cutlayer.verbs import BACKWARD, FORWARD


@algorithm(
    "psl",
    title="PSL",
    summary="parallel split learning: one server step on all clients' smashed data",
    paper="arXiv 2112.05929",
    needs={FORWARD, BACKWARD},
    spreads="apart",
    colour="blue",
)
class Psl(Scaled):
    """Parallel split learning."""

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        """One round (a local epoch) of PSL."""
        while smashed := clients.forward():
            step = server.step(smashed)
            clients.backward(own(step.gradient, smashed, self.gradient_scale))
            yield report(step, smashed)

    def traffic(self, epoch: Epoch) -> Traffic:
        """Smashed data up, own cut gradients down."""
        return Traffic("steps")
