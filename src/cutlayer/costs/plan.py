"""A plan: what split learning would cost, with a model cut here or there, without training.

Every figure is one epoch's. Costs are those of `expect`, for what `measure` finds the model to be on the meta device,
so that a million clients and billions of parameters take seconds. What is not known is None.

    from cutlayer.options import PlanConfig
    from cutlayer.costs.plan import plan

    found = plan(PlanConfig(model="resnet16", cut="all", clients=100, memory_budget=0.5))
    print(found.chosen.measured.name, found.chosen.costs.unicast)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from cutlayer import plugins
from cutlayer.adapters import of_rank, shrink
from cutlayer.algorithms import Algorithm, traffic_of
from cutlayer.copies import deep_copy
from cutlayer.costs.allotted import Allotment, remark
from cutlayer.costs.breakeven import BreakEven, break_evens, data_break_evens
from cutlayer.costs.divided import PerRank, per_rank
from cutlayer.costs.expect import Expected, Mixture, Workload, expect, plans_mixed, takes_mean
from cutlayer.costs.fleet import Fleet, fleet
from cutlayer.costs.flops import count_head
from cutlayer.costs.measure import (
    Footing,
    Measured,
    Survey,
    at_client,
    deepest,
    example,
    load_model,
    make,
    measure,
    measure_twice,
    measure_whole,
    names_of_client,
    placed,
    survey,
)
from cutlayer.data.own import own_code
from cutlayer.errors import ConfigError
from cutlayer.frozen import freeze
from cutlayer.models.auxiliary import AuxiliaryHead
from cutlayer.models.blocks import named_block
from cutlayer.models.recomputed import Sides, check_blocks, none_whole
from cutlayer.options import PlanConfig, RunConfig, default_cut
from cutlayer.text import format_bytes, format_quantity, listed
from cutlayer.traffic import Epoch
from cutlayer.verbs import LEARN, STEP_EACH
from cutlayer.wire.codecs import Codec

GB = 1e9
_MEAN = (
    "{titles}: which clients share a gradient is drawn in each step, and only those with the deepest cut can; what is "
    "broadcast, the paper's convention and, with multicast, the time are means over the draw."
)
_ONE_RANK = "Adapters of all clients have the largest rank here, {}: name a cut for those of each client's own rank"
_ANY = Epoch(2, 2, 1, 1, 1, 1, 1, 1, 1)  # to ask whether an algorithm states its traffic


@dataclass(frozen=True)
class Cost:
    """What an epoch costs with one algorithm. `memory` is a client's peak in bytes (the largest, if cuts differ).
    Joules per client are the mean of all; `server_share` is the part of the time that the server computes. None: not
    known, or no client device.
    """

    algorithm: str
    expected: Expected
    memory: int
    marginal: float | None
    total: float | None
    server_share: float | None

    def row(self) -> dict[str, Any]:
        """Plain values: bytes of all clients together, FLOPs and joules of one client and of the server."""
        e = self.expected
        return {
            "algorithm": self.algorithm,
            "bytes_up": e.up + e.once_up,
            "bytes_down": e.down,
            "bytes_down_broadcast": e.down_broadcast,
            "wire_unicast": e.unicast,
            "wire_broadcast": e.broadcast,
            "paper": e.paper,
            "client_flops": e.client_flops,
            "server_flops": e.server_flops,
            "client_memory": self.memory,
            "seconds": e.seconds,
            "server_share": self.server_share,
            "client_joules_marginal": self.marginal,
            "client_joules_total": self.total,
            "server_joules": e.server_joules,
        }


@dataclass(frozen=True)
class Memory:
    """Bytes that one side keeps while a batch is under way: weights that are `frozen` and `trained` (with buffers),
    `gradients`, what the optimiser keeps (`moments`), and what is saved for the backward pass (`activations`); also if
    each block is computed again there (`checkpointed`).
    """

    side: str
    frozen: int
    trained: int
    gradients: int
    moments: int
    activations: int
    checkpointed: int

    @property
    def total(self) -> int:
        """Bytes if nothing is computed again."""
        return self._weights + self.activations

    @property
    def total_checkpointed(self) -> int:
        """Bytes if blocks are computed again."""
        return self._weights + self.checkpointed

    @property
    def _weights(self) -> int:
        return self.frozen + self.trained + self.gradients + self.moments

    def row(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "total": self.total, "total_checkpointed": self.total_checkpointed}


@dataclass(frozen=True)
class Coded:
    """What an epoch costs with the judged algorithm if rows go up and down by `codecs`, which all come to the same.
    Bytes of one client's full batch, `up` and `down`; of all clients in an epoch, each message once per receiver
    (`unicast`); seconds of a step, the mean over an epoch, if the machines are known.
    """

    codecs: tuple[str, ...]
    up: int
    down: int
    unicast: int
    seconds: float | None

    def row(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "codecs": list(self.codecs)}


@dataclass(frozen=True)
class CutPlan:
    """One cut, and what the judged algorithm costs there. `strain` is the largest share of a budget that it takes:
    more than 1 does not fit.
    """

    measured: Measured
    cost: Cost
    strain: float

    @property
    def costs(self) -> Expected:
        """The judged algorithm's."""
        return self.cost.expected

    def row(self) -> dict[str, Any]:
        """Plain values; shares are of the whole model's, joules marginal and of one client."""
        m = self.measured
        return {
            "cut": m.name,
            "client_parameters": m.client_parameters,
            "client_flops_share": flops_share(m),
            "smashed_bytes": m.smashed,
            "gradient_bytes": m.gradient,
            "crossing": [{"shape": list(c.shape), "type": str(c.dtype).removeprefix("torch.")} for c in m.crossing],
            "client_memory": self.cost.memory,
            "client_joules_marginal": self.cost.marginal,
            "client_joules_total": self.cost.total,
            "seconds": self.costs.seconds,
            "wire_unicast": self.costs.unicast,
            "wire_broadcast": self.costs.broadcast,
            "client_flops": self.costs.client_flops,
            "fits": self.strain <= 1,
        }


