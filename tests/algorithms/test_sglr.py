"""SplitAvg, SplitLr and the phases against numbers worked out by hand, with the derivation beside each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import client_state, make, mlp, server_state, train

from cutlayer.algorithms.sglr import Sglr
from cutlayer.gradients import own
from cutlayer.types import CutGradients, Round, Smashed

# Three clients with 2, 3 and 1 rows of one number each: R = 6. The gradient of the concatenated mean loss, row by row:
#   client 0: 6 12 | client 1: 1 2 3 | client 2: 12
# Of each client's own mean loss (times R/b_k = 3, 2, 6):
#   client 0: 18 36 | client 1: 2 4 6 | client 2: 72
UNION = [6.0, 12.0, 1.0, 2.0, 3.0, 12.0]
OWN = [18.0, 36.0, 2.0, 4.0, 6.0, 72.0]
SIZES = (2, 3, 1)


def smashed(clients: tuple[int, ...] = (0, 1, 2), sizes: tuple[int, ...] = SIZES) -> Smashed:
    return Smashed((torch.zeros(sum(sizes), 1),), torch.zeros(sum(sizes)), clients, sizes)


def average(active: tuple[int, ...], **options: Any) -> CutGradients:
    gradient = (torch.tensor(UNION).view(6, 1),)
    return Sglr(**options).split_average(gradient, smashed(), active)


def column(rows: tuple[torch.Tensor, ...]) -> list[float]:
    return rows[0].flatten().tolist()


def test_a_server_that_steers_each_client_shares_nothing() -> None:
    steering = Sglr(phi=0.5, alpha=2.0).without_sharing()
    assert steering == Sglr(phi=0.0, alpha=2.0)
    assert not steering.shares_gradients


def test_own_gradients_are_of_the_own_mean_loss() -> None:
    gradient = (torch.tensor(UNION).view(6, 1),)
    assert column(own(gradient, smashed()).own) == OWN
    assert column(own(gradient, smashed(), "union").own) == UNION


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # Row 0 exists at clients 0 and 1: (18 + 2) / 2. So does row 1: (36 + 4) / 2. Row 2 exists only at client 1: 6.
        ({}, [10.0, 20.0, 6.0]),
        # In the scale of the concatenated loss: (6 + 1) / 2, (12 + 2) / 2, 3.
        ({"gradient_scale": "union"}, [3.5, 7.0, 3.0]),
        # Sum of the concatenated loss's slices: 6 + 1, 12 + 2, 3. The scale option has no effect.
        ({"average_reduce": "sum"}, [7.0, 14.0, 3.0]),
        ({"average_reduce": "sum", "gradient_scale": "union"}, [7.0, 14.0, 3.0]),
        # Mean over all rows of both clients: (18 + 36 + 2 + 4 + 6) / 5.
        ({"average_over": "clients-and-rows"}, [13.2]),
        # Sum over clients, mean over the three rows: (7 + 14 + 3) / 3.
        ({"average_over": "clients-and-rows", "average_reduce": "sum"}, [8.0]),
    ],
)
def test_common_gradient_of_unequal_batches(options: dict[str, Any], expected: list[float]) -> None:
    """Clients 0 (2 rows) and 1 (3 rows) are active, client 2 is not."""
    result = average((0, 1), **options)
    assert column(result.common) == pytest.approx(expected)
    assert result.clients == (2,)
    assert column(result.own) == ([12.0] if options.get("gradient_scale") == "union" else [72.0])


def test_what_each_client_back_propagates() -> None:
    """Client 0 has two rows and uses the first two of three common ones, client 1 uses all three, client 2 its own."""
    result = average((0, 1))
    assert column(result.for_client(0, 2)) == [10.0, 20.0]
    assert column(result.for_client(1, 3)) == [10.0, 20.0, 6.0]
    assert column(result.for_client(2, 1)) == [72.0]


def test_one_sample_shaped_gradient_is_repeated() -> None:
    result = average((0, 1), average_over="clients-and-rows")
    assert column(result.for_client(1, 3)) == pytest.approx([13.2] * 3)


def test_all_active_leaves_nothing_to_unicast() -> None:
    """All clients have row 0: (18 + 2 + 72) / 3. Clients 0 and 1 have row 1: (36 + 4) / 2. Client 1 has row 2: 6."""
    result = average((0, 1, 2))
    assert column(result.common) == pytest.approx([92 / 3, 20.0, 6.0])
    assert result.clients == ()
    assert result.own[0].shape == (0, 1)


def test_nobody_active_is_psl() -> None:
    result = average(())
    assert column(result.own) == OWN
    assert result.active == ()
    assert result.common == ()


def test_several_tensors_are_averaged_each() -> None:
    """Each of the two tensors that cross is averaged by itself.

    Two clients have one row each: their own scale is a factor of 2, and the mean of two is then the sum.
    """
    gradient = (torch.tensor([[1.0], [3.0]]), torch.tensor([[[10.0]], [[30.0]]]))
    both = Smashed(gradient, torch.zeros(2), (0, 1), (1, 1))
    common = Sglr().split_average(gradient, both, (0, 1)).common
    assert [c.tolist() for c in common] == [[[4.0]], [[[40.0]]]]


@pytest.mark.parametrize(
    ("alpha", "clients", "enrolled", "which", "factor"),
    [
        (0.0, 5, 5, "participating", 1.0),
        (0.5, 4, 9, "participating", 2.0),  # 4^0.5
        (0.5, 4, 9, "enrolled", 3.0),  # 9^0.5
        (1.0, 3, 10, "participating", 3.0),
        (2.0, 3, 10, "participating", 9.0),  # 3^2
        (1.5, 4, 4, "enrolled", 8.0),  # 4^1.5
        (2.0, 1, 1, "participating", 1.0),
    ],
)
def test_split_lr(alpha: float, clients: int, enrolled: int, which: str, factor: float) -> None:
    options = Sglr(alpha=alpha, alpha_clients=which)
    assert options.split_lr(smashed(tuple(range(clients)), (1,) * clients), enrolled) == pytest.approx(factor)


def test_server_rate_is_the_clients_times_c_to_the_alpha() -> None:
    """Recorded rates of the server: 0.1 x 3^1.5 with 3 clients in the step, and 0.1 x 1 with a single client."""
    run = train("sglr", make(mlp), [8, 4, 4], (6,), cut="2", alpha=1.5, rounds=1)
    run = type(run)(run.config, model=make(mlp), data=run.training.source)
    rates = [record.server_lr for record in run]
    assert rates == pytest.approx([0.1 * 3**1.5, 0.1])


@pytest.mark.parametrize(
    ("phi", "clients", "count"),
    [(0.0, 10, 0), (0.25, 10, 3), (0.5, 10, 5), (0.75, 10, 8), (1.0, 10, 10), (0.5, 3, 2), (0.04, 10, 0), (0.25, 2, 1)],
)
def test_active_count_is_phi_c_rounded_half_up(phi: float, clients: int, count: int) -> None:
    """Rounding: 2.5 -> 3, 7.5 -> 8, 1.5 -> 2, 0.4 -> 0, 0.5 -> 1."""
    this = Round(0, 1, tuple(range(clients)), (4,) * clients, 0)
    active = Sglr(phi=phi).draw_active(this.clients, this, 0)
    assert len(active) == len(set(active)) == count
    assert set(active) <= set(this.clients)


def test_active_clients_are_drawn_afresh_and_fairly() -> None:
    """In 400 draws of 2 of 5 clients, each client is active in 40% (10% is 4 standard deviations)."""
    this = Round(3, 10, (1, 4, 5, 7, 9), (400,) * 5, 7)
    draws = [Sglr(phi=0.4).draw_active(this.clients, this, turn) for turn in range(400)]
    assert len(set(draws)) == 10  # all pairs
    for client in this.clients:
        assert 0.3 < sum(client in d for d in draws) / 400 < 0.5
    assert draws[5] == Sglr(phi=0.4).draw_active(this.clients, this, 5)  # no draw depends on earlier ones


@pytest.mark.parametrize(
    ("when", "until", "on"),
    [
        # Two rounds of five steps: progress 0, 0.1, ... 0.9.
        ("always", 0.6, [True] * 10),
        ("initial", 0.6, [True] * 6 + [False] * 4),
        ("initial", 0.4, [True] * 4 + [False] * 6),
        ("final", 0.6, [False] * 4 + [True] * 6),
        ("final", 0.4, [False] * 6 + [True] * 4),
        ("initial", 0.0, [False] * 10),
        ("final", 1.0, [True] * 10),
    ],
)
def test_phases(when: str, until: float, on: list[bool]) -> None:
    """The paper's phased variants: SplitAvg during the initial or final 60% or 40% of the steps."""
    options = Sglr(phi=1.0, phi_when=when, phi_until=until)
    found = []
    for index in range(2):
        this = Round(index, 2, (0, 1), (5, 3), 0)
        found += [bool(options.draw_active(this.clients, this, turn)) for turn in range(this.steps)]
    assert found == on


