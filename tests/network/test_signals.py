"""SIGTERM and SIGINT at any moment: a message and an exit code, no traceback, and the run can continue."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from trial import CONFIG, PATIENCE, Trial, finished, same_as_local, until  # type: ignore[import-not-found]

SAVING = CONFIG + "checkpoint_every = 1\n"
pytestmark = [pytest.mark.network, pytest.mark.timeout(400)]  # seven processes start, one after another


@pytest.fixture
def trial(tmp_path: Path) -> Iterator[Trial]:
    made = Trial(tmp_path, "sglr", rounds=200, config=SAVING)
    yield made
    made.stop()


def stopped(t: Trial, name: str, process: Any, code: int) -> None:
    """The process ends soon, with this code and without a traceback."""
    assert process.wait(PATIENCE) == code, t.log(name)[-3000:]
    assert "Traceback" not in t.log(name), t.log(name)[-3000:]


def saving(t: Trial, place: str) -> Callable[[], bool]:
    """A function that tells whether a state is being written there. It looks for a while, since writing is quick."""

    def look() -> bool:
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            if any(p.name.endswith(".new") for p in (t.folder / place).glob(".*")):
                return True
        return False

    return look


def test_the_server_is_asked_to_stop(trial: Trial) -> None:
    """While it waits for clients, in the middle of training, and while it saves. The clients stay and continue."""
    t = trial
    server = t.serve()
    until(lambda: "listening" in t.log("server"), "listening", t)
    server.send_signal(signal.SIGTERM)
    stopped(t, "server", server, 130)
    assert "continue with: the same command" in " ".join(t.log("server").split())

    server, clients = t.serve(), [t.join(k) for k in range(3)]
    until(lambda: len(t.steps()) > 20, "twenty steps", t)
    server.send_signal(signal.SIGTERM)
    stopped(t, "server", server, 130)
    done = len(t.steps())
    server = t.serve()
    until(lambda: len(t.steps()) > done + 6, "steps beyond", t)
    until(saving(t, "run"), "a checkpoint that is being written", t)
    server.send_signal(signal.SIGINT)
    stopped(t, "server", server, 130)
    assert all(client.poll() is None for client in clients)
    finished(t, t.serve(), *clients)
    same_as_local(t)


def test_a_client_is_asked_to_stop(trial: Trial) -> None:
    """While it dials, in the middle of training, and while it saves. It comes back as a new process each time."""
    t = trial
    client = t.join(0)
    until(lambda: "dialling again" in t.log("client-0"), "dialling", t)
    client.send_signal(signal.SIGTERM)
    stopped(t, "client-0", client, 0)
    assert "stopped here" in t.log("client-0")

    # With a quorum of all clients, each round waits for this one.
    server, clients = t.serve("--quorum", "1"), [t.join(k) for k in range(3)]
    until(lambda: len(t.steps()) > 6, "six steps", t)
    moments: list[tuple[int, Callable[[], bool]]] = [
        (signal.SIGTERM, lambda: True),
        (signal.SIGINT, saving(t, "c/client-1")),
    ]
    for number, moment in moments:
        until(moment, "the moment", t)
        clients[1].send_signal(number)
        stopped(t, "client-1", clients[1], 0)
        done, clients[1] = len(t.steps()), t.join(1)
        until(lambda done=done: len(t.steps()) > done + 6, "steps with it again", t)
    finished(t, server, *clients)
    assert [r["step"] for r in t.steps()] == list(range(1200))


def test_a_signal_while_a_command_begins(trial: Trial) -> None:
    """Before Cutlayer can handle signals: while Python starts and imports."""
    t = trial
    t.forked = False
    for name, start in (("server", t.serve), ("client-0", lambda: t.join(0))):
        for pause in (0.3, 1.0, 2.0):
            process: Any = start()
            time.sleep(pause)
            os.kill(process.pid, signal.SIGTERM)
            assert process.wait(PATIENCE) in (0, 130, -signal.SIGTERM)
            assert "Traceback" not in t.log(name), t.log(name)[-3000:]
