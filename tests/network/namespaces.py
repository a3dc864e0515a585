"""Separate hosts on this machine: network namespaces, each connected to a switch by one cable.

A cable is a pair of `veth` devices. A long cable is a process that delays packets and loses some of them, like `tc
netem`, which many kernels lack.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import itertools
import json
import os
import random
import select
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

_NUMBERS = itertools.count()
_TUN = Path("/dev/net/tun")
SWITCH = "switch"


def lacking() -> str | None:
    """The reason why namespaces are not possible here, or None."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        return "needs Linux with iproute2 (`ip`)"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    name = f"cutlayer-probe-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False, timeout=30)
    if tried.returncode:
        return f"network namespaces cannot be made: {tried.stderr.strip()}"
    try:
        for kind in ("bridge", "veth"):
            words = ["ip", "-n", name, "link", "add", "name", "probe", "type", kind]
            tried = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
            if tried.returncode:
                return f"no {kind} devices can be made: {tried.stderr.strip()}"
            _run("ip", "-n", name, "link", "del", "probe")
    finally:
        _run("ip", "netns", "del", name)
    return None


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")


class Carried(NamedTuple):
    """Bytes, with Ethernet headers, and packets, none longer than a cable allows."""

    sent: int
    received: int
    packets_sent: int
    packets_received: int


class Network:
    """A switch, and hosts with the addresses 10.77.0.1, 10.77.0.2, ... in the order in which they are added. A context
    manager, which removes everything at the end, even after an error.
    """

    def __init__(self) -> None:
        self._name = f"cutlayer-{os.getpid()}-{next(_NUMBERS)}"
        self.addresses: dict[str, str] = {}
        self._cables: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> Self:
        try:
            self._namespace(SWITCH)
            _run("ip", "-n", self.space(SWITCH), "link", "add", "name", "bridge0", "type", "bridge")
            self._up(SWITCH, "bridge0")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def space(self, host: str) -> str:
        """The name of a host's namespace."""
        return f"{self._name}-{host}"

    def inside(self, host: str) -> list[str]:
        """Words to put before a command so that it runs at `host`."""
        return ["ip", "netns", "exec", self.space(host)]

    def add(self, host: str, *, delay: float = 0.0, loss: float = 0.0, seed: int = 0) -> str:
        """Add a host and return its address. Packets take `delay` seconds on its cable in each direction, and a
        fraction `loss` of them is lost.
        """
        self._namespace(host)
        at_host, at_switch = "eth0", f"to-{host}"
        if delay or loss:
            cable = [sys.executable, __file__, at_host, at_switch, str(delay), str(loss), str(seed)]
            process = subprocess.Popen(
                [*self.inside(SWITCH), *cable], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            self._cables[host] = process
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            _run("ip", "-n", self.space(SWITCH), "link", "set", at_host, "netns", self.space(host))
        else:
            peer = ("peer", "name", at_host, "netns", self.space(host))
            _run("ip", "-n", self.space(SWITCH), "link", "add", "name", at_switch, "type", "veth", *peer)
            for space, device in ((SWITCH, at_switch), (host, at_host)):  # otherwise 64 kB count as one packet
                _run("ip", "-n", self.space(space), "link", "set", device, "gso_max_segs", "1")
        _run("ip", "-n", self.space(SWITCH), "link", "set", at_switch, "master", "bridge0")
        address = f"10.77.0.{len(self.addresses) + 1}"
        _run("ip", "-n", self.space(host), "addr", "add", f"{address}/24", "dev", at_host)
        self._up(host, at_host)
        self._up(SWITCH, at_switch)
        self.addresses[host] = address
        return address

    def cut(self, host: str) -> None:
        """Disconnect the host's cable at the switch."""
        _run("ip", "-n", self.space(SWITCH), "link", "set", f"to-{host}", "down")

    def reconnect(self, host: str) -> None:
        """Connect the cable again."""
        self._up(SWITCH, f"to-{host}")

    def carried(self, host: str) -> Carried:
        """Bytes and packets that the host's device has sent and received so far."""
        words = ["ip", "-n", self.space(host), "-s", "-j", "link", "show", "eth0"]
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=30)
        sent, received = (json.loads(done.stdout)[0]["stats64"][way] for way in ("tx", "rx"))
        return Carried(sent["bytes"], received["bytes"], sent["packets"], received["packets"])

    def end_cable(self, host: str) -> tuple[int, int]:
        """End a long cable, and return how many packets it has carried and lost."""
        cable = self._cables.pop(host)
        carried, lost = cable.communicate(timeout=30)[0].split()
        return int(carried), int(lost)

    def close(self) -> None:
        """Remove everything."""
        for cable in self._cables.values():
            cable.kill()
            cable.communicate()
        self._cables.clear()
        listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True, timeout=30)
        for line in listed.stdout.splitlines():
            if line.startswith(f"{self._name}-"):
                _run("ip", "netns", "del", line.split()[0])

    def _namespace(self, host: str) -> None:
        _run("ip", "netns", "add", self.space(host))
        self._up(host, "lo")

    def _up(self, host: str, device: str) -> None:
        _run("ip", "-n", self.space(host), "link", "set", device, "up")


_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000


def _tap(name: str) -> int:
    """A device whose packets this process reads and writes as whole Ethernet frames."""
    end = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI))
    return end


def cable(near: str, far: str, delay: float, loss: float, seed: int) -> tuple[int, int]:
    """Pass packets between two new devices until standard input ends; returns how many were carried and lost."""
    ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL: this process must not outlive the tests
    ends = [_tap(near), _tap(far)]
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    chance, order = random.Random(seed), itertools.count()
    under_way: list[tuple[float, int, int, bytes]] = []
    carried = lost = 0
    print("ready", flush=True)  # noqa: T201
    while True:
        wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        readable, _, _ = select.select([*ends, sys.stdin], [], [], wait)
        if sys.stdin in readable:
            return carried, lost
        for end in readable:
            try:
                packet = os.read(end, 1 << 16)
            except OSError:  # the device is down
                continue
            if chance.random() < loss:
                lost += 1
            else:
                heapq.heappush(under_way, (time.monotonic() + delay, next(order), other[end], packet))
        while under_way and under_way[0][0] <= time.monotonic():
            _, _, end, packet = heapq.heappop(under_way)
            try:
                os.write(end, packet)
                carried += 1
            except OSError:
                lost += 1


def long_cables() -> str | None:
    """The reason why long cables are not possible here, or None."""
    return None if _TUN.exists() else f"a long cable needs {_TUN}"


if __name__ == "__main__":
    print(*cable(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5])))  # noqa: T201
