"""A user's own codec and defence, in a file that a configuration names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from cutlayer.defences.protection import Defence, defence, drawn
from cutlayer.errors import ConfigError
from cutlayer.plugins import option
from cutlayer.types import Rows
from cutlayer.wire import Codec, codec


@codec("grid")
@dataclass(frozen=True)
class Grid(Codec):
    """Sends the tensor's mean and each number's distance from it in steps, as two bytes; e.g. grid:0.01."""

    step: float = 0.001

    @classmethod
    def of(cls, argument: str | None) -> Self:
        """A codec with the given step."""
        try:
            return cls() if argument is None else cls(float(argument))
        except ValueError:
            raise ConfigError(f"{argument!r} is not a step: give e.g. grid:0.01") from None

    @property
    def argument(self) -> str:
        """The step as text."""
        return repr(self.step)

    def size(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """8 bytes for the mean, then 2 bytes per number."""
        return 8 + 2 * math.prod(shape)

    def write(self, x: Tensor) -> list[Tensor]:
        """The mean of all rows, and each number's distance from it in steps. If any is NaN, so is the mean."""
        mean = x.double().mean().view(1)
        steps = ((x - mean) / self.step).round().nan_to_num(0, 0, 0).clamp(-32768, 32767)
        return [mean, steps.to(torch.int16)]

    def read(self, payload: memoryview, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The mean plus the steps."""
        mean = torch.frombuffer(bytearray(payload[:8]), dtype=torch.float64)
        steps = torch.frombuffer(bytearray(payload[8:]), dtype=torch.int16).view(tuple(shape))
        return (mean + steps * self.step).to(dtype)

    def bound(self, x: Tensor) -> Tensor:
        """About half a step, and the part of a number that is out of range."""
        beyond = ((x - x.double().mean()).abs() - 32767 * self.step).clamp(min=0)
        return self.step * 0.51 + beyond + (x.double().abs() + beyond) * torch.finfo(x.dtype).eps


@codec("careless")
class Careless(Codec):
    """Claims another size than it writes."""

    def size(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """One byte less than it writes."""
        return math.prod(shape) * 2 - 1

    def write(self, x: Tensor) -> list[Tensor]:
        """Two bytes for each number."""
        return [x.half()]

    def read(self, payload: memoryview, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Is never called."""
        raise AssertionError

    def bound(self, x: Tensor) -> Tensor:
        """Not known."""
        return torch.full((), math.inf)


@defence("shrink")
class Shrink(Defence):
    """Multiplies smashed data by random factors, and penalises their length."""

    order = 15

    shrink: float = option(0.5, gt=0, le=1, help="The least factor.")

    def protect(self, rows: Rows, sizes: Sequence[int], draws: Sequence[torch.Generator]) -> Rows:
        """Multiplies every number by its own factor."""
        return tuple(r * drawn(self._factors, r, sizes, draws) for r in rows)

    def penalty(self, x: Tensor, z: Tensor) -> Tensor:
        """The mean square."""
        return z.square().mean()

    def _factors(self, shape: Sequence[int], draw: torch.Generator) -> Tensor:
        return self.shrink + (1 - self.shrink) * torch.rand(tuple(shape), generator=draw)
