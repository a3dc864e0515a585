"""Waiting ranks give signs of life, and ranks without signs are named."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch.distributed import HashStore, Store

from cutlayer.signs import Signs

LIMIT = 0.08
"""In seconds. A sign is due four times in this time."""


@contextmanager
def waiting(signs: Signs) -> Iterator[None]:
    """Another rank that gives signs because it waits."""
    end = threading.Event()

    def wait() -> None:
        while not end.wait(signs.pause / 4):
            signs.give()

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def of(store: Store, size: int) -> list[Signs]:
    return [Signs(store, rank, size, LIMIT) for rank in range(size)]


def test_who_waits_is_not_who_is_waited_for() -> None:
    ranks = of(HashStore(), 4)
    ranks[3].give()  # it waited earlier, but not now; rank 1 has never waited
    with waiting(ranks[2]):
        assert ranks[0].silent() == (1, 3)


def test_a_rank_that_has_found_out_and_left_is_not_missed() -> None:
    ranks = of(HashStore(), 3)
    with waiting(ranks[1]):
        assert ranks[0].silent() == (2,)
    assert ranks[1].silent() == (2,)  # rank 0 is silent, too, but has left


def test_ranks_that_wait_both_are_not_lost() -> None:
    """The cause of the delay is not a rank."""
    ranks = of(HashStore(), 2)
    with waiting(ranks[1]):
        assert ranks[0].silent() == ()


def test_who_looks_for_others_gives_signs_and_has_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for three pauses, so two ranks that look at the same time do not miss each other."""
    store, seen = HashStore(), list[bytes]()
    ranks = of(store, 2)

    def pause(seconds: float) -> None:
        seen.append(store.get("0"))
        if len(seen) == 3:
            ranks[1].give()

    monkeypatch.setattr(time, "sleep", pause)
    assert ranks[0].silent() == ()
    assert len(set(seen)) == 3


def test_signs_are_at_most_two_seconds_apart() -> None:
    assert Signs(HashStore(), 0, 2, 300.0).pause == 2.0
    assert Signs(HashStore(), 0, 2, 4.0).pause == 1.0


def test_who_does_not_come_is_named() -> None:
    ranks = of(HashStore(), 3)
    ranks[2].give()
    assert ranks[0].meet(LIMIT) == (1,)
    assert ranks[1].meet(LIMIT) == ()


def test_those_who_do_not_come_are_waited_for_together() -> None:
    began = time.monotonic()
    assert Signs(HashStore(), 0, 40, LIMIT).meet(0.5) == tuple(range(1, 40))
    assert time.monotonic() - began < 10  # half a second for each rank would take twice as long


class Asleep(HashStore):
    """A store that does not answer, since its machine has failed."""

    awake = threading.Event()

    def check(self, keys: list[str]) -> bool:
        return self.awake.wait(60) and super().check(keys)


def test_a_store_that_does_not_answer_is_that_of_rank_0() -> None:
    try:
        assert Signs(Asleep(), 1, 3, LIMIT).silent() == (0,)
    finally:
        Asleep.awake.set()
