"""The tuning of a comparison: its table [tuning], read and checked against its entries, with the same effort for all of
them.

An entry is tuned over the options that have an effect on it and that it does not set itself. All tuned entries have the
same number of trials.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from cutlayer import plugins
from cutlayer.errors import ConfigError, unknown
from cutlayer.options import (
    ATTACKS,
    COSTS,
    DATA,
    OUTPUT,
    TASK,
    CommonConfig,
    CompareConfig,
    RunConfig,
    about,
    normalised,
    owners_of,
)
from cutlayer.searches import Search, Space
from cutlayer.sweep import Point, check_name, entries_of, fitting_point, values_of

By = Literal["last", "best"]
"""The evaluation by which a trial is judged: the one after its last round, or the one with the best score."""
_OWN = {"how", "trials", "seed", "by"}
# Options that do not belong to the methods: their test data, the length of training, additional computations.
_SHARED_GROUPS = {DATA, TASK, COSTS, ATTACKS, OUTPUT}
_SHARED_KINDS = {"data", "format", "partition", "task", "metric", "logger"}
_SHARED = {"clients", "partition", "samples_per_client"}
_LENGTHS = {"epochs", "rounds"}
_NEAR = 0.02  # of a range: a value this close to its end counts as its end


@dataclass(frozen=True)
class Effort:
    """How a comparison is tuned: by which search, with how many trials of each entry, on which seed, judged `by` which
    evaluation. `spaces` says what is tried for each entry that is tuned; `untuned` are the others.
    """

    config: CompareConfig
    how: str
    search: Search
    trials: int
    seed: int
    by: By
    spaces: Mapping[str, Space]
    untuned: tuple[str, ...]

    @classmethod
    def of(cls, config: CompareConfig) -> Effort:
        """The content of the table [tuning] of a comparison without a sweep. Raises ConfigError."""
        table = normalised(config.tuning)
        how, search, own = _search(table)
        asked = dict(_dimensions({name: value for name, value in table.items() if name not in _OWN | own}))
        if not asked:
            raise ConfigError("tuning names no option: write e.g. client_lr = [0.001, 0.01] below [tuning]")
        spaces = {name: _space(config, values, asked) for name, values in entries_of(config).items()}
        for name in asked:
            if not any(name in space.values for space in spaces.values()):
                raise _idle(name, asked[name], spaces)
        tuned = {name: space for name, space in spaces.items() if space.values}
        for space in tuned.values():
            search.check_space(space)
        effort = cls(
            config,
            how,
            search,
            _trials(table, search, how, tuned),
            _seed(table, config),
            _by(table),
            tuned,
            tuple(name for name in spaces if name not in tuned),
        )
        effort._check_values()
        return effort

    def run(self, entry: str, point: Point) -> RunConfig:
        """The configuration of a trial. It has no loggers, no early stopping, and keeps no models. Raises
        ConfigError.
        """
        plain = {"seed": self.seed, "log_to": (), "stop_after": None, "keep_best": False, "snapshot_every": None}
        return self._entry(entry, point).model_copy(update=plain)

    def chosen(self, points: Mapping[str, Point]) -> CompareConfig:
        """The comparison in which the entries have these values."""
        entries = entries_of(self.config)
        variant = {name: {**values, **self._values(name, points.get(name, {}))} for name, values in entries.items()}
        values = self.config.model_dump(include=self.config.model_fields_set - {"tuning"})
        return CompareConfig.of({**values, "algorithms": (), "variant": variant})

    @property
    def remarks(self) -> tuple[str, ...]:
        """The tuned options and the way of tuning, a line each."""
        options = list(dict.fromkeys(name for space in self.spaces.values() for name in space.values))
        least = [name for name in options if all(name in space.values for space in self.spaces.values())]
        more = [
            f"{entry} also {', '.join(name for name in space.values if name not in least)}"
            for entry, space in self.spaces.items()
            if set(space.values) - set(least)
        ]
        what = "; ".join(filter(None, [", ".join(least), *more]))
        when = "after the last round" if self.by == "last" else "at the best evaluation"
        number = f"{self.trials} trial{'s' * (self.trials > 1)} of each method"
        first = (
            f"Tuning: {number} ({what}), {self.how}, on seed {self.seed}, by the score on the validation rows {when}"
        ) + ("" if self.overlap else "; no trial is trained or judged on test rows")
        idle = f"Not tuned, since none of these options is left to choose: {', '.join(self.untuned)}"
        return tuple(filter(None, (first, idle if self.untuned else "", self.overlap)))

    @property
    def overlap(self) -> str:
        """A sentence about test rows that trials may see; empty if there are none."""
        entries = [self._entry(name, _first_point(space)) for name, space in self.spaces.items()]
        if not any(run.evaluate_on != "global" and run.partition != "column" for run in entries):
            return ""
        return (
            "Each seed tests clients on rows of their own (evaluate_on), some of which trials on another seed are "
            "trained on"
        )

    def at_the_edge(self, entry: str, point: Point) -> list[str]:
        """The options whose value in `point` is at an end of the possible values, if values beyond it would be
        valid.
        """
        return [name for name, value in point.items() if _is_edge(name, value, self.spaces[entry].values[name])]

    def kinds(self, entry: str) -> Iterator[Point]:
        """A point of the entry, and then those that differ from it in a word, such as a cut: what is built of them
        differs in more than numbers.
        """
        first = _first_point(self.spaces[entry])
        yield first
        for name, values in self.spaces[entry].values.items():
            if not isinstance(values, Mapping):
                yield from ({**first, name: v} for v in values[1:] if not isinstance(v, int | float))

    def _entry(self, entry: str, point: Point) -> RunConfig:
        own = entries_of(self.config)[entry]
        return self.config.entry({**own, **self._values(entry, point)})

    def _values(self, entry: str, point: Point) -> dict[str, Any]:
        """The options of a point; several of one table of arguments beside those that the entry has."""
        values: dict[str, Any] = {}
        for name, value in point.items():
            option, _, argument = name.partition(".")
            if not argument:
                values[option] = value
                continue
            here = entries_of(self.config)[entry].get(option) or getattr(self.config, option, None) or {}
            values[option] = {**here, **values.get(option, {}), argument: value}
        return values

    def _check_values(self) -> None:
        """Raises ConfigError for a value that an option cannot have, before anything is trained."""
        for entry, space in self.spaces.items():
            first = _first_point(space)
            for name, values in space.values.items():
                tried = [values["low"], values["high"]] if isinstance(values, Mapping) else values
                for value in tried:
                    try:
                        self._entry(entry, {**first, name: value})
                    except ConfigError as error:
                        raise ConfigError(f"tuning.{name}: {error}") from None


def _search(table: Mapping[str, Any]) -> tuple[str, Search, set[str]]:
    """The search, how it is called, and its options. Raises ConfigError."""
    how = table.get("how", "grid")
    if not isinstance(how, str) or not (plugins.known("search", how) or plugins.is_reference(how)):
        raise ConfigError(unknown("tuning.how", how, plugins.names("search")))
    made = plugins.load("search", how)
    own = set(plugins.find("search", how).option_names)
    if not (isinstance(made, type) and issubclass(made, Search)):
        raise ConfigError(f"tuning.how = {how!r} is not a search: name a class derived from cutlayer.searches.Search")
    others = {o for name, entry in plugins.index("search").items() if name != how for o in entry.option_names}
    if idle := [name for name in table if name in others - own]:
        raise ConfigError(f"tuning.{idle[0]} has no effect on how = {how!r}: leave it out")
    return how, made.of({name: table[name] for name in own & set(table)}), own


def _dimensions(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What is tuned and the values of each: options, or arguments of an optimiser (client_optimizer_options.momentum).
    Raises ConfigError.
    """
    for name, value in table.items():
        _check_tunable(name)
        if name.endswith("_options") and isinstance(value, Mapping):
            yield from ((f"{name}.{k}", values_of(f"{name}.{k}", v, "tuning")) for k, v in value.items())
        else:
            yield name, values_of(name, value, "tuning")


