"""The server's side: the upper model, its optimiser, one loss on the concatenated rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from cutlayer import seeds
from cutlayer.adjustment import Adjustment, Shifts, adjusted
from cutlayer.averaging import average_into
from cutlayer.averagings import Averaging
from cutlayer.averagings.mean import WeightedMean
from cutlayer.eager import backward, gradients_of
from cutlayer.errors import ConfigError, NonFiniteError
from cutlayer.frozen import frozen_names, load_moving, moving, replica
from cutlayer.gradients import RowLoss, column, gradient_of, mean_loss, means, means_of_clients, spread
from cutlayer.optim import MOMENTUM, MakeOptimizer, Stepping, restore_optimizer
from cutlayer.stored import Count, Digits, Stored, checked, fit
from cutlayer.tasks import Task
from cutlayer.tasks.classification import Classification
from cutlayer.types import Rows, Smashed, TailGradients, as_real, as_tuple
from cutlayer.verbs import STEP_COPIES, STEP_EACH, undeclared


@dataclass(frozen=True)
class ServerStep:
    """One loss and its gradient. `gradient` = dLoss/d(smashed data), each [R, s...]; `lr` is the rate of the step.
    `means` [1 + C] are the mean losses over all rows and over each client's rows.
    """

    means: Tensor
    gradient: Rows
    lr: float


class Server:
    """The server model with its optimiser, and copies of both per client if an algorithm needs them (SplitFed V1, V3).

    `lr` is the base rate and `lr_factor` the round's schedule factor; a step may have its own factor (SplitLr). `task`
    defines the loss of a row (default: the cross entropy of its class).
    """

    def __init__(
        self, model: nn.Module, make_optimizer: MakeOptimizer, lr: float, seed: int = 0, task: Task | None = None
    ) -> None:
        self.model, self.lr, self.seed = model, lr, seed
        self.task = task or Classification()
        self.lr_factor = 1.0
        self._make_optimizer = make_optimizer
        self._weights = list(model.parameters())
        self._stepping = Stepping(make_optimizer, model.named_parameters())
        self._optimizer = self._stepping.optimizer
        self._copies: dict[int, Server] = {}
        self._steps = 0
        self._pending: tuple[Rows, Rows] | None = None
        self._algorithm, self._needs = "", frozenset[str]()
        self.kept: dict[str, Tensor] = {}
        """Values that the algorithm keeps from one round to the next, under its own names. They are part of the state.
        """
        self.make_head: Callable[..., nn.Module] | None = None
        """Makes an auxiliary head as clients have it at the start, from the seed of that name."""
        self.made_up: Callable[[int], None] = lambda rows: None
        """Is called with the number of generated rows that the server has stepped on. No clients send them or wait for
        this step.
        """
        self.outputs = 0
        """Number of scores that the model gives a row; in classification, the number of classes."""
        self.rows_made_up = 0
        """Number of rows that the server has stepped on without clients sending them for that step."""
        self.rule: Averaging = WeightedMean()
        self._adjustment: Adjustment | None = None

    def adjust(self, adjustment: Adjustment) -> None:
        """Adjust scores in losses from now on, also in those of the copies."""
        self._adjustment = adjustment

    def serve(self, algorithm: str, needs: frozenset[str], rule: Averaging | None = None) -> None:
        """From now on, refuse what the `algorithm` of that name does not state among its `needs`, since engines prepare
        only for these. `rule` says how copies are averaged (None: by their weighted mean).
        """
        self._algorithm, self._needs = algorithm, needs
        self.rule = rule or self.rule

    def _check(self, verb: str, method: str) -> None:
        """Raises ConfigError for a verb that the algorithm does not need."""
        if self._algorithm and verb not in self._needs:
            raise ConfigError(undeclared(self._algorithm, f"server.{method}", verb, self._needs))

    def step(self, smashed: Smashed, factor: float = 1.0, loss: RowLoss | None = None) -> ServerStep:
        """One loss (mean over all rows), its gradients, and one optimiser step at rate lr x schedule x `factor`.

        `loss` gives the loss of each row (None: the task's). If logits are adjusted, the gradient is that of the
        clients' loss, at the same model. Raises NonFiniteError before the step is taken and names the clients whose
        rows are to blame. (On an accelerator, a check would wait for the device, so the run checks the losses later
        instead.)
        """
        losses, gradient = self._through(smashed, loss, factor)
        return ServerStep(self._means(losses, smashed), gradient, self._rate(factor))

    def step_on(self, rows: Rows, labels: Tensor, factor: float = 1.0, loss: RowLoss | None = None) -> Tensor:
        """One step on rows that the algorithm has generated (resampled, buffered): each [n, s...], labels [n]. Returns
        the mean loss. Raises NonFiniteError.
        """
        made_up = Smashed(rows, labels, (), (), weights=self.task.weights(labels))
        losses, _ = self._through(made_up, loss, factor)
        self.rows_made_up += len(labels)
        self.made_up(len(labels))
        return mean_loss(losses, made_up.weights)

    def gradients(
        self, smashed: Smashed, loss: RowLoss | None = None, *, running_statistics: bool = False
    ) -> ServerStep:
        """One loss (mean over all rows) and its gradients, without a step of the server; `lr` is 0.

        With `running_statistics`, batch normalisation uses and keeps its running statistics (evaluation mode, also
        without dropout). Raises NonFiniteError as `step` does.
        """
        self._pending = None
        losses, gradient = self._through(smashed, loss, None, evaluating=running_statistics)
        return ServerStep(self._means(losses, smashed), gradient, 0.0)

    def _means(self, losses: Tensor, smashed: Smashed) -> Tensor:
        """The mean losses that a step reports, from its rows' losses [R]: [1 + C]."""
        return means(losses, smashed.sizes, smashed.weights)

    def _mean(self, losses: Tensor, smashed: Smashed) -> Tensor:
        """The loss of a step, from its rows' losses [R]."""
        return mean_loss(losses, smashed.weights)

    def _through(
        self, smashed: Smashed, loss: RowLoss | None, factor: float | None, *, evaluating: bool = False
    ) -> tuple[Tensor, Rows]:
        """(losses [R], gradients) of the rows' mean loss, with a step at rate lr x schedule x `factor` (None: none)."""
        outputs = self.forward(smashed, evaluating=evaluating)
        shifts = self._shifts(smashed)
        losses = self._losses(outputs, smashed, loss, shifts.clients if factor is None else shifts.server)
        mean = self._mean(losses, smashed)
        if not finite(losses):
            raise NonFiniteError("loss", culprits(smashed, losses.detach()))
        if factor is None or not smashed.clients or shifts.clients is shifts.server:
            gradient = self._backward(smashed, lambda: backward([mean], [torch.ones_like(mean)]), factor)
            return losses.detach(), gradient
        theirs, rows = self._losses(outputs, smashed, loss, shifts.clients), self._pending_rows
        theirs = self._mean(theirs, smashed)
        gradient = self._backward(smashed, lambda: apart(mean, self._weights, theirs, rows), factor)
        return losses.detach(), gradient

    @property
    def _pending_rows(self) -> Rows:
        """The leaves [R, s...] of the forward pass that waits for its backward pass."""
        assert self._pending is not None, "a backward pass follows a forward pass"
        return self._pending[0]

    def _shifts(self, smashed: Smashed) -> Shifts:
        """The shifts that are added to the scores of the rows, on each side."""
        return Shifts() if self._adjustment is None else self._adjustment.of(smashed)

    def _losses(self, outputs: Rows, smashed: Smashed, loss: RowLoss | None, shift: Tensor | None) -> Tensor:
        """The loss of each row [R], with `shift` added to its scores."""
        outputs = adjusted(outputs, shift, self.task)
        return self.task.row_losses(outputs, smashed.labels) if loss is None else loss(outputs[0], smashed.labels)

    def forward(self, smashed: Smashed, *, evaluating: bool = False) -> Rows:
        """The server model's outputs for the rows, in training mode (or in evaluation mode). They are kept for the
        backward pass.
        """
        rows = tuple(r.detach().requires_grad_(r.is_floating_point()) for r in smashed.rows)
        if self.model.training == evaluating:
            self.model.train(not evaluating)
        with seeds.seeded_for(self.model, self.seed, "server", self._steps, device=smashed.labels.device):
            outputs = as_tuple(self.model(rows))
        self._pending = (rows, outputs)
        return outputs

    def backward(self, smashed: Smashed, tail: TailGradients, factor: float = 1.0) -> ServerStep:
        """U-shaped split: continue from the gradients that the clients' tails sent back, and take a step at rate lr x
        schedule x `factor`.

        Each client's tail has its own mean loss. Weighted by b_k / R (or by the weights of the rows, W_k / W), they add
        up to the mean over all rows, whose gradient this is. Rows of several clients are treated as in `step`. Losses
        and gradient are those of the clients whose tails have answered.
        """
        assert self._pending is not None, "backward() follows forward()"
        outputs = tuple(o for o in self._pending[1] if o.requires_grad)
        masses = tail.masses or tail.sizes
        rows, share = tail.rows, [mass / (sum(masses) or 1) for mass in masses]
        if len(share) > 1:
            factors = spread(share, tail.sizes)
            rows = tuple(r * column(factors, r) for r in rows)
        everybody = tail.clients == smashed.clients
        rows = rows if everybody else tuple(smashed.among(r, tail.clients) for r in rows)
        gradient = self._backward(smashed, lambda: backward(outputs, rows), factor)
        gradient = gradient if everybody else smashed.take(gradient, tail.clients)
        return ServerStep(means_of_clients(tail.losses, masses), gradient, self._rate(factor))

    def predict(self, clients: Sequence[int], rows: Rows) -> Rows:
        """The server's outputs in eval mode, for evaluation. All clients share the one server model."""
        self.model.eval()
        with torch.no_grad():
            return as_tuple(self.model(rows))

    def step_in_turn(self, smashed: Smashed, order: Sequence[int]) -> ServerStep:
        """One step on the rows of each client, client after client in `order` (SplitFed V2).

        Each client's slice of the gradient belongs to its own mean loss, at the weights that its rows were computed
        with. Raises ConfigError if the algorithm does not need this.
        """
        self._check(STEP_EACH, "step_in_turn")
        done = {client: self.step(smashed.only(client)) for client in order}
        return _together([done[k] for k in smashed.clients], smashed)

    def step_copies(self, smashed: Smashed) -> ServerStep:
        """Every client's copy of the server takes one step on that client's rows (SplitFed V1, V3).

        Each client's slice of the gradient is of its own mean loss. Raises ConfigError if the algorithm does not need
        copies.
        """
        self._check(STEP_COPIES, "step_copies")
        return _together([self._copy_of(k).step(smashed.only(k)) for k in smashed.clients], smashed)

    def average_copies(self, weights: Mapping[int, float]) -> None:
        """The server model becomes the average of the copies of the clients in `weights`, and then every copy becomes
        the server model. Raises ConfigError if the algorithm does not need copies.
        """
        self._check(STEP_COPIES, "average_copies")
        self._settle_copies()
        copies = [self._copy_of(k).model for k in weights]  # averaged as updates of the model before
        average_into(self.model, copies, list(weights.values()), self.rule, moving(self.model))
        for one in self._copies.values():
            load_moving(one.model, moving(self.model))

    def average_momentum(self, weights: Mapping[int, float]) -> None:
        """The momentum of the copies of the clients in `weights` becomes its weighted mean. If the optimiser has no
        momentum, or has not taken a step yet, nothing happens. Raises ConfigError if the algorithm does not need
        copies.
        """
        self._check(STEP_COPIES, "average_momentum")
        copies = {k: self._copies[k] for k in weights if k in self._copies}
        for parameters in zip(*(copy._weights for copy in copies.values()), strict=True):
            found = [c._momentum(p) for c, p in zip(copies.values(), parameters, strict=True)]
            kept = [(weights[k], u) for k, u in zip(copies, found, strict=True) if u is not None]
            total = sum(weight for weight, _ in kept)
            if len(kept) > 1 and total > 0:
                mean = torch.stack([u * (weight / total) for weight, u in kept]).sum(0)
                for _, u in kept:
                    u.copy_(mean)

    def _momentum(self, parameter: Tensor) -> Tensor | None:
        """The mean of past gradients that the optimiser keeps of a parameter, if it keeps one."""
        state = self._optimizer.state.get(parameter, {}) if self._optimizer else {}
        return next((state[kind] for kind in MOMENTUM if state.get(kind) is not None), None)

    def end_round(self) -> None:
        """End the round: batches that still wait for a step (`accumulate`) are used for one."""
        self._stepping.settle()
        self._settle_copies()

    def state(self) -> dict[str, Any]:
        """Model, optimiser and step counter, and the same of every copy, without frozen parameters."""
        kept = {"kept": dict(self.kept)} if self.kept else {}
        made_up = {"rows_made_up": self.rows_made_up} if self.rows_made_up else {}
        return {**self._own_state(), "model": self.model.state_dict(), **kept, **made_up}

    def _own_state(self) -> dict[str, Any]:
        return {
            "model": moving(self.model),
            "optimizer": self._optimizer.state_dict() if self._optimizer else {},
            "steps": self._steps,
            "copies": {str(k): c._own_state() for k, c in self._copies.items()},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `state()` returned. Raises MalformedError."""
        own, mine = checked(state, _ServerState, "the server"), moving(self.model)
        frozen = {**self.model.state_dict(), **mine} if frozen_names(self.model) & own.model.keys() else mine
        fit(own.model, frozen, "the server's model")
        load_moving(self.model, own.model)
        restore_optimizer(self._optimizer, own.optimizer, "the server's optimiser")
        self._steps = own.steps
        self.kept, self.rows_made_up = dict(own.kept), own.rows_made_up
        self._copies.clear()
        for client, copy in own.copies.items():
            self._copy_of(int(client)).load(copy)

    def trial(self, client: int | None = None) -> Server:
        """A copy to try steps on (of the copy that belongs to `client`, if any). This server does not change."""
        one = self if client is None else self._copies.get(client, self)
        tried = Server(replica(one.model), self._make_optimizer, self.lr, one.seed, self.task)
        tried.load({**one._own_state(), "copies": {}})
        tried.lr_factor, tried._adjustment = self.lr_factor, self._adjustment
        return tried

    @property
    def moved(self) -> list[Tensor]:
        """All that steps change: weights and buffers, and the optimiser's numbers."""
        kept = self._optimizer.state.values() if self._optimizer else ()
        numbers = [value for values in kept for value in values.values() if isinstance(value, Tensor)]
        return [*moving(self.model).values(), *numbers]

    def _copy_of(self, client: int) -> Server:
        """Client `client`'s copy: the global weights, and an optimiser of its own that lives on from round to round."""
        if client not in self._copies:
            self._copies[client] = Server(
                replica(self.model),
                self._make_optimizer,
                self.lr,
                seeds.derive(self.seed, "copy", client),
                self.task,
            )
        self._copies[client].lr_factor = self.lr_factor
        self._copies[client]._adjustment = self._adjustment
        return self._copies[client]

    def _settle_copies(self) -> None:
        for one in self._copies.values():
            one.end_round()

    def _rate(self, factor: float) -> float:
        return self.lr * self.lr_factor * factor

    def _backward(self, smashed: Smashed, backward: Callable[[], None], factor: float | None) -> Rows:
        """Zero, back-propagate, check, step (unless `factor` is None); the gradients of the floating point rows."""
        assert self._pending is not None, "a backward pass follows a forward pass"
        rows, _ = self._pending
        self._pending = None
        for p in self._weights:
            p.grad = None
        backward()
        gradient = tuple(gradient_of(r) for r in rows if r.is_floating_point())
        for g in gradient:
            if not finite(g):
                raise NonFiniteError("cut gradient", culprits(smashed, g.flatten(1).sum(1)))
        if self._optimizer and factor is not None:
            self._take(self._rate(factor))
        self._steps += 1
        return gradient

    def _take(self, rate: float) -> None:
        """Take a step at this rate with the gradients that the weights have. Raises NonFiniteError."""
        if not finite(*(p.grad for p in self._weights if p.grad is not None)):
            raise NonFiniteError("server's weight gradient")
        self._stepping.take(rate, last=False)


def apart(mine: Tensor, weights: Sequence[Tensor], theirs: Tensor, rows: Rows) -> None:
    """The gradients of the mean loss `mine` for the `weights`, and of `theirs` for the `rows`."""
    leaves = [r for r in rows if r.requires_grad]
    for leaf, gradient in zip(leaves, gradients_of([theirs], leaves, [torch.ones_like(theirs)]), strict=True):
        leaf.grad = gradient
    if trained := [w for w in weights if w.requires_grad]:
        backward([mine], [torch.ones_like(mine)], trained)


class _ServerState(Stored):
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    steps: Count
    copies: dict[Digits, dict[str, Any]]
    kept: dict[str, Tensor] = msgspec.field(default_factory=dict)
    rows_made_up: Count = 0


def _together(steps: list[ServerStep], smashed: Smashed) -> ServerStep:
    """Several steps, one per client, as one: mean loss over all rows, gradients concatenated."""
    rows = tuple(torch.cat(parts) for parts in zip(*(step.gradient for step in steps), strict=True))
    losses = torch.stack([step.means[0] for step in steps])
    return ServerStep(means_of_clients(losses, smashed.masses), rows, steps[0].lr)


def finite(*tensors: Tensor) -> bool:
    """Whether all numbers are finite. Tensors on an accelerator are assumed to be finite, since a check would wait for
    the device.
    """
    for t in tensors:
        # A sum is not finite if one of its numbers is not. A second check finds sums that only overflowed.
        if t.device.type == "cpu" and not math.isfinite(as_real(t.detach()).sum()) and not torch.isfinite(t).all():
            return False
    return True


def culprits(smashed: Smashed, values: Tensor | None = None) -> tuple[int, ...]:
    """The clients whose smashed data are not finite; failing that, those whose row-wise `values` [R] are not."""

    if not smashed.clients:  # rows that belong to no client
        return ()

    def bad(finite: Tensor) -> list[int]:
        parts: Sequence[Tensor] = finite.split(list(smashed.sizes))
        return [k for k, part in zip(smashed.clients, parts, strict=True) if not part.all()]

    for rows in smashed.rows:
        if found := bad(torch.isfinite(rows).flatten(1).all(1)):
            return tuple(found)
    return () if values is None else tuple(bad(torch.isfinite(values)))
