"""The speed and memory of the remote engine's exchange, compared with a bare gRPC stream that moves the same bytes.

    python benchmarks/remote.py [exchange] [memory] [enrolled] [training] [--write docs/benchmarks.md]

The setting is real: separate processes, connected by loopback with mutual TLS and certificates made for the benchmark.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import multiprocessing
import os
import platform
import queue
import statistics
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import torch
from torch import nn

from cutlayer import RunConfig
from cutlayer.allocator import keep_memory
from cutlayer.build import load_source
from cutlayer.remote import network
from cutlayer.remote.carrier import Lost
from cutlayer.remote.certs import make_ca, make_certificate
from cutlayer.remote.dial import Dialler, dial_all
from cutlayer.remote.hub import Hub
from cutlayer.remote.security import ClientSecurity, ServerSecurity
from cutlayer.remote.sides import client_name, client_number, remote_training, worker_of
from cutlayer.wire import Frame, Limits, agree
from cutlayer.wire import messages as m

CONTEXT = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
PATIENCE = 300.0  # seconds, for each wait
MEMORY = -1
ROWS = 2
TERMS = m.Terms(run="r", algorithm="psl", part="p", crossing=[], returning=[], step=m.StepTerms(batch=ROWS))
SERVICE, METHOD = "bare.Bare", "Talk"
KB, MB = 1000, 1000_000
TRAINING_CLIENTS, BATCH = 50, 32
EXCHANGES = [(8, MB), (2, MB), (8, 100 * KB), (2, 100 * KB)]  # clients, bytes per client and step in each direction


# The reference: one message down and one up per client and step.


def bare_server(pki: Path, clients: int, size: int, pipe: Connection) -> None:
    """Serves all streams from one event loop, which is faster for several clients than a thread per stream."""
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


def bare_threads(pki: Path, clients: int, size: int, pipe: Connection) -> None:
    """The other way to serve: one thread per stream."""
    payload = os.urandom(size)
    key, certificate, ca = ((pki / name).read_bytes() for name in ("server.key", "server.crt", "ca.crt"))
    turns: list[queue.SimpleQueue[None]] = []
    done: queue.SimpleQueue[None] = queue.SimpleQueue()

    def talk(received: Iterator[bytes], _: object) -> Iterator[bytes]:
        turn: queue.SimpleQueue[None] = queue.SimpleQueue()
        turns.append(turn)
        while True:
            turn.get()
            yield payload
            assert len(next(received)) == size
            done.put(None)

    options = network.server_options(Limits(), network.KEEPALIVE)
    server = grpc.server(ThreadPoolExecutor(clients), options=options)
    handler = grpc.stream_stream_rpc_method_handler(talk)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
    pipe.send(server.add_secure_port("localhost:0", grpc.ssl_server_credentials([(key, certificate)], ca, True)))
    server.start()
    while len(turns) < clients:
        time.sleep(0.01)
    pipe.send("ready")
    while steps := pipe.recv():
        begin = time.perf_counter()
        for _ in range(steps):
            for turn in turns:
                turn.put(None)
            for _ in turns:
                done.get()
        pipe.send(time.perf_counter() - begin)


def bare_client(pki: Path, client: int, port: int, size: int) -> None:
    """Returns as many bytes as it receives."""
    payload = os.urandom(size)
    key, certificate, ca = (
        (pki / name).read_bytes() for name in (f"client-{client}.key", f"client-{client}.crt", "ca.crt")
    )

    async def main() -> None:
        options = network.client_options(Limits(), network.KEEPALIVE, None, local=True)
        credentials = grpc.ssl_channel_credentials(ca, key, certificate)
        async with grpc.aio.secure_channel(f"localhost:{port}", credentials, options) as channel:
            call = channel.stream_stream(f"/{SERVICE}/{METHOD}")()
            while await call.read() is not grpc.aio.EOF:
                await call.write(payload)

    asyncio.run(main())


# Ours: the messages of a backward pass and the next forward pass, without computation.


class Idle:
    """A worker that computes nothing and sends the same bytes in each forward pass."""

    def __init__(self, client: int, size: int) -> None:
        self._hello = m.Hello(client=f"client-{client}", terms=TERMS, samples=ROWS, mass=ROWS)
        self._payload = os.urandom(size)

    def hello(self) -> m.Hello:
        """The Hello message."""
        return self._hello

    def welcome(self, welcome: m.Welcome) -> m.Refused | None:
        """Checks the terms."""
        return agree(welcome.terms, TERMS)

    def handle(self, frame: Frame) -> tuple[m.Message, list[bytes]] | None:
        """Answers a forward pass with the bytes."""
        return (
            (m.SmashedUp(frame.message.step, ROWS), [self._payload]) if isinstance(frame.message, m.Forward) else None
        )


class Steps:
    """The messages of training steps, as the hub exchanges them."""

    def __init__(self, hub: Hub, clients: int, size: int) -> None:
        self._hub, self._size, self._step = hub, size, 1
        self._gradients = {k: [os.urandom(size)] for k in range(clients)}
        self._check(hub.exchange({k: [(m.Forward(1), ())] for k in self._gradients}, deadline=PATIENCE))

    def take(self, count: int) -> None:
        """Takes `count` steps. Each client receives its own gradients and sends its rows."""
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
    """Admits every client with the same terms."""
    return agree(hello.terms, TERMS) or m.Welcome(int(hello.client.split("-")[1]), 1 << 16, 0, TERMS)


def hub_server(pki: Path, clients: int, size: int, pipe: Connection) -> None:
    """Takes steps on request and returns the seconds."""
    security = ServerSecurity(pki / "server.crt", pki / "server.key", pki / "ca.crt")
    hub = Hub("localhost:0", security, greet)
    pipe.send(hub.start())
    assert len(hub.wait_for(clients, PATIENCE)) == clients
    steps = Steps(hub, clients, size)
    pipe.send("ready")
    while count := pipe.recv():
        if count == MEMORY:
            pipe.send(resident())
            continue
        begin = time.perf_counter()
        steps.take(count)
        pipe.send(time.perf_counter() - begin)
    hub.stop("that was all", 5)


def hub_client(pki: Path, client: int, port: int, size: int) -> None:
    """Answers until Bye."""
    hub_clients(pki, [client], port, size)


def hub_clients(pki: Path, clients: Sequence[int], port: int, size: int) -> None:
    """Several clients in one process."""
    dial_all([Dialler(f"localhost:{port}", shown(pki, k), Idle(k, size)) for k in clients])


def shown(pki: Path, client: int) -> ClientSecurity:
    """A client's credentials."""
    return ClientSecurity(pki / "ca.crt", pki / f"client-{client}.crt", pki / f"client-{client}.key")


