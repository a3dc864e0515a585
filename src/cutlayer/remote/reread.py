"""Files that are read again when they change, while a server runs."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from cutlayer.errors import ConfigError

T = TypeVar("T")
News = tuple[str, Mapping[str, Any]]
"""What has happened, as a word and as facts."""


class Reread(Generic[T]):
    """What `read` makes of the files at `paths`: `value`. `look` reads again if one of them has changed.

    Files that cannot be read, or say what cannot be, change nothing: the last good value stays, and `news` says so once
    for each state of the files. A good change is news, too: the word `what`, with the facts that `facts` finds in it.
    The first reading raises ConfigError. Any thread may look.
    """

    def __init__(
        self, what: str, paths: Sequence[Path], read: Callable[[], T], facts: Callable[[T], Mapping[str, Any]]
    ) -> None:
        self.news: deque[News] = deque()
        self._what, self._paths, self._read, self._facts = what, tuple(paths), read, facts
        self._lock = threading.Lock()
        self._seen = self._state()  # before reading: a change in the meantime is one that is still to be seen
        self.value = read()

    def look(self) -> T:
        """The value, read again if the files have changed: costs little if they have not."""
        with self._lock:
            state = self._state()
            if state != self._seen:
                self._seen = state
                self._take()
            return self.value

    def _take(self) -> None:
        try:
            self.value = self._read()
        except ConfigError as error:
            self.news.append(("kept", {"what": self._what, "why": f"{error}; what was read before stays in force"}))
        else:
            self.news.append((self._what, self._facts(self.value)))

    def _state(self) -> tuple[object, ...]:
        """What changes with the files: a file that was replaced has another number, one that was written a new time."""
        states: list[object] = []
        for path in self._paths:
            try:
                found = path.stat()
            except OSError as error:
                states.append(error.errno)
            else:
                states.append((found.st_ino, found.st_dev, found.st_size, found.st_mtime_ns))
        return tuple(states)
