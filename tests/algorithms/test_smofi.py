"""SplitFed V1 with momentum that the server copies share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import client_state, difference, make, mlp, server_state, train  # type: ignore[import-not-found]

from cutlayer import Run
from cutlayer.optim import make_optimizer
from cutlayer.server import Server
from cutlayer.types import Smashed

MOMENTUM: dict[str, Any] = {"server_optimizer": "sgd", "server_lr": 0.1, "server_optimizer_options": {"momentum": 0.9}}


def trained(algorithm: str, sizes: list[int], **options: Any) -> Run:
    return train(algorithm, make(mlp), sizes, (6,), cut="1", **options)


def off(a: Run, b: Run) -> float:
    """The largest difference between the models of two runs."""
    pairs = [(client_state(a, k), client_state(b, k)) for k in range(a.config.clients)]
    return max(difference(x, y) for x, y in [*pairs, (server_state(a), server_state(b))])


@pytest.mark.parametrize("engine", ["local", "stacked"])
@pytest.mark.parametrize(("sizes", "options"), [([8, 5, 10], {}), ([10], MOMENTUM)])
def test_it_is_splitfed_v1(engine: str, sizes: list[int], options: dict[str, Any]) -> None:
    """Equal bit for bit without momentum, or with one client."""
    assert off(*(trained(a, sizes, engine=engine, **options) for a in ("smofi", "sflv1"))) == 0


def test_with_one_local_step_it_is_one_union_step() -> None:
    runs = [trained(a, [8, 8], engine="auto", local_steps=1) for a in ("smofi", "sflv1")]
    assert [run.training.engine for run in runs] == ["union", "union"]
    assert off(*runs) == 0


@pytest.mark.parametrize("options", [MOMENTUM, {"server_optimizer": "adam", "server_lr": 0.01}])
def test_engines_agree(options: dict[str, Any]) -> None:
    """Clients of 8, 5 and 10 rows finish a round at different steps."""
    local, stacked = (trained("smofi", [8, 5, 10], engine=e, **options) for e in ("local", "stacked"))
    assert off(local, stacked) < 1e-9
    assert off(local, trained("sflv1", [8, 5, 10], **options)) > 1e-5


class Scores(torch.nn.Linear):
    """One linear layer for rows in the form that a server receives."""

    def forward(self, rows: tuple[torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
        """[n, 2] -> [n, 2]"""
        return super().forward(rows[0])


def test_momentum_by_hand() -> None:
    """Two copies of a linear layer, momentum 0.5, weights 1 and 3: from the second step on, u is the weighted mean."""
    model = Scores(2, 2, bias=False).double()
    server = Server(model, make_optimizer("sgd", 0.1, {"momentum": 0.5}), 0.1)
    start = model.weight.detach().clone()
    rows, labels = torch.tensor([[1.0, 0.0], [0.5, 2.0]], dtype=torch.float64), torch.tensor([0, 1])
    smashed, weights = Smashed((rows,), labels, (0, 1), (1, 1)), {0: 1.0, 1: 3.0}

    def gradient(v: torch.Tensor, k: int) -> torch.Tensor:
        v = v.clone().requires_grad_()
        torch.nn.functional.cross_entropy(rows[k : k + 1] @ v.T, labels[k : k + 1]).backward()
        assert v.grad is not None
        return v.grad

    expected, shared = [start.clone(), start.clone()], torch.zeros_like(start)
    for _ in range(3):
        own = [0.5 * shared + gradient(v, k) for k, v in enumerate(expected)]
        expected = [v - 0.1 * u for v, u in zip(expected, own, strict=True)]
        shared = 0.25 * own[0] + 0.75 * own[1]
        server.step_copies(smashed)
        server.average_momentum(weights)
    for k, v in enumerate(expected):
        assert torch.allclose(server.state()["copies"][str(k)]["model"]["weight"], v, rtol=0, atol=1e-12)
