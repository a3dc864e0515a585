"""The numbers of samples that clients announce, which weight averages and rounds."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

MULTIPLE = 10_000
"""The most samples that a client may have, as a multiple of the others' median, unless a number is given."""


def impossible(samples: int, mass: float, most: int | None, *, alike: bool) -> str | None:
    """Why a client cannot have this number of samples with this total weight; None if it can. `most`: the allowed
    number; `alike`: each sample has weight 1.
    """
    if not samples:
        return "has no training samples: give it some, or run without it"
    if most is not None and samples > most:
        return f"says that it has {samples} samples, of at most {most}: give it its own data, or raise most_samples"
    if not mass or (alike and mass != samples):
        return f"says that its {samples} samples count {mass:g} together: give it data whose targets count"
    return None


def excessive(client: int, masses: Mapping[int, float], samples: Mapping[int, int]) -> str | None:
    """Why a client cannot have so much more than the others; None if it can."""
    for what, numbers in (("samples", samples), ("counting targets", masses)):
        others = [number for k, number in numbers.items() if k != client]
        usual = median(others) if others else 0
        if usual and numbers[client] > MULTIPLE * usual:
            return (
                f"client {client} says that it has {numbers[client]:.6g} {what}, more than {MULTIPLE} times the median "
                f"of the others, {usual:.6g}: give it its own data, or say how many a client may have (most_samples)"
            )
    return None


def shares(masses: Mapping[int, float]) -> dict[int, float]:
    """The share of the whole that each client has."""
    whole = sum(masses.values()) or 1.0
    return {k: mass / whole for k, mass in masses.items()}
