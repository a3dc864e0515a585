"""The models of the benchmark: common ones, as sequences of named parts, each cut after one of its parts.

They are plain torch or the package's built-in models, and small enough for one processor core.

Shape legend: R rows of the batch, h x w one picture, T steps or tokens, D channels or the width of a token, K classes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from cutlayer.models import build

CLASSES = 10
Kind = Literal["convolutional", "transformer", "dense", "recurrent"]


@dataclass(frozen=True)
class Net:
    """A model of the benchmark. `make` makes it for samples of `shape`, and it is cut after its part `cut`.

    `tokens` is the size of the vocabulary, if samples are token numbers. `per_pixel` means that each pixel has a class.
    `light` models are small enough to train hundreds of copies, and are measured with all algorithms.
    """

    make: Callable[[], nn.Sequential]
    shape: tuple[int, ...]
    cut: str
    kind: Kind
    light: bool = False
    tokens: int | None = None
    per_pixel: bool = False

    @property
    def task(self) -> str:
        """The task of the model."""
        return "segmentation" if self.per_pixel else "classification"

    def halves(self, net: nn.Sequential) -> tuple[nn.Sequential, nn.Sequential]:
        """(client's part, server's part) of a model from `make`. The parts share its weights."""
        names = [name for name, _ in net.named_children()]
        end = names.index(self.cut) + 1
        return net[:end], net[end:]

    def samples(self, count: int) -> tuple[Tensor, Tensor]:
        """`count` random samples and their targets."""
        random = torch.Generator().manual_seed(0)
        if self.tokens is None:
            x = torch.rand(count, *self.shape, generator=random)
        else:
            x = torch.randint(self.tokens, (count, *self.shape), generator=random)
        where = self.shape[1:] if self.per_pixel else ()
        y = torch.randint(CLASSES, (count, *where), generator=random)
        y.view(count, -1)[:CLASSES, 0] = torch.arange(min(CLASSES, count))  # every class occurs
        return x, y


def named(**children: nn.Module) -> nn.Sequential:
    """A sequence of these named children."""
    return nn.Sequential(OrderedDict(children))


def zoo(name: str, shape: tuple[int, ...]) -> Callable[[], nn.Sequential]:
    """A function that makes a built-in model of the package."""

    def make() -> nn.Sequential:
        made = build(name, shape, CLASSES)
        assert isinstance(made, nn.Sequential), "the zoo's models are sequences of named parts"
        return made

    return make


# --- convolutional ---------------------------------------------------------------------------------------------------


def lenet5() -> nn.Sequential:
    """LeNet-5 in its modern form, with ReLU and max-pooling: 6 and 16 channels of 5x5, for pictures of 1x28x28."""
    return named(
        block1=nn.Sequential(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),  # [R, 6, 14, 14]
        block2=nn.Sequential(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),  # [R, 16, 5, 5]
        hidden1=nn.Sequential(nn.Flatten(), nn.Linear(400, 120), nn.ReLU()),
        hidden2=nn.Sequential(nn.Linear(120, 84), nn.ReLU()),
        head=nn.Linear(84, CLASSES),
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut: [R, inputs, h, w] -> [R, outputs, h/stride, w/stride]."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[R, inputs, h, w] -> [R, outputs, h/stride, w/stride]."""
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet18(width: int = 64) -> nn.Sequential:
    """ResNet-18 for CIFAR: a 3x3 stem without pooling, then pairs of blocks of 64, 128, 256 and 512 channels."""
    w = width

    def pair(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        return nn.Sequential(BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs))

    return named(
        stem=nn.Sequential(nn.Conv2d(3, w, 3, padding=1, bias=False), nn.BatchNorm2d(w), nn.ReLU()),
        layer1=pair(w, w, 1),  # [R, 64, 32, 32]
        layer2=pair(w, 2 * w, 2),
        layer3=pair(2 * w, 4 * w, 2),
        layer4=pair(4 * w, 8 * w, 2),  # [R, 512, 4, 4]
        head=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * w, CLASSES)),
    )


def depthwise(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """A block of MobileNet: one 3x3 filter per channel, then a 1x1 convolution, each with batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.ReLU(),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def mobilenet(width: int = 32) -> nn.Sequential:
    """MobileNet's depthwise blocks for pictures of 3x32x32."""
    w = width
    return named(
        stem=nn.Sequential(nn.Conv2d(3, w, 3, padding=1, bias=False), nn.BatchNorm2d(w), nn.ReLU()),
        block1=depthwise(w, 2 * w, 2),  # [R, 64, 16, 16]
        block2=depthwise(2 * w, 2 * w),
        block3=depthwise(2 * w, 4 * w, 2),  # [R, 128, 8, 8]
        block4=depthwise(4 * w, 4 * w),
        block5=depthwise(4 * w, 8 * w, 2),  # [R, 256, 4, 4]
        head=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * w, CLASSES)),
    )


def cnn1d() -> nn.Sequential:
    """Three convolutions along a signal of 128 values, as for sensors."""
    return named(
        block1=nn.Sequential(nn.Conv1d(1, 32, 7, padding=3), nn.ReLU(), nn.MaxPool1d(2)),  # [R, 32, 64]
        block2=nn.Sequential(nn.Conv1d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool1d(2)),  # [R, 64, 32]
        block3=nn.Sequential(nn.Conv1d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool1d(2)),  # [R, 64, 16]
        hidden=nn.Sequential(nn.Flatten(), nn.Linear(1024, 64), nn.ReLU()),
        head=nn.Linear(64, CLASSES),
    )


