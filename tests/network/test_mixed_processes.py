"""Clients with different cuts as separate processes: the simulation's numbers, and what a killed process loses."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import same
from trial import CONFIG, PATIENCE, Trial, finished, same_as_local, until

from cutlayer import checkpoint
from cutlayer.folder import CHECKPOINT

pytestmark = pytest.mark.network
MIXED = CONFIG + 'cut = ["hidden1", "hidden3", "hidden2"]\nclient_lr = 0.01\n'


@pytest.fixture
def trial(tmp_path: Path) -> Iterator[Callable[..., Trial]]:
    made: list[Trial] = []

    def make(algorithm: str, rounds: int) -> Trial:
        made.append(Trial(tmp_path, algorithm, rounds, config=MIXED))
        return made[-1]

    yield make
    for one in made:
        one.stop()


def test_a_killed_server_comes_back_with_its_clients_blocks(trial: Callable[..., Trial]) -> None:
    """The server's checkpoint contains the blocks, so the run ends exactly like a simulation."""
    t = trial("sglr", rounds=30)
    server = t.serve()
    clients = [t.join(k) for k in range(3)]
    until(lambda: len(t.steps()) > 40, "forty steps", t)
    server.send_signal(signal.SIGKILL)
    server.wait(PATIENCE)
    finished(t, t.serve(), *clients)
    same_as_local(t)


def test_a_killed_client_comes_back_to_its_blocks(trial: Callable[..., Trial]) -> None:
    """The others continue without it. After the next averaging, its part and blocks equal the common model again."""
    t = trial("sfl", rounds=100)
    server = t.serve("--deadline", "20", "--quorum", "0.6")
    clients = [t.join(k) for k in range(3)]
    until(lambda: len(t.steps()) > 20, "twenty steps", t)
    clients[0].kill()
    clients[0].wait()
    until(lambda: any(r["clients"] == [1, 2] for r in t.steps()), "a step without the client that is gone", t)
    clients[0] = t.join(0)
    lonely = max(r["step"] for r in t.steps() if r["clients"] == [1, 2])
    until(lambda: any(r["clients"] == [0, 1, 2] and r["step"] > lonely for r in t.steps()), "a step with all again", t)
    finished(t, server, *clients)
    assert [r["step"] for r in t.steps()] == list(range(600))
    kept = checkpoint.read(t.folder / "run" / CHECKPOINT)["clients"]["inner"]
    own = checkpoint.read(t.folder / "c" / "client-0" / "client.safetensors")["model"]
    assert same({**own, **kept["blocks"]["0"]["model"]}, kept["inner"]["average"])
