"""Defences for any task and for several input tensors: the same in every engine and in deployments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import Tagger
from torch import Tensor, nn

from cutlayer import Run
from cutlayer.data.samples import Samples, Source
from cutlayer.defences.watch import Watch
from cutlayer.options import RunConfig
from cutlayer.testing.deployed import train_in_memory

STRONG = {"clip": 0.5, "gaussian_noise": 0.2, "feature_dropout": 0.3, "nopeek": 0.5}


class Sum(nn.Module):
    """A model of two real tensors with one number as its output."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.body, self.head = nn.Linear(3, 8), nn.Linear(2, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """[R, 3], [R, 2] -> [R, 1]."""
        number: Tensor = self.head(self.body((self.left(left) + self.right(right)).relu()).relu())
        return number


def case(task: str) -> tuple[nn.Module, Source]:
    draw = torch.Generator().manual_seed(0)
    owners = torch.arange(3).repeat_interleave(16)
    if task == "regression":
        x = torch.randn(72, 5, generator=draw)
        every = Samples((x[:, :3], x[:, 3:]), x[:, 0] + x[:, 4])
    else:
        words = torch.randint(0, 9, (72, 5), generator=draw)
        mask = (torch.arange(5) < torch.randint(1, 6, (72, 1), generator=draw)).float()
        every = Samples({"words": words, "mask": mask}, torch.where(mask > 0, words % 4, -100))
    source = Source("drawn", every[:48], every[48:60], every[60:], (), client_column=owners)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return (Sum() if task == "regression" else Tagger()), source


def weights(run: Run) -> dict[str, Tensor]:
    return dict(run.training.server.model.state_dict())


@pytest.mark.parametrize("task", ["regression", "tokens"])
def test_defended_alike_everywhere(task: str) -> None:
    """Clipping, noise, dropout and NoPeek's penalty change training with several inputs, equally in all engines."""
    model, data = case(task)
    given: dict[str, Any] = {"algorithm": "psl", "task": task, "cut": "body", "clients": 3, "partition": "column"}
    given |= {"batch": 8, "rounds": 2, "client_lr": 0.01}
    runs = {}
    for engine in ("local", "stacked"):
        runs[engine] = Run(model=model, data=data, engine=engine, **given, **STRONG)
        assert runs[engine].training.engine == engine
        runs[engine].run()
    runs["remote"] = train_in_memory(RunConfig.of({**given, **STRONG}), model=model, data=data)
    local = weights(runs["local"])
    for engine in ("stacked", "remote"):
        for name, tensor in weights(runs[engine]).items():
            torch.testing.assert_close(tensor, local[name], rtol=1e-4, atol=1e-5)
    for option in ("gaussian_noise", "feature_dropout", "nopeek"):
        left = {k: v for k, v in STRONG.items() if k != option}
        other = Run(model=model, data=data, engine="local", **given, **left)
        other.run()
        assert any(not torch.equal(tensor, local[name]) for name, tensor in weights(other).items()), option


def test_a_watch_leaves_out_rows_that_do_not_count() -> None:
    """A label below 0 is not a class, so pairs with it are not compared."""
    draw = torch.Generator().manual_seed(0)
    gradients, rows = (torch.randn(24, 5, generator=draw) for _ in range(2))
    labels = torch.arange(24) % 3 - 1
    some, all_ = Watch(), Watch()
    some.observe(gradients, rows, labels)
    all_.observe(gradients[labels >= 0], rows[labels >= 0], labels[labels >= 0])
    assert some.score == all_.score
    none = Watch()
    none.observe(gradients, rows, torch.full((24,), -100))
    assert none.observed == 0
