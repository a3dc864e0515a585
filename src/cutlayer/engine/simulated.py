"""What every simulated cohort has in common: private data, batches, who takes part, who holds the travelling model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from cutlayer.cohort import draw_participants
from cutlayer.data.batches import Batches, Drawn
from cutlayer.data.samples import Samples
from cutlayer.optim import MakeOptimizer
from cutlayer.scoring import judged
from cutlayer.types import Round, Step

Shape = Literal["whole", "split", "u-shaped"]
ClientModel = tuple[nn.Module, nn.Module | None]  # (lower part, tail or auxiliary head)


@dataclass(frozen=True, kw_only=True)
class Routine:
    """How clients train, wherever they are. `lr` is the base rate; a round is `local_steps` batches or `local_epochs`
    passes; `alike` says that all models start equal; `eval_clients` how many models are evaluated (None: all).
    """

    lr: float
    batch: int
    seed: int = 0
    shape: Shape = "split"
    participation: float = 1.0
    local_epochs: int = 1
    local_steps: int | None = None
    alike: bool = True
    eval_clients: int | None = None

    def participants(self, index: int, clients: int) -> tuple[int, ...]:
        """The clients of round `index`."""
        return draw_participants(self.seed, index, clients, self.participation)

    def quota(self, per_epoch: np.ndarray) -> np.ndarray:
        """Batches that clients have to do in a round, who have `per_epoch` [C] in an epoch of their own data."""
        return np.full_like(per_epoch, self.local_steps) if self.local_steps else self.local_epochs * per_epoch

    @property
    def routine(self) -> dict[str, Any]:
        """These fields alone, by name: to set others up alike."""
        return {f.name: getattr(self, f.name) for f in fields(Routine)}


@dataclass(frozen=True)
class Clients(Routine):
    """How a simulated group of clients is set up; every engine takes one.

    `models` are (lower part, tail or auxiliary head or None) per client; `rows` each client's indices into `data`.
    """

    models: Sequence[ClientModel]
    data: Samples
    rows: Sequence[np.ndarray]
    make_optimizer: MakeOptimizer


class SimulatedCohort:
    """The part of the seam that does not depend on how models are computed."""

    def __init__(self, setup: Clients) -> None:
        self.setup = setup
        self._batches = Batches(setup.rows, setup.batch, setup.seed)
        self._quota = np.zeros(len(setup.rows), np.int64)  # batches left in this round
        self._participants: tuple[int, ...] = ()
        self._rate = setup.lr
        self._alike = setup.alike  # all client models are known to be equal
        self._holder: int | None = None
        self._kept: list[Drawn] | None = None

    def keep_batches(self) -> list[Drawn]:
        """A list that every batch is added to from now on; whoever reads it empties it."""
        self._kept = []
        return self._kept

    @property
    def samples(self) -> Sequence[int]:
        """n_k of each enrolled client."""
        counts: list[int] = self._batches.counts.tolist()
        return counts

    @property
    def shape(self) -> Shape:
        """What the clients hold."""
        return self.setup.shape

    @property
    def holder(self) -> int | None:
        """Who holds the one model that travels."""
        return self._holder

    def begin_round(self, index: int, total: int, lr_factor: float) -> Round:
        """Draw the participants and give each its number of batches: local steps, or local epochs of its own data."""
        s = self.setup
        self._participants = s.participants(index, len(self._quota))
        who = np.array(self._participants)
        self._quota[who] = s.quota(self._batches.per_epoch[who])
        self._rate = s.lr * lr_factor
        return Round(index, total, self._participants, tuple(self._quota[who].tolist()), s.seed)

    def _willing(self, clients: Sequence[int] | None) -> tuple[int, ...]:
        """The participants (or those of `clients`) that have batches left in this round."""
        asked = self._participants if clients is None else clients
        left = self._quota[list(asked)] > 0
        return tuple(asked) if left.all() else tuple(k for k, some in zip(asked, left, strict=True) if some)

    def _draw(self, clients: Sequence[int]) -> tuple[Samples, np.ndarray, np.ndarray]:
        """The next batches of `clients`, one after another: samples [R], sizes [C], and clocks [C] (how many batches
        each had drawn before)."""
        rows, sizes, clocks = self._batches.draw(clients)
        self._quota[list(clients)] -= 1
        batch = self.setup.data[rows.to(self.setup.data.y.device)]
        if self._kept is not None:
            self._kept.append(Drawn(batch.x, sizes, clocks))
        return batch, sizes, clocks

    def _judged(self) -> tuple[list[int], list[int]]:
        """(whose scores are asked for, whose models are looked at): models known to be equal are looked at once."""
        if self._holder is not None:
            return [self._holder], [self._holder]
        everyone = judged(len(self._quota), self.setup.eval_clients, self.setup.seed)
        return everyone, everyone[:1] if self._alike else everyone

    def _base_state(self) -> dict[str, Any]:
        return {"drawn": self._batches.drawn.tolist(), "holder": self._holder, "alike": self._alike}

    def _load_base(self, state: Mapping[str, Any]) -> None:
        self._batches.drawn[:] = state["drawn"]
        self._holder, self._alike = state["holder"], state["alike"]


def model_bytes(module: nn.Module) -> int:
    """Bytes of a model's parameters and buffers; tied weights cross once."""
    return sum({t.data_ptr(): t.nbytes for t in module.state_dict().values()}.values())


def together(taken: Mapping[int, list[tuple[float, int]]], t: int) -> Step:
    """Local step number t of all the clients that took so many, given (loss, rows) of each client's local steps."""
    here = {k: steps[t] for k, steps in taken.items() if t < len(steps)}
    rows = sum(n for _, n in here.values())
    loss = sum(x * n for x, n in here.values()) / rows
    return Step(torch.tensor([loss, *(x for x, _ in here.values())], dtype=torch.float64), tuple(here), rows)
