"""The names of classes and features behind the numbers in the data, in order, as a term of the handshake.

A Hello has little space. For a long list, it has the first names, the number of all names, and a digest of all. Numbers
and digests are compared, and the names around the first difference are shown.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from cutlayer.wire.messages import Names

_ROOM = 3000  # bytes of names in a Hello, of each kind
_LONGEST = 200  # bytes of one name in a Hello
_WIDTH = 60  # characters of one name in a sentence
_AROUND = 3  # names that are shown before and after the first difference


def named(names: Sequence[str]) -> Names:
    """The names as a term: whole lists that differ in any way have different digests."""
    first, room = list[str](), _ROOM
    for name in names:
        short = _cut(name)
        room -= len(short.encode()) + 4
        if room < 0:
            break
        first.append(short)
    return Names(count=len(names), digest=_digest(names) if names else "", first=first)


def _digest(names: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()


def _cut(name: str) -> str:
    """The name, or its beginning, as far as it can be written in UTF-8."""
    data = name.encode("utf-8", "replace")
    return data.decode() if len(data) <= _LONGEST else data[:_LONGEST].decode("utf-8", "ignore") + "..."


def both(a: Names, b: Names) -> tuple[str, str]:
    """Two lists as a sentence shows them: whole if they are short, otherwise around the first difference. The texts
    are the same only if the lists are.
    """
    if (a.count, a.digest) == (b.count, b.digest):
        return "", ""
    at = _first_difference(a, b)
    found = _shown(a, at), _shown(b, at)
    if found[0] != found[1]:
        return found
    return f"{found[0]} (SHA-256 of all: {a.digest})", f"{found[1]} (SHA-256 of all: {b.digest})"


def _first_difference(a: Names, b: Names) -> int:
    """The place of the first names that differ, as far as the names themselves are known."""
    known = min(len(a.first), len(b.first))
    return next((k for k in range(known) if a.first[k] != b.first[k]), known)


def _shown(names: Names, at: int) -> str:
    if not names.count:
        return "not known"
    begin, end = max(0, at - _AROUND), at + _AROUND + 1
    if names.count <= 2 * _AROUND + 2:
        begin, end = 0, names.count
    listed = [repr(name if len(name) <= _WIDTH else f"{name[:_WIDTH]}...") for name in names.first[begin:end]]
    text = ", ".join([*(["..."] if begin else []), *listed, *(["..."] if end < names.count else [])])
    return text if (begin, end) == (0, names.count) else f"{text} ({names.count} in all, the first {at} alike)"