def resident() -> tuple[int, int]:
    """(current, peak) resident bytes of this process."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return int(lines["VmRSS"].split()[0]) * 1024, int(lines["VmHWM"].split()[0]) * 1024


# The comparison


def kept(role: Callable[..., None], *args: Any) -> None:
    """Plays a role with the allocator of the command line, for all contestants alike."""
    keep_memory()
    role(*args)


class Contestant:
    """A server and its clients, as processes that wait for requests."""

    def __init__(
        self,
        server: Callable[..., None],
        client: Callable[..., None],
        pki: Path,
        clients: int,
        size: int,
        processes: int | None = None,
    ) -> None:
        self.pipe, theirs = CONTEXT.Pipe()
        self._processes = [CONTEXT.Process(target=kept, args=(server, pki, clients, size, theirs), daemon=True)]
        self._processes[0].start()
        port = self._receive()
        names: list[Any] = list(range(clients))
        if processes is not None:
            names = [names[i::processes] for i in range(processes)]
        for name in names:
            self._processes.append(CONTEXT.Process(target=kept, args=(client, pki, name, port, size), daemon=True))
            self._processes[-1].start()
        assert self._receive() == "ready"

    def seconds(self, steps: int) -> float:
        """The seconds that this number of steps takes."""
        return float(self.ask(steps))

    def ask(self, what: int) -> Any:
        """The server's answer."""
        self.pipe.send(what)
        return self._receive()

    def processor_seconds(self) -> float:
        """CPU seconds of all its processes so far."""
        fields = [
            Path(f"/proc/{p.pid}/stat").read_text(encoding="utf-8").rsplit(")")[-1].split() for p in self._processes
        ]
        return sum(int(f[11]) + int(f[12]) for f in fields) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Ends the processes."""
        for process in reversed(self._processes):  # clients first, so they do not dial again
            process.kill()
            process.join()

    def _receive(self) -> Any:
        assert self.pipe.poll(PATIENCE), "a process of the benchmark does not answer"
        return self.pipe.recv()


@contextmanager
def certificates(clients: int) -> Iterator[Path]:
    """A folder with an authority and certificates of the server and the clients."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_ca(folder)
        make_certificate(folder, "server", "server")
        for k in range(clients):
            make_certificate(folder, f"client-{k}")
        yield folder


