"""What a data set is, once loaded: tensors in memory, split three ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """Inputs `x` [n, ...] (floating point features or images, or integer tokens) and class labels `y` [n] (int64)."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, rows: Tensor | slice) -> Samples:
        """The samples at `rows` (an index tensor or a slice)."""
        if isinstance(rows, Tensor):
            return Samples(self.x.index_select(0, rows), self.y.index_select(0, rows))
        return Samples(self.x[rows], self.y[rows])

    def to(self, where: torch.dtype | torch.device) -> Samples:
        """The same samples on a device, or with floating point inputs in a type."""
        if isinstance(where, torch.device):
            return Samples(self.x.to(where), self.y.to(where))
        return Samples(self.x.to(where) if self.x.is_floating_point() else self.x, self.y)


@dataclass(frozen=True)
class Source:
    """A loaded data set.

    `train` is what the clients share between them; `validation` and `test` are held out from them all.
    `class_names` names labels 0..K-1. `client_column` [len(train)] says whose sample each training row is, where the
    data say so (None otherwise): a number 0..C-1, whose name is in `owner_names`. `validation_clients` and
    `test_clients` say the same of the rows held out; -1 is an owner without training rows.

    `preprocessing` is what became of the inputs, in plain values that JSON can hold: `preprocessed` does the same to
    new rows. `account` is one line about what was read, used and left out.
    """

    name: str
    train: Samples
    validation: Samples
    test: Samples
    class_names: tuple[str, ...]
    client_column: Tensor | None = None
    owner_names: tuple[str, ...] = ()
    validation_clients: Tensor | None = None
    test_clients: Tensor | None = None
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    account: str = ""

    def to(self, device: torch.device) -> Source:
        """The same data set on a device."""
        parts = {name: getattr(self, name).to(device) for name in ("train", "validation", "test")}
        return replace(self, **parts)

    def described(self) -> dict[str, Any]:
        """What is known of the data besides the rows, in plain values, for the folder of a run."""
        return {
            "name": self.name,
            "account": self.account,
            "owner_names": list(self.owner_names),
            "preprocessing": dict(self.preprocessing),
        }

    @property
    def classes(self) -> int:
        """Number of classes K."""
        return len(self.class_names)
