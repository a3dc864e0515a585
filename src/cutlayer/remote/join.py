"""A client of a remote run: its data, its part of the model, and a connection that it opens itself."""

from __future__ import annotations

import secrets
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from cutlayer.build import load_source
from cutlayer.data.samples import Source
from cutlayer.errors import RunFolderError
from cutlayer.files import replace_file
from cutlayer.folder import locked
from cutlayer.options import RunConfig
from cutlayer.plugins import registered_name
from cutlayer.remote.dial import Dialler, dial_all
from cutlayer.remote.network import KEEPALIVE
from cutlayer.remote.security import ClientSecurity
from cutlayer.remote.sides import client_number, worker_of
from cutlayer.remote.worker import Watching
from cutlayer.wire.limits import Limits


@dataclass(frozen=True)
class Joining:
    """How a client joins: the server's `address`, its name (`client-<k>`), what it trusts and shows, the folder that
    keeps its state, data of its own (None: its share of the configuration's), seconds of trying after which it gives up
    (None: never), and between pings; `watch`: what to do where the server's gradients do not look like the task's;
    `limits` bound messages.
    """

    address: str
    name: str
    security: ClientSecurity
    folder: Path | None = None
    data: Source | None = None
    give_up_after: float | None = None
    keepalive: float = KEEPALIVE
    watch: Watching = "off"
    limits: Limits = field(default_factory=Limits)


def join(config: RunConfig, joining: Sequence[Joining]) -> list[str]:
    """Work as these clients, one after another on this thread, until the server says that the run is done; its reasons.

    SIGTERM and Ctrl-C end it cleanly: what was kept stays. Raises UsageError before anything is sent; NetworkError,
    RefusedError, WireError as `dial` does.
    """
    stop = threading.Event()
    before = {number: signal.signal(number, _setting(stop)) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return _work(config, joining, stop)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _work(config: RunConfig, joining: Sequence[Joining], stop: threading.Event) -> list[str]:
    shared: Source | None = None  # what several clients are dealt from is read once
    workers, locks = [], []  # a lock holds as long as its file is open
    for j in joining:
        if j.folder is not None:
            j.folder.mkdir(parents=True, exist_ok=True)
            locks.append(locked(j.folder))
        token = j.security.token or ""
        number = client_number(j.name)
        if j.data is None and shared is None:
            shared = load_source(config, None)
        own = {"own": j.data} if j.data is not None else {"data": shared}
        workers.append(
            worker_of(
                config,
                number,
                name=j.name,
                run=registered_name("algorithm", config.algorithm),
                token=token,
                folder=j.folder,
                watch=j.watch,
                noise_seed=_secret(j.folder),
                **own,
            )
        )
    for worker in workers:
        worker.stop = stop
    diallers = [
        Dialler(j.address, j.security, worker, limits=j.limits, give_up_after=j.give_up_after, keepalive=j.keepalive)
        for j, worker in zip(joining, workers, strict=True)
    ]
    try:
        return dial_all(diallers, stop)
    finally:
        for worker in workers:
            worker.duty.samples.close()
            if worker.duty.own_test is not None:
                worker.duty.own_test.samples.close()
        for lock in locks:
            lock.close()


def _secret(folder: Path | None) -> int:
    """What names the draws of this client's defence: nobody else knows it. Kept in its folder, since noise drawn anew
    for the same batch after a restart would be a second release.
    """
    if folder is None:
        return secrets.randbits(63)
    path = folder / _NOISE
    if not path.exists():
        path.touch(mode=0o600)
        replace_file(path, f"{secrets.randbits(63)}\n".encode())
        path.chmod(0o600)
    try:
        return int(path.read_text("utf-8"))
    except ValueError:
        raise RunFolderError(f"{str(path)!r} is damaged: remove it, and this client's defence draws anew") from None


_NOISE = "noise.seed"


def _setting(stop: threading.Event) -> Callable[[int, FrameType | None], None]:
    def handler(number: int, frame: FrameType | None) -> None:
        stop.set()

    return handler
