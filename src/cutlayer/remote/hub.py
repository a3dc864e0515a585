"""The server's end of all connections: the trainer sends requests to several clients at once and waits for their
answers.

Training is synchronous, in its own thread; gRPC runs on an asyncio loop in another. All state of connections belongs to
the loop's thread; the two meet in `Exchange`.

A client cannot delay the others, or the server:
- Every client has its own stream and its own queue (`ClientLink`). Messages that a client does not read stay in its
  queue, which is bounded: beyond `limits.message_bytes`, or `limits.asked` outstanding answers, its stream is closed.
- Messages are packed when they are written, and only a few at a time (`WriteBudget`).
- A client that disappears without closing its connection is detected by pings.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from typing import Any, TypeVar, overload
from urllib.parse import unquote

import grpc
import grpc.aio
import msgspec

from cutlayer.errors import ConfigError, CutlayerError, NetworkError, PortInUseError, WireError
from cutlayer.remote import network
from cutlayer.remote.brake import Brake
from cutlayer.remote.budget import WriteBudget
from cutlayer.remote.caller import Caller
from cutlayer.remote.carrier import Lost, Reason, Request
from cutlayer.remote.counters import ClientTraffic
from cutlayer.remote.exchange import Body, Exchange, Out
from cutlayer.remote.health import health_handler
from cutlayer.remote.link import TEXT, ClientLink
from cutlayer.remote.security import Gate, ServerSecurity, StrangerError, split_address
from cutlayer.remote.transports import host_and_port
from cutlayer.remote.visits import Visits
from cutlayer.text import shortened
from cutlayer.wire import messages as m
from cutlayer.wire.conversation import ANSWERS, ServerSide
from cutlayer.wire.frames import Frame
from cutlayer.wire.limits import Limits
from cutlayer.wire.tensors import size_of

log = logging.getLogger(__name__)
Admit = Callable[[m.Hello, str | None], m.Welcome | m.Refused]
"""(a client's Hello, the name that its certificate or token proves) -> whether it is admitted."""
Tell = Callable[[str, Mapping[str, Any]], None]
"""Is called with an event, as a word and as facts, on the loop's thread."""
Gauge = tuple[str, str, float]
"""A figure for Prometheus: its name, its meaning, its value."""
T = TypeVar("T")

_LOOK = 1.0  # seconds between checks of files that may have changed
_STREAMS = 4096
_SHOWN = 100  # characters of a stranger's name in the log
_TOO_OFTEN = "too many connections and refusals of this name from this address: wait some seconds, and try again"
_SOON = 10.0  # seconds in which the loop must complete a request


class Hub:
    """Serves `address` (host:port; port 0: any). `admit(hello, identity)` decides about each client that connects. It
    must be quick, because it is called on the loop's thread. `identity` is the name that the client's certificate or
    token proves, and equals `hello.client`; it is None without security.

    `keepalive` seconds pass between pings. `metrics` is the address at which figures for Prometheus are served:
    host:port, or a port that only this machine reaches; `gauges` returns those that are not the hub's own. `tell` is
    called for connections, refusals, and files that were read again. `changed` is called when the deny list has
    changed, with the names on it.
    """

    concurrent = True

    def __init__(
        self,
        address: str,
        security: ServerSecurity,
        admit: Admit,
        limits: Limits | None = None,
        metrics: str | int | None = None,
        *,
        keepalive: float = network.KEEPALIVE,
        tell: Tell | None = None,
        changed: Callable[[frozenset[str]], None] | None = None,
        gauges: Callable[[], Sequence[Gauge]] = tuple,
    ) -> None:
        self.address = host_and_port(address, encrypted=not security.insecure)
        self.limits, self.keepalive = limits or Limits(), keepalive
        self.lost: dict[Reason, int] = {"late": 0, "gone": 0, "failed": 0, "garbage": 0}
        self._security, self._admit, self._metrics = security, admit, metrics
        self._tell, self._on_denied, self.gauges = tell, changed, gauges
        self._visits = Visits(self._record)
        self._links: dict[int, ClientLink] = {}
        self._names: dict[str, ClientLink | None] = {}  # None: is being greeted
        self._endings: dict[int, Lost] = {}
        self._traffic: dict[int, ClientTraffic] = {}
        self._changed = threading.Condition()
        self._exchanges: set[Exchange] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting: dict[str, asyncio.Event] = {}  # clients that wait for the end of an earlier stream of their name
        self._brake = Brake()
        self._budget = WriteBudget(max(self.limits.message_bytes, 1 << 20))
        self._gate: Gate
        self._loop: asyncio.AbstractEventLoop
        self._stopping: asyncio.Future[tuple[str, float, bool]]
        self._thread: threading.Thread | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._exporter: Any = None
        self._figures: Any = None
        self._running = False

    def start(self) -> int:
        """Begin to listen; the port. Raises ConfigError if files are wrong or the address is not available."""
        if self._thread is not None:
            raise NetworkError("a hub starts once: make a new one")
        self._gate = self._security.open(self.address)
        self._tell_denied()
        started: Future[int] = Future()
        self._pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "cutlayer-decode")
        self._thread = threading.Thread(target=self._run, args=(started,), name="cutlayer-hub", daemon=True)
        self._thread.start()
        try:
            port = started.result()
            if self._metrics is not None:
                from cutlayer.remote.metrics import Exporter, HubFigures

                self._figures = HubFigures(self)
                self._exporter = Exporter(self._figures, self._metrics)
        except BaseException:
            self.stop("the server could not start", 0)
            raise
        return port

    def stop(self, reason: str, grace: float, *, returning: bool = False) -> None:
        """Say Bye to all clients, or only hang up if the server is `returning`, so that they dial again. Give them
        `grace` seconds to leave, then close everything. A second call does nothing.
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
        """Whether it listens."""
        return self._running

    @property
    def metrics_port(self) -> int | None:
        """The port at which figures are served; None if they are not."""
        return self._exporter.port if self._exporter is not None else None

    @property
    def connected(self) -> frozenset[int]:
        """Clients that can receive requests now. One that has reconnected is among them after `arrivals`."""
        with self._changed:
            return frozenset(k for k, link in self._links.items() if link.open and link.admitted)

    @property
    def present(self) -> frozenset[int]:
        """Clients with an open stream."""
        with self._changed:
            return frozenset(k for k, link in self._links.items() if link.open)

    def arrivals(self) -> dict[int, m.Hello]:
        """The clients that have connected since the last call, with their Hellos.

        A client that reconnects may have missed messages, so nothing more is sent to it until this method has named it.
        The trainer then knows, and brings it up to date first.
        """
        with self._changed:
            new = {k: link for k, link in self._links.items() if link.open and not link.reported}
            for link in new.values():
                link.admitted = link.reported = True
            return {k: link.hello for k, link in new.items()}

    def wait_for(self, clients: int | Collection[int], timeout: float | None = None) -> frozenset[int]:
        """Wait until this number of clients, or these clients, are present. Returns those present, timeout or not."""

        def enough() -> bool:
            here = self.present
            there = len(here) >= clients if isinstance(clients, int) else here.issuperset(clients)
            return there or not self._running

        with self._changed:
            self._changed.wait_for(enough, timeout)
        return self.present

    def traffic(self) -> dict[int, ClientTraffic]:
        """Bytes and messages of every client that has ever connected."""
        return {k: replace(t) for k, t in list(self._traffic.items())}

    @property
    def refused(self) -> Mapping[str, int]:
        """The number of refusals, by reason."""
        return dict(self._visits.refused)

    @property
    def expiries(self) -> Mapping[str, datetime]:
        """The ends of validity of certificates: the server's, the clients' authority, those of connected clients."""
        with self._changed:
            callers = [link.caller for link in self._links.values() if link.open]
        return {**self._gate.expiries, **{c.name: c.expires for c in callers if c.expires is not None}}

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
        """Send each client its requests, in order, to all clients at once. Returns each client's answers, in order, or
        why there are none.

        The exchange ends when every client has answered (or has been sent everything, if nothing is to be answered) or
        is lost, or when `deadline` seconds have passed and `quorum` clients (of `voters`, if given) have answered.
        Later answers are discarded. With `on_answer`, its result replaces each answer; it is called on other threads
        while further answers arrive. If it raises WireError, the client has said "garbage" and its stream is closed.

        A body that is the same object for several clients is joined once. Buffers may change after the return.
        Raises WireError for a message that is too large or not allowed now, and whatever else `on_answer` raises.
        """
        begin = time.perf_counter()
        counts = {client: self._check(client, asked) for client, asked in requests.items()}
        exchange = Exchange(counts, quorum, on_answer, self._pool, self, voters=voters)
        with self._changed:
            if not self._running:
                raise NetworkError("the server is not running, so it cannot ask clients")
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
        if self._figures is not None:
            self._figures.observe(time.perf_counter() - begin)
        return results

    def dismiss(self, client: int, sentence: str) -> None:
        """Close the connection of a client that has sent something impossible."""
        done: Future[None] = Future()

        def close() -> None:
            self.garbled(client, sentence)
            done.set_result(None)

        self.call(close)
        with suppress(TimeoutError):  # the loop has ended, and all connections with it
            done.result(_SOON)

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
                exchange.fail(NetworkError("the server has stopped, so it cannot ask clients"))

    async def _serve(self, started: Future[int]) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(network.on_loop_error)
        self._stopping = self._loop.create_future()
        server = grpc.aio.server(
            options=network.server_options(self.limits, self.keepalive), maximum_concurrent_rpcs=_STREAMS
        )
        port = await self._listen(server)
        self._running = True
        log.info("listening at %s, port %d", self.address, port)
        started.set_result(port)
        looking = self._loop.create_task(self._keep_looking())
        ending = await self._stopping
        looking.cancel()
        await self._end(server, *ending)
        self._visits.close()

    async def _keep_looking(self) -> None:
        """Read again the files that have changed, and end the streams of clients that are now denied."""
        while True:
            await asyncio.sleep(_LOOK)
            self._visits.look(self._loop.time())
            for (host, name), count in self._brake.over(self._loop.time()).items():
                log.warning("%s, %s, was refused %d times more", host, shortened(name, _SHOWN) or "nobody", count)
            news = self._gate.look()
            for happened, facts in news:
                log.log(logging.WARNING if happened == "kept" else logging.INFO, "%s: %s", happened, dict(facts))
                self._record(happened, facts)
            if any(happened == "deny list" for happened, _ in news):
                self._tell_denied()
                self._cut_denied()

    def _tell_denied(self) -> None:
        if self._on_denied is not None:
            self._on_denied(self._gate.denied.names)

    def _cut_denied(self) -> None:
        """End the streams of clients that are denied. They connect again, and are then told the reason."""
        for link in list(self._links.values()):
            if link.open and (why := self._gate.denied.why(link.caller)):
                log.warning("client %d is cut off: %s", link.index, why)
                self._record("denied", {"client": link.index, **link.caller.facts, "why": why})
                self._cut(link, Lost("gone", f"client {link.index}: {why}"), grpc.StatusCode.PERMISSION_DENIED)

    def _record(self, happened: str, facts: Mapping[str, Any]) -> None:
        """Pass an event to the record. If its disk is full, this must not end a stream."""
        if self._tell is None:
            return
        try:
            self._tell(happened, facts)
        except CutlayerError as error:
            log.error("%s is not on record: %s", happened, error)

    async def _listen(self, server: Any) -> int:
        """Start the server; its port. Raises ConfigError."""
        talk = grpc.stream_stream_rpc_method_handler(self._talk)
        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(network.SERVICE, {network.METHOD: talk}),
                health_handler(lambda: self._running),
            )
        )
        try:
            if self._gate.credentials is None:
                port = server.add_insecure_port(self.address)
            else:
                port = server.add_secure_port(self.address, self._gate.credentials)
            await server.start()
            return int(port)
        except RuntimeError:
            await server.stop(0)
            host, wanted = split_address(self.address)
            if network.in_use(host, wanted):
                raise PortInUseError(
                    f"cannot listen at {self.address}: another program has that port; wait until it ends, or give "
                    "another port"
                ) from None
            raise ConfigError(
                f"cannot listen at {self.address}: give an address of this machine, and a port that this user may use"
            ) from None

    async def _end(self, server: Any, reason: str, grace: float, returning: bool) -> None:
        """Let all clients leave, for `grace` seconds at most, and stop the server."""
        end = self._loop.time() + grace
        self._running = False
        links = list(self._links.values())
        if returning:
            for link in links:
                self._cut(link, Lost("gone", reason), grpc.StatusCode.UNAVAILABLE)
            ways = list(self._tasks)
        else:
            ways = [asyncio.create_task(link.say_bye(reason)) for link in links]
        if ways:
            await asyncio.wait(ways, timeout=max(0.0, grace * 0.8))
        await server.stop(max(0.0, end - self._loop.time()))
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)

    def _request_stop(self, reason: str, grace: float, returning: bool) -> None:
        if not self._stopping.done():
            self._stopping.set_result((reason[:4096], grace, returning))

    def call(self, function: Callable[..., object], *args: object) -> None:
        """Run `function` on the loop, soon."""
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop has ended, and nothing waits for this any more
            log.debug("%s came after the end", function)

    def _check(self, client: int, asked: Sequence[Request]) -> int:
        """How many answers these requests have. Raises WireError before anything is sent to any client."""
        if len(asked) > self.limits.asked:
            raise WireError(f"{len(asked)} requests to client {client} at once: {self.limits.asked} are accepted")
        answers = 0
        for message, body in asked:
            answers += type(message) in ANSWERS
            size = size_of(body)
            if size > self.limits.message_bytes:
                raise WireError(
                    f"{type(message).__name__} to client {client} would have {size} bytes: {self.limits.message_bytes} "
                    "are accepted; raise the limit (--message-limit), or send smaller batches"
                )
        return answers

    def _begin(self, exchange: Exchange, requests: Mapping[int, Sequence[Request]], deadline: float | None) -> None:
        bodies: dict[int, Body] = {}
        for client, asked in requests.items():
            link = self._links.get(client)
            if link is None or not link.open or not link.admitted:
                exchange.lose(client, self._why_not(client, link))
                continue
            outs = _outs(asked, exchange, bodies)
            if why := link.stuck(outs):
                self._give_up(link, outs, why)
            else:
                exchange.sending(client, len(outs))
                link.queue(outs, self._budget)
        if deadline is not None and not exchange.over:
            exchange.timer = self._loop.call_later(deadline, exchange.expire)

    def _give_up(self, link: ClientLink, outs: list[Out], why: str) -> None:
        """Close the stream of a client that has not read earlier messages."""
        lost = Lost("gone", f"{why}; its connection was closed")
        for out in outs:
            out.exchange.lose(link.index, lost)
        self._cut(link, lost, grpc.StatusCode.UNAVAILABLE)

    def keep_bodies(self, exchange: Exchange) -> None:
        """Copy the messages that `exchange` has not written yet."""
        for link in self._links.values():
            for out in link.outbox:
                if out.exchange is exchange:
                    out.body.keep()

    def _why_not(self, client: int, link: ClientLink | None) -> Lost:
        if link is not None and link.open:
            return Lost("gone", f"client {client} has come back, and is not up to date (see Hub.arrivals)")
        return self._endings.get(client) or Lost("gone", f"client {client} is not connected")

    async def _talk(self, _: object, context: Any) -> None:
        """One stream, from start to end."""
        link = await self._handshake(context)
        if link is None:
            return
        lost = Lost("gone", f"client {link.index} is gone: its connection has ended")
        try:
            lost = await link.listen()
        except WireError as error:
            lost = Lost("garbage", f"client {link.index}: {error}", type(error).__name__)
        finally:
            self._unlink(link, lost)
        if lost.reason == "garbage":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(lost.sentence)[:TEXT])

    async def _handshake(self, context: Any) -> ClientLink | None:
        """Admit a client, or refuse it. Nothing that it sends is read before."""
        link, size = await self._arrived(context)
        try:
            identity = self._gate.identity(link.hello.client, link.hello.token, context.auth_context())
            self._gate.check(link.caller)
            await self._make_way(link)
        except StrangerError as stranger:
            await self._refuse(link, m.Refused(stranger.reason, stranger.sentence))
            return None
        try:
            sent = await self._welcome(link, identity)
        finally:
            if self._names.get(link.hello.client, link) is None:
                del self._names[link.hello.client]
        if sent is None:
            return None
        link.traffic = traffic = self._traffic.setdefault(link.index, ClientTraffic())
        traffic.sent += sent
        traffic.received += size
        traffic.messages_sent += 1
        traffic.connections += 1
        with self._changed:
            link.open = True
            self._endings.pop(link.index, None)
            self._changed.notify_all()
        log.info("client %d, %s, has joined from %s", link.index, link.hello.client, context.peer())
        self._brake.connect(link.caller.host, link.caller.name)
        self._visits.connect(link.caller, link.index, self._loop.time())
        return link

    async def _arrived(self, context: Any) -> tuple[ClientLink, int]:
        """A link for the Hello of a new stream, and the bytes of that Hello."""
        metadata = dict(context.invocation_metadata() or ())
        side = ServerSide(self.limits, encrypted=self._gate.credentials is not None)
        data = metadata.get(network.HELLO, b"")
        nobody = Caller("", unquote(context.peer()))
        await self._slow_down(context, nobody)
        try:
            hello = side.receive(network.check_hello(data)).message
        except WireError as error:
            if self._brake.refuse(nobody.host, ""):
                log.warning("%s was turned away: %s", context.peer(), error)
            nobody = Caller.of("", context.peer(), context.auth_context())
            self._visits.refuse(nobody, "hello", str(error), self._loop.time())
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error)[:TEXT])
        link = ClientLink(hello, str(metadata.get(network.INSTANCE, ""))[:64], side, context)
        await self._slow_down(context, Caller(hello.client, nobody.address))
        link.caller = Caller.of(hello.client, context.peer(), context.auth_context())
        return link, len(data)

    async def _slow_down(self, context: Any, caller: Caller) -> None:
        """Refuse a peer that has connected too often, before this costs much."""
        if self._brake.blocks(caller.host, caller.name):
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, _TOO_OFTEN)

    async def _welcome(self, link: ClientLink, identity: str | None) -> int | None:
        """Welcome a client whose name is reserved, and give it its number. Returns the bytes of this; None if it is
        refused.
        """
        answer = self._admit(link.hello, identity)
        if isinstance(answer, m.Welcome) and answer.index in self._links:
            answer = m.Refused("client", f"number {answer.index} is taken: give each client a name of its own")
        if isinstance(answer, m.Refused):
            await self._refuse(link, answer)
            return None
        link.index = answer.index
        link.hello = msgspec.structs.replace(link.hello, token="")
        link.admitted = answer.index not in self._traffic
        with self._changed:
            self._names[link.hello.client] = self._links[answer.index] = link
        try:
            return await link.greet(answer)
        except BaseException:
            self._unlink(link, Lost("gone", f"client {link.index} left before it was welcome"))
            raise

    async def _make_way(self, link: ClientLink) -> None:
        """Reserve the client's name. If a stream of that name is open, wait for its end, as long as it may take to
        notice that it is dead. Only the latest connection waits. Raises StrangerError.
        """
        name = link.hello.client
        taken = StrangerError(
            "taken",
            f"client {name!r} is connected already: give each client a name of its own, or try "
            "again when that has ended",
        )
        end = self._loop.time() + network.patience(self.keepalive)
        if name in self._names and (before := self._waiting.pop(name, None)):
            before.set()  # an earlier waiting connection of that name gives up
        mine = self._waiting[name] = asyncio.Event()
        try:
            while name in self._names:
                old = self._names[name]
                if old is not None and link.instance and old.instance == link.instance:
                    # The same process has one connection at a time: it has given up the old stream.
                    self._cut(old, Lost("gone", f"client {old.index} has dialled anew"), grpc.StatusCode.ABORTED)
                    continue
                if old is None or mine.is_set() or self._loop.time() > end:
                    raise taken
                await _first_of(old.ended, mine, timeout=end - self._loop.time() + 0.01)
        finally:
            if self._waiting.get(name) is mine:
                del self._waiting[name]
        self._names[name] = None

    async def _refuse(self, link: ClientLink, refused: m.Refused) -> None:
        if self._brake.refuse(link.caller.host, link.caller.name):
            who, sentence = shortened(link.caller.name, _SHOWN), shortened(refused.sentence, TEXT)
            log.warning("%s, %s, is refused: %s", link.context.peer(), who, sentence)
        self._visits.refuse(link.caller, refused.reason, refused.sentence, self._loop.time())
        await link.greet(refused)

    def _unlink(self, link: ClientLink, lost: Lost) -> None:
        """The stream has ended: tell the exchanges that wait for its answers."""
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
        link.lose(lost)

    def _cut(self, link: ClientLink, lost: Lost, code: Any) -> None:
        """End a stream from this side, even if the client does not read."""
        self._unlink(link, lost)
        task = self._loop.create_task(link.abort(lost, code))
        self._tasks.add(task)  # a task without a reference may be collected
        task.add_done_callback(self._tasks.discard)

    def garbled(self, client: int, sentence: str) -> None:
        """Close the stream of a client whose answer contradicts what was agreed."""
        link = self._links.get(client)
        if link is not None:
            lost = Lost("garbage", f"client {client}: {sentence}", WireError.__name__)
            self._cut(link, lost, grpc.StatusCode.INVALID_ARGUMENT)


async def _first_of(*events: asyncio.Event, timeout: float) -> None:
    """Wait until one of the events happens, or for this number of seconds."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=max(0.0, timeout), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


def _outs(asked: Sequence[Request], exchange: Exchange, bodies: dict[int, Body]) -> list[Out]:
    """One client's requests as messages to write. `bodies`: those that clients share, by the identity of buffers."""
    outs, slot = [], 0
    for message, buffers in asked:
        body = bodies.get(id(buffers))
        if body is None:
            body = bodies[id(buffers)] = Body(buffers)
        body.users += 1
        answered = type(message) in ANSWERS
        outs.append(Out(message, body, exchange, slot if answered else None))
        slot += answered
    return outs
