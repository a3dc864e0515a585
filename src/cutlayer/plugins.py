"""The registry of everything that can be chosen by name ("things"): algorithms, models, data, partitions, codecs,
defences.

One thing is one file with one registration. A thing is found by
1. its name in this package
   (a thing that takes an argument by its name and the argument: `hf:path/to/folder`);
2. the name of an entry point of an installed package, in the group of its kind (`cutlayer.algorithms`, ...);
3. `path/to/file.py:name` or `package.module:name`;
4. the object itself, from Python.

`index.json` has the content of this package's registrations, so that the command line's help does not import torch. It
is derived: `python -m cutlayer.derive` writes it, and a test checks it. If it is out of date, the files are imported
instead, which is slower but always right. A file is only read because the operator of this machine named it; received
data are never imported.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator
from pydantic.fields import FieldInfo

from cutlayer.errors import ConfigError, unknown

T = TypeVar("T")
_PACKAGE = Path(__file__).parent
_INDEX = "index.json"


@dataclass(frozen=True)
class Kind:
    """A kind of thing: the word for it, the modules of this package that register things of this kind, and its group of
    entry points. `flat`: its options are among those of a run (those of a codec are written with its name instead).
    `tabled`: its options have a table of their own.
    """

    word: str
    places: tuple[str, ...]
    group: str
    flat: bool = True
    tabled: bool = False


KINDS: dict[str, Kind] = {
    "algorithm": Kind("algorithm", ("algorithms",), "cutlayer.algorithms"),
    "model": Kind("model", ("models/zoo",), "cutlayer.models"),
    "task": Kind("task", ("tasks",), "cutlayer.tasks"),
    "metric": Kind("metric", ("tasks/measures",), "cutlayer.metrics"),
    "data": Kind("data set", ("data/built_in",), "cutlayer.data"),
    "format": Kind("data format", ("data/formats",), "cutlayer.formats"),
    "partition": Kind("partition", ("data/partitions",), "cutlayer.partitions"),
    "schedule": Kind("schedule", ("schedules",), "cutlayer.schedules"),
    "averaging": Kind("averaging rule", ("averagings",), "cutlayer.averagings"),
    "screening": Kind("screening", ("screenings",), "cutlayer.screenings"),
    "codec": Kind("codec", ("wire/codecs",), "cutlayer.codecs", flat=False),
    "defence": Kind("defence", ("defences",), "cutlayer.defences"),
    "attack": Kind("attack", ("attacks",), "cutlayer.attacks", flat=False),
    "logger": Kind("logger", ("loggers",), "cutlayer.loggers"),
    "search": Kind("search", ("searches",), "cutlayer.searches", flat=False, tabled=True),
    "optimizer": Kind("optimizer", (), "cutlayer.optimizers", flat=False),  # torch's are known by their names
    "head": Kind("auxiliary head", (), "cutlayer.heads", flat=False),  # an algorithm has one of its own
}

_PLAIN_KINDS = {"model", "data", "schedule", "optimizer", "metric", "head", "logger"}  # registered or not

SUPPLIED = frozenset({"input_shape", "classes", "cuts"})
"""Parameters of a model's function that the data and the cut decide: they are not options."""

_BASES = {"bool": bool, "int": int, "float": float, "str": str}
_BOUNDS = ("ge", "gt", "le", "lt")


