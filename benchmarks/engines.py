"""How fast the engines simulate: interleaved in one process, medians, ratios to two references measured in the same
run.

    ceiling   centralised training of the same model on the union batch (C x b rows)
    loop      plainly, as hand-made scripts do: per client a module, an optimiser and a pass through the server

    python benchmarks/engines.py [--quick] [--device cuda] [--write docs/benchmarks.md]

On the CPU: CPU seconds of the process on one thread, so that other tenants of the machine disturb little; freed memory
is kept in the process (cutlayer.allocator) for all contestants alike. On CUDA: seconds, the device awaited.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from cutlayer import RunConfig, from_arrays
from cutlayer.allocator import keep_memory
from cutlayer.build import Training, assemble
from cutlayer.models import build, cut
from cutlayer.types import Step

CLASSES = 10
EPOCH = 16  # batches that a client has (the paper: 125)
STEPS = 4  # steps that are timed at a time
Thunk = Callable[[], None]  # trains STEPS steps of C x b rows

SHAPES = {"cnn": (1, 28, 28), "mlp": (64,), "resnet16": (1, 28, 28)}
CUTS = {"cnn": "block1", "mlp": "hidden2", "resnet16": "block4"}
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
AVERAGING = {"fl", "sflv1"}


@dataclass(frozen=True)
class Workload:
    """One line of the table. FedAvg and SplitFed V1 average after `local_steps` steps."""

    model: str
    algorithm: str
    clients: int
    batch: int
    optimizer: str = "sgd"
    local_steps: int = STEPS
    device: str = "cpu"

    @property
    def rows(self) -> int:
        """Rows that one step trains on."""
        return self.batch if self.algorithm == "ssl" else self.clients * self.batch

    def __str__(self) -> str:
        more = [self.optimizer] if self.optimizer != "sgd" else []
        more += ["averaged at each step"] if self.local_steps == 1 else []
        return f"{self.model} {self.algorithm} C={self.clients} b={self.batch}{''.join(', ' + m for m in more)}"


QUICK = [Workload("cnn", "sglr", 10, 8), Workload("mlp", "sglr", 100, 8)]
FULL = [
    *[Workload("mlp", "sglr", c, b) for c in (10, 50, 100, 500) for b in (8, 32)],
    *[Workload("cnn", a, c, b) for a in ("sglr", "psl") for c in (10, 50, 100, 500) for b in (8, 32)],
    Workload("cnn", "sglr", 200, 4),
    Workload("cnn", "sglr", 1000, 8),
    *[Workload("resnet16", "sglr", c, 8) for c in (5, 20)],
    *[Workload("cnn", a, c, 8) for a in ("fl", "sflv1") for c in (10, 100)],
    *[Workload("cnn", a, 100, 8, local_steps=1) for a in ("fl", "sflv1")],
    *[Workload("mlp", "sglr", c, 8, "adam") for c in (10, 100)],
    Workload("cnn", "sglr", 100, 8, "adam"),
    *[Workload(m, a, 10, 8) for m in ("mlp", "cnn") for a in ("ssl", "sflv2")],
]
CUDA = [*[Workload("cnn", "sglr", c, 8) for c in (10, 100, 500)], Workload("resnet16", "sglr", 20, 8),
        Workload("mlp", "sglr", 100, 8), Workload("cnn", "fl", 100, 8)]  # fmt: skip
MEMORY = [Workload("cnn", "sglr", 100, 8), Workload("cnn", "sglr", 500, 8), Workload("mlp", "sglr", 500, 8)]


@dataclass(frozen=True)
class Data:
    """Random samples, on the workload's device."""

    x: torch.Tensor
    y: torch.Tensor

    @classmethod
    def of(cls, w: Workload) -> Data:
        """Enough for an epoch of all clients, and some to evaluate on."""
        count = w.clients * w.batch * EPOCH + 20
        x = np.random.default_rng(0).random((count, *SHAPES[w.model]), dtype=np.float32)
        return cls(torch.from_numpy(x), torch.from_numpy(np.arange(count) % CLASSES))

    def to(self, device: str) -> Data:
        """The same, elsewhere."""
        return Data(self.x.to(device), self.y.to(device))


