"""The server of ranks that keep their rows apart: each has a replica of its model, and all take the same steps.

    loss_r = sum of the rank's row losses / n, n = weight of all rows of the step; gradients are summed over ranks

The clients' losses, which all ranks report, go along with the gradients, in one message. While it is under way, the
clients go on with their gradients; the server takes its step when something depends on it. Copies for clients (SplitFed
V1, V3) are on the ranks of their clients; their average is summed over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cutlayer.adjustment import Shifts
from cutlayer.averaging import combined
from cutlayer.collective import World
from cutlayer.engine.distributed import Sharing, mean_of_means, own_stack, whole_stack
from cutlayer.engine.stacked import StackedServer
from cutlayer.errors import ConfigError, NonFiniteError
from cutlayer.frozen import load_moving, moving
from cutlayer.gradients import RowLoss, client_means, column, means_of_clients, spread
from cutlayer.server import Server, ServerStep
from cutlayer.types import Rows, Smashed, TailGradients, as_tuple


class LateStep(ServerStep):
    """A step that waits for the gradients of other ranks. Its mean losses wait for them, too."""

    _wait: Callable[[], Tensor]

    def __init__(self, means: Callable[[], Tensor], gradient: Rows, lr: float) -> None:
        for name, value in {"_wait": means, "gradient": gradient, "lr": lr}.items():
            object.__setattr__(self, name, value)

    @property
    def means(self) -> Tensor:
        """The mean losses over all rows and over each client's: [1 + C]. Raises NonFiniteError and LostRankError."""
        return self._wait()


