"""SMoFi: SplitFed V1 whose server copies share their momentum (arXiv 2511.09828).

One step, u_k being the momentum of the server copy v_k of client k:
    1. every client k, in parallel: s_k = f(w_k; x_k); upload (s_k, y_k)
    2. server, for every k: u_k <- mu u_k + dv mean CE(g(v_k; s_k), y_k); v_k <- v_k - eta u_k
    3. server: u_k <- sum_k (n_k / n) u_k, over the clients of the step
    4. every client k: w_k <- w_k - eta (ds_k/dw_k)^T ds_k mean CE(g(v_k; s_k), y_k)
At the end of a round both sides are averaged as in SplitFed V1. Without momentum at the server it is that.
"""

from __future__ import annotations

from collections.abc import Iterator

from cutlayer.algorithms.common import report, sample_weights
from cutlayer.algorithms.contract import algorithm
from cutlayer.algorithms.splitfed import AVERAGES, SflV1
from cutlayer.cohort import Cohort
from cutlayer.server import Server
from cutlayer.types import CutGradients, Round, Step
from cutlayer.verbs import AVERAGE, BACKWARD, FORWARD, STEP_COPIES


@algorithm(
    "smofi",
    title="SMoFi",
    summary="SplitFed V1 whose server copies average their momentum in every step",
    paper="arXiv 2511.09828",
    needs={FORWARD, BACKWARD, AVERAGE, STEP_COPIES},
    spreads="gathered",
    client_part=AVERAGES,
    colour="purple",
    line="--",
)
class Smofi(SflV1):
    """SplitFed V1 with momentum that the server copies share."""

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        """One round of SMoFi."""
        trained: set[int] = set()
        while smashed := clients.forward():
            step = server.step_copies(smashed)
            server.average_momentum(sample_weights(clients, smashed.clients))
            clients.backward(CutGradients(step.gradient, smashed.clients, smashed.sizes))
            trained |= set(smashed.clients)
            yield report(step, smashed)
        clients.average(sample_weights(clients, trained))
        server.average_copies(sample_weights(clients, trained))
