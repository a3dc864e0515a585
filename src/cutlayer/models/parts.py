"""The result of a cut: the parts of a model, and the tensors that cross between them.

Shape legend: R rows of the batch, s... the shape of one sample's smashed data, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from cutlayer.types import Rows

Example = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]
"""A batch as a model takes it: one tensor, several positional ones, or keyword arguments by name; each [R, ...]."""


class Part(nn.Module):
    """One part of a cut model. Owns its parameters under the names that they have in the whole model.

    The first part is called with the batch: a tensor [R, ...], a tuple of them, or a mapping of keyword arguments.
    Other parts are called with the rows of the part before (each [R, s...]). A part returns the tuple of tensors that
    cross to the next part (each [R, s...]); the last part returns the whole model's output (the logits [R, K], if the
    output has some).
    """

    # Names that a model's own children are unlikely to have: a part has them as attributes.
    is_last_part = False
    copies_rows = False  # set if the part changes its received tensors in place, which it does not own
    images_channels_last = False  # set if its images have their channels last in memory
    narrow_to: torch.dtype | None = None  # the type of its products in mixed precision
    argument_names: tuple[str, ...] | None = None  # of the first part, whose batch is a mapping
    crossing_names: tuple[str, ...] = ()  # of its output, in words
    structure: Structure | None = None  # of the last part's output, if that is not one tensor
    draws = True  # unless it is known that nothing in it draws random numbers in training

    def forward(self, received: Example) -> Any:
        """Rows [R, s...] each (or the batch) to rows [R, s...] each (or the whole model's output)."""
        rows = self._as_rows(received)
        rows = tuple(row.clone() for row in rows) if self.copies_rows else rows
        if self.narrow_to is None:
            given = self.run_rows(rows)
        else:
            with torch.autocast(rows[0].device.type, self.narrow_to):
                given = self.run_rows(rows)
            if self.is_last_part:
                given = tuple(g.float() if g.is_floating_point() else g for g in given)
        if not self.is_last_part:
            return given
        return given[0] if self.structure is None else self.structure.build(given)

    def _as_rows(self, received: Example) -> Rows:
        if isinstance(received, Tensor):
            return (received,)
        if isinstance(received, Mapping):
            return tuple(received[name] for name in self.argument_names or received)
        return tuple(received)

    def run_rows(self, rows: Rows) -> Rows:
        """The part's computation: received tensors, [R, s...] each, to its outputs, [R, s...] each."""
        raise NotImplementedError


class PassThrough(Part):
    """A part without layers: returns the received tensors."""

    def run_rows(self, rows: Rows) -> Rows:
        """The same rows."""
        return rows


@dataclass(frozen=True)
class Arguments:
    """A batch in the form that a model takes: its tensors, and the `names` of keyword arguments if it is given
    by name.
    """

    rows: Rows
    names: tuple[str, ...] | None = None

    @classmethod
    def of(cls, example: Example) -> Arguments:
        """The batch `example`, without its history."""
        if isinstance(example, Tensor):
            return cls((example.detach(),))
        if isinstance(example, Mapping):
            return cls(tuple(t.detach() for t in example.values()), tuple(example))
        return cls(tuple(t.detach() for t in example))

    def __len__(self) -> int:
        return len(self.rows[0])

    def run(self, model: nn.Module) -> Any:
        """The output of `model` for a copy of this batch."""
        return self.give(model, tuple(row.clone() for row in self.rows))

    def give(self, model: nn.Module, rows: Rows) -> Any:
        """The output of `model` for `rows` in place of this batch's."""
        return model(*rows) if self.names is None else model(**dict(zip(self.names, rows, strict=True)))

    def first(self, rows: int) -> Arguments:
        """The first `rows` rows."""
        return Arguments(tuple(row[:rows] for row in self.rows), self.names)

    def with_one_more(self) -> Arguments:
        """The batch with its first row once more at its end."""
        return Arguments(tuple(torch.cat([row, row[:1]]) for row in self.rows), self.names)

    def shuffled(self) -> Arguments:
        """The same samples, in another order and number."""
        return Arguments(tuple(torch.cat([row.flip(0), row[:2]]) for row in self.rows), self.names)

    def may_cross(self, i: int) -> bool:
        """Whether tensor `i` describes positions, not content: a mask, positions or lengths."""
        if self.rows[i].dtype == torch.bool:
            return True
        return self.names is not None and any(word in self.names[i] for word in ("mask", "position", "length"))

    def sealed(self) -> list[int]:
        """The tensors that must not cross unchanged."""
        return [i for i in range(len(self.rows)) if not self.may_cross(i)]


@dataclass(frozen=True)
class Structure:
    """The structure of a model's output: tensors, and values that are always the same."""

    spec: Any
    constants: tuple[Any, ...]  # by leaf; None where the leaf is a tensor
    places: tuple[int, ...]  # of the tensors among the leaves

    def build(self, rows: Rows) -> Any:
        """The output again, from its tensors."""
        leaves = list(self.constants)
        for place, row in zip(self.places, rows, strict=True):
            leaves[place] = row
        return pytree.tree_unflatten(leaves, self.spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> Structure:
        return self  # immutable


_TENSORS = (Tensor, fx.Proxy)


def taken_apart(output: Any) -> tuple[Rows, Structure | None]:
    """The tensors of a model's output (of its logits, if it has some), and their structure; None if it is one tensor.
    Raises CannotCutError.
    """
    output = logits(output)
    if isinstance(output, _TENSORS):
        return cast(Rows, (output,)), None
    leaves, spec = pytree.tree_flatten(output)
    for leaf in leaves:
        if not isinstance(leaf, (*_TENSORS, int, float, str, bool, type(None))):
            raise CannotCutError(
                f"the model's output holds a {type(leaf).__name__}, which is not a tensor: have it return tensors, for "
                "example only logits (a transformer: use_cache=False)"
            )
    places = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, _TENSORS))
    if not places:
        raise CannotCutError("the model does not return logits, or any other tensor")
    constants = tuple(None if isinstance(leaf, _TENSORS) else leaf for leaf in leaves)
    return tuple(leaves[i] for i in places), Structure(spec, constants, places)


