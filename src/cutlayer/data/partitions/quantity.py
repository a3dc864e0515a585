"""Client sizes that grow from client to client; labels stay iid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cutlayer.data.partitions.scheme import Indices, Partition, partition_scheme
from cutlayer.errors import DataError
from cutlayer.plugins import option

_GROWTH: dict[str, Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]] = {
    "linear": np.positive,
    "square": np.square,
    "exponential": np.exp,
}


@partition_scheme(
    "quantity",
    title="Quantity",
    summary="iid labels, with client sizes that grow linearly, with the square, or exponentially",
)
class Quantity(Partition):
    """Client k of 1..C holds a share proportional to k, k^2 or exp(k), rounded down; the last takes the remainder.

    Deals the same rows as the Linear-, Square- and ExponentialPartitioner of flwr-datasets.
    """

    quantity: Literal["linear", "square", "exponential"] = option("linear")
    """How client sizes grow."""

    def deal(
        self, labels: npt.NDArray[Any], order: Indices, clients: int, seed: int, owners: npt.NDArray[Any] | None
    ) -> Sequence[Indices]:
        """The shuffled rows in pieces of growing sizes."""
        sizes = self._sizes(len(order), clients)
        empty = np.flatnonzero(sizes < 1)
        if len(empty):
            milder = "" if self.quantity == "linear" else ", or a milder quantity ('linear')"
            raise DataError(
                f"client {empty[0]} would get none of the {len(order)} training samples with "
                f"quantity={self.quantity!r} and {clients} clients: use fewer clients{milder}"
            )
        return np.split(order, np.cumsum(sizes)[:-1])

    def _sizes(self, rows: int, clients: int) -> Indices:
        """How many of `rows` rows each client gets. Less than 1 if the units overflow."""
        with np.errstate(over="ignore", invalid="ignore"):  # exp(710) overflows
            units = _GROWTH[self.quantity](np.linspace(1, clients, clients))
            sizes: Indices = (units / units.sum() * rows).astype(np.int64)
            sizes[-1] += rows - sizes.sum()
        return sizes