@dataclass(frozen=True)
class CutClients:
    """Where clients have different cuts, or adapters of different ranks: one of these, the number of `clients` that
    have it, and what one of them computes in an epoch (FLOPs) and holds (bytes, its peak) with the judged algorithm.
    `rank` is that of the adapters, where ranks differ.
    """

    measured: Measured
    clients: int
    flops: float
    memory: int
    rank: int | None = None

    def row(self) -> dict[str, Any]:
        """Plain values; the share is of the whole model's FLOPs."""
        m = self.measured
        return {
            "cut": m.name,
            **({} if self.rank is None else {"rank": self.rank}),
            "clients": self.clients,
            "client_parameters": m.client_parameters,
            "client_flops_share": flops_share(m),
            "smashed_bytes": m.smashed,
            "gradient_bytes": m.gradient,
            "client_flops": self.flops,
            "client_memory": self.memory,
        }


@dataclass(frozen=True)
class Plan:
    """What is planned and what it costs.

    `judged` is the algorithm that cuts are judged by; `cuts` in the order data flows (with one cut named: that one),
    `refused` where the model cannot be cut, with the reasons; `costs` of every algorithm at the `chosen` cut, and what
    each trains there (`works`), but of those that are `not_planned`, since they do not state their traffic; `bests` by
    quantity (bytes, energy, time), None where no cut fits the budgets; `notes` on the machines' figures; `ranks` what
    each rank holds and sends with every algorithm, if there are several; `memory` of both sides with the judged
    algorithm, and of a client that trains the whole model; `coded` what the judged algorithm sends by each codec;
    `data_break_evens` against sending the data.

    Where clients have different cuts, `kinds` are these, the deepest last, which then is the `chosen` one; algorithms
    that need one cut for all are in `one_cut`, with the reasons. `remark` says which clients have which cut. Where the
    adapters of clients have different ranks, `kinds` are the clients of each rank, the largest last.
    """

    config: PlanConfig
    title: str
    judged: str
    cuts: tuple[CutPlan, ...]
    refused: dict[str, str]
    chosen: CutPlan
    costs: tuple[Cost, ...]
    works: Mapping[str, Workload | Mixture]
    not_planned: tuple[str, ...]
    break_evens: tuple[BreakEven, ...]
    bests: dict[str, str]
    verdict: str
    notes: tuple[str, ...] = ()
    ranks: tuple[PerRank, ...] = ()
    kinds: tuple[CutClients, ...] = ()
    one_cut: dict[str, str] = field(default_factory=dict)
    remark: str = ""
    memory: tuple[Memory, ...] = ()
    coded: tuple[Coded, ...] = ()
    data_break_evens: tuple[BreakEven, ...] = ()

    @property
    def tokens(self) -> int:
        """Numbers of one sample that are tokens (integers); 0 if they are not."""
        return math.prod(self.config.input) if self.config.input_type == "int64" else 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        m, work = self.chosen.measured, workload(self.chosen.measured, self.config)
        return {
            "config": self.config.model_dump(mode="json"),
            "model": {
                "title": self.title,
                "parameters": m.parameters,
                "bytes": m.whole.state,
                "flops_forward": m.flops.whole.forward,
                "flops_training": m.flops.whole.training,
                "raw_bytes": work.raw,
                "label_bytes": work.label,
            },
            "cut": m.name,
            "judged_by": self.judged,
            "algorithms": [cost.row() for cost in self.costs],
            "not_planned": [*self.not_planned, *self.one_cut],
            "clients_at_cuts": [kind.row() for kind in self.kinds],
            "cuts": [cut.row() for cut in self.cuts],
            "refused": self.refused,
            "best": self.bests,
            "verdict": self.verdict,
            "notes": list(self.notes),
            "ranks": [one.row() for one in self.ranks],
            "memory": [one.row() for one in self.memory],
            "codecs": [one.row() for one in self.coded],
            "break_evens": [{**asdict(b), "sentence": str(b)} for b in self.break_evens],
            "data_break_evens": [{**asdict(b), "sentence": str(b)} for b in self.data_break_evens],
        }


