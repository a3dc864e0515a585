"""The server's end of all connections: whoever trains asks, here, several clients at once, and waits for their answers.

Training is synchronous, in its own thread; gRPC runs on an asyncio loop in another. All state of connections belongs to
the loop's thread; the two meet in `Exchange`.

What keeps a client from holding up the others, or the server:
- every client has a stream and a queue of its own; what a client does not read stays in that queue, which is bounded:
  beyond `limits.message_bytes`, or with `limits.asked` answers owing, its stream is closed;
- messages are packed when they are written, and not many at once (`_Budget`);
- one that vanishes without a word is found out by pings.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar, overload

import grpc
import grpc.aio
import msgspec
from grpc_health.v1 import health_pb2

from cutlayer.errors import ConfigError, NetworkError, WireError
from cutlayer.remote import network
from cutlayer.remote.exchange import Body, Exchange, Lost, Out, Reason, Request
from cutlayer.remote.security import Gate, ServerSecurity, StrangerError, split_address
from cutlayer.wire import messages as m
from cutlayer.wire.conversation import ANSWERS, ServerSide
from cutlayer.wire.frames import Frame, split
from cutlayer.wire.limits import Limits
from cutlayer.wire.tensors import Buffer, size_of

log = logging.getLogger(__name__)
Greet = Callable[[m.Hello, str | None], m.Welcome | m.Refused]
T = TypeVar("T")

_WAITING = 64  # who may wait, at once, for an earlier stream of theirs to end
_STREAMS = 4096
_STUCK = 0.5  # seconds after which a message that is being written counts as stuck
_GREETING = 20.0  # seconds that a client has to take what it is answered
_TEXT = 1000  # characters of a sentence that ends a stream: it travels in a header


@dataclass
class Traffic:
    """What has crossed the network between the server and one client, over all its connections.

    `sent` and `received`: bytes of whole messages; `payload_sent` and `payload_received`: of the tensors in them.
    `latency`: seconds from the last request that was answered to its answer. What TLS and HTTP/2 add is not in here.
    """

    sent: int = 0
    received: int = 0
    payload_sent: int = 0
    payload_received: int = 0
    messages_sent: int = 0
    messages_received: int = 0
    latency: float | None = None
    connections: int = 0

    @property
    def reconnects(self) -> int:
        """How often the client has come back."""
        return max(0, self.connections - 1)


class Hub:
    """Serves `address` (host:port; port 0: any). `greet(hello, identity)` decides about each client that comes:
    quickly, for it is called on the loop's thread; `identity` is the name that its certificate or token proves, and
    equals `hello.client`; None without security.

    `keepalive` seconds pass between pings. `metrics` is an address to serve figures for Prometheus at, host:port or a
    port of this machine alone.
    """

    def __init__(
        self,
        address: str,
        security: ServerSecurity,
        greet: Greet,
        limits: Limits | None = None,
        metrics: str | int | None = None,
        *,
        keepalive: float = network.KEEPALIVE,
    ) -> None:
        self.address, self.limits, self.keepalive = address, limits or Limits(), keepalive
        self.lost: dict[Reason, int] = {"late": 0, "gone": 0, "failed": 0, "garbage": 0}
        self._security, self._greet, self._metrics = security, greet, metrics
        self._links: dict[int, _Link] = {}
        self._names: dict[str, _Link | None] = {}  # None: is being greeted
        self._endings: dict[int, Lost] = {}
        self._traffic: dict[int, Traffic] = {}
        self._changed = threading.Condition()
        self._exchanges: set[Exchange] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting = 0
        self._budget = _Budget(max(self.limits.message_bytes, 1 << 20))
        self._gate: Gate
        self._loop: asyncio.AbstractEventLoop
        self._stopping: asyncio.Future[tuple[str, float, bool]]
        self._thread: threading.Thread | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._exporter: Any = None
        self._running = False

    def start(self) -> int:
        """Begin to listen; the port. Raises ConfigError where files are wrong or the address cannot be had."""
        if self._thread is not None:
            raise NetworkError("a hub starts once: make a new one")
        self._gate = self._security.open(self.address)
        started: Future[int] = Future()
        self._pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "cutlayer-decode")
        self._thread = threading.Thread(target=self._run, args=(started,), name="cutlayer-hub", daemon=True)
        self._thread.start()
        try:
            port = started.result()
            if self._metrics is not None:
                from cutlayer.remote.metrics import Exporter

                self._exporter = Exporter(self, self._metrics)
        except BaseException:
            self.stop("the server could not start", 0)
            raise
        return port

    def stop(self, reason: str, grace: float, *, returning: bool = False) -> None:
        """Say Bye to all clients, or, where the server is `returning`, just hang up: they dial again. Give them `grace`
        seconds to go, close everything. Doing it again does nothing.
        """
        if self._thread is None:
            return
        if self._running:
            self.call(self._request_stop, reason, grace, returning)
        self._thread.join(grace + 10)
        if self._pool is not None:
            self._pool.shutdown()
        if self._exporter is not None:
            self._exporter.close()
            self._exporter = None
        with self._changed:
            self._changed.notify_all()

    def __enter__(self) -> Hub:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop("the server has stopped", 2)

    @property
    def running(self) -> bool:
        """Does it listen?"""
        return self._running

    @property
    def metrics_port(self) -> int | None:
        """Where figures are served."""
        return self._exporter.port if self._exporter is not None else None

    @property
    def connected(self) -> frozenset[int]:
        """Clients that can be asked something now. One that has come back is among them after `arrivals`."""
        with self._changed:
            return frozenset(k for k, link in self._links.items() if link.open and link.admitted)

    @property
    def present(self) -> frozenset[int]:
        """Clients with an open stream."""
        with self._changed:
            return frozenset(k for k, link in self._links.items() if link.open)

    def arrivals(self) -> dict[int, m.Hello]:
        """Who has come since this was asked last, with what they said.

        A client that comes back has not got everything that it was sent before, so nothing more is sent to it until
        this has named it: whoever trains then knows, and brings it up to date first.
        """
        with self._changed:
            new = {k: link for k, link in self._links.items() if link.open and not link.reported}
            for link in new.values():
                link.admitted = link.reported = True
            return {k: link.hello for k, link in new.items()}

    def wait_for(self, clients: int | Collection[int], timeout: float | None = None) -> frozenset[int]:
        """Wait until so many clients, or these, are present; those that are, also where the time is up."""

        def enough() -> bool:
            here = self.present
            there = len(here) >= clients if isinstance(clients, int) else here.issuperset(clients)
            return there or not self._running

        with self._changed:
            self._changed.wait_for(enough, timeout)
        return self.present

    def traffic(self) -> dict[int, Traffic]:
        """Bytes and messages of every client that has ever come."""
        return {k: replace(t) for k, t in list(self._traffic.items())}

    @overload
    def exchange(
        self,
        requests: Mapping[int, Sequence[Request]],
        *,
        deadline: float | None = ...,
        quorum: int | None = ...,
        voters: Collection[int] | None = ...,
    ) -> dict[int, list[Frame] | Lost]: ...

    @overload
    def exchange(
        self,
        requests: Mapping[int, Sequence[Request]],
        *,
        deadline: float | None = ...,
        quorum: int | None = ...,
        voters: Collection[int] | None = ...,
        on_answer: Callable[[int, Frame], T],
    ) -> dict[int, list[T] | Lost]: ...

    def exchange(
        self,
        requests: Mapping[int, Sequence[Request]],
        *,
        deadline: float | None = None,
        quorum: int | None = None,
        voters: Collection[int] | None = None,
        on_answer: Callable[[int, Frame], Any] | None = None,
    ) -> dict[int, Any]:
        """Send each client its requests, in order, all clients at once; each one's answers, in order, or why not.

        It is over when every client has answered (or has been sent all, where nothing is answered) or is lost, or when
        `deadline` seconds have passed and `quorum` clients (of `voters`, if told) have answered. A later answer is
        thrown away. With `on_answer`, what that makes of each answer is returned in its place; it is called on other
        threads while further answers come, and where it raises WireError, the client has said "garbage", and its stream
        is closed.

        Bodies that are one object for several clients are joined once. Buffers may change when this is back.
        Raises WireError for what may not be said now or is too large, and what `on_answer` raises otherwise.
        """
        begin = time.perf_counter()
        for client, asked in requests.items():
            self._check(client, asked)
        counts = {k: sum(type(message) in ANSWERS for message, _ in asked) for k, asked in requests.items()}
        exchange = Exchange(counts, quorum, on_answer, self._pool, self, voters=voters)
        with self._changed:
            if not self._running:
                raise NetworkError("the server is not running: nobody can be asked")
            self._exchanges.add(exchange)
        try:
            self.call(self._begin, exchange, requests, deadline)
            results = exchange.wait()
        except BaseException as error:
            self.call(exchange.fail, error)
            raise
        finally:
            self._exchanges.discard(exchange)
        for result in results.values():
            if isinstance(result, Lost):
                self.lost[result.reason] += 1
        if self._exporter is not None:
            self._exporter.observe(time.perf_counter() - begin)
        return results

    # From here on: the loop's thread.

    def _run(self, started: Future[int]) -> None:
        try:
            asyncio.run(self._serve(started))
        except BaseException as error:
            if not started.done():
                started.set_exception(error)
            else:
                log.exception("the hub has failed")
        finally:
            with self._changed:
                self._running = False
                self._changed.notify_all()
            for exchange in list(self._exchanges):
                exchange.fail(NetworkError("the server has stopped: nobody can be asked any more"))

    async def _serve(self, started: Future[int]) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(network.on_loop_error)
        self._stopping = self._loop.create_future()
        server = grpc.aio.server(
            options=network.server_options(self.limits, self.keepalive), maximum_concurrent_rpcs=_STREAMS
        )
        talk = grpc.stream_stream_rpc_method_handler(self._talk)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(network.SERVICE, {network.METHOD: talk}), _health(self))
        )
        try:
            if self._gate.credentials is None:
                port = server.add_insecure_port(self.address)
            else:
                port = server.add_secure_port(self.address, self._gate.credentials)
            await server.start()
        except RuntimeError:
            await server.stop(0)
            _, wanted = split_address(self.address)
            raise ConfigError(
                f"cannot listen at {self.address}: give an address of this machine, and a port other than {wanted} if "
                "another program has that"
            ) from None
        self._running = True
        log.info("listening at %s, port %d", self.address, port)
        started.set_result(port)
        reason, grace, returning = await self._stopping
        end = self._loop.time() + grace
        self._running = False
        links = list(self._links.values())
        if returning:
            for link in links:
                self._cut(link, Lost("gone", reason), grpc.StatusCode.UNAVAILABLE)
            ways = list(self._tasks)
        else:
            ways = [asyncio.create_task(self._say_bye(link, reason)) for link in links]
        if ways:
            await asyncio.wait(ways, timeout=max(0.0, grace * 0.8))
        await server.stop(max(0.0, end - self._loop.time()))
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)

    def _request_stop(self, reason: str, grace: float, returning: bool) -> None:
        if not self._stopping.done():
            self._stopping.set_result((reason[:4096], grace, returning))

    async def _say_bye(self, link: _Link, reason: str) -> None:
        while link.outbox or link.sending:
            await asyncio.sleep(0.02)
        if link.side.state == "open":
            try:
                await link.context.write(link.side.send(m.Bye(reason)))
            except (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError) as error:
                log.debug("client %d: %r", link.index, error)
        await link.ended.wait()

    def call(self, function: Callable[..., object], *args: object) -> None:
        """Run `function` on the loop, soon."""
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop has ended, and so has all that it could be of interest to
            log.debug("%s came after the end", function)

    def _check(self, client: int, asked: Sequence[Request]) -> None:
        """Raises WireError before anything is sent to anybody."""
        if len(asked) > self.limits.asked:
            raise WireError(f"{len(asked)} requests to client {client} at once: {self.limits.asked} are taken")
        for message, body in asked:
            size = size_of(body)
            if size > self.limits.message_bytes:
                raise WireError(
                    f"{type(message).__name__} to client {client} would have {size} bytes: {self.limits.message_bytes} "
                    "are taken; raise the limit (--message-limit), or send smaller batches"
                )

    def _begin(self, exchange: Exchange, requests: Mapping[int, Sequence[Request]], deadline: float | None) -> None:
        bodies: dict[int, Body] = {}
        for client, asked in requests.items():
            link = self._links.get(client)
            if link is None or not link.open or not link.admitted:
                exchange.lose(client, self._why_not(client, link))
                continue
            outs, slot = [], 0
            for message, buffers in asked:
                body = bodies.get(id(buffers))
                if body is None:
                    body = bodies[id(buffers)] = Body(buffers)
                body.users += 1
                answered = type(message) in ANSWERS
                outs.append(Out(message, body, exchange, slot if answered else None))
                slot += answered
            if not self._is_stuck(link, outs, slot):
                exchange.sending(client, len(outs))
                link.outbox.extend(outs)
                self._send_soon(link)
        if deadline is not None and not exchange.over:
            exchange.timer = self._loop.call_later(deadline, exchange.expire)

    def _is_stuck(self, link: _Link, outs: list[Out], answers: int) -> bool:
        """Close the stream of a client that has not taken what it was sent before."""
        unsent = sum(out.body.size for out in link.outbox)
        owing = len(link.side.asked) + sum(out.slot is not None for out in link.outbox) + answers
        if link.outbox and unsent + sum(out.body.size for out in outs) > self.limits.message_bytes:
            sentence = f"client {link.index} does not take what it is sent: {unsent} bytes wait"
        elif owing > self.limits.asked:
            sentence = f"client {link.index} owes {owing - answers} answers"
        else:
            return False
        lost = Lost("gone", f"{sentence}; its connection was closed")
        for out in outs:
            out.exchange.lose(link.index, lost)
        self._cut(link, lost, grpc.StatusCode.UNAVAILABLE)
        return True

    def keep_bodies(self, exchange: Exchange) -> None:
        """Copy what `exchange` has not written yet."""
        for link in self._links.values():
            for out in link.outbox:
                if out.exchange is exchange:
                    out.body.keep()

    def _why_not(self, client: int, link: _Link | None) -> Lost:
        if link is not None and link.open:
            return Lost("gone", f"client {client} has come back, and is not up to date (see Hub.arrivals)")
        return self._endings.get(client) or Lost("gone", f"client {client} is not connected")

    def _send_soon(self, link: _Link) -> None:
        if link.sending is None and link.open:
            link.sending = self._loop.create_task(self._send(link))

    async def _send(self, link: _Link) -> None:
        """Write what is in the outbox, in order."""
        try:
            while link.outbox:
                count, size = self._how_many(link)  # they stay there, to be found, until they are packed
                share = await self._budget.take(size)
                try:
                    if link.ended.is_set():
                        return
                    link.writing = [link.outbox.popleft() for _ in range(count)]
                    for data in list(self._packed(link)):  # before anything waits: buffers may change then
                        await link.context.write(data)
                        link.traffic.sent += len(data)
                finally:
                    self._budget.give_back(share)
                sent, link.writing = link.writing, []
                for out in sent:
                    out.exchange.sent(link.index)
        except (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError) as error:
            log.debug("client %d: %r", link.index, error)  # the reader ends, too, and says why
        finally:
            link.sending = None

    def _how_many(self, link: _Link) -> tuple[int, int]:
        """How many of the messages that wait can be packed together, and the bytes behind them."""
        count = size = 0
        for out in link.outbox:
            if count and size + out.body.size > self.limits.message_bytes:
                break
            count, size = count + 1, size + out.body.size
        return count, size

    def _packed(self, link: _Link) -> Iterator[bytes]:
        """The messages that are to be written, as few runs of bytes, each within the limit."""
        run: list[Buffer] = []
        for out in link.writing:
            try:
                parts = link.side.parts(out.message, out.body.buffers)
            except WireError as error:  # nothing was sent; whoever asked must know better
                out.exchange.fail(error)
                continue
            if out.slot is not None:
                link.due.append((out.exchange, out.slot, self._loop.time()))
            link.traffic.messages_sent += 1
            link.traffic.payload_sent += out.body.size
            if run and size_of(run) + size_of(parts) > self.limits.message_bytes:
                yield b"".join(run)
                run = []
            run += parts
        if run:
            yield b"".join(run)

    async def _talk(self, _: object, context: Any) -> None:
        """One stream, from its opening to its end."""
        link = await self._handshake(context)
        if link is None:
            return
        lost = Lost("gone", f"client {link.index} is gone: its connection has ended")
        try:
            lost = await self._listen(link)
        except WireError as error:
            lost = Lost("garbage", f"client {link.index}: {error}", type(error).__name__)
        finally:
            self._unlink(link, lost)
        if lost.reason == "garbage":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(lost.sentence)[:_TEXT])

    async def _listen(self, link: _Link) -> Lost:
        """Take what the client says, until the end; what that was. Raises WireError."""
        while True:
            data = await link.context.read()
            if data is grpc.aio.EOF:
                return Lost("gone", f"client {link.index} is gone: its connection has ended")
            link.traffic.received += len(data)
            for part in split(data):
                if not link.open or link.side.state == "closed":
                    break  # it has been cut, or Bye has been said, and that crossed an answer
                frame = link.side.receive(part)
                if isinstance(frame.message, m.Failed):
                    log.warning("client %d has failed: %s: %s", link.index, frame.message.kind, frame.message.sentence)
                    return Lost("failed", f"client {link.index}: {frame.message.sentence}", frame.message.kind)
                self._take(link, frame)

    def _take(self, link: _Link, frame: Frame) -> None:
        """An answer has come."""
        traffic = link.traffic
        traffic.payload_received += len(frame.body)
        traffic.messages_received += 1
        exchange, slot, since = link.due.popleft()
        traffic.latency = self._loop.time() - since
        if exchange.over:
            log.info("client %d: an answer came too late", link.index)
        else:
            exchange.answered(link.index, slot, frame)

    async def _handshake(self, context: Any) -> _Link | None:
        """Let a client in, or not. Nothing that it sends is read before."""
        metadata = dict(context.invocation_metadata() or ())
        side = ServerSide(self.limits, encrypted=self._gate.credentials is not None)
        try:
            hello = side.receive(network.check_hello(metadata.get(network.HELLO, b""))).message
        except WireError as error:
            log.warning("%s was turned away: %s", context.peer(), error)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error)[:_TEXT])
        link = _Link(hello, str(metadata.get(network.INSTANCE, ""))[:64], side, context)
        try:
            identity = self._gate.identity(hello.client, hello.token, context.auth_context())
            await self._make_way(link)
        except StrangerError as stranger:
            await self._refuse(link, m.Refused(stranger.reason, stranger.sentence))
            return None
        try:
            answer = self._greet(hello, identity)
            if isinstance(answer, m.Welcome) and answer.index in self._links:
                answer = m.Refused("client", f"number {answer.index} is taken: give each client a name of its own")
            if isinstance(answer, m.Refused):
                await self._refuse(link, answer)
                return None
            link.index = answer.index
            link.hello = msgspec.structs.replace(hello, token="")
            link.admitted = answer.index not in self._traffic
            with self._changed:
                self._names[hello.client] = self._links[answer.index] = link
            try:
                data = side.send(answer)
                await asyncio.wait_for(context.write(data), _GREETING)
            except BaseException:
                self._unlink(link, Lost("gone", f"client {link.index} left before it was welcome"))
                raise
        finally:
            if self._names.get(hello.client, link) is None:
                del self._names[hello.client]
        link.traffic = traffic = self._traffic.setdefault(link.index, Traffic())
        traffic.sent += len(data)
        traffic.received += len(metadata[network.HELLO])
        traffic.messages_sent += 1
        traffic.connections += 1
        with self._changed:
            link.open = True
            self._endings.pop(link.index, None)
            self._changed.notify_all()
        log.info("client %d, %s, has joined from %s", link.index, hello.client, context.peer())
        return link

    async def _make_way(self, link: _Link) -> None:
        """Reserve the client's name; where a stream of that name is open, its end is waited for, as long as it can take
        to notice that it is dead. Raises StrangerError.
        """
        name = link.hello.client
        taken = StrangerError("client", f"client {name!r} is connected already: give each client a name of its own")
        end = self._loop.time() + network.patience(self.keepalive)
        self._waiting += 1
        try:
            while name in self._names:
                old = self._names[name]
                if old is not None and link.instance and old.instance == link.instance:
                    # The same process dials once at a time: it has given up the old stream.
                    self._cut(old, Lost("gone", f"client {old.index} has dialled anew"), grpc.StatusCode.ABORTED)
                    continue
                if old is None or self._waiting > _WAITING or self._loop.time() > end:
                    raise taken
                with suppress(TimeoutError):
                    await asyncio.wait_for(old.ended.wait(), end - self._loop.time() + 0.01)
        finally:
            self._waiting -= 1
        self._names[name] = None

    async def _refuse(self, link: _Link, refused: m.Refused) -> None:
        log.warning("%s, %s, is refused: %s", link.context.peer(), link.hello.client, refused.sentence)
        await asyncio.wait_for(link.context.write(link.side.send(refused)), _GREETING)

    def _unlink(self, link: _Link, lost: Lost) -> None:
        """The stream has ended: tell those who wait for its answers."""
        if link.ended.is_set():
            return
        link.ended.set()
        with self._changed:
            link.open = False
            if self._links.get(link.index) is link:
                del self._links[link.index]
                self._endings[link.index] = lost
            if self._names.get(link.hello.client) is link:
                del self._names[link.hello.client]
            self._changed.notify_all()
        log.info("client %d: %s", link.index, lost.sentence)
        for exchange in {exchange for exchange, *_ in link.due} | {
            out.exchange for out in [*link.outbox, *link.writing]
        }:
            exchange.lose(link.index, lost)
        link.due.clear()
        link.outbox.clear()

    def _cut(self, link: _Link, lost: Lost, code: Any) -> None:
        """End a stream from this side, also where the client does not read."""
        self._unlink(link, lost)

        async def abort() -> None:
            try:
                await link.context.abort(code, lost.sentence[:_TEXT])
            except (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError) as error:
                log.debug("client %d: %r", link.index, error)

        task = self._loop.create_task(abort())
        self._tasks.add(task)  # a task that nobody holds may vanish
        task.add_done_callback(self._tasks.discard)

    def garbled(self, client: int, sentence: str) -> None:
        """Close the stream of a client that has said something which cannot be what was agreed."""
        link = self._links.get(client)
        if link is not None:
            lost = Lost("garbage", f"client {client}: {sentence}", WireError.__name__)
            self._cut(link, lost, grpc.StatusCode.INVALID_ARGUMENT)


class _Link:
    """One client's stream. `open`: from Welcome on; `admitted`: may be asked; `reported`: was among the arrivals."""

    def __init__(self, hello: m.Hello, instance: str, side: ServerSide, context: Any) -> None:
        self.hello, self.instance, self.side, self.context = hello, instance, side, context
        self.index = -1
        self.open = self.admitted = self.reported = False
        self.ended = asyncio.Event()
        self.outbox: deque[Out] = deque()
        self.due: deque[tuple[Exchange, int, float]] = deque()  # as side.asked: for whom an answer is, and since when
        self.writing: list[Out] = []  # out of the outbox, not through yet
        self.traffic = Traffic()
        self.sending: asyncio.Task[None] | None = None


