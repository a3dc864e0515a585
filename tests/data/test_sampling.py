"""The number of rows that clients bring to a step: shares and blocks by hand, and equal results of all engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import call, client_state, difference, make, mlp, server_state, source, train
from torch import nn

from cutlayer import ConfigError, Run, RunConfig
from cutlayer.data.batches import Batches, Clocks
from cutlayer.data.sampling import Turns, blocks, dealt, per_epoch, proportional, starved
from cutlayer.errors import CutlayerWarning, ForbiddenError, WireError
from cutlayer.remote.sides import worker_of
from cutlayer.stored import checked
from cutlayer.testing import check_algorithm, in_memory
from cutlayer.wire import Frame
from cutlayer.wire import messages as m

COUNTS = st.lists(st.integers(1, 40), min_size=1, max_size=8)
SIZES = [11, 3, 7]


@given(COUNTS, st.integers(1, 9))
def test_proportional_shares(samples: list[int], batch: int) -> None:
    """C x b rows in total (or all rows), at least one per client, and less than one row away from the exact share."""
    sizes = proportional(samples, batch)
    total = min(len(samples) * batch, sum(samples))
    assert sizes.sum() == total
    assert (sizes >= 1).all()
    assert (sizes <= samples).all()
    if not starved(samples, batch):
        assert (np.abs(sizes - total * np.array(samples) / sum(samples)) < 1 + 1e-9).all()
    assert proportional([5, 5, 10], 4).tolist() == [3, 3, 6]
    assert starved([1, 99], 10) == [0]
    assert starved([10, 90], 5) == []


@given(COUNTS, st.integers(1, 9), st.integers(0, 3))
def test_blocks_deal_every_row_once(samples: list[int], batch: int, index: int) -> None:
    """In each epoch, all blocks except the last have C x b rows, and no block is empty."""
    steps = per_epoch(samples, batch)
    drawn = [block for block, _ in zip(blocks(samples, batch, 0, index), range(2 * steps), strict=False)]
    for epoch in (drawn[:steps], drawn[steps:]):
        assert np.sum(epoch, 0).tolist() == samples
        assert [block.sum() for block in epoch[:-1]] == [len(samples) * batch] * (steps - 1)
        assert epoch[-1].sum() > 0


def test_turns() -> None:
    """In a common step, clients without rows are left out. Clients that work separately go on to their next rows."""
    turns = Turns({0: [2, 0, 1], 4: [0, 0, 3]})
    assert turns.batches == {0: 2, 4: 1}
    found = []
    while due := turns.together():
        found.append((due, turns.take(due)))
    assert found == [((0,), [2]), ((0, 4), [1, 3])]
    turns = Turns({0: [2, 0, 1], 4: [0, 0, 3]})
    assert turns.take([4]) == [3]
    assert turns.some(0, 5) == [2, 1]
    assert turns.together() == ()


@pytest.mark.parametrize("sizes", [[4, 3, 3], [6, 9], [10, 10]])
def test_rows_are_those_of_the_epochs_whatever_the_batches(sizes: list[int]) -> None:
    """A batch may contain the end of an epoch and the beginning of the next. The epoch of each row is known."""
    given, fixed = Batches([np.arange(10)], 3, 7), Batches([np.arange(10)], 10, 7)
    order = torch.cat([fixed.draw([0])[0] for _ in range(2)])[: sum(sizes)]
    found, epochs = [], []
    for number, size in enumerate(sizes):
        rows, drawn, clocks = given.draw([0], [size])
        assert (drawn.tolist(), clocks.tolist()) == ([size], [number])
        found.append(rows)
        epochs += given.epochs([0], drawn, clocks).tolist()
    assert torch.equal(torch.cat(found), order)
    assert epochs == [i // 10 for i in range(sum(sizes))]
    again = Batches([np.arange(10)], 3, 7)
    again.load(checked(given.state(), Clocks))
    assert torch.equal(again.draw([0], [5])[0], given.draw([0], [5])[0])


@pytest.mark.parametrize(("algorithm", "options"), [("psl", {}), ("fl", {}), ("sflv1", {"local_steps": 3})])
def test_proportional_on_every_engine(algorithm: str, options: dict[str, Any]) -> None:
    """The general checks, also with local steps."""
    check_algorithm(algorithm, sampling="proportional", one_client_is_sgd=not options, **options)


def noisy() -> nn.Module:
    """A model with dropout, whose masks are derived from the names of batches."""
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def states(run: Run) -> list[dict[str, torch.Tensor]]:
    """All models after a run."""
    holder = run.training.clients.holder
    return [*(client_state(run, k) for k in (range(3) if holder is None else [holder])), server_state(run)]


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("psl", {"participation": 0.7}),
        ("sglr", {"phi_when": "initial"}),
        ("fl", {"local_steps": 2}),
        ("sflv1", {"local_epochs": 2}),
        ("ssl", {"hand_over": "batch"}),
    ],
)
def test_global_on_every_engine(algorithm: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Local, stacked (except SSL), remote, and a run that is interrupted and resumed."""
    cut = {} if algorithm == "fl" else {"cut": "2"}
    common: dict[str, Any] = {**cut, **options, "sampling": "global", "rounds": 3, "client_optimizer": "adam"}
    local = train(algorithm, make(noisy), SIZES, (6,), **common)
    if algorithm != "ssl":
        stacked = train(algorithm, make(noisy), SIZES, (6,), **{**common, "engine": "stacked"})
        assert stacked.training.engine == "stacked"
        assert max(difference(a, b) for a, b in zip(states(local), states(stacked), strict=True)) < 1e-9
    there = in_memory(local.config, model=make(noisy), data=source(SIZES, (6,)))
    records = [(r.clients, r.samples, r.bytes_up) for r in there.run]
    again = Run(local.config, model=make(noisy), data=source(SIZES, (6,)), out=tmp_path / "run")
    found = []
    for record in again:
        found.append((record.clients, record.samples, record.bytes_up))
        if len(found) == len(records) // 2 + 1:
            break
    assert found == records[: len(found)]
    resumed = Run.resume(tmp_path / "run", model=make(noisy), data=source(SIZES, (6,)))
    resumed.run()
    assert all(difference(a, b) == 0.0 for a, b in zip(states(local), states(resumed), strict=True))
    whose = range(3) if local.training.clients.holder is None else [local.training.clients.holder]
    assert max(difference(there.model(k), client_state(local, k)) for k in whose) < 1e-9
    assert difference(server_state(there.run), server_state(local)) < 1e-9


