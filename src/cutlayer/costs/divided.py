"""What each of several ranks holds and sends, if they share the clients of one run (see docs/distributed.md).

R ranks have ceil(C / R) clients each, and a replica of the server's part. A sum over the ranks is a ring: each sends
2 (R - 1) / R of its bytes. Rows that all ranks need go from each rank to the R - 1 others. Left out are the numbers
about each participant that ranks tell each other in a step: losses, sizes, bytes.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from cutlayer.algorithms import Algorithm, traffic_of
from cutlayer.costs.expect import Workload
from cutlayer.costs.measure import Footing, Measured, Optimizer
from cutlayer.verbs import LEARN

_COUNT = 8  # bytes of the number of rows of a step


@dataclass(frozen=True)
class PerRank:
    """What one rank of several holds and sends with an algorithm. `clients` it simulates at most; `states` are bytes of
    their weights, gradients and optimisers, and of the server's; `rows` what a step of all of them saves for the
    backward pass, at most. Bytes that it sends: `step` in each step; `gathering` in each step if all ranks need the
    rows of all clients (the server's part has batch normalisation, or draws); `averaging` in each averaging of client
    models; `epoch` in an epoch, without gathering. `refused`: why ranks cannot share it, empty if they can; then all
    figures are 0.
    """

    algorithm: str
    clients: int = 0
    states: int = 0
    rows: int = 0
    step: float = 0.0
    gathering: float = 0.0
    averaging: float = 0.0
    epoch: float = 0.0
    refused: str = ""

    @property
    def memory(self) -> int:
        """Bytes of states and rows together."""
        return self.states + self.rows

    def row(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "memory": self.memory}


def per_rank(name: str, algorithm: Algorithm, m: Measured, work: Workload, optimizer: Optimizer, ranks: int) -> PerRank:
    """What each of `ranks` ranks holds and sends with the algorithm called `name`."""
    if refused := _refused(algorithm):
        return PerRank(name, refused=refused)
    traits, traffic = algorithm.traits, traffic_of(algorithm, work)
    assert traffic is not None, "only algorithms that state their traffic are planned"
    clients, around = math.ceil(work.clients / ranks), 2 * (ranks - 1) / ranks
    gathered = algorithm.entry.facts.get("spreads") == "gathered"
    own, others = (m.whole, None) if traits.whole else (m.client, m.server)
    states, rows = clients * _states(own, optimizer), clients * (own.fixed + work.batch * own.per_row)
    step = gathering = averaging = 0.0
    if others is not None:
        states += (clients + 1 if traits.server_copies else 1) * _states(others, optimizer)
        rows += others.fixed + (work.clients if gathered else clients) * work.batch * others.per_row
        step += around * _COUNT
        gathering = step + (ranks - 1) * clients * work.batch * (m.smashed + work.label)  # ranks send rows as they are
        if gathered:
            step = gathering
        elif not traits.server_copies:
            step += around * others.trainable
        if traffic.sharing:
            step += around * work.batch * m.gradient
        step += around * traffic.summed
    if traffic.averaged:
        averaging = around * (own.moving + (others.moving if others is not None and traits.server_copies else 0))
    steps = math.ceil(work.samples_per_client / work.batch)
    return PerRank(name, clients, states, rows, step, gathering, averaging, steps * step + averaging)


def _states(part: Footing, optimizer: Optimizer) -> int:
    """Bytes of a part's weights, gradients and optimiser."""
    return part.state + part.trainable + part.moments(optimizer)


def _refused(algorithm: Algorithm) -> str:
    """Why several ranks cannot share the clients of an algorithm; empty if they can."""
    traits = algorithm.traits
    if traits.central:
        return "it gathers all data in one place"
    if traits.takes_turns:
        return "its clients take turns"
    if LEARN in traits.needs:
        return "its clients train on auxiliary heads"
    if traits.asynchronous:
        return "its clients work at their own pace"
    return "" if algorithm.entry.facts.get("spreads") else "it is not registered with `spreads`"
