"""Both engines agree on unequal clients, batch normalisation and dropout, for every algorithm that can be stacked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from support import ALGORITHMS, client_state, difference, make, server_state, source, u_shaped
from torch import nn

from cutlayer import Run, plugins
from cutlayer.algorithms import traits_of
from cutlayer.engine.choice import Choice
from cutlayer.engine.ways import Stacking, Way

TAKE_TURNS = {name for name in ALGORITHMS if traits_of(plugins.index("algorithm")[name]).takes_turns}
IN_STEP = {name for name in ALGORITHMS if traits_of(plugins.index("algorithm")[name]).gradients_cross}  # never stacked
STACKED = [name for name in ALGORITHMS if name not in TAKE_TURNS | IN_STEP | {"cl"}]  # cl has a single client
DRAWN_TOGETHER = {
    name for name in STACKED if plugins.index("algorithm")[name].facts["presets"].get("sampling") == "global"
}  # a client may have a single row in a step, which batch normalisation refuses
OWN: dict[str, dict[str, Any]] = {
    "fl": {"local_epochs": 2},
    "sfl": {"average_every": "step"},
    "sflv1": {"local_steps": 2},
    "sgl": {"phi": 0.5, "average_over": "clients-and-rows"},
    "sglr": {"phi": 0.7, "alpha": 0.5},
    "usfl": {"average_every": "step"},
}
QUICK = (Phase.explicit, Phase.generate)  # without shrinking: examples are small, and shrinking takes minutes
OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("sgd", {}),
    ("sgd", {"weight_decay": 0.1}),
    ("sgd", {"momentum": 0.9}),
    ("adam", {"eps": 1e-3}),  # a smaller eps would make steps from gradients that consist only of rounding errors
]


def net(norm: bool, dropout: float) -> nn.Module:
    """Features [n, 3] -> scores [n, 4]; the same smooth layers on both sides of cut 3."""

    def block(inputs: int) -> list[nn.Module]:
        # The gradient of a bias before normalisation consists only of rounding errors. With the usual epsilon, two
        # nearly equal rows would amplify a rounding error a thousandfold in every step.
        normed = nn.BatchNorm1d(4, eps=0.1) if norm else nn.Identity()
        return [nn.Linear(inputs, 4, bias=not norm), normed, nn.Tanh(), nn.Dropout(dropout)]

    return nn.Sequential(*block(3), *block(4), nn.Linear(4, 4))


def agree(algorithm: str, sizes: Sequence[int], *, data_shape: tuple[int, ...] = (3,), **options: Any) -> None:
    """Runs both engines; losses, scores and the final parameters and buffers are equal up to rounding."""
    runs, losses = [], []
    for engine in ("local", "stacked"):
        run = Run(
            algorithm=algorithm, data=source(sizes, data_shape), clients=len(sizes), partition="column",
            precision="float64", client_lr=0.05, lr_schedule="constant", engine=engine, **options,
        )  # fmt: skip
        assert run.training.engine == engine
        losses.append([record.loss for record in run])
        runs.append(run)
    a, b = runs
    assert losses[1] == pytest.approx(losses[0], rel=1e-10)
    scores = [[x for s in run.evaluations for x in (s.test_loss, s.test_score, s.test_score_worst)] for run in runs]
    assert scores[1] == pytest.approx(scores[0], rel=1e-10)
    for k in range(len(sizes)):
        assert difference(client_state(a, k), client_state(b, k)) < 1e-10
    assert difference(server_state(a), server_state(b)) < 1e-10


@pytest.mark.parametrize("algorithm", STACKED)
@settings(max_examples=4, deadline=None, derandomize=True, database=None, phases=QUICK)
@given(
    sizes=st.lists(st.integers(2, 9), min_size=2, max_size=5),
    batch=st.integers(2, 4),
    norm=st.booleans(),
    dropout=st.sampled_from([0.0, 0.4]),
    optimizer=st.sampled_from(OPTIMIZERS),
    participation=st.sampled_from([1.0, 0.7]),
    chunk=st.sampled_from([None, 2]),
    keep=st.booleans(),
    way=st.sampled_from(["lowered", "each"]),
    seed=st.integers(0, 3),
)
@example([7, 8, 7], 4, True, 0.0, OPTIMIZERS[0], 1.0, None, True, "lowered", 0)
@example(
    [6, 7, 6, 3], 4, True, 0.4, OPTIMIZERS[1], 1.0, 2, False, "lowered", 0
)  # clients that are neighbours and others; forward passes that run twice
def test_engines_agree(
    algorithm: str,
    sizes: list[int],
    batch: int,
    norm: bool,
    dropout: float,
    optimizer: tuple[str, dict[str, Any]],
    participation: float,
    chunk: int | None,
    keep: bool,
    way: Way,
    seed: int,
) -> None:
    """Also in groups of two clients, and with forward passes that run twice to save memory."""
    norm = norm and algorithm not in DRAWN_TOGETHER
    if norm:  # batch normalisation refuses batches of one row
        sizes = [n + (n % batch == 1) for n in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Choice, "_stacking", lambda *_: Stacking(way, chunk, keep))
        agree(
            algorithm, sizes, model=make(lambda: net(norm, dropout)), batch=batch, rounds=2,
            participation=participation, client_optimizer=optimizer[0], client_optimizer_options=optimizer[1],
            seed=seed, **({} if algorithm == "fl" else {"cut": "3"}),
            **({"tail_cut": "7"} if u_shaped(algorithm) else {}), **OWN.get(algorithm, {}),
        )  # fmt: skip


def test_unequal_clients_of_a_small_model_with_batch_normalisation() -> None:
    """Last batches of 3, 4 and 3 rows: clients 0 and 2 step as one copy, before the backward pass of client 1."""
    small = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)).double()
    agree("psl", [7, 8, 7], model=small, cut="1", batch=4, rounds=2, client_optimizer="sgd")


@pytest.mark.long
def test_unequal_clients_of_the_papers_model() -> None:
    """ResNet16 with label skew, on the engine that is chosen automatically."""
    options: dict[str, Any] = {
        "algorithm": "psl", "data": "digits", "model": "resnet16", "clients": 5, "partition": "dirichlet",
        "samples_per_client": 12, "seed": 1, "rounds": 1, "test": 20, "validation": 20,
        "precision": "float64",
    }  # fmt: skip
    local, auto = (Run(engine=engine, **options) for engine in ("local", "auto"))
    assert auto.training.engine == "stacked"
    assert len(set(auto.training.clients.samples)) > 1
    first, second = ([record.loss for record in run] for run in (local, auto))
    assert second == pytest.approx(first, rel=1e-10)


class Spectral(nn.Module):
    """Features [n, 6] -> [n, 6]; each frequency is multiplied by a complex weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, dtype=torch.complex128))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.fft.irfft(torch.fft.rfft(x) * self.weight, n=6)


