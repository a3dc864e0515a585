"""Paired differences over seeds: their interval, their p value, corrections for several of them, and the number of
seeds that a given difference would need. Student's t is used throughout. Runs with the same seed share data, partition
and initial weights, so their common variation cancels in differences.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Student's t, as scipy.stats has it, without its second of loading.
from scipy.special import stdtr, stdtrit  # type: ignore[import-untyped]

LEVEL = 0.95  # of intervals
POWER = 0.8  # the probability of finding a given difference with the calculated number of seeds
MOST_SEEDS = 10_000


@dataclass(frozen=True)
class Paired:
    """The mean of paired differences with its two-sided interval, and the probability `p` of one at least as large if
    the true mean is 0. None if there are fewer than two pairs.
    """

    pairs: int
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    std: float | None = None


def half_width(values: Sequence[float], level: float = LEVEL) -> float:
    """Half of the t interval of the mean of two or more `values`."""
    n = len(values)
    return float(stdtrit(n - 1, (1 + level) / 2)) * statistics.stdev(values) / math.sqrt(n)


def paired(differences: Sequence[float]) -> Paired:
    """The statistics of paired differences, one per seed."""
    n = len(differences)
    mean = statistics.fmean(differences) if differences else None
    if mean is None or n < 2:
        return Paired(n, mean)
    half, std = half_width(differences), statistics.stdev(differences)
    t = math.inf if std == 0 else abs(mean) * math.sqrt(n) / std
    p = 1.0 if mean == 0 else 2 * float(stdtr(n - 1, -t))
    return Paired(n, mean, mean - half, mean + half, p, std)


def holm(values: Sequence[float | None]) -> list[float | None]:
    """The p values after Holm's correction (Scandinavian Journal of Statistics, 1979), in the order given: the
    probability of any false claim among all of them is below the level. None stays None.
    """
    order = sorted((p, i) for i, p in enumerate(values) if p is not None)
    found: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        found[i] = largest
    return found


def seeds_needed(std: float, wanted: float) -> int | None:
    """The number of seeds with which a true difference `wanted` is found in four of five studies, if paired differences
    have the standard deviation `std`. None: more than ten thousand.
    """
    if wanted <= 0:
        raise ValueError(f"a wanted difference must be greater than 0, not {wanted}")
    low, high = 2, MOST_SEEDS
    if not _suffice(high, std, wanted):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _suffice(middle, std, wanted) else (middle + 1, high)
    return low


def _suffice(seeds: int, std: float, wanted: float) -> bool:
    quantiles = float(stdtrit(seeds - 1, (1 + LEVEL) / 2)) + float(stdtrit(seeds - 1, POWER))
    return quantiles * std / math.sqrt(seeds) <= wanted
