"""The clients of one rank: their choice, their setup, and their numbers among all clients.

A rank simulates its own clients like any engine, with numbers 0..c-1. Their draws are named after their numbers among
all clients, which are also used outside the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn

from cutlayer.cohort import Cohort, CohortAround, Footprint, Predict, Summed
from cutlayer.data.samples import Samples
from cutlayer.data.sampling import Turns
from cutlayer.engine.simulated import ClientModel, Clients
from cutlayer.errors import NonFiniteError
from cutlayer.gradients import summed
from cutlayer.types import CutGradients, Evaluation, Round, Rows, Smashed, Step, TailGradients


def spans(samples: Sequence[int], ranks: int) -> list[range]:
    """The clients of each rank: consecutive ones, at least one, with about the same number of `samples` [C] on each
    rank.
    """
    ends = np.cumsum(samples)
    found, first = [], 0
    for rank in range(ranks):
        end = int(np.searchsorted(ends, ends[-1] * (rank + 1) / ranks - 1e-9)) + 1
        end = min(max(end, first + 1), len(ends) - (ranks - 1 - rank))
        found.append(range(first, end if rank < ranks - 1 else len(ends)))
        first = end
    return found


@dataclass
class DrawnRound:
    """The draws for the present round: the participants, and their rows in each step."""

    participants: tuple[int, ...] = ()
    turns: Turns | None = None


@dataclass(frozen=True, kw_only=True)
class OwnClients(Clients):
    """The clients `mine` of a rank, from a setup of all. Participants are drawn for all ranks at once (`now`)."""

    mine: range
    now: DrawnRound = field(default_factory=DrawnRound)
    total: Callable[[Sequence[Tensor]], None] = lambda tensors: None

    @classmethod
    def of(cls, whole: Clients, mine: range, total: Callable[[Sequence[Tensor]], None]) -> OwnClients:
        """`total` sums tensors over the ranks."""
        given: dict[str, Any] = {f.name: getattr(whole, f.name) for f in fields(Clients)}
        given |= {"models": Models(whole.models, mine), "rows": [whole.rows[k] for k in mine], "present": None}
        given["ranks"] = whole.ranks[mine.start : mine.stop]
        given["shifts"] = None if whole.shifts is None else whole.shifts[mine.start : mine.stop]
        return cls(**given, mine=mine, total=total)

    def called(self, client: int) -> int:
        """Its number among all clients."""
        return self.mine[client]

    def participants(self, index: int, clients: int) -> tuple[int, ...]:
        """The drawn clients, by their numbers on this rank."""
        return tuple(k - self.mine.start for k in self.now.participants if k in self.mine)

    def turns(self, index: int, clients: Sequence[int], samples: Sequence[int]) -> Turns | None:
        """Their part of the drawn sizes."""
        if self.now.turns is None:
            return None
        sizes = dict(zip(self.now.participants, self.now.turns.sizes, strict=True))
        return Turns({k: list(sizes[self.called(k)]) for k in clients})

    def summed(self, gradients: Sequence[Mapping[str, Tensor]], module: nn.Module) -> dict[str, Tensor]:
        """The sum over the clients of all ranks."""
        trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        found = summed(gradients) if gradients else {n: torch.zeros_like(p) for n, p in trained.items()}
        self.total(list(found.values()))
        return found


class Models(Sequence[ClientModel]):
    """Some clients' models, made when asked for."""

    def __init__(self, whole: Sequence[ClientModel], mine: range) -> None:
        self._whole, self._mine = whole, mine

    def __len__(self) -> int:
        return len(self._mine)

    @overload
    def __getitem__(self, client: int) -> ClientModel: ...
    @overload
    def __getitem__(self, client: slice) -> Sequence[ClientModel]: ...
    def __getitem__(self, client: int | slice) -> ClientModel | Sequence[ClientModel]:
        """The model of a client, by its number on this rank. Raises IndexError."""
        if isinstance(client, slice):
            return [self._whole[k] for k in self._mine[client]]
        return self._whole[self._mine[client]]


