"""Clients that several processes simulate together (`collective`): each rank its own, with a replica of the server.

All ranks run the same algorithm. A step's rows stay where they are if the algorithm and the server's part allow it:

    n = sum of what the rows count; loss_r = sum of the rank's row losses / n; gradients of the server are summed

Otherwise every rank gets the rows of all ranks, and computes the server's step itself. Client models are averaged as
sum n_k w_k, summed over the ranks. States are those of a single process: rank 0 has the whole.

Ranks tell each other as little as possible, since each message waits for the slowest. How many rows a client brings to
a step, and what its rows take as bytes, each rank works out for the clients of all.

Shape legend: R ranks, C clients of a step, c_r those of rank r.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from cutlayer.algorithms import Algorithm
from cutlayer.averaging import combined
from cutlayer.cohort import CohortAround, Crossed, Direction, Footprint, Held, Predict, Summed
from cutlayer.collective import World
from cutlayer.data.samples import Samples
from cutlayer.engine.choice import Chosen
from cutlayer.engine.layout import smashed as smashed_by
from cutlayer.engine.shares import OwnClients, spans
from cutlayer.engine.simulated import Clients
from cutlayer.engine.union import row_by_row
from cutlayer.errors import ConfigError
from cutlayer.frozen import frozen_names
from cutlayer.models import Parts
from cutlayer.options import RunConfig
from cutlayer.scoring import judged
from cutlayer.stored import sized
from cutlayer.types import CutGradients, Evaluation, Round, Rows, Smashed, Spread, Step, TailGradients, is_continuous
from cutlayer.verbs import LEARN
from cutlayer.wire.codecs import payload_bytes
from cutlayer.wire.coded import CodedCohort

State = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Sharing:
    """The assignment of clients: of the clients `whole`, rank r has those of `spans[r]`, and this rank has `own`.
    `apart`: the rows of a step stay on their ranks; `why` says why not. `engine` is the engine of each rank.
    """

    world: World
    whole: Clients
    spans: Sequence[range]
    own: OwnClients
    apart: bool
    why: str = ""
    engine: str = ""

    @classmethod
    def of(
        cls, world: World, config: RunConfig, algorithm: Algorithm, chosen: Chosen, whole: Clients, example: Rows
    ) -> Sharing:
        """How the ranks share the clients of an algorithm that they can share (`refuse`)."""
        world.deterministic = config.deterministic
        found = spans([len(rows) for rows in whole.rows], world.size)
        own = OwnClients.of(whole, found[world.rank], world.total)
        why = gathering(config, algorithm, chosen.split, example)
        return cls(world, whole, found, own, not why, why, chosen.ways.engine)

    def by_rank(self, clients: Sequence[int]) -> list[tuple[int, ...]]:
        """Those of `clients` that each rank has, in their order."""
        who = np.asarray(clients, np.int64)
        ranks = np.searchsorted([span.stop for span in self.spans], who, side="right")
        return [tuple(who[ranks == rank].tolist()) for rank in range(len(self.spans))]

    def everyones(
        self, models: Sequence[State], like: State, weights: Mapping[int, float]
    ) -> tuple[dict[str, Tensor], list[float]]:
        """(the models of the K clients in `weights`, whose tensors are [K, ...] each, their weights), from the `models`
        of this rank's among them, in order; of each only what `like` has.
        """
        parts = self.by_rank(list(weights))
        counts = [len(part) for part in parts]
        found = {}
        for name, t in like.items():
            own = torch.stack([model[name] for model in models]) if models else t.new_empty(0, *t.shape)
            found[name] = self.world.rows(own, counts)
        return found, [weights[k] for part in parts for k in part]

    @property
    def remark(self) -> str:
        """What was chosen, in a line."""
        each = sorted({len(span) for span in self.spans})
        clients = " to ".join(str(n) for n in dict.fromkeys((each[0], each[-1])))
        how = f"every rank computes all of it, because {self.why}" if self.why else "data-parallel"
        server = "" if self.whole.shape == "whole" else f"; the server: {how}"
        return f"{self.world.size} ranks simulate {clients} clients each ({self.engine} engine){server}"


def refuse(config: RunConfig, algorithm: Algorithm, clients: int, ranks: int) -> None:
    """Raises ConfigError for options that several ranks cannot share. It can be called before anything is read or
    built.
    """
    name, traits = config.algorithm, algorithm.traits
    if config.client_states == "disk":
        raise ConfigError(
            f"client_states = 'disk' has no effect on {ranks} ranks, which divide the clients among their memories: "
            "leave it out, or run one process"
        )
    alone = "start a single process"
    reasons = {
        f"{name} gathers all data in one place, and has nothing to share": traits.central,
        f"the clients of {name} take turns, so that there is nothing to share": traits.takes_turns,
        f"clients of {name} train on auxiliary heads, which ranks cannot share": LEARN in traits.needs,
        f"clients of {name} work at their own pace, and ranks in step": traits.asynchronous,
        f"{name} is not registered with `spreads`": not algorithm.entry.facts.get("spreads"),
        f"they are more than the {clients} clients": ranks > clients,
        "attack is not there with several ranks": bool(config.attack),
        "cache_features is not there with several ranks": config.cache_features,
        f"judge = {config.judge!r} needs the models of all clients in one place": config.judge != "mean",
        f"accumulate = {config.accumulate} is not there for {name} with several ranks": traits.gradients_cross
        and config.accumulate > 1,
    }
    for reason, holds in reasons.items():
        if holds:
            remedy = f"start {clients} ranks at most" if ranks > clients > 1 else alone
            raise ConfigError(f"{ranks} ranks cannot train this: {reason}; {remedy}")


def gathering(config: RunConfig, algorithm: Algorithm, split: Parts, example: Rows) -> str:
    """Why every rank needs the rows of all clients; empty if each can continue with its own."""
    traits = algorithm.traits
    if traits.whole:
        return ""
    if algorithm.entry.facts.get("spreads") == "gathered":
        return f"a step of {config.algorithm} needs them in one place"
    if config.screening != "none":
        return "they are screened together"
    if traits.server_copies or row_by_row(split.server, smashed_by(split.client, example)):
        return ""
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in split.server.modules()):
        return "its batch normalisation needs the statistics of all (group normalisation does not)"
    return "it draws, or what it gives for a row depends on others"


class Engine(Protocol):
    """A rank's engine, as far as its models are read and replaced from outside."""

    @property
    def masses(self) -> Sequence[float]:
        """The total weight of each client's training rows."""

    def settle(self) -> None:
        """Clients whose batches still wait for a step take this step."""

    def no_longer_alike(self) -> None:
        """Note that the models may differ from now on."""

    def model_state(self, client: int) -> State:
        """Parameters and buffers of a client, by its number here."""

    @property
    def origin(self) -> State | None:
        """The last average, as `model_state` has it, if the averaging rule looks at it."""

    def take_everyones(self, state: State) -> None:
        """All clients get these parameters and buffers, and keep the ranks of their adapters."""