def double(inputs: int, outputs: int) -> nn.Sequential:
    """Two 3x3 convolutions with batch norm: [R, inputs, h, w] -> [R, outputs, h, w]."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
    )  # fmt: skip


class BelowTheFirst(nn.Module):
    """A U-Net without its first level, whose output is also a skip connection: [R, D, h, w] -> [R, K, h, w]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        w = width
        self.down2, self.middle = double(w, 2 * w), double(2 * w, 4 * w)
        self.rise2, self.up2 = nn.ConvTranspose2d(4 * w, 2 * w, 2, 2), double(4 * w, 2 * w)
        self.rise1, self.up1 = nn.ConvTranspose2d(2 * w, w, 2, 2), double(2 * w, w)
        self.head = nn.Conv2d(w, CLASSES, 1)

    def forward(self, first: Tensor) -> Tensor:
        """[R, D, h, w] -> [R, K, h, w]."""
        second = self.down2(functional.max_pool2d(first, 2))
        x = self.middle(functional.max_pool2d(second, 2))
        x = self.up2(torch.cat([second, self.rise2(x)], 1))
        return self.head(self.up1(torch.cat([first, self.rise1(x)], 1)))


def unet(width: int = 16) -> nn.Sequential:
    """A U-Net of three levels of 16, 32 and 64 channels, for pictures of 3x32x32."""
    return named(down1=double(3, width), rest=BelowTheFirst(width))


# --- sequences -------------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """A GRU: [R, T, inputs] -> all its states [R, T, outputs]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.gru = nn.GRU(inputs, outputs, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """[R, T, inputs] -> [R, T, outputs]."""
        return self.gru(x)[0]


class At(nn.Module):
    """The value at one place of a sequence: [R, T, D] -> [R, D]."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        """[R, T, D] -> [R, D]."""
        return x[:, self.place]


def gru(width: int = 64) -> nn.Sequential:
    """Two layers of GRU over sequences of 32 vectors of 16 values; the last state is classified."""
    return named(
        layer1=Recurrent(16, width),  # [R, 32, 64]
        layer2=Recurrent(width, width),
        head=nn.Sequential(At(-1), nn.Linear(width, CLASSES)),
    )


class Patches(nn.Module):
    """Pictures as tokens: [R, 3, 32, 32] -> [R, 1 + 64, D], a class token first, with positions."""

    def __init__(self, width: int, patch: int = 4) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, width, patch, patch)
        self.first = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + (32 // patch) ** 2, width))

    def forward(self, x: Tensor) -> Tensor:
        """[R, 3, 32, 32] -> [R, 1 + 64, D]."""
        tokens = self.project(x).flatten(2).transpose(1, 2)
        return torch.cat([self.first.expand(len(tokens), -1, -1), tokens], 1) + self.positions


class Tokens(nn.Module):
    """Token numbers as vectors with positions: [R, T] -> [R, T, D]."""

    def __init__(self, vocabulary: int, length: int, width: int, dropout: float) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[R, T] -> [R, T, D]."""
        return self.dropout(self.norm(self.words(x) + self.positions.weight))


def layer(width: int, heads: int, wide: int, dropout: float, *, norm_first: bool) -> nn.TransformerEncoderLayer:
    """A layer of a transformer: [R, T, D] -> [R, T, D]."""
    return nn.TransformerEncoderLayer(
        width, heads, wide, dropout, "gelu", batch_first=True, norm_first=norm_first
    )  # fmt: skip


def vit(width: int = 192, heads: int = 3, layers: int = 4) -> nn.Sequential:
    """A small vision transformer for 3x32x32: patches of 4x4, width 192, 3 heads, 4 layers, no dropout."""
    made = {f"layer{i + 1}": layer(width, heads, 2 * width, 0.0, norm_first=True) for i in range(layers)}
    head = nn.Sequential(At(0), nn.LayerNorm(width), nn.Linear(width, CLASSES))
    return named(patches=Patches(width), **made, head=head)


def bert(width: int = 128, heads: int = 2, layers: int = 2, dropout: float = 0.1) -> nn.Sequential:
    """A classifier of 32 tokens of the size of BERT-tiny: width 128, 2 heads, 2 layers, dropout 0.1."""
    made = {f"layer{i + 1}": layer(width, heads, 4 * width, dropout, norm_first=False) for i in range(layers)}
    pool = nn.Sequential(At(0), nn.Linear(width, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, CLASSES))
    return named(words=Tokens(VOCABULARY, 32, width, dropout), **made, head=pool)


VOCABULARY = 1000

NETS = {
    "lenet5": Net(lenet5, (1, 28, 28), "block1", "convolutional", light=True),
    "cnn": Net(zoo("cnn", (1, 28, 28)), (1, 28, 28), "block1", "convolutional", light=True),
    "mlp": Net(zoo("mlp", (64,)), (64,), "hidden2", "dense", light=True),
    "resnet16": Net(zoo("resnet16", (1, 28, 28)), (1, 28, 28), "block4", "convolutional"),
    "resnet18": Net(resnet18, (3, 32, 32), "layer1", "convolutional"),
    "mobilenet": Net(mobilenet, (3, 32, 32), "block1", "convolutional"),
    "cnn1d": Net(cnn1d, (1, 128), "block1", "convolutional", light=True),
    "gru": Net(gru, (32, 16), "layer1", "recurrent"),
    "vit": Net(vit, (3, 32, 32), "layer1", "transformer"),
    "bert": Net(bert, (32,), "layer1", "transformer", tokens=VOCABULARY),
    "unet": Net(unet, (3, 32, 32), "down1", "convolutional", per_pixel=True),
}
"""The models, in the order of the table."""
