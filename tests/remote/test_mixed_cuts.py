"""Clients on other machines with different cuts: equal to the simulation bit for bit, and checked when they join."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import difference, normed, same, server_state, source

from cutlayer import ConfigError, Run
from cutlayer.engine.between import BetweenCohort
from cutlayer.errors import RefusedError
from cutlayer.options import RunConfig
from cutlayer.remote.sides import worker_of
from cutlayer.testing.deployed import in_memory
from cutlayer.types import Smashed, by_cut

SIZES = [10, 5, 8]
OPTIONS: dict[str, Any] = {
    "clients": 3, "partition": "column", "batch": 5, "rounds": 3, "cut": ["2", "5", "2"], "client_lr": 0.01,
    "engine": "local", "participation": 0.75,
}  # fmt: skip


def configured(algorithm: str, **options: Any) -> RunConfig:
    return RunConfig(algorithm=algorithm, **{**OPTIONS, **options})


def blocks_of(run: Run, client: int) -> dict[str, torch.Tensor]:
    """The layers that the server computes for a client, under the names of the whole model."""
    cohort: Any = run.training.clients
    while not isinstance(cohort, BetweenCohort):
        cohort = cohort.inner
    return cohort.named(client)


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("sglr", {"start": "independent", "phi": 0.7, "up_codec": "float16+zstd", "down_codec": "top-k:0.5"}),
        ("sflv1", {"local_epochs": 2, "client_device": "raspberry-pi-4", "server_device": "h100", "link": "lte"}),
    ],
)
def test_clients_on_other_machines_compute_the_same(algorithm: str, options: dict[str, Any]) -> None:
    config, data = configured(algorithm, **options), source(SIZES, (6,))
    local = Run(config, model=normed, data=data)
    local.run()
    made = in_memory(config, model=normed, data=data)
    made.run.run()
    assert same(server_state(made.run), server_state(local))
    for k in range(len(SIZES)):
        assert same({**made.model(k), **blocks_of(made.run, k)}, dict(local.training.clients.model_state(k)))
    assert made.run.result.test_score == local.result.test_score
    assert made.run.result.bytes == local.result.bytes
    if "client_device" in options:
        assert made.run.result.virtual_seconds == local.result.virtual_seconds
        assert made.run.result.client_flops == local.result.client_flops


@pytest.mark.long
def test_a_deployment_with_mixed_cuts_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    config, data = configured("sfl", start="equal"), source(SIZES, (6,))
    whole = in_memory(config, model=normed, data=data, folder=tmp_path / "whole")
    whole.run.run()
    broken = in_memory(config, model=normed, data=data, folder=tmp_path / "broken")
    for count, _ in enumerate(broken.run, 1):
        if count == 4:
            break
    resumed = in_memory(config, model=normed, data=data, folder=tmp_path / "broken", resume=True)
    resumed.run.run()
    for k in range(len(SIZES)):
        assert difference(resumed.model(k), whole.model(k)) == 0.0
    assert same(server_state(resumed.run), server_state(whole.run))


def test_a_client_with_another_cut_is_refused() -> None:
    data = source(SIZES, (6,))
    theirs = configured("sfl", cut=["2", "2", "5"])
    workers = {k: worker_of(theirs, k, name=f"client-{k}", model=normed, data=data) for k in range(len(SIZES))}
    with pytest.raises(RefusedError, match=r"for the client and .* for the server"):
        in_memory(configured("sfl"), model=normed, data=data, workers=workers).run.run()


def test_rows_that_a_block_cannot_bear_are_their_clients_fault() -> None:
    made = in_memory(configured("psl", participation=1.0), model=normed, data=source(SIZES, (6,)))
    made.run.run()
    vet, y = made.cohort.vet, torch.tensor([0, 1, 2])
    assert vet is not None
    rows = {0: (torch.ones(3, 8),), 1: (torch.ones(3, 8),), 2: (torch.full((3, 8), 3e38),)}
    blocks = blocks_of(made.run, 0)
    sent = Smashed((), y.repeat(3), (0, 1, 2), (3,) * 3, parts=by_cut(rows, (0, 1, 0)))
    assert vet.of_rows(sent, [(1.0, 2.0)] * 2 + [(3e38, 2.0)]) == (2,)
    assert vet.of_rows(sent, [(1.0, 2.0)] * 3) == ()  # usual numbers are not tested any further
    assert same(blocks_of(made.run, 0), blocks)


def test_no_whole_model_for_clients_with_blocks_at_the_server() -> None:
    with pytest.raises(
        ConfigError, match="share_server_model = True is not possible where clients have different cuts"
    ):
        in_memory(configured("sfl", share_server_model=True), model=normed, data=source(SIZES, (6,)))
