"""The wire with arbitrary input: every message that is not correct raises WireError, quickly and with little memory."""

from __future__ import annotations

import contextlib
import random
import struct
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from test_wire import TO_CLIENT, TO_SERVER, numbers

from cutlayer.errors import WireError
from cutlayer.models import Crossing
from cutlayer.wire import (
    Codec,
    Limits,
    ServerSide,
    decode,
    decode_named,
    described,
    encode,
    encode_named,
    pack,
    unpack,
)
from cutlayer.wire import messages as m

MEGABYTE = 1 << 20
ROWS = 5
NAMES = ["raw", "bfloat16", "float16", "int8", "float8", "top-k:0.3", "raw+zstd", "int8+zstd", "top-k:0.3+zstd"]
LIKE = [Crossing((3, 4), torch.float32), Crossing((), torch.bool)]
TENSORS = [numbers((ROWS, 3, 4), torch.float32, 0), torch.tensor([True, False, True, True, False])]
BODIES = {name: b"".join(encode(TENSORS, Codec.parse(name))) for name in NAMES}
STATE = {"0.weight": torch.randn(3, 2), "0.bias": torch.zeros(3), "n": torch.tensor(4)}
FRAMES = [(pack(x, encode(TENSORS), 3, 9), "to server") for x in TO_SERVER]
FRAMES += [(pack(x, encode(TENSORS), 3, 9), "to client") for x in TO_CLIENT]


@contextlib.contextmanager
def bounded(seconds: float = 2.0, memory: int = 4 * MEGABYTE) -> Iterator[None]:
    """Fails if the block computes for longer, or allocates more memory."""
    tracemalloc.start()
    start = time.process_time()
    try:
        yield
        took, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert took < seconds
    assert peak < memory


def repaired(data: bytes) -> bytes:
    """The frame with a correct checksum, as a forger would make it."""
    if len(data) < 40:
        return data
    return data[:32] + struct.pack("<Q", xxhash.xxh3_64_intdigest(data[:32] + data[40:])) + data[40:]


