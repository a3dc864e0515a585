"""The stacked engine equals the local one: same batches and seeds, twenty steps; float64 to 1e-10, float32 to 1e-4."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import MODELS, client_state, difference, make, mlp, server_state, source
from torch import nn

from cutlayer import Run
from cutlayer.catalog import MODELS as ZOO
from cutlayer.errors import CutlayerWarning

STACKED: list[tuple[str, dict[str, Any]]] = [
    ("fl", {"local_steps": 3}),
    ("fl", {"local_epochs": 2}),
    ("psl", {}),
    ("sfl", {"average_every": "step"}),
    ("sfl", {"average_every": "round"}),
    ("sflv1", {"local_epochs": 2}),
    ("sflv2", {}),
    ("sflv3", {}),
    ("slr", {"alpha": 0.5}),
    ("sgl", {"phi": 0.7, "average_over": "clients-and-rows"}),
    ("sglr", {"phi": 0.5}),
    ("sglr", {"phi": 1.0, "average_reduce": "sum"}),
]
algorithms = pytest.mark.parametrize(("algorithm", "options"), STACKED, ids=[f"{a} {o}" for a, o in STACKED])


def both(steps: int, **options: Any) -> tuple[Run, Run]:
    """The same run on both engines, so many steps long; records are compared on the way."""
    runs = tuple(Run(engine=engine, **options) for engine in ("local", "stacked"))
    assert [run.training.engine for run in runs] == ["local", "stacked"]
    for (a, b), _ in zip(zip(*runs, strict=True), range(steps), strict=False):
        assert (a.clients, a.active, a.samples, a.bytes_up, a.bytes_down) == (
            b.clients, b.active, b.samples, b.bytes_up, b.bytes_down
        )  # fmt: skip
        assert a.loss == pytest.approx(b.loss, rel=1e-3, abs=1e-3)
    return runs[0], runs[1]


def worst(a: Run, b: Run) -> float:
    """Largest difference of all weights and buffers, relative to the largest one."""
    clients = range(len(a.training.clients.samples))
    pairs = [(client_state(a, k), client_state(b, k)) for k in clients] + [(server_state(a), server_state(b))]
    scale = max((v.abs().max().item() for x, _ in pairs for v in x.values()), default=1.0)
    return max(difference(x, y) for x, y in pairs) / max(scale, 1.0)


def small(**options: Any) -> dict[str, Any]:
    """Options of a small run on random features."""
    return {"partition": "column", "precision": "float64", "batch": 4, "rounds": 8, "client_lr": 0.01, **options}


@algorithms
@pytest.mark.parametrize(("model", "shape", "at"), [m[1:] for m in MODELS], ids=[m[0] for m in MODELS])
@pytest.mark.parametrize("sizes", [[8, 8, 8], [10, 5, 7, 1]], ids=["equal", "unequal"])
def test_small_models(
    algorithm: str, options: dict[str, Any], model: Any, shape: tuple[int, ...], at: str, sizes: list[int]
) -> None:
    cut = {} if algorithm == "fl" else {"cut": at}
    a, b = both(
        20,
        algorithm=algorithm,
        model=make(model),
        data=source(sizes, shape),
        clients=len(sizes),
        **small(**cut, **options),
    )
    assert worst(a, b) < 1e-10


@algorithms
@pytest.mark.parametrize("name", ZOO)
def test_zoo(algorithm: str, options: dict[str, Any], name: str) -> None:
    """Batch normalisation (buffers too) and dropout (masks too), default cuts, 4 clients of which 3 take part."""
    steps = 4 if name in ("resnet16", "alexnet") else 20
    a, b = both(
        steps, algorithm=algorithm, model=name, data="digits", clients=4, samples_per_client=7, batch=3, rounds=3,
        participation=0.75, precision="float64", test=30, eval_every=100, **options,
    )  # fmt: skip
    assert worst(a, b) < 1e-10


@pytest.mark.parametrize(
    "optimizer", ["sgd", "adam", "adamw", "rmsprop", "adagrad", "adadelta", "adamax", "rprop", "radam"]
)
@pytest.mark.parametrize("algorithm", ["sglr", "fl", "sflv1"])
def test_optimizers(optimizer: str, algorithm: str) -> None:
    """With state per client, whose clocks differ: unequal clients, sampled."""
    more: dict[str, Any] = {"sgd": {"momentum": 0.9, "weight_decay": 0.01}}.get(optimizer, {})
    cut = {} if algorithm == "fl" else {"cut": "2"}
    a, b = both(
        30, algorithm=algorithm, model=make(mlp), data=source([10, 5, 7, 9], (6,)), clients=4, participation=0.7,
        **small(client_optimizer=optimizer, client_optimizer_options=more, **cut),
    )  # fmt: skip
    assert worst(a, b) < 1e-10


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=2, max_size=5),
    batch=st.integers(1, 5),
    width=st.integers(1, 5),
    seed=st.integers(0, 3),
)
def test_random_shapes(sizes: list[int], batch: int, width: int, seed: int) -> None:
    net = nn.Sequential(nn.Linear(width, 5), nn.GroupNorm(1, 5), nn.ReLU(), nn.Dropout(0.3), nn.Linear(5, 4)).double()
    a, b = both(
        20, algorithm="sglr", model=net, cut="3", data=source(sizes, (width,)), clients=len(sizes),
        **small(batch=batch, seed=seed),
    )  # fmt: skip
    assert worst(a, b) < 1e-10


@pytest.mark.parametrize("algorithm", ["sglr", "fl", "sflv3"])
def test_float32(algorithm: str) -> None:
    a, b = both(
        20, algorithm=algorithm, model="cnn", data="digits", clients=5, samples_per_client=16, rounds=10, test=30
    )
    assert worst(a, b) < 1e-4


def test_independent_starts_and_scores() -> None:
    """Different models per client; evaluations agree client by client."""
    options: dict[str, Any] = {
        "algorithm": "psl",
        "model": mlp,
        "data": source([8, 8, 8], (6,)),
        "clients": 3,
        "cut": "2",
    }
    a, b = (Run(engine=e, start="independent", **options, **small()) for e in ("local", "stacked"))
    assert (a.run().test_accuracy, a.evaluations[-1].test_accuracy_worst) == (
        b.run().test_accuracy,
        b.evaluations[-1].test_accuracy_worst,
    )
    assert worst(a, b) < 1e-10


class Mixing(nn.Module):
    """Subtracts the mean over rows: stacked without an error, and wrongly."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, d] -> [n, d]."""
        return x - x.mean(0)


