"""Requests that are under way to single clients, side by side: what comes back is taken in the order of its arrival."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cutlayer.remote.carrier import Carrier, Lost, Request
from cutlayer.wire.frames import Frame

Result = list[Any] | Lost


class Underway:
    """An exchange for each client that is asked, over a carrier. `clients` are those whose answers are not taken yet.

    A carrier that is not `concurrent` has all new requests answered at once, in the order in which they are given.
    """

    def __init__(self, carrier: Carrier) -> None:
        self._carrier = carrier
        self.clients: set[int] = set()
        self._came: queue.SimpleQueue[tuple[int, Result | BaseException]] = queue.SimpleQueue()

    def start(self, requests: Mapping[int, Sequence[Request]], on_answer: Callable[[int, Frame], Any]) -> None:
        """Ask these clients, each by itself, and do not wait; see `Carrier.exchange`."""
        self.clients |= requests.keys()
        if self._carrier.concurrent:
            for k, asked in requests.items():
                threading.Thread(target=self._ask, args=(k, asked, on_answer), daemon=True).start()
            return
        for k, found in self._carrier.exchange(requests, on_answer=on_answer).items():
            self._came.put((k, found))

    def take(self, seconds: float | None = None) -> tuple[int, Result] | None:
        """The next client whose answers are there, or that is lost, and these; None if none comes within these seconds.
        Raises what went wrong on this side.
        """
        try:
            client, found = self._came.get(timeout=seconds)
        except queue.Empty:
            return None
        self.clients.discard(client)
        if isinstance(found, BaseException):
            raise found
        return client, found

    def _ask(self, client: int, asked: Sequence[Request], on_answer: Callable[[int, Frame], Any]) -> None:
        try:
            found = self._carrier.exchange({client: asked}, on_answer=on_answer)[client]
        except BaseException as error:  # whoever takes it raises it
            self._came.put((client, error))
        else:
            self._came.put((client, found))
