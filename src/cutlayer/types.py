"""The values that cross the boundary between clients and server.

Shape legend: C clients that take part in the step, b_k rows of client k's batch, R = sum of b_k rows of all of them
("the server's effective batch"), s... the shape of one sample's smashed data.

Rows of different clients are concatenated along the batch, client after client, in the order of `clients`.
A cut may let several tensors cross (inside a residual block, say), so smashed data and their gradients are tuples.
Tensors that are not floating point (masks, positions) go up but have no gradient to come down; in gradient tuples they
are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

Rows = tuple[Tensor, ...]


@dataclass(frozen=True)
class Smashed:
    """Smashed data: what `clients` sent up in one step, with the labels. It is empty (falsy) if no client had a batch
    left.

    `weights` are the weights of the rows in the mean loss (None: all are 1). If clients have their own cuts, rows
    differ in shape; then `rows` is empty, and `parts` contains the rows of each cut.
    """

    rows: Rows  # each [R, s...]
    labels: Tensor  # [R, t...]
    clients: tuple[int, ...]  # [C]
    sizes: tuple[int, ...]  # [C], the b_k
    written: tuple[int, ...] = ()  # [C], bytes in which each client's rows arrived, if only the carrier knows them
    weights: Tensor | None = None  # [R]
    parts: tuple[Smashed, ...] = ()

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def owner(self) -> Tensor:
        """[R]: the client to which each row belongs."""
        return torch.repeat_interleave(torch.tensor(self.clients), torch.tensor(self.sizes))

    def sizes_of(self, clients: Container[int]) -> dict[int, int]:
        """Those of `clients` that sent something, in order, with their numbers of rows."""
        return {k: size for k, size in zip(self.clients, self.sizes, strict=True) if k in clients}

    @property
    def masses(self) -> tuple[float, ...]:
        """The total weight of each client's rows: [C], the b_k if all rows count equally."""
        return masses_of(self.weights, self.sizes)

    def masses_of(self, clients: Container[int]) -> tuple[float, ...]:
        """The total weight of the rows of each of `clients` that sent something, in order."""
        return tuple(mass for k, mass in zip(self.clients, self.masses, strict=True) if k in clients)

    def take(self, rows: Rows, clients: Container[int]) -> Rows:
        """The rows of `clients`, from rows shaped as the smashed data, [R, s...] each."""
        return tuple(select(r, self._at(clients)) for r in rows)

    def among(self, rows: Tensor, clients: Container[int]) -> Tensor:
        """The inverse: the rows of `clients` at their places among the rows of all clients [R, s...]. All other rows
        are 0.
        """
        everyones = rows.new_zeros(len(self), *rows.shape[1:])
        return everyones.index_copy_(0, self._at(clients).to(rows.device), rows)

    def _at(self, clients: Container[int]) -> Tensor:
        """The positions of the rows of those of `clients` that sent something."""
        return torch.from_numpy(np.repeat([k in clients for k in self.clients], self.sizes).nonzero()[0])

    @property
    def here(self) -> Smashed:
        """The part that lies in this process. This is all of it, unless several processes train one run together
        (`Spread`).
        """
        return self

    def added(self, tensors: Rows) -> None:
        """Replace each tensor, a sum over the rows in this process, by the same sum over all rows."""

    def only(self, client: int) -> Smashed:
        """The part of one client."""
        at = self.clients.index(client)
        start = sum(self.sizes[:at])
        stop = start + self.sizes[at]
        return Smashed(
            tuple(r[start:stop] for r in self.rows),
            self.labels[start:stop],
            (client,),
            (stop - start,),
            weights=None if self.weights is None else self.weights[start:stop],
        )


@dataclass(frozen=True)
class Spread(Smashed):
    """Smashed data whose rows lie in several processes: `clients` [C] and `sizes` [C] are those of the whole step,
    `counting` [C] the total weight of each client's rows; `rows`, `labels` and `weights` are those of `mine`, the
    clients in this process. `add` sums tensors over the processes, in place.

    Gradients, also in `CutGradients`, are those of the rows in this process.
    """

    mine: tuple[int, ...] = ()
    counting: tuple[float, ...] = ()
    add: Callable[[Rows], None] = lambda tensors: None

    @property
    def masses(self) -> tuple[float, ...]:
        """The total weight of each client's rows: [C]."""
        return self.counting

    @property
    def here(self) -> Smashed:
        """The part of the clients in this process."""
        sizes = tuple(self.sizes_of(set(self.mine)).values())
        return Smashed(self.rows, self.labels, self.mine, sizes, weights=self.weights)

    def counted(self, masses: Sequence[float]) -> Spread:
        """The same, if the rows of each client have the total weight `masses` [C], and equal weights within a
        client.
        """
        of = dict(zip(self.clients, masses, strict=True))
        here = self.here
        each = torch.tensor([of[k] / size for k, size in zip(here.clients, here.sizes, strict=True)])
        weights = torch.repeat_interleave(each.double(), torch.tensor(here.sizes, dtype=torch.long))
        return replace(self, counting=tuple(masses), weights=weights)

    def added(self, tensors: Rows) -> None:
        """Each tensor := its sum over the processes."""
        self.add(tensors)

    def take(self, rows: Rows, clients: Container[int]) -> Rows:
        """The rows of `clients` among those in this process."""
        return self.here.take(rows, clients)

    def only(self, client: int) -> Smashed:
        """The part of one client in this process."""
        return self.here.only(client)