def plan(config: PlanConfig, model: nn.Module | Callable[..., nn.Module] | None = None) -> Plan:
    """Measure the model, calculate, compare. `model` replaces the one named in `config`: a module, which stays as
    it is, or a function that makes one.

    Raises ConfigError and CutError with the value, the reason and the remedy.
    """
    config.check(frozenset(config.model_fields_set))
    if config.ranks > config.clients:
        raise ConfigError(
            f"ranks = {config.ranks} are more than the {config.clients} clients that they share: give {config.clients} "
            "at most"
        )
    machines = _machines(config)
    title = config.model if model is None else type(model).__name__ if isinstance(model, nn.Module) else "own model"
    net, x = _on_meta(config, model)
    algorithms, not_planned = _algorithms(config)
    default = default_cut(config.model) if model is None else None
    names = _own_cuts(config, net, x, default, machines)
    if len(set(names)) > 1:
        if len(set(_ranks(config, net))) > 1:
            raise ConfigError("lora_ranks are not possible with different cuts: name one cut for all, or one lora_rank")
        mixed = _Mixed(config, names, net, x)
        return mixed.plan(title, algorithms, not_planned, machines)
    name = names[0] if names else config.cut or default or "all"
    ranks, sides = _ranks(config, net), config.gradient_checkpointing
    if len(set(ranks)) > 1 and name != "all":
        return _Ranked(config, ranks, net, x, named_block(net, name)).plan(title, algorithms, not_planned, machines)
    judged = _judged(algorithms)
    if config.tail_cut is not None and name == "all":
        raise ConfigError(
            f"tail_cut = {config.tail_cut!r} needs one cut before it: name it with cut, e.g. --cut hidden1"
        )
    name = named_block(net, name)
    twice = None if config.tail_cut is None else measure_twice(net, name, named_block(net, config.tail_cut), x, sides)
    found = _with_blocks(survey(net, x, sides=sides), sides) if name == "all" else None
    once = found.cuts if found else (measure(net, name, x, sides),)
    _check_blocks(config, (*once, *(() if twice is None else (twice,))), algorithms.values())
    looked_at = (twice,) if twice is not None and algorithms[judged].traits.u_shaped else once
    cuts = [_cut_plan(judged, algorithms[judged], m, config, machines) for m in looked_at]
    _check_energy(cuts[0], config)
    chosen, bests, verdict = _best(algorithms[judged], cuts, config)
    straight = chosen.measured if found else once[0]
    at = {name: twice if twice is not None and a.traits.u_shaped else straight for name, a in algorithms.items()}
    works = {name: work_of(a, at[name], config) for name, a in algorithms.items()}
    both = [(a, works[name]) for name, a in algorithms.items()]
    return Plan(
        config,
        title,
        judged,
        tuple(cuts),
        found.refused if found else {},
        chosen,
        tuple(_cost(name, a, works[name], [at[name]], config, machines) for name, a in algorithms.items()),
        works,
        not_planned,
        tuple(break_evens(both, machines)),
        bests,
        verdict,
        () if machines is None else machines.notes,
        tuple(
            per_rank(name, a, at[name], works[name], config.client_optimizer, config.ranks, sides)
            for name, a in (algorithms.items() if config.ranks > 1 else ())
        ),
        memory=_memories(algorithms, judged, at, config),
        coded=_by_codec(algorithms[judged], lambda own: work_of(algorithms[judged], at[judged], own), config, machines),
        data_break_evens=tuple(data_break_evens(both)),
        remark=_ONE_RANK.format(max(ranks)) if len(set(ranks)) > 1 else remark(names, config.cut_by),
    )


def _check_energy(cut: CutPlan, config: PlanConfig) -> None:
    """Raises ConfigError for a budget of energy of which nothing is known."""
    if config.energy_budget is not None and cut.cost.marginal is None:
        link = "a link of your own" if config.link is None else f"link {config.link!r}"
        raise ConfigError(
            f"energy_budget = {config.energy_budget:g} cannot be checked: {link} has no figures for energy; name a "
            "link that has, such as lte, or leave the budget out"
        )


