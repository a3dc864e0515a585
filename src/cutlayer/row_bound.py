"""The server looks at how long the rows are that clients send: it can bound them, and names clients that deviate.

A row is what crosses of one sample, over all real tensors; its length is the Euclidean norm. A bound B is a multiple of
the median length in the step, or a length. A longer row z is used as z' = c z, c = B / |z|, as if its client had
clipped it. The gradient that goes back to that client is that with respect to z, by the chain rule with B fixed:

    dL/dz = c (g - (g.u) u),   g = dL/dz',   u = z / |z|

What a client shares with others (a common gradient) has no row of its own and stays as it is.

Shape legend: C clients of a step, R rows of all of them, s... the shape of one row.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cutlayer.cohort import Cohort, CohortAround, Summed, Tell
from cutlayer.errors import CutlayerWarning
from cutlayer.gradients import column
from cutlayer.types import CutGradients, Rows, Smashed, TailGradients

GROSS = 100.0
"""A client deviates grossly if its rows are more than this many times as long as those of the others."""


@dataclass(frozen=True)
class _Scaled:
    """Rows [n] of a step that were too long: where they are, their factors [n], and of what direction they were."""

    at: np.ndarray
    factors: Tensor
    directions: Rows


class RowBound(CohortAround):
    """A cohort whose rows are at most `multiple` times as long as the median row of a step, or `limit` long; without
    either they are only looked at. `tell` hears of a client that deviates grossly, once (default: a warning is given).

    The median of a step is the median of the clients' own medians (the lower one of an even number), so that a client
    does not gain weight by many rows. In the U-shaped split, the gradients that clients send are bounded by the
    multiple too.
    """

    def __init__(
        self,
        inner: Cohort,
        multiple: float | None = None,
        limit: float | None = None,
        tell: Tell | None = None,
    ) -> None:
        super().__init__(inner)
        self.multiple, self.limit = multiple, limit
        self._tell = _warn if tell is None else tell
        self._named: set[int] = set()
        self._latest = np.full(len(inner.samples), np.nan)  # the median length of each client's last rows
        self._starts: dict[int, int] = {}  # of the clients' rows in the last forward pass
        self._scaled: _Scaled | None = None

    def forward(self, clients: Sequence[int] | None = None, *, labels: bool = True) -> Smashed:
        """Rows that are too long are scaled down."""
        smashed = self.inner.forward(clients, labels=labels)
        self._scaled = None
        if not smashed:
            return smashed
        lengths = lengths_of(smashed.rows)
        own = medians(lengths, smashed.sizes)
        self._look(smashed.clients, own)
        bound = self.limit if self.multiple is None else self.multiple * float(own.median())
        if not bound:  # none is asked for, or the rows of most clients are zeros
            return smashed
        rows, self._scaled = _bounded(smashed.rows, lengths, bound)
        self._starts = dict(zip(smashed.clients, _starts(smashed.sizes), strict=True))
        return smashed if self._scaled is None else replace(smashed, rows=rows)

    def tail(self, features: Smashed) -> TailGradients:
        """Gradients that are too long are scaled down."""
        tail = self.inner.tail(features)
        if self.multiple is None:
            return tail
        lengths = lengths_of(tail.rows)
        rows, _ = _bounded(tail.rows, lengths, self.multiple * float(medians(lengths, tail.sizes).median()))
        return replace(tail, rows=rows)

    def backward(self, gradients: CutGradients) -> None:
        """Clients whose rows were scaled down get the gradient of what they sent."""
        scaled = self._scaled
        self.inner.backward(gradients if scaled is None else self._through(gradients, scaled))

    def backward_together(self, gradients: CutGradients) -> Summed:
        """The same."""
        scaled = self._scaled
        return self.inner.backward_together(gradients if scaled is None else self._through(gradients, scaled))

    def state(self) -> dict[str, Any]:
        """The inner cohort's."""
        return self.inner.state()

    def load(self, state: Mapping[str, Any]) -> None:
        """Take a state that `state()` returned."""
        self.inner.load(state)

    def _through(self, gradients: CutGradients, scaled: _Scaled) -> CutGradients:
        """Own gradients of rows that were scaled down, by the chain rule."""
        there = np.full(sum(gradients.sizes), -1)  # where each row was in the forward pass
        for k, start, size in zip(gradients.clients, _starts(gradients.sizes), gradients.sizes, strict=True):
            there[start : start + size] = self._starts[k] + np.arange(size)
        found = {int(place): number for number, place in enumerate(scaled.at)}
        pairs = [(at, found[place]) for at, place in enumerate(there.tolist()) if place in found]
        if not pairs:
            return gradients
        at, number = (torch.tensor(part, device=gradients.own[0].device) for part in zip(*pairs, strict=True))
        mine = [g[at].double() for g in gradients.own]
        along = [u[number] for u in scaled.directions]
        dots = torch.stack([(g * u).flatten(1).sum(1) for g, u in zip(mine, along, strict=True)]).sum(0)
        own = tuple(g.clone() for g in gradients.own)
        for rows, g, u in zip(own, mine, along, strict=True):
            rows[at] = (column(scaled.factors[number], g) * (g - column(dots, g) * u)).to(rows.dtype)
        return replace(gradients, own=own)

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
                self._tell("deviates", _facts(k, float(self._latest[k]), others, bounded=self.multiple is not None))


