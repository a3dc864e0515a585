"""Reading and writing small files so that a crash leaves nothing half-written. Imports nothing heavy."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cutlayer.errors import RunFolderError


def replace_file(path: Path, content: bytes) -> None:
    """Put `content` at `path` atomically: a reader sees the old file or the new one, also after a power cut.

    Raises RunFolderError where the folder cannot be written to.
    """
    fresh = path.with_name(f".{path.name}.new")
    try:
        with fresh.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise RunFolderError(f"cannot write {str(path)!r}: {error.strerror}; make the folder writable") from None


def finite_or_null(value: Any) -> Any:
    """`value`, in depth, with None for every number that JSON does not know: infinite ones, and NaN."""
    if isinstance(value, Mapping):
        return {key: finite_or_null(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    """The content of a JSON file; None where there is none. Raises RunFolderError where it is damaged."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise RunFolderError(f"{str(path)!r} is damaged ({error}): restore it, or run anew in another folder") from None


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a .jsonl file; a line that is still being written, or was cut by a crash, is left out.

    Raises RunFolderError where a whole line is no JSON.
    """
    if not path.exists():
        return
    with path.open() as file:
        for number, line in enumerate(file, 1):
            if line.endswith("\n"):
                try:
                    yield json.loads(line)
                except ValueError:
                    raise RunFolderError(
                        f"line {number} of {str(path)!r} is not JSON: correct or remove it, or start a new run"
                    ) from None
