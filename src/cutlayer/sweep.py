"""Sweeps: the same comparison at many values of its options, each point an entry of its own.

A sweep is expanded before anything is built. A comparison is trained, stored and resumed that has a variant for each
algorithm and point, with all values written out.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from cutlayer import plugins
from cutlayer.errors import ConfigError, unknown
from cutlayer.options import CommonConfig, CompareConfig, RunConfig, normalised, overlaid, owners_of

How = Literal["grid", "zip", "random"]
"""All combinations; the first values, then the second ones, and so on; values drawn at random."""
_OWN = {"how", "draws", "draw_seed"}
_DIGITS = 3  # of a drawn number, so that the name of an entry has the exact value of its training
Point = dict[str, Any]


def expanded(config: CompareConfig) -> CompareConfig:
    """The same comparison without a sweep, but with a variant for each entry and point.

    An entry has the swept options that have an effect on it, and only those that it does not set itself; equal variants
    are trained once. Raises ConfigError for a sweep that is not possible.
    """
    if not config.sweep:
        return config
    points = points_of(config.sweep)
    given = config.model_dump(include=config.model_fields_set - {"algorithms", "variant", "sweep", "tuning"})
    algorithms, variants = list[str](), dict[str, dict[str, Any]]()
    used = set[str]()
    for name, values in entries_of(config).items():
        found = {_label(name, point): point for point in (fitting_point(config, given, values, p) for p in points)}
        used |= {option for point in found.values() for option in point}
        for label, point in found.items():
            if label in variants:
                raise ConfigError(f"two entries of the sweep would be called {label!r}: rename the variant {name!r}")
            if point or name in config.variant:
                variants[label] = {**values, **point}
            else:
                algorithms.append(values["algorithm"])
    for option in points[0]:
        if option not in used:
            raise _idle(option, points[0][option], config)
    values = config.model_dump(include=config.model_fields_set - {"sweep"})
    return CompareConfig.of({**values, "algorithms": algorithms, "variant": variants})


def points_of(sweep: Mapping[str, Any]) -> list[Point]:
    """The points of a table [sweep], in order. Raises ConfigError."""
    table = normalised(sweep)
    how = table.get("how", "grid")
    if how not in get_args(How):
        raise ConfigError(unknown("sweep.how", how, get_args(How)))
    for name in set(table) - _OWN:
        check_name(name)
    swept = {name: values_of(name, value) for name, value in table.items() if name not in _OWN}
    if not swept:
        raise ConfigError("sweep names no option: write e.g. phi = [0.25, 0.5] below [sweep]")
    ranges = [name for name, values in swept.items() if isinstance(values, Mapping)]
    if how != "random":
        if idle := [name for name in ("draws", "draw_seed") if name in table]:
            raise ConfigError(f"sweep.{idle[0]} has no effect on how = {how!r}: choose random, or leave it out")
        if ranges:
            raise ConfigError(
                f"sweep.{ranges[0]} = {swept[ranges[0]]!r} is a range, which only how = 'random' can draw from: give a "
                "list of values"
            )
    if how == "random":
        if "draws" not in table:
            raise ConfigError("a sweep with how = 'random' needs draws: say how many points, e.g. draws = 20")
        return _drawn(swept, table["draws"], table.get("draw_seed", 0))
    if how == "zip":
        lengths = {name: len(values) for name, values in swept.items()}
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise ConfigError(f"sweep with how = 'zip' needs lists of one length, but there are {listed} values")
        return [dict(zip(swept, values, strict=True)) for values in zip(*swept.values(), strict=True)]
    return [dict(zip(swept, values, strict=True)) for values in itertools.product(*swept.values())]


def values_of(name: str, value: Any, table: str = "sweep") -> list[Any] | Mapping[str, Any]:
    """The values that an option takes in a table of the configuration, or the range that they are drawn from. Raises
    ConfigError.
    """
    if isinstance(value, str):  # of a flag
        value = [_plain(text) for text in value.split(",")]
    if isinstance(value, Mapping):
        return _range(f"{table}.{name}", {k: _plain(v) if isinstance(v, str) else v for k, v in value.items()})
    values = [list(v) if isinstance(v, tuple) else v for v in (value if isinstance(value, Sequence) else [value])]
    if not values:
        raise ConfigError(f"{table}.{name} is an empty list: give values, e.g. [0.25, 0.5]")
    if twice := [v for v in values if values.count(v) > 1]:
        raise ConfigError(f"{table}.{name} names {twice[0]!r} twice: name it once")
    return values


def _range(name: str, value: Mapping[str, Any]) -> Mapping[str, Any]:
    low, high, log = (value.get(key) for key in ("low", "high", "log"))
    numbers = [n for n in (low, high) if isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n)]
    if set(value) - {"low", "high", "log"} or len(numbers) < 2 or numbers[0] >= numbers[1]:
        raise ConfigError(
            f"{name} = {dict(value)!r} is not possible: write {{low = 0.001, high = 0.1, log = true}}, low below high"
        )
    if log and numbers[0] <= 0:
        raise ConfigError(f"{name}.low = {low!r} has no logarithm: it must be greater than 0 with log = true")
    return value


def _drawn(swept: Mapping[str, Any], draws: Any, seed: Any) -> list[Point]:
    """This number of different points, with every option's value drawn independently. Raises ConfigError."""
    for name, value, least in (("draws", draws, 1), ("draw_seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(
                f"sweep.{name} = {value!r} is not possible: it must be a whole number of at least {least}"
            )
    chance = random.Random(seed)
    found: list[Point] = []
    for _ in range(100 * draws):
        point = {name: drawn_value(values, chance) for name, values in swept.items()}
        if point not in found:
            found.append(point)
        if len(found) == draws:
            return found
    raise ConfigError(f"sweep.draws = {draws} is more than the {len(found)} possible points: draw fewer")


def drawn_value(values: Any, chance: random.Random) -> Any:
    """One of the values, or a number from the range {low, high, log}."""
    if not isinstance(values, Mapping):
        return chance.choice(values)
    low, high, log = values["low"], values["high"], values.get("log")
    whole = isinstance(low, int) and isinstance(high, int)
    if whole and not log:
        return chance.randint(low, high)
    drawn = math.exp(chance.uniform(math.log(low), math.log(high))) if log else chance.uniform(low, high)
    return min(max(round(drawn), low), high) if whole else rounded(drawn, values)


def rounded(number: float, values: Mapping[str, Any]) -> float:
    """A number drawn from a range, rounded to the shown digits."""
    shown: float = min(max(float(f"{number:.{_DIGITS}g}"), values["low"]), values["high"])
    return shown


def _plain(text: str) -> Any:
    """The value of a word of the command line: a number, true, or the word itself."""
    try:
        return json.loads(text.strip().lower())
    except ValueError:
        return text.strip()


def check_name(name: str, table: str = "sweep") -> None:
    """Raises ConfigError for a name in a table of the configuration that is not an option of a run, or one that all
    entries share.
    """
    if name in ("algorithm", "algorithms", "variant", "seed", "seeds", "sweep", "tuning"):
        what = "seeds, which all entries share" if name.startswith("seed") else "algorithms, and variants"
        raise ConfigError(f"{table}.{name} is not possible: list them as {what}")
    if name not in CommonConfig.model_fields and name not in RunConfig.model_fields and not owners_of(name):
        known = {*CommonConfig.model_fields, *(o.name for e in plugins.flat() for o in e.options)}
        near = difflib.get_close_matches(name, known, 1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"unknown option {name!r} in {table}: {meant}`cutlayer compare --help-all` shows all")


def entries_of(config: CompareConfig) -> dict[str, dict[str, Any]]:
    """The comparison's entries by name, each with its own values."""
    default = RunConfig.model_fields["algorithm"].get_default()
    plain = {plugins.label(algorithm): {"algorithm": algorithm} for algorithm in config.algorithms}
    return {**plain, **{name: {"algorithm": default, **normalised(v)} for name, v in config.variant.items()}}


def fitting_point(config: CompareConfig, given: Mapping[str, Any], values: Mapping[str, Any], point: Point) -> Point:
    """The options of `point` that have an effect on an entry with these own `values`."""
    left = {name: value for name, value in point.items() if name not in values}
    kept = config.fitting(overlaid(given, left), str(values["algorithm"]), values)
    return {name: value for name, value in left.items() if name in kept}


def _label(name: str, point: Point) -> str:
    """The name of the entry at a point."""
    return ", ".join([name, *(f"{option} {shown_value(value)}" for option, value in point.items())])


def shown_value(value: Any) -> str:
    """A value of an option in the form for the name of an entry."""
    if isinstance(value, str) and "/" in value:  # a path; names of entries are names of folders
        path, _, inside = value.partition(":")
        return ":".join([Path(path).stem, *([inside] if inside else [])])
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return str(value).replace("/", "-")


def _idle(option: str, value: Any, config: CompareConfig) -> ConfigError:
    owners = ", ".join(entry.name for entry in owners_of(option))
    what = f"it belongs to {owners}; choose one of these, or leave it out" if owners else "leave it out"
    entries = ", ".join(entries_of(config))
    return ConfigError(f"sweep.{option} = {value!r} has no effect on any entry of this comparison ({entries}): {what}")
