"""The exact shortcut for one local step followed by averaging: one step on the union of all batches.

With plain gradient descent from equal models, sum_k p_k (w - eta g_k) = w - eta sum_k p_k g_k, p_k = n_k / n: FedAvg
and SplitFed V1 with one local step, and SFL averaged at every step, need one model, not one per client. This holds if a
row's result does not depend on other rows and nothing is drawn or kept in buffers (no batch normalisation, no dropout);
`row_by_row` finds out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import msgspec
import torch
from torch import Tensor, nn

from cutlayer.adjustment import adjusted
from cutlayer.cohort import Footprint, Predict, Summed
from cutlayer.data.samples import Samples
from cutlayer.engine.simulated import Clients, CohortState, SimulatedCohort, model_bytes
from cutlayer.engine.stackable import close, drawing, exact
from cutlayer.errors import ConfigError, NonFiniteError
from cutlayer.gradients import column, descending, means, spread
from cutlayer.optim import MakeOptimizer, Stepping, as_tensor, restore_optimizer, set_lr
from cutlayer.scoring import Outputs, evaluation
from cutlayer.server import Server, ServerStep, apart, culprits, finite
from cutlayer.stored import checked, fit
from cutlayer.tasks import Task
from cutlayer.types import CutGradients, Evaluation, Round, Rows, Smashed, Step, as_tuple, masses_of
from cutlayer.verbs import AVERAGE, BACKWARD, BACKWARD_TOGETHER, FIT, FORWARD, STEP_COPIES


class _UnionState(CohortState, kw_only=True):
    model: dict[str, Tensor]
    optimizer: dict[str, Any] = msgspec.field(default_factory=dict)


class UnionCohort(SimulatedCohort):
    """Clients whose models are equal before and after every step: one model for all."""

    can: ClassVar[frozenset[str]] = frozenset({FORWARD, BACKWARD, FIT, AVERAGE, STEP_COPIES, BACKWARD_TOGETHER})

    def __init__(self, setup: Clients) -> None:
        super().__init__(setup)
        self._model, _ = setup.models[0]
        self._weights = [p for p in self._model.parameters() if p.requires_grad]
        self._stepping = Stepping(setup.make_optimizer, self._model.named_parameters())
        self._optimizer = self._stepping.optimizer
        self._asked: tuple[int, ...] = ()
        self._sizes: tuple[int, ...] = ()
        self._given: Rows = ()

    def footprint(self, client: int) -> Footprint:
        """Bytes of the client's model, of its optimiser's state and of its gradient."""
        states = self._optimizer.state.values() if self._optimizer else ()
        kept = sum(as_tensor(v).nbytes for state in states for v in state.values() if v is not None)
        return Footprint(model_bytes(self._model), kept, sum(p.nbytes for p in self._weights))

    def forward(self, clients: Sequence[int] | None = None, *, labels: bool = True) -> Smashed:
        """Every participant with a batch left in this round sends smashed data and labels."""
        asked = self._willing(clients)
        if not asked:
            return Smashed((), torch.empty(0), (), ())
        batch = self._forward(asked)
        return self._smashed(tuple(g.detach() for g in self._given), batch.y, asked, self._sizes, labels)

    def backward(self, gradients: CutGradients) -> None:
        """The weighted mean of the steps that the clients of the last `forward` would take."""
        received = gradients.for_all(self._asked, self._sizes)
        share = spread(shares(self.masses, self._asked), self._sizes)
        pairs = descending(self._given, tuple(g * column(share, g) for g in received))
        self._step([s for s, _ in pairs], [g for _, g in pairs])

    def backward_together(self, gradients: CutGradients) -> Summed:
        """One step with the gradient of the loss over all rows: the sum of the clients'."""
        received = gradients.for_all(self._asked, self._sizes)
        pairs = descending(self._given, received)
        everybody = tuple(range(len(self.samples)))
        if self._differentiate([s for s, _ in pairs], [g for _, g in pairs]):
            self._stepping.take(self._rate, last=not self._quota[list(self._participants)].any())
        return Summed(self._asked, everybody)

    def begin_round(self, index: int, total: int, lr_factor: float) -> Round:
        """As for all; unfinished steps of the round before come first, at its rate."""
        self._stepping.settle()
        return super().begin_round(index, total, lr_factor)

    def fit(self) -> list[Step]:
        """Each participant's one local step on its whole model, averaged."""
        batch = self._forward(self._willing(self._participants))
        task = self.setup.task
        losses = task.row_losses(adjusted(self._given, self.setup.shifts_of(self._asked, self._sizes), task), batch.y)
        weights = task.weights(batch.y)
        if not finite(losses.detach()):
            bad = culprits(Smashed((), batch.y, self._asked, self._sizes), losses.detach())
            raise NonFiniteError("loss", bad).at(0)
        share = in_client_means(spread(shares(self.masses, self._asked), self._sizes), weights, self._sizes)
        self._step([losses], [share.to(losses.device, losses.dtype)])
        return [Step(means(losses.detach(), self._sizes, weights), self._asked, len(batch))]

    def average(self, weights: Mapping[int, float]) -> tuple[int, ...]:
        """Done already, by the weights n_k / n."""
        check_done(weights, self.masses, self._asked)
        return tuple(weights)

    def evaluate(self, samples: Samples, predict: Predict, clients: Sequence[int] | None = None) -> Evaluation:
        """The one model, for all."""
        self._stepping.settle()
        self._model.eval()

        def outputs_of(models: Sequence[int], part: Samples, start: int) -> Outputs:
            rows = as_tuple(self._model(part.rows))
            return models, rows[0] if self.shape == "whole" else predict(models, rows)[0]

        return evaluation(self.setup.judge(samples, [0], outputs_of), self._judged(clients)[0], len(samples))

    def model_state(self, client: int) -> dict[str, Tensor]:
        """One client's parameters, under the names of the whole model."""
        return {name: t.detach() for name, t in self._model.state_dict().items()}

    def state(self) -> dict[str, Any]:
        """The model and the clocks."""
        self._stepping.settle()
        kept = {"optimizer": self._optimizer.state_dict()} if self._optimizer and self._optimizer.state else {}
        return {**self._base_state(), "model": self._model.state_dict(), **kept}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take a state that `state()` returned. Raises MalformedError."""
        found = checked(state, _UnionState, "the clients")
        self._load_base(found)
        fit(found.model, self._model.state_dict(), "the clients' model")
        self._model.load_state_dict(found.model)
        if found.optimizer:
            restore_optimizer(self._optimizer, found.optimizer, "the clients' optimiser")

    def _forward(self, asked: tuple[int, ...]) -> Samples:
        batch, sizes, _ = self._draw(asked)
        self._asked, self._sizes = asked, tuple(sizes.tolist())
        self._model.train()
        self._given = as_tuple(self._model(batch.rows))
        return batch

    def _step(self, outputs: list[Tensor], gradients: list[Tensor]) -> None:
        if self._differentiate(outputs, gradients) and self._optimizer is not None:
            set_lr(self._optimizer, self._rate)
            self._optimizer.step()

    def _differentiate(self, outputs: list[Tensor], gradients: list[Tensor]) -> bool:
        """Leave the model's gradients with its weights; returns whether there are any. Raises NonFiniteError."""
        self._given = ()
        if not outputs or self._optimizer is None:
            return False
        found = torch.autograd.grad(outputs, self._weights, gradients, allow_unused=True, retain_graph=True)
        if not finite(*(g for g in found if g is not None)):
            raise NonFiniteError("weight gradient", self._blamed(outputs, gradients))
        for p, g in zip(self._weights, found, strict=True):
            p.grad = g
        return True

    def _blamed(self, outputs: list[Tensor], gradients: list[Tensor]) -> tuple[int, ...]:
        """The clients whose own rows make a weight gradient that is not finite."""
        bad = []
        for i, k in enumerate(self._asked):
            mine = spread([float(i == j) for j in range(len(self._asked))], self._sizes)
            own = [torch.where(column(mine, g) > 0, g, torch.zeros_like(g)) for g in gradients]
            found = torch.autograd.grad(outputs, self._weights, own, allow_unused=True, retain_graph=True)
            if not finite(*(g for g in found if g is not None)):
                bad.append(k)
        return tuple(bad)