def engine(name: str, w: Workload, data: Data) -> Thunk:
    """STEPS steps on an engine of ours."""
    averaging = w.algorithm in AVERAGING
    config = RunConfig(
        algorithm=w.algorithm, model=w.model, clients=w.clients, batch=w.batch, engine=name, client_lr=0.01,
        client_optimizer=w.optimizer, samples_per_client=EPOCH * w.batch, device=w.device,
        local_steps=w.local_steps if averaging else None,
    )  # fmt: skip
    steps = endless(assemble(config, data=from_arrays(data.x, data.y, validation=0, test=20)), config)

    def some() -> None:
        for _ in range(STEPS):
            next(steps)

    return some


def endless(training: Training, config: RunConfig) -> Iterator[Step]:
    """One step at each `next`, round after round."""
    for index in itertools.count():
        this = training.clients.begin_round(index, 10**9, 1.0)
        yield from training.algorithm.round(training.server, training.clients, this)


def ceiling(w: Workload, net: nn.Module, data: Data) -> Thunk:
    """Centralised training: STEPS steps on as many rows."""
    net, rows = copy.deepcopy(net), w.rows
    optimizer = OPTIMIZERS[w.optimizer](net.parameters(), lr=0.01)

    def steps() -> None:
        for i in range(STEPS):
            x, y = data.x[i * rows : (i + 1) * rows], data.y[i * rows : (i + 1) * rows]
            optimizer.zero_grad()
            functional.cross_entropy(net(x), y).backward()
            optimizer.step()

    return steps


def loop(w: Workload, net: nn.Module, data: Data) -> Thunk:
    """Split learning by hand: per client a module, an optimiser and a pass through the server (V1: its copy)."""
    if w.algorithm == "fl":
        return loop_fedavg(w, net, data)
    parts = cut(copy.deepcopy(net).cpu(), CUTS[w.model], data.x[:3].cpu())
    clients = 1 if w.algorithm == "ssl" else w.clients  # one model travels
    own_server, one_by_one = w.algorithm == "sflv1", w.algorithm in ("ssl", "sflv2")
    lowers = [copy.deepcopy(parts.client).to(w.device) for _ in range(clients)]
    uppers = [copy.deepcopy(parts.server).to(w.device) for _ in range(clients if own_server else 1)]
    make = OPTIMIZERS[w.optimizer]
    optimizers = [make(m.parameters(), lr=0.01) for m in lowers]
    servers = [make(m.parameters(), lr=0.01) for m in uppers]
    xs, ys = data.x.split(w.batch), data.y.split(w.batch)

    def steps() -> None:
        for i in range(STEPS):
            for k in range(clients):
                upper, server = (uppers[k], servers[k]) if own_server else (uppers[0], servers[0])
                if own_server or one_by_one or k == 0:
                    server.zero_grad()
                (smashed,) = lowers[k](xs[i * clients + k])
                received = smashed.detach().requires_grad_()
                share = 1 if own_server or one_by_one else clients
                (functional.cross_entropy(upper((received,)), ys[i * clients + k]) / share).backward()
                optimizers[k].zero_grad()
                smashed.backward(received.grad * share)
                optimizers[k].step()
                if own_server or one_by_one or k == clients - 1:
                    server.step()
            if own_server and (i + 1) % w.local_steps == 0:
                average(lowers)
                average(uppers)

    return steps


def loop_fedavg(w: Workload, net: nn.Module, data: Data) -> Thunk:
    """FedAvg by hand: per client a module and an optimiser; then the mean of the state dicts."""
    nets = [copy.deepcopy(net) for _ in range(w.clients)]
    optimizers = [OPTIMIZERS[w.optimizer](m.parameters(), lr=0.01) for m in nets]
    xs, ys = data.x.split(w.batch), data.y.split(w.batch)

    def steps() -> None:
        for first in range(0, STEPS, w.local_steps):
            for k in range(w.clients):
                for i in range(first, first + w.local_steps):
                    optimizers[k].zero_grad()
                    functional.cross_entropy(nets[k](xs[i * w.clients + k]), ys[i * w.clients + k]).backward()
                    optimizers[k].step()
            average(nets)

    return steps


def average(nets: list[nn.Module]) -> None:
    """Every model := the mean of all."""
    states = [m.state_dict() for m in nets]
    mean = {n: torch.stack([s[n] for s in states]).mean(0) for n in states[0]}
    for m in nets:
        m.load_state_dict(mean)


def contestants(w: Workload) -> dict[str, Callable[[], Thunk]]:
    """Who competes, each to be made."""
    data = Data.of(w)
    torch.manual_seed(0)
    net = build(w.model, SHAPES[w.model], CLASSES).to(w.device)
    there = data.to(w.device)
    return {
        "ceiling": lambda: ceiling(w, net, there),
        "loop": lambda: loop(w, net, there),
        "local": lambda: engine("local", w, data),
        "fast": lambda: engine("auto", w, data),
    }