@pytest.mark.parametrize("until", [0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9])
@pytest.mark.parametrize("rounds", [1, 3, 7, 10, 30])
@pytest.mark.parametrize("steps", [1, 5, 6, 125])
def test_phases_are_exact_to_the_step(until: float, rounds: int, steps: int) -> None:
    """Phases are computed with whole numbers: of N steps, step i is in the initial phase if 10 i < 10 until N."""
    total = rounds * steps
    tenths = round(until * 10)
    for when in ("initial", "final"):
        options = Sglr(phi=1.0, phi_when=when, phi_until=until)
        for i in range(total):
            this = Round(i // steps, rounds, (0, 1), (steps, steps), 0)
            expected = 10 * i < tenths * total if when == "initial" else 10 * i >= (10 - tenths) * total
            assert bool(options.draw_active(this.clients, this, i % steps)) == expected, (when, i)


def test_phases_in_training() -> None:
    """Recorded active sets follow the phase: 2 rounds of 5 steps, the final 40%."""
    run = train("sgl", make(mlp), [20, 20], (6,), cut="2", phi=1.0, phi_when="final", phi_until=0.4)
    run = type(run)(run.config, model=make(mlp), data=run.training.source)
    assert [record.active for record in run] == [()] * 6 + [(0, 1)] * 4


def test_one_whole_step_by_hand() -> None:
    """Client s = w x, server u = v s [scores (u, 0)], two clients with one sample each, phi=1, alpha=1, SGD rate 0.1.

    x = 1, 2; labels 0, 0; w = 1; v = 1. With p = sigmoid(v w x): loss = -ln p, dloss/du = p - 1.
        u = 1: p - 1 = -0.26894142; u = 2: p - 1 = -0.11920292
    Server: dL/dv of the mean loss = ((-0.26894142)(1) + (-0.11920292)(2)) / 2 = -0.25367363; rate 0.1 x 2^1:
        v = 1 + 0.2 x 0.25367363 = 1.05073473
    Common gradient: own-mean-loss gradients are (p - 1) v = -0.26894142, -0.11920292; their mean g = -0.19407217.
    Clients: dL/dw = g x; w_0 = 1 + 0.1 x 0.19407217 x 1 = 1.01940722; w_1 = 1 + 0.1 x 0.19407217 x 2 = 1.03881443
    """
    from cutlayer import Run, Samples, Source

    class Scores(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v = torch.nn.Linear(1, 1, bias=False)

        def forward(self, s: torch.Tensor) -> torch.Tensor:
            u = self.v(s)
            return torch.cat([u, torch.zeros_like(u)], 1)

    net = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), Scores()).double()
    for p in net.parameters():
        torch.nn.init.ones_(p)
    data = Samples(torch.tensor([[1.0], [2.0]], dtype=torch.float64), torch.tensor([0, 0]))
    source = Source("hand", data, data, data, ("a", "b"), torch.tensor([0, 1]))
    run = Run(
        algorithm="sglr", model=net, data=source, cut="0", clients=2, partition="column", precision="float64",
        client_optimizer="sgd", client_lr=0.1, lr_schedule="constant", batch=1, rounds=1, phi=1.0, alpha=1.0,
    )  # fmt: skip
    run.run()
    assert server_state(run)["1.v.weight"].item() == pytest.approx(1.05073473, abs=1e-8)
    assert client_state(run, 0)["0.weight"].item() == pytest.approx(1.01940722, abs=1e-8)
    assert client_state(run, 1)["0.weight"].item() == pytest.approx(1.03881443, abs=1e-8)
