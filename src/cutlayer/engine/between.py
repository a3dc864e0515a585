"""Clients whose cuts differ: the server computes for each the layers between its own cut and the deepest one.

An algorithm then sees the same as if every client's cut were the deepest: the client's part and its blocks at the
server together are the client's model. So an algorithm with mixed cuts gives the same as with the deepest cut for all,
and an algorithm that does not depend on the cut gives the same as with any cut. Averaging is by parameter name: of each
parameter over all clients, whether the client holds it or the server does.

    forward    client k: s_k = f(w_k; x_k) up;      server: z_k = h(u_k; s_k)      the algorithm gets z
    backward   server: dLoss/ds_k, u_k steps;       client k: dLoss/ds_k down, w_k steps

The blocks u_k belong to the client, and step as the client does: same optimiser, rate and schedule.

Shape legend: R rows of all clients, b_k those of client k, s... the shape of one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from cutlayer import seeds
from cutlayer.cohort import Cohort, CohortAround, Held, Predict
from cutlayer.data.samples import Samples
from cutlayer.eager import backward
from cutlayer.engine.local import Client, named_as_whole
from cutlayer.frozen import load_moving, moving, replica
from cutlayer.optim import MakeOptimizer, restore_optimizer
from cutlayer.server import finite
from cutlayer.stored import Count, Digits, MalformedError, Stored, checked, fit
from cutlayer.types import CutGradients, Evaluation, Round, Rows, Smashed, as_tuple


class Block:
    """The blocks of one client at the server, with their own optimiser."""

    def __init__(self, client: int, module: nn.Module, make_optimizer: MakeOptimizer) -> None:
        self.client = Client(client, module, None, make_optimizer)
        self.passed = 0  # batches so far
        self._received: Rows = ()

    def forward(self, rows: Rows, seed: int) -> Rows:
        """Compute a client's smashed data, each [b_k, s...], up to the deepest cut, in training mode."""
        own = self.client
        own.module.train()
        for p in own.weights:
            p.grad = None
        self._received = tuple(r.detach().requires_grad_(r.is_floating_point()) for r in rows)
        with seeds.seeded_for(own.lower, seed, "between", own.name, self.passed, device=rows[0].device):
            own.smashed = as_tuple(own.lower(self._received))
        self.passed += 1
        return tuple(r.detach() for r in own.smashed)

    def backward(self, gradient: Rows, lr: float, *, last: bool) -> Rows:
        """Take a step, and return the gradient at the client's own cut, each [b_k, s...]. Raises NonFiniteError."""
        self.client.backward(gradient)
        self.client.step(lr, last=last)
        leaves, self._received = [r for r in self._received if r.requires_grad], ()
        return tuple(torch.zeros_like(r) if r.grad is None else r.grad for r in leaves)

    def predict(self, rows: Rows) -> Rows:
        """The same in evaluation mode."""
        with torch.no_grad():
            return as_tuple(self.client.lower.eval()(rows))


