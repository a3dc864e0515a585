"""Smashed data that the server keeps: a frozen client part's outputs for a row are computed and sent once.

Only for a client part whose outputs for a row are the same in every epoch (`checks.check_cacheable`). The server knows
which rows a client would draw next, since the order of an epoch depends only on names. It does not request a batch if
it has all its rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cutlayer.cohort import Cohort, CohortAround
from cutlayer.data.batches import Batches
from cutlayer.stored import Count, Digits, MalformedError, Stored, all_finite, checked
from cutlayer.types import Round, Rows, Smashed


@dataclass
class _Kept:
    """The results of a client's rows so far: `seen` [n], and tensors [n, ...] of rows, labels and perhaps weights."""

    seen: np.ndarray
    tensors: tuple[Tensor, ...]

    def put(self, at: np.ndarray, tensors: Sequence[Tensor]) -> None:
        """Keep these rows."""
        where = torch.from_numpy(at)
        for mine, theirs in zip(self.tensors, tensors, strict=True):
            mine[where.to(mine.device)] = theirs
        self.seen[at] = True

    def get(self, at: np.ndarray) -> tuple[Tensor, ...]:
        """These rows again."""
        where = torch.from_numpy(at)
        return tuple(t[where.to(t.device)] for t in self.tensors)


class _ClientFeatures(Stored):
    seen: list[bool]
    tensors: list[Tensor]


class _FeaturesState(Stored):
    inner: dict[str, Any]
    kept: dict[Digits, _ClientFeatures]
    drawn: dict[Digits, Count]
    computed: Count
    width: Count


class KeptFeatures(CohortAround):
    """A cohort that asks each client once for the smashed data and labels of a row. `computed` counts those rows."""

    def __init__(self, inner: Cohort, batch: int, seed: int, device: torch.device) -> None:
        super().__init__(inner)
        self.batch, self.seed, self.device = batch, seed, device
        self._width = 0  # tensors that cross for a row, besides its label and its weight
        self.computed = 0
        self._drawn: dict[int, int] = {}  # batches that each client has had
        self._orders: dict[int, Batches] = {}
        self._kept: dict[int, _Kept] = {}
        self._here: tuple[int, ...] = ()
        self._left: dict[int, int] = {}  # batches of this round

    def begin_round(self, index: int, total: int, lr_factor: float) -> Round:
        """As the inner cohort's."""
        this = self.inner.begin_round(index, total, lr_factor)
        self._here, self._left = this.clients, dict(zip(this.clients, this.batches, strict=True))
        return this

    def forward(self, clients: Sequence[int] | None = None, *, labels: bool = True) -> Smashed:
        """Clients whose next batch is not known send it; the others' batches are here."""
        wanted = self._here if clients is None else clients
        asked = [k for k in wanted if self._left.get(k, 0) > 0]
        drawn = {k: self._next(k) for k in asked}
        fresh = [k for k in asked if k not in self._kept or not self._kept[k].seen[drawn[k]].all()]
        for k in fresh:
            self.inner.seek(k, self._drawn[k] - 1)
        came = self.inner.forward(fresh, labels=labels) if fresh else None
        sent = {} if came is None else self._keep(came, drawn)
        found = {k: sent[k] if k in sent else self._kept[k].get(drawn[k]) for k in asked if k in sent or k not in fresh}
        if came is not None and len(found) == len(came.clients):
            return came
        return self._together(found)

    def _next(self, client: int) -> np.ndarray:
        """The rows of a client's next batch, as it counts its own."""
        if client not in self._orders:
            self._orders[client] = Batches([np.arange(self.samples[client])], self.batch, self.seed, [client])
        order = self._orders[client]
        order.drawn[0] = self._drawn.get(client, 0)
        rows, _, _ = order.draw([0])
        self._drawn[client] = int(order.drawn[0])
        self._left[client] -= 1
        at: np.ndarray = rows.numpy()
        return at

    def _keep(self, came: Smashed, drawn: Mapping[int, np.ndarray]) -> dict[int, tuple[Tensor, ...]]:
        """Store the received rows, each client's part separately."""
        weights = () if came.weights is None else (came.weights,)
        self._width = len(came.rows)
        parts = [t.split(list(came.sizes)) for t in (*came.rows, came.labels, *weights)]
        sent = {k: tuple(part[i] for part in parts) for i, k in enumerate(came.clients)}
        for k, tensors in sent.items():
            if k not in self._kept:
                count = self.samples[k]
                empty = tuple(t.new_zeros((count, *t.shape[1:])) for t in tensors)
                self._kept[k] = _Kept(np.zeros(count, bool), empty)
            self._kept[k].put(drawn[k], tensors)
            self.computed += len(drawn[k])
        return sent

    def _together(self, found: Mapping[int, tuple[Tensor, ...]]) -> Smashed:
        """Each client's rows, labels and weights as one batch."""
        if not found:
            return Smashed((), torch.empty(0), (), ())
        merged: Rows = tuple(torch.cat(parts) for parts in zip(*found.values(), strict=True))
        sizes, labels = tuple(len(tensors[0]) for tensors in found.values()), self._width
        weights = merged[labels + 1] if len(merged) > labels + 1 else None
        return Smashed(merged[:labels], merged[labels], tuple(found), sizes, weights=weights)

    def state(self) -> dict[str, Any]:
        """The inner cohort's, what is kept, and where the clients are."""
        kept = {str(k): {"seen": one.seen.tolist(), "tensors": list(one.tensors)} for k, one in self._kept.items()}
        drawn = {str(k): count for k, count in self._drawn.items()}
        own = {"kept": kept, "drawn": drawn, "computed": self.computed, "width": self._width}
        return {**super().state(), **own}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take a state that `state()` returned. Raises MalformedError."""
        found = checked(state, _FeaturesState, "the features that are kept")
        super().load({"inner": found.inner})
        for k, one in found.kept.items():
            if any(len(t) != len(one.seen) or not all_finite(t) for t in one.tensors):
                raise MalformedError(f"the features of client {k} are not one finite row for each of its samples")
        self._kept = {
            int(k): _Kept(np.array(one.seen, bool), tuple(t.to(self.device) for t in one.tensors))
            for k, one in found.kept.items()
        }
        self._drawn = {int(k): count for k, count in found.drawn.items()}
        self.computed, self._width = found.computed, found.width
