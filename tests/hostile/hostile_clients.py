"""A program: clients that have certificates and say a correct Hello, and then attack the server.

`main()` takes the arguments ADDRESS CONFIG CA and one of these jobs:

- `answers PLAN`: clients take part, and lie from one of their answers on. PLAN is JSON: {number of the client: [a key
  of LIES, the number of the first false answer of that kind]}. They keep dialling until they are killed.
- `frames TIMES`: client-2 answers each first request with one of FRAMES, each on a new connection.
- `crowd STREAMS`: client-2 takes part honestly. Meanwhile its certificate opens STREAMS more streams in its name, tries
  GREETINGS, and then dials STREAMS times as a stranger.

The results are lines of JSON: a name, gRPC's code or the answer, and the server's sentence.
"""

from __future__ import annotations

import asyncio
import json
import queue
import random
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import msgspec
import torch
import xxhash

from cutlayer.errors import CutlayerError, RefusedError
from cutlayer.options import RunConfig, read_toml
from cutlayer.remote import network
from cutlayer.remote.dial import Backoff, Dialler
from cutlayer.remote.security import ClientSecurity
from cutlayer.remote.sides import worker_of
from cutlayer.remote.worker import Worker
from cutlayer.wire import ClientSide, Frame, Limits, decode_named, described, encode, encode_named, pack
from cutlayer.wire import messages as m
from cutlayer.wire.frames import split
from cutlayer.wire.names import named

OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
AGAIN = 1.0  # seconds until an excluded client dials again
chance = random.Random(0)


# ---- lies in answers -------------------------------------------------------------------------------------------------


def rows_of(value: float) -> Callable[[Worker, Any, Any], Any]:
    """Smashed data, or gradients of a tail, in which every number is this value."""

    def forge(worker: Worker, message: Any, body: Any) -> Any:
        tail = isinstance(message, m.TailUp)
        rows = [torch.full((message.rows, *c.shape), value) for c in _crossing(worker, tail)]
        labelled = not tail and not worker.duty.traits.u_shaped
        return message, encode([*rows, torch.zeros(message.rows, dtype=torch.int64)] if labelled else rows)

    return forge


def _crossing(worker: Worker, tail: bool) -> Any:
    return worker.duty.returning if tail else worker.duty.crossing


def model_times(factor: float) -> Callable[[Worker, Any, Any], Any]:
    """A model whose weights are multiplied by this factor."""

    def forge(worker: Worker, message: Any, body: Any) -> Any:
        found = decode_named(b"".join(body), described(worker.client.module.state_dict()))
        return message, encode_named({name: t * factor for name, t in found.items()})

    return forge


def endless_losses(worker: Worker, message: Any, body: Any) -> Any:
    """Local training reports infinite losses."""
    return m.Fitted(message.step, [(float("inf"), rows, mass) for _, rows, mass in message.losses]), body


def counting(mass: float) -> Callable[[Worker, Any, Any], Any]:
    """Answers that claim this mass for all rows together."""

    def forge(worker: Worker, message: Any, body: Any) -> Any:
        if isinstance(message, m.TailUp):
            return m.TailUp(message.step, message.rows, message.loss, mass), body
        return m.Fitted(message.step, [(loss, rows, mass) for loss, rows, _ in message.losses]), body

    return forge


class Lie(NamedTuple):
    """A forged answer of one kind, or a false Hello."""

    kind: type[m.Message]
    forge: Callable[[Worker, Any, Any], Any] | None = None
    samples: int | None = None


LIES: dict[str, Lie] = {
    "smashed data of 3e38": Lie(m.SmashedUp, rows_of(3e38)),
    "smashed data of 1e30": Lie(m.SmashedUp, rows_of(1e30)),
    "smashed data of NaN": Lie(m.SmashedUp, rows_of(float("nan"))),
    "gradients of 3e38": Lie(m.TailUp, rows_of(3e38)),
    "a model times 1e37": Lie(m.ModelUp, model_times(1e37)),
    "infinite losses": Lie(m.Fitted, endless_losses),
    "rows that count 1e300": Lie(m.Fitted, counting(1e300)),
    "rows of a tail that count 1e300": Lie(m.TailUp, counting(1e300)),
    "1e12 samples": Lie(m.Hello, samples=10**12),
}


class Liar:
    """A worker that lies from its `begin`-th answer of a kind on."""

    def __init__(self, worker: Worker, lie: Lie, begin: int) -> None:
        self._worker, self._lie, self._left = worker, lie, begin

    def hello(self) -> m.Hello:
        """The Hello, which may claim a false number of samples."""
        said, samples = self._worker.hello(), self._lie.samples
        return said if samples is None else msgspec.structs.replace(said, samples=samples, mass=float(samples))

    def welcome(self, welcome: m.Welcome) -> m.Refused | None:
        """Handle the welcome correctly."""
        return self._worker.welcome(welcome)

    def handle(self, frame: Frame) -> Any:
        """The true answer, or the lie."""
        answer = self._worker.handle(frame)
        if answer is None or self._lie.forge is None or not isinstance(answer[0], self._lie.kind):
            return answer
        self._left -= 1
        return answer if self._left > 0 else self._lie.forge(self._worker, *answer)


