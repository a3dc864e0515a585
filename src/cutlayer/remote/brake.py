"""Slows down whoever dials again and again: a server does not read what comes too often, and writes few lines of it."""

from __future__ import annotations

from collections import Counter

WINDOW = 10.0
"""Seconds after which all counts begin anew."""

REFUSALS, CONNECTIONS = 20, 100
"""How often one name may be refused, or come, from one host in a window. What follows is turned away unread."""

LINES = 3
"""Lines of the log about refusals of one name from one host in a window. More are counted, and said in one."""

_NAMES = 256  # of refused strangers of one host that are told apart: they may make up any number

Key = tuple[str, str]
"""(a host, what somebody there calls itself)."""


class Brake:
    """Counts who comes and who is refused. `now`, seconds of any clock, is given with everything."""

    def __init__(self) -> None:
        self._end = 0.0
        self._refusals: Counter[Key] = Counter()
        self._connections: Counter[Key] = Counter()
        self._names: Counter[str] = Counter()

    def blocks(self, host: str, name: str) -> bool:
        """Whether this one has come too often. It is counted then."""
        key = self._key(host, name)
        blocked = self._refusals[key] >= REFUSALS or self._connections[key] >= CONNECTIONS
        if blocked:
            self._refusals[key] += 1
        return blocked

    def refuse(self, host: str, name: str) -> bool:
        """Somebody is refused: whether a line of the log is to say so."""
        key = self._key(host, name)
        self._names[host] += key not in self._refusals
        self._refusals[key] += 1
        return self._refusals[key] <= LINES

    def connect(self, host: str, name: str) -> None:
        """Somebody is let in: a name of its own, since a study has so many clients and no more."""
        self._connections[host, name] += 1

    def over(self, now: float) -> dict[Key, int]:
        """Where the window is over: how many refusals no line of the log has said, by host and name."""
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
