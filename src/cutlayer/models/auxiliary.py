"""Auxiliary heads, with which a client part trains on its own loss, without the server's gradients.

Shape legend: R rows; s... the shape of a row, K scores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cutlayer.models.prepared import has_lazy_layers
from cutlayer.types import Rows


class AuxiliaryHead(nn.Module):
    """A head in the place of a model's last part, which is called with a tuple of tensors."""

    def __init__(self, head: nn.Module, smashed: Rows) -> None:
        """`head` is called with the tensors that cross, one after another. `smashed` are examples of them, each [n,
        s...], with which lazy layers are initialised.
        """
        super().__init__()
        self.head = head
        if has_lazy_layers(head):
            like = next(head.parameters())
            with torch.no_grad():
                head(*(r.to(like.device, like.dtype if r.is_floating_point() else r.dtype) for r in smashed))

    def forward(self, smashed: Rows) -> Any:
        """Smashed data, each [R, s...], to scores [R, K]."""
        return self.head(*smashed)


class PooledHead(nn.Module):
    """Global average pooling over all but the first feature dimension, then one linear layer: [R, s...] -> [R, K].

    It uses the first floating point tensor that crosses. This is the default of arXiv 2507.15816 (CSE-FSL) and similar
    methods.
    """

    def __init__(self, smashed: Rows, classes: int) -> None:
        """`smashed` are examples of smashed data, each [n, s...]."""
        super().__init__()
        self.at = next(i for i, r in enumerate(smashed) if r.is_floating_point())
        example = smashed[self.at]
        self.linear = nn.Linear(example.shape[1] if example.dim() > 1 else 1, classes)

    def forward(self, *smashed: Tensor) -> Tensor:
        """Smashed data, each [R, s...], to scores [R, K]."""
        features = smashed[self.at]
        if features.dim() == 1:
            features = features[:, None]
        if features.dim() > 2:
            features = torch.mean(features, dim=tuple(range(2, features.dim())))
        scores: Tensor = self.linear(features)
        return scores
