"""Plans of clients with adapters of different ranks, compared with real runs."""

from __future__ import annotations

from typing import Any

import pytest
from support import CLASSES, Adapted, is_what_a_run_counts, source
from torch import nn

from cutlayer import ConfigError, Run
from cutlayer.costs.expect import Mixture
from cutlayer.costs.plan import Plan, plan
from cutlayer.options import PlanConfig
from cutlayer.report.planned import heading, notes

RANKS, INPUTS, HIDDEN, ROWS = (1, 4, 1, 2), 7, 8, 6
MACHINES: dict[str, Any] = {
    "client_device": "raspberry-pi-zero-2w", "link": "lte", "server_device": "raspberry-pi-5",
    "speed_spread": 0.7, "rate_spread": 0.5, "stragglers": 0.2,
}  # fmt: skip
NARROW: dict[str, Any] = {"multicast": True, "server_mbps": 0.5}
AVERAGED = ("fl", "sfl", "sflv1", "usfl", "smofi")
COMMON: dict[str, Any] = {"clients": len(RANKS), "batch": 4}


class Model(nn.Sequential):
    """Three frozen layers with adapters of the largest rank. Each client has adapters of its own rank."""

    def __init__(self, ranks: tuple[int, ...] = RANKS) -> None:
        r = max(ranks)
        first, second, third = Adapted(INPUTS, HIDDEN, r), Adapted(HIDDEN, HIDDEN, r), Adapted(HIDDEN, CLASSES, r)
        super().__init__(first, nn.Tanh(), second, nn.Tanh(), third)
        self.client_ranks = ranks


def model(*_: Any) -> nn.Module:
    return Model()


def planned(**options: Any) -> Plan:
    config = {**COMMON, "cut": "1", "samples_per_client": ROWS, "input": (INPUTS,), "classes": CLASSES, **options}
    return plan(PlanConfig.of(config), model)


@pytest.mark.parametrize(
    ("algorithm", "link"),
    [
        *(("fl", NARROW), ("sfl", NARROW), ("sglr", NARROW), ("usfl", {})),
        *(pytest.param(a, {}, marks=pytest.mark.long) for a in ("fl", "psl", "sfl", "sflv1", "smofi", "sglr", "upsl")),
        *(pytest.param(a, NARROW, marks=pytest.mark.long) for a in ("psl", "sflv1", "smofi", "upsl", "usfl")),
    ],
)
def test_a_plan_is_what_a_run_counts(algorithm: str, link: dict[str, Any]) -> None:
    """Bytes by each convention, FLOPs, time and energy on machines and links that all differ."""
    own: dict[str, Any] = {"tail_cut": "3"} if algorithm in ("upsl", "usfl") else {}
    own |= {"phi": 0.5} if algorithm == "sglr" else {}
    e = planned(algorithms=(algorithm,), **own, **MACHINES, **link).costs[0].expected
    own |= {} if algorithm == "fl" else {"cut": "1"}
    own |= {"averaging": "products"} if algorithm in AVERAGED else {}
    more = {**COMMON, "precision": "float32", "epochs": 1, "partition": "column", **MACHINES, **link, **own}
    run = Run(algorithm=algorithm, model=model, data=source([ROWS] * len(RANKS), (INPUTS,)), **more)
    run.run()
    is_what_a_run_counts(e, run)


def test_each_rank_has_its_row() -> None:
    """Sizes and gradients of the adapters on both sides, by hand."""
    found = planned(algorithms=("cl", "fl", "ssl", "psl", "sfl"))
    first, second, third = INPUTS + HIDDEN, 2 * HIDDEN, HIDDEN + CLASSES
    assert [(kind.rank, kind.clients) for kind in found.kinds] == [(1, 2), (2, 1), (4, 1)]
    assert [kind.measured.client.trainable for kind in found.kinds] == [4 * r * first for r in (1, 2, 4)]
    assert [kind.measured.server.trainable for kind in found.kinds][-1] == 4 * 4 * (second + third)
    assert [kind.measured.whole.trainable for kind in found.kinds] == [
        4 * r * (first + second + third) for r in (1, 2, 4)
    ]
    assert [one.side for one in found.memory] == [*(f"client of rank {r}" for r in (1, 2, 4)), "server", "client of FL"]
    assert [one.gradients for one in found.memory] == [
        *(4 * r * first for r in (1, 2, 4)), 4 * 4 * (second + third), 4 * 4 * (first + second + third),
    ]  # fmt: skip
    assert found.costs[-1].memory == max(kind.memory for kind in found.kinds)
    assert [row["rank"] for row in found.as_dict()["clients_at_cuts"]] == [1, 2, 4]
    works = found.works["sfl"]
    assert isinstance(works, Mixture)
    up = sum(ROWS * (w.smashed + w.label) * w.clients + w.clients * w.client_model for w in works.kinds)
    assert found.costs[-1].expected.up == up
    assert any("different ranks of adapters: SSL, since its one model goes" in line for line in notes(found))
    assert any("cut after '1'" in line for line in heading(found))
    assert {one.codecs for one in found.coded} > {("raw",)}
    assert {b.algorithm for b in found.break_evens} == {"psl", "sfl"}
    tight = planned(algorithms=("sfl",), memory_budget=found.costs[-1].memory / 2e9)
    assert "is not within" in tight.verdict


def test_only_those_algorithms_have_tails_that_use_them() -> None:
    found = planned(algorithms=("sfl", "usfl"), tail_cut="3")
    assert found.costs[0] == planned(algorithms=("sfl",)).costs[0]
    each = [kind.measured.flops for kind in found.kinds]  # planned with usfl
    assert [kind.flops for kind in found.kinds] == [ROWS * (f.client.training + f.tail.training) for f in each]
    assert all(f.tail.training for f in each)


def test_the_largest_rank_alone_where_no_cut_is_named() -> None:
    found = planned(algorithms=("sfl",), cut="all")
    assert found.kinds == ()
    assert "the largest rank here, 4: name a cut" in heading(found)[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"algorithms": ("ssl",)}, "ssl cannot be planned with different ranks of adapters: give one lora_rank"),
        ({"ranks": 2}, "ranks = 2 processes are not planned if adapters have different ranks"),
        ({"clients": 3}, "lora_ranks are 4 for 3 clients: give one for each"),
        ({"cut": "1,3,1,3"}, "lora_ranks are not possible with different cuts: name one cut for all"),
    ],
)
def test_what_cannot_be_planned(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        planned(**{"algorithms": ("sfl",), **options})
