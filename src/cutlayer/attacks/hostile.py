"""Simulated clients, some of them hostile: a cohort around a cohort."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cutlayer import seeds
from cutlayer.attacks.behaviour import Attack, Attacks
from cutlayer.cohort import Cohort, CohortAround, Predict
from cutlayer.data.own import own_code
from cutlayer.data.samples import Samples
from cutlayer.errors import ConfigError
from cutlayer.scoring import judged
from cutlayer.types import CutGradients, Evaluation, Round, Rows, Smashed, TailGradients, as_real, is_continuous

State = dict[str, Tensor]


class Changeable(Protocol):
    """An engine's cohort, whose models can be changed from outside."""

    def settle(self) -> None:
        """Clients whose batches still wait for a step take this step."""

    def take_model(self, client: int, state: Mapping[str, Tensor]) -> None:
        """Give a client these parameters and buffers, in the form that `model_state` returns."""


class HostileCohort(CohortAround):
    """A simulated cohort some of whose clients attack. `engine` is the innermost cohort; what is `frozen` does not
    move. Scores are those of the honest clients among the `eval_clients` that are drawn.
    """

    def __init__(
        self,
        inner: Cohort,
        engine: Changeable,
        attacks: Attacks,
        *,
        frozen: Collection[str] = (),
        eval_clients: int | None = None,
    ) -> None:
        super().__init__(inner)
        self.engine, self.attacks, self.frozen, self.eval_clients = engine, attacks, frozenset(frozen), eval_clients
        self._rows, self._gradient, self._update = (attacks.by(what) for what in ("rows", "gradient", "update"))
        self._received: dict[int, State] = {k: self._state_of(k) for k in self._update}
        self._round = 0
        self._step: Counter[tuple[str, int]] = Counter()  # what each client has changed in this round
        self._asked: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    def begin_round(self, index: int, total: int, lr_factor: float) -> Round:
        """Draws are named by the round."""
        self._round = index
        self._step.clear()
        return self.inner.begin_round(index, total, lr_factor)

    def forward(self, clients: Sequence[int] | None = None, *, labels: bool = True) -> Smashed:
        """Hostile clients send other rows."""
        smashed = self.inner.forward(clients, labels=labels)
        self._asked = (smashed.clients, smashed.sizes)
        rows = self._changed("rows", self._rows, smashed.rows, smashed.clients, smashed.sizes)
        return smashed if rows is smashed.rows else replace(smashed, rows=rows)

    def tail(self, features: Smashed) -> TailGradients:
        """Hostile clients send other gradients."""
        tail = self.inner.tail(features)
        rows = self._changed("rows", self._rows, tail.rows, tail.clients, tail.sizes)
        return tail if rows is tail.rows else replace(tail, rows=rows)

    def backward(self, gradients: CutGradients) -> None:
        """Hostile clients use another gradient, if they receive one."""
        clients, sizes = self._asked
        if not (gradients.own or gradients.common) or not self._gradient.keys() & set(clients):
            self.inner.backward(gradients)
            return
        own = gradients.for_all(clients, sizes)
        own = self._changed("gradient", self._gradient, own, clients, sizes)
        self.inner.backward(CutGradients(own, clients, sizes))

    def average(self, weights: Mapping[int, float]) -> tuple[int, ...]:
        """Hostile clients send another model than they have trained."""
        for k in weights:
            self._leave(k)
        here = self.inner.average(weights)
        self._received = {k: self._state_of(k) for k in self._update}
        return here

    def hand_over(self, client: int, *, optimizer: bool) -> None:
        """A hostile client passes on another model than it has trained."""
        if self.holder is not None and self.holder != client:
            self._leave(self.holder)
        self.inner.hand_over(client, optimizer=optimizer)
        if client in self._update:
            self._received[client] = self._state_of(client)

    def evaluate(self, samples: Samples, predict: Predict, clients: Sequence[int] | None = None) -> Evaluation:
        """The models of the honest clients; if one model travels, that one."""
        if self.holder is not None:
            return self.inner.evaluate(samples, predict, clients)
        asked = judged(len(self.samples), self.eval_clients, self.attacks.seed) if clients is None else clients
        honest = [k for k in asked if k not in self.attacks.hostile]
        return self.inner.evaluate(samples, predict, honest or clients)

    def state(self) -> dict[str, Any]:
        """The inner cohort's, and the models that hostile clients had received."""
        return {"inner": self.inner.state(), "received": {str(k): own for k, own in self._received.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take a state that `state()` returned."""
        self.inner.load(state["inner"])
        self._received = {int(k): dict(own) for k, own in state["received"].items()}

    def _draw(self, what: str, client: int) -> torch.Generator:
        """The next stream of a client's attack in this round."""
        step = self._step[what, client]
        self._step[what, client] += 1
        return seeds.torch_generator(self.attacks.seed, "attack", what, client, self._round, step)

    def _changed(
        self, what: str, by: Mapping[int, list[Attack]], rows: Rows, clients: Sequence[int], sizes: Sequence[int]
    ) -> Rows:
        """Rows [R, s...] in which attacks have replaced the rows of hostile clients."""
        if not by.keys() & set(clients):
            return rows
        changed, start = [r.clone() for r in rows], 0
        real = [r for r in changed if r.is_floating_point()]
        for k, size in zip(clients, sizes, strict=True):
            span = slice(start, start + size)
            start += size
            for one in by.get(k, ()):
                before = tuple(r[span].clone() for r in real)
                for r, new in zip(real, _asked(one, what, before, self._draw(what, k)), strict=True):
                    r[span] = _finite(new, r.dtype)
        return tuple(changed)

    def _leave(self, client: int) -> None:
        """Called before a model leaves a client: a hostile client changes its update."""
        if client not in self._update:
            return
        self.engine.settle()
        before, now = self._received[client], self._state_of(client)
        names = [name for name, tensor in now.items() if is_continuous(tensor) and name not in self.frozen]
        was = {name: as_real(before[name]).double() for name in names}
        update = torch.cat([(as_real(now[name]).double() - was[name]).flatten() for name in names])
        for one in self._update[client]:
            (update,) = _asked(one, "update", update, self._draw("update", client))
        for name, part in zip(names, update.split([value.numel() for value in was.values()]), strict=True):
            new = _finite(was[name] + part.view(was[name].shape), as_real(now[name]).dtype)
            now[name] = torch.view_as_complex(new) if now[name].is_complex() else new
        self.engine.take_model(client, now)

    def _state_of(self, client: int) -> State:
        return {name: tensor.clone() for name, tensor in self.inner.model_state(client).items()}


def with_targets(samples: Samples, owners: Sequence[np.ndarray], attacks: Attacks, classes: int) -> Samples:
    """Training samples in which the rows of hostile clients have the targets of their attacks. `owners` are each
    client's rows; `classes` is 0 if targets are not one class per sample. Raises ConfigError.
    """
    by = attacks.by("targets")
    y = samples.y.clone() if by else samples.y
    for k, several in by.items():
        rows = torch.from_numpy(owners[k]).to(y.device)
        for number, one in enumerate(several):
            draw = seeds.torch_generator(attacks.seed, "attack", "targets", k, number)
            (y[rows],) = _asked(one, "targets", y[rows], draw, classes)
    return replace(samples, y=y) if by else samples


def _asked(attack: Attack, what: str, given: Tensor | Rows, draw: torch.Generator, *classes: int) -> Rows:
    """The tensors that an attack returns. Raises ConfigError if it fails, or if their shapes or types are wrong."""
    name = f"`{what}` of the attack {attack.entry.name!r}"
    with own_code(attack, name), torch.no_grad():
        found = getattr(attack, what)(given, *classes, draw)
        found = (found,) if isinstance(found, Tensor) else tuple(found)
        shapes = [tuple(t.shape) for t in found]
    expected = [tuple(t.shape) for t in ((given,) if isinstance(given, Tensor) else given)]
    if shapes != expected:
        raise ConfigError(f"{name} makes tensors of the shapes {shapes} of {expected}: return those of the same shapes")
    return found


def _finite(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers in this type, without overflow."""
    limit = torch.finfo(dtype).max
    return numbers.clamp(-limit, limit).to(dtype)