class DataParallel(Server):
    """The additional part of a rank's server: call `share_by` once. `example` are rows of smashed data."""

    _sharing: Sharing
    _example: Rows
    _total = 1.0  # total weight of the step's rows
    _step: Smashed | None = None  # whose losses go along with the gradients
    _losses_here = torch.empty(0)  # the mean losses [c_r] of its clients that are here
    _late: Callable[[], Tensor] | None = None  # takes the last step, if it is not taken yet; losses of the clients [C]

    def share_by(self, sharing: Sharing, example: Rows) -> None:
        """Be a replica on one of the ranks."""
        self._sharing, self._example = sharing, tuple(r[:1].detach() for r in example)

    @property
    def _world(self) -> World:
        return self._sharing.world

    def step(self, smashed: Smashed, factor: float = 1.0, loss: RowLoss | None = None) -> ServerStep:
        """One loss over the rows of all ranks, and one step; the gradient is of the rows on this rank."""
        return self._together(smashed, loss, factor)

    def gradients(
        self, smashed: Smashed, loss: RowLoss | None = None, *, running_statistics: bool = False
    ) -> ServerStep:
        """The same without a step."""
        self._pending = None
        return self._together(smashed, loss, None, evaluating=running_statistics)

    def _together(
        self, smashed: Smashed, loss: RowLoss | None, factor: float | None, *, evaluating: bool = False
    ) -> ServerStep:
        """The mean losses of the clients of all ranks, and the gradients of the rows that are here."""
        self._open(smashed)
        try:
            _, gradient = self._through(smashed.here, loss, factor, evaluating=evaluating)
        finally:
            self._step = None
        rate = 0.0 if factor is None else self._rate(factor)
        if (late := self._late) is None:  # nothing of the server's is trained now
            return ServerStep(self._told(self._losses_here, smashed), gradient, rate)
        return LateStep(lambda: means_of_clients(late(), smashed.masses), gradient, rate)

    def step_on(self, rows: Rows, labels: Tensor, factor: float = 1.0, loss: RowLoss | None = None) -> Tensor:
        """Raises ConfigError: generated rows are not divided among ranks."""
        raise ConfigError(
            f"{self._algorithm} is registered with spreads = True, but takes steps on rows that it has generated: "
            "leave that out of its registration"
        )

    def step_in_turn(self, smashed: Smashed, order: Sequence[int]) -> ServerStep:
        """Raises ConfigError: clients whose rows are on other ranks cannot take turns here."""
        raise ConfigError(
            f"{self._algorithm} is registered with spreads = True, but takes steps on the rows of one client after "
            "another: leave that out of its registration"
        )

    def _open(self, smashed: Smashed) -> None:
        self.settle()
        self._total, self._step, self._late = sum(smashed.masses) or 1.0, smashed, None
        self._losses_here = torch.empty(0)

    def settle(self) -> None:
        """The last step is taken now, with the gradients of all ranks. Raises NonFiniteError and LostRankError."""
        if self._late is not None:
            self._late()

    def _told(self, own: Tensor, smashed: Smashed) -> Tensor:
        """The mean losses [1 + C] from those of the clients that are here, in a message of their own."""
        table = self._world.joined(own.double().cpu().numpy().reshape(-1, 1), self._present(smashed))
        return means_of_clients(torch.from_numpy(table[:, 0].copy()), smashed.masses)

    def _present(self, smashed: Smashed) -> list[int]:
        """How many clients of the step each rank has."""
        return [len(part) for part in self._sharing.by_rank(smashed.clients)]

    def _mean(self, losses: Tensor, smashed: Smashed) -> Tensor:
        """This rank's part of the loss. The server's own, which is reported, comes first."""
        if self._step is not None and not len(self._losses_here):
            self._losses_here = client_means(losses.detach(), smashed.sizes, smashed.weights)
        if smashed.weights is None:
            return losses.sum() / self._total
        return (losses * smashed.weights.to(losses.dtype)).sum() / self._total

    def _through(
        self, smashed: Smashed, loss: RowLoss | None, factor: float | None, *, evaluating: bool = False
    ) -> tuple[Tensor, Rows]:
        if len(smashed):
            return super()._through(smashed, loss, factor, evaluating=evaluating)
        self.forward(smashed, evaluating=evaluating)
        return torch.empty(0), self._backward(smashed, lambda: None, factor)

    def forward(self, smashed: Smashed, *, evaluating: bool = False) -> Rows:
        """The outputs for this rank's rows."""
        self.settle()
        if len(smashed.here):
            return super().forward(smashed.here, evaluating=evaluating)
        rows = tuple(r.detach().requires_grad_(r.is_floating_point()) for r in smashed.rows)
        with torch.no_grad():  # their shapes, of no rows
            outputs = tuple(o[:0] for o in as_tuple(self.model(self._example)))
        self._pending = (rows, outputs)
        return outputs

    def _take(self, rate: float) -> None:
        """Begin to sum the gradients over the ranks, and to tell the losses of the clients. The step follows."""
        trained = [p for p in self._weights if p.requires_grad]
        for p in trained:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        gradients = [p.grad for p in trained if p.grad is not None]
        losses = [] if self._step is None else [self._packed(self._step, gradients[0])]
        arrive, take = self._world.totalling([*gradients, *losses]), super()._take

        @cache
        def late() -> Tensor:
            arrive()
            take(rate)
            return unpacked(losses[0]).cpu() if losses else torch.empty(0)

        self._late = late

    def _packed(self, smashed: Smashed, like: Tensor) -> Tensor:
        """The losses of the clients that are here, zeros for others: their sum over the ranks has the losses of all."""
        present, own = self._present(smashed), self._losses_here
        first = sum(present[: self._world.rank])
        losses = torch.zeros(sum(present), dtype=torch.float64, device=like.device)
        losses[first : first + len(own)] = own
        return packed(losses, like.dtype)

    def backward(self, smashed: Smashed, tail: TailGradients, factor: float = 1.0) -> ServerStep:
        """U-shaped split: as a single server does, with this rank's rows."""
        assert self._pending is not None, "backward() follows forward()"
        masses = dict(zip(tail.clients, tail.masses or tail.sizes, strict=True))
        total, here = sum(masses.values()) or 1, smashed.here
        factors = spread([masses[k] / total for k in here.clients], here.sizes)
        outputs = tuple(o for o in self._pending[1] if o.requires_grad)
        rows = tuple(r * column(factors, r) for r in tail.rows)

        def back() -> None:
            if len(here):
                torch.autograd.backward(outputs, rows)

        gradient = self._backward(here, back, factor)

        def told() -> Tensor:
            self.settle()
            return means_of_clients(tail.losses, tuple(masses.values()))

        return LateStep(told, gradient, self._rate(factor))

    def predict(self, clients: Sequence[int], rows: Rows) -> Rows:
        """The server's outputs in eval mode."""
        self.settle()
        return super().predict(clients, rows)

    def end_round(self) -> None:
        """End the round."""
        self.settle()
        super().end_round()

    def _numbered(self, smashed: Smashed) -> Smashed:
        """With the numbers of the copies on this rank."""
        return smashed

    def step_copies(self, smashed: Smashed) -> ServerStep:
        """The copies of this rank's clients step."""
        here = smashed.here
        if len(here):
            with self._blamed():
                step = super().step_copies(self._numbered(here))
            own, gradient = step.means[1:], step.gradient
        else:
            own, gradient = torch.empty(0), tuple(r for r in here.rows if r.is_floating_point())
        return ServerStep(self._told(own, smashed), gradient, self._rate(1.0))

    @contextmanager
    def _blamed(self) -> Iterator[None]:
        """Errors use the clients' global numbers."""
        yield

    def _own(self, weights: Mapping[int, float]) -> dict[int, float]:
        """The losses of this rank's clients."""
        mine = self._sharing.own.mine
        return {k: w for k, w in weights.items() if k in mine}

    def average_copies(self, weights: Mapping[int, float]) -> None:
        """The copies' average, over all ranks."""
        if not self.rule.plain:
            self._average_by_rule(weights)
            return
        own = self._own(weights)
        if own:
            self._average_here(own)
        else:
            self._settle_copies()
        state = {name: t.clone() for name, t in moving(self.model).items()}
        mean_of_means(self._world, state, sum(own.values()) / sum(weights.values()))
        load_moving(self.model, state)
        self._spread_average()

    def _average_by_rule(self, weights: Mapping[int, float]) -> None:
        self._settle_copies()
        before = moving(self.model)
        copies = [self._state_of_copy(k) for k in self._own(weights)]
        everyones = self._sharing.everyones(copies, before, weights)
        load_moving(self.model, combined(*everyones, self.rule, before))
        self._spread_average()

    def _state_of_copy(self, client: int) -> Mapping[str, Tensor]:
        """What moves of the copy of a client on this rank."""
        return moving(self._copy_of(client).model)

    def _average_here(self, weights: Mapping[int, float]) -> None:
        super().average_copies(weights)

    def _spread_average(self) -> None:
        """Set every copy to the server's model."""
        for one in self._copies.values():
            load_moving(one.model, moving(self.model))

    def average_momentum(self, weights: Mapping[int, float]) -> None:
        """Raises ConfigError: the momenta of other ranks are not available."""
        raise ConfigError(
            f"{self._algorithm} is registered with spreads = True, but averages momenta: leave that out of its "
            "registration"
        )

    def state(self) -> dict[str, Any]:
        """That of a single server; whole on rank 0 alone."""
        self.settle()
        own = super().state()
        copies = self._world.collected(own["copies"])
        return {**own, "copies": {k: copy for part in copies for k, copy in part.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take this rank's part of a state that `state()` returned, or that of a single server."""
        mine = {str(k) for k in self._sharing.own.mine}
        copies = state.get("copies")
        own = {k: copy for k, copy in copies.items() if k in mine} if isinstance(copies, dict) else copies
        super().load({**state, "copies": own})


def packed(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Doubles [n] as tensors of gradients are, exactly: [n], or in single precision three parts of each, [3, n]. With
    zeros in the place of all but one, they can be added up. (Doubles beyond single precision's range become infinite.)
    """
    if dtype != torch.float32:
        return numbers
    parts, rest = [], numbers
    for _ in range(3):  # of 24 bits; a double has 53
        parts.append(rest.float())
        rest = torch.where(parts[-1].isfinite(), rest - parts[-1].double(), 0.0)
    return torch.stack(parts)


def unpacked(parts: Tensor) -> Tensor:
    """What was `packed`: [n]."""
    return parts if parts.dim() == 1 else parts.double().sum(0)


class ReplicaServer(DataParallel, Server):
    """A replica beside clients that are simulated one after another."""


class StackedReplica(DataParallel, StackedServer):
    """A replica beside stacked clients; the copies for them are stacked, and have their numbers on this rank."""

    def share_by(self, sharing: Sharing, example: Rows) -> None:
        """Be a replica on one of the ranks."""
        super().share_by(sharing, example)
        self.first = sharing.own.mine.start

    def _numbered(self, smashed: Smashed) -> Smashed:
        return replace(smashed, clients=tuple(k - self.first for k in smashed.clients))

    def _shifts(self, smashed: Smashed) -> Shifts:
        if not self.traits_of_copies:
            return super()._shifts(smashed)
        return super()._shifts(replace(smashed, clients=tuple(k + self.first for k in smashed.clients)))

    @contextmanager
    def _blamed(self) -> Iterator[None]:
        try:
            self.traits_of_copies = True
            yield
        except NonFiniteError as error:
            raise NonFiniteError(error.what, tuple(k + self.first for k in error.clients), error.step) from None
        finally:
            self.traits_of_copies = False

    traits_of_copies = False

    def _average_here(self, weights: Mapping[int, float]) -> None:
        super()._average_here({k - self.first: w for k, w in weights.items()})

    def _state_of_copy(self, client: int) -> Mapping[str, Tensor]:
        self._begin([client - self.first])
        return self._stack.state_of(client - self.first)

    def _settle_copies(self) -> None:
        super()._settle_copies()
        self._stack.settle()

    def _spread_average(self) -> None:
        self._stack.load_all(self.model.state_dict())

    def state(self) -> dict[str, Any]:
        """That of a single server; whole on rank 0 alone."""
        own = super().state()
        return {**own, "stack": whole_stack(self._world.collected(own["stack"]))}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take this rank's part of a state that `state()` returned, or that of a single server."""
        mine = self._sharing.own.mine
        stack = state.get("stack")
        if isinstance(stack, Mapping) and stack.get("steps"):
            state = {**state, "stack": own_stack(stack, mine)}
        super().load(state)
