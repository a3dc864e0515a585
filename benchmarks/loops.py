"""Loops written by hand, as references for the engines.

They are split learning and related methods as a good engineer would write them for one process, and centralised
training of the same model, which is the ceiling.

Batches are gathered beforehand. There is no bookkeeping: losses are not read, numbers are not checked, and nothing is
copied unnecessarily. PSL and SGLR run ONE server pass over the concatenated smashed data of all clients. Optimisers are
torch's with default settings. Random draws (active clients, the order of visits) are made beforehand.

Shape legend: C clients, b rows of each, R = C x b rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

MakeOptimizer = Callable[..., torch.optim.Optimizer]  # (parameters, lr=...)


@dataclass(frozen=True)
class Given:
    """The start of a loop.

    A client's `batch` has b rows. `batches` has the rows [R, ...] and targets of each step, client by client. If
    clients take turns, a step has the rows of one client, whose number is in `turns`. `active` lists the clients that
    share a cut gradient in each step, and `orders` the order in which a server visits them. `server_lr` is the server's
    rate. Clients are averaged after `local_steps` steps.
    """

    client: nn.Sequential
    server: nn.Sequential
    clients: int
    batch: int
    batches: Sequence[tuple[Tensor, Tensor]]
    optimizer: MakeOptimizer
    lr: float
    server_lr: float
    local_steps: int = 1
    turns: Sequence[int] = ()
    active: Sequence[Sequence[int]] = ()
    orders: Sequence[Sequence[int]] = ()


class Loop:
    """A loop that trains step by step. `lowers` are the clients' models, `uppers` the server's model or its copies."""

    own_servers = False

    def __init__(self, given: Given) -> None:
        self.given, self.at, self.b = given, 0, given.batch
        copies = given.clients if self.own_servers else 1
        self.lowers = [copy.deepcopy(given.client) for _ in range(given.clients)]
        self.uppers = [copy.deepcopy(given.server) for _ in range(copies)]
        self.optimizers = [given.optimizer(m.parameters(), lr=given.lr) for m in self.lowers]
        self.servers = [given.optimizer(m.parameters(), lr=given.server_lr) for m in self.uppers if len(m)]
        # Each client's views of the rows of each step, made only once.
        self.own = [list(zip(x.split(self.b), y.split(self.b), strict=True)) for x, y in given.batches]

    def __call__(self, steps: int) -> None:
        """Trains this number of steps."""
        for _ in range(steps):
            self.step(self.at % len(self.given.batches))
            self.at += 1

    def step(self, index: int) -> None:
        """One step with the batches of this index."""
        raise TypeError(f"{type(self).__name__} has no step")


class Parallel(Loop):
    """PSL: one server pass; every client gets the gradient of its own mean loss."""

    def step(self, index: int) -> None:
        """Forward pass of all clients, one server step, backward pass of all clients."""
        smashed = [lower(x) for lower, (x, _) in zip(self.lowers, self.own[index], strict=True)]
        received = torch.cat([s.detach() for s in smashed]).requires_grad_()
        self.servers[0].zero_grad()
        functional.cross_entropy(self.uppers[0](received), self.given.batches[index][1]).backward()
        self.servers[0].step()
        assert received.grad is not None, "the loss reaches the smashed data"
        gradients = self.shared(received.grad.mul_(len(smashed)), index)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        torch.autograd.backward(smashed, gradients)  # up to 9% faster than one call per client
        for optimizer in self.optimizers:
            optimizer.step()

    def shared(self, gradient: Tensor, index: int) -> Sequence[Tensor]:
        """The cut gradient of each client, from `gradient` [R, s...]."""
        return gradient.split(self.b)


class Sglr(Parallel):
    """SGLR: active clients get the mean of their cut gradients. The server's rate already has its factor."""

    def shared(self, gradient: Tensor, index: int) -> Sequence[Tensor]:
        """The mean of the active clients, or the client's own gradient."""
        each = list(gradient.split(self.b))
        active = self.given.active[index]
        common = gradient.unflatten(0, (-1, self.b))[list(active)].mean(0)
        for k in active:
            each[k] = common
        return each


