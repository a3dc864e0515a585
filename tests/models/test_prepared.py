"""Models that need preparation before a cut: compiled, lazy and scripted ones, and those with results in attributes."""

import copy
import re
from typing import Any

import pytest
import torch
from test_cut import assert_partitioned, assert_whole, vector
from torch import Tensor, nn

from cutlayer.errors import CutError
from cutlayer.models import cut


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("at", ["1", "_orig_mod.1"])
def test_the_original_of_a_compiled_model_is_cut(at: str) -> None:
    model = mlp()
    parts = cut(torch.compile(model), at, vector())
    assert_partitioned(model, parts)
    assert_whole(model, parts, vector(3))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_compiled_layers_keep_their_names() -> None:
    model = mlp()
    model[0] = torch.compile(model[0])
    parts = cut(model, "1", vector())
    assert set(parts.client.state_dict()) == {"0._orig_mod.weight", "0._orig_mod.bias"}
    plain = copy.deepcopy(model)
    plain[0] = plain[0]._orig_mod
    x = vector(3)
    assert torch.equal(parts.server(parts.client(x)), plain(x))


def test_lazy_layers_are_initialised_with_the_example() -> None:
    model = nn.Sequential(nn.LazyLinear(6), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(5))
    example, state = vector(), torch.get_rng_state()
    parts = cut(model, "2", example)
    assert isinstance(model[0].weight, nn.parameter.UninitializedParameter)
    assert torch.equal(torch.get_rng_state(), state)
    assert parts.client.state_dict()["0.weight"].shape == (6, 8)
    assert parts.server(parts.client(vector(3))).shape == (3, 5)
    with pytest.raises(CutError, match="lazy layers cannot be initialised with the example"):
        cut(nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.LazyLinear(2)), "0", torch.randn(4, 1, 1, 1))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*weight_norm.*:FutureWarning")
def test_scripted_models_are_refused_in_a_sentence() -> None:
    with pytest.raises(CutError, match=re.escape("the model is scripted by torch.jit, and runs outside Python")):
        cut(torch.jit.script(mlp()), "1", vector())
    model = mlp()
    model[0] = torch.jit.script(model[0])
    with pytest.raises(CutError, match=re.escape("the layer '0' is scripted by torch.jit")):
        cut(model, "1", vector())


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_the_older_weight_norm_keeps_a_result_in_an_attribute() -> None:
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 5))
    parts = cut(model, "1", vector())
    assert set(parts.client.state_dict()) == {"0.bias", "0.weight_g", "0.weight_v"}
    x = vector(3)
    assert torch.equal(parts.server(parts.client(x)), model(x))
    assert parts.client(x)[0].requires_grad


def test_one_layer_under_several_names_becomes_several() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.c = nn.Sequential(self.a)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))

    model = Twins()
    with pytest.raises(CutError, match=re.escape("'a.weight' = 'c.0.weight' is used on both sides")):
        cut(model, "b", vector())
    parts = cut(model, "b", vector(), untie=True)
    assert set(parts.server.state_dict()) == {"c.0.weight", "c.0.bias"}
    x = vector(3)
    assert torch.equal(parts.server(parts.client(x)), model(x))


def test_a_model_that_cannot_be_copied() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 5)
            self.state: Any = (step for step in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    with pytest.raises(CutError, match="cannot be copied"):
        cut(Holder(), "a", vector())
