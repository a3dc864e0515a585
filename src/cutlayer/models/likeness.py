"""What a module computes, as a key: with equal keys, what was found out about one module holds for the other.

A comparison builds the same small model dozens of times, and to prove its cut each time took longer than to train it.
There is a key only where it can hold all that matters: classes of torch and of this package, plain attributes, no
hooks. The values of parameters do not belong to it, but for whether they are finite, and whether all of them are zero.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Value = TypeVar("Value")

_KNOWN = ("torch.nn.modules.", "cutlayer.models.")  # packages whose classes look at nothing but their attributes
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_STATE = ("_parameters", "_buffers", "_modules")
_MOST = 512  # keys that are kept


class UnknownError(Exception):
    """A module has something that a key cannot hold. Never leaves this file."""


def likeness(module: nn.Module) -> Hashable | None:
    """The key of a module; None where it has something that a key cannot hold."""
    try:
        return tuple(_described(module))
    except UnknownError:
        return None


def of_tensor(tensor: Tensor) -> Hashable:
    """Shape, type and place of a tensor, and how it lies in memory."""
    return tuple(tensor.shape), tensor.dtype, tensor.stride(), str(tensor.device), tensor.requires_grad


class Established(dict[Hashable, Any]):
    """What was found out, by key. Nothing is kept of a failure."""

    def of(self, key: Hashable | None, find: Callable[[], Value]) -> Value:
        """What `find` gives, or gave for the same key. Without a key nothing is kept."""
        if key is None:
            return find()
        if key not in self:
            found = find()
            while len(self) >= _MOST:
                del self[next(iter(self))]
            self[key] = found
        value: Value = self[key]
        return value


def _described(module: nn.Module) -> Iterator[Hashable]:
    """Every module with its attributes, then every tensor; those that have several names are told by the first."""
    firsts: dict[int, str] = {}
    for name, m in module.named_modules(remove_duplicate=False):
        yield name, type(m), firsts.setdefault(id(m), name), _attributes(m)
    for name, p in module.named_parameters(remove_duplicate=False):
        peak = float(p.detach().abs().max()) if p.numel() and not p.is_meta else 1.0
        yield name, firsts.setdefault(id(p), name), of_tensor(p), peak == 0, peak < float("inf")
    for name, b in module.named_buffers(remove_duplicate=False):
        yield name, firsts.setdefault(id(b), name), of_tensor(b), _digest(b)


def _attributes(module: nn.Module) -> Hashable:
    """What a module has beside its parameters, buffers and modules. Raises UnknownError."""
    kind = type(module)
    if not f"{kind.__module__}.".startswith(_KNOWN):
        raise UnknownError
    found: list[Hashable] = []
    for name, value in vars(module).items():
        if name in _STATE:
            found.append((name, tuple(k for k, v in value.items() if v is None)))
        elif not (isinstance(value, dict | set) and not value):  # no hooks
            found.append((name, _plain(value)))
    return tuple(found)


def _plain(value: Any) -> Hashable:
    """A value as part of a key. Raises UnknownError."""
    if type(value) in _PLAIN:
        return type(value), repr(value) if isinstance(value, float | complex) else value  # a nan is like another
    if type(value) in (tuple, list, torch.Size):
        return type(value), tuple(map(_plain, value))
    if type(value) is set and all(type(item) is str for item in value):  # names of buffers that are not stored
        return type(value), tuple(sorted(value))
    raise UnknownError


def _digest(buffer: Tensor) -> Hashable:
    """The values of a buffer. Raises UnknownError on the meta device."""
    if buffer.is_meta:
        raise UnknownError
    return hashlib.sha256(buffer.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).digest()
