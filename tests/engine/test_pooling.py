"""Pooling by two equals torch's pooling, values and gradients, bit for bit, also for equal numbers."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cutlayer.engine.layout import in_layout, layouts, same
from cutlayer.engine.pooling import PoolByTwo, pool_by_two
from cutlayer.models import cut


@pytest.mark.parametrize("last", [False, True], ids=["", "channels last"])
@pytest.mark.parametrize("shape", [(3, 2, 8, 6), (3, 2, 7, 5), (2, 16, 6, 6), (2, 3, 9), (2, 3, 8)])
@pytest.mark.parametrize("rounded", [False, True], ids=["", "ties"])
def test_it_is_the_librarys(shape: tuple[int, ...], last: bool, rounded: bool) -> None:
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=noise)
    x = x.round() if rounded else x
    if last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    library = functional.max_pool2d if x.dim() == 4 else functional.max_pool1d
    expected, given = library(one, 2), pool_by_two(two)
    assert torch.equal(given, expected)
    g = torch.randn(expected.shape, generator=noise)
    expected.backward(g)
    given.backward(g)
    assert torch.equal(two.grad, one.grad)


def test_it_does_not_hide_what_is_not_a_number() -> None:
    x = torch.zeros(1, 1, 4, 4)
    x[0, 0, 1, 1] = float("nan")
    assert pool_by_two(x)[0, 0].isnan().tolist() == [[True, False], [False, False]]


class Functional(nn.Module):
    """Poolings called as functions: the first is by two, the others are not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.end = nn.Conv2d(1, 4, 3, padding=1), nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        """[n, 1, 16, 16] -> [n, 36]."""
        x = functional.max_pool2d(functional.relu(self.conv(x)), 2)
        x = functional.max_pool2d(x, kernel_size=(2, 2), stride=(1, 1))
        x = functional.max_pool2d(x, 3, stride=2, padding=1)
        return self.end(functional.max_pool2d(x, 2, ceil_mode=True)[:, :, :3, :3])


class Seen(nn.Module):
    """Another operation also uses a value between convolution and pooling: the activation's output, or its input."""

    def __init__(self, activation: bool) -> None:
        super().__init__()
        self.activation = activation
        self.conv, self.relu, self.pool = nn.Conv2d(1, 4, 3), nn.ReLU(inplace=not activation), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """[n, 1, 8, 8] -> [n, 180]."""
        x = self.conv(x)
        y = self.relu(x)
        return torch.cat([self.pool(y).flatten(1), (y if self.activation else x).flatten(1)], 1)


def operations(layer: nn.Module, x: Tensor) -> int:
    """Number of poolings by two in a forward pass of the layer, in the layout that is usually the fastest."""
    parts = cut(nn.Sequential(layer, nn.Flatten()), ("0",), x)
    assert "pooled" in layouts(parts.client)
    changed = in_layout(parts.client, "pooled")
    assert same(parts.client, parts.server, (changed, parts.server), (x,))
    calls: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        real = PoolByTwo.apply
        patch.setattr(PoolByTwo, "apply", lambda *args: (calls.append(1), real(*args))[1])
        changed((x,))
    return len(calls)


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (Functional(), (3, 1, 16, 16), 1),
        (
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.MaxPool2d(2, ceil_mode=True)),
            (3, 1, 9, 9),
            1,
        ),
        (Seen(True), (3, 1, 8, 8), 1),
        (Seen(False), (3, 1, 8, 8), 1),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2, stride=1), nn.MaxPool2d(3)), (3, 1, 9, 9), 0),
        (nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.MaxPool1d(2), nn.MaxPool1d(2, dilation=2)), (3, 1, 16), 1),
    ],
)
def test_only_pooling_by_two_is_changed(layer: nn.Module, shape: tuple[int, ...], expected: int) -> None:
    torch.manual_seed(0)
    assert operations(layer, torch.randn(shape)) == expected
