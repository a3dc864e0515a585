"""Tensors as bytes: no pickle, and no memory is allocated before the content is known to be as expected.

A body is a sequence of records. All integers are little-endian, and everything is padded with zeros to multiples of 16
bytes, so that tensors can be used in place:

    u32 number of tensors | pad
    per tensor:  (named tensors: u16 length | name in UTF-8)
                 u8 type | u8 codec | u8 rank | rank x u32 dimensions | u64 length | pad | payload | pad

The receiver knows which types, dimensions, names and codec to expect, and says what it received instead.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence

import torch
import zstandard
from torch import Tensor

from cutlayer.errors import WireError
from cutlayer.models.parts import Crossing
from cutlayer.types import Rows
from cutlayer.wire.codecs import RAW, Codec, compressed, name_of, payload_bytes, raw_bytes, read, write
from cutlayer.wire.limits import Limits

Buffer = bytes | bytearray | memoryview
Codecs = Codec | Sequence[Codec]
"""One codec for all tensors, or one for each (labels raw, say, behind compressed features)."""

ALIGNED = 16
# fmt: off
_NAMES = (  # in the order of their codes on the wire
    "float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
    "uint16", "uint32", "uint64", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2",
)
# fmt: on
TYPES: Mapping[str, torch.dtype] = {name: getattr(torch, name) for name in _NAMES}
_CODES = {dtype: code for code, dtype in enumerate(TYPES.values())}
_ZSTD = 0x80
_COUNT, _NAME, _START, _LENGTH = (struct.Struct(f) for f in ("<I", "<H", "<BBB", "<Q"))

if sys.byteorder != "little":  # numbers are sent as they are in memory
    raise ImportError("cutlayer.wire needs a machine that stores the low byte of a number first")


def encode(tensors: Sequence[Tensor], codec: Codecs = RAW) -> list[Buffer]:
    """The body of `tensors`, each of any shape, as consecutive buffers.

    Without a lossy codec they share the tensors' memory: join or send them before a tensor changes. Raises WireError
    for a tensor that is not dense or of a type that cannot be sent.
    """
    return _encode([(None, tensor) for tensor in tensors], codec)


def encode_named(tensors: Mapping[str, Tensor], codec: Codecs = RAW) -> list[Buffer]:
    """The body of named tensors (a state dict, say), in the mapping's order. Raises WireError as `encode` does."""
    return _encode(list(tensors.items()), codec)


def decode(
    body: Buffer, like: Sequence[Crossing], rows: int, codec: Codecs = RAW, limits: Limits | None = None
) -> Rows:
    """The tensors in `body`, which must be `rows` rows of each of `like`: each [rows, *shape].

    Raw tensors share the memory of `body` if it is writable. Raises WireError for any other content.
    """
    expected = [(None, Crossing((rows, *c.shape), c.dtype)) for c in like]
    limits = limits or Limits()
    if not 0 <= rows <= limits.rows:
        raise WireError(f"a message of {rows} rows: 0 to {limits.rows} are accepted here")
    return tuple(tensor for _, tensor in _decode(body, expected, codec, limits))


def decode_named(
    body: Buffer, like: Mapping[str, Crossing], codec: Codecs = RAW, limits: Limits | None = None
) -> dict[str, Tensor]:
    """The named tensors in `body`, which must be those of `like` (whole shapes), in its order, each exactly once.

    Raises WireError for any other content.
    """
    found = _decode(body, list(like.items()), codec, limits or Limits())
    return {name: tensor for name, tensor in found if name is not None}


def described(tensors: Mapping[str, Tensor]) -> dict[str, Crossing]:
    """The argument of `decode_named` for receiving tensors like these."""
    return {name: Crossing(tuple(t.shape), t.dtype) for name, t in tensors.items()}


def payload_sizes(body: Buffer) -> list[int]:
    """Bytes of each tensor's payload in a body of unnamed tensors that has been decoded; with zstd, the compressed
    bytes.
    """
    reader = _Reader(body)
    (count,) = reader.unpack(_COUNT, "the number of tensors")
    reader.skip()
    sizes: list[int] = []
    for _ in range(count):
        _, _, rank = reader.unpack(_START, "a description")
        reader.take(4 * rank, "dimensions")
        sizes += reader.unpack(_LENGTH, "a length")
        reader.skip()
        reader.take(sizes[-1], "a payload")
        reader.skip()
    return sizes


