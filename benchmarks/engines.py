"""How fast the engines simulate: interleaved in one process, medians, ratios to two references measured in the same
run.

    ceiling   centralised training of the same model on the union batch (C x b rows)
    loop      plainly, as hand-made scripts do: per client a module, an optimiser and a pass through the server

    python benchmarks/engines.py [--quick] [--rows N] [--write docs/benchmarks.md]

CPU seconds of the process on one thread, so that other tenants of the machine disturb little. Freed memory is kept in
the process (cutlayer.allocator) for all contestants alike.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from cutlayer import RunConfig, from_arrays
from cutlayer.algorithms import ALGORITHMS
from cutlayer.allocator import keep_memory
from cutlayer.build import Training, assemble
from cutlayer.models import build, cut
from cutlayer.types import Step

CLASSES = 10
EPOCH = 16  # batches that a client has (the paper: 125)
STEPS = 4  # steps that are timed at a time
Thunk = Callable[[], None]  # trains STEPS steps of C x b rows

AVERAGING = {"fl", "sflv1", "sflv3"}

# (model, shape, algorithm, C, b)
QUICK = [("cnn", (1, 28, 28), "sglr", 10, 8), ("mlp", (64,), "sglr", 100, 8)]
FULL = [
    *[("cnn", (1, 28, 28), a, c, b) for a in ("sglr", "psl") for c in (10, 50, 100, 500) for b in (8, 32)],
    *[("mlp", (64,), "sglr", c, b) for c in (10, 50, 100, 500) for b in (8, 32)],
    *[("resnet16", (1, 28, 28), "sglr", c, 8) for c in (5, 20)],
    *[("cnn", (1, 28, 28), a, c, 8) for a in ("fl", "sflv1") for c in (10, 100)],
    ("cnn", (1, 28, 28), "sglr", 200, 4),
]


def engine(name: str, x: torch.Tensor, y: torch.Tensor, model: str, algorithm: str, clients: int, batch: int) -> Thunk:
    """STEPS steps on an engine of ours. FedAvg and SplitFed average after each STEPS local steps."""
    source = from_arrays(x, y, validation=0, test=20)
    config = RunConfig(
        algorithm=algorithm, model=model, clients=clients, batch=batch, engine=name, client_optimizer="sgd",
        client_lr=0.01, samples_per_client=EPOCH * batch, local_steps=STEPS if algorithm in AVERAGING else None,
    )  # fmt: skip
    steps = endless(assemble(config, data=source), config)

    def some() -> None:
        for _ in range(STEPS):
            next(steps)

    return some


def endless(training: Training, config: RunConfig) -> Iterator[Step]:
    """One step at each `next`, round after round."""
    for index in itertools.count():
        this = training.clients.begin_round(index, 10**9, 1.0)
        yield from ALGORITHMS[config.algorithm](config, training.server, training.clients, this)


def ceiling(net: nn.Module, x: torch.Tensor, y: torch.Tensor, rows: int) -> Thunk:
    """Centralised training: STEPS steps on `rows` rows."""
    net = copy.deepcopy(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)

    def round_() -> None:
        for i in range(STEPS):
            optimizer.zero_grad()
            functional.cross_entropy(net(x[i * rows : (i + 1) * rows]), y[i * rows : (i + 1) * rows]).backward()
            optimizer.step()

    return round_


def loop(lower: nn.Module, upper: nn.Module, x: torch.Tensor, y: torch.Tensor, clients: int, batch: int) -> Thunk:
    """Parallel split learning by hand: per client a module, an optimiser and a pass through the server."""
    lowers = [copy.deepcopy(lower) for _ in range(clients)]
    upper = copy.deepcopy(upper)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in lowers]
    server = torch.optim.SGD(upper.parameters(), lr=0.01)
    xs, ys = x[: clients * STEPS * batch].split(batch), y[: clients * STEPS * batch].split(batch)

    def round_() -> None:
        for i in range(STEPS):
            server.zero_grad()
            for k in range(clients):
                (smashed,) = lowers[k](xs[i * clients + k])
                received = smashed.detach().requires_grad_()
                (functional.cross_entropy(upper((received,)), ys[i * clients + k]) / clients).backward()
                optimizers[k].zero_grad()
                smashed.backward(received.grad * clients)
                optimizers[k].step()
            server.step()

    return round_


def loop_fedavg(net: nn.Module, x: torch.Tensor, y: torch.Tensor, clients: int, batch: int) -> Thunk:
    """FedAvg by hand: per client a module and an optimiser; then the mean of the state dicts."""
    nets = [copy.deepcopy(net) for _ in range(clients)]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in nets]
    xs, ys = x[: clients * STEPS * batch].split(batch), y[: clients * STEPS * batch].split(batch)

    def round_() -> None:
        for k in range(clients):
            for i in range(STEPS):
                optimizers[k].zero_grad()
                functional.cross_entropy(nets[k](xs[i * clients + k]), ys[i * clients + k]).backward()
                optimizers[k].step()
        states = [m.state_dict() for m in nets]
        mean = {n: torch.stack([s[n] for s in states]).mean(0) for n in states[0]}
        for m in nets:
            m.load_state_dict(mean)

    return round_


def interleave(contestants: dict[str, Thunk], repeats: int, seconds: float) -> dict[str, list[float]]:
    """CPU seconds of each contestant's rounds, A B A B ..., after one round each to warm up."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for thunk in contestants.values():
        thunk()
    gc.collect()
    began = time.process_time()
    for repeat in range(repeats):
        for name, thunk in contestants.items():
            start = time.process_time()
            thunk()
            times[name].append(time.process_time() - start)
        if repeat >= 2 and time.process_time() - began > seconds:
            break
    return times


