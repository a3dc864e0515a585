"""Options have their stated effects on the trained weights, not only on records."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support import batches_of, client_state, difference, make, mlp, sgd, source, train, whole
from torch import nn

from cutlayer import Run, UsageError
from cutlayer.gradients import own


@pytest.mark.parametrize("engine", ["local", "stacked"])
@pytest.mark.parametrize("algorithm", ["fl", "psl", "sflv1", "sflv3"])
def test_rates_fall_on_both_sides(algorithm: str, engine: str) -> None:
    """Two rounds of one step at rates 0.1 and 0.01 (lr_decay_at 0.5), compared with plain SGD at these rates.

    There is one client, which the stacked engine also accepts if it is requested.
    """
    cut = {} if algorithm == "fl" else {"cut": "2"}
    more: dict[str, Any] = {"lr_schedule": "step", "lr_decay_at": (0.5,), "engine": engine}
    run = train(algorithm, make(mlp), [4], (6,), **more, **cut)
    net, stream = make(mlp), batches_of([4], 4)[0]
    for rate in (0.1, 0.01):
        state = sgd(net, run.training.source.train, [stream.next()], torch.optim.SGD(net.parameters(), lr=rate))
    assert difference(client_state(run) if algorithm == "fl" else whole(run), state) < 1e-14


def test_the_server_has_a_schedule_of_its_own() -> None:
    """The clients' rate falls to 0.01 and the server's stays at 0.1."""
    more: dict[str, Any] = {"lr_schedule": "step", "server_lr_schedule": "constant", "lr_decay_at": (0.5,)}
    run = train("psl", make(mlp), [4], (6,), cut="2", **more)
    net, stream = make(mlp), batches_of([4], 4)[0]
    for rate in (0.1, 0.01):
        lower = {"params": [p for n, p in net.named_parameters() if n[0] in "02"], "lr": rate}
        upper = {"params": [p for n, p in net.named_parameters() if n[0] == "4"], "lr": 0.1}
        state = sgd(net, run.training.source.train, [stream.next()], torch.optim.SGD([lower, upper]))
    assert difference(whole(run), state) < 1e-14


def test_sfl_averages_all_that_trained() -> None:
    """Client 1 takes one step and client 0 two. Both count, with weights 8/12 and 4/12, and the models of psl."""
    sfl = train("sfl", make(mlp), [8, 4], (6,), cut="2", rounds=1)
    psl = train("psl", make(mlp), [8, 4], (6,), cut="2", rounds=1)
    a, b = client_state(psl, 0), client_state(psl, 1)
    assert difference(client_state(sfl), {k: a[k] * (8 / 12) + b[k] * (4 / 12) for k in a}) < 1e-14


@pytest.mark.parametrize("algorithm", ["fl", "sfl", "sflv1", "sflv2", "sflv3"])
def test_local_epochs_and_steps(algorithm: str) -> None:
    """Two epochs of 8 samples in batches of 4 are four steps per round, so four epochs are two rounds."""
    cut = {} if algorithm == "fl" else {"cut": "2"}
    options: dict[str, Any] = {"model": make(mlp), "data": source([8, 8], (6,)), "clients": 2, "partition": "column"}
    options |= {"algorithm": algorithm, "batch": 4, "precision": "float64", **cut}
    run = Run(local_epochs=2, epochs=4, **options)
    assert [r.round for r in run] == [0] * 4 + [1] * 4
    run = Run(local_steps=3, epochs=3, **options)  # 6 steps
    assert [r.round for r in run] == [0] * 3 + [1] * 3


@pytest.mark.parametrize("algorithm", ["psl", "sfl", "slr"])
def test_union_scale_halves_a_step_of_two_clients(algorithm: str) -> None:
    begin = make(mlp).state_dict()
    one, union = (
        client_state(train(algorithm, make(mlp), [4, 4], (6,), cut="2", rounds=1, gradient_scale=scale))
        for scale in ("own", "union")
    )
    moved = {k: (one[k] - begin[k]) / 2 for k in one}
    assert difference({k: union[k] - begin[k] for k in union}, moved) < 1e-14
    assert max(v.abs().max() for v in moved.values()) > 1e-4


@pytest.mark.parametrize(("which", "factor"), [("participating", 2.0), ("enrolled", 4.0)])
def test_which_clients_split_lr_counts(which: str, factor: float) -> None:
    """Two of four clients take part, and alpha is 1."""
    more: dict[str, Any] = {"participation": 0.5, "alpha_clients": which, "clients": 4, "partition": "column"}
    run = Run(algorithm="slr", model=make(mlp), data=source([4] * 4, (6,)), cut="2", client_lr=0.1, rounds=1, **more)
    assert [r.server_lr for r in run] == [pytest.approx(0.1 * factor)]


def test_optimizer_options_reach_each_side() -> None:
    more: dict[str, Any] = {
        "client_optimizer_options": {"momentum": 0.5},
        "server_optimizer_options": {"momentum": 0.9},
    }
    run = train("psl", make(mlp), [4], (6,), cut="2", **more)
    assert run.training.server.state()["optimizer"]["param_groups"][0]["momentum"] == 0.9
    clients = run.training.clients.state()["inner"]["clients"]
    assert clients[0]["optimizer"]["param_groups"][0]["momentum"] == 0.5


def test_best_is_by_validation_the_latest_of_equals() -> None:
    """The rate is so high that accuracy varies, so the best round is not the last."""
    run = train("psl", make(mlp), [8, 8], (6,), cut="2", rounds=25, client_lr=3.0)
    result = run.result
    assert result is not None
    best = max(run.evaluations, key=lambda s: (s.validation_score or 0.0, s.round))
    assert (result.best_round, result.best_test_score) == (best.round, best.test_score)
    assert result.test_score == run.evaluations[-1].test_score
    assert best.round < 25


def test_the_server_is_evaluated_in_eval_mode() -> None:
    """The server has batch normalisation and dropout. The expected loss is computed by hand."""
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4)).double()
    run = train("psl", net, [8, 8], (6,), cut="0", rounds=6)
    test, losses = run.training.source.test, []
    for k in range(2):
        net.load_state_dict(whole(run, k))
        losses.append(nn.functional.cross_entropy(net.eval()(test.x), test.y).item())
    assert run.evaluations[-1].test_loss == pytest.approx(sum(losses) / 2)


@pytest.mark.parametrize("engine", ["local", "stacked"])
def test_dropout_masks_differ_by_client_and_step(engine: str) -> None:
    net = nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.5), nn.Linear(50, 4)).double()
    data = source([8, 8], (6,))
    data.train.x.fill_(1.0)
    more: dict[str, Any] = {"clients": 2, "partition": "column", "batch": 4, "precision": "float64", "client_lr": 1e-9}
    run = Run(model=net, data=data, algorithm="psl", cut="1", engine=engine, **more)
    clients = run.training.clients
    clients.begin_round(0, 1, 1.0)
    masks = []
    while smashed := clients.forward():
        masks += [smashed.only(k).rows[0] == 0 for k in smashed.clients]
        clients.backward(own(tuple(torch.zeros_like(r) for r in smashed.rows), smashed))
    assert len(masks) == 4
    assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


def test_server_dropout_masks_differ_by_step() -> None:
    net = nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.5), nn.Linear(50, 4)).double()
    run = Run(model=net, data=source([4], (6,)), algorithm="psl", cut="0", clients=1, partition="column")
    run.training.clients.begin_round(0, 1, 1.0)
    smashed, server = run.training.clients.forward(), run.training.server
    assert torch.equal(server.forward(smashed)[0], server.forward(smashed)[0])
    before = server.forward(smashed)[0]
    server.lr = 1e-12
    server.step(smashed)
    assert not torch.allclose(before, server.forward(smashed)[0], rtol=1e-3)


def test_a_tails_dropout_masks_differ_by_step() -> None:
    """Gradients of dropped features are 0. Masks differ between steps, but not if a step is repeated."""
    net = nn.Sequential(nn.Linear(6, 50), nn.Linear(50, 50), nn.Dropout(0.5), nn.Linear(50, 4)).double()
    run = Run(
        model=net, data=source([8], (6,)), algorithm="ussl", cut="0", tail_cut="1", clients=1, batch=4,
        partition="column", precision="float64", client_lr=1e-9,
    )  # fmt: skip
    clients, server = run.training.clients, run.training.server
    clients.begin_round(0, 1, 1.0)
    clients.hand_over(0, optimizer=False)
    masks = []
    while smashed := clients.forward([0], labels=False):
        features = replace(smashed, rows=server.forward(smashed))
        twice = [clients.tail(features).rows[0] == 0 for _ in range(2)]
        assert torch.equal(*twice)
        masks.append(twice[0])
        clients.backward(own(tuple(torch.zeros_like(r) for r in smashed.rows), smashed))
    assert len(masks) == 2
    assert not torch.equal(*masks)


def test_a_run_begins_once() -> None:
    run = Run(
        model=make(mlp), data=source([4, 4], (6,)), algorithm="psl", cut="2", clients=2, partition="column", rounds=3
    )
    next(iter(run))
    with pytest.raises(UsageError, match="has begun already"):
        run.run()


@pytest.mark.parametrize("codec", ["float16", "int8", "float16+zstd"])
def test_codecs_where_nobody_gets_rows_of_their_own(codec: str) -> None:
    """All clients are active, so only the common gradient goes down."""
    run = Run(data="digits", model="cnn", clients=2, samples_per_client=16, rounds=1, phi=1.0, down_codec=codec)
    plain = Run(data="digits", model="cnn", clients=2, samples_per_client=16, rounds=1, phi=1.0)
    assert 0 < next(iter(run)).bytes_down < next(iter(plain)).bytes_down
