"""The samples of the clients' next batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cutlayer import seeds
from cutlayer.stored import Count, Stored, sized
from cutlayer.types import Rows


class Clocks(Stored, kw_only=True):
    """The progress of clients in their sequences: batches drawn, and rows taken if batches have different sizes."""

    drawn: list[Count]
    taken: list[Count] | None = None

    def check(self, clients: int) -> None:
        """Raises MalformedError unless there is a clock for each client."""
        for name, values in (("drawn", self.drawn), ("taken", self.taken)):
            if values is not None:
                sized(values, clients, name)


class Batches:
    """Every client's endless sequence of batches: epoch after epoch, each in its own order.

    An epoch deals every one of a client's n samples once; its last batch has the n mod b samples that remain. The order
    of epoch e depends only on (seed, client, e), so all algorithms and engines see the same batches. The clients'
    orders are stored one after another in one array, so drawing for hundreds of clients takes a few array operations.

    Batches of given sizes take the next rows of the same sequence, independent of the batch size: the last of an epoch
    and the first of the next may be in one batch. A client has batches of one kind or the other.
    """

    def __init__(self, rows: Sequence[np.ndarray], batch: int, seed: int, names: Sequence[int] | None = None) -> None:
        self.batch, self.seed = batch, seed
        self.names = list(range(len(rows))) if names is None else list(names)
        self.counts = np.array([len(r) for r in rows], np.int64)  # samples of each client, n
        self.per_epoch = -(-self.counts // batch)  # batches in an epoch: ceil(n / b)
        # Batches drawn so far: the clients' clocks, which are the whole state.
        self.drawn = np.zeros(len(rows), np.int64)
        self.taken = np.zeros(len(rows), np.int64)  # rows drawn so far in batches of given sizes
        self._first = np.concatenate([[0], np.cumsum(self.counts)])[:-1]
        self._rows = np.concatenate(rows)
        self._order = self._rows.copy()
        self._epoch = np.full(len(rows), -1, np.int64)
        self._early: dict[int, tuple[int, np.ndarray]] = {}  # orders of epochs that were needed before the epochs begin

    def draw(
        self, clients: Sequence[int] | np.ndarray, sizes: Sequence[int] | None = None
    ) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """The next batches of `clients`: indices [R], one client after another, sizes [C] and clocks [C] (how many
        batches each had drawn before). `sizes` [C]: their numbers of rows (None: b, and the rest of an epoch).
        """
        who = np.asarray(clients, np.int64)
        if sizes is not None:
            return self._given(who, np.asarray(sizes, np.int64))
        clocks = self.drawn[who]
        epoch, at = np.divmod(clocks, self.per_epoch[who])
        for k, now in zip(who, epoch, strict=True):
            if now != self._epoch[k]:
                self._shuffle(int(k), int(now))
        begin = at * self.batch
        found = np.minimum(self.batch, self.counts[who] - begin)
        begin += self._first[who]
        if (found == found[0]).all():
            places = (begin[:, None] + np.arange(found[0])).ravel()
        else:
            ends = np.cumsum(found)
            places = np.repeat(begin - ends + found, found) + np.arange(ends[-1])
        self.drawn[who] += 1
        return torch.from_numpy(self._order[places]), found, clocks

    def coming(
        self, clients: Sequence[int], left: Sequence[int] | np.ndarray, each: int
    ) -> list[tuple[Tensor, np.ndarray]]:
        """The next `each` batches of `clients`, or as many as each has `left` [C], which `draw` will give: rows [b] and
        their epochs [b]. The first batches of all come first, then the second ones.
        """
        found = []
        for turn in range(each):
            for k, some in zip(clients, left, strict=True):
                if turn < some:
                    epoch, at = divmod(int(self.drawn[k]) + turn, int(self.per_epoch[k]))
                    rows = self._looked_into(k, epoch)[at * self.batch : (at + 1) * self.batch]
                    found.append((torch.from_numpy(rows), np.full(len(rows), epoch)))
        return found

    def epochs(self, clients: Sequence[int], sizes: np.ndarray, clocks: np.ndarray) -> np.ndarray:
        """For each row [R] of the last batches from `draw`: the epoch of its owner."""
        who = np.asarray(clients, np.int64)
        if not self.taken[who].any():
            return np.repeat(clocks // self.per_epoch[who], sizes)
        first = self.taken[who] - sizes
        numbers = np.concatenate([np.arange(start, start + size) for start, size in zip(first, sizes, strict=True)])
        epochs: np.ndarray = numbers // np.repeat(self.counts[who], sizes)
        return epochs

    def state(self) -> dict[str, list[int]]:
        """The progress of the clients."""
        taken = {"taken": self.taken.tolist()} if self.taken.any() else {}
        return {"drawn": self.drawn.tolist(), **taken}

    def load(self, state: Clocks) -> None:
        """Take a state that `state()` returned. Raises MalformedError."""
        state.check(len(self.counts))
        self.drawn[:] = state.drawn
        self.taken[:] = 0 if state.taken is None else state.taken

    def _given(self, who: np.ndarray, sizes: np.ndarray) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """Batches of these sizes."""
        clocks = self.drawn[who]
        rows = np.concatenate([self._next(int(k), int(size)) for k, size in zip(who, sizes, strict=True)])
        self.drawn[who] += 1
        return torch.from_numpy(rows), sizes, clocks

    def _next(self, client: int, size: int) -> np.ndarray:
        """The next `size` rows of a client."""
        parts, count, first = [], int(self.counts[client]), int(self._first[client])
        while size:
            epoch, at = divmod(int(self.taken[client]), count)
            if epoch != self._epoch[client]:
                self._shuffle(client, epoch)
            some = min(size, count - at)
            parts.append(self._order[first + at : first + at + some].copy())
            self.taken[client] += some
            size -= some
        rows: np.ndarray = np.concatenate(parts)
        return rows

    def _shuffle(self, client: int, epoch: int) -> None:
        """Put an epoch of the client in order."""
        self._order[self._span(client)] = self._looked_into(client, epoch)
        self._epoch[client] = epoch
        self._early.pop(client, None)

    def _looked_into(self, client: int, epoch: int) -> np.ndarray:
        """The client's rows in the order of an epoch, which is in progress or has not begun yet."""
        span = self._span(client)
        if epoch == self._epoch[client]:
            return self._order[span]
        if self._early.get(client, (None,))[0] != epoch:
            order = seeds.generator(self.seed, "batches", self.names[client], epoch)
            self._early[client] = epoch, order.permutation(self._rows[span])
        return self._early[client][1]

    def _span(self, client: int) -> slice:
        """Where the client's rows are."""
        return slice(self._first[client], self._first[client] + self.counts[client])


@dataclass(frozen=True)
class Drawn:
    """Batches of C clients: their inputs, each [R, ...], sizes [C], and how many batches each had drawn before [C]."""

    inputs: Rows
    sizes: np.ndarray
    clocks: np.ndarray