def exchange(pki: Path, clients: int, size: int, seconds: float) -> dict[str, Any]:
    """One line of the table. Contestants take turns in both orders, and the reference is the faster bare server."""
    roles = {
        "loop": (bare_server, bare_client),
        "threads": (bare_threads, bare_client),
        "ours": (hub_server, hub_client),
    }
    all_three: dict[str, Contestant] = {}
    try:
        for name, (server, client) in roles.items():
            all_three[name] = Contestant(server, client, pki, clients, size)
        steps = max(2, round(0.2 / min(c.seconds(5) / 5 for c in all_three.values())))  # for 0.2 seconds
        times: dict[str, list[float]] = {name: [] for name in roles}
        for contestant in all_three.values():
            contestant.seconds(steps)
        end = time.monotonic() + seconds
        while time.monotonic() < end or len(times["ours"]) < 8:
            for name in sorted(roles, reverse=bool(len(times["ours"]) % 2)):
                times[name].append(all_three[name].seconds(steps))
    finally:
        for contestant in all_three.values():
            contestant.close()
    rates = {name: steps / statistics.median(seconds) for name, seconds in times.items()}
    best = max("loop", "threads", key=lambda name: rates[name])
    low, middle, high = statistics.quantiles([a / b for a, b in zip(times[best], times["ours"], strict=True)], n=4)
    return {
        "clients": clients,
        "bytes each way": size,
        "bare, loop: steps/s": rates["loop"],
        "bare, threads: steps/s": rates["threads"],
        "ours steps/s": rates["ours"],
        "ours/faster bare": middle,
        "quartiles": f"{low:.2f} to {high:.2f}",
        "blocks": len(times["ours"]),
    }


def memory(pki: Path, clients: int, size: int) -> dict[str, Any]:
    """One line of the table: memory of ten steps, beyond that of the server's process before the first."""
    ours = Contestant(hub_server, hub_client, pki, clients, size)
    try:
        before, _ = ours.ask(MEMORY)
        ours.seconds(10)
        _, peak = ours.ask(MEMORY)
    finally:
        ours.close()
    step = clients * size
    return {
        "clients": clients,
        "bytes each way": size,
        "before, MB": before / MB,
        "peak, MB": peak / MB,
        "more/bytes of a step each way": (peak - before) / step,
        "more/bytes of a step": (peak - before) / (2 * step),
    }


def enrolled(pki: Path, clients: int, size: int, processes: int) -> dict[str, Any]:
    """One line of the table: steps with many clients whose streams are all open."""
    begin = time.monotonic()
    ours = Contestant(hub_server, hub_clients, pki, clients, size, processes)
    try:
        joined = time.monotonic() - begin
        times = [ours.seconds(1) for _ in range(20)]
        _, peak = ours.ask(MEMORY)
    finally:
        ours.close()
    return {
        "clients": clients,
        "processes": processes,
        "bytes each way": size,
        "all there after, s": joined,
        "steps/s": 1 / statistics.median(times),
        "slowest step, s": max(times),
        "server's peak, MB": peak / MB,
    }


# Training: a server and clients with models and data, as in a real run.


