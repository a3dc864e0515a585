"""Mapped modules: the dropout masks equal those that each client draws alone, in the same order and layout."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cutlayer.engine.mapping import Draw, attention, drawn
from cutlayer.engine.stackable import Stackability, stackable
from cutlayer.optim import make_optimizer
from cutlayer.testing import check_model


class Wrapped(nn.Module):
    """Modules in sequence, as a function of a tuple of rows."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*inner)
        self.scale = nn.Parameter(torch.ones(2, 3))  # used in a way that cannot be lowered

    def forward(self, rows: tuple[Tensor, ...]) -> Tensor:
        return self.inner(rows[0]) * self.scale.mean(0).sum()


class Attention(nn.Module):
    """Attention with dropout, computed by torch's function."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        p = 0.4 if self.training else 0.0
        return functional.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=self.causal).flatten(1)


class Turned(nn.Module):
    """Dropout on a tensor whose rows are not contiguous in memory."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(x.transpose(1, 2), 0.5, self.training) * 1.5


class Padded(nn.Module):
    """An embedding with a padding row that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8, padding_idx=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x.long().clamp(0, 8))


LAYERS = {
    "encoder layer": lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True),
    "encoder layer, norm first": lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.3, batch_first=True, norm_first=True),
    "attention": lambda: Attention(False),
    "causal attention": lambda: Attention(True),
    "dropout": lambda: nn.Sequential(nn.Dropout(0.3), nn.Linear(8, 8), nn.Dropout(0.6)),
    "transposed": Turned,
    "channels": lambda: nn.Sequential(nn.Dropout1d(0.4), nn.Linear(8, 8)),
    "alpha": lambda: nn.Sequential(nn.Linear(8, 8), nn.SELU(), nn.AlphaDropout(0.2)),
    "in place": lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2, inplace=True)),
    "padding": Padded,
}


def verdict(module: nn.Module, *rows: Tensor) -> Stackability:
    return stackable(module, rows, make_optimizer("sgd", 0.1, {}), data=True)


@pytest.mark.parametrize("name", LAYERS)
def test_masks_are_those_that_each_client_draws_alone(name: str) -> None:
    torch.manual_seed(0)
    found = verdict(Wrapped(LAYERS[name]()), torch.randn(4, 6, 8) * 3)
    assert found.ways == ("mapped", "each")


def test_draws_that_are_not_dropout_are_named_as_the_cause() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn_like(x)

    found = verdict(Wrapped(Noisy()), torch.randn(4, 6, 8))
    assert found.ways == ()  # not even one by one, as it draws in evaluation too
    assert "uses its 'scale'" in found.reason
    assert "torch.func.vmap cannot map it" in found.reason
    assert "random" in found.unmapped


def test_draws_are_in_the_layout_of_what_is_dropped() -> None:
    x = torch.randn(2, 3, 4).transpose(0, 2)
    draw = Draw(tuple(x.shape), torch.empty_like(x).stride(), x.dtype, x.device, 0.5)
    torch.manual_seed(3)
    expected = functional.dropout(torch.ones(2, 3, 4).transpose(0, 2), 0.5) / 2
    (masks,) = drawn([draw], [lambda: torch.Generator().manual_seed(3)] * 2)
    assert torch.equal(masks[0], expected)
    assert torch.equal(masks[1], expected)
    assert drawn([], []) == ()


@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"enable_gqa": True}])
def test_attention_step_by_step_is_torchs(mask: str | None, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    if "enable_gqa" not in options:
        k, v = k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)
    masks = {None: None, "bool": torch.rand(5, 6) < 0.7, "float": torch.randn(5, 6)}
    causal = mask is None
    expected = functional.scaled_dot_product_attention(q, k, v, masks[mask], 0.0, causal, **options)
    settings = {"scale": None, "enable_gqa": False} | options
    given = attention(q, k, v, masks[mask], causal, drop=lambda weights: weights, **settings)
    torch.testing.assert_close(given, expected)


def test_encoder_layers_train_on_all_clients_at_once_as_one_by_one() -> None:
    def encoder(input_shape: tuple[int, ...], classes: int) -> nn.Module:
        layer = nn.TransformerEncoderLayer(input_shape[-1], 2, 16, dropout=0.2, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        head = nn.Sequential(nn.Flatten(), nn.Linear(input_shape[0] * input_shape[1], classes))
        return nn.Sequential(*copy.deepcopy(encoder.layers), head)

    check_model(encoder, (5, 8), 3, cuts=["0"])
