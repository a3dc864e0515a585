"""Cuts a model in two or three at named modules, and proves that the parts together equal the whole.

    parts = cut(model, "block4", example)
    logits = parts.server(parts.client(x))          # == model(x)

The cut lies after the last operation that is executed inside the named module. Three methods are tried in order:
tracing with `torch.fx` (`trace.py`), replaying (`hooks.py`) and tracing by running (`tape.py`). A result is accepted
only after the proof: in training and in evaluation, for two batch sizes, the parts give the same logits, gradients of
all parameters and buffers (batch norm statistics) as the whole model. If a process cuts a model of torch's own layers
again at the same place (`likeness.py`), the first proof is still valid, and its parts are reused as a template.

The named module must be executed at least once. If it is executed several times, the last time counts (only with
tracing). The layers after it may have no parameters, but there must be some; otherwise use "output".

Shape legend: R rows of the batch, s... the shape of one sample's smashed data, K classes.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from cutlayer.copies import deep_copy
from cutlayer.errors import CutError, unknown
from cutlayer.models.blocks import named_block
from cutlayer.models.hooks import listen, split_by_hooks
from cutlayer.models.likeness import Established, likeness, of_tensor
from cutlayer.models.mould import Mould
from cutlayer.models.parts import (
    Arguments,
    CannotCutError,
    Crossing,
    Example,
    Part,
    Parts,
    PassThrough,
    SharedWeightError,
    state_names,
    taken_apart,
)
from cutlayer.models.prepared import prepared, untied
from cutlayer.models.proof import check_names, describe, protect, prove
from cutlayer.models.tape import split_by_tape
from cutlayer.models.trace import Traced, is_within_layer, split_by_trace
from cutlayer.seeds import torch_seeded

INPUT, OUTPUT = "input", "output"
Result = TypeVar("Result")
Split = Callable[[nn.Module, Sequence[str], Arguments], list[Part]]
Method = tuple[str, Split]
_METHODS: tuple[Method, ...] = (
    ("fx", split_by_trace),
    ("hooks", split_by_hooks),
    ("tape", split_by_tape),
)
_MOULDS = Established()
_ROWS = 4  # used rows of the example: enough for batch statistics
_TRIES = 40  # names that `cut_points` tries
_HINTS = 8  # names that an error message tries
_PATIENCE = 1.0  # seconds after which it tries no more


def cut(model: nn.Module, at: str | Sequence[str], example: Example, *, untie: bool = False) -> Parts:
    """Cut `model` after the module called `at` (client | server), or after two modules (client | server | tail,
    U-shaped).

    Names are those of `model.named_modules()`. "2" is the end of the second block of a deep model (see `blocks`). With
    "input", the whole model is at the server; with "output", at the client. `example` [R >= 2, ...] is a batch of the
    data, with samples of the shape that will be trained on: a tensor, a tuple of tensors (positional arguments) or a
    dict of them (keyword arguments).

    The parts own copies of the parameters under their original names, each parameter in one part. The model itself is
    not changed. A weight with several names may serve both ends of a U-shape. With `untie`, a weight that is used on
    both sides of a cut becomes a separate weight on each side.

    Raises CutError with the reason and with names that work.
    """
    names = (at,) if isinstance(at, str) else tuple(at)
    x = _inputs(example)
    with _undisturbed():
        model, names = prepared(model, names, x)
        _check(model, names)
        x = x.first(_ROWS)
        try:
            return _cut(model, names, x, _METHODS, untie)
        except CannotCutError as reason:
            others = _alternatives(model, names, x)
            raise CutError(
                f"cannot cut {type(model).__name__} at {_quoted(names)}: {reason}. "
                + (
                    f"Names that work: {', '.join(others)}"
                    if others
                    else "Of the names tried, only 'input' and 'output' work"
                )
            ) from None


def cut_points(model: nn.Module, example: Example) -> list[str]:
    """Names of modules after which `model` can be cut in two, in the order of `named_modules()`.

    Direct children are tried first, then the modules inside them, up to 40 names in total.
    """
    x = _inputs(example)
    with _undisturbed():
        model, _ = prepared(model, (), x)
        return _working(model, _by_depth(model)[:_TRIES], x.first(_ROWS), _METHODS)


def _inputs(example: Example) -> Arguments:
    """The batch. Raises CutError."""
    x = Arguments.of(example)
    if not x.rows or any(row.dim() < 1 for row in x.rows) or len({len(row) for row in x.rows}) > 1 or len(x) < 2:
        shapes = ", ".join(str(list(row.shape)) for row in x.rows) or "no tensor"
        raise CutError(
            f"the example has shape {shapes}: give a batch of at least two samples, in all its tensors alike"
        )
    return x


def cut_unproved(model: nn.Module, at: str, example: Example) -> Parts:
    """Cut a model on the meta device in two. It has shapes but no values, so there is no proof: tracing, then
    replaying.

    `example` [R >= 2, ...] is on the meta device too. Everything else is as in `cut`: crossings, parameters and
    refusals are those of the same model with values, except for facts that only values show.
    """
    _check(model, (at,))
    cuts = UnprovedCuts(model, (at,), example)
    try:
        return cuts.at(at)
    except CannotCutError as reason:
        raise CutError(f"cannot cut {type(model).__name__} at {at!r}: {reason}; choose another module") from None


class UnprovedCuts:
    """Cuts of one model on the meta device, each as from `cut_unproved`. Common work is done once."""

    def __init__(self, model: nn.Module, names: Sequence[str], example: Example) -> None:
        self.model, self.x = model, _inputs(example).first(_ROWS)
        inner = [_canonical(model, name) for name in names if name not in (INPUT, OUTPUT)]
        # Looking inside torch's own layers changes the trace, and may make it impossible.
        self._names = {within: [n for n in inner if is_within_layer(model, n) == within] for within in (True, False)}
        self._traced: dict[bool, Traced | CannotCutError] = {}
        self._heard: dict[bool, list[Any]] | CannotCutError | None = None

    def at(self, name: str) -> Parts:
        """The parts of a cut after `name`, one of the names given. Raises CannotCutError."""
        if name in (INPUT, OUTPUT):
            return self._first(name, ("whole", lambda _: self._replay([])))
        return self._first(name, ("fx", lambda n: self._trace(n).split([n])), ("hooks", lambda n: self._replay([n])))

    def look(self, name: str) -> Parts:
        """As `at`, but faster: if tracing works, the parts only have their parameters, and cannot be run."""
        inner = _canonical(self.model, name)
        with _undisturbed(), torch.device("meta"), contextlib.suppress(CannotCutError):
            owners, crossing = self._trace(inner).look(inner)
            check_names(self.model, owners)
            return Parts(owners[0], owners[1], None, crossing, "fx")
        return self.at(name)

    def _first(self, name: str, *methods: tuple[str, Callable[[str], list[Part]]]) -> Parts:
        """The parts of the first method that works."""

        def pieces(split: Callable[[str], list[Part]]) -> Callable[[], list[Part]]:
            return lambda: split(name if name in (INPUT, OUTPUT) else _canonical(self.model, name))

        def crossings(found: list[Part]) -> list[tuple[Crossing, ...]]:
            return describe(self.model, found, self.x, name == INPUT)

        with _undisturbed(), torch.device("meta"):
            return _first_that_works(self.model, (name,), self.x, [(m, pieces(s)) for m, s in methods], crossings)

    def _trace(self, name: str) -> Traced:
        within = is_within_layer(self.model, name)
        if within not in self._traced:
            traced = Traced(deep_copy(self.model), self._names[within], self.x)
            try:
                traced.run()
                self._traced[within] = traced
            except CannotCutError as reason:
                self._traced[within] = reason
        return _or_raise(self._traced[within])

    def _replay(self, names: list[str]) -> list[Part]:
        if self._heard is None:
            try:
                self._heard = listen(deep_copy(self.model), self.x)
            except CannotCutError as reason:
                self._heard = reason
        return split_by_hooks(deep_copy(self.model), names, self.x, _or_raise(self._heard))


def _or_raise(result: Result | CannotCutError) -> Result:
    if isinstance(result, CannotCutError):
        raise result
    return result


def _cut(
    model: nn.Module, names: tuple[str, ...], x: Arguments, methods: Sequence[Method], untie: bool = False
) -> Parts:
    """Raises CannotCutError with the reasons of every method."""
    try:
        return _cut_as_it_is(model, names, x, methods)
    except SharedWeightError as shared:
        if not untie or len(shared.names) < 2:
            raise
        return _cut(untied(model, shared.names), names, x, methods, untie)


def _cut_as_it_is(model: nn.Module, names: tuple[str, ...], x: Arguments, methods: Sequence[Method]) -> Parts:
    inner = [_canonical(model, name) for name in names if name not in (INPUT, OUTPUT)]

    def pieces(split: Split) -> Callable[[], list[Part]]:
        return lambda: split(deep_copy(model), inner, x)

    def crossings(found: list[Part]) -> list[tuple[Crossing, ...]]:
        return prove(model, found, x, inputs_may_cross=names[0] == INPUT)

    def parts() -> Parts:
        tried = methods if inner else (("whole", split_by_hooks),)
        if x.names is not None and len(tried) == 3:  # replays read the values of masks, and then cannot be stacked
            tried = (tried[0], tried[2], tried[1])
        return _first_that_works(model, names, x, [(method, pieces(split)) for method, split in tried], crossings)

    if (like := likeness(model)) is None:
        return parts()
    taken = (names, x.names, *map(of_tensor, x.rows), torch.is_grad_enabled(), torch.get_default_dtype())
    key = (like, taken)
    return _MOULDS.of(key, lambda: Mould(replace(parts(), likeness=key), model)).cast(model)


def _first_that_works(
    model: nn.Module,
    names: Sequence[str],
    x: Arguments,
    methods: Sequence[tuple[str, Callable[[], list[Part]]]],
    crossings: Callable[[list[Part]], list[tuple[Crossing, ...]]],
) -> Parts:
    """The parts of the first of `methods` whose parts pass the checks of `crossings`. Raises CannotCutError with
    the reasons of every method.
    """
    reasons: list[tuple[str, CannotCutError]] = []
    for method, split in methods:
        try:
            pieces = [PassThrough()] * (names[0] == INPUT) + split() + [PassThrough()] * (names[-1] == OUTPUT)
            _finish(model, pieces, x)
            return _parts(pieces, crossings(pieces), method)
        except CannotCutError as reason:
            reasons.append((method, reason))
    if shared := [reason for _, reason in reasons if isinstance(reason, SharedWeightError)]:
        raise shared[0]
    if len({str(reason) for _, reason in reasons}) == 1:
        raise CannotCutError(str(reasons[0][1]))
    raise CannotCutError("; ".join(f"{method}: {reason}" for method, reason in reasons))


def _finish(model: nn.Module, pieces: list[Part], x: Arguments) -> None:
    """Tell the parts their places, and make the ends of a U-shape share their common parameters."""
    for i, piece in enumerate(pieces):
        piece.is_last_part = i == len(pieces) - 1
        piece.train(model.training)
    pieces[0].argument_names = x.names
    with torch.no_grad():
        _, pieces[-1].structure = taken_apart(x.run(deep_copy(model).eval()))
    if len(pieces) == 3:
        _share(model, pieces[0], pieces[2])
    protect(pieces, x)


def _share(model: nn.Module, client: nn.Module, tail: nn.Module) -> None:
    """Parameters that are shared in the model are shared again between the client's two ends."""
    first: dict[int, nn.Parameter] = {}
    for name, parameter, _ in state_names(model):
        module, _, key = name.rpartition(".")
        for part in (client, tail):
            with contextlib.suppress(AttributeError):
                owner = part.get_submodule(module)
                own = owner._parameters.get(key)
                if own is not None:
                    owner._parameters[key] = first.setdefault(id(parameter), own)


