"""The fast engine: all clients at once, their models as stacked tensors.

One forward pass, one backward pass and one optimiser step serve all clients of a step; the server's copies of SplitFed
V1 and V3 are stacked in the same way. Algorithms in which clients take turns (ssl, ussl) have nothing to stack: the
local engine runs them. `obstacle` says why a model cannot be stacked; everything is proved equal to `local`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cutlayer import seeds
from cutlayer.cohort import Footprint, Predict
from cutlayer.data.samples import Samples
from cutlayer.engine.base import EVALUATION_ROWS, Clients, SimulatedCohort, evaluation, model_bytes, together
from cutlayer.engine.pooling import QuickPooling
from cutlayer.engine.stack import Group, Stack
from cutlayer.errors import NonFiniteError
from cutlayer.gradients import per_client, row_losses
from cutlayer.optim import MakeOptimizer
from cutlayer.server import Server, ServerStep, culprits
from cutlayer.types import CutGradients, Evaluation, Rows, Smashed, Step, TailGradients


class StackedCohort(SimulatedCohort):
    """All clients in this process, all at once."""

    def __init__(self, setup: Clients) -> None:
        super().__init__(setup)
        first, _ = setup.models[0]
        self._stack = Stack(first, len(setup.rows), setup.make_optimizer)
        if not setup.alike:
            for k, (lower, _) in enumerate(setup.models):
                self._stack.load_one(k, lower.state_dict())
        self._model_bytes = model_bytes(first)
        self._groups: list[Group] = []  # of the last forward pass
        self._asked: tuple[int, ...] = ()
        self._sizes: tuple[int, ...] = ()

    def footprint(self, client: int) -> Footprint:
        """Bytes of the client's model and optimiser state."""
        return Footprint(self._model_bytes, self._stack.optimizer_bytes(client))

    def forward(self, clients: Sequence[int] | None = None, *, labels: bool = True) -> Smashed:
        """Every participant with batches left in this round (or those of `clients`) sends smashed data and labels."""
        asked = self._willing(clients)
        if not asked:
            return Smashed((), torch.empty(0), (), ())
        rows, y, sizes = self._forward(asked)
        sent = tuple(r.detach() for r in rows)
        return Smashed(sent, y if labels else torch.empty(len(y), 0), asked, sizes)

    def tail(self, features: Smashed) -> TailGradients:
        """U-shaped learning is sequential: the local engine runs it."""
        raise NotImplementedError("the stacked engine does not run the U-shaped split")

    def backward(self, gradients: CutGradients) -> None:
        """Every client of the last `forward` back-propagates what it received and takes its optimiser step."""
        received = _by_rows(gradients, self._asked, self._sizes)
        for group in self._groups:
            floats = [s for s in group.given if s.is_floating_point()]
            mine = [g if group.rows is None else g[group.rows] for g in received]
            pairs = [(s, g) for s, g in zip(floats, mine, strict=True) if s.requires_grad]
            if pairs:
                torch.autograd.backward([s for s, _ in pairs], [g for _, g in pairs])
        self._step()

    def fit(self) -> list[Step]:
        """Each participant takes all its local steps of this round, all participants in step."""
        taken: dict[int, list[tuple[float, int]]] = {k: [] for k in self._participants}
        count = 0
        while asked := self._willing(None):
            try:
                self._fit_once(asked, taken)
            except NonFiniteError as error:
                raise error.at(count) from None
            count += 1
        return [together(taken, t) for t in range(count)]

    def average(self, weights: Mapping[int, float]) -> None:
        """All client models := the weighted mean of those in `weights`. Optimiser states stay where they are."""
        self._stack.average(weights)
        self._alike = True

    def hand_over(self, client: int, *, optimizer: bool) -> None:
        """The travelling model moves to `client`; before anyone holds it, it is `client`'s own."""
        if self._holder is not None and self._holder != client:
            self._stack.move(self._holder, client, optimizer=optimizer)
        self._holder = client

    def evaluate(self, samples: Samples, predict: Predict) -> Evaluation:
        """Every client model with the server; models known to be equal are looked at once."""
        everyone = list(range(len(self._streams))) if self._holder is None else [self._holder]
        models = everyone[:1] if self._alike else everyone
        at_once = max(1, EVALUATION_ROWS // max(1, len(samples)))
        found: dict[int, tuple[float, float]] = {}
        for start in range(0, len(models), at_once):
            found.update(self._evaluate(models[start : start + at_once], samples, predict))
        return evaluation(found, everyone, len(samples))

    def model_state(self, client: int) -> dict[str, Tensor]:
        """One client's parameters and buffers, under the names of the whole model."""
        return self._stack.state_of(client)

    def state(self) -> dict[str, Any]:
        """Models, optimisers and clocks of all clients, stacked."""
        return {**self._base_state(), "stack": self._stack.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take a state that `state()` returned."""
        self._load_base(state)
        self._stack.load(state["stack"])

    def _forward(self, asked: tuple[int, ...]) -> tuple[Rows, Tensor, tuple[int, ...]]:
        """Next batches through the models: rows [R, s...] with their graph, labels [R], sizes."""
        drawn = [self._next(k) for k in asked]
        clocks = {k: clock for k, (_, clock) in zip(asked, drawn, strict=True)}
        sizes = tuple(len(batch) for batch, _ in drawn)
        batch = self.setup.data[torch.cat([b for b, _ in drawn])]
        self._asked, self._sizes = asked, sizes
        self._groups = self._stack.groups(asked, sizes)
        self._stack.zero_grad()

        def stream(client: int) -> torch.Generator:
            name = seeds.derive(self.setup.seed, "forward", client, clocks[client])
            return torch.Generator().manual_seed(name)

        return run_groups(self._stack, self._groups, (batch.x,), stream), batch.y, sizes

    def _step(self) -> None:
        check_finite(self._stack, self._groups)
        for group in self._groups:
            self._stack.step(group, self._rate)
        self._groups = []
        self._alike = len(self._streams) == 1

    def _fit_once(self, asked: tuple[int, ...], taken: dict[int, list[tuple[float, int]]]) -> None:
        """One local step of all clients in `asked`: the sum of their own mean losses keeps their gradients apart."""
        rows, y, sizes = self._forward(asked)
        losses = row_losses(rows[0], y)
        own = torch.stack([part.mean() for part in losses.split(list(sizes))])
        if not torch.isfinite(own).all():
            raise NonFiniteError("loss", tuple(k for k, x in zip(asked, own.tolist(), strict=True) if not _finite(x)))
        own.sum().backward()
        self._step()
        for k, loss, size in zip(asked, own.tolist(), sizes, strict=True):
            taken[k].append((loss, size))

    def _evaluate(self, clients: list[int], samples: Samples, predict: Predict) -> dict[int, tuple[float, float]]:
        correct, loss = dict.fromkeys(clients, 0), dict.fromkeys(clients, 0.0)
        with torch.no_grad():
            for start in range(0, len(samples), EVALUATION_ROWS):
                part = samples[start : start + EVALUATION_ROWS]
                repeated = part.x.repeat(len(clients), *[1] * (part.x.dim() - 1))
                rows = self._stack.predict(clients, (repeated,))
                for i, k in enumerate(clients):
                    mine = tuple(r[i * len(part) : (i + 1) * len(part)] for r in rows)
                    outputs = mine[0] if self.shape == "whole" else predict(k, mine)[0]
                    correct[k] += int((outputs.argmax(1) == part.y).sum())
                    loss[k] += float(row_losses(outputs, part.y).sum())
        return {k: (correct[k] / len(samples), loss[k] / len(samples)) for k in clients}


class StackedServer(Server):
    """The server beside a stacked cohort; `copies` per client (SplitFed V1, V3; else 0) are stacked too."""

    def __init__(self, model: nn.Module, make_optimizer: MakeOptimizer, lr: float, seed: int, copies: int) -> None:
        super().__init__(model, make_optimizer, lr, seed)
        self._stack = Stack(model, copies, make_optimizer)

    def forward(self, smashed: Smashed) -> Rows:
        """As the server's own, with quick pooling."""
        with QuickPooling():
            return super().forward(smashed)

    def step_copies(self, smashed: Smashed) -> ServerStep:
        """Every client's copy takes one step on that client's rows."""
        rows = tuple(r.detach().requires_grad_(r.is_floating_point()) for r in smashed.rows)
        groups = self._stack.groups(smashed.clients, smashed.sizes)
        self._stack.zero_grad()

        def stream(client: int) -> torch.Generator:
            copy_seed = seeds.derive(self.seed, "copy", client)
            return torch.Generator().manual_seed(seeds.derive(copy_seed, "server", int(self._stack.steps[client])))

        losses = row_losses(run_groups(self._stack, groups, rows, stream)[0], smashed.labels)
        own = torch.stack([part.mean() for part in losses.split(list(smashed.sizes))])
        if not torch.isfinite(own).all():
            raise NonFiniteError("loss", culprits(smashed, losses.detach()))
        own.sum().backward()  # the sum keeps the clients' gradients apart, each of its own mean loss
        gradient = tuple(torch.zeros_like(r) if r.grad is None else r.grad for r in rows if r.is_floating_point())
        for g in gradient:
            if not torch.isfinite(g).all():
                raise NonFiniteError("cut gradient", culprits(smashed, g.flatten(1).sum(1)))
        for group in groups:
            self._stack.step(group, self._rate(1.0))
        return ServerStep(losses.mean().item(), per_client(losses.detach(), smashed.sizes), gradient, self._rate(1.0))

    def average_copies(self, weights: Mapping[int, float]) -> None:
        """Server model := weighted mean of the copies of the clients in `weights`; then every copy := server model."""
        self._stack.average(weights)
        self.model.load_state_dict(self._stack.state_of(0))

    def state(self) -> dict[str, Any]:
        """The server's state and its stacked copies'."""
        return {**super().state(), "stack": self._stack.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take a state that `state()` returned."""
        super().load(state)
        self._stack.load(state["stack"])


def run_groups(stack: Stack, groups: Sequence[Group], rows: Rows, stream: Any) -> Rows:
    """The groups' modules on their rows of the merged batch; what they give, in the order of the merged batch."""
    if len(groups) == 1:
        return stack.forward(groups[0], rows, stream)
    given = [stack.forward(g, tuple(r[g.rows] for r in rows), stream) for g in groups]
    order = torch.cat([g.rows for g in groups if g.rows is not None]).argsort()
    return tuple(torch.cat([part[i] for part in given])[order] for i in range(len(given[0])))


def check_finite(stack: Stack, groups: Sequence[Group]) -> None:
    """Raises NonFiniteError, naming the clients, where a weight gradient is not finite. One look at all of them."""
    gradients = [stack.gradients(group) for group in groups]
    everything = [g for of in gradients for g in of]
    if not everything or torch.isfinite(torch.nn.utils.get_total_norm(everything)):
        return
    bad = [
        int(k)
        for group, of in zip(groups, gradients, strict=True)
        for i, k in enumerate(group.clients)
        if not all(torch.isfinite(torch.linalg.vector_norm(g[i])) for g in of)
    ]
    if bad:  # else only the sum over all clients overflowed
        raise NonFiniteError("weight gradient", tuple(sorted(bad)))


def obstacle(module: nn.Module, rows: Rows, make_optimizer: MakeOptimizer) -> str:
    """Why `module` cannot be stacked, as a clause; empty where it can.

    The proof: three copies with different weights, on different rows, give together what each gives alone: outputs, all
    gradients and buffers, in training mode (dropout masks included) and in eval mode.
    """
    if len(list(module.parameters())) < len(list(module.named_parameters(remove_duplicate=False))):
        return "it has tied weights"
    copies = [copy.deepcopy(module).double() for _ in range(3)]  # in double precision rounding is no excuse
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in (p for c in copies for p in c.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=noise, dtype=p.dtype).to(p.device))
    order = torch.randperm(3 * len(rows[0]), generator=noise) % len(rows[0])
    rows = tuple(r.detach().double() if r.is_floating_point() else r for r in rows)
    merged = tuple(r[order].requires_grad_(r.is_floating_point()) for r in rows)
    stack = Stack(copies[0], 3, make_optimizer)
    for k, c in enumerate(copies):
        stack.load_one(k, c.state_dict())
    try:
        return _difference(stack, copies, merged)
    except Exception as error:  # a user's module can raise anything; whatever it is, the local engine runs it
        reason = str(error).strip().splitlines()
        return f"{type(error).__name__}: {reason[0] if reason else ''}"


def _difference(stack: Stack, copies: list[nn.Module], rows: Rows) -> str:
    """What differs between the stack and its copies run one by one; empty where nothing does."""
    size = len(rows[0]) // len(copies)
    (group,) = stack.groups(range(len(copies)), [size] * len(copies))
    given = stack.forward(group, rows, lambda k: torch.Generator().manual_seed(k))
    weights = [torch.linspace(0.5, 1.5, g.numel(), dtype=g.dtype).view(g.shape) for g in given if g.requires_grad]
    torch.autograd.backward([g for g in given if g.requires_grad], weights)
    for k, module in enumerate(copies):
        mine = tuple(r[k * size : (k + 1) * size].detach().requires_grad_(r.requires_grad) for r in rows)
        module.train()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(k)
            alone = module(mine)
        alone = alone if isinstance(alone, tuple) else (alone,)
        trained = [a for a in alone if a.requires_grad]
        torch.autograd.backward(trained, [w[k * size : (k + 1) * size] for w in weights])
        span = slice(k * size, (k + 1) * size)
        pairs = [(a, g[span]) for a, g in zip(alone, given, strict=True)]
        pairs += [(_grad(m), _grad(r)[span]) for m, r in zip(mine, rows, strict=True) if r.requires_grad]
        pairs += [(_grad(p), _grad(group.parameters[name])[k]) for name, p in module.named_parameters()]
        pairs += [(b, group.buffers[name][k]) for name, b in module.named_buffers()]
        if not _close(pairs):
            return "its rows influence each other across clients, or it keeps state of its own"
    return ""


def _grad(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def _close(pairs: list[tuple[Tensor, Tensor]]) -> bool:
    """Equal but for rounding, in units of the largest value of all (a gradient can be nothing but rounding)."""
    floats = [(a, b) for a, b in pairs if a.is_floating_point() and a.numel()]
    scale = max((float(a.detach().abs().max()) for a, _ in floats), default=0.0)
    allowed = 1e4 * torch.finfo(torch.float64).eps * scale
    return all(torch.equal(a, b) for a, b in pairs if not a.is_floating_point()) and all(
        torch.allclose(a, b, rtol=0.0, atol=allowed) for a, b in floats
    )


def _by_rows(gradients: CutGradients, clients: tuple[int, ...], sizes: tuple[int, ...]) -> Rows:
    """What every client back-propagates, in the order of the merged batch: each [R, s...]."""
    if not gradients.active:
        return gradients.own
    each = [gradients.for_client(k, n) for k, n in zip(clients, sizes, strict=True)]
    return tuple(torch.cat(parts) for parts in zip(*each, strict=True))


def _finite(x: float) -> bool:
    return x - x == 0.0
