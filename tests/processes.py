"""Command lines as separate processes, forked from a process that has imported everything already.

Python and torch take seconds to start, but a fork takes milliseconds. `start` sends a command line to a process that
has only imported modules and computed nothing, so it has no threads. This process forks, and the child runs
`cutlayer.cli.main` and ends like `python -m cutlayer`. A few tests start Python itself, to test the start.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

IMPORTED = [
    "cutlayer.cli",
    "cutlayer.compare",
    "cutlayer.remote.join",
    "cutlayer.remote.serve",
    "cutlayer.report.curves",
    "cutlayer.report.html",
    "cutlayer.run",
    "matplotlib.backends.backend_agg",
    "sklearn.datasets",
    "torch._dynamo",
]
_PR_SET_PDEATHSIG = 1
_CLONE_NEWNET = 0x40000000
_NO_THREADS = {"OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
_STARTED = 60.0  # seconds in which a process must be forked, including the imports of the first


class Process:
    """A forked process with the interface of `subprocess.Popen`."""

    def __init__(self, pid: int, status: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._status = status

    def poll(self) -> int | None:
        """The exit code, minus the signal's number, or None if the process still runs."""
        return self._look(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code. Raises subprocess.TimeoutExpired."""
        code = self._look(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def _look(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            said = os.read(self._status, 64)
            os.close(self._status)
            self.returncode = int(said) if said else -signal.SIGKILL  # nothing is said if the forking process has died
        return self.returncode


class _Forking:
    """The process that forks, seen from the test's process."""

    def __init__(self) -> None:
        own, other = socket.socketpair()
        paths = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(other.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=[other.fileno()],
            env={**os.environ, "PYTHONPATH": paths, **_NO_THREADS},
            start_new_session=True,
        )
        other.close()
        own.settimeout(_STARTED)
        self._socket = own

    def fork(self, job: dict[str, Any], out: int, err: int) -> Process:
        status, theirs = os.pipe()
        data = json.dumps(job).encode()
        try:
            socket.send_fds(self._socket, [len(data).to_bytes(4, "big")], [out, err, theirs])
            self._socket.sendall(data)
        finally:
            os.close(theirs)
        return Process(int.from_bytes(self._socket.recv(4), "big"), status)

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


_forking: _Forking | None = None


def start(
    argv: Sequence[str],
    *,
    cwd: Path,
    stdout: IO[Any] | int = subprocess.DEVNULL,
    stderr: IO[Any] | int = subprocess.DEVNULL,
    env: Mapping[str, str] | None = None,
    new_session: bool = False,
    namespace: str | None = None,
    path: Sequence[Path] = (),
    program: str = "cutlayer.cli",
) -> Process:
    """Start a process that runs `cutlayer ARGV`.

    `namespace`: the name of its network namespace. `path`: more folders in which it finds modules, as if PYTHONPATH
    named them. `program`: another module, whose `main()` runs instead.
    """
    global _forking
    if _forking is None:
        _forking = _Forking()
        atexit.register(_forking.close)
    job = {
        "argv": list(argv),
        "cwd": str(cwd.resolve()),
        "env": {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        "new_session": new_session,
        "namespace": namespace,
        "path": list(map(str, path)),
        "program": program,
    }
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        out, err = (
            nothing if file == subprocess.DEVNULL else file if isinstance(file, int) else file.fileno()
            for file in (stdout, stderr)
        )
        return _forking.fork(job, out, err)
    finally:
        os.close(nothing)


# ---- in the process that forks ---------------------------------------------------------------------------------------


def _serve(control: socket.socket) -> dict[str, Any] | None:
    """Fork for each job and report each child's end, until the other side closes. In a child, return its job."""
    statuses: dict[int, tuple[int, int]] = {}  # a child's descriptor: its process number, and where to report its end
    while True:
        ready, _, _ = select.select([control, *statuses], [], [])
        for descriptor in ready:
            if descriptor is control:
                head, received, _, _ = socket.recv_fds(control, 4, 3)
                if not head:
                    return None
                out, err, status = received
                job = json.loads(_exactly(control, int.from_bytes(head, "big")))
                if not (pid := os.fork()):
                    control.close()
                    for inherited in (status, *statuses, *(told for _, told in statuses.values())):
                        os.close(inherited)
                    _become(job, out, err)
                    return job
                os.close(out)
                os.close(err)
                statuses[os.pidfd_open(pid)] = pid, status
                control.sendall(pid.to_bytes(4, "big"))
            else:
                pid, status = statuses.pop(descriptor)
                os.close(descriptor)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with suppress(BrokenPipeError):  # nothing waits for this process any more
                    os.write(status, str(code).encode())
                os.close(status)


def _exactly(control: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += control.recv(size - len(data))
    return data


def _become(job: dict[str, Any], out: int, err: int) -> None:
    """Set the job's streams, folder, environment and namespace."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # do not outlive the tests
    if job["new_session"]:
        os.setsid()
    if job["namespace"]:
        space = os.open(f"/run/netns/{job['namespace']}", os.O_RDONLY)
        assert libc.setns(space, _CLONE_NEWNET) == 0
        os.close(space)
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.close(out)
    os.close(err)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    sys.path[1:1] = job["path"]
    sys.argv = ["cutlayer", *job["argv"]]


def _run() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # otherwise a child's garbage collection, at its end at the latest, would copy all this memory
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot fork"
    if (job := _serve(control)) is not None:
        importlib.import_module(job["program"]).main()


if __name__ == "__main__":
    # If a shell runs its jobs in the background, its processes ignore Ctrl-C from the start. These should not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _run()