def spectral() -> nn.Module:
    return nn.Sequential(Spectral(), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), Spectral(), nn.Linear(6, 4))


def with_complex_weights(algorithm: str, optimizer: str, **options: Any) -> dict[str, Any]:
    """The options of a run with complex weights on both sides of the cut."""
    both = {"client_optimizer": optimizer, **({} if algorithm in ("fl", "cl") else {"server_optimizer": optimizer})}
    whole = {} if algorithm in ("fl", "cl") else {"cut": "1"}
    tail = {"tail_cut": "3"} if u_shaped(algorithm) else {}
    return {"model": make(spectral), "batch": 4, "rounds": 2, **both, **whole, **tail, **options}


QUICK_WITH_COMPLEX = [("psl", "adam", {}), ("sfl", "sgd", {}), ("sflv1", "adam", {}), ("fl", "sgd", {"momentum": 0.9})]


@pytest.mark.filterwarnings("ignore:the FLOPs")  # torch's counter does not know Fourier transforms
@pytest.mark.parametrize(("algorithm", "optimizer", "more"), QUICK_WITH_COMPLEX)
def test_complex_weights(algorithm: str, optimizer: str, more: dict[str, float]) -> None:
    agree(
        algorithm, [6, 9, 4], data_shape=(6,), client_optimizer_options=more,
        **with_complex_weights(algorithm, optimizer, **OWN.get(algorithm, {})),
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:the FLOPs")
@pytest.mark.parametrize("optimizer", ["adam", "sgd", "rmsprop"])
@pytest.mark.parametrize("algorithm", STACKED)
def test_complex_weights_with_every_algorithm(algorithm: str, optimizer: str) -> None:
    eps = {"eps": 1e-3} if optimizer != "sgd" else {"weight_decay": 0.1}
    test_complex_weights(algorithm, optimizer, eps)


@pytest.mark.filterwarnings("ignore:the FLOPs")
@pytest.mark.parametrize("algorithm", sorted(TAKE_TURNS | IN_STEP | {"cl"}))
def test_complex_weights_of_models_that_are_not_stacked(algorithm: str) -> None:
    """The imaginary parts are trained too, except for the two frequencies that have none."""
    options = with_complex_weights(algorithm, "adam")
    run = Run(algorithm=algorithm, data=source([8, 8], (6,)), clients=2, precision="float64", **options)
    before = run.model(client="average").state_dict()
    run.run()
    after = run.model(client="average").state_dict()
    for name in ("0.weight", "4.weight"):
        moved = (after[name] - before[name]).imag.abs()
        assert moved[1:3].min() > 0