@dataclass(frozen=True)
class CutGradients:
    """Cut gradients on their way down: own rows for some clients (unicast), one common gradient for others (broadcast).

    `own` holds the concatenated rows of `clients` (with `sizes`). Every active client receives `common`. If it is [max
    b_k, s...], a client with fewer rows uses the first b_k. If it is [1, s...], it is used for every row. If clients
    have their own cuts, `own` and `common` are empty, and `parts` contains the gradients of each cut.
    """

    own: Rows
    clients: tuple[int, ...]
    sizes: tuple[int, ...]
    common: Rows = ()
    active: tuple[int, ...] = ()
    parts: tuple[CutGradients, ...] = ()

    def without_rows(self) -> CutGradients:
        """For the same clients, if their lower parts have nothing to train: each takes its step, and no gradient goes
        down.
        """
        return CutGradients((), self.clients, self.sizes, active=self.active)

    def for_client(self, client: int, size: int) -> Rows:
        """What `client`, whose batch has `size` rows, back-propagates: each [size, s...]."""
        if self.parts:
            part = next(p for p in self.parts if client in p.clients or client in p.active)
            return part.for_client(client, size)
        if client in self.active:
            return tuple(c.expand(size, *c.shape[1:]) if len(c) == 1 else c[:size] for c in self.common)
        at = self.clients.index(client)
        start = sum(self.sizes[:at])
        return tuple(r[start : start + self.sizes[at]] for r in self.own)

    def for_all(self, clients: Sequence[int], sizes: Sequence[int]) -> Rows:
        """What `clients`, whose batches have `sizes` rows, back-propagate, one after another: each [R, s...]."""
        if not self.active:
            return self.own
        active = np.zeros(max(clients) + 1, bool)
        active[list(self.active)] = True
        shared = np.repeat(active[list(clients)], sizes)
        found = []
        for own, common in zip(self.own, self.common, strict=True):
            at = np.empty(len(shared), np.int64)  # where each row is, in own rows followed by common ones
            at[~shared] = np.arange(len(own))
            at[shared] = len(own) + (row_numbers(sizes)[shared] if len(common) > 1 else 0)
            last = channels_last(own if len(own) else common)
            both = torch.cat([as_matrix(own, last), as_matrix(common, last)])
            rows = both.index_select(0, torch.from_numpy(at).to(both.device))
            found.append(as_rows(rows, common.shape[1:], last))
        return tuple(found)


def by_cut(
    rows: Mapping[int, Rows], cuts: Sequence[int], written: Mapping[int, int] | None = None
) -> tuple[Smashed, ...]:
    """The rows of several clients, whose cuts have the numbers `cuts` [C], as those of each cut; `written` are their
    bytes, where only the carrier knows them.
    """
    groups: dict[int, list[int]] = {}
    for k in rows:
        groups.setdefault(cuts[k], []).append(k)
    found = []
    for who in groups.values():
        joined = tuple(torch.cat(tensors) for tensors in zip(*(rows[k] for k in who), strict=True))
        sizes, counts = tuple(len(rows[k][0]) for k in who), tuple(written[k] for k in who) if written else ()
        found.append(Smashed(joined, torch.empty(0), tuple(who), sizes, counts))
    return tuple(found)


@dataclass(frozen=True)
class TailGradients:
    """U-shaped split: what the clients' tails return for the server's features: dLoss_k/d(features), each [R, f...]."""

    rows: Rows
    losses: Tensor  # [C], each client's own mean loss
    clients: tuple[int, ...]
    sizes: tuple[int, ...]
    written: tuple[int, ...] = ()  # as in Smashed
    masses: tuple[float, ...] = ()  # [C], the total weight of each client's rows; empty: the b_k


@dataclass(frozen=True)
class Round:
    """One round of training: a local epoch of every participant, or the requested number of local epochs or steps.

    This is round `index` of `total`. `clients` [C] take part, with `batches` [C] each. `seed` names all randomness.
    `sizes` [C][steps] are the rows that each client brings to each step, if batches have other sizes than b.
    """

    index: int
    total: int
    clients: tuple[int, ...]
    batches: tuple[int, ...]
    seed: int
    sizes: tuple[tuple[int, ...], ...] = ()

    @property
    def steps(self) -> int:
        """Number of batches of the client with the most; if clients sit out steps, the number of steps."""
        return max(map(len, self.sizes)) if self.sizes else max(self.batches)

    def progress(self, step: int) -> float:
        """Fraction of the whole training done before the round's `step`-th step, in [0, 1), to nine digits."""
        return round((self.index * self.steps + step) / (self.steps * self.total), 9)


