"""The speed of the simulation engines, as paired ratios to two references in the same process.

    ceiling   centralised training of the same model on the union batch (C x b rows; ssl: the b rows of a step)
    loop      the same algorithm as a good engineer would write it by hand (loops.py)
    local     our engine that trains one client after another
    fast      the engine that is chosen by default

    python benchmarks/engines.py [--only PREFIX] [--models lenet5,mlp] [--cells N] [--quick] [--seconds S]
                                 [--json FILE] [--write docs/benchmarks.md] [--device cuda]
    python benchmarks/engines.py --profile "lenet5 sglr C=10 b=32"
    python benchmarks/engines.py --compare BEFORE.jsonl AFTER.jsonl

Contestants take turns. The table shows medians and quartiles of the ratios, the worst cells first. On the CPU, times
are CPU seconds of the process on one thread, so other programs on the machine have little effect. For all contestants,
freed memory is kept in the process (cutlayer.allocator). On CUDA, times are seconds and include the wait for the
device.

The cells (`cells`) are: every model with SGLR and SGD at every (C, b) of SIZES; every light model with the other
algorithms at (10, 8) and (100, 8); every model with momentum and Adam at (10, 32), and the MLP at every size; growth to
C = 1000; and FedAvg and SplitFed V1, averaged at each step. Cells of more than LIMIT GFLOP per step are left out,
except for each model's (10, 32) with SGD.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loops import LOOPS, Ceiling, Given
from nets import NETS, Net
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cutlayer import RunConfig, from_arrays, seeds
from cutlayer.allocator import keep_memory
from cutlayer.build import Training, assemble, deal
from cutlayer.data import Source
from cutlayer.data.batches import Batches
from cutlayer.errors import CutlayerWarning
from cutlayer.types import Round, Step

EPOCH = 16  # batches per client (the paper: 125)
STEPS = 4  # steps per measurement, and between two averagings
LONG = 5.0  # GFLOP of a step. Above it, each step is measured by itself
HEAVY = 20.0  # GFLOP of a step. Above it, a client has only STEPS batches
VERY_HEAVY = 150.0  # GFLOP of a step. Above it, two rounds are enough
LIMIT = 400.0  # GFLOP of a step. Above it, a cell is left out
RATE = 1e-3  # learning rate of clients, and of SGLR's server for any C
ROUNDS = 50  # at most
Thunk = Callable[[int], None]  # trains this number of steps
Row = dict[str, Any]

SIZES = [(10, 8), (10, 32), (50, 32), (100, 8), (200, 4)]
OPTIMIZERS: dict[str, tuple[str, dict[str, float]]] = {
    "sgd": ("sgd", {}),
    "momentum": ("sgd", {"momentum": 0.9}),
    "adam": ("adam", {}),
}
CLASSES: dict[str, Callable[..., torch.optim.Optimizer]] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
AVERAGING = {"fl", "sflv1", "sflv2"}
CONTESTANTS = ("ceiling", "loop", "local", "fast")


@dataclass(frozen=True)
class Workload:
    """One line of the table. Clients have `batches` batches. FedAvg and SplitFed average after `local_steps` steps."""

    model: str
    algorithm: str
    clients: int
    batch: int
    optimizer: str = "sgd"
    local_steps: int = STEPS
    batches: int = EPOCH
    device: str = "cpu"

    @property
    def net(self) -> Net:
        """The model."""
        return NETS[self.model]

    @property
    def rows(self) -> int:
        """Rows that one step trains on."""
        return self.batch if self.algorithm == "ssl" else self.clients * self.batch

    @property
    def gflop(self) -> float:
        """GFLOP of one step."""
        return flops_per_row(self.model) * self.rows / 1e9

    @property
    def steps(self) -> int:
        """Steps per measurement. If models are averaged, these are whole rounds."""
        return 1 if self.gflop > LONG and self.algorithm not in AVERAGING else STEPS

    @property
    def epoch(self) -> int:
        """Batches per client, fewer if steps are long."""
        return STEPS if self.gflop > HEAVY else self.batches

    @property
    def config(self) -> RunConfig:
        """The configuration of the run, without its engine."""
        name, more = OPTIMIZERS[self.optimizer]
        options: dict[str, Any] = {"client_optimizer_options": more} if more else {}
        if self.algorithm != "fl":
            options |= {"cut": self.net.cut}
        if self.algorithm in AVERAGING:
            options |= {"local_steps": self.local_steps}
        if self.algorithm == "sglr":
            options |= {"server_lr": RATE / self.clients}
        return RunConfig(
            algorithm=self.algorithm, clients=self.clients, batch=self.batch, client_lr=RATE, client_optimizer=name,
            samples_per_client=self.epoch * self.batch, epochs=1000, device=self.device, task=self.net.task, **options,
        )  # fmt: skip

    def __str__(self) -> str:
        more = [self.optimizer] if self.optimizer != "sgd" else []
        more += ["averaged at each step"] if self.local_steps == 1 else []
        return f"{self.model} {self.algorithm} C={self.clients} b={self.batch}{''.join(', ' + m for m in more)}"


@functools.cache
def flops_per_row(model: str) -> float:
    """FLOPs of matrix products for a row, forward and backward (three times those of the forward pass)."""
    net = NETS[model]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.make()(net.samples(2)[0])
    return 3 * counter.get_total_flops() / 2


def cells() -> list[Workload]:
    """All lines of the table, by the rule in the module's docstring."""
    found: list[Workload] = []
    for model, net in NETS.items():
        found += [Workload(model, "sglr", c, b) for c, b in SIZES]
        if net.light:
            found += [Workload(model, a, c, 8) for a in LOOPS if a != "sglr" for c in (10, 100)]
        sizes = SIZES if model == "mlp" else [(10, 32)]
        found += [Workload(model, "sglr", c, b, o) for o in ("momentum", "adam") for c, b in sizes]
    found += [Workload(m, "sglr", 1000, 8) for m in ("mlp", "cnn")]
    found += [Workload("cnn", a, 100, 8, local_steps=1) for a in ("fl", "sflv1")]
    always = ("sgd", (10, 32))
    return [w for w in found if w.gflop <= LIMIT or (w.optimizer, (w.clients, w.batch)) == always]


