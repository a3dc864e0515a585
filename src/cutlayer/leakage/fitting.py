"""Training with a bounded budget, and stopping early on held-out rows."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cutlayer import seeds


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The budget of a training: at most `steps` Adam steps of `batch` rows at rate `lr`.

    Every `check_every` steps it is judged on held-out rows; after `patience` judgements without improvement, it stops.
    """

    steps: int = 1000
    batch: int = 64
    lr: float = 2e-3
    check_every: int = 50
    patience: int = 5


def fit(
    module: nn.Module,
    loss: Callable[[Tensor], Tensor],
    judge: Callable[[], Tensor],
    rows: int,
    budget: Budget,
    seed: int,
    *name: str | int,
    device: torch.device | None = None,
) -> int:
    """Train `module` in place and keep the weights with the best (lowest) value of `judge`. Returns the number of
    steps.

    `loss` maps row numbers [batch] out of `rows` to a scalar; `judge` is called without gradients, in evaluation mode.
    """
    best, left = math.inf, budget.patience
    kept = copy.deepcopy(module.state_dict())
    optimizer = torch.optim.Adam(module.parameters(), lr=budget.lr)
    draw = seeds.torch_generator(seed, "leakage", "batches", *name)
    made = 0
    with seeds.torch_seeded(seed, "leakage", "fit", *name, device=device):
        while made < budget.steps and left:
            module.train()
            for _ in range(min(budget.check_every, budget.steps - made)):
                optimizer.zero_grad()
                chosen = torch.randint(rows, (min(budget.batch, rows),), generator=draw)
                loss(chosen if device is None else chosen.to(device)).backward()
                optimizer.step()
                made += 1
            module.eval()
            with torch.no_grad():
                score = float(judge())
            if score < best:
                best, left = score, budget.patience
                kept = copy.deepcopy(module.state_dict())
            else:
                left -= 1
    module.load_state_dict(kept)
    module.eval()
    return made
