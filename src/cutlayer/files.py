"""Reading and writing small files so that a crash leaves nothing half-written. Imports nothing heavy."""

from __future__ import annotations

import errno
import math
import os
import shutil
import stat
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from cutlayer.errors import CutlayerError, CutlayerWarning, DiskFullError, RunFolderError
from cutlayer.stored import MalformedError, checked, parsed

CONFIG, EVENTS = "config.toml", "events.jsonl"
"""The file that identifies the folder of a run, and the one that only a run with clients on other machines has."""
STATES = "states"
"""The folder for states of clients, in the folder of a run."""


def replace_file(path: Path, content: bytes) -> None:
    """Put `content` at `path` atomically: a reader sees the old file or the new one, also after a power cut.

    Raises DiskFullError, or RunFolderError if the folder cannot be written; then nothing of `content` remains.
    """
    fresh = path.with_name(f".{path.name}.new")
    try:
        try:
            _write(fresh, content)
            os.replace(fresh, path)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise unwritable(path, error) from None
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the system write to disk which files a folder has. Raises DiskFullError or RunFolderError."""
    try:
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise unwritable(path, error) from None


def _write(path: Path, content: bytes) -> None:
    """Write a new file, and make the system write it to disk."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        put_whole(file, content)
        os.fsync(file)
    finally:
        os.close(file)


@contextmanager
def private(*folders: Path) -> Iterator[None]:
    """Inside, new folders have the mode 0700 and files 0600, whatever the umask. The `folders` are made; if they exist
    already, they and their files get these modes.
    """
    before = os.umask(0o077)
    try:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            _take_away(folder)
        yield
    finally:
        os.umask(before)


def _take_away(folder: Path) -> None:
    """Remove the permissions of others for a folder of ours, and for the files in it."""
    for path in (folder, *folder.iterdir()):
        mode = path.lstat().st_mode
        if stat.S_IMODE(mode) & 0o077 and not stat.S_ISLNK(mode):
            try:
                path.chmod(stat.S_IMODE(mode) & 0o700)
            except PermissionError:
                warnings.warn(
                    f"{str(path)!r} belongs to another user, who decides who can read it: give this one a folder of "
                    "its own",
                    CutlayerWarning,
                    stacklevel=2,
                )


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file. Raises DiskFullError or RunFolderError if that is not possible."""
    try:
        with Lines(path) as file:
            file.add(line)
    except OSError as error:
        raise unwritable(path, error) from None


class Lines:
    """Adds lines to a text file, several at a time. The file only has whole lines, even if the disk is full: a line
    without space is removed completely. A context manager; every method raises OSError.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._waiting = bytearray()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, line: str) -> None:
        """Add a line; it is written when there are enough of them."""
        self._waiting += f"{line}\n".encode()
        if len(self._waiting) >= _TOGETHER:
            self.flush()

    def flush(self) -> None:
        """Write waiting lines."""
        data, self._waiting = bytes(self._waiting), bytearray()
        append_whole(self._file, data)

    def sync(self) -> None:
        """Flush everything to disk."""
        self.flush()
        os.fsync(self._file)

    def close(self) -> None:
        """Write waiting lines, and close."""
        try:
            self.flush()
        finally:
            os.close(self._file)


_TOGETHER = 8192  # bytes of lines that are written at once


def append_whole(file: int, data: bytes) -> None:
    """Append all of `data` to an open file, or nothing. Raises OSError."""
    before = os.fstat(file).st_size
    try:
        while data:
            data = data[os.write(file, data) :]
    except OSError:
        _cut(file, before)
        raise


def put_whole(file: int, data: bytes) -> None:
    """Write `data` at the beginning of an open file; if there is no space, the file keeps its length. Raises
    OSError.
    """
    before, done = os.fstat(file).st_size, 0
    try:
        while done < len(data):
            done += os.pwrite(file, data[done:], done)
    except OSError:
        if before < len(data):
            _cut(file, before)
        raise


def _cut(file: int, length: int) -> None:
    with suppress(OSError):  # what is not a file on a disk has no length
        os.ftruncate(file, length)


def is_full(error: OSError) -> bool:
    """Whether a disk is full, or a quota used up."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def unwritable(path: Path, error: OSError, remedy: str = "make the folder writable") -> CutlayerError:
    """The error to raise for an error while writing `path`: a DiskFullError, or a RunFolderError with the `remedy`."""
    if not is_full(error):
        return RunFolderError(f"cannot write {str(path)!r}: {error.strerror}; {remedy}")
    run = next((folder for folder in path.absolute().parents if (folder / CONFIG).is_file()), None)
    resumed = run is not None and not (run / EVENTS).is_file()
    then = f"go on with `cutlayer resume {_shown(run)}`" if run and resumed else "start the same command again"
    return DiskFullError(
        f"cannot write {str(path)!r}: {_disk(path)} is full ({error.strerror}); make room, then {then}"
    )


def _shown(folder: Path) -> Path:
    """The folder as one would type it here."""
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def _disk(path: Path) -> str:
    """The disk of `path`, by its mount point, and its free space."""
    folders = [folder for folder in path.absolute().parents if folder.is_dir()]
    mount = next(folder for folder in folders if os.path.ismount(folder))
    return f"the disk at {str(mount)!r}, with {shutil.disk_usage(folders[0]).free} bytes free,"


def finite_or_null(value: Any) -> Any:
    """`value`, in depth, with None for every number that JSON does not know: infinite ones, and NaN."""
    if isinstance(value, Mapping):
        return {key: finite_or_null(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path, form: Any = None) -> Any:
    """The content of a JSON file in its `form` (see `stored`), if one is given; None if there is no file. Raises
    RunFolderError if it is damaged or has another form.
    """
    if not path.exists():
        return None
    try:
        found = parsed(path.read_text(encoding="utf-8"))
        if form is not None:
            checked(found, form)
    except (MalformedError, ValueError, OSError) as error:
        raise RunFolderError(f"{str(path)!r} is damaged ({error}): restore it, or run anew in another folder") from None
    return found


def read_records(path: Path, form: Any = None) -> Iterator[dict[str, Any]]:
    """The records of a .jsonl file, each in its `form`, if one is given; a line that is still being written, or was cut
    by a crash, is left out.

    Raises RunFolderError if a whole line is not a JSON object, or has another form.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                try:
                    yield checked(parsed(line), dict[str, Any]) if form is None else _in_form(parsed(line), form)
                except (MalformedError, ValueError) as error:
                    raise RunFolderError(
                        f"line {number} of {str(path)!r} is damaged ({error}): correct or remove it, or start a new run"
                    ) from None


def _in_form(value: dict[str, Any], form: Any) -> dict[str, Any]:
    checked(value, form)
    return value
