"""What a partition is: a class with its own options and one method, `deal`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from cutlayer.plugins import Thing, register

Indices = npt.NDArray[np.int64]
P = TypeVar("P", bound="Partition")


class Partition(Thing):
    """Says whose sample is whose. Its options are its fields, declared with `plugins.option`.

    `limits_samples`: whether the option `samples_per_client` has an effect on it. `by_class`: whether it deals by
    classes, so that it needs targets that are classes.
    """

    limits_samples: ClassVar[bool] = True
    by_class: ClassVar[bool] = False

    @abstractmethod
    def deal(
        self, labels: npt.NDArray[Any], order: Indices, clients: int, seed: int, owners: npt.NDArray[Any] | None
    ) -> Sequence[npt.ArrayLike]:
        """The row numbers of each of `clients` clients, every client at least one and no row twice.

        `labels` [n] are those of all rows (numbers in a regression; all 0 if a row has several targets). `order` are
        the rows to deal, shuffled: all of them, or those that `samples_per_client` leaves. `owners` [n] gives the owner
        of each row, if the data do. Draw random numbers from `seeds.generator(seed, ...)` only. Raises DataError if
        these samples cannot be dealt this way.
        """


def partition_scheme(name: str, *, title: str, summary: str, paper: str = "") -> Callable[[type[P]], type[P]]:
    """A decorator that registers a `Partition` under `name`."""
    return register("partition", name, title=title, summary=summary, paper=paper)
