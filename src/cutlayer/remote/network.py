"""The settings that both ends of a connection share: one bidirectional stream of opaque messages, over gRPC.

Clients open the connection; a stream is one conversation (`wire.conversation`). A message of the stream is one frame,
or several consecutive ones (`frames.split`): requests that are sent together, and the answers to them. A message costs
gRPC about as much as 50 kB.

Only the Hello frame is not a message of the stream: it travels in the metadata that opens it. gRPC bounds metadata
itself, so no peer can make the server hold more than `HELLO_BYTES` before the server knows its name. A stream's
messages are not read before that.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import Any

from cutlayer.errors import WireError
from cutlayer.wire.limits import Limits

SERVICE, METHOD = "cutlayer.Split", "Talk"
HELLO, INSTANCE = "cutlayer-hello-bin", "cutlayer-instance"
"""Metadata: the Hello frame; and a random text that stays the same when a process reconnects, so that the server knows
that this process's earlier stream is dead.
"""

HELLO_BYTES = 16 << 10
_METADATA_BYTES = 4 * HELLO_BYTES  # Hello in base 64, gRPC's additions, and some room
_SLACK = 1 << 10  # a slightly too large message is refused by us, with a better error

KEEPALIVE, LEAST = 10.0, 1.0
"""Seconds between pings, and the smallest value that a client may be told. A peer that takes half of that to answer is
gone.
"""


def in_use(host: str, port: int) -> bool:
    """Whether another program listens at that port of this machine (gRPC does not say why it cannot listen)."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, protocol, _, where in found:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(where)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    return True
    return False


def patience(keepalive: float) -> float:
    """Seconds until a peer that disappeared without closing its connection is known to be gone."""
    return 1.5 * keepalive + 0.5


def options(limits: Limits, keepalive: float) -> list[tuple[str, Any]]:
    """gRPC's settings for either end."""
    return [
        ("grpc.max_receive_message_length", limits.message_bytes + _SLACK),
        ("grpc.max_send_message_length", limits.message_bytes + _SLACK),
        ("grpc.max_metadata_size", _METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", _METADATA_BYTES),
        ("grpc.keepalive_time_ms", int(keepalive * 1000)),
        ("grpc.keepalive_timeout_ms", int(keepalive * 500)),
        ("grpc.http2.ping_timeout_ms", int(keepalive * 500)),  # gRPC's own setting, a minute by default
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def server_options(limits: Limits, keepalive: float) -> list[tuple[str, Any]]:
    """gRPC's settings for the server."""
    return [
        *options(limits, keepalive),
        ("grpc.http2.min_ping_interval_without_data_ms", int(min(keepalive, LEAST) * 250)),
        ("grpc.so_reuseport", 0),  # otherwise a second server would take half of the clients
        ("grpc.max_concurrent_streams", 16),
        ("grpc.server_handshake_timeout_ms", 10_000),
        ("grpc.max_connection_idle_ms", 30_000),  # for connections without a stream
    ]


def client_options(limits: Limits, keepalive: float, server_name: str | None, *, local: bool) -> list[tuple[str, Any]]:
    """gRPC's settings for a client."""
    return [
        *options(limits, keepalive),
        ("grpc.use_local_subchannel_pool", 1),  # its own connection: one that is stuck does not delay others
        ("grpc.enable_retries", 0),
        *([("grpc.enable_http_proxy", 0)] if local else []),
        *([("grpc.ssl_target_name_override", server_name)] if server_name else []),
    ]


def check_hello(frame: bytes) -> bytes:
    """`frame`, if it is small enough. Raises WireError."""
    if len(frame) > HELLO_BYTES:
        raise WireError(f"Hello has {len(frame)} bytes: {HELLO_BYTES} are accepted; let fewer tensors cross the cut")
    return frame


def on_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """asyncio's handler of uncaught errors, without harmless ones."""
    # gRPC wakes all loops of a process for each event. The second ones find nothing to read, and one that wakes another
    # may find that loop closed.
    error, poller = context.get("exception"), "PollerCompletionQueue" in repr(context.get("handle"))
    closed = poller and isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
    if not (closed or isinstance(error, BlockingIOError)):
        loop.default_exception_handler(context)
