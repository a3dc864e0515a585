"""What each of several ranks holds and sends, if they share the clients of one run (see docs/distributed.md).

R ranks have ceil(C / R) clients each, and a replica of the server's part. A sum over the ranks is a ring: each sends
2 (R - 1) / R of its bytes. What all ranks need goes from each rank to the R - 1 others: the participants' losses, and
rows if they are gathered. Losses go along with the server's gradient if that is summed. Left out is what ranks tell
each other once in a round, at an evaluation or in a checkpoint, and about rows that are weighted or compressed.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from cutlayer.algorithms import Algorithm, traffic_of
from cutlayer.costs.expect import Workload
from cutlayer.costs.measure import Footing, Measured, Optimizer, at_client, at_server
from cutlayer.models.parts import crossing_bytes
from cutlayer.models.recomputed import Sides
from cutlayer.traffic import Traffic
from cutlayer.verbs import LEARN

_LOSS = 8  # bytes of a participant's loss in a message of its own
_LOSS_ALONG = 12  # along with gradients in single precision, as three parts


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


def per_rank(
    name: str,
    algorithm: Algorithm,
    m: Measured,
    work: Workload,
    optimizer: Optimizer,
    ranks: int,
    sides: Sides = "none",
) -> PerRank:
    """What each of `ranks` ranks holds and sends with the algorithm called `name`, if blocks of these `sides` are
    computed again in the backward pass.
    """
    if refused := _refused(algorithm):
        return PerRank(name, refused=refused)
    traits, traffic = algorithm.traits, traffic_of(algorithm, work)
    assert traffic is not None, "only algorithms that state their traffic are planned"
    clients, around, others = math.ceil(work.clients / ranks), 2 * (ranks - 1) / ranks, ranks - 1
    gathered = algorithm.entry.facts.get("spreads") == "gathered"
    own, server = (m.whole, None) if traits.whole else (m.client, m.server)
    states, rows = clients * _states(own, optimizer), clients * own.saved(work.batch, checkpointed=at_client(sides))
    averaging = around * own.moving if traffic.averaged else 0.0
    if server is None:
        return PerRank(name, clients, states, rows, averaging=averaging, epoch=averaging)
    copies = (work.clients if gathered else clients) + 1 if traits.server_copies else 1
    states += copies * _states(server, optimizer)
    under_way = (work.clients if gathered else clients) * work.batch
    rows += server.saved(under_way, checkpointed=at_server(sides))
    if traffic.averaged and traits.server_copies and not gathered:  # else each rank has all copies
        averaging += around * server.moving
    # What a step sends, whatever its rows, and what it sends for each row of a batch: if rows stay, or are gathered.
    along = server.trainable and not (traits.server_copies or traffic.tails)
    apart = around * (traffic.summed + (0 if traits.server_copies else server.trainable))
    apart += around * work.clients * _LOSS_ALONG if along else others * clients * _LOSS
    together = around * traffic.summed + (others * clients * _LOSS if traffic.tails else 0)
    shared, moved = around * m.gradient if traffic.sharing else 0.0, others * clients * _row(m, work, traffic)
    fixed, per_row = (together, moved) if gathered else (apart, shared)
    steps = math.ceil(work.samples_per_client / work.batch)
    epoch = steps * fixed + work.samples_per_client * per_row + averaging
    step, gathering = fixed + work.batch * per_row, together + work.batch * moved
    return PerRank(name, clients, states, rows, step, gathering, averaging, epoch)


def _row(m: Measured, work: Workload, traffic: Traffic) -> int:
    """Bytes of a row that is gathered, as it is in memory: smashed data and label; with tails, features' gradients."""
    back = crossing_bytes(c for c in m.returning if c.differentiable) if traffic.tails else 0
    return m.smashed + (work.label if traffic.labels else 0) + back


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
