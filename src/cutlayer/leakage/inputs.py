"""The instruments' common checks of inputs, splits and scales.

Shape legend: n samples, d = number of values of one sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor

from cutlayer import seeds
from cutlayer.data.samples import Inputs, each, inputs_of
from cutlayer.errors import DataError

Client = Callable[[Tensor], Tensor]
X = TypeVar("X", bound=Inputs)


@dataclass(frozen=True)
class Split:
    """Row numbers of three disjoint parts: estimators are trained, chosen and reported on one each."""

    train: Tensor
    validation: Tensor
    test: Tensor


def split(n: int, seed: int, *name: str | int, shares: tuple[float, float] = (0.6, 0.2)) -> Split:
    """`n` rows, shuffled, in three: the shares of training and validation, and the rest for the test."""
    order = torch.from_numpy(seeds.generator(seed, "leakage", "split", *name).permutation(n))
    first, second = round(n * shares[0]), round(n * (shares[0] + shares[1]))
    return Split(order[:first], order[first:second], order[second:])


def check_real(x: Tensor, what: str) -> None:
    """Raises DataError unless `x` is floating point: tokens have no mean squared error."""
    if not x.is_floating_point():
        raise DataError(f"{what} are of type {x.dtype}: this instrument takes real numbers, such as images or features")


def width(t: Tensor) -> int:
    """The number of values of one sample."""
    return math.prod(t.shape[1:])


@dataclass(frozen=True)
class Scale:
    """An affine map to mean 0, deviation 1, fitted on some rows.

    Values that hardly vary (below a tenth of the root mean square deviation) are divided by that tenth. Otherwise a
    single row with a white pixel where all others are black would weigh more than everything else.
    """

    mean: Tensor  # [d]
    deviation: Tensor  # [d]

    @staticmethod
    def of(rows: Tensor) -> Scale:
        """Fitted to rows [n, d]."""
        deviation = rows.std(0)
        least = float(deviation.square().mean().sqrt()) / 10
        return Scale(rows.mean(0), deviation.clamp_min(least or 1.0))

    def __call__(self, rows: Tensor) -> Tensor:
        """[n, d] -> [n, d]."""
        return (rows - self.mean) / self.deviation


@torch.no_grad()
def smash(client: Callable[[X], Tensor], x: X, seed: int, *name: str | int, batch: int = 256) -> Tensor:
    """The client part's output for x [n, ...], batch by batch, with its own random draws seeded by `name`: [n, ...]."""
    first = inputs_of(x)[0]
    starts = range(0, len(first), batch)
    with seeds.torch_seeded(seed, "leakage", "smash", *name, device=first.device):
        return torch.cat([client(_part(x, slice(a, a + batch))) for a in starts])


def _part(x: X, rows: slice) -> X:
    return cast(X, each(x, lambda t: t[rows]))


def is_random(client: Client, x: Tensor, seed: int) -> bool:
    """Whether the client part gives different smashed data when the same rows go through it twice."""
    few = x[:8]
    return not torch.equal(smash(client, few, seed, "first"), smash(client, few, seed, "second"))
