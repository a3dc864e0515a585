"""Proofs of engines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cutlayer import plugins
from cutlayer.errors import ConfigError, unknown
from cutlayer.plugins import Entry
from cutlayer.testing.candidate import Candidate
from cutlayer.testing.material import fail

ENGINES = ("stacked", "union", "remote")
"""What `check_engine` compares with the local engine, the reference."""


def check_engine(name: str) -> None:
    """Test that an engine (one of `ENGINES`) gives the results of the local engine, for all algorithms of this package
    that it can run.

    Raises AssertionError as `check_algorithm` does, and ConfigError for an unknown engine.
    """
    if name not in ENGINES:
        raise ConfigError(unknown("engine to compare with the local one", name, ENGINES))
    compared = 0
    for entry in plugins.index("algorithm").values():
        for options in _variants(entry) if name == "union" else [{}]:
            candidate = Candidate(entry.name, entry, options)
            if name in candidate.engines:
                candidate.check_engine(name)
                compared += 1
    if not compared:
        fail(name, "no algorithm of this package can run on this engine")


def _variants(entry: Entry) -> Iterator[dict[str, Any]]:
    """An algorithm's options one by one: numbers are set to 1, and choices to each of their values."""
    yield {}
    for option in entry.options:
        values = option.choices or ((1,) if option.base == "int" else ())
        yield from ({option.name: value} for value in values if value != option.default)
