"""A client's end: it connects, answers requests, and reconnects when the network or the server fails.

Everything runs on the thread that calls `dial`, compute included; gRPC's own threads answer pings meanwhile. Several
clients of one process share a thread (`dial_all`) and are served in turn. A waiting client costs nothing, so a thousand
can wait. For more than one at a time, start several processes.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import msgspec

from cutlayer.errors import NetworkError, RefusedError, WireError
from cutlayer.remote import network
from cutlayer.remote.carrier import Responder, StoppedError
from cutlayer.remote.security import ClientSecurity, is_loopback, split_address
from cutlayer.remote.transports import host_and_port
from cutlayer.text import plain
from cutlayer.wire import messages as m
from cutlayer.wire.conversation import ClientSide
from cutlayer.wire.frames import Frame, split
from cutlayer.wire.limits import Limits
from cutlayer.wire.tensors import Buffer, size_of

log = logging.getLogger(__name__)

STOPPED = "stopped here"
"""What `dial` returns when its `stop` was set."""

_GREETING = 20.0  # seconds for Welcome, in addition to the server's wait for the end of our earlier stream
_LEAVING = 5.0
_TICK = 0.2
_DAMAGED = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE)
_TOO_LARGE = "message larger than max"  # what RESOURCE_EXHAUSTED says then; else it is said of a crowded server


@dataclass(frozen=True)
class Backoff:
    """Seconds before dialling again: `first`, then `factor` times as long, up to `most`. Each time, up to half of it is
    taken away at random, so that the clients of a restarted server do not all connect at once.
    """

    first: float = 0.5
    factor: float = 2.0
    most: float = 30.0

    def delay(self, failures: int) -> float:
        """The pause after this number of failures in a row (1, 2...)."""
        longest = min(self.most, self.first * self.factor ** min(failures - 1, 64))
        return longest * (1 - random.random() / 2)


def dial(
    address: str,
    security: ClientSecurity,
    worker: Responder,
    *,
    limits: Limits | None = None,
    backoff: Backoff | None = None,
    stop: threading.Event | None = None,
    give_up_after: float | None = None,
    keepalive: float = network.KEEPALIVE,
) -> str:
    """Work for the server at `address` until it sends Bye, and return its reason (`STOPPED` if `stop` was set).

    Reconnects when the connection breaks; if this fails for `give_up_after` seconds, raises NetworkError. Raises
    ConfigError if files are wrong, RefusedError if one side refuses the other, WireError if one side sends a message
    that is not allowed, and any error of `worker`, after telling the server.
    """
    dialler = Dialler(address, security, worker, limits, backoff, give_up_after, keepalive)
    return dial_all([dialler], stop)[0]


def dial_all(diallers: Sequence[Dialler], stop: threading.Event | None = None) -> list[str]:
    """Work as several clients on this one thread, as `dial` does, and return their reasons. The first error ends them
    all.
    """
    return asyncio.run(_dial_all(diallers, stop or threading.Event()))


async def _dial_all(diallers: Sequence[Dialler], stop: threading.Event) -> list[str]:
    asyncio.get_running_loop().set_exception_handler(network.on_loop_error)
    tasks = [asyncio.create_task(dialler.run()) for dialler in diallers]
    pending: set[asyncio.Task[str]] = set(tasks)
    while pending:
        done, pending = await asyncio.wait(pending, timeout=_TICK, return_when=asyncio.FIRST_EXCEPTION)
        if stop.is_set() or any(task.exception() for task in done):
            for dialler in diallers:
                dialler.stop()
    errors = [error for task in tasks if (error := task.exception())]
    if errors:
        raise errors[0]
    return [task.result() for task in tasks]


class _AwayError(Exception):
    """The connection has ended without a Bye. `worked`: something was done over it."""

    def __init__(self, sentence: str, *, worked: bool) -> None:
        super().__init__(sentence)
        self.worked = worked


class Dialler:
    """Connects one worker to one server, repeatedly; the options are those of `dial`."""

    def __init__(
        self,
        address: str,
        security: ClientSecurity,
        worker: Responder,
        limits: Limits | None = None,
        backoff: Backoff | None = None,
        give_up_after: float | None = None,
        keepalive: float = network.KEEPALIVE,
    ) -> None:
        self.address = host_and_port(address, encrypted=not security.insecure)
        self.security, self.worker, self.limits = security, worker, limits or Limits()
        self._backoff, self._give_up_after = backoff or Backoff(), give_up_after
        self._credentials = security.credentials(self.address)
        local = is_loopback(split_address(self.address)[0])
        self._options = network.client_options(self.limits, keepalive, security.server_name, local=local)
        self._patience = _GREETING + network.patience(keepalive)
        self._instance = secrets.token_hex(8)
        self._stopped = asyncio.Event()
        self._call: Any = None

    def stop(self) -> None:
        """End soon; on the loop's thread."""
        self._stopped.set()
        if self._call is not None:
            self._call.cancel()

    async def run(self) -> str:
        """Work, and reconnect, until Bye; its reason, or STOPPED."""
        failures, last_well = 0, time.monotonic()
        while not self._stopped.is_set():
            try:
                return await self._work()
            except StoppedError:
                break
            except _AwayError as away:
                if self._stopped.is_set():
                    break
                if away.worked:
                    failures, last_well = 0, time.monotonic()
                failures += 1
                delay = self._backoff.delay(failures)
                if self._give_up_after is not None and time.monotonic() + delay - last_well > self._give_up_after:
                    raise NetworkError(
                        f"the server at {self.address} cannot be reached ({away}): is it running, and can it be "
                        "reached from here?"
                    ) from None
                log.warning("%s: %s; dialling again in %.1f s", self.address, away, delay)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stopped.wait(), delay)
        return STOPPED

    async def _work(self) -> str:
        """One connection, from Hello to Bye. Raises _AwayError if it ends in another way."""
        if self._credentials is None:
            channel = grpc.aio.insecure_channel(self.address, self._options)
        else:
            channel = grpc.aio.secure_channel(self.address, self._credentials, self._options)
        async with channel:
            side = ClientSide(self.limits, encrypted=self._credentials is not None)
            stream = _Stream(channel, side, self._hello(), self._instance)
            self._call = stream.call
            try:
                with stream.within(self._patience):
                    await self._greet(stream)
                while True:
                    frame = await stream.receive()
                    if isinstance(frame.message, m.Bye):
                        await stream.leave()
                        return plain(frame.message.reason)
                    await self._answer(stream, frame)
            except grpc.RpcError as error:
                raise self._named(error, stream) from None
            except asyncio.CancelledError:
                if not stream.call.cancelled():
                    raise
                raise _AwayError("no answer in time", worked=stream.worked) from None
            finally:
                self._call = None

    def _hello(self) -> m.Hello:
        hello = self.worker.hello()
        token = self.security.token
        return msgspec.structs.replace(hello, token=token) if token else hello

    async def _greet(self, stream: _Stream) -> None:
        message = (await stream.receive()).message
        if isinstance(message, m.Refused):
            raise RefusedError(message.reason, plain(message.sentence))
        if not isinstance(message, m.Welcome):  # Bye: it stops just now
            raise _AwayError(plain(getattr(message, "reason", "the server stops")), worked=False)
        log.info("%s: accepted as client %d of %d", self.address, message.index, message.clients)
        if refused := self.worker.welcome(message):
            await stream.send(m.Failed(message.step, "Refused", refused.sentence))
            await stream.leave()
            raise RefusedError(refused.reason, plain(refused.sentence))

    async def _answer(self, stream: _Stream, frame: Frame) -> None:
        try:
            answer = self.worker.handle(frame)
            parts = None if answer is None else stream.side.parts(*answer)
        except StoppedError:
            raise
        except Exception as error:
            await stream.send(m.failed(getattr(frame.message, "step", 0), error))
            await stream.leave()
            raise
        if parts is not None or not stream.more:
            await stream.say(parts)
        stream.worked = True

    def _named(self, error: Any, stream: _Stream) -> Exception:
        """What a failed call means."""
        code, details = error.code(), plain((error.details() or "").strip())
        if code in _DAMAGED or (code is grpc.StatusCode.RESOURCE_EXHAUSTED and _TOO_LARGE in details):
            return WireError(f"the server at {self.address} has ended the connection: {details}")
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return RefusedError("protocol", f"{self.address} is not a Cutlayer server: check host and port")
        if not stream.welcome and code is grpc.StatusCode.UNAVAILABLE and (why := self.security.diagnose(self.address)):
            return RefusedError("certificate", why)
        return _AwayError(details or str(code), worked=stream.worked)


