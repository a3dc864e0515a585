"""Parameters that are not trained (`requires_grad` is False): all clients share one copy, which is never sent.

A model's state has two parts: the frozen part, and the moving part (trained parameters, and all buffers). Averages,
hand-overs, messages and the checkpoint of each client only have the moving part.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from cutlayer.copies import deep_copy
from cutlayer.errors import ConfigError

M = TypeVar("M", bound=nn.Module)


def freeze(model: nn.Module, pattern: str | None) -> None:
    """Freeze the parameters in whose names the regular expression is found. Raises ConfigError if there are none."""
    if pattern is None:
        return
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"freeze = {pattern!r} is not a regular expression ({error}): correct it, e.g. 'features|norm'"
        ) from None
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    chosen = [p for name, p in model.named_parameters(remove_duplicate=False) if found.search(name)]
    if not chosen:
        raise ConfigError(f"freeze = {pattern!r} matches none of the parameters: they are {', '.join(names) or 'none'}")
    for p in chosen:
        p.requires_grad_(False)


def trains(*modules: nn.Module | None) -> bool:
    """Whether any parameter of the modules is trained."""
    return any(p.requires_grad for module in modules if module is not None for p in module.parameters())


def frozen_names(module: nn.Module) -> set[str]:
    """The names of a module's frozen parameters, aliases included."""
    return {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}


def moving(module: nn.Module) -> dict[str, Tensor]:
    """The moving part of a module's state."""
    frozen = frozen_names(module)
    return {name: tensor for name, tensor in module.state_dict().items() if name not in frozen}


def resting(module: nn.Module) -> dict[str, Tensor]:
    """The frozen part of a module's state."""
    frozen = frozen_names(module)
    return {name: tensor for name, tensor in module.state_dict().items() if name in frozen}


def load_moving(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Take a state from `moving` of the same kind of module; the frozen part stays, unless it is in `state` too."""
    module.load_state_dict({**resting(module), **state} if frozen_names(module) else dict(state))


def load_resting(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Take a state from `resting` of the same kind of module, for all that share it."""
    if state:
        module.load_state_dict({**moving(module), **state})


def replica(module: M) -> M:
    """A copy that shares the frozen part with the original."""
    return deep_copy(module, {id(p): p for p in module.parameters() if not p.requires_grad})


def digest(*modules: nn.Module | None) -> str:
    """SHA-256, in hexadecimal, of the names and numbers of the frozen part; empty if nothing is frozen."""
    found = hashlib.sha256()
    some = False
    for module in modules:
        for name, tensor in sorted(resting(module).items()) if module is not None else ():
            some = True
            plain = tensor.detach().cpu().contiguous()
            found.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
            found.update(plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return found.hexdigest() if some else ""
