"""How fast, and how large, the remote engine's exchange is: against a bare gRPC stream that moves the same bytes.

    python benchmarks/remote.py [exchange] [memory] [enrolled] [training] [--write docs/benchmarks.md]

Everything is real: processes of their own on this machine's loopback, mutual TLS, certificates made for the run.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from cutlayer.allocator import keep_memory
from cutlayer.engine.remote import network
from cutlayer.engine.remote.certs import make_ca, make_certificate
from cutlayer.engine.remote.dial import dial
from cutlayer.engine.remote.exchange import Lost
from cutlayer.engine.remote.hub import Hub
from cutlayer.engine.remote.security import ClientSecurity, ServerSecurity
from cutlayer.wire import Frame, Limits, agree
from cutlayer.wire import messages as m

CONTEXT = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
PATIENCE = 300.0  # seconds for anything here
ROWS = 2
TERMS = m.Terms(run="r", algorithm="psl", part="p", crossing=[], returning=[], step=m.StepTerms(batch=ROWS))
SERVICE, METHOD = "bare.Bare", "Talk"
KB, MB = 1000, 1000_000
EXCHANGES = [(8, MB), (2, MB), (8, 100 * KB), (2, 100 * KB)]  # clients, bytes each way per client and step


# The reference: one message down and one up per client and step, and nothing besides.


def bare_server(pki: Path, clients: int, size: int, pipe: Connection) -> None:
    """Drive all streams from the server's own event loop: faster than a thread per stream for several clients."""
    payloads = [os.urandom(size) for _ in range(clients)]
    key, certificate, ca = ((pki / name).read_bytes() for name in ("server.key", "server.crt", "ca.crt"))
    contexts: list[Any] = []

    async def talk(_: object, context: Any) -> None:
        contexts.append(context)
        await asyncio.Event().wait()

    async def one(context: Any, payload: bytes) -> None:
        await context.write(payload)
        assert len(await context.read()) == size

    async def main() -> None:
        server = grpc.aio.server(options=network.server_options(Limits(), network.KEEPALIVE))
        handler = grpc.stream_stream_rpc_method_handler(talk)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
        credentials = grpc.ssl_server_credentials([(key, certificate)], ca, True)
        pipe.send(server.add_secure_port("localhost:0", credentials))
        await server.start()
        while len(contexts) < clients:
            await asyncio.sleep(0.01)
        pipe.send("ready")
        while steps := await asyncio.to_thread(pipe.recv):
            begin = time.perf_counter()
            for _ in range(steps):
                await asyncio.gather(*map(one, contexts, payloads))
            pipe.send(time.perf_counter() - begin)

    asyncio.run(main())


def bare_client(pki: Path, client: int, port: int, size: int) -> None:
    """Give back as many bytes as come."""
    payload = os.urandom(size)
    key, certificate, ca = ((pki / name).read_bytes() for name in (f"client-{client}.key", f"client-{client}.crt", "ca.crt"))

    async def main() -> None:
        options = network.client_options(Limits(), network.KEEPALIVE, None, local=True)
        credentials = grpc.ssl_channel_credentials(ca, key, certificate)
        async with grpc.aio.secure_channel(f"localhost:{port}", credentials, options) as channel:
            call = channel.stream_stream(f"/{SERVICE}/{METHOD}")()
            while await call.read() is not grpc.aio.EOF:
                await call.write(payload)

    asyncio.run(main())


# Ours: what a step of training says, a backward pass and the next forward pass, with tensors of nothing computed.


class Idle:
    """A worker that computes nothing: the same bytes at each forward pass."""

    def __init__(self, client: int, size: int) -> None:
        self._hello = m.Hello(client=f"client-{client}", terms=TERMS, samples=ROWS)
        self._payload = os.urandom(size)

    def hello(self) -> m.Hello:
        """Who it is."""
        return self._hello

    def welcome(self, welcome: m.Welcome) -> m.Refused | None:
        """Check the terms."""
        return agree(welcome.terms, TERMS)

    def handle(self, frame: Frame) -> tuple[m.Message, list[bytes]]:
        """A backward pass is done, a forward pass gives the bytes."""
        step = frame.message.step
        return (m.Smashed(step, ROWS), [self._payload]) if isinstance(frame.message, m.Forward) else (m.Stepped(step), [])


