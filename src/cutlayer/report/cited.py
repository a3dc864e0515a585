"""BibTeX of what many runs and comparisons used, read from their folders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cutlayer import plugins
from cutlayer.errors import RunFolderError
from cutlayer.files import read_json
from cutlayer.folder import ALGORITHM, CONFIG, CURVES, RESULT, TUNING, stored_config
from cutlayer.references import bibtex
from cutlayer.stored import ANEW, reading
from cutlayer.tuned import read_tuned


def cite(first: Path | str, *more: Path | str) -> str:
    """BibTeX of all that the runs in these folders used, each entry once; comments name things without one.

    Each is the folder of a run or of a comparison, finished or not. Pages with curves are drawn by matplotlib, and
    differences over two seeds or more rest on scipy. Raises RunFolderError for another folder.
    """
    used: list[dict[str, str]] = []
    libraries: list[str] = []
    for folder in map(Path, (first, *more)):
        runs = _runs(folder)
        for run in runs:
            used += _used(run)
        used += _searched(folder)
        libraries += ["scipy"] if len({run.name for run in runs}) > 1 else []
        libraries += ["matplotlib"] if (folder / CURVES).exists() else []
    return bibtex(used, libraries)


def _searched(folder: Path) -> Iterator[dict[str, str]]:
    """The search by which a comparison was tuned."""
    tuned = read_tuned(folder / TUNING)
    entry = None if tuned is None else plugins.index("search").get(tuned.how)
    if entry is not None:
        yield {"kind": "search", "name": entry.name, "paper": str(entry.facts.get("paper") or "")}


def _runs(folder: Path) -> list[Path]:
    """The folders of the runs. Raises RunFolderError."""
    comparison = "algorithms" in stored_config(folder)
    runs = sorted(path.parent for path in folder.glob(f"*/seed-*/{CONFIG}")) if comparison else [folder]
    if found := [run for run in runs if (run / ALGORITHM).exists()]:
        return found
    raise RunFolderError(f"{str(folder)!r} has not begun, so there is nothing to cite: start its runs first")


def _used(run: Path) -> Iterator[dict[str, str]]:
    """The notes of a run at its end or, if it has none yet, at its beginning. Raises RunFolderError."""
    for name in (RESULT, ALGORITHM):
        with reading(run / name):
            noted: Any = (read_json(run / name) or {}).get("used")
            if noted is not None:
                yield from ({str(k): str(v) for k, v in thing.items()} for thing in noted)
                return
    raise RunFolderError(f"{str(run)!r} does not say what it used, since an older version wrote it: {ANEW}")
