"""The server of a remote run: waits for its clients, trains, writes checkpoints, and continues after a restart."""

from __future__ import annotations

import json
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from cutlayer.errors import AbsentError, DiskFullError, TrainingError
from cutlayer.files import append_line, private
from cutlayer.folder import CHECKPOINT, CONFIG, EVENTS
from cutlayer.options import FaultConfig, RunConfig
from cutlayer.plugins import registered_name
from cutlayer.remote.far import RemoteCohort
from cutlayer.remote.hub import Gauge, Hub
from cutlayer.remote.network import KEEPALIVE
from cutlayer.remote.security import ServerSecurity
from cutlayer.remote.sides import client_name, remote_training, share
from cutlayer.run import Run, refuse_other
from cutlayer.wire import messages as m
from cutlayer.wire.limits import Limits

log = logging.getLogger("cutlayer.server")
_RETURN = 90.0  # seconds that clients have to reconnect to a restarted server: three times their longest pause
_PER_BATCH = 60.0  # seconds that local training has for each of its steps, unless a deadline is given
_LOOK = 1.0  # seconds between checks whether enough clients can still connect
GRACE = 5.0  # seconds that clients have to learn of the end (the unit files of deploy/ wait longer)


@dataclass(frozen=True)
class Serving:
    """How a server serves: the `address` at which it listens, its security, and its policy for faults; `metrics` is the
    address (or port) of figures for Prometheus; `keepalive` seconds pass between pings; `limits` bound messages.
    """

    address: str
    security: ServerSecurity
    faults: FaultConfig = field(default_factory=lambda: FaultConfig.of({}))
    metrics: str | None = None
    keepalive: float = KEEPALIVE
    limits: Limits = field(default_factory=Limits)


