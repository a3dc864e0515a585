"""How a comparison was tuned: what `tuning.json` holds. Imports nothing heavy, since reports read it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cutlayer.files import read_json
from cutlayer.stored import Amount, Count, Stored, checked, reading, remade
from cutlayer.text import listed


@dataclass(frozen=True)
class Trial:
    """One trial: its values, its result, and its cost."""

    number: int
    values: dict[str, Any]
    score: float | None
    rounds: int
    epochs: float
    samples: int
    diverged: bool = False


@dataclass(frozen=True)
class TunedEntry:
    """How an entry was tuned: all its trials, the `values` chosen, those of them at an `edge` of the possible values,
    and the cost: epochs and rows of all trials together.
    """

    trials: tuple[Trial, ...]
    chosen: int
    values: dict[str, Any]
    edges: tuple[str, ...]
    epochs: float
    samples: int


@dataclass(frozen=True)
class Tuned:
    """How a comparison was tuned, as written to tuning.json. `test_seed` has drawn the test rows of all seeds; None if
    the data have their own. `overlap` says which test rows trials may have been trained on; empty if none.
    """

    how: str
    trials: int
    seed: int
    by: str
    metric: str
    share: bool
    maximise: bool
    entries: dict[str, TunedEntry]
    untuned: tuple[str, ...] = ()
    test_seed: int | None = None
    overlap: str = ""

    @property
    def warnings(self) -> list[str]:
        """A sentence for each entry with a value that was chosen at the edge of those that were possible."""
        return [_at_the_edge(entry, tuned) for entry, tuned in self.entries.items() if tuned.edges]


def _at_the_edge(entry: str, tuned: TunedEntry) -> str:
    chosen = listed([f"{name} = {tuned.values[name]!r}" for name in tuned.edges])
    several = len(tuned.edges) > 1
    return (
        f"{entry}: the chosen {chosen} {'are' if several else 'is'} at the edge of the values that were tried, so "
        f"{'better ones' if several else 'a better one'} may lie beyond: widen them"
    )


class _StoredEntry(Stored):
    trials: list[dict[str, Any]]
    chosen: Count
    values: dict[str, Any]
    edges: list[str]
    epochs: Amount
    samples: Count


class _StoredTuned(Stored):
    how: str
    trials: Count
    seed: Count
    by: str
    metric: str
    share: bool
    maximise: bool
    entries: dict[str, _StoredEntry]
    untuned: list[str]
    test_seed: Count | None = None
    overlap: str = ""


def tuned_of(stored: object) -> Tuned:
    """The content of tuning.json. Raises MalformedError."""
    form = checked(stored, _StoredTuned)
    entries = {
        entry: TunedEntry(
            tuple(remade(Trial, trial, "trials") for trial in found.trials),
            found.chosen,
            found.values,
            tuple(found.edges),
            found.epochs,
            found.samples,
        )
        for entry, found in form.entries.items()
    }
    plain = {name: getattr(form, name) for name in form.__struct_fields__}
    return Tuned(**{**plain, "entries": entries, "untuned": tuple(form.untuned)})


def read_tuned(path: Path) -> Tuned | None:
    """The content of that file; None if there is none. Raises RunFolderError."""
    stored = read_json(path)
    if stored is None:
        return None
    with reading(path):
        return tuned_of(stored)