class NamedCohort(CohortAround):
    """A rank's engine, whose clients have outside it their numbers among all clients, `mine`."""

    def __init__(self, inner: Cohort, mine: range) -> None:
        super().__init__(inner)
        self.mine = mine

    def _here(self, clients: Sequence[int] | None) -> list[int] | None:
        """Their numbers in the engine."""
        return None if clients is None else [k - self.mine.start for k in clients]

    def _called(self, clients: Sequence[int]) -> tuple[int, ...]:
        """Their numbers among all clients."""
        return tuple(self.mine[k] for k in clients)

    def _steps(self, steps: list[Step]) -> list[Step]:
        return [replace(step, clients=self._called(step.clients)) for step in steps]

    @contextmanager
    def _blamed(self) -> Iterator[None]:
        """Errors name clients as they are called."""
        try:
            yield
        except NonFiniteError as error:
            raise NonFiniteError(error.what, self._called(error.clients), error.step) from None

    def footprint(self, client: int) -> Footprint:
        """As the engine's; for clients on other ranks, that of the first client on this rank."""
        return self.inner.footprint(client - self.mine.start if client in self.mine else 0)

    def begin_round(self, index: int, total: int, lr_factor: float) -> Round:
        """As the engine's."""
        this = self.inner.begin_round(index, total, lr_factor)
        return replace(this, clients=self._called(this.clients))

    def seek(self, client: int, batch: int) -> None:
        """As the engine's."""
        self.inner.seek(client - self.mine.start, batch)

    def forward(self, clients: Sequence[int] | None = None, *, labels: bool = True) -> Smashed:
        """As the engine's."""
        smashed = self.inner.forward(self._here(clients), labels=labels)
        return replace(smashed, clients=self._called(smashed.clients))

    def tail(self, features: Smashed) -> TailGradients:
        """As the engine's."""
        with self._blamed():
            tail = self.inner.tail(replace(features, clients=tuple(self._here(features.clients) or ())))
        return replace(tail, clients=self._called(tail.clients))

    def _received(self, gradients: CutGradients) -> CutGradients:
        clients, active = (tuple(self._here(who) or ()) for who in (gradients.clients, gradients.active))
        return replace(gradients, clients=clients, active=active)

    def backward(self, gradients: CutGradients) -> None:
        """As the engine's."""
        with self._blamed():
            self.inner.backward(self._received(gradients))

    def backward_together(self, gradients: CutGradients) -> Summed:
        """As the engine's."""
        with self._blamed():
            done = self.inner.backward_together(self._received(gradients))
        return Summed(self._called(done.gave), self._called(done.took))

    def fit(self) -> list[Step]:
        """As the engine's."""
        with self._blamed():
            return self._steps(self.inner.fit())

    def average(self, weights: Mapping[int, float]) -> tuple[int, ...]:
        """As the engine's."""
        return self._called(self.inner.average({k - self.mine.start: w for k, w in weights.items()}))

    def evaluate(self, samples: Samples, predict: Predict, clients: Sequence[int] | None = None) -> Evaluation:
        """As the engine's."""

        def called(clients: Sequence[int], rows: Rows) -> Rows:
            return predict(self._called(clients), rows)

        found = self.inner.evaluate(samples, called, self._here(clients))
        return Evaluation({self.mine[k]: scores for k, scores in found.scores.items()}, found.samples)

    def model_state(self, client: int) -> Mapping[str, Tensor]:
        """As the engine's."""
        return self.inner.model_state(client - self.mine.start)

    def state(self) -> dict[str, Any]:
        """The engine's."""
        return self.inner.state()

    def load(self, state: Mapping[str, Any]) -> None:
        """Take a state that `state()` returned."""
        self.inner.load(state)
