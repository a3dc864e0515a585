"""The costs of a run besides its training: the first step, memory, clients, evaluation.

    python benchmarks/startup.py [first] [imports] [memory] [growth] [evaluation] [--write docs/benchmarks.md]

Every figure is measured in its own process with one thread, in CPU seconds and MB of resident memory. `--source DIR`
measures another version's `src` folder, for a comparison.
"""

from __future__ import annotations

import argparse
import compileall
import importlib.util
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pages

MARK = "<!-- startup -->"
PICTURE = (1, 28, 28)


def resident() -> int:
    """Resident memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


def peak() -> int:
    """Peak resident memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


# What is measured, each in its own process. Arguments and results are passed as JSON.


def first_step(**_: Any) -> list[Any]:
    """[stage, CPU seconds since the process began, MB] up to the first training step on the user's tensors."""
    stages = [("Python", time.process_time(), resident())]

    def reached(stage: str) -> None:
        stages.append((stage, time.process_time(), resident()))

    import torch

    reached("import torch")
    import cutlayer.run

    reached("import cutlayer's training")
    x, y = torch.randn(600, *PICTURE), torch.arange(600) % 10
    run = cutlayer.Run(data=(x, y), model="cnn", algorithm="sglr", clients=4, batch=8, epochs=1)
    reached("Run(...): data, model, cut and its proof, engine")
    next(iter(run))
    reached("the first step")
    return stages


def command(**_: Any) -> list[Any]:
    """[stage, CPU seconds since the process began, MB] of `cutlayer run` on digits for one epoch."""
    from cutlayer import cli

    stages = [("Python and the command line", time.process_time(), resident())]

    def reached(stage: str) -> None:
        stages.append((stage, time.process_time(), resident()))

    import torch  # noqa: F401

    reached("import torch")
    import cutlayer.run

    train = cutlayer.run.Run.__iter__

    def watched(run: Any) -> Iterator[Any]:
        reached("Run(...): digits, model, cut and its proof, engine")
        for number, record in enumerate(train(run)):
            if not number:
                reached("the first step")
            yield record
        reached("the rest of the epoch, evaluation, model and result")

    cutlayer.run.Run.__iter__ = watched  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["cutlayer", "run", "--data", "digits", "--model", "cnn", "--clients", "4", "--epochs", "1"]
        sys.argv += ["--algorithm", "sglr", "--out", f"{folder}/run"]
        try:
            cli.main()
        except SystemExit as done:
            if done.code:
                raise
    reached("report.html and its pictures")
    return stages


def lenet() -> Any:
    """LeNet-5, which is cut after its first block."""
    from torch import nn

    class LeNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block1 = nn.Sequential(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2))
            self.block2 = nn.Sequential(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
            self.head = nn.Sequential(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10))

        def forward(self, x: Any) -> Any:
            return self.head(self.block2(self.block1(x)))

    return LeNet()


def model(name: str) -> dict[str, Any]:
    """The options of a run that choose the model."""
    return {"model": lenet, "cut": "block1"} if name == "lenet" else {"model": name}


def pictures(rows: int) -> Any:
    """Random pictures with the shape of Fashion-MNIST's, and classes."""
    import torch

    return torch.randn(rows, *PICTURE), torch.arange(rows) % 10


