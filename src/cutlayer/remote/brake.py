"""Slows down repeated connections: a server does not read connections that come too often, and logs few lines about
them.
"""

from __future__ import annotations

from collections import Counter

WINDOW = 10.0
"""Seconds after which all counts begin anew."""

REFUSALS, CONNECTIONS = 20, 100
"""How often one name may be refused, or connect, from one host in a window. Later connections are refused unread."""

LINES = 3
"""Lines of the log about refusals of one name from one host in a window. Further ones are counted, and reported in one
line.
"""

_NAMES = 256  # of refused strangers of one host that are counted separately: they may invent any number of names

Key = tuple[str, str]
"""(host, the name that a peer there claims)."""


class Brake:
    """Counts connections and refusals. `now`, seconds of any clock, is an argument of each method."""

    def __init__(self) -> None:
        self._end = 0.0
        self._refusals: Counter[Key] = Counter()
        self._connections: Counter[Key] = Counter()
        self._names: Counter[str] = Counter()

    def blocks(self, host: str, name: str) -> bool:
        """Count this connection; whether it is one too many."""
        key = self._key(host, name)
        blocked = self._refusals[key] >= REFUSALS or self._connections[key] >= CONNECTIONS
        if blocked:
            self._refusals[key] += 1
        return blocked

    def refuse(self, host: str, name: str) -> bool:
        """Count a refusal; whether it is logged."""
        key = self._key(host, name)
        self._names[host] += key not in self._refusals
        self._refusals[key] += 1
        return self._refusals[key] <= LINES

    def connect(self, host: str, name: str) -> None:
        """Count an admitted client, under its own name, since the number of clients is bounded."""
        self._connections[host, name] += 1

    def over(self, now: float) -> dict[Key, int]:
        """If the window is over: the number of refusals that were not logged, by host and name."""
        if now < self._end:
            return {}
        unsaid = {key: count - LINES for key, count in self._refusals.items() if count > LINES}
        self._end = now + WINDOW
        for counts in (self._refusals, self._connections, self._names):
            counts.clear()
        return unsaid

    def _key(self, host: str, name: str) -> Key:
        """Names beyond a number of refused ones share one key."""
        key = (host, name)
        known = key in self._refusals or key in self._connections
        return key if known or self._names[host] < _NAMES else (host, "")
