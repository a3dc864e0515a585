"""THE SEAM: what an algorithm can ask of a group of clients that it can only address collectively.

An algorithm is written once against `Cohort` and runs unchanged on any engine: one client after another in this
process, all clients as stacked tensors, remote machines. Wrappers (the ledger, faults, a virtual clock) are cohorts
around a cohort.

The cohort decides which clients take part (sampling, drop-outs, deadlines). An algorithm reads this from the results
and never assumes that all clients have answered. All tensors between clients and server pass through here, so they can
be counted here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from cutlayer import seeds
from cutlayer.data.samples import Samples
from cutlayer.types import CutGradients, Evaluation, Round, Rows, Smashed, Step, TailGradients

Predict = Callable[[Sequence[int], Rows], Rows]
"""(clients, their smashed data, as many rows of each, one client after another) -> the server's outputs."""


Tell = Callable[[str, Mapping[str, Any]], None]
"""Is called with an event, as a word and as facts."""

Direction = Literal["up", "down"]


@dataclass(frozen=True)
class Held:
    """The client models that can be read without asking a client on another machine, under the names of the whole
    model.

    They are parameters and buffers of each client, or those of a single model if `everyones` is true. If there are too
    many to read, `models` are those of some clients, and `mean` is the mean of all, weighted by their samples.
    """

    models: Mapping[int, Mapping[str, Tensor]]
    everyones: bool
    mean: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Crossed:
    """Bytes of rows on their way between `clients` and the server: a number for each client, or the number for one
    `common` message to all of them.
    """

    direction: Direction
    clients: Sequence[int]
    counts: int | np.ndarray
    common: bool = False


@dataclass(frozen=True)
class Footprint:
    """Bytes of other things that may move: a client model (parameters and buffers), its optimiser's state, and the
    gradient of its trained parameters.
    """

    model: int
    optimizer: int
    gradient: int = 0


class Beside(Protocol):
    """The server's part of client models, if clients have different cuts and the server holds some blocks for them."""

    def states(self, clients: Sequence[int]) -> Mapping[int, Mapping[str, Tensor]]:
        """What moves of these blocks, for each of `clients`, under the names that a client's module has for it."""

    def take(self, average: Mapping[str, Tensor]) -> None:
        """Set all blocks to their part of an average of whole client models."""


class Summed(NamedTuple):
    """Whose weight gradients were summed, and who has stepped with the sum."""

    gave: tuple[int, ...] = ()
    took: tuple[int, ...] = ()


