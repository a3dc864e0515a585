"""Tokens one after another: each candidate is sent after the tokens found so far, and the nearest is kept.

In a decoder, what is sent at a place depends on the tokens up to there alone. An attacker that has found those before
it can try every token at the place and compare exactly (Nikolaou et al., arXiv 2510.15511). Here the candidates are the
likeliest tokens by the inversion model. The attack is slow: for n rows it takes n T m passes of a row, and so it reads
only a few rows.

Shape legend: as in `seen`; m candidates at each place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cutlayer.leakage.inversion import likeliest
from cutlayer.leakage.seen import Seen, Words

ROWS_READ = 8
_CANDIDATES = 16


def prefix_search(seen: Seen) -> Tensor:
    """The tokens of the first eight rows: [at most 8, T]."""
    z = (seen.z / seen.scale())[:ROWS_READ]
    offered = likeliest(seen, min(_CANDIDATES, seen.vocabulary))[:ROWS_READ]  # [n, T, m]
    n, length, count = offered.shape
    mask = None if seen.mask is None else seen.mask[:ROWS_READ].repeat_interleave(count, 0)
    found = offered[..., 0].clone()
    for t in range(length):
        tried = found.repeat_interleave(count, 0)  # [n m, T]
        tried[:, t] = offered[:, t].flatten()
        made = seen.smashed(Words(tried, mask), "tried", bare=True)[:, t].view(n, count, -1)
        distance = (made - z[:, None, t]).square().sum(2)  # [n, m]
        found[:, t] = offered[:, t].gather(1, distance.argmin(1, keepdim=True))[:, 0]
    return found


def looks_ahead(seen: Seen) -> bool:
    """Whether what is sent at a place depends on a later token, as in an encoder: the search is then not possible."""
    few = seen.auxiliary[:8]
    other = few.ids.clone()
    other[:, -1] = (other[:, -1] + 1) % seen.vocabulary
    before = seen.smashed(few, "before", bare=True)[:, :-1]
    after = seen.smashed(Words(other, few.mask), "before", bare=True)[:, :-1]
    return not torch.allclose(before, after, atol=1e-5 * float(before.abs().max()))
