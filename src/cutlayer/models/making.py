"""Making a model: one of the zoo, of an installed package, or of the user's own file.

A model is made by a function that is registered with `model`, or by a plain function or `nn.Module` class. It takes no
arguments, or `input_shape` (of one sample), `classes` and `cuts` (the modules after which it will be cut) by these
names; keyword-only parameters with defaults are its options.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from pydantic.fields import FieldInfo
from torch import nn

from cutlayer.errors import ConfigError, CutlayerError
from cutlayer.models.parts import one_line
from cutlayer.plugins import find, load, register

F = TypeVar("F", bound=Callable[..., nn.Module])


def model(
    name: str,
    *,
    title: str = "",
    summary: str = "",
    cuts: Sequence[str] = (),
    default_cut: str | None = None,
    argument: str = "",
    paper: str = "",
    library: str = "",
) -> Callable[[F], F]:
    """A decorator that registers a function (or an `nn.Module` class) that makes a model.

    `cuts` are its named cut points in the order data flows, and `default_cut` is the one that is used if none is named.
    `argument` describes the text after the name and a colon, for a model that is made from something: the function's
    first parameter. `paper` and `library` are its citations (see `cutlayer.references`).
    """
    facts = {"argument": argument} if argument else {}
    facts |= {"paper": paper, "library": library}
    return register("model", name, title=title, summary=summary, cuts=list(cuts), default_cut=default_cut, **facts)


def build(
    reference: str, input_shape: Sequence[int], classes: int, *, at: Sequence[str] = (), **options: Any
) -> nn.Module:
    """The model `reference` for samples of `input_shape` (no batch dimension) and `classes` logits: [R, K]. `at` are
    the modules after which it will be cut, if that is known.

    `reference` is a name of the zoo or of an entry point, or `path/to/file.py:name` or `package.module:name`. Weights
    are drawn from torch's global generator (see `seeds.torch_seeded`).
    Raises ConfigError: unknown model or option, fewer than two classes, samples that the model cannot take, or any
    error of a user's own function.
    """
    function = load("model", reference)
    if isinstance(function, nn.Module):
        raise ConfigError(f"model {reference!r} is an existing module: name a function or class that makes a new one")
    entry = find("model", reference)
    if odd := sorted(set(options) - entry.option_names):
        raise ConfigError(f"{odd[0]} = {options[odd[0]]!r} has no effect on the model {reference!r}: leave it out")
    return make(function, input_shape, classes, name=reference, options=entry.checked(options), at=at)


def make(
    function: Callable[..., Any],
    input_shape: Sequence[int],
    classes: int,
    *,
    name: str = "",
    options: Mapping[str, Any] | None = None,
    at: Sequence[str] = (),
) -> nn.Module:
    """The result of `function` for samples of this form, called with its named parameters. Raises ConfigError with the
    reason.
    """
    name = name or getattr(function, "__name__", "of your own")
    if classes < 1:
        raise ConfigError(f"classes = {classes}: a model gives at least one number; check the targets")
    if not input_shape or min(input_shape) < 1:
        raise ConfigError(f"input shape {tuple(input_shape)}: every dimension must be at least 1; check the data set")
    supplied = {"input_shape": tuple(input_shape), "classes": classes, "cuts": tuple(at)}
    arguments = _arguments(function, name, supplied)
    try:
        with warnings.catch_warnings():
            if _on_meta():
                warnings.simplefilter("ignore")  # initialising tensors without values
            made = function(**(arguments | dict(options or {})))
    except CutlayerError:
        raise
    except Exception as error:  # the user's code: any error is possible
        raise ConfigError(_cannot(name, one_line(error))) from error
    if not isinstance(made, nn.Module):
        raise ConfigError(f"model {name!r} returns a {type(made).__name__}: have it return an nn.Module")
    return made


def _arguments(function: Callable[..., Any], name: str, supplied: dict[str, Any]) -> dict[str, Any]:
    """The values of `supplied` for which the function has parameters, and the defaults that it declares with `option`.

    Raises ConfigError for other mandatory parameters.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C, without a signature
        return {}
    by_name = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for p in parameters:
        optional = p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        if not optional and not (p.name in supplied and p.name in by_name):
            raise ConfigError(
                f"model {name!r} needs the argument {p.name!r}: give it a default, or take input_shape and classes by "
                "these names"
            )
    declared = {p.name: p.default.get_default() for p in parameters if isinstance(p.default, FieldInfo)}
    return declared | {key: value for key, value in supplied.items() if key in by_name}


def _on_meta() -> bool:
    return torch.empty(0).is_meta


def _cannot(name: str, reason: str) -> str:
    """The sentence for a model that cannot be made here."""
    if _on_meta():
        return (
            f"model {name!r} cannot be made on the meta device, where tensors have no values ({reason}): have the "
            "function return the module as it is when new, without reading values or loading weights"
        )
    return f"model {name!r} cannot be made ({reason}): correct its function"
