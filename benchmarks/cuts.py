"""Which models `cutlayer.cut` can cut, how, and which engine runs the parts. Writes the table of docs/models.md.

    python benchmarks/cuts.py --write docs/models.md     # all models; takes minutes
    python benchmarks/cuts.py llama swin                 # models with one of these words in their names

`architectures.py` makes the models with small sizes and random weights, so nothing is downloaded. Models of Hugging
Face need `pip install 'cutlayer[huggingface]'` and are left out without it.
"""

from __future__ import annotations

import argparse
import copy
import platform
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from architectures import Architecture, architectures

import cutlayer
from cutlayer.engine.stackable import stackable
from cutlayer.engine.tuning import Tuner
from cutlayer.engine.ways import Stacking
from cutlayer.models import Parts
from cutlayer.models.parts import Arguments, taken_apart
from cutlayer.optim import MakeOptimizer, make_optimizer
from cutlayer.seeds import torch_seeded
from cutlayer.types import Rows, as_tuple

_CLIENTS = 8  # number of clients in measurements of speed
_SECONDS = 3.0  # seconds of measurement per model


@dataclass(frozen=True)
class Found:
    """The result of one cut. `trouble` is the reason of a refusal or an error in the parts."""

    of: Architecture
    seconds: float
    method: str = ""
    crossing: int = 0
    engine: str = ""
    speed: float | None = None
    trouble: str = ""

    @property
    def row(self) -> str:
        """A line of the table."""
        result = "refused" if self.trouble else "yes"
        names = (self.of.at,) if isinstance(self.of.at, str) else self.of.at
        cells = [
            self.of.name,
            " and ".join(f"`{name}`" for name in names),
            self.method or "-",
            result,
            self.crossing or "-",
        ]
        speed = "-" if self.speed is None else f"{self.speed:.1f}"
        cells += [self.engine or self.trouble, speed, f"{self.seconds:.1f}"]
        return "| " + " | ".join(map(str, cells)) + " |"


def look_at(architecture: Architecture) -> Found:
    """Cuts the model, compares the parts with the whole on another batch, and checks whether they can be stacked."""
    try:
        with torch_seeded(0, architecture.name):
            model, example = architecture.make()
            with torch.no_grad():
                Arguments.of(example).run(model)  # initialises lazy layers
    except Exception as error:
        return Found(architecture, 0.0, trouble=_cell(f"does not run: {type(error).__name__} {error}"))
    begin = time.perf_counter()
    try:
        parts = cutlayer.cut(model, architecture.at, example, untie=architecture.untie)
    except cutlayer.CutError as error:
        return Found(architecture, time.perf_counter() - begin, trouble=_cell(str(error)))
    seconds = time.perf_counter() - begin
    return Found(
        architecture,
        seconds,
        parts.method,
        len(parts.crossing),
        *_engine(parts, example),
        "" if equal(model, parts, example) else "the parts differ from the whole",
    )


def equal(model: torch.nn.Module, parts: Parts, example: Any) -> bool:
    """Whether the parts give the outputs of the whole for the example's rows in another order, in both modes."""
    x = Arguments.of(example)
    other = Arguments(tuple(row.flip(0) for row in x.rows), x.names)
    for training in (True, False):
        whole, pieces = copy.deepcopy(model).train(training), copy.deepcopy(parts)
        with torch.no_grad(), torch_seeded(1, "equal"):
            expected, _ = taken_apart(other.run(whole))
        value: Any = other.rows
        with torch.no_grad(), torch_seeded(1, "equal"):
            for part in pieces.all:
                value = part.train(training)(value)
        given, _ = taken_apart(value)
        if not all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(given, expected, strict=True)):
            return False
    return True