class Steps:
    """Steps of training, as the hub sees them."""

    def __init__(self, hub: Hub, clients: int, size: int) -> None:
        self._hub, self._size, self._step = hub, size, 1
        self._gradients = {k: [os.urandom(size)] for k in range(clients)}
        self._check(hub.exchange({k: [(m.Forward(1), ())] for k in self._gradients}, deadline=PATIENCE))

    def take(self, count: int) -> None:
        """So many, each client's own gradients down, its own rows up."""
        for _ in range(count):
            step = self._step
            requests = {
                k: [(m.Backward(step, "own", ROWS), body), (m.Forward(step + 1), ())]
                for k, body in self._gradients.items()
            }
            self._check(self._hub.exchange(requests, deadline=PATIENCE))
            self._step += 1

    def _check(self, results: dict[int, list[Frame] | Lost]) -> None:
        assert len(results) == len(self._gradients)
        for frames in results.values():
            assert not isinstance(frames, Lost), frames
            assert len(frames[-1].body) == self._size


def greet(hello: m.Hello, _: str | None) -> m.Welcome | m.Refused:
    """Everybody is welcome who means the same."""
    return agree(hello.terms, TERMS) or m.Welcome(int(hello.client.split("-")[1]), 1 << 16, 0, TERMS)


def hub_server(pki: Path, clients: int, size: int, pipe: Connection) -> None:
    """Steps when asked for; their seconds."""
    security = ServerSecurity(pki / "server.crt", pki / "server.key", pki / "ca.crt")
    hub = Hub("localhost:0", security, greet)
    pipe.send(hub.start())
    assert len(hub.wait_for(clients, PATIENCE)) == clients
    steps = Steps(hub, clients, size)
    pipe.send("ready")
    while count := pipe.recv():
        begin = time.perf_counter()
        steps.take(count)
        pipe.send(time.perf_counter() - begin)
    hub.stop("that was all", 5)


def hub_client(pki: Path, client: int, port: int, size: int) -> None:
    """Answer until Bye."""
    security = ClientSecurity(pki / "ca.crt", pki / f"client-{client}.crt", pki / f"client-{client}.key")
    dial(f"localhost:{port}", security, Idle(client, size))


# The comparison.


def kept(role: Callable[..., None], *args: Any) -> None:
    """Play a role, with the allocator set up as the command line does it: for all contestants alike."""
    keep_memory()
    role(*args)


class Contestant:
    """A server and its clients, as processes that wait when they are not asked."""

    def __init__(self, server: Callable[..., None], client: Callable[..., None], pki: Path, clients: int, size: int) -> None:
        self.pipe, theirs = CONTEXT.Pipe()
        self._processes = [CONTEXT.Process(target=kept, args=(server, pki, clients, size, theirs), daemon=True)]
        self._processes[0].start()
        theirs.close()
        port = self._receive()
        for k in range(clients):
            self._processes.append(CONTEXT.Process(target=kept, args=(client, pki, k, port, size), daemon=True))
            self._processes[-1].start()
        assert self._receive() == "ready"

    def seconds(self, steps: int) -> float:
        """How long so many steps take."""
        self.pipe.send(steps)
        return float(self._receive())

    def close(self) -> None:
        """End the processes."""
        for process in reversed(self._processes):  # clients first: they need not dial again
            process.kill()
            process.join()

    def _receive(self) -> Any:
        assert self.pipe.poll(PATIENCE), "a process of the benchmark does not answer"
        return self.pipe.recv()


@contextmanager
def certificates(clients: int) -> Iterator[Path]:
    """A folder with an authority, the server's and the clients' certificates."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_ca(folder)
        make_certificate(folder, "server", "server")
        for k in range(clients):
            make_certificate(folder, f"client-{k}")
        yield folder


def exchange(pki: Path, clients: int, size: int, seconds: float) -> dict[str, Any]:
    """One line of the table: blocks of steps, bare and ours by turns, in both orders."""
    bare = Contestant(bare_server, bare_client, pki, clients, size)
    ours = Contestant(hub_server, hub_client, pki, clients, size)
    try:
        steps = max(2, round(0.2 / min(c.seconds(5) / 5 for c in (bare, ours))))  # a fifth of a second
        for contestant in (bare, ours):
            contestant.seconds(steps)
        pairs: list[tuple[float, float]] = []
        end = time.monotonic() + seconds
        while time.monotonic() < end or len(pairs) < 8:
            if len(pairs) % 2:
                pairs.append((bare.seconds(steps), ours.seconds(steps)))
            else:
                second = ours.seconds(steps)
                pairs.append((bare.seconds(steps), second))
    finally:
        bare.close()
        ours.close()
    ratios = [a / b for a, b in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "clients": clients,
        "bytes each way": size,
        "bare steps/s": steps / statistics.median(a for a, _ in pairs),
        "ours steps/s": steps / statistics.median(b for _, b in pairs),
        "ours/bare": middle,
        "quartiles": f"{low:.2f} to {high:.2f}",
        "blocks": len(pairs),
    }


if __name__ == "__main__":
    import sys
    with certificates(8) as pki:
        for clients, size in EXCHANGES:
            print(exchange(pki, clients, size, float(sys.argv[1])), flush=True)
