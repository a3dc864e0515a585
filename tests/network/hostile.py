"""A client that has a certificate, says Hello as it should, and then answers with whatever a server could choke on.

`python hostile.py ADDRESS CONFIG FOLDER`: attacks, one connection each, again and again until the run is over; a line
of JSON for each: its name, gRPC's code and the server's sentence.
"""

from __future__ import annotations

import json
import queue
import random
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import xxhash

from cutlayer.options import RunConfig, read_toml
from cutlayer.remote import network
from cutlayer.remote.security import ClientSecurity
from cutlayer.remote.sides import worker_of
from cutlayer.wire import ClientSide, Limits, pack
from cutlayer.wire import messages as m
from cutlayer.wire.frames import split

NAME = "client-2"
TOO_OFTEN = "too many connections and refusals"
chance = random.Random(0)


class Scene:
    """What an attack has to work with: the conversation, and frames of earlier ones."""

    def __init__(self, side: ClientSide, hello: bytes, request: Any, earlier: list[bytes]) -> None:
        self.side, self.hello, self.request, self.earlier = side, hello, request, earlier

    def frame(self, message: m.Message | None = None, body: bytes = b"", number: int = 1) -> bytes:
        """A frame that is right in form."""
        said = message or m.ModelUp(self.request.step)
        return pack(said, [body], number, self.side.conversation)


def flipped(frame: bytes) -> bytes:
    """One bit is wrong."""
    changed = bytearray(frame)
    changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def resized(frame: bytes, header: int, body: int) -> bytes:
    """It says that its parts are so long, with a checksum that is right."""
    changed = frame[:4] + struct.pack("<IQ", header, body) + frame[16:]
    checksum = xxhash.xxh3_64_intdigest(changed[:32] + changed[40:])
    return changed[:32] + struct.pack("<Q", checksum) + changed[40:]


ATTACKS: dict[str, Callable[[Scene], list[bytes]]] = {
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
    "oversized": lambda s: [bytes(Limits().message_bytes + (1 << 20))],
    "many at once": lambda s: [s.frame() for _ in range(2000)],
    "failed": lambda s: [s.frame(m.Failed(s.request.step, "Boom", "x" * 4096))],
}


def attack(channel: Any, name: str, hello: m.Hello, earlier: list[bytes]) -> tuple[str, str]:
    """One connection: Hello, the first request, the attack; how the server ended it."""
    side = ClientSide()
    first = side.send(hello)
    said: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    method = channel.stream_stream(f"/{network.SERVICE}/{network.METHOD}")
    call = method(iter(said.get, None), metadata=((network.HELLO, first),), timeout=30)
    try:
        for request in requests(call, side):
            if isinstance(request, m.Bye):
                return ("BYE", request.reason)
            if isinstance(request, m.Forward | m.Evaluate | m.Save):
                scene = Scene(side, first, request, earlier)
                for data in ATTACKS[name](scene):
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
    """What the server says. Raises RpcError."""
    for data in call:
        for piece in split(data):
            yield side.receive(piece).message


def main(address: str, config: Path, ca: Path) -> None:
    """Attack until the server is gone."""
    hello = worker_of(RunConfig.of(read_toml(config)), 2, name=NAME, run="sglr").hello()
    security = ClientSecurity(ca / "ca.crt", ca / f"{NAME}.crt", ca / f"{NAME}.key")
    options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    earlier = [pack(m.ModelUp(0), (), 1, 1)]
    with grpc.secure_channel(address, security.credentials(address), options) as channel:
        grpc.channel_ready_future(channel).result(timeout=120)
    rounds = 0
    while True:
        for name in ATTACKS:
            if name == "oversized" and rounds:
                continue  # a quarter of a gigabyte: once is enough
            code, said = "RESOURCE_EXHAUSTED", TOO_OFTEN
            while TOO_OFTEN in said:  # the server slows down whoever comes so often
                with grpc.secure_channel(address, security.credentials(address), options) as channel:
                    code, said = attack(channel, name, hello, earlier)
                time.sleep(1.0 if TOO_OFTEN in said else 0.0)
            print(json.dumps([name, code, said]), flush=True)  # noqa: T201
            if code in ("BYE", "UNAVAILABLE"):
                return
        rounds += 1


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