def _parts(pieces: list[Part], crossings: list[tuple[Crossing, ...]], method: str) -> Parts:
    client, server, *tail = pieces
    if tail:
        return Parts(client, server, tail[0], crossings[0], method, crossings[1])
    return Parts(client, server, None, crossings[0], method)


def _canonical(model: nn.Module, name: str) -> str:
    """The first of a module's names; for a block's number, the name of the block."""
    name = named_block(model, name)
    module = model.get_submodule(name)
    names: Iterator[str] = (first for first, m in model.named_modules() if m is module)
    return next(names)


def _check(model: nn.Module, names: tuple[str, ...]) -> None:
    """Raises CutError for names that the model does not have, or too many of them."""
    if len(names) not in (1, 2):
        raise CutError(f"cut at {names!r}: give one name (client | server) or two (client | server | tail)")
    if len(names) == 2 and (names[0] in (names[1], OUTPUT) or names[1] == INPUT):
        raise CutError(f"cut at {names!r}: the second cut must come after the first")
    known = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    for name in names:
        if named_block(model, name) not in (INPUT, OUTPUT, *known):
            raise CutError(unknown("module", name, [INPUT, *_worth_listing(name, model, known), OUTPUT]))
    for name, module in model.named_modules():
        if getattr(module, "sparse", False) is True:  # sparse gradients are not averaged, counted or sent here
            raise CutError(
                f"{type(module).__name__} {name!r} has sparse gradients, which are not supported: make it with "
                "sparse=False"
            )


