"""The paper's ResNet16. Shape legend: R rows of the batch, h x w one picture, K classes."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from cutlayer.errors import ConfigError
from cutlayer.models.making import model
from cutlayer.models.zoo._layers import named, picture_shape


@model(
    "resnet16",
    title="ResNet16",
    summary="the paper's ResNet16, cut 9/7 after block4 (inputs resized to 3x32x32)",
    cuts=("stem", "block1", "block2", "block3", "block4", "block5", "block6", "block7"),
    default_cut="block4",
    paper="arXiv 1512.03385",
)
def resnet16(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """The paper's ResNet16: stem and seven basic blocks of 16, 16, 32, 32, 64, 64, 64 channels.

    The paper does not say how a shortcut crosses a change of shape; ours is a 1x1 convolution and batch norm.
    """
    channels, _, _ = picture_shape("resnet16", input_shape, smallest=1)
    if channels not in (1, 3):
        raise ConfigError(
            f"model 'resnet16' takes pictures of 1 or 3 channels, these have {channels}: use 'cnn', or your own module"
        )
    return named(
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
