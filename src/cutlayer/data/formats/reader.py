"""What a data format is: a class that recognises a path and reads it, with options of its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

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


class Columns(Format):
    """Base of formats whose columns have names: one is the label, and one may say whose sample a row is."""

    label_column: str = option("label")
    """The label's column (CSV, Hugging Face)."""
    client_column: str | None = option(None)
    """The column that says whose sample a row is (CSV, Hugging Face), for the partition `column`."""


def data_format(name: str, *, title: str, summary: str, asked_first: bool = False) -> Callable[[type[R]], type[R]]:
    """A decorator that registers a `Format` under `name`. `asked_first`: before others that might fit a path too."""
    return register("format", name, title=title, summary=summary, asked_first=asked_first)
