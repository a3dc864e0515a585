"""The values that cross the boundary between clients and server.

Shape legend: C clients that take part in the step, b_k rows of client k's batch, R = sum of b_k rows of all of them
("the server's effective batch"), s... the shape of one sample's smashed data.

Rows of different clients are concatenated along the batch, client after client, in the order of `clients`.
A cut may let several tensors cross (inside a residual block, say), so smashed data and their gradients are tuples.
Tensors that are not floating point (masks, positions) go up but have no gradient to come down; in gradient tuples they
are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Rows = tuple[Tensor, ...]


@dataclass(frozen=True)
class Smashed:
    """Smashed data: what `clients` sent up in one step, with the labels. Empty (falsy) when nobody had a batch left."""

    rows: Rows  # each [R, s...]
    labels: Tensor  # [R]
    clients: tuple[int, ...]  # [C]
    sizes: tuple[int, ...]  # [C], the b_k

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def owner(self) -> Tensor:
        """[R]: whose row each row is."""
        return torch.repeat_interleave(torch.tensor(self.clients), torch.tensor(self.sizes))

    def only(self, client: int) -> Smashed:
        """The part of one client."""
        at = self.clients.index(client)
        start = sum(self.sizes[:at])
        stop = start + self.sizes[at]
        return Smashed(tuple(r[start:stop] for r in self.rows), self.labels[start:stop], (client,), (stop - start,))


@dataclass(frozen=True)
class CutGradients:
    """Cut gradients on their way down: own rows for some clients (unicast), one common gradient for others (broadcast).

    `own` holds the rows of `clients` (sizes `sizes`), concatenated; every active client receives `common`:
    [max b_k, s...], of which a client with fewer rows uses the first b_k; or [1, s...], used for every row.
    """

    own: Rows
    clients: tuple[int, ...]
    sizes: tuple[int, ...]
    common: Rows = ()
    active: tuple[int, ...] = ()

    def for_client(self, client: int, size: int) -> Rows:
        """What `client`, whose batch has `size` rows, back-propagates: each [size, s...]."""
        if client in self.active:
            return tuple(c.expand(size, *c.shape[1:]) if len(c) == 1 else c[:size] for c in self.common)
        at = self.clients.index(client)
        start = sum(self.sizes[:at])
        return tuple(r[start : start + self.sizes[at]] for r in self.own)


@dataclass(frozen=True)
class TailGradients:
    """U-shaped split: what the clients' tails return for the server's features: dLoss_k/d(features), each [R, f...]."""

    rows: Rows
    losses: Tensor  # [C], each client's own mean loss
    clients: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Round:
    """One round of training: a local epoch of every participant, or as many local epochs or steps as were asked for.

    `index` of `total` rounds; `clients` [C] take part, with `batches` [C] to do each; `seed` names all randomness.
    """

    index: int
    total: int
    clients: tuple[int, ...]
    batches: tuple[int, ...]
    seed: int

    @property
    def steps(self) -> int:
        """Number of batches of the busiest client."""
        return max(self.batches)

    def progress(self, step: int) -> float:
        """Fraction of the whole training done before the round's `step`-th step, in [0, 1), to nine digits."""
        return round((self.index * self.steps + step) / (self.steps * self.total), 9)


@dataclass(frozen=True)
class Step:
    """What one training step reports.

    `loss` is the mean over the step's rows, `losses` [C] the mean over each client's rows; `samples` = R;
    `active` shared a common cut gradient; `server_lr` is the rate the server stepped with (None without a server).
    """

    loss: float
    clients: tuple[int, ...]
    losses: tuple[float, ...]
    samples: int
    active: tuple[int, ...] = ()
    server_lr: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """Accuracy in [0, 1] and mean loss on held-out samples, per client model (with the one server model)."""

    accuracies: Mapping[int, float]
    losses: Mapping[int, float]
    samples: int

    @property
    def accuracy(self) -> float:
        """Mean over clients of the accuracy of (client model k, server model), in [0, 1]."""
        return sum(self.accuracies.values()) / len(self.accuracies)

    @property
    def loss(self) -> float:
        """Mean over clients of the mean loss of (client model k, server model)."""
        return sum(self.losses.values()) / len(self.losses)