class Blocks:
    """The blocks that the server computes for its clients: `make(k)` makes those of client k, None if it has none;
    `trains(k)` says whether the part that the client itself has is trained.
    """

    def __init__(
        self,
        make: Callable[[int], nn.Module | None],
        make_optimizer: MakeOptimizer,
        clients: int,
        trains: Callable[[int], bool] = lambda client: True,
    ) -> None:
        self.clients, self.trains = clients, trains
        self._make, self._make_optimizer = make, make_optimizer
        self._made: dict[int, Block | None] = {}

    def of(self, client: int) -> Block | None:
        """Those of a client; None if its cut is the deepest."""
        if client not in self._made:
            module = self._make(client)
            self._made[client] = None if module is None else Block(client, module, self._make_optimizer)
        return self._made[client]

    def states(self, clients: Sequence[int]) -> dict[int, dict[str, Tensor]]:
        """The part of each client's blocks that is averaged, under the names in a client's module."""
        found = {}
        for k in clients:
            block = self.of(k)
            if block is not None:
                block.client.stepping.settle()
            found[k] = {} if block is None else moving(block.client.module)
        return found

    def take(self, average: Mapping[str, Tensor]) -> None:
        """Set all blocks to their part of an average of whole client models."""
        for k in range(self.clients):
            if (block := self.of(k)) is not None:
                module = block.client.module
                load_moving(module, {name: average[name] for name in moving(module)})

    def lifted(self, client: int, rows: Rows) -> Rows:
        """A client's rows computed up to the deepest cut, in evaluation mode."""
        block = self.of(client)
        return rows if block is None else block.predict(rows)

    def bear(self, client: int, rows: Rows) -> bool:
        """Whether a client's blocks give finite numbers for its rows, forward and backward, tested before they are
        used.
        """
        block = self.of(client)
        if block is None:
            return True
        module = replica(block.client.lower).train()
        leaves = tuple(r.detach().requires_grad_(r.is_floating_point()) for r in rows)
        with seeds.torch_seeded(0, "between"):  # draws here are not part of the run
            given = as_tuple(module(leaves))
        if grown := [r for r in given if r.requires_grad]:
            backward(grown, [torch.ones_like(r) / len(r) for r in grown])
        found = [t for t in (*given, *(p.grad for p in module.parameters())) if t is not None]
        return finite(*(t for t in found if t.is_floating_point()))

    def state(self) -> dict[str, Any]:
        """Weights, optimisers and counts of all blocks."""
        found = {}
        for k, own in self.states(range(self.clients)).items():
            if (block := self.of(k)) is not None:
                optimizer = block.client.optimizer
                state = optimizer.state_dict() if optimizer else {}
                found[str(k)] = {"model": own, "optimizer": state, "passed": block.passed}
        return found

    def load(self, state: Mapping[int, _OneBlock]) -> None:
        """Take a state from `state`. Raises MalformedError."""
        there = {k: block for k in range(self.clients) if (block := self.of(k)) is not None}
        if state.keys() != there.keys():
            raise MalformedError(
                f"it holds the blocks of clients {sorted(state)}, where those of {sorted(there)} belong"
            )
        for k, block in there.items():
            kept = state[k]
            fit(kept.model, moving(block.client.module), f"the blocks of client {k}")
            load_moving(block.client.module, kept.model)
            restore_optimizer(block.client.optimizer, kept.optimizer, f"the optimiser of the blocks of client {k}")
            block.passed = kept.passed


class _OneBlock(Stored):
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    passed: Count


class _BetweenState(Stored):
    inner: dict[str, Any]
    blocks: dict[Digits, dict[str, Any]] = msgspec.field(default_factory=dict)


