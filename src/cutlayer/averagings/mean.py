"""The weighted mean of FedAvg: one client can move it as far as it likes."""

from __future__ import annotations

from cutlayer.averagings.rule import Averaging, averaging


@averaging("mean", title="Mean", paper="arXiv 1602.05629")
class WeightedMean(Averaging):
    """The mean of the client models, weighted by their numbers of samples."""
