"""The fast engine: all clients at once, their models as stacked tensors.

A few kernels compute all clients of a step. Their tails (U-shaped split), their auxiliary heads, and the server's
copies of SplitFed V1 and V3 are stacked in the same way. Algorithms in which clients take turns (ssl, ussl) have
nothing to stack: the local engine runs them. `proof.py` says why a model cannot be stacked; everything is proved equal
to `local`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from cutlayer import seeds
from cutlayer.adapters import beyond, narrowed
from cutlayer.adjustment import Shifts, adjusted
from cutlayer.cohort import Footprint, Held, Predict
from cutlayer.data.samples import Samples
from cutlayer.eager import backward
from cutlayer.engine.descent import Descent, DirectSteps, descent
from cutlayer.engine.local import name_in_whole, named_as_whole
from cutlayer.engine.shelf import StatesFolder
from cutlayer.engine.shelved import ShelvedStack
from cutlayer.engine.simulated import Clients, CohortState, SimulatedCohort, gradient_bytes, model_bytes
from cutlayer.engine.stack import Generators, Group, Stack
from cutlayer.engine.ways import Stacking
from cutlayer.errors import NonFiniteError
from cutlayer.frozen import load_resting, resting
from cutlayer.gradients import client_means, descending, gradient_of, means_of_clients
from cutlayer.optim import MakeOptimizer, rule_of
from cutlayer.scoring import Outputs, evaluation, judged
from cutlayer.server import Server, ServerStep, culprits, finite
from cutlayer.stored import MalformedError, checked, fit
from cutlayer.tasks import Task
from cutlayer.types import CutGradients, Evaluation, Round, Rows, Smashed, Step, TailGradients, masses_of, select
from cutlayer.verbs import ALIGN, ARRIVALS, AVERAGE, BACKWARD, FIT, FORWARD, LEARN, SERVER_VERBS, STEP_COPIES, TAIL

_MERGED_ROWS = 2048
"""Rows of all clients per forward pass in evaluation. This bounds memory, and rows that fit into the cache run twice as
fast.
"""
_HELD = 256 << 20  # bytes of models of clients on disk that are kept with a trained model


class _StackedState(CohortState, kw_only=True):
    stack: dict[str, Any]
    frozen: dict[str, Tensor] = msgspec.field(default_factory=dict)


@dataclass
class _Pass:
    """A group's forward pass that waits for its gradient."""

    group: Group
    inputs: Rows
    given: Rows = ()  # with its graph; empty if it was not kept