class UnionServer(Server):
    """The server of SplitFed V1 with one local step: its copies, stepped once and averaged, are one."""

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: MakeOptimizer,
        lr: float,
        seed: int,
        masses: Sequence[float],
        task: Task | None = None,
    ) -> None:
        super().__init__(model, make_optimizer, lr, seed, task)
        self._masses = masses
        self._asked: tuple[int, ...] = ()

    def step_copies(self, smashed: Smashed) -> ServerStep:
        """The weighted mean of the steps of all copies; each client's slice of the gradient is of its own mean loss."""
        self._check(STEP_COPIES, "step_copies")
        self._asked = smashed.clients
        outputs, shifts = self.forward(smashed), self._shifts(smashed)
        losses = self._losses(outputs, smashed, None, shifts.server)
        if not finite(losses.detach()):
            raise NonFiniteError("loss", culprits(smashed, losses.detach()))
        share = spread(shares(self._masses, smashed.clients), smashed.sizes).to(losses.device, losses.dtype)
        each = in_client_means(share, smashed.weights, smashed.sizes)
        rows = self._pending_rows

        def back() -> None:
            if shifts.clients is shifts.server:
                losses.backward(each)
                return
            theirs = self._losses(outputs, smashed, None, shifts.clients)
            apart((losses * each).sum(), self._weights, (theirs * each).sum(), rows)

        gradient = self._backward(smashed, back, 1.0)
        share = torch.where(share > 0, share, torch.ones_like(share))  # a client whose rows always have weight 0
        own = tuple(g / column(share, g) for g in gradient)
        return ServerStep(means(losses.detach(), smashed.sizes, smashed.weights), own, self._rate(1.0))

    def average_copies(self, weights: Mapping[int, float]) -> None:
        """Done already, by the weights n_k / n, except for a step that waits for more batches."""
        self._check(STEP_COPIES, "average_copies")
        self._stepping.settle()
        check_done(weights, self._masses, self._asked)


