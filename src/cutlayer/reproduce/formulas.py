"""The paper's own cost model: Table 6 and section 4.4 of arXiv 2112.05929, taken literally.

Per epoch. Bytes are in whatever unit the sizes are given in (the paper: MB). The ledger counts what this model leaves
out: labels, and the common gradient of every step but the first (`costs/ledger.py`, convention "paper"). Its time of
PSL lacks a division by C ("sic" below).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Method = Literal["fl", "psl", "sfl", "sglr"]
METHODS: tuple[Method, ...] = ("fl", "psl", "sfl", "sglr")


@dataclass(frozen=True)
class Sizes:
    """Table 6's symbols: C clients, |D| samples of all of them, S(L) of one sample's smashed data, S(w) of the model,
    S(w_c) of the client model, phi.
    """

    clients: int
    samples: int
    smashed: float
    model: float
    client_model: float
    phi: float = 0.5


def per_client(method: Method, s: Sizes) -> float:
    """Communication of one client in an epoch."""
    return total(method, s) / s.clients


def total(method: Method, s: Sizes) -> float:
    """Communication of all clients in an epoch."""
    smashed = 2 * s.samples * s.smashed
    return {
        "fl": 2 * s.clients * s.model,
        "psl": smashed,
        "sfl": smashed + 2 * s.clients * s.client_model,
        "sglr": (2 - s.phi) * s.samples * s.smashed + s.smashed,
    }[method]


def time(method: Method, s: Sizes, rate: float, compute: float) -> float:
    """Duration of an epoch, for `rate` (size per second) and `compute` seconds of computing."""
    smashed = 2 * s.samples * s.smashed
    sent = {
        "fl": 2 * s.model,
        "psl": smashed,  # sic: no 1/C
        "sfl": smashed / s.clients + 2 * s.client_model,
        "sglr": per_client("sglr", s),
    }[method]
    return compute + sent / rate


EXAMPLE = Sizes(clients=100, samples=50_000, smashed=0.024, model=200, client_model=67, phi=0.5)
"""Section 4.4's worked example, in MB: SGLR 1800.024, PSL 2400, SFL 15800, FL 40000."""
