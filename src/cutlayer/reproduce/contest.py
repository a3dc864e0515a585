"""A contest: methods against each other in several settings, as a JSON file of this folder describes it.

Every method has the same learning rates to choose from. It is tuned on one seed by the accuracy on validation data, in
the setting itself or in a similar one, and then trained with the chosen rate on other seeds. Only these are reported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class ContestSize:
    """The extent of a contest: rows per client, epochs, rows per batch, the rates to try, the seed for trying them, the
    reported seeds, the setting in which each setting's rates are tried (by default itself), and the compared settings
    and methods (None: all).
    """

    samples_per_client: int
    epochs: int
    batch: int
    rates: tuple[float, ...]
    tuning_seed: int
    seeds: tuple[int, ...]
    tuned_in: tuple[tuple[str, str], ...] = ()
    settings: tuple[str, ...] | None = None
    methods: tuple[str, ...] | None = None

    def tuning(self, setting: str) -> str:
        """The setting in which the rates of `setting` are tried."""
        return dict(self.tuned_in).get(setting, setting)


@dataclass(frozen=True)
class Setting:
    """How the data are dealt and who takes part, as options of a run, and which methods are compared there."""

    options: Mapping[str, Any]
    methods: tuple[str, ...]


@dataclass(frozen=True)
class ContestClaim:
    """A claim: that `more` is more accurate than `less` by more than `threshold` points, on average over `settings`."""

    name: str
    title: str
    sentence: str
    more: str
    less: str
    settings: tuple[str, ...]
    threshold: float = 0.0


@dataclass(frozen=True)
class Contest:
    """The comparison: methods and settings by name, claims, and the extent of each size. Traffic is compared with that
    of the method `baseline`.
    """

    about: str
    baseline: str
    methods: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, Setting]
    claims: tuple[ContestClaim, ...]
    sizes: Mapping[str, ContestSize]


@cache
def contest(name: str) -> Contest:
    """The contest of that file. Raises KeyError for a name that the file does not explain."""
    stored = json.loads(resources.files("cutlayer.reproduce").joinpath(f"{name}.json").read_text("utf-8"))
    methods = stored["methods"]

    def named(asked: list[str]) -> tuple[str, ...]:
        """Methods by their names and by the names of groups."""
        found = [m for name in asked for m in ([name] if name in methods else stored[name])]
        return tuple(m for m in methods if m in found)

    settings = {n: Setting(s["options"], named(s["methods"])) for n, s in stored["settings"].items()}
    claims = tuple(ContestClaim(**{**c, "settings": tuple(c["settings"])}) for c in stored.get("claims", []))
    sizes = {name: _size(size) for name, size in stored["sizes"].items()}
    return Contest(stored["about"], stored["baseline"], methods, settings, claims, sizes)


def _size(stored: dict[str, Any]) -> ContestSize:
    """An extent from its JSON, hashable as a study is."""
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
    return ContestSize(**{**plain, "tuned_in": tuple(stored.get("tuned_in", {}).items())})
