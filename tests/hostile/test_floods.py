"""Clients that keep dialling: the server turns them away at little cost, logs only a few lines, and lets others in."""

from __future__ import annotations

import logging
import threading

import grpc
import pytest
from test_transport import SOON, Raw, serving, until  # type: ignore[import-not-found]

from cutlayer.remote.brake import CONNECTIONS, LINES, REFUSALS, WINDOW, Brake
from cutlayer.wire import messages as m


def test_a_brake_counts_by_name_and_host() -> None:
    brake = Brake()
    brake.over(0.0)
    said = [brake.refuse("a", "x") for _ in range(REFUSALS)]
    assert said.count(True) == LINES
    assert brake.blocks("a", "x")
    assert not brake.blocks("a", "y")
    assert not brake.blocks("b", "x")
    for _ in range(CONNECTIONS):
        brake.connect("b", "x")
    assert brake.blocks("b", "x")
    assert brake.over(WINDOW / 2) == {}
    assert brake.over(WINDOW + 1) == {("a", "x"): REFUSALS + 1 - LINES}  # the blocked attempt counts too
    assert not brake.blocks("a", "x")


def test_names_that_are_made_up_are_counted_together() -> None:
    brake = Brake()
    for number in range(1000):
        brake.refuse("a", f"stranger-{number}")
    assert brake.blocks("a", "another")
    assert not brake.blocks("b", "another")
    assert len(brake.over(1e9)) < 300


def test_many_clients_of_one_host_are_not_strangers() -> None:
    """Any number of a study's own clients may connect once each, even while another peer invents names."""
    brake = Brake()
    names = [f"client-{number}" for number in range(1000)]
    for name in names:
        assert not brake.blocks("a", name)
        brake.connect("a", name)
    for number in range(1000):
        brake.refuse("a", f"stranger-{number}")
    assert not any(brake.blocks("a", name) for name in names)
    assert brake.blocks("a", "another")


def ended(raw: Raw) -> str:
    """The end of a connection that the server does not want."""
    try:
        answer = raw.receive().message
        return str(answer.sentence) if isinstance(answer, m.Refused) else "welcome"
    except grpc.RpcError as error:
        return str(error.code().name)
    finally:
        raw.close()


def test_a_flood_of_refusals(caplog: pytest.LogCaptureFixture) -> None:
    def greet(said: m.Hello, identity: str | None) -> m.Welcome | m.Refused:
        admitted.append(said.client)
        if said.client == "client-7":
            return m.Refused("excluded", "client 7 is excluded: " + "x" * 4000)
        return m.Welcome(int(said.client.split("-")[1]), 8, 0, said.terms)

    admitted: list[str] = []
    with serving(greet=greet) as (_, port), caplog.at_level(logging.WARNING):
        ends = [ended(Raw(port, 7, welcome=False)) for _ in range(3 * REFUSALS)]
        assert admitted.count("client-7") <= 2 * REFUSALS  # a new window may have begun meanwhile
        assert any("RESOURCE_EXHAUSTED" in end for end in ends)
        lines = [r for r in caplog.records if "is refused" in r.getMessage()]
        assert LINES <= len(lines) <= 2 * LINES
        assert max(len(r.getMessage()) for r in lines) < 1500
        other = Raw(port, 1)
        assert admitted[-1] == "client-1"
        other.close()


def test_one_of_a_name_waits() -> None:
    """Of many streams that wait for their client's first stream to end, only the last keeps waiting. Another client can
    return meanwhile.
    """
    with serving() as (hub, port):
        first, honest = Raw(port, 0), Raw(port, 1)
        ends: list[str] = []

        def dial() -> None:
            ends.append(ended(Raw(port, 0, welcome=False)))

        threads = [threading.Thread(target=dial) for _ in range(20)]
        for thread in threads:
            thread.start()
        until(lambda: len(ends) == 19)
        assert len(hub._waiting) == 1
        assert all("connected already" in end for end in ends)
        honest.close()
        until(lambda: 1 not in hub.present)
        Raw(port, 1).close()
        first.close()
        for thread in threads:
            thread.join(SOON)
            assert not thread.is_alive()
