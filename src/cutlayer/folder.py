"""A run's folder on disk: configuration, records, checkpoint, result; held by one process at a time.

config.toml              the resolved configuration; running from it reproduces the run
steps.jsonl              one record per step
evaluations.jsonl        one record per evaluation
classes.json             samples per client and class
data.json                what was read, used and left out, whose it is, and what became of the inputs
engine.json              how the models are computed, as it was chosen when the run began
events.jsonl             who came, was late or excluded, round by round (runs with clients on other machines)
checkpoint.safetensors   the state after the last checkpointed round
last.safetensors         the trained model, once the run is done
best.safetensors         the model of the best evaluation on the validation set so far
logs/                    what loggers keep there (`log_to`)
states/                  what differs from client to client, for the checkpoint (client_states = disk)
snapshots/               client models of some rounds, where asked for
result.json              once the run is done
tuning.json, tuning/     of a comparison that tunes: what was chosen, and the trials
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TextIO

import tomli_w

from cutlayer.collective import world
from cutlayer.errors import CutlayerError, CutlayerWarning, FolderInUseError, RunFolderError
from cutlayer.files import CONFIG as CONFIG
from cutlayer.files import EVENTS as EVENTS
from cutlayer.files import STATES, Lines, replace_file, unwritable
from cutlayer.options import read_toml
from cutlayer.stored import ANEW

STEPS, EVALUATIONS, CLIENTS = "steps.jsonl", "evaluations.jsonl", "clients.jsonl"
ALGORITHM, CLASSES, DATA, METRIC = "algorithm.json", "classes.json", "data.json", "metric.json"
ENGINE = "engine.json"
SNAPSHOTS, LOGS = "snapshots", "logs"
LAST, BEST = "last.safetensors", "best.safetensors"
CHECKPOINT, RESULT, COMPARISON = "checkpoint.safetensors", "result.json", "comparison.json"
TUNING, TRIALS = "tuning.json", "tuning"
CURVES, CLASS_COUNTS, PAGE = "curves.png", "classes.png", "report.html"
_RECORDS = (STEPS, EVALUATIONS, CLIENTS)
OWN_FILES = (
    CONFIG,
    STEPS,
    EVALUATIONS,
    CLIENTS,
    ALGORITHM,
    CLASSES,
    DATA,
    METRIC,
    ENGINE,
    EVENTS,
    SNAPSHOTS,
    LOGS,
    STATES,
    CHECKPOINT,
    LAST,
    BEST,
    RESULT,
    COMPARISON,
    TUNING,
    TRIALS,
    CURVES,
    CLASS_COUNTS,
    PAGE,
)
LOCK = ".lock"
_BEGUN = {LOCK, f".{CONFIG}.new"}  # only these two files: a run that was killed before it began
_DERIVED = re.compile(
    r"export|leakage\.(json|png)|(table|steps|evaluations|clients)\.csv|table\.tex|(score|loss)-over-\w+\.(pdf|svg)"
)
"""What commands write into the folder of a run by default, besides the run."""


class Folder:
    """An output folder, locked while this object is open. Use as a context manager.

    Without a lock, another process (rank 0 of several) writes to it, and this one writes nothing.
    """

    def __init__(self, path: Path, lock: TextIO | None) -> None:
        self.path, self._lock = path, lock
        self._files: dict[str, Lines] = {}

    @classmethod
    def held(cls, path: Path, config: Mapping[str, Any], *, again: bool, overwrite: bool = False) -> Folder:
        """Make the folder, or open it `again`; with several ranks, the first does this for all. Raises their errors."""

        def made() -> Folder:
            if not world().leads:
                return cls(path, None)
            return cls.reopen(path) if again else cls.create(path, config, overwrite=overwrite)

        return world().agreed(made)

    @property
    def written(self) -> bool:
        """Whether this process writes it."""
        return self._lock is not None

    @classmethod
    def create(cls, path: Path, config: Mapping[str, Any], *, overwrite: bool = False) -> Self:
        """Make the folder with its configuration; with `overwrite` the run or comparison in it is deleted first.
        Raises RunFolderError if it is in use, is not empty or has other content, and DiskFullError.
        """
        refuse_used(path, overwrite=overwrite)
        try:
            path.mkdir(parents=True, exist_ok=True)
            folder = cls(path, locked(path))
            if overwrite:
                _empty(path)
            folder.write_text(CONFIG, tomli_w.dumps(dict(config)))
        except OSError as error:
            raise unwritable(path, error, "choose another --out") from None
        return folder

    @classmethod
    def reopen(cls, path: Path) -> Self:
        """Open the folder of an earlier run. Raises RunFolderError if there is none, or if another process uses it."""
        if not (path / CONFIG).is_file():
            raise RunFolderError(f"{str(path)!r} is not a run folder: it has no {CONFIG}; name the folder of a run")
        try:
            return cls(path, locked(path))
        except OSError as error:
            raise unwritable(path, error, "make it writable") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.close()
        except CutlayerError:
            if kind is None:  # otherwise what happened first is what counts
                raise

    def close(self) -> None:
        """Close all files and release the lock. Raises DiskFullError if there is no space for the last records."""
        try:
            for name in list(self._files):
                with self._writing(name):
                    self._files.pop(name).close()
        finally:
            if self._lock is not None:
                self._lock.close()

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Add a line of JSON to `name`. Raises DiskFullError or RunFolderError if that is not possible."""
        if not self.written:
            return
        with self._writing(name):
            if name not in self._files:
                self._files[name] = Lines(self.path / name)
            self._files[name].add(json.dumps(record))

    def offsets(self) -> dict[str, int]:
        """Bytes in each record file, after flushing them to disk."""
        if not self.written:
            return {}
        for name, file in self._files.items():
            with self._writing(name):
                file.sync()
        return {n: (self.path / n).stat().st_size for n in _RECORDS if (self.path / n).exists()}

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        """Turn an error of the file system while `name` is written into a sentence."""
        try:
            yield
        except OSError as error:
            raise unwritable(self.path / name, error) from None

    def truncate(self, offsets: Mapping[str, int]) -> None:
        """Remove the records written after `offsets` were taken. Raises RunFolderError if a file is shorter."""
        if not self.written:
            return
        sizes = {name: (self.path / name).stat().st_size for name in _RECORDS if (self.path / name).exists()}
        for name, length in offsets.items():
            if name not in _RECORDS or length > sizes.get(name, 0):
                raise RunFolderError(
                    f"{str(self.path / name)!r} has {sizes.get(name, 0)} bytes, where the checkpoint says {length}: "
                    f"{ANEW}"
                )
        for name in sizes:
            os.truncate(self.path / name, offsets.get(name, 0))

    def write_text(self, name: str, text: str) -> None:
        """Write a small file atomically."""
        if self.written:
            replace_file(self.path / name, text.encode())

    def write_json(self, name: str, value: Any) -> None:
        """Write a small JSON file atomically."""
        self.write_text(name, json.dumps(value, indent=1))


