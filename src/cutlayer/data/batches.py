"""Which samples make up a client's next batch."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from cutlayer import seeds


class BatchStream:
    """The endless sequence of one client's batches: epoch after epoch, each in an order of its own.

    An epoch deals every one of the client's n samples once; its last batch has the n mod b samples that remain. The
    order of epoch e depends on (seed, client, e) alone, so all algorithms and engines see the same batches.
    """

    def __init__(self, rows: np.ndarray, batch: int, seed: int, client: int) -> None:
        self.rows, self.batch, self.seed, self.client = rows, batch, seed, client
        self.drawn = 0  # batches drawn so far: the client's clock, and all the state there is
        self._epoch, self._order = -1, rows

    @property
    def per_epoch(self) -> int:
        """Batches in an epoch: ceil(n / b)."""
        return math.ceil(len(self.rows) / self.batch)

    def next(self) -> Tensor:
        """Indices [b] of the next batch ([n mod b] at the end of an epoch)."""
        epoch, at = divmod(self.drawn, self.per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = seeds.generator(self.seed, "batches", self.client, epoch).permutation(self.rows)
        self.drawn += 1
        return torch.from_numpy(self._order[at * self.batch : (at + 1) * self.batch])
