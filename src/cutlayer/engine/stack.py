"""C copies of one module as stacked tensors [C, ...]: forward passes, optimiser steps, averages, states, all at once.

Consecutive clients with batches of the same size form a group, which runs as one. Its parameters are views of the
stacked tensors if its clients are neighbours, otherwise copies, which are written back after the step. Groups have at
most `chunk` clients, so that a group's weights are still in the processor's cache for its backward pass and its step,
and so that memory is bounded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from cutlayer import seeds
from cutlayer.averaging import State, combined
from cutlayer.averagings import Averaging
from cutlayer.engine.chain import Chain
from cutlayer.engine.descent import Descent, descent
from cutlayer.engine.kernels import Factors
from cutlayer.engine.lowering import Choose, Lowered
from cutlayer.engine.mapping import Draw, Listening, Masked, drawn
from cutlayer.engine.shelf import repeated, spread_out
from cutlayer.engine.ways import Stacking
from cutlayer.frozen import replica
from cutlayer.optim import MOMENTUM, MakeOptimizer, after_a_step, laid_as, rule_of, set_lr
from cutlayer.stored import Count, MalformedError, Stored, checked, fit, fits, sized
from cutlayer.types import Rows, as_tuple, is_continuous

Generators = Callable[[int], torch.Generator]
"""Client -> its random stream in this forward pass."""


@dataclass
class Group:
    """Some clients as one: `clients` [c] with b rows each, their parameters and buffers by name, each [c, ...].

    `at` are their positions among the clients of the step, `rows` those of their rows in the merged batch [c * b].
    `views`: the clients are neighbours, and the tensors are views of the stack.
    """

    clients: np.ndarray
    views: bool
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    at: np.ndarray = field(default_factory=lambda: np.arange(0))
    rows: slice | Tensor = field(default_factory=lambda: slice(None))
    factors: dict[str, list[Factors]] = field(default_factory=dict)

    @property
    def gradients(self) -> list[Tensor]:
        """The gradients of the parameters, each [c, ...]."""
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    @property
    def places(self) -> np.ndarray:
        """The positions of its rows in the merged batch: [c * b]."""
        if isinstance(self.rows, slice):
            return np.arange(self.rows.start, self.rows.stop)
        return self.rows.cpu().numpy()


@dataclass(frozen=True)
class _Piece:
    """The part that is computed at a time: the module, or one of its children, whose names begin with `prefix`; as one
    node if it consists only of dense layers.
    """

    module: nn.Module
    prefix: str
    chain: Chain | None

    def of(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The piece's tensors, under the module's names."""
        return {n: t for n, t in tensors.items() if n.startswith(self.prefix)} if self.prefix else tensors

    def bare(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same under the piece's own names."""
        return {n.removeprefix(self.prefix): t for n, t in self.of(tensors).items()} if self.prefix else tensors


class ShelvedState(Stored, rename={"plain_clock": "plain clock"}):
    """The state of a stack whose copies are on disk (`shelved.py`): three shelves, and the counters of a stack in
    memory.
    """

    models: dict[str, Any]
    apart: dict[str, Any]
    moments: dict[str, Any]
    clocked: bool
    steps: list[Count]
    batches: list[Count]
    plain_clock: bool = False


class _StackState(Stored, rename={"plain_clock": "plain clock"}):
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]
    clocked: bool
    steps: list[Count]
    batches: list[Count] | None = None
    plain_clock: bool = False