class BetweenCohort(CohortAround):
    """A cohort whose clients appear to have the deepest cut: the server computes their `blocks` for them. `lr` is the
    clients' base rate.
    """

    def __init__(self, inner: Cohort, blocks: Blocks, lr: float, seed: int) -> None:
        super().__init__(inner)
        self.blocks, self.lr, self.seed = blocks, lr, seed
        self._rate = lr
        self._left: dict[int, int] = {}  # batches that clients still have in this round
        self._last = Smashed((), torch.empty(0), (), ())

    def begin_round(self, index: int, total: int, lr_factor: float) -> Round:
        """Blocks step at the clients' rate."""
        self.blocks.states(range(self.blocks.clients))  # unfinished steps of the round before come first
        this = self.inner.begin_round(index, total, lr_factor)
        self._rate, self._left = self.lr * lr_factor, dict(zip(this.clients, this.batches, strict=True))
        return this

    def forward(self, clients: Sequence[int] | None = None, *, labels: bool = True) -> Smashed:
        """Smashed data of each client's own cut go through its blocks."""
        self._last = smashed = self.inner.forward(clients, labels=labels)
        if not smashed:
            return smashed
        lifted: dict[int, Rows] = {}
        for part in smashed.parts:
            for k in part.clients:
                self._left[k] = self._left.get(k, 1) - 1
                rows, block = part.only(k).rows, self.blocks.of(k)
                lifted[k] = rows if block is None else block.forward(rows, self.seed)
        rows = tuple(torch.cat(tensors) for tensors in zip(*(lifted[k] for k in smashed.clients), strict=True))
        return replace(smashed, rows=rows, parts=())

    def backward(self, gradients: CutGradients) -> None:
        """Gradients at the deepest cut go back through the blocks, which step. Clients with the deepest cut get their
        common gradient; the others get their own gradients.
        """
        self.inner.backward(
            replace(_nothing(gradients), parts=tuple(self._back(p, gradients) for p in self._last.parts))
        )

    def _back(self, part: Smashed, gradients: CutGradients) -> CutGradients:
        """The gradients of the clients that share a cut."""
        asked = set(gradients.clients) | set(gradients.active)
        sizes = part.sizes_of(asked)
        if self.blocks.of(part.clients[0]) is None:
            common = tuple(k for k in sizes if k in gradients.active)
            alone = {k: n for k, n in sizes.items() if k not in gradients.active}
            own = _cat([gradients.for_client(k, n) for k, n in alone.items()], gradients.own)
            return CutGradients(own, tuple(alone), tuple(alone.values()), gradients.common if common else (), common)
        found = []
        for k, size in sizes.items():
            block = self.blocks.of(k)
            assert block is not None, "clients with one cut all have blocks, or none has"
            found.append(block.backward(gradients.for_client(k, size), self._rate, last=not self._left[k]))
        own = _cat(found, ()) if self.blocks.trains(part.clients[0]) else ()  # or no gradients go down
        return CutGradients(own, tuple(sizes), tuple(sizes.values()))

    def evaluate(self, samples: Samples, predict: Predict, clients: Sequence[int] | None = None) -> Evaluation:
        """Held-out rows go through each client's blocks."""

        def lifted(clients: Sequence[int], rows: Rows) -> Rows:
            each = len(rows[0]) // len(clients)
            own = [
                self.blocks.lifted(k, tuple(r[i * each : (i + 1) * each] for r in rows)) for i, k in enumerate(clients)
            ]
            return predict(clients, own[0] if len(own) == 1 else _cat(own, ()))

        return self.inner.evaluate(samples, lifted, clients)

    def model_state(self, client: int) -> Mapping[str, Tensor]:
        """The client's part and its blocks."""
        return {**self.inner.model_state(client), **self.named(client)}

    def held(self) -> Held:
        """The clients' parts that are available here, with their blocks."""
        held = self.inner.held()
        return Held({k: {**state, **self.named(k)} for k, state in held.models.items()}, held.everyones)

    def named(self, client: int) -> dict[str, Tensor]:
        """A client's blocks, under the names of the whole model."""
        self.blocks.states([client])
        block = self.blocks.of(client)
        return {} if block is None else named_as_whole(block.client.module.state_dict(), self.shape)

    def state(self) -> dict[str, Any]:
        """The inner cohort's state, and the blocks'."""
        return {**super().state(), "blocks": self.blocks.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take a state that `state()` returned. Raises MalformedError."""
        found = checked(state, _BetweenState, "the clients")
        super().load({"inner": found.inner})
        self.blocks.load(
            {int(k): checked(own, _OneBlock, f"the blocks of client {k}") for k, own in found.blocks.items()}
        )


def _nothing(gradients: CutGradients) -> CutGradients:
    """For the same clients, no own gradients."""
    return CutGradients((), gradients.clients, gradients.sizes, (), gradients.active)


def _cat(rows: Sequence[Rows], like: Rows) -> Rows:
    """The rows of several clients, one after another; without clients, no rows, in the form of `like`."""
    if not rows:
        return tuple(r[:0] for r in like)
    return tuple(torch.cat(tensors) for tensors in zip(*rows, strict=True))
