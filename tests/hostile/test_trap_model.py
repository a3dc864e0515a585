"""A server sends a crafted model that reveals inputs: what a watching client does about it."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from cutlayer.defences.watch import look_at
from cutlayer.errors import DistrustError
from cutlayer.options import RunConfig
from cutlayer.remote.sides import worker_of
from cutlayer.remote.worker import Worker, state_of
from cutlayer.testing import in_memory
from cutlayer.wire import encode_named, pack, unpack
from cutlayer.wire import messages as m

SMALL: dict[str, Any] = {
    "data": "digits",
    "model": "mlp",
    "clients": 3,
    "samples_per_client": 20,
    "test": 20,
    "rounds": 3,
    "algorithm": "sfl",
}


def client(watch: Any, **options: Any) -> Worker:
    return worker_of(RunConfig.of({**SMALL, **options}), 0, name="client-0", watch=watch)


def take(worker: Worker, model: dict[str, Tensor]) -> None:
    body = b"".join(map(bytes, encode_named(model)))
    worker.handle(unpack(pack(m.TakeModel(1), [body], 0, 1), "to client"))


def trap(worker: Worker, scale: float = 1.0, bias: float = 50.0) -> dict[str, Tensor]:
    """Layers that pass on their inputs unchanged, and biases that keep all activations positive."""
    own = state_of(worker.client.module)
    return {n: scale * torch.eye(*t.shape) if t.dim() == 2 else torch.full_like(t, bias) for n, t in own.items()}


@pytest.mark.parametrize(("scale", "bias"), [(1.0, 50.0), (0.1, 0.0)])
def test_a_client_leaves_before_it_takes_a_model_that_reads_inputs(
    scale: float, bias: float, caplog: pytest.LogCaptureFixture
) -> None:
    worker = client("leave")
    before = {n: t.clone() for n, t in state_of(worker.client.module).items()}
    with pytest.raises(DistrustError, match=r"100% of the rows of 'lower.* pass one input on unchanged"):
        take(worker, trap(worker, scale, bias))
    assert all(torch.equal(t, before[n]) for n, t in state_of(worker.client.module).items())
    assert [r.levelno for r in caplog.records] == [logging.ERROR]
    assert "client-0 leaves: the model that the server sends" in caplog.text


def test_a_client_that_only_warns_takes_it_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    worker = client("warn")
    made = trap(worker)
    take(worker, made)
    take(worker, made)
    assert torch.equal(state_of(worker.client.module)["lower.hidden1.1.weight"], made["lower.hidden1.1.weight"])
    take(worker, {n: 10 * t for n, t in made.items()})
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    unwatched = client("off")
    take(unwatched, trap(unwatched))


@pytest.mark.parametrize(
    "options",
    [
        {"algorithm": "fl"},
        {"start": "independent"},
        {"client_optimizer": "sgd", "client_lr": 0.5},
        {"algorithm": "ssl"},
        {"partition": "shards", "shards_per_client": 1, "local_epochs": 5},
    ],
)
def test_honest_models_are_taken(options: dict[str, Any]) -> None:
    config = RunConfig.of({**SMALL, **options})
    workers = {k: worker_of(config, k, name=f"client-{k}", watch="leave") for k in range(3)}
    run = in_memory(config, workers=workers).run
    run.run()
    assert run.result is not None


def test_what_a_look_at_a_model_sees() -> None:
    own = {"w": torch.ones(4, 8), "b": torch.zeros(4), "n": torch.tensor(3)}
    same = look_at(own, own)
    assert (same.distance, same.passing, same.own, same.suspicious) == (0.0, 0.0, 0.0, False)
    far = look_at({**own, "b": torch.full((4,), 6.0)}, own)  # 12 relative to a norm of sqrt(32)
    assert far.distance == pytest.approx(12 / 32**0.5)
    assert far.suspicious
    half = torch.cat([torch.eye(2, 8), torch.ones(2, 8)])
    passed = look_at({**own, "w": half}, own)
    assert (passed.passing, passed.name, passed.suspicious) == (0.5, "w", True)
    assert not look_at({**own, "w": half}, {**own, "w": half}).suspicious  # the client's own model is like that too
    assert look_at({"w": torch.eye(4, 7)}, {"w": torch.ones(4, 7)}).passing == 0.0  # too few inputs to tell
    turned = look_at({"w": 1j * torch.eye(4, 8)}, {"w": torch.ones(4, 8) + 0j})
    assert (turned.distance, turned.passing) == (pytest.approx(36**0.5 / 32**0.5), 1.0)
