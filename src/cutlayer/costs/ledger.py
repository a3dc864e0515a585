"""The ledger of bytes, and the cohort that fills it at the seam.

It counts the values that cross, as the bytes that codecs write; without a codec, their tensors' own bytes (elements x
bytes per element). A deployment sends the same tensors and only adds its framing. Two conventions describe real
traffic, the third is for comparison:
- `wire-unicast`: a message to several clients counts once per client that receives it;
- `wire-broadcast`: a message that is the same for several clients counts once (wireless broadcast, multicast);
- `paper`: as Table 6 of arXiv 2112.05929 counts: no labels, models once per client, and of all common gradients of an
  epoch (here: a round) one sample's.
Evaluation, and a server's part that is sent at the end, are counted separately from training. A common gradient is one
message: every receiver gets all its rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta
from torch import Tensor

from cutlayer.cohort import Cohort, CohortAround, Crossed, Direction, Predict, Summed
from cutlayer.data.samples import AtClient, Samples
from cutlayer.stored import Count, Stored, below, checked, sized
from cutlayer.types import CutGradients, Evaluation, Round, Rows, Smashed, Step, TailGradients

Kind = Literal[
    "smashed data",
    "labels",
    "cut gradients",
    "features",
    "models",
    "heads",
    "raw data",
    "evaluation",
    "server model",
    "weight gradients",
]
_DIRECTIONS: tuple[Direction, ...] = ("up", "down")
_APART = ("evaluation", "server model")  # traffic other than training
Convention = Literal["wire-unicast", "wire-broadcast", "paper"]
CONVENTIONS: tuple[Convention, ...] = ("wire-unicast", "wire-broadcast", "paper")


class Ledger:
    """Bytes per client, direction and kind. With auxiliary heads also rows, of all clients together: `passed` went
    through their parts, `learnt` back from their heads.
    """

    def __init__(self, clients: int) -> None:
        self.clients = clients
        self._bytes: dict[tuple[str, str], np.ndarray] = {}
        self._saved: dict[str, int] = {}  # per kind: the savings of broadcast against unicast
        self.passed = self.learnt = 0
        self._common = 0  # bytes of common gradients, once per receiver
        self._common_once = 0  # those that the paper counts

    def add(self, direction: Direction, kind: Kind, clients: int | Sequence[int], counts: int | np.ndarray) -> None:
        """`counts` bytes of `kind` (one number, or one per client) went between `clients`, all different, and the
        server.
        """
        if isinstance(counts, int) and not counts:
            return
        if (direction, kind) not in self._bytes:
            self._bytes[direction, kind] = np.zeros(self.clients, np.int64)
        self._bytes[direction, kind][np.asarray(clients)] += counts

    def replace(self, direction: Direction, kind: Kind, counts: np.ndarray) -> None:
        """Set the bytes [C] of a kind so far."""
        if counts.any() or (direction, kind) in self._bytes:
            self._bytes[direction, kind] = counts

    def broadcast(self, kind: Kind, clients: Sequence[int], count: int) -> None:
        """The same `count` bytes went down to each of `clients`."""
        if count and len(clients):
            self.add("down", kind, clients, count)
        if count and len(clients) > 1:
            self._saved[kind] = self._saved.get(kind, 0) + count * (len(clients) - 1)

    def common(self, clients: Sequence[int], count: int, once: int) -> None:
        """A common gradient of `count` bytes went down to `clients`; the paper counts `once` of them."""
        self.broadcast("cut gradients", clients, count)
        self._common += count * len(clients)
        self._common_once += once

    def trained(self, direction: Direction) -> np.ndarray:
        """Bytes [C] of all training (without separately counted kinds) that each client sent or received."""
        kinds = [c for (d, k), c in self._bytes.items() if d == direction and k not in _APART]
        return np.sum(kinds, 0) if kinds else np.zeros(self.clients, np.int64)

    def of_clients(self, direction: Direction, kind: Kind) -> np.ndarray:
        """Bytes [C] that each client sent ("up") or received ("down"); every receiver of a broadcast counts it."""
        return self._bytes.get((direction, kind), np.zeros(self.clients, np.int64)).copy()

    def total(self, direction: Direction, convention: Convention = "wire-unicast", kind: Kind | None = None) -> int:
        """Bytes of all clients, of one kind, or of all training (without separately counted kinds)."""
        kinds = [k for d, k in self._bytes if d == direction and (k == kind or (kind is None and k not in _APART))]
        return sum(self._total(direction, k, convention) for k in kinds)

    def table(self) -> list[dict[str, Any]]:
        """One row per direction and kind: every convention's total in bytes."""
        return [
            {"direction": d, "kind": k, **{name: self._total(d, k, name) for name in CONVENTIONS}}
            for d, k in sorted(self._bytes)
        ]

    def _total(self, direction: str, kind: str, convention: Convention) -> int:
        count = int(self._bytes[direction, kind].sum())
        if convention == "wire-broadcast" and direction == "down":
            return count - self._saved.get(kind, 0)
        if convention == "paper" and kind == "labels":
            return 0
        if convention == "paper" and direction == "down" and kind == "cut gradients":
            return count - self._common + self._common_once
        return count

    def state(self) -> dict[str, Any]:
        """Plain values."""
        counts = {f"{direction}/{kind}": c.tolist() for (direction, kind), c in self._bytes.items()}
        rows = {"rows": [self.passed, self.learnt]} if self.learnt else {}
        return {"bytes": counts, "saved": dict(self._saved), "common": [self._common, self._common_once], **rows}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take a state that `state()` returned. Raises MalformedError."""
        found = checked(state, _LedgerState, "the ledger")
        self._bytes = {}
        for key, counts in found.bytes.items():
            direction, kind = key.split("/")
            sized(counts, self.clients, f"the ledger's {key!r}")
            self._bytes[direction, kind] = np.array(counts, np.int64)
        self._saved = dict(found.saved)
        self._common, self._common_once = found.common
        self.passed, self.learnt = found.rows


class _LedgerState(Stored):
    bytes: dict[Annotated[str, Meta(pattern="^(up|down)/[^/]+\\Z")], list[Count]]
    saved: dict[str, Count]
    common: tuple[Count, Count]
    rows: tuple[Count, Count] = (0, 0)


class _MeteredState(Stored):
    inner: dict[str, Any]
    ledger: dict[str, Any]
    stale: list[Count]
    at_work: list[Count] = msgspec.field(default_factory=list)


class MeteredCohort(CohortAround):
    """A cohort whose crossings go into a ledger. It counts, and changes nothing.

    The inner cohort adds the bytes of rows that have crossed to `crossed`; here they are taken out. `cuts` [C]
    are the numbers of the clients' cuts, where these differ. `total` sums the bytes of an evaluation over several
    processes that each evaluate some clients. `asynchronous`: clients begin to work when `arrivals` names them, and not
    when a round begins.
    """

    def __init__(
        self,
        inner: Cohort,
        ledger: Ledger,
        crossed: list[Crossed],
        cuts: Sequence[int] = (),
        *,
        total: Callable[[np.ndarray], np.ndarray] | None = None,
        asynchronous: bool = False,
    ) -> None:
        super().__init__(inner)
        self.asynchronous = asynchronous
        self.ledger, self._crossed, self._cuts, self._total = ledger, crossed, cuts, total
        self._stale: set[int] = set()  # missed an averaging: will fetch the model when they next take part
        self._at_work: set[int] = set()  # continue with their present model until it is averaged
        self._common_seen = False  # in this round
        self._in_step = False  # clients all take the same steps: who has missed one needs the optimiser's state too
        self._waiting = 0  # rows whose clients wait for their result

    def begin_round(self, index: int, total: int, lr_factor: float) -> Round:
        """Participants that missed an averaging fetch the averaged model first."""
        this = self.inner.begin_round(index, total, lr_factor)
        self._common_seen = False
        if not self.asynchronous:
            self._fetch(this.clients)
        return this

    def begin_work(self, clients: Sequence[int]) -> list[int]:
        """Those of `clients` that are not at work begin, and fetch the model if they missed an averaging. Returns these
        clients.
        """
        new = [k for k in clients if k not in self._at_work]
        self._fetch(new)
        self._at_work |= set(new)
        return new

    def arrivals(self, clients: Sequence[int], count: int) -> tuple[int, ...]:
        """Clients that begin to work fetch the model first."""
        self.begin_work(clients)
        return self.inner.arrivals(clients, count)

    def forward(self, clients: Sequence[int] | None = None, *, labels: bool = True) -> Smashed:
        """Up: smashed data and labels. A client that missed an averaging in this round has fetched the model before."""
        try:
            smashed = self.inner.forward(clients, labels=labels)
        finally:
            self._count("smashed data")
        self._fetch(smashed.clients)
        self._waiting = len(smashed)
        self.ledger.passed += self._waiting
        self._add("up", "labels", smashed.clients, np.array(smashed.sizes, np.int64) * row_bytes(smashed.labels))
        return smashed

    def tail(self, features: Smashed) -> TailGradients:
        """Down: features; up: their gradients."""
        try:
            return self.inner.tail(features)
        finally:
            self._count("features", up="cut gradients")

    def backward(self, gradients: CutGradients) -> None:
        """Down: own cut gradients one by one, the common one as a broadcast."""
        try:
            self.inner.backward(gradients)
        finally:
            self._count("cut gradients", common_rows=len(gradients.common[0]) if gradients.active else 0)

    def backward_together(self, gradients: CutGradients) -> Summed:
        """Down: cut gradients; up: the weight gradients of their receivers; down: their sum, to all clients (clients
        that were away get the model when they next take part).
        """
        try:
            summed = self.inner.backward_together(gradients)
        finally:
            self._count("cut gradients", common_rows=len(gradients.common[0]) if gradients.active else 0)
        if summed.gave:
            size = self.footprint(summed.gave[0]).gradient
            self.ledger.add("up", "weight gradients", summed.gave, size)
            self.ledger.broadcast("weight gradients", summed.took, size)
            self._stale |= set(range(len(self.samples))) - set(summed.took)
            self._in_step = True
        return summed

    def learn(self, steps: int) -> list[Step]:
        """Nothing crosses; rows that were sent before have gone through already."""
        taken = self.inner.learn(steps)
        rows = sum(step.samples for step in taken)
        self.ledger.passed += rows - (self._waiting if taken else 0)
        self.ledger.learnt += rows
        self._waiting = 0
        return taken

    def align(self, heads: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Down: each client's head."""
        self.inner.align(heads)
        sizes = [sum(t.nbytes for t in head.values()) for head in heads.values()]
        self._add("down", "heads", list(heads), np.array(sizes, np.int64))

    def average(self, weights: Mapping[int, float]) -> tuple[int, ...]:
        """Up: the models of those averaged; down: the average, to the same clients (to others when they next take
        part).
        """
        if not weights:  # no client has trained
            return ()
        averaged = self.inner.average(weights)
        for same in self._by_cut(averaged):
            size = self.footprint(same[0]).model
            self.ledger.add("up", "models", same, size)
            self.ledger.broadcast("models", same, size)
        self._at_work -= set(weights)
        self._stale = set(range(len(self.samples))) - set(averaged) - self._at_work
        return averaged

    def hand_over(self, client: int, *, optimizer: bool) -> None:
        """Up from the holder, down to the next: the client model, and its optimiser's state if that goes too."""
        holder = self.inner.holder
        self.inner.hand_over(client, optimizer=optimizer)
        if holder is not None and holder != client == self.inner.holder:  # otherwise it was not connected
            size = self.footprint(holder)
            count = size.model + (size.optimizer if optimizer else 0)
            self.ledger.add("up", "models", holder, count)
            self.ledger.add("down", "models", client, count)

    def evaluate(self, samples: Samples, predict: Predict, clients: Sequence[int] | None = None) -> Evaluation:
        """Up: smashed data of the held-out samples and their labels; U-shaped: no labels, but features down. If samples
        stay with their client, so do their labels, and outputs go down instead.
        """
        stay = isinstance(samples, AtClient)

        def metered(clients: Sequence[int], rows: Rows) -> Rows:
            if self.shape == "u-shaped":
                return predict(clients, rows)
            if not stay:
                labels = len(rows[0]) // len(clients) * samples.y[:1].nbytes
                self.ledger.add("up", "evaluation", clients, labels)
            outputs = predict(clients, rows)
            if stay:
                self.ledger.add("down", "evaluation", clients, outputs[0].nbytes)
            return outputs

        before = self._evaluated()
        try:
            found = self.inner.evaluate(samples, metered, clients)
        finally:
            self._count("evaluation")
        if self._total is not None:
            for direction, count in zip(_DIRECTIONS, self._total(self._evaluated() - before), strict=True):
                self.ledger.replace(direction, "evaluation", before[_DIRECTIONS.index(direction)] + count)
        if isinstance(samples, AtClient) and found.scores and self.holder not in (None, samples.client):
            self._lent(self.holder, samples.client)
        return found

    def _evaluated(self) -> np.ndarray:
        """Bytes that have crossed in evaluations: [2, C]."""
        return np.stack([self.ledger.of_clients(direction, "evaluation") for direction in _DIRECTIONS])

    def _lent(self, holder: int | None, client: int) -> None:
        """The travelling model goes to a client for a test there."""
        assert holder is not None, "somebody holds it"
        size = self.footprint(holder).model
        self.ledger.add("up", "evaluation", holder, size)
        self.ledger.add("down", "evaluation", client, size)

    def _fetch(self, clients: Sequence[int]) -> None:
        """Down: the averaged model, to those of `clients` that have missed it."""
        late = [k for k in clients if k in self._stale]
        for same in self._by_cut(late):
            size = self.footprint(same[0])
            self.ledger.broadcast("models", same, size.model + (size.optimizer if self._in_step else 0))
        self._stale -= set(late)

    def _by_cut(self, clients: Sequence[int]) -> list[list[int]]:
        """Clients whose models have the same form, so that they get the same message: those with the same cut."""
        groups: dict[int, list[int]] = {}
        for k in clients:
            groups.setdefault(self._cuts[k] if self._cuts else 0, []).append(k)
        return list(groups.values())

    def _count(self, kind: Kind, *, up: Kind | None = None, common_rows: int = 0) -> None:
        """Count the rows that have crossed as `kind`, those that went up as `up` if it is given; a common gradient has
        `common_rows` rows.
        """
        for one in self._crossed:
            if one.common:
                self._common(one.clients, int(one.counts), common_rows)
            else:
                self._add(one.direction, up if up and one.direction == "up" else kind, one.clients, one.counts)
        self._crossed.clear()

    def _common(self, clients: Sequence[int], count: int, rows: int) -> None:
        """Count a common gradient. The paper counts one row of the first in a round."""
        self.ledger.common(clients, count, 0 if self._common_seen else count // rows)
        self._common_seen = True

    def _add(self, direction: Direction, kind: Kind, clients: Sequence[int], counts: int | np.ndarray) -> None:
        """Count bytes [C] of `clients`."""
        if np.any(counts):
            self.ledger.add(direction, kind, clients, counts)

    def state(self) -> dict[str, Any]:
        """The inner cohort's state, and the ledger's."""
        at_work = {"at_work": sorted(self._at_work)} if self._at_work else {}
        return {**super().state(), "ledger": self.ledger.state(), "stale": sorted(self._stale), **at_work}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take a state that `state()` returned. Raises MalformedError."""
        found = checked(state, _MeteredState, "the clients")
        below(found.stale, self.ledger.clients, "stale")
        below(found.at_work, self.ledger.clients, "at_work")
        super().load({"inner": found.inner})
        self.ledger.load(found.ledger)
        self._stale, self._at_work = set(found.stale), set(found.at_work)


def row_bytes(rows: Tensor) -> int:
    """Bytes of one row of [R, s...]."""
    return math.prod(rows.shape[1:]) * rows.element_size()
