"""CL: centralised learning. The reference for comparisons: one model that sees the data of all clients.

One round (an epoch):
    for each batch of the pooled data:  w <- w - eta dLoss/dw

Paper: arXiv 2112.05929, baseline "CL". Privacy is given up: the raw data are uploaded once.
"""

from __future__ import annotations

from collections.abc import Iterator

from cutlayer.algorithms.contract import Algorithm, algorithm
from cutlayer.cohort import Cohort
from cutlayer.server import Server
from cutlayer.traffic import Epoch, Traffic
from cutlayer.types import Round, Step
from cutlayer.verbs import FIT


@algorithm(
    "cl",
    title="CL",
    summary="centralised: one model trained on the pooled data of all clients",
    paper="arXiv 2112.05929",
    needs={FIT},
    central=True,
    colour="black",
)
class Central(Algorithm):
    """Centralised learning."""

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        """One round of CL: the cohort is a single client that holds all the data and the whole model."""
        yield from clients.fit()

    def traffic(self, epoch: Epoch) -> Traffic:
        """The raw data, once."""
        return Traffic("gather")
