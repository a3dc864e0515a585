"""One side of a client and a server uses the previous protocol: the error names both numbers and the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
from test_transport import INSECURE, TERMS, Echo, Raw, hello, serving  # type: ignore[import-not-found]

from cutlayer.errors import WireError
from cutlayer.remote import network
from cutlayer.remote.dial import dial
from cutlayer.wire import ClientSide, pack
from cutlayer.wire import messages as m

BEFORE = m.PROTOCOL - 1


def older(frame: bytes) -> bytes:
    """The frame with the start of the previous protocol."""
    return b"CUT%d" % BEFORE + frame[4:]


def test_a_client_of_the_protocol_before() -> None:
    with serving() as (hub, port), Raw(port, said=older(ClientSide().send(hello(0))), welcome=False) as raw:
        error = raw.refused()
        assert not hub.traffic()
    assert f"protocol {BEFORE}, this side speaks {m.PROTOCOL}: install the same version" in error.details()


def test_a_client_whose_terms_are_of_the_protocol_before() -> None:
    """The protocol in the terms is compared too."""
    said = m.Hello(
        "client-0", m.Terms(**{n: getattr(TERMS, n) for n in TERMS.__struct_fields__} | {"protocol": BEFORE}), 10, 10
    )
    with serving() as (_, port), Raw(port, said=ClientSide().send(said), welcome=False) as raw:
        answer = ClientSide()
        answer.send(said)
        refused = answer.receive(next(raw.call)).message
    assert isinstance(refused, m.Refused)
    assert f"the protocol is {BEFORE} for the client and {m.PROTOCOL} for the server" in refused.sentence


@pytest.mark.parametrize("says", ["its own", "an error"])
def test_a_server_of_the_protocol_before(says: str) -> None:
    """The server answers in its own protocol, or says that it cannot read the client's."""

    def talk(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        if says == "its own":
            yield older(pack(m.Welcome(0, 1, 0, TERMS), (), 0, 1))
        context.abort(
            grpc.StatusCode.INVALID_ARGUMENT, f"a message of protocol {m.PROTOCOL}, this side speaks {BEFORE}"
        )

    server = grpc.server(futures.ThreadPoolExecutor(1))
    talks = grpc.method_handlers_generic_handler(
        network.SERVICE, {network.METHOD: grpc.stream_stream_rpc_method_handler(talk)}
    )
    server.add_generic_rpc_handlers((talks,))
    port = server.add_insecure_port("localhost:0")
    server.start()
    try:
        with pytest.raises(WireError) as error:
            dial(f"localhost:{port}", INSECURE[1], Echo(0))
    finally:
        server.stop(0).wait()
    ours, theirs = (m.PROTOCOL, BEFORE) if says == "an error" else (BEFORE, m.PROTOCOL)
    assert f"protocol {ours}, this side speaks {theirs}" in str(error.value)
