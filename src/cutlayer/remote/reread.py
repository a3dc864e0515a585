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
"""An event, as a word and as facts."""


class Reread(Generic[T]):
    """The result of `read` for the files at `paths`: `value`. `look` reads again if one of them has changed.

    If files cannot be read, or are invalid, the last good value stays, and `news` is called once for each state of the
    files. After a good change, `news` is called with the word `what` and the facts from `facts`. The first reading
    raises ConfigError. Any thread may call `look`.
    """

    def __init__(
        self, what: str, paths: Sequence[Path], read: Callable[[], T], facts: Callable[[T], Mapping[str, Any]]
    ) -> None:
        self.news: deque[News] = deque()
        self._what, self._paths, self._read, self._facts = what, tuple(paths), read, facts
        self._lock = threading.Lock()
        self._seen = self._state()  # before reading, so that a change in the meantime is noticed later
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
        """A value that changes with the files: a replaced file has another inode, a rewritten one another time."""
        states: list[object] = []
        for path in self._paths:
            try:
                found = path.stat()
            except OSError as error:
                states.append(error.errno)
            else:
                states.append((found.st_ino, found.st_dev, found.st_size, found.st_mtime_ns))
        return tuple(states)
