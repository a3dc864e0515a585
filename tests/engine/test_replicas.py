"""The server of a rank continues while other ranks' gradients are in transit, and steps before its result is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import pytest
import torch
from support import CLASSES
from torch import Tensor, nn

from cutlayer.collective import World
from cutlayer.engine.distributed import Sharing
from cutlayer.engine.replicas import ReplicaServer
from cutlayer.errors import NonFiniteError
from cutlayer.optim import MakeOptimizer
from cutlayer.server import Server
from cutlayer.types import Smashed, Spread, TailGradients

FEATURES, RATE = 3, 0.5


class Far(World):
    """A world of two ranks. The other rank answers when this one waits for it; its gradients and losses are zero."""

    def __init__(self) -> None:
        super().__init__(0, 2)
        self.under_way, self.grows = 0, 1.0

    def totalling(self, tensors: Sequence[Tensor]) -> Callable[[], None]:
        self.under_way += 1

        def arrive() -> None:
            self.under_way -= 1
            for t in tensors:
                t.mul_(self.grows)

        return arrive

    def joined(self, own: np.ndarray, counts: Sequence[int]) -> np.ndarray:
        return own


def rows(of: Callable[..., Any] = Smashed, **more: Any) -> Any:
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(4, FEATURES, generator=draw)
    return of((values,), torch.tensor([0, 1, 2, 1]), (0, 1), (1, 3), **more)


SPREAD = partial(rows, Spread, mine=(0, 1), counting=(1, 3))


class Upper(nn.Linear):
    """The server's part of the model."""

    def forward(self, rows: tuple[Tensor, ...]) -> Tensor:
        return super().forward(rows[0])


def model() -> nn.Module:
    torch.manual_seed(0)
    return Upper(FEATURES, CLASSES)


SGD = MakeOptimizer("sgd", torch.optim.SGD, RATE)


def replica() -> tuple[ReplicaServer, Far]:
    """The server of a rank that has both clients of a run on two ranks."""
    world, server = Far(), ReplicaServer(model(), SGD, RATE)
    sharing = Sharing(world, cast(Any, None), (range(2), range(2, 2)), cast(Any, None), apart=True)
    server.share_by(sharing, (torch.zeros(1, FEATURES),))
    return server, world


def weights(server: Server) -> Tensor:
    return torch.cat([p.detach().flatten() for p in server.model.parameters()])


def test_clients_have_their_gradients_before_the_other_ranks_answer() -> None:
    server, world = replica()
    alone = Server(model(), SGD, RATE)
    before, expected = weights(server), alone.step(rows())
    step = server.step(SPREAD())
    assert world.under_way == 1
    assert torch.equal(weights(server), before)
    torch.testing.assert_close(step.gradient, expected.gradient)
    torch.testing.assert_close(step.means, expected.means, check_dtype=False)
    assert world.under_way == 0
    torch.testing.assert_close(weights(server), weights(alone))


def forward_back(server: Server, smashed: Smashed) -> None:
    (outputs,) = server.forward(smashed)
    server.backward(smashed, TailGradients((torch.ones_like(outputs),), torch.zeros(2), (0, 1), (1, 3)))


DEPENDENT: dict[str, Callable[[Server], object]] = {
    "another step": lambda server: server.step(SPREAD()),
    "gradients": lambda server: server.gradients(SPREAD()),
    "outputs": lambda server: server.forward(SPREAD()),
    "predictions": lambda server: server.predict([0], rows().rows),
    "the end of the round": lambda server: server.end_round(),
}


@pytest.mark.parametrize("what", DEPENDENT)
def test_what_depends_on_a_step_waits_for_it_once(what: str) -> None:
    server, world = replica()
    alone = Server(model(), SGD, RATE)
    alone.step(rows())
    step = server.step(SPREAD())
    DEPENDENT[what](server)
    assert world.under_way == (what == "another step")
    _ = step.means
    torch.testing.assert_close(weights(server), weights(alone))


def test_a_step_from_tails_is_taken_late_as_well() -> None:
    server, world = replica()
    alone = Server(model(), SGD, RATE)
    forward_back(alone, rows())
    before = weights(server)
    forward_back(server, SPREAD())
    assert world.under_way == 1
    assert torch.equal(weights(server), before)
    server.end_round()
    torch.testing.assert_close(weights(server), weights(alone))


def test_a_gradient_that_is_not_finite_is_found_when_it_arrives() -> None:
    server, world = replica()
    world.grows = torch.inf
    before, step = weights(server), server.step(SPREAD())
    with pytest.raises(NonFiniteError, match="weight gradient"):
        _ = step.means
    assert torch.equal(weights(server), before)
