"""Flags, derived from the options of all runs, and from those of everything that can be chosen.

Things of this package or of installed ones are known before parsing. The user's own things are searched for in the
words of the command line and in the file of `--config`, so that their options are flags, too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Annotated, Any, Literal, get_origin, get_type_hints

from cyclopts import App, Group, Parameter
from pydantic import BaseModel, BeforeValidator, ConfigDict, create_model

from cutlayer import plugins
from cutlayer.errors import CutlayerError
from cutlayer.folder import CONFIG
from cutlayer.options import (
    CLIENTS,
    CROSSING,
    DATA,
    DEFENCES,
    GROUPS,
    MODEL,
    NAMING,
    OUTPUT,
    TASK,
    TRAINING,
    CommonConfig,
    PlanConfig,
    about,
    read_toml,
)
from cutlayer.plugins import Entry

_STAR = Parameter(name="*")
OWN = "Options of single algorithms"
_GROUPS = {name or OWN: Group(name or OWN, sort_key=i) for i, name in enumerate(GROUPS)}
# The options that name things, with their kinds; several things of a kind can be named.
_NAMING = {option: kind for option, kind in NAMING.items() if plugins.KINDS[kind].flat}
# The options for a first study. `--help` shows these, `--help-all` all of them.
FIRST = {"algorithm", "algorithms", "seed", "seeds", "data", "clients", "partition", "dirichlet_alpha", "participation"}
FIRST |= {"model", "cut", "epochs", "batch", "client_optimizer", "client_lr", "server_lr", "device"}
RARE = {"rank_timeout"}  # parameters of commands that only `--help-all` shows
_PLACES = {"algorithm": OWN, "partition": CLIENTS, "schedule": TRAINING, "model": MODEL, "data": DATA, "format": DATA}
_PLACES |= {
    "defence": DEFENCES,
    "task": TASK,
    "metric": TASK,
    "averaging": TRAINING,
    "screening": CROSSING,
    "logger": OUTPUT,
}
_PREFIXES = {
    kind: f"{kind} {{}}"
    for kind in ("partition", "schedule", "averaging", "screening", "model", "format", "task", "metric", "logger")
}


@dataclass(frozen=True)
class Command:
    """A command: its function, and the classes whose fields become the flags of its parameters in `flags`."""

    function: FunctionType
    sort_key: int
    name: str | None
    flags: Mapping[str, type[BaseModel]]

    def add_to(self, app: App, own: Sequence[Entry], *, wide: bool = False) -> None:
        """Make it a command of `app`, with the options of the user's `own` things among its flags; its help shows all
        of them if it is `wide`, otherwise the most important ones and the user's own.
        """
        f = self.function
        made = FunctionType(f.__code__, f.__globals__, f.__name__, f.__defaults__, f.__closure__)
        made.__doc__, made.__kwdefaults__ = f.__doc__, f.__kwdefaults__
        models = {
            parameter: Annotated[flags_of(c, own, wide=wide) | None, _STAR] for parameter, c in self.flags.items()
        }
        rare = set() if wide or not self.flags else RARE & set(f.__kwdefaults__ or ())
        if not wide and (hidden := len(rare) + sum(map(_hidden, self.flags.values()))):
            summary, _, rest = (f.__doc__ or "").partition("\n")
            made.__doc__ = f"{summary}\n\n{' ' * 4}`--help-all` shows {hidden} more options.\n{rest}"
        types = get_type_hints(f, include_extras=True) if rare else {}
        unseen = {name: Annotated[types[name], Parameter(show=False)] for name in rare}
        made.__annotations__ = {**f.__annotations__, **models, **unseen}
        app.command(made, name=self.name, sort_key=self.sort_key)


COMMANDS: list[Command] = []


def command(
    sort_key: int, name: str | None = None, **flags: type[BaseModel]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a function as a command. A parameter named in `flags` gets a model of the given flags."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        assert isinstance(function, FunctionType), "commands are plain functions"
        COMMANDS.append(Command(function, sort_key, name, flags))
        return function

    return decorate


def flags_of(config: type[BaseModel], own: Sequence[Entry] = (), *, wide: bool = True) -> type[BaseModel]:
    """A model of all flags of a command: the fields of `config`, and the options of everything that it can choose.
    Unless it is `wide`, help does not show all of them.
    """
    return _model_of(config, tuple(own), wide or not issubclass(config, CommonConfig))


def _hidden(config: type[BaseModel]) -> int:
    """How many flags of a command its short help does not show."""
    return len(set(flags_of(config).model_fields) - FIRST) if issubclass(config, CommonConfig) else 0


@cache  # several commands have the same flags
def _model_of(config: type[BaseModel], own: tuple[Entry, ...], wide: bool) -> type[BaseModel]:
    fields: dict[str, Any] = {}
    mine = {option.name for entry in own for option in entry.options}

    def shown(name: str) -> bool:
        return wide or name in FIRST or name in mine

    for name, info in config.model_fields.items():
        group = about(info, "group")
        if group:
            fields[name] = (_flag(info.annotation, group, shown(name)), info)
    for name, (option, owners) in _options(config, own).items():
        if name in fields:
            continue
        kind = owners[0].kind
        whose = _PREFIXES.get(kind, "{}").format(", ".join(e.name for e in owners))
        text = f"{whose}: {option.help}" if kind != "defence" else option.help
        made = replace(option, help=text)
        fields[name] = (_flag(option.annotation, _PLACES[kind], shown(name)), made.info)
    settings = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)
    model: type[BaseModel] = create_model(config.__name__, __config__=settings, **fields)
    return model


def _options(config: type[BaseModel], own: Sequence[Entry]) -> dict[str, tuple[plugins.Option, list[Entry]]]:
    """Every option of everything that can be chosen, with the things that have it."""
    kinds: tuple[str, ...] = getattr(config, "kinds", ())
    found: dict[str, tuple[plugins.Option, list[Entry]]] = {}
    for entry in (*_listed(kinds), *(e for e in own if e.kind in kinds)):
        for option in entry.options:
            if issubclass(config, PlanConfig) and entry.kind == "algorithm" and not option.planned:
                continue
            found.setdefault(option.name, (option, []))[1].append(entry)
    return found


def _listed(kinds: Iterable[str]) -> Iterator[Entry]:
    for kind in kinds:
        yield from plugins.index(kind).values()


def _flag(annotation: Any, group: str, shown: bool) -> Any:
    """The type of a field as that of a flag, `shown` in help or not."""
    several = get_origin(annotation) is tuple
    mapping = "dict" in str(annotation)
    negative: dict[str, Any] = {"negative": ()} if several or mapping else {}
    parameter = Parameter(group=_GROUPS[group], consume_multiple=several, show=shown, **negative)
    if mapping:
        return Annotated[annotation, BeforeValidator(_typed), parameter]
    if get_origin(annotation) is Literal:
        return Annotated[annotation, BeforeValidator(_lowered), parameter]
    return Annotated[annotation, parameter]


def _lowered(word: Any) -> Any:
    """Choices are converted to lower case."""
    return word.lower() if isinstance(word, str) else word


def _typed(options: Any) -> Any:
    """Options given as flags are texts: those with true, 0.9 or [0.9, 0.99] become these values."""
    if not isinstance(options, Mapping):
        return options
    return {name: _value(v) if isinstance(v, str) else _typed(v) for name, v in options.items()}


def _value(text: str) -> Any:
    try:
        value = json.loads(text.lower() if text.lower() in ("true", "false") else text)
    except ValueError:
        return text
    finite = isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value))
    return value if finite or isinstance(value, list) else text


def own_things(words: Sequence[str]) -> tuple[list[Entry], list[CutlayerError]]:
    """The user's own things that a command line names, directly or in its configuration file; and the reasons for those
    that cannot be found, which the command reports.
    """
    found: dict[tuple[str, str], None] = {}
    for option, values in _named(words):
        for value in values:
            if (kind := _NAMING.get(option)) and not plugins.index(kind).get(plugins.parted(kind, value)[0]):
                found[kind, value] = None
    own, missing = list[Entry](), list[CutlayerError]()
    for kind, value in found:
        if plugins.known(kind, value) or plugins.is_reference(value):
            try:
                own.append(plugins.find(kind, value))
            except CutlayerError as error:
                missing.append(error)
    return own, missing


def _named(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """(option, values) of the flags among `words`, and of the file that `--config` names."""
    if words[:1] == ["resume"]:  # the things of the run in that folder
        for word in words[1:]:
            yield from _in_file(Path(word) / CONFIG)
    option, values = "", list[str]()
    for word in (*words, "--"):
        if word.startswith("--"):
            if option:
                yield option, values
                if option == "config" and values:
                    yield from _in_file(Path(values[0]))
            option, _, value = word[2:].partition("=")
            option, values = option.replace("-", "_"), [value] if value else []
        else:
            values.append(word)


def _in_file(path: Path) -> Iterator[tuple[str, list[str]]]:
    try:
        table = read_toml(path)
    except CutlayerError:
        return
    variants = table.get("variant", {})
    for values in (table, *(variants.values() if isinstance(variants, Mapping) else ())):
        for option, value in values.items() if isinstance(values, Mapping) else ():
            yield option.replace("-", "_"), [str(v) for v in (value if isinstance(value, list) else [value])]
