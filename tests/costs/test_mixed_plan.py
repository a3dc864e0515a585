"""Plans of clients with different cuts, compared with real runs and with brute force."""

from __future__ import annotations

import itertools
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from support import call, is_what_a_run_counts, mlp, source

from cutlayer import ConfigError, CutError, Run
from cutlayer.costs.breakeven import bytes_of
from cutlayer.costs.expect import Mixture, expect
from cutlayer.costs.fleet import fleet
from cutlayer.costs.ledger import CONVENTIONS, Convention
from cutlayer.costs.plan import Plan, plan
from cutlayer.options import PlanConfig, RunConfig, traits
from cutlayer.report.planned import heading, notes

CUTS = ("0", "3", "0", "1", "3")
COMMON: dict[str, Any] = {"clients": 5, "cut": CUTS, "batch": 4}
DIFFERENT: dict[str, Any] = {
    "client_device": "raspberry-pi-zero-2w", "link": "lte", "server_device": "raspberry-pi-5",
    "speed_spread": 0.7, "rate_spread": 0.5, "stragglers": 0.2,
}  # fmt: skip
NARROW: dict[str, Any] = {"multicast": True, "server_mbps": 0.5}
STATED = ("psl", "slr", "sfl", "sflv1", "sflv2", "sflv3", "scala", "smofi", "sgl", "sglr")  # and allow different cuts
ROWS = 10  # per client


def planned(**options: Any) -> Plan:
    config = {**COMMON, "samples_per_client": ROWS, "input": (6,), **options}
    return plan(PlanConfig.of(config), mlp)


def trained(algorithm: str, **options: Any) -> Run:
    options = {"precision": "float32", "epochs": 1, "partition": "column", **COMMON, **options}
    run = Run(algorithm=algorithm, model=mlp, data=source([ROWS] * 5, (6,)), **options)
    run.run()
    return run


@pytest.mark.parametrize("link", [{}, NARROW], ids=["unicast", "broadcast"])
@pytest.mark.parametrize("phi", [0.0, 1.0])
@pytest.mark.long
def test_a_plan_of_different_cuts_is_what_a_run_counts(phi: float, link: dict[str, Any]) -> None:
    """Bytes by each convention, FLOPs, time and energy on machines and links that all differ."""
    found = planned(algorithms=STATED, phi=phi, **DIFFERENT, **link)
    for cost in found.costs:
        own = {"phi": phi} if cost.algorithm in ("sgl", "sglr") else {}
        is_what_a_run_counts(cost.expected, trained(cost.algorithm, **own, **DIFFERENT, **link))


def test_one_plan_of_different_cuts_is_what_runs_count() -> None:
    found = planned(algorithms=("sfl", "sglr"), phi=1.0, **DIFFERENT, **NARROW)
    runs = [trained("sfl", **DIFFERENT, **NARROW), trained("sglr", phi=1.0, **DIFFERENT, **NARROW)]
    for cost, run in zip(found.costs, runs, strict=True):
        is_what_a_run_counts(cost.expected, run)
    each = {kind.measured.name: kind for kind in found.kinds}
    assert tuple(each[name].measured.flops for name in CUTS) == runs[0].training.flops_each
    assert [(name, kind.clients) for name, kind in each.items()] == [("0", 2), ("1", 1), ("3", 2)]
    assert found.costs[0].memory == max(kind.memory for kind in found.kinds)
    assert found.remark in runs[0].training.remarks


FROZEN: dict[str, Any] = {"freeze": r"^0\.", "seed": 3}


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        pytest.param("psl", {"batch": 5}, marks=pytest.mark.long),
        pytest.param("sfl", {}, marks=pytest.mark.long),
        pytest.param("sfl", {**FROZEN, **NARROW}, marks=pytest.mark.long),
        # Clients that train nothing do not wait for the average. The slowest client is one of them.
        ("sfl", {**FROZEN, "latency_ms": 0.0, "up_mbps": 1e6, "down_mbps": 1e6, "stragglers": 0.4}),
        pytest.param("sglr", {"phi": 1.0, "batch": 64}, marks=pytest.mark.long),
        pytest.param(
            "sglr", {"phi": 1.0, "up_codec": "int8", "down_codec": "top-k:0.5", **NARROW}, marks=pytest.mark.long
        ),
    ],
)
def test_several_epochs_with_parts_that_train_nothing(algorithm: str, options: dict[str, Any]) -> None:
    options = {**DIFFERENT, **options}
    made = planned(algorithms=(algorithm,), **options)
    (work,) = made.works.values()
    assert isinstance(work, Mixture)
    work = work.varied(epochs=3)
    expected = expect(made.config.algorithm(algorithm), work, fleet(made.config, 5))
    is_what_a_run_counts(expected, trained(algorithm, **{**options, "epochs": 3}))


