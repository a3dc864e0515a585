"""The server of a remote run: waits for its clients, trains, keeps checkpoints, and goes on after a restart."""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from cutlayer.config import RunConfig
from cutlayer.engine.remote.build import client_name, remote_training
from cutlayer.engine.remote.exchange import Lost
from cutlayer.engine.remote.hub import Hub
from cutlayer.engine.remote.security import ServerSecurity
from cutlayer.errors import TrainingError
from cutlayer.folder import CONFIG
from cutlayer.run import Run
from cutlayer.wire import messages as m

log = logging.getLogger("cutlayer.server")
GRACE = 5.0  # seconds that clients have to hear of the end


@dataclass(frozen=True)
class Serving:
    """How a server serves: `address` to listen at; seconds (`deadline`) for every exchange, after which it goes on with
    those who have answered if they are a `quorum` (a fraction); seconds to wait for clients that are missing
    (`patience`: all of them at the start, a quorum later; None: for ever).
    """

    address: str
    security: ServerSecurity
    deadline: float | None = None
    quorum: float = 0.5
    patience: float | None = None
    metrics: str | None = None


class Service:
    """A run whose clients dial in. Iterate over `run` inside of `open()`.

    `listening(port)` is called once, when clients may come. `all_came`: all of them have.
    """

    def __init__(
        self, config: RunConfig, serving: Serving, out: Path, *, listening: Callable[[int], None] | None = None
    ) -> None:
        self.config, self.serving = config, serving
        self.all_came = False
        self._names = {client_name(k): k for k in range(config.clients)}
        self._listening = False
        self._on_listening = listening
        self.hub = Hub(serving.address, serving.security, self._greet, metrics=serving.metrics)
        resumed = (out / CONFIG).exists()
        training, self._cohort, self._greet_client = remote_training(
            config,
            self.hub,
            [0] * config.clients,
            run=config.algorithm,
            deadline=serving.deadline,
            quorum=serving.quorum,
            notice=self._notice,
            ready=self._ready,
        )
        if resumed:
            self.run = Run.resume(out, training=training)
        else:
            self.run = Run(config, out=out, training=training)

    @contextmanager
    def open(self) -> Iterator[Run]:
        """The run, with a clean end on SIGTERM: clients hear of it, and go on when the server is back."""
        before = signal.signal(signal.SIGTERM, _interrupt)
        try:
            yield self.run
            self._cohort.finish()
            self.hub.stop("the run is done", GRACE)
        finally:
            self.hub.stop("the server stops; it may come back", GRACE)
            signal.signal(signal.SIGTERM, before)

    def _greet(self, hello: m.Hello, identity: str | None) -> m.Welcome | m.Refused:
        """Who says Hello is client `client-<k>`, known by that name."""
        if hello.client not in self._names:
            last = client_name(self.config.clients - 1)
            return m.Refused("client", f"there is no client {hello.client!r} in this run: they are client-0 to {last}")
        return self._greet_client(hello, self._names[hello.client])

    def _ready(self) -> None:
        """Listen, once; then wait until enough clients are connected."""
        clients = self.config.clients
        if not self._listening:
            port = self.hub.start()
            log.info("listening at port %d for %d clients", port, clients)
            self._listening = True
            if self._on_listening is not None:
                self._on_listening(port)
        need = math.ceil(self.serving.quorum * clients) if self.all_came else clients
        here = self.hub.wait_for(need, self.serving.patience)
        if len(here) < need:
            raise TrainingError(
                f"{len(here)} of {clients} clients are connected after {self.serving.patience} seconds, {need} are "
                "needed: start the others, or have the server wait longer (patience)"
            )
        self.all_came = True

    def _notice(self, client: int, lost: Lost) -> None:
        log.warning("%s takes no part: %s (%s)", client_name(client), lost.sentence, lost.reason)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
