"""Skewed labels: each class is divided in shares drawn from a Dirichlet distribution (Hsu et al., 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from cutlayer import seeds
from cutlayer.data.partitions.scheme import Indices, Partition, partition_scheme
from cutlayer.errors import DataError
from cutlayer.plugins import option

_TRIES = 10


@partition_scheme(
    "dirichlet",
    title="Dirichlet",
    summary="shares of each class drawn from Dirichlet(alpha): a small alpha gives skewed labels (Hsu et al., 2019)",
    paper="arXiv 1909.06335",
)
class Dirichlet(Partition):
    """Deals the same rows as the DirichletPartitioner of flwr-datasets under the same seed.

    Drawn again, up to ten times, while a client remains without samples.
    """

    by_class: ClassVar = True

    dirichlet_alpha: float = option(0.5, gt=0)
    """Label skew: a small value (0.1) is strongly skewed, a large one (100) is nearly iid."""

    def deal(
        self, labels: npt.NDArray[Any], order: Indices, clients: int, seed: int, owners: npt.NDArray[Any] | None
    ) -> Sequence[Indices]:
        """The first draw that leaves no client empty."""
        for attempt in range(_TRIES):
            rng = np.random.default_rng(seeds.derive(seed, "partition", "dirichlet", attempt))
            parts = self._draw(labels[order], order, clients, rng)
            empty = [client for client, part in enumerate(parts) if len(part) == 0]
            if not empty:
                return parts
        raise DataError(
            f"client {empty[0]} would get none of the {len(order)} training samples with "
            f"dirichlet_alpha={self.dirichlet_alpha} and {clients} clients ({_TRIES} draws tried): raise "
            "dirichlet_alpha or use fewer clients"
        )

    def _draw(self, labels: npt.NDArray[Any], order: Indices, clients: int, rng: np.random.Generator) -> list[Indices]:
        """One draw; `labels` are those of the rows `order`."""
        hands: list[list[Indices]] = [[] for _ in range(clients)]
        for label in np.unique(labels):
            members = order[labels == label]
            shares = rng.dirichlet(np.full(clients, float(self.dirichlet_alpha)))
            ends = (np.cumsum(shares) * len(members)).astype(int)[:-1]
            for hand, piece in zip(hands, np.split(members, ends), strict=True):
                hand.append(piece)
        return [np.concatenate(hand) for hand in hands]
