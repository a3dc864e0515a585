"""Writes the measurements of benchmarks to a page, between two marks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def put(page: Path, mark: str, lines: Iterable[str]) -> None:
    """Writes `lines` between the two lines `mark` of `page`, replacing what is there."""
    head, _, tail = page.read_text(encoding="utf-8").split(mark)
    page.write_text(mark.join([head, "\n" + "\n".join(lines) + "\n", tail]), encoding="utf-8")
