"""What a data format is: a class that recognises a path and reads it, with its own options."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import PrivateAttr

from cutlayer.data.targets import Targets
from cutlayer.data.unsplit import Array, Raw, pick
from cutlayer.errors import ConfigError
from cutlayer.plugins import Thing, option, register

R = TypeVar("R", bound="Format")


class Format(Thing):
    """Decides what is an input, a label and an owner, and nothing else: `sources` checks, splits and converts.

    Its options are its fields, declared with `plugins.option`. It raises DataError, with the file's name, for anything
    that it cannot read.
    """

    @classmethod
    def fits(cls, path: Path) -> bool:
        """Whether the existing file or folder looks like this format. Reads no more than names."""
        return False

    @abstractmethod
    def read(self, path: Path) -> Any:
        """A `Raw`; or anything else that a function given to `sources.load` may return, such as (x, y)."""

    def taken(self, found: Any, name: str, owners: Array | None = None) -> Raw:
        """A local `datasets.Dataset`, or a dictionary of them by part, read as this format reads files of them.
        `owners` give the owner of each row, if the data belong to several clients. Raises ConfigError: most formats
        cannot do this.
        """
        raise ConfigError(f"data_format = {self.entry.name!r} has no effect on data from Python: leave it out")

    def set_for(self, targets: Targets, folder: str) -> Self:
        """The same for a task with such targets, and a model in `folder` (empty: none). By default, this has no
        effect.
        """
        return self


class Sized(Format):
    """Base of formats of pictures."""

    resize: str | None = option(None)
    """Scale all pictures to HEIGHTxWIDTH, such as 224x224. Default: all pictures must have the same size."""


class Labelled(Format):
    """Base of formats whose columns have names: one may be the label, and one may say whose sample a row is."""

    label_column: str = option("label")
    """The column with the label (CSV, Hugging Face, text)."""
    client_column: str | None = option(None)
    """The column that names the client to which a row belongs (CSV, Hugging Face, text), for the partition `column`."""

    _alone: bool = PrivateAttr(False)

    def alone(self) -> Self:
        """The same for data of one client, which need not have the client column."""
        copy = self.model_copy()
        copy._alone = True
        return copy

    def owner_among(self, names: Sequence[str], source: str) -> str | None:
        """The client column, if there is one. Raises DataError if it was named and is not among the columns `names`."""
        if self.client_column is None or (self._alone and self.client_column not in names):
            return None
        pick("client column", self.client_column, names, f"set client_column to a column of {source}")
        return self.client_column


class Columns(Labelled):
    """Base of formats of tables, or of inputs in one of several columns."""

    columns: tuple[str, ...] = option(())
    """The columns used as inputs (CSV, Hugging Face), in this order. Default: all but the label and the client."""
    ignore_columns: tuple[str, ...] = option(())
    """Columns to leave out, such as identifiers (CSV, Hugging Face)."""
    impute: Literal["mean", "median", "zero"] | None = option(None)
    """Replacement for missing numbers in a table (CSV, Hugging Face): the mean or median of the column's training rows,
    or zero. A row with a missing category belongs to none. Default: missing values are an error."""


def data_format(name: str, *, title: str, summary: str, asked_first: bool = False) -> Callable[[type[R]], type[R]]:
    """A decorator that registers a `Format` under `name`. `asked_first`: before others that might fit a path too."""
    return register("format", name, title=title, summary=summary, asked_first=asked_first)
