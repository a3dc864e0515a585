"""Clients by a column of the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from cutlayer.data.partitions.scheme import Indices, Partition, partition_scheme
from cutlayer.errors import DataError


@partition_scheme("column", title="Column", summary="by a column of the data that names each row's client")
class Column(Partition):
    """Client k holds the rows with the k-th smallest value of the column."""

    limits_samples: ClassVar[bool] = False

    def deal(
        self, labels: npt.NDArray[Any], order: Indices, clients: int, seed: int, owners: npt.NDArray[Any] | None
    ) -> Sequence[Indices]:
        """Each owner's rows."""
        if owners is None:
            raise DataError(
                "the data have no client column, which the partition 'column' needs: name it with client_column (CSV, "
                "Hugging Face), save an array 'client' (npz), or choose another partition"
            )
        if owners.shape != labels.shape[:1]:
            raise DataError(
                f"the client column has shape {owners.shape}, expected ({len(labels)},): one owner per training sample"
            )
        values, whose, sizes = np.unique(owners, return_inverse=True, return_counts=True)
        if len(values) != clients:
            raise DataError(
                f"the client column has {len(values)} distinct values, but clients={clients}: pass "
                f"clients={len(values)}"
            )
        return np.split(np.argsort(whose, kind="stable"), np.cumsum(sizes)[:-1])
