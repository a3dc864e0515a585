"""The place of the states of simulated clients: in memory, or on disk if memory is too small."""

from __future__ import annotations

import torch
from torch import nn

from cutlayer.allocator import free_memory, sharing
from cutlayer.collective import world
from cutlayer.engine.shelf import StatesFolder
from cutlayer.engine.ways import EngineName
from cutlayer.errors import ConfigError
from cutlayer.models import Parts
from cutlayer.options import RunConfig
from cutlayer.text import format_bytes
from cutlayer.verbs import Traits

PER_MODEL = 7
"""Models' worth of memory that a client takes: weights, gradients, two moments of the optimiser, and a copy of all but
the gradients in a checkpoint."""


def placed(config: RunConfig, parts: Parts, traits: Traits, engine: EngineName) -> tuple[StatesFolder | None, str]:
    """The place of the states of clients that are not in use (None: in memory), as `client_states` says; and a line if
    they may take more memory than is free. Raises ConfigError if they should be on disk and cannot.
    """
    if config.client_states == "memory" or traits.central or engine == "union":  # in a union all share one model
        return None, ""
    if world().several:  # each rank has a share of the clients in its own memory; `refuse` refuses the disk
        return None, ""
    if config.client_states == "disk":
        if engine == "local":
            raise ConfigError(
                f"client_states = 'disk' has no effect on the local engine, which runs {config.algorithm} here and "
                "keeps all clients in memory: leave it out, or choose what the stacked engine can compute"
            )
        return StatesFolder(), ""
    needs, free = PER_MODEL * config.clients * bytes_of_client(parts, traits), room(config.device)
    if free is None or needs <= free / sharing():
        return None, ""
    said = (
        f"The states of {config.clients:,} clients may take {format_bytes(needs)} of memory, where "
        f"{format_bytes(round(free / sharing()))} are free: "
    )
    if engine == "local":
        return None, f"{said}the local engine keeps them there all the same; the stacked one could use the disk"
    return StatesFolder(), f"{said}those of clients that do not take part lie on disk (client_states)"


def bytes_of_client(parts: Parts, traits: Traits) -> int:
    """Bytes of one client's model, and of the server's copy for it if there is one."""
    own = [part for part in (parts.client, parts.tail) if part is not None]
    return sum(map(weight_bytes, own)) + (weight_bytes(parts.server) if traits.server_copies else 0)


def weight_bytes(part: nn.Module) -> int:
    """Bytes of all tensors of a module."""
    return sum(t.nbytes for t in part.state_dict().values())


def room(device: str) -> int | None:
    """Free bytes of the memory that runs on `device` use; None if the system does not tell."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    return free_memory() if device == "cpu" else None
