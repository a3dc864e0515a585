"""The paper's ResNet16 with SplitAvg for all clients: does batch norm explain why phi 1 fails there?

    python benchmarks/norms.py [--seeds 0 1] [--cells 12] [--json FILE] [--write docs/batch-norm.md]

Clients have 500 samples of Fashion-MNIST each. ResNet16 is trained by SGLR (Adam, rate 0.001, batch 8) with {batch
norm, group norm, frozen statistics} x phi {0, 0.5, 1} x alpha {0, 1} x C {5, 10}, and with SplitAvg over clients and
rows. Frozen statistics are a batch norm that uses no batch: they are taken from normally distributed noise in the
untrained network. Scores are the mean accuracy of the clients' models on the first 1000 test images at the end.
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

import pages
import scored
import torch
from torch import Tensor, nn

from cutlayer import Run, Source
from cutlayer.models.zoo.resnet16 import resnet16

MARK = "<!-- norms -->"
SAMPLES, EPOCHS, BATCH, RATE, TESTED = 500, 12, 8, 0.001, 1000


@dataclass(frozen=True)
class Cell:
    """One training, without its seed."""

    norm: str
    clients: int
    alpha: float
    phi: float
    over: str = "clients"


def cells() -> Iterator[Cell]:
    """All cells, the most informative ones first."""
    for clients in (10, 5):
        for alpha in (1.0, 0.0):
            for norm in ("batch", "group", "frozen"):
                for phi in (0.0, 1.0):
                    yield Cell(norm, clients, alpha, phi)
        yield Cell("batch", clients, 1.0, 1.0, "clients-and-rows")
    for clients in (10, 5):
        for norm in ("batch", "group", "frozen"):
            for alpha in (1.0, 0.0):
                yield Cell(norm, clients, alpha, 0.5)


class FrozenNorm(nn.Module):
    """A batch norm whose statistics never change: [R, channels, h, w] -> the same shape."""

    mean: Tensor
    variance: Tensor

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.register_buffer("mean", norm.running_mean.clone())
        self.register_buffer("variance", norm.running_var.clone())

    def forward(self, x: Tensor) -> Tensor:
        """One scale and one shift per channel."""
        scale = self.weight * (self.variance + self.eps).rsqrt()
        return x * scale.view(-1, 1, 1) + (self.bias - self.mean * scale).view(-1, 1, 1)


def replaced(module: nn.Module, norm: str) -> None:
    """Replaces every batch norm by another norm."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            other = FrozenNorm(child) if norm == "frozen" else nn.GroupNorm(4, child.num_features)
            setattr(module, name, other)
        else:
            replaced(child, norm)


def make(norm: str) -> nn.Module:
    """ResNet16 for pictures of one channel and ten classes."""
    model = resnet16((1, 28, 28), 10)
    if norm == "frozen":
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.momentum = None  # averages the statistics of all its inputs
        with torch.no_grad():
            model.train()(torch.randn(64, 1, 28, 28))
    if norm != "batch":
        replaced(model, norm)
    return model


def batch(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """With batch norm."""
    return make("batch")


def group(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """With group norm, four groups."""
    return make("group")


def frozen(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """With frozen statistics."""
    return make("frozen")


MODELS = {"batch": batch, "group": group, "frozen": frozen}


def accuracy(source: Source, cell: Cell, seed: int, epochs: int, samples: int) -> float:
    """The score of a run in percent; nan if numbers became infinite or NaN."""
    reading = {"average_over": cell.over} if cell.phi else {}
    run = Run(
        algorithm="sglr",
        data=source,
        model=MODELS[cell.norm],
        cut="block4",
        clients=cell.clients,
        samples_per_client=samples,
        epochs=epochs,
        batch=BATCH,
        client_lr=RATE,
        alpha=cell.alpha,
        phi=cell.phi,
        seed=seed,
        eval_every=10**6,
        **reading,
    )
    return scored.accuracy(run)


def figure(scores: list[float]) -> str:
    """Every seed's score and their mean."""
    if not scores:
        return ""
    each = ", ".join(f"{s:.1f}" for s in scores)
    return f"{statistics.fmean(scores):.1f} ({each})" if len(scores) > 1 else each


def table(found: dict[Cell, list[float]]) -> Iterator[str]:
    """One line per norm, number of clients and alpha."""
    yield "| norm | clients | alpha | phi 0 | phi 0.5 | phi 1 | phi 1, over rows too | phi 1 loses |"
    yield "|---|---|---|---|---|---|---|---|"
    for clients in (10, 5):
        for norm in MODELS:
            for alpha in (0.0, 1.0):
                of = {phi: found.get(Cell(norm, clients, alpha, phi), []) for phi in (0.0, 0.5, 1.0)}
                rows = found.get(Cell(norm, clients, alpha, 1.0, "clients-and-rows"), [])
                if any(of.values()):
                    lost = [a - b for a, b in zip(of[0.0], of[1.0], strict=False)]
                    shown = " | ".join(figure(s) for s in (*of.values(), rows))
                    yield f"| {norm} | {clients} | {alpha:g} | {shown} | {figure(lost)} |"


def main() -> None:
    """Trains everything and prints the table or writes it to a page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--cells", type=int, help="the first so many alone")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--samples", type=int, default=SAMPLES, help="per client")
    parser.add_argument("--data", default="/usr/share/datasets/fashion-mnist", help="the folder of Fashion-MNIST")
    parser.add_argument("--json", type=Path, help="add results to this file, a line each, and take those that it has")
    parser.add_argument("--write", type=Path, help=f"write the table to this file, between its lines '{MARK}'")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    source = scored.data(asked.data, TESTED)
    kept: dict[tuple[Cell, int], float] = {}
    if asked.json and asked.json.exists():
        for line in asked.json.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            kept[Cell(**row["cell"]), row["seed"]] = row["accuracy"]
    found: dict[Cell, list[float]] = {}
    for seed in asked.seeds:
        for cell in list(cells())[: asked.cells]:
            if (cell, seed) not in kept:
                started = time.process_time()
                kept[cell, seed] = accuracy(source, cell, seed, asked.epochs, asked.samples)
                spent = time.process_time() - started
                print(f"{cell} seed {seed}: {kept[cell, seed]:.1f}, {spent:.0f} s of CPU", flush=True)
                if asked.json:
                    row = {"cell": asdict(cell), "seed": seed, "accuracy": kept[cell, seed], "seconds": spent}
                    with asked.json.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
            found.setdefault(cell, []).append(kept[cell, seed])
    lines = list(table(found))
    print("\n".join(lines))
    if asked.write:
        pages.put(asked.write, MARK, lines)


if __name__ == "__main__":
    main()
