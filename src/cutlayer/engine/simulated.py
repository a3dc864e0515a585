"""The common part of all simulated cohorts: private data, batches, participants, and the holder of the travelling
model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from cutlayer.averaging import State
from cutlayer.averagings import Averaging
from cutlayer.averagings.mean import WeightedMean
from cutlayer.cohort import Beside, Held, draw_participants
from cutlayer.data.batches import Batches, Clocks, Drawn
from cutlayer.data.samples import Samples
from cutlayer.data.sampling import Sampling, Turns, dealt
from cutlayer.engine.shelf import StatesFolder
from cutlayer.frozen import moving, trains
from cutlayer.gradients import summed
from cutlayer.optim import MakeOptimizer
from cutlayer.scoring import ROWS_PER_PASS, OutputsOf, Scores, evaluate, evaluate_together, judged
from cutlayer.stored import Count, Digits, MalformedError, below, fit
from cutlayer.tasks import Task
from cutlayer.tasks.classification import Classification
from cutlayer.types import Round, Rows, Smashed, Step

Shape = Literal["whole", "split", "u-shaped"]
Judging = Literal["mean", "average", "ensemble"]
ClientModel = tuple[nn.Module, nn.Module | None]  # (lower part, tail or auxiliary head)


@dataclass(frozen=True, kw_only=True)
class Routine:
    """How clients train, simulated or remote. `lr` is the base rate; a round is `local_steps` batches or `local_epochs`
    passes; `alike` says that all models start equal; `eval_clients` how many models are evaluated (None: all);
    `judge_by` whether each model is judged, their average, or all of them together; `task` defines the loss of a row
    and the metrics; `class_names` are the names of the classes, if any; `rule` says how models are averaged; `sampling`
    how many rows a client brings to a step; `carries` that clients work at their own pace, and that their work
    continues from one round to the next. If clients have different cuts, `cuts` [C] are their numbers, and `beside` are
    the blocks that the server holds for the clients' models.
    """

    lr: float
    batch: int
    seed: int = 0
    shape: Shape = "split"
    participation: float = 1.0
    local_epochs: int = 1
    local_steps: int | None = None
    alike: bool = True
    eval_clients: int | None = None
    judge_by: Judging = "mean"
    task: Task = field(default_factory=Classification)
    class_names: tuple[str, ...] = ()
    sampling: Sampling = "fixed"
    rule: Averaging = field(default_factory=WeightedMean)
    carries: bool = False
    cuts: Sequence[int] = ()
    beside: Beside | None = None

    def participants(self, index: int, clients: int) -> tuple[int, ...]:
        """The clients of round `index`."""
        return draw_participants(self.seed, index, clients, self.participation)

    def quota(self, per_epoch: np.ndarray) -> np.ndarray:
        """The clients' batches in a round, if they have `per_epoch` [C] in an epoch of their own data."""
        return np.full_like(per_epoch, self.local_steps) if self.local_steps else self.local_epochs * per_epoch

    def turns(self, index: int, clients: Sequence[int], samples: Sequence[int]) -> Turns | None:
        """The sizes of the batches of round `index`, in which `clients` take part, if they are not b; `samples` [C] are
        those of all clients.
        """
        if self.sampling == "fixed":
            return None
        local = self.local_epochs, self.local_steps
        return dealt(self.sampling, samples, clients, self.batch, self.seed, index, local)

    def judge(
        self,
        samples: Samples,
        models: Sequence[int],
        outputs_of: OutputsOf,
        *,
        at_once: int | None = None,
        rows_per_pass: int = ROWS_PER_PASS,
    ) -> Scores:
        """The scores of the clients' models `models` on `samples` (see `scoring.evaluate`)."""
        how: dict[str, Any] = {"at_once": at_once, "rows_per_pass": rows_per_pass, "names": self.class_names}
        one_by_one = self.judge_by != "ensemble" or len(models) == 1
        return (evaluate if one_by_one else evaluate_together)(self.task, samples, models, outputs_of, **how)

    @property
    def routine(self) -> dict[str, Any]:
        """Only these fields, by name, for setting up others in the same way."""
        return {f.name: getattr(self, f.name) for f in fields(Routine)}


