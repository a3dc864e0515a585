"""CSE-FSL, FSL-SAGE and Ampere: special cases with known results, steps worked out by hand, and the heads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support import batches_of, client_state, difference, make, mlp, samples, server_state, train
from torch import Tensor, nn
from torch.nn import functional

from cutlayer import ConfigError, seeds
from cutlayer.algorithms.fslsage import FslSage
from cutlayer.models.auxiliary import AuxiliaryHead, PooledHead
from cutlayer.optim import make_optimizer
from cutlayer.remote.worker import _SERVED
from cutlayer.server import Server
from cutlayer.tasks.classification import Classification
from cutlayer.types import Rows, Smashed
from cutlayer.wire import messages as m

TIGHT = 1e-14
NAMES = ("cse-fsl", "fsl-sage", "ampere")
HEADS = """
import torch
from support import make, mlp
from torch import nn

def upper(smashed, classes):
    return make(mlp)[3:]  # the server's part as it is in the beginning

def lazy(smashed, classes):
    return nn.Sequential(nn.ReLU(), nn.LazyLinear(classes))

def lazily_unfit(smashed, classes):
    return nn.Sequential(nn.Flatten(3), nn.LazyLinear(classes))

def wrong(smashed, classes):
    return nn.Linear(smashed.width, classes)

def text(smashed, classes):
    return "a head"

def unfit(smashed, classes):
    return nn.Linear(5, classes)

def narrow(smashed, classes):
    return nn.Linear(8, classes - 1)

class Empty(nn.Module):
    def forward(self, smashed):
        return smashed[:, :4]

def empty(smashed, classes):
    return Empty()
"""


@pytest.fixture
def heads(tmp_path: Path) -> Path:
    """A file with the user's own heads."""
    path = tmp_path / "heads.py"
    path.write_text(HEADS)
    return path


