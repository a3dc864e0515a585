"""Common layers of the built-in models. Shape legend: R rows of the batch, h x w one picture."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from cutlayer.errors import ConfigError


def named(**children: nn.Module) -> nn.Sequential:
    """The children one after another, under their names."""
    return nn.Sequential(OrderedDict(children))


def conv_block(inputs: int, outputs: int, kernel: int = 3, pool: bool = False) -> nn.Sequential:
    """[R, inputs, h, w] -> [R, outputs, h, w], or h/2 x w/2 with `pool`."""
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.ReLU()]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool else []))


def picture_shape(model: str, shape: tuple[int, ...], smallest: int) -> tuple[int, int, int]:
    """`shape` as (channels, height, width). Raises ConfigError if it is not a picture of at least smallest x
    smallest.
    """
    if len(shape) != 3:
        raise ConfigError(
            f"model {model!r} takes pictures (channels, height, width), these samples have shape {shape}: use 'mlp', "
            "which flattens any input, or reshape the data"
        )
    channels, height, width = shape
    if min(height, width) < smallest:
        raise ConfigError(
            f"model {model!r} needs pictures of at least {smallest}x{smallest}, these are {height}x{width}: "
            "use 'mlp', or enlarge the pictures"
        )
    return channels, height, width
