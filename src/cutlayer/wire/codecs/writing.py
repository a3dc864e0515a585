"""How the numbers of a tensor are written: as they are, or in fewer bytes with a bound on the error.

A codec applies to one tensor at a time, and only to the types that it names: all other tensors are written as they
are. NaN and Inf must be preserved: a received tensor has one if and only if the sent tensor had one, so that a check
for NaN on the other side finds it.

A codec of your own is a subclass of `Codec` under `@codec("name")`, in a file that the configuration names:
`up_codec = "path/to/file.py:Name"`, or `path/to/file.py:Name:ARGUMENT`. Both sides of a deployment name it, and compare
its file.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self, TypeVar

import numpy as np
import torch
import zstandard
from torch import Tensor

from cutlayer import plugins
from cutlayer.data.own import own_code
from cutlayer.errors import ConfigError, WireError

OWN = 0x7F
"""The number in messages for a codec from outside this package. Both sides know from their configurations which codec
it is.
"""
_ZSTD = "+zstd"


@dataclass(frozen=True)
class Codec(ABC):
    """How tensors are written; with `zstd` the bytes are then compressed without loss.

    A subclass says how many bytes a tensor takes, writes and reads it, and bounds the error. It is only asked about
    tensors with at least one number, of a type to which it applies. Fields, if any, make it a frozen dataclass.
    """

    entry: ClassVar[plugins.Entry]
    code: ClassVar[int] = OWN
    """The codec's number in messages."""
    lossy: ClassVar[bool] = True
    """Whether received numbers can differ from those sent."""
    example: ClassVar[str] = ""
    """The argument that a table of all codecs uses for it; empty if it takes none."""

    zstd: bool = field(default=False, kw_only=True)

    @staticmethod
    def parse(text: str) -> Codec:
        """The codec that `text` names: NAME, file.py:NAME or module:NAME, then :ARGUMENT and +zstd if wanted.

        Raises ConfigError.
        """
        body = text.removesuffix(_ZSTD)
        if "+" in body and not plugins.is_reference(_parted(body)[0]):
            name = body.partition("+")[0]
            raise ConfigError(f"codec {text!r}: only zstd can follow the +, e.g. {name}{_ZSTD}")
        reference, argument = _parted(body)
        plugins.find("codec", reference)
        made = plugins.load("codec", reference)
        if not (isinstance(made, type) and issubclass(made, Codec)):
            raise ConfigError(f"codec {text!r}: {reference} is not a subclass of cutlayer.wire.Codec; make it one")
        try:
            found = made.of(argument)
        except ConfigError as error:
            raise ConfigError(f"codec {text!r}: {error}") from None
        return replace(found, zstd=body != text)

    @classmethod
    def of(cls, argument: str | None) -> Self:
        """The codec for the text after its name and a colon; None if there is none. Raises ConfigError."""
        if argument is not None:
            raise ConfigError(f"{cls.entry.name} takes no {argument!r}")
        return cls()

    @property
    def argument(self) -> str:
        """The text after the name and a colon that makes this codec; empty if it takes none."""
        return ""

    def __str__(self) -> str:
        argument = f":{self.argument}" if self.argument else ""
        return f"{self.entry.name}{argument}{_ZSTD if self.zstd else ''}"

    @property
    def plain(self) -> Codec:
        """The same without zstd."""
        return replace(self, zstd=False)

    @property
    def evaluating(self) -> Codec:
        """The codec for rows of held-out samples: the same without zstd."""
        return self.plain

    @property
    def gradient_on_support(self) -> bool:
        """Whether the gradient of rows written by the codec is set to zero where only a zero was received."""
        return False

    @property
    def agreed(self) -> str:
        """The text that both sides of a deployment compare: the name and, for your own codec, a digest of its file."""
        if self.code != OWN:
            return str(self)
        return f"{self} (file {plugins.source_digest(type(self))[:16] or 'unknown'})"

    def applies(self, dtype: torch.dtype) -> bool:
        """Whether tensors of this type are written by the codec. By default: all floating point types of 2 bytes or
        more.
        """
        return dtype.is_floating_point and dtype.itemsize >= 2

    def row_by_row(self, dimensions: int) -> bool:
        """Whether the rows of a tensor with this number of dimensions are written independently of each other.

        Then a simulation writes the rows of all clients together, which is faster. By default, they are not.
        """
        return False

    @abstractmethod
    def size(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Bytes of a tensor of this shape and type, independent of its numbers."""

    @abstractmethod
    def write(self, x: Tensor) -> list[Tensor]:
        """The tensors whose bytes are sent, one after another: `size` bytes in all."""

    @abstractmethod
    def read(self, payload: memoryview, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The tensor [shape] of type `dtype` in a received payload of `size` bytes.

        Raises WireError for bytes that `write` never produces.
        """

    @abstractmethod
    def bound(self, x: Tensor) -> Tensor:
        """At most how far each received number is from the one sent: float64, of a shape that broadcasts to x's.

        It holds for finite numbers in rows and channels that are finite throughout.
        """


C = TypeVar("C", bound=type[Codec])


def codec(name: str, *, title: str = "", paper: str = "") -> Callable[[C], C]:
    """A decorator that registers a subclass of `Codec`."""

    def decorate(made: C) -> C:
        return plugins.register("codec", name, title=title, paper=paper, code=made.code)(made)

    return decorate


def name_of(code: int) -> str:
    """The meaning of a codec's number in a message."""
    return next((e.name for e in plugins.index("codec").values() if e.facts["code"] == code), f"codec {code}")


def _parted(text: str) -> tuple[str, str | None]:
    """(name or reference, argument). A reference has a colon of its own."""
    name, colon, argument = text.partition(":")
    parts = [] if plugins.known("codec", name) else text.split(":")
    for n in range(2, len(parts) + 1):
        if plugins.is_reference(":".join(parts[:n])):
            return ":".join(parts[:n]), ":".join(parts[n:]) if len(parts) > n else None
    return name, argument if colon else None


# Tensors written by a codec, or unchanged if it does not apply


def payload_bytes(codec: Codec, shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes that a tensor of this shape and type is written in, before zstandard."""
    numbers = math.prod(shape)
    return codec.size(shape, dtype) if numbers and codec.applies(dtype) else numbers * dtype.itemsize


def write(codec: Codec, tensor: Tensor) -> list[Tensor]:
    """The payload of `tensor`, before zstandard: contiguous tensors on the CPU, whose bytes follow one another.

    They share the memory of `tensor` if nothing had to be changed. Raises ConfigError if your own codec writes another
    number of bytes than it states.
    """
    x = tensor.detach()
    if not x.numel() or not codec.applies(x.dtype):
        return [x.resolve_conj().resolve_neg().cpu().contiguous()]
    with own_code(codec, f"the codec {codec}"):
        pieces = [piece.cpu().contiguous() for piece in codec.write(x)]
    size, said = sum(piece.nbytes for piece in pieces), codec.size(x.shape, x.dtype)
    if size != said:
        raise ConfigError(
            f"the codec {codec} wrote {size} bytes for {tuple(x.shape)} of {x.dtype}, its `size` says {said}: correct "
            "one of them"
        )
    return pieces


def raw_bytes(piece: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, which share its memory."""
    flat = piece.reshape(-1)
    flat = flat.as_strided(flat.shape, (1,))  # a single number is contiguous whatever its stride, but not viewed so
    data: memoryview = flat.view(torch.uint8).numpy().data
    return data


def compressed(payload: bytes) -> bytes:
    """A payload compressed by zstd, which declares its size."""
    return zstandard.ZstdCompressor(level=1).compress(payload)


def read(codec: Codec, payload: memoryview, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The tensor [shape] of type `dtype` that was written as `payload`, which has `payload_bytes` bytes.

    A tensor that was written as it is shares the payload's memory where that is writable and aligned. Raises WireError
    for a payload that `write` never produces: truth values other than 0 and 1, positions outside a row or not in order.
    """
    if not payload or not codec.applies(dtype):
        return as_it_is(payload, shape, dtype)
    return codec.read(payload, shape, dtype)


def error_bound(codec: Codec, tensor: Tensor) -> Tensor:
    """At most how far each received number is from the one sent: float64, of a shape that broadcasts to the tensor's.

    It holds for finite numbers in rows and channels that are finite throughout.
    """
    x = tensor.detach().cpu()
    return codec.bound(x) if x.numel() and codec.applies(x.dtype) else torch.zeros((), dtype=torch.float64)


def as_tensor(data: memoryview, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor with its own memory, copied from `data`, the bytes of this shape and type."""
    if not data:
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy()).view(dtype).view(tuple(shape))


def as_it_is(data: memoryview, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The tensor whose own bytes `data` are; it shares them if it can. Raises WireError."""
    aligned = bool(data) and np.frombuffer(data, np.uint8).ctypes.data % dtype.itemsize == 0
    if data.readonly or not aligned:
        tensor = as_tensor(data, shape, dtype)
    else:
        tensor = torch.frombuffer(data, dtype=torch.uint8).view(dtype).view(tuple(shape))
    if dtype == torch.bool and tensor.numel() and int(tensor.view(torch.uint8).max()) > 1:
        raise WireError("a tensor of truth values holds bytes other than 0 and 1: the message was damaged on its way")
    return tensor