@dataclass(frozen=True)
class Option:
    """An option of a thing, as it was declared. This is enough to make a flag, to check a value, and to write a table.

    `base` is bool, int, float or str. `choices` are the only possible values, if there are any. With `many`, values
    form a tuple; with `none`, None is allowed. `shared`: a client on another machine must have the same value.
    `planned`: `plan` reads the option.
    """

    name: str
    base: str
    default: Any
    help: str = ""
    choices: tuple[str, ...] = ()
    many: bool = False
    none: bool = False
    bounds: Mapping[str, float] = field(default_factory=dict)
    shared: bool = True
    planned: bool = False

    @property
    def annotation(self) -> Any:
        """The type of its values."""
        one: Any = Literal[self.choices] if self.choices else _BASES[self.base]
        several: Any = tuple[one, ...] if self.many else one
        return several | None if self.none else several

    @property
    def info(self) -> Any:
        """The pydantic field: default, bounds, help."""
        bounds: dict[str, Any] = dict(self.bounds)
        return Field(self.default, description=self.help, **bounds)

    @classmethod
    def from_field(cls, name: str, info: FieldInfo) -> Option:
        """The option that a pydantic field declares. Raises TypeError for a type that no flag can have."""
        base, choices, many, none = _plain(name, info.annotation)
        bounds = {b: getattr(m, b) for m in info.metadata for b in _BOUNDS if hasattr(m, b)}
        extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        return cls(
            name,
            base,
            info.get_default(),
            " ".join((info.description or "").split()),
            choices,
            many,
            none,
            bounds,
            bool(extra.get("shared", True)),
            bool(extra.get("planned", False)),
        )

    def as_json(self) -> dict[str, Any]:
        """Plain values, without defaults."""
        plain = {f: getattr(self, f) for f in self.__dataclass_fields__}
        unset: dict[str, Any] = {
            f: () if f == "choices" else {} if f == "bounds" else info.default
            for f, info in self.__dataclass_fields__.items()
        }
        return {f: v for f, v in plain.items() if f in ("name", "base", "default") or v != unset[f]}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Option:
        """What `as_json` gave."""
        made = dict(plain)
        made["choices"] = tuple(made.get("choices", ()))
        if made.get("many") and made["default"] is not None:
            made["default"] = tuple(made["default"])
        return cls(**made)


def option(
    default: Any,
    *,
    help: str | None = None,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    shared: bool = True,
    planned: bool = False,
) -> Any:
    """Declares an option of a thing, as a class attribute: `phi: float = option(0.5, ge=0, le=1)`.

    Its help text is `help`, or the string literal below the attribute. With `shared=False`, clients on other machines
    need not have the same value. With `planned=True`, `traffic` reads the option, so `plan` has it too.
    """
    return Field(
        default,
        description=help,
        ge=ge,
        gt=gt,
        le=le,
        lt=lt,
        json_schema_extra={"shared": shared, "planned": planned},
    )