def _check_blocks(config: PlanConfig, measured: Iterable[Measured], algorithms: Iterable[Algorithm]) -> None:
    """Raises ConfigError where gradient_checkpointing has no effect, as a run does."""
    sides = config.gradient_checkpointing
    whole = at_client(sides) and any(a.traits.whole for a in algorithms)  # has all blocks
    if sides != "none" and not whole and not any(m.again for m in measured):
        raise ConfigError(
            f"gradient_checkpointing = {sides!r} has no effect: {none_whole(sides)}; leave it out, or cut elsewhere"
        )


def _with_blocks(found: Survey, sides: Sides) -> Survey:
    """The cuts at which a run could compute blocks of these sides again."""
    if sides == "none":
        return found
    cuts = tuple(m for m in found.cuts if m.again)
    lacking = {m.name: none_whole(sides) for m in found.cuts if not m.again}
    return Survey(cuts or found.cuts, {**found.refused, **(lacking if cuts else {})})


def _own_cuts(
    config: PlanConfig, net: nn.Module, x: torch.Tensor, default: str | None, machines: Fleet | None
) -> tuple[str, ...]:
    """The cut of each client, [C], if clients have their own, or if there is something that it has to fit; else empty.
    Raises ConfigError and CutError as a run does.
    """
    budgets = {n: list(given) for n in ("client_memory", "client_seconds") if (given := getattr(config, n))}
    if config.cut_by is None and len(config.cuts) < 2 and not budgets:
        return ()
    dtype = getattr(torch, config.precision)
    names = Allotment(config, net, x, label_bytes(config), dtype, machines).cuts(default)
    if not names:
        option, given = next(iter(budgets.items()))
        raise ConfigError(f"{option} = {given} needs a cut that it can be checked for: name one, or choose cut_by")
    return names


def _ranks(config: PlanConfig, net: nn.Module) -> tuple[int, ...]:
    """The rank of each client's adapters, [C], if they have their own. Raises ConfigError."""
    ranks: tuple[int, ...] = getattr(net, "client_ranks", ())
    if ranks and len(ranks) != config.clients:
        raise ConfigError(f"lora_ranks are {len(ranks)} for {config.clients} clients: give one for each")
    return ranks


class _Mixed:
    """Clients with the cuts `names` [C], which differ: `kinds` are these, measured, the deepest last."""

    def __init__(self, config: PlanConfig, names: Sequence[str], net: nn.Module, x: torch.Tensor) -> None:
        self.config, self.names, counts = config, names, Counter(names)
        measured = {name: measure(net, name, x, config.gradient_checkpointing) for name in counts}
        _check_blocks(config, measured.values(), ())
        last = measured.pop(deepest(net, list(counts), x))
        self.kinds = [*measured.values(), last]
        self.counts = [counts[m.name] for m in self.kinds]
        number = {m.name: i for i, m in enumerate(self.kinds)}
        self.numbers = np.array([number[name] for name in names])

    def plan(
        self, title: str, algorithms: dict[str, Algorithm], not_planned: tuple[str, ...], machines: Fleet | None
    ) -> Plan:
        """What it costs with each of the algorithms that allow it. Raises ConfigError if none does."""
        config, last = self.config, self.kinds[-1]
        fit = {n: a for n, a in algorithms.items() if a.traits.whole or plans_mixed(a, workload(last, config))}
        if not fit:
            raise ConfigError(
                f"{listed(list(algorithms))} cannot be planned with different cuts: name one cut for all, or another "
                f"algorithm, e.g. --algorithms {RunConfig.model_fields['algorithm'].get_default()}"
            )
        work = self.mixture()
        costs = {n: _cost(n, a, work, self.kinds, config, machines) for n, a in fit.items()}
        judged = _judged(fit)
        chosen = CutPlan(last, costs[judged], 0.0)
        drawn = [a.entry.title for n, a in fit.items() if takes_mean(a, work)]
        return Plan(
            config,
            title,
            judged,
            (chosen,),
            {},
            chosen,
            tuple(costs.values()),
            dict.fromkeys(fit, work),
            not_planned,
            tuple(break_evens([(a, work) for a in fit.values()], machines)),
            {},
            "",
            (*(() if machines is None else machines.notes), *([_MEAN.format(titles=listed(drawn))] if drawn else [])),
            kinds=tuple(map(self._kind, self.kinds, self.counts)),
            one_cut={n: a.traits.one_cut or "its clients take turns" for n, a in algorithms.items() if n not in fit},
            remark=remark(self.names, config.cut_by),
            memory=self.memories(fit[judged]),
            data_break_evens=tuple(data_break_evens([(a, work) for a in fit.values()])),
        )

    def memories(self, judged: Algorithm) -> tuple[Memory, ...]:
        """Of the clients at each cut, and of the server, which holds the blocks between each client's cut and the
        deepest. Frozen parameters are held once.
        """
        if not judged.traits.split:
            return ()
        c, last, others = self.config, self.kinds[-1], zip(self.kinds[:-1], self.counts, strict=False)
        clients = [_memory(f"client cut after {m.name}", m.client, c.batch, c) for m in self.kinds]
        blocks = [_memory("blocks", last.client - m.client, n * c.batch, c, n) for m, n in others]
        server = _server_memory(judged, last, c)
        each = ("trained", "gradients", "moments", "activations", "checkpointed")
        sums = {name: sum(getattr(one, name) for one in (server, *blocks)) for name in each}
        return (*clients, replace(server, frozen=server.frozen + max(one.frozen for one in blocks), **sums))

    def mixture(self) -> Mixture:
        """What `expect` takes."""
        pairs = zip(self.kinds, self.counts, strict=True)
        return Mixture(tuple(replace(workload(m, self.config), clients=n) for m, n in pairs), self.numbers)

    def _kind(self, m: Measured, clients: int) -> CutClients:
        c = self.config
        computed = c.samples_per_client * m.flops.client.training
        return CutClients(m, clients, computed, _peak(m.client, c))