def _check_tunable(name: str) -> None:
    """Raises ConfigError for options that do not belong to a method."""
    check_name(name, "tuning")
    if name in _LENGTHS:
        raise ConfigError(
            f"tuning.{name} is not possible, since trials would be trained for different times: tune other options, "
            f"and compare several {name} by [sweep]"
        )
    info = {**CommonConfig.model_fields, **RunConfig.model_fields}.get(name)
    kinds = {entry.kind for entry in owners_of(name)}
    shared = about(info, "group") in _SHARED_GROUPS if info is not None else kinds and kinds <= _SHARED_KINDS
    if shared or name in _SHARED:
        raise ConfigError(
            f"tuning.{name} is not possible, since it is what all methods are compared on: tune options of the "
            f"methods, and compare several values of {name} by [sweep]"
        )


def _space(config: CompareConfig, values: Mapping[str, Any], asked: Mapping[str, Any]) -> Space:
    """Those of the options that have an effect on an entry with these values of its own."""
    given = config.model_dump(include=config.model_fields_set - {"algorithms", "variant", "tuning"})

    def fits(name: str, possible: Any) -> bool:
        option, _, argument = name.partition(".")
        tried = [{argument: _first(possible)}] if argument else [_first(possible), *_listed(possible)]
        return any(fitting_point(config, given, values, {option: value}) for value in tried)

    return Space({name: possible for name, possible in asked.items() if fits(name, possible)})


