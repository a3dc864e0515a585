"""Cuts of several depths: each client has its own, and the server's model begins at the deepest of them.

    depths = cut_each(model, ["block1", "block3", "block1"], example)     # client 0, 1 and 2
    between = depths.of(0).between                                          # block1 | between | block3

A client whose cut is not the deepest leaves blocks to the server: those between its own cut and the deepest one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from cutlayer.errors import CutError
from cutlayer.models.cut import cut
from cutlayer.models.parts import Example, Parts
from cutlayer.types import as_tuple

_ROWS = 4  # rows of the example that results are compared on


@dataclass(frozen=True, eq=False)
class Depth:
    """One cut: the model's `parts` there, and the blocks `between` it and the deepest cut (None: it is the deepest)."""

    name: str
    parts: Parts
    between: nn.Module | None = None


@dataclass(frozen=True, eq=False)
class Depths:
    """The cuts of all clients: `names` [C] of modules, and the cut model at `each` of them."""

    names: tuple[str, ...]
    each: Mapping[str, Depth]

    def of(self, client: int) -> Depth:
        """The cut of a client's model."""
        return self.each[self.names[client]]

    @property
    def deepest(self) -> Depth:
        """The cut after which the server's model begins."""
        return next(depth for depth in self.each.values() if depth.between is None)

    @property
    def mixed(self) -> bool:
        """Whether clients have different cuts."""
        return len(self.each) > 1

    @property
    def numbers(self) -> tuple[int, ...]:
        """The number of each client's cut, [C]; empty if all have the same."""
        order = list(self.each)
        return tuple(order.index(name) for name in self.names) if self.mixed else ()

    @property
    def modules(self) -> list[nn.Module]:
        """All parts at all cuts."""
        found = [part for depth in self.each.values() for part in depth.parts.all]
        return found + [depth.between for depth in self.each.values() if depth.between is not None]


def one_depth(name: str, parts: Parts, clients: int) -> Depths:
    """The same cut for all clients."""
    return Depths((name,) * clients, {name: Depth(name, parts)})


def cut_each(model: nn.Module, names: Sequence[str], example: Example) -> Depths:
    """Cut `model` for clients whose cuts are `names` [C]. Each result is proved as in `models.cut`. It is also proved
    that a client's part, the blocks between and the server's part together equal the whole.

    Raises CutError for a name at which the model cannot be cut, and for cuts of which none comes after all the others.
    """
    parts = {name: cut(model, name, example) for name in dict.fromkeys(names)}
    owned = {name: sum(1 for _ in found.client.state_dict()) for name, found in parts.items()}
    reason: CutError | None = None
    for deepest in sorted(parts, key=lambda name: -owned[name]):
        try:
            between = {name: _between(model, name, deepest, example) for name in parts if name != deepest}
        except CutError as error:
            reason = reason or error
            continue
        for name, module in between.items():
            _check(parts[name], module, parts[deepest], name, deepest, example)
        return Depths(tuple(names), {n: Depth(n, found, between.get(n)) for n, found in parts.items()})
    raise CutError(
        f"the cuts {', '.join(map(repr, parts))} do not follow one another ({reason}): name modules of which each "
        "comes after the one before"
    )


def _between(model: nn.Module, name: str, deepest: str, example: Example) -> nn.Module:
    """The blocks between two cuts. Raises CutError if the second does not come after the first."""
    return cut(model, (name, deepest), example).server


def _check(own: Parts, between: nn.Module, deep: Parts, name: str, deepest: str, example: Example) -> None:
    """Check that the three parts, which were cut separately, fit together. Raises CutError."""
    x = _few(example)
    modules = (own.client, between, deep.server, deep.client)
    modes = [module.training for module in modules]
    try:
        with torch.no_grad():
            for module in modules:
                module.eval()
            through, directly = as_tuple(between(own.client(x))), as_tuple(deep.client(x))
            shapes = [(t.shape, t.dtype) for t in through], [(t.shape, t.dtype) for t in directly]
            fits = shapes[0] == shapes[1] and all(
                torch.allclose(a, b, equal_nan=True) for a, b in zip(through, directly, strict=True)
            )
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)
    if not fits:
        raise CutError(
            f"the blocks between {name!r} and {deepest!r} give the server other tensors than a client that is cut at "
            f"{deepest!r}: name other cuts, or one for all clients"
        )


def _few(example: Example) -> Example:
    """The first rows of a batch."""
    if isinstance(example, torch.Tensor):
        return example[:_ROWS]
    if isinstance(example, Mapping):
        return {name: tensor[:_ROWS] for name, tensor in example.items()}
    return tuple(tensor[:_ROWS] for tensor in example)
