"""A server's waiting is limited, and it does not wait at all for clients that cannot return."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from test_hostile_clients import Attacked  # type: ignore[import-not-found]
from test_transport import SOON, until  # type: ignore[import-not-found]

from cutlayer.errors import TrainingError
from cutlayer.options import FaultConfig, RunConfig
from cutlayer.remote.security import ServerSecurity
from cutlayer.remote.serve import Service, Serving
from cutlayer.wire import messages as m

CONFIG = RunConfig.of(
    {"algorithm": "fl", "data": "digits", "model": "mlp", "clients": 3, "samples_per_client": 20, "rounds": 1}
)


def service(out: Path, **faults: object) -> Service:
    made = Service(CONFIG, Serving("localhost:0", ServerSecurity(), FaultConfig.of(faults)), out)
    out.mkdir()
    return made


def test_limits_without_being_asked(tmp_path: Path) -> None:
    """By default, local training gets more time for each of its steps. With a configured deadline, it gets none."""
    assert (FaultConfig.of({}).deadline, FaultConfig.of({}).patience) == (600, 3600)
    setup = service(tmp_path / "a")._cohort.setup
    assert (setup.deadline, setup.per_batch) == (600, 60)
    setup = service(tmp_path / "b", deadline=30.0)._cohort.setup
    assert (setup.deadline, setup.per_batch) == (30, 0)
    assert service(tmp_path / "c", deadline=0)._cohort.setup.deadline is None


def test_local_training_has_longer() -> None:
    """A round has two steps."""
    attacked = Attacked("fl", m.Hello, lambda a, message, body: (message, body), deadline=10.0, per_batch=2.0)
    asked: list[tuple[type, float]] = []
    own = attacked.hub.exchange

    def exchange(requests, *, deadline=None, **options):  # type: ignore[no-untyped-def]
        asked.append((type(next(iter(requests.values()))[-1][0]), deadline))
        return own(requests, **options)

    attacked.hub.exchange = exchange
    attacked.run.run()
    assert {deadline for kind, deadline in asked if kind is m.Fit} == {14.0}
    assert {deadline for kind, deadline in asked if kind is not m.Fit} == {10.0}


def test_who_can_never_be_enough_is_not_waited_for(tmp_path: Path) -> None:
    """Two of three clients are denied while the server waits for its clients."""
    waiting = service(tmp_path / "run", patience=1e6)
    found: list[BaseException] = []

    def wait() -> None:
        try:
            waiting._ready(frozenset())
        except TrainingError as error:
            found.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    until(lambda: waiting.hub.running)
    waiting._deny(frozenset({"client-0", "client-1"}))
    begun = time.monotonic()
    thread.join(SOON)
    waiting.hub.stop("the test is over", 0)
    assert "2 of 3 clients are denied, 2 are needed" in str(found[0])
    assert time.monotonic() - begun < SOON


def test_no_patience_is_no_limit(tmp_path: Path) -> None:
    waiting = service(tmp_path / "run", patience=0.01)
    with pytest.raises(TrainingError, match=r"0 of 3 clients are connected after 0\.01 seconds"):
        waiting._ready(frozenset())
    waiting.hub.stop("the test is over", 0)
    endless = service(tmp_path / "other", patience=0)
    threading.Timer(0.05, lambda: (until(lambda: endless.hub.running), endless.hub.stop("over", 0))).start()
    with pytest.raises(TrainingError, match="are connected after 0 seconds"):  # it ends because the hub has stopped
        endless._ready(frozenset())
