"""Figures for Prometheus, on their own port, by default only on the loopback address.

A hub or a client counts; the figures are read when they are requested.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

from prometheus_client import CollectorRegistry, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cutlayer.errors import ConfigError, PortInUseError
from cutlayer.remote.security import split_address

if TYPE_CHECKING:
    from cutlayer.remote.answers import Answers
    from cutlayer.remote.carrier import Reason
    from cutlayer.remote.counters import ClientTraffic

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Counted(Protocol):
    """The attributes of a hub that are read."""

    @property
    def present(self) -> frozenset[int]:
        """Clients with an open stream."""

    @property
    def lost(self) -> Mapping[Reason, int]:
        """How often clients were lost, by reason."""

    @property
    def refused(self) -> Mapping[str, int]:
        """The number of refusals, by reason."""

    @property
    def expiries(self) -> Mapping[str, datetime]:
        """The ends of validity of certificates, by owner."""

    @property
    def gauges(self) -> Callable[[], Sequence[tuple[str, str, float]]]:
        """Further figures: name, meaning, value."""

    def traffic(self) -> dict[int, ClientTraffic]:
        """Bytes and messages of every client."""


class Exporter:
    """Serves `figures` at `address`: host:port, or a port of this machine. Raises ConfigError, PortInUseError."""

    def __init__(self, figures: Collector, address: str | int) -> None:
        host, port = split_address(f"127.0.0.1:{address}" if str(address).isdigit() else str(address))
        registry = CollectorRegistry()
        registry.register(figures)
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            kind = PortInUseError if error.errno == errno.EADDRINUSE else ConfigError
            raise kind(f"cannot serve metrics at {address}: {error.strerror}; choose another address or port") from None
        self.port: int = self._server.server_port

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


class HubFigures(Collector):
    """Figures of a hub: connections, bytes, refusals, and how long exchanges took."""

    def __init__(self, hub: Counted) -> None:
        self._hub = hub
        self._exchanges = Histogram(
            "cutlayer_exchange_seconds", "from asking clients to the last answer", buckets=_SECONDS, registry=None
        )

    def observe(self, seconds: float) -> None:
        """An exchange took `seconds`."""
        self._exchanges.observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """What there is to say now."""
        hub, traffic = self._hub, sorted(self._hub.traffic().items())
        yield GaugeMetricFamily("cutlayer_clients", "clients with an open connection", len(hub.present))
        size = CounterMetricFamily("cutlayer_bytes", "bytes of whole messages", labels=["client", "direction"])
        payload = CounterMetricFamily("cutlayer_payload_bytes", "bytes of tensors", labels=["client", "direction"])
        messages = CounterMetricFamily("cutlayer_messages", "messages", labels=["client", "direction"])
        came = CounterMetricFamily("cutlayer_connections", "times that a client was welcome", labels=["client"])
        latency = GaugeMetricFamily(
            "cutlayer_latency_seconds", "from the last request to its answer", labels=["client"]
        )
        for client, t in traffic:
            name = str(client)
            for direction, values in (
                ("down", (t.sent, t.payload_sent, t.messages_sent)),
                ("up", (t.received, t.payload_received, t.messages_received)),
            ):
                for family, value in zip((size, payload, messages), values, strict=True):
                    family.add_metric((name, direction), value)
            came.add_metric((name,), t.connections)
            if t.latency is not None:
                latency.add_metric((name,), t.latency)
        lost = CounterMetricFamily("cutlayer_lost", "clients that did not answer", labels=["reason"])
        for reason, times in hub.lost.items():
            lost.add_metric((reason,), times)
        yield from (size, payload, messages, came, latency, lost)
        yield from self._exchanges.collect()
        yield from self._admission()
        for name, meaning, figure in hub.gauges():
            yield GaugeMetricFamily(name, meaning, figure)

    def _admission(self) -> Iterator[Metric]:
        """Refusals, and how long certificates are still valid."""
        refused = CounterMetricFamily("cutlayer_refused", "connections that were refused", labels=["reason"])
        for reason, count in self._hub.refused.items():
            refused.add_metric((reason,), count)
        left = GaugeMetricFamily(
            "cutlayer_certificate_days_left", "days until a certificate expires", labels=["certificate"]
        )
        now = datetime.now(UTC)
        for whose, until in self._hub.expiries.items():
            left.add_metric((whose,), (until - now).total_seconds() / 86400)
        yield from (refused, left)


class Answering(Protocol):
    """The attributes of a client that are read."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def answers(self) -> Answers:
        """The requests that it received since it started."""

    def budget(self) -> Mapping[str, tuple[float, float | None]]:
        """(spent, allowed; None: without a limit) of each item of its budget, over all its starts."""


class ClientFigures(Collector):
    """Figures of the clients in this process: requests, rows and bytes sent, and the budget of each."""

    def __init__(self, clients: Sequence[Answering]) -> None:
        self._clients = clients

    def collect(self) -> Iterator[Metric]:
        """What there is to say now."""
        requests = CounterMetricFamily(
            "cutlayer_client_requests", "requests of the server", labels=["client", "request", "outcome"]
        )
        rows = CounterMetricFamily("cutlayer_client_rows_sent", "rows of smashed data sent", labels=["client"])
        size = CounterMetricFamily("cutlayer_client_bytes_sent", "bytes of tensors sent", labels=["client"])
        spent = GaugeMetricFamily("cutlayer_client_budget_spent", "spent of the budget", labels=["client", "item"])
        allowed = GaugeMetricFamily(
            "cutlayer_client_budget_allowed", "the most that the budget allows", labels=["client", "item"]
        )
        for client in self._clients:
            for (request, outcome), count in list(client.answers.requests.items()):
                requests.add_metric((client.name, request, outcome), count)
            rows.add_metric((client.name,), client.answers.rows)
            size.add_metric((client.name,), client.answers.bytes)
            for item, (so_far, most) in client.budget().items():
                spent.add_metric((client.name, item), so_far)
                if most is not None:
                    allowed.add_metric((client.name, item), most)
        yield from (requests, rows, size, spent, allowed)