QUICK = [Workload("lenet5", "sglr", 10, 8), Workload("mlp", "sglr", 100, 8)]
CUDA = [*[Workload("cnn", "sglr", c, 8) for c in (10, 100, 500)], Workload("resnet16", "sglr", 20, 8),
        *[Workload(m, "sglr", 10, 32) for m in ("resnet18", "mobilenet", "gru", "vit", "bert", "unet")],
        Workload("mlp", "sglr", 100, 8), Workload("cnn", "fl", 100, 8)]  # fmt: skip
MEMORY = [Workload("lenet5", "sglr", 50, 32), Workload("cnn", "sglr", 100, 8), Workload("cnn", "sglr", 500, 8),
          Workload("mlp", "sglr", 500, 8)]  # fmt: skip


# --- the contestants -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Material:
    """The same model and the same rows in the same order for all contestants of a cell.

    With `by_hand`, similar rows are made without the package's data sets, to measure the memory of a script.
    """

    w: Workload
    net: nn.Sequential
    by_hand: bool = False

    @classmethod
    def of(cls, w: Workload, make: Callable[[], nn.Sequential] | None = None, *, by_hand: bool = False) -> Material:
        """The material of a cell. `make` makes its model (default: the cell's model)."""
        with seeds.torch_seeded(0, "benchmark", w.model):
            return cls(w, (make or w.net.make)(), by_hand)

    @functools.cached_property
    def source(self) -> Source:
        """Samples for an epoch of all clients, and some for evaluation."""
        x, y = self.w.net.samples(self.w.clients * self.w.batch * self.w.epoch + 20)
        targets = "classes" if self.w.net.per_pixel else "class"
        return from_arrays(x, y, validation=0, test=20, targets=targets)

    def engine(self, name: str) -> Engine:
        """The engine with this name."""
        config = RunConfig.of({**self.w.config.model_dump(exclude_unset=True), "engine": name})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CutlayerWarning)  # the table names the chosen engine
            return Engine(assemble(config, self.net, self.source))

    @functools.cached_property
    def given(self) -> Given:
        """The start of the loop and the ceiling, with batches on the device."""
        w, config = self.w, self.w.config
        name, more = OPTIMIZERS[w.optimizer]
        lower, upper = (self.net, nn.Sequential()) if w.algorithm == "fl" else w.net.halves(self.net)
        orders = [seeds.generator(config.seed, "server order", *step).permutation(w.clients) for step in steps_of(w)]
        return Given(
            lower.to(w.device),
            upper.to(w.device),
            w.clients,
            w.batch,
            self._batches(),
            functools.partial(CLASSES[name], **more),
            RATE,
            RATE,
            w.local_steps,
            turns=[who[0] for who in turns(w)],
            active=self._active() if w.algorithm == "sglr" else (),
            orders=[order.tolist() for order in orders],
        )

    def _active(self) -> list[Sequence[int]]:
        """The clients that share a cut gradient in each step of an epoch, drawn as in SGLR."""
        w, config = self.w, self.w.config
        this = Round(0, 10**9, tuple(range(w.clients)), (w.epoch,) * w.clients, config.seed)
        sglr = config.thing("algorithm", "sglr")
        return [sglr.draw_active(this.clients, this, turn) for turn in range(w.epoch)]

    def _batches(self) -> list[tuple[Tensor, Tensor]]:
        """The rows of each step of an epoch, in the order of the engines."""
        w = self.w
        if self.by_hand:
            x, y = w.net.samples(w.clients * w.batch * w.epoch)
            found = list(zip(x.split(w.rows), y.split(w.rows), strict=True))
        else:
            batches = Batches(deal(w.config, self.source), w.batch, w.config.seed)
            samples = [self.source.train[batches.draw(who)[0]] for who in turns(w)]
            found = [(s.x, s.y) for s in samples]
        return [(x.to(w.device), y.to(w.device)) for x, y in found]

    def contestant(self, name: str) -> Thunk:
        """The contestant with this name."""
        if name == "ceiling":
            return Ceiling(self.net.to(self.w.device), self.given)
        if name == "loop":
            return LOOPS[self.w.algorithm](self.given)
        return self.engine({"local": "local", "fast": "auto"}[name])


