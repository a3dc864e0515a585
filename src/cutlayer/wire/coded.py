"""Applies codecs to the rows that cross: a cohort around a cohort."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from cutlayer.cohort import Cohort, CohortAround, Crossed, Direction, Predict, Summed
from cutlayer.data.samples import Samples
from cutlayer.types import CutGradients, Evaluation, Rows, Smashed, TailGradients
from cutlayer.wire.codecs import Codec
from cutlayer.wire.coding import Coding


class CodedCohort(CohortAround):
    """A cohort whose rows are received as its codecs write them. Without a lossy codec, nothing is changed.

    `trains`: clients train something; if not, no backward pass is requested. `lower_trains`: their lower parts train;
    if not, no gradients go down. `crossed` lists the bytes of all rows that crossed, oldest first, until the counter
    empties it. Codecs have no state, so the state is the inner cohort's.
    """

    def __init__(self, inner: Cohort, coding: Coding, *, trains: bool = True, lower_trains: bool = True) -> None:
        super().__init__(inner)
        self.coding, self.trains, self.lower_trains = coding, trains, lower_trains
        self.crossed: list[Crossed] = []
        self._received: tuple[Smashed, ...] = ()  # of each cut, if clients have their own cuts

    def forward(self, clients: Sequence[int] | None = None, *, labels: bool = True) -> Smashed:
        """Smashed data go up."""
        smashed = self.inner.forward(clients, labels=labels)
        received = tuple(map(self._as_received, smashed.parts or (smashed,)))
        self._received = received if self.coding.up.gradient_on_support else ()
        return replace(smashed, parts=received) if smashed.parts else received[0]

    def _as_received(self, smashed: Smashed) -> Smashed:
        rows = self._up(smashed)
        return smashed if _alike(rows, smashed.rows) else replace(smashed, rows=rows)

    def tail(self, features: Smashed) -> TailGradients:
        """Features go down, their gradients up."""
        rows = self._cross("down", self.coding.down, features.rows, features.clients, features.sizes)
        tail = self.inner.tail(replace(features, rows=rows))
        return replace(tail, rows=self._up(tail))

    def backward(self, gradients: CutGradients) -> None:
        """Own cut gradients are written one by one, a common one is written once."""
        if self.trains:
            self.inner.backward(self._down(gradients))

    def backward_together(self, gradients: CutGradients) -> Summed:
        """The same; weight gradients are not changed."""
        return self.inner.backward_together(self._down(gradients)) if self.trains else Summed()

    def _down(self, gradients: CutGradients) -> CutGradients:
        """Cut gradients as they are received."""
        if not self.lower_trains:  # the rest of the client, its tail, has its gradients already
            return gradients.without_rows()
        received = self._received or (None,) * max(1, len(gradients.parts))
        if not gradients.parts:
            return self._one_down(gradients, received[0])
        return replace(gradients, parts=tuple(map(self._one_down, gradients.parts, received)))

    def _one_down(self, gradients: CutGradients, received: Smashed | None) -> CutGradients:
        """The gradients of one cut, whose rows were `received`."""
        rows = self._supported(gradients, received)
        own = self._cross("down", self.coding.down, rows, gradients.clients, gradients.sizes)
        common = gradients.common
        if gradients.active:
            common, count = self.coding.common(common)
            self.crossed.append(Crossed("down", gradients.active, count, common=True))
        unchanged = _alike(own, gradients.own) and _alike(common, gradients.common)
        return gradients if unchanged else replace(gradients, own=own, common=common)

    def _supported(self, gradients: CutGradients, received: Smashed | None) -> Rows:
        """Own cut gradients, with zeros where the codec sent nothing, if it requires this. A common gradient belongs to
        several clients and stays as it is.
        """
        if received is None or not gradients.clients or not gradients.own:
            return gradients.own
        rows = received.take(received.rows, gradients.clients)
        return tuple(torch.where(x != 0, g, torch.zeros_like(g)) for x, g in zip(rows, gradients.own, strict=True))

    def evaluate(self, samples: Samples, predict: Predict, clients: Sequence[int] | None = None) -> Evaluation:
        """Smashed data of held-out samples go up and, in the U-shaped split, features down; without zstd, as remote
        clients do it.
        """
        up, down = self.coding.up.evaluating, self.coding.down.evaluating

        def coded(clients: Sequence[int], rows: Rows) -> Rows:
            sizes = [len(rows[0]) // len(clients)] * len(clients)
            outputs = predict(clients, self._cross("up", up, rows, clients, sizes))
            return self._cross("down", down, outputs, clients, sizes) if self.shape == "u-shaped" else outputs

        return self.inner.evaluate(samples, coded, clients)

    def state(self) -> dict[str, Any]:
        """The inner cohort's."""
        return self.inner.state()

    def load(self, state: Mapping[str, Any]) -> None:
        """Take a state that `state()` returned."""
        self.inner.load(state)

    def _up(self, sent: Smashed | TailGradients) -> Rows:
        """The rows that clients sent, as they are received. If another machine sent them, only the carrier may know
        their bytes.
        """
        return self._cross("up", self.coding.up, sent.rows, sent.clients, sent.sizes, sent.written)

    def _cross(
        self,
        direction: Direction,
        codec: Codec,
        rows: Rows,
        clients: Sequence[int],
        sizes: Sequence[int],
        written: Sequence[int] = (),
    ) -> Rows:
        """Rows [R, s...] as they are received; their bytes [C] are noted."""
        received, counts = self.coding.rows(codec, rows, sizes)
        self.crossed.append(Crossed(direction, clients, np.asarray(written or counts, np.int64)))
        return received


def _alike(coded: Rows, rows: Rows) -> bool:
    """Whether a codec left all tensors as they were."""
    return all(a is b for a, b in zip(coded, rows, strict=True))
