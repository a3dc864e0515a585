"""Clients on other machines whose adapters have different ranks: the results equal the simulation's."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Adapted
from torch import Tensor, nn
from torch.nn import functional

from cutlayer import ConfigError, Run
from cutlayer.adapters import filled, of_rank, shrink
from cutlayer.errors import RefusedError
from cutlayer.options import RunConfig
from cutlayer.remote.sides import share, worker_of
from cutlayer.testing.deployed import in_memory
from cutlayer.trained import find_trained

INPUTS, HIDDEN, OUTPUTS, RANKS = 7, 8, 5, (1, 4, 2)


class Ranked(nn.Sequential):
    """A model with adapters of the largest rank, and the rank of each client."""

    def __init__(self, ranks: tuple[int, ...] = RANKS) -> None:
        rank = max(ranks)
        super().__init__(Adapted(INPUTS, HIDDEN, rank), nn.Tanh(), Adapted(HIDDEN, OUTPUTS, rank))
        self.client_ranks = ranks


def ranked(input_shape: Any = None, classes: int = OUTPUTS, *, ranks: tuple[int, ...] = RANKS) -> Ranked:
    """A model whose weights depend on the run's seed."""
    return Ranked(ranks)


def data() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(24, INPUTS, generator=generator), torch.randint(0, OUTPUTS, (24,), generator=generator)
    return {"x": x, "y": y, "x_test": x[:4], "y_test": y[:4]}


def options(algorithm: str, **more: Any) -> dict[str, Any]:
    ends = {"cut": "1"} if algorithm != "fl" else {}
    rule = {} if algorithm == "psl" else {"averaging": "products"}
    common = {
        "clients": 3, "rounds": 3, "batch": 4, "validation": 0, "precision": "float64", "client_optimizer": "adamw",
        "client_lr": 0.05, "engine": "local",
    }  # fmt: skip
    return {"algorithm": algorithm, **common, **ends, **rule, **more}


@pytest.mark.parametrize(
    ("algorithm", "more"),
    [
        ("psl", {"client_clip_grad_norm": 0.1}),
        ("psl", {"freeze": "lora_A"}),
        ("sfl", {"start": "independent", "participation": 0.7}),
        ("sfl", {"judge": "average"}),
        ("fl", {"client_optimizer": "sgd", "accumulate": 2}),
    ],
)
def test_clients_on_other_machines_compute_the_same(algorithm: str, more: dict[str, Any]) -> None:
    """Clients hold, and send, only the factors of their own rank."""
    given = options(algorithm, **more)
    local = Run(model=ranked, data=data(), **given)
    losses = [step.loss for step in local]
    made = in_memory(RunConfig.of(given), model=ranked, data=data())
    assert [step.loss for step in made.run] == pytest.approx(losses, rel=1e-10)
    assert made.run.evaluations[-1].test_loss == pytest.approx(local.evaluations[-1].test_loss, rel=1e-10)
    for k, rank in enumerate(RANKS):
        own, theirs = made.model(k), local.training.clients.model_state(k)
        assert own["0.lora_A"].shape == (rank, INPUTS)
        assert own["0.lora_B"].shape == (HIDDEN, rank)
        for name, tensor in filled(own, theirs).items():
            assert torch.allclose(tensor, theirs[name], rtol=0, atol=1e-10), name
        optimizer = made.workers[k].client.optimizer
        assert optimizer is not None
        kept = [t for values in optimizer.state.values() for t in values.values() if torch.is_tensor(t) and t.dim()]
        assert all(rank in t.shape for t in kept)
    assert made.run.training.ledger.table() == local.training.ledger.table()


def test_layers_have_the_size_of_their_rank() -> None:
    adapter = nn.ModuleDict({"lora_A": nn.Linear(INPUTS, 4, bias=False), "lora_B": nn.Linear(4, OUTPUTS, bias=False)})
    shrink(adapter, of_rank(adapter, 2))
    sizes = {name: (layer.in_features, layer.out_features) for name, layer in adapter.items()}
    assert sizes == {"lora_A": (INPUTS, 2), "lora_B": (2, OUTPUTS)}


def test_a_deployment_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    config = RunConfig.of(options("sfl"))
    whole = in_memory(config, model=ranked, data=data())
    whole.run.run()
    broken = in_memory(config, model=ranked, data=data(), folder=tmp_path)
    for count, _ in enumerate(broken.run, 1):
        if count == 4:
            break
    resumed = in_memory(config, model=ranked, data=data(), folder=tmp_path, resume=True)
    resumed.run.run()
    for k in range(3):
        assert all(torch.equal(t, whole.model(k)[name]) for name, t in resumed.model(k).items())


def test_a_client_of_another_rank_is_refused() -> None:
    theirs, given = partial(ranked, ranks=(2, 4, 1)), RunConfig.of(options("sfl"))
    workers = {k: worker_of(given, k, name=f"client-{k}", model=theirs, data=data()) for k in range(3)}
    with pytest.raises(RefusedError, match="rank of the client's adapters is 2 for the client and 1 for the server"):
        in_memory(given, model=ranked, data=data(), workers=workers).run.run()


class Baked(nn.Module):
    """An adapter whose rank is fixed in its code."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.lora_A, self.lora_B = nn.Parameter(torch.ones(rank, INPUTS)), nn.Parameter(torch.zeros(INPUTS, rank))

    def forward(self, x: Tensor) -> Tensor:
        return x + functional.linear(functional.linear(x, self.lora_A).view(-1, self.rank), self.lora_B)


def test_adapters_that_compute_with_one_rank_alone() -> None:
    model = nn.Sequential(Baked(4), nn.Tanh(), nn.Linear(INPUTS, OUTPUTS))
    model.client_ranks = RANKS
    with pytest.raises(ConfigError, match="computes with factors of one rank alone; give one lora_rank"):
        in_memory(RunConfig.of(options("sfl")), model=model, data=data())


def test_each_keeps_the_whole_model_with_its_own_rank(tmp_path: Path) -> None:
    given = options("sfl", share_server_model=True)
    made = in_memory(RunConfig.of(given), model=ranked, data=data(), folder=tmp_path)
    made.run.run()
    assert set(share(made.run, made.cohort)) == {0, 1, 2}
    x = data()["x_test"].double()
    for k, rank in enumerate(RANKS):
        kept = find_trained(tmp_path / f"client-{k}").model(k, model=ranked)
        assert kept[0].lora_A.shape == (rank, INPUTS)
        assert kept[2].lora_A.shape == (max(RANKS), HIDDEN)
        smashed = made.workers[k].client.lower.eval()((x,))
        assert torch.equal(kept(x), made.run.training.server.model.eval()(smashed))
