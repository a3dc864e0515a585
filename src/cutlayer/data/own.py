"""Code that users bring: whatever it raises becomes one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cutlayer.errors import ConfigError, CutlayerError


@contextmanager
def own_code(code: object, what: str) -> Iterator[None]:
    """Turn an exception of `code`, called `what`, into a ConfigError with the reason.

    Errors that Cutlayer raises on purpose pass as they are, and so does whatever this package's own code raises.
    """
    try:
        yield
    except CutlayerError:
        raise
    except Exception as error:  # the user's code: anything can be raised
        if str(getattr(code, "__module__", "")).startswith("cutlayer."):
            raise
        first = str(error).strip().split("\n", 1)[0]
        reason = f"{type(error).__name__}: {first}" if first else type(error).__name__
        raise ConfigError(f"{what} failed ({reason}): correct its code") from error
