"""What a client was asked and what it answered since it started, counted."""

from __future__ import annotations

from collections import Counter

from cutlayer.remote.carrier import Answer
from cutlayer.wire.frames import Frame
from cutlayer.wire.messages import SmashedUp
from cutlayer.wire.tensors import size_of


class Answers:
    """`requests`: how often (request, "answered" or "refused") happened; `rows` of smashed data and `bytes` of tensors
    that were sent.
    """

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str]] = Counter()
        self.rows = self.bytes = 0

    def answered(self, frame: Frame, answer: Answer | None) -> None:
        """A request was answered, or done where it has no answer."""
        self.requests[frame.message.called(), "answered"] += 1
        if answer is not None:
            said, body = answer
            self.rows += said.rows if isinstance(said, SmashedUp) else 0
            self.bytes += size_of(body)

    def refused(self, frame: Frame) -> None:
        """A request was not answered."""
        self.requests[frame.message.called(), "refused"] += 1
