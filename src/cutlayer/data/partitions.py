"""Whose sample is whose: the training set dealt to the clients.

    iid        shuffled and dealt evenly
    dirichlet  per class, shares drawn from Dirichlet(alpha): small alpha, skewed labels (Hsu et al., 2019)
    shards     sorted by label, cut into shards, `shards_per_client` each (McMahan et al., 2017)
    quantity   labels iid, client sizes growing linearly, with the square, or exponentially
    column     as a column of the data says

Dirichlet, quantity and column are flwr-datasets' partitioners. Its ShardPartitioner is not used: where the samples do
not divide evenly it drops rows, or else cannot promise `shards_per_client` shards to everybody.
"""

from __future__ import annotations

import contextlib
import io
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from cutlayer import seeds
from cutlayer.errors import ConfigError, DataError, unknown

Indices = npt.NDArray[np.int64]

PARTITIONS = ("iid", "dirichlet", "shards", "quantity", "column")
QUANTITIES = ("linear", "square", "exponential")
_DIRICHLET_TRIES = 10


def partition(
    labels: npt.ArrayLike,
    clients: int,
    how: str = "iid",
    *,
    seed: int,
    dirichlet_alpha: float = 0.5,
    shards_per_client: int = 2,
    quantity: str = "exponential",
    client_column: npt.ArrayLike | None = None,
    samples_per_client: int | None = None,
) -> list[Indices]:
    """Deal the training samples with `labels` [n] (integers) to `clients` clients.

    Returns one ascending int64 array of row numbers per client; none is empty, no row is in two, and together they
    are all rows, or with `samples_per_client` just C times so many, drawn at random (iid: each client gets just that
    number; else it is their mean). The same arguments always give the same result.

    how="iid": client sizes differ by at most one.
    how="dirichlet": `dirichlet_alpha` > 0; drawn again, up to ten times, while a client remains without samples.
    how="shards": `shards_per_client` label-sorted shards each, whose sizes differ by at most one.
    how="quantity": client k of 1..C holds a share proportional to k, k^2 or exp(k), as `quantity` says.
    how="column": `client_column` [n] with exactly `clients` distinct values; client k holds the k-th smallest value.

    Raises ConfigError for an option out of range or without effect; DataError if these samples cannot be dealt so.
    """
    y = np.asarray(labels)
    rows = len(y)
    _check(rows, clients, how, samples_per_client)
    order = seeds.generator(seed, "partition", "shuffle").permutation(rows)
    order = order if samples_per_client is None else order[: clients * samples_per_client]
    if how == "iid":
        parts: list[Any] = np.array_split(order, clients)
    elif how == "dirichlet":
        parts = _dirichlet(y, order, clients, dirichlet_alpha, seed)
    elif how == "shards":
        parts = _shards(y, order, clients, shards_per_client, seed)
    elif how == "quantity":
        parts = _quantity(order, clients, quantity)
    else:
        parts = _column(rows, client_column, clients)
    return [np.sort(np.asarray(part, dtype=np.int64)) for part in parts]


def class_counts(labels: npt.ArrayLike, parts: list[Indices], classes: int) -> npt.NDArray[np.int64]:
    """How many samples of each class each client holds: [clients, classes]. `labels` [n] are 0..classes-1."""
    y = np.asarray(labels)
    counts = [np.bincount(y[part], minlength=classes) for part in parts]
    return np.array(counts, dtype=np.int64).reshape(len(parts), classes)


def _check(rows: int, clients: int, how: str, samples_per_client: int | None) -> None:
    if how not in PARTITIONS:
        raise ConfigError(unknown("partition", how, PARTITIONS))
    if clients < 1:
        raise ConfigError(f"clients={clients} is not a number of clients: use 1 or more")
    if clients > rows:
        raise DataError(f"clients={clients} is more than the {rows} training samples: use at most {rows} clients")
    if samples_per_client is None:
        return
    if how == "column":
        raise ConfigError(
            f"samples_per_client={samples_per_client} has no effect on the partition 'column': use another partition, "
            "or leave it out"
        )
    if samples_per_client < 1:
        raise ConfigError(f"samples_per_client={samples_per_client} is too few: use 1 or more")
    if samples_per_client * clients > rows:
        raise DataError(
            f"samples_per_client={samples_per_client} for {clients} clients needs {samples_per_client * clients} "
            f"training samples, but there are {rows}: use at most {rows // clients} samples per client, or fewer "
            "clients"
        )