def row_by_row(part: nn.Module, rows: Rows) -> bool:
    """Whether, on these rows in training mode, a part's output for a row depends only on that row, and nothing is drawn
    or kept.
    """
    if list(part.buffers()):
        return False
    twin = exact(part).train()
    wide = tuple(r.double() if r.is_floating_point() else r for r in rows)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), drawing(wide[0].device) as drew:
        try:
            together = as_tuple(twin(wide))
            apart = [as_tuple(twin(tuple(r[i : i + 1] for r in wide))) for i in range(len(wide[0]))]
        except (RuntimeError, ValueError):  # batch normalisation of features refuses single rows
            return False
    alone = [torch.cat(parts) for parts in zip(*apart, strict=True)]
    return not drew and close(list(zip(together, alone, strict=True)))


def shares(masses: Sequence[float], clients: Sequence[int]) -> list[float]:
    """p_k = n_k / n of each of `clients`, n being their sum (by the weights of their rows)."""
    counts = [masses[k] for k in clients]
    return [count / sum(counts) for count in counts]


def check_done(weights: Mapping[int, float], masses: Sequence[float], asked: Sequence[int]) -> None:
    """Check that the requested averaging is the one that was done. Raises ConfigError."""
    total = sum(weights.values())
    done = dict(zip(asked, shares(masses, asked), strict=True))
    same = weights.keys() == done.keys() and all(abs(w / total - done[k]) < 1e-9 for k, w in weights.items())
    if not same:
        raise ConfigError(
            "the algorithm's averages_every_step is true, but it averages other clients than those that stepped, or by "
            "other weights than their numbers of samples: return false there, or average with sample_weights"
        )


def in_client_means(values: Tensor, weights: Tensor | None, sizes: Sequence[int]) -> Tensor:
    """`values` [R], each times its row's part in its client's own mean loss: w_i / W_k (1 / b_k where all count 1)."""
    masses = spread([float(mass or 1) for mass in masses_of(weights, sizes)], sizes).to(values)
    return values / masses if weights is None else values * weights.to(values) / masses
