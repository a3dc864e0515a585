"""Codecs: how the numbers of a tensor are written, one file per codec.

| codec | payload | error of a number x, about | where NaN goes |
|---|---|---|---|
| raw | the bytes | none | nowhere |
| bfloat16 | 2 bytes each | |x| / 2^8 | nowhere |
| float16 | 2 bytes each | |x| / 2^11 | nowhere |
| int8 | scales, then 1 byte each | max |x| / 254 over its channel: half a scale | through its channel |
| float8 (e4m3) | scales, then 1 byte each | |x| / 2^4 + max |x| / 2^19 over its row | through its row |
| top-k:f | k = ceil(f m) values and positions per row of m numbers | none, or |x| where dropped | nowhere |
| rand-top-k:f:c | as top-k, of numbers drawn | |x| where dropped | nowhere |

`error_bound` states it in full.
"""

from cutlayer.wire.codecs.raw import RAW
from cutlayer.wire.codecs.writing import (
    OWN,
    Codec,
    as_tensor,
    codec,
    compressed,
    error_bound,
    name_of,
    payload_bytes,
    raw_bytes,
    read,
    write,
)

__all__ = [
    "OWN",
    "RAW",
    "Codec",
    "as_tensor",
    "codec",
    "compressed",
    "error_bound",
    "name_of",
    "payload_bytes",
    "raw_bytes",
    "read",
    "write",
]
