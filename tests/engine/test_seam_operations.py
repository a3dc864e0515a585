"""Operations of the seam and the server that no built-in algorithm uses, called as an outside algorithm would."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support import client_state, difference, make, mlp, samples, server_state, train
from torch import Tensor, nn
from torch.nn import functional

from cutlayer import ConfigError
from cutlayer.algorithms import Algorithm, algorithm
from cutlayer.algorithms.common import Scaled, report, sample_weights
from cutlayer.cohort import Cohort
from cutlayer.engine.stacked import StackedCohort
from cutlayer.errors import CutlayerWarning
from cutlayer.gradients import own
from cutlayer.models.auxiliary import PooledHead
from cutlayer.optim import make_optimizer
from cutlayer.plugins import option
from cutlayer.server import Server
from cutlayer.types import Round, Rows, Smashed, Step
from cutlayer.verbs import AVERAGE, BACKWARD, FORWARD, LEARN, STEP_COPIES, TAIL

TIGHT = 1e-12


@algorithm("u-psl", title="U-shaped PSL", needs={FORWARD, TAIL, BACKWARD})
class UShapedPsl(Scaled):
    """PSL whose labels stay with the clients: several U-shaped clients in one step."""

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        while smashed := clients.forward(labels=False):
            features = replace(smashed, rows=server.forward(smashed))
            step = server.backward(smashed, clients.tail(features))
            clients.backward(own(step.gradient, smashed, self.gradient_scale))
            yield report(step, smashed)


@algorithm("local-loss", title="Local losses", needs={FORWARD, LEARN, AVERAGE})
class LocalLoss(Algorithm):
    """Clients train on the loss of their heads. Every `upload_every`-th batch goes up. A round ends with averaging."""

    upload_every: int = option(1, ge=1)

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        trained: set[int] = set()
        while smashed := clients.forward():
            step = server.step(smashed)
            clients.learn(self.upload_every)
            trained |= set(smashed.clients)
            yield report(step, smashed)
        clients.average(sample_weights(clients, trained))


def test_several_u_shaped_clients_are_parallel_split_learning() -> None:
    """With equal rates, the tails train as if they belonged to the server.

    The lower layers and the middle are equal after one step from equal starts. The tails differ between clients, since
    each tail steps with its own gradient.
    """
    options: dict[str, Any] = {"cut": "0", "rounds": 1}
    u = train(UShapedPsl, make(mlp), [4, 4, 4], (6,), tail_cut="2", **options)
    psl = train("psl", make(mlp), [4, 4, 4], (6,), **options)
    lower = {n: t for n, t in client_state(u, 1).items() if n.startswith("0.")}
    assert difference(lower, client_state(psl, 1)) < TIGHT
    middle = server_state(u)
    assert difference(middle, {n: t for n, t in server_state(psl).items() if n in middle}) < TIGHT


def test_unequal_u_shaped_clients_count_by_their_rows() -> None:
    options: dict[str, Any] = {"cut": "0", "rounds": 1, "batch": 8}
    u = train(UShapedPsl, make(mlp), [7, 3, 5], (6,), tail_cut="2", **options)
    psl = train("psl", make(mlp), [7, 3, 5], (6,), **options)
    middle = server_state(u)
    assert difference(middle, {n: t for n, t in server_state(psl).items() if n in middle}) < TIGHT


@algorithm("known-head", title="Known head", needs={FORWARD, LEARN, AVERAGE})
class Known(LocalLoss):
    """Its head is a copy of the server's part."""

    def head(self, smashed: Rows, classes: int) -> nn.Module:
        return copy.deepcopy(make(mlp)[3:])


def test_a_head_that_is_the_server_makes_a_local_loss_split_learning() -> None:
    """If its one client uploads every batch, this is sequential split learning without a gradient from the server."""
    own_loss = train(Known, make(mlp), [10], (6,), cut="2")
    split = train("ssl", make(mlp), [10], (6,), cut="2")
    lower = {n: t for n, t in client_state(own_loss).items() if not n.startswith("auxiliary.")}
    assert difference(lower, client_state(split)) < TIGHT
    assert difference(server_state(own_loss), server_state(split)) < TIGHT


def test_local_steps_between_uploads() -> None:
    """8 samples in batches of 2. If every second batch is uploaded, a round has two server steps and half of the bytes;
    only averaged models come down. Every client takes four steps in either case.
    """
    options: dict[str, Any] = {"cut": "2", "batch": 2}
    runs = {n: train(LocalLoss, make(mlp), [8, 8], (6,), upload_every=n, **options) for n in (1, 2)}
    up = {n: r.training.ledger.total("up", kind="smashed data") for n, r in runs.items()}
    assert up[2] * 2 == up[1]
    for run in runs.values():
        assert run.training.ledger.total("down", kind="cut gradients") == 0
        assert run.training.clients.state()["inner"]["drawn"] == [8, 8]
    assert (runs[1].steps, runs[2].steps) == (8, 4)