def test_global_is_one_union_step() -> None:
    """FedAvg with one local step. A client may have no rows in a step."""
    runs = [
        train("fl", make(mlp), SIZES, (6,), sampling="global", local_steps=1, rounds=9, batch=1, engine=engine)
        for engine in ("local", "auto")
    ]
    assert runs[1].training.engine == "union"
    assert difference(client_state(runs[0]), client_state(runs[1])) < 1e-12


def test_steps_of_a_round() -> None:
    """With global and proportional sampling, clients end together. With fixed batches, the largest ends alone."""
    counted = {}
    for sampling in ("fixed", "proportional", "global"):
        run = train("psl", make(mlp), [24, 6, 6], (6,), cut="2", sampling=sampling, rounds=1)
        assert run.result is not None
        counted[sampling] = run.result.steps
    assert counted == {"fixed": 6, "proportional": 3, "global": 3}
    turns = dealt("proportional", [24, 0, 8], [0, 2], 4, 0, 0, (1, None))
    assert turns.sizes == ((6, 6, 6, 6), (2, 2, 2, 2))


def test_the_clock_knows_the_rows_of_local_training() -> None:
    """The FLOPs of local training are those of the rows, for each kind of sampling."""
    fleet = {"client_device": "raspberry-pi-4", "up_mbps": 1.0, "down_mbps": 1.0}
    joules = set()
    for sampling in ("fixed", "proportional", "global"):
        run = train("fl", make(mlp), SIZES, (6,), sampling=sampling, rounds=2, **fleet)
        clock = run.training.clock
        assert clock is not None
        joules.add(tuple(np.round(clock.flops, 6)))
    assert len(joules) == 1


def test_what_is_refused() -> None:
    """Starved clients cause a warning. Kept features need batches that repeat, single rows a suitable model."""
    with pytest.warns(CutlayerWarning, match=r"leaves client 1 \(1 of 41 samples\) less than one row of a step's 8"):
        train("psl", make(mlp), [40, 1], (6,), cut="2", sampling="proportional", rounds=1)
    with pytest.raises(ConfigError, match="cache_features is not possible with sampling = 'global'"):
        train("psl", make(mlp), SIZES, (6,), cut="2", sampling="global", cache_features=True, freeze="0")
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).double()
    with pytest.raises(ConfigError, match=r"a batch of one sample.*choose another batch, or sampling = fixed"):
        train("psl", net, SIZES, (6,), cut="1", sampling="global")
    said = call("run", "--algorithm", "cl", "--sampling", "global", code=2)
    assert "sampling = 'global' has no effect on cl" in said.stderr


def test_a_client_draws_no_more_rows_than_a_round_has() -> None:
    """A client refuses requests for too many rows, and the server refuses a batch of a size that it did not request."""
    options: dict[str, Any] = {"algorithm": "psl", "clients": 2, "model": "mlp", "samples_per_client": 20, "batch": 5}
    worker = worker_of(RunConfig.of({**options, "sampling": "global"}), 0, name="client-0")

    def ask(message: m.Message) -> Any:
        return worker.handle(Frame(message, memoryview(b"")))

    ask(m.BeginRound(0, 2, 1.0, 4))
    for take in (None, 0, 21):
        with pytest.raises(ForbiddenError, match="20 rows are left of the round"):
            ask(m.Forward(1, take=take))
    answer, _ = ask(m.Forward(1, take=13))
    assert answer.rows == 13
    with pytest.raises(ForbiddenError, match="7 rows are left"):
        ask(m.Forward(2, take=8))
    fixed = worker_of(RunConfig.of(options), 0, name="client-0")
    fixed.handle(Frame(m.BeginRound(0, 2, 1.0, 4), memoryview(b"")))
    with pytest.raises(ForbiddenError, match="of 13 rows, but a client draws batches of 5"):
        fixed.handle(Frame(m.Forward(1, take=13), memoryview(b"")))
    there = in_memory(RunConfig.of({**options, "sampling": "global"}))
    there.cohort._takes = {0: [3]}
    with pytest.raises(WireError, match="a batch of 4 rows came, where 3 were asked for"):
        there.cohort._smashed(0, Frame(m.SmashedUp(1, 4), memoryview(b"")), True)
