"""What training costs, without training: closed forms for equal clients, each what ledger and clock would count.

Per algorithm: bytes under every convention, FLOPs, virtual time, energy, for a number of epochs. Every client holds the
same number of samples, takes part in every round, and computes and sends at its own speed. A million clients are a few
arrays; the number of steps does not matter.

Shape legend: C clients.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from cutlayer.algorithms import Algorithm, traffic_of
from cutlayer.costs.energy import Energy, Use, clients_energy, server_energy
from cutlayer.costs.fleet import Array, Fleet
from cutlayer.costs.flops import ModelFlops
from cutlayer.errors import ConfigError
from cutlayer.traffic import Epoch, Traffic


@dataclass(frozen=True, kw_only=True)
class Workload(Epoch):
    """What is trained: an epoch's sizes, FLOPs of one sample, and how many epochs."""

    flops: ModelFlops
    epochs: int = 1


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


def expect(algorithm: Algorithm, work: Workload, fleet: Fleet | None = None) -> Expected:
    """The costs of training `work` with `algorithm`, on `fleet` if there is one. Raises ConfigError for an algorithm
    that does not state its traffic.
    """
    traffic = traffic_of(algorithm, work)
    if traffic is None:
        raise ConfigError(
            f"{algorithm.entry.name} is not planned: it does not say what it moves (a method `traffic`); leave it out"
        )
    counted = _counted(algorithm.entry.name, traffic, work)
    return counted if fleet is None else _timed(counted, traffic, work, fleet)


