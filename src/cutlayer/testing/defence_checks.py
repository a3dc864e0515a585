"""Proofs of defences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cutlayer import plugins
from cutlayer.defences import Defence, Defences
from cutlayer.errors import ConfigError
from cutlayer.testing.material import demand_equal, fail

_SIZES = (3, 1, 2)
_SHAPES = ((4,), (2, 3, 3))


def check_defence(defence: Any, **options: Any) -> None:
    """Test that a defence keeps the promises of all defences. `options` are its own.

    - Rows keep their shapes and types, and stay finite.
    - A batch of a client is protected in the same way, whichever other clients take part.
    - The backward pass through it is the derivative, both of the sent rows and of its penalty.

    Raises AssertionError, which says what does not hold and by how much, and ConfigError for a defence that cannot be
    found, or has no effect with these options.
    """
    part = _made(defence, options)
    if not part.active:
        raise ConfigError(f"the defence {part.entry.title} has no effect with these options: give some that have")
    found = Defences(0, (part,))
    rows = tuple(_random(sum(_SIZES), *shape) for shape in _SHAPES)
    name = part.entry.title
    sent = _sent(found, rows, tuple(range(len(_SIZES))), _SIZES)
    for before, after in zip(rows, sent, strict=True):
        if before.shape != after.shape or before.dtype != after.dtype or not torch.isfinite(after).all():
            fail(name, f"of {tuple(before.shape)} of {before.dtype} it makes {tuple(after.shape)} of {after.dtype}")
    _check_alone(name, found, rows, sent)
    _check_way_back(name, found, rows)


def _made(defence: Any, options: dict[str, Any]) -> Defence:
    reference, values = plugins.adopt("defence", defence)
    entry = plugins.find("defence", reference)
    made: Defence = plugins.load("defence", reference).of({**values, **options})
    made.check(frozenset(n for n, default in entry.defaults.items() if getattr(made, n) != default))
    return made


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def _inputs(sizes: tuple[int, ...]) -> list[Tensor]:
    return [_random(n, 5) for n in sizes]


def _sent(found: Defences, rows: tuple[Tensor, ...], clients: tuple[int, ...], sizes: tuple[int, ...]) -> Any:
    return found.step(rows, _inputs(sizes), clients, sizes, [3] * len(sizes)).rows


def _check_alone(name: str, found: Defences, rows: tuple[Tensor, ...], sent: tuple[Tensor, ...]) -> None:
    start = 0
    for client, size in enumerate(_SIZES):
        own = tuple(r[start : start + size] for r in rows)
        alone = _sent(found, own, (client,), (size,))
        together = [r[start : start + size] for r in sent]
        sentence = f"client {client}'s rows are protected otherwise when others are there: draw from its own generator"
        demand_equal(name, sentence, list(alone), together)
        start += size


def _check_way_back(name: str, found: Defences, rows: tuple[Tensor, ...]) -> None:
    """Against finite differences, in a random direction."""
    weights = tuple(torch.linspace(-1, 1, r.numel(), dtype=torch.float64).view_as(r) for r in rows)
    bent = tuple(_random(*r.shape, 1).view_as(r) for r in rows)

    def value(h: float) -> float:
        moved = tuple(r + h * d for r, d in zip(rows, bent, strict=True))
        step = found.step(moved, _inputs(_SIZES), tuple(range(len(_SIZES))), _SIZES, [3] * len(_SIZES))
        total = sum(float((w * s).sum()) for w, s in zip(weights, step.rows, strict=True))
        return total + sum(_penalty(part, x, own) for x, own in _own(moved) for part in found.in_order)

    step = found.step(rows, _inputs(_SIZES), tuple(range(len(_SIZES))), _SIZES, [3] * len(_SIZES))
    slope = sum(float((g * d).sum()) for g, d in zip(step.back(weights), bent, strict=True))
    h = 1e-6
    expected = (value(h) - value(-h)) / (2 * h)
    if abs(slope - expected) > 1e-5 * max(1.0, abs(expected)):
        fail(name, f"the way back is not the derivative: a slope of {slope:.6g}, finite differences say {expected:.6g}")


def _own(rows: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
    """Inputs and flat smashed data of each client."""
    flat = torch.cat([r.flatten(1) for r in rows], 1).split(list(_SIZES))
    return list(zip(_inputs(_SIZES), flat, strict=True))


def _penalty(part: Defence, x: Tensor, z: Tensor) -> float:
    found = part.penalty(x, z)
    return 0.0 if found is None else part.weight * float(found)
