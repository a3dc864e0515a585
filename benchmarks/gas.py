"""GAS compared with synchronous learning under label skew and with clients of unequal speed, as in its paper's table 1.

    python benchmarks/gas.py [--seeds 0 1 2] [--skews NAME ...] [--rounds N] [--json FILE] [--write FILE]

20 clients share Fashion-MNIST by shards (two classes each) or by a Dirichlet distribution of 0.1. Ten of them work at a
time, for 20 local steps of 32 rows, with SGD (momentum 0.9, rate 0.01, weight decay 0.0005) and gradients clipped at
10. A round is one averaging, like an iteration of the authors' script. A fifth of the clients are ten times as slow as
the others. Scores are the accuracy on the first test images at the end.

The paper trains an AlexNet for 1000 rounds. This benchmark uses a small CNN and fewer rounds, which two cores can
train.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pages
import scored

from cutlayer import Run, Source

MARK = "<!-- gas -->"
ROUNDS, TESTED, EVERY, GOAL = 25, 2000, 5, 75.0
SKEWS: dict[str, dict[str, Any]] = {
    "2 shards": {"partition": "shards", "shards_per_client": 2},
    "Dirichlet 0.1": {"partition": "dirichlet", "dirichlet_alpha": 0.1},
}
SYNC: dict[str, Any] = {"participation": 0.5}
WAYS: dict[str, dict[str, Any]] = {
    "FedAvg": {"algorithm": "fl", **SYNC},
    "SFL": {"algorithm": "sfl", **SYNC},
    "SFL, V1": {"algorithm": "sflv1", **SYNC},
    "SCALA": {"algorithm": "scala", **SYNC},
    "GAS": {"algorithm": "gas"},
    "GAS, nothing drawn": {"algorithm": "gas", "generate": "never"},
}
OPTIMIZER = {"momentum": 0.9, "weight_decay": 0.0005}
FLEET: dict[str, Any] = {
    "client_device": "raspberry-pi-4",
    "server_device": "desktop-ryzen-5600x",
    "up_mbps": 10.0,
    "down_mbps": 10.0,
    "stragglers": 0.2,
    "straggler_slowdown": 10.0,
}


@dataclass(frozen=True)
class Cell:
    """One training, without its seed."""

    way: str
    skew: str


@dataclass(frozen=True)
class Outcome:
    """Results of one training.

    Accuracy is in percent, time in virtual hours, and `idle` is the mean share of time in which a client waits. Ages
    are means: that of a batch in server steps, that of a model in averagings (0 in synchronous learning). `curve` lists
    virtual hours and accuracy.
    """

    accuracy: float
    hours: float
    idle: float
    batch_age: float
    model_age: float
    curve: list[tuple[float, float]]

    @property
    def reached(self) -> float | None:
        """Virtual hours until the accuracy reached `GOAL`, or None."""
        return next((hours for hours, accuracy in self.curve if accuracy >= GOAL), None)


def outcome(source: Source, cell: Cell, seed: int, rounds: int, model: str) -> Outcome:
    """Trains once."""
    run = Run(
        data=source,
        model=model,
        clients=20,
        rounds=rounds,
        batch=32,
        local_steps=20,
        client_optimizer="sgd",
        client_optimizer_options=OPTIMIZER,
        client_lr=0.01,
        lr_schedule="constant",
        client_clip_grad_norm=10.0,
        seed=seed,
        eval_every=EVERY,
        **({} if WAYS[cell.way]["algorithm"] == "fl" else {"server_clip_grad_norm": 10.0}),
        **FLEET,
        **SKEWS[cell.skew],
        **WAYS[cell.way],
    )
    accuracy = scored.accuracy(run)
    result = run.result
    assert result is not None
    assert result.virtual_seconds is not None
    assert result.idle_seconds is not None
    idle = result.idle_seconds / result.virtual_seconds
    curve = [
        (s.virtual_seconds / 3600, 100 * s.test_score) for s in run.evaluations if s.virtual_seconds and s.test_score
    ]
    return Outcome(
        accuracy, result.virtual_seconds / 3600, idle, result.batch_age or 0.0, result.model_age or 0.0, curve
    )


def figure(values: list[float]) -> str:
    """Mean and standard deviation over the seeds."""
    spread = f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def table(found: dict[Cell, list[Outcome]]) -> Iterator[str]:
    """One line per algorithm and partition."""
    heads = "accuracy, %", f"hours to {GOAL:g} %", "hours", "a client waits", "age of a batch", "of a model", "seeds"
    yield f"| partition | algorithm | {' | '.join(heads)} |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for skew in SKEWS:
        for way in WAYS:
            if all_seeds := found.get(Cell(way, skew)):
                hours, idle, batch, model = (
                    statistics.fmean(getattr(o, name) for o in all_seeds)
                    for name in ("hours", "idle", "batch_age", "model_age")
                )
                reached = [o.reached for o in all_seeds if o.reached is not None]
                soon = f"{statistics.fmean(reached):.3f}" if len(reached) == len(all_seeds) else "not all"
                yield (
                    f"| {skew} | {way} | {figure([o.accuracy for o in all_seeds])} | {soon} | {hours:.2f} | "
                    f"{idle:.0%} | {batch:.1f} | {model:.1f} | {len(all_seeds)} |"
                )


def main() -> None:
    """Trains everything and prints the table or writes it to a page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--skews", nargs="+", default=list(SKEWS), choices=list(SKEWS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--model", default="cnn", help="alexnet is the paper's")
    parser.add_argument("--data", default="/usr/share/datasets/fashion-mnist", help="the folder of Fashion-MNIST")
    parser.add_argument("--json", type=Path, help="add results to this file, a line each, and take those that it has")
    parser.add_argument("--write", type=Path, help=f"write the table to this file, between its lines '{MARK}'")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    source = scored.data(asked.data, TESTED)
    size = {"rounds": asked.rounds, "model": asked.model}
    kept: dict[tuple[Cell, int], Outcome] = {}
    if asked.json and asked.json.exists():
        for line in asked.json.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["size"] == size:
                kept[Cell(**row["cell"]), row["seed"]] = Outcome(**row["outcome"])
    found: dict[Cell, list[Outcome]] = {}
    for seed in asked.seeds:
        for cell in (Cell(way, skew) for way in asked.ways for skew in asked.skews):
            if (cell, seed) not in kept:
                started = time.process_time()
                kept[cell, seed] = outcome(source, cell, seed, **size)
                spent = time.process_time() - started
                print(f"{cell} seed {seed}: {kept[cell, seed]}, {spent:.0f} s of CPU", flush=True)
                if asked.json:
                    row = {"cell": asdict(cell), "seed": seed, "size": size, "outcome": asdict(kept[cell, seed])}
                    with asked.json.open("a", encoding="utf-8") as file:
                        file.write(json.dumps({**row, "seconds": spent}) + "\n")
            found.setdefault(cell, []).append(kept[cell, seed])
    lines = list(table(found))
    print("\n".join(lines))
    if asked.write:
        pages.put(asked.write, MARK, lines)


if __name__ == "__main__":
    main()
