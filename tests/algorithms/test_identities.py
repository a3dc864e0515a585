"""The exact identities that every implementation must satisfy: float64, plain SGD, no batch norm or dropout.

Each test is named after its number. Results agree bit for bit if the order of sums is the same, and otherwise to 1e-14
after several steps (one rounding error is 2e-16).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import (
    MODELS,
    batches_of,
    by_hand,
    client_state,
    difference,
    make,
    mlp,
    samples,
    server_state,
    sgd,
    train,
    whole,
)
from torch import nn

from cutlayer.algorithms.sglr import Sglr
from cutlayer.types import Smashed

TIGHT = 1e-14
model_and_cut = pytest.mark.parametrize(("model", "shape", "at"), [m[1:] for m in MODELS], ids=[m[0] for m in MODELS])
Make = Callable[[], nn.Module]


def visits(sizes: list[int], batch: int, rounds: int, turns: str) -> list[torch.Tensor]:
    """The batches of sequential learning in visiting order."""
    streams = batches_of(sizes, batch)
    order = []
    for _ in range(rounds):
        left = [s.per_epoch for s in streams]
        if turns == "epoch":
            order += [s.next() for s in streams for _ in range(s.per_epoch)]
        else:
            for turn in range(max(left)):
                order += [s.next() for s in streams if turn < s.per_epoch]
    return order


def unions(sizes: list[int], batch: int, steps: int) -> list[torch.Tensor]:
    """The union batch of each parallel step, client by client."""
    streams = batches_of(sizes, batch)
    return [torch.cat([s.next() for s in streams]) for _ in range(steps)]


SINGLE: list[tuple[str, dict[str, Any]]] = [
    ("cl", {}),
    ("fl", {}),
    ("ssl", {"hand_over": "batch"}),
    ("ssl", {"hand_over": "epoch"}),
    ("psl", {}),
    ("sfl", {"average_every": "step"}),
    ("sfl", {"average_every": "round"}),
    ("sflv1", {}),
    ("sflv1", {"local_steps": 1, "rounds": 6}),
    ("sflv2", {}),
    ("sflv3", {}),
    ("slr", {"alpha": 2.0}),
    ("sgl", {"phi": 1.0}),
    ("sglr", {"alpha": 0.0, "phi": 0.0}),
    ("sglr", {"alpha": 1.5, "phi": 0.4}),
    ("sglr", {"alpha": 1.0, "phi": 1.0}),
    ("sglr", {"alpha": 0.5, "phi": 1.0, "average_reduce": "sum"}),
    ("sglr", {"alpha": 0.5, "phi": 1.0, "gradient_scale": "union"}),
]


@model_and_cut
@pytest.mark.parametrize(("algorithm", "options"), SINGLE, ids=[f"{a} {o}" for a, o in SINGLE])
def test_identity_01_one_client_is_centralised_sgd(
    model: Make, shape: tuple[int, ...], at: str, algorithm: str, options: dict[str, Any]
) -> None:
    """C=1: every algorithm is centralised SGD, bit for bit. 10 samples in batches of 4, so the last batch has 2."""
    cut = {} if algorithm in ("cl", "fl") else {"cut": at}
    run = train(algorithm, make(model), [10], shape, **cut, **options)
    reference = sgd(make(model), run.training.source.train, unions([10], 4, 6))
    found = client_state(run) if algorithm in ("cl", "fl") else whole(run)
    assert found.keys() == reference.keys()
    for name, value in reference.items():
        assert torch.equal(found[name], value), name


@model_and_cut
@pytest.mark.parametrize("turns", ["batch", "epoch"])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_identity_02_ssl_with_full_hand_over_is_centralised_in_visiting_order(
    model: Make, shape: tuple[int, ...], at: str, turns: str, optimizer: str
) -> None:
    """Three clients of 10, 5 and 7 samples; with momentum or Adam the optimiser's state is handed over too."""
    options: dict[str, Any] = {
        "sgd": {},
        "momentum": {"client_optimizer_options": {"momentum": 0.9}},
        "adam": {"client_optimizer": "adam", "client_lr": 0.01},
    }[optimizer]
    run = train("ssl", make(model), [10, 5, 7], shape, cut=at, hand_over=turns, hand_over_optimizer=True, **options)
    net = make(model)
    by_name = {
        "sgd": torch.optim.SGD(net.parameters(), lr=0.1),
        "momentum": torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
        "adam": torch.optim.Adam(net.parameters(), lr=0.01),
    }
    reference = sgd(net, run.training.source.train, visits([10, 5, 7], 4, 2, turns), by_name[optimizer])
    holder = run.training.clients.holder
    assert holder is not None
    assert difference(whole(run, holder), reference) == 0.0