def interleave(thunks: dict[str, Thunk], repeats: int, seconds: float, clock: Callable[[], float]) -> dict[str, Any]:
    """Seconds of each contestant, A B A B ..., after one time each to warm up."""
    times: dict[str, list[float]] = {name: [] for name in thunks}
    for thunk in thunks.values():
        thunk()
    gc.collect()
    began = clock()
    for repeat in range(repeats):
        for name, thunk in thunks.items():
            start = clock()
            thunk()
            times[name].append(clock() - start)
        if repeat >= 2 and clock() - began > seconds:
            break
    return times


def ratio(reference: list[float], times: list[float]) -> float:
    """How many times as fast as the reference: median of the paired ratios."""
    return statistics.median(a / b for a, b in zip(reference, times, strict=True))


def awaited() -> float:
    """The time once the device has done all its work."""
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(w: Workload, seconds: float) -> dict[str, Any]:
    """One line of the table."""
    clock = awaited if w.device != "cpu" else time.process_time
    times = interleave({name: make() for name, make in contestants(w).items()}, 25, seconds, clock)
    return {
        "workload": str(w),
        "samples/s": w.rows * STEPS / statistics.median(times["fast"]),
        "fast/ceiling": ratio(times["ceiling"], times["fast"]),
        "fast/loop": ratio(times["loop"], times["fast"]),
        "local/ceiling": ratio(times["ceiling"], times["local"]),
        "loop/ceiling": ratio(times["ceiling"], times["loop"]),
        "rounds": len(times["fast"]),
    }


def peak_memory(w: Workload) -> dict[str, Any]:
    """Peak resident memory of each contestant in a process of its own, in MB, data and libraries included."""
    found: dict[str, Any] = {"workload": str(w)}
    for name in ("ceiling", "loop", "local", "fast"):
        command = [sys.executable, __file__, "--memory-of", name, w.model, w.algorithm, str(w.clients), str(w.batch)]
        found[name] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    return found


def memory_of(name: str, model: str, algorithm: str, clients: str, batch: str) -> None:
    """Print this process's peak memory in MB after two times STEPS steps (of this process alone: Linux tells)."""
    thunk = contestants(Workload(model, algorithm, int(clients), int(batch)))[name]()
    thunk()
    thunk()
    (peak,) = (
        line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM")
    )
    print(int(peak.split()[1]) // 1024)


def processor() -> str:
    """The processor's name, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, one thread"


def table(rows: Iterator[dict[str, Any]], lines: list[str]) -> None:
    """Print rows as they come, and keep them."""
    for number, row in enumerate(rows):
        if number == 0:
            head = ["| " + " | ".join(row) + " |", "|" + "---|" * len(row)]
            lines += head
            print("\n".join(head), flush=True)
        cells = [f"{v:.2f}" if isinstance(v, float) and v < 100 else f"{v:.0f}" if isinstance(v, float) else v
                 for v in row.values()]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
        print(lines[-1], flush=True)


def main() -> None:
    """Measure and print, row by row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two workloads only")
    parser.add_argument("--only", default="", help="workloads whose name starts so")
    parser.add_argument("--seconds", type=float, default=15.0, help="seconds per workload (three rounds at least)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--write", type=Path, help="write the tables to this file, below its line '<!-- engines -->'")
    parser.add_argument("--memory-of", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = keep_memory()
    if options.memory_of:
        memory_of(*options.memory_of)
        return
    on_cpu = options.device == "cpu"
    where = f"{processor()}, freed memory kept: {kept}" if on_cpu else torch.cuda.get_device_name()
    lines = [f"{where}; torch {torch.__version__}; the same optimiser on both sides, SGD unless said.", ""]
    print("\n".join(lines), flush=True)
    workloads = [Workload(**{**vars(w), "device": options.device}) for w in (FULL if on_cpu else CUDA)]
    workloads = QUICK if options.quick else [w for w in workloads if str(w).startswith(options.only)]
    table((measure(w, options.seconds) for w in workloads), lines)
    if on_cpu and not options.quick and options.only in ("", "memory"):
        lines += ["", "Peak memory of a process of its own, MB, torch and data included:", ""]
        print("\n".join(lines[-3:]), flush=True)
        table((peak_memory(w) for w in MEMORY), lines)
    if options.write:
        mark = "<!-- engines -->"
        head = options.write.read_text().split(mark)[0]
        options.write.write_text(head + mark + "\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