def lenet() -> nn.Module:
    """LeNet-5 for 28 x 28 pixels, cut after its first block: [R, 6, 14, 14] cross."""
    return nn.Sequential(
        OrderedDict(
            block1=nn.Sequential(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            block2=nn.Sequential(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            hidden1=nn.Sequential(nn.Linear(400, 120), nn.ReLU()),
            hidden2=nn.Sequential(nn.Linear(120, 84), nn.ReLU()),
            output=nn.Linear(84, 10),
        )
    )


def training_config(clients: int) -> RunConfig:
    """SGLR on Fashion-MNIST, b = 32, twenty batches per client and epoch."""
    return RunConfig.of(
        {
            "algorithm": "sglr",
            "data": "fashion-mnist",
            "clients": clients,
            "samples_per_client": 20 * BATCH,
            "batch": BATCH,
            "epochs": 1000,
            "cut": "block1",
            "validation": 0,
        }
    )


def training_server(pki: Path, clients: int, _: int, pipe: Connection) -> None:
    """Trains steps on request and returns the seconds."""
    torch.set_num_threads(1)
    config = training_config(clients)
    security = ServerSecurity(pki / "server.crt", pki / "server.key", pki / "ca.crt")
    hub = Hub("localhost:0", security, lambda hello, _: greet_client(hello, client_number(hello.client)))
    training, _, greet_client = remote_training(config, hub, [0] * clients, model=lenet)

    def endless() -> Iterator[Any]:
        for index in itertools.count():
            this = training.clients.begin_round(index, 1000, 1.0)  # the number of rounds in the clients' configuration
            yield from training.algorithm.round(training.server, training.clients, this)

    pipe.send(hub.start())
    assert len(hub.wait_for(clients, PATIENCE)) == clients
    steps = endless()
    pipe.send("ready")
    while count := pipe.recv():
        begin = time.perf_counter()
        for _ in range(count):
            next(steps)
        pipe.send(time.perf_counter() - begin)


def training_clients(pki: Path, clients: Sequence[int], port: int, _: int) -> None:
    """Several clients in one process, with their data and models."""
    torch.set_num_threads(1)
    config = training_config(TRAINING_CLIENTS)
    source = load_source(config, None)  # loaded once for all of them
    workers = [worker_of(config, k, name=client_name(k), model=lenet, data=source) for k in clients]
    dial_all([Dialler(f"localhost:{port}", shown(pki, k), worker) for k, worker in zip(clients, workers, strict=True)])


def training(pki: Path, processes: int) -> dict[str, Any]:
    """One line of the table: trained samples of all clients per second of wall time."""
    ours = Contestant(training_server, training_clients, pki, TRAINING_CLIENTS, 0, processes)
    try:
        ours.seconds(5)
        computed = ours.processor_seconds()
        blocks = [ours.seconds(10) for _ in range(10)]
        computed = ours.processor_seconds() - computed
    finally:
        ours.close()
    rates = [10 * TRAINING_CLIENTS * BATCH / seconds for seconds in blocks]
    low, middle, high = statistics.quantiles(rates, n=4)
    return {
        "clients": TRAINING_CLIENTS,
        "processes": processes,
        "samples/s": middle,
        "quartiles": f"{low:.0f} to {high:.0f}",
        "samples per processor second": len(blocks) * 10 * TRAINING_CLIENTS * BATCH / computed,
    }


def processor() -> str:
    """The name of the processor, if the system provides it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def table(title: str, rows: Iterator[dict[str, Any]], lines: list[str]) -> None:
    """Prints rows as they are measured, and collects them."""
    lines += ["", title, ""]
    print(f"\n{title}\n", flush=True)
    for number, row in enumerate(rows):
        new = ["| " + " | ".join(row) + " |", "|" + "---|" * len(row)] if number == 0 else []
        cells = [f"{v:.2f}" if isinstance(v, float) and v < 100 else f"{v:.0f}" if isinstance(v, float) else str(v)
                 for v in row.values()]  # fmt: skip
        new.append("| " + " | ".join(cells) + " |")
        lines += new
        print("\n".join(new), flush=True)


def main() -> None:
    """Measures and prints row by row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", help="exchange, memory, enrolled, training; all where none is named")
    parser.add_argument("--seconds", type=float, default=20.0, help="seconds per line of the exchange")
    parser.add_argument("--write", type=Path, help="write the tables to this file, between its lines '<!-- remote -->'")
    options = parser.parse_args()
    what = options.what or ["exchange", "memory", "enrolled", "training"]
    load = os.getloadavg()[0]
    lines = [f"{processor()}; load when it began {load:.1f}; grpcio {grpc.__version__}."]
    print(lines[0], flush=True)
    with certificates(1000 if "enrolled" in what else 64) as pki:
        if "exchange" in what:
            rows = (exchange(pki, clients, size, options.seconds) for clients, size in EXCHANGES)
            table("Exchange, steps per second:", rows, lines)
        if "memory" in what:
            table("The server's memory:", (memory(pki, 8, size) for size in (MB, 16 * MB)), lines)
        if "enrolled" in what:
            rows = (enrolled(pki, *line) for line in ((64, 100 * KB, 4), (1000, 10 * KB, 8)))
            table("Many clients:", rows, lines)
        if "training" in what:
            table("Training, samples per second:", (training(pki, n) for n in (2, 4)), lines)
    lines[0] += f" Load when it ended {os.getloadavg()[0]:.1f}."
    if options.write:
        head, _, tail = options.write.read_text().split("<!-- remote -->")
        options.write.write_text("<!-- remote -->".join([head, "\n" + "\n".join(lines) + "\n\n", tail]))


if __name__ == "__main__":
    main()