def test_what_is_shared_between_the_draws_is_the_mean_of_all_draws() -> None:
    """In each of three steps, two of five clients are drawn. Clients 1 and 4 have the deepest cut.

    If both are drawn, they share one gradient.
    """
    found = planned(algorithms=("psl", "sgl"), phi=0.4)
    (psl, sgl), (*_, deep) = (cost.expected for cost in found.costs), found.kinds
    draws = [len({1, 4} & set(drawn)) for drawn in itertools.combinations(range(5), 2)]
    saved = Fraction(sum(max(n - 1, 0) for n in draws), len(draws)) * ROWS * deep.measured.gradient
    assert sgl.down == psl.down
    assert sgl.down_broadcast == round(psl.down_broadcast - saved)
    alone = Fraction(sum(draws), len(draws)) * ROWS * deep.measured.gradient
    ever = 1 - Fraction(draws.count(0), len(draws)) ** 3
    assert sgl.paper == round(psl.paper - alone + ever * deep.measured.gradient)
    assert any(line.startswith("SGL: which clients share a gradient is drawn") for line in found.notes)
    assert not planned(algorithms=("psl", "sgl"), phi=1.0).notes


@pytest.mark.long
def test_a_run_that_draws_comes_near_the_mean() -> None:
    epochs = 30
    run = trained("sgl", phi=0.4, epochs=epochs)
    ledger, e = run.training.ledger, planned(algorithms=("sgl",), phi=0.4).costs[0].expected
    counted = ledger.total("down") - ledger.total("down", "wire-broadcast")
    assert counted / epochs == pytest.approx(e.down - e.down_broadcast, rel=0.35)
    assert 0 < counted < epochs * (planned(algorithms=("sgl",), phi=1.0).costs[0].expected.down - e.down_broadcast)


def test_on_both_sides_of_a_break_even_of_different_cuts_the_order_differs() -> None:
    """Checked in samples per client by each convention, in time, and in epochs compared with sending the data."""
    found = planned(algorithms=("cl", "fl", "psl", "sfl", "sglr"), **DIFFERENT)
    machines = fleet(found.config, 5)

    def cost(name: str, convention: Convention | None, **sizes: int) -> float:
        e = expect(found.config.algorithm(name), found.works[name].varied(**sizes), machines)
        assert e.seconds is not None
        return e.seconds if convention is None else bytes_of(e, convention)

    marks = [*found.break_evens, *found.data_break_evens]
    assert len(marks) == 3 * (len(CONVENTIONS) + 1) + 4 * 2
    for b in marks:
        if b.last is not None:
            size = "epochs" if b.quantity == "epochs" else "samples_per_client"
            at, beyond = (
                cost(b.algorithm, b.convention, **{size: n}) > cost(b.against_name, b.convention, **{size: n})
                for n in (b.last, b.last + 1)
            )
            assert (at, beyond) == ((False, True) if b.dearer == "above" else (True, False))
    assert {b.quantity for b in marks if b.last is not None} == {"samples per client", "time"}
    assert all(b.dearer == "always" for b in found.data_break_evens)  # a row of the data is as small as smashed data
    assert all(b.exact == pytest.approx(b.last, abs=2) for b in marks if b.quantity != "time" and b.exact)


def test_who_cannot_have_different_cuts_is_not_planned() -> None:
    assert all(traits(name).mixes_cuts for name in STATED)
    found = planned(algorithms=("cl", "fl", "ssl", "cse-fsl", *STATED), **DIFFERENT)
    assert [cost.algorithm for cost in found.costs] == ["cl", "fl", *STATED]
    assert set(found.one_cut) == {"ssl", "cse-fsl"}
    assert found.costs[1] == planned(cut="0", algorithms=("fl",), **DIFFERENT).costs[0]  # whole models have no cut
    said = "\n".join([*heading(found), *notes(found)])
    assert "Not planned with different cuts: SSL, since one client model travels" in said
    assert "Cuts: 0 for clients 0, 2; 3 for clients 1, 4; 1 for client 3" in said
    with pytest.raises(ConfigError, match="a list of cuts is not possible with ssl, cse-fsl"):
        planned(algorithms=("ssl", "cse-fsl"))