class _Ranked:
    """Clients whose adapters have `ranks` [C], which differ, all cut after `name`. The server's adapters have the
    largest rank; a whole model has a client's rank throughout.
    """

    def __init__(self, config: PlanConfig, ranks: Sequence[int], net: nn.Module, x: torch.Tensor, name: str) -> None:
        self.config, self.ranks, self.net, self.x, self.name = config, sorted(set(ranks)), net, x, name
        self.tail = None if config.tail_cut is None else named_block(net, config.tail_cut)
        self.counts = [ranks.count(rank) for rank in self.ranks]
        self.numbers = np.array([self.ranks.index(rank) for rank in ranks])
        self._kinds: dict[bool, list[Measured]] = {}

    def plan(
        self, title: str, algorithms: dict[str, Algorithm], not_planned: tuple[str, ...], machines: Fleet | None
    ) -> Plan:
        """What it costs with each of the algorithms that allow it. Raises ConfigError if none does."""
        config = self.config
        if config.ranks > 1:
            raise ConfigError(
                f"ranks = {config.ranks} processes are not planned if adapters have different ranks: leave it out, or "
                "give one lora_rank"
            )
        fit = {n: a for n, a in algorithms.items() if not a.traits.one_rank}
        if not fit:
            raise ConfigError(
                f"{listed(list(algorithms))} cannot be planned with different ranks of adapters: give one lora_rank, "
                f"or name another algorithm, e.g. --algorithms {RunConfig.model_fields['algorithm'].get_default()}"
            )
        both = [(a, self.work(a, config)) for a in fit.values()]
        _check_blocks(config, [m for kinds in self._kinds.values() for m in kinds], fit.values())
        works = dict(zip(fit, (work for _, work in both), strict=True))
        costs = {n: _cost(n, a, works[n], self.kinds(a), config, machines) for n, a in fit.items()}
        judged = _judged(fit)
        one = fit[judged]
        at = CutPlan(self.kinds(one)[-1], costs[judged], _strain(costs[judged], config))
        _check_energy(at, config)
        chosen, bests, verdict = _best(one, [at], config)
        return Plan(
            config,
            title,
            judged,
            (chosen,),
            {},
            chosen,
            tuple(costs.values()),
            works,
            not_planned,
            tuple(break_evens(both, machines)),
            bests,
            verdict,
            () if machines is None else machines.notes,
            kinds=tuple(map(self._kind, self.kinds(one), self.counts, self.ranks)),
            one_cut={n: a.traits.one_rank for n, a in algorithms.items() if n not in fit},
            memory=self._memories(
                one, next((a for a in fit.values() if a.traits.whole and not a.traits.central), None)
            ),
            coded=_by_codec(one, lambda own: self.work(one, own), config, machines),
            data_break_evens=tuple(data_break_evens(both)),
        )

    def work(self, algorithm: Algorithm, config: PlanConfig) -> Mixture:
        """What `expect` takes."""
        pairs = zip(self.kinds(algorithm), self.counts, strict=True)
        return Mixture(tuple(replace(workload(m, config), clients=n) for m, n in pairs), self.numbers, ranked=True)

    def kinds(self, algorithm: Algorithm) -> list[Measured]:
        """The model with each of the ranks, at the cut or cuts that an algorithm has."""
        bent = algorithm.traits.u_shaped
        if bent not in self._kinds:
            tail = self.tail if bent else None
            owned = names_of_client(self.net, self.name, tail, self.x)
            self._kinds[bent] = [self._measured(rank, owned, tail) for rank in self.ranks]
        return self._kinds[bent]

    def _measured(self, rank: int, owned: Collection[str], tail: str | None) -> Measured:
        own, whole, sides = deep_copy(self.net), deep_copy(self.net), self.config.gradient_checkpointing
        shrink(own, {name: shape for name, shape in of_rank(own, rank).items() if name in owned})
        shrink(whole, of_rank(whole, rank))
        m = (
            measure(own, self.name, self.x, sides)
            if tail is None
            else measure_twice(own, self.name, tail, self.x, sides)
        )
        held, computed = measure_whole(whole, self.x, sides)
        return replace(m, whole=held, flops=replace(m.flops, uncut=computed))

    def _kind(self, m: Measured, clients: int, rank: int) -> CutClients:
        c = self.config
        computed = c.samples_per_client * m.flops.at_client.training
        return CutClients(m, clients, computed, _peak(m.client, c), rank)

    def _memories(self, judged: Algorithm, whole: Algorithm | None) -> tuple[Memory, ...]:
        """Of the clients of each rank, and of the server; of a client with the whole model and the largest rank."""
        c, found = self.config, []
        if judged.traits.split:
            kinds = self.kinds(judged)
            pairs = zip(kinds, self.ranks, strict=True)
            found += [_memory(f"client of rank {rank}", m.client, c.batch, c) for m, rank in pairs]
            found.append(_server_memory(judged, kinds[-1], c))
        if whole is not None:
            found.append(_memory(f"client of {whole.entry.title}", self.kinds(whole)[-1].whole, c.batch, c))
        return tuple(found)


