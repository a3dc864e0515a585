"""Which engine simulates the clients, and how: `stacked` where it applies, `local` else, with the reason."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from typing import cast

import torch
from torch import nn

from cutlayer import defences
from cutlayer.algorithms import Algorithm
from cutlayer.cohort import Cohort
from cutlayer.defences.defended import DefendedCohort
from cutlayer.engine.bounded import BoundedCohort
from cutlayer.engine.layout import quicker, smashed
from cutlayer.engine.local import LocalCohort
from cutlayer.engine.simulated import Clients
from cutlayer.engine.stackable import bytes_per_row, stackable, unlike_alone
from cutlayer.engine.stacked import StackedCohort, StackedServer, Stacking
from cutlayer.engine.union import UnionCohort, UnionServer, row_by_row
from cutlayer.errors import ConfigError, CutlayerWarning
from cutlayer.frozen import trains
from cutlayer.models import Parts
from cutlayer.optim import ELEMENTWISE, MakeOptimizer, rule_of
from cutlayer.options import RunConfig
from cutlayer.server import Server
from cutlayer.types import Rows
from cutlayer.verbs import LEARN

# Bytes of results that a group of clients may make in a forward pass: beyond this, larger groups are no quicker.
_WORTHWHILE = 256 << 20
# Bytes of weights that a group may have on the CPU: what the cache holds until the backward pass is back (measured).
_CACHED = 8 << 20


def simulate(
    config: RunConfig,
    algorithm: Algorithm,
    split: Parts,
    setup: Clients,
    make_server: MakeOptimizer,
    seed: int,
    example: Rows,
) -> tuple[Cohort, Server, str]:
    """(clients, server, name of the engine). Warns where a model cannot be stacked."""
    simulated, server, engine = _chosen(config, algorithm, split, setup, make_server, seed, example)
    cohort = cast(Cohort, simulated)  # its verbs are those that the algorithm needs
    protection = defences.of(config)
    if protection.penalised and LEARN in algorithm.traits.needs:
        raise ConfigError(
            f"{protection.penalised} adds to the loss that comes through the server, but the clients of "
            f"{config.algorithm} train on a loss of their own: leave it out"
        )
    if protection.penalised and not trains(split.client):
        raise ConfigError(
            f"{protection.penalised} adds to the loss that the client part is trained on, but nothing of that part is "
            "trained: leave it out, or freeze less"
        )
    if protection.active:
        cohort = DefendedCohort(cohort, simulated.keep_batches(), protection)
    return BoundedCohort(cohort, config.algorithm, algorithm.traits.needs), server, engine


def _chosen(
    config: RunConfig,
    algorithm: Algorithm,
    split: Parts,
    setup: Clients,
    make_server: MakeOptimizer,
    seed: int,
    example: Rows,
) -> tuple[LocalCohort | StackedCohort | UnionCohort, Server, str]:
    lr, needs = config.server_lr or config.client_lr, algorithm.traits.needs
    nothing_to_stack = algorithm.traits.takes_turns or len(setup.rows) == 1
    if config.engine == "local" or (nothing_to_stack and config.engine == "auto"):
        return LocalCohort(setup), Server(split.server, make_server, lr, seed, setup.task), "local"
    rows = smashed(split.client, example)
    if config.engine == "auto" and _one_union_step(config, algorithm, split, setup, make_server, example, rows):
        union = UnionCohort(setup)
        if algorithm.traits.server_copies:
            return union, UnionServer(split.server, make_server, lr, seed, union.masses, setup.task), "union"
        return union, Server(split.server, make_server, lr, seed, setup.task), "union"
    if config.engine == "stacked":
        _check_can("stacked", StackedCohort.can, config.algorithm, needs)
    copies = len(setup.rows) if algorithm.traits.server_copies else 0
    why = _unfit(algorithm, setup.make_optimizer, make_server)
    hows = []
    for side, part, received, make in (
        ("client", split.client, example, setup.make_optimizer),
        ("server", split.server, rows, make_server),
    ):
        if side == "server" and not copies:
            hows.append(Stacking())
        elif not why:
            verdict = stackable(part, received, make, data=side == "client")
            why = verdict.reason and f"the model's {side} part cannot be stacked: {verdict.reason}"
            hows.append(_bounded(config, verdict.mapped, part, received))
    if why:
        warnings.warn(f"{config.algorithm} runs on the local engine: {why}", CutlayerWarning, stacklevel=4)
        return LocalCohort(setup), Server(split.server, make_server, lr, seed, setup.task), "local"
    server = StackedServer(split.server, make_server, lr, seed, copies, hows[1], setup.task)
    return StackedCohort(setup, hows[0]), server, "stacked"


def _one_union_step(
    config: RunConfig,
    algorithm: Algorithm,
    split: Parts,
    setup: Clients,
    make_server: MakeOptimizer,
    example: Rows,
    rows: Rows,
) -> bool:
    """Whether every step is followed by averaging, from equal models, with rules that make both one step."""
    if not algorithm.averages_every_step or algorithm.traits.needs - UnionCohort.can:
        return False
    if config.start != "equal" or not rule_of(setup.make_optimizer).plain:
        return False
    copies = algorithm.traits.server_copies
    if setup.make_optimizer.clip is not None or (copies and make_server.clip is not None):
        return False  # each model's own gradient is clipped
    if copies and not (rule_of(make_server).plain and row_by_row(split.server, rows)):
        return False
    return row_by_row(split.client, example)


def _check_can(engine: str, can: frozenset[str], algorithm: str, needs: frozenset[str]) -> None:
    """Raises ConfigError where an engine that was asked for lacks a verb that the algorithm needs."""
    if lacking := sorted(needs - can):
        raise ConfigError(
            f"engine = {engine!r} cannot run {algorithm}, which needs {', '.join(lacking)}: choose 'local' or 'auto'"
        )


def _unfit(algorithm: Algorithm, make_client: MakeOptimizer, make_server: MakeOptimizer) -> str:
    """Why this algorithm or its optimisers cannot be stacked, whatever the model; empty where they can."""
    if lacking := sorted(algorithm.traits.needs - StackedCohort.can):
        return f"it needs {', '.join(lacking)}, which the stacked engine cannot do"
    for make in (make_client, make_server)[: 2 if algorithm.traits.server_copies else 1]:
        if make.own:
            if why := unlike_alone(make):
                return f"the rule of {make.name} is not elementwise: {why}"
        elif make.name not in ELEMENTWISE:
            return f"the rule of {make.name} is not elementwise"
    return ""


def laid_out(config: RunConfig, split: Parts, example: Rows) -> Parts:
    """The parts, laid out in memory as is quickest. The local engine, asked for by name, takes them as they are."""
    if config.engine == "local" or config.precision == "float64" or config.device != "cpu":
        return split  # measured to help on the CPU, whose library has no double precision convolutions
    if split.tail is not None:
        return split
    client, server = quicker(split.client, split.server, example)
    return replace(split, client=client, server=server)


def _bounded(config: RunConfig, mapped: bool, part: nn.Module, rows: Rows) -> Stacking:
    """So many clients at a time, and their forward passes kept or run twice, that memory suffices."""
    limit = memory_limit(config)
    each = max(1, bytes_per_row(part, rows) * config.batch)
    taking_part = max(1.0, config.clients * config.participation)
    chunk = max(1, int(min(limit / 4, _WORTHWHILE) // each))
    if config.device == "cpu":
        chunk = min(chunk, max(1, _CACHED // max(1, sum(p.nbytes for p in part.parameters() if p.requires_grad))))
    return Stacking(mapped, None if chunk >= config.clients else chunk, keep=each * taking_part <= limit)


def memory_limit(config: RunConfig) -> float:
    """Bytes that the clients' forward passes may leave for their backward passes: as asked for, or half of what is free
    now."""
    if config.memory_limit is not None:
        return config.memory_limit * 1e9
    if config.device != "cpu":
        return torch.cuda.mem_get_info()[0] / 2 if config.device.startswith("cuda") else 4e9
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
    except (ValueError, OSError):  # not all systems tell
        return 4e9
