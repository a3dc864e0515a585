"""Directly computed steps equal torch's: weights and states, from gradients and factors, for all kinds of groups."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cutlayer import Run
from cutlayer.engine.descent import DirectSteps, descent
from cutlayer.engine.kernels import Factors
from cutlayer.engine.stack import Stack
from cutlayer.optim import MakeOptimizer, ParamGroup, load_optimizer, make_optimizer, rule_of

CPU = torch.device("cpu")
OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("sgd", {"momentum": 0.9}),
    ("sgd", {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1}),
    ("sgd", {"momentum": 0.8, "dampening": 0.3, "maximize": True}),
    ("adam", {}),
    ("adam", {"weight_decay": 0.1, "betas": [0.8, 0.9], "eps": 1e-4, "maximize": True}),
    ("adamw", {"weight_decay": 0.2}),
    ("rmsprop", {}),
    ("rmsprop", {"momentum": 0.9, "weight_decay": 0.1, "alpha": 0.8}),
]
GROUPS = (ParamGroup("bias", lr=0.5, weight_decay=0.0),)


class Layers(nn.Module):
    """Parameters as layers have them, including a kernel whose channels come last in memory."""

    def __init__(self) -> None:
        super().__init__()
        noise = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 3, generator=noise).double())
        self.bias = nn.Parameter(torch.randn(4, generator=noise).double())
        kernel = torch.randn(2, 3, 2, 2, generator=noise).double()
        self.kernel = nn.Parameter(kernel.contiguous(memory_format=torch.channels_last))


def made(name: str, options: dict[str, Any]) -> MakeOptimizer:
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    return make_optimizer(name, 0.1, options, groups=GROUPS)


@pytest.mark.parametrize(("name", "options"), OPTIMIZERS)
def test_stacked_steps_are_torchs(name: str, options: dict[str, Any]) -> None:
    """All three clients step, then two that are not neighbours, then all with different numbers of steps taken."""
    make, noise = made(name, options), torch.Generator().manual_seed(1)
    alone = [Layers() for _ in range(3)]
    optimizers = [make(one.named_parameters()) for one in alone]
    stack = Stack(alone[0], 3, make)
    assert stack._direct is not None
    for who in ([0, 1, 2], [0, 1, 2], [0, 2], [0, 1, 2], [0, 1]):
        (group,) = stack.groups(who, np.ones(len(who)))
        group.factors.clear()
        for p in group.parameters.values():
            p.grad = None
        g, x = (torch.randn(len(who), 5, n, generator=noise).double() for n in (4, 3))
        group.factors["weight"] = [Factors(g, x), Factors(g * 0.5, x + 1)]
        for key in ("bias", "kernel"):
            group.parameters[key].grad = torch.randn(group.parameters[key].shape, generator=noise).double()
        total = sum(part.product() for part in group.factors["weight"])
        for i, k in enumerate(who):
            alone[k].weight.grad = total[i].clone()
            for key in ("bias", "kernel"):
                alone[k].get_parameter(key).grad = group.parameters[key].grad[i].clone()
        stack.step(group, 0.05, last=np.zeros(len(who), bool))
        for k in who:
            for pg in optimizers[k].param_groups:
                pg["lr"] = 0.05 * pg.get("lr_factor", 1.0)
            optimizers[k].step()
    for k, one in enumerate(alone):
        for key, p in one.named_parameters():
            torch.testing.assert_close(stack.state_of(k)[key], p.detach(), rtol=1e-12, atol=1e-12)
            for kind, value in optimizers[k].state[p].items():
                if kind != "step" and value is not None:
                    torch.testing.assert_close(stack._state[key][kind][k], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "options"), OPTIMIZERS)
def test_one_models_steps_are_torchs(name: str, options: dict[str, Any]) -> None:
    make, noise = made(name, options), torch.Generator().manual_seed(1)
    one, two = Layers(), Layers()
    theirs, ours = make(one.named_parameters()), make(two.named_parameters())
    step = DirectSteps(descent(make, CPU), ours, list(two.named_parameters()), rule_of(make))
    for number, lr in enumerate((0.1, 0.05, 0.02)):
        if number == 2:  # resume from a checkpoint
            written, ours = ours.state_dict(), make(two.named_parameters())
            load_optimizer(ours, written)
            step = DirectSteps(descent(make, CPU), ours, list(two.named_parameters()), rule_of(make))
        for a, b in zip(one.parameters(), two.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=noise).double()
            b.grad = a.grad.clone()
        for pg in theirs.param_groups:
            pg["lr"] = lr * pg.get("lr_factor", 1.0)
        theirs.step()
        step(lr)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        for kind, value in theirs.state[a].items():
            if value is not None:
                torch.testing.assert_close(ours.state[b][kind], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
@pytest.mark.parametrize("few", [1, 2, 5])
def test_factors_and_a_gradient_are_added_up(few: int, turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of 1, 2 or 5 of the five clients, also if weights and gradients have different memory layouts."""
    noise = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 3, 4, generator=noise).double().transpose(1, 2)
    weight = weight if turned else weight.contiguous()
    monkeypatch.setattr("cutlayer.engine.descent._BLOCK", few * weight[0].nbytes)
    gradient = torch.randn(5, 4, 3, generator=noise).double()
    factors = [Factors(*(torch.randn(5, rows, n, generator=noise).double() for n in (4, 3))) for rows in (2, 7)]
    how = descent(made("sgd", {"momentum": 0.9}), CPU)
    assert how is not None
    outcomes = []
    for left in (factors, []):
        given = gradient if left else gradient + factors[0].product() + factors[1].product()
        stepped, moments = weight.clone(), {"momentum_buffer": torch.zeros_like(weight)}
        assert stepped.stride() == weight.stride()
        for taken in (0, 1):
            how.take(stepped, given.clone(), left, moments, 0.1, 0.01, taken)
        outcomes.append((stepped, moments["momentum_buffer"]))
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    expected = gradient + factors[0].product() + factors[1].product() + 0.01 * weight
    first = weight - 0.1 * expected
    torch.testing.assert_close(outcomes[0][0], first - 0.1 * 1.899 * expected)


@pytest.mark.parametrize("name", ["adagrad", "radam", "adamax"])
def test_others_are_left_to_torch(name: str) -> None:
    assert descent(make_optimizer(name, 0.1, {}), CPU) is None
    assert descent(make_optimizer("adam", 0.1, {"amsgrad": True}), CPU) is None
    assert descent(make_optimizer("rmsprop", 0.1, {"centered": True}), CPU) is None
    assert descent(make_optimizer("sgd", 0.1, {}), CPU) is None


@pytest.mark.parametrize(("name", "options"), OPTIMIZERS[:1] + OPTIMIZERS[3:4] + OPTIMIZERS[6:7])
def test_engines_agree_on_weights_in_blocks(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients are multiplied out for two clients at a time, and for the last client alone."""
    monkeypatch.setattr("cutlayer.engine.descent._BLOCK", 2 * 64 * 128 * 8)
    losses = []
    for engine in ("local", "stacked"):
        run = Run(
            algorithm="sglr", data="digits", model="mlp", clients=5, samples_per_client=20, batch=8, rounds=2, test=20,
            validation=20, precision="float64", client_optimizer=name, client_optimizer_options=options, engine=engine,
        )  # fmt: skip
        losses.append([step.loss for step in run])
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