def ratio(reference: list[float], times: list[float]) -> float:
    """How many times as fast as the reference: median of the paired ratios."""
    return statistics.median(a / b for a, b in zip(reference, times, strict=True))


def measure(
    model: str, shape: tuple[int, ...], algorithm: str, clients: int, batch: int, seconds: float
) -> dict[str, Any]:
    """One line of the table."""
    rng = np.random.default_rng(0)
    count = clients * batch * EPOCH + 20
    x = torch.from_numpy(rng.random((count, *shape), dtype=np.float32))
    y = torch.from_numpy(np.arange(count) % CLASSES)
    torch.manual_seed(0)
    net = build(model, shape, CLASSES)
    at = {"cnn": "block1", "mlp": "hidden2", "resnet16": "block4"}[model]
    parts = cut(net, at, x[:3])
    by_hand = (
        loop_fedavg(net, x, y, clients, batch)
        if algorithm == "fl"
        else loop(parts.client, parts.server, x, y, clients, batch)
    )
    contestants = {
        "ceiling": ceiling(net, x, y, clients * batch),
        "loop": by_hand,
        "local": engine("local", x, y, model, algorithm, clients, batch),
        "stacked": engine("stacked", x, y, model, algorithm, clients, batch),
    }
    times = interleave(contestants, 9, seconds)
    samples = clients * batch * STEPS
    return {
        "workload": f"{model} {algorithm} C={clients} b={batch}",
        "samples/s": samples / statistics.median(times["stacked"]),
        "stacked/ceiling": ratio(times["ceiling"], times["stacked"]),
        "stacked/loop": ratio(times["loop"], times["stacked"]),
        "local/ceiling": ratio(times["ceiling"], times["local"]),
        "loop/ceiling": ratio(times["ceiling"], times["loop"]),
        "rounds": len(times["stacked"]),
    }


def processor() -> str:
    """The processor's name, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    """Measure and print, row by row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two workloads only")
    parser.add_argument("--seconds", type=float, default=20.0, help="CPU seconds per workload")
    parser.add_argument("--write", type=Path, help="write the table to this file, below its line '<!-- engines -->'")
    parser.add_argument("--rows", type=int, default=10**9, help="leave out workloads with more than C x b rows a step")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = keep_memory()
    lines = [
        f"{processor()}, one thread, torch {torch.__version__}, freed memory kept: {kept}; SGD on both sides.",
        "",
        "| workload | stacked, samples/s | stacked/ceiling | stacked/loop | local/ceiling | loop/ceiling | rounds |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for workload in QUICK if options.quick else FULL:
        if workload[3] * workload[4] > options.rows:
            continue
        row = measure(*workload, options.seconds)
        cells = [
            f"{v:.2f}" if isinstance(v, float) and v < 100 else f"{v:.0f}" if isinstance(v, float) else v
            for v in row.values()
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
        print(lines[-1], flush=True)
    if options.write:
        mark = "<!-- engines -->"
        head = options.write.read_text().split(mark)[0]
        options.write.write_text(head + mark + "\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