class OneByOne(Loop):
    """The server steps on the rows of one client after another, and client models are averaged (SplitFed V2)."""

    def step(self, index: int) -> None:
        """One client after another."""
        for k in self.given.orders[index]:
            x, y = self.own[index][k]
            through(self.lowers[k], self.uppers[0], self.optimizers[k], self.servers[0], x, y)
        if (self.at + 1) % self.given.local_steps == 0:
            average(self.lowers)


class OwnServers(Loop):
    """Each client has a copy of the server, and both sides are averaged (SplitFed V1)."""

    own_servers = True

    def step(self, index: int) -> None:
        """One client after another, each with its copy."""
        for k, (x, y) in enumerate(self.own[index]):
            through(self.lowers[k], self.uppers[k], self.optimizers[k], self.servers[k], x, y)
        if (self.at + 1) % self.given.local_steps == 0:
            average(self.lowers)
            average(self.uppers)


class FedAvg(Loop):
    """Clients train whole models, which are averaged. `client` is the whole model, and `server` is not used."""

    def step(self, index: int) -> None:
        """One client after another."""
        for net, optimizer, (x, y) in zip(self.lowers, self.optimizers, self.own[index], strict=True):
            optimizer.zero_grad()
            functional.cross_entropy(net(x), y).backward()
            optimizer.step()
        if (self.at + 1) % self.given.local_steps == 0:
            average(self.lowers)


class Travelling(Loop):
    """Clients take turns with one client model. Each client keeps its own optimiser (SSL)."""

    def __init__(self, given: Given) -> None:
        super().__init__(given)
        self.lowers = self.lowers[:1]
        self.optimizers = [given.optimizer(self.lowers[0].parameters(), lr=given.lr) for _ in range(given.clients)]

    def step(self, index: int) -> None:
        """The turn of one client."""
        x, y = self.given.batches[index]
        optimizer = self.optimizers[self.given.turns[index]]
        through(self.lowers[0], self.uppers[0], optimizer, self.servers[0], x, y)


LOOPS: dict[str, type[Loop]] = {
    "psl": Parallel, "sglr": Sglr, "sflv1": OwnServers, "sflv2": OneByOne, "fl": FedAvg, "ssl": Travelling,
}  # fmt: skip
"""The loop for each algorithm of the benchmark."""


class Ceiling:
    """Centralised training of the whole model on the union of the clients' batches."""

    def __init__(self, net: nn.Module, given: Given) -> None:
        self.net, self.given, self.at = copy.deepcopy(net), given, 0
        self.optimizer = given.optimizer(self.net.parameters(), lr=given.lr)

    def __call__(self, steps: int) -> None:
        """Trains this number of steps."""
        for _ in range(steps):
            x, y = self.given.batches[self.at % len(self.given.batches)]
            self.optimizer.zero_grad()
            functional.cross_entropy(self.net(x), y).backward()
            self.optimizer.step()
            self.at += 1


def through(
    lower: nn.Module,
    upper: nn.Module,
    optimizer: torch.optim.Optimizer,
    server: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
) -> None:
    """One client's step with its server or its copy: both sides step."""
    smashed = lower(x)
    received = smashed.detach().requires_grad_()
    server.zero_grad()
    functional.cross_entropy(upper(received), y).backward()
    server.step()
    optimizer.zero_grad()
    smashed.backward(received.grad)
    optimizer.step()


def average(nets: Sequence[nn.Module]) -> None:
    """Sets all models to their mean. The counters of batch normalisation are equal in all models."""
    with torch.no_grad():
        for same in zip(*([*m.parameters(), *m.buffers()] for m in nets), strict=True):
            if same[0].is_floating_point():
                mean = torch.stack(same).mean(0)
                for tensor in same:
                    tensor.copy_(mean)
