"""`memory://`: clients in the server's own process, without a network.

Every request and every answer becomes a frame and is read again, by both sides' rules of a conversation, so tests here
cover what crosses a network. Everything is done on the caller's thread, one client after another, so a run is the same
each time and a failure has one traceback.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cutlayer.errors import NonFiniteError, RefusedError, WireError
from cutlayer.remote.carrier import Answer, Lost, Request, Responder
from cutlayer.remote.counters import ClientTraffic
from cutlayer.wire import messages as m
from cutlayer.wire.conversation import ANSWERS, ClientSide, ServerSide
from cutlayer.wire.frames import Frame
from cutlayer.wire.limits import Limits
from cutlayer.wire.tensors import Buffer, size_of

Greet = Callable[[m.Hello, int], m.Welcome | m.Refused]
"""(a client's Hello, its number) -> whether it is admitted."""


@dataclass
class _Line:
    """One client's connection: both sides of its conversation. `admitted`: can receive requests."""

    server: ServerSide
    client: ClientSide
    hello: m.Hello
    admitted: bool
    reported: bool = False


class MemoryCarrier:
    """Carries requests to `workers`, by number; each must `join` first.

    A worker's NonFiniteError or WireError is reported to the server and ends the client's connection, as over a
    network. Any other error is raised: it belongs to this process, and its traceback says more than a lost client.
    Answers are immediate, so deadlines and quorums have no effect.
    """

    concurrent = False

    def __init__(self, workers: Mapping[int, Responder], limits: Limits | None = None) -> None:
        self.workers = dict(workers)
        self._limits = limits or Limits()
        self._lines: dict[int, _Line] = {}
        self._endings: dict[int, Lost] = {}
        self._traffic: dict[int, ClientTraffic] = {}

    def join(self, client: int, greet: Greet) -> m.Refused | None:
        """Connect a worker; the server's reason if `greet` refuses it. Raises RefusedError if the worker refuses."""
        server, own, worker = ServerSide(self._limits), ClientSide(self._limits), self.workers[client]
        said = own.send(worker.hello())
        hello = server.receive(said).message
        answered = server.send(greet(hello, client))
        answer = own.receive(answered).message
        if isinstance(answer, m.Refused):
            return answer
        if refused := worker.welcome(answer):
            raise RefusedError(refused.reason, refused.sentence)
        self._lines[client] = _Line(server, own, hello, admitted=client not in self._traffic)
        self._endings.pop(client, None)
        traffic = self._traffic.setdefault(client, ClientTraffic())
        traffic.received += len(said)
        traffic.sent += len(answered)
        traffic.messages_sent += 1
        traffic.connections += 1
        return None

    def cut(self, client: int, lost: Lost | None = None) -> None:
        """End a client's connection; `lost` is what the server is told."""
        if self._lines.pop(client, None) is not None:
            self._endings[client] = lost or Lost("gone", f"client {client} is gone: its connection has ended")

    def dismiss(self, client: int, sentence: str) -> None:
        """Close the connection of a client that has sent something impossible."""
        self.cut(client, Lost("garbage", sentence, WireError.__name__))

    @property
    def present(self) -> frozenset[int]:
        """Clients that have joined and not been cut."""
        return frozenset(self._lines)

    @property
    def connected(self) -> frozenset[int]:
        """Clients that can receive requests now. A client that has reconnected is among them after `arrivals`."""
        return frozenset(k for k, line in self._lines.items() if line.admitted)

    def arrivals(self) -> dict[int, m.Hello]:
        """The clients that have joined since the last call, with their Hellos."""
        new = {k: line for k, line in self._lines.items() if not line.reported}
        for line in new.values():
            line.admitted = line.reported = True
        return {k: line.hello for k, line in new.items()}

    def traffic(self) -> dict[int, ClientTraffic]:
        """Bytes and messages of every client that has ever joined."""
        return {k: replace(t) for k, t in self._traffic.items()}

    def exchange(
        self,
        requests: Mapping[int, Sequence[Request]],
        *,
        deadline: float | None = None,
        quorum: int | None = None,
        voters: Collection[int] | None = None,
        on_answer: Callable[[int, Frame], Any],
    ) -> dict[int, list[Any] | Lost]:
        """Send each client its requests, in order, one client after another; see `Carrier.exchange`."""
        return {k: self._exchange_one(k, asked, on_answer) for k, asked in requests.items()}

    def answer(self, client: int, frame: Frame) -> Answer | None:
        """A client's answer. Tests override this to simulate faults; a `cut` in it loses the answer."""
        return self.workers[client].handle(frame)

    def _exchange_one(
        self, client: int, asked: Sequence[Request], on_answer: Callable[[int, Frame], Any]
    ) -> list[Any] | Lost:
        if client not in self.connected:
            return self._why_not(client)
        found: list[Any] = []
        owed = sum(type(message) in ANSWERS for message, _ in asked)
        for message, body in asked:
            answer = self._ask(client, message, body)
            if isinstance(answer, Lost):
                self.cut(client, answer)
                # As over a network: all answers are here, so nothing waits for later messages of a client.
                return found if len(found) == owed else answer
            if answer is None:
                continue
            try:
                found.append(on_answer(client, answer))
            except WireError as error:
                lost = Lost("garbage", str(error), type(error).__name__)
                self.cut(client, lost)
                return lost
        return found

    def _ask(self, client: int, message: m.Message, body: Sequence[Buffer]) -> Frame | Lost | None:
        """One request to one client: its answer, None if there is none, or how the client was lost."""
        line, traffic = self._lines[client], self._traffic[client]
        data = line.server.send(message, body)
        traffic.sent += len(data)
        traffic.messages_sent += 1
        traffic.payload_sent += size_of(body)
        try:
            answer = self.answer(client, line.client.receive(data))
            back = None if answer is None else line.client.send(*answer)
        except (NonFiniteError, WireError) as error:
            return Lost("failed", f"client {client}: {error}", type(error).__name__)
        if self._lines.get(client) is not line:
            return self._why_not(client)
        if back is None:
            return None
        traffic.received += len(back)
        try:
            frame = line.server.receive(back)
        except WireError as error:
            return Lost("garbage", f"client {client}: {error}", type(error).__name__)
        traffic.messages_received += 1
        traffic.payload_received += len(frame.body)
        return frame

    def _why_not(self, client: int) -> Lost:
        if client in self._lines:
            return Lost("gone", f"client {client} has come back, and is not up to date (see arrivals)")
        return self._endings.get(client) or Lost("gone", f"client {client} is not connected")
