"""FL: federated averaging (McMahan et al., arXiv 1602.05629).

One round:
    1. every participating client, in parallel: E local steps or epochs on the whole model
    2. w <- sum_k (n_k / n) w_k                                    (n = sum of the participants' n_k)

With one local step and plain SGD this is FedSGD: one step on the union batch.
"""

from __future__ import annotations

from collections.abc import Iterator

from cutlayer.algorithms.common import sample_weights
from cutlayer.cohort import Cohort
from cutlayer.options import RunConfig
from cutlayer.server import Server
from cutlayer.types import Round, Step


def fedavg(options: RunConfig, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
    """One round of FedAvg. The weights are those of the clients that did train."""
    steps = clients.fit()
    yield from steps
    clients.average(sample_weights(clients, {k for step in steps for k in step.clients}))