def _memories(
    algorithms: dict[str, Algorithm], judged: str, at: dict[str, Measured], config: PlanConfig
) -> tuple[Memory, ...]:
    """Of a client and of the server with the judged algorithm, and of a client that trains the whole model."""
    found, one = [], algorithms[judged]
    if one.traits.split:
        m = at[judged]
        found.append(_memory("client", m.client, config.batch, config))
        found.append(_server_memory(one, m, config))
    whole = next((name for name, a in algorithms.items() if a.traits.whole and not a.traits.central), None)
    if whole is not None:
        found.append(_memory(f"client of {algorithms[whole].entry.title}", at[whole].whole, config.batch, config))
    return tuple(found)


def _server_memory(algorithm: Algorithm, m: Measured, config: PlanConfig) -> Memory:
    """What the server keeps of its part of the model."""
    together, traits = traffic_of(algorithm, _ANY), algorithm.traits
    assert together is not None, "only algorithms that state their traffic are judged"
    in_turn = together.pattern != "steps" or STEP_EACH in traits.needs
    clients, copies = 1 if in_turn else config.clients, config.clients if traits.server_copies else 1
    return _memory("server", m.server, clients * config.batch, config, copies)


def _peak(part: Footing, config: PlanConfig) -> int:
    """Bytes that a client's training takes, at most."""
    checkpointed = at_client(config.gradient_checkpointing)
    return part.peak(config.batch, config.client_optimizer, checkpointed=checkpointed)


def _memory(side: str, part: Footing, rows: int, config: PlanConfig, copies: int = 1) -> Memory:
    """What a part keeps with so many rows under way, in so many copies of all that is trained."""
    return Memory(
        side,
        part.frozen,
        copies * part.moving,
        copies * part.trainable,
        copies * part.moments(config.client_optimizer),
        part.saved(rows),
        part.saved(rows, checkpointed=True),
    )


def _by_codec(
    algorithm: Algorithm,
    work_with: Callable[[PlanConfig], Workload | Mixture],
    config: PlanConfig,
    machines: Fleet | None,
) -> tuple[Coded, ...]:
    """The judged algorithm, which trains what `work_with` says, with each codec of the registry in both directions,
    then with those that are planned; codecs that come to the same are one.
    """
    if not algorithm.traits.split:
        return ()
    pairs = {str(codec): (str(codec), str(codec)) for codec in map(_example, plugins.index("codec"))}
    pairs.setdefault(_planned_codecs(config), (config.up_codec, config.down_codec))
    found: dict[Coded, list[str]] = {}
    for label, (up, down) in pairs.items():
        own = config.model_copy(update={"up_codec": up, "down_codec": down})
        all_of_it = work_with(own)
        work = all_of_it if isinstance(all_of_it, Workload) else all_of_it.kinds[-1]  # the same at the cut
        e, t = expect(algorithm, all_of_it, machines), traffic_of(algorithm, work)
        assert t is not None, "only algorithms that state their traffic are judged"
        b, turns = config.batch, config.clients if t.pattern == "relay" else 1
        sent = b * (work.smashed + work.returned * t.tails) + work.smashed_besides + work.returned_besides * t.tails
        back = (b * work.gradient + work.gradient_besides) * t.gradients
        back += (b * work.features + work.features_besides) * t.tails
        seconds = None if e.seconds is None else e.seconds / work.batches / turns
        found.setdefault(Coded((), sent, back, e.unicast, seconds), []).append(label)
    most_first = sorted(found.items(), key=lambda item: -item[0].unicast)
    return tuple(replace(one, codecs=tuple(labels)) for one, labels in most_first)