class StackedCohort(SimulatedCohort):
    """All clients in this process, all at once."""

    can: ClassVar[frozenset[str]] = (
        frozenset({FORWARD, ARRIVALS, TAIL, BACKWARD, LEARN, ALIGN, FIT, AVERAGE}) | SERVER_VERBS
    )

    def __init__(self, setup: Clients, how: Stacking | None = None) -> None:
        super().__init__(setup)
        how = how or Stacking()
        lower, tail = setup.models[0]
        first = _as_one(lower, tail)
        pieces = ("",) if tail is None else ("lower", "tail")
        called = str if tail is None else partial(name_in_whole, shape=setup.shape)
        self._lower = pieces[0]
        parts: dict[str, Any] = {"pieces": pieces, "called": called, "apart": "tail." if self._heads_apart else None}
        kind = Stack if setup.place is None else partial(ShelvedStack, setup.place, "clients")
        self._stack = kind(first, len(setup.rows), setup.make_optimizer, how, **parts)
        if not setup.alike:
            for k, model in enumerate(setup.models):
                self._stack.load_one(k, _as_one(*model).state_dict())
        self._keep = how.keep
        self._model_bytes = model_bytes(first)
        self._gradient_bytes = gradient_bytes(first)
        self._beyond = {rank: beyond(first, rank) for rank in set(setup.ranks)}  # bytes that are not sent
        self._passes: list[_Pass] = []  # of the last forward pass
        self._asked: tuple[int, ...] = ()
        self._sizes: tuple[int, ...] = ()
        self._targets = torch.empty(0)  # of the last forward pass, merged
        self._clocks: dict[int, int] = {}
        if setup.alike:
            self._begin_from(self._stack.state_of(0))

    def footprint(self, client: int) -> Footprint:
        """Bytes of the client's model, of its optimiser's state and of its gradient."""
        less = self._beyond[self.setup.ranks[client]] if self.setup.ranks else 0
        return Footprint(self._model_bytes - less, self._stack.optimizer_bytes(client), self._gradient_bytes - less)

    def forward(self, clients: Sequence[int] | None = None, *, labels: bool = True) -> Smashed:
        """Every participant (or each of `clients`) that has batches left in this round sends smashed data and
        labels.
        """
        asked = self._willing(clients)
        if not asked:
            return Smashed((), torch.empty(0), (), ())
        self._end_passes()
        batch, groups = self._next(asked)
        self._passes = [_Pass(group, batch[group.rows].rows) for group in groups]
        rows = merged([self._run(p) for p in self._passes], groups)
        self._drift()
        self._targets = batch.y
        return self._smashed(rows, batch.y, asked, self._sizes, labels)

    def tail(self, features: Smashed) -> TailGradients:
        """Each client's tail finishes its rows of `features` with the client's own mean loss."""
        parts, own = [], torch.empty(0)
        for p in self._passes:
            group, targets = p.group, self._targets[p.group.rows]
            leaves = tuple(r[group.rows].detach().requires_grad_(r.is_floating_point()) for r in features.rows)
            losses = self._through_tail(group, leaves, targets, "tail")
            parts.append(tuple(leaf.grad for leaf in leaves if leaf.grad is not None))
            own = own if len(own) else losses.new_empty(len(self._asked))
            own[torch.from_numpy(group.at)] = losses
        masses = masses_of(self.setup.task.weights(self._targets), self._sizes)
        rows = merged(parts, [p.group for p in self._passes])
        return TailGradients(rows, own, self._asked, self._sizes, masses=masses)

    def backward(self, gradients: CutGradients) -> None:
        """Every client of the last `forward` back-propagates what it received and takes its optimiser step."""
        received = gradients.for_all(self._asked, self._sizes)
        for p in self._passes:
            given = self._given(p)
            if pairs := descending(given, tuple(g[p.group.rows] for g in received)):
                backward([s for s, _ in pairs], [g for _, g in pairs])
            del given
            check_weights(p.group)
            self._stack.step(p.group, self._rate, last=self._last(p.group))
        self._passes = []
        self._alike = len(self._quota) == 1

    def learn(self, steps: int) -> list[Step]:
        """Each participant takes up to `steps` steps on its auxiliary head's loss."""
        taken: list[Step] = []
        while len(taken) < steps:
            waiting = self._asked if self._passes else ()
            asked = tuple(k for k in self._willing(None) if k not in waiting)
            if not (waiting or asked):
                break
            try:
                parts = [self._learn_once(waiting)] if waiting else []
                if asked:
                    batch, groups = self._next(asked)
                    self._passes, self._targets = [_Pass(g, batch[g.rows].rows) for g in groups], batch.y
                    parts.append(self._learn_once(asked))
            except NonFiniteError as error:
                raise error.at(len(taken)) from None
            taken.append(_together(parts))
            self._alike = len(self._quota) == 1
        return taken

    def align(self, heads: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Each client of `heads` takes its head."""
        for k, state in heads.items():
            self._stack.load_one(k, {f"tail.{name}": tensor for name, tensor in state.items()})

    def _learn_once(self, asked: tuple[int, ...]) -> _Taken:
        """One local step of all clients in `asked`, on the batches that were drawn last."""
        own = torch.empty(0)
        for p in self._passes:
            given = self._given(p, fresh=True)
            losses = self._through_tail(p.group, given, self._targets[p.group.rows], "auxiliary")
            check_weights(p.group)
            self._stack.step(p.group, self._rate, last=self._last(p.group))
            own = own if len(own) else losses.new_empty(len(asked))
            own[torch.from_numpy(p.group.at)] = losses
        self._passes = []
        return _Taken(asked, own, self._sizes, masses_of(self.setup.task.weights(self._targets), self._sizes))

    def _through_tail(self, group: Group, rows: Rows, targets: Tensor, draw: str) -> Tensor:
        """Forward and backward pass of a group's tails (or heads) with their clients' own mean losses [c]. Their draws
        are named `draw`. Raises NonFiniteError, naming the clients.
        """
        stream = partial(self._stream, name=draw)
        alike = self._alike and not self._heads_apart
        outputs = self._stack.forward(group, rows, stream, alike=alike, piece="tail", fresh=False)
        shift = self.setup.shifts_of(group.clients, len(targets) // len(group.clients))
        return descend(group, adjusted(outputs, shift, self.setup.task), targets, self.setup.task)

    def fit(self) -> list[Step]:
        """Each participant takes all its local steps of this round: group by group, to make use of the cache."""
        everybody, alike = self._participants, self._alike
        steps: list[list[_Taken]] = []
        for start in range(0, len(everybody), self._stack.chunk):
            block = everybody[start : start + self._stack.chunk]
            self._alike, count = alike, 0
            while asked := self._willing(block):
                try:
                    taken = self._fit_once(asked)
                except NonFiniteError as error:
                    raise error.at(count) from None
                if count == len(steps):
                    steps.append([])
                steps[count].append(taken)
                self._alike, count = len(self._quota) == 1, count + 1
        return [_together(parts) for parts in steps]

    def begin_round(self, index: int, total: int, lr_factor: float) -> Round:
        """As for all; unfinished steps of the round before come first, at its rate."""
        self.settle()
        return super().begin_round(index, total, lr_factor)

    def average(self, weights: Mapping[int, float]) -> tuple[int, ...]:
        """Set all client models to the average of those in `weights`. Optimiser states are not averaged."""
        self.settle()
        others = {k: _copied(self._stack.state_of(k)) for k in self._passed_over(weights)}
        self._stack.average(weights, self.setup.rule, self._origin)
        self._begin_from(self._stack.state_of(0))
        self._narrow()
        for k, own in others.items():
            self._stack.load_one(k, own)
        return tuple(weights)

    def _narrow(self) -> None:
        """Adapters keep their own ranks."""
        for k, rank in enumerate(self.setup.ranks):
            self._stack.load_one(k, narrowed(self._stack.state_of(k), rank))

    def evaluate(self, samples: Samples, predict: Predict, clients: Sequence[int] | None = None) -> Evaluation:
        """Every client model with the server; models known to be equal are judged once."""
        self.settle()
        everyone, models = self._judged(clients)
        if self.setup.judge_by == "average" and not self._alike and self._holder is None:
            with self._stack.averaged(dict(enumerate(self.masses)), self.setup.rule, self._origin):
                return self._scored(samples, predict, everyone, [0])
        return self._scored(samples, predict, everyone, models)

    def _scored(self, samples: Samples, predict: Predict, everyone: list[int], models: list[int]) -> Evaluation:
        at_once = max(1, _MERGED_ROWS // max(1, len(samples)))

        def outputs_of(clients: Sequence[int], part: Samples, start: int) -> Outputs:
            inputs = tuple(x.repeat(len(clients), *[1] * (x.dim() - 1)) for x in part.rows)
            rows = self._stack.predict(list(clients), inputs, self._lower)
            if self.shape == "whole":
                return clients, rows[0]
            outputs = predict(clients, rows)
            if self.shape == "u-shaped":
                outputs = self._stack.predict(list(clients), outputs, "tail")
            return clients, outputs[0]

        found = self.setup.judge(samples, models, outputs_of, at_once=at_once, rows_per_pass=_MERGED_ROWS)
        return evaluation(found, everyone, len(samples))

    def model_state(self, client: int) -> dict[str, Tensor]:
        """One client's parameters and buffers, under the names of the whole model."""
        own = self._stack.state_of(client)
        return named_as_whole(own, self.shape) if self._lower else own

    def take_everyones(self, state: Mapping[str, Tensor]) -> None:
        """Give all clients these parameters and buffers, in the form that `model_state` returns."""
        self.settle()
        named = {n: state[name_in_whole(n, self.shape) if self._lower else n] for n in self._stack.state_of(0)}
        self._stack.load_all(named)
        self._begin_from(self._stack.state_of(0))
        self._narrow()
        self._alike = not self.setup.ranks

    @property
    def origin(self) -> Mapping[str, Tensor] | None:
        """The last average in the form that `model_state` returns, if the averaging rule looks at it."""
        if self._origin is None or not self._lower:
            return self._origin
        return named_as_whole(self._origin, self.shape)

    def held(self) -> Held:
        """As for all; but if states are on disk and all models would take more than 256 MiB, those of as many clients
        as fit, drawn as for evaluation (fewer, if fewer are evaluated), and the mean of all.
        """
        fit = max(2, _HELD // max(1, self._model_bytes))
        one = self._alike or self._holder is not None or self._has_average is not None
        if one or not isinstance(self._stack, ShelvedStack) or len(self._quota) <= fit:
            return super().held()
        s, mean = self.setup, self._stack.mean_state(self.samples)
        some = judged(len(self._quota), max(2, min(fit, s.eval_clients or fit)), s.seed)
        named = named_as_whole(mean, self.shape) if self._lower else mean
        return Held({k: self.model_state(k) for k in some}, everyones=False, mean=named)

    def take_model(self, client: int, state: Mapping[str, Tensor]) -> None:
        """Give a client these parameters and buffers, in the form that `model_state` returns."""
        own = self._stack.state_of(client)
        named = {name: state[name_in_whole(name, self.shape) if self._lower else name] for name in own}
        self._stack.load_one(client, named)

    def settle(self) -> None:
        """Clients whose batches wait for a step make one."""
        self._end_passes()
        self._stack.settle()

    def _end_passes(self) -> None:
        """Forward passes without a step still pass their buffers (running statistics) to the copies."""
        for p in self._passes:
            if not p.given:  # it was only a test
                with torch.no_grad():
                    how: dict[str, Any] = {"alike": self._alike, "piece": self._lower}
                    self._stack.forward(p.group, p.inputs, self._stream, **how)
            self._stack.put_back(p.group)
        self._passes = []

    def state(self) -> dict[str, Any]:
        """Models, optimisers and clocks of all clients, stacked."""
        self.settle()
        return {**self._base_state(), "stack": self._stack.state(), "frozen": resting(self._stack.module)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take a state that `state()` returned. Raises MalformedError."""
        found = checked(state, _StackedState, "the clients")
        self._load_base(found)
        self._stack.load(found.stack)
        if found.frozen:
            fit(found.frozen, resting(self._stack.module), "the frozen parameters")
        load_resting(self._stack.module, found.frozen)

    def _next(self, asked: tuple[int, ...]) -> tuple[Samples, list[Group]]:
        """The next batches of `asked`, and the groups they make."""
        batch, sizes, clocks = self._draw(asked)
        self._asked, self._sizes = asked, tuple(sizes.tolist())
        self._clocks = dict(zip(asked, clocks.tolist(), strict=True))
        return batch, self._stack.groups(asked, sizes)

    def _last(self, group: Group) -> np.ndarray:
        """Of each client of a group, whether it has no batch left in this round."""
        left: np.ndarray = self._quota[group.clients] == 0
        return left

    def _stream(self, client: int, name: str = "forward") -> torch.Generator:
        named = (name, self.setup.called(client), self._clocks[client])
        return seeds.torch_generator(self.setup.seed, *named, device=self._stack.device)

    def _given(self, p: _Pass, *, fresh: bool = False) -> Rows:
        """The outputs of a waiting pass with their graph, for the single use; `fresh`: if they must be computed again,
        earlier gradients are dropped.
        """
        given, p.given = p.given, ()
        if given:
            return given
        how: dict[str, Any] = {"alike": self._alike, "piece": self._lower, "fresh": fresh}
        return self._stack.forward(p.group, p.inputs, self._stream, **how)

    def _run(self, p: _Pass) -> Rows:
        """A group's forward pass; returns its outputs without the graph."""
        if self._keep or not self._stack.trains:
            p.given = self._stack.forward(p.group, p.inputs, self._stream, alike=self._alike, piece=self._lower)
            if not self._stack.trains:  # no step will write them back
                self._stack.put_back(p.group)
            return tuple(g.detach() for g in p.given)
        with torch.no_grad(), self._stack.rehearsal(p.group):
            return self._stack.forward(p.group, p.inputs, self._stream, alike=self._alike, piece=self._lower)

    def _fit_once(self, asked: tuple[int, ...]) -> _Taken:
        """One local step of all clients in `asked`."""
        batch, groups = self._next(asked)
        task, own = self.setup.task, torch.empty(0)
        for group in groups:
            part = batch[group.rows]
            shift = self.setup.shifts_of(group.clients, len(part) // len(group.clients))
            losses = learn(self._stack, group, part.rows, part.y, task, self._stream, self._alike, shift)
            check_weights(group)
            self._stack.step(group, self._rate, last=self._last(group))
            own = own if len(own) else losses.new_empty(len(asked))
            own[torch.from_numpy(group.at)] = losses
        return _Taken(asked, own, self._sizes, masses_of(task.weights(batch.y), self._sizes))


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state that later steps do not change."""
    return {name: tensor.clone() for name, tensor in state.items()}


class StackedServer(Server):
    """The server beside a stacked cohort; its copies per client (SplitFed V1, V3) are stacked too."""

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: MakeOptimizer,
        lr: float,
        seed: int,
        copies: int,
        how: Stacking | None = None,
        task: Task | None = None,
        place: StatesFolder | None = None,
    ) -> None:
        super().__init__(model, make_optimizer, lr, seed, task)
        self.first = 0  # the global number of the client whose copy is the first
        how = how or Stacking()
        self._rule = rule_of(make_optimizer)
        if self._optimizer is not None:
            self._rule.quicken(self._optimizer)
        self._named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if self._optimizer is not None and (how_to_step := self._directly(make_optimizer)) is not None:
            self._stepping.advance = DirectSteps(how_to_step, self._optimizer, self._named, self._rule)
        kind = Stack if place is None or not copies else partial(ShelvedStack, place, "copies")
        self._stack = kind(model, copies, make_optimizer, how)

    def step_copies(self, smashed: Smashed) -> ServerStep:
        """Every client's copy takes one step on that client's rows. Raises ConfigError if copies are not needed."""
        self._check(STEP_COPIES, "step_copies")
        self._begin(smashed.clients)
        groups, shifts = self._stack.groups(smashed.clients, np.array(smashed.sizes)), self._shifts(smashed)
        own = torch.empty(len(smashed.clients), dtype=torch.float64 if smashed.rows[0].dtype == torch.float64 else None)
        own = own.to(smashed.labels.device)
        parts = []
        for group in groups:
            rows = tuple(r[group.rows].detach().requires_grad_(r.is_floating_point()) for r in smashed.rows)
            try:
                losses, gradient = self._learn(group, rows, smashed, shifts)
            except NonFiniteError as error:  # the received rows may be the cause
                raise NonFiniteError(error.what, culprits(smashed) or error.clients) from None
            own[torch.from_numpy(group.at)] = losses.to(own.dtype)
            parts.append(gradient)
            if not finite(*parts[-1]):
                raise NonFiniteError("cut gradient", culprits(smashed) or tuple(group.clients.tolist()))
            check_weights(group, "server's weight gradient")
            self._stack.step(group, self._rate(1.0), last=np.zeros(len(group.clients), bool))
        return ServerStep(means_of_clients(own, smashed.masses), merged(parts, groups), self._rate(1.0))

    def _learn(self, group: Group, rows: Rows, smashed: Smashed, shifts: Shifts) -> tuple[Tensor, Rows]:
        """A group's own mean losses [c] and the gradients of its `rows`; those of its copies are left in the stack.

        If the clients' loss differs, it comes first, from a separate forward pass that changes nothing.
        """
        targets = smashed.labels[group.rows]

        def of(shift: Tensor | None) -> Tensor:
            mine = shift if shift is None or shift.dim() == 1 else shift[group.rows]
            return learn(self._stack, group, rows, targets, self.task, self._stream, shift=mine)

        if shifts.clients is shifts.server:
            losses = of(shifts.server)
            return losses, _gradients(rows)
        with self._stack.rehearsal(group):
            of(shifts.clients)
        gradient = _gradients(rows)
        rows = tuple(r.detach() for r in rows)
        return of(shifts.server), gradient

    def _directly(self, make: MakeOptimizer) -> Descent | None:
        """How the optimiser steps without its object, if reading its state does not make an accelerator wait."""
        on_cpu = all(p.device.type == "cpu" for _, p in self._named)
        return descent(make, torch.device("cpu")) if on_cpu else None

    def average_copies(self, weights: Mapping[int, float]) -> None:
        """Set the server model to the average of the copies of the clients in `weights`, and then every copy to the
        server model.

        Raises ConfigError if copies are not needed.
        """
        self._check(STEP_COPIES, "average_copies")
        self._begin(weights)
        self._stack.settle()
        self._stack.average(weights, self.rule, self.model.state_dict())
        self.model.load_state_dict(self._stack.state_of(0))

    def average_momentum(self, weights: Mapping[int, float]) -> None:
        """Set the momentum of the copies of the clients in `weights` to its weighted mean, if there is momentum. Raises
        ConfigError if copies are not needed.
        """
        self._check(STEP_COPIES, "average_momentum")
        self._stack.average_momentum(weights)

    def end_round(self) -> None:
        """Batches that wait for their step are used for one, in the copies too."""
        super().end_round()
        self._stack.settle()

    def state(self) -> dict[str, Any]:
        """The server's state and its stacked copies'."""
        return {**super().state(), "stack": self._stack.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take a state that `state()` returned. Raises MalformedError."""
        if "stack" not in state:
            raise MalformedError("the server lacks 'stack', its copies for the clients")
        super().load({name: value for name, value in state.items() if name != "stack"})
        self._stack.load(state["stack"])

    def _begin(self, clients: Iterable[int]) -> None:
        """A copy that has not stepped yet starts from the server's model, which may have been trained before."""
        if self._steps:
            for client in clients:
                if not self._stack.batches[client]:
                    self._stack.load_one(client, self.model.state_dict())

    def _stream(self, client: int) -> torch.Generator:
        copy_seed = seeds.derive(self.seed, "copy", self.first + client)
        name = ("server", int(self._stack.batches[client]))
        return seeds.torch_generator(copy_seed, *name, device=self._stack.device)


def _gradients(rows: Rows) -> Rows:
    """Those of the floating point rows."""
    return tuple(gradient_of(r) for r in rows if r.is_floating_point())


def learn(
    stack: Stack,
    group: Group,
    rows: Rows,
    targets: Tensor,
    task: Task,
    stream: Generators,
    alike: bool = False,
    shift: Tensor | None = None,
) -> Tensor:
    """Forward and backward pass of a group with its clients' own mean losses: these losses [c], without their graph.
    `shift` is added to the scores.

    The sum of the clients' own means keeps their gradients apart. Raises NonFiniteError, naming the clients.
    """
    outputs = adjusted(stack.forward(group, rows, stream, alike=alike), shift, task)
    return descend(group, outputs, targets, task)


def descend(group: Group, outputs: Rows, targets: Tensor, task: Task) -> Tensor:
    """Backward pass of a group from its `outputs`, with its clients' own mean losses: these losses [c]. Raises
    NonFiniteError, naming the clients.
    """
    losses = task.row_losses(outputs, targets)
    clients = len(group.clients)
    if not finite(losses.detach()):
        bad = group.clients[~torch.isfinite(losses.detach().view(clients, -1)).all(1).cpu().numpy()]
        raise NonFiniteError("loss", tuple(bad.tolist()))
    own = client_means(losses, [len(losses) // clients] * clients, task.weights(targets))
    own.sum().backward()
    return own.detach()


def merged(parts: Sequence[Rows], groups: Sequence[Group]) -> Rows:
    """The outputs of the groups, [c * b, s...] each, in the order of the merged batch."""
    if len(parts) == 1:
        return parts[0]
    whole = tuple(torch.cat(of) for of in zip(*parts, strict=True))
    places = np.concatenate([group.places for group in groups])
    if (places[:-1] < places[1:]).all():
        return whole
    order = torch.from_numpy(np.argsort(places))
    return tuple(select(r, order) for r in whole)


def check_weights(group: Group, what: str = "weight gradient") -> None:
    """Raises NonFiniteError, naming the clients, if a weight gradient is not finite."""
    left = [f for factors in group.factors.values() for f in factors]
    gradients = group.gradients
    if not (left or gradients) or (left or gradients)[0].device.type != "cpu":
        return  # a check would make an accelerator wait
    norms = [*(f.bound for f in left), *(torch.linalg.vector_norm(g) for g in gradients)]
    if all(math.isfinite(n) for n in norms):
        return
    gradients += [f.product() for f in left]
    bad = [
        int(k)
        for i, k in enumerate(group.clients)
        if not all(torch.isfinite(torch.linalg.vector_norm(g[i])) for g in gradients)
    ]
    if bad:  # otherwise only the sum over all clients overflowed
        raise NonFiniteError(what, tuple(bad))


def _as_one(lower: nn.Module, tail: nn.Module | None) -> nn.Module:
    """A client's parts as one module, with the local engine's names; only the lower part if there are no others."""
    return lower if tail is None else nn.ModuleDict({"lower": lower, "tail": tail})


class _Taken(NamedTuple):
    """A local step of some clients: their own mean losses [C], their rows, the total weights of these."""

    clients: tuple[int, ...]
    own: Tensor
    sizes: tuple[int, ...]
    masses: tuple[float, ...]


def _together(parts: list[_Taken]) -> Step:
    """One local step from those of several blocks of clients, in order."""
    own = torch.cat([part.own for part in parts])
    masses = [mass for part in parts for mass in part.masses]
    clients = [k for part in parts for k in part.clients]
    order = sorted(range(len(clients)), key=clients.__getitem__)
    if order != list(range(len(clients))):
        own, masses, clients = own[order], [masses[i] for i in order], [clients[i] for i in order]
    rows = sum(sum(part.sizes) for part in parts)
    return Step(means_of_clients(own, masses), tuple(clients), rows, mass=float(sum(masses)))