def lengths_of(rows: Rows) -> Tensor:
    """The length of each row [R], in double precision, over all real tensors."""
    each = [_lengths(r.flatten(1)) for r in rows if r.is_floating_point()]
    if len(each) == 1:
        return each[0]
    together: Tensor = torch.stack(each) if each else torch.zeros(1, len(rows[0]), dtype=torch.float64)
    lengths: Tensor = torch.linalg.vector_norm(together, dim=0)
    return lengths


def _lengths(rows: Tensor) -> Tensor:
    """[R, n] -> [R]. Squares of large numbers overflow in single precision: a second look is in double."""
    lengths: Tensor = torch.linalg.vector_norm(rows if rows.element_size() >= 4 else rows.float(), dim=1).double()
    if not bool(torch.isfinite(lengths).all()):
        lengths = torch.linalg.vector_norm(rows.double(), dim=1)
    return lengths


def medians(lengths: Tensor, sizes: Sequence[int]) -> Tensor:
    """The median of each client's lengths: [R] -> [C]."""
    if len(set(sizes)) == 1:
        return lengths.view(len(sizes), -1).median(1).values
    return torch.stack([part.median() for part in lengths.split(list(sizes))])


def _bounded(rows: Rows, lengths: Tensor, bound: float) -> tuple[Rows, _Scaled | None]:
    """Rows of which those longer than `bound` are scaled down to it; None if there are none."""
    long = ((lengths > bound) & torch.isfinite(lengths)).nonzero().flatten()
    if not len(long):
        return rows, None
    real = [r for r in rows if r.is_floating_point()]
    wide = [r[long].double() for r in real]
    directions = tuple(r / column(lengths[long], r) for r in wide)
    shorter = iter(directions)
    scaled = [r.clone() if r.is_floating_point() else r for r in rows]
    for r in scaled:
        if r.is_floating_point():
            r[long] = (next(shorter) * bound).to(r.dtype)
    return tuple(scaled), _Scaled(long.cpu().numpy(), bound / lengths[long], directions)


def _starts(sizes: Sequence[int]) -> list[int]:
    """Where each client's rows begin."""
    starts: list[int] = (np.cumsum(sizes) - np.asarray(sizes)).tolist()
    return starts


def _facts(client: int, median: float, others: float, *, bounded: bool) -> dict[str, Any]:
    """What is told of a client that deviates."""
    remedy = "they are scaled down (row_bound)" if bounded else "row_bound scales such rows down"
    why = (
        f"its rows have a median length of {median:.3g}, those of the others {others:.3g}: its data or its model are "
        f"unlike theirs, or it is hostile; {remedy}"
    )
    return {"client": client, "median": median, "others": others, "why": why}


def _warn(happened: str, facts: Mapping[str, Any]) -> None:
    warnings.warn(CutlayerWarning(f"client {facts['client']} {happened}: {facts['why']}"), stacklevel=2)