@dataclass(frozen=True, eq=False)
class Entry:
    """The facts about a thing that are known without importing it. `where` is "module:attribute" (or
    "path.py:attribute"). `facts` are the other content of its registration.
    """

    kind: str
    name: str
    where: str
    title: str
    summary: str = ""
    options: tuple[Option, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def option_names(self) -> frozenset[str]:
        """The names of its options."""
        return frozenset(o.name for o in self.options)

    @property
    def defaults(self) -> dict[str, Any]:
        """Its options' defaults."""
        return {o.name: o.default for o in self.options}

    def checked(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """`values` of its options, converted and complete. Raises ConfigError: value, reason, remedy."""
        try:
            return dict(_form(self)(**values))
        except ValidationError as error:
            raise explain(error, _form(self)) from None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        facts = {k: sorted(v) if isinstance(v, set | frozenset) else v for k, v in self.facts.items()}
        return {
            "kind": self.kind,
            "name": self.name,
            "where": self.where,
            "title": self.title,
            "summary": self.summary,
            "options": [o.as_json() for o in self.options],
            "facts": facts,
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Entry:
        """What `as_json` gave."""
        return cls(**{**plain, "options": tuple(Option.from_json(o) for o in plain["options"])})


@cache
def _form(entry: Entry) -> type[BaseModel]:
    """A pydantic model of the entry's options."""
    fields: dict[str, Any] = {o.name: (o.annotation, o.info) for o in entry.options}
    return create_model(entry.title or entry.name, __base__=_Form, **fields)


class Typed(BaseModel):
    """Base of models that are made from the values of a file or from keywords. It distinguishes texts, numbers and
    truth values. Only flags, which are all texts, are converted.
    """

    @model_validator(mode="before")
    @classmethod
    def _refuse_mistyped(cls, values: Any) -> Any:
        for name, value in values.items() if isinstance(values, Mapping) else ():
            if name in cls.model_fields and (what := _mistyped(value, _simple(cls, name))):
                raise _impossible(name, repr(value), f"it must be {what}", cls.model_fields[name])
        return values


class _Form(Typed):
    """Base of the models of entries' options."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)


@cache
def _simple(model: type[BaseModel], name: str) -> tuple[str, bool]:
    """(base, many) of a field; an empty base if it is not a simple one, such as a table."""
    try:
        base, _, many, _ = _plain(name, model.model_fields[name].annotation)
    except TypeError:
        return "", False
    return base, many


_WORDS = {"bool": "true or false", "int": "a whole number", "float": "a number"}


def _mistyped(value: Any, simple: tuple[str, bool]) -> str:
    """What a value, or one of many, should be but is not; empty if it may be right."""
    base, many = simple
    if many:
        several = isinstance(value, list | tuple)
        what = next((w for one in value if (w := _mistyped(one, (base, False)))), "") if several else ""
        return f"a list, each {what}" if what else ""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    wrong = {
        "bool": isinstance(value, str) or number,
        "int": isinstance(value, str | bool),
        "float": isinstance(value, str | bool),
    }
    return _WORDS[base] if wrong.get(base) else ""


class Thing(Typed):
    """Base of things that have options: a frozen pydantic model whose fields are declared with `option`."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )
    entry: ClassVar[Entry]
    exclusive: ClassVar[tuple[tuple[str, str], ...]] = ()  # pairs of options: the second replaces the first

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> typing.Self:
        """Built from plain values. Raises ConfigError: value, reason, remedy."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise explain(error, cls) from None

    def check(self, given: frozenset[str]) -> None:
        """Check conditions that concern several options. `given` are the options that differ from their defaults.
        Raises ConfigError.
        """


_registered: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}  # by a decorator, in this process
_given: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}  # objects from Python, by their references


def register(kind: str, name: str, *, title: str = "", summary: str = "", **facts: Any) -> Callable[[T], T]:
    """A decorator that registers a class (a `Thing`) or a function under `name`. `facts` can be read without importing
    it.

    Kinds have their own decorators, with the facts that they need: `algorithms.algorithm`, `models.model`, ...
    """

    def decorate(thing: T) -> T:
        found: Any = thing
        first = inspect.cleandoc(found.__doc__ or "").split("\n", 1)[0]  # its own docstring, not that of a base class
        where = f"{found.__module__}:{found.__qualname__}"
        try:
            options = options_of(found) if KINDS[kind].flat or KINDS[kind].tabled else ()
        except TypeError as error:
            raise ConfigError(f"{KINDS[kind].word} {name!r}: {error}") from None
        facts.setdefault("exclusive", [list(pair) for pair in getattr(found, "exclusive", ())])
        found.entry = Entry(kind, name, where, title or name, summary or first, options, facts)
        _registered[kind][name] = found
        return thing

    return decorate


def options_of(thing: Any) -> tuple[Option, ...]:
    """The options that a class declares with `option`, or a function (or another class's constructor) as keyword-only
    parameters with defaults, except those that the caller supplies by name.
    """
    if inspect.isclass(thing) and issubclass(thing, BaseModel):
        return tuple(Option.from_field(name, info) for name, info in thing.model_fields.items())
    if not callable(thing):
        return ()
    own = {
        name: p
        for name, p in inspect.signature(thing).parameters.items()
        if p.kind is p.KEYWORD_ONLY and p.default is not p.empty and name not in SUPPLIED
    }
    hints = typing.get_type_hints(thing.__init__ if inspect.isclass(thing) else thing) if own else {}
    found = []
    for name, p in own.items():
        info = p.default if isinstance(p.default, FieldInfo) else FieldInfo(default=p.default)
        info.annotation = hints.get(name, str)
        found.append(Option.from_field(name, info))
    return tuple(found)


def positional(thing: Any) -> frozenset[str]:
    """The parameters with defaults of a function or a class's constructor that are not options, since they may be given
    by position.
    """
    if not callable(thing):
        return frozenset()
    parameters = inspect.signature(thing).parameters.values()
    return frozenset(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is not p.empty)


def index(kind: str) -> dict[str, Entry]:
    """This package's things of a kind, by name."""
    return _index()[kind]


def flat() -> list[Entry]:
    """This package's things whose options are among those of a run."""
    return [entry for name, kind in KINDS.items() if kind.flat for entry in index(name).values()]


def installed() -> list[Entry]:
    """The things of installed packages whose options are among those of a run, except those that cannot be imported.
    This imports all of them, so it is only used for error messages.
    """
    found = []
    for kind, about in KINDS.items():
        for name in _entry_points(kind) if about.flat else ():
            with contextlib.suppress(ConfigError):
                found.append(find(kind, name))
    return found


def names(kind: str) -> list[str]:
    """Everything that can be named: this package's things, then those of installed packages."""
    return [*index(kind), *(name for name in _entry_points(kind) if name not in index(kind))]


def known(kind: str, reference: object) -> bool:
    """Whether `reference` is the name of a thing (not that of a file, a module or anything else)."""
    named = isinstance(reference, str) and (reference in _given[kind] or reference in names(kind))
    return named or (isinstance(reference, str) and bool(argument_of(kind, reference)))


def parted(kind: str, reference: str) -> tuple[str, str]:
    """(name, argument) of a reference to a thing that takes an argument, such as hf:path/to/folder. Other references
    are names without an argument.
    """
    name, _, argument = reference.partition(":")
    takes = argument and name in index(kind) and index(kind)[name].facts.get("argument")
    return (name, argument) if takes else (reference, "")


def argument_of(kind: str, reference: str) -> str:
    """The argument in a reference such as hf:path/to/folder; empty if there is none."""
    return parted(kind, reference)[1]


def is_reference(text: str) -> bool:
    """Whether `text` looks like path/to/file.py:name or package.module:name."""
    place, colon, name = text.rpartition(":")
    return bool(colon) and name.isidentifier() and (place.endswith(".py") or _dotted(place))


def absolute(reference: str) -> str:
    """The reference with the whole path of its file or folder, so that it is found from every working directory."""
    for kind in KINDS:
        name, argument = parted(kind, reference)
        if argument:
            return f"{name}:{Path(argument).expanduser().resolve()}"
    place, mark, name = reference.partition(".py:")
    return f"{Path(f'{place}.py').expanduser().resolve()}:{name}" if mark and name else reference


def label(reference: str) -> str:
    """The short name of a thing, for places where a path is not possible, such as the name of a folder. For
    file.py:name, it is the name.
    """
    return reference.rpartition(":")[2]


def registered_name(kind: str, reference: str) -> str:
    """The name under which a thing was registered, wherever its file is. Machines with other paths can compare it."""
    reference, _ = parted(kind, reference)
    entry = None if reference in index(kind) else _registration(load(kind, reference))
    if entry is not None:
        return entry.name
    return label(reference) if is_reference(reference) else reference


def find(kind: str, reference: str) -> Entry:
    """The entry of the thing with that name or reference. Only things from outside this package are imported.
    Raises ConfigError with the known names.
    """
    if reference in _given[kind]:
        return _entry_of(kind, reference, _given[kind][reference])
    name, argument = parted(kind, reference)
    if argument:
        return _renamed(index(kind)[name], reference)
    if reference in index(kind):
        return index(kind)[reference]
    if reference in _entry_points(kind) or is_reference(reference):
        return _entry_of(kind, reference, load(kind, reference))
    raise ConfigError(
        _meant(kind, reference)
        or f"{unknown(KINDS[kind].word, reference, names(kind))}; or your own: path/to/file.py:name or "
        "package.module:name"
    )


def _meant(kind: str, reference: str) -> str:
    """What is wrong with a file without a name in it, or several names in one word; empty if it is neither."""
    word = KINDS[kind].word
    if reference.endswith(".py") and Path(reference).expanduser().is_file():
        try:
            module = _module_of(str(Path(reference).expanduser().resolve()))
        except (Exception, SystemExit) as error:  # the user's file: anything can come out
            reason = f"{type(error).__name__}: {error}"
            return f"{word} {reference!r} cannot be imported ({reason}): correct it, and give path/to/file.py:name"
        things = [getattr(module, name) for name in _defined(module)]
        offered = [
            f"{reference}:{t.__qualname__}" for t in things if (e := _registration(t)) is not None and e.kind == kind
        ]
        what = f"it offers {', '.join(offered)}" if offered else f"it registers no {word}"
        return f"{word} {reference!r} is a file, not a thing in it: {what}; give path/to/file.py:name"
    several = [part.strip() for part in reference.split(",")]
    if len(several) > 1 and all(known(kind, part) for part in several):
        how = f" (cutlayer compare --algorithms {' '.join(several)})" if kind == "algorithm" else ""
        return (
            f"{word} {reference!r} is several names in one word: separate them by spaces if several can be named{how}"
        )
    return ""


def load(kind: str, reference: str) -> Any:
    """The thing itself: a class or a function. Raises ConfigError if it is unknown or cannot be imported."""
    if reference in _given[kind]:
        return _given[kind][reference]
    name, argument = parted(kind, reference)
    if name in index(kind):
        if not argument and (wanted := index(kind)[name].facts.get("argument")):
            raise ConfigError(f"{KINDS[kind].word} {name!r} needs {wanted}: name it with {name}:...")
        module, _, attribute = index(kind)[name].where.partition(":")
        thing = getattr(importlib.import_module(module), attribute)
        return functools.partial(thing, argument) if argument else thing
    if reference in _entry_points(kind):
        return _loaded_entry_point(_entry_points(kind)[reference], KINDS[kind].word)
    if is_reference(reference):
        return _loaded(KINDS[kind].word, reference)
    find(kind, reference)  # raises
    raise AssertionError


def adopt(kind: str, thing: Any) -> tuple[str, dict[str, Any]]:
    """(reference, option values) of an object from Python: a name as it is; a class, function or configured instance.

    The reference of an object can be stored; in another process it is found again if its module can be imported.
    """
    if isinstance(thing, str):
        return thing, {}
    values = thing.model_dump(exclude_defaults=True) if isinstance(thing, Thing) else {}
    made = type(thing) if isinstance(thing, Thing) else thing
    if not hasattr(made, "__qualname__"):
        raise ConfigError(
            f"{thing!r} is not {_one(kind)}: give a name, a class that is registered, or an object of one"
        )
    entry = _registration(made)
    if entry is not None and entry.name in index(kind) and index(kind)[entry.name].where == entry.where:
        return entry.name, values
    reference = f"{made.__module__}:{made.__qualname__}"
    _given[kind][reference] = made
    return reference, values


_PLAIN = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "it must be a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "it must be a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "it must be true or false"),
    "string_type": "it must be a text",
    "tuple_type": "it must be a list",
}  # if pydantic's own message is about parsing


def explain(error: ValidationError, model: type[BaseModel]) -> ConfigError:
    """One sentence for the first error that pydantic found: value, reason, remedy."""
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        return ConfigError(unknown("option", name, model.model_fields))
    if first["type"] == "literal_error" and isinstance(first["input"], str):
        return ConfigError(unknown(name, first["input"], _choices(model.model_fields[name].annotation)))
    message = _PLAIN.get(first["type"]) or str(first["msg"]).replace("Input should be", "it must be")
    message = message[:1].lower() + message[1:]
    return _impossible(name, first["input"], message, model.model_fields.get(name))


def _impossible(name: str, value: object, message: str, info: FieldInfo | None) -> ConfigError:
    about = f" ({' '.join(info.description.split())})" if info is not None and info.description else ""
    return ConfigError(f"{name} = {value} is not possible: {message}{about}")


def fingerprint(kind: str, reference: str) -> str:
    """SHA-256, in hexadecimal, of the file of a thing from outside this package; empty for this package's things."""
    return "" if parted(kind, reference)[0] in index(kind) else source_digest(load(kind, reference))


def source_digest(thing: Any) -> str:
    """SHA-256, in hexadecimal, of the file that defines a class or function; empty if there is none."""
    try:
        path = inspect.getsourcefile(thing)
    except TypeError:  # defined at a prompt
        path = None
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path and Path(path).is_file() else ""


# The index


def _modules(kind: str) -> list[str]:
    """The modules of this package that register things of a kind, in order."""
    found = []
    for place in KINDS[kind].places:
        folder = _PACKAGE / place
        base = f"cutlayer.{place.replace('/', '.')}"
        if folder.is_dir():
            found += [f"{base}.{p.stem}" for p in sorted(folder.glob("*.py")) if not p.stem.startswith("_")]
        elif folder.with_suffix(".py").is_file():
            found.append(base)
    return found


def _digest() -> str:
    """Of all files that could register something."""
    digest = hashlib.sha256()
    for kind in KINDS:
        for module in _modules(kind):
            path = _PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
            digest.update(f"{module}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def _index() -> dict[str, dict[str, Entry]]:
    return stored_index() or scan()


def stored_index() -> dict[str, dict[str, Entry]] | None:
    """The content of `index.json`; None if it is missing, or older than a file that could register something."""
    try:
        stored = json.loads((_PACKAGE / _INDEX).read_bytes())
    except (OSError, ValueError):
        return None
    if stored.get("digest") != _digest():
        return None
    found: dict[str, dict[str, Entry]] = {kind: {} for kind in KINDS}
    for plain in stored["things"]:
        found[plain["kind"]][plain["name"]] = Entry.from_json(plain)
    return found


def scan() -> dict[str, dict[str, Entry]]:
    """The registrations of this package's files, found by importing them all."""
    found: dict[str, dict[str, Entry]] = {}
    for kind in KINDS:
        modules = _modules(kind)
        for module in modules:
            importlib.import_module(module)
        own = [t for t in _registered[kind].values() if t.__module__ in modules]
        found[kind] = {t.entry.name: t.entry for t in sorted(own, key=lambda t: modules.index(t.__module__))}
    return found


def write_index() -> Path:
    """Write `index.json` from the registrations of the files."""
    things = [entry.as_json() for kind in scan().values() for entry in kind.values()]
    path = _PACKAGE / _INDEX
    path.write_text(json.dumps({"digest": _digest(), "things": things}, indent=1) + "\n", encoding="utf-8")
    _index.cache_clear()
    return path


# Things from elsewhere


@cache
def _entry_points(kind: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=KINDS[kind].group)}


def _loaded_entry_point(point: EntryPoint, word: str) -> Any:
    try:
        return point.load()
    except Exception as error:  # another package: any error is possible
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"the {word} {point.name!r} of an installed package cannot be imported ({reason}): update or uninstall it"
        ) from error


@cache
def _module_of(place: str) -> types.ModuleType:
    """The module of a file (given as an absolute path) or of a dotted name. It can import files in its folder."""
    folder = str(Path(place).parent if place.endswith(".py") else Path.cwd())
    sys.path.insert(0, folder)
    try:
        return _file_module(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    finally:
        sys.path.remove(folder)


def _file_module(path: Path) -> types.ModuleType:
    place = str(path)
    name = f"cutlayer_own_{path.stem}_{hashlib.sha256(place.encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, "a path that ends in .py has a spec"
    assert spec.loader is not None, "and a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _loaded(word: str, reference: str) -> Any:
    place, _, name = reference.rpartition(":")
    if place.endswith(".py"):
        path = Path(place).expanduser()
        if not path.is_file():
            raise ConfigError(f"{word} {reference!r}: there is no file {place!r} (from {Path.cwd()}); check the path")
        place = str(path.resolve())
    try:
        module = _module_of(place)
    except (Exception, SystemExit) as error:  # the user's file: anything can come out
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")
        raise ConfigError(
            f"{word} {reference!r} cannot be imported ({reason}): correct the file or the name"
        ) from error
    if not hasattr(module, name):
        if place == "__main__":
            raise ConfigError(f"{word} {reference!r} is in a script that is not running: continue from that script")
        raise ConfigError(unknown(f"{word} in {place!r}:", name, _defined(module)))
    return getattr(module, name)


def _defined(module: types.ModuleType) -> list[str]:
    """The objects that a module defines itself, without imported ones."""
    named = {name: getattr(thing, "__module__", None) for name, thing in vars(module).items()}
    return [name for name, owner in named.items() if owner == module.__name__ and not name.startswith("_")]


def _entry_of(kind: str, reference: str, thing: Any) -> Entry:
    """The entry of a thing from outside this package, under the name by which it was requested."""
    entry = _registration(thing)
    if entry is not None and entry.kind != kind:
        raise ConfigError(f"{reference!r} is {_one(entry.kind)}, not {_one(kind)}")
    if entry is not None:
        return _renamed(entry, reference)
    if kind in _PLAIN_KINDS and callable(thing):  # a plain function will do
        try:
            options = options_of(thing) if KINDS[kind].flat or KINDS[kind].tabled else ()
        except (TypeError, NameError) as error:
            raise ConfigError(f"{KINDS[kind].word} {reference!r}: {error}") from None
        return Entry(kind, reference, reference, getattr(thing, "__name__", reference), options=options)
    raise ConfigError(
        f"{KINDS[kind].word} {reference!r} is not registered: decorate it (see docs/extending.md), or name another"
    )


def _one(kind: str) -> str:
    word = KINDS[kind].word
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _registration(thing: Any) -> Entry | None:
    """The thing's own registration: a class that is derived from a registered one is another thing."""
    found: Entry | None = getattr(thing, "__dict__", {}).get("entry")
    return found


@cache
def _renamed(entry: Entry, reference: str) -> Entry:
    return replace(entry, name=reference)


def _dotted(text: str) -> bool:
    return bool(text) and all(part.isidentifier() for part in text.split("."))


# Types


def _plain(name: str, annotation: Any) -> tuple[str, tuple[str, ...], bool, bool]:
    """(base, choices, many, none) of a type. Raises TypeError if a flag cannot have this type."""
    none = many = False
    if get_origin(annotation) in (typing.Union, types.UnionType):
        parts = [p for p in get_args(annotation) if p is not type(None)]
        none = len(parts) < len(get_args(annotation))
        if len(parts) != 1:
            raise TypeError(f"option {name!r} has the type {annotation}: give it one type, or None")
        annotation = parts[0]
    if get_origin(annotation) is tuple:
        inner = get_args(annotation)
        if len(inner) != 2 or inner[1] is not Ellipsis:
            raise TypeError(f"option {name!r} has the type {annotation}: make it tuple[..., ...] of one type")
        many, annotation = True, inner[0]
    if get_origin(annotation) is Literal:
        words = get_args(annotation)
        if not all(isinstance(w, str) for w in words):
            raise TypeError(f"option {name!r} has the type {annotation}: choices must be words")
        return "str", tuple(words), many, none
    base = next((word for word, kind in _BASES.items() if kind is annotation), None)
    if base is None:
        raise TypeError(
            f"option {name!r} has the type {annotation}: an option is bool, int, float, str or a Literal of words, "
            "optional or a tuple of these"
        )
    return base, (), many, none


def _choices(annotation: Any) -> list[str]:
    """The words of a Literal, also inside a union."""
    return [word for part in get_args(annotation) for word in ([part] if isinstance(part, str) else _choices(part))]


def listing(kind: str) -> Iterable[Entry]:
    """Everything that can be named, for tables: entries of installed packages are imported for this."""
    for name in names(kind):
        yield find(kind, name)
