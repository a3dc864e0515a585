"""Plans with blocks that are computed again in the backward pass, compared with real runs."""

from __future__ import annotations

from typing import Any

import pytest
from support import CLASSES, source
from torch import Tensor, nn

from cutlayer import ConfigError, Run
from cutlayer.costs.expect import Expected
from cutlayer.costs.plan import Plan, plan
from cutlayer.options import PlanConfig
from cutlayer.report.planned import notes

WIDTH, BLOCKS, CLIENTS, ROWS, BATCH = 6, 4, 3, 8, 4
MACHINES = {"client_device": "raspberry-pi-4", "link": "lte", "server_device": "h100", "speed_spread": 0.5}


class Block(nn.Module):
    """A block that saves more than its input."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.down(self.up(x).relu())
        return found


class Traced(nn.Module):
    """A model with blocks that torch.fx can trace."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.head(x)
        return found


class Replayed(Traced):
    """A model with blocks that torch.fx cannot trace."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != WIDTH:
            raise ValueError("another width")
        return super().forward(x)


def planned(kind: type[nn.Module], **options: Any) -> Plan:
    config = {"clients": CLIENTS, "batch": BATCH, "samples_per_client": ROWS, "input": (WIDTH,), "classes": CLASSES}
    return plan(PlanConfig.of({**config, "cut": "2", **options}), lambda *_: kind())


def same(algorithm: str, kind: type[nn.Module], more: dict[str, Any], sides: str) -> Expected:
    """The planned costs, after a check that a run computes the same FLOPs and takes the same time."""
    given = {"gradient_checkpointing": sides, **MACHINES, **more}
    e = planned(kind, algorithms=(algorithm,), **given).costs[0].expected
    common = {"clients": CLIENTS, "batch": BATCH, "epochs": 1, "partition": "column", "engine": "local"}
    cuts = {} if algorithm == "fl" else {"cut": "2"}
    data = source([ROWS] * CLIENTS, (WIDTH,))
    result = Run(algorithm=algorithm, model=kind(), data=data, **{**common, **cuts, **given}).run()
    assert e.client_flops == pytest.approx(result.client_flops, rel=1e-12)
    assert e.server_flops == pytest.approx(result.server_flops, rel=1e-12)
    assert e.seconds == pytest.approx(result.virtual_seconds, rel=1e-9)
    return e


@pytest.mark.parametrize(
    ("algorithm", "more", "sides"),
    [("psl", {}, "both"), ("upsl", {"tail_cut": "3"}, "client"), ("sfl", {"cut": ["1", "3", "1"]}, "server")],
)
def test_a_plan_is_what_a_run_computes(algorithm: str, more: dict[str, Any], sides: str) -> None:
    assert same(algorithm, Replayed if algorithm == "psl" else Traced, more, sides).client_flops > 0


@pytest.mark.parametrize(
    ("algorithm", "kind", "more"),
    [
        ("fl", Traced, {}),
        ("psl", Traced, {}),
        ("sflv1", Replayed, {}),
        ("upsl", Traced, {"tail_cut": "3"}),
        ("sfl", Traced, {"cut": ["1", "3", "1"]}),
    ],
)
@pytest.mark.long
def test_each_side_computes_its_blocks_again(algorithm: str, kind: type[nn.Module], more: dict[str, Any]) -> None:
    """Only the side with checkpointing computes more, and the bytes stay the same."""
    sides = ("none", "client", "both", *(() if algorithm == "fl" else ("server",)))
    found = {one: same(algorithm, kind, more, one) for one in sides}
    plain, both = found["none"], found["both"]
    assert found["client"].client_flops == both.client_flops > plain.client_flops
    assert found["client"].server_flops == plain.server_flops
    if algorithm != "fl":
        assert found["server"].client_flops == plain.client_flops
        assert found["server"].server_flops == both.server_flops > plain.server_flops
    assert (plain.up, plain.down) == (both.up, both.down)


def test_memory_and_what_is_said() -> None:
    """If the client's blocks are computed again, the chosen cut, ranks and budgets have another memory."""
    plain, server, client = (
        planned(Traced, algorithms=("fl", "sfl"), ranks=2, gradient_checkpointing=s)
        for s in ("none", "server", "client")
    )
    for one in (plain, server, client):
        m = one.chosen.measured.client
        peaks = [m.peak(BATCH, "adam", checkpointed=again) for again in (False, True)]
        assert peaks[0] > peaks[1]
        assert one.costs[1].memory == peaks[one is client]
        assert one.ranks[1].rows == 2 * m.saved(BATCH, checkpointed=one is client) + one.chosen.measured.server.saved(
            2 * BATCH, checkpointed=one is server
        )
    assert client.costs[0].memory < plain.costs[0].memory == server.costs[0].memory
    budget = client.costs[1].memory / 1e9
    assert (
        planned(Traced, algorithms=("sfl",), memory_budget=budget, gradient_checkpointing="client").chosen.strain == 1
    )
    assert planned(Traced, algorithms=("sfl",), memory_budget=budget).chosen.strain > 1
    more = {"cut": None, "cut_by": "memory", "client_memory": (budget,), "algorithms": ("sfl",)}
    deep, shallow = (planned(Traced, gradient_checkpointing=s, **more) for s in ("client", "server"))
    assert (deep.chosen.measured.name, shallow.chosen.measured.name) == ("blocks.1", "blocks.0")
    assert "of which blocks keep only their inputs" in notes(client)[0]
    assert notes(client)[1].startswith("Blocks of the client are computed again in the backward pass")
    assert "blocks keep" not in notes(server)[0]
    assert not any("computed again" in line for line in notes(plain))


def test_cuts_without_blocks() -> None:
    """A plan refuses the same options as a run."""
    found = planned(Traced, cut="all", algorithms=("sfl",), gradient_checkpointing="client")
    assert [cut.measured.name for cut in found.cuts] == [f"blocks.{i}" for i in range(BLOCKS)]
    assert found.refused["first"] == "no whole block lies on the client's side of the cut"
    with pytest.raises(ConfigError, match="gradient_checkpointing = 'client' has no effect: no whole block lies on"):
        planned(Traced, cut="first", algorithms=("sfl",), gradient_checkpointing="client")
    assert planned(Traced, cut="first", algorithms=("fl",), gradient_checkpointing="client").costs
    with pytest.raises(ConfigError, match="has no effect on Sequential, which has no blocks"):
        planned(
            lambda: nn.Sequential(nn.Linear(WIDTH, 4), nn.Linear(4, CLASSES)), cut="0", gradient_checkpointing="both"
        )  # type: ignore[arg-type]
