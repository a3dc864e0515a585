"""The built-in models. Their cut points are the names of direct children, in the order data flows.

Names and default cuts are listed in `catalog.MODELS`; `build` makes a model for a sample shape and a number of classes.
A user's own `nn.Module` needs nothing from this file: `cut` takes any module and any name of its `named_modules()`.

Shape legend: R rows of the batch, c x h x w one picture, K classes.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

from cutlayer.catalog import MODELS
from cutlayer.errors import ConfigError, unknown

Shape = tuple[int, ...]


def build(name: str, input_shape: Shape, classes: int) -> nn.Module:
    """The zoo's model `name` for samples of `input_shape` (no batch dimension) and `classes` logits: [R, K].

    Weights are drawn from torch's global generator (see `seeds.torch_seeded`).
    Raises ConfigError: unknown name, fewer than two classes, or samples that the model cannot take.
    """
    if name not in _BUILDERS:
        raise ConfigError(unknown("model", name, MODELS))
    if classes < 2:
        raise ConfigError(f"classes = {classes}: a classifier needs at least two classes; check the labels")
    if not input_shape or min(input_shape) < 1:
        raise ConfigError(f"input shape {input_shape}: every dimension must be at least 1; check the data set")
    return _BUILDERS[name](tuple(input_shape), classes)


def mlp(shape: Shape, classes: int, width: int = 128) -> nn.Module:
    """Three hidden layers of 128; takes samples of any shape, flattened."""
    return _named(
        hidden1=nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), width), nn.ReLU()),  # [R, 128]
        hidden2=nn.Sequential(nn.Linear(width, width), nn.ReLU()),
        hidden3=nn.Sequential(nn.Linear(width, width), nn.ReLU()),
        head=nn.Linear(width, classes),
    )


def cnn(shape: Shape, classes: int) -> nn.Module:
    """Two blocks of convolution, ReLU and max-pool, then two linear layers."""
    channels, height, width = _image("cnn", shape, smallest=4)
    features = 32 * (height // 4) * (width // 4)
    return _named(
        block1=_conv(channels, 16, pool=True),  # [R, 16, h/2, w/2]
        block2=_conv(16, 32, pool=True),  # [R, 32, h/4, w/4]
        hidden=nn.Sequential(nn.Flatten(), nn.Linear(features, 64), nn.ReLU()),  # [R, 64]
        head=nn.Linear(64, classes),
    )


def resnet16(shape: Shape, classes: int) -> nn.Module:
    """The paper's ResNet16: stem and seven basic blocks of 16, 16, 32, 32, 64, 64, 64 channels.

    The paper does not say how a shortcut crosses a change of shape; ours is a 1x1 convolution and batch norm.
    """
    channels, _, _ = _image("resnet16", shape, smallest=1)
    if channels not in (1, 3):
        raise ConfigError(
            f"model 'resnet16' takes pictures of 1 or 3 channels, these have {channels}: use 'cnn', or your own module"
        )
    return _named(
        prepare=Prepare(),  # [R, 3, 32, 32]
        stem=nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        block1=BasicBlock(16, 16),
        block2=BasicBlock(16, 16),  # [R, 16, 32, 32]
        block3=BasicBlock(16, 32, stride=2),
        block4=BasicBlock(32, 32),  # [R, 32, 16, 16]: the paper's cut
        block5=BasicBlock(32, 64, stride=2),
        block6=BasicBlock(64, 64),
        block7=BasicBlock(64, 64),  # [R, 64, 8, 8]
        head=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)),
    )


def alexnet(shape: Shape, classes: int) -> nn.Module:
    """An AlexNet for small pictures whose first block, one convolution and one max-pool, is the client part.

    The paper (Table 4) gives no widths. These are ours, chosen so that on 1x28x28 the client part does 5.27 % of the
    forward multiply-accumulates, as there.
    """
    channels, height, width = _image("alexnet", shape, smallest=8)
    features = 64 * (height // 8) * (width // 8)
    return _named(
        block1=_conv(channels, 64, kernel=5, pool=True),  # [R, 64, h/2, w/2]
        block2=_conv(64, 64, pool=True),  # [R, 64, h/4, w/4]
        conv3=_conv(64, 128),
        conv4=_conv(128, 128),  # [R, 128, h/4, w/4]
        block5=_conv(128, 64, pool=True),  # [R, 64, h/8, w/8]
        hidden1=nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(features, 1024), nn.ReLU()),
        hidden2=nn.Sequential(nn.Dropout(0.5), nn.Linear(1024, 256), nn.ReLU()),
        head=nn.Linear(256, classes),
    )


class Prepare(nn.Module):
    """Pictures [R, 1 or 3, h, w] -> [R, 3, 32, 32]: resized bilinearly, one channel repeated three times."""

    def forward(self, x: Tensor) -> Tensor:
        """[R, 1 or 3, h, w] -> [R, 3, 32, 32]."""
        # Both steps run for every input: a condition on the shape would be a branch that tracing cannot follow, and
        # resizing 32x32 to 32x32 changes nothing.
        x = functional.interpolate(x, size=(32, 32), mode="bilinear", align_corners=False)
        return x.expand(-1, 3, -1, -1)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut: [R, inputs, h, w] -> [R, outputs, h/stride, w/stride]."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[R, inputs, h, w] -> [R, outputs, h/stride, w/stride]."""
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


_BUILDERS: dict[str, Callable[[Shape, int], nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "resnet16": resnet16,
    "alexnet": alexnet,
}


def _named(**children: nn.Module) -> nn.Sequential:
    """The children one after another, under their names."""
    return nn.Sequential(OrderedDict(children))


def _conv(inputs: int, outputs: int, kernel: int = 3, pool: bool = False) -> nn.Sequential:
    """[R, inputs, h, w] -> [R, outputs, h, w], or h/2 x w/2 with `pool`."""
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.ReLU()]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool else []))


def _image(model: str, shape: Shape, smallest: int) -> tuple[int, int, int]:
    """`shape` as (channels, height, width); ConfigError where it is not a picture of at least smallest x smallest."""
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