def lower(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A client's part, without its head."""
    return {n: t for n, t in state.items() if not n.startswith("auxiliary.")}


# ---- a head that is the server ---------------------------------------------------------------------------------------


def test_one_client_with_the_server_as_its_head_is_split_learning(heads: Path) -> None:
    """CSE-FSL with h = 1: the head and the server start equal, see the same rows, and so stay equal."""
    own = train("cse-fsl", make(mlp), [10], (6,), cut="2", upload_every=1, aux=f"{heads}:upper")
    split = train("ssl", make(mlp), [10], (6,), cut="2")
    assert difference(lower(client_state(own)), client_state(split)) < TIGHT
    assert difference(server_state(own), server_state(split)) < TIGHT
    heads_last = client_state(own)["auxiliary.head.4.weight"]
    assert difference({"w": heads_last}, {"w": server_state(own)["4.weight"]}) < TIGHT


def test_a_head_that_is_the_server_gives_the_servers_gradients(heads: Path) -> None:
    """FSL-SAGE with a frozen server: the clients train as they do with the server's own gradients."""
    options: dict[str, Any] = {"cut": "2", "freeze": "^4", "rounds": 3}
    sage = {"upload_every": 1, "align_every": 1, "aux": f"{heads}:upper"}
    estimated = train("fsl-sage", make(mlp), [10, 6], (6,), **options, **sage)
    given = train("sfl", make(mlp), [10, 6], (6,), **options)
    for k in range(2):
        assert difference(lower(client_state(estimated, k)), client_state(given, k)) < TIGHT


def uploads(count: int, scale: str) -> tuple[FslSage, Server, Rows, Tensor, Rows]:
    """Rows, labels, and the server's gradients, each of the row's own loss or of the mean loss of 5 rows."""
    sage = FslSage(align_scale=scale, align_batch=5)
    torch.manual_seed(0)
    part = nn.Sequential(nn.Linear(6, 4)).double()
    server = Server(Last(part), make_optimizer("sgd", 0.1, {}), 0.1)
    data = samples(count, (6,))
    gradients = []
    for start in range(0, count, 5):
        own = slice(start, start + 5)
        step = server.gradients(Smashed((data.x[own],), data.y[own], (0,), (5,)))
        gradients.append(step.gradient[0] * (5 if scale == "row" else 1))
    return sage, server, (data.x,), data.y, (torch.cat(gradients),)


class Last(nn.Module):
    """A server part that takes a single tensor."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, rows: Rows) -> Tensor:
        scores: Tensor = self.part(rows[0])
        return scores


@pytest.mark.parametrize("scale", ["row", "mean"])
def test_an_aligned_head_stays_as_it_is(scale: str) -> None:
    """A head that equals the server: its estimates are the gradients, so there is nothing to fit."""
    sage, server, rows, labels, gradients = uploads(20, scale)
    batch = slice(0, 20) if scale == "row" else slice(0, 5)
    estimate = sage.estimate(server.model, Classification(), (rows[0][batch],), labels[batch])
    assert (estimate[0] - gradients[0][batch]).abs().max() < TIGHT
    before = {n: t.clone() for n, t in server.model.state_dict().items()}
    rate = FslSage(align_scale=scale, align_batch=5, align_lr=1e-9)  # Adam turns rounding errors into steps of lr
    rate.fit(server.model, Classification(), rows, labels, gradients)
    assert difference(server.model.state_dict(), before) < 1e-7


def test_a_fitted_head_estimates_better() -> None:
    sage, _, rows, labels, gradients = uploads(200, "row")
    torch.manual_seed(1)
    head = AuxiliaryHead(PooledHead(rows, 4), rows).double()

    def error() -> float:
        return (sage.estimate(head, Classification(), rows, labels)[0] - gradients[0]).square().mean().item()

    before = error()
    FslSage(align_lr=0.05, align_epochs=20).fit(head, Classification(), rows, labels, gradients)
    assert error() < 0.2 * before


# ---- by hand ---------------------------------------------------------------------------------------------------------


def frozen_lower(x: Tensor) -> Tensor:
    """The output of the untrained part below cut 2."""
    return make(mlp)[:3](x).detach()


def served(batches: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The server's part after training on these batches one after another."""
    upper = make(mlp)
    for rows, labels in batches:
        upper.zero_grad()
        functional.cross_entropy(upper[3:](rows), labels).backward()
        with torch.no_grad():
            for p in upper[3:].parameters():
                assert p.grad is not None
                p -= 0.1 * p.grad
    return {n: t.detach() for n, t in upper.state_dict().items() if n.startswith("4.")}


STILL: dict[str, Any] = {"client_lr": 1e-13, "server_lr": 0.1}
"""Client parts practically do not change, so the test knows what they send."""


@pytest.mark.parametrize("name", ["cse-fsl", "fsl-sage"])
def test_the_server_steps_upload_by_upload_in_the_order_of_arrival(name: str) -> None:
    """In a round with batches 0, 1 and 2 and h = 2, the server sees batches 0 and 2, one client after another."""
    run = train(name, make(mlp), [10, 12, 9], (6,), cut="2", upload_every=2, rounds=2, **STILL)
    data, streams, order = run.training.source.train, batches_of([10, 12, 9], 4), []
    for index in range(2):
        drawn = [[stream.next() for _ in range(3)] for stream in streams]
        for turn in range(2):
            for k in seeds.generator(0, "arrivals", index, turn).permutation(3):
                at = drawn[k][2 * turn]
                order.append((frozen_lower(data.x[at]), data.y[at]))
    found = {n: t for n, t in server_state(run).items() if n.startswith("4.")}
    assert difference(found, served(order)) < 1e-11


def test_amperes_server_trains_on_the_pool_alone() -> None:
    """The server trains for two epochs on all rows, shuffled."""
    run = train("ampere", make(mlp), [10, 7], (6,), cut="2", rounds=4, pool_batch=5, **STILL)
    data, streams = run.training.source.train, batches_of([10, 7], 4)
    drawn = [torch.cat([stream.next() for _ in range(3 * stream.per_epoch)][-stream.per_epoch :]) for stream in streams]
    rows = torch.cat(drawn)
    batches = []
    for index in (2, 3):
        order = torch.randperm(17, generator=seeds.torch_generator(0, "pool", index))
        batches += [(frozen_lower(data.x[rows[at]]), data.y[rows[at]]) for at in order.split(5)]
    found = {n: t for n, t in server_state(run).items() if n.startswith("4.")}
    assert difference(found, served(batches)) < 1e-11
    sent = run.training.ledger.of_clients("up", "smashed data").tolist()
    assert sent == [10 * 8 * 8, 7 * 8 * 8]  # each row is sent once and has 8 numbers
    assert run.training.ledger.total("down", kind="cut gradients") == 0


def test_ampere_trains_clients_as_cse_fsl_does() -> None:
    """In both algorithms, the server has no influence on the clients."""
    ampere = train("ampere", make(mlp), [10, 7], (6,), cut="2", rounds=4)
    other = train("cse-fsl", make(mlp), [10, 7], (6,), cut="2", rounds=2)
    for k in range(2):
        assert difference(client_state(ampere, k), client_state(other, k)) < TIGHT


def test_ampere_pools_whom_it_meets_late() -> None:
    """Clients that are not drawn when the server's rounds begin send their rows once, when they are drawn later."""
    run = train("ampere", make(mlp), [8] * 5, (6,), cut="2", rounds=12, participation=0.4)
    sent = run.training.ledger.of_clients("up", "smashed data").tolist()
    assert set(sent) <= {0, 8 * 8 * 8}
    assert sum(map(bool, sent)) > 2


def test_ampere_needs_a_round_for_each_side() -> None:
    with pytest.raises(ConfigError, match="rounds = 1 is not enough for ampere"):
        train("ampere", make(mlp), [8, 8], (6,), cut="2", rounds=1)


# ---- heads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["local", "stacked"])
def test_fitted_heads_are_each_clients_own_and_go_down_in_their_rounds(engine: str) -> None:
    """Heads are sent in rounds 0, 2 and 4 of five. Averaging makes the models equal and does not touch the heads."""
    run = train("fsl-sage", make(mlp), [10, 7], (6,), cut="2", rounds=5, align_every=2, engine=engine)
    a, b = (client_state(run, k) for k in range(2))
    assert difference(lower(a), lower(b)) == 0.0
    assert difference({n: t for n, t in a.items() if n.startswith("aux")}, {n: b[n] for n in b if "aux" in n}) > 1e-6
    head = 8 * (8 * 4 + 4)
    assert run.training.ledger.of_clients("down", "heads").tolist() == [3 * head, 3 * head]
    kept = run.training.server.kept
    assert all(torch.equal(kept[f"{k} head {n}"], s[f"auxiliary.{n}"]) for k, s in ((0, a), (1, b)) for n in
               ("head.linear.weight", "head.linear.bias"))  # fmt: skip


def test_the_server_keeps_the_last_rows() -> None:
    run = train("fsl-sage", make(mlp), [10, 7], (6,), cut="2", rounds=3, upload_every=1, align_rows=6)
    kept = run.training.server.kept
    assert {len(t) for n, t in kept.items() if " head " not in n} == {6}
    assert kept["0 gradients 0"].shape == kept["0 smashed 0"].shape == (6, 8)


BAD = [
    ("wrong", r"the auxiliary head '.*heads.py:wrong' failed at .*AttributeError: .*'width'\): correct its code"),
    ("lazily_unfit", "failed .*: correct its code"),
    ("text", "gives str: return a torch.nn.Module"),
    ("unfit", r"does not take smashed data of shape \(8,\) \(RuntimeError.*cut elsewhere"),
    ("narrow", r"gives \(3, 3\) for smashed data of shape \(8,\), but the model \(3, 4\): make one"),
    ("empty", "has no parameters, so it cannot learn"),
    ("missing", "'missing'"),
]


@pytest.mark.parametrize("engine", ["local", "stacked"])
def test_a_head_with_lazy_layers(engine: str, heads: Path) -> None:
    options: dict[str, Any] = {"cut": "2", "engine": engine, "aux": f"{heads}:lazy", "upload_every": 1}
    run = train("cse-fsl", make(mlp), [8, 8], (6,), **options)
    assert client_state(run)["auxiliary.head.1.weight"].shape == (4, 8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("make_head", "sentence"), BAD)
def test_heads_that_do_not_fit(name: str, make_head: str, sentence: str, heads: Path) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        train(name, make(mlp), [8, 8], (6,), cut="2", aux=f"{heads}:{make_head}")
    assert "\n" not in str(caught.value)


def test_only_algorithms_that_need_it_let_heads_come_down() -> None:
    assert _SERVED[m.TakeHead].verbs == {"align"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", ["client", "server", "both"])
def test_logits_can_be_adjusted(name: str, side: str) -> None:
    runs = [
        train(name, make(mlp), [10, 7], (6,), cut="2", logit_adjust=side, engine=engine)
        for engine in ("local", "stacked")
    ]
    plain = train(name, make(mlp), [10, 7], (6,), cut="2")
    one, other = ({**client_state(r, 1), **server_state(r)} for r in runs)
    assert difference(one, other) < 1e-12
    assert difference(one, {**client_state(plain, 1), **server_state(plain)}) > 1e-6


def test_a_fitting_goes_on_from_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    fit, seen = FslSage.fit, []

    def watched(self: FslSage, head: nn.Module, *rest: Any) -> None:
        before = {n: t.clone() for n, t in head.state_dict().items()}
        fit(self, head, *rest)
        seen.append((before, {n: t.clone() for n, t in head.state_dict().items()}))

    monkeypatch.setattr(FslSage, "fit", watched)
    train("fsl-sage", make(mlp), [10, 7], (6,), cut="2", rounds=2, align_every=1)
    assert len(seen) == 4  # two clients in two rounds
    assert difference(seen[0][1], seen[2][0]) == difference(seen[1][1], seen[3][0]) == 0.0
    assert difference(*seen[2]) > 0