class Service:
    """A run whose clients connect over a network. Iterate over `run` inside of `open()`.

    `listening(port)` is called once, when clients can connect. `all_came`: all of them have connected. If the folder
    has a run, this run continues: the constructor raises RunFolderError if `config` is not that run's. How it is served
    may change.
    """

    def __init__(
        self, config: RunConfig, serving: Serving, out: Path, *, listening: Callable[[int], None] | None = None
    ) -> None:
        self.config, self.serving, self.out = config, serving, out
        self.all_came = False
        self._names = {client_name(k): k for k in range(config.clients)}
        self._listening = self._returned = False
        self._rounds_begun = 0
        resumed = (out / CONFIG).exists()
        if resumed:  # before anything is read, and before any client can connect
            refuse_other(out, config)
        self._on_listening = listening
        self.hub = Hub(
            serving.address,
            serving.security,
            self._greet,
            metrics=serving.metrics,
            keepalive=serving.keepalive,
            limits=serving.limits,
            tell=self._record,
            changed=self._deny,
            gauges=self._gauges,
        )
        training, self._cohort, self._greet_client = remote_training(
            config,
            self.hub,
            [0] * config.clients,
            run=registered_name("algorithm", config.algorithm),
            deadline=serving.faults.deadline or None,
            per_batch=0.0 if "deadline" in serving.faults.model_fields_set else _PER_BATCH,
            most_samples=serving.faults.most_samples,
            quorum=serving.faults.quorum,
            faulty=serving.faults.faulty,
            tell=self._tell,
            ready=self._ready,
        )
        if resumed:
            self.run = Run.resume(out, training=training)
            self._returned = (out / CHECKPOINT).exists()  # which has the numbers of samples of all clients
        else:
            self.run = Run(config, out=out, training=training)

    @contextmanager
    def open(self) -> Iterator[Run]:
        """The run, with a clean end on SIGTERM, in a folder that only its owner can read. Unless the run is done,
        clients reconnect until the server is back.
        """
        with private(*([self.out] if self.out.is_dir() else [])):
            yield from self._open()

    def _open(self) -> Iterator[Run]:
        before = signal.signal(signal.SIGTERM, _interrupt)
        try:
            yield self.run
            if self._listening:  # otherwise the run was done before
                self._share()
                if self.run.result is not None and self.run.result.stopped:
                    self._tell("stopped early", {"why": self.run.result.stopped})
                self._cohort.finish()
                self._tell("done", self._traffic())
                self.hub.stop("the run is done", GRACE)
        except BaseException as error:
            if self._listening:
                with suppress(DiskFullError):  # what happened first is what counts
                    self._tell("stopped", {"why": str(error) or "interrupted", **self._traffic()})
            raise
        finally:
            self.hub.stop("the server stops; it may come back", GRACE, returning=True)
            signal.signal(signal.SIGTERM, before)

    def _share(self) -> None:
        """Send the server's part to the clients that want it, if it is shared, and count this in the ledger and the
        result.
        """
        if not self.config.share_server_model:
            return
        sent = share(self.run, self._cohort)
        self._tell("shared", {"clients": sorted(sent), "bytes_each": max(sent.values(), default=0)})

    def _greet(self, hello: m.Hello, identity: str | None) -> m.Welcome | m.Refused:
        """The name in a Hello must be `client-<k>`."""
        if hello.client not in self._names:
            last = client_name(self.config.clients - 1)
            return m.Refused("client", f"there is no client {hello.client!r} in this run: they are client-0 to {last}")
        return self._greet_client(hello, self._names[hello.client])

    def _ready(self, wanted: frozenset[int]) -> None:
        """Listen, once; then wait until enough clients are connected. If the run needs one of those `wanted`, it has
        the time of a deadline to return: others may form a quorum, but they cannot do its part.
        """
        clients, faults = self.config.clients, self.serving.faults
        if not self._listening:
            port = self.hub.start()
            self._listening = True
            policy = faults.model_dump(include=set(FaultConfig.model_fields))
            self._tell("listening", {"port": port, "clients": clients, **policy})
            if self._on_listening is not None:
                self._on_listening(port)
        need = self._needed()
        if self._returned and need == clients:
            # They reconnect by themselves. Dead clients must not delay a run that continued without them before.
            self._returned = False
            if len(self._wait_for(need, min(_RETURN, faults.patience or _RETURN))) < need:
                need = math.ceil(faults.quorum * clients)
        if len(connected := self.hub.connected) < need:
            away = [client_name(k) for k in range(clients) if k not in connected and k not in self._cohort.out]
            log.info("waiting for %d of %d clients; not here: %s", need, clients, ", ".join(away[:10]))
        here = self._wait_for(need, faults.patience or math.inf)
        if len(here) < need:
            raise AbsentError(
                f"{len(here)} of {clients} clients are connected after {faults.patience:g} seconds, {need} are "
                "needed: start the others, or have the server wait longer (patience)"
            )
        self.all_came = True
        if wanted and not wanted & here:
            self._wait_for_one(wanted, faults.deadline or faults.patience or math.inf)

    def _wait_for_one(self, wanted: frozenset[int], seconds: float) -> None:
        """Wait until one of these clients is connected, or none can connect, or for these seconds. Raises
        TrainingError.
        """
        end = time.monotonic() + seconds
        names = [client_name(k) for k in sorted(wanted)]
        log.info("waiting for one of %s: no other client can do its part", ", ".join(names[:10]))
        while self.hub.running and not wanted & self.hub.present and not wanted <= self._cohort.out:
            if time.monotonic() >= end:
                return
            self._needed()
            self.hub.wait_for(wanted, max(0.0, min(_LOOK, end - time.monotonic())))

    def _needed(self) -> int:
        """The number of clients that must be connected. Raises TrainingError if this number can never be reached."""
        clients, quorum = self.config.clients, math.ceil(self.serving.faults.quorum * self.config.clients)
        able = clients - len(self._cohort.out)
        need = quorum if self.all_came or self._cohort.out else clients
        if able < need:
            raise TrainingError(
                f"{clients - able} of {clients} clients are {_how_out(self._cohort)}, {need} are needed: fix them (the "
                f"record {EVENTS} says why), or lower the quorum"
            )
        return need

    def _wait_for(self, need: int, seconds: float) -> frozenset[int]:
        """The connected clients, when they are this many, or after these seconds. Raises TrainingError as soon as this
        number can never be reached, which a change of the deny list can cause at any time.
        """
        end = time.monotonic() + seconds
        while True:
            here = self.hub.wait_for(need, max(0.0, min(_LOOK, end - time.monotonic())))
            self._needed()
            if len(here) >= need or time.monotonic() >= end or not self.hub.running:
                return here

    def _traffic(self) -> dict[str, Any]:
        """Bytes and latency of every client."""
        return {"traffic": {client_name(k): asdict(t) for k, t in sorted(self.hub.traffic().items())}}

    def _deny(self, names: frozenset[str]) -> None:
        """From now on, the run's clients with these names are denied, and all others are not."""
        if strangers := sorted(names - self._names.keys()):
            log.warning(
                "the list of denied clients has %d names that no client of this run has, such as %.64r",
                len(strangers),
                strangers[0],
            )
        self._cohort.denied = frozenset(self._names[name] for name in names & self._names.keys())

    def _gauges(self) -> list[Gauge]:
        """The run's figures for Prometheus."""
        run, cohort = self.run, self._cohort
        return [
            ("cutlayer_clients_expected", "clients of the run", self.config.clients),
            ("cutlayer_clients_excluded", "clients that are excluded from the run", len(cohort.excluded)),
            ("cutlayer_clients_denied", "clients whose names are on the list of denied ones", len(cohort.denied)),
            ("cutlayer_rounds_begun", "rounds that have begun", self._rounds_begun),
            ("cutlayer_rounds_planned", "rounds of the whole run", run.rounds),
            ("cutlayer_steps_done", "steps that are done", run.steps),
        ]

    def _entry(self, happened: str, facts: Mapping[str, Any]) -> dict[str, Any]:
        """The events in the run's record."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        return {"time": now, "step": self.run.steps, "event": happened, **facts}

    def _record(self, happened: str, facts: Mapping[str, Any]) -> None:
        """Add an event of the hub to the run's record."""
        append_line(self.out / EVENTS, json.dumps(self._entry(happened, facts)))

    def _tell(self, happened: str, facts: Mapping[str, Any]) -> None:
        """Log an event, and add it to the run's record."""
        entry = self._entry(happened, facts)
        append_line(self.out / EVENTS, json.dumps(entry))
        if happened == "round":
            self._rounds_begun = facts["round"] + 1
        worry = happened in ("late", "gone", "failed", "garbage", "excluded", "not kept", "deviates")
        log.log(logging.WARNING if worry else logging.INFO, "%s", _sentence(happened, facts), extra={"facts": entry})


def _how_out(cohort: RemoteCohort) -> str:
    """Why clients cannot take part, in one or two words."""
    return " or ".join(filter(None, ["excluded" if cohort.excluded else "", "denied" if cohort.denied else ""]))


def _sentence(happened: str, facts: Mapping[str, Any]) -> str:
    """An event as a line for people: short, single values; a reason without the name that it begins with."""
    single = {n: v for n, v in facts.items() if n not in ("client", "why") and isinstance(v, int | float | str)}
    shown = [f"{n} {v}" for n, v in single.items()]
    who, why = "", str(facts.get("why", ""))
    if "client" in facts:
        who, number = f"{client_name(facts['client'])} ", facts["client"]
        why = why.removeprefix(f"client {number} is gone: ").removeprefix(f"client {number}: ")
    shown += [why] if why else []
    return f"{who}{happened}{': ' if shown else ''}{', '.join(shown)}"


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