def test_heads_are_averaged_with_their_models() -> None:
    run = train(LocalLoss, make(mlp), [8, 4], (6,), cut="2")
    states = [client_state(run, k) for k in range(2)]
    assert any(name.startswith("auxiliary.") for name in states[0])
    assert difference(*states) == 0.0


@algorithm("understated", title="Understated", needs={FORWARD})
class Understated(UShapedPsl):
    """Calls more verbs than it declares."""


def test_a_verb_that_is_not_needed_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"calls clients.tail\(\), but its needs are forward: add TAIL"):
        train(Understated, make(mlp), [4, 4], (6,), cut="2")


def copies_round(server: Server, clients: Cohort) -> Iterator[Step]:
    while smashed := clients.forward():
        step = server.step_copies(smashed)
        clients.backward(own(step.gradient, smashed))
        yield report(step, smashed)


@algorithm("undeclared-copies", title="Undeclared copies", needs={FORWARD, BACKWARD})
class UndeclaredCopies(Algorithm):
    """Steps copies of the server without declaring it."""

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        yield from copies_round(server, clients)


@algorithm("undeclared-averaging", title="Undeclared averaging", needs={FORWARD, BACKWARD, AVERAGE})
class UndeclaredAveraging(Algorithm):
    """Averages copies of the server without declaring it."""

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        server.average_copies(sample_weights(clients, this.clients))
        yield from copies_round(server, clients)


@algorithm("undeclared-turns", title="Undeclared turns", needs={FORWARD, BACKWARD, STEP_COPIES})
class UndeclaredTurns(Algorithm):
    """Steps on the rows of one client after another without declaring it."""

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        while smashed := clients.forward():
            step = server.step_in_turn(smashed, smashed.clients)
            clients.backward(own(step.gradient, smashed))
            yield report(step, smashed)


@pytest.mark.parametrize("engine", ["local", "stacked", "auto"])
@pytest.mark.parametrize(
    ("made", "call", "verb"),
    [
        (UndeclaredCopies, "step_copies", "STEP_COPIES"),
        (UndeclaredAveraging, "average_copies", "STEP_COPIES"),
        (UndeclaredTurns, "step_in_turn", "STEP_EACH"),
    ],
)
def test_what_is_asked_of_the_server_must_be_declared_too(made: Any, call: str, verb: str, engine: str) -> None:
    with pytest.raises(ConfigError, match=rf"calls server\.{call}\(\), but its needs are .*: add {verb} \("):
        train(made, make(mlp), [8, 8], (6,), cut="2", engine=engine)


@algorithm("late-copies", title="Late copies", needs={FORWARD, BACKWARD, STEP_COPIES})
class LateCopies(Algorithm):
    """In the first round, all clients share one server; later, each client gets a copy of it."""

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        if this.index:
            yield from copies_round(server, clients)
            return
        while smashed := clients.forward():
            step = server.step(smashed)
            clients.backward(own(step.gradient, smashed))
            yield report(step, smashed)


def test_copies_start_from_the_trained_server_on_both_engines() -> None:
    one, other = (
        train(LateCopies, make(mlp), [8, 8, 8], (6,), cut="2", engine=engine, rounds=3)
        for engine in ("local", "stacked")
    )
    assert other.training.engine == "stacked"
    assert difference(client_state(one, 2), client_state(other, 2)) < TIGHT
    assert difference(server_state(one), server_state(other)) < TIGHT


@algorithm("copies-at-once", title="Copies at once", needs={FORWARD, BACKWARD, STEP_COPIES})
class CopiesAtOnce(Algorithm):
    """Averages the copies before any of them has stepped."""

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        server.average_copies(sample_weights(clients, this.clients))
        yield from copies_round(server, clients)


def test_copies_can_be_averaged_before_they_step() -> None:
    one, other = (
        train(CopiesAtOnce, make(mlp), [8, 8], (6,), cut="2", engine=engine) for engine in ("local", "stacked")
    )
    assert difference(client_state(one, 1), client_state(other, 1)) < TIGHT
    assert difference(server_state(one), server_state(other)) < TIGHT


@algorithm("falsely-averaged", title="Falsely averaged", needs={FORWARD, BACKWARD, AVERAGE})
class FalselyAveraged(Algorithm):
    """Claims to average by sample counts after every step, but averages only one client's model."""

    @property
    def averages_every_step(self) -> bool:
        return True

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        while smashed := clients.forward():
            step = server.step(smashed)
            clients.backward(own(step.gradient, smashed))
            clients.average({0: 1.0})
            yield report(step, smashed)


def test_a_false_statement_about_averaging_is_an_error() -> None:
    with pytest.raises(ConfigError, match="averages_every_step is true, but it averages other clients"):
        train(FalselyAveraged, make(mlp), [8, 8], (6,), cut="2", engine="auto")


def test_a_pooled_head_takes_whatever_crosses() -> None:
    images, features = torch.randn(3, 5, 4, 4), torch.randn(3, 7)
    assert PooledHead((images,), 4)(images).shape == (3, 4)
    assert PooledHead((torch.ones(3, 2, dtype=torch.long), features), 4)(images, features).shape == (3, 4)


