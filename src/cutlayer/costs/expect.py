"""What training costs, without training: closed forms for equal clients, each what ledger and clock would count.

Per algorithm: bytes under every convention, FLOPs, virtual time, energy, for a number of epochs. Every client holds the
same number of samples, takes part in every round, and computes and sends at its own speed. A million clients are a few
arrays; the number of steps does not matter.

Shape legend: C clients.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from cutlayer.costs.energy import Energy, Use, clients_energy, server_energy
from cutlayer.costs.fleet import Array, Fleet
from cutlayer.costs.flops import ModelFlops
from cutlayer.errors import ConfigError, unknown

ALGORITHMS = ("cl", "fl", "ssl", "psl", "slr", "sfl", "sflv1", "sflv2", "sflv3", "sgl", "sglr")
_AVERAGED = ("sfl", "sflv1", "sflv2")
_SPLIT_AVG = ("sgl", "sglr")


@dataclass(frozen=True)
class Workload:
    """What is trained. Sizes in bytes: `smashed` and `gradient` of one sample at the cut (up, down), `label` and `raw`
    of one sample, `model` and `client_model` with their buffers. FLOPs are those of one sample.
    """

    clients: int
    samples_per_client: int
    batch: int
    smashed: int
    gradient: int
    label: int
    raw: int
    model: int
    client_model: int
    flops: ModelFlops
    phi: float = 0.5
    epochs: int = 1

    @property
    def samples(self) -> int:
        """Of all clients, |D|."""
        return self.clients * self.samples_per_client

    @property
    def active(self) -> int:
        """Clients that share the common gradient: phi x C, rounded half up (as `algorithms.sglr.draw_active`)."""
        return math.floor(self.phi * self.clients + 0.5)


@dataclass(frozen=True)
class Expected:
    """Costs of `epochs` epochs, of all clients together. `once_*`: at the start, whatever the epochs (raw data of
    centralised learning). FLOPs: of one client, of the server. Time and energy are None without a fleet.
    """

    algorithm: str
    up: int
    down: int
    down_broadcast: int
    paper: int
    client_flops: float
    server_flops: float
    once_up: int = 0
    seconds: float | None = None
    clients: Energy | None = None
    server_joules: float | None = None

    @property
    def unicast(self) -> int:
        """Up and down, each message once per receiver."""
        return self.up + self.down + self.once_up

    @property
    def broadcast(self) -> int:
        """Up and down, what is the same for several once."""
        return self.up + self.down_broadcast + self.once_up


def expect(algorithm: str, work: Workload, fleet: Fleet | None = None) -> Expected:
    """The costs of training `work` with `algorithm`, on `fleet` if there is one. Raises ConfigError for an unknown
    algorithm (the U-shape is not among those known here).
    """
    if algorithm not in ALGORITHMS:
        raise ConfigError(unknown("algorithm", algorithm, ALGORITHMS))
    counted = _counted(algorithm, work)
    return counted if fleet is None else _timed(counted, work, fleet)


def _counted(algorithm: str, w: Workload) -> Expected:
    """Bytes and FLOPs."""
    c, rows, epochs = w.clients, w.samples, w.epochs
    if algorithm == "cl":
        work = epochs * rows * w.flops.whole.training
        raw = rows * (w.raw + w.label)
        return Expected("cl", 0, 0, 0, raw, 0.0, work, once_up=raw)
    if algorithm == "fl":
        model = epochs * c * w.model
        flops = epochs * w.samples_per_client * w.flops.whole.training
        return Expected("fl", model, model, epochs * w.model, 2 * model, flops, 0.0)
    up, down = rows * (w.smashed + w.label), rows * w.gradient
    broadcast, paper = down, rows * w.smashed + down
    if algorithm in _SPLIT_AVG and w.active:
        alone = (c - w.active) * w.samples_per_client * w.gradient
        broadcast = alone + w.samples_per_client * w.gradient
        paper = rows * w.smashed + alone + w.gradient
    if algorithm in _AVERAGED:
        up, down = up + c * w.client_model, down + c * w.client_model
        broadcast, paper = broadcast + w.client_model, paper + 2 * c * w.client_model
    moves = 0
    if algorithm == "ssl" and c > 1:  # the very first client has the model already
        moves = (epochs * c - 1) * w.client_model
    return Expected(
        algorithm,
        epochs * up + moves,
        epochs * down + moves,
        epochs * broadcast + moves,
        epochs * paper + 2 * moves,
        epochs * w.samples_per_client * w.flops.client.training,
        epochs * rows * w.flops.server.training,
    )


def _timed(e: Expected, w: Workload, fleet: Fleet) -> Expected:
    """With time and energy: what `costs.clock.Clock` would read at the end."""
    path = _Path(e, w, fleet)
    seconds = {"cl": path.central, "fl": path.federated, "ssl": path.relay}.get(e.algorithm, path.parallel)()
    busy = path.flops / fleet.speeds + path.up_seconds + path.down_seconds
    waiting = np.maximum(seconds - busy, 0.0)
    waiting[waiting < 1e-9 * max(seconds, 1.0)] = 0.0
    use = Use(path.flops, path.up_bits, path.up_seconds, path.down_bits, path.down_seconds, waiting)
    return replace(
        e, seconds=seconds, clients=clients_energy(fleet, use), server_joules=server_energy(fleet, e.server_flops)
    )


class _Path:
    """What each client does along the way: [C] each. Every method adds it up and returns the seconds of the whole."""

    def __init__(self, e: Expected, w: Workload, fleet: Fleet) -> None:
        self.e, self.w, self.fleet = e, w, fleet
        zeros = np.zeros(w.clients)
        self.flops = zeros + e.client_flops
        self.up_bits, self.up_seconds = zeros.copy(), zeros.copy()
        self.down_bits, self.down_seconds = zeros.copy(), zeros.copy()

    def central(self) -> float:
        """Everybody sends its data; then the server computes."""
        arrived = self._up(self.w.samples_per_client * (self.w.raw + self.w.label), 1)
        return float(arrived.max()) + self.fleet.latency + self.e.server_flops / self.fleet.server_speed

    def federated(self) -> float:
        """Rounds: the slowest in computing and sending, then the slowest in receiving; computing goes on from there."""
        w, f = self.w, self.fleet
        fit = self.flops / w.epochs / f.speeds
        up = self._up(w.model, w.epochs)
        down = self._down(w.model, w.model if f.multicast else w.model * w.clients, w.epochs)
        first = float((fit + up).max())
        between = float((down + fit + up).max())
        return first + (w.epochs - 1) * between + float(down.max()) + 2 * w.epochs * f.latency

    def relay(self) -> float:
        """Clients one after another, batches one after another, the model from each to the next."""
        w, f = self.w, self.fleet
        total = 0.0
        for size, count in self._batches().items():
            turns = count * w.epochs
            up = self._up(size * (w.smashed + w.label), turns, together=False)
            down = self._down(size * w.gradient, size * w.gradient, turns)
            own = size * w.flops.client.training / f.speeds
            serve = size * w.flops.server.training / f.server_speed
            total += turns * float((up + down + own + serve + 2 * f.latency).sum())
        if w.clients > 1:
            # Each client passes the model on once an epoch and takes it once, but for the first and last time.
            up = self._up(w.client_model, w.epochs, together=False)
            down = self._down(w.client_model, w.client_model, w.epochs)
            total += w.epochs * float((up + down + 2 * f.latency).sum())
            total -= float(up[-1] + down[0]) + 2 * f.latency
            bits = 8.0 * w.client_model
            self.up_bits[-1] -= bits
            self.up_seconds[-1] -= up[-1]
            self.down_bits[0] -= bits
            self.down_seconds[0] -= down[0]
        return total

    def parallel(self) -> float:
        """Steps: the slowest of all in going back, forth and sending; the server; and so on."""
        w, f = self.w, self.fleet
        go: dict[int, Array] = {}  # forward and up, by the size of the batch
        come: dict[int, Array] = {}  # down and backward
        serve: dict[int, float] = {}
        batches = self._batches()
        for size, count in batches.items():
            up = self._up(size * (w.smashed + w.label), count * w.epochs)
            down = self._down(size * w.gradient, self._leaving(size), count * w.epochs)
            go[size] = size * w.flops.client.forward / f.speeds + up
            come[size] = size * w.flops.client.backward / f.speeds + down
            serve[size] = size * w.clients * w.flops.server.training / f.server_speed
        order = list(batches)  # the full batches, then the rest
        averaged = self.e.algorithm in _AVERAGED
        rounds = 1 if averaged else w.epochs  # that hang together; an averaging stands between the others
        epochs = w.epochs // rounds
        total = float(go[order[0]].max())
        turns: Counter[tuple[int, int]] = Counter()
        for size, count in batches.items():
            turns[size, size] += rounds * (count - 1)
        for before, after in itertools.pairwise(order):
            turns[before, after] += rounds
        turns[order[-1], order[0]] += rounds - 1
        between = sum(n * float((come[a] + go[b]).max()) for (a, b), n in turns.items() if n)
        served = rounds * sum(count * serve[size] for size, count in batches.items())
        latencies = 2 * f.latency * rounds * sum(batches.values())
        last = come[order[-1]]
        if not averaged:
            return total + between + served + latencies + float(last.max())
        up = self._up(w.client_model, w.epochs)
        down = self._down(w.client_model, w.client_model if f.multicast else w.client_model * w.clients, w.epochs)
        inside = between + served + latencies + float((last + up).max()) + 2 * f.latency
        return total + epochs * inside + (epochs - 1) * float((down + go[order[0]]).max()) + float(down.max())

    def _batches(self) -> dict[int, int]:
        """Sizes of an epoch's batches, with how many there are of each, in order."""
        full, rest = divmod(self.w.samples_per_client, self.w.batch)
        found = {self.w.batch: full} if full else {}
        return {**found, **({rest: 1} if rest else {})}

    def _leaving(self, size: int) -> int:
        """Bytes of cut gradients that leave the server in a step."""
        w = self.w
        copies = w.clients
        if self.e.algorithm in _SPLIT_AVG and w.active and self.fleet.multicast:
            copies = w.clients - w.active + 1
        return copies * size * w.gradient

    def _up(self, count: int, times: int, *, together: bool = True) -> Array:
        """Seconds [C] that `count` bytes take each client up, all of them `together` or one alone; `times` times."""
        bits = 8.0 * count
        shared = bits * (self.w.clients if together else 1) / self.fleet.server_rate
        seconds = np.maximum(bits / self.fleet.up, shared)
        self.up_bits += times * bits
        self.up_seconds += times * seconds
        return seconds

    def _down(self, count: int, leaving: int, times: int) -> Array:
        """Seconds [C] that `count` bytes take each client down, while `leaving` leave the server; `times` over."""
        bits = 8.0 * count
        seconds = np.maximum(bits / self.fleet.down, 8.0 * leaving / self.fleet.server_rate)
        self.down_bits += times * bits
        self.down_seconds += times * seconds
        return seconds
