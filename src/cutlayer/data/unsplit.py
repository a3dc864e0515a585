"""What a reader finds: plain arrays, and which of them are inputs, labels and owners."""

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
"""What folders and splits are called, in lower case, and which part of the data each name means."""


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
    """What a reader found: the training part, and a validation and a test part where the data bring their own.

    `client` [len(train.y)] says whose sample each training row is; `validation_client` and `test_client` say it of the
    rows of the other parts. `class_names` is set where labels are already 0..K-1; otherwise labels are mapped to their
    rank among all labels. `columns` names the columns of a table (x [n, columns]), which `sources` standardises, except
    those at `categories`, which are 0 or 1; it is empty for everything else. Missing values (NaN) of a table are
    filled in as `impute` says. `symmetric` asks for 8-bit inputs in [-1, 1] instead of [0, 1].

    `rows` is what one calls a row (pictures); `left_out` and `remarks` are for the line that says what was used;
    `recipe` is what the reader did to the inputs, in plain values. `several` holds the arrays of each part where a
    sample's inputs are several: `x` are then the numbers of rows in them (see `several`). `cited` are papers, libraries
    and BibTeX entries that the data are cited by, as `cutlayer.references` takes them.
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
        """Whose samples the rows of each part are, for the parts of which that is known."""
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
