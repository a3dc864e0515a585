"""A client's end: it dials out, answers what it is asked, and dials again when the network or the server goes away.

Everything runs on the thread that calls `dial`, compute included; gRPC's own threads answer pings meanwhile.
"""

from __future__ import annotations

import logging
import queue
import random
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import grpc
import msgspec

from cutlayer.engine.remote import network
from cutlayer.engine.remote.security import ClientSecurity, is_loopback, split_address
from cutlayer.errors import NetworkError, RefusedError, WireError
from cutlayer.wire import messages as m
from cutlayer.wire.conversation import ClientSide
from cutlayer.wire.frames import Frame, split
from cutlayer.wire.limits import Limits
from cutlayer.wire.tensors import Buffer, size_of

log = logging.getLogger(__name__)

STOPPED = "stopped here"
"""What `dial` returns when its `stop` was set."""

_GREETING = 20.0  # seconds for Welcome, besides those that the server waits for an earlier stream of ours to end
_LEAVING = 5.0
_TICK = 0.2
_DAMAGED = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.OUT_OF_RANGE)


class Worker(Protocol):
    """What a client does. All is called on the thread of `dial`, one after another."""

    def hello(self) -> m.Hello:
        """Who it is; asked at each connection."""

    def welcome(self, welcome: m.Welcome) -> m.Refused | None:
        """Check the server's terms in turn."""

    def handle(self, frame: Frame) -> tuple[m.Message, Sequence[Buffer]] | None:
        """Answer a request; None where it has no answer."""


@dataclass(frozen=True)
class Backoff:
    """Seconds before dialling again: `first`, then `factor` times as long, up to `most`; each time up to half of that
    less, at random, so that clients of a server that restarts do not come all at once.
    """

    first: float = 0.5
    factor: float = 2.0
    most: float = 30.0

    def delay(self, failures: int) -> float:
        """After so many failures in a row (1, 2...)."""
        longest = min(self.most, self.first * self.factor ** min(failures - 1, 64))
        return longest * (1 - random.random() / 2)


def dial(
    address: str,
    security: ClientSecurity,
    worker: Worker,
    *,
    limits: Limits | None = None,
    backoff: Backoff | None = None,
    stop: threading.Event | None = None,
    give_up_after: float | None = None,
    keepalive: float = network.KEEPALIVE,
) -> str:
    """Work for the server at `address` until it says Bye; its reason. `STOPPED` where `stop` was set.

    Dials again when the connection breaks; where that fails for `give_up_after` seconds on end, raises NetworkError.
    Raises ConfigError where files are wrong; RefusedError where one side does not take the other; WireError where one
    side says what it must not; and what `worker` raises, after telling the server.
    """
    backoff, stop = backoff or Backoff(), stop or threading.Event()
    dialler = _Dialler(address, security, worker, limits or Limits(), keepalive)
    failures, last_well = 0, time.monotonic()
    with _Watch(stop) as watch:
        while not stop.is_set():
            try:
                return dialler.work(watch)
            except _AwayError as away:
                if stop.is_set():
                    break
                if away.worked:
                    failures, last_well = 0, time.monotonic()
                failures += 1
                delay = backoff.delay(failures)
                if give_up_after is not None and time.monotonic() + delay - last_well > give_up_after:
                    raise NetworkError(
                        f"the server at {address} cannot be reached ({away}): is it running, and can it be reached "
                        "from here?"
                    ) from None
                log.warning("%s: %s; dialling again in %.1f s", address, away, delay)
                stop.wait(delay)
    return STOPPED


class _AwayError(Exception):
    """The connection has ended without a Bye. `worked`: something was done over it."""

    def __init__(self, sentence: str, *, worked: bool) -> None:
        super().__init__(sentence)
        self.worked = worked