class Place(NamedTuple):
    """The server's address, and what a client needs to reach it."""

    address: str
    config: RunConfig
    ca: Path

    def security(self, k: int) -> ClientSecurity:
        return ClientSecurity(self.ca / "ca.crt", self.ca / f"client-{k}.crt", self.ca / f"client-{k}.key")

    def worker(self, k: int) -> Worker:
        """The honest client, with its state in a folder."""
        name = f"client-{k}"
        folder = self.ca.parent / "hostile-states" / name
        folder.mkdir(parents=True, exist_ok=True)
        return worker_of(self.config, k, name=name, run=str(self.config.algorithm), folder=folder)

    def channel(self, k: int) -> Any:
        return grpc.secure_channel(self.address, self.security(k).credentials(self.address), OPTIONS)


async def dial_on(place: Place, k: int, responder: Any) -> None:
    """Dial again after every end, until the server says that the run is over."""
    backoff = Backoff(first=0.1, most=AGAIN)
    while True:
        dialler = Dialler(place.address, place.security(k), responder, backoff=backoff, keepalive=1.0)
        try:
            say(f"client-{k}", "BYE", await dialler.run())
            return
        except CutlayerError as error:
            say(f"client-{k}", error.reason if isinstance(error, RefusedError) else type(error).__name__, str(error))
        await asyncio.sleep(AGAIN)


async def answer_all(place: Place, plan: dict[str, tuple[str, int]]) -> None:
    """Run all clients of the plan in this thread."""
    liars = {int(k): Liar(place.worker(int(k)), LIES[lie], begin) for k, (lie, begin) in plan.items()}
    await asyncio.gather(*(dial_on(place, k, liar) for k, liar in liars.items()))


# ---- frames that are wrong -------------------------------------------------------------------------------------------


class Scene:
    """The material of an attack: the conversation, and frames of earlier conversations."""

    def __init__(self, side: ClientSide, hello: bytes, request: Any, earlier: list[bytes]) -> None:
        self.side, self.hello, self.request, self.earlier = side, hello, request, earlier

    def frame(self, message: m.Message | None = None, body: bytes = b"", number: int = 1) -> bytes:
        """A frame with a correct form."""
        said = message or m.ModelUp(self.request.step)
        return pack(said, [body], number, self.side.conversation)


def flipped(frame: bytes) -> bytes:
    """Flip one bit."""
    changed = bytearray(frame)
    changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def resized(frame: bytes, header: int, body: int) -> bytes:
    """Claim these sizes of header and body, with a correct checksum."""
    changed = frame[:4] + struct.pack("<IQ", header, body) + frame[16:]
    checksum = xxhash.xxh3_64_intdigest(changed[:32] + changed[40:])
    return changed[:32] + struct.pack("<Q", checksum) + changed[40:]


OVERSIZED = "oversized"  # a quarter of a gigabyte, so one is enough
FRAMES: dict[str, Callable[[Scene], list[bytes]]] = {
    "truncated": lambda s: [s.frame(body=bytes(5000))[:2000]],
    "only a beginning": lambda s: [s.frame()[:20]],
    "nothing": lambda s: [b""],
    "run on": lambda s: [s.frame() + bytes(64)],
    "bit-flipped": lambda s: [flipped(s.frame(body=bytes(5000)))],
    "foreign": lambda s: [b"POST /v1/chat HTTP/1.1\r\nHost: example.org\r\n\r\n" * 20],
    "noise": lambda s: [chance.randbytes(chance.randrange(1, 100_000))],
    "overtaken": lambda s: [s.frame(number=2), s.frame(number=1)],
    "replayed": lambda s: [s.hello],
    "of an earlier conversation": lambda s: [s.earlier[-1]],
    "not asked for": lambda s: [s.frame(m.ModelUp(s.request.step))],
    "of another step": lambda s: [s.frame(m.SmashedUp(s.request.step + 1, 10))],
    "a wrong body": lambda s: [s.frame(m.SmashedUp(s.request.step, 10), body=bytes(64))],
    "no rows": lambda s: [s.frame(m.SmashedUp(s.request.step, 0))],
    "too many rows": lambda s: [s.frame(m.SmashedUp(s.request.step, (1 << 32) - 1))],
    "a header of gigabytes": lambda s: [resized(s.frame(), 1 << 31, 0)],
    "a body of gigabytes": lambda s: [resized(s.frame(), 20, 1 << 62)],
    "a server's message": lambda s: [s.frame(m.Forward(s.request.step))],
    OVERSIZED: lambda s: [bytes(Limits().message_bytes + (1 << 20))],
    "many at once": lambda s: [s.frame() for _ in range(2000)],
    "failed": lambda s: [s.frame(m.Failed(s.request.step, "Boom", "x" * 4096))],
}