@dataclass(frozen=True, eq=False)
class Step:
    """What one training step reports.

    `means` [1 + C] are the mean losses over the step's rows and over each client's rows. They stay on the device until
    `loss` or `losses` is read, so a step does not wait for its own numbers. `samples` = R. The clients in `active`
    shared a common cut gradient. `server_lr` is the rate of the server's step (None without a server). `mass` is the
    total weight of the rows, if this may differ from their number.
    """

    means: Tensor
    clients: tuple[int, ...]
    samples: int
    active: tuple[int, ...] = ()
    server_lr: float | None = None
    mass: float | None = None

    @cached_property
    def _read(self) -> tuple[float, ...]:
        return tuple(self.means.tolist())

    @property
    def loss(self) -> float:
        """The mean loss over the step's rows."""
        return self._read[0]

    @property
    def losses(self) -> tuple[float, ...]:
        """The mean loss over each client's rows: [C]."""
        return self._read[1:]


@dataclass(frozen=True)
class Evaluation:
    """Results of models on held-out samples. `scores` contains, for each client k, the metrics of (client model k,
    server model) by name; "loss", the mean loss, is always among them.

    A metric may have several numbers (one per class), or None (it is not defined on these samples).
    """

    scores: Mapping[int, Mapping[str, Any]]
    samples: int

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the metrics."""
        return tuple(next(iter(self.scores.values())))

    def each(self, metric: str) -> dict[int, Any]:
        """The values of one metric for each client's model."""
        return {k: scores[metric] for k, scores in self.scores.items()}

    def mean(self, metric: str) -> Any:
        """The mean of a metric over those clients for which it is defined, number by number; None if there are none."""
        return _mean(list(self.each(metric).values()))

    @property
    def loss(self) -> float:
        """Mean over clients of the mean loss of (client model k, server model)."""
        return float(self.mean("loss"))


def _mean(values: Sequence[Any]) -> Any:
    values = [value for value in values if value is not None]
    if not values:
        return None
    if isinstance(values[0], (tuple, list)):
        return tuple(_mean(several) for several in zip(*values, strict=True))
    return sum(values) / len(values)


def as_tuple(given: Any) -> Rows:
    """The output of a part of a model as a tuple of tensors. It may be one tensor, a tuple or list, or a dictionary or
    output with names (as in Hugging Face), of which `logits` (or `out`) come first.
    """
    if isinstance(given, Tensor):
        return (given,)
    if isinstance(given, Mapping):
        first = [key for key in ("logits", "out") if key in given]
        given = [given[key] for key in [*first, *(key for key in given if key not in first)]]
    elif hasattr(given, "logits"):
        return as_tuple(given.logits)
    return tuple(value for value in given if isinstance(value, Tensor))


def masses_of(weights: Tensor | None, sizes: Sequence[int]) -> tuple[float, ...]:
    """The total weight of each client's rows: [C], from each row's weight [R] (None: 1) and the b_k."""
    if weights is None:
        return tuple(sizes)
    return tuple(part.sum().item() for part in weights.double().split(list(sizes)))


def aligned(rows: Rows) -> Rows:
    """The same numbers at a memory address that is a multiple of 64 bytes, copied if necessary. Kernels round
    differently for other addresses, and tensors from a network may lie at any address.
    """
    return tuple(r.clone() if r.data_ptr() % 64 or 0 in r.stride() else r for r in rows)


def is_continuous(tensor: Tensor) -> bool:
    """Whether its numbers are real or complex. Only such tensors are trained and averaged, and must be finite."""
    return tensor.is_floating_point() or tensor.is_complex()


def as_real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones, [..., 2]; others as they are."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def joined(rows: Rows) -> Tensor:
    """All real tensors among `rows`, as one row per sample: [R, d]. If none is real, all tensors."""
    real = [r.flatten(1) for r in rows if r.is_floating_point()]
    return torch.cat(real or [r.flatten(1).float() for r in rows], 1)


def as_matrix(rows: Tensor, last: bool) -> Tensor:
    """[R, s...] -> [R, numbers of a row], with an image's channels `last` or first. It is a view if memory has this
    layout.
    """
    return (rows.permute(0, 2, 3, 1) if last else rows).reshape(len(rows), math.prod(rows.shape[1:]))


def as_rows(matrix: Tensor, shape: Sequence[int], last: bool) -> Tensor:
    """[n, numbers of a row] -> [n, s...], the inverse of `as_matrix`; `shape` is s."""
    if last:
        channels, height, width = shape
        return matrix.view(-1, height, width, channels).permute(0, 3, 1, 2)
    return matrix.view(-1, *shape)


def channels_last(rows: Tensor) -> bool:
    """Whether images [n, c, h, w] lie in memory with their channels last."""
    return rows.dim() == 4 and not rows.is_contiguous() and rows.is_contiguous(memory_format=torch.channels_last)


def select(rows: Tensor, at: Tensor) -> Tensor:
    """The rows [n, s...] at positions `at` [n] of `rows` [R, s...]."""
    last = channels_last(rows)
    chosen = as_matrix(rows, last).index_select(0, at.to(rows.device))
    return as_rows(chosen, rows.shape[1:], last)


def row_numbers(sizes: Sequence[int]) -> np.ndarray:
    """Each row's number in its client's batch: [R]."""
    counts = np.asarray(sizes, np.int64)
    return np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
