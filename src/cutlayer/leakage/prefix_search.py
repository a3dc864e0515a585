"""Tokens one after another: each candidate is sent after the tokens found so far, and the nearest is kept.

In a decoder, the smashed data at a place only depend on the tokens up to there. An attacker that has found the earlier
tokens can try every token at the place and compare exactly (Nikolaou et al., arXiv 2510.15511). Here the likeliest
tokens by the inversion model are tried first, and without noise and codec all others if none of these fits exactly. The
attack is slow, at least n T m passes of a row for n rows, so it reads only a few rows.

Shape legend: as in `seen`; m candidates at a place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cutlayer.leakage.inversion import likeliest
from cutlayer.leakage.seen import Seen, Words

ROWS_READ = 8
_CANDIDATES = 16
_FITS = 1e-8  # of the squared length: rounding


def prefix_search(seen: Seen) -> Tensor:
    """The tokens of the first eight rows: [at most 8, T]."""
    z = (seen.z / seen.scale())[:ROWS_READ]
    offered = likeliest(seen, min(_CANDIDATES, seen.vocabulary))[:ROWS_READ]  # [n, T, m]
    found, exact = offered[..., 0].clone(), _is_exact(seen)
    every = torch.arange(seen.vocabulary, device=z.device)
    for row in range(len(found)):
        words = Words(found[row : row + 1], None if seen.mask is None else seen.mask[row : row + 1])
        for t in range(found.shape[1]):
            token, distance = _nearest_at(seen, words, t, offered[row, t], z[row, t])
            if exact and distance > _FITS * float(z[row, t].square().sum()):
                token, _ = _nearest_at(seen, words, t, every, z[row, t])
            found[row, t] = token
    return found


def _nearest_at(seen: Seen, words: Words, t: int, candidates: Tensor, z: Tensor) -> tuple[int, float]:
    """Which of m candidates [m] at place `t` of one row of words gives the output nearest to z [d]; with its squared
    distance.
    """
    ids = words.ids.repeat(len(candidates), 1)
    ids[:, t] = candidates
    tried = Words(ids, None if words.mask is None else words.mask.expand_as(ids))
    made = torch.cat([seen.smashed(part, "tried", bare=True)[:, t] for part in tried.split()])  # [m, d]
    distances = (made - z).square().sum(1)
    best = int(distances.argmin())
    return int(candidates[best]), float(distances[best])


def _is_exact(seen: Seen) -> bool:
    """Whether defences and codec change nothing."""
    few = seen.auxiliary[:8]
    return torch.equal(seen.smashed(few, "exact"), seen.smashed(few, "exact", bare=True))


def looks_ahead(seen: Seen) -> bool:
    """Whether the smashed data at a place depend on a later token, as in an encoder. Then the search is not
    possible.
    """
    known = seen.auxiliary
    there = torch.ones_like(known.ids) if known.mask is None else (known.mask != 0).long()
    longest = there.sum(1).argsort(descending=True)[:8]
    few, places = known[longest], torch.arange(known.ids.shape[1], device=known.ids.device)
    last = (there[longest] * places).amax(1)  # what a row is filled up with has no influence
    changed = places == last[:, None]
    before = seen.smashed(few, "before", bare=True)
    other = torch.where(changed, (few.ids + 1) % seen.vocabulary, few.ids)
    after = seen.smashed(Words(other, few.mask), "before", bare=True)
    earlier = places < last[:, None]
    return not torch.allclose(before[earlier], after[earlier], atol=1e-5 * float(before.abs().max()))