class Stack:
    """`count` copies of `module`, stacked, computed as `how` says. `choose` decides the forms of operations for which
    `how` has none. `pieces` are the children of `module` that are computed one at a time (one without a name: all of
    it); `called` says under which name the optimiser knows a parameter. Frozen parameters whose names begin with
    `apart` are still each copy's own.
    """

    def __init__(
        self,
        module: nn.Module,
        count: int,
        make_optimizer: MakeOptimizer,
        how: Stacking | None = None,
        choose: Choose | None = None,
        *,
        pieces: Sequence[str] = ("",),
        called: Callable[[str], str] = str,
        apart: str | None = None,
    ) -> None:
        how = how or Stacking()
        self.module = replica(module)
        self.count, self.way, self.forms, self._choose = count, how.way, dict(how.forms), choose
        # Frozen parameters are not stacked: all clients use the module's own.
        self._parameters = {n: repeated(p, count) for n, p in module.named_parameters() if p.requires_grad}
        self._frozen = [p for p in self.module.parameters() if not p.requires_grad]
        frozen = {n: p for n, p in module.named_parameters() if not p.requires_grad}
        self._apart = {n: repeated(p, count) for n, p in frozen.items() if apart is not None and n.startswith(apart)}
        self._buffers = {n: repeated(b, count) for n, b in module.named_buffers()} | self._apart
        self._trained = list(self._parameters)
        self._called = {name: called(name) for name in self._trained}
        self._make_optimizer = make_optimizer
        self._rule = rule_of(make_optimizer)
        self._direct = descent(make_optimizer, self.device)
        alone = make_optimizer.clip is None and make_optimizer.accumulate == 1
        self._by_factors = alone and (self._rule.plain or self._direct is not None)
        self._pieces = {name: self._piece(name) for name in pieces}
        self._state: dict[str, dict[str, Tensor]] = {}  # parameter -> kind -> the optimiser's [C, ...]
        self._clocked = False  # the optimiser counts steps
        self._plain_clock = False  # in a number of Python's, not in a tensor
        self._held: dict[str, Tensor] = {}  # parameter -> sums [C, ...] of the gradients of the batches that wait
        self._waiting = np.zeros(count, np.int64)  # their number
        self._lr = 0.0  # of the last of them
        self.watch: AbstractContextManager[Any] = nullcontext()  # sees the module's operations (for the proof)
        self.steps = np.zeros(count, np.int64)  # optimiser steps that each client has taken
        self.batches = np.zeros(count, np.int64)  # batches that each has trained on
        self.chunk = how.chunk or max(1, count)
        self._drawn: dict[Any, Sequence[Draw]] = {}  # by the shapes of a client's rows
        self._neighbours: dict[tuple[int, int], Group] = {}
        self._places = [(*_owner(self.module, n), n) for n in (*self._parameters, *self._buffers)]

    @property
    def trains(self) -> bool:
        """Whether there is anything to train."""
        return bool(self._parameters)

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        tensors = (*self._parameters.values(), *self._buffers.values(), *self._frozen)
        return tensors[0].device if tensors else torch.device("cpu")

    # Running

    def groups(self, clients: Sequence[int], sizes: np.ndarray) -> list[Group]:
        """The groups of `clients` with batches of `sizes` rows, client after client in the merged batch."""
        who = np.asarray(clients)
        if len(who) <= self.chunk and (sizes == sizes[0]).all():  # the usual case: one group
            group = self._group(who)
            group.at, group.rows = np.arange(len(who)), slice(0, len(who) * int(sizes[0]))
            return [group]
        first = np.concatenate([[0], np.cumsum(sizes)])
        found = []
        for size in np.unique(sizes):
            mine = np.flatnonzero(sizes == size)
            for start in range(0, len(mine), self.chunk):
                at = mine[start : start + self.chunk]
                if at[-1] - at[0] == len(at) - 1:
                    rows: slice | Tensor = slice(int(first[at[0]]), int(first[at[-1] + 1]))
                else:
                    rows = torch.from_numpy((first[at][:, None] + np.arange(size)).ravel()).to(self.device)
                group = self._group(who[at])
                group.at, group.rows = at, rows
                found.append(group)
        return found

    def forward(
        self,
        group: Group,
        rows: Rows,
        generators: Generators,
        *,
        alike: bool = False,
        piece: str = "",
        fresh: bool = True,
    ) -> Rows:
        """The group's modules (of each, this `piece`) in training mode on their rows: each [c * b, ...] -> each
        [c * b, ...].

        `alike`: all its clients' models are known to be equal. `fresh`: gradients of the step before are dropped.
        Raises NotStackableError if the module uses its parameters in a way that has no stacked form.
        """
        if not self.module.training:  # setting the mode walks through all modules
            self.module.train()
        if fresh:
            for p in group.parameters.values():
                p.grad = None
            group.factors.clear()
        return self._run(self._pieces[piece], group, rows, generators, alike)

    @contextmanager
    def rehearsal(self, group: Group) -> Iterator[None]:
        """Forward passes in here do not change the group's buffers, since the real one follows later."""
        real = group.buffers
        group.buffers = {name: b.clone() for name, b in real.items()}
        try:
            yield
        finally:
            group.buffers = real

    def predict(self, clients: Sequence[int], rows: Rows, piece: str = "") -> Rows:
        """The modules of `clients` in eval mode, each on its b of the rows: [c * b, ...] -> [c * b, ...]."""
        self.module.eval()
        with torch.no_grad():
            return self._run(self._pieces[piece], self._group(np.asarray(clients)), rows, _no_generator, False)

    def step(self, group: Group, lr: float, *, last: np.ndarray) -> None:
        """One optimiser step at rate `lr`, from the gradients of the group's tensors, for clients that have no further
        batches in the step. `last` [c]: whether no batches are left in this round.
        """
        who, accumulate = group.clients, self._make_optimizer.accumulate
        self.batches[who] += 1
        if accumulate == 1:
            self._advance(group, lr)
            return
        self._hold(group, lr)
        self.put_back(group)
        due = who[(self._waiting[who] >= accumulate) | last]
        if len(due):
            self._release(due, lr)

    def settle(self) -> None:
        """Clients whose batches still wait take their step, because models are about to be read, or the round
        is over.
        """
        due = np.flatnonzero(self._waiting)
        for start in range(0, len(due), self.chunk):
            self._release(due[start : start + self.chunk], self._lr)

    def _hold(self, group: Group, lr: float) -> None:
        """Add a group's gradients to those that wait."""
        at = torch.from_numpy(group.clients).to(self.device)
        for name, p in group.parameters.items():
            if p.grad is not None:
                if name not in self._held:
                    self._held[name] = torch.zeros_like(self._parameters[name])
                self._held[name].index_add_(0, at, p.grad)
        self._waiting[group.clients] += 1
        self._lr = lr

    def _release(self, due: np.ndarray, lr: float) -> None:
        """A step of the clients `due` on the mean gradient of their batches."""
        group = self._group(due)
        batches = torch.from_numpy(self._waiting[due]).to(self.device)
        for name, p in group.parameters.items():
            p.grad = None
            if name in self._held:
                p.grad = self._sum_of(name, due) / batches.to(p.dtype).view(-1, *[1] * (p.dim() - 1))
        self._forget_sums(due)
        self._waiting[due] = 0
        self._advance(group, lr)

    def _sum_of(self, name: str, due: np.ndarray) -> Tensor:
        """The waiting gradients of a parameter for these clients: [c, ...]."""
        return self._held[name][torch.from_numpy(due).to(self.device)]

    def _forget_sums(self, due: np.ndarray) -> None:
        """Nothing waits any longer for these clients."""
        at = torch.from_numpy(due).to(self.device)
        for held in self._held.values():
            held[at] = 0.0

    def _advance(self, group: Group, lr: float) -> None:
        """Clip, and step."""
        who = group.clients
        if self._make_optimizer.clip is not None:
            clip(group.gradients, self._make_optimizer.clip)
        taken = self.steps[who]
        if self._rule.plain:
            self._descend(group, lr)
        elif self._direct is not None and group.views and (taken == taken[0]).all():
            self._step_directly(self._direct, group, int(taken[0]), lr)
        else:
            _multiply_out(group)
            counts = np.unique(taken)
            for count in counts:
                at = np.flatnonzero(taken == count) if len(counts) > 1 else None
                self._optimize(group, at, int(count), lr)
        self.put_back(group)
        self.steps[who] += 1

    def put_back(self, group: Group) -> None:
        """Write a group's parameters and buffers into the stack, if they are not views of it."""
        if group.views:
            return
        at = torch.from_numpy(group.clients).to(self.device)
        with torch.no_grad():
            for mine, theirs in ((self._parameters, group.parameters), (self._buffers, group.buffers)):
                for name, tensor in theirs.items():
                    mine[name][at] = tensor

    # Moving models

    def average(self, weights: Mapping[int, float], rule: Averaging | None = None, origin: State | None = None) -> None:
        """Set all copies to the weighted mean of those in `weights`, and integer buffers to their largest value; or to
        the result of another `rule`, given their `origin`.
        """
        if rule is not None and not rule.plain:
            self._average_by(rule, weights, origin)
            return
        who = torch.tensor(list(weights), device=self.device)
        share = shares_of(weights, self.device)
        for tensor in self._moving().values():
            chosen = tensor if len(who) == self.count else tensor[who]
            tensor.copy_(mean_of(chosen, share).expand_as(tensor))

    def average_momentum(self, weights: Mapping[int, float]) -> None:
        """The momentum of those in `weights` that have stepped := its weighted mean, where the optimiser has one."""
        stepped = {client: weight for client, weight in weights.items() if self.steps[client]}
        total = sum(stepped.values())
        if len(stepped) < 2 or not total > 0:
            return
        who = torch.tensor(list(stepped), device=self.device)
        share = [weight / total for weight in stepped.values()]
        for kinds in self._state.values():
            for tensor in (kinds[kind] for kind in MOMENTUM if kind in kinds):
                factors = torch.tensor(share, dtype=tensor.dtype, device=tensor.device)
                tensor[who] = torch.tensordot(factors, tensor[who], 1).expand(len(who), *tensor.shape[1:])

    def _average_by(self, rule: Averaging, weights: Mapping[int, float], origin: State | None) -> None:
        """Set all copies to the result of a rule for those in `weights`."""
        tensors, who = self._moving(), torch.tensor(list(weights), device=self.device)
        models = {name: tensor[who] for name, tensor in tensors.items()}
        for name, one in combined(models, list(weights.values()), rule, origin).items():
            tensors[name].copy_(one.expand_as(tensors[name]))

    def _moving(self) -> dict[str, Tensor]:
        """The tensors that are averaged: all that are persistent and not apart."""
        tensors = {**self._parameters, **self._buffers}
        return {n: tensors[n] for n in self.module.state_dict() if n in tensors and n not in self._apart}

    @contextmanager
    def averaged(self, weights: Mapping[int, float], rule: Averaging, origin: State | None) -> Iterator[None]:
        """All copies are their average meanwhile."""
        before = copy.deepcopy(self.state())
        self.average(weights, rule, origin)
        try:
            yield
        finally:
            self.take(before)

    def load_one(self, client: int, state: Mapping[str, Tensor]) -> None:
        """Give one client the parameters and buffers in `state`."""
        for name, tensor in (*self._parameters.items(), *self._buffers.items()):
            if name in state:
                tensor[client] = state[name]

    def load_all(self, state: Mapping[str, Tensor]) -> None:
        """Give all clients the parameters and buffers in `state`."""
        for name, tensor in (*self._parameters.items(), *self._buffers.items()):
            if name in state:
                tensor.copy_(state[name].expand_as(tensor))

    def state_of(self, client: int) -> dict[str, Tensor]:
        """One client's parameters and buffers, under the module's names."""
        tensors = {**self._parameters, **self._buffers}
        own = self.module.state_dict()
        return {name: tensors[name][client] if name in tensors else frozen for name, frozen in own.items()}

    def optimizer_bytes(self, client: int) -> int:
        """Bytes of one client's optimiser state, its step counter (4 bytes per parameter tensor) included."""
        if not self.steps[client]:
            return 0
        tensors = [t for kinds in self._state.values() for t in kinds.values()]
        clock = (8 if self._plain_clock else 4) * len(self._state) if self._clocked else 0
        return sum(t[0].nbytes for t in tensors) + clock

    def state(self) -> dict[str, Any]:
        """Everything, stacked."""
        return {
            "parameters": dict(self._parameters),
            "buffers": dict(self._buffers),
            "optimizer": {name: dict(kinds) for name, kinds in self._state.items()},
            "clocked": self._clocked,
            "plain clock": self._plain_clock,
            "steps": self.steps.tolist(),
            "batches": self.batches.tolist(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take a state that `state()` returned, from a file. Raises MalformedError."""
        state = self._spread_out(state) if "models" in state else state
        found = checked(state, _StackState, "the copies")
        sized(found.steps, self.count, "steps")
        sized(found.batches or found.steps, self.count, "batches")
        self._check(found.parameters, found.buffers, found.optimizer)
        self.take(state)

    def take(self, state: Mapping[str, Any]) -> None:
        """Take a state that `state()` returned in this process."""
        for mine, theirs in ((self._parameters, state["parameters"]), (self._buffers, state["buffers"])):
            for name, tensor in mine.items():
                tensor.copy_(theirs[name])
        self._state = {
            name: {kind: laid_as(t.to(self.device, copy=True), self._parameters[name]) for kind, t in kinds.items()}
            for name, kinds in state["optimizer"].items()
        }
        self._clocked = state["clocked"]
        self._plain_clock = state.get("plain clock", False)
        self.steps = np.array(state["steps"], np.int64)
        self.batches = np.array(state.get("batches", state["steps"]), np.int64)

    def _spread_out(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The state of a stack whose copies are on disk, in the form of a stack in memory. Raises MalformedError."""
        found = checked(state, ShelvedState, "the copies")
        parameters: dict[str, Tensor] = {}
        buffers: dict[str, Tensor] = {}
        for shelf in (found.models, found.apart):
            for name, many in spread_out(shelf, self.count, "the copies").items():
                like = self._buffers.get(name, self._parameters.get(name, many))
                (buffers if name in self._buffers else parameters)[name] = laid_as(many, like)
        optimizer: dict[str, dict[str, Tensor]] = {}
        for name, many in spread_out(found.moments, self.count, "the optimiser of the copies").items():
            parameter, _, kind = name.rpartition("/")
            optimizer.setdefault(parameter, {})[kind] = many
        counted = {"steps": found.steps, "batches": found.batches}
        clock = {"clocked": found.clocked, "plain clock": found.plain_clock}
        return {"parameters": parameters, "buffers": buffers, "optimizer": optimizer, **clock, **counted}

    def _check(
        self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], optimizer: Mapping[str, Any]
    ) -> None:
        """Raises MalformedError unless these are the tensors of all copies."""
        fit(parameters, self._parameters, "the copies")
        fit(buffers, self._buffers, "the copies")
        self._check_optimizer(optimizer)

    def _check_optimizer(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The optimiser's state of every parameter for all clients, from that of one client. Raises MalformedError."""
        alone = {name: p[:1].clone().requires_grad_() for name, p in self._parameters.items()} if state else {}
        optimizer = self._make_optimizer(alone.items()) if alone else None
        like = None if optimizer is None else after_a_step(optimizer)
        kept = None if like is None else {kind for values in like.values() for kind in values} - {"step"}
        for name, kinds in state.items():
            if name not in self._parameters or (kept is not None and not kinds.keys() <= kept):
                raise MalformedError(
                    f"the optimiser of the copies keeps {sorted(kinds)} of {name!r}: not its own state"
                )
            for kind, tensor in kinds.items():
                mine = self._parameters[name]
                fits(tensor, mine.to(tensor.dtype), f"the optimiser of the copies: {kind!r} of {name!r}")

    # Inside

    def _group(self, clients: np.ndarray) -> Group:
        first, last = int(clients[0]), int(clients[-1])
        if last - first == len(clients) - 1 and (np.diff(clients) == 1).all():
            if (first, last) not in self._neighbours:
                if len(self._neighbours) > 64:  # sampled clients: neighbours by chance are not worth keeping
                    self._neighbours.clear()
                self._neighbours[first, last] = self._take(clients, slice(first, last + 1), True)
            return self._neighbours[first, last]
        return self._take(clients, torch.from_numpy(clients).to(self.device), False)

    def _take(self, clients: np.ndarray, at: slice | Tensor, views: bool) -> Group:
        # `.data`: autograd must not take a step of one group for a change of another group's tensors.
        parameters = {n: p[at].data.requires_grad_() for n, p in self._parameters.items()}
        return Group(clients, views, parameters, {n: b[at].data for n, b in self._buffers.items()})

    def _piece(self, name: str) -> _Piece:
        module, prefix = self.module.get_submodule(name), f"{name}." if name else ""
        trained = [n.removeprefix(prefix) for n in self._trained if n.startswith(prefix)]
        chained = self.way == "lowered" and not any(n.startswith(prefix) for n in self._buffers)
        return _Piece(module, prefix, Chain.of(module, trained) if chained else None)

    def _run(self, piece: _Piece, group: Group, rows: Rows, generators: Generators, alike: bool) -> Rows:
        tensors = piece.of({**group.parameters, **group.buffers})
        names = group.clients.tolist()
        if self.way == "mapped":
            return self._mapped(piece, group, rows, [partial(generators, name) for name in names])
        if self.way == "each":
            return self._each(piece.module, tensors, names, rows, generators)

        def leave(weight: Tensor, factors: Factors) -> None:
            name = next(n for n, p in group.parameters.items() if p is weight)
            group.factors.setdefault(name, []).append(factors)

        chain = piece.chain
        if chain is not None and self.module.training and not alike and chain.takes(rows[0]):
            return (chain(rows[0], piece.bare(group.parameters), leave if self._by_factors else None),)
        self._install(tensors)
        try:
            lowered = Lowered(
                len(names),
                piece.bare(tensors),
                lambda i: generators(names[i]),
                alike=alike,
                frozen=self._frozen,
                channels_last=getattr(piece.module, "images_channels_last", False),
                leave=leave if self._by_factors else None,
                chosen=self.forms,
                choose=self._choose,
            )
            with lowered, self.watch:
                given = piece.module(rows)
        finally:
            self._install({})
        return as_tuple(given)

    def _each(
        self,
        module: nn.Module,
        tensors: Mapping[str, Tensor],
        names: Sequence[int],
        rows: Rows,
        generators: Generators,
    ) -> Rows:
        """The same copy by copy, as each computes alone; its backward pass stacks their gradients."""
        apart = [r.chunk(len(names)) for r in rows]
        own = {name: t.unbind(0) for name, t in tensors.items()}
        given = []
        try:
            draws = module.training and getattr(module, "draws", True)
            with seeds.streams(self.device) if draws else nullcontext() as draw_from:
                for i, name in enumerate(names):
                    self._install({n: copies[i] for n, copies in own.items()})
                    if draw_from is not None:
                        draw_from(generators(name))
                    with self.watch:
                        given.append(as_tuple(module(tuple(a[i] for a in apart))))
        finally:
            self._install({})
        return tuple(torch.cat(parts) for parts in zip(*given, strict=True))

    def _mapped(
        self, piece: _Piece, group: Group, rows: Rows, generators: Sequence[Callable[[], torch.Generator]]
    ) -> Rows:
        """The same through `vmap`, for modules that use their parameters in ways that are not lowered."""
        clients = len(group.clients)

        def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], mine: Rows, masks: Rows) -> Any:
            with Masked(masks):
                return functional_call(piece.module, (parameters, buffers), (mine,))

        apart = tuple(r.view(clients, -1, *r.shape[1:]) for r in rows)
        masks = drawn(self._draws(piece, group, tuple(r[0] for r in apart)), generators)
        with self.watch:
            own = piece.bare(group.parameters), piece.bare(group.buffers)
            given = vmap(one, randomness="error")(*own, apart, masks)
        return tuple(g.flatten(0, 1) for g in as_tuple(given))

    def _draws(self, piece: _Piece, group: Group, rows: Rows) -> Sequence[Draw]:
        """The masks that one client draws for rows of these shapes, in order."""
        if not self.module.training:
            return ()
        key = (piece.prefix, tuple((r.shape, r.dtype) for r in rows))
        if key not in self._drawn:
            stacked = piece.bare({**group.parameters, **group.buffers})
            tensors = {n: t[0].detach().clone() for n, t in stacked.items()}
            with torch.no_grad(), Listening() as listening:
                functional_call(piece.module, tensors, (rows,))
            self._drawn[key] = listening.draws
        return self._drawn[key]

    def _install(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the module's own parameters and buffers by these tensors (or restore its own)."""
        for places, key, own, name in self._places:
            places[key] = tensors.get(name, own)

    def _descend(self, group: Group, base: float) -> None:
        """Plain gradient descent: w <- (1 - lr * decay) w - lr g, factors multiplied directly into the weights."""
        with torch.no_grad():
            for name in self._trained:
                factor, weight_decay = self._rule.rates_of(self._called[name])
                lr = base * factor
                p, factors = group.parameters[name].detach(), group.factors.get(name, [])
                gradient = group.parameters[name].grad
                if gradient is None and not factors:
                    continue
                keep = 1.0 - lr * weight_decay
                for part in factors:
                    part.add_to(p, keep, -lr)
                    keep = 1.0
                if gradient is not None:
                    descend(p, gradient, lr, 0.0 if factors else weight_decay)

    def _step_directly(self, direct: Descent, group: Group, taken: int, base: float) -> None:
        """A step of neighbours who have all taken `taken` of them; the stacked state is changed in place."""
        span = slice(int(group.clients[0]), int(group.clients[-1]) + 1)
        self._clocked, self._plain_clock = direct.clocked, False
        with torch.no_grad():
            for name in self._trained:
                weight, factors = group.parameters[name], group.factors.get(name, [])
                if weight.grad is None and not factors:
                    continue
                if name not in self._state:
                    self._state[name] = {kind: torch.zeros_like(self._parameters[name]) for kind in direct.kinds}
                factor, decay = self._rule.rates_of(self._called[name])
                moments = self._moments(name, span)
                direct.take(weight.detach(), weight.grad, factors, moments, base * factor, decay, taken)
                self._put_moments(name, moments, span)

    def _moments(self, name: str, span: slice | Tensor) -> dict[str, Tensor]:
        """The optimiser's state of a parameter for some clients: kind -> [c, ...]; views for neighbours."""
        return {kind: t[span] for kind, t in self._state.get(name, {}).items()}

    def _put_moments(self, name: str, moments: Mapping[str, Tensor], span: slice | Tensor) -> None:
        """Store the state of neighbours after a step; here it was changed in place."""

    def _optimize(self, group: Group, at: np.ndarray | None, taken: int, lr: float) -> None:
        """The optimiser's own step for the clients at positions `at` (None: all), who have all taken `taken` steps."""
        names = [n for n in self._trained if group.parameters[n].grad is not None]
        where = None if at is None else torch.from_numpy(at).to(self.device)
        slices = {}
        for name in names:
            p = group.parameters[name]
            assert p.grad is not None
            slices[name] = (p if where is None else p[where]).detach().requires_grad_()
            slices[name].grad = laid_as(p.grad if where is None else p.grad[where], slices[name])
        who = group.clients if at is None else group.clients[at]
        span: slice | Tensor = torch.from_numpy(who).to(self.device)
        if group.views and at is None:
            span = slice(int(who[0]), int(who[-1]) + 1)
        optimizer = self._make_optimizer((self._called[name], part) for name, part in slices.items())
        if optimizer is None:
            return
        self._rule.quicken(optimizer)
        set_lr(optimizer, lr)
        if taken:
            for name, part in slices.items():
                state = {kind: laid_as(t, part) for kind, t in self._moments(name, span).items()}
                clock: dict[str, Any] = {"step": taken}
                if not self._plain_clock:
                    clock["step"] = torch.tensor(float(taken), device=self._rule.clock_device(part))
                optimizer.state[part] = {**(clock if self._clocked else {}), **state}
        before = {name: dict(optimizer.state[part]) if taken else {} for name, part in slices.items()}
        optimizer.step()
        with torch.no_grad():
            for name, part in slices.items():
                if where is not None:
                    group.parameters[name].detach()[where] = part
                self._keep(name, optimizer.state[part], before[name], span)

    def _keep(self, name: str, state: Mapping[str, Any], before: Mapping[str, Any], span: slice | Tensor) -> None:
        """Write an optimiser's state of some clients into the stacked state, if it is not a view of it."""
        kinds = self._state.setdefault(name, {})
        for kind, value in state.items():
            if kind == "step":
                self._clocked, self._plain_clock = True, not isinstance(value, Tensor)
            elif value is not None and not (isinstance(span, slice) and value is before.get(kind) and kind in kinds):
                if kind not in kinds:
                    kinds[kind] = torch.zeros_like(self._parameters[name], dtype=value.dtype)
                kinds[kind][span] = value


def shares_of(weights: Mapping[int, float], device: torch.device) -> Tensor:
    """The weights, in order, divided by their sum."""
    share = torch.tensor(list(weights.values()), dtype=torch.float64)
    return (share / share.sum()).to(device, dtype=None if device.type != "mps" else torch.float32)


def mean_of(rows: Tensor, share: Tensor) -> Tensor:
    """The weighted mean [...] of tensors [c, ...]; for integers, the largest."""
    if not is_continuous(rows):
        return rows.amax(0)
    return (share.to(rows.dtype) @ rows.reshape(len(rows), -1)).view(rows.shape[1:])


def _multiply_out(group: Group) -> None:
    """Gradients that were left as factors, multiplied out."""
    for name, factors in group.factors.items():
        p = group.parameters[name]
        for part in factors:
            product = part.product().to(p.dtype)
            p.grad = product if p.grad is None else p.grad + product


def clip(gradients: Sequence[Tensor], largest: float) -> None:
    """Scale each client's gradients [c, ...], all its parameters together, down to a norm of at most `largest`: what
    torch's `clip_grad_norm_` does for each alone.
    """
    if not gradients:
        return
    clients = len(gradients[0])
    norms = torch.stack([torch.linalg.vector_norm(g.reshape(clients, -1), dim=1) for g in gradients])
    scale = (largest / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
    for g in gradients:
        g.mul_(scale.view(-1, *[1] * (g.dim() - 1)).to(g.dtype))


def descend(weight: Tensor, gradient: Tensor, lr: float, weight_decay: float) -> None:
    """Plain gradient descent, in place: w <- (1 - lr * decay) w - lr g."""
    if weight_decay:
        weight.mul_(1.0 - lr * weight_decay)
    weight.add_(gradient, alpha=-lr)


def _owner(module: nn.Module, name: str) -> tuple[dict[str, Any], str, Any]:
    """(dictionary, key, value) of the place of the parameter or buffer `name`."""
    prefix, _, key = name.rpartition(".")
    owner = module.get_submodule(prefix)
    places: dict[str, Any] = owner._parameters if key in owner._parameters else owner._buffers
    return places, key, places[key]


def _no_generator(client: int) -> torch.Generator:
    raise AssertionError("nothing draws in eval mode")
