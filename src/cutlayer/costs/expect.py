"""The costs of training, without training: closed forms for equal clients, which equal the counts of ledger and clock.

Per algorithm: bytes under every convention, FLOPs, virtual time, energy, for a number of epochs. Every client holds the
same number of samples, takes part in every round, and computes and sends at its own speed; its cut may be its own. A
million clients are a few arrays; the number of steps does not matter.

Shape legend: C clients.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cutlayer.algorithms import Algorithm, traffic_of
from cutlayer.costs.energy import Energy, Use, clients_energy, server_energy
from cutlayer.costs.fleet import Array, Fleet
from cutlayer.costs.flops import ModelFlops
from cutlayer.errors import ConfigError
from cutlayer.traffic import Epoch, Traffic


@dataclass(frozen=True, kw_only=True)
class Workload(Epoch):
    """The training: an epoch's sizes, FLOPs of one sample, and the number of epochs."""

    flops: ModelFlops
    epochs: int = 1

    def varied(self, **sizes: Any) -> Workload:
        """The same with other `samples_per_client` or `epochs`."""
        return replace(self, **sizes)


@dataclass(frozen=True, eq=False)
class Mixture:
    """The training if clients have different cuts: `kinds` are the workloads at each cut, whose `clients` are the
    number of clients that have it; `numbers` [C] are the kinds of the clients (only needed with a fleet). The server's
    model begins at the last kind's cut, which is the deepest; the server also computes the layers between a client's
    cut and that one.

    `ranked`: all have one cut, and the kinds differ in the rank of the clients' adapters, the last has the largest.
    Then a workload's `model` has that rank throughout.
    """

    kinds: tuple[Workload, ...]
    numbers: npt.NDArray[np.intp]
    ranked: bool = False

    @property
    def clients(self) -> int:
        """C."""
        return sum(kind.clients for kind in self.kinds)

    def varied(self, **sizes: Any) -> Mixture:
        """The same with other `samples_per_client` or `epochs`."""
        return replace(self, kinds=tuple(kind.varied(**sizes) for kind in self.kinds))


