"""GPSL: parallel split learning that samples globally and keeps its clients in step (arXiv 2407.15738).

One step of B = C b rows, drawn from the data of all clients together (`sampling = global`):
    1. every client k with rows in the step, in parallel: s_k = f(w; x_k); upload (s_k, y_k)
    2. server: ONE loss on the concatenated rows; v <- v - eta dLoss/dv
    3. the same clients: back-propagate dLoss/ds_k; upload g_k = (ds_k/dw)^T dLoss/ds_k
    4. every client, with rows or without: w <- w - eta sum_k g_k
All client models are equal throughout. With plain gradient descent and without batch normalisation this is centralised
gradient descent on the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator

from cutlayer.algorithms.common import LocalWork
from cutlayer.algorithms.contract import algorithm
from cutlayer.algorithms.splitfed import in_step
from cutlayer.cohort import Cohort
from cutlayer.server import Server
from cutlayer.traffic import Epoch, Traffic
from cutlayer.types import Round, Step
from cutlayer.verbs import BACKWARD_TOGETHER, FORWARD


@algorithm(
    "gpsl",
    title="GPSL",
    summary="PSL on rows drawn from all data; all clients step with the sum of their gradients",
    paper="arXiv 2407.15738",
    needs={FORWARD, BACKWARD_TOGETHER},
    spreads="apart",
    presets={"sampling": "global"},
    client_part="it sums the gradients of the client models",
    colour="blue",
    line="--",
)
class Gpsl(LocalWork):
    """Parallel split learning with global sampling and synchronised clients."""

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        """One round of GPSL."""
        yield from in_step(server, clients)

    def traffic(self, epoch: Epoch) -> Traffic:
        """As PSL, and in each step weight gradients up and their sum down."""
        return Traffic("steps", summed=epoch.client_gradient)
