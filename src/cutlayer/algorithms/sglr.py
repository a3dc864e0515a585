"""SGLR: server-side local gradient averaging and learning rate acceleration (arXiv 2112.05929).

One step:
    1. every client i, in parallel: s_i = f(w_ci, x_i); upload (s_i, y_i)
    2. server: ONE loss on the concatenated rows; w_s <- w_s - eta_s g_s
    3. SplitLr:  eta_s = eta_c * C^alpha                                                  (eq. 13)
    4. SplitAvg: draw phi * C active clients afresh; they all receive ONE common cut gradient, the average of
       theirs (broadcast); the others receive their own (unicast)                         (eq. 14, 15)
    5. every client i: back-propagate what it received; w_ci <- w_ci - eta_c g_ci
Client models are never exchanged.

SLR is SGLR with phi = 0, SGL is SGLR with alpha = 0; PSL is both. Where the paper can be read in several ways, the
reading is an option: `alpha_clients`, `average_over`, `average_reduce`, `gradient_scale`, `phi_when`
(docs/algorithms.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from cutlayer import seeds
from cutlayer.algorithms.common import report
from cutlayer.cohort import Cohort
from cutlayer.gradients import own, scaled
from cutlayer.options import RunConfig
from cutlayer.server import Server
from cutlayer.types import CutGradients, Round, Rows, Smashed, Step, as_matrix, as_rows, channels_last, row_numbers


def sglr(options: RunConfig, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
    """One round (a local epoch) of SGLR."""
    turn = 0
    while smashed := clients.forward():
        step = server.step(smashed, split_lr(options, smashed, enrolled=len(clients.samples)))
        active = draw_active(options, smashed.clients, this, turn)
        clients.backward(split_average(options, step.gradient, smashed, active))
        turn += 1
        yield report(step, smashed, active)


def slr(options: RunConfig, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
    """SplitLr alone: phi = 0."""
    return sglr(options.model_copy(update={"phi": 0.0}), server, clients, this)


def sgl(options: RunConfig, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
    """SplitAvg alone: alpha = 0."""
    return sglr(options.model_copy(update={"alpha": 0.0}), server, clients, this)


def split_lr(options: RunConfig, smashed: Smashed, enrolled: int) -> float:
    """What SplitLr multiplies the server's rate with: C^alpha, C being the clients in this step, or all enrolled."""
    count = enrolled if options.alpha_clients == "enrolled" else len(smashed.clients)
    return float(count**options.alpha)


def draw_active(options: RunConfig, clients: tuple[int, ...], this: Round, turn: int) -> tuple[int, ...]:
    """The active set of the round's step number `turn`: phi x C clients (rounded half up), without replacement."""
    done = this.progress(turn)  # rounded, as the bounds are: 7/15 and .4 + .2/3 are the same moment
    final = round(1 - options.phi_until, 9)
    phase = {"always": True, "initial": done < round(options.phi_until, 9), "final": done >= final}
    count = math.floor(options.phi * len(clients) + 0.5) if phase[options.phi_when] else 0
    order = torch.randperm(len(clients), generator=seeds.torch_generator(this.seed, "active", this.index, turn))
    return tuple(clients[i] for i in sorted(order[:count].tolist()))


def split_average(options: RunConfig, gradient: Rows, smashed: Smashed, active: tuple[int, ...]) -> CutGradients:
    """One common cut gradient for the `active` clients, their own for the others.

    `gradient` is dLoss/d(smashed data) of the concatenated mean loss, each [R, s...]. Raises nothing: an empty active
    set is PSL.
    """
    if not active:
        return own(gradient, smashed, options.gradient_scale)
    # The sum is of the concatenated loss's slices, to the letter of eq. 15; the mean is of gradients in the clients'
    # scale.
    share = "union" if options.average_reduce == "sum" else options.gradient_scale
    shared, others = smashed.sizes_of(set(active)), smashed.sizes_of(set(smashed.clients) - set(active))
    shares = scaled(smashed.take(gradient, shared), tuple(shared.values()), share, len(smashed))
    unicast = scaled(smashed.take(gradient, others), tuple(others.values()), options.gradient_scale, len(smashed))
    common = tuple(average(options, g, tuple(shared.values())) for g in shares)
    return CutGradients(unicast, tuple(others), tuple(others.values()), common, active)


def average(options: RunConfig, gradient: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """The common gradient of the active clients' rows [sum b_k, s...], b_k = `sizes`.

    Over clients: [max b_k, s...], row j over the clients that have a row j. Over clients and rows: [1, s...].
    """
    last = channels_last(gradient)
    rows = as_matrix(gradient, last)
    longest = max(sizes)
    if longest == min(sizes):
        total = rows.view(len(sizes), -1).sum(0).view(longest, -1)
        count: int | Tensor = len(sizes)
    else:
        number = torch.from_numpy(row_numbers(sizes))
        total = rows.new_zeros(longest, rows.shape[1]).index_add_(0, number.to(rows.device), rows)
        count = number.bincount().view(-1, 1).to(rows.device, rows.dtype)
    over_rows = options.average_over == "clients-and-rows"
    if options.average_reduce == "sum":
        common = total.mean(0, keepdim=True) if over_rows else total
    else:
        common = total.sum(0, keepdim=True) / sum(sizes) if over_rows else total / count
    return as_rows(common, gradient.shape[1:], last)
