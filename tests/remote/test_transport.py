"""The real network between server and clients: gRPC and TLS on this machine's own address, without mocks."""

from __future__ import annotations

import itertools
import logging
import os
import queue
import resource
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, get_args

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from grpc_health.v1 import health_pb2

from cutlayer.errors import (
    REFUSALS,
    ConfigError,
    CutlayerWarning,
    NetworkError,
    PortInUseError,
    RefusedError,
    WireError,
)
from cutlayer.remote import network
from cutlayer.remote.carrier import Lost
from cutlayer.remote.certs import make_ca, make_certificate
from cutlayer.remote.dial import STOPPED, Backoff, dial
from cutlayer.remote.exchange import Body, Exchange
from cutlayer.remote.hub import Hub
from cutlayer.remote.security import ClientSecurity, ServerSecurity, hash_token, make_token
from cutlayer.remote.transports import host_and_port
from cutlayer.remote.transports.memory import MemoryCarrier
from cutlayer.wire import ClientSide, Frame, Limits, agree, pack, unpack
from cutlayer.wire import messages as m
from cutlayer.wire.frames import split

TERMS = m.Terms(run="r", algorithm="psl", part="p", crossing=[], returning=[], step=m.StepTerms(batch=4))
QUICK = Backoff(first=0.05, most=0.2)
SOON = 30.0  # seconds that anything may take on a busy machine; it usually takes a hundredth of that
INSECURE = ServerSecurity(), ClientSecurity()


def hello(client: int, token: str = "", name: str | None = None) -> m.Hello:
    return m.Hello(client=name or f"client-{client}", terms=TERMS, samples=10, mass=10, token=token)


def greet(said: m.Hello, identity: str | None) -> m.Welcome | m.Refused:
    return agree(said.terms, TERMS) or m.Welcome(int(said.client.split("-")[1]), 8, 0, TERMS)


def answer(request: Any, body: Any = b"") -> tuple[m.Message, Sequence[Any]] | None:
    """A client's answer: after Forward, the bytes that it received with TakeModel."""
    return (m.SmashedUp(request.step, 2), [bytes(body)]) if isinstance(request, m.Forward) else None


class Echo:
    """A worker that sends back the model that it received. It waits for `pause` before each answer."""

    def __init__(self, client: int, *, token: str = "", name: str | None = None) -> None:
        self.said = hello(client, token, name)
        self.pause = threading.Event()
        self.pause.set()
        self.model = b""
        self.welcomed = 0

    def hello(self) -> m.Hello:
        return self.said

    def welcome(self, welcome: m.Welcome) -> m.Refused | None:
        self.welcomed += 1
        return agree(welcome.terms, TERMS, "the server", "the client")

    def handle(self, frame: Frame) -> tuple[m.Message, Sequence[Any]] | None:
        assert self.pause.wait(SOON)
        if isinstance(frame.message, m.TakeModel):
            self.model = bytes(frame.body)
        return answer(frame.message, self.model)


