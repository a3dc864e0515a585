"""Low-rank adapters by the names of their factors, and clients whose adapters have ranks of their own.

    W x + s B A x,   A [r, i], B [o, r]

All clients have factors of the largest rank. Of a client with a smaller one, the further rows of A and columns of B are
zero. Gradient descent leaves them zero: the gradient of the one is a multiple of the other. They are not sent.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import nn

_FIRST = re.compile(r"(.*\.)?lora_A(\..+)?")


def pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """The names of A and B of each adapter among the names of parameters."""
    known = set(names)
    found = []
    for name in names:
        if match := _FIRST.fullmatch(name):
            other = f"{match[1] or ''}lora_B{match[2] or ''}"
            if other in known:
                found.append((name, other))
    return found


def narrow(module: nn.Module, rank: int) -> None:
    """Leave adapters their first `rank` rows of A and columns of B; the others become zero."""
    own = dict(module.named_parameters())
    with torch.no_grad():
        for first, second in pairs(list(own)):
            own[first][rank:] = 0
            own[second][:, rank:] = 0


def beyond(module: nn.Module, rank: int) -> int:
    """Bytes of the trained rows of A and columns of B beyond the first `rank`."""
    own = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return sum(own[a][rank:].nbytes + own[b][:, rank:].nbytes for a, b in pairs(list(own)))


def numbers(ranks: Sequence[int]) -> tuple[int, ...]:
    """Which of the ranks each client has, [C]: clients with one number get the same models."""
    order = sorted(set(ranks))
    return tuple(order.index(rank) for rank in ranks)