def _listed(values: Any) -> Iterable[Any]:
    return () if isinstance(values, Mapping) else values


def _first_point(space: Space) -> Point:
    return {name: _first(values) for name, values in space.values.items()}


def _first(values: Any) -> Any:
    return values["low"] if isinstance(values, Mapping) else values[0]


def _trials(table: Mapping[str, Any], search: Search, how: str, spaces: Mapping[str, Space]) -> int:
    """The number of trials of each entry. Raises ConfigError if not all entries can have this number."""
    sizes = {entry: space.size for entry, space in spaces.items()}
    trials = table.get("trials")
    if trials is None:
        wanted = {entry: search.trials_of(space) for entry, space in spaces.items()}
        if None in wanted.values():
            raise ConfigError(f"tuning with how = {how!r} needs trials: say how many for each method, e.g. trials = 20")
        if len(set(wanted.values())) > 1:
            listed = ", ".join(f"{entry} {n:g}" for entry, n in wanted.items())
            raise ConfigError(
                f"tuning would have different numbers of trials ({listed}): say how many each method has, e.g. trials "
                f"= {min(sizes.values()):g}"
            )
        trials = int(next(iter(wanted.values())) or 0)
    if not isinstance(trials, int) or isinstance(trials, bool) or trials < 1:
        raise ConfigError(f"tuning.trials = {trials!r} is not possible: it must be a whole number of at least 1")
    entry = min(sizes, key=lambda name: sizes[name])
    if trials > sizes[entry]:
        raise ConfigError(
            f"tuning.trials = {trials} is more than the {sizes[entry]:g} points that there are for {entry!r}, and all "
            "methods have as many: give fewer trials, or more values, or a range"
        )
    return trials


def _seed(table: Mapping[str, Any], config: CompareConfig) -> int:
    """The seed that is tuned on: the next one, unless it is given. Raises ConfigError for one of the study's."""
    seed = table.get("seed", max(config.seeds, default=0) + 1)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ConfigError(f"tuning.seed = {seed!r} is not possible: it must be a whole number of at least 0")
    if seed in config.seeds:
        raise ConfigError(
            f"tuning.seed = {seed} is one of seeds = {list(config.seeds)}, whose scores are reported: choose another"
        )
    return seed


def _by(table: Mapping[str, Any]) -> By:
    by = table.get("by", "last")
    if by not in get_args(By):
        raise ConfigError(unknown("tuning.by", by, get_args(By)))
    return by  # type: ignore[no-any-return]


def _idle(name: str, values: Any, spaces: Mapping[str, Space]) -> ConfigError:
    owners = ", ".join(entry.name for entry in owners_of(name.partition(".")[0]))
    what = f"it belongs to {owners}; choose one of these, or leave it out" if owners else "leave it out"
    return ConfigError(
        f"tuning.{name} = {values!r} has no effect on any entry of this comparison ({', '.join(spaces)}), or all set "
        f"it themselves: {what}"
    )


def _is_edge(name: str, value: Any, values: Any) -> bool:
    """Whether `value` is at an end of its values, and others beyond that end are possible."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    numbers = [values["low"], values["high"]] if isinstance(values, Mapping) else [v for v in values if _is_number(v)]
    low, high = min(numbers), max(numbers)
    near = _NEAR * (high - low) if isinstance(values, Mapping) and not values.get("log") else 0.0
    factor = (high / low) ** _NEAR if isinstance(values, Mapping) and values.get("log") else 1.0
    least, most = _limits(name)
    at_low, at_high = value <= low * factor + near, value >= high / factor - near
    return bool(low < high and ((at_low and low > least) or (at_high and high < most)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _limits(name: str) -> tuple[float, float]:
    """The least and the greatest value that an option can have. Arguments of optimisers are not negative."""
    info = CommonConfig.model_fields.get(name)
    declared = [o.bounds for entry in owners_of(name) for o in entry.options if o.name == name]
    found = [{b: getattr(m, b) for m in info.metadata for b in ("ge", "le") if hasattr(m, b)}] if info else declared
    return (
        max((bounds.get("ge", float("-inf")) for bounds in found), default=0.0 if "." in name else float("-inf")),
        min((bounds.get("le", float("inf")) for bounds in found), default=float("inf")),
    )
