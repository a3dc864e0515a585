"""Frames: one message with the bytes of its tensors, as one run of bytes.

    "CUT3" | u32 length of header | u64 length of body | u64 conversation | u64 number | u64 checksum |
    header (the message in MessagePack) | zeros up to a multiple of 16 | body

All integers are little-endian. The checksum (XXH3) is over all the rest. It detects damage on the way, but not forgery.
An encrypted connection detects both, so there the sender gives no checksum: 0. `conversation` and `number` say where
the frame belongs (see `conversation.py`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, get_args

import msgspec
import xxhash

from cutlayer.errors import WireError
from cutlayer.text import plain
from cutlayer.wire.limits import Limits
from cutlayer.wire.messages import PROTOCOL, Direction, FromClient, FromServer, Message
from cutlayer.wire.tensors import ALIGNED, Buffer, padded, size_of

MAGIC = b"CUT%d" % PROTOCOL
_PREFIX, _SIZES = struct.Struct("<4sIQQQQ"), struct.Struct("<4sIQ")  # the second is the beginning of the first
PREFIX, _PLACE = _PREFIX.size, _PREFIX.size - 8  # bytes of it, and of all in it but the checksum
_NONE = 0  # for a checksum
_SENT_BY_CLIENTS = frozenset(get_args(FromClient))
_ENCODER = msgspec.msgpack.Encoder()
_DECODERS: dict[Direction, msgspec.msgpack.Decoder[Any]] = {
    "to server": msgspec.msgpack.Decoder(FromClient),
    "to client": msgspec.msgpack.Decoder(FromServer),
}


class Frame(NamedTuple):
    """A received message, with the bytes of its tensors (a view of the frame) and its place in the conversation."""

    message: Any
    body: memoryview
    number: int = 0
    conversation: int = 0


def pack(message: Message, body: Sequence[Buffer] = (), number: int = 0, conversation: int = 0) -> bytes:
    """The frame of `message` with the buffers from `tensors.encode`, and a checksum. The body is copied once.

    Raises WireError if the message exceeds a bound, so that the receiver would refuse it.
    """
    return b"".join(parts(message, body, number, conversation))


def parts(
    message: Message, body: Sequence[Buffer] = (), number: int = 0, conversation: int = 0, *, checksum: bool = True
) -> list[Buffer]:
    """The frame that `pack` returns, as consecutive buffers; the body is not copied. Raises WireError."""
    try:
        header = _ENCODER.encode(message)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise WireError(f"{message.called()} cannot be sent: {error}") from None
    _message(header, "to server" if type(message) in _SENT_BY_CLIENTS else "to client")
    prefix = _PREFIX.pack(MAGIC, len(header), size_of(body), conversation, number, _NONE)
    padding = bytes(-(PREFIX + len(header)) % ALIGNED)
    if not checksum:
        return [prefix + header + padding, *body]
    rest = [header + padding, *body]
    return [prefix[:_PLACE] + _checksum(prefix[:_PLACE], rest).to_bytes(8, "little"), *rest]


def unpack(data: Buffer, direction: Direction, limits: Limits | None = None) -> Frame:
    """The message in a frame that goes in `direction`, and its body, which is not copied.

    Raises WireError unless `data` is exactly one whole, undamaged frame of this protocol within the limits, with a
    message that goes in this direction.
    """
    limits = limits or Limits()
    view = memoryview(data).cast("B")
    size = len(view)
    if size > limits.message_bytes:
        raise WireError(
            f"a message of {size} bytes: {limits.message_bytes} are accepted here; raise the limit (--message-limit), "
            "or send smaller batches"
        )
    if size < PREFIX:
        raise WireError(f"{size} bytes are not a message, which has {PREFIX} at least: it was cut off")
    magic, header_size, body_size, conversation, number, checksum = _PREFIX.unpack_from(view)
    if magic != MAGIC:
        raise WireError(_not_ours(magic))
    if header_size > limits.header_bytes:
        raise WireError(f"a message with a header of {header_size} bytes: {limits.header_bytes} are accepted here")
    start = padded(PREFIX + header_size)
    if size != start + body_size:
        raise WireError(f"a message of {size} bytes says that it has {start + body_size}: it was cut off or run on")
    if checksum != _NONE and checksum != _checksum(view[:_PLACE], [view[PREFIX:]]):
        raise WireError("a message does not have the checksum that it says: it was damaged on its way")
    message = _message(view[PREFIX : PREFIX + header_size], direction)
    return Frame(message, view[start:], number, conversation)


def split(data: Buffer) -> Iterator[memoryview]:
    """The frames in `data`, one after another. An incomplete frame comes last, and `unpack` says what is wrong
    with it.
    """
    view = memoryview(data).cast("B")
    while len(view) >= PREFIX:
        magic, header_size, body_size = _SIZES.unpack_from(view)
        size = padded(PREFIX + header_size) + body_size
        if magic != MAGIC or size >= len(view):
            break
        yield view[:size]
        view = view[size:]
    yield view


def _message(header: Buffer, direction: Direction) -> Any:
    try:
        return _DECODERS[direction].decode(header)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise WireError(
            f"a message {direction} cannot be understood ({plain(error)}): both sides need the same version"
        ) from None


def _checksum(place: Buffer, rest: Sequence[Buffer]) -> int:
    state = xxhash.xxh3_64(place)
    for buffer in rest:
        state.update(buffer)
    return state.intdigest() or 1  # 0 means that there is none


def _not_ours(magic: bytes) -> str:
    if magic[:3] == MAGIC[:3]:
        theirs = magic[3:].decode("ascii", "backslashreplace")
        return f"a message of protocol {theirs}, this side speaks {PROTOCOL}: install the same version on both sides"
    return f"a message that begins with {magic!r} is not Cutlayer's: is another program at this address?"