@dataclass(frozen=True)
class Crossing:
    """One tensor that crosses a cut: its shape without the batch dimension, its type, and a description."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    name: str = field(default="", compare=False)

    @property
    def differentiable(self) -> bool:
        """Floating-point tensors are; masks and positions are not."""
        return self.dtype.is_floating_point


def crossing_bytes(crossings: Iterable[Crossing]) -> int:
    """Bytes of one row of the tensors that cross."""
    return sum(math.prod(c.shape) * c.dtype.itemsize for c in crossings)


@dataclass(frozen=True)
class Parts:
    """A model cut in two parts, or in three (U-shaped: client, server, and a tail that stays with the client).

    `client(x)` takes the model's inputs and always returns a tuple of tensors. `server(rows)` takes this tuple and
    returns the model's outputs: logits [R, K]. With a tail, `server(rows)` returns a tuple, and `tail(rows)` returns
    the logits. `crossing` describes the tensors from client to server, `returning` those from server to tail. `method`
    says how the model was cut: "fx", "hooks", "tape" or "whole". Parts with the same `likeness` compute alike (None:
    not known).
    """

    client: nn.Module
    server: nn.Module
    tail: nn.Module | None
    crossing: tuple[Crossing, ...]
    method: str
    returning: tuple[Crossing, ...] = ()
    likeness: Hashable | None = None

    @property
    def all(self) -> tuple[nn.Module, ...]:
        """The parts in the order data flows."""
        return (self.client, self.server) if self.tail is None else (self.client, self.server, self.tail)


class CannotCutError(Exception):
    """Why one method cannot cut a model there, as a sentence without its full stop. Never leaves this package."""


class SharedWeightError(CannotCutError):
    """A parameter is used on both sides of the cut; `names` are its names in the model."""

    def __init__(self, names: Iterable[str], parameter: Tensor) -> None:
        self.names = tuple(names)
        shown = " = ".join(repr(name) for name in self.names)
        reason = f"{shown} is used on both sides of the cut, and a parameter can live on one side only"
        if len(self.names) == 1:
            reason += " (the layer runs on both sides, or its result takes a path around the cut)"
        else:
            reason += f" (untie=True gives each side one of its own, for {parameter.nbytes / 1e6:.3g} MB more)"
        super().__init__(reason)


RAW_INPUT = "the raw input itself would be sent (to mean that, say 'input'): no privacy would be left"


def one_line(error: BaseException, limit: int = 160) -> str:
    """The kind of an error and the first line of its message."""
    text = str(error).strip().splitlines()
    line = f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
    return line if len(line) <= limit else line[: limit - 3] + "..."


def logits(output: Any) -> Any:
    """A model's output, or its `logits` if the output has this field (as in Hugging Face)."""
    if isinstance(output, (Tensor, fx.Proxy)):
        return output
    return getattr(output, "logits", output)


def tensors_in(value: Any) -> Rows:
    """The tensors in a (nested) tuple, list or dict, in order."""
    return tuple(leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))


def storage_of(tensor: Tensor) -> int:
    """The identity of a tensor's memory. This is not its address, since on the meta device every address is 0."""
    return int(tensor.untyped_storage()._cdata)


def batch_dimension(shape: tuple[int, ...], larger: tuple[int, ...], batch: int) -> int | None:
    """The batch dimension, given a tensor's shape for `batch` rows and for one row more; None if there is none."""
    if len(shape) != len(larger):
        return None
    sizes = list(zip(shape, larger, strict=True))
    follows = [d for d, size in enumerate(sizes) if size == (batch, batch + 1)]
    rest_fixed = all(a == b for d, (a, b) in enumerate(sizes) if d not in follows[:1])
    return follows[0] if follows and rest_fixed else None


def state_names(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Every name of a parameter or buffer (aliases too), its tensor, and whether the state dict has it."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield dot + name, parameter, True
        for name, buffer in module._buffers.items():
            if buffer is not None:
                yield dot + name, buffer, name not in module._non_persistent_buffers_set


def load_own(part: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a part's share of a whole model's state, which has more names."""
    part.load_state_dict({name: state[name] for name in part.state_dict()})


def fill_owners(names: Iterable[str], owners: dict[str, int], parts: int) -> dict[str, int]:
    """Owners for all `names`: unused state belongs to the owner of the name before it (or else after it)."""
    names = list(names)
    first = next((owners[name] for name in names if name in owners), parts - 1)
    filled, last = {}, first
    for name in names:
        last = filled[name] = owners.get(name, last)
    return filled
