"""Clients that all step with the sum of their gradients: centralised descent on the same batches, in every engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support import MODELS, client_state, conv, difference, make, mlp, sgd, source, train, whole

from cutlayer import ConfigError, Run
from cutlayer.costs.expect import Workload, expect
from cutlayer.data.batches import Batches
from cutlayer.data.sampling import blocks, per_epoch
from cutlayer.testing import check_algorithm, in_memory

SIZES = [11, 3, 7]


def drawn(rounds: int, batch: int) -> list[torch.Tensor]:
    """The rows of each step, computed by hand, client by client."""
    ends = np.cumsum(SIZES)
    streams = Batches([np.arange(end - n, end) for n, end in zip(SIZES, ends, strict=True)], batch, 0)
    found = []
    for index in range(rounds):
        steps = blocks(SIZES, batch, 0, index)
        for block in [next(steps) for _ in range(per_epoch(SIZES, batch))]:
            who = [k for k in range(3) if block[k]]
            found.append(streams.draw(who, [int(block[k]) for k in who])[0])
    return found


@pytest.mark.parametrize(("model", "shape", "at"), [m[1:] for m in MODELS], ids=[m[0] for m in MODELS])
@pytest.mark.parametrize("engine", ["local", "auto"])
def test_it_is_centralised_descent(model: Any, shape: tuple[int, ...], at: str, engine: str) -> None:
    """With global sampling and summed gradients, every client has the model of centralised descent on these batches."""
    run = train("gpsl", make(model), SIZES, shape, cut=at, engine=engine, rounds=3)
    assert run.training.engine == ("local" if engine == "local" else "union")
    reference = sgd(make(model), run.training.source.train, drawn(3, 4))
    for client in range(3):
        assert difference(whole(run, client), reference) < 1e-10


def test_every_client_steps_whether_it_takes_part_or_not() -> None:
    """With Adam and only some clients taking part, all models and optimisers stay equal."""
    options: dict[str, Any] = {"client_optimizer": "adam", "client_lr": 0.01, "participation": 0.4, "rounds": 4}
    runs = [train("gpsl", make(mlp), SIZES, (6,), cut="2", engine=e, **options) for e in ("local", "auto")]
    first = client_state(runs[0])
    assert all(difference(first, client_state(run, k)) < 1e-12 for run in runs for k in range(3))
    there = in_memory(runs[0].config, model=make(mlp), data=source(SIZES, (6,)))
    there.run.run()
    assert all(difference(there.model(k), first) < 1e-12 for k in range(3))


def test_a_client_that_was_away_gets_the_model_and_its_optimisers_state() -> None:
    """Client 2 misses a round. When it returns, it has the same model and optimiser state as the others."""
    options: dict[str, Any] = {"client_optimizer": "adam", "client_lr": 0.01, "rounds": 4}
    config = train("gpsl", make(mlp), SIZES, (6,), cut="2", **options).config
    gone: set[int] = set()
    there = in_memory(config, model=make(mlp), data=source(SIZES, (6,)), gone=lambda: gone)
    for record in there.run:
        if record.round == 1 and not gone:
            gone.add(2)
            there.carrier.cut(2)
        elif record.round == 2:
            gone.clear()
    models = [there.model(k) for k in range(3)]
    assert difference(models[0], models[2]) < 1e-12
    kept = [w.client.optimizer.state_dict()["state"] for w in there.workers.values() if w.client.optimizer is not None]
    assert all(torch.allclose(kept[0][i]["exp_avg"], kept[2][i]["exp_avg"], atol=1e-12) for i in kept[0])


@pytest.mark.parametrize(
    "options", [{"average_every": "gradients"}, {"average_every": "gradients", "sampling": "proportional"}]
)
def test_the_option_keeps_what_all_algorithms_promise(options: dict[str, Any]) -> None:
    """The general checks for SFL with this option, also with unequal batches."""
    check_algorithm("sfl", **options)


def test_with_the_step_of_each_round_it_is_sfl_averaged_at_each_step() -> None:
    """Plain descent, equal batches: the mean of models after a step is the model after a step with the sum."""
    common: dict[str, Any] = {"cut": "2", "batch": 4, "rounds": 3}
    sums = train("sfl", make(conv), [8, 8, 8], (1, 6, 6), average_every="gradients", **common)
    means = train("sfl", make(conv), [8, 8, 8], (1, 6, 6), average_every="step", gradient_scale="own", **common)
    assert difference(whole(sums), whole(means)) < 1e-13


@pytest.mark.parametrize("multicast", [False, True])
def test_what_is_planned_is_what_is_counted(multicast: bool) -> None:
    """For equal clients with equal batches, the planned bytes and virtual time are those of the run."""
    fleet: dict[str, Any] = {
        "client_device": "raspberry-pi-4", "server_device": "raspberry-pi-4", "up_mbps": 0.1, "down_mbps": 0.3,
        "latency_ms": 5.0, "multicast": multicast,
    }  # fmt: skip
    run = train("gpsl", make(mlp), [10, 10], (6,), cut="2", sampling="fixed", rounds=2, **fleet)
    t, result = run.training, run.result
    assert result is not None
    assert t.clock is not None
    found = expect(t.algorithm, Workload(**vars(t.epoch), flops=t.flops, epochs=2), t.clock.fleet)
    assert (found.up, found.down, found.down_broadcast) == (
        result.bytes_up,
        result.bytes_down,
        result.bytes_down_broadcast,
    )
    assert found.seconds == pytest.approx(t.clock.now, rel=1e-9)
    weights = sum(p.numel() * p.element_size() for p in make(mlp)[:3].parameters())
    assert t.ledger.total("up", kind="weight gradients") == 2 * 2 * 3 * weights


def test_clients_must_start_equal() -> None:
    """All clients take the same steps, so different initial models would stay different."""
    with pytest.raises(ConfigError, match="start = 'independent' is not possible with gpsl"):
        train("gpsl", lambda: make(mlp), SIZES, (6,), cut="2", start="independent")


def test_the_engine_that_stacks_lacks_the_verb() -> None:
    """The union engine is faster for this algorithm."""
    with pytest.raises(ConfigError, match="cannot run gpsl, which needs backward_together"):
        Run(algorithm="gpsl", engine="stacked", model="mlp", clients=2, samples_per_client=20)
