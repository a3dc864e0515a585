"""A cohort whose server examines the rows that clients send. The rows are screened, and clients that deviate are named.

Shape legend: C clients of a step, R rows of all of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cutlayer.cohort import Cohort, CohortAround, Summed, Tell
from cutlayer.errors import CutlayerWarning
from cutlayer.screenings.filtering import Back, Screening
from cutlayer.screenings.lengths import lengths_of, medians
from cutlayer.types import CutGradients, Smashed, TailGradients

if TYPE_CHECKING:
    from torch import Tensor

GROSS = 100.0
"""A client deviates grossly if its rows are more than this many times as long as those of the others."""


class ScreenedCohort(CohortAround):
    """A cohort in which `rule` screens the rows that clients send.

    Even without a rule, rows are examined: if a client deviates grossly, `tell` is called once (default: a warning).
    """

    def __init__(self, inner: Cohort, rule: Screening, tell: Tell | None = None) -> None:
        super().__init__(inner)
        self.rule = rule
        self._tell = _warn if tell is None else tell
        self._named: set[int] = set()
        self._latest = np.full(len(inner.samples), np.nan)  # the median length of each client's last rows
        self._starts: dict[int, int] = {}  # of the clients' rows in the last forward pass
        self._back: Back | None = None

    def forward(self, clients: Sequence[int] | None = None, *, labels: bool = True) -> Smashed:
        """The rows are screened."""
        smashed = self.inner.forward(clients, labels=labels)
        self._back = None
        if not smashed:
            return smashed
        lengths = lengths_of(smashed.rows)
        self._look(smashed.clients, medians(lengths, smashed.sizes))
        rows, self._back = self.rule.apply(smashed.rows, lengths, smashed.sizes)
        self._starts = dict(zip(smashed.clients, _starts(smashed.sizes), strict=True))
        return smashed if self._back is None else replace(smashed, rows=rows)

    def tail(self, features: Smashed) -> TailGradients:
        """Gradients of features are screened, too, if rows are compared with each other."""
        tail = self.inner.tail(features)
        if not self.rule.compares:
            return tail
        return replace(tail, rows=self.rule.apply(tail.rows, lengths_of(tail.rows), tail.sizes).rows)

    def backward(self, gradients: CutGradients) -> None:
        """Clients whose rows were changed get the gradient of what they sent."""
        self.inner.backward(self._through(gradients))

    def backward_together(self, gradients: CutGradients) -> Summed:
        """The same."""
        return self.inner.backward_together(self._through(gradients))

    def state(self) -> dict[str, Any]:
        """The inner cohort's."""
        return self.inner.state()

    def load(self, state: Mapping[str, Any]) -> None:
        """Take a state that `state()` returned."""
        self.inner.load(state)

    def _through(self, gradients: CutGradients) -> CutGradients:
        """Own gradients after the backward pass through the screening; shared gradients stay as they are."""
        if self._back is None or not gradients.clients:
            return gradients
        at = np.full(sum(gradients.sizes), -1)  # where each row was in the forward pass
        for k, start, size in zip(gradients.clients, _starts(gradients.sizes), gradients.sizes, strict=True):
            at[start : start + size] = self._starts[k] + np.arange(size)
        return replace(gradients, own=self._back(gradients.own, at.tolist()))

    def _look(self, clients: Sequence[int], own: Tensor) -> None:
        """Name those of the clients whose rows are much longer than the latest of the others."""
        self._latest[list(clients)] = own.tolist()
        known = self._latest[np.isfinite(self._latest)]
        if len(known) < 2 or known.max() <= GROSS * np.sort(known)[(len(known) - 1) // 2]:
            return  # the usual case
        for k in sorted(set(clients) - self._named):
            rest = np.delete(self._latest, k)
            others = float(np.median(rest[np.isfinite(rest)]))
            if others > 0 and self._latest[k] > GROSS * others:
                self._named.add(k)
                self._tell("deviates", self._facts(k, float(self._latest[k]), others))

    def _facts(self, client: int, median: float, others: float) -> dict[str, Any]:
        """The facts about a client that deviates."""
        name = self.rule.entry.name
        remedy = f"they are screened ({name})" if self.rule.active else "screening = median_bound scales such rows down"
        why = (
            f"its rows have a median length of {median:.3g}, those of the others {others:.3g}: its data or its model "
            f"are unlike theirs, or it is hostile; {remedy}"
        )
        return {"client": client, "median": median, "others": others, "why": why}


def _starts(sizes: Sequence[int]) -> list[int]:
    """Where each client's rows begin."""
    starts: list[int] = (np.cumsum(sizes) - np.asarray(sizes)).tolist()
    return starts


def _warn(happened: str, facts: Mapping[str, Any]) -> None:
    warnings.warn(CutlayerWarning(f"client {facts['client']} {happened}: {facts['why']}"), stacklevel=2)