class Cohort(Protocol):
    """A group of clients. Clients are numbered 0..C-1, with C = len(samples)."""

    @property
    def samples(self) -> Sequence[int]:
        """n_k: number of training samples of each enrolled client."""

    @property
    def masses(self) -> Sequence[float]:
        """The total weight of each enrolled client's training samples in a mean: n_k if all samples count equally."""

    @property
    def shape(self) -> Literal["whole", "split", "u-shaped"]:
        """What clients hold: whole models (nothing crosses when they predict), the part below the cut, or the parts
        below the first and above the second cut.
        """

    @property
    def holder(self) -> int | None:
        """The client that holds the travelling model (sequential learning); None before the first `hand_over`."""

    def footprint(self, client: int) -> Footprint:
        """Bytes of the client's model and optimiser state, now."""

    def begin_round(self, index: int, total: int, lr_factor: float) -> Round:
        """Draw the participants of round `index` of `total`. Their rates are the base rates times `lr_factor`."""

    def seek(self, client: int, batch: int) -> None:
        """Make batch number `batch` (counted from 0 over all epochs) the next batch of `client`."""

    def forward(self, clients: Sequence[int] | None = None, *, labels: bool = True) -> Smashed:
        """Every participant (or each of `clients`) draws its next batch, runs its model and sends smashed data and
        labels.

        Participants that have finished their part of the round stay silent. When all have finished, the result is
        empty. Without `labels` (U-shaped split), labels stay with the clients.
        """

    def arrivals(self, clients: Sequence[int], count: int) -> tuple[int, ...]:
        """All of `clients` work on their next batch, each at its own pace. Returns the first `count` clients whose
        batches reach the server, in the order of arrival; `forward` then gives their rows.

        Clients whose batches arrive together come in the order of `clients`. The result is shorter than `count` if no
        more batches can arrive. From now on, these clients are at work until their models are averaged: an averaging
        leaves out those that have not sent theirs, and a round that begins in the meantime does not change their
        batches.
        """

    def tail(self, features: Smashed) -> TailGradients:
        """U-shaped split: each client finishes the forward pass on its rows of the server's `features`, with its own
        mean loss, and sends dLoss/d(features) back.
        """

    def backward(self, gradients: CutGradients) -> None:
        """Each client of the last `forward` back-propagates its cut gradient and takes one optimiser step."""

    def backward_together(self, gradients: CutGradients) -> Summed:
        """Each client of the last `forward` back-propagates its cut gradient, which is a slice of that of the mean loss
        over all rows, and sends its weight gradient up. Then every client, whether it takes part or not, takes one
        optimiser step with the sum of the weight gradients. Models that start equal stay equal.
        """

    def learn(self, steps: int) -> list[Step]:
        """Each participant takes up to `steps` steps of its part of the model on the loss of its auxiliary head.
        Nothing crosses.

        If the batch sent by the last `forward` still waits for its gradient, it is the first one. There is one record
        per local step, over the clients that took it. The result is empty if no client has a batch left.
        """

    def align(self, heads: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Replace the auxiliary heads of the clients in `heads` by these states, which the server has fitted."""

    def fit(self) -> list[Step]:
        """Each participant trains its whole model on its part of the round, by itself. Nothing crosses. There is one
        record per local step, over the clients that took it.
        """

    def average(self, weights: Mapping[int, float]) -> tuple[int, ...]:
        """Every client's model becomes the sum of weights[k] x model of client k (weights are scaled to sum to one).
        Clients that are at work (`arrivals`) and not among `weights` keep theirs.

        Returns the clients whose models were averaged: all of `weights`, except those that have left in the meantime.
        """

    def hand_over(self, client: int, *, optimizer: bool) -> None:
        """The travelling model moves to `client` (which may hold it already), with its optimiser state if requested."""

    def evaluate(self, samples: Samples, predict: Predict, clients: Sequence[int] | None = None) -> Evaluation:
        """The task's metrics of every pair of client model and server model on `samples`, in eval mode. The training
        state does not change. With `clients`, only these clients' models are evaluated.
        """

    def model_state(self, client: int) -> Mapping[str, Tensor]:
        """One client's parameters and buffers, under the names of the whole model."""

    def held(self) -> Held:
        """The client models that are available without asking other machines."""

    def state(self) -> dict[str, Any]:
        """All that a later `load` needs to continue as if nothing had happened: nested dicts of tensors and plain
        values.
        """

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `state()` returned."""


class CohortAround:
    """A cohort around another cohort, which passes everything on. Subclasses override what they do differently."""

    def __init__(self, inner: Cohort) -> None:
        self.inner = inner

    @property
    def samples(self) -> Sequence[int]:
        """As the inner cohort's."""
        return self.inner.samples

    @property
    def masses(self) -> Sequence[float]:
        """As the inner cohort's."""
        return self.inner.masses

    @property
    def shape(self) -> Literal["whole", "split", "u-shaped"]:
        """As the inner cohort's."""
        return self.inner.shape

    @property
    def holder(self) -> int | None:
        """As the inner cohort's."""
        return self.inner.holder

    def footprint(self, client: int) -> Footprint:
        """As the inner cohort's."""
        return self.inner.footprint(client)

    def begin_round(self, index: int, total: int, lr_factor: float) -> Round:
        """Passed on."""
        return self.inner.begin_round(index, total, lr_factor)

    def seek(self, client: int, batch: int) -> None:
        """Passed on."""
        self.inner.seek(client, batch)

    def forward(self, clients: Sequence[int] | None = None, *, labels: bool = True) -> Smashed:
        """Passed on."""
        return self.inner.forward(clients, labels=labels)

    def arrivals(self, clients: Sequence[int], count: int) -> tuple[int, ...]:
        """Passed on."""
        return self.inner.arrivals(clients, count)

    def tail(self, features: Smashed) -> TailGradients:
        """Passed on."""
        return self.inner.tail(features)

    def backward(self, gradients: CutGradients) -> None:
        """Passed on."""
        self.inner.backward(gradients)

    def backward_together(self, gradients: CutGradients) -> Summed:
        """Passed on."""
        return self.inner.backward_together(gradients)

    def learn(self, steps: int) -> list[Step]:
        """Passed on."""
        return self.inner.learn(steps)

    def align(self, heads: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Passed on."""
        self.inner.align(heads)

    def fit(self) -> list[Step]:
        """Passed on."""
        return self.inner.fit()

    def average(self, weights: Mapping[int, float]) -> tuple[int, ...]:
        """Passed on."""
        return self.inner.average(weights)

    def hand_over(self, client: int, *, optimizer: bool) -> None:
        """Passed on."""
        self.inner.hand_over(client, optimizer=optimizer)

    def evaluate(self, samples: Samples, predict: Predict, clients: Sequence[int] | None = None) -> Evaluation:
        """Passed on."""
        return self.inner.evaluate(samples, predict, clients)

    def model_state(self, client: int) -> Mapping[str, Tensor]:
        """As the inner cohort's."""
        return self.inner.model_state(client)

    def held(self) -> Held:
        """As the inner cohort's."""
        return self.inner.held()

    def state(self) -> dict[str, Any]:
        """The inner cohort's state."""
        return {"inner": self.inner.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take a state that `state()` returned."""
        self.inner.load(state["inner"])


def draw_participants(
    seed: int, index: int, clients: int, fraction: float, present: Sequence[int] | None = None
) -> tuple[int, ...]:
    """The clients of round `index`, in order: max(1, fraction x C rounded half up) of them, drawn without replacement.
    If `present` is given, only these are drawn from, and C is their number.
    """
    if present is not None:
        return tuple(present[k] for k in draw_participants(seed, index, len(present), fraction))
    count = max(1, math.floor(fraction * clients + 0.5))
    if count >= clients:
        return tuple(range(clients))
    drawn = seeds.generator(seed, "participants", index).choice(clients, count, replace=False)
    return tuple(sorted(int(k) for k in drawn))