class Engine:
    """An engine that trains step by step, without evaluations."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.steps = endless(training)

    def __call__(self, steps: int) -> None:
        """Trains this number of steps."""
        for _ in range(steps):
            next(self.steps)


def endless(training: Training) -> Iterator[Step]:
    """Yields after each step, round after round."""
    for index in itertools.count():
        this = training.clients.begin_round(index, 10**9, 1.0)
        yield from training.algorithm.round(training.server, training.clients, this)


def turns(w: Workload) -> Iterator[Sequence[int]]:
    """The clients of each step of an epoch: all, or (SSL) one client after another with all its batches."""
    if w.algorithm == "ssl":
        yield from ([k] for k in range(w.clients) for _ in range(w.epoch))
    else:
        yield from (range(w.clients) for _ in range(w.epoch))


def steps_of(w: Workload) -> list[tuple[int, int]]:
    """(round, step of the round) for each step of an epoch."""
    length = w.local_steps if w.algorithm in AVERAGING else w.epoch
    return [divmod(step, length) for step in range(w.epoch)]


# --- measuring -------------------------------------------------------------------------------------------------------


def interleave(
    thunks: dict[str, Thunk], w: Workload, seconds: float, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each contestant in the order A B C D, B C D A, ..., after one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in thunks}
    for thunk in thunks.values():
        thunk(w.steps)
    gc.collect()
    order, began = list(thunks), clock()
    for number in range(1, ROUNDS + 1):
        for name in order:
            start = clock()
            thunks[name](w.steps)
            times[name].append(clock() - start)
        order = [*order[1:], order[0]]
        if number >= (2 if w.gflop > VERY_HEAVY else 3) and clock() - began > seconds:
            break
    return times


def quartiles(reference: Sequence[float], times: Sequence[float]) -> list[float]:
    """Speed relative to the reference: quartiles of the paired ratios, [q1, median, q3]."""
    ratios = [a / b for a, b in zip(reference, times, strict=True)]
    return [float(q) for q in np.quantile(ratios, [0.25, 0.5, 0.75])]


def awaited() -> float:
    """The time when the device has finished all its work."""
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(w: Workload, seconds: float) -> Row:
    """One line of the table, or an error."""
    several = torch.get_num_threads() > 1  # CPU time would add up all threads
    clock = awaited if w.device != "cpu" else time.perf_counter if several else time.process_time
    row: Row = {"cell": str(w), **vars(w), "rows": w.rows, "gflop": round(w.gflop, 3), "steps": w.steps}
    began = time.perf_counter()
    try:
        material = Material.of(w)
        thunks = {name: material.contestant(name) for name in CONTESTANTS}
        times = interleave(thunks, w, seconds, clock)
    except Exception as error:  # an error in one cell must not end the others
        return {**row, "error": f"{type(error).__name__}: {error}"}
    fast = thunks["fast"]
    assert isinstance(fast, Engine), "the default engine is ours"
    ratios = {
        f"{name}/{reference}": quartiles(times[reference], times[name])
        for name, reference in (("fast", "loop"), ("fast", "ceiling"), ("fast", "local"), ("local", "loop"),
                                ("loop", "ceiling"))
    }  # fmt: skip
    return {
        **row,
        "engine": fast.training.engine,
        **ratios,
        "samples/s": w.rows * w.steps / statistics.median(times["fast"]),
        "rounds": len(times["fast"]),
        "took": round(time.perf_counter() - began, 1),
        "times": {name: [round(t, 6) for t in own] for name, own in times.items()},
    }


def profile(w: Workload) -> None:
    """Prints the most expensive operators of one step, for `fast` and `loop`."""
    material = Material.of(w)
    for name in ("fast", "loop"):
        thunk = material.contestant(name)
        thunk(2 * STEPS)
        gc.collect()
        bare = statistics.median(took(thunk) for _ in range(5)) / STEPS
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            thunk(STEPS)
        events = sorted(found.key_averages(), key=lambda e: -e.self_cpu_time_total)
        total, calls = sum(e.self_cpu_time_total for e in events), sum(e.count for e in events)
        print(f"\n{w}: {name}, {1e3 * bare:.3f} ms of CPU per step;", end=" ")
        print(f"profiled, {total / STEPS / 1e3:.3f} ms in {calls / STEPS:.0f} operators\n")
        print("\n".join(heading(["operator", "calls", "self, ms", "share"])))
        for event in events[:20]:
            spent = f"{event.self_cpu_time_total / STEPS / 1e3:.3f} | {100 * event.self_cpu_time_total / total:.1f} %"
            print(f"| {event.key[:60]} | {event.count / STEPS:.0f} | {spent} |")


def took(thunk: Thunk) -> float:
    """CPU seconds of STEPS steps."""
    start = time.process_time()
    thunk(STEPS)
    return time.process_time() - start


def peak_memory(w: Workload) -> Row:
    """Peak resident memory in MB of each contestant in its own process, with data and libraries."""
    found: Row = {"cell": str(w)}
    for name in CONTESTANTS:
        command = [sys.executable, __file__, "--memory-of", name, w.model, w.algorithm, str(w.clients), str(w.batch)]
        found[name] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    return {**found, "1.2 x loop + 150": round(1.2 * found["loop"] + 150)}


def memory_of(name: str, model: str, algorithm: str, clients: str, batch: str) -> None:
    """Prints the peak memory of this process in MB after some steps (on Linux)."""
    # Few batches, since rows are in memory twice while an engine is built, which is not to be measured here.
    w = Workload(model, algorithm, int(clients), int(batch), batches=STEPS)
    Material.of(w, by_hand=name in ("ceiling", "loop")).contestant(name)(2 * w.steps)
    (peak,) = (
        line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM")
    )
    print(int(peak.split()[1]) // 1024)


# --- what is shown ---------------------------------------------------------------------------------------------------


def processor() -> str:
    """The name of the processor, if the system provides it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)"


