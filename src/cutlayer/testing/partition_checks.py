"""Proofs of partitions."""

from __future__ import annotations

from typing import Any

import numpy as np

from cutlayer import plugins
from cutlayer.data import partition
from cutlayer.data.partitions import Partition
from cutlayer.errors import DataError
from cutlayer.testing.material import fail

_ROWS, _CLASSES = 120, 4


def check_partition(scheme: Any, *, clients: int = 5, **options: Any) -> None:
    """Test that a partition keeps the promises of all partitions. `options` are its own.

    - Every client gets at least one row, no row is assigned twice, and none is left over.
    - The same seed gives the same rows, and each client's rows are sorted.
    - If `samples_per_client` has an effect, exactly that number of rows per client is assigned in total.

    Raises AssertionError, which says what does not hold, and ConfigError for a partition that cannot be found.
    """
    reference, values = (scheme, {}) if isinstance(scheme, Partition) else plugins.adopt("partition", scheme)
    name = reference if isinstance(reference, str) else repr(reference)
    values = {**values, **options}
    y = np.random.default_rng(0).permutation(np.arange(_ROWS) % _CLASSES)
    owners = np.arange(_ROWS) % clients
    limits = True if isinstance(reference, Partition) else plugins.load("partition", reference).limits_samples

    def dealt(seed: int, limit: int | None = None) -> list[np.ndarray]:
        try:
            return partition(y, clients, reference, seed=seed, client_column=owners, samples_per_client=limit, **values)
        except DataError as error:
            fail(name, str(error))

    for seed in range(3):
        parts = dealt(seed)
        if (left := _ROWS - len(np.concatenate(parts))) != 0:
            fail(name, f"it leaves {left} of {_ROWS} rows unassigned")
        if not all(np.array_equal(a, b) for a, b in zip(parts, dealt(seed), strict=True)):
            fail(name, f"with the same seed, {seed}, it deals other rows the second time: draw from seeds.generator")
    if limits and (count := len(np.concatenate(dealt(0, 7)))) != 7 * clients:
        fail(name, f"with samples_per_client = 7 it deals {count} rows to {clients} clients, not {7 * clients}")
