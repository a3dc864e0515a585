"""Logit adjustment: each side's loss takes the frequencies of the classes into account, so that the model need not
learn them.

P_k(y) = n_k(y) / n_k is the share of class y among client k's training rows, P_S(y) the same over all participants of
the round. Scores z [R, K] enter a loss as z + tau log P; predictions use z itself.

    the server steps on            mean CE(z + tau log P_S, y)
    client k is sent the gradient  d/ds_k CE(z + tau log P_k, y_k)

Both are taken at the same server model, before its step. log P^tau is log(P^tau + 1e-12), so that an absent class has a
finite number. Rule: Zhang et al., arXiv 2405.04875 and 2409.01251; for one model: Menon et al., arXiv 2007.07314.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cutlayer.cohort import Cohort, CohortAround
from cutlayer.tasks import Task
from cutlayer.types import Round, Rows, Smashed

Side = Literal["none", "client", "server", "both"]
_ABSENT = 1e-12


class Shifts(NamedTuple):
    """The shifts of the scores of some rows, [K] or [R, K], in the server's loss and in the clients'; None: no shift.
    If both are the same object, one loss is enough for both.
    """

    server: Tensor | None = None
    clients: Tensor | None = None


class Adjustment:
    """Shifts by the class counts [C][K] of all clients, for the losses of one `side` or both. The counts may still
    change when clients join, so they are read when a round begins.
    """

    def __init__(self, side: Side, tau: float, counts: Sequence[Sequence[int]]) -> None:
        self.side, self.tau, self.counts = side, tau, counts
        self.begin(range(len(counts)))

    def begin(self, participants: Sequence[int]) -> None:
        """A round begins with these clients."""
        counts = torch.tensor([list(own) for own in self.counts], dtype=torch.float64)
        self._server = log_prior(counts[list(participants)].sum(0), self.tau)
        self._clients = log_prior(counts, self.tau)

    def of(self, smashed: Smashed) -> Shifts:
        """The shifts of the rows of a step; rows that belong to no client only have the server's."""
        server = None if self.side == "client" else self._server
        if self.side == "server" or not smashed.clients:
            return Shifts(server)
        own = self._clients[list(smashed.clients)]
        if server is not None and bool((own == server).all()):
            return Shifts(server, server)
        return Shifts(server, torch.repeat_interleave(own, torch.tensor(smashed.sizes), 0))

    @property
    def apart(self) -> bool:
        """Whether the two sides have different losses, as far as known (counts of clients that have not joined are
        missing).
        """
        known = any(map(sum, self.counts))
        return self.side != "both" or not (known and bool((self._clients == self._server).all()))


def log_prior(counts: Tensor, tau: float) -> Tensor:
    """tau log P of class counts [..., K], in double precision; without any rows, that of equal shares."""
    counts = counts.double()
    total = counts.sum(-1, keepdim=True)
    shares = torch.where(total > 0, counts / total.clamp(min=1), torch.full_like(counts, 1 / counts.shape[-1]))
    return (shares**tau + _ABSENT).log()


def adjusted(outputs: Rows, shift: Tensor | None, task: Task) -> Rows:
    """A model's outputs, [R, K] each, with `shift` added to the scores that the loss reads."""
    if shift is None:
        return outputs
    read = 1 + len(task.auxiliary_weights)
    return (*(o + shift.to(o.device, o.dtype) for o in outputs[:read]), *outputs[read:])


class InformedCohort(CohortAround):
    """A cohort that tells `adjustment` the participants of each round."""

    def __init__(self, inner: Cohort, adjustment: Adjustment) -> None:
        super().__init__(inner)
        self.adjustment = adjustment

    def begin_round(self, index: int, total: int, lr_factor: float) -> Round:
        """As the inner cohort's."""
        this = self.inner.begin_round(index, total, lr_factor)
        self.adjustment.begin(this.clients)
        return this

    def state(self) -> dict[str, Any]:
        """The inner cohort's, since priors follow from the participants."""
        return self.inner.state()

    def load(self, state: Mapping[str, Any]) -> None:
        """Take a state that `state()` returned."""
        self.inner.load(state)
