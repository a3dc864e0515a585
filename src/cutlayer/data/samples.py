"""What a loaded data set is: tensors, split three ways."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cutlayer.errors import DataError
from cutlayer.types import Rows

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
"""The arguments of a model: one tensor, several as arguments, or several by the names of arguments. Rows first."""


@dataclass(frozen=True)
class Samples:
    """Inputs [n, ...] (floating point features or images, or integer tokens; or several such tensors) and targets `y`
    [n, t...] (classes as int64, or numbers).
    """

    inputs: Inputs
    y: Tensor

    @property
    def in_memory(self) -> bool:
        """Whether all inputs are in memory. If not (see `lazy`), only batches have `rows` and `x`."""
        return True

    @property
    def form(self) -> Samples:
        """The first sample, with the shape and type of the inputs."""
        return self[:1]

    def __len__(self) -> int:
        return len(self.y)

    @property
    def ahead(self) -> int:
        """The useful number of batches to announce; 0: none."""
        return 0

    def foresee(self, batches: Iterable[tuple[Tensor, np.ndarray]]) -> None:
        """These batches, each (rows [R], epochs [R]), are requested next, in this order."""

    def batch(self, rows: Tensor, epochs: np.ndarray, sizes: Sequence[int] = ()) -> Samples:
        """The samples at `rows` [R], to train on in these `epochs` [R] of their owners: random transforms differ. They
        are batches of `sizes`, which were announced (without sizes: they were not).
        """
        return self[rows.to(self.y.device)]

    def share(self, rows: Tensor) -> Samples:
        """The samples at `rows` as a separate set: one client's."""
        return self[rows]

    def close(self) -> None:
        """End the processes that read samples, if there are any; they start again when something is read."""

    def __getitem__(self, rows: Tensor | slice) -> Samples:
        """The samples at `rows` (an index tensor or a slice)."""
        if isinstance(rows, Tensor):
            return Samples(each(self.inputs, lambda x: x.index_select(0, rows)), self.y.index_select(0, rows))
        return Samples(each(self.inputs, lambda x: x[rows]), self.y[rows])

    @property
    def rows(self) -> Rows:
        """The tensors of the inputs, in order: each [n, ...]."""
        return inputs_of(self.inputs)

    @property
    def x(self) -> Tensor:
        """The inputs [n, ...] if they are one tensor. Raises DataError if they are several."""
        if not isinstance(self.inputs, Tensor):
            raise DataError(
                f"this needs one input tensor per sample, but the data have {len(self.rows)}: choose data with one"
            )
        return self.inputs

    def to(self, where: torch.dtype | torch.device) -> Samples:
        """The same samples on a device, or with floating point inputs and targets in a type."""
        if isinstance(where, torch.device):
            return replace(self, inputs=each(self.inputs, lambda x: x.to(where)), y=self.y.to(where))

        def typed(tensor: Tensor) -> Tensor:
            return tensor.to(where) if tensor.is_floating_point() else tensor

        return replace(self, inputs=each(self.inputs, typed), y=typed(self.y))


@dataclass(frozen=True)
class AtClient(Samples):
    """Test rows that stay on the machine of their `client`: only their number `count` is known here. `inputs` and `y`
    have the shapes and types, without rows.
    """

    client: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows: Tensor | slice) -> Samples:
        """Raises DataError: the rows are not here."""
        raise DataError(
            f"the {self.count} own test rows of client {self.client} are on its machine: only their scores can be "
            "requested"
        )


def each(x: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """Inputs of the same form, each tensor changed."""
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, Mapping):
        return {name: change(tensor) for name, tensor in x.items()}
    return tuple(change(tensor) for tensor in x)


def called(model: Callable[..., Any], x: Inputs) -> Any:
    """A model's outputs for inputs: one argument, several, or several by name."""
    if isinstance(x, Tensor):
        return model(x)
    return model(**x) if isinstance(x, Mapping) else model(*x)


def inputs_of(x: Inputs) -> Rows:
    """The tensors of inputs, in order: each [n, ...]."""
    if isinstance(x, Tensor):
        return (x,)
    return tuple(x.values()) if isinstance(x, Mapping) else tuple(x)


@dataclass(frozen=True)
class Source:
    """A loaded data set.

    `train` contains the rows that are divided among the clients; `validation` and `test` are held out from all of them.
    `class_names` names the labels 0..K-1; it is empty if targets are quantities or classes without names.
    `client_column` [len(train)] says to which client each training row belongs, if the data say so (otherwise None): a
    number 0..C-1, whose name is in `owner_names`. `validation_clients` and `test_clients` say the same for held-out
    rows; -1 is an owner without training rows. `preprocessing` describes how inputs were preprocessed, in plain values
    that JSON can hold; `preprocessed` does the same to new rows. `account` is a line about what was read, used and left
    out. `cited` are the citations of the data. `test_drawn` is true if the test rows were drawn with a seed because the
    data brought none.
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
    cited: tuple[str, ...] = ()
    test_drawn: bool = False

    def to(self, device: torch.device) -> Source:
        """The same data set on a device."""
        parts = {name: getattr(self, name).to(device) for name in ("train", "validation", "test")}
        return replace(self, **parts)

    def close(self) -> None:
        """End the processes that read samples, if there are any."""
        for part in (self.train, self.validation, self.test):
            part.close()

    def real(self, dtype: torch.dtype) -> Source:
        """The same data set with whole-number inputs as real numbers."""

        def change(samples: Samples) -> Samples:
            real = each(samples.inputs, lambda x: x if x.is_floating_point() else x.to(dtype))
            return replace(samples, inputs=real)

        conversion = {**self.preprocessing.get("conversion", {}), "real": True}
        return replace(
            self,
            train=change(self.train),
            validation=change(self.validation),
            test=change(self.test),
            preprocessing={**self.preprocessing, "conversion": conversion},
        )

    def described(self) -> dict[str, Any]:
        """The facts about the data without the rows, in plain values, for the folder of a run."""
        return {
            "name": self.name,
            "account": self.account,
            "owner_names": list(self.owner_names),
            "preprocessing": dict(self.preprocessing),
        }

    @property
    def classes(self) -> int:
        """Number of named classes K; 0 if the targets are not named classes."""
        return len(self.class_names)
