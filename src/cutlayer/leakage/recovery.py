"""How many input tokens an honest-but-curious server recovers from smashed data.

Each attack in `ATTACKS` maps the attacker's observations (`seen.Seen`) to a token for each place. What the attacker
knows:
- "model": the present client part with its adapters, which a server that averages client models has;
- "smashed": the client part that the run began with, such as the public base without the clients' adapters, and the
  smashed data.

Padding is never counted. Each attack is compared with the unigram guesser, who always answers with the most frequent
auxiliary token. The report is the result of these attacks: a lower bound on possible attacks.

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
"""Attacks on tokens by name: from the attacker's observations to tokens [n, T], or to those of the first rows."""

LEAST = 20  # auxiliary rows
_SAME = 2  # equal unlearnt tokens at a row's end count as padding, if the padding token is not known


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
    """Which places have a token of the text, and not padding: [n, T] of bool.

    A mask says it. Without one, padding is at a row's end: the token `padding`, which is not learnt; if that token is
    not known, at least two equal tokens that are not learnt.
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
    """Which targets [n, T] count; None if all do."""
    ignored = getattr(task, "ignore_index", None)
    return None if ignored is None else targets != ignored
