"""C copies of one module as stacked tensors [C, ...]: forward passes, optimiser steps, averages, states, all at once.

Clients whose batches have the same size form a group; a group runs as one. With equal clients there is one group, and
the stacked tensors themselves are its parameters: nothing is copied. Otherwise a group works on a copy of its clients'
slices, which is written back after the step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from cutlayer.engine.lowering import Lowered
from cutlayer.optim import MakeOptimizer, set_lr
from cutlayer.types import Rows

# Optimisers whose rule is elementwise, so that one step on stacked tensors is every client's own step. The others
# (Adafactor's row means, ASGD's and NAdam's history of rates) are the local engine's.
ELEMENTWISE = {"adadelta", "adagrad", "adam", "adamax", "adamw", "radam", "rmsprop", "rprop", "sgd"}

Generators = Callable[[int], torch.Generator]
"""Client -> its random stream in this forward pass."""


@dataclass
class Group:
    """Some clients as one: `clients` [c], their parameters and buffers by name, each [c, ...]; `rows` are the positions
    of their rows in the whole batch [c * b] (None: they are the whole batch)."""

    clients: Tensor
    everyone: bool
    rows: Tensor | None
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    given: Rows = field(default=())  # what they gave last, with its graph


class Stack:
    """`count` copies of `module`, stacked."""

    def __init__(self, module: nn.Module, count: int, make_optimizer: MakeOptimizer) -> None:
        self.module = copy.deepcopy(module)
        self.count = count
        self._parameters = {
            n: _repeated(p, count).requires_grad_(p.requires_grad) for n, p in module.named_parameters()
        }
        self._buffers = {n: _repeated(b, count) for n, b in module.named_buffers()}
        self._trained = {n: p for n, p in self._parameters.items() if p.requires_grad}
        self._make_optimizer = make_optimizer
        self._optimizer = make_optimizer(self._trained.values())
        self.steps = np.zeros(count, np.int64)  # optimiser steps that each client has taken

    # Running

    def groups(self, clients: Sequence[int], sizes: Sequence[int]) -> list[Group]:
        """The groups of `clients` with batches of `sizes` rows, client after client in the merged batch."""
        size = np.asarray(sizes)
        kinds = np.unique(size)
        if len(kinds) == 1:
            return [self._group(np.asarray(clients), None)]
        first = np.concatenate([[0], np.cumsum(size)[:-1]])
        found = []
        for kind in kinds:
            mine = np.flatnonzero(size == kind)
            rows = (first[mine][:, None] + np.arange(kind)).ravel()
            found.append(self._group(np.asarray(clients)[mine], torch.from_numpy(rows)))
        return found

    def forward(self, group: Group, rows: Rows, generators: Generators) -> Rows:
        """The group's modules in training mode on their rows: each [c * b, ...] -> each [c * b, ...].

        Raises NotStackableError where the module does with its parameters what has no stacked form.
        """
        self.module.train()
        given = self._run(group, rows, generators)
        group.given = given
        return given

    def predict(self, clients: Sequence[int], rows: Rows) -> Rows:
        """The modules of `clients` in eval mode, each on its b of the rows: [c * b, ...] -> [c * b, ...]."""
        self.module.eval()
        with torch.no_grad():
            return self._run(self._group(np.asarray(clients), None), rows, _no_generator)

    def zero_grad(self) -> None:
        """Forget gradients."""
        for p in self._trained.values():
            p.grad = None

    def step(self, group: Group, lr: float) -> None:
        """One optimiser step of the group's clients at rate `lr`, from the gradients of its tensors."""
        who = group.clients.numpy()
        if self._optimizer is not None:
            taken = np.unique(self.steps[who])
            if group.everyone and len(taken) == 1:
                self._step_all(int(taken[0]), lr)
            else:
                for count in taken:
                    self._step_some(group, torch.from_numpy(np.flatnonzero(self.steps[who] == count)), int(count), lr)
        if not group.everyone:
            self._put_back(group)
        self.steps[who] += 1

    def gradients(self, group: Group) -> list[Tensor]:
        """The gradients of the group's trained parameters, each [c, ...]."""
        return [g for n in self._trained if (g := group.parameters[n].grad) is not None]

    # Moving models

    def average(self, weights: Mapping[int, float]) -> None:
        """All copies := the weighted mean of those in `weights`; integer buffers take the largest value."""
        who = torch.tensor(list(weights))
        share = torch.tensor(list(weights.values()), dtype=torch.float64)
        share /= share.sum()
        with torch.no_grad():
            for tensor in (*self._parameters.values(), *self._buffers.values()):
                chosen = tensor if len(who) == self.count else tensor[who]
                if tensor.is_floating_point():
                    mean = (share.to(tensor.dtype) @ chosen.flatten(1)).view(tensor.shape[1:])
                else:
                    mean = chosen.amax(0)
                tensor.copy_(mean.expand_as(tensor))

    def move(self, giver: int, taker: int, *, optimizer: bool) -> None:
        """Copy one client's model to another, with its optimiser's state if asked."""
        with torch.no_grad():
            for tensor in (*self._parameters.values(), *self._buffers.values()):
                tensor[taker] = tensor[giver]
            if optimizer:
                for values in self._state().values():
                    for tensor in values.values():
                        tensor[taker] = tensor[giver]
                self.steps[taker] = self.steps[giver]

    def load_one(self, client: int, state: Mapping[str, Tensor]) -> None:
        """Give one client the parameters and buffers in `state`."""
        with torch.no_grad():
            for name, tensor in (*self._parameters.items(), *self._buffers.items()):
                if name in state:
                    tensor[client] = state[name]

    def state_of(self, client: int) -> dict[str, Tensor]:
        """One client's parameters and buffers, under the module's names."""
        tensors = {**self._parameters, **self._buffers}
        return {name: tensors[name].detach()[client] for name in self.module.state_dict()}

    def optimizer_bytes(self, client: int) -> int:
        """Bytes of one client's optimiser state, its step counter (4 bytes per parameter tensor) included."""
        if not self.steps[client]:
            return 0
        state = self._state()
        return sum(t[0].nbytes for values in state.values() for t in values.values()) + sum(
            4 for p in self._trained.values() if "step" in self._raw(p)
        )

    def state(self) -> dict[str, Any]:
        """Everything, stacked."""
        return {
            "parameters": dict(self._parameters),
            "buffers": dict(self._buffers),
            "optimizer": self._state(),
            "clocked": any("step" in self._raw(p) for p in self._trained.values()),
            "steps": self.steps.tolist(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take a state that `state()` returned."""
        with torch.no_grad():
            for mine, theirs in ((self._parameters, state["parameters"]), (self._buffers, state["buffers"])):
                for name, tensor in mine.items():
                    tensor.copy_(theirs[name])
        for name, values in state["optimizer"].items():
            clock = {"step": torch.tensor(0.0)} if state["clocked"] else {}  # set from `steps` at each step
            self._raw(self._trained[name]).update({k: v.clone() for k, v in values.items()}, **clock)
        self.steps = np.array(state["steps"], np.int64)

    # Inside

    def _group(self, clients: np.ndarray, rows: Tensor | None) -> Group:
        everyone = rows is None and len(clients) == self.count
        if everyone:
            return Group(torch.from_numpy(clients), True, None, self._parameters, self._buffers)
        who = torch.from_numpy(clients)
        parameters = {n: p.detach()[who].requires_grad_(p.requires_grad) for n, p in self._parameters.items()}
        return Group(who, False, rows, parameters, {n: b[who] for n, b in self._buffers.items()})

    def _run(self, group: Group, rows: Rows, generators: Generators) -> Rows:
        tensors = {**group.parameters, **group.buffers}
        names = group.clients.tolist()
        with Lowered(len(names), tensors.values(), lambda i: generators(names[i])):
            given = functional_call(self.module, tensors, (rows,))
        return given if isinstance(given, tuple) else (given,)

    def _step_all(self, taken: int, lr: float) -> None:
        """Everybody has taken as many steps: the optimiser's own step on the stacked tensors."""
        assert self._optimizer is not None
        for p in self._trained.values():
            state = self._optimizer.state.get(p)
            if state and "step" in state:
                state["step"] = torch.tensor(float(taken))
        set_lr(self._optimizer, lr)
        self._optimizer.step()

    def _step_some(self, group: Group, at: Tensor, taken: int, lr: float) -> None:
        """The clients at positions `at` of the group, which have all taken `taken` steps, on a copy of their slices."""
        who = group.clients[at]
        slices = {n: group.parameters[n].detach()[at].requires_grad_() for n in self._trained}
        for name, part in slices.items():
            grad = group.parameters[name].grad
            part.grad = None if grad is None else grad[at]
        optimizer = self._make_optimizer(slices.values())
        assert optimizer is not None
        set_lr(optimizer, lr)
        if taken:
            for name, part in slices.items():
                raw = self._raw(self._trained[name])
                optimizer.state[part] = {
                    k: torch.tensor(float(taken)) if k == "step" else v[who] for k, v in raw.items() if v is not None
                }
        optimizer.step()
        with torch.no_grad():
            for name, part in slices.items():
                group.parameters[name][at] = part
                self._keep(self._trained[name], optimizer.state[part], who)

    def _keep(self, parameter: Tensor, state: Mapping[str, Any], who: Tensor) -> None:
        """Write the optimiser state of the clients `who` into the stacked state."""
        raw = self._raw(parameter)
        for name, value in state.items():
            if name == "step" or value is None:
                raw.setdefault(name, value)
                continue
            if raw.get(name) is None:
                raw[name] = torch.zeros_like(parameter, requires_grad=False)
            raw[name][who] = value

    def _put_back(self, group: Group) -> None:
        with torch.no_grad():
            for mine, theirs in ((self._parameters, group.parameters), (self._buffers, group.buffers)):
                for name, tensor in theirs.items():
                    mine[name][group.clients] = tensor

    def _raw(self, parameter: Tensor) -> dict[str, Any]:
        assert self._optimizer is not None
        state: dict[str, Any] = self._optimizer.state[parameter]
        return state

    def _state(self) -> dict[str, dict[str, Tensor]]:
        """The optimiser's stacked tensors by parameter and kind; step counters are in `steps`."""
        if self._optimizer is None:
            return {}
        return {
            name: {k: v for k, v in self._raw(p).items() if isinstance(v, Tensor) and v.shape == p.shape}
            for name, p in self._trained.items()
        }


def _repeated(tensor: Tensor, count: int) -> Tensor:
    """[...] -> [count, ...], contiguous, in memory of its own."""
    return tensor.detach().unsqueeze(0).repeat(count, *[1] * tensor.dim())


def _no_generator(client: int) -> torch.Generator:
    raise AssertionError("nothing draws in eval mode")
