"""The obvious engine: clients one after another in this process. Slow, and the reference for every other engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import msgspec
import torch
from torch import Tensor, nn

from cutlayer import seeds
from cutlayer.adapters import beyond, narrow
from cutlayer.adjustment import adjusted
from cutlayer.averaging import average, average_into
from cutlayer.cohort import Footprint, Predict, Summed
from cutlayer.data.samples import Samples
from cutlayer.eager import backward
from cutlayer.engine.simulated import (
    Clients,
    CohortState,
    Local,
    Shape,
    SimulatedCohort,
    gradient_bytes,
    mass_of,
    model_bytes,
    together,
)
from cutlayer.errors import NonFiniteError
from cutlayer.frozen import load_moving, moving, resting
from cutlayer.gradients import descending, gradient_of, mean_loss
from cutlayer.models.parts import Part
from cutlayer.optim import MakeOptimizer, Stepping, as_tensor, load_optimizer, restore_optimizer
from cutlayer.scoring import Outputs, evaluation
from cutlayer.server import finite
from cutlayer.stored import Stored, checked, fit, sized
from cutlayer.tasks import Task
from cutlayer.tasks.classification import Classification
from cutlayer.types import (
    CutGradients,
    Evaluation,
    Round,
    Rows,
    Smashed,
    Step,
    TailGradients,
    aligned,
    as_tuple,
    by_cut,
)
from cutlayer.verbs import VERBS


class Client:
    """One client: private data, its part of the model, its optimiser. `tail` is the last part of the model in a
    U-shaped split, or an auxiliary head. `task` defines the loss of a row (default: the cross entropy of its class).
    `shift` [K] is added to the scores in a loss that is computed here. Its draws are named after `called`, its number
    among all clients (default: `name`).
    """

    def __init__(
        self,
        name: int,
        lower: nn.Module,
        tail: nn.Module | None,
        make_optimizer: MakeOptimizer,
        task: Task | None = None,
        shift: Tensor | None = None,
        called: int | None = None,
    ) -> None:
        self.name, self.lower, self.tail = name, lower, tail
        self.called = name if called is None else called
        self.task, self.shift = task or Classification(), shift
        self.module = nn.ModuleDict({"lower": lower} if tail is None else {"lower": lower, "tail": tail})
        self.weights = list(self.module.parameters())
        self.stepping = Stepping(make_optimizer, _named(lower, tail))
        self.optimizer = self.stepping.optimizer
        self.smashed: Rows = ()  # of the last forward pass, with its graph
        self.labels = torch.empty(0)
        self.clock = 0  # batches drawn before this one

    def forward(self, batch: Samples, seed: int, clock: int) -> Rows:
        """Run the lower part on a batch in training mode: smashed data, each [b, s...]."""
        self.labels, self.clock = batch.y, clock
        if not self.module.training:  # setting the mode walks through all modules
            self.module.train()
        for p in self.weights:
            p.grad = None
        with seeds.seeded_for(self.lower, seed, "forward", self.called, clock, device=batch.y.device):
            self.smashed = self.lower(batch.rows)
        return self.smashed

    def backward(self, gradient: Rows) -> None:
        """Back-propagate `gradient` from the cut; gradients are added to those of the tail."""
        if pairs := descending(self.smashed, aligned(gradient)):
            backward([s for s, _ in pairs], [g for _, g in pairs])
        self.smashed = ()

    def step(self, lr: float, *, last: bool) -> None:
        """One optimiser step at rate `lr`, if no further batches belong to it; `last`: no batches are left in this
        round. Raises NonFiniteError instead, naming the client.
        """
        if self.optimizer is None:
            return
        if not finite(*(p.grad for p in self.weights if p.grad is not None)):
            raise NonFiniteError("weight gradient", (self.name,))
        self.stepping.take(lr, last=last)

    def gradient(self) -> dict[str, Tensor]:
        """The gradient of every trained parameter, by its name. Raises NonFiniteError, naming the client."""
        found = {name: gradient_of(p) for name, p in self.module.named_parameters() if p.requires_grad}
        if not finite(*found.values()):
            raise NonFiniteError("weight gradient", (self.name,))
        return found

    def take(self, gradient: Mapping[str, Tensor], lr: float, *, last: bool) -> None:
        """A step as `step` takes it, with this gradient."""
        for name, p in self.module.named_parameters():
            if p.requires_grad:
                p.grad = gradient[name].clone()
        self.smashed = ()
        self.step(lr, last=last)

    def finish(self, features: Rows, seed: int) -> tuple[Tensor, list[Tensor]]:
        """U-shaped split: the tail continues from `features`, each [b, f...]. Returns the mean loss over the rows, and
        its gradients with respect to the features. Raises NonFiniteError, naming the client.
        """
        assert self.tail is not None, "only the U-shaped split has tails"
        leaves = tuple(r.detach().requires_grad_(r.is_floating_point()) for r in aligned(features))
        with seeds.torch_seeded(seed, "tail", self.called, self.clock, device=self.labels.device):
            loss = self._mean_loss(as_tuple(self.tail(leaves)))
        if not torch.isfinite(loss):
            raise NonFiniteError("loss", (self.name,))
        loss.backward()
        return loss.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]

    def learn(self, outputs: Rows, lr: float, *, last: bool) -> Local:
        """A whole model's step on the batch that gave `outputs`. Raises NonFiniteError."""
        loss = self._mean_loss(outputs)
        if not torch.isfinite(loss):
            raise NonFiniteError("loss", (self.name,))
        loss.backward()
        self.step(lr, last=last)
        self.smashed = ()
        return Local(loss.item(), len(self.labels), self.mass)

    def learn_alone(self, seed: int, lr: float, *, last: bool) -> Local:
        """A step on the auxiliary head's loss of the batch that was forwarded last. Raises NonFiniteError."""
        assert self.tail is not None, "an algorithm that needs LEARN has auxiliary heads"
        with seeds.torch_seeded(seed, "auxiliary", self.called, self.clock, device=self.labels.device):
            outputs = as_tuple(self.tail(self.smashed))
        return self.learn(outputs, lr, last=last)

    @property
    def mass(self) -> float:
        """The total weight of the rows of the batch."""
        return mass_of(self.task, self.labels)

    def _mean_loss(self, outputs: Rows) -> Tensor:
        outputs = adjusted(outputs, self.shift, self.task)
        return mean_loss(self.task.row_losses(outputs, self.labels), self.task.weights(self.labels))

    def footprint(self) -> Footprint:
        """Bytes of the model, of the optimiser's state and of the gradient."""
        model = model_bytes(self.module)
        gradient = gradient_bytes(self.module)
        if self.optimizer is None:
            return Footprint(model, 0)
        tensors = [as_tensor(v) for s in self.optimizer.state.values() for v in s.values() if v is not None]
        return Footprint(model, sum(t.nbytes for t in tensors), gradient)


