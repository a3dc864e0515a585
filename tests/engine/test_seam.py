"""The seam: batches, rows and owners, bytes in the ledger, sampling of clients, hand-over, averaging, evaluation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import batches_of, client_state, conv, difference, made, make, mlp, samples, source, train, u_shaped
from torch import nn

from cutlayer import NonFiniteError, Run, Samples, Source, plugins
from cutlayer.averaging import average_into
from cutlayer.cohort import draw_participants
from cutlayer.costs.ledger import Ledger, MeteredCohort
from cutlayer.data.batches import Batches
from cutlayer.engine.local import LocalCohort
from cutlayer.engine.simulated import Clients, model_bytes
from cutlayer.gradients import own
from cutlayer.models import cut
from cutlayer.optim import make_optimizer
from cutlayer.scoring import judged
from cutlayer.types import CutGradients, Round, Smashed, aligned

sizes_of_clients = st.lists(st.integers(1, 23), min_size=1, max_size=6)


class Double(nn.Module):
    """2 x."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[...] -> [...]."""
        return 2 * x


def cohort(sizes: list[int], batch: int, width: int = 1, **options: Any) -> tuple[LocalCohort, Samples]:
    """Clients whose model doubles its inputs. The inputs are row numbers, so smashed data identify their rows."""
    n = sum(sizes)
    data = Samples(torch.arange(n, dtype=torch.float64).view(n, 1).expand(n, width).clone(), torch.arange(n))
    net = nn.Sequential(Double(), nn.Linear(width, n).double())
    parts = cut(net, "0", data.x[:2] if n > 1 else data.x[[0, 0]])
    starts = np.cumsum([0, *sizes])
    rows = [np.arange(starts[k], starts[k + 1]) for k in range(len(sizes))]
    models: list[tuple[nn.Module, nn.Module | None]] = [(parts.client, None) for _ in sizes]
    setup = Clients(models, data, rows, make_optimizer("sgd", 0.1, {}), lr=0.1, batch=batch, **options)
    return LocalCohort(setup), data


@given(n=st.integers(1, 60), batch=st.integers(1, 20), epochs=st.integers(1, 3), seed=st.integers(0, 5))
def test_every_epoch_deals_every_sample_once(n: int, batch: int, epochs: int, seed: int) -> None:
    rows = np.arange(100, 100 + n)
    other = np.arange(7)
    stream = Batches([other, rows], batch, seed)
    orders = []
    for _ in range(epochs):
        drawn = [stream.draw([1])[0] for _ in range(stream.per_epoch[1])]
        assert all(len(b) == batch for b in drawn[:-1])
        assert len(drawn[-1]) == (n % batch or batch)
        assert sorted(torch.cat(drawn).tolist()) == rows.tolist()
        orders.append(torch.cat(drawn).tolist())
    if n > 20 and epochs > 1:
        assert orders[0] != orders[1]


@given(n=st.integers(1, 40), batch=st.integers(1, 9), skip=st.integers(0, 30))
def test_batches_resume_from_their_clocks(n: int, batch: int, skip: int) -> None:
    a, b = (Batches([np.arange(n)], batch, 0) for _ in range(2))
    for _ in range(skip):
        a.draw([0])
    b.drawn[:] = a.drawn
    assert all(torch.equal(a.draw([0])[0], b.draw([0])[0]) for _ in range(5))


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    batch=st.integers(1, 5),
    asked=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True), max_size=12),
)
def test_drawing_together_is_drawing_alone(sizes: list[int], batch: int, asked: list[list[int]]) -> None:
    """A client's batches depend neither on which other clients draw nor on the order."""
    starts = np.cumsum([0, *sizes])
    rows = [np.arange(starts[k], starts[k + 1]) for k in range(len(sizes))]
    together, alone = Batches(rows, batch, 1), Batches(rows, batch, 1)
    for clients in ([k for k in some if k < len(sizes)] for some in asked):
        if clients:
            drawn, counts, clocks = together.draw(clients)
            each = [alone.draw([k]) for k in clients]
            assert torch.equal(drawn, torch.cat([d for d, _, _ in each]))
            assert counts.tolist() == [len(d) for d, _, _ in each]
            assert clocks.tolist() == [int(c[0]) for _, _, c in each]


