"""Signs of life of ranks, so that those that have waited too long can say for whom.

A rank that waits for others leaves a sign in the store where all have met, again and again. One that computes for
long, hangs, or is gone leaves none. Nothing is written while nobody waits.
"""

from __future__ import annotations

import time
from datetime import timedelta
from threading import Thread
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_MOST = 2.0  # seconds between two signs
_LEAVES = "leaves"


class Signs:
    """What rank `rank` of `size` and the others leave in the `store` while they wait, up to `limit` seconds."""

    def __init__(self, store: Store, rank: int, size: int, limit: float) -> None:
        self._store, self._rank, self._size, self.limit = store, rank, size, limit
        self.pause = min(_MOST, limit / 4)
        """Seconds between two signs of a rank that waits."""
        self._count = 0

    def give(self) -> None:
        """Another sign of this rank."""
        self._count += 1
        self._store.set(str(self._rank), str(self._count))

    def meet(self, seconds: float) -> tuple[int, ...]:
        """Wait for all ranks to be there. Those that are not after so many seconds."""
        self.give()
        end = time.monotonic() + seconds
        return tuple(r for r in self._others if not self._there(r, max(0.01, end - time.monotonic())))

    def silent(self) -> tuple[int, ...]:
        """The ranks that give no sign for three pauses, while this one, which is about to leave, still does. None if
        that cannot be found out. If the store does not answer, it is rank 0, which keeps it.
        """
        found: list[tuple[int, ...]] = []
        asking = Thread(target=lambda: found.append(self._silent()), daemon=True)
        asking.start()
        asking.join(6 * self.pause + 1)
        if asking.is_alive():
            return (0,) if self._rank else ()
        return found[0] if found else ()

    def _silent(self) -> tuple[int, ...]:
        try:
            before = [self._last(r) for r in self._others]
            for _ in range(3):
                self.give()
                time.sleep(self.pause)
            after = [self._last(r) for r in self._others]
            self._store.set(str(self._rank), _LEAVES)
        except RuntimeError:  # the store is gone too
            return ()
        both = zip(self._others, before, after, strict=True)
        return tuple(r for r, old, new in both if new == old and new != _LEAVES)

    @property
    def _others(self) -> list[int]:
        return [r for r in range(self._size) if r != self._rank]

    def _last(self, rank: int) -> str:
        """The last sign of a rank; nothing if it has never had to wait."""
        return self._store.get(str(rank)).decode() if self._store.check([str(rank)]) else ""

    def _there(self, rank: int, seconds: float) -> bool:
        try:
            self._store.wait([str(rank)], timedelta(seconds=seconds))
        except RuntimeError:
            return False
        return True
