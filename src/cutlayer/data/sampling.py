"""The number of rows that each client brings to each step of a round: b rows, in proportion to its data, or as drawn.

With `fixed` sampling, every client takes batches of b rows until its local epoch is over; nothing here is needed. With
the other two, a step has B = C b rows of C clients together, and all clients finish their data at the same time:

    proportional   client k brings b_k rows, in proportion to n_k
    global         an epoch's list that has client k n_k times is shuffled and cut into blocks of B; client k brings one
                   row for each time that it is in the block, as in draws from the pooled data (arXiv 2407.15738)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import Literal

import numpy as np

from cutlayer import seeds

Sampling = Literal["fixed", "proportional", "global"]


def proportional(samples: Sequence[int], batch: int) -> np.ndarray:
    """b_k [C]: C x `batch` rows in proportion to `samples` [C], by the largest remainders; at least one, and at most
    all rows of a client.
    """
    counts = np.asarray(samples, np.float64)
    total = min(len(counts) * batch, int(counts.sum()))
    exact = total * counts / max(1.0, counts.sum())
    sizes: np.ndarray = np.maximum(np.floor(exact), np.minimum(counts, 1)).astype(np.int64)
    while (missing := total - int(sizes.sum())) != 0:
        may = sizes < counts if missing > 0 else sizes > 1
        if not may.any():
            break
        sign = 1 if missing > 0 else -1
        sizes[int(np.where(may, sign * (exact - sizes), -np.inf).argmax())] += sign
    return sizes


def starved(samples: Sequence[int], batch: int) -> list[int]:
    """The clients whose proportional share of a step is less than one row."""
    total = sum(samples)
    return [k for k, n in enumerate(samples) if len(samples) * batch * n < total]


def blocks(samples: Sequence[int], batch: int, seed: int, index: int) -> Iterator[np.ndarray]:
    """Rows [C] of each client in the steps of round `index`: those of one epoch after another. C x `batch` rows make a
    step, and each epoch begins with a new step.
    """
    owners, size = np.repeat(np.arange(len(samples)), samples), len(samples) * batch
    for epoch in count():
        order = seeds.generator(seed, "blocks", index, epoch).permutation(owners)
        for start in range(0, len(order), size):
            yield np.bincount(order[start : start + size], minlength=len(samples))


def per_epoch(samples: Sequence[int], batch: int) -> int:
    """Steps of an epoch in which all clients bring C x `batch` rows together."""
    return math.ceil(sum(samples) / (len(samples) * batch))


class Turns:
    """The sizes of the batches of a round, step by step (0: the client does not take part in the step), and the
    progress of each client.
    """

    def __init__(self, sizes: dict[int, list[int]]) -> None:
        self._sizes, self._at = sizes, dict.fromkeys(sizes, 0)
        self._turn = 0

    @property
    def batches(self) -> dict[int, int]:
        """How many batches each client has in the round."""
        return {k: sum(size > 0 for size in own) for k, own in self._sizes.items()}

    @property
    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """Of each client, step by step."""
        return tuple(tuple(own) for own in self._sizes.values())

    def together(self) -> tuple[int, ...]:
        """The clients that bring rows to the next non-empty step; empty at the end."""
        longest = max(map(len, self._sizes.values()), default=0)
        while self._turn < longest:
            turn, self._turn = self._turn, self._turn + 1
            due = [k for k, own in self._sizes.items() if self._at[k] <= turn < len(own) and own[turn]]
            if due:
                self._at.update(dict.fromkeys(due, turn))
                return tuple(due)
        return ()

    def take(self, clients: Sequence[int]) -> list[int]:
        """The sizes of the next batches of `clients`, which have some left."""
        return [self.some(k, 1)[0] for k in clients]

    def some(self, client: int, batches: int) -> list[int]:
        """The sizes of a client's next batches, at most this number."""
        found: list[int] = []
        own = self._sizes[client]
        while len(found) < batches and self._at[client] < len(own):
            size = own[self._at[client]]
            self._at[client] += 1
            found += [size] if size else []
        return found


def dealt(
    sampling: Sampling,
    samples: Sequence[int],
    clients: Sequence[int],
    batch: int,
    seed: int,
    index: int,
    local: tuple[int, int | None],
) -> Turns:
    """The batches of round `index` of those `clients` that take part, all clients having `samples` rows. A round is
    `local` epochs, or steps.
    """
    epochs, steps = local
    if sampling == "global":
        own = [samples[k] for k in clients]
        drawn = list(islice(blocks(own, batch, seed, index), steps or epochs * per_epoch(own, batch)))
        return Turns({k: [int(block[i]) for block in drawn] for i, k in enumerate(clients)})
    known = [k for k, n in enumerate(samples) if n]
    share = dict(zip(known, proportional([samples[k] for k in known], batch).tolist(), strict=True))
    sizes = {}
    for k in clients:
        full, rest = divmod(samples[k], share[k])
        sizes[k] = [share[k]] * steps if steps else epochs * ([share[k]] * full + ([rest] if rest else []))
    return Turns(sizes)