@settings(max_examples=25, deadline=None)
@given(sizes=sizes_of_clients, batch=st.integers(1, 7))
def test_rows_owners_labels_stay_together(sizes: list[int], batch: int) -> None:
    """Over a round: the client that sent a row owns it, a row keeps its label, every sample occurs exactly once."""
    clients, _ = cohort(sizes, batch)
    this = clients.begin_round(0, 1, 1.0)
    starts = np.cumsum([0, *sizes])
    seen: list[int] = []
    steps = 0
    while smashed := clients.forward():
        steps += 1
        rows = smashed.rows[0][:, 0].long() // 2
        assert len(smashed) == len(rows) == len(smashed.labels) == len(smashed.owner) == sum(smashed.sizes)
        assert torch.equal(rows, smashed.labels)
        for k in smashed.clients:
            mine = rows[smashed.owner == k]
            assert ((mine >= starts[k]) & (mine < starts[k + 1])).all()
            assert torch.equal(smashed.only(k).rows[0][:, 0].long() // 2, mine)
            assert torch.equal(smashed.only(k).labels, mine)
        seen += rows.tolist()
        clients.backward(own(smashed.rows, smashed))
    assert sorted(seen) == list(range(sum(sizes)))
    assert steps == this.steps == max(math.ceil(n / batch) for n in sizes)
    assert not clients.forward()


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5), data=st.data())
def test_each_client_gets_its_rows_or_the_common_ones(sizes: list[int], data: st.DataObject) -> None:
    clients = tuple(range(0, 2 * len(sizes), 2))
    active = tuple(sorted(data.draw(st.sets(st.sampled_from(clients)))))
    others = [(k, n) for k, n in zip(clients, sizes, strict=True) if k not in active]
    rows = torch.cat([torch.zeros(0, 1), *(torch.full((n, 1), float(k)) for k, n in others)])
    common = torch.full((max(sizes), 1), -1.0)
    gradients = CutGradients((rows,), tuple(k for k, _ in others), tuple(n for _, n in others), (common,), active)
    for k, n in zip(clients, sizes, strict=True):
        assert gradients.for_client(k, n)[0].flatten().tolist() == [-1.0 if k in active else float(k)] * n


@given(seed=st.integers(0, 9), clients=st.integers(1, 30), fraction=st.floats(0.01, 1.0))
def test_participants(seed: int, clients: int, fraction: float) -> None:
    drawn = draw_participants(seed, 4, clients, fraction)
    assert len(drawn) == len(set(drawn)) == max(1, math.floor(fraction * clients + 0.5))
    assert list(drawn) == sorted(drawn)
    assert set(drawn) <= set(range(clients))
    assert drawn == draw_participants(seed, 4, clients, fraction)


def test_everybody_takes_part_sooner_or_later() -> None:
    found = {k for index in range(60) for k in draw_participants(0, index, 10, 0.2)}
    assert found == set(range(10))


# ---- the ledger -----------------------------------------------------------------------------------------------------
# mlp cut 0 in float64: a row of smashed data has 8 numbers of 8 bytes, which is 64 bytes; a label has 8 bytes. The
# client model has 6x8 + 8 = 56 numbers, which is 448 bytes. Clients have 4, 4 and 2 samples; with batches of 4, one
# step has 10 rows. There are 12 + 12 held-out samples.


def ledger_of(algorithm: str, **options: Any) -> Ledger:
    return train(algorithm, make(mlp), [4, 4, 2], (6,), **({"cut": "0", "rounds": 1} | options)).training.ledger


def test_bytes_of_psl() -> None:
    ledger = ledger_of("psl")
    assert ledger.total("up", kind="smashed data") == 10 * 64
    assert ledger.total("up", kind="labels") == 10 * 8
    assert ledger.total("down", kind="cut gradients") == 10 * 64
    assert ledger.of_clients("up", "smashed data").tolist() == [256, 256, 128]
    assert ledger.total("up") == 720
    # Evaluation is counted separately: three client models, or one as long as they are known to be equal.
    assert ledger.total("up", kind="evaluation") == 3 * 24 * (64 + 8)


