"""How many input tokens an honest-but-curious server recovers from smashed data.

Each attack in `ATTACKS` maps what the attacker has (`seen.Seen`) to a token for each place. What the attacker knows:
- "model": the client part as it is, adapters included, as a server has that averages client models;
- "smashed": the client part that the run began with, such as the public base without the clients' adapters, and the
  smashed data.

Places that are filled up count nowhere. Beside each attack stands the unigram guesser, who always answers with the
commonest auxiliary token. What is reported is what these attacks reached: a lower bound on what can be done.

Shape legend: as in `seen`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cutlayer.data.samples import Samples
from cutlayer.leakage.inversion import inversion
from cutlayer.leakage.nearest import nearest
from cutlayer.leakage.prefix_search import looks_ahead, prefix_search
from cutlayer.leakage.seen import Seen, Words
from cutlayer.tasks import Task

ATTACKS: dict[str, Callable[[Seen], Tensor]] = {
    "nearest": nearest,
    "inversion": inversion,
    "search": prefix_search,
}
"""Attacks on tokens by name: from what the attacker has to tokens [n, T], or to those of the first rows."""

LEAST = 20  # auxiliary rows
_SAME = 2  # equal tokens at a row's end of which nothing is learnt: filling, where nothing says what fills rows


@dataclass(frozen=True)
class Recovered:
    """The share of `tokens` in `rows` rows that an `attack` named rightly, and that the unigram guesser did on the
    same; `knowledge` is what the attacker knew.
    """

    attack: str
    knowledge: str
    accuracy: float
    unigram: float
    tokens: int
    rows: int


def recover(seen: Seen, words: Words, counting: Tensor, attack: str, knowledge: str) -> Recovered | None:
    """Attack the true `words` [n, T], of which the places `counting` [n, T] count. None where it is not possible: a
    search in a model whose tokens look ahead.
    """
    if attack == "search" and looks_ahead(seen):
        return None
    guess = ATTACKS[attack](seen)
    rows = len(guess)
    true = words.ids[:rows][counting[:rows]]
    commonest = seen.auxiliary.ids[seen.learnt].bincount().argmax()
    accuracy, unigram = (_share(guess[counting[:rows]] == true), _share(true == commonest))
    return Recovered(attack, knowledge, accuracy, unigram, len(true), rows)


def _share(right: Tensor) -> float:
    return float(right.double().mean()) if len(right) else 0.0


def counting_places(samples: Samples, task: Task, padding: int | None) -> Tensor:
    """Which places hold a token of the text, and not what a row was filled up with: [n, T] of bool.

    A mask says it. Without one, filling stands at a row's end: the token `padding`, of which nothing is learnt; where
    it is not known, at least two equal tokens of which nothing is learnt.
    """
    words = Words.of(samples.inputs)
    if words.mask is not None:
        return words.mask != 0
    if samples.y.shape != words.ids.shape or (counts := _counts(task, samples.y)) is None:
        return torch.ones_like(words.ids, dtype=torch.bool)
    filling = words.ids == (words.ids[:, -1:] if padding is None else padding)
    run = (filling & ~counts).flip(1).cumprod(1).flip(1).bool()  # up to the row's end
    if padding is None:
        run &= run.sum(1, keepdim=True) >= _SAME
    return ~run


def _counts(task: Task, targets: Tensor) -> Tensor | None:
    """Which targets [n, T] count; None where all do."""
    ignored = getattr(task, "ignore_index", None)
    return None if ignored is None else targets != ignored
