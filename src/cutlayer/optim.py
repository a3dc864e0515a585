"""Optimisers by name."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cutlayer.errors import ConfigError, unknown

MakeOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer | None]
"""Makes the optimiser of parameters; None where there are none to train (an empty client or server part)."""

# LBFGS wants a closure, SparseAdam sparse gradients, Muon matrices only: none of them fits any model's step here.
_UNFIT = {"optimizer", "lbfgs", "sparseadam", "muon"}

# How an optimiser is computed is the engine's business.
_OURS = {"params", "lr", "foreach", "fused", "capturable", "differentiable"}


def optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    """The classes of torch.optim that can be named, in lower case."""
    found = {
        n.lower(): c
        for n, c in vars(torch.optim).items()
        if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer)
    }
    return {n: c for n, c in found.items() if n not in _UNFIT}


def make_optimizer(name: str, lr: float, options: Mapping[str, Any]) -> MakeOptimizer:
    """The maker for `name` (lower case, e.g. "adam") with rate `lr`. Raises ConfigError before anything is trained."""
    known = optimizers()
    if name not in known:
        raise ConfigError(unknown("optimizer", name, sorted(known)))
    kind: Callable[..., torch.optim.Optimizer] = known[name]
    parameters = [n for n in inspect.signature(known[name]).parameters if n not in _OURS]
    for option in options:
        if option not in parameters:
            raise ConfigError(unknown(f"option of {name}", option, parameters))
    try:
        # One idle step: it also loads what torch loads at the first one (seconds), so that no run's clock counts it.
        probe = nn.Parameter(torch.zeros(1))
        probe.grad = torch.zeros(1)
        kind([probe], lr=lr, **options).step()
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"the optimizer {name!r} refuses {dict(options)}: {error}; correct these options") from None

    def make(parameters: Iterable[Tensor]) -> torch.optim.Optimizer | None:
        trained = [p for p in parameters if p.requires_grad]
        return kind(trained, lr=lr, **options) if trained else None

    return make


# Optimisers whose rule is elementwise, so that one step on stacked tensors is every client's own step. The others
# (Adafactor's row means, ASGD's and NAdam's history of rates) are the local engine's.
ELEMENTWISE = {"adadelta", "adagrad", "adam", "adamax", "adamw", "radam", "rmsprop", "rprop", "sgd"}


@dataclass(frozen=True)
class Rule:
    """What the stacked engine needs to know of an optimiser whose rule is elementwise.

    `plain`: gradient descent and nothing else, w <- w - lr (g + weight_decay w). `fused`: torch has it as one operation
    per tensor, here.
    """

    plain: bool
    weight_decay: float
    fused: bool

    def quicken(self, optimizer: torch.optim.Optimizer) -> None:
        """Have the steps computed as one operation per tensor, where there is such a one."""
        if self.fused:
            for group in optimizer.param_groups:
                group["fused"], group["foreach"] = True, False

    def clock_device(self, parameter: Tensor) -> torch.device:
        """Where torch wants this optimiser's step counter."""
        return parameter.device if self.fused else torch.device("cpu")


def rule_of(make: MakeOptimizer) -> Rule:
    """The rule of the optimisers that `make` makes."""
    optimizer = make([torch.zeros(1, requires_grad=True)])
    assert optimizer is not None, "a parameter that is trained has an optimiser"
    d, kind = optimizer.defaults, type(optimizer)
    plain = kind is torch.optim.SGD and not (d["momentum"] or d["nesterov"] or d["maximize"])
    fused = kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
    return Rule(plain, d.get("weight_decay", 0.0), fused)


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Take a `state_dict()`, tensors as they are: torch's own loading casts them to the parameters' type, which changes
    numbers that an optimiser keeps in another one (NAdam's)."""
    optimizer.load_state_dict(copy.deepcopy(dict(state)))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in state["state"].items():
        kept = {n: v.clone() if isinstance(v, Tensor) else v for n, v in values.items()}
        optimizer.state[parameters[index]] = kept


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
