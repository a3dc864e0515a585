"""Algorithms in which the server trains before it answers: special cases with known results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import client_state, difference, make, mlp, server_state, train
from torch import nn
from torch.nn import functional

from cutlayer.algorithms import algorithm
from cutlayer.algorithms.cycle import CyclePsl
from cutlayer.cohort import Cohort
from cutlayer.gradients import own
from cutlayer.server import Server
from cutlayer.testing import check_algorithm
from cutlayer.types import Round, Step
from cutlayer.verbs import BACKWARD, FORWARD


@algorithm("answers-first", title="Answers first", needs={FORWARD, BACKWARD})
class AnswersFirst(CyclePsl):
    """The reference: the same algorithm, but with gradients at the old server."""

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        """Computes the gradients before the server trains."""
        turn = 0
        while smashed := clients.forward():
            step = server.gradients(smashed, running_statistics=self.running_statistics)
            self.train(server, smashed, this, turn, 1.0)
            clients.backward(own(step.gradient, smashed))
            turn += 1
            yield Step(step.means, smashed.clients, len(smashed), server_lr=server.lr * server.lr_factor)


def net() -> nn.Module:
    """Features [n, 6] -> scores [n, 4], with batch normalisation at the server."""
    return nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)
    )  # fmt: skip


def trained(algorithm: object, sizes: list[int], **options: Any) -> Any:
    return train(algorithm, make(net), sizes, (6,), cut="1", **options)


@pytest.mark.parametrize("sizes", [[4, 4, 4], [9, 6, 10]])
def test_one_mini_batch_and_gradients_at_the_old_server_are_psl(sizes: list[int]) -> None:
    """Equal bit for bit over several steps, also with unequal clients. Only running statistics see rows twice."""
    psl = trained("psl", sizes)
    cycle = trained(AnswersFirst, sizes, server_batch=99, running_statistics=False)
    assert difference(client_state(psl), client_state(cycle)) == 0.0
    weights = [name for name in server_state(psl) if name.endswith(("weight", "bias"))]
    assert all(torch.equal(server_state(psl)[name], server_state(cycle)[name]) for name in weights)


@pytest.mark.parametrize(("name", "plain"), [("cyclepsl", "psl"), ("cyclesfl", "sfl"), ("cyclesglr", "sgl")])
def test_one_mini_batch_is_the_server_step_of_the_plain_algorithm(name: str, plain: str) -> None:
    """After the first step, the server equals that of the plain algorithm bit for bit; after the second it does not."""
    for rounds, same in ((1, True), (2, False)):
        first = trained(plain, [4, 4, 4], rounds=rounds)
        cycle = trained(name, [4, 4, 4], rounds=rounds, server_batch=12)
        states = server_state(first), server_state(cycle)
        assert all(torch.equal(states[0][n], states[1][n]) for n in states[0]) is same


def test_clients_are_answered_by_the_server_that_has_trained() -> None:
    """One step by hand: client 0 receives the gradient at the server after the server's step, not before it."""
    run = train("cyclepsl", make(mlp), [4, 4, 4], (6,), cut="2", rounds=1, server_batch=12)
    whole = make(mlp)
    whole.load_state_dict(server_state(run), strict=False)
    data, lower = run.training.source.train, whole[:3]
    functional.cross_entropy(whole(data.x[:4]), data.y[:4]).backward()
    expected = {name: p.detach() - 0.1 * p.grad for name, p in lower.named_parameters() if p.grad is not None}
    assert difference(client_state(run), expected) < 1e-14


def test_options_have_an_effect() -> None:
    """The size of mini-batches, running statistics, alpha and phi each change the result."""
    base = server_state(trained("cyclesglr", [8, 8]))
    for options in ({"server_batch": 3}, {"running_statistics": False}, {"alpha": 1.0}, {"phi": 1.0}):
        assert difference(base, server_state(trained("cyclesglr", [8, 8], **options))) > 1e-6


@pytest.mark.parametrize("options", [{"server_batch": 5, "running_statistics": False}, {"logit_adjust": "both"}])
def test_it_keeps_what_all_algorithms_promise(options: dict[str, Any]) -> None:
    """The general checks, with options other than the defaults."""
    check_algorithm("cyclesglr", one_client_is_sgd=False, **options)
