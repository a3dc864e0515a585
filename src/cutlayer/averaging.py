"""Client models become one, parameters and buffers alike: by their weighted mean (FedAvg: weights n_k / n), or by
another rule (`averagings`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from cutlayer.averagings import Averaging
from cutlayer.data.own import own_code
from cutlayer.errors import ConfigError
from cutlayer.frozen import load_moving, moving
from cutlayer.types import as_real, is_continuous

State = Mapping[str, Tensor]


def average_into(
    target: nn.Module,
    models: Sequence[nn.Module],
    weights: Sequence[float],
    rule: Averaging | None = None,
    origin: State | None = None,
) -> None:
    """Set `target` to the average of `models`, which may include it. Frozen parameters stay as they are."""
    load_moving(target, average([moving(m) for m in models], weights, rule, origin))


def average(
    states: Sequence[State], weights: Sequence[float], rule: Averaging | None = None, origin: State | None = None
) -> dict[str, Tensor]:
    """sum_k (w_k / sum w) states[k], name by name; or the result of another `rule`, given their `origin`.

    Real and complex buffers (batch normalisation's running statistics) are averaged like parameters; integer ones (its
    batch counter) take the largest value.
    """
    if rule is not None and not rule.plain:
        return combined({n: torch.stack([s[n] for s in states]) for n in states[0]}, weights, rule, origin)
    total = sum(weights)
    mean: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, first in states[0].items():
            if is_continuous(first):
                mean[name] = first * (weights[0] / total)
                for state, weight in zip(states[1:], weights[1:], strict=True):
                    mean[name].add_(state[name], alpha=weight / total)
            else:
                mean[name] = torch.stack([s[name] for s in states]).amax(0)
    return mean


def combined(
    models: State, weights: Sequence[float], rule: Averaging, origin: State | None = None
) -> dict[str, Tensor]:
    """The result of a rule for K models, whose tensors are [K, ...] each; for integer tensors, the median. Raises
    ConfigError if the rule fails or does not return one model.
    """
    real = {name: as_real(t) for name, t in models.items() if is_continuous(t)}
    found = {name: t.median(0).values for name, t in models.items() if name not in real}
    if not real:
        return found
    if rule.by_name:
        for name, one in _by_name(rule, real, weights).items():
            found[name] = torch.view_as_complex(one) if models[name].is_complex() else one
        return {name: found[name] for name in models}
    double = any(t.dtype == torch.float64 for t in real.values())
    wide = torch.float64 if double else torch.float32
    with torch.no_grad():
        matrix = torch.cat([t.reshape(len(t), -1).to(wide) for t in real.values()], 1)  # [K, d]
        start = None
        if rule.relative and origin is not None:
            start = torch.cat([as_real(origin[name]).reshape(-1).to(wide) for name in real])
        shares = torch.tensor(list(weights), dtype=torch.float64)
        one = _one(rule, matrix, (shares / shares.sum()).to(matrix.device, wide), start)
        for (name, t), part in zip(real.items(), one.split([t[0].numel() for t in real.values()]), strict=True):
            like = part.reshape(t.shape[1:]).to(t.dtype)
            found[name] = torch.view_as_complex(like) if models[name].is_complex() else like
    return {name: found[name] for name in models}


def _by_name(rule: Averaging, models: State, weights: Sequence[float]) -> dict[str, Tensor]:
    """The rule's result, tensor by tensor. Raises ConfigError."""
    what = f"`combine_named` of the averaging rule {rule.entry.name!r}"
    shares = torch.tensor(list(weights), dtype=torch.float64)
    with torch.no_grad(), own_code(rule, what):
        found = rule.combine_named(models, shares / shares.sum())
        shapes = {name: tuple(t.shape) for name, t in found.items()}
    if wrong := [name for name, t in models.items() if shapes.get(name) != tuple(t.shape[1:])]:
        raise ConfigError(
            f"{what} gives a tensor of the shape {shapes.get(wrong[0])} for {wrong[0]!r}: return one of each name, of "
            f"the shape {tuple(models[wrong[0]].shape[1:])}"
        )
    return {name: found[name].to(t.dtype) for name, t in models.items()}


def _one(rule: Averaging, models: Tensor, shares: Tensor, origin: Tensor | None) -> Tensor:
    """The rule's result [d]. Raises ConfigError."""
    what = f"`combine` of the averaging rule {rule.entry.name!r}"
    with own_code(rule, what):
        one = rule.combine(models, shares, origin)
        shape = tuple(one.shape)
    if shape != models.shape[1:]:
        raise ConfigError(
            f"{what} gives a tensor of the shape {shape} for models {tuple(models.shape)}: return one model, "
            f"{tuple(models.shape[1:])}"
        )
    return one