def _counted(name: str, t: Traffic, w: Workload) -> Expected:
    """Bytes and FLOPs."""
    c, rows, epochs = w.clients, w.samples, w.epochs
    if t.pattern == "gather":
        work = epochs * rows * w.flops.whole.training
        raw = rows * (w.raw + w.label)
        return Expected(name, 0, 0, 0, raw, 0.0, work, once_up=raw)
    if t.pattern == "rounds":
        model = epochs * c * t.averaged
        flops = epochs * w.samples_per_client * w.flops.whole.training
        return Expected(name, model, model, epochs * t.averaged, 2 * model, flops, 0.0)
    label, gradient = w.label * t.labels, w.gradient * t.gradients
    sent, features = w.smashed + w.returned * t.tails, rows * w.features * t.tails
    sending = c * w.uploaded(t.every)
    up, down = sending * (sent + label), rows * gradient
    broadcast, paper = down, sending * sent + down
    if t.sharing:
        alone = (c - t.sharing) * w.samples_per_client * gradient
        broadcast = alone + w.samples_per_client * gradient
        paper = rows * sent + alone + gradient
    down, broadcast, paper = down + features, broadcast + features, paper + features
    moved = t.averaged + t.summed * -(-w.samples_per_client // w.batch)  # from and to each client in an epoch
    up, down = up + c * moved, down + c * moved
    broadcast, paper = broadcast + moved, paper + 2 * c * moved
    moves = (epochs * c - 1) * t.moved if c > 1 else 0  # the very first client has the model already
    given = -(-epochs // t.given_every) * c * t.given
    return Expected(
        name,
        epochs * up + moves,
        epochs * down + moves + given,
        epochs * broadcast + moves + given,
        epochs * paper + 2 * moves + given,
        epochs * w.samples_per_client * _computing(t, w),
        epochs * sending * _serving(t, w),
    )


def _computing(t: Traffic, w: Workload) -> float:
    """FLOPs of a client for each sample."""
    f = w.flops
    return f.client.training + f.head.training + f.tail.training * t.tails


def _serving(t: Traffic, w: Workload) -> float:
    """FLOPs of the server for each sample."""
    server = w.flops.server
    return server.training * t.server_passes + (server.forward if t.answers_apart else 0.0)


def _timed(e: Expected, t: Traffic, w: Workload, fleet: Fleet) -> Expected:
    """With time and energy: what `costs.clock.Clock` would read at the end."""
    path = _Path(e, t, w, fleet)
    patterns = {
        "gather": path.central,
        "rounds": path.federated,
        "relay": path.relay,
        "steps": path.parallel,
        "local": path.local,
    }
    seconds = patterns[t.pattern]()
    busy = path.flops / fleet.speeds + path.up_seconds + path.down_seconds
    waiting = np.maximum(seconds - busy, 0.0)
    waiting[waiting < 1e-9 * max(seconds, 1.0)] = 0.0
    use = Use(path.flops, path.up_bits, path.up_seconds, path.down_bits, path.down_seconds, waiting)
    return replace(
        e, seconds=seconds, clients=clients_energy(fleet, use), server_joules=server_energy(fleet, e.server_flops)
    )


class _Path:
    """What each client does along the way: [C] each. Every method adds it up and returns the seconds of the whole."""

    def __init__(self, e: Expected, t: Traffic, w: Workload, fleet: Fleet) -> None:
        self.e, self.t, self.w, self.fleet = e, t, w, fleet
        self.label, self.gradient = w.label * t.labels, w.gradient * t.gradients
        self.serving = _serving(t, w)  # FLOPs per sample
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
        model = self.t.averaged
        up = self._up(model, w.epochs)
        down = self._down(model, model if f.multicast else model * w.clients, w.epochs)
        first = float((fit + up).max())
        between = float((down + fit + up).max())
        return first + (w.epochs - 1) * between + float(down.max()) + 2 * w.epochs * f.latency

    def relay(self) -> float:
        """Clients one after another, batches one after another, the model from each to the next."""
        w, f = self.w, self.fleet
        total = 0.0
        for size, count in self._batches().items():
            turns = count * w.epochs
            up = self._up(size * (w.smashed + self.label), turns, together=False)
            down = self._down(size * self.gradient, size * self.gradient, turns)
            own = size * w.flops.client.training / f.speeds
            serve = size * self.serving / f.server_speed
            back = self._through_tails(size, turns, 1)
            total += turns * float((up + down + own + back + serve + 2 * f.latency).sum())
        if w.clients > 1 and self.t.moved:
            # Each client passes the model on once an epoch and takes it once, but for the first and last time.
            up = self._up(self.t.moved, w.epochs, together=False)
            down = self._down(self.t.moved, self.t.moved, w.epochs)
            total += w.epochs * float((up + down + 2 * f.latency).sum())
            total -= float(up[-1] + down[0]) + 2 * f.latency
            bits = 8.0 * self.t.moved
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
            up = self._up(size * (w.smashed + self.label), count * w.epochs)
            down = self._down(size * self.gradient, self._leaving(size), count * w.epochs)
            go[size] = size * w.flops.client.forward / f.speeds + up
            come[size] = size * w.flops.client.backward / f.speeds + down
            serve[size] = size * w.clients * self.serving / f.server_speed
            serve[size] += float(self._through_tails(size, count * w.epochs, w.clients).max())
        order = list(batches)  # the full batches, then the rest
        averaged = self.t.averaged
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
        if self.t.summed:
            return self._in_step(batches, go, come, serve)
        if not averaged:
            return total + between + served + latencies + float(last.max())
        up = self._up(averaged, w.epochs)
        down = self._down(averaged, averaged if f.multicast else averaged * w.clients, w.epochs)
        inside = between + served + latencies + float((last + up).max()) + 2 * f.latency
        return total + epochs * inside + (epochs - 1) * float((down + go[order[0]]).max()) + float(down.max())

    def local(self) -> float:
        """Rounds: clients compute and send without waiting; the server trains on what has come, one upload after
        another; the slowest of all in computing and sending; the models.
        """
        w, f, t = self.w, self.fleet, self.t
        uploads, busy = self._uploads()
        up, down = self._up(t.averaged, w.epochs), self._down(t.averaged, self._copies() * t.averaged, w.epochs)
        given = self._down(t.given, t.given * w.clients, -(-w.epochs // t.given_every))
        now, begins = 0.0, np.zeros(w.clients)
        for epoch in range(w.epochs):
            server = now
            for sent, serve in uploads:
                server = max(server, float((begins + sent).max()) + f.latency) + serve
            now = max(server, float((begins + busy + up).max()) + f.latency)
            begins = now + f.latency + down
            if epoch % t.given_every == 0:
                begins = begins + given
        return max(now, float(begins.max()))

    def _uploads(self) -> tuple[list[tuple[Array, float]], Array]:
        """A round's uploads: when each client has sent it, counted from its beginning [C], and how long the server
        trains on it; and how long clients compute and send [C].
        """
        w, f, every = self.w, self.fleet, self.t.every
        sizes = [size for size, count in self._batches().items() for _ in range(count)]
        busy, found = np.zeros(w.clients), []
        seconds = {size: self._up(size * (w.smashed + self.label), 0) for size in set(sizes)}
        for number, size in enumerate(sizes):
            work = size * (w.flops.client.training + w.flops.head.training) / f.speeds
            if number % every == 0:
                forward = size * w.flops.client.forward / f.speeds
                self._up(size * (w.smashed + self.label), w.epochs)
                found.append((busy + forward + seconds[size], size * w.clients * self.serving / f.server_speed))
                busy = busy + seconds[size]
            busy = busy + work
        return found, busy

    def _copies(self) -> int:
        """How often what is the same for all clients leaves the server."""
        return 1 if self.fleet.multicast else self.w.clients

    def _through_tails(self, size: int, times: int, together: int) -> Array:
        """Seconds [C] from the server's features on until their gradients are with the server again, for a batch of
        `size` rows of each of the clients that do it `together`; `times` times.
        """
        w, f = self.w, self.fleet
        if not self.t.tails:
            return np.zeros(w.clients)
        up = self._up(size * w.returned, times, together=together > 1)
        down = self._down(size * w.features, size * w.features * together, times)
        return up + down + size * w.flops.tail.training / f.speeds + 2 * f.latency

    def _in_step(
        self, batches: dict[int, int], go: dict[int, Array], come: dict[int, Array], serve: dict[int, float]
    ) -> float:
        """The same where all wait for the sum of their gradients in every step; `batches` by size, in order."""
        w, f, summed = self.w, self.fleet, self.t.summed
        order, steps = list(batches), w.epochs * sum(batches.values())
        up = self._up(summed, steps)
        down = self._down(summed, summed if f.multicast else summed * w.clients, steps)
        before = [size for size in order for _ in range(batches[size])]
        starts = Counter(itertools.pairwise([*before, order[0]]))  # an epoch's steps, each with the next one
        total = float(go[order[0]].max()) + float(down.max()) - float((down + go[order[0]]).max())
        for (now, then), count in starts.items():
            step = serve[now] + float((come[now] + up).max()) + float((down + go[then]).max()) + 4 * f.latency
            total += w.epochs * count * step
        return total

    def _batches(self) -> dict[int, int]:
        """Sizes of an epoch's batches, with how many there are of each, in order."""
        full, rest = divmod(self.w.samples_per_client, self.w.batch)
        found = {self.w.batch: full} if full else {}
        return {**found, **({rest: 1} if rest else {})}

    def _leaving(self, size: int) -> int:
        """Bytes of cut gradients that leave the server in a step."""
        copies, sharing = self.w.clients, self.t.sharing
        if sharing and self.fleet.multicast:
            copies = self.w.clients - sharing + 1
        return copies * size * self.gradient

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
