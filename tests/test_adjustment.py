"""Logit adjustment: results by hand, properties that must follow, where it has an effect, and costs."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
import torch
from support import CLASSES, call, client_state, difference, make, mlp, server_state, train, whole
from torch import Tensor
from torch.nn import functional

from cutlayer import ConfigError, Run, RunConfig, Source
from cutlayer.adjustment import Adjustment, adjusted, log_prior
from cutlayer.cohort import draw_participants
from cutlayer.data.batches import Batches
from cutlayer.remote.sides import worker_of
from cutlayer.tasks.classification import Classification
from cutlayer.testing import check_algorithm, in_memory, random_source
from cutlayer.wire import messages as m

SIDES = ["client", "server", "both"]


@pytest.mark.parametrize(
    ("algorithm", "side"),
    [
        ("psl", "client"),
        ("sflv1", "both"),
        ("sflv2", "server"),
        ("ssl", "both"),
        ("fl", "client"),
        ("ussl", "client"),
    ],
)
def test_engines_resumed_runs_and_bytes(algorithm: str, side: str) -> None:
    """Clients have different sizes and classes, and only some take part in each round."""
    check_algorithm(algorithm, one_client_is_sgd=False, logit_adjust=side, tau=0.7)


def test_one_union_step() -> None:
    """With averaging after every step, the union step equals the steps of single clients."""
    for algorithm, side in (("sflv1", "both"), ("sflv1", "server"), ("fl", "client")):
        cut = {} if algorithm == "fl" else {"cut": "2"}
        options: dict[str, Any] = {**cut, "local_steps": 1, "rounds": 4, "logit_adjust": side}
        runs = [train(algorithm, make(mlp), [9, 5, 7], (6,), **options, engine=e) for e in ("local", "auto")]
        assert runs[1].training.engine == "union"
        states = [client_state(run) if algorithm == "fl" else whole(run) for run in runs]
        assert difference(*states) < 1e-12


def shift(rows: Tensor, y: Tensor, tau: float) -> Tensor:
    """tau log P of the classes of these rows."""
    shares = y[rows].bincount(minlength=CLASSES).double() / len(rows)
    return (shares**tau + 1e-12).log()


def by_hand(source: Source, sizes: list[int], here: list[int], side: str, tau: float) -> dict[str, Tensor]:
    """Parameters after one PSL step by the paper's rule: those of the first client of `here`, and the server's."""
    net = make(mlp)
    lower, upper = net[:3], net[3:]
    owned = dict(enumerate(torch.arange(sum(sizes)).split(sizes)))
    batches = Batches([owned[k].numpy() for k in range(len(sizes))], 4, 0)
    drawn = {k: batches.draw([k])[0] for k in here}
    y = source.train.y
    at = torch.cat([drawn[k] for k in here])
    everyone = shift(torch.cat([owned[k] for k in here]), y, tau)
    scores = upper(lower(source.train.x[at]).detach())
    loss = functional.cross_entropy(scores + everyone if side != "client" else scores, y[at])
    mine = torch.autograd.grad(loss, list(upper.parameters()))
    k = here[0]
    scores = upper(lower(source.train.x[drawn[k]]))
    own = functional.cross_entropy(scores + shift(owned[k], y, tau) if side != "server" else scores, y[drawn[k]])
    theirs = torch.autograd.grad(own, list(lower.parameters()))
    named = [*zip(upper.named_parameters(), mine, strict=True), *zip(lower.named_parameters(), theirs, strict=True)]
    return {name: p.detach() - 0.1 * g for (name, p), g in named}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("participation", [1.0, 0.6])
def test_one_step_is_the_rule(side: str, participation: float) -> None:
    """Both gradients are computed with the old server. P_S is the distribution of the round's participants."""
    sizes = [9, 4, 7]
    options: dict[str, Any] = {"logit_adjust": side, "tau": 1.5, "participation": participation}
    run = train("psl", make(mlp), sizes, (6,), cut="2", rounds=1, **options)
    here = list(draw_participants(0, 0, 3, participation))
    first = Run(run.config, model=make(mlp), data=random_source(sizes, (6,), classes=CLASSES))
    next(iter(first))
    expected = by_hand(first.training.source, sizes, here, side, 1.5)
    assert difference({k: expected[k] for k in server_state(first)}, server_state(first)) < 1e-14
    mine = client_state(first, here[0])
    assert difference({k: expected[k] for k in mine}, mine) < 1e-14


def even(sizes: tuple[int, ...]) -> Source:
    """Clients in which all classes are equally frequent."""
    source = random_source(sizes, (6,), classes=CLASSES)
    source.train.y[:] = torch.arange(sum(sizes)) % CLASSES
    return source


@pytest.mark.parametrize("algorithm", ["psl", "sflv1", "sflv2", "ssl", "fl"])
def test_equal_shares_change_nothing_but_roundings(algorithm: str) -> None:
    """Every score is shifted by the same constant."""
    states = []
    for side in ("none", "client", *(() if algorithm == "fl" else ("server", "both"))):
        cut = {} if algorithm == "fl" else {"cut": "2"}
        options: dict[str, Any] = {"client_optimizer": "sgd", "client_lr": 0.1, "engine": "local", **cut}
        run = Run(
            algorithm=algorithm, model=make(mlp), data=even((8, 12, 4)), clients=3, partition="column", batch=5,
            precision="float64", rounds=3, logit_adjust=side, **options,
        )  # fmt: skip
        run.run()
        states.append(client_state(run) if algorithm == "fl" else whole(run, run.training.clients.holder or 0))
    assert all(0 <= difference(states[0], state) < 1e-13 for state in states[1:])


