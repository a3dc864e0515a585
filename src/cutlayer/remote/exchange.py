"""One exchange: one moment of training with several clients. It tracks which clients have answered or are lost, and
whether it is over.

Everything here happens on the thread of the hub's loop, except `wait`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from cutlayer.errors import WireError
from cutlayer.remote.carrier import Lost
from cutlayer.wire.frames import Frame
from cutlayer.wire.tensors import Buffer, size_of


class Body:
    """Buffers behind a message, for one client or several."""

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        self._buffers, self.size, self.users = buffers, size_of(buffers), 0

    @property
    def buffers(self) -> Sequence[Buffer]:
        """The buffers, joined once if several clients receive them."""
        if self.users > 1:
            self.keep()
        return self._buffers

    def keep(self) -> None:
        """Copy buffers that share memory with tensors, which may change after the exchange."""
        if len(self._buffers) != 1 or not isinstance(self._buffers[0], bytes):
            self._buffers = [b"".join(self._buffers)]


class Out:
    """A message on its way to one client. `slot` numbers the answers that an exchange expects; None: there is none."""

    __slots__ = ("body", "exchange", "message", "slot")

    def __init__(self, message: Any, body: Body, exchange: Exchange, slot: int | None) -> None:
        self.message, self.body, self.exchange, self.slot = message, body, exchange, slot


class Hooks(Protocol):
    """What an exchange needs of its hub."""

    def call(self, function: Callable[..., object], *args: object) -> None:
        """Run `function` on the loop, soon."""

    def garbled(self, client: int, sentence: str) -> None:
        """The client has sent something that contradicts the agreed terms."""

    def keep_bodies(self, exchange: Exchange) -> None:
        """The exchange ends: messages that it has not sent yet must no longer depend on tensors."""


class Exchange:
    """Collects the answers of clients. `counts`: how many answers each owes; `voters`: the clients that count for the
    quorum (None: all).
    """

    def __init__(
        self,
        counts: Mapping[int, int],
        quorum: int | None,
        on_answer: Callable[[int, Frame], Any] | None,
        pool: ThreadPoolExecutor | None,
        hub: Hooks,
        *,
        voters: Collection[int] | None = None,
    ) -> None:
        self.results: dict[int, list[Any] | Lost] = {}
        self.error: BaseException | None = None
        self.timer: asyncio.TimerHandle | None = None
        self._answers: dict[int, list[Any]] = {k: [None] * n for k, n in counts.items()}
        self._due = dict(counts)  # missing answers
        self._decoding = dict.fromkeys(counts, 0)
        self._unsent = dict.fromkeys(counts, 0)
        self._quorum, self._on_answer, self._pool = quorum, on_answer, pool
        self._voters = counts if voters is None else voters
        self._hub = hub
        self._expired = self._ended = False
        self.over = not counts
        """Whether further answers are ignored."""
        self._done = threading.Lock()  # held until the end: wakes whoever waits at half the cost of an Event
        if counts:
            self._done.acquire()

    def wait(self) -> dict[int, list[Any] | Lost]:
        """All results; called from another thread, once. Raises an error of this side."""
        self._done.acquire()
        if self.error is not None:
            raise self.error
        return self.results

    def sending(self, client: int, count: int) -> None:
        """`count` messages are to be written to the client."""
        self._unsent[client] = count
        if not count:
            self._settle(client)

    def sent(self, client: int) -> None:
        """One of them is."""
        self._unsent[client] -= 1
        if not self._unsent[client]:
            self._settle(client)

    def answered(self, client: int, slot: int, frame: Frame) -> None:
        """The client has sent one of its answers."""
        if client in self.results:
            return
        self._due[client] -= 1
        if self._on_answer is None or self._pool is None:
            self._answers[client][slot] = frame
            if not self._due[client]:
                self._settle(client)
            return
        self._decoding[client] += 1
        future = self._pool.submit(self._on_answer, client, frame)
        future.add_done_callback(lambda done: self._hub.call(self._decoded, client, slot, done))

    def lose(self, client: int, lost: Lost) -> None:
        """The client will not answer."""
        if client in self._answers and client not in self.results:
            self._finish(client, lost)

    def fail(self, error: BaseException) -> None:
        """An error on this side: end at once."""
        if not self._ended:
            self.error = error
            self._end()

    def expire(self) -> None:
        """The deadline has passed."""
        self._expired = True
        self._close_if_enough()

    def _decoded(self, client: int, slot: int, done: Future[Any]) -> None:
        self._decoding[client] -= 1
        error = done.exception()
        if client in self.results:
            return
        if isinstance(error, WireError):
            self._hub.garbled(client, str(error))
            self.lose(client, Lost("garbage", str(error), type(error).__name__))
        elif error is not None:
            self.fail(error)
        else:
            self._answers[client][slot] = done.result()
            self._settle(client)

    def _settle(self, client: int) -> None:
        waits = self._due[client] or self._decoding[client] or self._unsent[client]
        if client not in self.results and not waits:
            self._finish(client, self._answers[client])

    def _finish(self, client: int, result: list[Any] | Lost) -> None:
        self.results[client] = result
        if len(self.results) == len(self._answers):
            self._end()
        else:
            self._close_if_enough()

    def _close_if_enough(self) -> None:
        if not self._expired or self.over:
            return
        answered = sum(k in self._voters and not isinstance(r, Lost) for k, r in self.results.items())
        if answered < (self._quorum or 0):
            return
        self.over = True
        self._hub.keep_bodies(self)
        for client in [k for k in self._answers if k not in self.results]:
            if self._due[client] or self._unsent[client]:  # others arrived in time and are being decoded
                self.lose(client, Lost("late", f"client {client} had not answered when the deadline passed"))

    def _end(self) -> None:
        if self._ended:  # ended from outside, and then its clients were lost
            return
        self.over = self._ended = True
        if self.timer is not None:
            self.timer.cancel()  # it would keep all answers until the deadline
        self._hub.keep_bodies(self)
        self._done.release()
