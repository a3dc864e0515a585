"""SplitAvg under label skew, averaged by class or among similar clients: does it help?

    python benchmarks/split_averages.py [--seeds 0 1 2] [--json FILE] [--write docs/which-algorithm.md]

SplitAvg sends the active clients one common cut gradient. Its row j is the mean over their rows j, whatever these rows
show. Under label skew, a client with two classes therefore learns from rows of ten classes. The benchmark tries two
other averages:

    by class   a row gets the mean gradient of all rows of its class, so one gradient per class is sent
    similar    row j gets the mean over the rows j of clients with similar shares of classes

All use phi 1. They are compared with PSL and with SplitAvg, each with and without adjusted logits for the clients.
Model, data, rates and seeds are those of `cutlayer reproduce skew --size reduced`. The learning rate of each way is the
one of three with the best validation accuracy on a separate seed, with two shards.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pages
import torch
from torch import Tensor
from torch.nn import functional

from cutlayer import Run
from cutlayer.algorithms import algorithm
from cutlayer.algorithms.sglr import Sgl
from cutlayer.gradients import own
from cutlayer.reproduce.cells import SIZES, SKEW, Study
from cutlayer.reproduce.contest import contest
from cutlayer.types import CutGradients, Rows, Smashed
from cutlayer.verbs import BACKWARD, FORWARD

MARK = "<!-- averages -->"
SKEWS = ("2 shards", "Dirichlet 0.1")
ALIKE = 0.7  # clients are similar if the cosine of their shares of classes is at least this


class Grouped(Sgl):
    """SplitAvg over groups of rows: every row gets the mean of its group."""

    def groups(self, smashed: Smashed) -> Tensor:
        """The group of each row, [R]."""
        raise NotImplementedError

    def split_average(self, gradient: Rows, smashed: Smashed, active: tuple[int, ...]) -> CutGradients:
        """The mean of each group over the rows of all clients."""
        of, groups = torch.unique(self.groups(smashed), return_inverse=True)
        each = own(gradient, smashed, self.gradient_scale)
        count = groups.bincount().to(each.own[0].dtype)
        rows = tuple(
            (g.new_zeros(len(of), *g.shape[1:]).index_add_(0, groups, g) / count.view(-1, *[1] * (g.dim() - 1)))[groups]
            for g in each.own
        )
        return CutGradients(rows, smashed.clients, smashed.sizes)


@algorithm("by-class", title="SplitAvg by class", summary="SplitAvg over rows of a class", needs={FORWARD, BACKWARD})
class ByClass(Grouped):
    """SplitAvg over the rows of each class."""

    def groups(self, smashed: Smashed) -> Tensor:
        """The labels."""
        return smashed.labels


@algorithm(
    "similar", title="SplitAvg of similar clients", summary="SplitAvg among similar clients", needs={FORWARD, BACKWARD}
)
class Similar(Grouped):
    """SplitAvg, row by row, among clients with similar labels in the step.

    Clients are in a group if the cosine of their shares of classes is at least `ALIKE`, or if such pairs connect them.
    """

    def groups(self, smashed: Smashed) -> Tensor:
        """The number of the row in its batch, combined with the client's group."""
        classes = int(smashed.labels.max()) + 1
        seen = torch.stack([p.bincount(minlength=classes) for p in smashed.labels.split(list(smashed.sizes))]).double()
        shares = functional.normalize(seen, dim=1)
        near = (shares @ shares.T >= ALIKE).double()
        for _ in range(len(near).bit_length()):
            near = (near @ near > 0).double()
        group = near.argmax(1)  # the first of the connected clients
        rows = torch.cat([torch.arange(size) for size in smashed.sizes])
        return group.repeat_interleave(torch.tensor(smashed.sizes)) * max(smashed.sizes) + rows


OWN: dict[str, type[Grouped]] = {"SplitAvg by class": ByClass, "SplitAvg of similar clients": Similar}
GIVEN = {
    "PSL": "their own gradients (PSL)",
    "SplitAvg": "one gradient, averaged row by row (SplitAvg)",
    "SplitAvg by class": "one gradient for each class",
    "SplitAvg of similar clients": "one for each group of similar clients, averaged row by row",
}
LIKE = {"PSL": "PSL", "SplitAvg": "SGL, phi 1", **dict.fromkeys(OWN, "SGL, phi 1")}  # the configurations that they use


@dataclass(frozen=True)
class Cell:
    """One training, without its rate and seed."""

    way: str
    skew: str
    adjusted: bool


@dataclass
class Scores:
    """Accuracies in percent on validation and test data. `file` contains earlier ones and receives new ones."""

    study: Study
    file: Path | None
    known: dict[str, tuple[float, float]]

    def of(self, cell: Cell, rate: float, seed: int) -> tuple[float, float]:
        """Trains once, unless the result is known."""
        key = json.dumps([*asdict(cell).values(), rate, seed])
        if key not in self.known:
            self.known[key] = self._trained(cell, rate, seed)
            print(key, self.known[key], flush=True)
            if self.file:
                with self.file.open("a", encoding="utf-8") as out:
                    out.write(json.dumps({"run": key, "scores": self.known[key]}) + "\n")
        return self.known[key]

    def _trained(self, cell: Cell, rate: float, seed: int) -> tuple[float, float]:
        config = self.study.contestant(cell.skew, LIKE[cell.way] + " + client" * cell.adjusted).config
        options: dict[str, Any] = {**config.model_dump(exclude_unset=True), "client_lr": rate, "seed": seed}
        if cell.way in OWN:
            options["algorithm"] = OWN[cell.way](phi=options.pop("phi"))
        run = Run(**options)
        run.run()
        last = run.evaluations[-1]
        assert last.validation_score is not None
        assert last.test_score is not None
        return 100 * last.validation_score, 100 * last.test_score

    def tuned(self, cell: Cell) -> float:
        """The rate with the best validation accuracy with two shards, on a separate seed."""
        size = self.study.extent
        return max(size.rates, key=lambda rate: self.of(replace(cell, skew=SKEWS[0]), rate, size.tuning_seed)[0])


def table(scores: Scores, seeds: Sequence[int]) -> Iterator[str]:
    """A line for each way, with its rate and its accuracy for each kind of skew."""
    yield f"| the clients get | logits | rate | {' | '.join(SKEWS)} |"
    yield "|---|---|---|---|---|"
    for way, adjusted in ((w, a) for w in LIKE for a in (False, True)):
        rate = scores.tuned(Cell(way, SKEWS[0], adjusted))
        figures = []
        for skew in SKEWS:
            tests = [scores.of(Cell(way, skew, adjusted), rate, seed)[1] for seed in seeds]
            figures.append(f"{statistics.fmean(tests):.2f} ± {statistics.stdev(tests):.2f}")
        yield f"| {GIVEN[way]} | {'adjusted' if adjusted else 'as they are'} | {rate:g} | {' | '.join(figures)} |"


def main() -> None:
    """Trains everything and prints the table or writes it to a page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--json", type=Path, help="add results to this file, a line each, and take those that it has")
    parser.add_argument("--write", type=Path, help=f"write the table to this file, between its lines {MARK!r}")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    study = Study(SIZES["reduced"], asked.data, extent=contest(SKEW).sizes["reduced"])
    lines = asked.json.read_text(encoding="utf-8").splitlines() if asked.json and asked.json.exists() else []
    known = {row["run"]: tuple(row["scores"]) for row in map(json.loads, lines)}
    found = list(table(Scores(study, asked.json, known), asked.seeds))
    print("\n".join(found))
    if asked.write:
        pages.put(asked.write, MARK, found)


if __name__ == "__main__":
    main()
