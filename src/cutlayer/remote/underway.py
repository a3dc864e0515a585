"""Requests to single clients that are open at the same time. Answers are taken in the order of their arrival."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cutlayer.remote.carrier import Carrier, Lost, Request
from cutlayer.wire.frames import Frame

Result = list[Any] | Lost


class Underway:
    """An exchange for each client with an open request, over a carrier. `clients` are those whose answers are not taken
    yet.

    With a carrier that is not `concurrent`, all new requests are answered at once, in the given order.
    """

    def __init__(self, carrier: Carrier) -> None:
        self._carrier = carrier
        self.clients: set[int] = set()
        self._came: queue.SimpleQueue[tuple[int, Result | BaseException]] = queue.SimpleQueue()

    def start(self, requests: Mapping[int, Sequence[Request]], on_answer: Callable[[int, Frame], Any]) -> None:
        """Send requests to these clients, each in its own exchange, without waiting; see `Carrier.exchange`."""
        self.clients |= requests.keys()
        if self._carrier.concurrent:
            for k, asked in requests.items():
                threading.Thread(target=self._ask, args=(k, asked, on_answer), daemon=True).start()
            return
        for k, found in self._carrier.exchange(requests, on_answer=on_answer).items():
            self._came.put((k, found))

    def take(self, seconds: float | None = None) -> tuple[int, Result] | None:
        """The next client that has answered or is lost, with its answers; None if there is none within these seconds.
        Raises an error of this side.
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
        except BaseException as error:  # raised when it is taken
            self._came.put((client, error))
        else:
            self._came.put((client, found))