def attack(channel: Any, name: str, hello: m.Hello, earlier: list[bytes]) -> tuple[str, str]:
    """One connection: Hello, the first request, the attack. Returns how the server ended it."""
    side = ClientSide()
    first = side.send(hello)
    said: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    method = channel.stream_stream(f"/{network.SERVICE}/{network.METHOD}")
    call = method(iter(said.get, None), metadata=((network.HELLO, first),), timeout=60)
    try:
        for request in requests(call, side):
            if isinstance(request, m.Forward | m.Evaluate | m.Save):
                scene = Scene(side, first, request, earlier)
                for data in FRAMES[name](scene):
                    said.put(data)
                earlier.append(scene.frame())
                break
        for _ in call:
            pass
        return ("OK", "")
    except grpc.RpcError as error:
        return (error.code().name, error.details() or "")
    finally:
        said.put(None)
        call.cancel()


def requests(call: Any, side: ClientSide) -> Iterator[Any]:
    """The server's messages. Raises RpcError."""
    for data in call:
        for piece in split(data):
            yield side.receive(piece).message


def send_frames(place: Place, times: int) -> None:
    """Make one attack in each round, since the server waits for this client to come back."""
    hello = place.worker(2).hello()
    earlier = [pack(m.ModelUp(0), (), 1, 1)]
    for name in [*FRAMES, *(times - 1) * [name for name in FRAMES if name != OVERSIZED]]:
        with place.channel(2) as channel:
            grpc.channel_ready_future(channel).result(timeout=60)
            say(name, *attack(channel, name, hello, earlier))


# ---- a crowd of connections ------------------------------------------------------------------------------------------


def reversed_classes(hello: m.Hello) -> m.Hello:
    """Claim another meaning of the labels."""
    terms = msgspec.structs.replace(hello.terms, classes=named([f"class {k}" for k in range(9, -1, -1)]))
    return msgspec.structs.replace(hello, terms=terms)


CROWDED = ("UNAVAILABLE", "RESOURCE_EXHAUSTED")  # codes of a server with too many streams

GREETINGS: dict[str, Callable[[m.Hello], m.Hello]] = {
    "another's name": lambda hello: msgspec.structs.replace(hello, client="client-0"),
    "a stranger's name": lambda hello: msgspec.structs.replace(hello, client="stranger"),
    "other classes": reversed_classes,
    "no samples": lambda hello: msgspec.structs.replace(hello, samples=0, mass=0.0),
}


def crowd(place: Place, streams: int) -> None:
    """Client 2 takes part, and its certificate is misused meanwhile."""
    worker, there = place.worker(2), threading.Event()
    own, hello = worker.welcome, worker.hello()
    worker.welcome = lambda welcome: (own(welcome), there.set())[0]  # type: ignore[method-assign]
    honest = threading.Thread(target=lambda: asyncio.run(dial_on(place, 2, worker)))
    with place.channel(2) as channel:
        grpc.channel_ready_future(channel).result(timeout=60)
        for name in ("other classes", "no samples"):  # before a client with that name is connected
            say(name, *greet(channel, GREETINGS[name](hello)))
        honest.start()
        there.wait(60)
        many = [threading.Thread(target=lambda: say("crowd", *greet(channel, hello))) for _ in range(streams)]
        for thread in many:
            thread.start()
        for _ in range(20):
            heard = greet(channel, GREETINGS["another's name"](hello))
            if heard[0] not in CROWDED:  # at first, the crowd is in the way
                break
            time.sleep(0.2)
        say("another's name", *heard)
        for _ in range(streams):
            say("a stranger's name", *greet(channel, GREETINGS["a stranger's name"](hello)))
        for thread in many:
            thread.join()
    say("crowded", "OK", "")
    honest.join()


def greet(channel: Any, hello: m.Hello) -> tuple[str, str]:
    """The answer to one Hello: a reason and a sentence, or gRPC's code."""
    side = ClientSide()
    method = channel.stream_stream(f"/{network.SERVICE}/{network.METHOD}")
    call = method(iter(()), metadata=((network.HELLO, side.send(hello)),), timeout=30)
    try:
        message = next(requests(call, side))
        return getattr(message, "reason", type(message).__name__), getattr(message, "sentence", "")
    except grpc.RpcError as error:
        return error.code().name, error.details() or ""
    except StopIteration:
        return "OK", ""
    finally:
        call.cancel()


def say(name: str, code: str, sentence: str) -> None:
    sys.stdout.write(json.dumps([name, code, sentence]) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Run the job that the command line names; see the top of this file."""
    address, config, ca, job, how = sys.argv[1:]
    place = Place(address, RunConfig.of(read_toml(Path(config))), Path(ca).absolute())
    if job == "answers":
        asyncio.run(answer_all(place, json.loads(how)))
    elif job == "frames":
        send_frames(place, int(how))
    else:
        crowd(place, int(how))


if __name__ == "__main__":
    main()
