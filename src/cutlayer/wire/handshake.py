"""Checks that both sides mean the same run: each compares the other's terms with its own, and says what differs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator
from typing import cast

from torch import nn

from cutlayer.models.parts import state_names
from cutlayer.text import plain
from cutlayer.wire.messages import Names, Reason, Refused, StepTerms, TensorSpec, Terms
from cutlayer.wire.names import both

_SAME = "start both with the same configuration"
CUT, RANK = "cut", "the rank of the client's adapters"
"""What options are called that the shapes of one client's model follow from."""
_SHAPING = (CUT, RANK)
_REMEDIES: dict[str, tuple[Reason, str, str]] = {
    "protocol": ("protocol", "the protocol", "install the same version of cutlayer on both sides"),
    "run": ("run", "the run", "give both sides the same run, or the client the address of its own server"),
    "algorithm": ("algorithm", "the algorithm", _SAME),
    "classes": (
        "data",
        "the list of the classes",
        "set class_names to all labels, in order, in the configuration of both sides",
    ),
    "features": (
        "data",
        "the list of the features",
        "give both sides files with the same columns and categories in the same order, or name the same columns in "
        "both configurations (columns, ignore_columns)",
    ),
    "crossing": ("crossing", "what goes up at the cut", "give both sides the same model, cut and data"),
    "returning": ("crossing", "what comes down at the second cut", "give both sides the same model and tail_cut"),
    "part": (
        "model",
        "the fingerprint of the client's model",
        "give both sides the same model, cut and number of classes, and the same version of torch",
    ),
    "batch": ("step", "batch", _SAME),
    "up": ("codec", "the codec of what goes up", "give both sides the same codec"),
    "down": ("codec", "the codec of what comes down", "give both sides the same codec"),
}


def agree(theirs: Terms, ours: Terms, they: str = "the client", we: str = "the server") -> Refused | None:
    """None if the terms are equal, otherwise the first difference, with both values and the remedy.

    Both sides use it: the server with the terms of Hello, the client with those of Welcome (and the names exchanged).
    """
    for (reason, what, remedy), a, b in _compared(theirs, ours):
        if a != b:
            return Refused(reason=reason, sentence=f"{what} is {a} for {they} and {b} for {we}: {remedy}")
    return None


def _compared(theirs: Terms, ours: Terms) -> Iterator[tuple[tuple[Reason, str, str], str, str]]:
    """(reason, what, remedy), with both sides' values as texts: of every field, then of every option. The names of the
    data and the client's cut come before terms that follow from them: shapes at the cut, the model.
    """
    for field, remedy in _REMEDIES.items():
        if field == "crossing":
            yield from _options(theirs, ours, _SHAPING)
        holders = (theirs.step, ours.step) if field in StepTerms.__struct_fields__ else (theirs, ours)
        a, b = (getattr(holder, field) for holder in holders)
        yield remedy, *(both(a, b) if isinstance(a, Names) else _both_short(_shown(a), _shown(b)))
    yield from _options(theirs, ours)


def _options(
    theirs: Terms, ours: Terms, names: Collection[str] | None = None
) -> Iterator[tuple[tuple[Reason, str, str], str, str]]:
    """The options, or those of `names`. Options that both sides have come first, since another task has other
    options.
    """
    both = [
        {name: value for name, value in terms.step.options.items() if names is None or name in names}
        for terms in (theirs, ours)
    ]
    for name in sorted({*both[0], *both[1]}, key=lambda name: (not all(name in options for options in both), name)):
        a, b = (options.get(name, "not known") for options in both)
        yield ("step", name, _SAME), *_both_short(a, b)


def fingerprint(*modules: nn.Module) -> str:
    """SHA-256, in hexadecimal, of everything that makes models interchangeable: names, shapes and types of all
    parameters and buffers, the layers with their settings, and the code that a cut has produced, but not the weights.
    """
    digest = hashlib.sha256()
    for module in modules:
        state = sorted((name, list(t.shape), str(t.dtype), saved) for name, t, saved in state_names(module))
        lines = [*map(str, state), *(_layer(name, m) for name, m in module.named_modules())]
        digest.update("\n".join([*lines, "end\n"]).encode())
    return digest.hexdigest()


def _layer(name: str, module: nn.Module) -> str:
    """One layer's name, kind and settings; of a traced part, the code too."""
    codes = getattr(module, "_codes", {})
    source = "\n".join(code.source for _, code in sorted(codes.items())) if isinstance(codes, dict) else ""
    text = f"{name}: {type(module).__qualname__}({module.extra_repr()}) {source}"
    return re.sub(r"\bat 0x[0-9a-f]+", "", text)  # addresses in memory


def _shown(value: object) -> str:
    """A value as a sentence shows it."""
    if isinstance(value, list):
        return ", ".join(f"{t.dtype} {t.shape}" for t in cast(list[TensorSpec], value)) or "nothing"
    return "none" if value is None else str(value)


def _both_short(a: str, b: str) -> tuple[str, str]:
    """Two texts for a sentence, shortened so that they still differ: from the beginning, or from shortly before the
    difference.
    """
    short = _short(a), _short(b)
    if short[0] != short[1] or a == b:
        return short
    differs = (k for k, (left, right) in enumerate(zip(a, b, strict=False)) if left != right)
    first = max(0, next(differs, min(len(a), len(b))) - 20)
    return "..." + _short(a[first:]), "..." + _short(b[first:])


def _short(text: str, limit: int = 200) -> str:
    text = plain(text)
    return text if len(text) <= limit else text[: limit - 3] + "..."
