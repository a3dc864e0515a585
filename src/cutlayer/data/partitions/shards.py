"""Sorted by label and cut into shards, which are dealt at random (McMahan et al., 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cutlayer import seeds
from cutlayer.data.partitions.scheme import Indices, Partition, partition_scheme
from cutlayer.errors import DataError
from cutlayer.plugins import option


@partition_scheme(
    "shards",
    title="Shards",
    summary="sorted by label, cut into shards, `shards_per_client` for each client (McMahan et al., 2017)",
    paper="arXiv 1602.05629",
)
class Shards(Partition):
    """The sizes of shards differ by at most one."""

    shards_per_client: int = option(2, ge=1)
    """Number of label-sorted shards that each client gets."""

    def deal(
        self, labels: npt.NDArray[Any], order: Indices, clients: int, seed: int, owners: npt.NDArray[Any] | None
    ) -> Sequence[Indices]:
        """`shards_per_client` shards for each client, drawn at random."""
        each, total = self.shards_per_client, clients * self.shards_per_client
        if total > len(order):
            raise DataError(
                f"shards_per_client={each} for {clients} clients makes {total} shards of {len(order)} training "
                f"samples, and client {clients - 1} could get an empty one: use at most {len(order) // clients} shards "
                "per client"
            )
        by_label = order[np.argsort(labels[order], kind="stable")]  # equal labels stay shuffled
        shards = np.array_split(by_label, total)
        hands = seeds.generator(seed, "partition", "shards").permutation(total).reshape(clients, each)
        return [np.concatenate([shards[shard] for shard in hand]) for hand in hands]