def test_the_servers_memory_holds_the_blocks() -> None:
    """By hand, in bytes of float32: Linear 8 x 8 has 72 parameters and Linear 8 x 4 has 36.

    The server holds the 8 x 8 layer for clients 0, 2 and 3. Adam keeps two numbers per parameter.
    """
    first, second, last, server = planned(algorithms=("psl",)).memory
    assert [one.side for one in (first, last, server)] == ["client cut after 0", "client cut after 3", "server"]
    assert server.trained == server.gradients == 4 * (36 + 3 * 72)
    assert server.moments == 2 * server.gradients
    one = planned(cut="3", algorithms=("psl",)).memory[1]
    two, to_one = last.activations - first.activations, last.activations - second.activations
    assert server.activations == one.activations + 2 * two + to_one
    frozen = planned(algorithms=("psl",), freeze="^2").memory[-1]
    assert (frozen.frozen, frozen.trained) == (4 * 72, 4 * 36)


def test_equal_cuts_are_one_cut() -> None:
    alike, one = planned(cut="3*5", algorithms=("psl", "ssl")), planned(cut="3", algorithms=("psl", "ssl"))
    assert alike.costs == one.costs
    assert not alike.kinds


def test_cuts_are_chosen_as_in_a_run() -> None:
    needs = {kind.measured.name: kind.memory / 1e9 for kind in planned(algorithms=("psl",)).kinds}
    budgets: dict[str, Any] = {"cut": None, "cut_by": "memory"}
    budgets["client_memory"] = tuple(needs[name] * 1.0001 for name in CUTS)
    run = trained("psl", client_optimizer="adam", **budgets)
    assert run.training.depths is not None
    assert run.training.depths.names == CUTS
    found = planned(algorithms=("psl",), client_optimizer="adam", **budgets)
    assert found.remark in run.training.remarks
    assert found.remark.endswith("(cut_by = memory)")


def test_many_clients_are_named_in_short() -> None:
    assert RunConfig.of({"clients": 5, "cut": "a*2, b ,c * 2"}).cuts == ("a", "a", "b", "c", "c")
    assert RunConfig.of({"clients": 3, "cut": ["a*2", "b"]}).cuts == ("a", "a", "b")
    million = planned(clients=1_000_000, cut="0*400000,3*600000", algorithms=("psl", "sglr"), **DIFFERENT)
    assert [kind.clients for kind in million.kinds] == [400_000, 600_000]
    ten = planned(clients=10, cut="0*4,3*6", algorithms=("psl", "sglr"))
    assert [c.expected.unicast for c in million.costs] == [100_000 * c.expected.unicast for c in ten.costs]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cut": ("0", "3")}, "cut has 2 entries for 5 clients"),
        ({"cut": ("0", "9", "3", "0", "0")}, "'9'"),
        ({"cut": "0,,3,0,0"}, "has an empty name"),
        (
            {"memory_budget": 1.0},
            "memory_budget = 1.0 belongs to one cut for all, and a list of cuts gives",
        ),
        ({"tail_cut": "3", "algorithms": ("psl", "upsl")}, "tail_cut = '3' belongs to one cut for all"),
        ({"ranks": 2}, "ranks = 2 is not possible with a list of cuts"),
        ({"cut_by": "memory", "client_memory": (1.0,)}, "exclude each other"),
        ({"cut": None, "cut_by": "memory"}, "cut_by = 'memory' needs client_memory"),
        ({"cut": None, "cut_by": "profile"}, "cut_by = 'profile' needs client_device"),
        ({"cut": "all", "client_memory": (1.0,)}, "client_memory = [1.0] has no effect with cut = 'all'"),
        ({"cut": None, "client_memory": (1.0,)}, "client_memory = [1.0] needs a cut that it can be checked for"),
        ({"client_memory": (1e-9,)}, "cut = '0' of client 0 takes"),
    ],
)
def test_what_cannot_be_planned(options: dict[str, Any], words: str) -> None:
    with pytest.raises((ConfigError, CutError)) as error:
        planned(**options)
    assert words in str(error.value)


def test_the_command_takes_a_list(tmp_path: Path) -> None:
    words = "--model mlp --input 1 8 8 --clients 3 --cut hidden1*2,hidden3 --algorithms fl psl"
    done = call("plan", *words.split(), "--out", str(tmp_path / "p"), plots=True)
    assert "Clients of each cut" in done.stdout
    stored = json.loads((tmp_path / "p" / "plan.json").read_text("utf-8"))
    assert [(kind["cut"], kind["clients"]) for kind in stored["clients_at_cuts"]] == [("hidden1", 2), ("hidden3", 1)]
    assert (tmp_path / "p" / "plan.png").stat().st_size > 10_000