def _dirichlet(y: npt.NDArray[Any], order: Indices, clients: int, alpha: float, seed: int) -> list[Any]:
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ConfigError(f"dirichlet_alpha={alpha} is not a positive number: use .1 (skewed) to 100 (nearly iid)")
    flower = _flower("dirichlet")
    dataset = _dataset(row=order, label=y[order])
    for attempt in range(_DIRICHLET_TRIES):
        # The library's own retries would warn each time, and fail without saying which client stays empty.
        drawn = flower.DirichletPartitioner(
            num_partitions=clients,
            partition_by="label",
            alpha=float(alpha),
            min_partition_size=0,
            shuffle=False,
            seed=seeds.derive(seed, "partition", "dirichlet", attempt),
        )
        drawn.dataset = dataset
        parts = [drawn.load_partition(client)["row"][:] for client in range(clients)]
        empty = [client for client, part in enumerate(parts) if len(part) == 0]
        if not empty:
            return parts
    raise DataError(
        f"client {empty[0]} would get none of the {len(order)} training samples with dirichlet_alpha={alpha} and "
        f"{clients} clients ({_DIRICHLET_TRIES} draws tried): raise dirichlet_alpha or use fewer clients"
    )


def _shards(y: npt.NDArray[Any], order: Indices, clients: int, each: int, seed: int) -> list[Any]:
    if each < 1:
        raise ConfigError(f"shards_per_client={each} is too few: use 1 or more")
    total = clients * each
    if total > len(order):
        raise DataError(
            f"shards_per_client={each} for {clients} clients makes {total} shards of {len(order)} training samples, "
            f"and client {clients - 1} could get an empty one: use at most {len(order) // clients} shards per client"
        )
    by_label = order[np.argsort(y[order], kind="stable")]  # equal labels stay shuffled
    shards = np.array_split(by_label, total)
    hands = seeds.generator(seed, "partition", "shards").permutation(total).reshape(clients, each)
    return [np.concatenate([shards[shard] for shard in hand]) for hand in hands]


def _quantity(order: Indices, clients: int, quantity: str) -> list[Any]:
    if quantity not in QUANTITIES:
        raise ConfigError(unknown("quantity", quantity, QUANTITIES))
    flower = _flower("quantity")
    kinds = {
        "linear": flower.LinearPartitioner,
        "square": flower.SquarePartitioner,
        "exponential": flower.ExponentialPartitioner,
    }
    dealt = kinds[quantity](num_partitions=clients)
    dealt.dataset = _dataset(row=order)
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # exp(710) overflows; the sizes show it
            return [dealt.load_partition(client)["row"][:] for client in range(clients)]
    except ValueError:
        empty = [client for client, size in dealt.partition_id_to_size.items() if size < 1]
        if not empty:
            raise
        milder = "" if quantity == "linear" else ", or a milder quantity ('linear')"
        raise DataError(
            f"client {empty[0]} would get none of the {len(order)} training samples with quantity={quantity!r} and "
            f"{clients} clients: use fewer clients{milder}"
        ) from None


def _column(rows: int, column: npt.ArrayLike | None, clients: int) -> list[Any]:
    if column is None:
        raise DataError(
            "the data have no client column, which the partition 'column' needs: name it with client_column (CSV, "
            "Hugging Face), save an array 'client' (npz), or choose another partition"
        )
    owner = np.asarray(column)
    if owner.shape != (rows,):
        raise DataError(f"the client column has shape {owner.shape}, expected ({rows},): one owner per training sample")
    values = len(np.unique(owner))
    if values != clients:
        raise DataError(f"the client column has {values} distinct values, but clients={clients}: pass clients={values}")
    dealt = _flower("column").NaturalIdPartitioner(partition_by="owner")
    dealt.dataset = _dataset(row=np.arange(rows), owner=owner)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar cannot be switched off
        return [dealt.load_partition(client)["row"][:] for client in range(clients)]


def _flower(how: str) -> Any:
    """flwr-datasets' partitioners; imported here because that takes seconds, which iid and shards need not wait."""
    try:
        from flwr_datasets import partitioner  # type: ignore[import-untyped]
    except ImportError:
        raise ConfigError(
            f"the partition {how!r} needs the package flwr-datasets, which is not installed: pip install "
            "'flwr-datasets>=0.6', or use partition 'iid' or 'shards'"
        ) from None
    return partitioner


def _dataset(**columns: npt.NDArray[Any]) -> Any:
    """The columns as a data set in memory: the library deals rows of this, and never sees the samples themselves."""
    from datasets import Dataset  # type: ignore[import-untyped]

    return Dataset.from_dict(columns)
