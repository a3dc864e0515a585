"""A client of a remote run: its data, its part of the model, and a connection that it opens itself."""

from __future__ import annotations

import secrets
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Annotated

from msgspec import Meta

from cutlayer.build import load_source
from cutlayer.data.samples import Source
from cutlayer.files import private, replace_file
from cutlayer.folder import locked
from cutlayer.options import BudgetConfig, RunConfig
from cutlayer.plugins import registered_name
from cutlayer.remote.audit import AUDIT, Audit
from cutlayer.remote.dial import Dialler, dial_all
from cutlayer.remote.network import KEEPALIVE
from cutlayer.remote.security import ClientSecurity
from cutlayer.remote.sides import client_number, worker_of
from cutlayer.remote.worker import Watching, Worker
from cutlayer.stored import checked, parsed, reading
from cutlayer.wire.limits import Limits


@dataclass(frozen=True)
class Joining:
    """How a client joins: the server's `address`, its name (`client-<k>`), the credentials that it trusts and shows,
    the folder for its state, its own data (None: its share of the configuration's), the seconds after which it gives up
    (None: never), and the seconds between pings; `watch`: the reaction if the server's gradients do not look like the
    task's; `limits` bound messages; `budget` limits its answers; `audit` is the file for its record of requests (None:
    a file in the folder, if there is one).
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
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    audit: Path | None = None

    @property
    def record(self) -> Path | None:
        """The path of the client's record of requests."""
        return self.folder / AUDIT if self.audit is None and self.folder is not None else self.audit


def join(config: RunConfig, joining: Sequence[Joining], prometheus: str | int | None = None) -> list[str]:
    """Work as these clients, one after another on this thread, until the server says that the run is done. Returns the
    server's reasons. `prometheus`: the address at which this process serves its figures, host:port or a port of this
    machine.

    SIGTERM and Ctrl-C end it cleanly, and saved states remain. Raises UsageError before anything is sent; NetworkError,
    RefusedError, WireError as `dial` does.
    """
    stop = threading.Event()
    before = {number: signal.signal(number, _setting(stop)) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return _work(config, joining, stop, prometheus)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _work(
    config: RunConfig, joining: Sequence[Joining], stop: threading.Event, prometheus: str | int | None
) -> list[str]:
    shared: Source | None = None  # data that are dealt to several clients are read once
    with ExitStack() as stack:
        workers = []
        for j in joining:
            if j.folder is not None:
                stack.enter_context(private(j.folder))
                stack.enter_context(locked(j.folder))  # a lock holds as long as its file is open
            if j.data is None and shared is None:
                shared = load_source(config, None)
            worker = made(config, j, shared, noise_seed=_secret(j.folder))
            stack.callback(_close, worker)
            worker.stop = stop
            workers.append(worker)
        if prometheus is not None:
            from cutlayer.remote.metrics import ClientFigures, Exporter

            stack.enter_context(closing(Exporter(ClientFigures(workers), prometheus)))
        diallers = [
            Dialler(
                j.address, j.security, worker, limits=j.limits, give_up_after=j.give_up_after, keepalive=j.keepalive
            )
            for j, worker in zip(joining, workers, strict=True)
        ]
        return dial_all(diallers, stop)


def made(config: RunConfig, joining: Joining, shared: Source | None, *, noise_seed: int, alone: bool = False) -> Worker:
    """The client that joins in this way, with its own data or its part of the `shared` data. With `alone`, it stores
    and records nothing, and is only examined. Raises UsageError.
    """
    record = None if alone else joining.record
    own = {"own": joining.data} if joining.data is not None else {"data": shared}
    return worker_of(
        config,
        client_number(joining.name),
        name=joining.name,
        run=registered_name("algorithm", config.algorithm),
        token=joining.security.token or "",
        folder=None if alone else joining.folder,
        watch=joining.watch,
        noise_seed=noise_seed,
        budget=joining.budget,
        audit=None if record is None else Audit(record, joining.name, joining.address),
        **own,
    )


def _close(worker: Worker) -> None:
    """The end of this process."""
    worker.duty.samples.close()
    if worker.duty.own_test is not None:
        worker.duty.own_test.samples.close()
    worker.close()


def _secret(folder: Path | None) -> int:
    """The secret that names the draws of this client's defence. It is stored in the client's folder, since other noise
    for the same batch after a restart would be a second release.
    """
    if folder is None:
        return secrets.randbits(63)
    path = folder / _NOISE
    if not path.exists():
        with private():
            replace_file(path, f"{secrets.randbits(63)}\n".encode())
    with reading(path, "remove it, and this client's defence draws anew"):
        text = path.read_text("utf-8").strip()
        return checked(parsed(text), Secret)


_NOISE = "noise.seed"
Secret = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


def _setting(stop: threading.Event) -> Callable[[int, FrameType | None], None]:
    def handler(number: int, frame: FrameType | None) -> None:
        stop.set()

    return handler