def refuse_used(path: Path, *, overwrite: bool = False) -> None:
    """Raises RunFolderError unless `path` is free for a new run: absent, or an empty folder. With `overwrite` it may
    also hold a run or a comparison and nothing else. Writes nothing.
    """
    if path.exists() and not path.is_dir():
        raise RunFolderError(f"{str(path)!r} is a file: choose another --out")
    held = {inside.name for inside in path.iterdir()} if path.is_dir() else set[str]()
    if (path / LOCK).is_file():
        with (path / LOCK).open(encoding="utf-8") as lock:
            _lock(path, lock)  # names the process that uses it, if there is one
    if overwrite:
        _refuse_other(path, held)
    elif held - _BEGUN:
        go_on = f", `cutlayer resume {path}` to finish that run, or --overwrite to replace it" if CONFIG in held else ""
        raise RunFolderError(f"{str(path)!r} already holds files: choose another --out{go_on}")


def _refuse_other(path: Path, held: set[str]) -> None:
    """Raises RunFolderError unless everything in the folder belongs to a run or a comparison, so that it may be
    deleted.
    """
    if not held - _BEGUN:
        return
    stored = stored_config(path) if CONFIG in held else {}
    comparison = "algorithms" in stored
    if not comparison and "algorithm" not in stored:
        raise RunFolderError(f"{str(path)!r} is not the folder of a run, and is not overwritten: choose another --out")
    for name in sorted(held - _BEGUN - set(OWN_FILES)):
        inside = path / name
        if comparison and inside.is_dir() and not inside.is_symlink():
            for run in sorted(inside.iterdir()):
                if not (run.name.startswith("seed-") and run.is_dir() and not run.is_symlink()):
                    raise _foreign(path, run)
                _refuse_other(run, {file.name for file in run.iterdir()})
        elif not _DERIVED.fullmatch(name):
            raise _foreign(path, inside)


def _foreign(path: Path, thing: Path) -> RunFolderError:
    return RunFolderError(
        f"{str(path)!r} is not overwritten, since it holds {str(thing.relative_to(path))!r}, which is not part of a "
        "run: move that elsewhere, or choose another --out"
    )


def _empty(path: Path) -> None:
    """Delete the files of a run or a comparison, and warn of it. The configuration is deleted last: if this process
    ends before, the folder can still be recognised.
    """
    there = [file for file in sorted(path.iterdir()) if file.name not in (LOCK, CONFIG)]
    if (path / CONFIG).exists():
        stored = stored_config(path)
        kind = "comparison" if "algorithms" in stored else f"run of {stored.get('algorithm', 'an algorithm')}"
        begun = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((path / CONFIG).stat().st_mtime))
        ended = "finished" if {RESULT, COMPARISON} & {file.name for file in there} else "unfinished"
        warnings.warn(f"{str(path)!r}: the {ended} {kind} of {begun} is replaced", CutlayerWarning, stacklevel=2)
    for file in there:
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        else:
            file.unlink()
    (path / CONFIG).unlink(missing_ok=True)


def stored_config(path: Path) -> dict[str, Any]:
    """The configuration stored in a run folder. Raises RunFolderError if there is none."""
    if not (path / CONFIG).is_file():
        raise RunFolderError(f"{str(path)!r} is not a run folder: it has no {CONFIG}; name the folder of a run")
    return read_toml(path / CONFIG)


def locked(path: Path) -> TextIO:
    """The folder's lock file, locked. Raises FolderInUseError if another process has the lock."""
    lock = (path / LOCK).open("a+", encoding="utf-8")
    try:
        _lock(path, lock)
    except RunFolderError:
        lock.close()
        raise
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def _lock(path: Path, lock: TextIO) -> None:
    """Lock the open file, without waiting. Raises FolderInUseError if another process has the lock."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        raise FolderInUseError(
            f"{str(path)!r} is in use by process {holder}: wait for it, or choose another --out"
        ) from None