def test_bytes_of_a_common_gradient() -> None:
    """Two of three clients are active (phi = 0.67): the common gradient of 4 rows is sent to both of them, or once."""
    run = train("sgl", make(mlp), [4, 4, 4], (6,), rounds=1, cut="0", phi=0.67)
    ledger = run.training.ledger
    assert ledger.total("down", "wire-unicast") == 4 * 64 + 2 * 4 * 64
    assert ledger.total("down", "wire-broadcast") == 4 * 64 + 4 * 64
    assert ledger.total("up", "wire-broadcast") == ledger.total("up", "wire-unicast")


def test_bytes_of_one_gradient_for_all_rows() -> None:
    """A gradient that is averaged over clients and rows is one row: 64 bytes."""
    ledger = ledger_of("sgl", phi=1.0, average_over="clients-and-rows")
    assert ledger.total("down", "wire-broadcast") == 64
    assert ledger.total("down", "wire-unicast") == 3 * 64


def test_bytes_of_averaging() -> None:
    """SFL: three client models go up; the average comes down three times (unicast) or once (broadcast)."""
    ledger = ledger_of("sfl")
    assert ledger.total("up", kind="models") == 3 * 448
    assert ledger.total("down", kind="models") == 3 * 448
    assert ledger.total("down", "wire-broadcast", "models") == 448
    assert ledger.total("down", kind="cut gradients") == 640


def test_bytes_of_fedavg() -> None:
    """The whole model has 56 + 72 + 36 = 164 numbers. Nothing else crosses, not even in evaluation."""
    ledger = train("fl", make(mlp), [4, 4, 2], (6,), rounds=2).training.ledger
    assert ledger.total("up") == ledger.total("down") == 2 * 3 * 164 * 8
    assert ledger.total("up", kind="evaluation") == 0


def test_bytes_of_fedavg_with_sampling() -> None:
    """A client that missed an averaging fetches the model when it next takes part; the others already have it."""
    run = train("fl", make(mlp), [4, 4, 4, 4], (6,), rounds=6, participation=0.5)
    stale: set[int] = set()
    fetched = 0
    for index in range(6):
        drawn = set(draw_participants(0, index, 4, 0.5))
        fetched += len(drawn & stale)
        stale = (stale - drawn) | (set(range(4)) - drawn)
    assert fetched > 0
    assert run.training.ledger.total("up") == 6 * 2 * 164 * 8
    assert run.training.ledger.total("down") == (6 * 2 + fetched) * 164 * 8


def test_bytes_of_averaging_with_sampling() -> None:
    """A client that missed an averaging fetches the model once, before the first of the round's two steps."""
    run = train("sfl", make(mlp), [8, 8, 8, 8], (6,), cut="0", rounds=6, participation=0.5)
    stale: set[int] = set()
    fetched = 0
    for index in range(6):
        drawn = set(draw_participants(0, index, 4, 0.5))
        fetched += len(drawn & stale)
        stale = set(range(4)) - drawn
    assert fetched > 0
    assert run.training.ledger.total("down", kind="models") == (6 * 2 + fetched) * 448


@pytest.mark.parametrize(("turns", "moves"), [("epoch", 2 + 3), ("batch", 2 + 3)])
def test_bytes_of_hand_over(turns: str, moves: int) -> None:
    """Clients with one batch each: two hand-overs in round one (the first client has the model), three in round two."""
    ledger = ledger_of("ssl", rounds=2, hand_over=turns)
    assert ledger.total("up", kind="models") == ledger.total("down", kind="models") == moves * 448
    assert ledger.of_clients("down", "models").tolist() == [448, 2 * 448, 2 * 448]


def test_who_is_through_is_not_visited_again() -> None:
    """Clients with 1, 3 and 2 batches, one per turn: the model goes to 0, 1, 2, then 1, 2, then 1, where it stays."""
    run = train("ssl", make(mlp), [4, 12, 8], (6,), cut="0", rounds=1, hand_over="batch", visit_order="fixed")
    ledger = run.training.ledger
    assert ledger.of_clients("up", "models").tolist() == [448, 2 * 448, 2 * 448]
    assert ledger.of_clients("down", "models").tolist() == [0, 3 * 448, 2 * 448]
    assert run.training.clients.holder == 1


def test_random_visits_differ_from_round_to_round() -> None:
    tour = made("ssl", visit_order="random", hand_over="epoch")
    orders = [tuple(tour.visits(Round(index, 9, tuple(range(5)), (1,) * 5, 0))) for index in range(9)]  # type: ignore[attr-defined]
    assert all(sorted(order) == list(range(5)) for order in orders)
    assert len(set(orders)) > 5