class Clients:
    """Workers that dial from their own threads; `ends` contains their results."""

    def __init__(self, port: int, security: Callable[[int], ClientSecurity] | ClientSecurity, **options: Any) -> None:
        self.port, self.security, self.options = port, security, options
        self.workers: dict[int, Any] = {}
        self.ends: queue.Queue[tuple[int, str | BaseException]] = queue.Queue()
        self.stop = threading.Event()
        self.threads: list[threading.Thread] = []

    def add(self, *workers: Any) -> Self:
        for worker in workers:
            key = len(self.threads)
            self.workers[key] = worker
            thread = threading.Thread(target=self._dial, args=(key, worker), name=f"client {key}")
            thread.start()
            self.threads.append(thread)
        return self

    def _dial(self, key: int, worker: Any) -> None:
        security = self.security if isinstance(self.security, ClientSecurity) else self.security(key)
        options = {"backoff": QUICK, "stop": self.stop, **self.options}
        try:
            self.ends.put((key, dial(f"localhost:{self.port}", security, worker, **options)))
        except BaseException as error:
            self.ends.put((key, error))

    def end(self) -> str | BaseException:
        """The result of the next worker that ends."""
        return self.ends.get(timeout=SOON)[1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for worker in self.workers.values():
            getattr(worker, "pause", self.stop).set()
        for thread in self.threads:
            thread.join(SOON)
            assert not thread.is_alive()


class Raw:
    """A client that the test controls message by message, and that can send anything."""

    def __init__(
        self,
        port: int,
        client: int = 0,
        *,
        said: bytes | None = None,
        credentials: Any = None,
        channel: Any = None,
        welcome: bool = True,
        timeout: float = SOON,
    ) -> None:
        self.side = ClientSide()
        self.said: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.came: list[memoryview] = []
        first = self.side.send(hello(client))
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
        options += [("grpc.max_receive_message_length", -1)]
        target = f"localhost:{port}"
        self.own = None
        if channel is None and credentials is None:
            channel = self.own = grpc.insecure_channel(target, options)
        elif channel is None:
            channel = self.own = grpc.secure_channel(target, credentials, options)
        method = channel.stream_stream(f"/{network.SERVICE}/{network.METHOD}")
        metadata = ((network.HELLO, first if said is None else said),) if said != b"" else ()
        self.call = method(iter(self.said.get, None), metadata=metadata, timeout=timeout)
        if welcome:
            assert isinstance(self.receive().message, m.Welcome)

    def receive(self) -> Frame:
        if not self.came:
            self.came = list(split(next(self.call)))
        return self.side.receive(self.came.pop(0))

    def send(self, message: m.Message, body: Sequence[Any] = ()) -> bytes:
        """Send a message, and return its frame."""
        frame = self.side.send(message, body)
        self.said.put(frame)
        return frame

    def refused(self) -> Any:
        """The error that ends the call."""
        with pytest.raises(grpc.RpcError) as error:
            for _ in self.call:
                pass
        return error.value

    def close(self) -> None:
        self.said.put(None)
        self.call.cancel()
        if self.own is not None:
            self.own.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def serving(security: ServerSecurity | None = None, **options: Any) -> Iterator[tuple[Hub, int]]:
    """A hub that listens, and its port. The hub must leave no thread behind."""
    before = set(threading.enumerate())
    hub = Hub("localhost:0", security or ServerSecurity(), options.pop("greet", greet), **options)
    port = hub.start()
    try:
        yield hub, port
    finally:
        hub.stop("the test is over", 5)
        left = set(threading.enumerate()) - before
        assert not [t for t in left if t.name.startswith("cutlayer-hub")]


def step(number: int, body: Sequence[Any] = (b"x",)) -> list[tuple[m.Message, Sequence[Any]]]:
    """A model, and the request to send it back."""
    return [(m.TakeModel(number), body), (m.Forward(number), ())]


def bodies(results: dict[int, Any]) -> dict[int, Any]:
    """The bytes that each client returned, or the reason why it is lost."""
    return {k: r.reason if isinstance(r, Lost) else b"".join(bytes(f.body) for f in r) for k, r in results.items()}


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates for a server and client-0 to client-7; some of another authority, and some that have expired."""
    folder = tmp_path_factory.mktemp("pki")
    make_ca(folder)
    make_ca(folder / "other")
    make_certificate(folder, "server", "server")
    make_certificate(folder, "old-server", "server", days=-1)
    make_certificate(folder, "elsewhere", "server", hosts=["elsewhere.example"])
    make_certificate(folder, "old", days=-1)
    for k in range(8):
        make_certificate(folder, f"client-{k}")
    make_certificate(folder / "other", "client-0")
    return folder


def server_tls(pki: Path, name: str = "server") -> ServerSecurity:
    return ServerSecurity(pki / f"{name}.crt", pki / f"{name}.key", pki / "ca.crt")


def client_tls(pki: Path, name: str) -> ClientSecurity:
    return ClientSecurity(pki / "ca.crt", pki / f"{name}.crt", pki / f"{name}.key")


@pytest.mark.parametrize("clients", [1, 3, 8])
def test_exchange_over_mutual_tls(clients: int, pki: Path) -> None:
    seen: dict[str, str | None] = {}

    def noting(said: m.Hello, identity: str | None) -> m.Welcome | m.Refused:
        seen[said.client] = identity
        return greet(said, identity)

    with serving(server_tls(pki), greet=noting) as (hub, port):
        with Clients(port, lambda k: client_tls(pki, f"client-{k}")).add(*map(Echo, range(clients))) as group:
            assert hub.wait_for(clients, SOON) == hub.wait_for(range(clients), SOON) == hub.connected
            assert hub.connected == frozenset(range(clients))
            for number in range(1, 4):
                sent = {k: os.urandom(1000 * k + number) for k in range(clients)}
                results = hub.exchange({k: step(number, [sent[k][:7], sent[k][7:]]) for k in sent}, deadline=SOON)
                assert bodies(results) == sent
                assert all(r[0].message.step == number for r in results.values())
            common = [b"one", b"body", os.urandom(300_000)]
            results = hub.exchange({k: step(4, common) for k in range(clients)})
            assert set(bodies(results).values()) == {b"".join(common)}
            assert bodies(hub.exchange({0: [(m.TakeModel(5), common)]})) == {0: b""}  # sent; nothing comes back
            assert hub.exchange({}) == {}
            assert hub.exchange({0: []}) == {0: []}
            traffic = hub.traffic()[clients - 1]
            hub.stop("that was all", 5)
            assert [group.end() for _ in range(clients)] == ["that was all"] * clients
        assert seen == {f"client-{k}": f"client-{k}" for k in range(clients)}
        assert traffic.payload_received == sum(1000 * (clients - 1) + n for n in (1, 2, 3)) + len(b"".join(common))
        assert traffic.messages_received == 4
        assert traffic.received > traffic.payload_received
        assert traffic.connections == 1
        assert traffic.reconnects == 0
        assert traffic.latency is not None
        assert 0 < traffic.latency < SOON


@pytest.mark.parametrize(
    ("address", "encrypted", "sentence"),
    [
        ("grpc://localhost:1", True, "has no TLS, but certificates are given: write grpcs://localhost:1"),
        ("grpcs://localhost:1", False, "needs TLS: give certificates, or write grpc://localhost:1"),
        ("memory://x", False, "clients in the server's own process: give grpcs://host:port"),
        ("grcp://localhost:1", False, "unknown scheme of an address 'grcp': did you mean 'grpc'?"),
    ],
)
def test_schemes_that_do_not_fit(address: str, encrypted: bool, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        host_and_port(address, encrypted=encrypted)
    assert sentence in str(error.value)


def test_schemes_of_addresses() -> None:
    for encrypted, scheme in ((False, "grpc://"), (True, "grpcs://")):
        for place in ("localhost:1", "[::1]:1"):
            assert host_and_port(place, encrypted=encrypted) == place
            assert host_and_port(scheme + place, encrypted=encrypted) == place


def test_both_ends_take_addresses_with_a_scheme(pki: Path) -> None:
    for scheme, security, own in (("grpc", *INSECURE), ("grpcs", server_tls(pki), client_tls(pki, "client-0"))):
        hub = Hub(f"{scheme}://localhost:0", security, greet)
        address = f"{scheme}://localhost:{hub.start()}"
        with ThreadPoolExecutor() as pool:
            end = pool.submit(dial, address, own, Echo(0))
            assert hub.wait_for(1, SOON) == {0}
            hub.stop("that was all", 5)
            assert end.result(SOON) == "that was all"
    with pytest.raises(ConfigError, match="write grpcs://"):
        Hub("grpc://localhost:0", server_tls(pki), greet)
    with pytest.raises(ConfigError, match="needs TLS"):
        dial("grpcs://localhost:1", ClientSecurity(), Echo(0))


class Memory:
    """A carrier in memory for the tests below."""

    def __init__(self, clients: int) -> None:
        self.carrier = MemoryCarrier({k: Echo(k) for k in range(clients)})
        for k in range(clients):
            assert self.carrier.join(k, lambda said, _: greet(said, None)) is None

    def bodies(self, requests: dict[int, Any]) -> dict[int, Any]:
        return bodies(self.carrier.exchange(requests, on_answer=lambda _, frame: frame))


def test_memory_carries_what_a_network_does() -> None:
    """The same requests give the same answers and the same numbers of bytes."""
    requests = {k: step(1, [os.urandom(1000 * k + 1)]) for k in range(3)}
    memory = Memory(3)
    there = memory.bodies(requests)
    with serving() as (hub, port), Clients(port, INSECURE[1]).add(*map(Echo, range(3))):
        hub.wait_for(3, SOON)
        assert bodies(hub.exchange(requests)) == there
        until(lambda: all(t.messages_received == 1 for t in hub.traffic().values()))
        assert {k: replace(t, latency=None) for k, t in hub.traffic().items()} == memory.carrier.traffic()


def test_memory_lets_nobody_answer_who_is_not_up_to_date() -> None:
    memory = Memory(2)
    assert memory.carrier.connected == {0, 1}
    assert set(memory.carrier.arrivals()) == {0, 1}
    memory.carrier.cut(1)
    assert memory.bodies({k: step(1) for k in range(3)}) == {0: b"x", 1: "gone", 2: "gone"}
    memory.carrier.join(1, lambda said, _: greet(said, None))
    assert memory.carrier.present == {0, 1}
    assert memory.carrier.connected == {0}
    assert memory.bodies({1: step(2)}) == {1: "gone"}
    assert set(memory.carrier.arrivals()) == {1}
    assert memory.bodies({1: step(3)}) == {1: b"x"}
    assert memory.carrier.traffic()[1].reconnects == 1


def test_memory_tells_faults_of_both_sides_apart() -> None:
    """As over a network: an unreadable answer is garbage, and a client that reports an error has failed."""

    def wrong(client: int, frame: Frame) -> Any:
        raise WireError("three dimensions were expected")

    memory = Memory(3)
    requests: Any = {0: step(1)}
    assert memory.carrier.exchange(requests, on_answer=wrong) == {
        0: Lost("garbage", "three dimensions were expected", "WireError")
    }
    worker: Any = memory.carrier.workers[1]
    worker.handle = lambda frame: (m.Settled(frame.message.step), ())
    (lost,) = memory.carrier.exchange({1: [(m.Forward(1), ())]}, on_answer=wrong).values()
    assert isinstance(lost, Lost)
    assert (lost.reason, lost.kind) == ("failed", "WireError")
    assert "Settled of step 1 came in answer to Forward" in lost.sentence
    assert memory.carrier.connected == {2}
    worker = memory.carrier.workers[2]
    worker.handle = lambda frame: 1 / 0
    with pytest.raises(ZeroDivisionError):  # an error in this process
        memory.bodies({2: step(1)})


def test_a_common_body_is_joined_once() -> None:
    body = Body([b"a", memoryview(b"b")])
    assert list(body.buffers) == [b"a", b"b"]  # for a single client, the body is packed as it is
    body.users = 2
    assert body.buffers == [b"ab"]
    assert body.buffers[0] is body.buffers[0]


def test_a_late_answer_is_thrown_away_and_the_next_exchange_is_right() -> None:
    with serving() as (hub, port), Clients(port, INSECURE[1]).add(Echo(0), Echo(1)) as group:
        hub.wait_for(2, SOON)
        slow = group.workers[0]
        assert bodies(hub.exchange({k: step(1, [b"1"]) for k in (0, 1)})) == {0: b"1", 1: b"1"}
        slow.pause.clear()
        changing = bytearray(b"2")
        results = hub.exchange({k: step(2, [changing]) for k in (0, 1)}, deadline=0.5)
        changing[:] = b"?"
        assert bodies(results) == {0: "late", 1: b"2"}
        assert hub.connected == {0, 1}
        # The second answer is even later. The client gives both before the third.
        assert bodies(hub.exchange({0: step(3, [b"3"])}, deadline=0.1)) == {0: "late"}
        slow.pause.set()
        results = hub.exchange({k: step(4, [b"4"]) for k in (0, 1)}, deadline=SOON)
        assert bodies(results) == {0: b"4", 1: b"4"}
        assert [results[k][0].message.step for k in (0, 1)] == [4, 4]
        assert hub.lost == {"late": 2, "gone": 0, "failed": 0, "garbage": 0}
        assert slow.welcomed == 1


def test_quorum() -> None:
    with serving() as (hub, port), Clients(port, INSECURE[1]).add(*map(Echo, range(3))) as group:
        hub.wait_for(3, SOON)
        for k in (1, 2):
            group.workers[k].pause.clear()
        threading.Timer(0.5, group.workers[1].pause.set).start()
        begin = time.monotonic()
        results = hub.exchange({k: step(1) for k in range(3)}, deadline=0.1, quorum=2)
        assert bodies(results) == {0: b"x", 1: b"x", 2: "late"}
        assert 0.4 < time.monotonic() - begin < SOON
        threading.Timer(0.3, group.workers[2].pause.set).start()
        assert bodies(hub.exchange({k: step(2) for k in range(3)}, deadline=0.01, quorum=5)) == dict.fromkeys(
            range(3), b"x"
        )  # an impossible quorum, so it waits for all clients


def test_only_voters_make_a_quorum() -> None:
    with serving() as (hub, port), Clients(port, INSECURE[1]).add(*map(Echo, range(3))) as group:
        hub.wait_for(3, SOON)
        group.workers[0].pause.clear()
        threading.Timer(0.5, group.workers[0].pause.set).start()
        requests: dict[int, Any] = {0: step(1), 1: [(m.TakeModel(1), (b"x",))], 2: step(1)}
        results = hub.exchange(requests, deadline=0.1, quorum=1, voters=[0])
        assert bodies(results) == {0: b"x", 1: b"", 2: b"x"}


def test_what_is_decoded_while_more_comes() -> None:
    names = set()

    def decode(client: int, frame: Frame) -> tuple[int, bytes]:
        names.add(threading.current_thread().name)
        if frame.body == b"wrong":
            raise WireError("three dimensions were expected")
        if frame.body == b"bug":
            raise ZeroDivisionError("in decoding")
        return client, bytes(frame.body)

    with serving() as (hub, port), Clients(port, INSECURE[1]).add(*map(Echo, range(3))) as group:
        hub.wait_for(3, SOON)
        results = hub.exchange({k: step(1, [b"%d" % k]) for k in range(3)}, on_answer=decode)
        assert results == {k: [(k, b"%d" % k)] for k in range(3)}
        assert all(name.startswith("cutlayer-decode") for name in names)
        results = hub.exchange({k: step(2, [b"wrong" if k == 1 else b"right"]) for k in range(3)}, on_answer=decode)
        assert results[0] == [(0, b"right")]
        assert results[1] == Lost("garbage", "three dimensions were expected", "WireError")
        ended = group.end()
        assert isinstance(ended, WireError)
        assert "three dimensions were expected" in str(ended)
        assert hub.connected == {0, 2}
        with pytest.raises(ZeroDivisionError):
            hub.exchange({0: step(3, [b"bug"]), 2: step(3)}, on_answer=decode)
        assert bodies(hub.exchange({k: step(4) for k in (0, 2)})) == {0: b"x", 2: b"x"}


KILLED = """
import sys, grpc
channel = grpc.insecure_channel("localhost:" + sys.argv[1])
method = channel.stream_stream("/cutlayer.Split/Talk")
import queue
for frame in method(iter(queue.SimpleQueue().get, None), metadata=[("cutlayer-hello-bin", bytes.fromhex(sys.argv[2]))]):
    print(len(frame), flush=True)
"""


def test_a_client_killed_in_the_midst_does_not_disturb_the_others() -> None:
    with serving() as (hub, port), Clients(port, INSECURE[1]).add(Echo(1), Echo(2)):
        said = ClientSide().send(hello(0)).hex()
        with subprocess.Popen([sys.executable, "-c", KILLED, str(port), said], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline()  # a Welcome
            hub.wait_for(3, SOON)

            def kill() -> None:
                assert process.stdout is not None
                assert process.stdout.readline()  # a request
                process.kill()

            threading.Thread(target=kill).start()
            results = hub.exchange({k: step(1) for k in range(3)}, deadline=SOON)
        assert bodies(results) == {0: "gone", 1: b"x", 2: b"x"}
        assert hub.connected == {1, 2}
        assert bodies(hub.exchange({k: step(2) for k in range(3)})) == {0: "gone", 1: b"x", 2: b"x"}


class Cable:
    """A connection to a port that can be cut."""

    def __init__(self, port: int) -> None:
        self.to, self.ends = port, list[socket.socket]()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.lock = threading.Lock()
        self.flows = threading.Event()
        self.flows.set()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self.to))
            except OSError:
                near.close()
                continue
            with self.lock:
                self.ends += [near, far]
            for a, b in ((near, far), (far, near)):
                threading.Thread(target=self._copy, args=(a, b), daemon=True).start()

    def _copy(self, a: socket.socket, b: socket.socket) -> None:
        try:
            while (data := a.recv(1 << 16)) and self.flows.wait(SOON):
                b.sendall(data)
        except OSError:
            pass
        for end in (a, b):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def cut(self) -> None:
        with self.lock:
            for end in self.ends:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            self.ends.clear()

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.flows.set()
        self.cut()


def test_a_client_comes_back_when_the_network_does() -> None:
    with serving() as (hub, port):
        cable = Cable(port)
        with Clients(cable.port, INSECURE[1]).add(Echo(0)), Clients(port, INSECURE[1]).add(Echo(1)):
            hub.wait_for(2, SOON)
            assert set(hub.arrivals()) == {0, 1}
            assert bodies(hub.exchange({k: step(1) for k in (0, 1)})) == {0: b"x", 1: b"x"}
            cable.cut()
            until(lambda: hub.traffic()[0].connections == 2 and 0 in hub.present)
            # Until the trainer has noticed, the client receives nothing that depends on messages that it missed.
            assert hub.connected == {1}
            lost = hub.exchange({k: step(2) for k in (0, 1)})[0]
            assert isinstance(lost, Lost)
            assert lost.reason == "gone"
            assert "come back" in lost.sentence
            assert set(hub.arrivals()) == {0}
            assert hub.arrivals() == {}
            assert bodies(hub.exchange({k: step(3) for k in (0, 1)})) == {0: b"x", 1: b"x"}
            assert hub.traffic()[0].reconnects == 1
        cable.close()


def test_clients_come_back_when_the_server_does() -> None:
    hub = Hub("localhost:0", ServerSecurity(), greet)
    port = hub.start()
    cable = Cable(port)
    with Clients(cable.port, INSECURE[1]).add(Echo(0), Echo(1)) as group:
        hub.wait_for(2, SOON)
        cable.cut()  # so that they receive no Bye
        cable.to = 1
        hub.stop("a crash", 0)
        time.sleep(0.3)
        hub = Hub(f"localhost:{port}", ServerSecurity(), greet)
        assert hub.start() == port
        cable.to = port
        assert hub.wait_for(2, SOON) == {0, 1}
        assert bodies(hub.exchange({k: step(1) for k in (0, 1)})) == {0: b"x", 1: b"x"}
        hub.stop("now really", 5)
        assert {group.end(), group.end()} == {"now really"}
    cable.close()


def test_a_server_that_will_return_says_no_bye() -> None:
    hub = Hub("localhost:0", ServerSecurity(), greet)
    port = hub.start()
    with Clients(port, INSECURE[1]).add(Echo(0), Echo(1)) as group:
        hub.wait_for(2, SOON)
        group.workers[1].pause.clear()
        assert bodies(hub.exchange({k: step(1) for k in (0, 1)}, deadline=0.2)) == {0: b"x", 1: "late"}
        begin = time.monotonic()
        hub.stop("back soon", 2 * SOON, returning=True)
        assert time.monotonic() - begin < SOON
        group.workers[1].pause.set()
        hub = Hub(f"localhost:{port}", ServerSecurity(), greet)
        assert hub.start() == port
        assert hub.wait_for(2, SOON) == {0, 1}
        assert bodies(hub.exchange({k: step(2) for k in (0, 1)})) == {0: b"x", 1: b"x"}
        hub.stop("now really", 5)
        assert {group.end(), group.end()} == {"now really"}


def test_nobody_there() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(NetworkError, match=f"localhost:{port} cannot be reached") as error:
        dial(f"localhost:{port}", INSECURE[1], Echo(0), backoff=QUICK, give_up_after=0.5)
    assert error.value.exit_code == 75
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    assert dial(f"localhost:{port}", INSECURE[1], Echo(0), stop=stop) == STOPPED
    delays = [Backoff(1, 2, 30).delay(n) for n in range(1, 100)]
    assert all(0.5 <= delays[0] <= 1 and 15 <= d <= 30 for d in delays[5:])


def test_stop_ends_a_client_that_waits() -> None:
    with serving() as (hub, port), Clients(port, INSECURE[1]).add(Echo(0)) as group:
        hub.wait_for(1, SOON)
        group.stop.set()
        assert group.end() == STOPPED
        until(lambda: not hub.present)
        assert bodies(hub.exchange({0: step(1)})) == {0: "gone"}


class Faulty(Echo):
    """Fails at step 2, or sends a forbidden answer."""

    def handle(self, frame: Frame) -> tuple[m.Message, Sequence[Any]] | None:
        if getattr(frame.message, "step", 0) == 2:
            raise ZeroDivisionError("no samples left")
        if getattr(frame.message, "step", 0) == 3:
            return m.ModelUp(3), ()
        return super().handle(frame)


@pytest.mark.parametrize(
    ("number", "kind", "sentence"), [(2, "ZeroDivisionError", "no samples left"), (3, "WireError", "Model of step 3")]
)
def test_a_clients_error_is_heard_on_both_sides(number: int, kind: str, sentence: str) -> None:
    with serving() as (hub, port), Clients(port, INSECURE[1]).add(Faulty(0), Echo(1)) as group:
        hub.wait_for(2, SOON)
        assert bodies(hub.exchange({k: step(1) for k in (0, 1)})) == {0: b"x", 1: b"x"}
        results = hub.exchange({k: [(m.Forward(number), ())] for k in (0, 1)})
        assert isinstance(results[0], Lost)
        assert (results[0].reason, results[0].kind) == ("failed", kind)
        assert sentence in results[0].sentence
        ended = group.end()
        assert type(ended).__name__ == kind
        assert sentence in str(ended)
        again = hub.exchange({k: [(m.Forward(number + 1), ())] for k in (0, 1)})[0]
        assert again == results[0]  # the reason is given again to later requests


def test_a_client_refuses_a_server() -> None:
    other = m.Terms(run="other", algorithm="psl", part="p", crossing=[], returning=[], step=TERMS.step)
    with (
        serving(greet=lambda said, _: m.Welcome(0, 1, 0, other)) as (hub, port),
        Clients(port, INSECURE[1]).add(Echo(0)) as group,
    ):
        ended = group.end()
        assert isinstance(ended, RefusedError)
        assert ended.reason == "run"
        assert ended.exit_code == 2
        until(lambda: hub.traffic() and not hub.present)
        lost = hub.exchange({0: step(1)})[0]
        assert isinstance(lost, Lost)
        assert lost.reason == "failed"
        assert "the run is other for the server" in lost.sentence


def damaged(frame: bytes) -> bytes:
    return frame[:-1] + bytes([frame[-1] ^ 1])


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("garbage", "is not Cutlayer's"),
        ("truncated", "cut off"),
        ("damaged", "checksum"),
        ("replayed", "repeated"),
        ("other conversation", "another conversation"),
        ("wrong step", "in answer to Forward of step 1"),
        ("not asked", "was not asked for"),
        ("too large", "16384 are accepted"),
        ("far too large", ""),
    ],
)
def test_a_client_that_talks_nonsense(what: str, sentence: str) -> None:
    limits = Limits(message_bytes=16384)
    with serving(limits=limits) as (hub, port), Clients(port, INSECURE[1]).add(Echo(1)), Raw(port, 0) as raw:
        hub.wait_for(2, SOON)

        def talk() -> None:
            forward = raw.receive()
            number, conversation = 1, forward.conversation
            smashed = m.SmashedUp(1, 2)
            if what == "garbage":
                raw.said.put(os.urandom(500))
            elif what == "truncated":
                raw.said.put(raw.side.send(smashed, [b"abc" * 100])[:-5])
            elif what == "damaged":
                raw.said.put(damaged(raw.side.send(smashed, [b"abc"])))
            elif what == "replayed":
                raw.said.put(raw.send(smashed))
            elif what == "other conversation":
                raw.said.put(pack(smashed, (), number, conversation + 1))
            elif what == "wrong step":
                raw.said.put(pack(m.SmashedUp(2, 2), (), number, conversation))
            elif what == "not asked":
                raw.send(smashed)
                raw.said.put(pack(m.ModelUp(1), (), number + 1, conversation))
            else:
                raw.said.put(pack(smashed, [bytes(16384 if what == "too large" else 10**6)], number, conversation))

        threading.Thread(target=talk).start()
        first = hub.exchange({k: [(m.Forward(1), ())] for k in (0, 1)}, deadline=SOON)
        error = raw.refused()
        until(lambda: 0 not in hub.present)
        second = hub.exchange({k: [(m.Forward(2), ())] for k in (0, 1)}, deadline=SOON)
        assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert sentence in (error.details() or "")
        assert [type(r[1]) for r in (first, second)] == [list, list]
        lost = second[0]  # the error may follow a correct answer to the first request
        assert isinstance(lost, Lost)
        assert lost.reason == ("gone" if what == "far too large" else "garbage")
        assert sentence in lost.sentence
        with Clients(port, INSECURE[1]).add(Echo(0)):  # the client may come back
            until(lambda: 0 in hub.arrivals())
            assert bodies(hub.exchange({k: step(3) for k in (0, 1)})) == {0: b"x", 1: b"x"}


def test_a_first_word_that_is_none(caplog: pytest.LogCaptureFixture) -> None:
    right = ClientSide().send(hello(0))
    older = b"CUT0" + right[4:]
    big = ClientSide().send(m.Hello(client="a", terms=TERMS, samples=1, mass=1, token="t" * 4096))
    wrong = [
        (b"", "not a message"),
        (b"garbage" * 10, "not Cutlayer's"),
        (older, f"protocol 0, this side speaks {m.PROTOCOL}: install the same version"),
        (right[:-1], "cut off"),
        (pack(m.SmashedUp(1, 1)), "before Hello"),
        (big + bytes(network.HELLO_BYTES), "16384 are accepted"),
    ]
    with serving() as (hub, port):
        for said, sentence in wrong:
            with Raw(port, said=said, welcome=False) as raw:
                error = raw.refused()
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert sentence in error.details()
        with Raw(port, said=bytes(200_000), welcome=False) as raw:  # more than gRPC accepts, so our code never sees it
            assert raw.refused().code() is not grpc.StatusCode.OK
        assert hub.traffic() == {}
        with Raw(port):
            assert hub.wait_for(1, SOON) == {0}
    huge = replace_terms(crossing=[m.TensorSpec([1] * 16, "f" * 256)] * 256)
    with pytest.raises(WireError, match="Hello has"), serving() as (_, port):
        dial(f"localhost:{port}", INSECURE[1], Saying(m.Hello("client-0", huge, 1, 1)))


def replace_terms(**changes: Any) -> m.Terms:
    import msgspec

    return msgspec.structs.replace(TERMS, **changes)


class Saying(Echo):
    """Sends another Hello."""

    def __init__(self, said: m.Hello) -> None:
        super().__init__(0)
        self.said = said


@pytest.mark.parametrize(
    ("changes", "reason", "sentence"),
    [
        (
            {"protocol": 0},
            "protocol",
            f"the protocol is 0 for the client and {m.PROTOCOL} for the server: install the same",
        ),
        ({"run": "another"}, "run", "the run is another for the client"),
    ],
)
def test_refused_with_a_reason(changes: dict[str, Any], reason: str, sentence: str) -> None:
    with serving() as (hub, port), pytest.raises(RefusedError, match=sentence) as error:
        dial(f"localhost:{port}", INSECURE[1], Saying(m.Hello("client-0", replace_terms(**changes), 1, 1)))
    assert error.value.reason == reason
    assert error.value.exit_code == 2
    assert hub.traffic() == {}


def test_joining_twice_and_taking_anothers_number() -> None:
    with serving(keepalive=0.2) as (hub, port), Clients(port, INSECURE[1], keepalive=0.2).add(Echo(0)):
        hub.wait_for(1, SOON)
        begin = time.monotonic()
        with pytest.raises(RefusedError, match="'client-0' is connected already") as error:
            dial(f"localhost:{port}", INSECURE[1], Echo(0), keepalive=0.2)
        assert error.value.reason == "taken"
        assert error.value.exit_code == 75
        assert time.monotonic() - begin > 0.5  # long enough to notice if the first client was dead
        with pytest.raises(RefusedError, match="number 0 is taken"):
            dial(f"localhost:{port}", INSECURE[1], Echo(0, name="other-0"), keepalive=0.2)
        assert bodies(hub.exchange({0: step(1)})) == {0: b"x"}


def test_a_message_too_large_for_the_server_ends_the_client() -> None:
    small, large = Limits(message_bytes=5000), Limits()
    with serving(limits=small) as (hub, port), Clients(port, INSECURE[1], limits=large).add(Echo(0)) as group:
        hub.wait_for(1, SOON)
        group.workers[0].model = bytes(10_000)
        assert bodies(hub.exchange({0: [(m.Forward(1), ())]})) == {0: "gone"}
        ended = group.end()
        assert isinstance(ended, WireError)
        assert "larger than max" in str(ended)


def test_a_crowded_server_is_dialled_again(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("cutlayer.remote.hub._STREAMS", 1)
    with serving() as (hub, port), Clients(port, INSECURE[1]).add(Echo(0)) as first:
        hub.wait_for(1, SOON)
        with Clients(port, INSECURE[1]).add(Echo(1)) as second:
            until(lambda: "dialling again" in caplog.text)
            assert hub.present == {0}
            assert second.ends.empty()
            first.stop.set()
            until(lambda: hub.present == {1})


@pytest.mark.network
def test_who_waits_stays() -> None:
    """Pings without other messages are no reason to hang up, since a client may wait for its turn for hours."""
    often = {"keepalive": network.LEAST}
    with serving(**often) as (hub, port), Clients(port, INSECURE[1], **often).add(Echo(0)):
        hub.wait_for(1, SOON)
        time.sleep(5 * network.LEAST)  # one ping more than a server that counts pings forgives
        assert hub.traffic()[0].connections == 1
        assert bodies(hub.exchange({0: step(1)})) == {0: b"x"}


def test_who_vanishes_makes_way() -> None:
    """If a client's packets are silently lost, pings notice it, and its successor waits for that."""
    with serving(keepalive=0.4) as (hub, port):
        cable = Cable(port)
        with Clients(cable.port, INSECURE[1]).add(Echo(0)) as group:
            hub.wait_for(1, SOON)
            cable.flows.clear()
            with Clients(port, INSECURE[1]).add(Echo(0)) as successor:
                until(lambda: successor.workers[0].welcomed)
                until(lambda: hub.traffic()[0].connections == 2 and hub.present == {0})
                group.stop.set()
        cable.close()


class Damaging:
    """A proxy that flips the last bit of the client's second message on the given connections, counted from 0. The
    server then hangs up after the handshake, as if it did not accept the certificate.
    """

    def __init__(self, port: int, damaged: Collection[int]) -> None:
        self._to, self._damaged = port, damaged
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port, self.came = self._listener.getsockname()[1], 0
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def _start(self, what: Callable[..., None], *args: Any) -> None:
        self._threads.append(threading.Thread(target=what, args=args, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                number, self.came = self.came, self.came + 1
                far = socket.create_connection(("127.0.0.1", self._to))
                self._start(self._copy, near, far, number in self._damaged)
                self._start(self._copy, far, near, False)

    def _copy(self, a: socket.socket, b: socket.socket, damaged: bool) -> None:
        with suppress(OSError):
            for piece in itertools.count():
                if not (data := a.recv(1 << 16)):
                    break
                b.sendall(data[:-1] + bytes([data[-1] ^ 1]) if damaged and piece == 1 else data)
        for end in (a, b):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        a.close()  # the other socket is closed by the other direction, which reads from it

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(SOON)


def test_a_damaged_handshake_says_nothing_about_certificates(pki: Path) -> None:
    """A handshake that is damaged repeatedly looks like a refusal by the server."""
    security = replace(client_tls(pki, "client-0"), server_name="localhost")
    with serving(server_tls(pki)) as (_, port):
        for damaged, verdict in (((0,), None), ((0, 1), "does not accept")):
            way = Damaging(port, damaged)
            found = security.diagnose(f"127.0.0.1:{way.port}")
            way.close()
            assert way.came == 2
            assert found is None if verdict is None else verdict in (found or "")


def test_wrong_certificates(pki: Path, tmp_path: Path) -> None:
    def fails(security: ClientSecurity, client: int = 0) -> RefusedError:
        with pytest.raises(RefusedError) as error:
            dial(f"localhost:{port}", security, Echo(client), backoff=QUICK, give_up_after=5)
        return error.value

    with serving(server_tls(pki)) as (hub, port):
        error = fails(ClientSecurity(pki / "ca.crt"))
        assert error.reason == "certificate"
        assert "does not accept this client's certificate" in str(error)
        other = pki / "other"
        error = fails(ClientSecurity(pki / "ca.crt", other / "client-0.crt", other / "client-0.key"))
        assert "does not accept this client's certificate" in str(error)
        error = fails(ClientSecurity(other / "ca.crt", pki / "client-0.crt", pki / "client-0.key"))
        assert "the certificate of the server at localhost" in str(error)
        error = fails(client_tls(pki, "client-1"))
        assert (error.reason, str(error)[:50]) == ("client", "this certificate is made for 'client-1', not for '"[:50])
        assert "speaks TLS" in str(fails(ClientSecurity()))
        # An expired certificate is found here, before it is sent; the server would refuse it too.
        with pytest.raises(ConfigError, match=r"expired on .*: make a new one"):
            dial(f"localhost:{port}", client_tls(pki, "old"), Echo(0))
        assert "does not accept this client's certificate" in (
            client_tls(pki, "old").diagnose(f"localhost:{port}") or ""
        )
        parts = [(pki / name).read_bytes() for name in ("ca.crt", "old.key", "old.crt")]
        with Raw(port, credentials=grpc.ssl_channel_credentials(*parts), welcome=False) as raw:
            assert raw.refused().code() is grpc.StatusCode.UNAVAILABLE
        assert client_tls(pki, "client-0").diagnose(f"localhost:{port}") is None
        assert hub.traffic() == {}
    with serving(server_tls(pki, "elsewhere")) as (hub, port):
        assert "the certificate of the server at localhost" in str(fails(client_tls(pki, "client-0")))
        named = replace(client_tls(pki, "client-0"), server_name="elsewhere.example")
        with Clients(port, named).add(Echo(0)):
            assert hub.wait_for(1, SOON) == {0}
    with serving() as (_, port):
        assert "speaks no TLS" in str(fails(client_tls(pki, "client-0")))


def test_tokens(pki: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    good, other = make_token(), make_token()
    file = tmp_path / "tokens.toml"
    file.write_text(f'client-0 = "{good}"\nclient-1 = "{hash_token(other)}"\n')
    file.chmod(0o600)
    security = ServerSecurity(pki / "server.crt", pki / "server.key", tokens=file)
    with serving(security) as (hub, port):
        for client, token in ((0, other), (0, ""), (1, good), (2, good)):
            with pytest.raises(RefusedError, match="with this token") as error:
                dial(f"localhost:{port}", ClientSecurity(pki / "ca.crt", token=token or None), Echo(client))
            assert error.value.reason == "token"
        shown = [ClientSecurity(pki / "ca.crt", token=token) for token in (good, other)]
        with Clients(port, lambda k: shown[k]).add(Echo(0), Echo(1)):
            assert hub.wait_for(2, SOON) == {0, 1}
            assert [said.token for said in hub.arrivals().values()] == ["", ""]
            assert bodies(hub.exchange({0: step(1), 1: step(1)})) == {0: b"x", 1: b"x"}
        assert good not in repr(shown)
    said = caplog.text
    assert "is refused" in said
    assert good not in said
    assert other not in said


@pytest.mark.parametrize("address", ["0.0.0.0:0", "192.0.2.1:4747", "split.example.org:4747", "[::]:0"])
def test_without_tls_only_here(address: str) -> None:
    with pytest.raises(ConfigError, match="without TLS, anyone"):
        Hub(address, ServerSecurity(), greet).start()
    with pytest.raises(ConfigError, match="without TLS, anyone"):
        dial(address, ClientSecurity(), Echo(0))


@pytest.mark.parametrize("address", ["localhost", "localhost:", ":1", "::1:1", "localhost:x", "localhost:99999"])
def test_no_address(address: str) -> None:
    with pytest.raises(ConfigError, match=r"not an address|a port is"):
        Hub(address, ServerSecurity(), greet).start()


def test_a_port_that_is_taken(pki: Path) -> None:
    with serving() as (_, port), pytest.raises(PortInUseError, match="cannot listen at") as error:
        Hub(f"localhost:{port}", ServerSecurity(), greet).start()
    assert error.value.exit_code == 75
    with pytest.raises(ConfigError, match="give an address of this machine") as error:
        Hub("192.0.2.1:0", server_tls(pki), greet).start()
    assert error.value.exit_code == 2


@pytest.fixture(scope="module")
def refusing() -> Iterator[int]:
    """The port of a server that refuses every client, with the client's name as the reason."""

    def refuse(said: m.Hello, identity: str | None) -> m.Refused:
        reason: Any = said.client
        return m.Refused(reason, "a sentence")

    with serving(greet=refuse) as (_, port):
        yield port


@pytest.mark.parametrize("reason", get_args(m.Reason))
def test_what_a_refused_client_ends_with(reason: str, refusing: int) -> None:
    """2 if a person has to do something first, 75 if the same command may succeed later."""
    with pytest.raises(RefusedError, match="a sentence") as error:
        dial(f"localhost:{refusing}", INSECURE[1], Saying(hello(0, name=reason)))
    assert error.value.exit_code == (75 if reason in ("taken", "full") else 2)


def test_every_reason_has_an_exit_code() -> None:
    assert set(REFUSALS) == {*get_args(m.Reason), "certificate"}


def test_files_are_checked_first(pki: Path, tmp_path: Path) -> None:
    def complaint(security: Any, **changes: Any) -> str:
        changed = replace(security, **changes)
        check = changed.open if isinstance(changed, ServerSecurity) else changed.credentials
        with pytest.raises(ConfigError) as error:
            check("localhost:1")
        return str(error.value)

    server, client = server_tls(pki), client_tls(pki, "client-0")
    missing, text, folder = tmp_path / "missing", tmp_path / "text", tmp_path
    text.write_text("nothing of the kind")
    text.chmod(0o600)
    for path in (missing, folder):
        for field in ("certificate", "key", "ca"):
            assert f"cannot read '{path}'" in complaint(server, **{field: path})
            assert f"cannot read '{path}'" in complaint(client, **{field: path})
    assert "holds no certificate" in complaint(server, certificate=text)
    assert "holds no private key" in complaint(server, key=text)
    assert "is not the key of" in complaint(server, key=pki / "client-0.key")
    assert "not made for a server" in complaint(server, certificate=pki / "client-0.crt", key=pki / "client-0.key")
    assert "not made for a client" in complaint(client, certificate=pki / "server.crt", key=pki / "server.key")
    assert "but not that of an authority" in complaint(client, ca=pki / "client-1.crt")
    assert "expired on" in complaint(server, certificate=pki / "old-server.crt", key=pki / "old-server.key")
    assert "exactly one of ca and tokens" in complaint(server, tokens=text)
    assert "exactly one of ca and tokens" in complaint(server, ca=None)
    assert "its certificate and its key" in complaint(server, key=None)
    assert "needs its key" in complaint(client, key=None)
    assert "give ca" in complaint(client, ca=None)
    assert "is not valid TOML" in complaint(server, ca=None, tokens=text)
    text.write_text("")
    assert "one at least" in complaint(server, ca=None, tokens=text)
    text.write_text('a = "short"')
    assert "client 'a': a token of 5 characters can be guessed" in complaint(server, ca=None, tokens=text)
    text.write_text('a = "sha256$zz$zz"')
    assert "is damaged" in complaint(server, ca=None, tokens=text)
    private = serialization.load_pem_private_key((pki / "server.key").read_bytes(), None)
    form = serialization.PrivateFormat.PKCS8
    text.write_bytes(
        private.private_bytes(serialization.Encoding.PEM, form, serialization.BestAvailableEncryption(b"pw"))
    )
    assert "locked by a password" in complaint(server, key=text)
    text.write_bytes((pki / "server.key").read_bytes())
    text.chmod(0o644)
    with pytest.warns(CutlayerWarning, match="chmod 600"):
        replace(server, key=text).open("localhost:0")


def test_certificates(tmp_path: Path) -> None:
    ca = make_ca(tmp_path / "new")
    server = make_certificate(tmp_path / "new", "hub", "server", hosts=["split.example.org", "10.0.0.1", "::1"])
    client = make_certificate(tmp_path / "new", "site-7", days=30)
    modes = [path.stat().st_mode & 0o777 for pair in (ca, server, client) for path in pair]
    assert modes == [0o644, 0o600] * 3
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    authority, hub, site = (
        x509.load_pem_x509_certificate(pair.certificate.read_bytes()) for pair in (ca, server, client)
    )
    for made in (hub, site):
        made.verify_directly_issued_by(authority)
        constraints = made.extensions.get_extension_for_class(x509.BasicConstraints)
        assert constraints.critical
        assert not constraints.value.ca
        usage = made.extensions.get_extension_for_class(x509.KeyUsage).value
        assert usage.digital_signature
        assert not usage.key_cert_sign
    basic = authority.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert (basic.ca, basic.path_length) == (True, 0)
    assert authority.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    names = hub.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["split.example.org"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.1", "::1"]
    purposes = [list(c.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) for c in (hub, site)]
    assert [p[0]._name for p in purposes] == ["serverAuth", "clientAuth"]
    assert (site.not_valid_after_utc - site.not_valid_before_utc).days == 30

    before = sorted(p.name for p in (tmp_path / "new").iterdir())
    for wrong in (
        lambda: make_ca(tmp_path / "new"),
        lambda: make_certificate(tmp_path / "new", "hub", "server"),
        lambda: make_certificate(tmp_path / "new", "ca"),
        lambda: make_certificate(tmp_path / "new", "../evil"),
        lambda: make_certificate(tmp_path / "new", "a b"),
        lambda: make_certificate(tmp_path / "new", "x", hosts=["h"]),
        lambda: make_certificate(tmp_path / "new", "x", "server", hosts=["http://h"]),
        lambda: make_certificate(tmp_path / "none", "x"),
    ):
        with pytest.raises(ConfigError):
            wrong()
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == before
    (tmp_path / "new" / "ca.key").write_bytes(client.key.read_bytes())
    with pytest.raises(ConfigError, match="is not the key of"):
        make_certificate(tmp_path / "new", "x")


def test_sixty_four_clients() -> None:
    with serving() as (hub, port), Clients(port, INSECURE[1]).add(*map(Echo, range(64))) as group:
        assert hub.wait_for(64, 60) == frozenset(range(64))
        for number in (1, 2):
            results = hub.exchange({k: step(number, [b"%d" % k]) for k in range(64)}, deadline=60)
            assert bodies(results) == {k: b"%d" % k for k in range(64)}
        hub.stop("enough", 20)
        assert {group.end() for _ in range(64)} == {"enough"}


@pytest.mark.parametrize("count", [300, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_clients_and_few_threads(count: int) -> None:
    """More clients than decoding threads, over a few connections, which answer one after another."""
    patience = 160.0 if count > 300 else SOON
    with serving() as (hub, port):
        channels = [
            grpc.insecure_channel(f"localhost:{port}", [("grpc.use_local_subchannel_pool", 1)])
            for _ in range(count // 15)  # a connection can have 16 streams
        ]
        streams = [Raw(port, k, channel=channels[k % len(channels)], timeout=patience) for k in range(count)]
        assert len(hub.wait_for(count, patience)) == count
        server_threads = [t for t in threading.enumerate() if t.name.startswith("cutlayer")]
        assert len(server_threads) <= 5

        def work() -> None:
            for _ in range(2):
                for stream in streams:
                    took = bytes(stream.receive().body)
                    stream.send(*answer(stream.receive().message, took) or (m.Bye(""),))

        thread = threading.Thread(target=work)
        thread.start()
        for number in (1, 2):
            results = hub.exchange(
                {k: step(number, [b"%d" % k]) for k in range(count)},
                deadline=patience,
                on_answer=lambda _, f: bytes(f.body),
            )
            assert results == {k: [b"%d" % k] for k in range(count)}
        thread.join(patience)
        for stream in streams:
            stream.close()
        for channel in channels:
            channel.close()


def resident() -> int:
    """Number of bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_who_does_not_read_costs_the_server_little() -> None:
    """Four clients read nothing. Others get answers as usual, and the data that wait for the four are bounded."""
    size = 1 << 20
    limits = Limits(message_bytes=8 * size)
    with serving(limits=limits) as (hub, port), Clients(port, INSECURE[1], limits=limits).add(Echo(9)):
        stuck = [Raw(port, k) for k in range(4)]
        assert hub.wait_for(5, SOON) == {0, 1, 2, 3, 9}
        before = resident()
        gone: set[int] = set()
        for number in range(1, 40):
            common = [bytes(size // 2), bytes(size // 2)]
            requests = {k: [(m.TakeModel(number), common)] for k in {0, 1, 2, 3} - gone}
            results = hub.exchange({**requests, 9: step(number, [b"%d" % number])}, deadline=0.15)
            assert bodies(results)[9] == b"%d" % number
            gone |= {k for k, r in results.items() if isinstance(r, Lost) and r.reason == "gone"}
            assert resident() - before < 100 * size  # without a bound, it would be 39 times 4 MB
        assert gone == {0, 1, 2, 3}
        lost = hub.exchange({0: step(40)})[0]
        assert isinstance(lost, Lost)
        assert "does not take what it is sent" in lost.sentence
        for stream in stuck:
            stream.close()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_exchanges_leave_nothing_behind() -> None:
    """Neither answers nor requests remain after an exchange, however late its deadline was."""
    size = 1 << 20
    with serving() as (hub, port), Clients(port, INSECURE[1]).add(Echo(0)):
        hub.wait_for(1, SOON)
        for number in range(1, 101):
            if number == 20:
                before = resident()
            assert len(hub.exchange({0: step(number, [bytes(size)])}, deadline=1000)[0][0].body) == size
        assert resident() - before < 30 * size


def test_frames_in_one_message() -> None:
    frames = [pack(m.Forward(n), [bytes(n)], n, 7) for n in (1, 16, 40)]
    assert [bytes(f) for f in split(b"".join(frames))] == frames
    for rest in (frames[2][:-1], b"CUT", b"garbage" * 20, damaged(frames[0]) + b"x"):
        pieces = list(split(b"".join([*frames[:2], rest])))
        assert [bytes(f) for f in pieces[:2]] == frames[:2]
        assert b"".join(pieces[2:]) == rest
        with pytest.raises(WireError):
            unpack(pieces[-1], "to client")
    assert list(split(b"")) == [b""]


def test_what_waits_for_a_client_is_what_it_was() -> None:
    """Buffers may change after an exchange, even if their messages have not been sent yet."""
    size = 32 << 20  # more than gRPC's windows ever take
    with serving() as (hub, port), Raw(port, 0) as raw:
        hub.wait_for(1, SOON)
        buffers = [bytearray(b"a" * size) for _ in range(3)]
        for number, buffer in enumerate(buffers):  # the first is stuck on its way, and the others wait
            assert bodies(hub.exchange({0: [(m.TakeModel(number), [buffer])]}, deadline=0.2)) == {0: "late"}
            buffer[:] = b"b" * size
        assert bodies(hub.exchange({0: [(m.Forward(3), ())]}, deadline=0.2)) == {0: "late"}
        assert all(raw.receive().body == b"a" * size for _ in buffers)
        assert isinstance(raw.receive().message, m.Forward)
        raw.send(m.SmashedUp(3, 1))
        raw.send(m.Failed(3, "Enough", "that will do"))
        until(lambda: not hub.present)


STRANGERS = """
import sys
from test_transport import Raw, m
strangers = []
for k in range(20):
    stranger = Raw(int(sys.argv[1]), k, welcome=False)
    stranger.said.put(bytes(10 << 20))
    strangers.append(stranger)
print(all(isinstance(stranger.receive().message, m.Refused) for stranger in strangers), flush=True)
sys.stdin.readline()
"""


def test_strangers_cannot_fill_the_memory() -> None:
    """The server does not read data that come with a refused Hello. The clients are in a process of their own, so their
    memory is not measured.
    """
    with serving(greet=lambda said, _: m.Refused("full", "no")) as (_, port):
        before = resident()
        words = [sys.executable, "-c", STRANGERS, str(port)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None
        try:
            with ThreadPoolExecutor(1) as pool:
                assert pool.submit(process.stdout.readline).result(60) == "True\n"
            assert resident() - before < 50 << 20
        finally:
            process.kill()
            process.communicate()


def test_a_request_that_may_not_be() -> None:
    with serving(limits=Limits(message_bytes=5000)) as (hub, port), Clients(port, INSECURE[1]).add(Echo(0), Echo(1)):
        hub.wait_for(2, SOON)
        with pytest.raises(WireError, match="TakeModel to client 1 would have 6000 bytes: 5000 are accepted"):
            hub.exchange({0: step(1), 1: step(1, [bytes(6000)])})
        with pytest.raises(WireError, match="17 requests"):
            hub.exchange({0: [(m.Forward(1), ())] * 17})
        with pytest.raises(WireError, match="no forward pass"):
            hub.exchange({0: [(m.Backward(1, "own", 2), ())], 1: step(1)})
        assert bodies(hub.exchange({k: step(2) for k in (0, 1)})) == {0: b"x", 1: b"x"}


def test_a_clean_end(caplog: pytest.LogCaptureFixture) -> None:
    before = set(threading.enumerate())
    hub = Hub("localhost:0", ServerSecurity(), greet)
    hub.stop("not begun", 1)
    port = hub.start()
    with pytest.raises(NetworkError, match="starts once"):
        hub.start()
    with Clients(port, INSECURE[1]).add(Echo(0), Echo(1)) as group, Raw(port, 2) as stuck:
        hub.wait_for(3, SOON)
        group.workers[1].pause.clear()
        assert bodies(hub.exchange({0: step(1), 1: step(1)}, deadline=0.2)) == {0: b"x", 1: "late"}
        hub.exchange({2: [(m.TakeModel(1), [bytes(5 << 20)])]}, deadline=0.1)  # it does not read this
        threading.Timer(0.3, group.workers[1].pause.set).start()
        begin = time.monotonic()
        hub.stop("the end", 2)
        assert time.monotonic() - begin < SOON
        hub.stop("again", 2)
        assert {group.end(), group.end()} == {"the end"}
        stuck.close()
    with pytest.raises(NetworkError, match="not running"):
        hub.exchange({0: step(2)})
    assert hub.connected == frozenset()
    assert hub.wait_for(1, SOON) == frozenset()
    until(lambda: not set(threading.enumerate()) - before)
    assert not [r for r in caplog.records if r.name == "asyncio" and r.levelno > logging.INFO]


def test_an_exchange_ends_once() -> None:
    """The waiting thread was interrupted, and then the server hangs up on the clients that it had asked."""

    class Nothing:
        def keep_bodies(self, exchange: Exchange) -> None:
            pass

    exchange = Exchange({0: 1, 1: 1}, None, None, None, Nothing())  # type: ignore[arg-type]
    exchange.fail(KeyboardInterrupt())
    for client in (0, 1):
        exchange.lose(client, Lost("gone", "the server stops"))
    with pytest.raises(KeyboardInterrupt):
        exchange.wait()


def test_stopping_ends_an_exchange() -> None:
    with serving() as (hub, port), Clients(port, INSECURE[1]).add(Echo(0)) as group:
        hub.wait_for(1, SOON)
        group.workers[0].pause.clear()
        threading.Timer(0.2, lambda: hub.stop("the end", 0.5)).start()
        assert bodies(hub.exchange({0: step(1)})) == {0: "gone"}


def test_health(pki: Path) -> None:
    with serving(server_tls(pki)) as (_, port):
        parts = [(pki / name).read_bytes() for name in ("ca.crt", "client-0.key", "client-0.crt")]
        with grpc.secure_channel(f"localhost:{port}", grpc.ssl_channel_credentials(*parts)) as channel:

            def check(service: str) -> Any:
                method = channel.unary_unary(
                    "/grpc.health.v1.Health/Check",
                    health_pb2.HealthCheckRequest.SerializeToString,
                    health_pb2.HealthCheckResponse.FromString,
                )
                return method(health_pb2.HealthCheckRequest(service=service), timeout=SOON).status

            serving_now = health_pb2.HealthCheckResponse.SERVING
            assert check("") == check("cutlayer.Split") == serving_now
            with pytest.raises(grpc.RpcError) as error:
                check("other")
            assert error.value.code() is grpc.StatusCode.NOT_FOUND


def test_metrics() -> None:
    with serving(metrics=0) as (hub, port), Clients(port, INSECURE[1]).add(Echo(0)):
        hub.wait_for(1, SOON)
        hub.exchange({0: step(1, [b"12345"]), 3: step(1)})
        with urllib.request.urlopen(f"http://127.0.0.1:{hub.metrics_port}/metrics", timeout=SOON) as page:
            text = page.read().decode()
        traffic = hub.traffic()[0]
        for line in (
            "cutlayer_clients 1.0",
            f'cutlayer_bytes_total{{client="0",direction="down"}} {float(traffic.sent)}',
            'cutlayer_payload_bytes_total{client="0",direction="up"} 5.0',
            'cutlayer_lost_total{reason="gone"} 1.0',
            'cutlayer_connections_total{client="0"} 1.0',
            "cutlayer_exchange_seconds_count 1.0",
        ):
            assert line in text, text
        with pytest.raises(ConfigError, match="cannot serve metrics"):
            Hub("localhost:0", ServerSecurity(), greet, metrics=f"127.0.0.1:{hub.metrics_port}").start()
    assert not [t for t in threading.enumerate() if "http" in t.name.lower()]