def loop(*, clients: int, batch: int, steps: int, **_: Any) -> int:
    """Peak MB of LeNet trained by a plain loop over clients: parallel split learning with plain SGD."""
    import torch
    from torch.nn import functional

    x, y = pictures(clients * batch * steps)
    x, y = x.view(clients, -1, batch, *PICTURE), y.view(clients, -1, batch)
    lower, whole = [lenet().block1 for _ in range(clients)], lenet()
    server = torch.nn.Sequential(whole.block2, whole.head)
    optimizers = [torch.optim.SGD(part.parameters(), 0.1) for part in (*lower, server)]
    for step in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        smashed = torch.cat([part(x[k, step]) for k, part in enumerate(lower)])
        functional.cross_entropy(server(smashed), y[:, step].flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()
    return peak()


def ours(*, clients: int, batch: int, steps: int, **options: Any) -> int:
    """Peak MB of the same training as a run."""
    import cutlayer

    x, y = pictures(clients * batch * steps)
    x_test, y_test = pictures(batch)
    data = cutlayer.from_arrays(x, y, x_test=x_test, y_test=y_test, validation=0)
    del x, y
    options |= {"client_optimizer": "sgd", "server_optimizer": "sgd", "epochs": 1, "eval_every": steps}
    run = cutlayer.Run(data=data, algorithm="psl", clients=clients, batch=batch, **model("lenet"), **options)
    run.run()
    return peak()


def growth(*, clients: int, steps: int, **_: Any) -> float:
    """CPU microseconds per trained sample: the small CNN, SGLR, batches of 8."""
    import cutlayer

    x, y = pictures(clients * 8 * steps)
    x_test, y_test = pictures(8)
    data = cutlayer.from_arrays(x, y, x_test=x_test, y_test=y_test, validation=0)
    del x, y
    run = cutlayer.Run(data=data, algorithm="sglr", model="cnn", clients=clients, batch=8, epochs=1, eval_clients=1)
    records, warm = iter(run), max(2, steps // 5)
    for _ in range(warm):
        next(records)
    started = time.process_time()
    for _ in range(steps - warm):
        next(records)
    return 1e6 * (time.process_time() - started) / ((steps - warm) * 8 * clients)


def evaluation(*, name: str, clients: int, rows: int, tests: int, epochs: int, **_: Any) -> dict[str, Any]:
    """CPU seconds of the whole run, of the evaluations before the last one, and of the last one."""
    import cutlayer
    from cutlayer.run import Run

    spent: list[float] = []
    judge = Run._evaluate

    def timed(run: Any, *values: Any, **named: Any) -> None:
        started = time.process_time()
        judge(run, *values, **named)
        spent.append(time.process_time() - started)

    Run._evaluate = timed  # type: ignore[method-assign]
    x, y = pictures(clients * rows)
    x_test, y_test = pictures(tests)
    data = cutlayer.from_arrays(x, y, x_test=x_test, y_test=y_test, validation=0)
    run = cutlayer.Run(data=data, algorithm="sglr", clients=clients, batch=32, epochs=epochs, **model(name))
    started = time.process_time()
    run.run()
    whole = time.process_time() - started
    return {
        "whole": whole,
        "before": sum(spent[:-1]),
        "last": spent[-1],
        "times": len(spent),
    }


MEASURED: dict[str, Callable[..., Any]] = {f.__name__: f for f in (first_step, command, loop, ours, growth, evaluation)}


# Tables


class Bench:
    """Measures in separate processes."""

    def __init__(self, source: Path | None, repeats: int, where: Path) -> None:
        """Copies the package to `where` and compiles it there, as an installation does."""
        found = importlib.util.find_spec("cutlayer")
        assert found is not None, "the package is installed"
        assert found.origin is not None, "as files"
        package = Path(found.origin).parent if source is None else source / "cutlayer"
        shutil.copytree(package, where / "cutlayer")
        compileall.compile_dir(where, quiet=2)
        self.repeats = repeats
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(where)}

    def run(self, what: str, *flags: str, keep: str = "1", **arguments: Any) -> tuple[Any, str]:
        """(the result, the error stream of the process)."""
        words = [sys.executable, *flags, __file__, "--one", what, json.dumps(arguments)]
        environment = {**self.environment, "CUTLAYER_KEEP_MEMORY": keep}
        done = subprocess.run(words, env=environment, check=True, capture_output=True, text=True)
        return json.loads(done.stdout.splitlines()[-1]), done.stderr

    def stages(self, what: str) -> list[str]:
        """A table of stages, from the fastest repeat."""
        found = min((self.run(what)[0] for _ in range(self.repeats)), key=lambda stages: stages[-1][1])
        lines = ["| stage | CPU seconds | in all | resident MB |", "|---|---|---|---|"]
        before = 0.0
        for stage, seconds, memory in found:
            lines.append(f"| {stage} | {seconds - before:.2f} | {seconds:.2f} | {memory} |")
            before = seconds
        return lines

    def first(self) -> list[str]:
        """The first step, from Python and from the command line."""
        head = "From the start of the process to the first step, on tensors of one's own (CNN, SGLR, 4 clients):"
        then = "The same for `cutlayer run --data digits --model cnn --clients 4 --epochs 1`, and what follows:"
        return [head, "", *self.stages("first_step"), "", then, "", *self.stages("command")]

    def imports(self) -> list[str]:
        """Seconds by imported library, up to the first step."""
        _, text = self.run("first_step", "-X", "importtime")
        spent: defaultdict[str, int] = defaultdict(int)
        for line in text.splitlines():
            if line.startswith("import time:") and line.count("|") == 2:
                own, _, name = line.removeprefix("import time:").split("|")
                if own.strip().isdigit():
                    spent[name.strip().split(".")[0]] += int(own)
        most = sorted(spent.items(), key=lambda item: -item[1])
        lines = ["Seconds of imports up to the first step, by library:", "", "| library | seconds |", "|---|---|"]
        lines += [f"| {name} | {micro / 1e6:.2f} |" for name, micro in most[:6]]
        return [*lines, f"| {len(most) - 6} others | {sum(micro for _, micro in most[6:]) / 1e6:.2f} |"]

    def memory(self) -> list[str]:
        """Peak memory of a run and of a loop."""
        lines = ["Peak resident MB, LeNet-5, parallel split learning, 50 clients, 20 steps:", ""]
        lines += ["| batch | a loop over clients | a run | allowed (1.2 loops + 150) |", "|---|---|---|---|"]
        for batch in (8, 32):
            size = {"clients": 50, "batch": batch, "steps": 20}
            plain, run = self.run("loop", **size)[0], self.run("ours", **size)[0]
            lines.append(f"| {batch} | {plain} | {run} | {1.2 * plain + 150:.0f} |")
        return lines

    def growth(self) -> list[str]:
        """Cost per sample for growing numbers of clients."""
        lines = ["CPU microseconds per sample from Python (CNN, SGLR, b = 8):", ""]
        lines += ["| clients | memory kept (the default) | `CUTLAYER_KEEP_MEMORY=0` |", "|---|---|---|"]
        for clients, steps in ((10, 200), (100, 40), (1000, 10)):
            cells = [
                min(self.run("growth", keep=keep, clients=clients, steps=steps)[0] for _ in range(self.repeats))
                for keep in "10"
            ]
            lines.append(f"| {clients} | {cells[0]:.0f} | {cells[1]:.0f} |")
        return lines

    def evaluation(self) -> list[str]:
        """The share of evaluation in a run with the default intervals."""
        lines = [
            "Evaluation's share of a run's CPU time, with the default pace (10 clients x 600 rows, b = 32):",
            "",
        ]
        lines += ["| model | test rows | epochs | evaluations | before the last | the last | in all |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for name, tests, epochs in CASES:
            found, _ = self.run("evaluation", name=name, clients=10, rows=600, tests=tests, epochs=epochs)
            before, last = (found[part] / found["whole"] for part in ("before", "last"))
            shares = f"{before:.0%} | {last:.0%} | {before + last:.0%}"
            lines.append(f"| {name} | {tests:,} | {epochs} | {found['times']} | {shares} |")
        return lines


CASES = [
    ("cnn", 10_000, 5),
    ("cnn", 10_000, 20),
    ("cnn", 10_000, 60),
    ("lenet", 10_000, 20),
    ("lenet", 10_000, 60),
    ("mlp", 10_000, 20),
    ("mlp", 10_000, 60),
    ("cnn", 1_000, 20),
]
TABLES: dict[str, Callable[[Bench], list[str]]] = {
    "first": Bench.first,
    "imports": Bench.imports,
    "memory": Bench.memory,
    "growth": Bench.growth,
    "evaluation": Bench.evaluation,
}


def main() -> None:
    """Prints the tables or writes them to a page."""
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(MEASURED[sys.argv[2]](**json.loads(sys.argv[3]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}; default: all")
    parser.add_argument("--source", type=Path, help="another version's src folder")
    parser.add_argument("--repeats", type=int, default=3, help="of which the fastest counts")
    parser.add_argument("--write", type=Path, help=f"write the tables to this file, between its lines '{MARK}'")
    asked = parser.parse_args()
    if strange := set(asked.tables) - set(TABLES):
        parser.error(f"there is no table {sorted(strange)[0]!r}: choose of {', '.join(TABLES)}")
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as where:
        bench = Bench(asked.source, asked.repeats, Path(where))
        for name in asked.tables or TABLES:
            table = [*TABLES[name](bench), ""]
            print("\n".join(table), flush=True)
            lines += table
    if asked.write:
        pages.put(asked.write, MARK, lines)


if __name__ == "__main__":
    main()
