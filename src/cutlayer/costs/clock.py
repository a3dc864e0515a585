"""A virtual clock around a cohort: the time and energy of a training on a fleet of clients.

Time follows from the algorithm's requests, without knowledge of the algorithm: a client does one thing after another;
messages that go up together have arrived when the last one has; the server sends when it has computed. In sequential
learning this makes a relay, in parallel learning a wait for the slowest client in each step, in federated learning a
wait in each round. The numbers of the training are not changed, with one exception: if clients work at their own pace
(`arrivals`), the clock decides whose batch arrives first.

Left out: evaluation, optimiser steps, averaging, and the work of a client while others receive requests. A batch that
arrives while models are on their way to be averaged is taken after them.

Shape legend: C clients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np
from torch import Tensor

from cutlayer.cohort import CohortAround, Direction, Summed
from cutlayer.costs.attendance import Attendance
from cutlayer.costs.energy import Energy, Use, clients_energy, server_energy
from cutlayer.costs.fleet import Array, Fleet
from cutlayer.costs.flops import ModelFlops
from cutlayer.costs.ledger import MeteredCohort
from cutlayer.stored import Amount, Count, Stored, below, checked, sized
from cutlayer.types import CutGradients, Round, Smashed, Step, TailGradients


@dataclass(frozen=True)
class Reading:
    """Virtual seconds since the start; joules of all clients (modelled) and of the server (None: not known); seconds
    [C] that each client has waited, for others or for its link.
    """

    seconds: float
    clients: Energy
    server_joules: float | None
    idle: tuple[float, ...]


class Clock:
    """The times until which each side has worked, sent, received and waited, in seconds: arrays [C]."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        zeros = np.zeros(fleet.clients)
        self.ready = zeros.copy()  # when each client has finished its requests
        self.server = 0.0  # when the server has finished
        self.server_flops = 0.0
        self.flops, self.asleep = zeros.copy(), zeros.copy()
        self.up_bits, self.up_seconds = zeros.copy(), zeros.copy()
        self.down_bits, self.down_seconds = zeros.copy(), zeros.copy()
        self.here = np.zeros(fleet.clients, bool)  # takes part in the present round
        self.attendance = None if fleet.trace is None else Attendance(fleet.trace)

    def present(self) -> tuple[int, ...]:
        """The clients that can take part in the round that begins now. If none can be reached, the clock moves on to
        the time when one can, and all clients sleep until then.
        """
        if self.attendance is None:
            return tuple(range(self.fleet.clients))
        clients, begins = self.attendance.present(self.server)
        if begins > self.server:
            self.ready[self.here] = np.maximum(self.ready, self.server)[self.here]
            self.here[:] = False
            self.server = begins
        return clients

    def begin(self, clients: Sequence[int]) -> None:
        """A round with `clients`: those that did not take part in the last one wake up now."""
        at = np.zeros_like(self.here)
        at[list(clients)] = True
        waking = at & ~self.here
        woken = np.maximum(self.ready, self.server)
        self.asleep[waking] += woken[waking] - self.ready[waking]
        self.ready[waking] = woken[waking]
        self.here = at

    def wake(self, clients: Sequence[int]) -> None:
        """These sleeping clients begin to work now, each separately."""
        who = list(clients)
        woken = np.maximum(self.ready[who], self.server)
        self.asleep[who] += woken - self.ready[who]
        self.ready[who] = woken

    def arrive(self, flops: Array, bits: Array) -> Array:
        """When the server would have the `bits` [C] of clients that compute `flops` [C] and then send, each separately:
        seconds [C]. This changes nothing.
        """
        arrives = self.ready + flops / self.fleet.speeds
        if self.attendance is None:
            return arrives + np.maximum(bits / self.fleet.up, bits / self.fleet.server_rate) + self.fleet.latency
        for k in np.flatnonzero(bits > 0).tolist():
            alone = np.zeros_like(bits)
            alone[k] = bits[k]
            seconds, gaps = self._passing("up", arrives, alone, bits[k], notes=False)
            arrives[k] += seconds[k] + gaps[k]
        return arrives + self.fleet.latency

    def not_before(self, client: int, time: float) -> None:
        """A client cannot begin before `time`."""
        self.ready[client] = max(self.ready[client], time)

    def compute(self, flops: Array) -> None:
        """Every client computes its `flops` [C]."""
        self.flops += flops
        self.ready += flops / self.fleet.speeds

    def serve(self, flops: float) -> None:
        """The server computes."""
        self.server_flops += flops
        self.server += flops / self.fleet.server_speed

    def upload(self, bits: Array) -> None:
        """Clients send `bits` [C] together; the server has them when the last has arrived."""
        who = bits > 0
        if not who.any():
            return
        seconds, gaps = self._passing("up", self.ready, bits, bits.sum())
        self.ready += seconds + gaps
        self.up_bits += bits
        self.up_seconds += seconds
        self.server = max(self.server, float(self.ready[who].max()) + self.fleet.latency)

    def download(self, bits: Array, at_server: float) -> None:
        """The server sends `bits` [C] together; `at_server` is what leaves it (multicast messages once)."""
        who = bits > 0
        if not who.any():
            return
        comes = np.maximum(self.ready, self.server + self.fleet.latency)
        seconds, gaps = self._passing("down", comes, bits, at_server)
        arrives = comes + (seconds + gaps)
        self.ready = np.where(who, arrives, self.ready)
        self.down_bits += bits
        self.down_seconds += seconds

    def _passing(
        self, direction: Direction, begin: Array, bits: Array, at_server: float, *, notes: bool = True
    ) -> tuple[Array, Array]:
        """Seconds [C] on air, and without a link, of `bits` [C] that are sent together at `begin` [C]; `at_server` bits
        pass at the server. `notes`: the attendance counts them.
        """
        rates, shared = getattr(self.fleet, direction), at_server / self.fleet.server_rate
        if self.attendance is None:
            return np.where(bits > 0, np.maximum(bits / rates, shared), 0.0), np.zeros_like(bits)
        return self.attendance.passing(direction, begin, bits, shared, notes=notes)

    def go_on(self, clients: Sequence[int]) -> None:
        """The server sends `clients` the next request, whose bytes are not counted."""
        at = list(clients)
        self.ready[at] = np.maximum(self.ready[at], self.server + self.fleet.latency)

    @property
    def now(self) -> float:
        """The time when all have finished."""
        return max(self.server, float(self.ready.max()))

    def read(self) -> Reading:
        """The time and the energy so far. Clients of the present round have waited for the others until now."""
        busy = self.asleep + self.flops / self.fleet.speeds + self.up_seconds + self.down_seconds
        until = np.where(self.here, self.now, self.ready)
        waiting = np.maximum(until - busy, 0.0)
        waiting[waiting < 1e-9 * max(self.now, 1.0)] = 0.0  # rounding errors do not count as waiting
        use = Use(self.flops, self.up_bits, self.up_seconds, self.down_bits, self.down_seconds, waiting)
        joules = clients_energy(self.fleet, use), server_energy(self.fleet, self.server_flops)
        return Reading(self.now, *joules, idle=tuple(waiting.tolist()))

    _ARRAYS = ("ready", "flops", "asleep", "up_bits", "up_seconds", "down_bits", "down_seconds")

    def state(self) -> dict[str, Any]:
        """Plain values."""
        arrays = {name: getattr(self, name).tolist() for name in self._ARRAYS}
        attendance = {} if self.attendance is None else {"attendance": self.attendance.state()}
        server = {"server": self.server, "server_flops": self.server_flops}
        return {**arrays, "here": self.here.tolist(), **server, **attendance}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take a state that `state()` returned. Raises MalformedError."""
        found = checked(state, _ClockState, "the clock")
        for name in self._ARRAYS:
            sized(getattr(found, name), len(self.here), f"the clock's {name!r}")
            setattr(self, name, np.array(getattr(found, name), np.float64))
        sized(found.here, len(self.here), "the clock's 'here'")
        self.here = np.array(found.here, bool)
        self.server, self.server_flops = float(found.server), float(found.server_flops)
        if self.attendance is not None:
            self.attendance.load(found.attendance)


class _ClockState(Stored):
    ready: list[Amount]
    flops: list[Amount]
    asleep: list[Amount]
    up_bits: list[Amount]
    up_seconds: list[Amount]
    down_bits: list[Amount]
    down_seconds: list[Amount]
    here: list[bool]
    server: Amount
    server_flops: Amount
    attendance: dict[str, Any] = msgspec.field(default_factory=dict)


class _ClockedState(Stored):
    inner: dict[str, Any]
    clock: dict[str, Any]
    fitted: list[Count]
    at_work: list[Count] = msgspec.field(default_factory=list)
    row_bytes: Amount | None = None


class ClockedCohort(CohortAround):
    """A cohort that reports another cohort's work to a clock, and changes nothing else.

    Bytes are those of the ledger; FLOPs per sample those of `flops`; `batch` is b, which only local training uses (its
    rows do not cross). `central`: the one model is trained by the server, on data that the fleet has sent.
    `server_flops`: the server's FLOPs for each row of a step. `row_bytes`: bytes of a row on its way up, as far as
    known before the first is sent. If clients have different cuts, `each` [C] are the FLOPs per sample at each client's
    cut; the server then also computes the layers between that cut and the deepest one.
    """

    def __init__(
        self,
        inner: MeteredCohort,
        clock: Clock,
        flops: ModelFlops,
        batch: int,
        server_flops: float,
        *,
        central: bool = False,
        row_bytes: float = 0.0,
        each: Sequence[ModelFlops] = (),
    ) -> None:
        super().__init__(inner)
        self.metered, self._row_bytes = inner, row_bytes
        self._at_work: set[int] = set()  # clients that work at their own pace
        own = each or [flops] * len(inner.samples)
        self._forward = np.array([f.client.forward for f in own])
        self._backward = np.array([f.client.backward for f in own])
        self._tails = np.array([f.tail.training for f in own])
        self._whole = np.array([f.whole.training for f in own])
        self._between = np.array([f.server.training - flops.server.training for f in own])
        self.server_flops = server_flops
        self.ledger = inner.ledger
        self.clock, self.flops, self.batch, self.central = clock, flops, batch, central
        self._rows = np.zeros(len(inner.samples))  # of the present step
        self._tail_done = False
        self._round: Round | None = None
        self._fitted = np.zeros(len(inner.samples), np.int64)  # batches of local training so far
        self._before = self._fitted.copy()  # those of earlier rounds
        self._sent = self._seen()

    def begin_round(self, index: int, total: int, lr_factor: float) -> Round:
        """Participants wake up; those that missed an averaging fetch the model."""
        this = self._round = self.inner.begin_round(index, total, lr_factor)
        self._before = self._fitted.copy()
        if self.metered.asynchronous:  # clients begin to work when they are named
            return this
        here = range(self.clock.fleet.clients) if self.central else this.clients
        self.clock.begin(here)
        if self.clock.attendance is not None:
            self.clock.attendance.took_part(here)
        self._download()
        return this

    def arrivals(self, clients: Sequence[int], count: int) -> tuple[int, ...]:
        """Clients that begin to work fetch the model first; then the order is that of the fleet's rates, links and
        trace, where the clients are simulated.
        """
        new = [k for k in clients if k not in self._at_work]
        if new:
            self.clock.wake(new)
            self.metered.begin_work(new)
            self._download()
            self._at_work |= set(new)
            if self.clock.attendance is not None:
                self.clock.attendance.took_part(new)
        batches = np.zeros(len(self._rows), np.int64)
        batches[list(clients)] = 1
        rows = self._next_rows(batches, draw=False)
        times = self.clock.arrive(rows * self._forward, 8.0 * self._row_bytes * rows)
        return self.inner.arrivals(sorted(clients, key=times.__getitem__), count)

    def forward(self, clients: Sequence[int] | None = None, *, labels: bool = True) -> Smashed:
        """Forward passes, then the uploads; the server waits for the last."""
        smashed = self.inner.forward(clients, labels=labels)
        self._rows[:] = 0
        self._rows[list(smashed.clients)] = smashed.sizes
        self._fitted[list(smashed.clients)] += 1
        self._tail_done = False
        self.clock.compute(self._rows * self._forward)
        sent = self._upload()
        if self._at_work and len(smashed):
            self._row_bytes = sent / len(smashed)
        return smashed

    def tail(self, features: Smashed) -> TailGradients:
        """The server's forward pass, features down, the tails' passes, gradients up."""
        tail = self.inner.tail(features)
        sizes = np.zeros_like(self._rows)
        sizes[list(features.clients)] = features.sizes
        self.clock.serve(float(sizes.sum()) * self.flops.server.forward)
        self._download()
        self.clock.compute(sizes * self._tails)
        self._upload()
        self._tail_done = True
        return tail

    def backward(self, gradients: CutGradients) -> None:
        """The server's passes, cut gradients down, the backward passes."""
        self.inner.backward(gradients)
        self._passes(gradients, *self._down_since())

    def backward_together(self, gradients: CutGradients) -> Summed:
        """The same; then weight gradients go up, and all clients wait for their sum."""
        before = self.ledger.of_clients("down", "weight gradients")
        summed = self.inner.backward_together(gradients)
        sums = self.ledger.of_clients("down", "weight gradients") - before
        down, leaving = self._down_since()
        once = int(sums.max(initial=0))
        out = once if self.clock.fleet.multicast else int(sums.sum())
        self._passes(gradients, down - sums, leaving - out)
        self._upload()
        self.clock.download(8.0 * sums, 8.0 * out)
        return summed

    def _passes(self, gradients: CutGradients, down: Array, leaving: float) -> None:
        """The server's passes, `down` [C] bytes to the clients (`leaving` leave the server), the backward passes."""
        server = self.flops.server
        rows = np.zeros_like(self._rows)
        addressed = [*gradients.clients, *gradients.active]
        rows[addressed] = self._rows[addressed]
        per_row = server.backward if self._tail_done else self.server_flops
        self.clock.serve(float(rows.sum()) * per_row + float(rows @ self._between))
        self.clock.download(8.0 * down, 8.0 * leaving)
        # A client whose part trains nothing receives no gradients, and still waits until it is asked again.
        self.clock.go_on([client for client in addressed if rows[client] and not down[client]])
        self.clock.compute(rows * self._backward)
        self._rows[addressed] = 0

    def learn(self, steps: int) -> list[Step]:
        """Local training of client parts and their heads; no client waits, and the server trains on the sent rows.
        A batch that was sent before has had its forward pass.
        """
        self.clock.serve(float(self._rows.sum()) * self.server_flops)
        taken = self.inner.learn(steps)
        drawn = np.zeros(len(self._rows), np.int64)
        for step in taken:
            drawn[list(step.clients)] += 1
        waiting = (self._rows > 0) & (drawn > 0)
        client, head = self.flops.client, self.flops.head.training
        work = np.where(waiting, self._rows, 0.0) * (client.backward + head)
        work += self._next_rows(drawn - waiting) * (client.forward + client.backward + head)
        self._rows[:] = 0
        self.clock.compute(work)
        return taken

    def align(self, heads: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Heads down; the server's time to fit them is left out."""
        self.inner.align(heads)
        self._download()

    def _next_rows(self, batches: np.ndarray, *, draw: bool = True) -> Array:
        """Rows [C] of each client's next `batches` [C] batches, which are drawn unless told otherwise."""
        rows = np.zeros(len(batches))
        given = {} if self._round is None else dict(zip(self._round.clients, self._round.sizes, strict=False))
        for client, count in enumerate(batches.tolist()):
            before = int(self._fitted[client])
            if client in given:
                start = before - int(self._before[client])
                rows[client] = sum([size for size in given[client] if size][start : start + count])
            else:
                rows[client] = self._dealt(client, before + count) - self._dealt(client, before)
            self._fitted[client] += count if draw else 0
        return rows

    def fit(self) -> list[Step]:
        """Local training of whole models; no client waits."""
        steps = self.inner.fit()
        assert self._round is not None
        batches = np.zeros(len(self._rows), np.int64)
        batches[list(self._round.clients)] = self._round.batches
        rows = self._next_rows(batches)
        work = rows * self._whole
        if self.central:
            self.clock.serve(float(work.sum()))
        else:
            self.clock.compute(work)
        return steps

    def _dealt(self, client: int, batches: int) -> int:
        """Rows of a client's first `batches` batches: an epoch's last one has what remains."""
        n = self.samples[client]
        epochs, rest = divmod(batches, -(-n // self.batch))
        return epochs * n + rest * self.batch

    def average(self, weights: Mapping[int, float]) -> tuple[int, ...]:
        """Models up, the average down: all clients wait for the last."""
        averaged = self.inner.average(weights)
        self._upload()
        self._download()
        self._at_work -= set(weights)
        return averaged

    def hand_over(self, client: int, *, optimizer: bool) -> None:
        """The next client begins when the last has finished and the model has arrived."""
        before = self.holder
        self.inner.hand_over(client, optimizer=optimizer)
        if before is not None and before != client:
            self._upload()
            self._download()
            self.clock.not_before(client, float(self.clock.ready[before]))

    def state(self) -> dict[str, Any]:
        """The inner cohort's state, and the clock's."""
        own = {**super().state(), "clock": self.clock.state(), "fitted": self._fitted.tolist()}
        if not self.metered.asynchronous:
            return own
        return {**own, "at_work": sorted(self._at_work), "row_bytes": self._row_bytes}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take a state that `state()` returned. Raises MalformedError."""
        found = checked(state, _ClockedState, "the clients")
        sized(found.fitted, len(self._fitted), "fitted")
        super().load({"inner": found.inner})
        self.clock.load(found.clock)
        self._fitted = np.array(found.fitted, np.int64)
        below(found.at_work, len(self._fitted), "at_work")
        self._at_work = set(found.at_work)
        self._row_bytes = self._row_bytes if found.row_bytes is None else found.row_bytes
        self._sent = self._seen()

    def _seen(self) -> tuple[Array, Array, int]:
        ledger = self.ledger
        convention: Literal["wire-broadcast", "wire-unicast"] = (
            "wire-broadcast" if self.clock.fleet.multicast else "wire-unicast"
        )
        return ledger.trained("up"), ledger.trained("down"), ledger.total("down", convention)

    def _upload(self) -> float:
        """Bytes that have gone up since the last call."""
        up, down, total = self._sent
        self._sent = (self._seen()[0], down, total)
        self.clock.upload(8.0 * (self._sent[0] - up))
        return float((self._sent[0] - up).sum())

    def _download(self) -> None:
        """Bytes that have come down since the last call."""
        down, leaving = self._down_since()
        self.clock.download(8.0 * down, 8.0 * leaving)

    def _down_since(self) -> tuple[Array, float]:
        """Bytes [C] that have come down since the last call, and how many left the server."""
        up, down, total = self._sent
        _, now, now_total = self._seen()
        self._sent = (up, now, now_total)
        return now - down, now_total - total
