"""How the numbers of a tensor are written: as they are, or in fewer bytes with a bound on the error.

A codec applies to one tensor at a time. Only floating point tensors are ever changed, and only by codecs that make them
smaller; all others go raw. In every codec a number is received as NaN or Inf if, and only if, the sender's tensor held
one near it ("where NaN goes"), so that whoever checks for NaN finds it.

Shape legend: n rows, c the channels (dimension 1 of [n, c, ...]), m the numbers of a row, k how many of them are kept.

| codec | payload | error of a number x, about | where NaN goes |
|---|---|---|---|
| raw | the bytes | none | nowhere |
| bfloat16 | 2 bytes each | |x| / 2^8 | nowhere |
| float16 | 2 bytes each | |x| / 2^11 | nowhere |
| int8 | scales, then 1 byte each | max |x| / 254 over its channel: half a scale | through its channel |
| float8 (e4m3) | scales, then 1 byte each | |x| / 2^4 + max |x| / 2^19 over its row | through its row |
| top-k:f | k = ceil(f m) values and positions per row | none, or |x| where dropped | nowhere |

`error_bound` states it in full. A finite number beyond the largest of bfloat16 or float16 (65504) becomes that one.
top-k drops nothing larger than what it keeps; NaN and Inf count as the largest. Scales are float32 (float64 for float64
tensors). int8 has one per channel for [n, c, ...] with more than two dimensions, one per row for [n, m], one in all for
[n]; float8 one per row, one in all for [n]. Where max |x| is below 2^10 times the smallest normal number (1.2e-35 in
float32), zeros are sent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import zstandard
from torch import Tensor

from cutlayer.errors import ConfigError, WireError, unknown

KINDS = ("raw", "bfloat16", "float16", "int8", "float8", "top-k")
_HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# The largest code, a hair more: the largest number divided by its scale must not round up to beyond it, nor the product
# on the other side overflow.
_LARGEST = {"int8": 127.0001, "float8": 448.001}
_NEGLIGIBLE = 1024  # in smallest normal numbers: scales made of less would lose digits, or be flushed to zero


@dataclass(frozen=True)
class Codec:
    """How tensors are written; `fraction` of each row is kept (top-k alone); `zstd`: then compressed without loss."""

    kind: str = "raw"
    fraction: float = 1.0
    zstd: bool = False

    @classmethod
    def parse(cls, text: str) -> Codec:
        """The codec that `text` names: raw, bfloat16, float16, int8, float8 or top-k:FRACTION, with +zstd or without.

        Raises ConfigError.
        """
        name, plus, packing = text.partition("+")
        if plus and packing != "zstd":
            raise ConfigError(f"codec {text!r}: what follows the + can only be zstd, e.g. {name}+zstd")
        kind, colon, given = name.partition(":")
        if kind not in KINDS:
            raise ConfigError(unknown("codec", kind, KINDS))
        if (kind == "top-k") != bool(colon):
            what = "needs the fraction that is kept, e.g. top-k:0.1" if kind == "top-k" else f"takes no {given!r}"
            raise ConfigError(f"codec {text!r}: {kind} {what}")
        try:
            fraction = float(given) if colon else 1.0
        except ValueError:
            fraction = math.nan
        if not 0 < fraction <= 1:
            raise ConfigError(f"codec {text!r}: {given!r} is no fraction above 0 and up to 1: give e.g. top-k:0.1")
        return cls(kind, fraction, bool(plus))

    def __str__(self) -> str:
        kept = f":{self.fraction!r}" if self.kind == "top-k" else ""
        return f"{self.kind}{kept}{'+zstd' if self.zstd else ''}"

    @property
    def plain(self) -> Codec:
        """The same without zstd."""
        return replace(self, zstd=False)

    def kind_for(self, dtype: torch.dtype) -> str:
        """What is done to tensors of type `dtype`: this codec's kind, or raw where it does not apply."""
        least = 4 if self.kind in _HALVES else 2
        return self.kind if dtype.is_floating_point and dtype.itemsize >= least else "raw"


RAW = Codec()


