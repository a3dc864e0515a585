"""NoPeek (Vepakomma et al. 2020, arXiv 2008.09161): a penalty on the distance correlation of inputs and smashed data.

The sent data are not changed; the client learns to send data that tell less about its inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cutlayer.defences.protection import Defence, defence
from cutlayer.plugins import option


@defence("nopeek", title="NoPeek", paper="arXiv 2008.09161")
class NoPeek(Defence):
    """A penalty on the distance correlation of inputs and smashed data, in the client's loss."""

    nopeek: float = option(
        0.0,
        ge=0,
        help="Weight of NoPeek: a penalty on the distance correlation of inputs and smashed data, in the client's "
        "loss.",
    )

    @property
    def exact(self) -> bool:
        """Everything is sent as it is."""
        return True

    @property
    def active(self) -> bool:
        """With a weight above 0."""
        return self.nopeek > 0

    @property
    def weight(self) -> float:
        """As the option says."""
        return self.nopeek

    def penalty(self, x: Tensor, z: Tensor) -> Tensor:
        """The distance correlation."""
        return distance_correlation(x, z)


def distance_correlation(x: Tensor, z: Tensor) -> Tensor:
    """Distance correlation, in [0, 1], of rows x [n, d] and z [n, m], by the biased estimator, differentiable in z
    (Szekely et al. 2007). 0 if one of them is constant.
    """
    a, b = (_centred(r.double()) for r in (x, z))
    product = (a.square().mean() * b.square().mean()).sqrt()
    squared = (a * b).mean() / product.clamp(min=1e-30)
    return squared.clamp(min=1e-12).sqrt()


def _centred(rows: Tensor) -> Tensor:
    """Euclidean distances [n, n] between rows, their means taken out in both directions."""
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")  # the other way is inexact
    centred: Tensor = distances - distances.mean(0) - distances.mean(1, keepdim=True) + distances.mean()
    return centred
