"""Batches that wait at the server until there are enough for a step, if clients work at their own pace.

Shape legend: R rows in the buffer, s... the shape of one row's smashed data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cutlayer.gradients import means_of_clients
from cutlayer.types import Rows, Smashed, Step


class Batch(NamedTuple):
    """The client of a batch, and the number of server steps before its last download."""

    client: int
    since: int


class Buffer:
    """The activation buffer in `kept`: rows, labels, and their clients. `told` batches are in a record."""

    def __init__(self, kept: dict[str, Tensor]) -> None:
        self._kept = kept
        about = kept.get("buffer about", torch.empty(0, 2, dtype=torch.int64)).tolist()
        self.batches = [Batch(*one) for one in about]
        self.told = len(self.batches)
        self._losses: list[Tensor] = []  # of the batches that are not in a record yet
        self._sizes: list[int] = []

    @property
    def rows(self) -> Rows:
        """The smashed data: each [R, s...]."""
        count = sum(name.startswith("buffer rows") for name in self._kept)
        return tuple(self._kept[f"buffer rows {i}"] for i in range(count))

    @property
    def labels(self) -> Tensor:
        """[R]."""
        return self._kept["buffer labels"]

    def add(self, smashed: Smashed, since: Sequence[int], losses: Tensor) -> None:
        """Add received batches, with the clients' mean losses [C]."""
        self.batches += map(Batch, smashed.clients, since)
        self._losses += losses.detach().unbind()
        self._sizes += smashed.sizes
        for name, new in (*((f"rows {i}", r) for i, r in enumerate(smashed.rows)), ("labels", smashed.labels)):
            before = self._kept.get(f"buffer {name}")
            new = new.detach()
            self._kept[f"buffer {name}"] = new if before is None else torch.cat([before.to(new.device), new])
        self._kept["buffer about"] = torch.tensor(self.batches, dtype=torch.int64)

    def record(self, lr: float) -> Step:
        """The results of the batches since the last record, summed up for each client."""
        owners, losses = [one.client for one in self.batches[self.told :]], torch.stack(self._losses)
        clients = list(dict.fromkeys(owners))
        sizes = torch.tensor(self._sizes, dtype=losses.dtype, device=losses.device)
        at = torch.tensor([clients.index(k) for k in owners], device=losses.device)
        rows = sizes.new_zeros(len(clients)).index_add(0, at, sizes)
        means = sizes.new_zeros(len(clients)).index_add(0, at, losses * sizes) / rows
        self.told, self._losses, count, self._sizes = len(self.batches), [], sum(self._sizes), []
        return Step(means_of_clients(means, rows.tolist()), tuple(clients), count, server_lr=lr)

    def clear(self) -> None:
        """The server has stepped."""
        for name in [name for name in self._kept if name.startswith("buffer ")]:
            del self._kept[name]
        self.batches, self.told = [], 0
