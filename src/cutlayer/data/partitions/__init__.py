"""Divides the training set among the clients. One scheme is one file.

Every built-in scheme deals all rows: none is lost if the samples do not divide evenly.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cutlayer import plugins, seeds
from cutlayer.data.own import own_code
from cutlayer.data.partitions.scheme import Indices, Partition, partition_scheme
from cutlayer.errors import ConfigError, DataError

__all__ = ["Indices", "Partition", "class_counts", "partition", "partition_scheme"]


def partition(
    labels: npt.ArrayLike,
    clients: int,
    how: str | Partition = "iid",
    *,
    seed: int,
    client_column: npt.ArrayLike | None = None,
    samples_per_client: int | None = None,
    **options: Any,
) -> list[Indices]:
    """Divide the training samples with `labels` [n] (integers) among `clients` clients.

    Returns one ascending int64 array of row numbers per client. No array is empty, and no row is in two of them.
    Together they are all rows. With `samples_per_client`, they are that number times C rows, drawn at random (iid: each
    client gets exactly that number; otherwise it is the mean). The same arguments always give the same result.

    `how` is a name (iid, dirichlet, shards, quantity, column, or an entry point), `path/to/file.py:name`,
    `package.module:name`, or a `Partition`. `options` are those of the scheme:

        iid        none; client sizes differ by at most one
        dirichlet  dirichlet_alpha
        shards     shards_per_client
        quantity   quantity
        column     none; client_column [n] has exactly `clients` distinct values, client k holds the k-th smallest

    Raises ConfigError for an option that is out of range or has no effect, and DataError if these samples cannot be
    divided in this way.
    """
    name = how if isinstance(how, str) else type(how).__name__
    scheme = _scheme(how, options)
    y = np.asarray(labels)
    _check(len(y), clients, samples_per_client)
    if samples_per_client is not None and not scheme.limits_samples:
        raise ConfigError(
            f"samples_per_client={samples_per_client} has no effect on the partition {name!r}: use another partition, "
            "or leave it out"
        )
    order = seeds.generator(seed, "partition", "shuffle").permutation(len(y))
    order = order if samples_per_client is None else order[: clients * samples_per_client]
    owners = None if client_column is None else np.asarray(client_column)
    with own_code(scheme, f"the partition {name!r}"):
        parts = scheme.deal(y, order, clients, seed, owners)
    return _dealt(name, parts, order, clients)


def class_counts(labels: npt.ArrayLike, parts: list[Indices], classes: int) -> npt.NDArray[np.int64]:
    """How many samples of each class each client holds: [clients, classes]. `labels` [n] are 0..classes-1."""
    y = np.asarray(labels)
    counts = [np.bincount(y[part], minlength=classes) for part in parts]
    return np.array(counts, dtype=np.int64).reshape(len(parts), classes)


def _scheme(how: str | Partition, options: Mapping[str, Any]) -> Partition:
    """The scheme with its options. Raises ConfigError for an option that it does not have."""
    if isinstance(how, Partition):
        if options:
            raise ConfigError(f"{min(options)} is given beside {how!r}, which has its options already: leave it out")
        return how
    found = plugins.load("partition", how)
    entry = plugins.find("partition", how)
    if not (inspect.isclass(found) and issubclass(found, Partition)) or inspect.isabstract(found):
        raise ConfigError(f"partition {how!r} is not a Partition with a method deal: derive a class from Partition")
    for odd in sorted(set(options) - entry.option_names):
        raise ConfigError(_no_effect(odd, options[odd], how))
    return found.of(options)


def _no_effect(name: str, value: object, how: str) -> str:
    """The sentence for an option that the partition `how` does not have."""
    owners = [known for known, entry in plugins.index("partition").items() if name in entry.option_names]
    if not owners:
        return f"{name} = {value!r} has no effect on the partition {how!r}: leave it out"
    whose = ", ".join(map(repr, owners))
    return f"{name} = {value!r} has no effect on the partition {how!r}: it belongs to {whose}; leave it out"


def _check(rows: int, clients: int, samples_per_client: int | None) -> None:
    if clients < 1:
        raise ConfigError(f"clients={clients} is not a number of clients: use 1 or more")
    if clients > rows:
        raise DataError(f"clients={clients} is more than the {rows} training samples: use at most {rows} clients")
    if samples_per_client is None:
        return
    if samples_per_client < 1:
        raise ConfigError(f"samples_per_client={samples_per_client} is too few: use 1 or more")
    if samples_per_client * clients > rows:
        raise DataError(
            f"samples_per_client={samples_per_client} for {clients} clients needs {samples_per_client * clients} "
            f"training samples, but there are {rows}: use at most {rows // clients} samples per client, or fewer "
            "clients"
        )


def _dealt(name: str, parts: Sequence[npt.ArrayLike], order: Indices, clients: int) -> list[Indices]:
    """The result of a scheme as ascending row numbers. Raises DataError if it is not a partition of `order`."""
    hands = [np.asarray(part) for part in parts]
    if len(hands) != clients:
        raise DataError(f"the partition {name!r} gave {len(hands)} parts for {clients} clients: return one part each")
    for client, hand in enumerate(hands):
        if hand.ndim != 1 or hand.dtype.kind not in "iu" or len(hand) == 0:
            raise DataError(
                f"the partition {name!r} gave client {client} an array of shape {hand.shape} and type {hand.dtype}: "
                "return row numbers [n], at least one per client"
            )
    rows = np.concatenate(hands)
    if len(np.unique(rows)) < len(rows):
        raise DataError(f"the partition {name!r} gave a row to two clients, or twice to one: assign each row once")
    if not np.isin(rows, order).all():
        raise DataError(f"the partition {name!r} gave rows that are not available: choose among those in `order`")
    return [np.sort(hand.astype(np.int64)) for hand in hands]
