"""An AlexNet for small pictures. Shape legend: R rows of the batch, h x w one picture, K classes."""

from __future__ import annotations

from torch import nn

from cutlayer.models.making import model
from cutlayer.models.zoo._layers import conv_block, named, picture_shape


@model(
    "alexnet",
    title="AlexNet",
    summary="an AlexNet for 28x28 whose client part is one convolution and one max-pool (paper, Table 4)",
    cuts=("block1", "block2", "conv3", "conv4", "block5", "hidden1", "hidden2"),
    default_cut="block1",
    paper="doi 10.1145/3065386",
)
def alexnet(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """An AlexNet for small pictures whose first block, one convolution and one max-pool, is the client part.

    The paper (Table 4) gives no widths. These are ours, chosen so that on 1x28x28 the client part does 5.27 % of the
    forward multiply-accumulates, as there.
    """
    channels, height, width = picture_shape("alexnet", input_shape, smallest=8)
    features = 64 * (height // 8) * (width // 8)
    return named(
        block1=conv_block(channels, 64, kernel=5, pool=True),  # [R, 64, h/2, w/2]
        block2=conv_block(64, 64, pool=True),  # [R, 64, h/4, w/4]
        conv3=conv_block(64, 128),
        conv4=conv_block(128, 128),  # [R, 128, h/4, w/4]
        block5=conv_block(128, 64, pool=True),  # [R, 64, h/8, w/8]
        hidden1=nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(features, 1024), nn.ReLU()),
        hidden2=nn.Sequential(nn.Dropout(0.5), nn.Linear(1024, 256), nn.ReLU()),
        head=nn.Linear(256, classes),
    )
