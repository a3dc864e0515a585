"""Low-rank adapters averaged by what they add to a weight, their products (HSplitLoRA, arXiv 2505.02795).

    W + s B_k A_k   for client k, with A_k [r, i] and B_k [o, r]

The mean of the factors does not give the mean of the products: (mean B)(mean A) also multiplies one client's B by
another client's A.
Here P = sum_k p_k B_k A_k is decomposed into singular values, and the r largest make the new factors

    A = a V^T,   B = U S / a

so that B A is the matrix of rank r that is nearest to P: P itself, if its rank is no larger. The first rows of A belong
to the largest singular values, so a client whose adapters have a smaller rank takes only the first rows (`adapters`).
The scale a keeps the rows of A as long as the clients' were, in the mean of those that are not zero. Directions that P
lacks (all of them, as long as B is 0) have rows of A from what the mean of the clients' A spans, and B = 0. If these
are not enough, because all participants have smaller ranks, further rows are drawn. They are always the same ones,
since otherwise rounding would choose them.

P is never written down: its factors are those of all clients side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cutlayer.adapters import pairs
from cutlayer.averagings.rule import Averaging, averaging

if TYPE_CHECKING:
    from torch import Tensor

_NOTHING = 1e-9  # of the largest singular value: in double precision, smaller values are rounding errors


@averaging("products", title="Mean of products", paper="arXiv 2505.02795")
class MeanOfProducts(Averaging):
    """The weighted mean; for LoRA adapters, the factors nearest to the weighted mean of the clients' products B A.

    The factors come from a singular value decomposition of that mean.
    """

    by_name = True

    def combine_named(self, models: Mapping[str, Tensor], shares: Tensor) -> dict[str, Tensor]:
        """The model from tensors [K, ...] by name."""
        import torch

        found = {name: torch.tensordot(shares.to(t.dtype), t, 1) for name, t in models.items()}
        for first, second in pairs(list(models)):
            found[first], found[second] = factors(models[first], models[second], shares)
        return found

    def obstacle(self, names: Sequence[str]) -> str:
        """There must be adapters."""
        return "" if pairs(names) else "the model has no adapters (lora_A, lora_B)"


def factors(first: Tensor, second: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """A [r, i] and B [o, r] of the mean of products, from those of K clients, [K, r, i] and [K, o, r]. Rows of A are in
    the order of their singular values.
    """
    import torch

    a, b, p = first.double(), second.double(), shares.to(first.device, torch.float64)
    rank, inputs = a.shape[1:]
    rows = a.flatten(0, 1)  # [K r, i]
    columns = (p[:, None, None] * b).transpose(0, 1).flatten(1)  # [o, K r]
    left, inner_left = torch.linalg.qr(columns)
    right, inner_right = torch.linalg.qr(rows.T)
    u, s, vh = torch.linalg.svd(inner_left @ inner_right.T)
    there = min(rank, int((s > _NOTHING * max(float(s[0]), 1e-300)).sum()))
    u, s, v = left @ u[:, :there], s[:there], right @ vh[:there].T  # [o, q], [q], [i, q]
    rest = (rank if rank <= inputs else inputs) - there
    if rest > 0:  # directions that the product lacks: from the rest of the mean of A
        mean = torch.tensordot(p, a, 1)
        _, sizes, others = torch.linalg.svd(mean - mean @ v @ v.T, full_matrices=False)
        spanned = min(rest, int((sizes > _NOTHING * mean.norm()).sum()))
        v = torch.cat([v, others[:spanned].T], 1)
        v = torch.cat([v, _further(v, rest - spanned)], 1)
    lengths = a.square().sum(2)  # [K, r], squared
    scale = (torch.tensordot(p, lengths.sum(1), 1) / torch.tensordot(p, (lengths > 0).sum(1).double(), 1)).sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # also for 0 / 0
    sign = torch.sign(v.gather(0, v.abs().argmax(0, keepdim=True)))  # so that it does not depend on the library
    new_first, new_second = torch.zeros_like(a[0]), torch.zeros_like(b[0])
    new_first[: v.shape[1]] = scale * (v * sign).T
    new_second[:, :there] = u * s * sign[:, :there] / scale
    return new_first.to(first.dtype), new_second.to(second.dtype)


def _further(v: Tensor, count: int) -> Tensor:
    """Columns [i, count] that are orthonormal to those of `v` [i, q] and to each other: always the same for these."""
    import torch

    drawn = torch.randn(len(v), count, generator=torch.Generator().manual_seed(0), dtype=v.dtype).to(v.device)
    found: Tensor = torch.linalg.qr(torch.cat([v, drawn], 1))[0][:, v.shape[1] :]
    return found
