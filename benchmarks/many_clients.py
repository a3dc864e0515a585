"""Clients whose states are in memory or on disk: seconds per round, seconds per checkpoint, and peak memory.

    python benchmarks/many_clients.py [--clients 1000 10000 100000] [--repeats 3] [--json FILE]
        [--write docs/many-clients.md]

PSL with Adam. In each round, 100 clients take part with one batch of two rows, so all rounds compute the same, and
costs that grow with the number of clients become visible. Each run is a separate process with one thread. Runs in
memory and on disk take turns. The time of a round is that of its training. The time of a checkpoint is that between the
end of a round's training and the beginning of the next.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import pages

MARK = "<!-- many clients -->"
TAKING_PART, BATCH, INPUTS, CLASSES, ROUNDS, CHECKPOINTS = 100, 2, 64, 10, 20, 5
WIDTHS = {"small": 32, "large": 256}  # width of the cut: 8.3 and 67 kB of weights per client
WHERE = ("memory", "disk")


def status(name: str) -> int:
    """Bytes from the process's status. VmHWM is the peak in memory, including mapped files."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def measure(clients: int, where: str, size: str, folder: Path) -> dict[str, Any]:
    """One run in this process."""
    import torch
    from torch import nn

    from cutlayer import Run

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    draw, rows = torch.Generator().manual_seed(0), BATCH * clients
    data = torch.randn(rows + 500, INPUTS, generator=draw), torch.randint(0, CLASSES, (rows + 500,), generator=draw)
    width = WIDTHS[size]

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(INPUTS, width), nn.ReLU(), nn.Linear(width, CLASSES))

    before, started = status("VmHWM"), time.perf_counter()
    run = Run(
        model=model, data=data, algorithm="psl", cut="1", client_optimizer="adam", clients=clients, batch=BATCH,
        participation=TAKING_PART / clients, rounds=ROUNDS, test=500 / (rows + 500), validation=0.0, tune="off",
        engine="stacked", client_states=where, eval_every=ROUNDS, eval_clients=10, checkpoint_every=CHECKPOINTS,
        keep_best=False, out=folder / "run",
    )  # fmt: skip
    built, training, checkpoints, last, trained = time.perf_counter() - started, [], [], 0.0, 0
    done = time.perf_counter()
    for record in run:
        took = record.seconds - last
        if record.round and record.round % CHECKPOINTS == 0:
            checkpoints.append(time.perf_counter() - done - took)
        else:
            trained = status("VmHWM") if record.round < CHECKPOINTS else trained
        training.append(took)
        last, done = record.seconds, time.perf_counter()
    files = [path for path in (folder / "run").rglob("*") if path.is_file()]
    return {
        "clients": clients,
        "where": where,
        "size": size,
        "rounds": training[1:],  # without the first round, which creates files for the others
        "checkpoints": checkpoints,
        "built": built,
        "before": before,
        "trained": trained,
        "peak": status("VmHWM"),
        "stored": sum(path.stat().st_blocks * 512 for path in files),
    }


def measured_apart(clients: int, where: str, size: str) -> dict[str, Any]:
    """The same run in a separate process."""
    with tempfile.TemporaryDirectory(prefix="many-clients-") as folder:
        command = [sys.executable, __file__, "--one", str(clients), where, size, folder]
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def figure(values: list[float], unit: float = 1e3, places: int = 1) -> str:
    """The median, and the quartiles in parentheses."""
    low, middle, high = (unit * q for q in statistics.quantiles(values, n=4, method="inclusive"))
    return f"{middle:.{places}f} ({low:.{places}f}, {high:.{places}f})"


def table(found: list[dict[str, Any]]) -> list[str]:
    """A row for each number of clients, size, and place."""
    lines = [
        "| client part | clients | states | ms per round (quartiles) | s per checkpoint | peak memory, MB: training | "
        "with checkpoints | folder, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size, clients, where in dict.fromkeys((row["size"], row["clients"], row["where"]) for row in found):
        same = [row for row in found if (row["size"], row["clients"], row["where"]) == (size, clients, where)]
        rounds = [seconds for row in same for seconds in row["rounds"]]
        checkpoints = [seconds for row in same for seconds in row["checkpoints"]]
        trained, peak, stored = (max(row[name] for row in same) / 1e6 for name in ("trained", "peak", "stored"))
        lines.append(
            f"| {size} | {clients:,} | {where} | {figure(rounds)} | {figure(checkpoints, 1, 2)} | {trained:,.0f} | "
            f"{peak:,.0f} | {stored:,.0f} |"
        )
    return lines


def main() -> None:
    """Measures everything and prints the table or writes it to a page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--clients", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--large", type=int, nargs="*", default=[100_000], help="numbers of clients with large parts")
    parser.add_argument("--json", type=Path, help="add what was measured to this file, a line for each run")
    parser.add_argument("--write", type=Path, help=f"write the table to this file, between its lines '{MARK}'")
    parser.add_argument("--one", nargs=4, metavar=("CLIENTS", "WHERE", "SIZE", "FOLDER"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        clients, where, size, folder = asked.one
        print(json.dumps(measure(int(clients), where, size, Path(folder))))
        return
    # Large parts of very many clients are only measured on disk, since they may not fit into memory.
    cells = [(clients, where, "small") for clients in asked.clients for where in WHERE]
    cells += [(clients, "disk", "large") for clients in asked.large]
    found: dict[tuple[int, str, str], list[dict[str, Any]]] = {cell: [] for cell in cells}
    for _ in range(asked.repeats):
        for cell in cells:
            row = measured_apart(*cell)
            found[cell].append(row)
            print(*cell, figure(row["rounds"]), f"{row['peak'] / 1e6:.0f} MB", file=sys.stderr, flush=True)
            if asked.json:
                with asked.json.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    lines = table([row for rows in found.values() for row in rows])
    print("\n".join(lines))
    if asked.write:
        pages.put(asked.write, MARK, lines)


if __name__ == "__main__":
    main()
