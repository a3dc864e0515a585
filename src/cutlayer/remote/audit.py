"""A client's own record of requests and answers: JSON lines, appended as they happen.

Each line is passed to the system at once, so every answer is in the record even if the process is killed. The file is
opened only for appending, and only its owner can read it.
"""

from __future__ import annotations

import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cutlayer.files import append_whole, unwritable
from cutlayer.remote.carrier import Answer
from cutlayer.wire import messages as m
from cutlayer.wire.frames import Frame
from cutlayer.wire.tensors import size_of

AUDIT = "audit.jsonl"


class Audit:
    """Appends to the file at `path`: the requests of the server at `address` to the client `name`, and its answers.
    Raises DiskFullError or RunFolderError if it cannot: a request that cannot be recorded is not answered.
    """

    def __init__(self, path: Path, name: str, address: str) -> None:
        self._path, self._who = path, {"client": name, "server": address}
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        except OSError as error:
            raise unwritable(path, error) from None

    def answered(self, frame: Frame, answer: Answer | None) -> None:
        """A request was answered, or done where it has no answer."""
        facts: dict[str, Any] = {"answered": "done"}
        if answer is not None:
            said, body = answer
            facts = {"answered": said.called(), "rows": getattr(said, "rows", None), "bytes_up": size_of(body)}
        self._note(frame.message, len(frame.body), facts)

    def refused(self, frame: Frame, error: Exception) -> None:
        """A request was not answered: the client leaves."""
        self._note(frame.message, len(frame.body), {"refused": type(error).__name__, "why": str(error)})

    def event(self, what: str, **facts: Any) -> None:
        """Something else happened: the client has joined, or ended."""
        self._write({"event": what, **facts})

    def close(self) -> None:
        """Flush everything to the disk."""
        os.fsync(self._file)
        os.close(self._file)

    def _note(self, asked: m.Message, size: int, facts: dict[str, Any]) -> None:
        fields = {"step", "index", "rows", "batch", "batches", "part", "start", "phase", "mode"} & set(
            asked.__struct_fields__
        )
        values = {name: getattr(asked, name) for name in sorted(fields)}
        self._write({"asked": asked.called(), **{f"of_{n}": v for n, v in values.items()}, "bytes_down": size, **facts})

    def _write(self, facts: dict[str, Any]) -> None:
        now = datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, **self._who, **facts}) + "\n"
        try:
            append_whole(self._file, line.encode())
        except OSError as error:
            raise unwritable(self._path, error) from None
