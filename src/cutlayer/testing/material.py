"""Material for the checks: small random data and models, and the difference between two results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from cutlayer.data.samples import Samples, Source

CLASSES = 4
FEATURES = 6
ROUNDING = 1e-9
"""The allowed relative difference between two computations of the same, relative to the largest number: a million
roundings of double precision.
"""


def random_samples(n: int, shape: Sequence[int] = (FEATURES,), *, classes: int = CLASSES, seed: int = 0) -> Samples:
    """n random samples in double precision; every class occurs when n >= `classes`."""
    rng = np.random.default_rng(seed)
    y = torch.from_numpy(rng.permutation(np.arange(n) % classes))
    return Samples(torch.from_numpy(rng.normal(size=(n, *shape))), y)


def random_source(
    sizes: Sequence[int], shape: Sequence[int] = (FEATURES,), *, classes: int = CLASSES, seed: int = 0
) -> Source:
    """A data set whose client column gives `sizes` samples to the clients, in order. Use it with the partition
    `column`.
    """
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(list(sizes)))
    held_out = random_samples(12, shape, classes=classes, seed=seed + 1)
    train = random_samples(sum(sizes), shape, classes=classes, seed=seed)
    return Source("random", train, held_out, held_out, tuple(map(str, range(classes))), owner)


def smooth() -> nn.Module:
    """Features [n, 6] -> scores [n, 4]: no state but weights, and nothing random. Cuts: "1", and "3" for the tail."""
    layers = (nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    return nn.Sequential(*layers)


def stateful() -> nn.Module:
    """The same with batch normalisation and dropout. Cuts: "3", and "5" for the tail."""
    return nn.Sequential(
        nn.Linear(FEATURES, 8),
        nn.BatchNorm1d(8),
        nn.Tanh(),
        nn.Dropout(0.3),
        nn.Linear(8, 8),
        nn.Dropout(0.3),
        nn.Tanh(),
        nn.Linear(8, CLASSES),
    )


def apart(a: Any, b: Any, at: str = "") -> tuple[float, str]:
    """The difference between two results, and where it is: nested dicts, sequences, tensors and plain values. It is
    infinite if their forms differ, or if they are not numbers.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return (_gap(a, b) if a.shape == b.shape else math.inf), at
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        if a.keys() != b.keys():
            return math.inf, at
        return max((apart(a[k], b[k], f"{at}, {k!r}" if at else str(k)) for k in a), default=(0.0, at))
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return math.inf, at
        pairs = enumerate(zip(a, b, strict=True))
        return max((apart(x, y, f"{at}, number {i}" if at else str(i)) for i, (x, y) in pairs), default=(0.0, at))
    if isinstance(a, float) and isinstance(b, float):
        return (0.0 if a == b or (a != a and b != b) else abs(a - b)), at
    return (0.0 if a == b else math.inf), at


def _gap(a: Tensor, b: Tensor) -> float:
    """The largest difference; infinite if a number is NaN in only one of them."""
    if torch.equal(a, b) or not a.numel():
        return 0.0
    gap = (a.double() - b.double()).abs()
    alike = (a == b) | (a.isnan() & b.isnan())
    return float(gap.masked_fill(alike, 0.0).nan_to_num(math.inf).max())


def largest(found: Any) -> float:
    """The largest number in nested values, at least 1."""
    if isinstance(found, Tensor):
        return float(found.abs().max()) if found.numel() else 1.0
    if isinstance(found, Mapping):
        return max([1.0, *map(largest, found.values())])
    return max([1.0, *map(largest, found)]) if isinstance(found, list | tuple) else 1.0


def fail(what: str, sentence: str) -> NoReturn:
    """Raises AssertionError."""
    raise AssertionError(f"{what}: {sentence}")


def demand_equal(what: str, sentence: str, a: Any, b: Any, *, exact: bool = False) -> None:
    """Raises AssertionError unless a and b agree: within rounding, or bit for bit."""
    gap, at = apart(a, b)
    allowed = 0.0 if exact else ROUNDING * largest(a)
    if gap <= allowed:
        return
    size = "it is something else" if math.isinf(gap) else f"the largest difference is {gap:.3g}, at most {allowed:.3g}"
    fail(what, f"{sentence} ({at}: {size}{'' if math.isinf(gap) else ' is rounding' if allowed else ' is allowed'})")
