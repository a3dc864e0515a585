"""A key for what a module computes: if two keys are equal, results about one module are valid for the other.

A comparison builds the same small model dozens of times, and proving its cut each time took longer than training it. A
key only exists if it can include everything that matters: classes of torch and of this package, plain attributes, no
hooks. The values of parameters are not part of it, except whether they are finite, and whether all of them are zero.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Value = TypeVar("Value")

_KNOWN = ("torch.nn.modules.", "cutlayer.models.")  # packages whose classes only depend on their attributes
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_STATE = ("_parameters", "_buffers", "_modules")
_MOST = 512  # keys that are kept


class UnknownError(Exception):
    """A module has something that a key cannot include. Never leaves this file."""


def likeness(module: nn.Module) -> Hashable | None:
    """The key of a module; None if it has something that a key cannot include."""
    try:
        return tuple(_described(module))
    except UnknownError:
        return None


def of_tensor(tensor: Tensor) -> Hashable:
    """Shape, type, device and memory layout of a tensor."""
    return tuple(tensor.shape), tensor.dtype, tensor.stride(), str(tensor.device), tensor.requires_grad


class Established(dict[Hashable, Any]):
    """Stored results, by key. Failures are not stored."""

    def of(self, key: Hashable | None, find: Callable[[], Value]) -> Value:
        """The result of `find`, or its earlier result for the same key. Without a key, nothing is stored."""
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
    """Every module with its attributes, then every tensor; a tensor with several names has the first."""
    firsts: dict[int, str] = {}
    for name, m in module.named_modules(remove_duplicate=False):
        yield name, type(m), firsts.setdefault(id(m), name), _attributes(m)
    for name, p in module.named_parameters(remove_duplicate=False):
        peak = float(p.detach().abs().max()) if p.numel() and not p.is_meta else 1.0
        yield name, firsts.setdefault(id(p), name), of_tensor(p), peak == 0, peak < float("inf")
    for name, b in module.named_buffers(remove_duplicate=False):
        yield name, firsts.setdefault(id(b), name), of_tensor(b), _digest(b)


def _attributes(module: nn.Module) -> Hashable:
    """A module's attributes other than its parameters, buffers and modules. Raises UnknownError."""
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
        return type(value), repr(value) if isinstance(value, float | complex) else value  # all NaNs are equal here
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