@dataclass(frozen=True)
class Clients(Routine):
    """The setup of a simulated group of clients, for every engine.

    `models` are (lower part, tail or auxiliary head or None) per client; `ranks` [C] those of their adapters, if they
    differ; `rows` each client's indices into `data`; `shifts` [C, K] are added to the scores in losses that clients
    compute (None: nothing). `present` says which clients can take part in the coming round (None: all). `place` is the
    place of the states of clients that are not in use (None: in memory).
    """

    models: Sequence[ClientModel]
    data: Samples
    rows: Sequence[np.ndarray]
    make_optimizer: MakeOptimizer
    shifts: Tensor | None = None
    present: Callable[[], Sequence[int]] | None = None
    place: StatesFolder | None = None
    ranks: Sequence[int] = ()

    def called(self, client: int) -> int:
        """The global number of client number `client`: the same, unless these are part of a larger group
        (`OwnClients`).
        """
        return client

    def summed(self, gradients: Sequence[Mapping[str, Tensor]], module: nn.Module) -> dict[str, Tensor]:
        """The sum of clients' weight gradients, by the names of their `module`."""
        return summed(gradients)

    def participants(self, index: int, clients: int) -> tuple[int, ...]:
        """The clients of round `index`, drawn from those that are present."""
        present = None if self.present is None else self.present()
        return draw_participants(self.seed, index, clients, self.participation, present)

    def shifts_of(self, clients: Sequence[int] | np.ndarray, sizes: int | Sequence[int]) -> Tensor | None:
        """The shifts of the rows of `clients`, whose batches have `sizes` rows, one after another: [R, K]."""
        if self.shifts is None:
            return None
        each = sizes if isinstance(sizes, int) else torch.tensor(list(sizes))
        return torch.repeat_interleave(self.shifts[list(clients)], each, 0)


