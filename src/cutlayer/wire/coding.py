"""How codecs change rows between clients and server, and how many bytes the rows take.

Every client's rows are written by themselves, as they are when clients are on other machines. A common gradient is
written once.

Shape legend: R rows of all clients, b_k those of client k, s... the shape of one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cutlayer.data.own import own_code
from cutlayer.types import Rows
from cutlayer.wire.codecs import RAW, Codec, compressed, payload_bytes, raw_bytes, read, write


@dataclass(frozen=True)
class Coding:
    """The codecs for rows that go `up` (smashed data; in the U-shaped split also gradients) and `down` (cut gradients,
    features). `carried`: the carrier of the rows applies the codecs, and only the bytes are counted here.
    """

    up: Codec = RAW
    down: Codec = RAW
    carried: bool = False

    def rows(self, codec: Codec, rows: Rows, sizes: Sequence[int]) -> tuple[Rows, np.ndarray]:
        """Concatenated rows, each [R, s...], as they are received; bytes [C] of each client's b_k = `sizes` rows."""
        counts = np.zeros(len(sizes), np.int64)
        if not sizes:  # of no single client: all clients get the common gradient
            return rows, counts
        received = []
        for tensor in rows:
            each = math.prod(tensor.shape[1:]) * tensor.element_size()
            if not codec.applies(tensor.dtype) and not codec.zstd:
                counts += np.array(sizes, np.int64) * each
                received.append(tensor)
                continue
            if codec.zstd or not (self.carried or codec.row_by_row(tensor.dim())):
                parts = [written(codec, part, decode=not self.carried) for part in tensor.split(list(sizes))]
                counts += [size for _, size in parts]
                received.append(tensor if self.carried else torch.cat([part for part, _ in parts]))
            else:  # writing the rows together gives the same result
                counts += [payload_bytes(codec, (size, *tensor.shape[1:]), tensor.dtype) for size in sizes]
                received.append(tensor if self.carried else written(codec, tensor)[0])
        return tuple(received), counts

    def common(self, rows: Rows) -> tuple[Rows, int]:
        """A common gradient as it is received, each [max b_k, s...] or [1, s...], and its bytes."""
        coded, counts = self.rows(self.down, rows, [len(rows[0])] if rows else [])
        return coded, int(counts.sum())


def written(codec: Codec, tensor: Tensor, *, decode: bool = True) -> tuple[Tensor, int]:
    """`tensor` as it is received (with `decode`), and the bytes of its payload."""
    data = b"".join(raw_bytes(piece) for piece in write(codec, tensor))
    size = len(compressed(data)) if codec.zstd else len(data)
    if not decode:
        return tensor, size
    with own_code(codec, f"the codec {codec}"):
        received = read(codec, memoryview(data), tuple(tensor.shape), tensor.dtype)
    return received.to(tensor.device), size
