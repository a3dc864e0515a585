"""Memory and traffic of a rank by the formulas of plans. `engine/test_distributed.py` compares them with real ranks."""

from __future__ import annotations

import math

import pytest
from torch import nn

from cutlayer.costs.divided import PerRank
from cutlayer.costs.plan import Plan, plan
from cutlayer.errors import ConfigError
from cutlayer.options import PlanConfig

CLIENTS, BATCH, RANKS, SAMPLES = 7, 3, 2, 10
AROUND = 2 * (RANKS - 1) / RANKS
TOLD = AROUND * CLIENTS * 12
"""Bytes of the clients' losses, which travel with the gradient."""
LOWER, UPPER = 4 * (6 * 5 + 5), 4 * (5 * 4 + 4)  # bytes of weights


def net() -> nn.Module:
    """Five numbers cross after the first layer."""
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))


def planned(*names: str, model: object = net, **options: object) -> Plan:
    """A plan of these algorithms with several ranks."""
    base = {"cut": "0", "input": (6,), "clients": CLIENTS, "batch": BATCH, "samples_per_client": SAMPLES}
    return plan(PlanConfig.of({**base, "ranks": RANKS, "algorithms": names, **options}), model)  # type: ignore[arg-type]


def of(name: str, **options: object) -> PerRank:
    """The costs per rank of one algorithm."""
    (found,) = planned(name, **options).ranks
    return found


@pytest.mark.parametrize(
    ("name", "step", "averaging"),
    [
        ("psl", TOLD + AROUND * UPPER, 0.0),
        ("sglr", TOLD + AROUND * (UPPER + BATCH * 20), 0.0),
        ("sfl", TOLD + AROUND * UPPER, AROUND * LOWER),
        ("sflv1", (RANKS - 1) * 4 * 8, AROUND * (LOWER + UPPER)),
        ("gpsl", TOLD + AROUND * (UPPER + LOWER), 0.0),
    ],
)
def test_sent(name: str, step: float, averaging: float) -> None:
    """Computed by hand from the sizes of the two layers. One rank has 4 clients, the other 3."""
    found = of(name)
    assert (found.clients, found.step, found.averaging) == (4, step, averaging)
    last = BATCH - SAMPLES % BATCH  # rows that the last batch is short of a full one
    common = AROUND * 20 if name == "sglr" else 0.0
    assert found.epoch == math.ceil(SAMPLES / BATCH) * step - last * common + averaging


def test_sent_where_rows_are_gathered() -> None:
    """Rows are five floats and a label. Every rank holds all server copies."""
    rows = (RANKS - 1) * 4 * (20 + 8)
    for found in (of("sflv2"), of("smofi")):
        assert found.step == found.gathering == BATCH * rows
        assert found.epoch == SAMPLES * rows + AROUND * LOWER
    assert of("smofi").states == 4 * 4 * LOWER + 8 * 4 * UPPER
    assert of("psl").gathering == of("sflv2").step


def test_gathered_rows_of_clients_with_tails() -> None:
    """Labels stay. The loss of each tail and the gradients of a row's four features go to the other ranks."""
    (found,) = planned("usfl", model=lambda: nn.Sequential(*net(), nn.Linear(4, 4)), tail_cut="1").ranks
    assert found.gathering == (RANKS - 1) * 4 * (8 + BATCH * (20 + 16))


def test_losses_go_by_themselves_where_no_gradient_goes() -> None:
    """The server's part is frozen, so no gradient carries the losses."""
    found = of("psl", freeze="^1")
    assert found.step == (RANKS - 1) * 4 * 8


def test_sent_of_whole_models() -> None:
    """Steps send nothing; only averaging does."""
    found = of("fl")
    assert (found.step, found.gathering) == (0, 0)
    assert found.epoch == found.averaging == AROUND * (LOWER + UPPER)


def test_held() -> None:
    """Weights, gradients and two numbers of Adam for each client model, and for one server part or one per client."""
    assert of("psl").states == 4 * 4 * LOWER + 4 * UPPER
    assert of("psl", client_optimizer="sgd").states == 2 * (4 * LOWER + UPPER)
    assert of("fl").states == 4 * 4 * (LOWER + UPPER)
    assert of("sflv1").states == 4 * (4 * LOWER + 5 * UPPER)
    assert of("sflv2").rows > of("psl").rows > 0
    assert of("psl").memory == of("psl").states + of("psl").rows


def test_who_cannot_be_shared() -> None:
    """The plan names algorithms that ranks refuse. One process has no table. More ranks than clients are an error."""
    found = {one.algorithm: one.refused for one in planned("ssl", "cl", "psl").ranks}
    assert found["psl"] == ""
    assert "take turns" in found["ssl"]
    assert "one place" in found["cl"]
    assert planned("psl", ranks=1).ranks == ()
    assert planned("psl").as_dict()["ranks"][0]["clients"] == 4
    with pytest.raises(ConfigError, match="ranks = 8 are more than the 7 clients"):
        planned("psl", ranks=8)


def test_the_network_of_the_paper() -> None:
    """ResNet16, 1000 clients, batches of 8, 8 ranks: 2 MB per step. Gathering all rows would take 219 MiB."""
    options = {"model": "resnet16", "cut": "block4", "clients": 1000, "batch": 8, "ranks": 8}
    apart, gathered = found = plan(PlanConfig.of({**options, "algorithms": ("sglr", "sflv2")})).ranks
    assert apart.step == pytest.approx(1.9e6, rel=0.2)
    for one in found:
        assert one.gathering / 2**20 == pytest.approx(219, rel=0.01)
    assert gathered.step == gathered.gathering
