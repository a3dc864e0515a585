"""What a cut yields: the parts of a model, and what crosses between them.

Shape legend: R rows of the batch, s... the shape of one sample's smashed data, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from cutlayer.types import Rows


class Part(nn.Module):
    """One part of a cut model. Owns its parameters under the names that they have in the whole model.

    Called with the rows that the part before it gave (each [R, s...]) or, being first, with the batch itself [R, ...].
    Gives the tuple of tensors that cross to the next part (each [R, s...]) or, being last, the logits [R, K].
    """

    # Names that a model's own children will hardly have: a part owns them as attributes.
    is_last_part = False
    copies_rows = False  # set where the part works in place on what it receives, which is not its own
    images_channels_last = False  # set where its images lie in memory with their channels last
    narrow_to: torch.dtype | None = None  # the type of its products in mixed precision

    def forward(self, received: Tensor | Rows) -> Tensor | Rows:
        """Rows [R, s...] each (or the batch) to rows [R, s...] each (or logits [R, K])."""
        rows = (received,) if isinstance(received, Tensor) else tuple(received)
        rows = tuple(row.clone() for row in rows) if self.copies_rows else rows
        if self.narrow_to is None:
            given = self.run_rows(rows)
        else:
            with torch.autocast(rows[0].device.type, self.narrow_to):
                given = self.run_rows(rows)
            given = tuple(g.float() for g in given) if self.is_last_part else given
        return given[0] if self.is_last_part else given

    def run_rows(self, rows: Rows) -> Rows:
        """The part's computation: what it received, [R, s...] each, to what it gives, [R, s...] each."""
        raise NotImplementedError


class PassThrough(Part):
    """A part without layers: gives what it received."""

    def run_rows(self, rows: Rows) -> Rows:
        """The same rows."""
        return rows


@dataclass(frozen=True)
class Crossing:
    """One tensor that crosses a cut: its shape without the batch dimension, and its type."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def differentiable(self) -> bool:
        """Floating-point tensors are; masks and positions are not."""
        return self.dtype.is_floating_point


@dataclass(frozen=True)
class Parts:
    """A model cut in two, or in three (U-shaped: client, server, and a tail that stays with the client).

    `client(x)` gives a tuple of tensors, always; `server(rows)` takes it and gives logits [R, K]. With a tail,
    `server(rows)` gives a tuple and `tail(rows)` the logits. `crossing` describes the tensors from client to server,
    `returning` those from server to tail. `method` is how the model was cut: "fx", "hooks" or "whole".
    """

    client: nn.Module
    server: nn.Module
    tail: nn.Module | None
    crossing: tuple[Crossing, ...]
    method: str
    returning: tuple[Crossing, ...] = ()

    @property
    def all(self) -> tuple[nn.Module, ...]:
        """The parts in the order data flows."""
        return (self.client, self.server) if self.tail is None else (self.client, self.server, self.tail)


class CannotCutError(Exception):
    """Why one method cannot cut a model there, as a sentence without its full stop. Never leaves this package."""


RAW_INPUT = "the raw input itself would be sent (to mean that, say 'input'): no privacy would be left"


def one_line(error: BaseException, limit: int = 160) -> str:
    """The kind of an error and the first line of its message."""
    text = str(error).strip().splitlines()
    line = f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
    return line if len(line) <= limit else line[: limit - 3] + "..."


def logits(output: Any) -> Any:
    """A model's output, or its `logits` where the output carries them under that name (as Hugging Face's do)."""
    if isinstance(output, (Tensor, fx.Proxy)):
        return output
    return getattr(output, "logits", output)


def tensors_in(value: Any) -> Rows:
    """The tensors in a (nested) tuple, list or dict, in order."""
    return tuple(leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))


def storage_of(tensor: Tensor) -> int:
    """Which memory a tensor lies in. Not its address: on the meta device every address is 0."""
    return int(tensor.untyped_storage()._cdata)


def batch_dimension(shape: tuple[int, ...], larger: tuple[int, ...], batch: int) -> int | None:
    """Which dimension is the batch, given a tensor's shape for `batch` rows and for one row more; None if none is."""
    if len(shape) != len(larger):
        return None
    sizes = list(zip(shape, larger, strict=True))
    follows = [d for d, size in enumerate(sizes) if size == (batch, batch + 1)]
    rest_fixed = all(a == b for d, (a, b) in enumerate(sizes) if d not in follows[:1])
    return follows[0] if follows and rest_fixed else None


def state_names(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Every name of a parameter or buffer (aliases too), its tensor, and whether the state dict has it."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield dot + name, parameter, True
        for name, buffer in module._buffers.items():
            if buffer is not None:
                yield dot + name, buffer, name not in module._non_persistent_buffers_set


def load_own(part: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a part its share of a whole model's state, which has more names."""
    part.load_state_dict({name: state[name] for name in part.state_dict()})


def fill_owners(names: Iterable[str], owners: dict[str, int], parts: int) -> dict[str, int]:
    """Owners for all `names`: state that no part uses goes with the state named before it (or else after it)."""
    names = list(names)
    first = next((owners[name] for name in names if name in owners), parts - 1)
    filled, last = {}, first
    for name in names:
        last = filled[name] = owners.get(name, last)
    return filled
