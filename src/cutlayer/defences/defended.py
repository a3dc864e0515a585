"""Simulated clients that protect their smashed data before it crosses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from cutlayer.cohort import Cohort, CohortAround, Predict, Summed
from cutlayer.data.batches import Drawn
from cutlayer.data.samples import Samples
from cutlayer.defences.pipeline import Defences, Guarded
from cutlayer.types import CutGradients, Evaluation, Rows, Smashed


class DefendedCohort(CohortAround):
    """A simulated cohort whose clients all have the same defences. `drawn` gets every batch that it draws."""

    def __init__(self, inner: Cohort, drawn: list[Drawn], defences: Defences) -> None:
        super().__init__(inner)
        self.defences, self._drawn = defences, drawn
        self._guarded: Guarded | None = None
        self._asked: tuple[int, ...] = ()

    def forward(self, clients: Sequence[int] | None = None, *, labels: bool = True) -> Smashed:
        """Smashed data leave the clients protected."""
        self._drawn.clear()
        smashed = self.inner.forward(clients, labels=labels)
        if not smashed:
            return smashed
        clocks = [clock for d in self._drawn for clock in d.clocks.tolist()]
        x = [own for d in self._drawn for own in zip(*(rows.split(d.sizes.tolist()) for rows in d.inputs), strict=True)]
        self._asked = smashed.clients
        self._guarded = self.defences.step(smashed.rows, x, smashed.clients, smashed.sizes, clocks)
        return replace(smashed, rows=self._guarded.rows)

    def backward(self, gradients: CutGradients) -> None:
        """Every client takes its gradient, own or common, back through its defences."""
        self.inner.backward(self._back(gradients))

    def backward_together(self, gradients: CutGradients) -> Summed:
        """The same."""
        return self.inner.backward_together(self._back(gradients))

    def _back(self, gradients: CutGradients) -> CutGradients:
        """Gradients that have gone back through the defences."""
        assert self._guarded is not None, "a backward pass follows a forward pass"
        sizes = self._guarded.sizes
        own = self._guarded.back(gradients.for_all(self._asked, sizes))
        return CutGradients(own, self._asked, sizes)

    def evaluate(self, samples: Samples, predict: Predict, clients: Sequence[int] | None = None) -> Evaluation:
        """Smashed data of held-out samples is protected, too."""
        seen: Counter[int] = Counter()  # rows of each client so far

        def protected(clients: Sequence[int], rows: Rows) -> Rows:
            sent = self.defences.evaluation(rows, clients, seen[clients[0]])
            seen.update(dict.fromkeys(clients, len(rows[0]) // len(clients)))
            return predict(clients, sent)

        return self.inner.evaluate(samples, protected, clients)
