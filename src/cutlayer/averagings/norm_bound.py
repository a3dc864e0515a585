"""Updates of bounded length (norm thresholding, Sun et al. 2019, arXiv 1911.07963)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from cutlayer.averagings.rule import Averaging, averaging
from cutlayer.plugins import option

if TYPE_CHECKING:
    from torch import Tensor


@averaging("norm_bound", title="Norm bound", paper="arXiv 1911.07963")
class NormBound(Averaging):
    """The weighted mean of the updates, after those that are longer than a bound are scaled down to it.

    A client's update is its model minus the last average (before the first: minus the model that all started from;
    where clients started from different models, minus the median of the received models, number by number). Its
    length is the Euclidean norm over all parameters and real buffers. The weights are those of the mean.
    """

    relative: ClassVar[bool] = True
    exclusive: ClassVar = (("norm_multiple", "norm_limit"),)

    norm_multiple: float = option(1.0, gt=0)
    """The bound as a multiple of the median length of all updates (for an even number of updates, of the lower
    median)."""
    norm_limit: float | None = option(None, gt=0)
    """The bound as a fixed length, instead of a multiple of the median."""

    def combine(self, models: Tensor, shares: Tensor, origin: Tensor | None) -> Tensor:
        """The origin and the mean of the bounded updates, added up in double precision."""
        start = (models.median(0).values if origin is None else origin).double()
        lengths = torch.stack([torch.linalg.vector_norm(model.double() - start) for model in models])
        bound = lengths.median() * self.norm_multiple if self.norm_limit is None else self.norm_limit
        factors = shares.to(lengths) * (bound / lengths.clamp(min=torch.finfo(torch.float64).tiny)).clamp(max=1)
        combined = start.clone()
        for model, factor in zip(models, factors, strict=True):
            combined += factor * (model.double() - start)
        return combined.to(models.dtype)
