"""The gain from ranks: one process of one thread against R ranks of one thread each, in turns in one run.

    python benchmarks/ranks.py [--ranks 2] [--clients 100] [--batch 8] [--model cnn] [--algorithms sglr psl fl]
                               [--pairs 15] [--steps 6] [--write docs/distributed.md]

Each pair times the same number of steps alone, while the other ranks wait for a message, and together. Two quotients
are given with their quartiles: of wall time, and of CPU seconds (of the process alone; of the busiest rank). Other
programs on the machine disturb the second less, but it leaves waiting out. Also the bytes that a rank sends in a step,
as it counts them, and as the formula of docs/distributed.md says.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pages

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.multiprocessing

from cutlayer import Run, from_arrays
from cutlayer.collective import Place, World, joined
from cutlayer.engine.simulated import gradient_bytes
from cutlayer.errors import CutlayerWarning
from cutlayer.run import Record

MARK = "<!-- ranks -->"
EPOCH = 20  # batches that a client has
IMAGE = (1, 28, 28)
LOSS, LOSS_ALONG = 8, 12  # bytes of a client's loss: in a message of its own, along with a gradient


class Pair(NamedTuple):
    """Seconds and CPU seconds of some steps: alone, and together (of the busiest rank)."""

    alone: float
    together: float
    cpu_alone: float
    cpu_together: float


class Found(NamedTuple):
    """What was measured of an algorithm."""

    algorithm: str
    pairs: list[Pair]
    sent: float
    formula: float


def run_of(options: argparse.Namespace, algorithm: str) -> Run:
    """A run of many steps on random images, without evaluations on the way."""
    draw = torch.Generator().manual_seed(0)
    rows = options.clients * options.batch * EPOCH
    data = from_arrays(torch.rand(rows, *IMAGE, generator=draw), torch.randint(10, (rows,), generator=draw))
    more: dict[str, Any] = {"alpha": 0.5} if algorithm in ("slr", "sglr") else {}
    return Run(
        **{"data": data, "model": options.model, "algorithm": algorithm, "clients": options.clients, **more},
        batch=options.batch,
        client_optimizer="sgd",
        client_lr=1e-3,
        rounds=100,
        eval_every=100,
        validation=0.01,
        test=0.01,
        tune="off",
    )


def through(records: Iterator[Record], steps: int) -> tuple[float, float]:
    """Seconds and CPU seconds of this number of steps."""
    begin, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        next(records)
    return time.perf_counter() - begin, time.process_time() - cpu


def busiest(world: World, seconds: float) -> float:
    """The largest number of all ranks."""
    return max(world.gathered(seconds))


def measured(world: World, alone: Iterator[Record] | None, run: Run, options: argparse.Namespace) -> tuple[Any, float]:
    """The pairs, and the bytes that this rank sent in a step. `alone` is on rank 0."""
    records, pairs = iter(run), list[Pair]()
    through(records, 1)
    before = world.sent
    through(records, 1)
    sent = world.sent - before
    for _ in range(options.pairs):
        once = (0.0, 0.0) if alone is None else through(alone, options.steps)
        world.gathered(None)  # the others wait here
        wall, cpu = through(records, options.steps)
        pairs.append(Pair(once[0], wall, once[1], busiest(world, cpu)))
    return pairs, sent


def formula(run: Run, options: argparse.Namespace) -> float:
    """Bytes that a rank sends in a step of equal clients, a ring of ranks at work."""
    ranks, most = options.ranks, -(-options.clients // options.ranks)
    training = run.training
    traits, ring = training.algorithm.traits, 2 * (ranks - 1) / ranks
    if traits.whole:
        return 0.0
    losses = (ranks - 1) * most * LOSS if traits.server_copies else ring * options.clients * LOSS_ALONG
    server = 0 if traits.server_copies else gradient_bytes(training.parts.server)
    common = options.batch * training.epoch.gradient if hasattr(training.algorithm, "split_average") else 0
    return ring * (server + common) + losses


def work(rank: int, options: argparse.Namespace, store: str, pipe: Any) -> None:
    """One of the ranks. The first one returns the measurements."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", CutlayerWarning)
    for number, algorithm in enumerate(options.algorithms):
        alone = iter(run_of(options, algorithm)) if rank == 0 else None
        if alone is not None:
            through(alone, 2)  # it begins before the others exist
        place = Place(rank, options.ranks, rank, options.ranks, "tcp://127.0.0.1:1")
        with joined(place, store=f"{store}-{number}") as world:
            run = run_of(options, algorithm)
            pairs, sent = measured(world, alone, run, options)
            if rank == 0:
                pipe.send(Found(algorithm, pairs, sent, formula(run, options)))


def quartiles(values: Sequence[float]) -> str:
    """The median, and the quartiles around it."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def table(found: Sequence[Found], options: argparse.Namespace) -> list[str]:
    """Lines of Markdown."""
    about = (
        f"{options.model}, C = {options.clients}, b = {options.batch}; {options.pairs} pairs of {options.steps} steps; "
        f"{options.ranks} ranks of one thread on {os.cpu_count()} cores ({platform.machine()}), torch "
        f"{torch.__version__}. The load of the machine, with these ranks, was {os.getloadavg()[0]:.1f}."
    )
    lines = [
        *textwrap.wrap(about, 120),
        "",
        "| algorithm | ms a step, 1 process | quotient of wall times | of CPU seconds | kB a rank sends in a step "
        "| formula |",
        "|---|---|---|---|---|---|",
    ]
    for f in found:
        each = statistics.median(p.alone for p in f.pairs) / options.steps * 1e3
        wall = quartiles([p.alone / p.together for p in f.pairs])
        cpu = quartiles([p.cpu_alone / p.cpu_together for p in f.pairs])
        lines.append(f"| {f.algorithm} | {each:.0f} | {wall} | {cpu} | {f.sent / 1e3:.1f} | {f.formula / 1e3:.1f} |")
    return lines


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--model", default="cnn")
    parser.add_argument("--algorithms", nargs="+", default=["sglr", "psl", "sflv1"])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--write", type=Path, help=f"write the table to this file, between its lines {MARK!r}")
    options = parser.parse_args()
    context = torch.multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    store = "file://" + tempfile.mkdtemp() + "/store"
    ranks = [context.Process(target=work, args=(r, options, store, there)) for r in range(options.ranks)]
    for rank in ranks:
        rank.start()
    there.close()
    found = []
    for _ in options.algorithms:
        found.append(here.recv())
        print("\n".join(table(found[-1:], options)[-1:]), flush=True)
    for rank in ranks:
        rank.join()
    lines = table(found, options)
    print("\n".join(lines))
    if options.write:
        pages.put(options.write, MARK, [*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
