"""Small networks for attackers and predictors, fitted to the shapes at hand; weights come from the global generator.

Shape legend: R rows; c x h x w one sample's smashed data, C x H x W one picture.
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional

Shape = tuple[int, ...]


class SkipMLP(nn.Module):
    """A linear map plus a two-layer perceptron: [R, a...] -> [R, b...]. Linear codes are then learned at once."""

    def __init__(self, inputs: Shape, outputs: Shape, hidden: int = 256) -> None:
        super().__init__()
        a, b = math.prod(inputs), math.prod(outputs)
        self.outputs = outputs
        self.linear = nn.Linear(a, b)
        self.bend = nn.Sequential(nn.Linear(a, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.out = nn.Linear(hidden, b)

    def forward(self, rows: Tensor) -> Tensor:
        """[R, a...] -> [R, b...]."""
        rows = rows.flatten(1)
        out: Tensor = self.linear(rows) + self.out(self.bend(rows))
        return out.view(-1, *self.outputs)


class Upsampler(nn.Module):
    """[R, c, h, w] -> [R, C, H, W]: convolutions at the code's resolution, pixel shuffle up to the picture's.

    If H is not a multiple of h, the output is resized bilinearly.
    """

    def __init__(self, code: Shape, picture: Shape, channels: int = 32) -> None:
        super().__init__()
        self.size = picture[1:]
        self.factor = max(1, math.ceil(picture[1] / code[1]), math.ceil(picture[2] / code[2]))
        self.body = nn.Sequential(
            nn.Conv2d(code[0], channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
        )
        pixels = picture[0] * self.factor**2
        self.out = nn.Conv2d(channels, pixels, 3, padding=1)
        self.linear = nn.Conv2d(code[0], pixels, 3, padding=1)

    def forward(self, rows: Tensor) -> Tensor:
        """[R, c, h, w] -> [R, C, H, W]."""
        pictures = functional.pixel_shuffle(self.out(self.body(rows)) + self.linear(rows), self.factor)
        if pictures.shape[2:] == self.size:
            return pictures
        return functional.interpolate(pictures, size=self.size, mode="bilinear", align_corners=False)


class Classifier(nn.Module):
    """Pictures [R, C, H, W] or vectors [R, d] -> logits [R, K]."""

    def __init__(self, inputs: Shape, classes: int) -> None:
        super().__init__()
        if len(inputs) == 3 and min(inputs[1:]) >= 4:
            features = 32 * (inputs[1] // 4) * (inputs[2] // 4)
            self.body = nn.Sequential(
                nn.Conv2d(inputs[0], 16, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(16, 32, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Flatten(),
                nn.Linear(features, classes),
            )
        else:
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(inputs), 64), nn.ReLU(), nn.Linear(64, classes))

    def forward(self, rows: Tensor) -> Tensor:
        """[R, ...] -> [R, K]."""
        logits: Tensor = self.body(rows)
        return logits


class Encoder(nn.Module):
    """Inputs [R, ...] -> codes of the smashed data's shape [R, ...]: an attacker's guess at the client part.

    For pictures and spatial smashed data, it has two convolutions, otherwise it is a perceptron. `nonnegative` if the
    observed smashed data are (as after a ReLU).
    """

    def __init__(self, inputs: Shape, code: Shape, nonnegative: bool, channels: int = 32) -> None:
        super().__init__()
        self.nonnegative = nonnegative
        if spatial(inputs, code):
            stride = max(1, min(inputs[1] // code[1], inputs[2] // code[2]))
            layers = [
                nn.Conv2d(inputs[0], channels, 2 * stride + 1, stride=stride, padding=stride),
                nn.ReLU(),
                nn.Conv2d(channels, code[0], 3, padding=1),
            ]
            # The stride brings the usual sizes about; pooling, which is slow on a CPU, is for the others.
            exact = all((i - 1) // stride + 1 == c for i, c in zip(inputs[1:], code[1:], strict=True))
            self.body: nn.Module = nn.Sequential(*layers, *([] if exact else [nn.AdaptiveAvgPool2d(code[1:])]))
        else:
            self.body = SkipMLP(inputs, code)

    def forward(self, rows: Tensor) -> Tensor:
        """[R, ...] -> [R, ...]."""
        code: Tensor = self.body(rows)
        return functional.relu(code) if self.nonnegative else code


def spatial(inputs: Shape, code: Shape) -> bool:
    """Whether both are pictures, the code being no larger than the input."""
    return len(inputs) == 3 and len(code) == 3 and code[1] <= inputs[1] and code[2] <= inputs[2]


def decoder(code: Shape, inputs: Shape) -> nn.Module:
    """A network from smashed data [R, *code] to inputs [R, *inputs]."""
    return Upsampler(code, inputs) if spatial(inputs, code) else SkipMLP(code, inputs)
