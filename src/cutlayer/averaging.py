"""Weighted averaging of models, parameters and buffers alike (FedAvg: weights n_k / n)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from cutlayer.frozen import load_moving, moving


def average_into(target: nn.Module, models: Sequence[nn.Module], weights: Sequence[float]) -> None:
    """target := sum_k (w_k / sum w) models[k]. `target` may be one of `models`. What is frozen stays as it is."""
    load_moving(target, average([moving(m) for m in models], weights))


def average(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """sum_k (w_k / sum w) states[k], name by name.

    Real and complex buffers (batch normalisation's running statistics) are averaged like parameters; integer ones (its
    batch counter) take the largest value.
    """
    total = sum(weights)
    mean: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, first in states[0].items():
            if first.is_floating_point() or first.is_complex():
                mean[name] = first * (weights[0] / total)
                for state, weight in zip(states[1:], weights[1:], strict=True):
                    mean[name].add_(state[name], alpha=weight / total)
            else:
                mean[name] = torch.stack([s[name] for s in states]).amax(0)
    return mean
