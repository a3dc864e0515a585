"""The interface between the server's cohort and its clients: requests go out, answers or losses come back.

`RemoteCohort` (`far.py`) asks a `Carrier`; at the other end a `Responder` answers, which is a `Worker` (`worker.py`)
outside of tests. A transport decides how the bytes travel (see `transports`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from cutlayer.errors import CutlayerError
from cutlayer.wire import messages as m
from cutlayer.wire.frames import Frame
from cutlayer.wire.tensors import Buffer

Request = tuple[m.Message, Sequence[Buffer]]
Answer = tuple[m.Message, Sequence[Buffer]]
Reason = Literal["late", "gone", "failed", "garbage"]


class StoppedError(CutlayerError):
    """This process was told to end while it worked on a request."""


@dataclass(frozen=True)
class Lost:
    """A client that did not answer all its requests: the reason as a word and as a sentence; `kind` is the name of the
    client's error if it has "failed".

    A "late" client stays connected: it has received, or is receiving, all its requests in order, and its answers are
    discarded. All others are no longer connected, and it is not known how far they got.
    """

    reason: Reason
    sentence: str
    kind: str = ""


class Carrier(Protocol):
    """Carries requests to clients, and their answers back. `concurrent`: exchanges with different clients may run at
    the same time, each in its own thread.
    """

    concurrent: bool

    @property
    def connected(self) -> frozenset[int]:
        """Clients that can receive requests now."""

    def arrivals(self) -> Mapping[int, m.Hello]:
        """Clients that have connected, or reconnected, since the last call. From then on they can receive requests."""

    def exchange(
        self,
        requests: Mapping[int, Sequence[Request]],
        *,
        deadline: float | None = None,
        quorum: int | None = None,
        voters: Collection[int] | None = None,
        on_answer: Callable[[int, Frame], Any],
    ) -> Mapping[int, list[Any] | Lost]:
        """Send each client its requests, in order. Returns for each client the result of `on_answer` for its answers,
        or why there are none. If it raises WireError, the client is lost for "garbage".
        """

    def dismiss(self, client: int, sentence: str) -> None:
        """Close the connection of a client that has sent something impossible."""


class Responder(Protocol):
    """A client's end. All methods are called on one thread, one after another."""

    def hello(self) -> m.Hello:
        """The client's Hello, for each connection."""

    def welcome(self, welcome: m.Welcome) -> m.Refused | None:
        """Check the server's terms."""

    def handle(self, frame: Frame) -> Answer | None:
        """Answer a request; None if it has no answer."""
