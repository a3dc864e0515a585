"""Transcripts on pages of the documentation: files, and commands with their output."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest


class Block(NamedTuple):
    """A code block on a page: its language, the words after the language, and its text."""

    language: str
    purpose: str
    text: str

    @property
    def commands(self) -> Iterator[tuple[str, str]]:
        """The commands of a console block with their outputs."""
        for part in re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:]:
            command, _, shown = part.partition("\n")
            yield command, shown


def blocks(page: str) -> list[Block]:
    """The code blocks of a page, in order."""
    return [Block(*found) for found in re.findall(r"^```(\w+) ?([^\n]*)\n(.*?)^```", page, re.DOTALL | re.MULTILINE)]


TIMES = {
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d": "TIME",
    r"\d[\d.]* (?:ms|s|min)\b(?: \d+ s)?": "DURATION",
    r"[\d.]+ (steps|samples)/s": r"RATE of \1",
}
UNSAID = re.compile(r"\.(?:png|html)$| (?:INFO|WARNING) |\(tune\)$")  # pictures, the log, lines that depend on a cache


def plain(printed: str) -> str:
    """Printed output as one line without pictures and logs, with equal placeholders for times and rates."""
    text = " ".join(" ".join(line for line in printed.splitlines() if not UNSAID.search(line)).split())
    for pattern, word in TIMES.items():
        text = re.sub(pattern, word, text)
    return re.sub(r"[━─]+", "-", text)


def agree(shown: str, printed: str) -> None:
    """Checks that a page shows the printed words, and numbers within the differences between machines."""
    number = re.compile(r"([-+]?\b\d+(?:\.\d+)?\b)")
    wanted, found = number.split(plain(shown)), number.split(plain(printed))
    assert found[::2] == wanted[::2]
    assert [*map(float, found[1::2])] == pytest.approx([*map(float, wanted[1::2])], rel=0.1, abs=3)
