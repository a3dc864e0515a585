"""The server's end of one client's stream: messages written to it and received from it.

Everything here happens on the thread of the hub's loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import Any

import grpc
import grpc.aio

from cutlayer.errors import WireError
from cutlayer.remote.budget import WriteBudget
from cutlayer.remote.caller import Caller
from cutlayer.remote.carrier import Lost
from cutlayer.remote.counters import ClientTraffic
from cutlayer.remote.exchange import Exchange, Out
from cutlayer.text import plain
from cutlayer.wire import messages as m
from cutlayer.wire.conversation import ServerSide
from cutlayer.wire.frames import Frame, split
from cutlayer.wire.tensors import Buffer, size_of

log = logging.getLogger(__name__)

GREETING = 20.0
"""Seconds that a client has to take the answer to its Hello."""

TEXT = 1000
"""Characters of the message that ends a stream, which is sent in a header."""

_BROKEN = (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError)


class ClientLink:
    """One client's stream, with the `caller` at its other end. `open`: from Welcome on; `admitted`: can receive
    requests; `reported`: was among the arrivals.

    Messages wait in `outbox`; `due` are the answers that the client owes.
    """

    def __init__(self, hello: m.Hello, instance: str, side: ServerSide, context: Any) -> None:
        self.hello, self.instance, self.side, self.context = hello, instance, side, context
        self.caller = Caller("", "")
        self.index = -1
        self.open = self.admitted = self.reported = False
        self.ended = asyncio.Event()
        self.outbox: deque[Out] = deque()
        self.due: deque[tuple[Exchange, int, float]] = deque()  # as side.asked: for whom an answer is, and since when
        self.writing: list[Out] = []  # taken from the outbox, not written yet
        self.traffic = ClientTraffic()
        self.sending: asyncio.Task[None] | None = None

    def stuck(self, outs: list[Out]) -> str | None:
        """Why `outs` cannot be queued: the client has not read earlier messages. None if they can."""
        limits, owing = self.side.limits, len(self.side.asked)
        if self.outbox:  # usually everything has been written
            unsent = sum(out.body.size for out in self.outbox)
            owing += sum(out.slot is not None for out in self.outbox)
            if unsent + sum(out.body.size for out in outs) > limits.message_bytes:
                return f"client {self.index} does not take what it is sent: {unsent} bytes wait"
        if owing + len(outs) > limits.asked and owing + sum(out.slot is not None for out in outs) > limits.asked:
            return f"client {self.index} owes {owing} answers"
        return None

    def queue(self, outs: list[Out], budget: WriteBudget) -> None:
        """Write these messages soon, after those that wait."""
        self.outbox.extend(outs)
        if self.sending is None and self.open:
            self.sending = asyncio.get_running_loop().create_task(self._send(budget))

    async def listen(self) -> Lost:
        """Read the client's messages until its stream ends; returns the reason for the end. Raises WireError."""
        while True:
            data = await self.context.read()
            if data is grpc.aio.EOF:
                return Lost("gone", f"client {self.index} is gone: its connection has ended")
            self.traffic.received += len(data)
            for part in split(data):
                if not self.open or self.side.state == "closed":
                    break  # it was cut, or Bye was sent at the same time as an answer
                frame = self.side.receive(part)
                if isinstance(frame.message, m.Failed):
                    kind, sentence = plain(frame.message.kind), plain(frame.message.sentence)
                    log.warning("client %d has failed: %s: %s", self.index, kind, sentence)
                    return Lost("failed", f"client {self.index}: {sentence}", kind)
                self._take(frame)

    async def greet(self, answer: m.Welcome | m.Refused) -> int:
        """Answer the client's Hello. Returns the bytes of the answer. Raises TimeoutError, WireError, gRPC's errors."""
        data = self.side.send(answer)
        await asyncio.wait_for(self.context.write(data), GREETING)
        return len(data)

    async def say_bye(self, reason: str) -> None:
        """Send Bye after everything is written, and wait until the client has left."""
        while self.outbox or self.sending:
            await asyncio.sleep(0.02)
        if self.side.state == "open":
            try:
                await self.context.write(self.side.send(m.Bye(reason)))
            except _BROKEN as error:
                log.debug("client %d: %r", self.index, error)
        await self.ended.wait()

    def lose(self, lost: Lost) -> None:
        """Tell the exchanges that wait for this client, and drop messages that were not written."""
        waiting = {exchange for exchange, *_ in self.due}
        waiting |= {out.exchange for out in [*self.outbox, *self.writing]}
        for exchange in waiting:
            exchange.lose(self.index, lost)
        self.due.clear()
        self.outbox.clear()

    async def abort(self, lost: Lost, code: Any) -> None:
        """End the stream from this side, even if the client does not read."""
        try:
            await self.context.abort(code, lost.sentence[:TEXT])
        except _BROKEN as error:
            log.debug("client %d: %r", self.index, error)

    async def _send(self, budget: WriteBudget) -> None:
        """Write what is in the outbox, in order."""
        try:
            while self.outbox:
                count, size = self._how_many()  # they stay there, and can be found, until they are packed
                share = await budget.take(size)
                try:
                    if self.ended.is_set():
                        return
                    self.writing = [self.outbox.popleft() for _ in range(count)]
                    for data in self._packed():  # all before anything waits: buffers may change then
                        await self.context.write(data)
                        self.traffic.sent += len(data)
                finally:
                    budget.give_back(share)
                sent, self.writing = self.writing, []
                for out in sent:
                    out.exchange.sent(self.index)
        except _BROKEN as error:
            log.debug("client %d: %r", self.index, error)  # the reader ends, too, and says why
        finally:
            self.sending = None

    def _how_many(self) -> tuple[int, int]:
        """How many of the waiting messages can be packed together, and the bytes behind them."""
        count = size = 0
        for out in self.outbox:
            if count and size + out.body.size > self.side.limits.message_bytes:
                break
            count, size = count + 1, size + out.body.size
        return count, size

    def _packed(self) -> list[bytes]:
        """The messages that are being written, as few pieces of bytes, each within the limit."""
        runs: list[bytes] = []
        run: list[Buffer] = []
        filled = 0
        for out in self.writing:
            parts = self._parts(out)
            size = size_of(parts)
            if run and filled + size > self.side.limits.message_bytes:
                runs.append(b"".join(run))
                run, filled = [], 0
            run += parts
            filled += size
        if run:
            runs.append(b"".join(run))
        return runs

    def _parts(self, out: Out) -> list[Buffer]:
        """One message as buffers; its answer is added to `due`. Empty if it may not be sent; then its exchange
        is told.
        """
        try:
            parts = self.side.parts(out.message, out.body.buffers)
        except WireError as error:
            out.exchange.fail(error)
            return []
        if out.slot is not None:
            self.due.append((out.exchange, out.slot, asyncio.get_running_loop().time()))
        self.traffic.messages_sent += 1
        self.traffic.payload_sent += out.body.size
        return parts

    def _take(self, frame: Frame) -> None:
        """Pass an answer to the exchange that waits for it."""
        self.traffic.payload_received += len(frame.body)
        self.traffic.messages_received += 1
        exchange, slot, since = self.due.popleft()
        self.traffic.latency = asyncio.get_running_loop().time() - since
        if exchange.over:
            log.info("client %d: an answer came too late", self.index)
        else:
            exchange.answered(self.index, slot, frame)