@model_and_cut
@pytest.mark.parametrize("hand_over_optimizer", [True, False])
def test_identity_02_needs_the_optimizer_state(
    model: Make, shape: tuple[int, ...], at: str, hand_over_optimizer: bool
) -> None:
    """With momentum, the identity does not hold unless the optimiser's state is handed over."""
    options: dict[str, Any] = {"client_optimizer_options": {"momentum": 0.9}}
    run = train("ssl", make(model), [8, 8], shape, cut=at, hand_over_optimizer=hand_over_optimizer, **options)
    net = make(model)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    reference = sgd(net, run.training.source.train, visits([8, 8], 4, 2, "epoch"), optimizer)
    assert (difference(whole(run, 1), reference) == 0.0) is hand_over_optimizer


@model_and_cut
def test_identity_03_sflv1_with_one_local_step_is_fedsgd_is_centralised(
    model: Make, shape: tuple[int, ...], at: str
) -> None:
    """Unequal clients with full batches, weights n_k/n."""
    sizes = [9, 4, 6]
    options: dict[str, Any] = {"local_steps": 1, "rounds": 5, "batch": 9}
    v1 = train("sflv1", make(model), sizes, shape, cut=at, **options)
    fedsgd = train("fl", make(model), sizes, shape, **options)
    reference = sgd(make(model), v1.training.source.train, unions(sizes, 9, 5))
    assert difference(whole(v1), reference) < TIGHT
    assert difference(client_state(fedsgd), reference) < TIGHT


@model_and_cut
@pytest.mark.parametrize("local", [{"local_steps": 1}, {"local_steps": 3}, {"local_epochs": 1}, {"local_epochs": 2}])
def test_identity_04_sflv1_is_fedavg(model: Make, shape: tuple[int, ...], at: str, local: dict[str, int]) -> None:
    """For any number of local steps, any cut, unequal clients and last batches, and with sampling of clients."""
    options: dict[str, Any] = {**local, "rounds": 3, "participation": 0.7}
    v1 = train("sflv1", make(model), [10, 5, 7], shape, cut=at, **options)
    fedavg = train("fl", make(model), [10, 5, 7], shape, **options)
    for client in range(3):
        assert difference(whole(v1, client), client_state(fedavg, client)) < TIGHT


@model_and_cut
@pytest.mark.parametrize(
    "options", [{"phi": 0.0, "alpha": 0.0}, {"phi": 0.25, "alpha": 0.0}], ids=["phi=0", "one active client"]
)
def test_identity_05_sglr_without_its_halves_is_psl(
    model: Make, shape: tuple[int, ...], at: str, options: dict[str, float]
) -> None:
    """phi=0 and alpha=0, or exactly one active client (phi C = 1)."""
    sizes = [9, 9, 5, 7]
    a = train("sglr", make(model), sizes, shape, cut=at, **options)
    b = train("psl", make(model), sizes, shape, cut=at)
    for client in range(4):
        assert difference(whole(a, client), whole(b, client)) < TIGHT


@model_and_cut
@pytest.mark.parametrize("algorithm", ["psl", "sglr"])
def test_identity_06_equal_starts_and_equal_batches(
    model: Make, shape: tuple[int, ...], at: str, algorithm: str
) -> None:
    """Three clients with the same rows in the same order: SGLR(phi=1) = PSL = centralised SGD on that batch."""
    data = samples(10, shape)
    rows = [np.arange(10)] * 3
    own = {"phi": 1.0, "alpha": 0.0} if algorithm == "sglr" else {}
    clients, server, _ = by_hand(algorithm, make(model), at, data, rows, rounds=2, same_batches=True, **own)
    reference = sgd(make(model), data, unions([10], 4, 6))
    for state in clients:
        assert difference({**state, **server}, reference) < TIGHT


@pytest.mark.parametrize("shape", [(3,), (2, 4, 4)])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_identity_07_mean_of_own_is_sum_of_slices(shape: tuple[int, ...], count: int) -> None:
    """phi=1, equal batches: the mean of own gradients is the sum over slices of the concatenated loss's gradient."""
    rng = np.random.default_rng(0)
    gradient = (torch.from_numpy(rng.normal(size=(4 * count, *shape))),)
    smashed = Smashed(gradient, torch.zeros(4 * count), tuple(range(count)), (4,) * count)
    everyone = tuple(range(count))
    mean = Sglr(average_reduce="mean").split_average(gradient, smashed, everyone).common[0]
    total = Sglr(average_reduce="sum").split_average(gradient, smashed, everyone).common[0]
    assert torch.allclose(mean, total, rtol=1e-15, atol=1e-15)
    assert torch.allclose(total, gradient[0].view(count, 4, *shape).sum(0), rtol=1e-15, atol=1e-15)


