"""Losses and cut gradients: what the server computes and how it is scaled for the clients.

The server's loss is ONE mean over all R rows. A client's own mean loss is over its b_k rows; the two gradients differ
by the factor R / b_k on its rows (that is C for equal batches). If rows have different weights, both are weighted
means, and the factor is W / W_k: the total weight of all rows divided by that of the client's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from cutlayer.types import CutGradients, Rows, Smashed

RowLoss = Callable[[Tensor, Tensor], Tensor]
"""(outputs [R, K], labels [R]) -> the loss of each row [R]."""


def mean_loss(losses: Tensor, weights: Tensor | None) -> Tensor:
    """The loss of a step: sum(w_i l_i) / sum(w_i) over its rows [R] (`weights` None: the mean). 0 if all
    weights are 0.
    """
    if weights is None:
        return losses.mean()
    weights = weights.to(losses.dtype)
    return (losses * weights).sum() / _positive(weights.sum())


def client_means(values: Tensor, sizes: Sequence[int], weights: Tensor | None = None) -> Tensor:
    """Weighted mean of a row-wise quantity [R] over each client's rows: [C]."""
    if weights is not None:
        parts = zip(values.split(list(sizes)), weights.split(list(sizes)), strict=True)
        return torch.stack([mean_loss(part, counting) for part, counting in parts])
    if len(set(sizes)) == 1:
        return values.view(len(sizes), -1).mean(1)
    return torch.stack([part.mean() for part in values.split(list(sizes))])


def means(losses: Tensor, sizes: Sequence[int], weights: Tensor | None = None) -> Tensor:
    """The mean losses that a step reports, from the rows' losses [R]: over all rows, then over each client's rows: [1 +
    C].
    """
    return torch.cat([mean_loss(losses, weights).view(1), client_means(losses, sizes, weights)])


def means_of_clients(own: Tensor, masses: Sequence[float]) -> Tensor:
    """The same from the clients' own mean losses [C] and the weights of their rows: [1 + C]."""
    share = torch.tensor(list(masses), dtype=own.dtype, device=own.device) / (sum(masses) or 1)
    return torch.cat([(share @ own).view(1), own])


def gradient_of(tensor: Tensor) -> Tensor:
    """A tensor's gradient; zeros if it has none."""
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def summed(gradients: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The sum of several clients' weight gradients, by name, in their order."""
    first, *others = gradients
    total = {name: g.clone() for name, g in first.items()}
    for other in others:
        for name, g in other.items():
            total[name] += g
    return total


def descending(given: Rows, received: Rows) -> list[tuple[Tensor, Tensor]]:
    """The pairs that a client part back-propagates: (smashed data, its gradient) for each tensor in `given` that has a
    graph. `received` has one gradient per floating point tensor, or is empty if the part trains nothing.
    """
    floats = [s for s in given if s.is_floating_point()] if received else []
    return [(s, g) for s, g in zip(floats, received, strict=True) if s.requires_grad]


def own(gradient: Rows, smashed: Smashed, scale: str = "own") -> CutGradients:
    """Every client gets its own slice of `gradient` = dLoss/d(smashed data), each [R, s...].

    `scale="own"`: as the gradient of the client's own mean loss, so that a client's step does not shrink with C.
    `scale="union"`: as it is, the gradient of the concatenated mean loss. Adam hides the difference, SGD does not.
    """
    here = smashed.here
    rows = scaled(gradient, here.sizes, here.masses, scale, sum(smashed.masses))
    return CutGradients(rows, smashed.clients, smashed.sizes)


def scaled(gradient: Rows, sizes: Sequence[int], masses: Sequence[float], scale: str, total: float) -> Rows:
    """`gradient` [sum b_k, s...] times W / W_k on the rows of client k (`scale="own"`), or as it is (`"union"`).

    `masses` are the W_k, the total weights of each client's rows (b_k if all rows count equally). `total` is W, over
    all clients of the step, since `gradient` may have the rows of only some of them. If all rows of a client have
    weight 0, its gradient is 0.
    """
    if scale == "union" or total == (masses[0] if masses else total):  # one client: W / W_k = 1
        return gradient
    if len(set(masses)) == 1 and masses[0]:
        return tuple(g * (total / masses[0]) for g in gradient)
    factors = spread([total / mass if mass else 0.0 for mass in masses], sizes)
    return tuple(g * column(factors, g) for g in gradient)


def _positive(total: Tensor) -> Tensor:
    """`total`, or 1 if it is 0, as the divisor of a sum whose weights may all be 0."""
    return torch.where(total > 0, total, torch.ones_like(total))


def spread(values: Sequence[float], sizes: Sequence[int]) -> Tensor:
    """One value per client -> one per row: [R], in double precision, on the CPU."""
    each = torch.tensor(list(sizes), dtype=torch.int64)  # of none, too
    return torch.repeat_interleave(torch.tensor(list(values), dtype=torch.float64), each)


def column(values: Tensor, rows: Tensor) -> Tensor:
    """Row-wise values [R] as a factor of rows [R, s...]."""
    return values.to(rows.device, rows.dtype).view(-1, *[1] * (rows.dim() - 1))