class Gate(nn.Module):
    """Uses a parameter by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, 8] -> [n, 8]."""
        return x * self.gate


class Branch(nn.Module):
    """Does different things with different values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, 8] -> [n, 8]."""
        return x * 2 if x.detach().sum() > 0 else x


class Counter(nn.Module):
    """Replaces its buffer by another one in each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, 8] -> [n, 8]."""
        self.seen = self.seen + x.detach().mean()
        return x + self.seen


def with_layer(layer: nn.Module) -> nn.Module:
    """Features [n, 6] -> scores [n, 4], with the layer on the client's side."""
    return nn.Sequential(nn.Linear(6, 8), layer, nn.Linear(8, 4))


@pytest.mark.parametrize("layer", [Mixing(), Gate()])
def test_what_is_not_lowered_is_mapped(layer: nn.Module) -> None:
    """Parameters used by hand and rows mixed by hand: vmap keeps the clients apart."""
    a, b = both(
        20, algorithm="sglr", model=with_layer(layer).double(), cut="1", data=source([8, 8, 8], (6,)), clients=3,
        **small(client_optimizer="sgd"),
    )  # fmt: skip
    assert b.training.clients.inner._stack.mapped
    assert worst(a, b) < 1e-10


@pytest.mark.parametrize(
    ("layer", "reason"),
    [(Branch(), "client part cannot be stacked"), (Counter(), "Counter '1.layer' uses its 'seen' in 'add'"), (nn.LSTM(8, 8), "LSTM '1.layer' uses its 'weight_ih_l0'")],
)
def test_what_cannot_be_stacked_runs_locally_and_says_why(layer: nn.Module, reason: str) -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layer(x)
            return y[0] if isinstance(y, tuple) else y

    with pytest.warns(CutlayerWarning, match=reason):
        run = Run(
            algorithm="psl", model=with_layer(First()), data=source([4, 4], (6,)), cut="1", clients=2,
            partition="column", rounds=1,
        )  # fmt: skip
    assert run.training.engine == "local"
    assert run.run().engine == "local"


@pytest.mark.parametrize("algorithm", ["ssl", "cl"])
def test_turns_are_local_without_a_warning(algorithm: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = Run(algorithm=algorithm, data="digits", model="mlp", clients=3, samples_per_client=9)
    assert run.training.engine == "local"


def test_automatic_choice_is_stacked() -> None:
    run = Run(algorithm="sglr", data="digits", model="cnn", clients=3, samples_per_client=9)
    assert run.training.engine == "stacked"
