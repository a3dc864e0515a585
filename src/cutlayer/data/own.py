"""Users' own code: any error becomes one sentence."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cutlayer.errors import ConfigError, CutlayerError

_PACKAGE = str(Path(__file__).parents[1])


@contextmanager
def own_code(code: object, what: str) -> Iterator[None]:
    """Turn an exception of `code`, called `what`, into a ConfigError with the reason and the place.

    Errors that Cutlayer raises on purpose, and errors of this package's own code, pass unchanged.
    """
    try:
        yield
    except CutlayerError:
        raise
    except Exception as error:  # the user's code: any error is possible
        if str(getattr(code, "__module__", "")).startswith("cutlayer."):
            raise
        first = str(error).strip().split("\n", 1)[0]
        reason = f"{type(error).__name__}: {first}" if first else type(error).__name__
        raise ConfigError(f"{what} failed{place_of(code, error)} ({reason}): correct its code") from error


def place_of(code: object, error: Exception) -> str:
    """The place of the error, " at file:line": the last line of the user's file, or of any file outside this
    package.
    """
    frames = traceback.extract_tb(error.__traceback__)
    mine = [frame for frame in frames if frame.filename == _file_of(code)]
    found = mine or [frame for frame in frames if not frame.filename.startswith(_PACKAGE)]
    # Without a frame of the user's code (as for a wrong signature), the call itself has failed.
    return f" at {_short(found[-1].filename)}:{found[-1].lineno}" if found else ""


def _file_of(code: object) -> str:
    thing = code if inspect.isclass(code) or inspect.isroutine(code) else type(code)
    try:
        return inspect.getsourcefile(thing) or ""
    except TypeError:  # defined at a prompt
        return ""


def _short(file: str) -> str:
    """The path from the working directory, if it lies below."""
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else file
