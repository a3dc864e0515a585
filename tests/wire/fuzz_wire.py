"""Coverage-guided fuzzing of everything that is read from the network.

It needs atheris (`pip install cutlayer[fuzz]`):

    python tests/wire/fuzz_wire.py [CORPUS...] [-max_total_time=SECONDS] [libFuzzer's other options]

The first byte of an input chooses the function that reads the other bytes. It may raise WireError or return a result of
the right form; anything else is a finding, and so is more time or memory than libFuzzer's options allow.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import atheris  # type: ignore[import-not-found]

with atheris.instrument_imports(include=["cutlayer.wire"]):
    from cutlayer.wire import ClientSide, Codec, ServerSide, decode, decode_named, described, encode, encode_named
    from cutlayer.wire import messages as m
    from cutlayer.wire.frames import pack, split, unpack

import torch
import xxhash

from cutlayer.errors import WireError
from cutlayer.models import Crossing

ROWS = 5
CODECS = [
    Codec.parse(n) for n in ("raw", "bfloat16", "float16", "int8", "float8", "top-k:0.3", "raw+zstd", "int8+zstd")
]
LIKE = [Crossing((3, 4), torch.float32), Crossing((), torch.bool)]
STATE = {"0.weight": torch.ones(3, 2), "0.bias": torch.zeros(3), "n": torch.tensor(4)}
TERMS = m.Terms(run="r", algorithm="psl", part="p", crossing=[], returning=[], step=m.StepTerms(batch=4))
HELLO = m.Hello(client="client-0", terms=TERMS, samples=10, mass=10)


def signed(frame: bytes, **place: int) -> bytes:
    """`frame` with a correct checksum, and with this `number` and `conversation` if they are given."""
    if len(frame) < 40:
        return frame
    if place:
        frame = frame[:16] + struct.pack("<QQ", place["conversation"], place["number"]) + frame[32:]
    return frame[:32] + struct.pack("<Q", xxhash.xxh3_64_intdigest(frame[:32] + frame[40:])) + frame[40:]


def to_server(data: bytes) -> None:
    """Read a frame as a server."""
    frame = unpack(signed(data), "to server")
    assert isinstance(frame.message, m.FromClient)


def to_client(data: bytes) -> None:
    """Read frames as a client."""
    for piece in split(data):
        assert isinstance(unpack(signed(bytes(piece)), "to client").message, m.FromServer)


def tensors(data: bytes) -> None:
    """Read the body of a message with each codec."""
    for codec in CODECS:
        with suppress(WireError):
            found = decode(data, LIKE, ROWS, codec)
            assert [(t.shape, t.dtype) for t in found] == [((ROWS, 3, 4), torch.float32), ((ROWS,), torch.bool)]


def named(data: bytes) -> None:
    """Read a model's state."""
    assert described(decode_named(data, described(STATE))) == described(STATE)


def pieces(data: bytes) -> list[bytes]:
    """Cut `data` into pieces, whose sizes it contains."""
    found = []
    while len(data) >= 2 and len(found) < 20:
        size = int.from_bytes(data[:2], "little")
        found.append(data[2 : 2 + size])
        data = data[2 + size :]
    return found


def talk_to_server(data: bytes) -> None:
    """Read answers as a server that has asked for a forward pass."""
    server = ServerSide()
    server.receive(ClientSide().send(HELLO))
    server.send(m.Welcome(0, 1, 0, TERMS))
    for number, piece in enumerate(pieces(data), 1):
        if not server.asked:
            server.send(m.Forward(number))
        server.receive(signed(piece, number=number, conversation=server.conversation))
        assert len(server.asked) < 16


def talk_to_client(data: bytes) -> None:
    """Read requests as a client that the server has welcomed."""
    server, client = ServerSide(), ClientSide()
    server.receive(client.send(HELLO))
    client.receive(server.send(m.Welcome(0, 1, 0, TERMS)))
    for number, piece in enumerate(pieces(data), 1):
        client.receive(signed(piece, number=number, conversation=client.conversation))
        assert len(client.asked) <= client.limits.asked


TARGETS: list[Callable[[bytes], None]] = [to_server, to_client, tensors, named, talk_to_server, talk_to_client]


def one(data: bytes) -> None:
    """Read one input of libFuzzer."""
    if data:
        with suppress(WireError):
            TARGETS[data[0] % len(TARGETS)](data[1:])


def seeds(folder: Path) -> None:
    """Write correct inputs for the fuzzer to begin with."""
    batch = [torch.ones(ROWS, 3, 4), torch.ones(ROWS, dtype=torch.bool)]
    found: dict[str, bytes] = {}
    said: Any
    for said in (HELLO, m.SmashedUp(1, ROWS), m.Fitted(1, [(0.5, 2, 2)]), m.Failed(1, "k", "s"), m.Saved(1, "commit")):
        frame = pack(said, encode(batch))
        found[f"0-{type(said).__name__}"] = b"\0" + frame
        found[f"4-{type(said).__name__}"] = b"\4" + len(frame).to_bytes(2, "little") + frame
    for said in (m.Welcome(0, 1, 0, TERMS), m.Forward(1), m.Backward(1, "own", 5), m.Save(1, "prepare"), m.Bye("b")):
        frame = pack(said, encode(batch))
        found[f"1-{type(said).__name__}"] = b"\1" + frame
        found[f"5-{type(said).__name__}"] = b"\5" + len(frame).to_bytes(2, "little") + frame
    for number, codec in enumerate(CODECS):
        found[f"2-{number}"] = b"\2" + b"".join(encode(batch, codec))
    found["3"] = b"\3" + b"".join(encode_named(STATE))
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in found.items():
        (folder / name).write_bytes(content)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        if not argument.startswith("-"):
            seeds(Path(argument))
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
