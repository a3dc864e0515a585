"""Shuffled and dealt evenly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cutlayer.data.partitions.scheme import Indices, Partition, partition_scheme


@partition_scheme("iid", title="IID", summary="shuffled and dealt evenly")
class Iid(Partition):
    """Client sizes differ by at most one."""

    def deal(
        self, labels: npt.NDArray[Any], order: Indices, clients: int, seed: int, owners: npt.NDArray[Any] | None
    ) -> Sequence[Indices]:
        """The shuffled rows in equal pieces."""
        return np.array_split(order, clients)