def _example(name: str) -> Codec:
    """A codec of the registry, with an argument if it takes one."""
    argument = plugins.load("codec", name).example
    return Codec.parse(f"{name}:{argument}" if argument else name)


def _planned_codecs(config: PlanConfig) -> str:
    """Those of both directions in words."""
    up, down = config.up_codec, config.down_codec
    return up if up == down else f"{up} up, {down} down"


def workload(m: Measured, config: PlanConfig) -> Workload:
    """What `expect` takes: an epoch of the model at that cut."""
    item = torch.int64.itemsize if config.input_type == "int64" else getattr(torch, config.precision).itemsize
    return m.workload(
        clients=config.clients,
        samples_per_client=config.samples_per_client,
        batch=config.batch,
        label=label_bytes(config),
        raw=math.prod(config.input) * item,
        up=Codec.parse(config.up_codec),
        down=Codec.parse(config.down_codec),
    )


def work_of(algorithm: Algorithm, m: Measured, config: PlanConfig) -> Workload:
    """The same for one algorithm, whose clients may have auxiliary heads. Raises ConfigError for unfit heads."""
    work = workload(m, config)
    if LEARN not in algorithm.traits.needs:
        return work
    with own_code(algorithm, f"`head` of the algorithm {algorithm.entry.name!r}"), torch.device("meta"):
        smashed = tuple(torch.zeros(2, *c.shape, dtype=c.dtype) for c in m.crossing)
        head = AuxiliaryHead(algorithm.head(smashed, _width(config)), smashed)
        flops = count_head(head.requires_grad_(not algorithm.traits.heads_come_down), smashed)
    tensors = placed(head, getattr(torch, config.precision)).state_dict().values()
    return replace(work, head=sum(t.nbytes for t in tensors), flops=replace(work.flops, head=flops))


def label_bytes(config: PlanConfig) -> int:
    """Bytes of one sample's label: as given, or as a run sends targets."""
    if config.label_bytes is not None:
        return config.label_bytes
    numbers = plugins.find("task", config.task).facts["targets"] == "numbers"
    return math.prod(config.targets) * (torch.float32 if numbers else torch.int64).itemsize


def _width(config: PlanConfig) -> int:
    """How many numbers a built-in model gives for a row, or for a place."""
    task = plugins.load("task", config.task)()
    return int(task.width(torch.zeros(1, *config.targets), config.classes))


def flops_share(m: Measured) -> float:
    """The client's part of an epoch's FLOPs, in [0, 1]."""
    return m.flops.client.training / m.flops.whole.training if m.flops.whole.training else 0.0


def _on_meta(config: PlanConfig, model: nn.Module | Callable[..., nn.Module] | None) -> tuple[nn.Module, torch.Tensor]:
    """The model in the planned precision, and a batch of two for it."""
    dtype = getattr(torch, config.precision)
    if model is None:
        options = config.options_of(plugins.find("model", config.model))
        named = (*config.cuts, config.tail_cut) if len(config.cuts) == 1 else ()
        cuts = [at for at in named if at not in (None, "all")]
        net = load_model(config.model, config.input, _width(config), at=cuts, **options)
    else:
        net = model if isinstance(model, nn.Module) else make(model, config.input, _width(config))
    try:
        net = placed(net, dtype)
    except Exception as error:  # the user's module: anything can come out
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"model {config.model!r} cannot be put on the meta device ({reason}): use plain parameters and buffers, "
            "all of them created in its constructor"
        ) from None
    freeze(net, config.freeze)
    if config.gradient_checkpointing != "none":
        check_blocks(net, config.gradient_checkpointing)
    return net, example(config.input, torch.int64 if config.input_type == "int64" else dtype)


def _machines(config: PlanConfig) -> Fleet | None:
    """The fleet, with the server's devices as one of their speed and power together."""
    machines = fleet(config, config.clients)
    if machines is None or machines.server is None or config.servers == 1:
        return machines
    together = machines.server.model_copy(update={"watts": machines.server.watts * config.servers})
    return replace(machines, server=together, server_speed=machines.server_speed * config.servers)


def _algorithms(config: PlanConfig) -> tuple[dict[str, Algorithm], tuple[str, ...]]:
    """Those that state their traffic, with their options, by the names that the configuration has; the names of the
    others. Raises ConfigError without any.
    """
    made = {name: config.algorithm(name) for name in config.algorithms}
    stated = {name: a for name, a in made.items() if traffic_of(a, _ANY) is not None}
    others = tuple(name for name in made if name not in stated)
    if not stated:
        raise ConfigError(
            f"{listed(list(others))} cannot be planned without a method `traffic` that states what is sent: "
            f"name another algorithm, e.g. --algorithms {RunConfig.model_fields['algorithm'].get_default()}"
        )
    return stated, others


