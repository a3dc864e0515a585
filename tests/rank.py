"""Ranks of a test: a few processes compute the same list of cases together. The test's own process is rank 0."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import processes
import torch
from support import CLASSES, MODELS, Adapted, make, source
from torch import Tensor, nn

from cutlayer import Run
from cutlayer.collective import Place, joined, world
from cutlayer.errors import CutlayerError, CutlayerWarning

PATIENCE = 100.0
SIZES = (10, 12, 6, 8, 14)
DEFAULTS: dict[str, Any] = {
    "clients": len(SIZES),
    "partition": "column",
    "precision": "float64",
    "client_optimizer": "sgd",
    "client_lr": 0.1,
    "batch": 4,
    "rounds": 7,
    "checkpoint_every": 1,
}
Case = Mapping[str, Any]
"""Options of a run, with `model` and `data` by name, or `own`: one of the models below. `stop`: the round in which the
run is interrupted. `resume`: whether it continues an interrupted run.
"""


def _normed() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES)
    )


def _dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 8), nn.Dropout(0.3), nn.Linear(8, 4))


def _norm_below() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)
    )


class Ranked(nn.Sequential):
    """A model whose clients have adapters of different ranks."""

    def __init__(self) -> None:
        super().__init__(Adapted(6, 8, 3), nn.ReLU(), Adapted(8, CLASSES, 3))
        self.client_ranks = (1, 3, 2, 3, 1)


OWN: dict[str, Any] = {
    **{name: (model, shape, cut) for name, model, shape, cut in MODELS},
    "normed": (_normed, (6,), "2"),
    "dropping": (_dropping, (6,), "2"),
    "norm below": (_norm_below, (6,), "2"),
    "ranked": (Ranked, (6,), "1"),
}


class Outcome(NamedTuple):
    """The outcome of a run: exact facts, numbers, and the bytes that this rank had sent at each record; or an error."""

    facts: Any = None
    numbers: Any = None
    sent: tuple[float, ...] = ()
    error: str = ""


def trained(case: Case) -> Outcome:
    """Run a case in this process."""
    options = {**DEFAULTS, **case}
    own, stop, resume = options.pop("own", "mlp cut 2"), options.pop("stop", None), options.pop("resume", False)
    model, shape, cut = OWN[own]
    named = "model" in options  # the case names its own model and data
    given: dict[str, Any] = {} if named else {"model": make(model), "data": source(SIZES[: options["clients"]], shape)}
    try:
        run = Run.resume(options["out"], **given) if resume else Run(**{"cut": cut, **options}, **given)
        records, sent = [], []
        for record in run:
            records.append(record)
            sent.append(world().sent)
            if stop is not None and record.round == stop:
                return Outcome(sent=tuple(sent))
    except CutlayerError as error:
        return Outcome(error=f"{type(error).__name__}: {error}")
    assert run.result is not None
    facts = [(r.step, r.clients, r.active, r.samples, r.bytes_up, r.bytes_down) for r in records]
    losses = [r.loss for r in records]
    held = run.training.clients.held().models
    models = {f"{k} {name}": t for k, state in held.items() for name, t in state.items()}
    server = {f"server {name}": t for name, t in run.training.server.model.state_dict().items()}
    scores = [s.test_loss for s in run.evaluations]
    result = run.result
    return Outcome(
        (facts, result.bytes, result.virtual_seconds, result.samples),
        {
            "losses": torch.tensor(losses, dtype=torch.float64),
            "tests": torch.tensor(scores, dtype=torch.float64),
            **models,
            **server,
        },
        tuple(sent),
    )


def difference(one: Outcome, other: Outcome) -> float:
    """The largest difference of the numbers of two runs, whose facts must be equal."""
    assert not one.error, one.error
    assert not other.error, other.error
    assert one.facts == other.facts
    assert one.numbers.keys() == other.numbers.keys()
    numbers: list[tuple[Tensor, Tensor]] = [(one.numbers[name], other.numbers[name]) for name in one.numbers]
    return max(float((a.double() - b.double()).abs().max()) for a, b in numbers)


def together(size: int, cases: Sequence[Case], folder: Path) -> list[Outcome]:
    """The outcomes of the cases on `size` ranks; this process is the first of them."""
    store = f"file://{folder / 'store'}"
    (folder / "cases.json").write_text(json.dumps(list(cases)), encoding="utf-8")
    here = [Path(__file__).parent]
    with ExitStack() as stack:
        others = []
        for rank in range(1, size):
            log = stack.enter_context((folder / f"rank-{rank}.log").open("w"))
            argv = [str(rank), str(size), store, str(folder / "cases.json")]
            others.append(processes.start(argv, cwd=folder, stdout=log, stderr=log, path=here, program="rank"))
        for process in others:
            stack.callback(process.kill)
        try:
            outcomes = list(_as_one_of(0, size, store, cases))
            codes = [process.wait(PATIENCE) for process in others]
        except BaseException as error:
            logs = [(folder / f"rank-{rank}.log").read_text() for rank in range(1, size)]
            raise AssertionError("\n".join(logs)[-5000:]) from error
    assert codes == [0] * (size - 1)
    return outcomes


def _as_one_of(rank: int, size: int, store: str, cases: Sequence[Case]) -> list[Outcome]:
    with joined(Place(rank, size, rank, size, "tcp://127.0.0.1:1"), store=store, timeout=PATIENCE):
        return [trained(case) for case in cases]


def main() -> None:
    """Run as one of the ranks after the first."""
    rank, size, store, cases = sys.argv[1:]
    warnings.simplefilter("ignore", CutlayerWarning)
    torch.set_num_threads(1)
    _as_one_of(int(rank), int(size), store, json.loads(Path(cases).read_text(encoding="utf-8")))
