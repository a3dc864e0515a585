"""CL: centralised learning. The yardstick: one model that sees everybody's data.

One round (an epoch):
    for each batch of the pooled data:  w <- w - eta dLoss/dw

Paper: arXiv 2112.05929, baseline "CL". Privacy is given up: the raw data are uploaded once.
"""

from __future__ import annotations

from collections.abc import Iterator

from cutlayer.cohort import Cohort
from cutlayer.options import RunConfig
from cutlayer.server import Server
from cutlayer.types import Round, Step


def central(options: RunConfig, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
    """One round of CL: the cohort is a single client that holds all the data and the whole model."""
    yield from clients.fit()
