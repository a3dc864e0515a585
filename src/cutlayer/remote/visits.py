"""A server's record of who came and who was refused, which floods cannot swell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from cutlayer.remote.caller import Caller

EACH, ALL = 5, 50
"""Events that are recorded in a window of time: of one kind from one host, and in all. More are counted."""

FIRST, LONGEST = 60.0, 3600.0
"""Seconds of a window: as long as too much happens, each is twice as long as the one before, up to the longest."""


class Visits:
    """Who came and who was refused, told to `tell` as a word and facts; `refused` counts the refusals by reason.

    What is told is bounded, whatever happens: `EACH` and `ALL` events in a window of time, and one that says how many
    more there were. `now`, seconds of any clock, is given with everything.
    """

    def __init__(self, tell: Callable[[str, Mapping[str, Any]], None]) -> None:
        self.refused: Counter[str] = Counter()
        self._tell = tell
        self._window, self._end = FIRST, 0.0
        self._told: Counter[tuple[str, str]] = Counter()
        self._more: Counter[str] = Counter()

    def refuse(self, caller: Caller, reason: str, why: str, now: float) -> None:
        """Somebody was not let in."""
        self.refused[reason] += 1
        self._note("refused", f"refused: {reason}", caller, {"reason": reason, "why": why[:500]}, now)

    def connect(self, caller: Caller, client: int, now: float) -> None:
        """Somebody was let in as client number `client`."""
        self._note("connected", "connected", caller, {"client": client}, now)

    def look(self, now: float) -> None:
        """Say how many events were not told, if the window is over."""
        if now < self._end:
            return
        if self._more:
            self._tell("more", {"counts": dict(sorted(self._more.items())), "seconds": self._window})
        self._window = min(2 * self._window, LONGEST) if self._more else FIRST
        self._end = now + self._window
        self._told.clear()
        self._more.clear()

    def close(self) -> None:
        """Say what was not told yet: the end."""
        self.look(self._end)

    def _note(self, happened: str, counted: str, caller: Caller, facts: Mapping[str, Any], now: float) -> None:
        self.look(now)
        source = happened, caller.host
        if self._told.total() >= ALL or self._told[source] >= EACH:
            self._more[counted] += 1
            return
        self._told[source] += 1
        self._tell(happened, {**facts, **caller.facts})
