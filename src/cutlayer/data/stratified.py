"""Draws rows to hold out, in proportion to the classes, as scikit-learn's `train_test_split` does.

Its module loads pandas and most of scipy, which costs more than torch itself, while the draws are only a few lines. All
rows of the splits are the same.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


def held_out(rows: int, count: int, classes: Rows | None, state: int) -> Rows:
    """The `count` held-out rows of `rows`, in no particular order. The shares of the `classes` [rows] are kept, unless
    a class has too few rows to be in both halves.
    """
    drawn = np.random.RandomState(state)
    found = None if classes is None else np.unique(classes, return_inverse=True, return_counts=True)
    if found is None or found[2].min() < 2 or min(count, rows - count) < len(found[2]):
        anyone: Rows = drawn.permutation(rows)[:count]
        return anyone
    _, ranks, sizes = found
    kept = _shares(sizes, rows - count, drawn)
    held = _shares(sizes - kept, count, drawn)
    members = np.split(np.argsort(ranks, kind="stable"), np.cumsum(sizes)[:-1])
    shuffled = [rows_of[drawn.permutation(len(rows_of))] for rows_of in members]
    return np.concatenate([s[k : k + h] for s, k, h in zip(shuffled, kept, held, strict=True)])


def _shares(sizes: Rows, count: int, drawn: np.random.RandomState) -> Rows:
    """`count` rows divided in proportion to the `sizes`: the largest remainders are rounded up, ties at random."""
    exact = sizes / sizes.sum() * count
    shares = np.floor(exact)
    remainders = exact - shares
    missing = int(count - shares.sum())
    for value in np.unique(remainders)[::-1]:
        if not missing:
            break
        (tied,) = np.nonzero(remainders == value)
        up = drawn.choice(tied, size=min(len(tied), missing), replace=False)
        shares[up] += 1
        missing -= len(up)
    return np.asarray(shares, np.int64)
