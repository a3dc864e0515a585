"""Losses and cut gradients: what the server computes and how it is scaled for the clients.

The server's loss is ONE mean over all R rows. A client's own mean loss is over its b_k rows; the two gradients differ
by the factor R / b_k on its rows (that is C for equal batches).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from cutlayer.types import CutGradients, Rows, Smashed


def row_losses(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of each row: outputs [R, K], labels [R] -> [R]."""
    return functional.cross_entropy(outputs, labels, reduction="none")


def per_client(values: Tensor, sizes: tuple[int, ...]) -> tuple[float, ...]:
    """Mean of a row-wise quantity [R] over each client's rows."""
    return tuple(float(part.mean()) for part in values.split(list(sizes)))


def per_row(values: list[float], sizes: tuple[int, ...], like: Tensor) -> Tensor:
    """One value per client -> [R, 1...], to multiply rows shaped as `like` with."""
    rows = torch.repeat_interleave(like.new_tensor(values), torch.tensor(sizes, device=like.device))
    return rows.view(-1, *[1] * (like.dim() - 1))


def own(gradient: Rows, smashed: Smashed, scale: str = "own") -> CutGradients:
    """Every client gets its own slice of `gradient` = dLoss/d(smashed data), each [R, s...].

    `scale="own"`: as the gradient of the client's own mean loss, so that a client's step does not shrink with C.
    `scale="union"`: as it is, the gradient of the concatenated mean loss. Adam hides the difference, SGD does not.
    """
    return CutGradients(scaled(gradient, smashed, scale), smashed.clients, smashed.sizes)


def scaled(gradient: Rows, smashed: Smashed, scale: str) -> Rows:
    """`gradient` times R / b_k on the rows of client k (`scale="own"`), or as it is (`"union"`)."""
    if scale == "union" or len(smashed.clients) == 1:  # one client: R / b_k = 1
        return gradient
    factors = [len(smashed) / size for size in smashed.sizes]
    return tuple(g * per_row(factors, smashed.sizes, g) for g in gradient)