def spread(ratio: Sequence[float]) -> str:
    """A ratio's median and quartiles."""
    low, middle, high = ratio
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "cell": lambda r: r["cell"],
    "engine": lambda r: r["engine"],
    "fast/loop": lambda r: spread(r["fast/loop"]),
    "fast/ceiling": lambda r: spread(r["fast/ceiling"]),
    "local/loop": lambda r: f"{r['local/loop'][1]:.2f}",
    "loop/ceiling": lambda r: f"{r['loop/ceiling'][1]:.2f}",
    "samples/s": lambda r: f"{r['samples/s']:.0f}",
    "rounds": lambda r: str(r["rounds"]),
}


def heading(columns: Iterable[str]) -> list[str]:
    """The first two lines of a table."""
    names = list(columns)
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]


def line(row: Row) -> str:
    """A row of the table."""
    if "error" in row:
        return f"| {row['cell']} | {row['error']} |"
    return "| " + " | ".join(show(row) for show in COLUMNS.values()) + " |"


def worst_first(rows: Iterable[Row]) -> list[Row]:
    """Failed rows, then the others by the ratio of the default engine to the loop."""
    return sorted(rows, key=lambda r: 0.0 if "error" in r else r["fast/loop"][1])


def summary(rows: Sequence[Row]) -> list[str]:
    """The summary of the table, in lines."""
    good = [r for r in rows if "error" not in r]
    if not good:
        return ["No cell was measured."]
    against = sorted(r["fast/loop"][1] for r in good)
    slower = sum(r["fast/local"][1] < 1 for r in good)
    lines = [
        f"{len(rows)} cells, {len(rows) - len(good)} failed; fast/loop below 1 in {sum(v < 1 for v in against)}, "
        f"median {statistics.median(against):.2f}, worst {against[0]:.2f}; slower than the local engine in {slower}.",
    ]

    def group(title: str, ratio: str, chosen: Callable[[Row], bool]) -> None:
        found = sorted(r[ratio][1] for r in good if chosen(r))
        if found:
            lines.append(
                f"{title}, {ratio}: median {statistics.median(found):.2f}, worst {found[0]:.2f} ({len(found)} cells)."
            )

    def kind(r: Row) -> str:
        return NETS[r["model"]].kind

    parallel = {"psl", "sglr"}
    group("Convolutional nets at b = 32", "fast/ceiling", lambda r: kind(r) == "convolutional" and r["batch"] == 32)
    group("Transformers", "fast/ceiling", lambda r: kind(r) == "transformer")
    mlp = [r for r in good if r["model"] == "mlp" and r["algorithm"] in parallel]
    group("MLP, SGD", "fast/ceiling", lambda r: r in mlp and r["optimizer"] == "sgd")
    for clients in (10, 100):
        group(f"MLP, Adam, C = {clients}", "fast/ceiling",
              lambda r, c=clients: r in mlp and r["optimizer"] == "adam" and r["clients"] == c)  # fmt: skip
    for name in LOOPS:
        group(name, "fast/loop", lambda r, name=name: r["algorithm"] == name)
    for name in OPTIMIZERS:
        group(name, "fast/loop", lambda r, name=name: r["optimizer"] == name)
    lines += growth(good)
    return lines


