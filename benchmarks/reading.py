"""Data that are read during training: the gain from worker processes that read the next batches in advance.

    python benchmarks/reading.py [--workers 2] [--pause 5] [--repeats 3]

Reading an item takes some milliseconds, as from a slow disk or a network. Each step trains on 8 items (PSL: two clients
with 4 rows each; SSL: one client with 8 rows). The model is so slow that a step computes for as long as the workers
take to read its items. The table shows the shortest time of a step over the repeats: in one process, with workers that
read a step's items when they are needed, and with workers that read ahead, as runs do. The ratio compares the last two,
which are measured alternately. `reading alone` is the minimum for any order.
"""

from __future__ import annotations

import argparse
import time
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from cutlayer import Run
from cutlayer.data.lazy import Lazy

ROWS, FEATURES, CLASSES = 512, 64, 4


class Slow(torch.utils.data.Dataset[Any]):
    """Items that take `pause` seconds each to read."""

    targets = torch.arange(ROWS) % CLASSES

    def __init__(self, pause: float) -> None:
        self.pause = pause

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, n: int) -> tuple[Tensor, int]:
        time.sleep(self.pause)
        return torch.full((FEATURES,), n / ROWS), int(self.targets[n])


class Busy(nn.Module):
    """A layer that computes for `seconds` per row, or waits, as for an accelerator."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        """The same rows, after a delay."""
        time.sleep(self.seconds * len(x) if self.training else 0.0)
        return x


def model(seconds: float) -> nn.Module:
    """Two layers with the server's work between them."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), Busy(seconds), nn.Linear(32, CLASSES))


def seconds_of(algorithm: str, workers: int, pause: float, compute: float, *, ahead: bool = True) -> float:
    """Seconds per step in the second round, since workers start in the first one."""
    run = Run(
        model=model(compute),
        data=Slow(pause),
        algorithm=algorithm,
        clients=2,
        batch=4 if algorithm == "psl" else 8,
        cut="1",
        rounds=2,
        engine="local",
        data_in_memory="never",
        data_workers=workers,
        validation=0,
        test=8,
        eval_every=2,
    )
    with mock.patch.object(Lazy, "ahead", Lazy.ahead if ahead else 0):
        marks = [(record.round, time.perf_counter()) for record in run]
    last = [at for index, at in marks if index == marks[-1][0]]
    return (last[-1] - last[0]) / (len(last) - 1)


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pause", type=float, default=5.0, help="milliseconds of an item")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    pause, workers = given.pause / 1000, given.workers
    print("| algorithm | one process | workers, not ahead | workers, ahead | ratio | reading alone |")
    print("|---|---|---|---|---|---|")
    for algorithm in ("psl", "ssl"):
        ways = {"one": (0, False), "not ahead": (workers, False), "ahead": (workers, True)}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(given.repeats):
            for name, (count, ahead) in ways.items():
                times[name].append(seconds_of(algorithm, count, pause, pause / workers, ahead=ahead))
        shown = [1000 * min(found) for found in times.values()]
        cells = " | ".join(f"{each:.1f} ms" for each in shown)
        print(f"| {algorithm} | {cells} | {shown[1] / shown[2]:.2f} | {1000 * 8 * pause / workers:.1f} ms |")


if __name__ == "__main__":
    main()
