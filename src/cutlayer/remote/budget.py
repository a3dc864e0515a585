"""A bound on the memory of messages that are being written to clients, all of them together."""

from __future__ import annotations

import asyncio
from contextlib import suppress

_STUCK = 0.5  # seconds after which a message that is being written counts as stuck


class WriteBudget:
    """Bytes of messages that are packed and being written. A single message of any size may be written.

    A stuck message returns its share after a while, since clients that do not read must not delay the others.
    """

    def __init__(self, total: int) -> None:
        self._total, self._used = total, 0
        self._held: dict[int, tuple[int, float]] = {}  # (bytes, time until which they count), the oldest first
        self._last = 0
        self._freed = asyncio.Event()

    async def take(self, size: int) -> int:
        """Wait until `size` bytes are free and hold them; the share, for `give_back`."""
        loop = asyncio.get_running_loop()
        while self._used and self._used + size > self._total:
            now = loop.time()
            for share in [share for share, (_, until) in self._held.items() if until <= now]:
                self.give_back(share)
            if self._held:
                oldest = next(iter(self._held.values()))[1]
                self._freed.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._freed.wait(), max(0.0, oldest - now))
        self._last += 1
        self._held[self._last] = (size, loop.time() + _STUCK)
        self._used += size
        return self._last

    def give_back(self, share: int) -> None:
        """The bytes of this share are written, or stuck."""
        size, _ = self._held.pop(share, (0, 0))
        self._used -= size
        self._freed.set()
