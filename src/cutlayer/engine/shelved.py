"""The stack whose copies are on disk: only those in use are in memory.

A copy that was never trained, or has just received an average, has no row: all of these have the common tensors
(`shelf.py`). Groups are always copied out and back. Their steps equal those of a stack in memory bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cutlayer.averaging import State, combined
from cutlayer.averagings import Averaging
from cutlayer.engine.shelf import Shelf, StatesFolder
from cutlayer.engine.stack import Group, ShelvedState, Stack, mean_of, shares_of
from cutlayer.engine.ways import Stacking
from cutlayer.optim import MOMENTUM, MakeOptimizer
from cutlayer.stored import MalformedError, all_finite, checked, sized
from cutlayer.types import is_continuous

_AT_ONCE = 1 << 30  # bytes of copies that are averaged in one product; larger ones in several parts


class ShelvedStack(Stack):
    """`count` copies of `module` as in `Stack`, in files at `place` whose names begin with `name`."""

    def __init__(
        self,
        place: StatesFolder,
        name: str,
        module: nn.Module,
        count: int,
        make_optimizer: MakeOptimizer,
        how: Stacking | None = None,
        **pieces: Any,
    ) -> None:
        super().__init__(module, 1, make_optimizer, how, **pieces)
        self.count, self.chunk = count, (how or Stacking()).chunk or max(1, count)
        self.steps, self.batches, self._waiting = (np.zeros(count, np.int64) for _ in range(3))
        device, moving = self.device, self._moving()
        self._models = Shelf(place, f"{name}-models", count, device)
        self._others = Shelf(place, f"{name}-apart", count, device)  # the tensors that no averaging changes
        self._moments_of = Shelf(place, f"{name}-moments", count, device)
        self._sums = Shelf(place, f"{name}-sums", count, device)  # of the gradients of batches that wait
        for own in (self._parameters, self._buffers):
            for key, one in own.items():
                shelf = self._models if key in moving else self._others
                shelf.add(key, one[0])
                own[key] = shelf.common[key]

    # Groups

    def _group(self, clients: np.ndarray) -> Group:
        neighbours = bool((np.diff(clients) == 1).all())
        parameters = {n: self._rows(n, clients).requires_grad_() for n in self._parameters}
        return Group(clients, neighbours, parameters, {n: self._rows(n, clients) for n in self._buffers})

    def put_back(self, group: Group) -> None:
        """Write a group's parameters and buffers to its clients' files."""
        tensors = {**group.parameters, **group.buffers}
        for shelf in (self._models, self._others):
            shelf.put(group.clients, {n: t for n, t in tensors.items() if n in shelf.common})

    def settle(self) -> None:
        """Clients whose batches wait take their step; after that, no client is used for a while."""
        super().settle()
        for shelf in self._shelves:
            shelf.rest()

    @property
    def _shelves(self) -> tuple[Shelf, ...]:
        return self._models, self._others, self._moments_of, self._sums

    def _rows(self, name: str, clients: np.ndarray) -> Tensor:
        """A parameter or buffer of some clients [c, ...], a copy."""
        return (self._models if name in self._models.common else self._others).take(name, clients)

    # Steps

    def _hold(self, group: Group, lr: float) -> None:
        for name, p in group.parameters.items():
            if p.grad is not None:
                if name not in self._held:
                    self._held[name] = torch.zeros_like(self._parameters[name])
                    self._sums.add(name, self._held[name][0])
                self._sums.put(group.clients, {name: self._sums.take(name, group.clients) + p.grad})
        self._waiting[group.clients] += 1
        self._lr = lr

    def _sum_of(self, name: str, due: np.ndarray) -> Tensor:
        return self._sums.take(name, due)

    def _forget_sums(self, due: np.ndarray) -> None:
        self._sums.drop(due)

    def _moments(self, name: str, span: slice | Tensor) -> dict[str, Tensor]:
        who = _clients_of(span)
        return {kind: self._moments_of.take(f"{name}/{kind}", who) for kind in self._kinds(name)}

    def _put_moments(self, name: str, moments: Mapping[str, Tensor], span: slice | Tensor) -> None:
        self._moments_of.put(_clients_of(span), {f"{name}/{kind}": tensor for kind, tensor in moments.items()})

    def _keep(self, name: str, state: Mapping[str, Any], before: Mapping[str, Any], span: slice | Tensor) -> None:
        kinds = self._state.setdefault(name, {})
        for kind, value in state.items():
            if kind == "step":
                self._clocked, self._plain_clock = True, not isinstance(value, Tensor)
            elif value is not None and kind not in kinds:
                kinds[kind] = torch.zeros_like(self._parameters[name], dtype=value.dtype)
        self._put_moments(name, {kind: value for kind, value in state.items() if kind in self._kinds(name)}, span)

    def _kinds(self, name: str) -> Mapping[str, Tensor]:
        """The kinds of state that the optimiser has of a parameter: a row of zeros each, [1, ...]."""
        kinds = self._state.get(name, {})
        for kind, zeros in kinds.items():
            if f"{name}/{kind}" not in self._moments_of.common:
                self._moments_of.add(f"{name}/{kind}", zeros[0])
        return kinds

    # Moving models

    def average(self, weights: Mapping[int, float], rule: Averaging | None = None, origin: State | None = None) -> None:
        """Set all copies to the mean of those in `weights`, or to the result of another `rule`, as the common
        tensors.
        """
        who = np.array(list(weights), np.int64)
        names = list(self._models.common)
        if rule is not None and not rule.plain:
            models = {name: self._models.take(name, who) for name in names}
            self._models.set_common(combined(models, list(weights.values()), rule, origin))
            return
        share = shares_of(weights, self.device)
        self._models.set_common({name: self._mean(name, who, share) for name in names})

    def _mean(self, name: str, who: np.ndarray, share: Tensor) -> Tensor:
        """The mean [...] of one tensor of some clients: in one product, unless that would take too much memory."""
        some = max(1, _AT_ONCE // max(1, self._models.common[name].nbytes))
        if len(who) <= some:
            return mean_of(self._models.take(name, who), share)
        found = torch.zeros_like(self._models.common[name][0])
        for first in range(0, len(who), some):
            part = slice(first, first + some)
            one = mean_of(self._models.take(name, who[part]), share[part])
            found = found + one if is_continuous(found) else torch.maximum(found, one)
        return found

    def average_momentum(self, weights: Mapping[int, float]) -> None:
        """Set the momentum of those in `weights` that have stepped to its weighted mean, if the optimiser has
        momentum.
        """
        stepped = {client: weight for client, weight in weights.items() if self.steps[client]}
        total = sum(stepped.values())
        if len(stepped) < 2 or not total > 0:
            return
        who, share = np.array(list(stepped), np.int64), [weight / total for weight in stepped.values()]
        for name in list(self._state):
            for kind in [kind for kind in MOMENTUM if kind in self._kinds(name)]:
                rows = self._moments_of.take(f"{name}/{kind}", who)
                factors = torch.tensor(share, dtype=rows.dtype, device=rows.device)
                mean = torch.tensordot(factors, rows, 1).expand(len(who), *rows.shape[1:])
                self._moments_of.put(who, {f"{name}/{kind}": mean})

    def mean_state(self, weights: Sequence[float]) -> dict[str, Tensor]:
        """The mean of all copies' parameters and buffers, weighted by `weights` [C], under the module's names. Only the
        copies that have rows of their own are read.
        """
        share = np.asarray(weights, np.float64) / sum(weights)
        own = self._models.own
        means = {name: self._mean_of_all(name, own, share) for name in self._models.common}
        return {**self.state_of(0), **means}

    def _mean_of_all(self, name: str, own: np.ndarray, share: np.ndarray) -> Tensor:
        """The mean [...] of one tensor over all clients (`own` have rows); for integers, the largest."""
        one = self._models.common[name][0]
        whole, rest = len(own) == self.count, 1.0 - float(share[own].sum())
        found = torch.zeros_like(one) if whole else one * rest if is_continuous(one) else one.clone()
        some = max(1, _AT_ONCE // max(1, one.nbytes))
        for first in range(0, len(own), some):
            who = own[first : first + some]
            mean = mean_of(self._models.take(name, who), torch.from_numpy(share[who]).to(self.device))
            found = found + mean if is_continuous(one) else torch.maximum(found, mean)
        return found

    @contextmanager
    def averaged(self, weights: Mapping[int, float], rule: Averaging, origin: State | None) -> Iterator[None]:
        """Inside, all copies are their average."""
        back = self._models.aside()
        self.average(weights, rule, origin)
        try:
            yield
        finally:
            back()

    def load_all(self, state: Mapping[str, Tensor]) -> None:
        """Give all clients the parameters and buffers in `state`; then no client has its own rows of these."""
        for shelf in (self._models, self._others):
            if rows := {name: state[name] for name in shelf.common if name in state}:
                shelf.set_common({**{name: one[0] for name, one in shelf.common.items()}, **rows})

    def load_one(self, client: int, state: Mapping[str, Tensor]) -> None:
        """Give one client the parameters and buffers in `state`."""
        for shelf in (self._models, self._others):
            shelf.put(np.array([client]), {n: state[n][None] for n in shelf.common if n in state})

    def state_of(self, client: int) -> dict[str, Tensor]:
        """One client's parameters and buffers, under the module's names: copies."""
        own, who = self.module.state_dict(), np.array([client])
        stacked = {*self._parameters, *self._buffers}
        return {name: self._rows(name, who)[0] if name in stacked else frozen for name, frozen in own.items()}

    # Checkpoints

    def state(self) -> dict[str, Any]:
        """The common tensors, and the places of clients' tensors that differ from them."""
        for name in self._state:
            self._kinds(name)
        return {
            "models": self._models.state(),
            "apart": self._others.state(),
            "moments": self._moments_of.state(),
            "clocked": self._clocked,
            "plain clock": self._plain_clock,
            "steps": self.steps.tolist(),
            "batches": self.batches.tolist(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take a state that `state()` returned, of copies on disk or in memory. Raises MalformedError."""
        if "models" not in state:
            super().load(state)
            return
        found = checked(state, ShelvedState, "the copies")
        sized(found.steps, self.count, "steps")
        sized(found.batches, self.count, "batches")
        kinds: dict[str, dict[str, Tensor]] = {}
        for name, row in checked(found.moments.get("common"), dict[str, Any], "the optimiser of the copies").items():
            parameter, _, kind = name.rpartition("/")
            kinds.setdefault(parameter, {})[kind] = row[None]
        self._check_optimizer(kinds)
        self._state = kinds
        for name in kinds:
            self._kinds(name)
        self._models.load(found.models, "the copies")
        self._others.load(found.apart, "the copies")
        self._moments_of.load(found.moments, "the optimiser of the copies")
        self._count(found.clocked, found.plain_clock, found.steps, found.batches)

    def _check(
        self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], optimizer: Mapping[str, Any]
    ) -> None:
        """Of all copies, in memory."""
        kinds = [t for kinds in optimizer.values() for t in kinds.values()]
        for tensor in (*parameters.values(), *buffers.values(), *kinds):
            if len(tensor) != self.count or not all_finite(tensor):
                raise MalformedError(f"the copies are not finite numbers for each of {self.count} clients")
        one, own = ({name: t[:1] for name, t in tensors.items()} for tensors in (parameters, buffers))
        super()._check(one, own, {n: {kind: t[:1] for kind, t in kinds.items()} for n, kinds in optimizer.items()})

    def _count(self, clocked: bool, plain_clock: bool, steps: Sequence[int], batches: Sequence[int]) -> None:
        """Restore the counters of the state."""
        self._clocked, self._plain_clock = clocked, plain_clock
        self.steps, self.batches = np.array(steps, np.int64), np.array(batches, np.int64)

    def take(self, state: Mapping[str, Any]) -> None:
        """Take the state of a stack in memory: copies that equal the first one get the common tensors."""
        for name, kinds in state["optimizer"].items():
            self._state[name] = {kind: torch.zeros_like(t[:1]) for kind, t in kinds.items()}
            self._kinds(name)
        tensors = {**state["parameters"], **state["buffers"]}
        for shelf in (self._models, self._others):
            shelf.spread({name: tensors[name] for name in shelf.common})
        moments = {f"{name}/{kind}": t for name, kinds in state["optimizer"].items() for kind, t in kinds.items()}
        self._moments_of.spread(moments, common={name: torch.zeros_like(t[0]) for name, t in moments.items()})
        plain, steps = state.get("plain clock", False), state["steps"]
        self._count(state["clocked"], plain, steps, state.get("batches", steps))


def _clients_of(span: slice | Tensor) -> np.ndarray:
    """The clients that a slice or an index of tensors names."""
    return np.arange(span.start, span.stop) if isinstance(span, slice) else span.cpu().numpy()
