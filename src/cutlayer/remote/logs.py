"""What happens to connections, as lines on stderr: for people, or as JSON for a collector of logs."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal

from cutlayer.text import plain, plain_lines


def show_log(form: Literal["text", "json"]) -> None:
    """Begin to write this process's log to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    if form == "json":
        handler.setFormatter(_JsonLines())
    else:
        handler.setFormatter(_TextLines("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


class _TextLines(logging.Formatter):
    """One line per event: text of others, who may be strangers, cannot add lines or control the terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's own name
        """The line, control characters escaped."""
        return plain(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802  # logging's own name
        """The traceback, whose error may quote text of others."""
        return plain_lines(super().formatException(ei))


class _JsonLines(logging.Formatter):
    """One JSON object per line: time, level, logger, message, and its facts."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": plain(record.getMessage()),
            **{name: plain(v) if isinstance(v, str) else v for name, v in getattr(record, "facts", {}).items()},
        }
        if record.exc_info:
            line["error"] = plain_lines(self.formatException(record.exc_info))
        return json.dumps(line)