def _engine(parts: Parts, example: Any) -> tuple[str, float | None]:
    """The engine ("stacked", or "local" with the reason), and the speed relative to single clients."""
    rows, make = Arguments.of(example).rows, make_optimizer("sgd", 0.1, {})
    verdict = stackable(parts.client, rows, make, data=True)
    if verdict.reason:
        return f"local: {_cell(verdict.reason)}", None
    tuner = Tuner(_SECONDS, torch.device("cpu"))
    timed = {
        way: tuner.copies(parts.client, rows, len(rows[0]), _CLIENTS, make, Stacking(way), data=True).seconds
        for way in verdict.ways
    }
    alone = tuner.seconds(_one_by_one(parts.client, rows, make))
    quickest = min(timed, key=timed.__getitem__)
    known = alone < float("inf") and timed[quickest] < float("inf")
    return f"stacked, {quickest}", alone / timed[quickest] if known else None


def _one_by_one(part: torch.nn.Module, rows: Rows, make: MakeOptimizer) -> Callable[[], None]:
    """A step of each client with its own module and optimiser."""
    twins = [copy.deepcopy(part).train() for _ in range(_CLIENTS)]
    steps = [make(twin.named_parameters()) for twin in twins]

    def work() -> None:
        for twin, optimizer in zip(twins, steps, strict=True):
            given = [g for g in as_tuple(twin(rows)) if g.requires_grad]
            if optimizer is not None and given:
                optimizer.zero_grad()
                torch.autograd.backward(given, [torch.full_like(g, 1e-3) for g in given])
                optimizer.step()

    return work


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:300]


def _page(found: list[Found]) -> str:
    refused = [f for f in found if f.trouble]
    stacked = sum(f.engine.startswith("stacked") for f in found)
    methods = ", ".join(
        f"{name} {count}" for name, count in sorted(Counter(f.method for f in found if f.method).items())
    )
    seconds = sorted(f.seconds for f in found)
    lines = [
        "# Which models can be cut",
        "",
        "You can cut any `nn.Module` after any of its modules, if Cutlayer can prove that the two parts together",
        'equal the whole model. Name the module: `Run(model=net, cut="encoder.layers.0")`. This page shows which',
        f"architectures we tried. {len(found) - len(refused)} of {len(found)} can be cut after an inner block. The",
        f"clients' parts of {stacked} run on the stacked engine. Finding and proving a cut takes",
        f"{seconds[len(seconds) // 2]:.1f} s (median; the longest took {seconds[-1]:.1f} s).",
        "",
        f"`python benchmarks/cuts.py --write docs/models.md` wrote this page (torch {torch.__version__.split('+')[0]}, "
        f"{platform.machine()}, one thread).",
        "The models have small configurations and random weights (`benchmarks/architectures.py`). The columns:",
        "",
        "- **Method**: how the model was cut. `fx` traces it with `torch.fx`, `hooks` runs the model's own `forward`",
        f"  with hooks, and `tape` records two runs. They are tried in this order. Counts: {methods}.",
        "- **Proved**: whether logits, gradients and buffers equal those of the whole model, in training and in",
        "  evaluation, and on a second batch (`models/proof.py`). If not, the cut is refused.",
        "- **Tensors**: the number of tensors that cross the cut.",
        "- **Engine**: how simulations compute the clients' parts. `stacked` keeps the weights of all clients in",
        "  stacked tensors. Single operations are then replaced by stacked ones (lowered), the whole part is mapped by",
        "  `torch.func.vmap` (mapped), or each client's part is computed by itself (each). `local` has one module for",
        "  each client; the reason is given.",
        f"- **Speed**: how many times as fast the parts of {_CLIENTS} clients train on the stacked engine as with one",
        "  module and one optimiser per client. Small models gain from being computed together; large ones cannot.",
        "- **Seconds**: the time for finding and proving the cut.",
        "",
        "| architecture | cut after | method | proved | tensors | engine | speed | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(f.row for f in found)]) + "\n"


def main() -> None:
    """Examines all models or the named ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only models whose names contain one of these")
    parser.add_argument("--write", type=Path, help="write the page here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = []
    for architecture in architectures():
        if arguments.words and not any(w in architecture.name.lower() for w in arguments.words):
            continue
        found.append(look_at(architecture))
        print(found[-1].row, flush=True)
    print(f"{sum(not f.trouble for f in found)} of {len(found)} are cut")
    if arguments.write:
        arguments.write.write_text(_page(found))


if __name__ == "__main__":
    main()