def _judged(algorithms: dict[str, Algorithm]) -> str:
    """The default algorithm of a run, if it is among these; or the last that cuts the model; or the last."""
    default = RunConfig.model_fields["algorithm"].get_default()
    cutting = [name for name, a in algorithms.items() if a.traits.split]
    return default if default in cutting else (cutting or list(algorithms))[-1]


def _cost(
    name: str,
    algorithm: Algorithm,
    work: Workload | Mixture,
    kinds: Sequence[Measured],
    config: PlanConfig,
    machines: Fleet | None,
) -> Cost:
    """With clients that hold what one of the `kinds` is at its cut."""
    e, traits = expect(algorithm, work, machines), algorithm.traits
    held = [m.whole if traits.whole else m.client for m in kinds]
    memory = 0 if traits.central else max(_peak(own, config) for own in held)
    share = None
    if machines is not None and machines.server is not None and e.seconds:
        share = e.server_flops / machines.server_speed / e.seconds
    marginal, total = (None, None) if e.clients is None else (e.clients.marginal, e.clients.total)
    each = config.clients
    return Cost(
        name,
        e,
        memory,
        None if marginal is None else marginal / each,
        None if total is None else total / each,
        share,
    )


def _cut_plan(name: str, judged: Algorithm, m: Measured, config: PlanConfig, machines: Fleet | None) -> CutPlan:
    cost = _cost(name, judged, work_of(judged, m, config), [m], config, machines)
    return CutPlan(m, cost, _strain(cost, config))


def _strain(cost: Cost, config: PlanConfig) -> float:
    """The largest share of a budget that it takes."""
    strains = [0.0]
    if config.memory_budget is not None:
        strains.append(cost.memory / (config.memory_budget * GB))
    if config.energy_budget is not None and cost.marginal is not None:
        strains.append(cost.marginal / config.energy_budget)
    return max(strains)


def _best(judged: Algorithm, cuts: list[CutPlan], config: PlanConfig) -> tuple[CutPlan, dict[str, str], str]:
    """The cut with the least bytes (then the least client FLOPs) of those within the budgets; the best by quantity; a
    sentence. Where none fits: the one that comes nearest.
    """
    fitting = [c for c in cuts if c.strain <= 1]
    title, budgets = judged.entry.title, _budgets(config)
    within = f" within {budgets}" if budgets else ""
    if not fitting:
        nearest = min(cuts, key=lambda c: c.strain)
        need = [f"{format_bytes(nearest.cost.memory)} of memory"] if config.memory_budget is not None else []
        if config.energy_budget is not None and nearest.cost.marginal is not None:
            need.append(f"{format_quantity(nearest.cost.marginal, 'J')} per epoch")
        which = "no cut" if len(cuts) > 1 else f"the cut at {nearest.measured.name!r} is not"
        text = f"{which[0].upper()}{which[1:]}{within if len(cuts) == 1 else f' is{within}'}: "
        near = f"{nearest.measured.name!r} comes nearest and needs" if len(cuts) > 1 else "it needs"
        return nearest, {}, f"{text}{near} {listed(need)}."
    best = min(fitting, key=lambda c: (_bytes(c, config), c.costs.client_flops))
    bests = {"bytes": best.measured.name}
    energies = [c for c in fitting if c.cost.marginal is not None]
    times = [c for c in fitting if c.costs.seconds is not None]
    if energies:
        bests["energy"] = min(energies, key=lambda c: c.cost.marginal or 0.0).measured.name
    if times:
        bests["time"] = min(times, key=lambda c: c.costs.seconds or 0.0).measured.name
    if len(cuts) == 1:
        return best, bests, f"The cut at {best.measured.name!r} is{within}." if budgets else ""
    others = [
        f"{what} at {bests[key]!r}"
        for key, what in (("energy", "least marginal energy of a client"), ("time", "least time"))
        if key in bests
    ]
    also = f"; {listed(others)}" if others else ""
    return best, bests, f"Of the cuts{within}, {title} sends the least bytes at {best.measured.name!r}{also}."


def _bytes(cut: CutPlan, config: PlanConfig) -> int:
    return cut.costs.broadcast if config.multicast else cut.costs.unicast


def _budgets(config: PlanConfig) -> str:
    parts = []
    if config.memory_budget is not None:
        parts.append(f"{format_bytes(round(config.memory_budget * GB))} of a client's memory")
    if config.energy_budget is not None:
        parts.append(f"{format_quantity(config.energy_budget, 'J')} of a client's energy per epoch (marginal)")
    return listed(parts) if parts else ""
