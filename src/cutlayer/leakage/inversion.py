"""Tokens by a trained inversion model: smashed data to scores of tokens, learnt on auxiliary text.

The attacker sends its own text through the client part, with fresh noise each time, and trains a network on these
pairs. A token is predicted from the smashed data at its place and at two places on either side.

Shape legend: as in `seen`; h hidden values, m tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from cutlayer import seeds
from cutlayer.leakage.fitting import Budget, fit
from cutlayer.leakage.inputs import Scale, split
from cutlayer.leakage.seen import Seen

_TOKENS = 512  # in a step
_BUDGET = Budget(steps=400, lr=3e-3, check_every=50, patience=3)
_KEPT = "inversion"


class Inverter(nn.Module):
    """Standardised smashed data [R, T, d] to scores of tokens [R, T, V]: a linear map plus convolutions over places."""

    def __init__(self, values: int, vocabulary: int, hidden: int = 128) -> None:
        super().__init__()
        self.linear = nn.Linear(values, vocabulary)
        self.body = nn.Sequential(
            nn.Conv1d(values, hidden, 5, padding=2), nn.GELU(), nn.Conv1d(hidden, hidden, 1), nn.GELU()
        )
        self.out = nn.Linear(hidden, vocabulary)

    def forward(self, rows: Tensor) -> Tensor:
        """[R, T, d] -> [R, T, V]."""
        scores: Tensor = self.linear(rows) + self.out(self.body(rows.transpose(1, 2)).transpose(1, 2))
        return scores


def inversion(seen: Seen) -> Tensor:
    """The likeliest token at each place, by the trained model: [n, T]."""
    return likeliest(seen, 1)[..., 0]


def likeliest(seen: Seen, count: int) -> Tensor:
    """The m = `count` likeliest tokens at each place, in order: [n, T, m]. The model is trained once."""
    if _KEPT not in seen.kept:
        seen.kept[_KEPT] = _trained(seen)
    scores = seen.kept[_KEPT]
    with torch.no_grad():
        return torch.cat([scores(z).topk(count, 2).indices for z in seen.z.split(_rows(seen))])


def _rows(seen: Seen) -> int:
    """How many rows have as many tokens as a step."""
    return max(1, _TOKENS // seen.z.shape[1])


def _trained(seen: Seen) -> Callable[[Tensor], Tensor]:
    """The attacker's model: smashed data [R, T, d] to scores of tokens [R, T, V]."""
    parts = split(len(seen.auxiliary), seen.seed, "tokens", shares=(0.8, 0.2))
    device = seen.z.device
    words, learnt = seen.auxiliary, seen.learnt
    train, held = parts.train.to(device), parts.validation.to(device)
    once = seen.smashed(words, "auxiliary")  # [N, T, d]
    random = not torch.equal(once[:8], seen.smashed(words[:8], "again"))
    scale = Scale.of(once[train][learnt[train]])
    with seeds.torch_seeded(seen.seed, "leakage", "inversion"):
        model = Inverter(once.shape[2], seen.vocabulary).to(device)

    def scores(z: Tensor) -> Tensor:
        given: Tensor = model(scale(z.flatten(0, 1)).view(z.shape))
        return given

    def loss_of(z: Tensor, rows: Tensor) -> Tensor:
        there = learnt[rows]
        return functional.cross_entropy(scores(z)[there], words.ids[rows][there])

    def loss(chosen: Tensor) -> Tensor:
        rows = train[chosen]
        with torch.no_grad():
            z = seen.client(words[rows]) if random else once[rows]
        return loss_of(z, rows)

    batch = _rows(seen)
    pieces = held.split(batch)

    def judge() -> Tensor:
        return torch.stack([loss_of(once[rows], rows) * learnt[rows].sum() for rows in pieces]).nansum()

    budget = replace(_BUDGET, batch=batch)
    fit(model, loss, judge, len(train), budget, seen.seed, "inversion", device=device)
    return scores