@model_and_cut
def test_identity_07_holds_in_training(model: Make, shape: tuple[int, ...], at: str) -> None:
    """Both definitions train the same models if all clients are active."""
    runs = [
        train("sglr", make(model), [8, 8, 8], shape, cut=at, phi=1.0, average_reduce=reading)
        for reading in ("mean", "sum")
    ]
    assert difference(whole(runs[0]), whole(runs[1])) < TIGHT


@model_and_cut
def test_identity_08_first_server_step_ignores_phi(model: Make, shape: tuple[int, ...], at: str) -> None:
    """After one step, the server is the same for every phi; after three steps it is not."""
    steps = {
        (phi, n): server_state(train("sglr", make(model), [4 * n] * 4, shape, cut=at, phi=phi, rounds=1))
        for phi in (0.0, 0.5, 1.0)
        for n in (1, 3)
    }
    assert difference(steps[0.0, 1], steps[0.5, 1]) == difference(steps[0.0, 1], steps[1.0, 1]) == 0.0
    assert difference(steps[0.0, 3], steps[1.0, 3]) > 1e-6


@model_and_cut
def test_identity_08_alpha_one_sums_the_clients_mean_gradients(model: Make, shape: tuple[int, ...], at: str) -> None:
    """alpha=1 with SGD: w_s <- w_s - eta_c * sum over clients of the gradient of the client's own mean loss."""
    run = train("slr", make(model), [4, 4, 4], shape, cut=at, alpha=1.0, rounds=1)
    data, net = run.training.source.train, make(model)
    for rows in (torch.arange(0, 4), torch.arange(4, 8), torch.arange(8, 12)):
        nn.functional.cross_entropy(net(data.x[rows]), data.y[rows]).backward()  # gradients accumulate
    expected = {k: p.detach() - 0.1 * p.grad for k, p in net.named_parameters() if p.grad is not None}
    found = server_state(run)
    assert difference(found, {k: expected[k] for k in found}) < TIGHT


@pytest.mark.parametrize("at", ["0", "2"])
def test_identity_09_linear_cut_layer_bias_is_fedsgds(at: str) -> None:
    """Cut after a linear layer, equal starts, phi=1: after a step the bias equals FedSGD's, the weight does not."""
    a = client_state(train("sglr", make(mlp), [4, 4, 4], (6,), cut=at, phi=1.0, alpha=0.0, rounds=1))
    b = client_state(train("fl", make(mlp), [4, 4, 4], (6,), local_steps=1, rounds=1))
    assert difference({"b": a[f"{at}.bias"]}, {"b": b[f"{at}.bias"]}) < TIGHT
    assert difference({"w": a[f"{at}.weight"]}, {"w": b[f"{at}.weight"]}) > 1e-4


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_identity_10_averaging_over_rows_gives_rank_one_updates(reduce: str) -> None:
    """Every row of the batch back-propagates the same vector g: dW = g (sum of the inputs)^T."""
    start = make(mlp).state_dict()["0.weight"]
    options: dict[str, Any] = {"cut": "0", "phi": 1.0, "rounds": 1, "average_reduce": reduce}
    over_rows = train("sglr", make(mlp), [4, 4, 4], (6,), average_over="clients-and-rows", **options)
    over_clients = train("sglr", make(mlp), [4, 4, 4], (6,), average_over="clients", **options)
    for client in range(3):
        assert torch.linalg.matrix_rank(client_state(over_rows, client)["0.weight"] - start, atol=1e-12) == 1
        assert torch.linalg.matrix_rank(client_state(over_clients, client)["0.weight"] - start, atol=1e-12) > 1


@pytest.mark.parametrize(("model", "shape"), [(m[1], m[2]) for m in MODELS[1:]])
@pytest.mark.parametrize("algorithm", ["psl", "sglr"])
def test_identity_11_empty_client_part_is_centralised_on_the_union(
    model: Make, shape: tuple[int, ...], algorithm: str
) -> None:
    """The whole model at the server: PSL and SGLR (any phi) train it on the union batch."""
    data = samples(19, shape)
    rows = [np.arange(0, 9), np.arange(9, 13), np.arange(13, 19)]
    own = {"phi": 0.7, "alpha": 0.0} if algorithm == "sglr" else {}
    _, server, _ = by_hand(algorithm, make(model), "input", data, rows, batch=9, rounds=3, **own)
    assert difference(server, sgd(make(model), data, unions([9, 4, 6], 9, 3))) < TIGHT


