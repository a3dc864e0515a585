"""Which message is allowed when: both sides of one conversation, without any input or output.

A conversation is one connection of one client. It begins with Hello and Welcome (or Refused); then the server sends
requests and the client answers them in order; several requests may be open at once. Bye and Failed end it.

Each side numbers its frames 0, 1, 2...; the server chooses the conversation's own number, random, which every frame
from Welcome on carries. A frame that was repeated, lost or reordered, or that belongs to another conversation, is
refused, as is every answer other than the expected one. After a WireError on receiving, nothing more can be sent or
received: close the connection. After one on sending, Failed or Bye can still be sent.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Sequence
from typing import Any, get_args

from cutlayer.errors import WireError
from cutlayer.wire import messages as m
from cutlayer.wire.frames import Frame, parts, unpack
from cutlayer.wire.limits import Limits
from cutlayer.wire.tensors import Buffer, size_of

ANSWERS: dict[type[m.Message], type[Any]] = {
    m.Forward: m.SmashedUp,
    m.Tail: m.TailUp,
    m.Settle: m.Settled,
    m.Fit: m.Fitted,
    m.Learn: m.Fitted,
    m.GiveGradient: m.GradientUp,
    m.GiveModel: m.ModelUp,
    m.GiveOptimizer: m.OptimizerUp,
    m.Evaluate: m.EvaluationRows,
    m.OwnForward: m.EvaluationRows,
    m.GiveScores: m.ScoresUp,
    m.Save: m.Saved,
}
"""The possible answers to each request. Other messages of the server have no answer."""


_REQUESTS = frozenset(get_args(m.FromServer)) - {m.Welcome, m.Refused, m.Bye}
"""The messages that the server may send while a conversation is open, except those that end it."""


class _Side:
    """The state of both sides: numbers of frames, the requests that wait for their answers, and the phase of the
    conversation.

    `state` is "new" (before Hello), "greeted" (before Welcome), "open", or "closed". `encrypted`: the connection is
    encrypted, so frames need no checksum.
    """

    _direction: m.Direction  # of received frames
    _they: str

    def __init__(self, limits: Limits | None = None, *, encrypted: bool = False) -> None:
        self.limits, self._encrypted = limits or Limits(), encrypted
        self.state = "new"
        self.conversation = 0
        self.asked: deque[Any] = deque()
        self._sent = self._received = 0
        self._step = 0  # of the last request
        self._batch: tuple[int, int] | None = None  # (step, rows) of the last forward pass, until its backward pass

    def receive(self, data: Buffer) -> Frame:
        """The frame in `data`, if it is allowed now. Otherwise raises WireError and closes this side."""
        try:
            if self.state == "closed":
                raise WireError(f"a message came from {self._they} after the end of the conversation")
            frame = unpack(data, self._direction, self.limits)
            if frame.number != self._received:
                raise WireError(
                    f"message {frame.number} came from {self._they} where number {self._received} was due: it was "
                    "repeated, lost or overtaken on its way"
                )
            if frame.conversation != self.conversation or not self.conversation:
                self._check_conversation(frame)
            self._accept(frame.message)
        except WireError:
            self.state = "closed"
            raise
        self._received += 1
        return frame

    def send(self, message: Any, body: Sequence[Buffer] = ()) -> bytes:
        """The frame of `message`, to be sent next. Raises WireError if the message is not allowed now."""
        return b"".join(self.parts(message, body))

    def parts(self, message: Any, body: Sequence[Buffer] = ()) -> list[Buffer]:
        """The frame that `send` returns, as consecutive buffers. Raises WireError."""
        if self.state == "closed":
            raise WireError(f"{_name(message)} cannot be sent after the end of the conversation")
        self._say(message)
        data = parts(message, body, self._sent, self.conversation, checksum=not self._encrypted)
        size = size_of(data)
        if size > self.limits.message_bytes:
            raise WireError(
                f"{_name(message)} would have {size} bytes: {self.limits.message_bytes} are accepted; raise the "
                "limit, or send smaller batches"
            )
        self._sent += 1
        return data

    def _check_conversation(self, frame: Frame) -> None:
        if frame.conversation != self.conversation:
            raise WireError(f"a message came from {self._they} that belongs to another conversation")

    def _accept(self, message: Any) -> None:
        raise NotImplementedError

    def _say(self, message: Any) -> None:
        raise NotImplementedError

    def _ask(self, request: Any) -> None:
        """Note a request of the server, if it is allowed now."""
        step = getattr(request, "step", self._step)
        if step < self._step:
            raise WireError(f"{_name(request)} of step {step} follows step {self._step}: steps only go on")
        kind = type(request)
        if kind is m.Backward or kind is m.Tail:
            self._check_batch(request)
        if kind in ANSWERS:
            if len(self.asked) >= self.limits.asked:
                raise WireError(f"{len(self.asked)} requests wait for their answers: no more may be asked at once")
            self.asked.append(request)
        self._step = step

    def _check_batch(self, request: m.Tail | m.Backward) -> None:
        """The rows must be those of the last forward pass, which was answered and has not had its backward pass yet."""
        if self._batch is None or self._batch[0] != request.step:
            raise WireError(f"{_name(request)} of step {request.step} has no forward pass that it belongs to")
        rows = self._batch[1]
        fits = request.rows == rows or (
            isinstance(request, m.Backward) and request.mode == "common" and (request.rows == 1 or request.rows > rows)
        )
        if not fits:
            raise WireError(f"{_name(request)} of step {request.step} has {request.rows} rows, its batch {rows}")
        if isinstance(request, m.Backward):
            self._batch = None

    def _answer(self, answer: Any) -> None:
        """Remove the oldest open request, if this is its answer."""
        kind = type(answer)
        if kind is m.Failed:
            self.state = "closed"
            return
        request = self.asked[0] if self.asked else None
        if request is None:
            raise WireError(f"{_name(answer)} was not asked for")
        if kind is not ANSWERS[type(request)] or answer.step != request.step:
            raise WireError(
                f"{_name(answer)} of step {answer.step} came in answer to {_name(request)} of step {request.step}"
            )
        if kind is m.SmashedUp:
            if not 0 < answer.rows <= self.limits.rows:
                raise WireError(f"Smashed of {answer.rows} rows: 1 to {self.limits.rows} are accepted here")
            self._batch = (answer.step, answer.rows)
        else:
            self._check_fits(answer, request)
        self.asked.popleft()

    def _check_fits(self, answer: Any, request: Any) -> None:
        """Values that an answer repeats from its request must be equal."""
        asked_rows = getattr(request, "rows", 0)
        if asked_rows and hasattr(answer, "rows") and answer.rows != asked_rows:
            raise WireError(f"{_name(answer)} has {answer.rows} rows, {_name(request)} had {asked_rows}")
        if isinstance(request, m.Save) and answer.phase != request.phase:
            raise WireError(f"Saved of phase {answer.phase} came in answer to Save of phase {request.phase}")

    def _wrong_time(self, message: Any) -> WireError:
        waits = {"new": "before Hello", "greeted": "before Welcome", "open": "after Welcome"}[self.state]
        return WireError(f"{_name(message)} is not expected {waits}")


class ServerSide(_Side):
    """The server's side of a conversation with one client: receives Hello and answers, sends Welcome and requests."""

    _direction: m.Direction = "to server"
    _they = "the client"

    def _accept(self, message: Any) -> None:
        if self.state == "open" and not isinstance(message, m.Hello):
            self._answer(message)
        elif self.state == "new":
            if not isinstance(message, m.Hello):
                raise self._wrong_time(message)
            self.state = "greeted"
        elif isinstance(message, m.Hello) or (self.state == "greeted" and not isinstance(message, m.Failed)):
            raise self._wrong_time(message)
        else:
            self._answer(message)

    def _say(self, message: Any) -> None:
        if self.state == "open" and type(message) in _REQUESTS:
            self._ask(message)
        elif isinstance(message, m.Bye) and self.state != "new":
            self.state = "closed"
        elif isinstance(message, (m.Welcome, m.Refused)):
            if self.state != "greeted":
                raise self._wrong_time(message)
            if isinstance(message, m.Refused):
                self.state = "closed"
            else:
                self.state, self._step = "open", message.step
                self.conversation = secrets.randbits(63) + 1
        else:
            raise self._wrong_time(message)