def encoded_bytes(like: Sequence[Crossing], rows: int, codec: Codecs = RAW) -> int | None:
    """Bytes of the body of `rows` rows of each of `like`; None if they depend on the numbers, because of zstandard."""
    expected = [(None, Crossing((rows, *c.shape), c.dtype)) for c in like]
    return _encoded_bytes(expected, codec)


def encoded_bytes_named(like: Mapping[str, Crossing], codec: Codecs = RAW) -> int | None:
    """Bytes of the body of named tensors of these whole shapes; None as in `encoded_bytes`."""
    return _encoded_bytes(list(like.items()), codec)


def padded(size: int) -> int:
    """The next multiple of 16."""
    return -(-size // ALIGNED) * ALIGNED


def size_of(buffers: Sequence[Buffer]) -> int:
    """Bytes of all buffers together."""
    total = 0
    for buffer in buffers:
        total += buffer.nbytes if type(buffer) is memoryview else len(buffer)
    return total


def _encode(tensors: Sequence[tuple[str | None, Tensor]], codec: Codecs) -> list[Buffer]:
    buffers: list[Buffer] = [_pad(_COUNT.pack(len(tensors)))]
    for (name, tensor), one in zip(tensors, _each(codec, len(tensors)), strict=True):
        if tensor.layout != torch.strided or tensor.dtype not in _CODES:
            raise WireError(
                f"a {tensor.layout} tensor of {tensor.dtype} cannot be sent: make it dense, of a usual type"
            )
        payload = [raw_bytes(piece) for piece in write(one, tensor)]
        if one.zstd:
            payload = [memoryview(compressed(b"".join(payload)))]
        length = size_of(payload)
        buffers += [_head(name, tensor.dtype, tuple(tensor.shape), one, length), *(p for p in payload if p.nbytes)]
        if length % ALIGNED:
            buffers.append(bytes(-length % ALIGNED))
    return buffers


def _head(name: str | None, dtype: torch.dtype, shape: tuple[int, ...], codec: Codec, length: int) -> bytes:
    """The part of a record before its payload."""
    if len(shape) > 255 or any(d >= 1 << 32 for d in shape):
        raise WireError(f"a tensor of shape {shape} cannot be sent: 255 dimensions below 2^32 are possible")
    text = name.encode() if name is not None else b""
    if len(text) >= 1 << 16:
        raise WireError(f"the name {text[:40]!r}... of a tensor has {len(text)} bytes: {(1 << 16) - 1} are possible")
    label = b"" if name is None else _NAME.pack(len(text)) + text
    start = _START.pack(_CODES[dtype], _code(codec, dtype), len(shape)) + struct.pack(f"<{len(shape)}I", *shape)
    return _pad(label + start + _LENGTH.pack(length))


def _code(codec: Codec, dtype: torch.dtype) -> int:
    """The code in a message for how a tensor of this type is written."""
    return (codec.code if codec.applies(dtype) else RAW.code) | _ZSTD * codec.zstd


def _decode(
    body: Buffer, expected: Sequence[tuple[str | None, Crossing]], codec: Codecs, limits: Limits
) -> Iterator[tuple[str | None, Tensor]]:
    """Tensor by tensor: after a fault, the tensors decoded so far are dropped with the generator."""
    reader = _Reader(body)
    whole = sum(math.prod(c.shape) * c.dtype.itemsize for _, c in expected)
    if whole > limits.message_bytes or len(reader.view) > limits.message_bytes:
        raise WireError(
            f"tensors of {whole} bytes in {len(reader.view)}: {limits.message_bytes} are accepted here; raise the "
            "limit (--message-limit), or send smaller batches"
        )
    if len(expected) > limits.tensors:
        raise WireError(f"{len(expected)} tensors are expected: {limits.tensors} are accepted here")
    (count,) = reader.unpack(_COUNT, "the number of tensors")
    reader.skip()
    if count != len(expected):
        raise WireError(f"a message of {count} tensors came where {len(expected)} were expected")
    for number, ((name, one), way) in enumerate(zip(expected, _each(codec, count), strict=True)):
        what = f"tensor {number}" if name is None else f"tensor {name!r}"
        if name is not None:
            _check_name(reader, name, limits)
        yield name, _record(reader, what, one, way, limits)
    if reader.at != len(reader.view):
        raise WireError(f"{len(reader.view) - reader.at} bytes follow the last tensor: the message is damaged")


def _check_name(reader: _Reader, name: str, limits: Limits) -> None:
    (length,) = reader.unpack(_NAME, "a name's length")
    if length > limits.name_bytes:
        raise WireError(f"a tensor's name of {length} bytes: {limits.name_bytes} are accepted here")
    came = bytes(reader.take(length, "a name"))
    if came != name.encode():
        shown = came.decode(errors="replace")[:80]
        raise WireError(f"tensor {name!r} was expected, {shown!r} came: both sides need the same model and cut")


def _record(reader: _Reader, what: str, expected: Crossing, codec: Codec, limits: Limits) -> Tensor:
    code, kind, rank = reader.unpack(_START, f"{what}'s description")
    if rank > limits.rank:
        raise WireError(f"{what} has {rank} dimensions: {limits.rank} are accepted here")
    shape = struct.unpack(f"<{rank}I", reader.take(4 * rank, f"{what}'s dimensions"))
    if code >= len(TYPES) or expected != Crossing(shape, TYPES[_NAMES[code]]):
        came = _NAMES[code] if code < len(TYPES) else f"type {code}"
        raise WireError(
            f"{what} must be {_type_name(expected.dtype)} {list(expected.shape)}, {came} {list(shape)} came: both "
            "sides need the same model, cut and batch"
        )
    if kind != _code(codec, expected.dtype):
        came = f"{name_of(kind & ~_ZSTD)}{'+zstd' if kind & _ZSTD else ''}"
        raise WireError(f"{what} came as {came} where {codec} was agreed: both sides need the same codec")
    (length,) = reader.unpack(_LENGTH, f"{what}'s length")
    reader.skip()
    size = payload_bytes(codec, expected.shape, expected.dtype)
    if length != size and not codec.zstd:
        raise WireError(f"{what} has {length} bytes where {size} were expected: the message is damaged")
    payload = reader.take(length, what)
    reader.skip()
    plain = _decompressed(payload, size, what) if codec.zstd else payload
    return read(codec, plain, expected.shape, expected.dtype)


def _decompressed(payload: memoryview, size: int, what: str) -> memoryview:
    """`size` bytes. The size that the frame declares is checked first, since zstandard trusts it regardless of its own
    bound.
    """
    try:
        declared = zstandard.get_frame_parameters(payload).content_size
        if declared != size:
            raise WireError(f"{what} declares {declared} bytes behind zstd where {size} were expected: it is damaged")
        # One byte is allowed where none is expected: 0 would mean no bound.
        plain = zstandard.ZstdDecompressor().decompress(payload, max_output_size=max(size, 1), allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise WireError(f"{what} cannot be decompressed ({error}): the message is damaged") from None
    if len(plain) != size:
        raise WireError(f"{what} has {len(plain)} bytes behind zstd where {size} were expected: it is damaged")
    return memoryview(plain)


class _Reader:
    """Takes bytes from a body, one piece after another. Raises WireError if the body ends too early."""

    def __init__(self, body: Buffer) -> None:
        self.view, self.at = memoryview(body).cast("B"), 0

    def take(self, size: int, what: str) -> memoryview:
        """The next `size` bytes."""
        if size > len(self.view) - self.at:
            raise WireError(
                f"the message ends within {what}: {size} bytes were to come, {len(self.view) - self.at} did"
            )
        self.at += size
        return self.view[self.at - size : self.at]

    def unpack(self, form: struct.Struct, what: str) -> tuple[int, ...]:
        """The next integers."""
        return form.unpack(self.take(form.size, what))

    def skip(self) -> None:
        """Padding up to the next multiple of 16."""
        if any(self.take(-self.at % ALIGNED, "padding")):
            raise WireError("padding between tensors is not zero: the message is damaged")


def _encoded_bytes(expected: Sequence[tuple[str | None, Crossing]], codec: Codecs) -> int | None:
    total = padded(_COUNT.size)
    for (name, one), way in zip(expected, _each(codec, len(expected)), strict=True):
        if way.zstd:
            return None
        payload = payload_bytes(way, one.shape, one.dtype)
        total += len(_head(name, one.dtype, one.shape, way, payload)) + padded(payload)
    return total


def _each(codec: Codecs, count: int) -> Sequence[Codec]:
    return [codec] * count if isinstance(codec, Codec) else codec


def _pad(data: bytes) -> bytes:
    return data.ljust(padded(len(data)), b"\0")


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
