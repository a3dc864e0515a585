"""Transports: how requests reach the clients, by the scheme of an address.

`memory://` is for clients in the server's own process (`memory.py`): messages are encoded and decoded as on a network.
`grpc://` and `grpcs://` (gRPC without and with TLS) reach other machines: `hub.py` is the server's end and `dial.py`
the client's. An address without a scheme is gRPC's, with TLS if certificates or tokens are given.
"""

from __future__ import annotations

from dataclasses import dataclass

from cutlayer.errors import ConfigError, unknown


@dataclass(frozen=True)
class Transport:
    """One way for requests to reach clients. `listens`: a server can listen at its addresses; `encrypted`: by TLS."""

    scheme: str
    title: str
    listens: bool
    encrypted: bool


TRANSPORTS: dict[str, Transport] = {
    transport.scheme: transport
    for transport in (
        Transport("memory", "clients in the server's own process", listens=False, encrypted=False),
        Transport("grpc", "gRPC without TLS, on this machine only", listens=True, encrypted=False),
        Transport("grpcs", "gRPC over TLS", listens=True, encrypted=True),
    )
}


def host_and_port(address: str, *, encrypted: bool) -> str:
    """The address without its scheme, if it has one. `encrypted`: certificates or tokens are given.

    Raises ConfigError for an unknown scheme, or one that contradicts `encrypted`.
    """
    scheme, separator, place = address.partition("://")
    if not separator:
        return address
    if scheme not in TRANSPORTS:
        raise ConfigError(unknown("scheme of an address", scheme, TRANSPORTS))
    transport = TRANSPORTS[scheme]
    if not transport.listens:
        raise ConfigError(f"{address!r} is for clients in the server's own process: give grpcs://host:port")
    if transport.encrypted and not encrypted:
        raise ConfigError(f"{address!r} needs TLS: give certificates, or write grpc://{place} on localhost")
    if encrypted and not transport.encrypted:
        raise ConfigError(f"{address!r} has no TLS, but certificates are given: write grpcs://{place}")
    return place
