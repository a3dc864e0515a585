"""Checks the content of stored files before it is used: types, ranges, keys, shapes, depth.

Stored objects declare their form as a class (`Stored`), which `checked` compares. Tensors are compared with those that
they will replace (`fit`). Files are opened within `reading`, which reports what is wrong with which file. Imports
nothing heavy.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from cutlayer.errors import RunFolderError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

Count = Annotated[int, Meta(ge=0, le=(1 << 62))]
Amount = Annotated[float, Meta(ge=0, le=1e300)]  # not NaN
Digits = Annotated[str, Meta(pattern=r"^(0|[1-9][0-9]{0,8})\Z")]
"""The number of a client as a key."""

Number = int | float | None
Metric = Number | list[Number | list[Number]]
"""The value of a metric: a number, one for each class, or a matrix; None where it is not defined."""

ANEW = (
    "it was changed, or written by another version of Cutlayer: restore it from a copy, or start anew in another folder"
)


class MalformedError(Exception):
    """Stored content does not have its form; `reading` turns this into a sentence about the file."""


class Stored(msgspec.Struct, forbid_unknown_fields=True):
    """Base of the forms: every field must be there, unless it has a default, and no other."""


def checked(value: object, form: type[T], what: str = "") -> T:
    """`value` in its form: nothing is converted, except whole numbers for floats. Raises MalformedError."""
    try:
        return msgspec.convert(value, form)
    except msgspec.ValidationError as error:
        sentence = str(error).replace("`", "").replace("$", "").replace(" - at ", " at ")
    except RecursionError:
        sentence = "it is nested too deeply"
    except (AttributeError, RuntimeError, TypeError, ValueError):  # tensors, asked to be a mapping or a number
        msgspec.inspect.type_info(form)  # which raises if the form itself is wrong
        sentence = "a tensor, where a plain value belongs"
    raise MalformedError(f"{what}: {sentence}" if what else sentence)


def form_of(made: type[Any], *, whole: bool = False) -> type[Any]:
    """The form of a dataclass as a JSON object: its fields and no others; whole numbers are not negative. Fields with a
    default may be left out, unless it has to be `whole`.
    """
    if (made, whole) not in _FORMS:
        _FORMS[made, whole] = _form_of(made, whole)
    return _FORMS[made, whole]


_FORMS: dict[tuple[type[Any], bool], type[Any]] = {}


def _form_of(made: type[Any], whole: bool) -> type[Any]:
    hints, places = get_type_hints(made), list[Any]()
    for one in fields(made):
        hint = _counted(hints[one.name])
        if one.default_factory is not MISSING and not whole:
            places.append((one.name, hint, msgspec.field(default_factory=one.default_factory)))
        else:
            places.append((one.name, hint) if whole or one.default is MISSING else (one.name, hint, one.default))
    return msgspec.defstruct(made.__name__, places, bases=(Stored,), kw_only=True)


def _counted(hint: Any) -> Any:
    """The type, with counts for whole numbers."""
    if get_origin(hint) in (Union, UnionType):
        return Union[tuple(_counted(one) for one in get_args(hint))]  # noqa: UP007 (built while running)
    return Count if hint is int else hint


def remade(made: type[T], value: object, what: str = "", *, whole: bool = False) -> T:
    """A dataclass from its JSON object, a `whole` one where no field may be left out. Raises MalformedError."""
    form = checked(value, form_of(made, whole=whole), what)
    return made(**{name: getattr(form, name) for name in form.__struct_fields__})


def sized(values: Sequence[Any], count: int, what: str) -> None:
    """Raises MalformedError unless there is one of `values` for each of `count` clients."""
    if len(values) != count:
        raise MalformedError(f"{what} has {len(values)} entries, not one for each of {count} clients")


def below(numbers: Collection[int], count: int, what: str) -> None:
    """Raises MalformedError unless the numbers are those of clients, each once."""
    if len(set(numbers)) != len(numbers) or not all(0 <= k < count for k in numbers):
        raise MalformedError(f"{what} names clients {sorted(numbers)}, each of which is one of {count}, named once")


def fit(given: Mapping[str, Tensor], like: Mapping[str, Tensor], what: str) -> None:
    """Raises MalformedError unless the tensors have the names, shapes and types of those that they replace, and are
    finite where those are.
    """
    for name in {**like, **given}:
        if name not in given or name not in like:
            raise MalformedError(f"{what} {'has' if name in given else 'lacks'} {name!r}")
        fits(given[name], like[name], f"{what}: {name!r}")


def fits(given: Tensor, like: Tensor, what: str) -> None:
    """Raises MalformedError unless a tensor can replace `like`: the same shape and type, finite if that is."""
    if (given.shape, given.dtype) != (like.shape, like.dtype):
        raise MalformedError(
            f"{what} is {given.dtype} {tuple(given.shape)}, where {like.dtype} {tuple(like.shape)} belongs"
        )
    if not all_finite(given) and all_finite(like):
        raise MalformedError(f"{what} holds NaN or infinite numbers")


def all_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor are finite."""
    return not (tensor.is_floating_point() or tensor.is_complex()) or bool(tensor.isfinite().all())


_WRONG = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@contextmanager
def reading(path: Path, remedy: str = ANEW) -> Iterator[None]:
    """Turns any error of content read from `path` into a RunFolderError with the remedy: MalformedError, and errors of
    objects without a form, such as the user's own optimiser.
    """
    try:
        yield
    except MalformedError as error:
        raise RunFolderError(f"{str(path)!r} is damaged or of another kind: {error}; {remedy}") from None
    except _WRONG as error:
        kind = type(error).__name__
        reason = " ".join(str(error).split())[:300] or "no more is known"
        raise RunFolderError(f"{str(path)!r} is damaged or of another kind ({kind}: {reason}); {remedy}") from error


def parsed(text: str | bytes) -> Any:
    """JSON as plain values. Raises MalformedError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise MalformedError("it is nested too deeply") from None
    except ValueError as error:
        raise MalformedError(f"it is not JSON ({error})") from None
