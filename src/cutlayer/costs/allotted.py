"""The cut of each client: named, or chosen for its memory, or for its machine and link; and whether it fits.

The costs of a cut are measured on the meta device, as in `plan`. Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from cutlayer.costs.fleet import Fleet, FleetOptions
from cutlayer.costs.measure import Measured, Optimizer, at_client, candidates, measure, placed, survey
from cutlayer.errors import ConfigError
from cutlayer.models.blocks import named_block
from cutlayer.options import RunConfig, cuts_of
from cutlayer.plugins import known
from cutlayer.text import format_bytes

GB = 1e9
_SAID = 8  # clients that a remark names


@dataclass(frozen=True, eq=False)
class Allotment:
    """The facts that decide the clients' cuts in a run or a plan: the `model` as made, an `example` [n >= 2, ...] of
    its inputs, bytes of a row's `label`, the type of the model's real numbers, and the machines, if they are known.
    """

    config: FleetOptions
    model: nn.Module
    example: object
    label: int
    dtype: torch.dtype
    fleet: Fleet | None

    def cuts(self, default: str | None) -> tuple[str, ...]:
        """The cut of each client, [C]; `default` if none is named. Raises ConfigError for a cut that does not fit a
        client, or if none does; CutError for names at which the model cannot be cut.
        """
        c = self.config
        if c.cut_by is not None:
            return tuple(self._chosen(k) for k in range(c.clients))
        named = c.cuts or (() if default is None else (default,))
        modules = {name: named_block(self.model, name) for name in set(named)} if len(named) > 1 else {}
        names = named * c.clients if len(named) == 1 else tuple(modules[name] for name in named)
        for k, name in enumerate(names if c.client_memory or c.client_seconds else ()):
            if why := self._over(k, measured := self._at(name)):
                raise ConfigError(
                    f"cut = {measured.name!r} of client {k} {why}: name another, or have cut_by choose one"
                )
        return names

    def _chosen(self, client: int) -> str:
        """The cut that is chosen for a client. Raises ConfigError if none fits."""
        fit = [m for m in self._surveyed if not self._over(client, m)]
        if not fit:
            least = self._surveyed[0]
            raise ConfigError(
                f"no cut fits client {client}: even {least.name!r} {self._over(client, least)}: allow more, or train "
                "without this client"
            )
        if self.config.cut_by != "profile":
            return fit[-1].name
        return min(reversed(fit), key=lambda m: self._seconds(client, m)).name

    def _over(self, client: int, m: Measured) -> str:
        """Why a cut does not fit a client, as the end of a sentence; empty if it fits."""
        c = self.config
        memory, seconds = _own(c.client_memory, client), _own(c.client_seconds, client)
        device = self.fleet.client.memory_gb if self.fleet is not None else None
        if device is not None and (memory is None or device < memory) and c.cut_by == "profile":
            memory = device
        if memory is not None and (held := self._memory(m)) > memory * GB:
            what = "its client_memory" if memory in c.client_memory else "its device's memory"
            return f"takes {format_bytes(held)} to train with batches of {c.batch}, more than {what} = {memory:g} GB"
        if seconds is not None and (takes := self._seconds(client, m)) > seconds:
            return f"takes {takes:.3g} s for a step, more than its client_seconds = {seconds:g}"
        return ""

    def _memory(self, m: Measured) -> int:
        """The most bytes that a client's training takes."""
        kind: Optimizer = "sgd" if self.config.client_optimizer == "sgd" else "adam"
        return m.client.peak(self.config.batch, kind, checkpointed=at_client(self.config.gradient_checkpointing))

    def _seconds(self, client: int, m: Measured) -> float:
        """The seconds of a step for a single client: its own computing, the server's, up and down. Raises
        ConfigError.
        """
        fleet, rows = self.fleet, self.config.batch
        assert fleet is not None, "it was checked that there is a client device"
        if fleet.trace is not None or not np.isfinite(fleet.up[client]):
            raise ConfigError(
                "the time of a step cannot be calculated with trace, whose rates change: choose cut_by = 'memory', or "
                "leave trace out"
            )
        up, down = rows * (m.smashed + self.label), rows * m.gradient
        computing = rows * m.flops.client.training / fleet.speeds[client]
        serving = rows * m.flops.server.training / fleet.server_speed
        return float(
            computing + serving + 8 * up / fleet.up[client] + 8 * down / fleet.down[client] + 2 * fleet.latency
        )

    @cached_property
    def _surveyed(self) -> list[Measured]:
        """The cuts to choose from, in the order data flows."""
        c = self.config
        named = cuts_of(c.model) if known("model", c.model) else ()
        names = named if named and set(named) <= {n for n, _ in self.model.named_modules()} else candidates(self.model)
        return list(survey(self._net, self._x, names, c.gradient_checkpointing).cuts)

    @cached_property
    def _measured(self) -> dict[str, Measured]:
        return {}

    def _at(self, name: str) -> Measured:
        if name not in self._measured:
            self._measured[name] = measure(self._net, name, self._x, self.config.gradient_checkpointing)
        return self._measured[name]

    @cached_property
    def _net(self) -> nn.Module:
        return placed(self.model, self.dtype)

    @cached_property
    def _x(self) -> Tensor:
        """A batch on the meta device. Raises ConfigError for inputs that are several tensors."""
        if not isinstance(self.example, Tensor):
            raise ConfigError(
                "what a cut needs is not known for a model with several inputs: leave cut_by, client_memory and "
                "client_seconds out, and name the cuts"
            )
        return self.example.detach().to("meta")


def _own(budget: Sequence[float], client: int) -> float | None:
    """A client's part of a budget; None without one."""
    return None if not budget else budget[client if len(budget) > 1 else 0]


def remark(names: Sequence[str], by: str | None) -> str:
    """The clients' cuts in a line; empty if all have one that was named."""
    if len(set(names)) < 2 and by is None:
        return ""
    groups: dict[str, list[int]] = {}
    for k, name in enumerate(names):
        groups.setdefault(name, []).append(k)
    said = [f"{name} for {_listed(who)}" for name, who in groups.items()]
    return f"Cuts: {'; '.join(said)}" + (f" (cut_by = {by})" if by else "")


def _listed(clients: Sequence[int]) -> str:
    if len(clients) > _SAID:
        return f"{len(clients)} clients"
    return f"client{'s' if len(clients) > 1 else ''} {', '.join(map(str, clients))}"


def refuse_mixed(config: RunConfig, conditions: Mapping[str, Callable[[], bool]]) -> None:
    """Raises ConfigError for options that need one cut for all, in a run whose clients have different cuts."""
    for option, holds in conditions.items():
        if holds():
            raise ConfigError(
                f"{option} = {getattr(config, option)!r} is not possible where clients have different cuts: leave it "
                "out, or name one cut for all"
            )