def _named(lower: nn.Module, tail: nn.Module | None) -> list[tuple[str, Tensor]]:
    """A client's parameters under the names of the whole model; an auxiliary head's are auxiliary.NAME. A parameter
    that both ends share has its first name.
    """
    parts = [(lower, "")] if tail is None else [(lower, ""), (tail, "" if isinstance(tail, Part) else "auxiliary.")]
    named = [(f"{prefix}{name}", p) for part, prefix in parts for name, p in part.named_parameters()]
    first = {id(p): name for name, p in reversed(named)}
    return [(name, p) for name, p in named if first[id(p)] == name]


def outputs_with(client: Client, shape: Shape, x: Rows, predict: Predict) -> Tensor:
    """One client's model with the server's, in eval mode: [n, ...]."""
    client.module.eval()
    rows: Rows = client.lower(x)
    if shape != "whole":
        rows = predict([client.name], rows)
    return as_tuple(client.tail(rows))[0] if shape == "u-shaped" and client.tail is not None else rows[0]


def named_as_whole(state: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """A client's `module.state_dict()` under the names of the whole model; an auxiliary head's are auxiliary.NAME."""
    return {name_in_whole(name, shape): tensor for name, tensor in state.items()}


def name_in_whole(name: str, shape: Shape) -> str:
    """The name in the whole model of a client's lower.NAME or tail.NAME."""
    part, _, own = name.partition(".")
    return own if part == "lower" or shape == "u-shaped" else f"auxiliary.{own}"


class LocalCohort(SimulatedCohort):
    """All clients in this process, one after another."""

    can: ClassVar[frozenset[str]] = VERBS

    def __init__(self, setup: Clients) -> None:
        super().__init__(setup)
        self._clients = [
            Client(
                k,
                *model,
                setup.make_optimizer,
                setup.task,
                None if setup.shifts is None else setup.shifts[k],
                setup.called(k),
            )
            for k, model in enumerate(setup.models)
        ]
        self._asked: tuple[int, ...] = ()  # the clients of the last forward pass
        if setup.alike:
            self._begin_from(self._whole([0])[0])

    def footprint(self, client: int) -> Footprint:
        """Bytes of the client's model and optimiser state, and of its gradient."""
        size, ranks = self._clients[client].footprint(), self.setup.ranks
        if not ranks:
            return size
        less = beyond(self._clients[client].module, ranks[client])
        return replace(size, model=size.model - less, gradient=size.gradient - less)

    def forward(self, clients: Sequence[int] | None = None, *, labels: bool = True) -> Smashed:
        """Every participant (or each of `clients`) that has batches left in this round sends smashed data and
        labels.
        """
        self._asked = self._willing(clients)
        if not self._asked:
            return Smashed((), torch.empty(0), (), ())
        self._foresee(self._asked)
        sent = [self._forward_one(k, len(self._asked)) for k in self._asked]
        self._drift()
        of = [self._clients[k].labels for k in self._asked]
        sizes = tuple(len(y) for y in of)
        if self.setup.cuts:
            own = {k: tuple(r.detach() for r in rows) for k, rows in zip(self._asked, sent, strict=True)}
            smashed = self._smashed((), torch.cat(of), self._asked, sizes, labels)
            return replace(smashed, parts=by_cut(own, self.setup.cuts))
        rows = tuple(torch.cat([s[i].detach() for s in sent]) for i in range(len(sent[0])))
        return self._smashed(rows, torch.cat(of), self._asked, sizes, labels)

    def _forward_one(self, client: int, among: int = 1) -> Rows:
        """A client's smashed data of its next batch; in each step, `among` clients draw one."""
        batch, _, (clock,) = self._draw([client], among)
        return self._clients[client].forward(batch, self.setup.seed, int(clock))

    def tail(self, features: Smashed) -> TailGradients:
        """Each client's tail finishes its rows of `features` with the client's own mean loss."""
        rows, losses = [], []
        for k in features.clients:
            loss, own = self._clients[k].finish(features.only(k).rows, self.setup.seed)
            rows.append(own)
            losses.append(loss)
        cat = tuple(torch.cat(parts) for parts in zip(*rows, strict=True))
        masses = tuple(self._clients[k].mass for k in features.clients)
        return TailGradients(cat, torch.stack(losses), features.clients, features.sizes, masses=masses)

    def backward(self, gradients: CutGradients) -> None:
        """Every client of the last `forward` back-propagates what it received and takes its optimiser step."""
        for k in self._asked:
            client = self._clients[k]
            client.backward(gradients.for_client(k, len(client.labels)))
        for k in self._asked:
            self._clients[k].step(self._rate, last=not self._quota[k])
        self._alike = len(self._clients) == 1

    def backward_together(self, gradients: CutGradients) -> Summed:
        """Every client of the last `forward` back-propagates what it received; all step with the sum."""
        for k in self._asked:
            client = self._clients[k]
            client.backward(gradients.for_client(k, len(client.labels)))
        total = self.setup.summed([self._clients[k].gradient() for k in self._asked], self._clients[0].module)
        last = not self._quota[list(self._participants)].any()
        for client in self._clients:
            client.take(total, self._rate, last=last)
        if any(True for _ in self._clients[0].module.buffers()):  # running statistics are each client's own
            self._alike = len(self._clients) == 1
        return Summed(self._asked, tuple(range(len(self._clients))))

    def learn(self, steps: int) -> list[Step]:
        """Each participant takes up to `steps` steps on its auxiliary head's loss."""
        for k in set(self._participants) - set(self._asked):
            self._clients[k].smashed = ()  # of an earlier forward pass
        taken = {k: self._learn_one(self._clients[k], steps) for k in self._participants}
        taken = {k: own for k, own in taken.items() if own}
        self._alike = len(self._clients) == 1
        return [together(taken, t) for t in range(max(map(len, taken.values()), default=0))]

    def _learn_one(self, client: Client, steps: int) -> list[Local]:
        """The local steps of one client on its auxiliary head's loss."""
        taken: list[Local] = []
        while len(taken) < steps and (client.smashed or self._quota[client.name] > 0):
            if not client.smashed:
                self._forward_one(client.name)
            try:
                last = not self._quota[client.name]
                taken.append(client.learn_alone(self.setup.seed, self._rate, last=last))
            except NonFiniteError as error:
                raise error.at(len(taken)) from None
        return taken

    def align(self, heads: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Each client of `heads` takes its head."""
        for k, state in heads.items():
            head = self._clients[k].tail
            assert head is not None, "an algorithm that needs ALIGN has auxiliary heads"
            head.load_state_dict(dict(state))

    def fit(self) -> list[Step]:
        """Each participant takes all its local steps of this round."""
        taken = {k: self._fit_one(self._clients[k]) for k in self._participants}
        self._alike = len(self._clients) == 1
        return [together(taken, t) for t in range(max(map(len, taken.values())))]

    def _fit_one(self, client: Client) -> list[Local]:
        """The local steps of one client with a whole model."""
        taken: list[Local] = []
        while self._quota[client.name] > 0:
            outputs = self._forward_one(client.name)
            try:
                taken.append(client.learn(outputs, self._rate, last=not self._quota[client.name]))
            except NonFiniteError as error:
                raise error.at(len(taken)) from None
        return taken

    def begin_round(self, index: int, total: int, lr_factor: float) -> Round:
        """As for all; unfinished steps of the round before come first, at its rate."""
        self._settle()
        return super().begin_round(index, total, lr_factor)

    def average(self, weights: Mapping[int, float]) -> tuple[int, ...]:
        """Set all client models to the average of those in `weights`. Optimiser states are not averaged."""
        self._settle()
        if (beside := self.setup.beside) is not None:
            one = average(self._whole(list(weights)), list(weights.values()), self.setup.rule, self._origin)
            self._begin_from(one)
            for client in self._clients:
                load_moving(client.module, {name: one[name] for name in moving(client.module)})
            beside.take(one)
            self._alike = True
            return tuple(weights)
        others = self._passed_over(weights)
        everybody = [client.module for client in self._clients if client.name not in others]
        first, models = everybody[0], [self._clients[k].module for k in weights]
        average_into(first, models, list(weights.values()), self.setup.rule, self._origin)
        self._begin_from(moving(first))
        for module in everybody[1:]:
            load_moving(module, moving(first))
        self._narrow()
        return tuple(weights)

    def _narrow(self) -> None:
        """Adapters keep their own ranks."""
        for client, rank in zip(self._clients, self.setup.ranks, strict=False):
            narrow(client.module, rank)

    def _whole(self, clients: Sequence[int]) -> list[dict[str, Tensor]]:
        """The averaged part of the models of `clients`, with the blocks that the server holds for them."""
        own, beside = {k: moving(self._clients[k].module) for k in clients}, self.setup.beside
        return list(own.values()) if beside is None else [{**own[k], **s} for k, s in beside.states(clients).items()]

    def hand_over(self, client: int, *, optimizer: bool) -> None:
        """The travelling model moves to `client`; before any client holds it, it is `client`'s own model."""
        if self._holder is not None and self._holder != client:
            self._settle()
            giver, taker = self._clients[self._holder], self._clients[client]
            load_moving(taker.module, moving(giver.module))
            if optimizer and giver.optimizer and taker.optimizer:
                load_optimizer(taker.optimizer, giver.optimizer.state_dict())
        self._holder = client

    def evaluate(self, samples: Samples, predict: Predict, clients: Sequence[int] | None = None) -> Evaluation:
        """Every client model with the server, one after another; models known to be equal are judged once."""
        self._settle()
        everyone, models = self._judged(clients)
        averaged = self._average() if self._averages else None

        def outputs_of(asked: Sequence[int], part: Samples, start: int) -> Outputs:
            (k,) = asked
            return asked, outputs_with(averaged or self._clients[k], self.shape, part.rows, predict)

        found = self.setup.judge(samples, models[:1] if averaged else models, outputs_of, at_once=1)
        return evaluation(found, everyone, len(samples))

    @property
    def _averages(self) -> bool:
        """Whether the clients' average is judged, and differs from the clients' models."""
        return self.setup.judge_by == "average" and not self._alike and self._holder is None

    def _average(self) -> Client:
        """A client with the average of all client models."""
        made = Client(0, *self.setup.models[0], self.setup.make_optimizer, self.setup.task)
        models = [client.module for client in self._clients]
        average_into(made.module, models, list(self.masses), self.setup.rule, self._origin)
        return made

    def model_state(self, client: int) -> dict[str, Tensor]:
        """One client's parameters and buffers, under the names of the whole model."""
        return named_as_whole(self._clients[client].module.state_dict(), self.shape)

    def take_everyones(self, state: Mapping[str, Tensor]) -> None:
        """Give all clients these parameters and buffers, in the form that `model_state` returns."""
        self._settle()
        for client in self._clients:
            self.take_model(client.name, state)
        self._begin_from(moving(self._clients[0].module))
        self._narrow()
        self._alike = not self.setup.ranks

    @property
    def origin(self) -> Mapping[str, Tensor] | None:
        """The last average in the form that `model_state` returns, if the averaging rule looks at it."""
        return None if self._origin is None else named_as_whole(self._origin, self.shape)

    def take_model(self, client: int, state: Mapping[str, Tensor]) -> None:
        """Give a client these parameters and buffers, in the form that `model_state` returns."""
        module = self._clients[client].module
        load_moving(module, {name: state[name_in_whole(name, self.shape)] for name in moving(module)})

    def settle(self) -> None:
        """Clients whose batches wait for a step make one."""
        self._settle()

    def _settle(self) -> None:
        for client in self._clients:
            client.stepping.settle()

    def state(self) -> dict[str, Any]:
        """Models, optimisers and clocks of all clients (between rounds there is nothing else)."""
        self._settle()
        clients = [
            {"model": self._own(c), "optimizer": c.optimizer.state_dict() if c.optimizer else {}} for c in self._clients
        ]
        shared = {} if not self.setup.cuts else {n: t for c in self._clients for n, t in resting(c.module).items()}
        return {**self._base_state(), "clients": clients, "frozen": shared or resting(self._clients[0].module)}

    def _own(self, client: Client) -> dict[str, Tensor]:
        """The tensors that a client does not share with others: all except frozen ones, and its head."""
        head = {n: t for n, t in resting(client.module).items() if self._heads_apart and n.startswith("tail.")}
        return {**moving(client.module), **head}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take a state that `state()` returned. Raises MalformedError."""
        found = checked(state, _LocalState, "the clients")
        sized(found.clients, len(self._clients), "clients")
        self._load_base(found)
        for k, (client, own) in enumerate(zip(self._clients, found.clients, strict=True)):
            frozen = found.frozen
            if self.setup.cuts:  # tensors that others hold, too
                frozen = {name: frozen[name] for name in frozen.keys() & resting(client.module).keys()}
            whole = client.module.state_dict() if frozen else moving(client.module)
            fit({**frozen, **own.model}, whole, f"the model of client {k}")
            load_moving(client.module, {**frozen, **own.model})
            restore_optimizer(client.optimizer, own.optimizer, f"the optimiser of client {k}")


class _OneClient(Stored):
    model: dict[str, Tensor]
    optimizer: dict[str, Any]


class _LocalState(CohortState, kw_only=True):
    clients: list[_OneClient]
    frozen: dict[str, Tensor] = msgspec.field(default_factory=dict)
