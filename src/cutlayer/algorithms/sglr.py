"""SGLR: server-side local gradient averaging and learning rate acceleration (arXiv 2112.05929).

One step:
    1. every client i, in parallel: s_i = f(w_ci, x_i); upload (s_i, y_i)
    2. server: ONE loss on the concatenated rows; w_s <- w_s - eta_s g_s
    3. SplitLr:  eta_s = eta_c * C^alpha                                                  (eq. 13)
    4. SplitAvg: draw phi * C active clients afresh; they all receive ONE common cut gradient, the average of
       theirs (broadcast); the others receive their own (unicast)                         (eq. 14, 15)
    5. every client i: back-propagate what it received; w_ci <- w_ci - eta_c g_ci
Client models are never exchanged.

SLR is SplitLr alone, SGL is SplitAvg alone, PSL is neither. Where the paper can be read in several ways, the reading is
an option: `alpha_clients`, `average_over`, `average_reduce`, `gradient_scale`, `phi_when`.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Sequence
from itertools import count
from typing import Literal

import torch
from torch import Tensor

from cutlayer import seeds
from cutlayer.algorithms.common import Scaled, report
from cutlayer.algorithms.contract import Algorithm, algorithm
from cutlayer.cohort import Cohort
from cutlayer.errors import ConfigError
from cutlayer.gradients import own, scaled
from cutlayer.plugins import option
from cutlayer.server import Server
from cutlayer.traffic import Epoch, Traffic
from cutlayer.types import CutGradients, Round, Rows, Smashed, Step, as_matrix, as_rows, channels_last, row_numbers
from cutlayer.verbs import BACKWARD, FORWARD

_SPLITS_LR = "SplitLr accelerates the server model"
_SPLITS_AVG = "SplitAvg averages the gradients that reach the client models"


class SplitLr(Scaled):
    """SplitLr, eq. 13."""

    alpha: float = option(1.0, ge=0)
    """Rate exponent: the server's learning rate is server_lr x C^alpha (eq. 13)."""
    alpha_clients: Literal["participating", "enrolled"] = option("participating")
    """What C counts: the clients that take part in the step, or all enrolled clients."""

    def split_lr(self, smashed: Smashed, enrolled: int) -> float:
        """The factor of the server's rate: C^alpha, C being the clients in this step, or all enrolled."""
        clients = enrolled if self.alpha_clients == "enrolled" else len(smashed.clients)
        return float(clients**self.alpha)

    def rate_growth(self, clients: int) -> tuple[str, float]:
        """Powers of ten in C^alpha."""
        return f"alpha = {self.alpha}", self.alpha * math.log10(clients)


