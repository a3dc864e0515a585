"""FL: federated averaging (McMahan et al., arXiv 1602.05629).

One round:
    1. every participating client, in parallel: E local steps or epochs on the whole model
    2. w <- sum_k (n_k / n) w_k                                    (n = sum of the participants' n_k)

With one local step and plain SGD this is FedSGD: one step on the union batch.
"""

from __future__ import annotations

from collections.abc import Iterator

from cutlayer.algorithms.common import LocalWork, sample_weights
from cutlayer.algorithms.contract import algorithm
from cutlayer.cohort import Cohort
from cutlayer.server import Server
from cutlayer.traffic import Epoch, Traffic
from cutlayer.types import Round, Step
from cutlayer.verbs import AVERAGE, FIT


@algorithm(
    "fl",
    title="FL",
    summary="federated (FedAvg): whole models trained locally, averaged every round",
    paper="arXiv 1602.05629",
    needs={FIT, AVERAGE},
    spreads="apart",
    colour="purple",
)
class FedAvg(LocalWork):
    """Federated averaging."""

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        """One round of FedAvg. The weights are those of the clients that trained."""
        steps = clients.fit()
        yield from steps
        clients.average(sample_weights(clients, {k for step in steps for k in step.clients}))

    @property
    def averages_every_step(self) -> bool:
        """With one local step."""
        return self.local_steps == 1

    def traffic(self, epoch: Epoch) -> Traffic:
        """Whole models, up and down."""
        return Traffic("rounds", averaged=epoch.model)