def test_a_penalty_needs_the_servers_gradient() -> None:
    with pytest.raises(ConfigError, match="nopeek adds to the loss that comes through the server"):
        train(LocalLoss, make(mlp), [8, 8], (6,), cut="2", nopeek=1.0)


def test_an_engine_that_lacks_a_verb_is_refused_or_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"engine = 'stacked' cannot run ssl, which needs hand_over"):
        train("ssl", make(mlp), [8, 8], (6,), cut="2", engine="stacked")
    monkeypatch.setattr(StackedCohort, "can", StackedCohort.can - {LEARN})
    with pytest.warns(CutlayerWarning, match="it needs learn, which the stacked engine cannot do"):
        run = train(LocalLoss, make(mlp), [8, 8], (6,), cut="2", engine="auto")
    assert run.training.engine == "local"


def test_virtual_time_of_local_steps() -> None:
    """Every client computes all its batches, uploaded or not. Fewer uploads take less time."""
    fleet: dict[str, Any] = {"client_device": "raspberry-pi-4", "link": "lte"}
    common: dict[str, Any] = {"cut": "2", "batch": 2, **fleet}
    seldom = train(LocalLoss, make(mlp), [8, 6], (6,), upload_every=2, **common)
    often = train(LocalLoss, make(mlp), [8, 6], (6,), upload_every=1, **common)
    psl = train("psl", make(mlp), [8, 6], (6,), **common)
    for run in (seldom, often):
        heads = 2 * np.array([8, 6]) * 3 * 2 * 8 * 4  # two rounds; forward, backward to weights and rows; 8 x 4
        assert run.training.clock.flops == pytest.approx(psl.training.clock.flops + heads)
    assert seldom.training.clock.now < often.training.clock.now


def server_of(seed: int = 0) -> Server:
    return Server(make(Upper, seed), make_optimizer("sgd", 0.1, {}), 0.1)


class Upper(nn.Module):
    """The server's part: rows [R, 6] -> scores [R, 4], with batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 4))

    def forward(self, rows: Rows) -> Tensor:
        scores: Tensor = self.layers(rows[0])
        return scores


def sent() -> Smashed:
    data = samples(9, (6,))
    return Smashed((data.x,), data.y, (0, 1), (5, 4))


def test_gradients_without_a_step_are_those_of_a_step() -> None:
    stepping, still = server_of(), server_of()
    before = copy.deepcopy(still.model.state_dict())
    step, seen = stepping.step(sent()), still.gradients(sent())
    assert torch.equal(step.gradient[0], seen.gradient[0])
    assert torch.equal(step.means, seen.means)
    assert seen.lr == 0.0
    assert all(torch.equal(p, before[n]) for n, p in still.model.named_parameters())


def test_running_statistics_are_used_and_kept() -> None:
    server = server_of()
    before = copy.deepcopy(server.model.state_dict())
    server.gradients(sent(), running_statistics=True)
    assert all(torch.equal(t, before[n]) for n, t in server.model.state_dict().items())
    assert server.step(sent()).gradient[0].shape == (9, 6)  # the server is back in training mode
    assert not torch.equal(server.model.state_dict()["layers.0.running_mean"], before["layers.0.running_mean"])


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_step_on_made_up_rows_is_a_step(factor: float) -> None:
    a, b = server_of(), server_of()
    a.step(sent(), factor)
    loss = b.step_on(sent().rows, sent().labels, factor)
    assert difference(a.model.state_dict(), b.model.state_dict()) == 0.0
    assert float(loss) == pytest.approx(float(server_of().gradients(sent()).means[0]), rel=1e-12)


@pytest.mark.parametrize("sizes", [(3, 3, 3), (5, 4)])
def test_mean_losses_of_all_rows_and_of_each_clients(sizes: tuple[int, ...]) -> None:
    rows = replace(sent(), clients=tuple(range(len(sizes))), sizes=sizes)
    server = server_of()
    losses = functional.cross_entropy(copy.deepcopy(server.model)(rows.rows), rows.labels, reduction="none")
    expected = [losses.mean(), *(part.mean() for part in losses.split(list(sizes)))]
    assert torch.allclose(server.step(rows).means, torch.stack(expected).detach(), rtol=1e-12)


def test_a_loss_of_ones_own() -> None:
    """Logit adjustment by a constant changes nothing. By a prior, it changes the gradient."""
    prior = torch.tensor([0.7, 0.1, 0.1, 0.1], dtype=torch.float64)

    def adjusted(shift: Tensor) -> Any:
        return lambda outputs, labels: functional.cross_entropy(outputs + shift, labels, reduction="none")

    plain = server_of().gradients(sent())
    same = server_of().gradients(sent(), adjusted(torch.full((4,), 3.0, dtype=torch.float64)))
    moved = server_of().gradients(sent(), adjusted(prior.log()))
    assert (plain.gradient[0] - same.gradient[0]).abs().max() < TIGHT
    assert (plain.gradient[0] - moved.gradient[0]).abs().max() > 1e-3
    server = server_of()
    server.step(sent(), loss=adjusted(prior.log()))
    assert difference(server.model.state_dict(), server_of().model.state_dict()) > 1e-4
