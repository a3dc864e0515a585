"""The limits of a receiver: every size is compared with them before memory is allocated for it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """`message_bytes` of a whole message, and of all its tensors once they are decoded; `header_bytes` of the part
    before the tensors; `tensors` in a message, each of rank `rank` at most; `rows` of a batch; `name_bytes` of a
    tensor's name in UTF-8; `asked` requests that wait for their answers at once.
    """

    message_bytes: int = 1 << 28
    header_bytes: int = 1 << 20
    tensors: int = 4096
    rank: int = 16
    rows: int = 1 << 20
    name_bytes: int = 1024
    asked: int = 16
