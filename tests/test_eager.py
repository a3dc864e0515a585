"""Torch without its compiler gives the same numbers, and a run imports only what it needs."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cutlayer.eager import FlopCount, backward, eager, gradients_of
from cutlayer.optim import optimizers

NEEDLESS = (
    "pandas",
    "scipy",
    "sklearn",
    "matplotlib",
    "torch._dynamo",
    "sympy",
    "transformers",
    "rich",
    "jinja2",
    "datasets",
)

ONE_ROUND = """
import json, sys, torch, cutlayer
x, y = torch.randn(60, 1, 8, 8), torch.arange(60) % 3
for options in ({"algorithm": "sglr"}, {"algorithm": "psl", "engine": "local"}, {"algorithm": "fl"}):
    run = cutlayer.Run(data=(x, y), rounds=1, model="cnn", clients=2, batch=8, **options)
    run.run()
    assert run.result.client_flops > 0
print(json.dumps(sorted(sys.modules)))
"""


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 2), (4,))]


def steps(kind: Any, params: list[nn.Parameter], **options: Any) -> tuple[list[Tensor], dict[str, Any]]:
    """Parameters and state after two steps, a checkpoint and a copy, and two more steps."""
    optimizer = kind([{"params": params[:1]}, {"params": params[1:], "lr": 0.02}], 0.01, **options)
    generator = torch.Generator().manual_seed(1)
    for number in range(4):
        optimizer.zero_grad()
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        if number == 1:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            assert type(copy.deepcopy(optimizer)) is type(optimizer)
    return [p.detach() for p in params], optimizer.state_dict()


@pytest.mark.parametrize("name", sorted(optimizers()))
def test_the_optimisers_steps_and_states_are_torchs(name: str) -> None:
    kind = optimizers()[name]
    assert eager(kind) is not kind
    (ours, our_state), (theirs, their_state) = steps(eager(kind), parameters()), steps(kind, parameters())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert our_state["param_groups"] == their_state["param_groups"]
    torch.testing.assert_close(our_state["state"], their_state["state"], rtol=0, atol=0)


def test_torchs_own_classes_stay_as_they_are() -> None:
    before = {name: vars(torch.optim.Optimizer)[name] for name in ("add_param_group", "zero_grad", "state_dict")}
    made = eager(torch.optim.Adam)(parameters(), 0.1)
    made.zero_grad()
    assert isinstance(made, torch.optim.Adam)
    assert "add_param_group" not in vars(torch.optim.Adam)
    assert all(vars(torch.optim.Optimizer)[name] is method for name, method in before.items())


def test_hooks_and_closures_work() -> None:
    params, seen = parameters(), list[str]()
    made = eager(torch.optim.SGD)(params, 0.1)
    made.register_step_pre_hook(lambda *_: seen.append("before"))
    made.register_step_post_hook(lambda *_: seen.append("after"))

    def closure() -> Tensor:
        seen.append("closure")
        loss = params[0].square().sum()
        loss.backward()
        return loss

    assert made.step(closure) is not None  # type: ignore[arg-type]
    assert seen == ["before", "closure", "after"]
    assert not any(p.requires_grad is False for p in params)


def test_what_is_no_class_of_torch_is_left_alone() -> None:
    def own(params: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr)

    assert eager(own) is own


def test_the_counter_of_flops_counts_as_torchs() -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 5))
    x = torch.randn(2, 1, 8, 8, requires_grad=True)
    totals = []
    for counter in (FlopCount(display=False), FlopCounterMode(display=False)):
        with counter:
            net(x).sum().backward()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


def test_a_run_loads_nothing_that_it_does_not_need() -> None:
    """Parallel and sequential split learning, and training of whole models."""
    done = subprocess.run([sys.executable, "-c", ONE_ROUND], check=True, capture_output=True, text=True)
    loaded = set(json.loads(done.stdout))
    assert "torch" in loaded
    assert not loaded.intersection(NEEDLESS)


def test_gradients_go_back_as_torch_sends_them() -> None:
    """Also if a tensor is used twice, and added to existing gradients. Wrong shapes are refused."""
    found = []
    for send in (backward, torch.autograd.backward):
        weights = parameters()
        for _ in range(2):
            rows = [weights[0] * 2, weights[0].sum(0), weights[1].exp()]
            send(rows, [torch.full_like(r, 0.5) for r in rows])
        found.append([w.grad for w in weights])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="Mismatch in shape"):
        backward([weights[1] * 2], [torch.ones(3)])


def test_gradients_of_inputs_are_torchs() -> None:
    first, second = parameters()
    rows = [first * second[0], first.sum(0)]
    seeds = [torch.full_like(r, 0.5) for r in rows]
    unused = torch.ones(1, requires_grad=True)
    ours = gradients_of(rows, [first, second, unused], seeds)
    theirs = torch.autograd.grad(rows, [first, second, unused], seeds, allow_unused=True)
    assert ours[2] is theirs[2] is None
    torch.testing.assert_close(ours[:2], theirs[:2], rtol=0, atol=0)
