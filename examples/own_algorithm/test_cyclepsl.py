"""Three lines prove what all algorithms promise; the rest is what the paper's rule says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cyclepsl import CyclePsl
from torch import Tensor, nn

from cutlayer import Run
from cutlayer.algorithms import algorithm
from cutlayer.cohort import Cohort
from cutlayer.server import Server
from cutlayer.testing import check_algorithm, random_source
from cutlayer.types import Round, Step
from cutlayer.verbs import BACKWARD, FORWARD


@pytest.mark.parametrize("options", [{}, {"server_batch": 3}, {"server_batch": 5, "running_statistics": False}])
def test_it_keeps_what_all_algorithms_promise(options: dict[str, object]) -> None:
    """On every engine; one client is not plain gradient descent, since it is answered by a server that has trained."""
    check_algorithm(CyclePsl, one_client_is_sgd=False, **options)


@algorithm("answers-first", title="Answers first", needs={FORWARD, BACKWARD})
class AnswersFirst(CyclePsl):
    """The same with gradients at the old server: the oracle."""

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        """The order of the two changed."""
        turn = 0
        while smashed := clients.forward():
            gradients, means = self.answer(server, smashed)
            self.train(server, smashed, this, turn)
            clients.backward(gradients)
            turn += 1
            yield Step(means, smashed.clients, len(smashed), server_lr=server.lr * server.lr_factor)


def net() -> nn.Module:
    """Features [n, 6] -> scores [n, 4]."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))


def trained(algorithm: object, sizes: tuple[int, ...], **options: object) -> tuple[list[float], dict[str, Tensor]]:
    """Losses, and the server's weights."""
    data = random_source(sizes)
    run = Run(
        algorithm=algorithm,
        model=net(),
        data=data,
        clients=len(sizes),
        partition="column",
        precision="float64",
        client_optimizer="sgd",
        client_lr=0.1,
        batch=4,
        cut="1",
        **options,
    )
    losses = [record.loss for record in run]
    return losses, run.training.server.state()["model"]


@pytest.mark.parametrize("sizes", [(4, 4, 4), (9, 6, 10)])
def test_one_mini_batch_and_gradients_at_the_old_server_are_psl(sizes: tuple[int, ...]) -> None:
    """Bit for bit, over several steps and clients of unequal sizes; only that running statistics see each row twice."""
    psl = trained("psl", sizes, rounds=2)
    cycle = trained(AnswersFirst, sizes, rounds=2, server_batch=99, running_statistics=False)
    assert psl[0] == cycle[0]
    weights = [name for name in psl[1] if name.endswith(("weight", "bias"))]
    assert all(torch.equal(psl[1][name], cycle[1][name]) for name in weights)


def test_one_mini_batch_of_all_rows_is_the_server_step_of_psl() -> None:
    """Of the algorithm itself: after its first step the server is PSL's, bit for bit; afterwards it is not."""
    for rounds, same in ((1, True), (2, False)):
        psl = trained("psl", (4, 4, 4), rounds=rounds)
        cycle = trained(CyclePsl, (4, 4, 4), rounds=rounds, server_batch=12)
        assert all(torch.equal(psl[1][name], cycle[1][name]) for name in psl[1]) is same


def test_options_have_an_effect() -> None:
    """Smaller mini-batches train the server more; the two kinds of statistics give other gradients."""
    losses = {b: trained(CyclePsl, (4, 4, 4), rounds=6, server_batch=b)[0][-1] for b in (2, 12)}
    assert losses[2] < losses[12]
    kinds = [trained(CyclePsl, (4, 4, 4), rounds=2, running_statistics=kind) for kind in (True, False)]
    assert kinds[0][0] != kinds[1][0]
