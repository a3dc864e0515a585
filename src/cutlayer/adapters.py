"""Low-rank adapters by the names of their factors, and clients whose adapters have ranks of their own.

    W x + s B A x,   A [r, i], B [o, r]

In a simulation, all clients have factors of the largest rank. For a client with a smaller rank, the further rows of A
and columns of B are zero. Gradient descent leaves them zero, since the gradient of each is a multiple of the other.
They are not sent. A client on another machine only has factors of its own rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_FIRST = re.compile(r"(.*\.)?lora_A(\..+)?")


def pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """The names of A and B of each adapter among the names of parameters."""
    known = set(names)
    found = []
    for name in names:
        if match := _FIRST.fullmatch(name):
            other = f"{match[1] or ''}lora_B{match[2] or ''}"
            if other in known:
                found.append((name, other))
    return found


def narrow(module: nn.Module, rank: int) -> None:
    """Leave adapters their first `rank` rows of A and columns of B; the others become zero."""
    own = dict(module.named_parameters())
    with torch.no_grad():
        for first, second in pairs(list(own)):
            own[first][rank:] = 0
            own[second][:, rank:] = 0


def narrowed(state: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """A state with the first `rank` rows of A and columns of B; the others become zero."""
    found = dict(state)
    for first, second in pairs(list(state)):
        found[first], found[second] = (t.clone() for t in (state[first], state[second]))
        found[first][rank:] = 0
        found[second][:, rank:] = 0
    return found


def shrink(module: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Replace the factors whose shapes in `shapes` are smaller by their first rows or columns."""
    own = dict(module.named_parameters())
    for name in (name for pair in pairs(list(own)) for name in pair):
        if name in shapes and tuple(shapes[name]) != tuple(own[name].shape):
            _replace(module, name, cropped(own[name].detach(), shapes[name]).clone())


def of_rank(module: nn.Module, rank: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the factors of a module's adapters with no more than `rank` rows of A and columns of B."""
    own, found = dict(module.named_parameters()), {}
    for first, second in pairs(list(own)):
        found[first] = (min(rank, len(own[first])), *own[first].shape[1:])
        found[second] = (len(own[second]), min(rank, own[second].shape[1]))
    return found


def cropped(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The first entries of each dimension."""
    return tensor[tuple(slice(size) for size in shape)]


def filled(state: Mapping[str, Tensor], like: Mapping[str, Any]) -> dict[str, Tensor]:
    """A state whose tensors have the shapes of those in `like`: filled up with zeros where they are smaller."""
    found = dict(state)
    for name, tensor in state.items():
        shape = tuple(like[name].shape) if name in like else tuple(tensor.shape)
        if tuple(tensor.shape) != shape:
            found[name] = tensor.new_zeros(shape)
            cropped(found[name], tensor.shape).copy_(tensor)
    return found


def _replace(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Give a module another parameter of that name."""
    place, _, leaf = name.rpartition(".")
    owner = module.get_submodule(place)
    setattr(owner, leaf, nn.Parameter(tensor, requires_grad=getattr(owner, leaf).requires_grad))
    if isinstance(owner, nn.Linear):  # its own parameter
        owner.out_features, owner.in_features = tensor.shape


def beyond(module: nn.Module, rank: int) -> int:
    """Bytes of the trained rows of A and columns of B beyond the first `rank`."""
    own = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return sum(own[a][rank:].nbytes + own[b][:, rank:].nbytes for a, b in pairs(list(own)))


def numbers(ranks: Sequence[int]) -> tuple[int, ...]:
    """The number of each client's rank, [C]: clients with the same number get the same models."""
    order = sorted(set(ranks))
    return tuple(order.index(rank) for rank in ranks)