class SpreadCohort(CohortAround):
    """All clients, with each rank simulating some: `inner` are this rank's, around its `engine`; their traffic is noted
    in `noted`, and that of all clients in `crossed`. Tensors in `frozen` are not sent; `example` are rows of smashed
    data and targets.
    """

    def __init__(
        self,
        inner: CodedCohort,
        engine: Engine,
        sharing: Sharing,
        noted: list[Crossed],
        split: Parts,
        example: tuple[Rows, Tensor],
    ) -> None:
        super().__init__(inner)
        self._engine, self._sharing, self._noted = engine, sharing, noted
        self._coding, self._sends_back = inner.coding, inner.lower_trains
        self._world, self._whole, self._spans = sharing.world, sharing.whole, sharing.spans
        self._mine = sharing.spans[self._world.rank]
        self.crossed: list[Crossed] = []
        self._frozen = {name for part in split.all for name in frozen_names(part)}
        self._no_rows = tuple(r[:0].detach() for r in smashed_by(split.client, example[0]))
        self._no_labels = example[1][:0]
        self._weighted = sharing.whole.task.weights(example[1]) is not None
        parts = [part for part in (split.client, split.tail) if part is not None]
        self._buffers = any(True for part in parts for _ in part.buffers())
        self._trains = any(p.requires_grad for part in parts for p in part.parameters())
        self._alike = self._whole.alike
        sizes = self._world.gathered([inner.footprint(k) for k in self._mine]) if self._whole.ranks else []
        self._footprints = [size for part in sizes for size in part]
        self._samples = [len(rows) for rows in self._whole.rows]
        self._masses = [mass for part in self._world.gathered(list(engine.masses)) for mass in part]
        self._counts = np.array(self._samples, np.int64)
        self._quota = np.zeros(len(self._samples), np.int64)
        self._drawn = np.zeros(len(self._samples), np.int64)  # batches of all clients so far
        self._asked: list[tuple[int, ...]] = []  # of the last forward pass, by rank
        self._everybody: tuple[int, ...] = ()  # the same, rank by rank
        self._sizes: tuple[int, ...] = ()

    @property
    def samples(self) -> Sequence[int]:
        """n_k of each client, of all ranks."""
        return self._samples

    @property
    def masses(self) -> Sequence[float]:
        """The total weight of each client's training rows."""
        return self._masses

    def footprint(self, client: int) -> Footprint:
        """Clients' models have different sizes only if their adapters have different ranks."""
        return self._footprints[client] if self._footprints else super().footprint(client)

    def begin_round(self, index: int, total: int, lr_factor: float) -> Round:
        """Drawn for all clients at once, on every rank the same."""
        s, now = self._whole, self._sharing.own.now
        now.participants = who = s.participants(index, len(self._samples))
        now.turns = s.turns(index, who, self._samples)
        at = np.array(who, np.int64)
        self._quota[at] = s.quota(-(-np.array(self._samples, np.int64)[at] // s.batch))
        if now.turns is not None:
            self._quota[at] = list(now.turns.batches.values())
        self.inner.begin_round(index, total, lr_factor)
        sizes = () if now.turns is None else now.turns.sizes
        return Round(index, total, who, tuple(self._quota[at].tolist()), s.seed, sizes)

    def _willing(self, clients: Sequence[int] | None) -> tuple[int, ...]:
        """The clients of all ranks that have rows for the next step."""
        now = self._sharing.own.now
        if clients is None and now.turns is not None:
            return now.turns.together()
        return tuple(k for k in (now.participants if clients is None else clients) if self._quota[k] > 0)

    def _ours(self, clients: Iterable[int]) -> tuple[int, ...]:
        """The clients that are on this rank."""
        return tuple(k for k in clients if k in self._mine)

    def forward(self, clients: Sequence[int] | None = None, *, labels: bool = True) -> Smashed:
        """Every rank's clients send; the weights of each client's rows are known to all ranks."""
        asked = self._willing(clients)
        if not asked:
            return Smashed((), torch.empty(0), (), ())
        self._asked = self._sharing.by_rank(asked)
        self._everybody = everybody = tuple(k for part in self._asked for k in part)
        mine = self._asked[self._world.rank]
        self._sizes = sizes = self._drawn_by(everybody)
        sent = self.inner.forward(mine, labels=labels)
        if not mine:
            sent = self._nothing(labels)
        assert sent.sizes == self._here(sizes), "all ranks know what each client brings"
        assert self._weighted or sent.weights is None, "all ranks know whether rows count alike"
        up = self._bytes("up", sent.rows, everybody, sizes)
        self.crossed.append(Crossed("up", everybody, up))
        counting = sent.masses if labels and self._weighted and self._sharing.apart else None
        self._alike &= self._trains or not self._buffers or len(self._samples) == 1
        found = Spread(
            sent.rows,
            sent.labels,
            everybody,
            sizes,
            weights=sent.weights,
            mine=mine,
            counting=sizes if counting is None else tuple(self._told([counting])[:, 0].tolist()),
            add=self._world.total,
        )
        return found if self._sharing.apart else self._all_of(found, labels)

    def _nothing(self, labels: bool) -> Smashed:
        """The values that a rank sends if none of its clients take part."""
        y = self._no_labels if labels else torch.empty(0, 0)
        return Smashed(self._no_rows, y, (), (), weights=self._whole.task.weights(y) if labels else None)

    def _all_of(self, found: Spread, labels: bool) -> Smashed:
        """The rows of all ranks."""
        counts = self._row_counts
        rows = tuple(self._world.rows(r, counts) for r in found.rows)
        y = self._world.rows(found.labels, counts) if labels else torch.empty(len(found), 0)
        weights = self._whole.task.weights(y) if labels else None
        return Smashed(rows, y, found.clients, found.sizes, weights=weights)

    @property
    def _row_counts(self) -> list[int]:
        """Rows of each rank in the last forward pass."""
        sizes = iter(self._sizes)
        return [sum(next(sizes) for _ in part) for part in self._asked]

    def _told(self, columns: Sequence[Sequence[float] | np.ndarray]) -> np.ndarray:
        """Numbers [c_r] of this rank's clients in the last forward pass, as columns; those of all: [C, columns]."""
        own = np.array([np.asarray(column, np.float64) for column in columns]).reshape(len(columns), -1).T
        return self._world.joined(own, [len(part) for part in self._asked])

    def _drawn_by(self, clients: Sequence[int]) -> tuple[int, ...]:
        """The rows of the next batches of `clients`, which draw them now."""
        who, turns, batch = np.array(clients, np.int64), self._sharing.own.now.turns, self._whole.batch
        at = self._drawn[who] % -(-self._counts[who] // batch) * batch
        self._drawn[who] += 1
        self._quota[who] -= 1
        if turns is not None:
            return tuple(turns.take(clients))
        return tuple(np.minimum(batch, self._counts[who] - at).tolist())

    def _here(self, values: Sequence[int]) -> tuple[int, ...]:
        """Those of this rank's clients, out of those of all in the last forward pass."""
        first = sum(map(len, self._asked[: self._world.rank]))
        return tuple(values[first : first + len(self._asked[self._world.rank])])

    def _bytes(self, direction: Direction, rows: Rows, clients: Sequence[int], sizes: Sequence[int]) -> np.ndarray:
        """Bytes [C] that have crossed for each of `clients` with `sizes` [C] rows, which were shaped as `rows`; of
        those that are here they are noted, and forgotten now. What zstd has written only they can say.
        """
        codec = self._coding.up if direction == "up" else self._coding.down
        mine = [one for one in self._noted if one.direction == direction and not one.common]
        self._noted[:] = [one for one in self._noted if one.direction != direction or one.common]
        if codec.zstd:
            return self._written(mine, clients)
        kinds, which = np.unique(np.array(sizes, np.int64), return_inverse=True)
        each = [sum(payload_bytes(codec, (size, *r.shape[1:]), r.dtype) for r in rows) for size in kinds.tolist()]
        return np.array(each, np.int64)[which]

    def _written(self, mine: Sequence[Crossed], clients: Sequence[int]) -> np.ndarray:
        """Bytes [C] of `clients`, of the last forward pass, of which each rank has noted those of its own."""
        here = dict.fromkeys(self._asked[self._world.rank], 0)
        for one in mine:
            for k, size in zip(one.clients, np.broadcast_to(one.counts, len(one.clients)).tolist(), strict=True):
                here[k] += size
        table = self._told([list(here.values())])
        everyones = dict(zip(self._everybody, table[:, 0].astype(np.int64).tolist(), strict=True))
        return np.array([everyones[k] for k in clients], np.int64)

    def tail(self, features: Smashed) -> TailGradients:
        """Each rank's clients finish their rows."""
        mine = self._asked[self._world.rank]
        here = features.here if self._sharing.apart else self._part_of(features, mine)
        rows = tuple(r for r in here.rows if r.is_floating_point())
        losses, masses = np.zeros(0), tuple[float, ...]()
        if mine:
            tail = self.inner.tail(here)
            rows, losses, masses = tail.rows, tail.losses.double().cpu().numpy(), tail.masses or tail.sizes
        table = self._told([losses, masses] if self._weighted else [losses])
        down = self._bytes("down", here.rows, self._everybody, self._sizes)
        up = self._bytes("up", rows, self._everybody, self._sizes)
        self.crossed += [Crossed("down", self._everybody, down), Crossed("up", self._everybody, up)]
        if not self._sharing.apart:
            rows = tuple(self._world.rows(r, self._row_counts) for r in rows)
        own = torch.from_numpy(table[:, 0].copy()).to(rows[0])
        everyones = tuple(table[:, 1].tolist()) if self._weighted else self._sizes
        return TailGradients(rows, own, self._everybody, self._sizes, masses=everyones)

    def _part_of(self, smashed: Smashed, clients: Sequence[int]) -> Smashed:
        """The rows of some clients, out of those of all."""
        sizes = smashed.sizes_of(set(clients))
        rows = smashed.take(smashed.rows, set(clients))
        return Smashed(rows, smashed.labels[: sum(sizes.values())], tuple(sizes), tuple(sizes.values()))

    def backward(self, gradients: CutGradients) -> None:
        """Each rank's clients take theirs."""
        mine = self._asked[self._world.rank]
        if mine:
            self.inner.backward(self._own(gradients))
        self._note_down(gradients)
        self._alike = len(self._samples) == 1

    def backward_together(self, gradients: CutGradients) -> Summed:
        """The sum is over the clients of all ranks."""
        self.inner.backward_together(self._own(gradients))
        self._note_down(gradients)
        self._alike &= not self._buffers or len(self._samples) == 1
        return Summed(self._everybody, tuple(range(len(self._samples))))

    def _own(self, gradients: CutGradients) -> CutGradients:
        """Those of this rank's clients."""
        sizes = dict(zip(gradients.clients, gradients.sizes, strict=True))
        clients, active = self._ours(gradients.clients), self._ours(gradients.active)
        own = gradients.own
        if not self._sharing.apart:
            at = np.repeat([k in self._mine for k in gradients.clients], gradients.sizes).astype(bool)
            own = tuple(g[torch.from_numpy(at).to(g.device)] for g in own)
        common = gradients.common if active else ()
        return CutGradients(own, clients, tuple(sizes[k] for k in clients), common, active)

    def _note_down(self, gradients: CutGradients) -> None:
        """The gradients that went down to all clients; a common gradient is the same on all ranks."""
        if not self._trains:
            return
        own = gradients.own if self._sends_back else ()
        down = self._bytes("down", own, gradients.clients, gradients.sizes)
        self.crossed.append(Crossed("down", gradients.clients, down))
        if gradients.active:
            self.crossed.append(Crossed("down", gradients.active, self._common_bytes(gradients), common=True))

    def _common_bytes(self, gradients: CutGradients) -> int:
        """Bytes of the common gradient, once."""
        codec, noted = self._coding.down, max((int(np.max(one.counts)) for one in self._noted if one.common), default=0)
        self._noted.clear()
        if not self._sends_back:
            return 0
        if codec.zstd:
            return max(self._world.gathered(noted))
        return sum(payload_bytes(codec, r.shape, r.dtype) for r in gradients.common)

    def fit(self) -> list[Step]:
        """Each rank's participants train; one record per local step, over the clients of all ranks."""
        everybody = list(self._sharing.own.now.participants)
        self._drawn[everybody] += self._quota[everybody]
        self._quota[everybody] = 0
        steps = self.inner.fit() if self._ours(everybody) else []
        plain = [(s.clients, s.means.tolist(), s.samples, s.samples if s.mass is None else s.mass) for s in steps]
        parts = self._world.gathered(plain)
        self._alike = len(self._samples) == 1
        return [_joined([part[t] for part in parts if t < len(part)]) for t in range(max(map(len, parts), default=0))]

    def average(self, weights: Mapping[int, float]) -> tuple[int, ...]:
        """The mean of the ranks' means; if another rule averages, it is given the models of all ranks, on each."""
        one = self._mean(weights) if self._whole.rule.plain else self._by_rule(weights)
        self._engine.take_everyones(one)
        self._alike = not self._whole.ranks
        return tuple(weights)

    def _mean(self, weights: Mapping[int, float]) -> State:
        own = {k: w for k, w in weights.items() if k in self._mine}
        if own:
            self.inner.average(own)
        else:
            self._engine.settle()
        state = self._engine.model_state(0)
        moving = {name: t.clone() for name, t in state.items() if name not in self._frozen}
        mean_of_means(self._world, moving, sum(own.values()) / sum(weights.values()))
        return {**state, **moving}

    def _by_rule(self, weights: Mapping[int, float]) -> State:
        self._engine.settle()
        state = self._engine.model_state(0)
        moving = {name: t for name, t in state.items() if name not in self._frozen}
        models = [self._engine.model_state(k - self._mine.start) for k in self._ours(weights)]
        everyones = self._sharing.everyones(models, moving, weights)
        return {**state, **combined(*everyones, self._whole.rule, self._engine.origin)}

    def evaluate(self, samples: Samples, predict: Predict, clients: Sequence[int] | None = None) -> Evaluation:
        """Each rank judges its own clients' models; models known to be equal are judged once."""
        drawn = judged(len(self._samples), self._whole.eval_clients, self._whole.seed)
        everyone = drawn if clients is None else list(clients)
        mine = self._ours(everyone[:1] if self._alike else everyone)
        if not self._alike:
            self._engine.no_longer_alike()
        own = dict(self.inner.evaluate(samples, predict, mine).scores) if mine else {}
        self.crossed.extend(self._noted)
        self._noted.clear()
        found = {k: scores for part in self._world.gathered(own) for k, scores in part.items()}
        first = next(iter(found.values()))
        return Evaluation({k: found.get(k, first) for k in everyone}, len(samples))

    def model_state(self, client: int) -> State:
        """One client's model, on all ranks."""
        rank = next(r for r, span in enumerate(self._spans) if client in span)
        own = dict(self.inner.model_state(client)) if client in self._mine else None
        found = self._world.from_rank(rank, own)
        assert found is not None, "its rank has it"
        return found

    def held(self) -> Held:
        """The models of all clients; if they differ, only on rank 0."""
        if self._alike:
            return Held({0: self.inner.model_state(self._mine.start)}, True)
        own = {k: dict(self.inner.model_state(k)) for k in self._mine}
        return Held({k: state for part in self._world.collected(own) for k, state in part.items()}, False)

    def state(self) -> dict[str, Any]:
        """The state of a single process with all clients; complete only on rank 0."""
        return whole_state(self._world.collected(self.inner.state()), self._alike)

    def load(self, state: Mapping[str, Any]) -> None:
        """Take this rank's part of a state that `state()` returned, or that of a single process."""
        part, self._alike = own_state(state, self._mine)
        self.inner.load(part)
        self._drawn[:] = drawn_of(state, len(self._samples))


def _joined(parts: Sequence[tuple[tuple[int, ...], list[float], int, float]]) -> Step:
    """One local step from those of several ranks: (clients, means, rows, their total weight)."""
    mass = sum(part[3] for part in parts)
    loss = sum(part[1][0] * part[3] for part in parts) / (mass or 1)
    own = [value for part in parts for value in part[1][1:]]
    clients = tuple(k for part in parts for k in part[0])
    return Step(torch.tensor([loss, *own], dtype=torch.float64), clients, sum(part[2] for part in parts), mass=mass)


def mean_of_means(world: World, state: Mapping[str, Tensor], share: float) -> None:
    """Replace each rank's mean (or nothing, with a `share` of 0) by the mean over all ranks, in place; integers by the
    largest. The shares add up to 1.
    """
    real = [t for t in state.values() if is_continuous(t)]
    for t in real:
        t.mul_(share) if share else t.zero_()
    world.total(real)
    for t in state.values():
        if not is_continuous(t):
            if not share:
                t.fill_(torch.iinfo(t.dtype).min if t.dtype != torch.bool else False)
            world.largest(t)


def whole_state(states: Sequence[Mapping[str, Any]], alike: bool) -> dict[str, Any]:
    """The states of the ranks' cohorts, as that of a single process with all clients."""
    first = states[0]
    if "inner" in first:
        return {**first, "inner": whole_state([state["inner"] for state in states], alike)}
    found = {**first, "alike": alike}
    for name in ("drawn", "clients"):
        if name in first:
            found[name] = [one for state in states for one in state[name]]
    if any("taken" in state for state in states):
        found["taken"] = [n for s in states for n in s.get("taken", [0] * len(s["drawn"]))]
    if "stack" in first:
        found["stack"] = whole_stack([state["stack"] for state in states])
    return found


def own_state(state: Mapping[str, Any], mine: range) -> tuple[dict[str, Any], bool]:
    """(the part of the clients `mine`, whether all models are known to be equal): the inverse of `whole_state`."""
    if "inner" in state:
        inner, alike = own_state(state["inner"], mine)
        return {**state, "inner": inner}, alike
    found = dict(state)
    for name in ("drawn", "clients", "taken"):
        if isinstance(state.get(name), list):
            found[name] = state[name][mine.start : mine.stop]
    if "stack" in state:
        found["stack"] = own_stack(state["stack"], mine)
    return found, bool(state.get("alike"))


def drawn_of(state: Mapping[str, Any], clients: int) -> Sequence[int]:
    """The batches that each client has drawn, out of such a state. Raises MalformedError."""
    while "inner" in state:
        state = state["inner"]
    sized(state["drawn"], clients, "drawn")
    drawn: Sequence[int] = state["drawn"]
    return drawn


def whole_stack(stacks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The states of the ranks' stacked copies as one. Copies whose optimiser has not stepped have zeros there."""
    found = {**stacks[0], **{name: any(s[name] for s in stacks) for name in ("clocked", "plain clock")}}
    for name in ("steps", "batches"):
        found[name] = [n for stack in stacks for n in stack[name]]
    for name in ("parameters", "buffers"):
        found[name] = {key: torch.cat([stack[name][key] for stack in stacks]) for key in stacks[0][name]}
    kinds = {(key, kind): t for s in stacks for key, own in s["optimizer"].items() for kind, t in own.items()}
    found["optimizer"] = {}
    for (key, kind), like in kinds.items():
        parts = [
            stack["optimizer"].get(key, {}).get(kind, torch.zeros_like(stack["parameters"][key], dtype=like.dtype))
            for stack in stacks
        ]
        found["optimizer"].setdefault(key, {})[kind] = torch.cat(parts)
    return found


def own_stack(stack: Mapping[str, Any], mine: range) -> dict[str, Any]:
    """The part of some copies: the inverse of `whole_stack`."""
    at = slice(mine.start, mine.stop)
    tensors = {name: {key: t[at] for key, t in stack[name].items()} for name in ("parameters", "buffers")}
    moments = {key: {kind: t[at] for kind, t in own.items()} for key, own in stack["optimizer"].items()}
    counts = {name: stack[name][at] for name in ("steps", "batches") if stack.get(name) is not None}
    return {**stack, **tensors, **counts, "optimizer": moments}