def growth(rows: Sequence[Row]) -> list[str]:
    """The cost per sample with 1000 clients relative to 10, if both were measured."""
    cost = {r["cell"]: 1 / r["samples/s"] for r in rows}
    pairs = [(name, name.replace("C=1000 ", "C=10 ")) for name in cost if "C=1000 " in name]
    return [f"{many}: a sample costs {cost[many] / cost[few]:.2f} times what it costs with C = 10."
            for many, few in pairs if few in cost]  # fmt: skip


def compare(before: Path, after: Path) -> list[str]:
    """Two measurements of the same cells in one table, sorted by the second one, worst first."""
    old, new = ({r["cell"]: r for r in map(json.loads, p.read_text().splitlines())} for p in (before, after))
    columns = [
        "cell",
        "fast/loop before",
        "after",
        "fast/ceiling before",
        "after",
        "samples/s before",
        "after",
        "engine",
    ]
    lines = heading(columns)
    for row in worst_first(new.values()):
        was = old.get(row["cell"])
        if "error" in row or was is None or "error" in was:
            continue
        ratios = [spread(r[name]) for name in ("fast/loop", "fast/ceiling") for r in (was, row)]
        speeds = [f"{r['samples/s']:.0f}" for r in (was, row)]
        lines.append("| " + " | ".join([row["cell"], *ratios, *speeds, row["engine"]]) + " |")
    for title, rows in (("Before", old), ("After", new)):
        lines += ["", f"{title}:", "", *(f"- {one}" for one in summary(list(rows.values())))]
    return lines


