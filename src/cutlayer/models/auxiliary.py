"""Auxiliary heads, with which a client part trains on its own loss, without the server's gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cutlayer.types import Rows


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

    def forward(self, rows: Rows) -> Tensor:
        """Smashed data, each [R, s...], to scores [R, K]."""
        features = rows[self.at]
        if features.dim() == 1:
            features = features[:, None]
        if features.dim() > 2:
            features = torch.mean(features, dim=tuple(range(2, features.dim())))
        scores: Tensor = self.linear(features)
        return scores
