"""Formats of data on disk. One format is one file, which reads a path into plain arrays.

Nothing is ever unpickled or downloaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cutlayer import plugins
from cutlayer.data.formats.reader import Format, data_format
from cutlayer.errors import ConfigError, DataError

__all__ = ["Format", "data_format", "detect", "find_format", "no_effect"]


def detect(path: Path) -> str:
    """The name of the first format that fits the existing `path`. Raises DataError if none does."""
    known = plugins.index("format")
    first = [name for name, entry in known.items() if entry.facts.get("asked_first")]
    for name in dict.fromkeys([*first, *plugins.names("format")]):
        if _class(name).fits(path):
            return name
    raise DataError(
        f"the format of {str(path)!r} is not recognised: name it with data_format ({', '.join(known)}); `cutlayer list "
        "data` describes each"
    )


def find_format(reference: str, options: Mapping[str, Any]) -> Format:
    """The format with its options. Raises ConfigError: unknown, or an option that it does not have."""
    found = _class(reference)
    for name in sorted(set(options) - plugins.find("format", reference).option_names):
        raise ConfigError(no_effect(name, options[name], f"data of the format {reference!r}"))
    return found.of(options)


def no_effect(name: str, value: object, what: str) -> str:
    """The sentence for an option that has no effect on `what`, with the formats that have it."""
    owners = [known for known, entry in plugins.index("format").items() if name in entry.option_names]
    whose = f" (it belongs to {' and '.join(owners)})" if owners else ""
    return f"{name}={value!r} has no effect on {what}{whose}: leave it out"


def _class(reference: str) -> type[Format]:
    found = plugins.load("format", reference)
    plugins.find("format", reference)  # a thing of another kind is an error
    if not (inspect.isclass(found) and issubclass(found, Format)) or inspect.isabstract(found):
        raise ConfigError(f"data format {reference!r} is not a Format with a method read: derive a class from Format")
    return found
