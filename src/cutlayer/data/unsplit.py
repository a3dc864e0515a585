"""The result of a reader: plain arrays, and their roles as inputs, labels and owners."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from cutlayer.errors import DataError, unknown

Array = npt.NDArray[Any]

SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
"""The names of folders and splits, in lower case, and the part of the data that each means."""


def part_called(name: str) -> str | None:
    """The part of the data that a folder or a split of this name is; None for any other name."""
    return SPLITS.get(name.lower())


@dataclass(frozen=True)
class Section:
    """Inputs `x` [n, ...] and labels `y` [n] as they were found: any numeric inputs; integer or string labels."""

    x: Array
    y: Array


@dataclass(frozen=True)
class Raw:
    """The result of a reader: the training part, and a validation and a test part if the data have their own.

    `client` [len(train.y)] gives the owner of each training row; `validation_client` and `test_client` do so for the
    other parts. `class_names` is set if labels are already 0..K-1; otherwise labels are mapped to their rank among all
    labels. `columns` names the columns of a table (x [n, columns]), which `sources` standardises, except those at
    `categories`, which are 0 or 1; it is empty for everything else. Missing values (NaN) of a table are filled in as
    `impute` says. `symmetric` asks for 8-bit inputs in [-1, 1] instead of [0, 1].

    `rows` is the word for rows (pictures); `left_out` and `remarks` are for the line about the data; `recipe` describes
    the reader's changes to the inputs, in plain values. `several` has the arrays of each part if a sample has several
    inputs: `x` are then the numbers of rows in them (see `several`). `cited` are papers, libraries and BibTeX entries
    for citing the data, as `cutlayer.references` takes them.
    """

    name: str
    train: Section
    validation: Section | None = None
    test: Section | None = None
    client: Array | None = None
    class_names: tuple[str, ...] | None = None
    columns: tuple[str, ...] = ()
    symmetric: bool = False
    validation_client: Array | None = None
    test_client: Array | None = None
    categories: tuple[int, ...] = ()
    impute: str | None = None
    rows: str = "rows"
    left_out: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    several: Mapping[str, Any] = field(default_factory=dict)
    cited: tuple[str, ...] = ()

    def owners(self) -> dict[str, Array]:
        """The owners of the rows of each part, for parts with known owners."""
        every = {"train": self.client, "validation": self.validation_client, "test": self.test_client}
        return {name: owner for name, owner in every.items() if owner is not None}

    def parts(self) -> dict[str, Section]:
        """The parts that exist, by name."""
        every = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: part for name, part in every.items() if part is not None}


def pick(kind: str, value: str, names: Sequence[str], hint: str) -> int:
    """The position of the column `value` in `names`. Raises DataError with the nearest names if it is not there."""
    if value in names:
        return names.index(value)
    few = list(names)
    if len(few) > 20:  # a table of pixels has hundreds of columns: show the near ones and the first
        few = [*difflib.get_close_matches(value, few, n=3), *few[:10], f"... ({len(names)} in all)"]
    raise DataError(f"{unknown(kind, value, dict.fromkeys(few))}; {hint}")
