"""A multi-layer perceptron. Shape legend: R rows of the batch, K classes."""

from __future__ import annotations

import math

from torch import nn

from cutlayer.models.making import model
from cutlayer.models.zoo._layers import named

_WIDTH = 128


@model(
    "mlp",
    title="MLP",
    summary="multi-layer perceptron, three hidden layers of 128",
    cuts=("hidden1", "hidden2", "hidden3"),
    default_cut="hidden2",
)
def mlp(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Three hidden layers of 128; takes samples of any shape, flattened."""
    return named(
        hidden1=nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), _WIDTH), nn.ReLU()),  # [R, 128]
        hidden2=nn.Sequential(nn.Linear(_WIDTH, _WIDTH), nn.ReLU()),
        hidden3=nn.Sequential(nn.Linear(_WIDTH, _WIDTH), nn.ReLU()),
        head=nn.Linear(_WIDTH, classes),
    )
