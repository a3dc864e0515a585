"""CSE-FSL: communication and storage efficient federated split learning (arXiv 2507.15816).

Client k has an auxiliary head a_k beside its part w_k of the model. One round:
    1. every client, in parallel, for each of its batches:  (w_k, a_k) <- step on CE(a_k(f(w_k; x)), y);
       of every h batches it sends the first:  s_k = f(w_k; x), y, as they are before that step
    2. the one server, upload by upload as they arrive:  v <- v - eta_s dCE(g(v; s_k), y)/dv
    3. w <- sum_k (n_k / n) w_k;  a <- sum_k (n_k / n) a_k
No gradient comes down, and clients only wait for the server in step 3.
"""

from __future__ import annotations

from collections.abc import Iterator

from cutlayer.algorithms.common import sample_weights
from cutlayer.algorithms.contract import algorithm
from cutlayer.algorithms.heads import SeldomSending
from cutlayer.cohort import Cohort
from cutlayer.server import Server
from cutlayer.traffic import Epoch, Traffic
from cutlayer.types import Round, Step
from cutlayer.verbs import AVERAGE, FORWARD, LEARN, STEP_EACH


@algorithm(
    "cse-fsl",
    title="CSE-FSL",
    summary="clients train on auxiliary heads and send every h-th batch to one server; no gradients come down",
    paper="arXiv 2507.15816",
    needs={FORWARD, LEARN, AVERAGE, STEP_EACH},
    client_part="it trains the client models on auxiliary heads and averages them",
    colour="grey",
)
class CseFsl(SeldomSending):
    """CSE-FSL."""

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        """One round of CSE-FSL."""
        trained: set[int] = set()
        for smashed, _, record in self.local_steps_and_uploads(server, clients, this):
            trained |= set(smashed.clients)
            yield record
        clients.average(sample_weights(clients, trained))

    def traffic(self, epoch: Epoch) -> Traffic:
        """Of every h batches one up, with labels; models and heads up and down, once a round."""
        averaged = epoch.client_model + epoch.head
        return Traffic("local", gradients=False, every=self.upload_every, averaged=averaged)
