"""Rows of equal length from the tokens of documents: packed end to end, or one document (or a part of it) each.

A row's targets are the next tokens: targets[t] is the token after token t, or -100 if it is not learnt. Rows are padded
at one end, and padding is not learnt.

Shape legend: n rows, T tokens in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cutlayer.data.formats._tokenizer import Tokenized
from cutlayer.data.unsplit import Array

IGNORED = -100
"""The target of a token after which nothing is learnt."""


@dataclass(frozen=True)
class Sequences:
    """Tokens `ids`, their `targets` and the `mask` (1: a token, 0: filling), [n, T] each; the number of the `document`
    that each row comes from, [n] (the first, where several are packed); and how many documents were cut off, or left
    out because none of their tokens are learnt.
    """

    ids: Array
    targets: Array
    mask: Array
    document: Array
    cut_off: int = 0
    empty: int = 0


def packed(documents: Sequence[Tokenized], length: int, padding: int) -> Sequences:
    """The tokens of all documents one after another, in rows of `length`; the last row is padded on the right."""
    stream = Tokenized([i for d in documents for i in d.ids], [x for d in documents for x in d.learnt])
    owner = [number for number, d in enumerate(documents) for _ in d.ids]
    rows = [(_row(stream, a, length), owner[a]) for a in range(0, len(owner) - 1, length)]
    return _made([(row, document) for row, document in rows if _learns(row)], length, padding)


def padded(
    documents: Sequence[Tokenized],
    length: int,
    padding: int,
    *,
    left: bool = False,
    whole: bool = False,
    every: bool = False,
) -> Sequences:
    """Rows of one document each, padded on one side. A longer document continues in further rows; with `whole`, its end
    is left out. Rows without learnt tokens are left out, unless `every` row is requested.
    """
    rows, cut_off, empty = list[tuple[_Row, int]](), 0, 0
    for number, document in enumerate(documents):
        starts = [0] if whole else range(0, max(1, len(document.ids) - 1), length)
        found = [row for a in starts if _learns(row := _row(document, a, length)) or every]
        rows += [(row, number) for row in found]
        cut_off += whole and len(document.ids) > length
        empty += not found
    return replace(_made(rows, length, padding, left=left), cut_off=cut_off, empty=empty)


def together(parts: Sequence[Sequences]) -> Sequences:
    """The rows of all, in order."""
    ids, targets, mask, document = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "targets", "mask", "document")
    )
    return Sequences(ids, targets, mask, document, sum(p.cut_off for p in parts), sum(p.empty for p in parts))


_Row = tuple[list[int], list[int]]  # tokens, and the token after each


def _row(tokens: Tokenized, start: int, length: int) -> _Row:
    """At most `length` tokens from `start` on, and the token after each."""
    ids, after = tokens.ids[start : start + length], slice(start + 1, start + 1 + length)
    follow = [i if x else IGNORED for i, x in zip(tokens.ids[after], tokens.learnt[after], strict=True)]
    return ids, follow + [IGNORED] * (len(ids) - len(follow))


def _learns(row: _Row) -> bool:
    return any(target != IGNORED for target in row[1])


def _made(rows: Sequence[tuple[_Row, int]], length: int, padding: int, *, left: bool = False) -> Sequences:
    ids = np.full((len(rows), length), padding, np.int64)
    targets, mask = np.full_like(ids, IGNORED), np.zeros_like(ids)
    for i, ((row, follow), _) in enumerate(rows):
        at = slice(length - len(row), None) if left else slice(0, len(row))
        ids[i, at], targets[i, at], mask[i, at] = row, follow, 1
    return Sequences(ids, targets, mask, np.array([document for _, document in rows], np.int64))
