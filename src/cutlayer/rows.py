"""Tensors with a row per sample, as instruments and checks take them.

Shape legend: n samples, d = number of values of one sample.
"""

from __future__ import annotations

from torch import Tensor

from cutlayer.errors import DataError


def check_rows(least: int, what: str, **tensors: Tensor) -> int:
    """The common number of rows. Raises DataError: rows that differ, fewer than `least` rows, NaN or infinity."""
    sizes = {name: len(t) for name, t in tensors.items()}
    if len(set(sizes.values())) != 1:
        counts = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        raise DataError(f"rows do not match ({counts}): row i of each must be sample i")
    n = next(iter(sizes.values()))
    if n < least:
        raise DataError(f"{n} samples are too few {what}: give at least {least}")
    for name, t in tensors.items():
        if t.is_floating_point() and not bool(t.isfinite().all()):
            raise DataError(f"{name} holds NaN or infinite values: leave those samples out")
    return n


def flat(t: Tensor) -> Tensor:
    """[n, ...] -> [n, d], float32, detached."""
    return t.detach().reshape(len(t), -1).float()
