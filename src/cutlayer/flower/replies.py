"""The ClientApps' replies, which arrive while the run trains, received on a separate thread."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from flwr.app import Message
from flwr.serverapp import Grid

from cutlayer.errors import CutlayerError, NetworkError, TrainingError, WireError
from cutlayer.flower.invitation import Farewell
from cutlayer.remote.sides import client_name
from cutlayer.text import plain

log = logging.getLogger(__name__)
_TICK = 1.0  # seconds between questions to the SuperLink


class Replies:
    """Receives the nodes' replies. Use as a context manager.

    `give_up(reason)` is called on this object's thread if the run cannot continue: a ClientApp failed before `begun()`,
    so there is no replacement, or the SuperLink no longer answers, for example because the run was stopped. `trouble`
    gives the reason. After the run has begun, its own rules decide how many clients it needs.
    """

    def __init__(self, grid: Grid, begun: Callable[[], bool], give_up: Callable[[str], None]) -> None:
        self.trouble: CutlayerError | None = None
        self.farewells: dict[int, Farewell] = {}
        self.failures: dict[int, str] = {}
        self._grid, self._begun, self._give_up = grid, begun, give_up
        self._open: dict[str, int] = {}
        self._closed, self._all = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="cutlayer-replies", daemon=True)

    def follow(self, sent: Mapping[str, int]) -> None:
        """Listen for the replies to these messages: message id -> client."""
        self._open = dict(sent)
        self._thread.start()

    def wait(self, seconds: float) -> None:
        """Wait until all replies have arrived, or this object has stopped, at most this long."""
        end = time.monotonic() + seconds
        while self._thread.is_alive() and not self._all.is_set() and time.monotonic() < end:
            self._all.wait(_TICK)  # in short pauses, so that a signal is handled between two of them

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(_TICK)

    def _run(self) -> None:
        while self._open and not self._closed.wait(_TICK):
            try:
                came = list(self._grid.pull_messages(list(self._open)))
            except Exception as error:  # whatever Flower's transport raises
                self._fail(
                    NetworkError(f"the SuperLink no longer answers for this run ({error}): was the run stopped?")
                )
                return
            for message in came:
                self._take(message)
        if not self._open:
            self._all.set()

    def _take(self, message: Message) -> None:
        client = self._open.pop(message.metadata.reply_to_message_id, None)
        if client is None:
            return
        if message.has_error():
            failure = plain(message.error.reason) or f"error {message.error.code}"
        else:
            try:
                self.farewells[client] = Farewell.of(message.content)
                failure = ""
            except WireError as error:
                failure = str(error)
        if failure:
            self.failures[client] = failure
            node = message.metadata.src_node_id
            log.warning("%s (node %d) has failed: %s", client_name(client), node, failure)
            if not self._begun():
                self._fail(TrainingError(f"{client_name(client)} (node {node}) has failed before training: {failure}"))

    def _fail(self, trouble: CutlayerError) -> None:
        if self.trouble is None:
            self.trouble = trouble
            self._give_up("the run cannot go on")
