"""The lengths of rows. A row consists of all real tensors that cross for one sample; its length is the Euclidean norm.

Shape legend: C clients of a step, R rows of all of them, n numbers of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from cutlayer.types import Rows


def lengths_of(rows: Rows) -> Tensor:
    """The length of each row [R], in double precision, over all real tensors."""
    each = [_lengths(r.flatten(1)) for r in rows if r.is_floating_point()]
    if len(each) == 1:
        return each[0]
    together: Tensor = torch.stack(each) if each else torch.zeros(1, len(rows[0]), dtype=torch.float64)
    lengths: Tensor = torch.linalg.vector_norm(together, dim=0)
    return lengths


def _lengths(rows: Tensor) -> Tensor:
    """[R, n] -> [R]. Squares of large numbers overflow in single precision; these are computed again in double."""
    lengths: Tensor = torch.linalg.vector_norm(rows if rows.element_size() >= 4 else rows.float(), dim=1).double()
    if not bool(torch.isfinite(lengths).all()):
        lengths = torch.linalg.vector_norm(rows.double(), dim=1)
    return lengths


def medians(lengths: Tensor, sizes: Sequence[int]) -> Tensor:
    """The median of each client's lengths: [R] -> [C]."""
    if len(set(sizes)) == 1:
        return lengths.view(len(sizes), -1).median(1).values
    return torch.stack([part.median() for part in lengths.split(list(sizes))])
