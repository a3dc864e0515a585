"""The first test makes the general checks of all algorithms. The others test this algorithm's rule."""

from __future__ import annotations

import pytest
import torch
from echopsl import EchoPsl, drawn
from torch import Tensor, nn

from cutlayer import Run
from cutlayer.testing import check_algorithm, random_source
from cutlayer.types import Smashed


@pytest.mark.parametrize("options", [{}, {"memory": 1, "echoes": 2}])
def test_it_keeps_what_all_algorithms_promise(options: dict[str, object]) -> None:
    """In every engine. One client is not plain gradient descent, since the server trains again."""
    check_algorithm(EchoPsl, one_client_is_sgd=False, **options)


def net() -> nn.Module:
    """Features [n, 6] -> scores [n, 4]."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def trained(algorithm: object, sizes: tuple[int, ...] = (9, 6, 10), **options: object) -> tuple[list[float], Tensor]:
    """The losses, and a weight of the server."""
    run = Run(
        algorithm=algorithm,
        model=net(),
        data=random_source(sizes),
        clients=len(sizes),
        partition="column",
        precision="float64",
        client_optimizer="sgd",
        client_lr=0.1,
        batch=4,
        cut="1",
        rounds=2,
        **options,
    )
    losses = [record.loss for record in run]
    return losses, run.training.server.state()["model"]["4.weight"]


def test_without_echoes_it_is_psl() -> None:
    """Equal bit for bit over several steps, with clients of unequal sizes."""
    psl, silent = trained("psl"), trained(EchoPsl, echoes=0)
    assert psl[0] == silent[0]
    assert torch.equal(psl[1], silent[1])
    assert not torch.equal(psl[1], trained(EchoPsl)[1])


def test_the_first_step_is_that_of_psl() -> None:
    """Echoes come after the loss of the first step, so only later losses differ."""
    psl, echo = trained("psl")[0], trained(EchoPsl)[0]
    assert psl[0] == echo[0]
    assert psl[1] != echo[1]


def test_it_remembers_so_many_steps() -> None:
    """The memory has an effect only if rounds have several steps."""
    assert trained(EchoPsl, memory=1)[0] != trained(EchoPsl, memory=2)[0]
    assert trained(EchoPsl, (4, 4), memory=1)[0] == trained(EchoPsl, (4, 4), memory=9)[0]


def test_rows_keep_their_labels() -> None:
    """The rows have the requested number and are all different."""
    steps = [
        Smashed((torch.arange(4 * i, 4 * i + 4).float().view(4, 1),), torch.arange(4 * i, 4 * i + 4), (0,), (4,))
        for i in range(3)
    ]
    (rows,), labels = drawn(steps, 5, torch.Generator().manual_seed(0))
    assert len(labels.unique()) == 5
    assert torch.equal(rows[:, 0], labels.float())
