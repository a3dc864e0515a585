"""A running Gaussian of smashed data for each label, with a diagonal covariance.

Shape legend: R rows, s... the shape of one row's smashed data, K labels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cutlayer.gradients import column
from cutlayer.types import Rows


class LabelGaussians:
    """Weighted means and variances [K, s...] of all rows of each label so far, in `kept`."""

    def __init__(self, kept: dict[str, Tensor], labels: int) -> None:
        self._kept, self.labels = kept, labels

    @property
    def weights(self) -> Tensor:
        """The total weight of the rows of each label: [K]."""
        return self._kept.get("gaussians weight", torch.zeros(self.labels, dtype=torch.float64))

    @property
    def known(self) -> Tensor:
        """The labels that have had rows, in order."""
        return (self.weights > 0).nonzero()[:, 0]

    def update(self, rows: Rows, labels: Tensor, weight: float = 1.0, decay: float = 1.0) -> None:
        """Add rows, each [R, s...], with `labels` [R] and the weight `weight` each. The weights of earlier rows are
        multiplied by `decay`.
        """
        labels = labels.cpu()
        new = torch.bincount(labels, minlength=self.labels).double() * weight  # [K]
        old = self.weights * decay
        total = old + new
        share = new / total.clamp(min=torch.finfo(total.dtype).tiny)
        for i, r in enumerate(rows):
            self._update_one(i, r.detach(), labels.to(r.device), share)
        self._kept["gaussians weight"] = total

    def _update_one(self, i: int, rows: Tensor, labels: Tensor, share: Tensor) -> None:
        """Update the mean and the variance of one of the crossing tensors; `share` [K] is the share of the new rows in
        the total weight.
        """
        counts = torch.bincount(labels, minlength=self.labels).clamp(min=1)
        zeros = rows.new_zeros(self.labels, *rows.shape[1:])  # [K, s...]
        mean = zeros.index_add(0, labels, rows) / column(counts, zeros)
        variance = zeros.index_add(0, labels, (rows - mean[labels]).square()) / column(counts, zeros)
        before, spread = (self._of(what, i, zeros) for what in ("mean", "variance"))
        s, apart = column(share, zeros), mean - before
        self._kept[f"gaussians mean {i}"] = before + s * apart
        self._kept[f"gaussians variance {i}"] = spread + s * (variance - spread) + s * (1 - s) * apart.square()

    def draw(self, labels: Tensor, generator: torch.Generator) -> Rows:
        """A row for each of `labels` [n], all of them known: each [n, s...]."""
        found = []
        for i in range(sum(name.startswith("gaussians mean") for name in self._kept)):
            mean, variance = self._kept[f"gaussians mean {i}"], self._kept[f"gaussians variance {i}"]
            at = labels.to(mean.device)
            noise = torch.randn(len(labels), *mean.shape[1:], generator=generator, dtype=mean.dtype).to(mean.device)
            found.append(mean[at] + variance[at].sqrt() * noise)
        return tuple(found)

    def _of(self, what: str, i: int, like: Tensor) -> Tensor:
        """The stored values of a crossing tensor, [K, s...]; zeros if there are none."""
        return self._kept.get(f"gaussians {what} {i}", like).to(like.device)
