"""A chain computed by hand equals its layers computed one by one; any other module is left alone."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cutlayer.engine.chain import Chain
from cutlayer.engine.stack import Stack
from cutlayer.engine.stackable import stackable
from cutlayer.models import cut
from cutlayer.optim import make_optimizer


class Functional(nn.Module):
    """Activations called as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[n, 6] -> [n, 4]."""
        return torch.sigmoid(self.two(functional.relu(self.one(x))))


CHAINS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "relu": (nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU()), (6,)),
    "no bias": (nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 4)), (6,)),
    "flattened": (nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 3, bias=False)), (2, 3)),
    "two activations": (nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Sigmoid(), nn.ReLU()), (6,)),
    "functions": (Functional(), (6,)),
}


def part_of(layers: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(layers, nn.Softplus()).double()
    return cut(model, ("0",), torch.randn(3, *shape).double()).client


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adagrad"])  # factors; factors multiplied in blocks; gradients
@pytest.mark.parametrize("case", CHAINS)
def test_it_trains_as_its_layers_do(case: str, optimizer: str) -> None:
    layers, shape = CHAINS[case]
    part, make, noise = part_of(layers, shape), make_optimizer(optimizer, 0.1, {}), torch.Generator().manual_seed(1)
    stacks = [Stack(part, 3, make) for _ in range(2)]
    chain = stacks[0]._pieces[""].chain
    assert chain is not None
    stacks[1]._pieces = {"": replace(stacks[1]._pieces[""], chain=None)}
    for step in range(3):
        x = torch.randn(12, *shape, generator=noise).double().requires_grad_(step > 0)
        assert chain.takes(x)
        g, outcomes = None, []
        for stack in stacks:
            (group,) = stack.groups(range(3), np.full(3, 4))
            mine = x.detach().clone().requires_grad_(x.requires_grad)
            (y,) = stack.forward(group, (mine,), lambda _: torch.Generator())
            g = torch.randn(y.shape, generator=noise).double() if g is None else g
            y.backward(g)
            stack.step(group, 0.1, last=np.zeros(3, bool))
            outcomes.append([y.detach(), *([mine.grad] if mine.requires_grad else [])])
        for a, b in zip(*outcomes, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for name in stacks[0].state_of(0):
        for k in range(3):
            a, b = (stack.state_of(k)[name] for stack in stacks)
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def hooked() -> nn.Module:
    layer = nn.Linear(6, 5)
    layer.register_forward_hook(lambda *args: args[2] * 2)
    return nn.Sequential(layer, nn.ReLU())


def frozen() -> nn.Module:
    layers = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    layers[0].requires_grad_(False)
    return layers


class Skipping(nn.Module):
    """A residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        """[n, 6] -> [n, 6]."""
        return self.one(x) + x


@pytest.mark.parametrize(
    "layers",
    [
        hooked(),
        frozen(),
        Skipping(),
        nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5)),
        nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)),
        nn.Sequential(nn.ReLU(), nn.Linear(6, 5)),
        nn.Sequential(nn.Linear(6, 6), nn.GELU()),
    ],
)
def test_what_is_no_chain_is_left_alone(layers: nn.Module) -> None:
    stack: Any = Stack(part_of(layers, (6,)), 2, make_optimizer("sgd", 0.1, {}))
    assert stack._pieces[""].chain is None


LINES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "as they come": (nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), (3, 6)),
    "the first dimensions flattened": (nn.Sequential(nn.Flatten(1, 2), nn.Linear(6, 5)), (2, 3, 6)),
    "the last dimensions flattened": (nn.Sequential(nn.Flatten(2), nn.Linear(6, 5)), (4, 2, 3)),
}


@pytest.mark.parametrize("case", LINES)
def test_rows_of_several_lines_are_left_to_the_layers(case: str) -> None:
    """A dense layer computes each line separately; all clients are still computed at once."""
    layers, shape = LINES[case]
    part, x = part_of(layers, shape), torch.randn(4, *shape).double()
    chain = Chain.of(part, [name for name, _ in part.named_parameters()])
    assert chain is None or not chain.takes(x)
    assert stackable(part, (x,), make_optimizer("sgd", 0.1, {}), data=True).ways[0] == "lowered"


def test_lower_precision_is_left_to_autocast() -> None:
    part = part_of(CHAINS["relu"][0], (6,))
    names = [name for name, _ in part.named_parameters()]
    assert Chain.of(part, names) is not None
    part.narrow_to = torch.bfloat16
    assert Chain.of(part, names) is None
