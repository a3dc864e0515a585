"""Clients with different cuts: oracles, averaging by name, state, and the runs that cannot have mixed cuts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import ALGORITHMS, client_state, difference, make, mlp, normed, same, source, train, whole
from torch import nn

from cutlayer import ConfigError, Run, checkpoint
from cutlayer.engine.between import Blocks
from cutlayer.errors import CutError, CutlayerWarning
from cutlayer.folder import CHECKPOINT
from cutlayer.models.depths import cut_each
from cutlayer.optim import make_optimizer
from cutlayer.options import RunConfig, traits
from cutlayer.stored import MalformedError
from cutlayer.trained import load_model

SIZES = [9, 5, 7, 8]
CUTS = ["0", "3", "1", "0"]
MIXING = [name for name in ALGORITHMS if traits(name).mixes_cuts]
QUICK = ("sglr", "sflv2", "cyclesfl")
STRICT: dict[str, Any] = {"client_optimizer": "adam", "client_lr": 0.01, "participation": 0.75}


def trained(algorithm: str, cut: Any, **options: Any) -> Run:
    return train(algorithm, make(mlp), SIZES, (6,), **({} if cut is None else {"cut": cut}), **options)


@pytest.mark.parametrize("optimizer", [{}, STRICT])
def test_v1_with_mixed_cuts_is_fedavg_exactly(optimizer: dict[str, Any]) -> None:
    mixed = trained("sflv1", CUTS, local_epochs=2, rounds=3, **optimizer)
    federated = trained("fl", None, local_epochs=2, rounds=3, **optimizer)
    for client in range(len(SIZES)):
        assert difference(whole(mixed, client), client_state(federated, client)) == 0.0
    assert mixed.result.test_score == federated.result.test_score


@pytest.mark.parametrize("algorithm", [pytest.param(a, marks=[] if a in QUICK else pytest.mark.long) for a in MIXING])
def test_mixed_cuts_compute_what_the_deepest_cut_for_all_computes(algorithm: str) -> None:
    mixed, deepest = trained(algorithm, CUTS, **STRICT), trained(algorithm, "3", **STRICT)
    for client in range(len(SIZES)):
        assert difference(whole(mixed, client), whole(deepest, client)) < 1e-12


def test_averaging_is_by_name_over_all_who_have_the_parameter() -> None:
    """Client 0 has only layer 0, and client 1 has all layers but the last: the server holds layer 2 for client 0."""
    run = train("sfl", make(mlp), [4, 8], (6,), cut=["0", "3"], rounds=1, local_epochs=1)
    alone = train("psl", make(mlp), [4, 8], (6,), cut="3", rounds=1)  # the same steps, without the average at the end
    own = [client_state(alone, k) for k in (0, 1)]
    for name in own[0]:
        mean = (4 * own[0][name] + 8 * own[1][name]) / 12
        assert torch.allclose(client_state(run, 0)[name], mean, atol=1e-12)
        assert torch.equal(client_state(run, 0)[name], client_state(run, 1)[name])


@pytest.mark.parametrize("engine", ["auto", "stacked"])
def test_other_engines_give_way_and_say_so(engine: str) -> None:
    if engine == "stacked":
        with pytest.warns(CutlayerWarning, match="different cuts, so that their models cannot be stacked"):
            run = trained("sglr", CUTS, engine=engine)
    else:
        run = trained("sglr", CUTS, engine=engine)
    assert run.training.engine == "local"
    assert same(whole(run, 1), whole(trained("sglr", CUTS), 1))
    assert "Cuts: 0 for clients 0, 3; 3 for client 1; 1 for client 2" in run.training.remarks


@pytest.mark.parametrize("algorithm", ["sglr", "sflv1"])
def test_a_resumed_run_with_mixed_cuts_is_the_uninterrupted_one(algorithm: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"algorithm": algorithm, "clients": 4, "partition": "column", "batch": 5, "rounds": 3}
    options |= {"cut": ["2", "4", "5", "2"], "start": "independent" if algorithm == "sglr" else "equal"}
    options |= {"participation": 0.75, "client_lr": 0.01, "up_codec": "float16", "gaussian_noise": 0.1, "clip": 1.0}

    def new(out: Path) -> Run:
        return Run(model=normed, data=source(SIZES, (6,)), out=out, **options)

    new(tmp_path / "whole").run()
    for count, _ in enumerate(new(tmp_path / "parts"), 1):
        if count == 4:  # in the second or third round
            break
    Run.resume(tmp_path / "parts", model=normed, data=source(SIZES, (6,))).run()
    a, b = (checkpoint.read(tmp_path / name / CHECKPOINT) for name in ("whole", "parts"))
    assert a["rounds"] == b["rounds"] == 3
    for part in ("server", "clients"):
        assert same(a[part], b[part])
    state = load_model(tmp_path / "parts", 0, model=normed).state_dict()
    assert state.keys() == normed().state_dict().keys()


def test_blocks_of_another_run_are_refused() -> None:
    run, blocks = trained("psl", CUTS), trained("psl", ["3", "0", "1", "0"]).training.clients.state()["inner"]["blocks"]
    state = run.training.clients.state()
    state["inner"]["blocks"] = blocks
    with pytest.raises(MalformedError, match=r"it holds the blocks of clients \[1, 2, 3\], where those of \[0, 2, 3\]"):
        run.training.clients.load(state)


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if traits(name).split and name not in MIXING])
def test_who_needs_one_cut_says_why(algorithm: str) -> None:
    with pytest.raises(ConfigError) as error:
        RunConfig.of({"algorithm": algorithm, "clients": 2, "cut": ["hidden1", "hidden2"]}).check(frozenset({"cut"}))
    assert f"not possible with {algorithm}: {traits(algorithm).one_cut}" in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cut": ["0", "3"]}, "cut has 2 entries for 4 clients"),
        ({"cut": ["0", "9", "3", "0"]}, "'9'"),
        ({"cut": "0,,3,0"}, "has an empty name"),
        ({"cut": CUTS, "untie": True}, "untie = True is not possible where clients have different cuts"),
        ({"cut": CUTS, "cache_features": True}, "cache_features = True is not possible where"),
        ({"cut": CUTS, "attack": ["scale:1e6@3"]}, "attack = .* is not possible where"),
        ({"cut": CUTS, "judge": "average"}, "judge = 'average' is not possible where"),
    ],
)
def test_what_mixed_cuts_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises((ConfigError, CutError), match=words):
        trained("psl", **options)


def test_the_deepest_cut_is_found_in_any_order() -> None:
    x = torch.randn(4, 6, dtype=torch.float64)
    depths = cut_each(make(mlp), ["0", "3", "1"], x)
    assert depths.deepest.name == "3"
    assert depths.numbers == (0, 1, 2)
    for client in (0, 2):
        between = depths.of(client).between
        assert between is not None
        (deep,) = between(depths.of(client).parts.client(x))
        assert torch.equal(deep, depths.deepest.parts.client(x)[0])


def test_two_names_of_one_place() -> None:
    nested = make(lambda: nn.Sequential(nn.Sequential(nn.Linear(6, 4), nn.ReLU()), nn.Linear(4, 4)))
    run = train("sfl", nested, [4, 8], (6,), cut=["0.1", "0"])
    assert difference(whole(run), whole(train("sfl", nested, [4, 8], (6,), cut="0"))) == 0.0


def uneven() -> nn.Module:
    """Features [n, 6] -> scores [n, 4]; more crosses at cut 2 than at cut 0."""
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def test_each_client_is_counted_at_its_own_cut() -> None:
    """Computed by hand: each row takes 8 numbers of 8 bytes at the cut of client 0, and 16 at the cut of client 1."""
    fleet: dict[str, Any] = {"client_device": "raspberry-pi-4", "link": "lte", "server_device": "h100"}
    sizes, rounds = [12, 8], 2
    run = train("sfl", make(uneven), sizes, (6,), cut=["0", "2"], rounds=rounds, **fleet)
    ledger, epochs = run.training.ledger, rounds
    crossed = [8 * epochs * n * width for n, width in zip(sizes, (8, 16), strict=True)]
    assert ledger.of_clients("up", "smashed data").tolist() == crossed
    assert ledger.of_clients("down", "cut gradients").tolist() == crossed
    models = [8 * 56, 8 * (56 + 144)]
    assert ledger.of_clients("up", "models").tolist() == [rounds * size for size in models]
    assert ledger.of_clients("down", "models").tolist() == [rounds * size for size in models]
    assert run.result.bytes[1]["wire-broadcast"] == rounds * sum(models)  # models differ: one message each
    alone = [train("sfl", make(uneven), sizes, (6,), cut=cut, rounds=rounds, **fleet) for cut in ("0", "2")]
    each = [run.training.flops_each[k].client.training for k in (0, 1)]
    assert each == [r.training.flops.client.training for r in alone]
    assert run.result.client_flops == sum(rounds * n * own for n, own in zip(sizes, each, strict=True)) / 2
    both = run.result.server_flops + 2 * run.result.client_flops
    for r in alone:  # a cut moves computation between the sides, and the total stays the same
        assert both == pytest.approx(r.result.server_flops + 2 * r.result.client_flops, rel=0.05)
    assert run.training.clock is not None
    assert run.training.clock.state()["server_flops"] == pytest.approx(run.result.server_flops)
    assert alone[0].result.virtual_seconds < run.result.virtual_seconds < alone[1].result.virtual_seconds


class OneLayer(nn.Module):
    """One layer in the form of a model's part: it takes its rows in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2, bias=False)

    def forward(self, rows: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """[n, 2] -> [n, 2]."""
        return self.linear(rows[0])


def test_blocks_say_what_they_cannot_bear_and_stay_as_they_are() -> None:
    """The rows become infinite inside the blocks. A client without blocks accepts them."""
    sgd = make_optimizer("sgd", 0.1, {})
    blocks = Blocks(lambda k: OneLayer() if k else None, sgd, 2)
    block = blocks.of(1)
    assert block is not None
    (weight,) = block.client.module.parameters()
    with torch.no_grad():
        weight.fill_(4.0)
    rows = torch.ones(3, 2)
    assert blocks.bear(1, (rows,))
    assert blocks.bear(0, (rows * 3e38,))
    assert not blocks.bear(1, (rows * 3e38,))  # 4 * 3e38 + 4 * 3e38
    assert not blocks.bear(1, (rows * torch.nan,))
    assert weight.grad is None
    assert block.passed == 0


def test_a_client_that_trains_nothing_gets_no_gradients() -> None:
    """Of the model of client 0, the server holds all trained parameters."""
    options: dict[str, Any] = {"freeze": r"^0\.", "rounds": 1}
    run = train("psl", make(uneven), [12, 8], (6,), cut=["0", "2"], **options)
    assert run.training.ledger.of_clients("down", "cut gradients").tolist() == [0, 8 * 8 * 16]
    assert difference(whole(run), whole(train("psl", make(uneven), [12, 8], (6,), cut="2", **options))) == 0.0
    coded = train("psl", make(uneven), [12, 8], (6,), cut=["0", "2"], up_codec="top-k:0.5", **options)
    assert coded.training.ledger.of_clients("down", "cut gradients")[0] == 0
