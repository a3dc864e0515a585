"""Numbers of each row by chance, the largest more often: rand-top-k:FRACTION:CHANCE (RandTopk, arXiv 2305.18469).

k = ceil(FRACTION m) of a row's m numbers are sent with their positions, drawn one after another without putting back:
each is one of the k largest with probability 1 - CHANCE, else one of the others; all of a group are equally likely. So
small numbers are trained too. With a chance of 0 this is top-k, bit for bit.

The draws come from the bytes of the row: a simulation and a deployment draw the same, and nothing has to be kept to
resume. But runs whose numbers differ in the last digit (on another device, in another engine) draw differently.
Held-out samples, and rows with NaN or Inf, are written as by top-k.

With rand-top-k:FRACTION:CHANCE:support the gradient comes back only where a number was received, as in the paper. Then
`down_codec = "top-k:FRACTION"` sends it in fewer bytes without loss; the paper saves its positions, which both sides
know, and this does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from cutlayer.errors import ConfigError
from cutlayer.wire.codecs.top_k import SUPPORT, TopK, fraction_of
from cutlayer.wire.codecs.writing import Codec, codec

_EXAMPLE = "rand-top-k:0.1:0.2"
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_GOLDEN, _FIRST, _SECOND = (c - (1 << 64) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@codec("rand-top-k", paper="arXiv 2305.18469")
@dataclass(frozen=True)
class RandTopK(TopK):
    """Numbers of each row, drawn at random, mostly the largest; rand-top-k:0.1:0.2 keeps a tenth.

    `fraction` (0.1) of the numbers is kept. Each is one of the largest with probability 1 - `chance` (0.8).
    """

    code = 6
    example = "0.1:0.2"
    chance: float = 0.0

    @classmethod
    def of(cls, argument: str | None) -> Self:
        """Raises ConfigError unless `argument` is a fraction and a chance, with :support or without."""
        text = (argument or "").removesuffix(SUPPORT)
        fraction, colon, chance = text.partition(":")
        if not colon:
            raise ConfigError(f"rand-top-k needs the fraction that is kept and the chance of others, e.g. {_EXAMPLE}")
        return cls(fraction_of(fraction, _EXAMPLE), _chance_of(chance), support=text != argument)

    @property
    def argument(self) -> str:
        """The fraction and the chance, with :support or without."""
        return f"{self.fraction!r}:{self.chance!r}" + SUPPORT * self.support

    @property
    def evaluating(self) -> Codec:
        """Nothing is drawn: the largest numbers."""
        return replace(self, zstd=False, chance=0.0)

    def chosen(self, flat: Tensor, k: int) -> Tensor:
        """Of the k largest and of the others, as many of each as are drawn."""
        largest, m = super().chosen(flat, k), flat.shape[1]
        if not self.chance or k == m:
            return largest
        seed = _seeds(flat)
        keys, others = _draws(seed, m), min(k, m - k)
        threshold = min(int(self.chance * 2.0**63), (1 << 63) - 1)
        drawn = (_shifted(_draws(~seed, k), 1) < threshold).sum(1, keepdim=True).clamp(max=others)
        kept = k - drawn * flat.isfinite().all(1, keepdim=True)
        largest = largest.gather(1, keys.gather(1, largest).argsort(1))
        rest = keys.scatter(1, largest, (1 << 63) - 1).topk(others, largest=False).indices
        place = torch.arange(k, device=flat.device).expand(len(flat), k)
        return torch.where(place < kept, largest, rest.gather(1, (place - kept).clamp(0, others - 1)))

    def bound(self, x: Tensor) -> Tensor:
        """Any number can be dropped: the largest of a row."""
        if not self.chance:
            return super().bound(x)
        rows = x.shape[0] if x.dim() else 1
        largest = x.double().abs().reshape(rows, math.prod(x.shape[1:])).amax(1)
        return largest.view(rows, *[1] * (x.dim() - 1)) if x.dim() else largest.view(())


def _chance_of(text: str) -> float:
    try:
        chance = float(text)
    except ValueError:
        chance = math.nan
    if not 0 <= chance <= 1:
        raise ConfigError(f"{text!r} is not a chance between 0 and 1: give e.g. {_EXAMPLE}")
    return chance


# Whole numbers of 64 bits that wrap around: the same on all devices


def _seeds(flat: Tensor) -> Tensor:
    """A number per row [n], from the row's bits and their positions."""
    bits = flat.view(_BITS[flat.element_size()]).long()
    return _mixed(bits + _GOLDEN * _counting(flat.shape[1], flat.device)).sum(1)


def _draws(seeds: Tensor, count: int) -> Tensor:
    """Numbers [n, count] of 64 random bits, from a seed per row."""
    return _mixed(_mixed(seeds)[:, None] + _GOLDEN * _counting(count, seeds.device))


def _counting(count: int, device: torch.device) -> Tensor:
    return torch.arange(1, count + 1, device=device)


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64's last steps: numbers that differ in one bit come out unrelated."""
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shifted to the right, as numbers without a sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
