"""The obvious engine: clients one after another in this process. Slow, and the reference for every other engine."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from cutlayer import seeds
from cutlayer.averaging import average_into
from cutlayer.cohort import Footprint, Predict, draw_participants
from cutlayer.data.batches import BatchStream
from cutlayer.data.samples import Samples
from cutlayer.errors import NonFiniteError
from cutlayer.gradients import row_losses
from cutlayer.optim import MakeOptimizer, set_lr
from cutlayer.types import CutGradients, Evaluation, Round, Rows, Smashed, Step, TailGradients

_EVALUATION_ROWS = 1024  # rows per forward pass in evaluation: bounds memory, changes no result


class Client:
    """One client: private data, its part of the model (with a tail in a U-shaped split), its optimiser."""

    def __init__(
        self, name: int, lower: nn.Module, tail: nn.Module | None, make_optimizer: MakeOptimizer, batches: BatchStream
    ) -> None:
        self.name, self.lower, self.tail, self.batches = name, lower, tail, batches
        self.module = nn.ModuleDict({"lower": lower} if tail is None else {"lower": lower, "tail": tail})
        self.optimizer = make_optimizer(self.module)
        self.quota = 0  # batches left in this round
        self.smashed: Rows = ()  # of the last forward pass, with its graph
        self.labels = torch.empty(0)

    def forward(self, data: Samples, seed: int) -> Rows:
        """Draw a batch, run the lower part in training mode: smashed data, each [b, s...]."""
        clock = self.batches.drawn
        batch = data[self.batches.next()]
        self.quota -= 1
        self.labels = batch.y
        self.module.train()
        self.zero_grad()
        with seeds.torch_seeded(seed, "forward", self.name, clock):
            self.smashed = self.lower(batch.x)
        return self.smashed

    def zero_grad(self) -> None:
        """Forget the last batch's gradients."""
        if self.optimizer:
            self.optimizer.zero_grad()

    def backward(self, gradient: Rows) -> None:
        """Back-propagate `gradient` from the cut; gradients add to those the tail has left."""
        floats = [s for s in self.smashed if s.is_floating_point()]
        pairs = [(s, g) for s, g in zip(floats, gradient, strict=True) if s.requires_grad]
        if pairs:
            torch.autograd.backward([s for s, _ in pairs], [g for _, g in pairs])
        self.smashed = ()

    def step(self, lr: float) -> None:
        """One optimiser step at rate `lr`. Raises NonFiniteError before anything is changed."""
        if self.optimizer is None:
            return
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        if grads and not torch.isfinite(torch.nn.utils.get_total_norm(grads)):
            raise NonFiniteError("weight gradient", (self.name,))
        set_lr(self.optimizer, lr)
        self.optimizer.step()

    def footprint(self) -> Footprint:
        """Bytes of the model and of the optimiser's state."""
        model = sum(t.nbytes for t in self.module.state_dict().values())
        if self.optimizer is None:
            return Footprint(model, 0)
        tensors = [v for s in self.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        return Footprint(model, sum(t.nbytes for t in tensors))


class LocalCohort:
    """All clients in this process, one after another.

    `models` are (lower part, tail or None) per client, `rows` each client's indices into `data`; `alike` says that
    all models start equal (evaluation then looks at one of them).
    """

    def __init__(
        self,
        models: Sequence[tuple[nn.Module, nn.Module | None]],
        data: Samples,
        rows: Sequence[np.ndarray],
        make_optimizer: MakeOptimizer,
        *,
        lr: float,
        batch: int,
        seed: int = 0,
        shape: Literal["whole", "split", "u-shaped"] = "split",
        participation: float = 1.0,
        local_epochs: int = 1,
        local_steps: int | None = None,
        alike: bool = True,
    ) -> None:
        self._clients = [
            Client(k, lower, tail, make_optimizer, BatchStream(rows[k], batch, seed, k))
            for k, (lower, tail) in enumerate(models)
        ]
        self._data, self._lr, self._seed, self._shape = data, lr, seed, shape
        self._participation, self._local_epochs, self._local_steps = participation, local_epochs, local_steps
        self._alike = alike
        self._holder: int | None = None
        self._rate = lr
        self._participants: tuple[int, ...] = ()
        self._asked: tuple[int, ...] = ()  # the clients of the last forward pass

    @property
    def samples(self) -> Sequence[int]:
        """n_k of each enrolled client."""
        return [len(c.batches.rows) for c in self._clients]

    @property
    def shape(self) -> Literal["whole", "split", "u-shaped"]:
        """What the clients hold."""
        return self._shape

    @property
    def holder(self) -> int | None:
        """Who holds the one model that travels."""
        return self._holder

    def footprint(self, client: int) -> Footprint:
        """Bytes of the client's model and optimiser state."""
        return self._clients[client].footprint()

    def begin_round(self, index: int, total: int, lr_factor: float) -> Round:
        """Draw the participants and give each its number of batches: local steps, or local epochs of its own data."""
        self._participants = draw_participants(self._seed, index, len(self._clients), self._participation)
        for k in self._participants:
            client = self._clients[k]
            client.quota = self._local_steps or self._local_epochs * client.batches.per_epoch
        self._rate = self._lr * lr_factor
        batches = tuple(self._clients[k].quota for k in self._participants)
        return Round(index, total, self._participants, batches, self._seed)

    def forward(self, clients: Sequence[int] | None = None, *, labels: bool = True) -> Smashed:
        """Every participant with batches left in this round (or those of `clients`) sends smashed data and labels."""
        asked = self._participants if clients is None else clients
        self._asked = tuple(k for k in asked if self._clients[k].quota > 0)
        if not self._asked:
            return Smashed((), torch.empty(0), (), ())
        sent = [self._clients[k].forward(self._data, self._seed) for k in self._asked]
        rows = tuple(torch.cat([s[i].detach() for s in sent]) for i in range(len(sent[0])))
        of = [self._clients[k].labels for k in self._asked]
        sizes = tuple(len(y) for y in of)
        return Smashed(rows, torch.cat(of) if labels else torch.empty(sum(sizes), 0), self._asked, sizes)

    def tail(self, features: Smashed) -> TailGradients:
        """Each client's tail finishes its rows of `features` with the client's own mean loss."""
        rows, losses = [], []
        for k in features.clients:
            client = self._clients[k]
            assert client.tail is not None, "tail() is for the U-shaped split"
            leaves = tuple(r.detach().requires_grad_(r.is_floating_point()) for r in features.only(k).rows)
            with seeds.torch_seeded(self._seed, "tail", k, client.batches.drawn):
                loss = row_losses(client.tail(leaves), client.labels).mean()
            if not torch.isfinite(loss):
                raise NonFiniteError("loss", (k,))
            loss.backward()
            rows.append([leaf.grad for leaf in leaves if leaf.grad is not None])
            losses.append(loss.detach())
        cat = tuple(torch.cat(parts) for parts in zip(*rows, strict=True))
        return TailGradients(cat, torch.stack(losses), features.clients, features.sizes)

    def backward(self, gradients: CutGradients) -> None:
        """Every client of the last `forward` back-propagates what it received and takes its optimiser step."""
        for k in self._asked:
            client = self._clients[k]
            client.backward(gradients.for_client(k, len(client.labels)))
        for k in self._asked:
            self._clients[k].step(self._rate)
        self._alike = len(self._clients) == 1

    def fit(self) -> list[Step]:
        """Each participant takes all its local steps of this round."""
        taken = {k: self._fit_one(self._clients[k]) for k in self._participants}
        self._alike = len(self._clients) == 1
        return [_together(taken, t) for t in range(max(map(len, taken.values())))]

    def _fit_one(self, client: Client) -> list[tuple[float, int]]:
        """(loss, rows) of each local step of one client with a whole model."""
        taken: list[tuple[float, int]] = []
        while client.quota > 0:
            (outputs,) = client.forward(self._data, self._seed)
            loss = row_losses(outputs, client.labels).mean()
            try:
                if not torch.isfinite(loss):
                    raise NonFiniteError("loss", (client.name,))
                loss.backward()
                client.step(self._rate)
            except NonFiniteError as error:
                raise error.at(len(taken)) from None
            client.smashed = ()
            taken.append((loss.item(), len(client.labels)))
        return taken

    def average(self, weights: Mapping[int, float]) -> None:
        """All client models := the weighted mean of those in `weights`. Optimiser states stay where they are."""
        first = self._clients[0].module
        average_into(first, [self._clients[k].module for k in weights], list(weights.values()))
        for client in self._clients[1:]:
            client.module.load_state_dict(first.state_dict())
        self._alike = True

    def hand_over(self, client: int, *, optimizer: bool) -> None:
        """The travelling model moves to `client`; before anyone holds it, it is `client`'s own."""
        if self._holder is not None and self._holder != client:
            giver, taker = self._clients[self._holder], self._clients[client]
            taker.module.load_state_dict(giver.module.state_dict())
            if optimizer and giver.optimizer and taker.optimizer:
                taker.optimizer.load_state_dict(copy.deepcopy(giver.optimizer.state_dict()))
        self._holder = client

    def evaluate(self, samples: Samples, predict: Predict) -> Evaluation:
        """Every client model with the server, one after another; models known to be equal are looked at once."""
        everyone = range(len(self._clients)) if self._holder is None else [self._holder]
        models = list(everyone)[:1] if self._alike else everyone
        found = {k: self._evaluate_one(self._clients[k], samples, predict) for k in models}
        result = {k: found.get(k, found[models[0]]) for k in everyone}
        return Evaluation({k: a for k, (a, _) in result.items()}, {k: x for k, (_, x) in result.items()}, len(samples))

    def _evaluate_one(self, client: Client, samples: Samples, predict: Predict) -> tuple[float, float]:
        """(accuracy, mean loss) of one client's model with the server."""
        client.module.eval()
        correct, loss = 0, 0.0
        with torch.no_grad():
            for start in range(0, len(samples), _EVALUATION_ROWS):
                part = samples[start : start + _EVALUATION_ROWS]
                rows: Rows = client.lower(part.x)
                if self._shape != "whole":
                    rows = predict(client.name, rows)
                outputs = rows[0] if client.tail is None else client.tail(rows)
                correct += int((outputs.argmax(1) == part.y).sum())
                loss += float(row_losses(outputs, part.y).sum())
        return correct / len(samples), loss / len(samples)

    def state(self) -> dict[str, Any]:
        """Models, optimisers and clocks of all clients (between rounds there is nothing else)."""
        clients = {
            str(c.name): {
                "model": c.module.state_dict(),
                "optimizer": c.optimizer.state_dict() if c.optimizer else {},
                "batches": c.batches.state(),
            }
            for c in self._clients
        }
        return {"clients": clients, "holder": self._holder, "alike": self._alike}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take a state that `state()` returned."""
        for client in self._clients:
            own = state["clients"][str(client.name)]
            client.module.load_state_dict(own["model"])
            if client.optimizer:
                client.optimizer.load_state_dict(own["optimizer"])
            client.batches.load(own["batches"])
        self._holder, self._alike = state["holder"], state["alike"]


def _together(taken: Mapping[int, list[tuple[float, int]]], t: int) -> Step:
    """Local step number t of all the clients that took so many."""
    here = {k: steps[t] for k, steps in taken.items() if t < len(steps)}
    rows = sum(n for _, n in here.values())
    loss = sum(x * n for x, n in here.values()) / rows
    return Step(loss, tuple(here), tuple(x for x, _ in here.values()), rows)
