"""The rows of each server step of SplitFed V2, and their order."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
from support import client_state, difference, make, mlp, server_state, train  # type: ignore[import-not-found]

from cutlayer import Run

TINY: dict[str, Any] = {
    "algorithm": "sflv2",
    "data": "digits",
    "model": "mlp",
    "clients": 3,
    "samples_per_client": 20,
    "batch": 8,
    "test": 30,
}


def trained(**options: Any) -> Run:
    """A finished run on digits."""
    run = Run(**TINY, **options)
    run.run()
    return run


def second(sizes: list[int], **options: Any) -> Run:
    """A finished run of SplitFed V2 on random data."""
    return train("sflv2", make(mlp), sizes, (6,), cut="1", **options)


def off(a: Run, b: Run) -> float:
    """The largest difference between the models of two runs."""
    pairs = [(client_state(a, k), client_state(b, k)) for k in range(a.config.clients)]
    return max(difference(x, y) for x, y in [*pairs, (server_state(a), server_state(b))])


@pytest.mark.parametrize(("sizes", "options"), [([10], {}), ([4, 9, 6], {"local_steps": 1, "rounds": 3})])
def test_both_orders_are_one(sizes: list[int], options: dict[str, Any]) -> None:
    """Equal bit for bit with one client, or with one batch per client."""
    assert off(*(second(sizes, server_order=order, **options) for order in ("interleaved", "sequential"))) == 0


def test_client_by_client_each_through_its_epoch() -> None:
    """A step has one client's rows. A client's batches follow one another. Each round has another order of clients."""
    run = Run(**TINY, server_order="sequential", rounds=4, engine="local")
    steps = list(run)
    rounds = [[r.clients for r in steps if r.round == n] for n in range(4)]
    orders = [[(*who, len(list(times))) for who, times in groupby(turns)] for turns in rounds]
    assert all(sorted(order) == [(0, 3), (1, 3), (2, 3)] for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    assert off(run, trained(server_order="interleaved", rounds=4, engine="local")) > 1e-3


def test_stacked_clients_do_the_same() -> None:
    runs = [trained(server_order="sequential", rounds=2, participation=0.7, engine=e) for e in ("local", "stacked")]
    assert off(*runs) < 1e-4