class _Watch:
    """Cancels the current call when `stop` is set, or when its time is up: a thread that waits for gRPC cannot look."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._call: Any = None
        self._until: float | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cutlayer-watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    @contextmanager
    def over(self, call: Any) -> Iterator[None]:
        """Watch `call`."""
        self._call = call
        try:
            yield
        finally:
            self._call = self._until = None
            call.cancel()

    def allow(self, seconds: float | None) -> None:
        """So long from now; None: as long as it takes."""
        self._until = None if seconds is None else time.monotonic() + seconds

    def _run(self) -> None:
        while not self._closed.wait(_TICK):
            call, until = self._call, self._until
            if call is not None and (self._stop.is_set() or (until is not None and time.monotonic() > until)):
                call.cancel()


class _Dialler:
    """Dials one server for one worker, again and again."""

    def __init__(
        self, address: str, security: ClientSecurity, worker: Worker, limits: Limits, keepalive: float
    ) -> None:
        self.address, self.security, self.worker, self.limits = address, security, worker, limits
        self._credentials = security.credentials(address)
        local = is_loopback(split_address(address)[0])
        self._options = network.client_options(limits, keepalive, security.server_name, local=local)
        self._patience = _GREETING + network.patience(keepalive)
        self._instance = secrets.token_hex(8)

    def work(self, watch: _Watch) -> str:
        """One connection, from Hello to Bye. Raises _AwayError where it ends otherwise."""
        if self._credentials is None:
            channel = grpc.insecure_channel(self.address, self._options)
        else:
            channel = grpc.secure_channel(self.address, self._credentials, self._options)
        with channel, _Stream(channel, self._hello(), self._instance, self.limits) as stream, watch.over(stream.call):
            try:
                watch.allow(self._patience)
                self._greet(stream)
                watch.allow(None)
                while True:
                    frame = stream.receive()
                    if isinstance(frame.message, m.Bye):
                        watch.allow(_LEAVING)
                        stream.leave()
                        return frame.message.reason
                    self._answer(stream, frame, watch)
            except grpc.RpcError as error:
                raise self._named(error, stream) from None

    def _hello(self) -> m.Hello:
        hello = self.worker.hello()
        token = self.security.token
        return msgspec.structs.replace(hello, token=token) if token else hello

    def _greet(self, stream: _Stream) -> None:
        message = stream.receive().message
        if isinstance(message, m.Refused):
            raise RefusedError(message.reason, message.sentence)
        if not isinstance(message, m.Welcome):  # Bye: it stops just now
            raise _AwayError(getattr(message, "reason", "the server stops"), worked=False)
        log.info("%s: welcome as number %d of %d", self.address, message.index, message.clients)
        if refused := self.worker.welcome(message):
            stream.send(m.Failed(message.step, "Refused", refused.sentence))
            stream.leave()
            raise RefusedError(refused.reason, refused.sentence)

    def _answer(self, stream: _Stream, frame: Frame, watch: _Watch) -> None:
        try:
            answer = self.worker.handle(frame)
            if answer is not None:
                stream.answer(*answer)
        except Exception as error:
            stream.send(m.failed(getattr(frame.message, "step", 0), error))
            watch.allow(_LEAVING)
            stream.leave()
            raise
        stream.worked = True

    def _named(self, error: Any, stream: _Stream) -> Exception:
        """What a failed call means."""
        code, details = error.code(), (error.details() or "").strip()
        if code in _DAMAGED:
            return WireError(f"the server at {self.address} has ended the connection: {details}")
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return RefusedError("protocol", f"{self.address} is not a Cutlayer server: check host and port")
        if not stream.welcome and code is grpc.StatusCode.UNAVAILABLE and (why := self.security.diagnose(self.address)):
            return RefusedError("certificate", why)
        if code is grpc.StatusCode.CANCELLED:
            details = "no answer in time"
        return _AwayError(details or str(code), worked=stream.worked)


class _Stream:
    """One call, and the client's side of the conversation over it."""

    def __init__(self, channel: Any, hello: m.Hello, instance: str, limits: Limits) -> None:
        self.side = ClientSide(limits)
        self.worked = self.welcome = False
        self._came: deque[memoryview] = deque()  # frames that came together
        self._said: list[Buffer] = []  # answers to those of them that are done
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        method = channel.stream_stream(f"/{network.SERVICE}/{network.METHOD}")
        metadata = ((network.HELLO, network.check_hello(self.side.send(hello))), (network.INSTANCE, instance))
        self.call = method(iter(self._outbox.get, None), metadata=metadata)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._outbox.put(None)  # lets gRPC's thread go that waits for what is to be sent

    def receive(self) -> Frame:
        """The next frame. Raises RpcError, or _AwayError at the end; WireError."""
        if not self._came:
            data = next(self.call, None)
            if data is None:
                raise _AwayError("the server has ended the connection", worked=self.worked)
            self._came.extend(split(data))
        frame = self.side.receive(self._came.popleft())
        self.welcome = True
        return frame

    def answer(self, message: Any, body: Sequence[Buffer] = ()) -> None:
        """Say this, together with what else answers requests that came together: a message of its own is dear."""
        parts = self.side.parts(message, body)
        if self._said and size_of(self._said) + size_of(parts) > self.side.limits.message_bytes:
            self._flush()
        self._said += parts if not self._came else [b"".join(parts)]  # tensors change with the next request
        if not self._came:
            self._flush()

    def send(self, message: Any, body: Sequence[Buffer] = ()) -> None:
        """Hand a frame to gRPC's thread, and what waits."""
        self._said += self.side.parts(message, body)
        self._flush()

    def _flush(self) -> None:
        self._outbox.put(b"".join(self._said))
        self._said = []

    def leave(self) -> None:
        """Say no more, and wait until the server ends the call, too: what was said before has arrived then."""
        self._outbox.put(None)
        try:
            for _ in self.call:
                pass
        except grpc.RpcError as error:
            log.debug("at the end: %r", error)
