"""Smashed data are clipped, and noise is added.

The noise is given in units of the clip, and the kind of noise decides which norm is clipped. Together they are
differentially private, as `dp` states.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import PrivateAttr
from torch import Tensor

from cutlayer.defences.protection import Defence, defence, drawn
from cutlayer.errors import ConfigError
from cutlayer.plugins import option
from cutlayer.types import Rows


@defence("noise", title="Clipping and noise", paper="arXiv 1905.02383, arXiv 1805.06530")
class Noise(Defence):
    """Clips each sample's smashed data, all tensors together, and adds Gaussian or Laplace noise."""

    order = 20

    clip: float | None = option(
        None,
        gt=0,
        help="Scale each sample's smashed data down to this length: the Euclidean norm, or with laplace_noise the "
        "sum of absolute values.",
    )
    gaussian_noise: float = option(
        0.0, ge=0, help="Add Gaussian noise to smashed data: its standard deviation, in units of clip."
    )
    laplace_noise: float = option(0.0, ge=0, help="Add Laplace noise to smashed data: its scale, in units of clip.")

    _silent: bool = PrivateAttr(False)

    @property
    def active(self) -> bool:
        """With a clip."""
        return self.clip is not None

    @property
    def exact(self) -> bool:
        """If there is no noise: clipping is continuous."""
        return not self.scale

    @property
    def scale(self) -> float:
        """The noise's standard deviation (Gaussian) or scale (Laplace), in units of smashed data; 0: there is none."""
        return 0.0 if self._silent else (self.clip or 0.0) * (self.gaussian_noise or self.laplace_noise)

    @property
    def silent(self) -> Noise:
        """The same without noise, clipped by the same norm."""
        quiet = self.model_copy()
        quiet._silent = True
        return quiet

    def check(self, given: frozenset[str]) -> None:
        """Noise only has a meaning relative to the length of the rows that it hides. Raises ConfigError."""
        for name in ("gaussian_noise", "laplace_noise"):
            if getattr(self, name) and self.clip is None:
                raise ConfigError(f"{name} = {getattr(self, name)!r} needs clip, its unit: give e.g. clip = 1.0")
        if self.gaussian_noise and self.laplace_noise:
            raise ConfigError(
                f"gaussian_noise = {self.gaussian_noise!r} and laplace_noise = {self.laplace_noise!r} exclude each "
                "other: give one"
            )

    def protect(self, rows: Rows, sizes: Sequence[int], draws: Sequence[torch.Generator]) -> Rows:
        """Clipped rows plus noise. The way back goes through clipping; noise has no derivative."""
        rows = self.clipped(rows)
        if not self.scale:
            return rows
        noise = _laplace if self.laplace_noise else _gaussian
        return tuple(r + self.scale * drawn(noise, r, sizes, draws) for r in rows)

    def clipped(self, rows: Rows) -> Rows:
        """Floating point rows, each [R, s...], of which each sample is at most `clip` long, over all tensors."""
        if self.clip is None:
            return rows
        factor = self.clip / _length(rows, 1 if self.laplace_noise else 2).clamp(min=self.clip)
        return tuple(_shortened(r, factor.view(-1, *[1] * (r.dim() - 1))) for r in rows)


def _shortened(rows: Tensor, factor: Tensor) -> Tensor:
    if rows.element_size() >= 4:
        return rows * factor.to(rows.dtype)
    slack = 1 - torch.finfo(rows.dtype).eps  # rounding to few digits may increase the norm again
    return (rows.float() * torch.where(factor < 1, factor * slack, factor)).to(rows.dtype)


def _length(rows: Sequence[Tensor], order: int) -> Tensor:
    """The norm of each sample over all tensors: [R]."""
    flat = torch.cat([r.flatten(1) for r in rows], 1)
    lengths: Tensor = torch.linalg.vector_norm(flat if flat.element_size() >= 4 else flat.float(), order, 1)
    return lengths


def _gaussian(shape: Sequence[int], draw: torch.Generator) -> Tensor:
    return torch.randn(tuple(shape), generator=draw)


def _laplace(shape: Sequence[int], draw: torch.Generator) -> Tensor:
    """Of scale 1: the difference of two exponential draws."""
    one, two = (torch.empty(tuple(shape)).exponential_(generator=draw) for _ in range(2))
    return one - two