class _Stream:
    """One call, and the client's side of the conversation over it."""

    def __init__(self, channel: Any, side: ClientSide, hello: m.Hello, instance: str) -> None:
        self.side = side
        self.worked = self.welcome = False
        self._came: deque[memoryview] = deque()  # frames that arrived together
        self._said: list[Buffer] = []  # answers to those requests among them that are done
        method = channel.stream_stream(f"/{network.SERVICE}/{network.METHOD}")
        metadata = ((network.HELLO, network.check_hello(self.side.send(hello))), (network.INSTANCE, instance))
        self.call = method(metadata=metadata)

    @property
    def more(self) -> bool:
        """Whether frames that arrived together with the last one are still to be processed."""
        return bool(self._came)

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Cancel the call unless this is over by then."""
        timer = asyncio.get_running_loop().call_later(seconds, self.call.cancel)
        try:
            yield
        finally:
            timer.cancel()

    async def receive(self) -> Frame:
        """The next frame. Raises RpcError, or _AwayError at the end; WireError."""
        if not self._came:
            data = await self.call.read()
            if data is grpc.aio.EOF:
                raise _AwayError("the server has ended the connection", worked=self.worked)
            self._came.extend(split(data))
        frame = self.side.receive(self._came.popleft())
        self.welcome = True
        return frame

    async def say(self, parts: Sequence[Buffer] | None) -> None:
        """Send an answer. Answers to requests that arrived together are sent together, since each message has a
        cost.
        """
        if parts is not None:
            if self._said and size_of(self._said) + size_of(parts) > self.side.limits.message_bytes:
                await self._flush()
            self._said += [b"".join(parts)] if self._came else parts  # tensors change with the next request
        if self._said and not self._came:
            await self._flush()

    async def send(self, message: Any) -> None:
        """Send a message now, after those that wait."""
        self._said += self.side.parts(message)
        await self._flush()

    async def leave(self) -> None:
        """Send no more, and wait until the server ends the call, too. Then all earlier messages have arrived."""
        try:
            with self.within(_LEAVING):
                await self.call.done_writing()
                while await self.call.read() is not grpc.aio.EOF:
                    pass
        except grpc.RpcError as error:
            log.debug("at the end: %r", error)
        except asyncio.CancelledError:
            if not self.call.cancelled():
                raise

    async def _flush(self) -> None:
        data, self._said = b"".join(self._said), []
        with suppress(asyncio.InvalidStateError):  # the call has ended: reading gives the reason
            await self.call.write(data)
