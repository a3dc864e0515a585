"""A small convolutional network. Shape legend: R rows of the batch, h x w one picture, K classes."""

from __future__ import annotations

from torch import nn

from cutlayer.models.making import model
from cutlayer.models.zoo._layers import conv_block, named, picture_shape


@model(
    "cnn",
    title="CNN",
    summary="small CNN: two convolution blocks, two linear layers",
    cuts=("block1", "block2", "hidden"),
    default_cut="block1",
)
def cnn(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Two blocks of convolution, ReLU and max-pool, then two linear layers."""
    channels, height, width = picture_shape("cnn", input_shape, smallest=4)
    features = 32 * (height // 4) * (width // 4)
    return named(
        block1=conv_block(channels, 16, pool=True),  # [R, 16, h/2, w/2]
        block2=conv_block(16, 32, pool=True),  # [R, 32, h/4, w/4]
        hidden=nn.Sequential(nn.Flatten(), nn.Linear(features, 64), nn.ReLU()),  # [R, 64]
        head=nn.Linear(64, classes),
    )