class ClientSide(_Side):
    """The client's side: sends Hello and answers, receives Welcome and requests."""

    _direction: m.Direction = "to client"
    _they = "the server"

    def _check_conversation(self, frame: Frame) -> None:
        if self.state == "greeted" and isinstance(frame.message, m.Welcome):
            if not frame.conversation:
                raise WireError("Welcome does not number the conversation: the server is at fault")
            self.conversation = frame.conversation
        super()._check_conversation(frame)

    def _accept(self, message: Any) -> None:
        if self.state == "open" and type(message) in _REQUESTS:
            self._ask(message)
        elif self.state == "greeted":
            if isinstance(message, m.Welcome):
                self.state, self._step = "open", message.step
            elif isinstance(message, (m.Refused, m.Bye)):
                self.state = "closed"
            else:
                raise self._wrong_time(message)
        elif self.state == "open" and isinstance(message, m.Bye):
            self.state = "closed"
        else:
            raise self._wrong_time(message)

    def _say(self, message: Any) -> None:
        if isinstance(message, m.Hello):
            if self.state != "new":
                raise self._wrong_time(message)
            self.state = "greeted"
        else:
            if type(message) not in _SAID[self.state]:
                raise self._wrong_time(message)
            self._answer(message)


_SAID: dict[str, tuple[type[m.Message], ...]] = {
    "new": (),
    "greeted": (m.Failed,),
    "open": get_args(m.FromClient),
    "closed": (),
}
"""The messages that a client may send, by the state of its side, except Hello."""


def _name(message: m.Message) -> str:
    return message.called()