def mutate(data: bytes, rng: random.Random, start: int = 0) -> bytes:
    """One to four random changes after `start`: bits, bytes, extreme numbers, cuts, insertions."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(start, max(len(changed), start + 1))
        kind = rng.randrange(6)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at : at + 1] = bytes([rng.choice([0, 1, 0x7F, 0x80, 0xFF, 0xDD, 0xDF, 0xDB])])
        elif kind == 2:
            size = rng.choice([2, 4, 8])
            changed[at : at + size] = rng.choice([0, 1, (1 << 8 * size) - 1, 1 << (8 * size - 1)]).to_bytes(
                size, "little"
            )
        elif kind == 3:
            del changed[at : at + rng.randint(1, 20)]
        elif kind == 4:
            changed[at:at] = rng.randbytes(rng.randint(1, 20))
        else:
            end = rng.randrange(start, len(changed) + 1)
            changed[at:at] = changed[min(at, end) : end]
    return bytes(changed)


def refused_or_right(data: bytes, direction: Any) -> None:
    """Any frame raises WireError or gives a message of the right kind."""
    try:
        frame = unpack(data, direction)
    except WireError:
        return
    assert isinstance(frame.message, m.FromClient if direction == "to server" else m.FromServer)


def decoded_or_refused(body: bytes, name: str) -> None:
    """Any body raises WireError or gives tensors of the expected kind."""
    try:
        tensors = decode(body, LIKE, ROWS, Codec.parse(name))
    except WireError:
        return
    assert [(t.shape, t.dtype) for t in tensors] == [(t.shape, t.dtype) for t in TENSORS]
    assert int(tensors[1].view(torch.uint8).max()) <= 1


def named_or_refused(body: bytes) -> None:
    try:
        state = decode_named(body, described(STATE))
    except WireError:
        return
    assert described(state) == described(STATE)


# Damage: each one is found


@given(st.sampled_from(FRAMES), st.data())
@settings(max_examples=300)
def test_every_flipped_bit_is_found(sample: tuple[bytes, Any], data: st.DataObject) -> None:
    frame, direction = sample
    bit = data.draw(st.integers(0, 8 * len(frame) - 1))
    changed = bytearray(frame)
    changed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(WireError):
        unpack(changed, direction)


def test_every_truncation_and_every_extension_is_found() -> None:
    frame, direction = FRAMES[0]
    for size in range(len(frame)):
        for data in (frame[:size], repaired(frame[:size])):
            with pytest.raises(WireError):
                unpack(data, direction)
    for more in (b"\0", b"\0" * 16, frame):
        with pytest.raises(WireError, match="cut off or run on"):
            unpack(repaired(frame + more), direction)


@pytest.mark.parametrize("name", NAMES)
def test_every_truncation_of_tensors_is_found(name: str) -> None:
    body = BODIES[name]
    for size in range(len(body)):
        with pytest.raises(WireError):
            decode(body[:size], LIKE, ROWS, Codec.parse(name))
    with pytest.raises(WireError, match="follow the last tensor"):
        decode(body + b"\0" * 16, LIKE, ROWS, Codec.parse(name))


@given(st.binary(max_size=400), st.sampled_from(["to server", "to client"]), st.booleans())
def test_foreign_bytes(data: bytes, direction: Any, ours: bool) -> None:
    with pytest.raises(WireError):
        unpack(b"CUT3" + data if ours else data, direction)
    with pytest.raises(WireError):
        ServerSide().receive(data)
    for name in NAMES:
        decoded_or_refused(data, name)
    named_or_refused(data)


# Forgery: only WireError, or messages of the right form


def fuzz(rng: random.Random) -> None:
    """Mutate one frame and one body of each kind."""
    frame, direction = rng.choice(FRAMES)
    refused_or_right(mutate(frame, rng), direction)
    refused_or_right(repaired(mutate(frame, rng, rng.choice([0, 40]))), direction)
    name = rng.choice(NAMES)
    decoded_or_refused(mutate(BODIES[name], rng), name)
    decoded_or_refused(BODIES[rng.choice(NAMES)], name)
    named_or_refused(mutate(b"".join(encode_named(STATE)), rng))


@given(st.integers(0, 1 << 30))
@settings(max_examples=300)
def test_forged_messages(seed: int) -> None:
    fuzz(random.Random(seed))


def test_forged_messages_cost_little() -> None:
    rng = random.Random(0)
    with bounded(seconds=20.0):
        for _ in range(500):
            fuzz(rng)


@pytest.mark.slow
def test_forged_messages_for_minutes() -> None:
    rng = random.Random(1)
    until = time.monotonic() + 100
    while time.monotonic() < until:
        with bounded(seconds=20.0):
            for _ in range(200):
                fuzz(rng)


# Bombs: small messages that claim to be large


def header(message: str, **fields: bytes) -> bytes:
    """A message in MessagePack, with fields given as bytes on the wire."""
    encoded = msgspec.msgpack.encode
    pairs = [encoded("type") + encoded(message), *(encoded(k) + v for k, v in fields.items())]
    return bytes([0x80 + len(pairs)]) + b"".join(pairs)


def framed(head: bytes) -> bytes:
    """A frame around the given header."""
    start = -(-(40 + len(head)) // 16) * 16
    place = struct.pack("<4sIQQQQ", f"CUT{m.PROTOCOL}".encode(), len(head), 0, 0, 0, 0)
    return repaired(place + head.ljust(start - 40, b"\0"))


STEP = b"\x01"
HOSTILE = [
    header("Fitted", step=STEP, losses=b"\xdd\xff\xff\xff\xff"),  # 4 294 967 295 losses
    header("Fitted", step=STEP, losses=b"\xdd\x00\x00\xff\xff"),
    header("Failed", step=STEP, kind=b"\xdb\xff\xff\xff\xff", sentence=b"\xa0"),  # a name of four gigabytes
    header("Failed", step=STEP, kind=b"\xa2\xff\xfe", sentence=b"\xa0"),  # not UTF-8
    header("Model", step=b"\x91" * 100_000),  # very deep nesting
    header("Model", step=STEP, more=b"\x91" * 100_000),
    header("Model", more=b"\xdf\xff\xff\xff\xff"),
    header("Model", step=b"\xcb" + struct.pack(">d", 1.0)),
    header("Model", step=b"\xa11"),
    header("Model", step=b"\xc0"),
    header("Model"),
    header("Nothing", step=STEP),
    b"\x91" * 100_000,
    b"\xdf\xff\xff\xff\xff",
    b"\xdd\xff\xff\xff\xff",
    b"\xc1",
    b"",
]


@pytest.mark.parametrize("head", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_headers(head: bytes) -> None:
    data = framed(head)
    with bounded(seconds=1.0, memory=MEGABYTE), pytest.raises(WireError, match="cannot be understood"):
        unpack(data, "to server")


def test_framed_makes_frames() -> None:
    """Otherwise the headers above could be refused for another reason."""
    assert unpack(framed(header("Model", step=STEP)), "to server").message == m.ModelUp(1)


def zstd_body(payload: bytes) -> bytes:
    """The body of one float32 tensor [2, 3] with this compressed payload."""
    record = struct.pack("<BBBIIQ", 0, 0x80, 2, 2, 3, len(payload)).ljust(32, b"\0")
    return struct.pack("<I12x", 1) + record + payload + bytes(-len(payload) % 16)


def receive_zstd(payload: bytes) -> torch.Tensor:
    return decode(zstd_body(payload), [Crossing((3,), torch.float32)], 2, Codec.parse("raw+zstd"))[0]


def undeclared(size: int) -> bytes:
    """`size` compressed zeros, without the number of zeros."""
    return zstandard.ZstdCompressor(write_content_size=False).compress(bytes(size))


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (zstandard.compress(bytes(64 * MEGABYTE)), "declares 67108864 bytes"),
        (undeclared(64 * MEGABYTE), "declares"),
        (undeclared(24), "declares"),
        (zstandard.compress(bytes(23)), "declares 23 bytes"),
        (zstandard.compress(bytes(24)) + zstandard.compress(bytes(MEGABYTE)), "cannot be decompressed"),
        (zstandard.compress(bytes(24))[:-1], "cannot be decompressed|has"),
        (struct.pack("<II", 0x184D2A50, 24) + bytes(24), "declares|cannot be decompressed|has"),  # a skippable frame
        (b"", "cannot be decompressed"),
        (b"nonsense", "cannot be decompressed"),
    ],
    ids=["bomb", "undeclared bomb", "undeclared", "short", "two frames", "cut off", "skippable", "empty", "nonsense"],
)
def test_zstandard_is_not_believed(payload: bytes, says: str) -> None:
    with bounded(seconds=1.0, memory=MEGABYTE), pytest.raises(WireError, match=says):
        receive_zstd(payload)


def test_a_frame_that_lies_about_its_size() -> None:
    """The frame declares the expected 24 bytes, but contains a megabyte."""
    honest = zstandard.compress(bytes(MEGABYTE))
    parameters = zstandard.get_frame_parameters(honest)
    assert parameters.content_size == MEGABYTE
    at = honest.index(struct.pack("<I", MEGABYTE), 4)
    lie = honest[:at] + struct.pack("<I", 24) + honest[at + 4 :]
    assert zstandard.get_frame_parameters(lie).content_size == 24
    with bounded(seconds=1.0, memory=MEGABYTE), pytest.raises(WireError, match=r"cannot be decompressed|has"):
        receive_zstd(lie)


def test_zstd_body_makes_bodies() -> None:
    assert torch.equal(receive_zstd(zstandard.compress(bytes(24))), torch.zeros(2, 3))


def test_sizes_that_are_only_said() -> None:
    """A few bytes claim dimensions and lengths of gigabytes."""
    for record in (
        struct.pack("<BBBIIQ", 0, 0, 2, 1 << 31, 1 << 31, 1 << 62),
        struct.pack("<BBBIIQ", 0, 0, 2, 2, 3, 1 << 62),
        struct.pack("<BBBIIQ", 0, 0, 2, 2, 3, (1 << 64) - 1),
        struct.pack("<BBB", 0, 0, 255),
        struct.pack("<BBBIIQ", 200, 0, 2, 2, 3, 24),
        struct.pack("<BBBIIQ", 0, 77, 2, 2, 3, 24),
    ):
        body = struct.pack("<I12x", 1) + record.ljust(32, b"\0") + bytes(32)
        with bounded(seconds=1.0, memory=MEGABYTE), pytest.raises(WireError):
            decode(body, [Crossing((3,), torch.float32)], 2)
    with bounded(seconds=1.0, memory=MEGABYTE), pytest.raises(WireError, match="4294967295 tensors"):
        decode(struct.pack("<I12x", (1 << 32) - 1), [Crossing((3,), torch.float32)], 2)
    with bounded(seconds=1.0, memory=MEGABYTE), pytest.raises(WireError, match="are accepted here"):
        decode(b"", [Crossing((1 << 30,), torch.float32)], 1 << 19)


def test_positions_of_top_k() -> None:
    """Positions beyond the row, repeated, or in the wrong order."""
    codec, like = Codec.parse("top-k:0.5"), [Crossing((4,), torch.float32)]
    body = b"".join(encode([torch.tensor([[1.0, 2.0, 0.0, 0.0]])], codec))
    good = struct.pack("<HH", 0, 1)
    assert body.count(good) == 1
    for positions in ((0, 4), (0, 65535), (1, 1), (1, 0)):
        with pytest.raises(WireError, match="not in order or beyond"):
            decode(body.replace(good, struct.pack("<HH", *positions)), like, 1, codec)


def test_a_message_over_the_limit_is_not_looked_at() -> None:
    data = pack(m.SmashedUp(0, 4), encode([torch.zeros(MEGABYTE)]))
    with bounded(seconds=0.5, memory=MEGABYTE // 4), pytest.raises(WireError, match="are accepted here"):
        unpack(data, "to server", Limits(message_bytes=MEGABYTE))
