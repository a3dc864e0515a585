"""The parts of one model as a template for those of equal models. In a comparison of seeds, algorithms or values of an
option, the same model is trained from other weights. Tracing it again for each of them took longer than some of the
trainings.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from cutlayer.copies import deep_copy
from cutlayer.models.parts import Parts, state_names


class Mould:
    """Parts without the values of their model's tensors, so that little memory is kept."""

    def __init__(self, parts: Parts, model: nn.Module) -> None:
        """Takes the form of `parts`, which are a cut of `model` and are not changed."""
        known = {name for name, _, _ in state_names(model)}
        names = {id(tensor): name for part in parts.all for name, tensor, _ in state_names(part) if name in known}
        places: dict[int, Any] = {tensor: torch.empty(0) for tensor in names}
        self._filled = [(names[tensor], place) for tensor, place in places.items()]
        self._parts = _copied(parts, places)

    def cast(self, model: nn.Module) -> Parts:
        """The parts of a model that equals the first one in form, with copies of its parameters and buffers."""
        state = {name: tensor for name, tensor, _ in state_names(model)}
        return _copied(self._parts, {id(place): deep_copy(state[name]) for name, place in self._filled})


def _copied(parts: Parts, known: dict[int, Any]) -> Parts:
    """Copies of the parts, which share among them what these share; `known` has what takes a tensor's place, by id."""
    client, server, *tail = deep_copy(list(parts.all), known)
    return replace(parts, client=client, server=server, tail=tail[0] if tail else None)