def test_bytes_of_handing_over_the_optimizer() -> None:
    """Momentum adds one number per parameter. Clients 1 and 2 receive it from clients 0 and 1, which have stepped."""
    more: dict[str, Any] = {"client_optimizer_options": {"momentum": 0.9}, "hand_over_optimizer": True}
    assert ledger_of("ssl", **more).total("up", kind="models") == 2 * 2 * 448


def test_bytes_of_the_u_shape() -> None:
    """With the tail after layer 2, features have 8 numbers too. Labels stay; feature gradients go up."""
    ledger = ledger_of("ussl", tail_cut="2")
    assert ledger.total("up", kind="labels") == 0
    assert ledger.total("down", kind="features") == 640
    assert ledger.total("up", kind="cut gradients") == ledger.total("down", kind="cut gradients") == 640
    assert ledger.total("up", kind="evaluation") == 24 * 64  # from the client that has the model; no labels
    assert ledger.total("down", kind="evaluation") == 24 * 64


def test_tied_weights_cross_once() -> None:
    layer = nn.Linear(4, 4, bias=False)
    assert model_bytes(nn.Sequential(layer, nn.ReLU(), layer)) == 16 * 4


def test_bytes_of_central() -> None:
    """The raw data cross once: 10 samples of 6 numbers and a label."""
    ledger = train("cl", make(mlp), [4, 4, 2], (6,)).training.ledger
    assert ledger.total("up") == 10 * (6 * 8 + 8)
    assert ledger.total("down") == 0


def test_two_tensors_that_cross_are_both_counted() -> None:
    """A cut inside a residual block: x and f(x) both cross, with 8 numbers each."""
    from support import residual

    ledger = train("psl", make(residual), [4, 4], (6,), rounds=1, cut="1.first").training.ledger
    assert ledger.total("up", kind="smashed data") == 2 * 8 * 64
    assert ledger.total("down", kind="cut gradients") == 2 * 8 * 64


@pytest.mark.parametrize("algorithm", ["fl", "ssl", "psl", "sfl", "sflv1", "sflv2", "sflv3", "sglr"])
def test_metering_changes_nothing(algorithm: str) -> None:
    metered = train(algorithm, make(mlp), [6, 5], (6,), **({} if algorithm == "fl" else {"cut": "2"}))
    bare = Run(metered.config, model=make(mlp), data=metered.training.source)
    cohort = bare.training.clients.inner
    object.__setattr__(bare.training, "clients", cohort)
    bare.run()
    for k in range(2):
        assert difference(client_state(metered, k), cohort.model_state(k)) == 0.0
    assert isinstance(metered.training.clients, MeteredCohort)


# ---- verbs ----------------------------------------------------------------------------------------------------------


def test_averaging_weights_parameters_and_buffers() -> None:
    """(1 x 1 + 3 x 5) / 4 = 4. Integer counters take the largest value."""
    a, b = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    for module, value in ((a, 1.0), (b, 5.0)):
        nn.init.constant_(module.weight, value)
        module.running_mean.fill_(value)
        module.num_batches_tracked.fill_(int(value))
    average_into(a, [a, b], [1, 3])
    assert a.weight.tolist() == a.running_mean.tolist() == [4.0, 4.0]
    assert a.num_batches_tracked == 5