def _worth_listing(name: str, model: nn.Module, known: list[str]) -> list[str]:
    if len(known) <= _TRIES:
        return known
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return [*(child for child, _ in model.named_children()), *(c for c in close if "." in c)]


def _alternatives(model: nn.Module, names: tuple[str, ...], x: Arguments) -> list[str]:
    """A few names that work: near the given one, then among the direct children."""
    near = [up for name in names if "." in name for up in (name.rpartition(".")[0],)]
    tried = [name for name in (*near, *(child for child, _ in model.named_children())) if name not in names]
    return _working(model, list(dict.fromkeys(tried))[:_HINTS], x, _METHODS, _PATIENCE)


def _working(
    model: nn.Module, names: Iterable[str], x: Arguments, methods: Sequence[Method], seconds: float = math.inf
) -> list[str]:
    """Those of `names` that work, as far as they can be tried in this number of seconds."""
    working, begin = set(), time.monotonic()
    for name in names:
        if time.monotonic() - begin > seconds:
            break
        with contextlib.suppress(CannotCutError):
            _cut(model, (name,), x, methods)
            working.add(name)
    return [name for name, _ in model.named_modules() if name in working]


def _by_depth(model: nn.Module) -> list[str]:
    return sorted((name for name, _ in model.named_modules() if name), key=lambda name: name.count("."))


def _quoted(names: tuple[str, ...]) -> str:
    return " and ".join(repr(name) for name in names)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Run the body with gradients on; the states of the global generators are restored afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch_seeded(0, "cut"), torch.enable_grad():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
