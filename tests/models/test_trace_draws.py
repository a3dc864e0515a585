"""Operations tell whether a part may draw random numbers. Wrongly assuming none never happens."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cutlayer.models import cut


class ByHand(nn.Module):
    """Draws random numbers in its own forward pass."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        """[n, 6] -> [n, 6]."""
        if self.how == "functional":
            return functional.dropout(x, 0.2, self.training)
        if self.how == "method":
            return x * torch.empty_like(x).bernoulli_(0.5)
        return x + torch.rand_like(x) if self.how == "function" else x


def draws(layer: nn.Module, shape: tuple[int, ...] = (3, 6)) -> bool:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Tanh(), layer), nn.Tanh())
    parts = cut(model, ("0",), torch.randn(shape))
    return bool(parts.client.draws)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)),
        nn.Sequential(nn.Linear(6, 6), nn.RReLU()),
        nn.Sequential(nn.Linear(6, 6), nn.AlphaDropout(0.1)),
        nn.TransformerEncoderLayer(6, 2, 8, batch_first=True),
        ByHand("functional"),
        ByHand("method"),
        ByHand("function"),
        nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),  # a parametrised layer is a new class
    ],
)
def test_what_may_draw_is_seeded(layer: nn.Module) -> None:
    assert draws(layer, (3, 4, 6) if isinstance(layer, nn.TransformerEncoderLayer) else (3, 6))


def test_a_hook_may_draw() -> None:
    layer = nn.Linear(6, 6)
    layer.register_forward_hook(lambda *args: args[2] + torch.rand(1))
    assert draws(nn.Sequential(layer, nn.ReLU()))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.LayerNorm(8), nn.GELU()), (3, 6)),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1)), (3, 1, 8, 8)),
        (ByHand("no"), (3, 6)),
    ],
)
def test_what_does_not_is_not(layer: nn.Module, shape: tuple[int, ...]) -> None:
    assert not draws(layer, shape)