@given(weights=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_averaging_equal_models_keeps_them(weights: list[int]) -> None:
    models = [make(mlp) for _ in weights]
    target = make(mlp, seed=1)
    average_into(target, models, weights)
    assert difference(target.state_dict(), models[0].state_dict()) < 1e-15


def test_clients_stay_apart_without_averaging() -> None:
    """PSL never exchanges client models; SFL averages them in every round."""
    psl = train("psl", make(mlp), [6, 6], (6,), cut="2")
    sfl = train("sfl", make(mlp), [6, 6], (6,), cut="2")
    assert difference(client_state(psl, 0), client_state(psl, 1)) > 1e-4
    assert difference(client_state(sfl, 0), client_state(sfl, 1)) == 0.0


def test_sfl_every_step_is_not_every_round() -> None:
    """From equal starts, the results are equal with one step per round but not with two, as the clients drift apart."""
    runs = {
        (every, n): train("sfl", make(mlp), [n, n], (6,), cut="2", average_every=every)
        for every in ("step", "round")
        for n in (4, 8)
    }
    assert difference(client_state(runs["step", 4]), client_state(runs["round", 4])) == 0.0
    assert difference(client_state(runs["step", 8]), client_state(runs["round", 8])) > 1e-6


def test_independent_starts() -> None:
    def fresh() -> nn.Module:
        return mlp()

    run = Run(
        model=fresh,
        data=source([5, 5], (6,)),
        cut="2",
        algorithm="psl",
        clients=2,
        partition="column",
        start="independent",
    )
    assert difference(client_state(run, 0), client_state(run, 1)) > 1e-2
    again = Run(run.config, model=fresh, data=source([5, 5], (6,)))
    assert difference(client_state(run, 1), client_state(again, 1)) == 0.0


def test_evaluation_is_the_mean_over_client_models() -> None:
    """Computed by hand on the test set: each client's own model with the one server."""
    run = train("psl", make(conv), [9, 8, 7], (1, 6, 6), cut="2", rounds=30)
    test = run.training.source.test
    accuracies = []
    for k in range(3):
        net = make(conv)
        net.load_state_dict({**client_state(run, k), **run.training.server.state()["model"]})
        accuracies.append((net(test.x).argmax(1) == test.y).double().mean().item())
    assert len(set(accuracies)) > 1
    assert run.evaluations[-1].test_score == pytest.approx(sum(accuracies) / 3)
    assert run.evaluations[-1].test_score_worst == pytest.approx(min(accuracies))


def test_evaluated_clients_are_drawn() -> None:
    drawn = [judged(10, 3, seed) for seed in range(20)]
    assert all(len(set(some)) == 3 and some == sorted(some) for some in drawn)
    assert {k for some in drawn for k in some} == set(range(10))
    assert drawn[4] == judged(10, 3, 4)


def test_evaluation_leaves_training_alone() -> None:
    """Training is the same if evaluated in every round or only at the end, with dropout and batch normalisation."""

    def net() -> nn.Module:
        return nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 4)
        )

    often, rarely = (train("sglr", make(net), [6, 6], (6,), cut="2", rounds=4, eval_every=n) for n in (1, 4))
    assert difference(client_state(often), client_state(rarely)) == 0.0
    assert (len(often.evaluations), len(rarely.evaluations)) == (4, 1)


def test_gradients_are_zeroed() -> None:
    """A server (or client) that keeps old gradients would move twice as far in the second of two equal steps."""
    data = samples(4, (6,))
    one = Source("same", data, data, data, ("a", "b", "c", "d"), torch.zeros(4, dtype=torch.long))
    options: dict[str, Any] = {
        "algorithm": "psl",
        "clients": 1,
        "partition": "column",
        "cut": "0",
        "precision": "float64",
    }
    tiny: dict[str, Any] = {"client_optimizer": "sgd", "client_lr": 1e-6, "batch": 4, "lr_schedule": "constant"}
    run = Run(model=make(mlp), data=one, rounds=1, **options, **tiny)
    start = run.training.server.state()["model"]["4.weight"].clone()
    run.run()
    first = run.training.server.state()["model"]["4.weight"].clone()
    two = Run(model=make(mlp), data=one, rounds=2, **options, **tiny)
    two.run()
    second = two.training.server.state()["model"]["4.weight"]
    assert torch.allclose(second - first, first - start, rtol=1e-3)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("step", [1, 1, 1, 1, 0.1]),
        ("constant", [1] * 5),
        ("cosine", [0.5 * (1 + math.cos(math.pi * i / 5)) for i in range(5)]),
    ],
)
def test_schedules(schedule: str, expected: list[float]) -> None:
    """Five rounds; the step is at 80 %."""
    made = plugins.load("schedule", schedule)()
    assert [made.factor(i / 5) for i in range(5)] == pytest.approx(expected)


def test_separate_optimizers_rates_and_schedules() -> None:
    """Each record gives the learning rates of the client and the server."""
    run = Run(
        model=make(mlp), data=source([4, 4], (6,)), algorithm="psl", cut="2", clients=2, partition="column", batch=4,
        rounds=5, client_optimizer="sgd", client_lr=0.5, server_optimizer="adamw", server_lr=0.01,
        server_lr_schedule="constant", lr_decay=0.5, lr_decay_at=(0.4, 0.8), precision="float64",
    )  # fmt: skip
    rates = [(r.client_lr, r.server_lr) for r in run]
    assert [c for c, _ in rates] == pytest.approx([0.5, 0.5, 0.25, 0.25, 0.125])
    assert [s for _, s in rates] == pytest.approx([0.01] * 5)
    assert "exp_avg" in run.training.server.state()["optimizer"]["state"][0]


