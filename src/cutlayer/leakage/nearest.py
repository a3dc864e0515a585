"""Tokens by their nearest candidate: the token whose own smashed data are nearest to those at its place.

The candidates at a place are the client part's outputs there for rows that repeat one token. After an embedding they
are the embeddings, with their positions; after decoder blocks they lack the context of the true row, which the blocks
mix in. The attack only needs the client part: no training and no text.

Shape legend: as in `seen`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cutlayer.leakage.seen import Seen, Words

_CANDIDATES = 256  # at once


def nearest(seen: Seen) -> Tensor:
    """The token whose candidate has the least squared distance, place by place: [n, T]."""
    z = (seen.z / seen.scale()).transpose(0, 1)  # [T, n, d]
    length, n, _ = z.shape
    best = torch.full((length, n), -torch.inf, device=z.device)
    guess = torch.zeros((length, n), dtype=torch.int64, device=z.device)
    for first in range(0, seen.vocabulary, _CANDIDATES):
        tokens = torch.arange(first, min(first + _CANDIDATES, seen.vocabulary), device=z.device)
        ids = tokens[:, None].expand(-1, length)
        mask = None if seen.mask is None else torch.ones_like(ids, dtype=seen.mask.dtype)
        made = seen.smashed(Words(ids, mask), "candidates", bare=True).permute(1, 2, 0)  # [T, d, c]
        near = 2 * z @ made - made.square().sum(1)[:, None]  # [T, n, c]: minus the distance, but for |z|^2
        found, at = near.max(2)
        guess = torch.where(found > best, at + first, guess)
        best = torch.maximum(best, found)
    return guess.T