class _Budget:
    """Bytes of messages that are packed and being written. One message goes out however large it is.

    A message that is stuck gives its share back after a while: those who do not read must not hold up the others.
    """

    def __init__(self, total: int) -> None:
        self._total, self._used = total, 0
        self._held: dict[int, tuple[int, float]] = {}  # (bytes, until when they count), the oldest first
        self._last = 0
        self._freed = asyncio.Event()

    async def take(self, size: int) -> int:
        """Wait for `size` bytes to be free, and hold them: until what this returns is given back."""
        loop = asyncio.get_running_loop()
        while self._used and self._used + size > self._total:
            now = loop.time()
            for share in [share for share, (_, until) in self._held.items() if until <= now]:
                self.give_back(share)
            if self._held:
                oldest = next(iter(self._held.values()))[1]
                self._freed.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._freed.wait(), max(0.0, oldest - now))
        self._last += 1
        self._held[self._last] = (size, loop.time() + _STUCK)
        self._used += size
        return self._last

    def give_back(self, share: int) -> None:
        """What was taken is written, or stuck."""
        size, _ = self._held.pop(share, (0, 0))
        self._used -= size
        self._freed.set()


def _health(hub: Hub) -> Any:
    """gRPC's standard health check: for orchestrators. Without its Watch, streams that strangers could keep open."""

    async def check(request: Any, context: Any) -> Any:
        if request.service not in ("", network.SERVICE):
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service!r} is here")
        state = "SERVING" if hub.running else "NOT_SERVING"
        return health_pb2.HealthCheckResponse(status=state)

    handler = grpc.unary_unary_rpc_method_handler(
        check, health_pb2.HealthCheckRequest.FromString, health_pb2.HealthCheckResponse.SerializeToString
    )
    return grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": handler})
