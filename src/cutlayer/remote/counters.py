"""The traffic between the server and one client, counted where bytes are sent and received."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ClientTraffic:
    """The traffic between the server and one client, over all its connections.

    `sent` and `received`: bytes of whole messages; `payload_sent` and `payload_received`: bytes of the tensors in them.
    `latency`: seconds from the last answered request to its answer. TLS and HTTP/2 overhead is not included.
    """

    sent: int = 0
    received: int = 0
    payload_sent: int = 0
    payload_received: int = 0
    messages_sent: int = 0
    messages_received: int = 0
    latency: float | None = None
    connections: int = 0

    @property
    def reconnects(self) -> int:
        """How often the client has reconnected."""
        return max(0, self.connections - 1)