@pytest.mark.parametrize(("model", "shape"), [(m[1], m[2]) for m in MODELS[1:]])
def test_identity_11_empty_client_part_sflv2_is_sequential(model: Make, shape: tuple[int, ...]) -> None:
    """The whole model at the server: SplitFed V2 is SGD on one client's batch after another, in the drawn order."""
    from cutlayer import seeds

    data = samples(12, shape)
    rows = [np.arange(0, 4), np.arange(4, 8), np.arange(8, 12)]
    _, server, _ = by_hand("sflv2", make(model), "input", data, rows, rounds=3)
    streams = batches_of([4, 4, 4], 4)
    order = []
    for index in range(3):
        drawn = [s.next() for s in streams]
        order += [drawn[k] for k in seeds.generator(0, "server order", index, 0).permutation(3)]
    assert difference(server, sgd(make(model), data, order)) == 0.0


@pytest.mark.parametrize(("model", "shape"), [(m[1], m[2]) for m in MODELS[1:]])
def test_identity_11_empty_server_part_sflv2_is_fedavg(model: Make, shape: tuple[int, ...]) -> None:
    """The whole model at the clients: SplitFed V2 is FedAvg."""
    sizes = [9, 4, 6]
    fedavg = train("fl", make(model), sizes, shape)
    starts = np.cumsum([0, *sizes])
    rows = [np.arange(starts[k], starts[k + 1]) for k in range(3)]
    clients, server, _ = by_hand("sflv2", make(model), "output", fedavg.training.source.train, rows, rounds=2)
    assert not server
    assert difference(clients[0], client_state(fedavg)) < TIGHT


U_SHAPES = [
    (mlp, (6,), "0", "2"),
    (mlp, (6,), "2", "3"),
    (MODELS[2][1], (6,), "0", "1"),
    (MODELS[3][1], (1, 6, 6), "0", "3"),
]


@pytest.mark.parametrize(("model", "shape", "at", "tail"), U_SHAPES)
@pytest.mark.parametrize("turns", ["batch", "epoch"])
def test_identity_12_u_shaped_is_vanilla(model: Make, shape: tuple[int, ...], at: str, tail: str, turns: str) -> None:
    """At equal learning rates, keeping the labels and last layers at the client changes no number."""
    sizes = [10, 5, 7]
    vanilla = train("ssl", make(model), sizes, shape, cut=at, hand_over=turns)
    u = train("ussl", make(model), sizes, shape, cut=at, tail_cut=tail, hand_over=turns)
    assert difference(whole(u, 2 if turns == "epoch" else 0), whole(vanilla, 2 if turns == "epoch" else 0)) < TIGHT
    assert u.training.ledger.total("up", kind="labels") == 0 < vanilla.training.ledger.total("up", kind="labels")


@model_and_cut
@pytest.mark.parametrize("algorithm", ["psl", "sglr", "sfl", "sflv1", "fl"])
def test_identity_13_first_adam_step(model: Make, shape: tuple[int, ...], at: str, algorithm: str) -> None:
    """The first step of Adam is -lr g / (|g| + eps), at server and clients. Gradients are taken from an SGD step."""
    cut = {} if algorithm == "fl" else {"cut": at}
    local = {} if algorithm in ("psl", "sglr") else {"local_steps": 1}
    averaged = {"average_every": "round"} if algorithm == "sfl" else {}
    options: dict[str, Any] = {**cut, **local, **averaged, "rounds": 1}
    one = {"psl": [4, 4], "sglr": [4, 4]}.get(algorithm, [4])  # averaging would mix several clients' steps
    begin = make(model).state_dict()
    plain = train(algorithm, make(model), one, shape, client_lr=1.0, **options)
    adam = train(algorithm, make(model), one, shape, client_lr=0.01, client_optimizer="adam", **options)
    end, step = (client_state(r) if algorithm == "fl" else whole(r) for r in (plain, adam))
    c = 2.0 if algorithm == "sglr" else 1.0  # SplitLr: the server's rate is eta_c C^alpha
    clients = client_state(plain).keys()
    for name, start in begin.items():
        rate = 1.0 if name in clients else c
        g = (start - end[name]) / rate
        assert torch.allclose(step[name] - start, -0.01 * rate * g / (g.abs() + 1e-8), rtol=1e-6, atol=1e-9), name


def test_models_are_left_alone() -> None:
    """Training works on copies: the user's module keeps its weights, its mode and its gradients."""
    net = make(mlp).eval()
    before = copy.deepcopy(net.state_dict())
    train("sglr", net, [5, 5], (6,), cut="2")
    assert difference(net.state_dict(), before) == 0.0
    assert not net.training
    assert all(p.grad is None for p in net.parameters())
