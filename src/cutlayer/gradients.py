"""Losses and cut gradients: what the server computes and how it is scaled for the clients.

The server's loss is ONE mean over all R rows. A client's own mean loss is over its b_k rows; the two gradients differ
by the factor R / b_k on its rows (that is C for equal batches).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from cutlayer.types import CutGradients, Rows, Smashed

RowLoss = Callable[[Tensor, Tensor], Tensor]
"""(outputs [R, K], labels [R]) -> the loss of each row [R]."""


def row_losses(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of each row: outputs [R, K], labels [R] -> [R]."""
    return functional.cross_entropy(outputs, labels, reduction="none")


def client_means(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Mean of a row-wise quantity [R] over each client's rows: [C]."""
    if len(set(sizes)) == 1:
        return values.view(len(sizes), -1).mean(1)
    return torch.stack([part.mean() for part in values.split(list(sizes))])


def means(losses: Tensor, sizes: Sequence[int]) -> Tensor:
    """What a step reports of its losses [R]: the mean over all rows, then over each client's: [1 + C]."""
    return torch.cat([losses.mean().view(1), client_means(losses, sizes)])


def means_of_clients(own: Tensor, sizes: Sequence[int]) -> Tensor:
    """The same from the clients' own mean losses [C]: [1 + C]."""
    share = torch.tensor(list(sizes), dtype=own.dtype, device=own.device) / sum(sizes)
    return torch.cat([(share @ own).view(1), own])


def gradient_of(tensor: Tensor) -> Tensor:
    """A tensor's gradient; zeros where nothing reached it."""
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def own(gradient: Rows, smashed: Smashed, scale: str = "own") -> CutGradients:
    """Every client gets its own slice of `gradient` = dLoss/d(smashed data), each [R, s...].

    `scale="own"`: as the gradient of the client's own mean loss, so that a client's step does not shrink with C.
    `scale="union"`: as it is, the gradient of the concatenated mean loss. Adam hides the difference, SGD does not.
    """
    return CutGradients(scaled(gradient, smashed.sizes, scale), smashed.clients, smashed.sizes)


def scaled(gradient: Rows, sizes: Sequence[int], scale: str, union: int | None = None) -> Rows:
    """`gradient` times R / b_k on the rows of client k (`scale="own"`), or as it is (`"union"`).

    R is the number of rows, or `union` where `gradient` holds only some clients' rows.
    """
    total = sum(sizes) if union is None else union
    if scale == "union" or total == (sizes[0] if sizes else total):  # one client: R / b_k = 1
        return gradient
    if len(set(sizes)) == 1:
        return tuple(g * (total / sizes[0]) for g in gradient)
    factors = spread([total / size for size in sizes], sizes)
    return tuple(g * column(factors, g) for g in gradient)


def spread(values: Sequence[float], sizes: Sequence[int]) -> Tensor:
    """One value per client -> one per row: [R], in double precision, on the CPU."""
    return torch.repeat_interleave(torch.tensor(list(values), dtype=torch.float64), torch.tensor(list(sizes)))


def column(values: Tensor, rows: Tensor) -> Tensor:
    """Row-wise values [R] as a factor of rows [R, s...]."""
    return values.to(rows.device, rows.dtype).view(-1, *[1] * (rows.dim() - 1))
