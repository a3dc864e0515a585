"""Proofs of codecs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from cutlayer.errors import ConfigError
from cutlayer.models.parts import Crossing
from cutlayer.testing.material import fail
from cutlayer.wire import Codec, Coding, decode, encode, error_bound
from cutlayer.wire.codecs import payload_bytes

_SHAPES = ((1,), (5,), (1, 1), (4, 9), (3, 2, 5, 5), (2, 8, 1, 3))
_TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_SIZES = (1e-30, 1e-4, 1.0, 1e4, 1e30)


def check_codec(reference: str | Codec | type[Codec]) -> None:
    """Test that a codec (NAME, NAME:ARGUMENT, a class or an object of it) keeps the promises of all codecs.

    - Received numbers are within its bound of the sent ones, at any magnitude. If it is not `lossy`, both are equal.
    - It writes as many bytes as its `size` says; zero rows take no bytes.
    - The receiver finds NaN and infinite numbers, and finite numbers stay finite.
    - If the codec says that it writes rows by themselves (`row_by_row`), each client's rows are received as they would
      be among those of all clients.
    - zstd changes nothing.

    Raises AssertionError, which says what does not hold and by how much, and ConfigError for an unknown codec.
    """
    made = Codec.parse(reference) if isinstance(reference, str) else reference
    codec = made if isinstance(made, Codec) else made.of(None)
    for x in _tensors():
        _check_bytes(codec, x)
        _check_bound(codec, x)
        _check_rows(codec, x)
        _check_zstd(codec, x)
        _check_not_finite(codec, x)
    _check_empty(codec)


def _tensors() -> Iterator[Tensor]:
    """Numbers of many magnitudes, a third of them zero, in all shapes and types."""
    generator = torch.Generator().manual_seed(0)
    for shape in _SHAPES:
        for dtype in _TYPES:
            most = torch.finfo(dtype).max
            for size in _SIZES:
                x = torch.randn(shape, dtype=torch.float64, generator=generator) * size
                kept = torch.rand(shape, generator=generator) > 1 / 3
                yield (x * kept).clamp(-most, most).to(dtype)


def _received(codec: Codec, x: Tensor) -> tuple[Tensor, int]:
    """The received form of x [n, ...], and its bytes."""
    try:
        body = b"".join(encode([x], codec))
    except ConfigError as error:
        fail(str(codec), f"it writes another number of bytes than it says: {error}")
    (received,) = decode(body, [Crossing(tuple(x.shape[1:]), x.dtype)], len(x), codec)
    return received, len(body)


def _check_bytes(codec: Codec, x: Tensor) -> None:
    plain = codec.plain
    pieces = _written(plain, x)
    if pieces != payload_bytes(plain, x.shape, x.dtype):
        fail(str(codec), f"it writes {pieces} bytes for {_said(x)}, its size says {plain.size(x.shape, x.dtype)}")


def _written(codec: Codec, x: Tensor) -> int:
    if not codec.applies(x.dtype):
        return x.nbytes
    return sum(piece.nbytes for piece in codec.write(x))


def _check_bound(codec: Codec, x: Tensor) -> None:
    received, _ = _received(codec, x)
    if received.shape != x.shape or received.dtype != x.dtype:
        fail(str(codec), f"of {_said(x)} comes {_said(received)}")
    if not torch.isfinite(received).all():
        fail(str(codec), f"finite numbers become infinite or NaN, in {_said(x)}")
    off = (received.double() - x.double()).abs()
    bound = error_bound(codec, x).broadcast_to(x.shape)
    if (over := off > bound).any():
        worst = (off - bound).masked_fill(~over, -math.inf).argmax()
        fail(
            str(codec),
            f"a number {float(x.reshape(-1)[worst]):.6g} is off by {float(off.reshape(-1)[worst]):.3g}, its bound says "
            f"{float(bound.reshape(-1)[worst]):.3g}, in {_said(x)}",
        )
    if not codec.lossy and not torch.equal(received, x):
        fail(str(codec), f"it says that it is not lossy, but numbers come off by {float(off.max()):.3g}, in {_said(x)}")


def _check_rows(codec: Codec, x: Tensor) -> None:
    """Rows of two clients give the same together as one after another."""
    if len(x) < 2 or not codec.applies(x.dtype):
        return
    together, _ = Coding(up=codec.plain).rows(codec.plain, (x,), [1, len(x) - 1])
    alone = torch.cat([_received(codec.plain, part)[0] for part in x.split([1, len(x) - 1])])
    if not torch.equal(together[0], alone):
        off = float((together[0].double() - alone.double()).abs().max())
        fail(str(codec), f"its rows are not written by themselves, as row_by_row says: off by {off:.3g}, in {_said(x)}")


def _check_zstd(codec: Codec, x: Tensor) -> None:
    plain, compressed = (_received(replace(codec, zstd=zstd), x)[0] for zstd in (False, True))
    if not torch.equal(plain, compressed):
        fail(str(codec), f"with zstd, the numbers differ from those without it, in {_said(x)}")


def _check_not_finite(codec: Codec, x: Tensor) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        sent = x.clone()
        sent.view(-1)[-1] = bad
        received, _ = _received(codec, sent)
        if torch.isfinite(received).all():
            fail(str(codec), f"{bad} is lost: the receiver gets only finite numbers, in {_said(x)}")


def _check_empty(codec: Codec) -> None:
    for dtype in _TYPES:
        received, _ = _received(codec, torch.empty(0, 3, dtype=dtype))
        if received.shape != (0, 3) or payload_bytes(codec, (0, 3), dtype):
            fail(str(codec), f"no rows of {dtype} are not written as nothing: {_said(received)} comes")


def _said(x: Tensor) -> str:
    return f"{tuple(x.shape)} of {x.dtype}"
