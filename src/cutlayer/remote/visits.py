"""A server's record of connections and refusals, whose size floods cannot increase."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from cutlayer.remote.caller import Caller
from cutlayer.text import plain

EACH, ALL = 5, 50
"""Limits on recorded events in a window of time: for refusals of one host, or connections of one client, and for all
refusals. Further ones are counted.
"""

FIRST, LONGEST = 60.0, 3600.0
"""Seconds of a window: as long as events continue, each window is twice as long as the one before, up to the
longest.
"""

_WHY = 500  # characters of a reason


class Visits:
    """Passes connections and refusals to `tell`, as a word and facts; `refused` counts the refusals by reason.

    The number of events is bounded, whatever strangers do: `EACH` and `ALL` events in a window of time, and one with
    the number of further ones. `now`, seconds of any clock, is an argument of each method.
    """

    def __init__(self, tell: Callable[[str, Mapping[str, Any]], None]) -> None:
        self.refused: Counter[str] = Counter()
        self._tell = tell
        self._window, self._end = FIRST, 0.0
        self._connects: Counter[int] = Counter()
        self._refusals: Counter[str] = Counter()
        self._more: Counter[str] = Counter()

    def refuse(self, caller: Caller, reason: str, why: str, now: float) -> None:
        """A peer was refused."""
        self.look(now)
        self.refused[reason] += 1
        if self._refusals.total() >= ALL or self._refusals[caller.host] >= EACH:
            self._more[f"refused: {reason}"] += 1
            return
        self._refusals[caller.host] += 1
        self._tell("refused", {"reason": reason, "why": plain(why[:_WHY]), **caller.facts})

    def connect(self, caller: Caller, client: int, now: float) -> None:
        """A peer was admitted as client number `client`."""
        self.look(now)
        if self._connects[client] >= EACH:
            self._more["connected"] += 1
            return
        self._connects[client] += 1
        self._tell("connected", {"client": client, **caller.facts})

    def look(self, now: float) -> None:
        """Report the number of events that were left out, if the window is over."""
        if now < self._end:
            return
        if self._more:
            self._tell("more", {"counts": dict(sorted(self._more.items())), "seconds": self._window})
        quiet = not self._connects and not self._refusals
        self._window = FIRST if quiet else min(2 * self._window, LONGEST)
        self._end = now + self._window
        for counts in (self._connects, self._refusals, self._more):
            counts.clear()

    def close(self) -> None:
        """Report at the end what was left out."""
        self.look(self._end)
