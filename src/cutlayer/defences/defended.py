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
        self._guarded: list[tuple[tuple[int, ...], Guarded]] = []  # of each cut: whose rows, and what was done to them

    def forward(self, clients: Sequence[int] | None = None, *, labels: bool = True) -> Smashed:
        """Smashed data leave the clients protected."""
        self._drawn.clear()
        smashed = self.inner.forward(clients, labels=labels)
        if not smashed:
            return smashed
        clocks = [clock for d in self._drawn for clock in d.clocks.tolist()]
        x = [own for d in self._drawn for own in zip(*(rows.split(d.sizes.tolist()) for rows in d.inputs), strict=True)]
        parts, inputs = (
            smashed.parts or (smashed,),
            dict(zip(smashed.clients, zip(x, clocks, strict=True), strict=True)),
        )
        self._guarded = [(p.clients, self._protected(p, [inputs[k] for k in p.clients])) for p in parts]
        sent = tuple(replace(p, rows=g.rows) for p, (_, g) in zip(parts, self._guarded, strict=True))
        return replace(smashed, parts=sent) if smashed.parts else sent[0]

    def _protected(self, smashed: Smashed, batches: Sequence[tuple[Rows, int]]) -> Guarded:
        """The protected rows of clients, from their `batches` (inputs, clock)."""
        x, clocks = [own for own, _ in batches], [clock for _, clock in batches]
        return self.defences.step(smashed.rows, x, smashed.clients, smashed.sizes, clocks)

    def backward(self, gradients: CutGradients) -> None:
        """Every client takes its gradient, own or common, back through its defences."""
        self.inner.backward(self._back(gradients))

    def backward_together(self, gradients: CutGradients) -> Summed:
        """The same."""
        return self.inner.backward_together(self._back(gradients))

    def _back(self, gradients: CutGradients) -> CutGradients:
        """The gradients after the backward pass through the defences."""
        assert self._guarded, "a backward pass follows a forward pass"
        found = tuple(map(_through, gradients.parts or (gradients,), self._guarded))
        return replace(gradients, parts=found) if gradients.parts else found[0]

    def evaluate(self, samples: Samples, predict: Predict, clients: Sequence[int] | None = None) -> Evaluation:
        """Smashed data of held-out samples is protected, too."""
        seen: Counter[int] = Counter()  # rows of each client so far

        def protected(clients: Sequence[int], rows: Rows) -> Rows:
            sent = self.defences.evaluation(rows, clients, seen[clients[0]])
            seen.update(dict.fromkeys(clients, len(rows[0]) // len(clients)))
            return predict(clients, sent)

        return self.inner.evaluate(samples, protected, clients)


def _through(gradients: CutGradients, guarded: tuple[tuple[int, ...], Guarded]) -> CutGradients:
    """The gradients of one cut after the backward pass through the defences of its clients."""
    clients, done = guarded
    own = done.back(gradients.for_all(clients, done.sizes))
    return CutGradients(own, clients, done.sizes)