def chosen(options: argparse.Namespace) -> list[Workload]:
    """The requested cells."""
    if options.quick:
        return QUICK
    found = cells() if options.device == "cpu" else [replace(w, device=options.device) for w in CUDA]
    models = options.models.split(",") if options.models else list(NETS)
    found = [w for w in found if w.model in models and str(w).startswith(options.only)]
    if options.cells and options.cells < len(found):
        found = [found[i * len(found) // options.cells] for i in range(options.cells)]
    return found


def measured(workloads: Sequence[Workload], seconds: float, kept: Path | None) -> list[Row]:
    """Measures and prints line by line, and appends each line to the file of JSON lines."""
    rows = []
    print("\n".join(heading(COLUMNS)), flush=True)
    for w in workloads:
        row = measure(w, seconds)
        rows.append(row)
        print(line(row), flush=True)
        gc.collect()
        if kept is not None:
            with kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**row, "torch": torch.__version__}) + "\n")
    return rows


def memory_table() -> list[str]:
    """Peak memory in separate processes."""
    lines = ["", "Peak memory of a process of its own, MB, libraries and four batches of each client included:", "",
             *heading(["cell", *CONTESTANTS, "1.2 x loop + 150"])]  # fmt: skip
    print("\n".join(lines), flush=True)
    for w in MEMORY:
        lines.append("| " + " | ".join(map(str, peak_memory(w).values())) + " |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Measures and prints row by row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two cells only")
    parser.add_argument("--only", default="", help="cells whose name starts so, e.g. 'mlp sglr'")
    parser.add_argument("--models", default="", help=f"of these models only: {','.join(NETS)}")
    parser.add_argument("--cells", type=int, help="at most so many cells, evenly spread over those chosen")
    parser.add_argument("--seconds", type=float, default=4.0, help="CPU seconds per cell (two rounds at least)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="of torch; with several, wall time is measured")
    parser.add_argument("--list", action="store_true", help="print the cells with their GFLOP a step, measure nothing")
    parser.add_argument("--memory", action="store_true", help="measure peak memory only")
    parser.add_argument("--json", type=Path, help="append what was measured to this file, one JSON object a line")
    parser.add_argument("--write", type=Path, help="write the tables to this file, below its line '<!-- engines -->'")
    parser.add_argument("--profile", metavar="CELL", help="the operators of one step of this cell")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"), help="two files of --json")
    parser.add_argument("--memory-of", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.compare:
        print("\n".join(compare(*options.compare)))
        return
    kept = keep_memory()
    if options.memory_of:
        memory_of(*options.memory_of)
        return
    if options.profile:
        (w,) = [w for w in {*cells(), *QUICK, *MEMORY} if str(w) == options.profile] or parser.error(
            "--list names them"
        )
        profile(replace(w, device=options.device))
        return
    workloads = chosen(options)
    if options.list:
        print("\n".join(f"{w}: {w.gflop:.3g} GFLOP" for w in workloads))
        return
    on_cpu = options.device == "cpu"
    where = f"{processor()}, freed memory kept: {kept}" if on_cpu else torch.cuda.get_device_name()
    lines = [f"{where}; torch {torch.__version__}; the same optimiser on all sides, SGD unless said.", ""]
    print("\n".join(lines), flush=True)
    if not options.memory:
        rows = measured(workloads, options.seconds, options.json)
        found = [*(f"- {one}" for one in summary(rows)), "", *heading(COLUMNS), *map(line, worst_first(rows))]
        print("\n".join(["", "Worst first:", "", *found]), flush=True)
        lines += found
    everything = on_cpu and not (options.quick or options.only or options.models or options.cells)
    if options.memory or everything:
        lines += memory_table()
    if options.write:
        mark = "<!-- engines -->"
        head = options.write.read_text(encoding="utf-8").split(mark)[0]
        options.write.write_text(head + mark + "\n" + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