class SplitAvg(Scaled):
    """SplitAvg, eq. 14 and 15."""

    phi: float = option(0.5, ge=0, le=1, planned=True)
    """Active fraction: in each step, phi x C clients share one common cut gradient."""
    phi_when: Literal["always", "initial", "final"] = option("always")
    """Use SplitAvg during the whole training, or only in its initial or final part (the phased variants)."""
    phi_until: float = option(0.6, ge=0, le=1)
    """Length of the initial or final part, as a fraction of the training."""
    average_over: Literal["clients", "clients-and-rows"] = option("clients")
    """Average row by row over the active clients (clients), or over all rows of the active clients into one gradient
    for every row (clients-and-rows)."""
    average_reduce: Literal["mean", "sum"] = option("mean")
    """Average with the mean of the clients' gradients, or with the sum of the slices of the concatenated loss's
    gradient (eq. 15 to the letter)."""

    def check(self, given: frozenset[str]) -> None:
        """A phase's length needs a phase. Raises ConfigError."""
        if "phi_until" in given and self.phi_when == "always":
            raise ConfigError(
                f"phi_until = {self.phi_until:g} has no effect with phi_when = 'always': choose initial or final, or "
                "leave it out"
            )

    @property
    def shares_gradients(self) -> bool:
        """Whether any client is active."""
        return self.phi > 0

    def without_sharing(self) -> Algorithm:
        """No client is active."""
        return self.model_copy(update={"phi": 0.0})

    def draw_active(self, clients: tuple[int, ...], this: Round, turn: int) -> tuple[int, ...]:
        """The active set of the round's step number `turn`: phi x C clients (rounded half up), without replacement."""
        done = this.progress(turn)  # rounded, as the bounds are: 7/15 and 0.4 + 0.2/3 are the same moment
        final = round(1 - self.phi_until, 9)
        phase = {"always": True, "initial": done < round(self.phi_until, 9), "final": done >= final}
        active = self._active_of(len(clients)) if phase[self.phi_when] else 0
        order = torch.randperm(len(clients), generator=seeds.torch_generator(this.seed, "active", this.index, turn))
        return tuple(clients[i] for i in sorted(order[:active].tolist()))

    def split_average(self, gradient: Rows, smashed: Smashed, active: tuple[int, ...]) -> CutGradients:
        """One common cut gradient for the `active` clients, their own for the others.

        `gradient` is dLoss/d(smashed data) of the concatenated mean loss, each [R, s...]. Raises nothing: an empty
        active set is PSL.
        """
        if not active:
            return own(gradient, smashed, self.gradient_scale)
        # The sum is of the concatenated loss's slices, to the letter of eq. 15; the mean is of gradients in the
        # clients' scale.
        share = "union" if self.average_reduce == "sum" else self.gradient_scale
        shared, others = smashed.sizes_of(set(active)), smashed.sizes_of(set(smashed.clients) - set(active))
        shares = _scaled_of(gradient, smashed, shared, share)
        unicast = _scaled_of(gradient, smashed, others, self.gradient_scale)
        common = self._common(shares, shared, smashed)
        return CutGradients(unicast, tuple(others), tuple(others.values()), common, active)

    def average(self, gradient: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """The common gradient of the active clients' rows [sum b_k, s...], b_k = `sizes`.

        Over clients: [max b_k, s...], row j over the clients that have a row j. Over clients and rows: [1, s...].
        """
        last = channels_last(gradient)
        total = _total(as_matrix(gradient, last), sizes, max(sizes))
        return as_rows(self._reduced(total, sizes), gradient.shape[1:], last)

    def _common(self, gradient: Rows, shared: dict[int, int], smashed: Smashed) -> Rows:
        """The same for each tensor, whose rows are those of the active clients, `shared`, in this process."""
        sizes = tuple(shared.values())
        if smashed.here is smashed:
            return tuple(self.average(g, sizes) for g in gradient)
        here = tuple(smashed.here.sizes_of(shared).values())
        totals = tuple(_total(as_matrix(g, last=False), here, max(sizes)) for g in gradient)
        smashed.added(totals)
        pairs = zip(totals, gradient, strict=True)
        return tuple(as_rows(self._reduced(total, sizes), g.shape[1:], last=False) for total, g in pairs)

    def _reduced(self, total: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """From the sums over clients, row by row [max b_k, q], to the common gradient."""
        over_rows = self.average_over == "clients-and-rows"
        if self.average_reduce == "sum":
            return total.mean(0, keepdim=True) if over_rows else total
        if over_rows:
            return total.sum(0, keepdim=True) / sum(sizes)
        if max(sizes) == min(sizes):
            return total / len(sizes)
        each = torch.from_numpy(row_numbers(sizes)).bincount().view(-1, 1)
        return total / each.to(total.device, total.dtype)

    def traffic(self, epoch: Epoch) -> Traffic:
        """As PSL, with one gradient for the active clients."""
        return Traffic("steps", sharing=self._active_of(epoch.clients))

    def _active_of(self, clients: int) -> int:
        return math.floor(self.phi * clients + 0.5)


def _scaled_of(gradient: Rows, smashed: Smashed, clients: Container[int], scale: str) -> Rows:
    """The rows of some clients, in their scale."""
    here = smashed.here
    sizes = here.sizes_of(clients)
    rows = here.take(gradient, sizes)
    return scaled(rows, tuple(sizes.values()), here.masses_of(sizes), scale, sum(smashed.masses))


def _total(rows: Tensor, sizes: Sequence[int], longest: int) -> Tensor:
    """The sums over clients of their rows [sum b_k, q], row by row: [longest, q]."""
    if sizes and longest == min(sizes):
        return rows.view(len(sizes), -1).sum(0).view(longest, -1)
    number = torch.from_numpy(row_numbers(sizes)).to(rows.device)
    return rows.new_zeros(longest, rows.shape[1]).index_add_(0, number, rows)


@algorithm(
    "slr",
    title="SLR",
    summary="PSL with the server's rate scaled by C^alpha (SplitLr)",
    paper="arXiv 2112.05929",
    needs={FORWARD, BACKWARD},
    spreads="apart",
    server_part=_SPLITS_LR,
    colour="sky",
)
class Slr(SplitLr):
    """SplitLr alone."""

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        """One round (a local epoch) of SLR."""
        while smashed := clients.forward():
            step = server.step(smashed, self.split_lr(smashed, enrolled=len(clients.samples)))
            clients.backward(own(step.gradient, smashed, self.gradient_scale))
            yield report(step, smashed)

    def traffic(self, epoch: Epoch) -> Traffic:
        """As PSL."""
        return Traffic("steps")


@algorithm(
    "sgl",
    title="SGL",
    summary="PSL with one common cut gradient for a random fraction phi of the clients (SplitAvg)",
    paper="arXiv 2112.05929",
    needs={FORWARD, BACKWARD},
    spreads="apart",
    client_part=_SPLITS_AVG,
    colour="sky",
    line="--",
)
class Sgl(SplitAvg):
    """SplitAvg alone."""

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        """One round (a local epoch) of SGL."""
        for turn in count():
            if not (smashed := clients.forward()):
                return
            step = server.step(smashed)
            active = self.draw_active(smashed.clients, this, turn)
            clients.backward(self.split_average(step.gradient, smashed, active))
            yield report(step, smashed, active)


@algorithm(
    "sglr",
    title="SGLR",
    summary="PSL with both SplitAvg and SplitLr",
    paper="arXiv 2112.05929",
    needs={FORWARD, BACKWARD},
    spreads="apart",
    client_part=_SPLITS_AVG,
    server_part=_SPLITS_LR,
    colour="vermillion",
)
class Sglr(SplitAvg, SplitLr):
    """SGLR: SplitAvg and SplitLr."""

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        """One round (a local epoch) of SGLR."""
        for turn in count():
            if not (smashed := clients.forward()):
                return
            step = server.step(smashed, self.split_lr(smashed, enrolled=len(clients.samples)))
            active = self.draw_active(smashed.clients, this, turn)
            clients.backward(self.split_average(step.gradient, smashed, active))
            yield report(step, smashed, active)