# ---- NaN ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "algorithm", ["cl", "fl", "ssl", "ussl", "psl", "sfl", "sflv1", "sflv2", "sflv3", "sglr", "upsl"]
)
def test_not_a_number_names_step_and_client(algorithm: str) -> None:
    """The inputs of client 1 overflow after the first layers. The error reports this at the client's first step."""
    data = source([4, 4, 4], (6,))
    data.train.x[4:8] *= 1e200  # finite, but the product of two such numbers is not
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), Square(), nn.Linear(8, 8), nn.Linear(8, 4))
    cut = {} if algorithm in ("cl", "fl") else {"cut": "2"}
    tail = {"tail_cut": "3"} if u_shaped(algorithm) else {}
    run = Run(
        model=net.double(), data=data, algorithm=algorithm, clients=3, partition="column", precision="float64",
        rounds=2, batch=4, client_optimizer="sgd", client_lr=0.1, **cut, **tail,
    )  # fmt: skip
    with pytest.raises(NonFiniteError, match=r"is NaN or Inf at step \d:") as caught:
        run.run()
    assert caught.value.clients == ((0,) if algorithm == "cl" else (1,))
    assert caught.value.step == (1 if algorithm in ("ssl", "ussl") else 0)
    assert "lower rates" in str(caught.value)


def test_not_a_number_in_a_later_local_step() -> None:
    """FedAvg reports the local step: the row that overflows is in the client's second batch."""
    data = source([8], (6,))
    stream = batches_of([8], 4)[0]
    stream.next()
    data.train.x[stream.next()[0]] *= 1e200
    net = nn.Sequential(nn.Linear(6, 8), Square(), nn.Linear(8, 4)).double()
    run = Run(model=net, data=data, algorithm="fl", clients=1, partition="column", precision="float64", batch=4)
    with pytest.raises(NonFiniteError, match="of client 0 is NaN or Inf at step 1:"):
        run.run()


class Square(nn.Module):
    """x^2: may overflow where x does not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[...] -> [...]."""
        return x * x


def test_an_infinite_weight_gradient_is_caught_before_the_step() -> None:
    """Loss and cut gradient are finite, but the client's weight gradient is not: x is huge and the weights are tiny."""
    data = source([4, 4], (6,))
    data.train.x[4:8] = 1e308
    net = make(mlp)
    with torch.no_grad():
        net[0].weight.mul_(1e-320)
    run = Run(
        model=net, data=data, algorithm="psl", cut="0", clients=2, partition="column", precision="float64", rounds=1,
        batch=4, client_optimizer="sgd", client_lr=0.1,
    )  # fmt: skip
    with pytest.raises(NonFiniteError, match="weight gradient of client 1 is NaN or Inf at step 0"):
        run.run()


def test_smashed_data_know_their_owner() -> None:
    smashed = Smashed((torch.zeros(6, 2),), torch.zeros(6), (4, 2, 9), (1, 3, 2))
    assert smashed.owner.tolist() == [4, 2, 2, 2, 9, 9]
    assert len(smashed) == 6
    assert not Smashed((), torch.zeros(0), (), ())


def test_rounding_does_not_depend_on_where_rows_lie() -> None:
    """With aligned rows, a layer's gradient has the same bits wherever the rows were in memory."""
    g = torch.Generator().manual_seed(0)
    x, w, gradient = (torch.randn(*s, generator=g) for s in ((8, 128), (10, 128), (8, 10)))
    found = set()
    for offset in range(16):
        room = torch.empty(gradient.numel() + 16)
        lying = room[offset : offset + gradient.numel()].view(8, 10)
        lying.copy_(gradient)
        (rows,) = aligned((lying,))
        assert rows.data_ptr() % 64 == 0
        assert torch.equal(rows, gradient)
        found.add((rows.t() @ x).numpy().tobytes() + (rows @ w).numpy().tobytes())
    assert len(found) == 1