class SimulatedCohort(ABC):
    """The part of the seam that does not depend on how models are computed."""

    def __init__(self, setup: Clients) -> None:
        self.setup = setup
        self._batches = Batches(setup.rows, setup.batch, setup.seed, [setup.called(k) for k in range(len(setup.rows))])
        self._quota = np.zeros(len(setup.rows), np.int64)  # batches left in this round
        self._participants: tuple[int, ...] = ()
        self._turns: Turns | None = None  # of this round, if batches do not have b rows
        self._rate = setup.lr
        self._alike = setup.alike  # all client models are known to be equal
        lower, tail = setup.models[0]
        # Blocks at the server are averaged even if no tensor of the clients' parts is.
        self._buffered = bool(setup.cuts) or (not trains(lower, tail) and any(True for _ in lower.buffers()))
        # Auxiliary heads that are not trained here: each client still has its own.
        self._heads_apart = setup.shape == "split" and tail is not None and not trains(tail)
        self._holder: int | None = None
        self._at_work: set[int] = set()  # named by `arrivals`, and not averaged since
        self._has_average: int | None = None  # has the average, unlike others that are at work
        self._kept: list[Drawn] | None = None
        self._origin: State | None = None  # the models' origin, if the averaging rule uses it

    def keep_batches(self) -> list[Drawn]:
        """A list to which every batch is added from now on; its reader empties it."""
        self._kept = []
        return self._kept

    def _begin_from(self, state: State) -> None:
        """All clients have these parameters and buffers now."""
        if self.setup.rule.relative:
            self._origin = {name: tensor.detach().clone() for name, tensor in state.items()}

    def no_longer_alike(self) -> None:
        """Note that the models may differ now, because those of other processes have changed."""
        self._alike = len(self._quota) == 1

    @property
    def samples(self) -> Sequence[int]:
        """n_k of each enrolled client."""
        counts: list[int] = self._batches.counts.tolist()
        return counts

    @cached_property
    def masses(self) -> Sequence[float]:
        """The total weight of each enrolled client's training rows."""
        return [mass_of(self.setup.task, self.setup.data.y, rows) for rows in self.setup.rows]

    @property
    def shape(self) -> Shape:
        """What the clients hold."""
        return self.setup.shape

    @property
    def holder(self) -> int | None:
        """The client that holds the travelling model."""
        return self._holder

    def begin_round(self, index: int, total: int, lr_factor: float) -> Round:
        """Draw the participants and give each its number of batches: local steps, or local epochs of its own data."""
        s = self.setup
        drawn, going_on = s.participants(index, len(self._quota)), self._going_on
        self._participants = tuple(sorted({*drawn, *going_on}))
        who = np.array(self._participants, np.int64)
        self._quota[who] = s.quota(self._batches.per_epoch[who])
        for k, left in going_on.items():
            self._quota[k] = left
        self._turns = s.turns(index, self._participants, self.samples)
        if self._turns is not None:
            self._quota[who] = list(self._turns.batches.values())
        self._rate = s.lr * lr_factor
        sizes = () if self._turns is None else self._turns.sizes
        return Round(index, total, self._participants, tuple(self._quota[who].tolist()), s.seed, sizes)

    @property
    def _going_on(self) -> dict[int, int]:
        """The remaining batches of clients that are at work."""
        return {k: int(self._quota[k]) for k in sorted(self._at_work) if self._quota[k]}

    def arrivals(self, clients: Sequence[int], count: int) -> tuple[int, ...]:
        """All clients are equally fast here: the first `count` of `clients`. A clock around this cohort names them in
        the order of their arrival.
        """
        self._at_work |= set(clients)
        if self._has_average in clients:
            self._has_average = None
        return tuple(clients[:count])

    def _passed_over(self, averaged: Collection[int]) -> set[int]:
        """The clients at work that have not sent their models to be `averaged`; the others are no longer at work."""
        self._at_work -= set(averaged)
        self._has_average = next(iter(averaged)) if self._at_work else None
        self._alike = not (self._at_work or self.setup.ranks)
        return self._at_work

    def seek(self, client: int, batch: int) -> None:
        """The next batch of `client` is its batch number `batch`."""
        self._batches.drawn[client] = batch

    def _willing(self, clients: Sequence[int] | None) -> tuple[int, ...]:
        """The participants (or those of `clients`) that have batches left in this round, or rows for this step."""
        if clients is None and self._turns is not None:
            return self._turns.together()
        asked = self._participants if clients is None else clients
        left = self._quota[list(asked)] > 0
        return tuple(asked) if left.all() else tuple(k for k, some in zip(asked, left, strict=True) if some)

    def _draw(self, clients: Sequence[int], among: int = 1) -> tuple[Samples, np.ndarray, np.ndarray]:
        """The next batches of `clients`, one after another: samples [R], sizes [C], and clocks [C] (how many batches
        each had drawn before). In each step, `among` clients draw, one by one.
        """
        foreseen = self._foresee(clients, among)
        rows, sizes, clocks = self._batches.draw(clients, None if self._turns is None else self._turns.take(clients))
        self._quota[list(clients)] -= 1
        batch = self.setup.data.batch(
            rows, self._batches.epochs(clients, sizes, clocks), sizes.tolist() if foreseen else ()
        )
        if self._kept is not None:
            self._kept.append(Drawn(batch.rows, sizes, clocks))
        return batch, sizes, clocks

    def _foresee(self, clients: Sequence[int], among: int = 1) -> bool:
        """Tell lazily read data the next batches of `clients`, for as many steps as is useful; `among` is the number of
        clients that draw one by one in each. Returns whether the data use this.
        """
        ahead = self.setup.data.ahead
        if not ahead or self._turns is not None:
            return False
        steps = 1 - (-ahead // max(among, len(clients)))
        self.setup.data.foresee(self._batches.coming(clients, self._quota[list(clients)], steps))
        return True

    def _smashed(
        self, rows: Rows, y: Tensor, clients: tuple[int, ...], sizes: tuple[int, ...], labels: bool
    ) -> Smashed:
        """The smashed data that clients send: with targets `y` [R, t...], or without `labels` (which stay with
        them).
        """
        if not labels:
            return Smashed(rows, torch.empty(sum(sizes), 0), clients, sizes)
        return Smashed(rows, y, clients, sizes, weights=self.setup.task.weights(y))

    def _drift(self) -> None:
        """After a forward pass: clients with buffers become different even without a step."""
        if self._buffered:
            self._alike = len(self._quota) == 1

    def _judged(self, clients: Sequence[int] | None = None) -> tuple[list[int], list[int]]:
        """(clients whose scores are requested, clients whose models are judged): models known to be equal are judged
        once.
        """
        if self._holder is not None:
            return [self._holder] if clients is None else list(clients), [self._holder]
        everyone = judged(len(self._quota), self.setup.eval_clients, self.setup.seed)
        everyone = everyone if clients is None else list(clients)
        if self._has_average is not None:  # the server's copy
            return everyone, [self._has_average]
        return everyone, everyone[:1] if self._alike else everyone

    @abstractmethod
    def model_state(self, client: int) -> dict[str, Tensor]:
        """One client's parameters and buffers, under the names of the whole model."""

    def held(self) -> Held:
        """The models of all clients: the travelling model, the common model, or each client's own."""
        one = self._alike or self._holder is not None or self._has_average is not None
        clients = [self._has_average or self._holder or 0] if one else range(len(self._quota))
        return Held({k: self.model_state(k) for k in clients}, one)

    def _base_state(self) -> dict[str, Any]:
        origin = {} if self._origin is None else {"origin": dict(self._origin)}
        own = {**self._batches.state(), "holder": self._holder, "alike": self._alike, **origin}
        if not self._at_work:
            return own
        left = {str(k): int(self._quota[k]) for k in sorted(self._at_work)}
        return {**own, "at_work": left, "has_average": self._has_average}

    def _load_base(self, state: CohortState) -> None:
        count = len(self._batches.drawn)
        below([] if state.holder is None else [state.holder], count, "holder")
        self._batches.load(state)
        self._holder, self._alike = state.holder, state.alike
        below([*map(int, state.at_work), *([] if state.has_average is None else [state.has_average])], count, "at_work")
        self._at_work, self._has_average = set(map(int, state.at_work)), state.has_average
        for k, left in state.at_work.items():
            self._quota[int(k)] = left
        if state.origin is not None:
            if not self.setup.rule.relative:
                raise MalformedError("it holds 'origin', which the rule of averaging does not look at")
            fit(state.origin, self._origin or state.origin, "the origin")
            self._begin_from(state.origin)


class CohortState(Clocks, kw_only=True):
    """The state that all simulated cohorts have."""

    holder: Count | None
    alike: bool
    origin: dict[str, Tensor] | None = None
    at_work: dict[Digits, Count] = msgspec.field(default_factory=dict)
    has_average: Count | None = None


def model_bytes(module: nn.Module) -> int:
    """Bytes of a model's parameters and buffers as they are sent: tied weights once, frozen ones never."""
    return sum({t.data_ptr(): t.nbytes for t in moving(module).values()}.values())


def gradient_bytes(module: nn.Module) -> int:
    """Bytes of the gradient of a model's trained parameters: tied weights once."""
    return sum(p.nbytes for p in module.parameters() if p.requires_grad)


def mass_of(task: Task, targets: Tensor, rows: np.ndarray | None = None) -> float:
    """The total weight of targets [n, t...] (or those of `rows`) in a mean: n if all count equally."""
    own = targets if rows is None else targets[torch.from_numpy(rows).to(targets.device)]
    weights = task.weights(own)
    return float(len(own)) if weights is None else weights.double().sum().item()


class Local(NamedTuple):
    """A local step of a client: its mean loss, its rows, their total weight."""

    loss: float
    rows: int
    mass: float


def together(taken: Mapping[int, list[Local]], t: int) -> Step:
    """Local step number t of all clients that took this many, given each client's local steps."""
    here = {k: steps[t] for k, steps in taken.items() if t < len(steps)}
    rows = sum(step.rows for step in here.values())
    mass = sum(step.mass for step in here.values())
    loss = sum(step.loss * step.mass for step in here.values()) / (mass or 1)
    own = [step.loss for step in here.values()]
    return Step(torch.tensor([loss, *own], dtype=torch.float64), tuple(here), rows, mass=mass)