@pytest.mark.parametrize("algorithm", ["psl", "sflv1", "fl"])
def test_tau_0_changes_nothing_at_all(algorithm: str) -> None:
    """Equal bit for bit; with tau = 1, the result changes."""
    cut = {} if algorithm == "fl" else {"cut": "2"}
    runs = [
        train(algorithm, make(mlp), [9, 5, 7], (6,), **cut, **own)
        for own in ({}, {"logit_adjust": "client", "tau": 0.0}, {"logit_adjust": "client"})
    ]
    plain, nothing, one = (client_state(run) for run in runs)
    assert difference(plain, nothing) == 0.0
    assert difference(plain, one) > 1e-6


def test_gradients_of_scores_sum_to_0() -> None:
    """For each row, since a softmax of shifted scores is a softmax. Other outputs are shifted if they have a weight."""
    scores = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    prior = log_prior(torch.tensor([3, 0, 1, 9]), 2.0)
    task = Classification(auxiliary_weights=(0.5,))
    outputs = adjusted((scores, scores * 2, scores * 3), prior, task)
    task.row_losses(outputs, torch.tensor([0, 1, 2, 3, 3])).sum().backward()
    assert scores.grad is not None
    assert scores.grad.sum(1).abs().max() < 1e-14
    assert torch.equal(outputs[1], scores * 2 + prior)
    assert torch.equal(outputs[2], scores * 3)


def test_priors() -> None:
    """Priors for absent classes, for clients without rows that count, and for the participants alone."""
    found = log_prior(torch.tensor([[1, 3, 0], [0, 0, 0]]), 2.0)
    assert found[0].tolist() == pytest.approx([2 * math.log(0.25), 2 * math.log(0.75), math.log(1e-12)])
    assert found[1].tolist() == pytest.approx([2 * math.log(1 / 3)] * 3)
    adjustment = Adjustment("both", 1.0, [[2, 2], [9, 1], [1, 1]])
    adjustment.begin([0, 2])
    assert adjustment._server.tolist() == pytest.approx([math.log(0.5)] * 2)
    task = Classification(ignore_index=-1)
    assert task.occurrences(torch.tensor([0, 2, -1, 2]), 4).tolist() == [1, 0, 2, 0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tau": 2.0}, "tau = 2 has no effect without logit_adjust"),
        ({"algorithm": "fl", "logit_adjust": "both"}, "fl, whose server sees no labels: choose client"),
        ({"algorithm": "ussl", "tail_cut": "hidden3", "logit_adjust": "server"}, "ussl, whose server sees no labels"),
        ({"algorithm": "cl", "logit_adjust": "client"}, "logit_adjust = 'client' has no effect on cl"),
    ],
)
def test_where_it_has_no_effect(options: dict[str, Any], sentence: str) -> None:
    """The error is raised before anything is trained."""
    with pytest.raises(ConfigError, match=sentence):
        RunConfig.of(options).check(frozenset(options))


def test_one_class_per_row_is_needed() -> None:
    """Regression has no classes."""
    said = call("run", "--task", "regression", "--logit-adjust", "client", "--data", "digits", "--model", "mlp", code=2)
    assert "needs one class per row, which the targets of the task 'regression' are not" in said.stderr


def test_what_it_costs() -> None:
    """No further bytes. A second backward pass of the server, unless one loss serves both sides."""
    found = {}
    for side in ("none", "client", "both"):
        for name, sizes in (("skewed", [9, 5, 7]), ("alone", [9])):
            run = train("psl", make(mlp), sizes, (6,), cut="2", logit_adjust=side)
            assert run.result is not None
            found[side, name] = run.result
    plain, client = found["none", "skewed"], found["client", "skewed"]
    assert plain.server_flops
    assert client.server_flops
    assert (plain.bytes_up, plain.bytes_down) == (client.bytes_up, client.bytes_down)
    assert plain.server_flops < client.server_flops < 1.5 * plain.server_flops
    assert found["both", "alone"].server_flops == found["none", "alone"].server_flops
    assert found["both", "skewed"].server_flops == client.server_flops


def test_counts_are_announced_and_checked() -> None:
    """A server that adjusts logits receives the class counts of its clients. Other servers do not."""
    options: dict[str, Any] = {"clients": 3, "model": "mlp", "samples_per_client": 40}
    for algorithm, side, told in (("psl", "both", True), ("psl", "none", False), ("fl", "client", False)):
        config = RunConfig.of({**options, "algorithm": algorithm, "logit_adjust": side})
        hello = worker_of(config, 1, name="client-1").hello()
        assert (sum(hello.counts) == hello.samples == 40) is told
    there = in_memory(RunConfig.of({**options, "algorithm": "psl", "logit_adjust": "both", "rounds": 1}))
    there.run.run()
    cohort = there.cohort
    counts = [list(own) for own in cohort.setup.class_counts]
    assert [sum(own) for own in counts] == [40, 40, 40]
    assert cohort.state()["class counts"] == counts
    hello = there.workers[0].hello()
    for wrong in (hello.counts[1:], [n + 1 for n in hello.counts], hello.counts[::-1]):
        refused = there.greet(msgspec.structs.replace(hello, counts=wrong), 0)
        assert isinstance(refused, m.Refused)
        assert refused.reason == "client"
