"""GAS: its result when all clients are equally fast, and the rows that it generates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import CLASSES, client_state, difference, make, mlp, samples, server_state, train

from cutlayer import Run
from cutlayer.algorithms.gas import Gas
from cutlayer.algorithms.gaussians import LabelGaussians
from cutlayer.errors import ConfigError
from cutlayer.testing import check_algorithm

PLAIN: dict[str, Any] = {"generate": "never", "working": 3, "rounds": 3}
FLEET: dict[str, Any] = {"client_device": "raspberry-pi-4", "up_mbps": 1.0, "down_mbps": 1.0}
SLOW: dict[str, Any] = {**FLEET, "stragglers": 0.34, "straggler_slowdown": 50.0}


def trained(algorithm: str = "gas", sizes: tuple[int, ...] = (8, 8, 8), **options: Any) -> Run:
    return train(algorithm, make(mlp), sizes, (6,), cut="2", **options)


@pytest.mark.parametrize("answer", ["arrival", "full"])
@pytest.mark.parametrize("engine", ["local", "stacked"])
def test_equally_fast_clients_that_all_work_are_scala(answer: str, engine: str) -> None:
    """With buffers of one batch and one model per client and no generated rows, GAS is SFL with the same adjustment."""
    gas = trained(answer=answer, engine=engine, **PLAIN)
    assert gas.result is not None
    assert gas.result.staleness is not None
    assert gas.result.staleness["models_most"] == [0] * 3
    assert gas.result.staleness["batches_most"] == [1] * 3  # a batch is answered before the server steps
    for name in ("scala", "sfl"):
        sync = trained(name, logit_adjust="client", rounds=3)
        assert difference(server_state(sync), server_state(gas)) < 1e-10
        assert difference(client_state(sync), client_state(gas)) < 1e-10


def test_rows_that_are_drawn_train_the_server_alone() -> None:
    """In the first step, generated rows change the server's model but not the clients' models."""
    one = {"local_steps": 1, "working": 3, "rounds": 1}
    never, drawn = trained(generate="never", **one), trained(generate="seen", fill="most", **one)
    assert difference(client_state(never), client_state(drawn)) == 0
    assert difference(server_state(never), server_state(drawn)) > 1e-6
    assert drawn.training.server.rows_made_up > never.training.server.rows_made_up == 12


def test_statistics_of_all_data_are_those_of_numpy() -> None:
    kept: dict[str, torch.Tensor] = {}
    gaussians, data = LabelGaussians(kept, CLASSES), samples(60, (3, 2), seed=1)
    for part in range(0, 60, 7):
        gaussians.update((data.x[part : part + 7],), data.y[part : part + 7])
    for label in range(CLASSES):
        own = data.x[data.y == label].numpy()
        assert np.abs(kept["gaussians mean 0"][label].numpy() - own.mean(0)).max() < 1e-12
        assert np.abs(kept["gaussians variance 0"][label].numpy() - own.var(0)).max() < 1e-12


def test_what_is_forgotten_counts_less() -> None:
    kept: dict[str, torch.Tensor] = {}
    gaussians, y = LabelGaussians(kept, 1), torch.zeros(1, dtype=torch.int64)
    gaussians.update((torch.tensor([[0.0]]),), y)
    gaussians.update((torch.tensor([[3.0]]),), y, weight=2.0, decay=0.5)
    assert kept["gaussians mean 0"].item() == pytest.approx(3.0 * 2.0 / 2.5)


@pytest.mark.parametrize(("fill", "each"), [("share", 3), ("most", 6)])
def test_labels_are_equally_frequent_in_a_full_buffer(fill: str, each: int) -> None:
    kept: dict[str, torch.Tensor] = {}
    gaussians, y = LabelGaussians(kept, 3), torch.tensor([0, 0, 0, 0, 0, 0, 1, 2, 2])
    x = torch.arange(9.0).view(9, 1)
    gaussians.update((x,), y)
    algorithm = Gas.of({"fill": fill})
    (rows,), labels = algorithm.filled((x,), y, gaussians, torch.Generator().manual_seed(0))
    assert torch.bincount(labels).tolist() == [each] * 3
    assert rows[labels == 0][:, 0].tolist() == list(range(each))  # the first rows that arrived, none generated
    assert rows[labels == 1].tolist() == [[6.0]] * each  # the variance of a single row is 0


def test_nothing_is_drawn_before_every_label_was_seen() -> None:
    kept: dict[str, torch.Tensor] = {}
    gaussians, y = LabelGaussians(kept, 3), torch.tensor([0, 0, 1])
    x = torch.arange(3.0).view(3, 1)
    gaussians.update((x,), y)
    draw = torch.Generator().manual_seed(0)
    assert Gas.of({}).filled((x,), y, gaussians, draw)[1] is y
    assert torch.bincount(Gas.of({"generate": "seen"}).filled((x,), y, gaussians, draw)[1]).tolist() == [2, 2]


def test_the_clock_decides_who_comes_first() -> None:
    """A slow client sends fewer and older batches. Without stragglers, all clients are equally fast."""
    options = {"local_steps": 4, "working": 3, "buffer_models": 1, "rounds": 6}
    found = trained(**options, **SLOW).result
    even = trained(**options, **FLEET).result
    assert found is not None
    assert found.staleness is not None
    assert even is not None
    assert even.staleness is not None
    counts = sorted(found.staleness["batches"])
    assert counts[0] * 3 < counts[1]
    assert max(even.staleness["batches"]) - min(even.staleness["batches"]) <= 4
    assert len(found.staleness["idle_seconds"]) == 3
    assert found.staleness["averagings"] == 6
    assert trained(**options, **SLOW).result.staleness == found.staleness  # type: ignore[union-attr]


@pytest.mark.parametrize("engine", ["local", "stacked"])
def test_a_run_goes_on_bit_for_bit(engine: str, tmp_path: Path) -> None:
    """The checkpoint is written while clients are at work and batches wait in the buffer."""
    options: dict[str, Any] = {
        "local_steps": 3, "working": 2, "buffer_batches": 4, "rounds": 6, "checkpoint_every": 1, "engine": engine,
        "eval_every": 1, **SLOW,
    }  # fmt: skip
    whole = trained(**options)
    with pytest.raises(KeyboardInterrupt):
        _interrupted(tmp_path / "run", options)
    rest = Run.resume(tmp_path / "run", model=make(mlp), data=whole.training.source)
    rest.run()
    assert difference(server_state(whole), server_state(rest)) == 0
    assert difference(client_state(whole), client_state(rest)) == 0
    assert whole.result is not None
    assert rest.result is not None
    assert (whole.result.staleness, whole.result.virtual_seconds) == (
        rest.result.staleness,
        rest.result.virtual_seconds,
    )


def _interrupted(out: Path, options: dict[str, Any]) -> None:
    run = Run(
        algorithm="gas", model=make(mlp), data=trained(**{**options, "rounds": 1}).training.source, out=out, cut="2",
        clients=3, partition="column", precision="float64", client_optimizer="sgd", client_lr=0.1, batch=4,
        lr_schedule="constant", **options,
    )  # fmt: skip
    for record in run:
        if record.round == 3:
            raise KeyboardInterrupt


def test_it_keeps_what_all_algorithms_promise() -> None:
    """Without generated rows and adjustment, one client alone does gradient descent."""
    check_algorithm("gas", generate="never", logit_adjust="none", answer="full", buffer_models=1)


def test_rows_without_classes_are_not_drawn() -> None:
    config = {"algorithm": "gas", "task": "regression", "logit_adjust": "none", "local_steps": 1, "clients": 2}
    data = torch.randn(24, 6, dtype=torch.float64), torch.randn(24, 1, dtype=torch.float64)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    with pytest.raises(ConfigError, match="set generate = never"):
        Run(model=model, data=data, cut="1", rounds=2, **config).run()


def test_sampling_for_common_steps_is_refused() -> None:
    with pytest.raises(ConfigError, match="work at their own pace: choose fixed"):
        Run(algorithm="gas", data="digits", model="mlp", clients=4, samples_per_client=20, sampling="global")


@pytest.mark.parametrize("engine", ["local", "stacked"])
def test_who_is_at_work_keeps_its_model_when_others_are_averaged(engine: str) -> None:
    run = trained(local_steps=4, working=3, buffer_models=1, rounds=2, engine=engine)
    clients = run.training.clients
    held = clients.held()
    (average,) = held.models.values()
    at_work = [k for k in run.training.server.kept["queue"].tolist() if difference(clients.model_state(k), average) > 0]
    assert held.everyones
    assert len(at_work) == len(run.training.server.kept["queue"]) > 0