@dataclass(frozen=True)
class Expected:
    """Costs of `epochs` epochs, of all clients together. `once_*`: at the start, independent of the epochs (raw data of
    centralised learning). FLOPs: of one client (the mean, if cuts differ), of the server. Time and energy are None
    without a fleet.
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
        """Up and down, messages that are the same for several clients once."""
        return self.up + self.down_broadcast + self.once_up


def expect(algorithm: Algorithm, work: Workload | Mixture, fleet: Fleet | None = None) -> Expected:
    """The costs of training `work` with `algorithm`, on `fleet` if there is one. Raises ConfigError for an algorithm
    that does not state its traffic, or whose clients cannot have different cuts if they have.

    If an algorithm draws the clients that share a gradient, and the cuts differ, bytes and time are those of the mean.
    """
    one = algorithm.traits.central or (algorithm.traits.whole and not (isinstance(work, Mixture) and work.ranked))
    if isinstance(work, Mixture) and one:  # the cut plays no role
        work = replace(work.kinds[-1], clients=work.clients)
    mix = Mixture((work,), np.zeros(0, np.intp)) if isinstance(work, Workload) else work
    moved = _Moved(algorithm, mix)
    counted = moved.counted()
    return counted if fleet is None else _timed(counted, moved, fleet)


def plans_mixed(algorithm: Algorithm, epoch: Epoch) -> bool:
    """Whether `expect` takes a mixture of cuts for an algorithm: its clients can have different ones, and wait for the
    slowest in each step.
    """
    traffic = traffic_of(algorithm, epoch)
    return algorithm.traits.mixes_cuts and traffic is not None and traffic.pattern == "steps"


def takes_mean(algorithm: Algorithm, work: Workload | Mixture) -> bool:
    """Whether costs depend on which clients an algorithm draws to share a gradient, so that `expect` gives a mean."""
    if not isinstance(work, Mixture) or work.ranked or algorithm.traits.whole:
        return False
    return 0 < _Moved(algorithm, work).traffic.sharing < work.clients


@dataclass(frozen=True)
class _Sharing:
    """For the clients with the deepest cut: how many receive one common gradient in a step (in the mean), and the
    probabilities that any does in a step and in an epoch. Whole numbers if nothing depends on which clients are drawn.
    """

    clients: float
    some: float
    ever: float

    @property
    def saved(self) -> float:
        """Gradients that need not be sent in a step if the common one is sent once."""
        return self.clients - self.some


def _sharing(drawn: int, deepest: int, clients: int, steps: int) -> _Sharing:
    """The same if `drawn` of all `clients` are drawn in each step to share, but only the `deepest` of them can."""
    if drawn in (0, clients) or deepest == clients:
        there = int(drawn > 0)
        return _Sharing(min(drawn, deepest), there, there)
    none = _none_of(deepest, drawn, clients)
    return _Sharing(drawn * deepest / clients, 1 - none, 1 - none**steps)


def _none_of(deepest: int, drawn: int, clients: int) -> float:
    """The probability that none of the `deepest` is drawn, if `drawn` of `clients` are."""
    others = clients - deepest
    if drawn > others:
        return 0.0
    orders = [math.lgamma(n + 1) - math.lgamma(n - drawn + 1) for n in (others, clients)]
    return math.exp(orders[0] - orders[1])


def _whole(count: float) -> int:
    """A mean is rounded; exact counts stay as they are."""
    return round(count) if isinstance(count, float) else count


class _Moved:
    """The traffic of an algorithm for each kind of clients: `traffics` and `costs`, in the order of `mix.kinds`. Raises
    ConfigError as `expect` does.
    """

    def __init__(self, algorithm: Algorithm, mix: Mixture) -> None:
        self.name, self.mix = algorithm.entry.name, mix
        stated = [traffic_of(algorithm, replace(kind, clients=mix.clients)) for kind in mix.kinds]
        self.traffics = [t for t in stated if t is not None]
        if len(self.traffics) < len(stated):
            raise ConfigError(
                f"{self.name} is not planned: it does not say what it moves (a method `traffic`); leave it out"
            )
        self.work, self.traffic = mix.kinds[-1], self.traffics[-1]
        if mix.ranked and algorithm.traits.one_rank:
            raise ConfigError(
                f"{self.name} is not planned with different ranks of adapters: {algorithm.traits.one_rank}; leave it "
                "out, or give one lora_rank"
            )
        if len(mix.kinds) > 1 and not mix.ranked and not plans_mixed(algorithm, self.work):
            raise ConfigError(
                f"{self.name} is not planned with different cuts: {algorithm.traits.one_cut or 'clients take turns'}; "
                "leave it out, or name one cut for all"
            )
        steps = -(-self.work.samples_per_client // self.work.batch)
        deepest = mix.clients if mix.ranked else self.work.clients
        self.sharing = _sharing(self.traffic.sharing, deepest, mix.clients, steps)
        self.costs = [self._kind(t, w) for t, w in zip(self.traffics, mix.kinds, strict=True)]

    def counted(self) -> Expected:
        """Bytes and FLOPs of all kinds together."""
        kinds, found = self.mix.kinds, self.costs
        if len(found) == 1:
            return found[0]
        counts = {n: sum(getattr(e, n) for e in found) for n in ("up", "down", "down_broadcast", "paper")}
        at_clients = sum(w.clients * e.client_flops for w, e in zip(kinds, found, strict=True))
        served = sum(e.server_flops for e in found)
        return Expected(self.name, **counts, client_flops=at_clients / self.mix.clients, server_flops=served)

    def _kind(self, t: Traffic, w: Workload) -> Expected:
        """Bytes and FLOPs of the clients of one kind; only clients with the deepest cut can share a gradient."""
        name, c, rows, epochs = self.name, w.clients, w.samples, w.epochs
        if t.pattern == "gather":
            work = epochs * rows * w.flops.whole.training
            raw = rows * (w.raw + w.label)
            return Expected(name, 0, 0, 0, raw, 0.0, work, once_up=raw)
        if t.pattern == "rounds":
            model = epochs * c * t.averaged
            flops = epochs * w.samples_per_client * w.flops.whole.training
            return Expected(name, model, model, epochs * t.averaged, 2 * model, flops, 0.0)
        f, label, gradient = w.flops, w.label * t.labels, w.gradient * t.gradients
        sent, features = w.smashed + w.returned * t.tails, rows * w.features * t.tails
        sending, besides = c * w.uploaded(t.every), w.gradient_besides * t.gradients
        going = sending * sent + c * -(-w.batches // t.every) * (w.smashed_besides + w.returned_besides * t.tails)
        common = w.samples_per_client * gradient + w.batches * besides  # that comes down to one client
        up, down = going + sending * label, c * common
        broadcast: float = down
        paper: float = going + down
        if w is self.work:
            first = min(w.batch, w.samples_per_client)  # rows
            broadcast, paper = down - self.sharing.saved * common, paper - self.sharing.clients * common
            paper = paper + self.sharing.ever * (gradient + besides // max(first, 1))
        features += c * w.batches * w.features_besides * t.tails
        down, broadcast, paper = down + features, broadcast + features, paper + features
        moved = t.averaged + t.summed * w.batches  # from and to each client in an epoch
        up, down = up + c * moved, down + c * moved
        broadcast, paper = broadcast + moved, paper + 2 * c * moved
        moves = (epochs * c - 1) * t.moved if c > 1 else 0  # the very first client has the model already
        given = -(-epochs // t.given_every) * c * t.given
        return Expected(
            name,
            epochs * up + moves,
            epochs * down + moves + given,
            _whole(epochs * broadcast + moves + given),
            _whole(epochs * paper + 2 * moves + given),
            epochs * w.samples_per_client * (f.client.training + f.head.training + f.tail.training * t.tails),
            epochs * sending * self.serving(w, t),
        )

    def serving(self, w: Workload, t: Traffic) -> float:
        """FLOPs of the server for each sample of a client of one kind."""
        server = self.work.flops.server
        own = server.training * t.server_passes + (server.forward if t.answers_apart else 0.0)
        return own + (w.flops.server.training - server.training)


def _timed(e: Expected, moved: _Moved, fleet: Fleet) -> Expected:
    """With time and energy: the final values of `costs.clock.Clock`."""
    path = _Path(e, moved, fleet)
    patterns = {
        "gather": path.central,
        "rounds": path.federated,
        "relay": path.relay,
        "steps": path.parallel,
        "local": path.local,
    }
    seconds = patterns[moved.traffic.pattern]()
    busy = path.flops / fleet.speeds + path.up_seconds + path.down_seconds
    waiting = np.maximum(seconds - busy, 0.0)
    waiting[waiting < 1e-9 * max(seconds, 1.0)] = 0.0
    use = Use(path.flops, path.up_bits, path.up_seconds, path.down_bits, path.down_seconds, waiting)
    return replace(
        e, seconds=seconds, clients=clients_energy(fleet, use), server_joules=server_energy(fleet, e.server_flops)
    )


class _Path:
    """The work of each client: [C] each. Every method adds it up and returns the seconds of the whole. Values that
    depend on a client's cut are one number if all have the same, or [C].
    """

    def __init__(self, e: Expected, moved: _Moved, fleet: Fleet) -> None:
        self.e, self.moved, self.fleet = e, moved, fleet
        self.t, self.w, self.clients = moved.traffic, moved.work, moved.mix.clients
        pairs = list(zip(moved.mix.kinds, moved.traffics, strict=True))
        self.sent = self._each([w.smashed + w.label * t.labels for w, t in pairs])  # bytes of a sample
        self.gradient = self._each([w.gradient * t.gradients for w, t in pairs])
        self.sent_besides = self._each([w.smashed_besides for w, t in pairs])  # bytes of a batch
        self.gradient_besides = self._each([w.gradient_besides * t.gradients for w, t in pairs])
        self.forward = self._each([w.flops.client.forward for w, _ in pairs])  # FLOPs of a sample
        self.backward = self._each([w.flops.client.backward for w, _ in pairs])
        self.tail = self._each([w.flops.tail.training for w, _ in pairs])
        self.averaged = self._each([t.averaged for _, t in pairs])
        served = [moved.serving(w, t) for w, t in pairs]
        self.serving = served[0] if len(pairs) == 1 else float(self._each(served).mean())  # the mean of all clients
        zeros = np.zeros(self.clients)
        self.flops = zeros + self._each([cost.client_flops for cost in moved.costs])
        self.up_bits, self.up_seconds = zeros.copy(), zeros.copy()
        self.down_bits, self.down_seconds = zeros.copy(), zeros.copy()

    def _each(self, of_kinds: Sequence[float]) -> Any:
        """A number of each kind of clients: the only one, or every client's, [C]."""
        return of_kinds[0] if len(of_kinds) == 1 else np.array(of_kinds, np.float64)[self.moved.mix.numbers]

    def central(self) -> float:
        """All clients send their data; then the server computes."""
        arrived = self._up(self.w.samples_per_client * (self.w.raw + self.w.label), 1)
        return float(arrived.max()) + self.fleet.latency + self.e.server_flops / self.fleet.server_speed

    def federated(self) -> float:
        """Rounds: the slowest in computing and sending, then the slowest in receiving; computing continues from
        there.
        """
        w, f = self.w, self.fleet
        fit = self.flops / w.epochs / f.speeds
        up = self._up(self.averaged, w.epochs)
        down = self._down(self.averaged, self._models_leaving(), w.epochs)
        first = float((fit + up).max())
        between = float((down + fit + up).max())
        return first + (w.epochs - 1) * between + float(down.max()) + 2 * w.epochs * f.latency

    def relay(self) -> float:
        """Clients one after another, batches one after another, the model from each to the next."""
        w, f = self.w, self.fleet
        total = 0.0
        for size, count in self._batches().items():
            turns = count * w.epochs
            up = self._up(self._sent(size), turns, together=False)
            down = self._down(self._back(size), self._back(size), turns)
            own = size * w.flops.client.training / f.speeds
            serve = size * self.serving / f.server_speed
            back = self._through_tails(size, turns, 1)
            total += turns * float((up + down + own + back + serve + 2 * f.latency).sum())
        if self.clients > 1 and self.t.moved:
            # Each client passes the model on once an epoch and takes it once, except for the first and last time.
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
            up = self._up(self._sent(size), count * w.epochs)
            down = self._down(self._back(size), self._leaving(size), count * w.epochs)
            go[size] = size * self.forward / f.speeds + up
            come[size] = size * self.backward / f.speeds + down
            serve[size] = size * self.clients * self.serving / f.server_speed
            serve[size] += float(self._through_tails(size, count * w.epochs, self.clients).max())
        order = list(batches)  # the full batches, then the rest
        averaging = np.any(self.averaged)
        rounds = 1 if averaging else w.epochs  # that are connected; between the others there is an averaging
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
        if not averaging:
            return total + between + served + latencies + float(last.max())
        up = self._up(self.averaged, w.epochs)
        down = self._down(self.averaged, self._models_leaving(), w.epochs)
        at_once = np.broadcast_to(self.averaged, last.shape) == 0  # train nothing, and continue without an average
        gathered = float((last + up)[~at_once].max())
        inside = between + served + latencies + gathered + 2 * f.latency
        begun = float((down + go[order[0]])[~at_once].max())
        total = total + epochs * inside + (epochs - 1) * begun + float(down.max())
        if not at_once.any():
            return total
        later = float((last + go[order[0]])[at_once].max()) - (gathered + 2 * f.latency + begun)
        return total + (epochs - 1) * max(later, 0.0)

    def _models_leaving(self) -> int:
        """Bytes of averaged models that leave the server: one for each kind of clients, or for each client."""
        pairs = zip(self.moved.mix.kinds, self.moved.traffics, strict=True)
        return sum(t.averaged * (1 if self.fleet.multicast else w.clients) for w, t in pairs)

    def local(self) -> float:
        """Rounds: clients compute and send without waiting; the server trains on the uploads, one after another; the
        slowest of all in computing and sending; the models.
        """
        w, f, t = self.w, self.fleet, self.t
        uploads, busy = self._uploads()
        up, down = self._up(t.averaged, w.epochs), self._down(t.averaged, self._copies() * t.averaged, w.epochs)
        given = self._down(t.given, t.given * self.clients, -(-w.epochs // t.given_every))
        now, begins = 0.0, np.zeros(self.clients)
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
        """A round's uploads: the time of each client's upload since the start of the round [C], and how long the server
        trains on it; and how long clients compute and send [C].
        """
        w, f, every = self.w, self.fleet, self.t.every
        sizes = [size for size, count in self._batches().items() for _ in range(count)]
        busy, found = np.zeros(self.clients), []
        seconds = {size: self._up(self._sent(size), 0) for size in set(sizes)}
        for number, size in enumerate(sizes):
            work = size * (w.flops.client.training + w.flops.head.training) / f.speeds
            if number % every == 0:
                forward = size * w.flops.client.forward / f.speeds
                self._up(self._sent(size), w.epochs)
                found.append((busy + forward + seconds[size], size * self.clients * self.serving / f.server_speed))
                busy = busy + seconds[size]
            busy = busy + work
        return found, busy

    def _copies(self) -> int:
        """How often a message that is the same for all clients leaves the server."""
        return 1 if self.fleet.multicast else self.clients

    def _through_tails(self, size: int, times: int, together: int) -> Array:
        """Seconds [C] from the server's features on until their gradients are with the server again, for a batch of
        `size` rows of each of the clients that do it `together`; `times` times.
        """
        w, f = self.w, self.fleet
        if not self.t.tails:
            return np.zeros(self.clients)
        features = size * w.features + w.features_besides
        up = self._up(size * w.returned + w.returned_besides, times, together=together > 1)
        down = self._down(features, features * together, times)
        seconds: Array = up + down + size * self.tail / f.speeds + 2 * f.latency
        return seconds

    def _in_step(
        self, batches: dict[int, int], go: dict[int, Array], come: dict[int, Array], serve: dict[int, float]
    ) -> float:
        """The same if all wait for the sum of their gradients in every step; `batches` by size, in order."""
        w, f, summed = self.w, self.fleet, self.t.summed
        order, steps = list(batches), w.epochs * sum(batches.values())
        up = self._up(summed, steps)
        down = self._down(summed, summed if f.multicast else summed * self.clients, steps)
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

    def _leaving(self, size: int) -> float:
        """Bytes of cut gradients that leave the server in a step (in the mean)."""
        pairs = zip(self.moved.mix.kinds, self.moved.traffics, strict=True)
        own = [(w.clients, (size * w.gradient + w.gradient_besides) * t.gradients) for w, t in pairs]
        saved = self.moved.sharing.saved * own[-1][1] if self.fleet.multicast else 0
        return sum(clients * each for clients, each in own) - saved

    def _sent(self, size: int) -> Any:
        """Bytes of a batch that go up."""
        return size * self.sent + self.sent_besides

    def _back(self, size: int) -> Any:
        """Bytes of a batch's cut gradients."""
        return size * self.gradient + self.gradient_besides

    def _up(self, count: Any, times: int, *, together: bool = True) -> Array:
        """Seconds [C] that `count` bytes (one number, or [C]) take each client up, all of them `together` or one alone;
        `times` times.
        """
        bits = 8.0 * count
        at_server = (bits.sum() if isinstance(bits, np.ndarray) else bits * self.clients) if together else bits
        return self._passing("up", bits, at_server, times)

    def _down(self, count: Any, leaving: float, times: int) -> Array:
        """Seconds [C] that `count` bytes (one number, or [C]) take each client down, while `leaving` leave the server;
        `times` over.
        """
        return self._passing("down", 8.0 * count, 8.0 * leaving, times)

    def _passing(self, direction: Literal["up", "down"], bits: Any, at_server: Any, times: int) -> Array:
        """Seconds [C] of each client's `bits`, while `at_server` bits pass at the server."""
        taken = np.maximum(bits / getattr(self.fleet, direction), at_server / self.fleet.server_rate)
        seconds: Array = np.where(bits > 0, taken, 0.0)
        noted, busy = (getattr(self, f"{direction}_{what}") for what in ("bits", "seconds"))
        noted += times * bits
        busy += times * seconds
        return seconds
