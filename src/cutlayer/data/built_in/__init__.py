"""Data sets that are found by name: one file each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from cutlayer.plugins import register

F = TypeVar("F", bound=Callable[..., Any])


def data_set(name: str, *, title: str = "", summary: str = "", paper: str = "", library: str = "") -> Callable[[F], F]:
    """A decorator that registers a function that returns a data set, in any form that `sources.load` takes.

    The function takes no arguments except its options: keyword-only parameters with defaults. `paper` and `library` are
    what the data are cited by (see `cutlayer.references`).
    """
    return register("data", name, title=title, summary=summary, paper=paper, library=library)
