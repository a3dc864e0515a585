"""How much of the package runs in one training step: the distinct executed lines, and their files.

    python benchmarks/step_lines.py                        # all engines, a table
    python benchmarks/step_lines.py --engine local --files # one engine, file by file
    python benchmarks/step_lines.py --engine local --functions

It trains SGLR on a small network and watches the second step, so set-up, first uses and evaluation do not count. With
the engine `remote`, clients dial in over gRPC from a thread of this process, and the lines of both sides count. A few
of them depend on timing.
"""

from __future__ import annotations

import argparse
import sys
import threading
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from cutlayer import Run, RunConfig
from cutlayer.remote.dial import Dialler, dial_all
from cutlayer.remote.hub import Hub
from cutlayer.remote.security import ClientSecurity, ServerSecurity
from cutlayer.remote.sides import client_name, client_number, remote_training, worker_of

PACKAGE = Path(sys.modules["cutlayer"].__file__ or "").parent
ENGINES = ("local", "stacked", "remote")
CLIENTS = 4
OPTIONS: dict[str, Any] = {
    "algorithm": "sglr",
    "data": "digits",
    "model": "mlp",
    "clients": CLIENTS,
    "samples_per_client": 32,
    "batch": 8,
    "rounds": 1,
}


class Watch:
    """Executed lines of this package while `on` is set, by file, in all threads; functions in the order of entry."""

    def __init__(self) -> None:
        self.on = False
        self.lines: defaultdict[str, set[int]] = defaultdict(set)
        self.functions: defaultdict[str, dict[str, None]] = defaultdict(dict)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Watches this thread and those that start later."""
        threading.settrace(self._enter)
        sys.settrace(self._enter)
        try:
            yield
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]

    def _enter(self, frame: FrameType, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.startswith(f"{PACKAGE}/"):
            return None
        if self.on:
            self.functions[self._place(frame)][frame.f_code.co_qualname] = None
        return self._line

    def _line(self, frame: FrameType, event: str, _: object) -> Any:
        if self.on and event == "line":
            self.lines[self._place(frame)].add(frame.f_lineno)
        return self._line

    @staticmethod
    def _place(frame: FrameType) -> str:
        return str(Path(frame.f_code.co_filename).relative_to(PACKAGE))

    @property
    def count(self) -> int:
        """The number of distinct lines."""
        return sum(map(len, self.lines.values()))


@contextmanager
def run_of(engine: str) -> Iterator[Run]:
    """A run before its first step. Remote clients dial in from a thread of this process, over gRPC without TLS."""
    if engine != "remote":
        yield Run(RunConfig(engine=engine, **OPTIONS))
        return
    config, every = RunConfig(**OPTIONS), range(CLIENTS)
    hub = Hub("localhost:0", ServerSecurity(), lambda hello, _: greet(hello, client_number(hello.client)))
    training, _, greet = remote_training(config, hub, [0] * CLIENTS)
    port, workers = hub.start(), [worker_of(config, k, name=client_name(k)) for k in every]
    dialled = [Dialler(f"localhost:{port}", ClientSecurity(), worker) for worker in workers]
    clients = threading.Thread(target=dial_all, args=(dialled,), daemon=True)
    clients.start()
    hub.wait_for(CLIENTS, 60)
    yield Run(config, training=training)
    hub.stop("the lines are counted", 5)
    clients.join()


def watched(engine: str) -> Watch:
    """What the second step of a run executes."""
    watch = Watch()
    with watch.installed(), run_of(engine) as run:
        records = iter(run)
        next(records)
        watch.on = True
        next(records)
        watch.on = False
    return watch


def main() -> None:
    """Prints the requested tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=ENGINES, action="append", help="default: all")
    parser.add_argument("--files", action="store_true", help="lines of each file")
    parser.add_argument("--functions", action="store_true", help="functions, in the order in which they are entered")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| engine | lines | files |\n|---|---|---|")
    for engine in asked.engine or ENGINES:
        watch = watched(engine)
        print(f"| {engine} | {watch.count} | {len(watch.lines)} |")
        for place in watch.functions if asked.functions else sorted(watch.lines) if asked.files else ():
            names = ", ".join(watch.functions[place]) if asked.functions else ""
            print(f"    {place} ({len(watch.lines[place])}) {names}")


if __name__ == "__main__":
    main()