def payload_bytes(codec: Codec, shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes that a tensor of this shape and type is written in, before zstandard."""
    kind, numbers = codec.kind_for(dtype), math.prod(shape)
    if kind == "raw" or not numbers:
        return numbers * dtype.itemsize
    if kind in _HALVES:
        return 2 * numbers
    if kind == "top-k":
        rows, k, position = _kept(codec, shape)
        return rows * k * (dtype.itemsize + position.itemsize)
    return math.prod(_scale_shape(kind, shape)) * _computed_in(dtype).itemsize + numbers


def write(codec: Codec, tensor: Tensor) -> list[Tensor]:
    """The payload of `tensor`, before zstandard: contiguous tensors on the CPU, whose bytes follow one another.

    They share the memory of `tensor` where nothing had to be changed.
    """
    x = tensor.detach()
    kind = codec.kind_for(x.dtype)
    if kind == "raw" or not x.numel():
        pieces = [x.resolve_conj().resolve_neg()]
    elif kind in _HALVES:
        pieces = [_halved(x, _HALVES[kind])]
    elif kind == "top-k":
        pieces = _largest(codec, x)
    else:
        x = x.to(_computed_in(x.dtype))
        scale = _scale(kind, x)
        q = x / torch.where(scale == 0, 1, scale)
        if kind == "float8":
            pieces = [scale, q.to(torch.float8_e4m3fn)]
        else:
            q = q if torch.isfinite(scale).all() else q.nan_to_num(0, 0, 0)  # there is no integer for NaN
            pieces = [scale, q.round_().to(torch.int8)]
    return [piece.cpu().contiguous() for piece in pieces]


def raw_bytes(piece: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, which share its memory."""
    data: memoryview = piece.reshape(-1).view(torch.uint8).numpy().data
    return data


def compressed(payload: bytes) -> bytes:
    """A payload behind zstd. What it declares is its own size."""
    return zstandard.ZstdCompressor(level=1).compress(payload)


def read(codec: Codec, payload: memoryview, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The tensor [shape] of type `dtype` that was written as `payload`, which has `payload_bytes` bytes.

    A raw tensor shares the payload's memory where that is writable and aligned. Raises WireError where the payload is
    of no tensor: truth values other than 0 and 1, positions beyond a row or not in order.
    """
    kind = codec.kind_for(dtype)
    if kind == "raw" or not payload:
        return _raw(payload, shape, dtype)
    if kind in _HALVES:
        return as_tensor(payload, shape, _HALVES[kind]).to(dtype)
    if kind == "top-k":
        return _spread(codec, payload, shape, dtype)
    scales, computed = _scale_shape(kind, shape), _computed_in(dtype)
    stop = math.prod(scales) * computed.itemsize
    scale = as_tensor(payload[:stop], scales, computed)
    q = as_tensor(payload[stop:], shape, torch.int8)
    if kind == "float8":
        # The sign, 4 bits of exponent and 3 of mantissa, put where float16 has them: 2^-8 of the number. (The types'
        # own conversion takes many times as long.)
        bits = q.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~(1 << 14))
        return bits.view(torch.float16).to(computed).mul_(scale.mul_(256)).to(dtype)
    return q.to(computed).mul_(scale).to(dtype)


def error_bound(codec: Codec, tensor: Tensor) -> Tensor:
    """At most how far each received number is from the one sent: float64, of a shape that broadcasts to the tensor's.

    Holds for finite numbers in rows and channels that are finite throughout.
    """
    kind, dtype = codec.kind_for(tensor.dtype), tensor.dtype
    x = tensor.detach().cpu().double().abs()
    if kind == "raw" or not x.numel():
        return torch.zeros((), dtype=torch.float64)
    if kind in _HALVES:
        half = torch.finfo(_HALVES[kind])
        rounding = x * (half.eps / 2 * 1.01) + max(half.tiny * half.eps, torch.finfo(torch.float32).tiny)
        return torch.where(x > half.max, x - half.max, rounding)
    if kind == "top-k":
        rows, k, _ = _kept(codec, x.shape)
        flat = x.view(rows, -1)
        kept = flat.topk(k).values[:, -1:] if k < flat.shape[1] else torch.zeros(rows, 1, dtype=torch.float64)
        return kept.view(rows, *[1] * (x.dim() - 1)) if x.dim() else kept.view(())
    computed = _computed_in(dtype)
    scale = _scale(kind, tensor.detach().cpu().to(computed)).double()
    own, info = torch.finfo(dtype), torch.finfo(computed)
    coding = 0.5001 * scale if kind == "int8" else x * (1.001 / 16) + scale * (1.001 / 1024)
    return coding + x * own.eps * 2 + own.tiny * own.eps + _NEGLIGIBLE * info.tiny


def as_tensor(data: memoryview, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor with memory of its own, copied from `data`, bytes of just that shape and type."""
    if not data:
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy()).view(dtype).view(tuple(shape))


def _raw(data: memoryview, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    aligned = bool(data) and np.frombuffer(data, np.uint8).ctypes.data % dtype.itemsize == 0
    if data.readonly or not aligned:
        tensor = as_tensor(data, shape, dtype)
    else:
        tensor = torch.frombuffer(data, dtype=torch.uint8).view(dtype).view(tuple(shape))
    if dtype == torch.bool and tensor.numel() and int(tensor.view(torch.uint8).max()) > 1:
        raise WireError("a tensor of truth values holds bytes other than 0 and 1: the message was damaged on its way")
    return tensor


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scale_shape(kind: str, shape: Sequence[int]) -> tuple[int, ...]:
    if len(shape) < 2:
        return (1,) * len(shape)
    if kind == "int8" and len(shape) > 2:
        return (1, shape[1], *[1] * (len(shape) - 2))
    return (shape[0], *[1] * (len(shape) - 1))


def _scale(kind: str, x: Tensor) -> Tensor:
    """Scales, which broadcast to x: NaN or Inf where one of the numbers is, 0 where all are negligible."""
    shape = _scale_shape(kind, x.shape)
    largest = x.abs()
    if kind == "int8" and x.dim() > 2:
        largest = largest.amax([d for d in range(x.dim()) if d != 1], keepdim=True)
    else:
        largest = (largest.flatten(1).amax(1) if x.dim() > 1 else largest.amax()).view(shape)
    scale = largest / _LARGEST[kind]
    return scale.masked_fill_(largest < _NEGLIGIBLE * torch.finfo(x.dtype).tiny, 0)


def _halved(x: Tensor, half: torch.dtype) -> Tensor:
    """x in 2 bytes; a finite number beyond the largest one becomes that one, not Inf."""
    y, largest = x.to(half), torch.finfo(half).max
    if torch.isfinite(y.sum(dtype=torch.float32)):  # usual, and quick to see
        return y
    return torch.where(torch.isfinite(x), x.clamp(-largest, largest), x).to(half)


def _kept(codec: Codec, shape: Sequence[int]) -> tuple[int, int, torch.dtype]:
    """(rows, k, the type of a position). A tensor without dimensions is one row; one row has one number at least."""
    rows = shape[0] if shape else 1
    m = math.prod(shape[1:])
    return rows, min(m, math.ceil(codec.fraction * m)), torch.uint16 if m <= 1 << 16 else torch.int32


def _largest(codec: Codec, x: Tensor) -> list[Tensor]:
    """Values [n, k] and their positions [n, k], ascending; NaN and Inf are larger than all numbers."""
    rows, k, position = _kept(codec, x.shape)
    flat = x.reshape(rows, -1)
    chosen = flat.abs().topk(k, sorted=False).indices
    # Marked and found again, they are in order: quicker than sorting.
    mark = torch.zeros(flat.shape, dtype=torch.bool, device=x.device).scatter_(1, chosen, True)
    at = mark.nonzero()[:, 1].view(rows, k)
    return [flat.gather(1, at), at.to(position)]


def _spread(codec: Codec, payload: memoryview, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The inverse of `_largest`: [shape], zero where nothing was kept."""
    rows, k, position = _kept(codec, shape)
    m, stop = math.prod(shape[1:]), rows * k * dtype.itemsize
    values = as_tensor(payload[:stop], (rows, k), dtype)
    at = as_tensor(payload[stop:], (rows, k), position).long()
    if int(at.min()) < 0 or int(at.max()) >= m or not bool((at.diff(dim=1) > 0).all()):
        raise WireError(
            f"positions of a {codec} tensor are not in order or beyond a row's {m} numbers: the message was damaged on "
            "its way"
        )
    return torch.zeros(rows, m, dtype=dtype).scatter_(1, at, values).view(tuple(shape))
