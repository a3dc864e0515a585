"""Helpers for several tests: small models in float64, random data, an algorithm run by hand, plain SGD for comparison,
and the command line in this process.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import io
import itertools
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cutlayer import Run, RunConfig, Samples, Source, cli, plugins
from cutlayer.algorithms import Algorithm, traits_of
from cutlayer.costs.expect import Expected
from cutlayer.data.batches import Batches
from cutlayer.engine.local import LocalCohort
from cutlayer.engine.simulated import Clients
from cutlayer.models import cut
from cutlayer.optim import make_optimizer
from cutlayer.server import Server
from cutlayer.testing import random_samples, random_source
from cutlayer.types import Step

ROOT = Path(__file__).parents[1]
CLASSES = 4
ALGORITHMS = tuple(plugins.index("algorithm"))
ZOO = {name: entry for name, entry in plugins.index("model").items() if not entry.facts.get("argument")}
State = dict[str, Tensor]


def made(algorithm: str, **options: Any) -> Algorithm:
    """An algorithm with those of the options that it has; others are ignored."""
    entry = plugins.find("algorithm", algorithm)
    return plugins.load("algorithm", algorithm).of({k: v for k, v in options.items() if k in entry.option_names})


def u_shaped(algorithm: str) -> bool:
    """Whether the clients of an algorithm have tails, so that the model is cut twice."""
    return traits_of(plugins.find("algorithm", algorithm)).u_shaped


class Residual(nn.Module):
    """x + f(x): two tensors cross at a cut inside it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[n, width] -> [n, width]."""
        return functional.relu(x + self.second(functional.relu(self.first(x))))


class Tagger(nn.Module):
    """A model with two inputs: words, and a mask of padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(9, 6), nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        """Scores [n, words, 4] for each word."""
        scores: Tensor = self.head(self.body(self.embed(words) * mask.unsqueeze(-1)).relu())
        return scores


class Adapted(nn.Module):
    """A frozen layer with an adapter that starts at zero."""

    def __init__(self, inputs: int, outputs: int, rank: int = 2) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        low = nn.functional.linear(x, self.lora_A)
        found: Tensor = self.base(x) + 2 * nn.functional.linear(low, self.lora_B)
        return found


def mlp() -> nn.Module:
    """Features [n, 6] -> scores [n, 4]; cuts 0..4."""
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def normed() -> nn.Module:
    """Features [n, 6] -> scores [n, 4], with running statistics and dropout; cuts 0..6."""
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 8), nn.BatchNorm1d(8)]
    return nn.Sequential(*layers, nn.Linear(8, 4))


def residual() -> nn.Module:
    """Features [n, 6] -> scores [n, 4]; cuts 0, 1.first (two tensors cross), 1."""
    return nn.Sequential(nn.Linear(6, 8), Residual(8), nn.Linear(8, CLASSES))


def conv() -> nn.Module:
    """Images [n, 1, 6, 6] -> scores [n, 4]; cuts 0..5."""
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 3),
        nn.Flatten(),
        nn.Linear(4, CLASSES),
    )


MODELS: list[tuple[str, Callable[[], nn.Module], tuple[int, ...], str]] = [
    ("mlp cut 0", mlp, (6,), "0"),
    ("mlp cut 2", mlp, (6,), "2"),
    ("residual cut inside", residual, (6,), "1.first"),
    ("conv cut 2", conv, (1, 6, 6), "2"),
]


def make(model: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A float64 model with seeded weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model().double()


def samples(n: int, shape: tuple[int, ...], seed: int = 0) -> Samples:
    """n random samples in float64. Every class occurs if n >= CLASSES."""
    return random_samples(n, shape, classes=CLASSES, seed=seed)


def source(sizes: Sequence[int], shape: tuple[int, ...], seed: int = 0) -> Source:
    """A data set with a client column that gives `sizes` samples to the clients."""
    return random_source(sizes, shape, classes=CLASSES, seed=seed)


def train(algorithm: Any, model: nn.Module, sizes: Sequence[int], shape: tuple[int, ...], **options: Any) -> Run:
    """Train with plain SGD in float64 on `source(sizes)`, and return the finished run."""
    defaults: dict[str, Any] = {
        "clients": len(sizes),
        "partition": "column",
        "precision": "float64",
        "client_optimizer": "sgd",
        "client_lr": 0.1,
        "batch": 4,
        "lr_schedule": "constant",
        "rounds": 2,
        "engine": "local",
    }
    run = Run(algorithm=algorithm, model=model, data=source(sizes, shape), **{**defaults, **options})
    run.run()
    return run


def is_what_a_run_counts(e: Expected, run: Run) -> None:
    """A plan's bytes (in each convention), FLOPs, time and energy equal those of a finished run."""
    result, ledger = run.result, run.training.ledger
    assert result is not None
    assert (e.up, e.down) == (ledger.total("up"), ledger.total("down"))
    assert e.down_broadcast == ledger.total("down", "wire-broadcast")
    assert e.paper == ledger.total("up", "paper") + ledger.total("down", "paper")
    assert e.client_flops == pytest.approx(result.client_flops, rel=1e-12)
    assert e.server_flops == pytest.approx(result.server_flops, rel=1e-12)
    assert e.seconds == pytest.approx(result.virtual_seconds, rel=1e-9)
    assert e.clients is not None
    assert e.clients.total == pytest.approx(result.clients_joules, rel=1e-9)
    assert e.clients.marginal == pytest.approx(result.clients_marginal_joules, rel=1e-9)
    assert e.server_joules == pytest.approx(result.server_joules, rel=1e-9)


def simulated(run: Run) -> Any:
    """The innermost cohort, which is the engine's."""
    cohort: Any = run.training.clients
    while hasattr(cohort, "inner"):
        cohort = cohort.inner
    return cohort


def client_state(run: Run, client: int = 0) -> State:
    """The parameters of one client, under the names of the whole model."""
    return run.training.clients.model_state(client)


def server_state(run: Run) -> State:
    """The server's parameters, under the names of the whole model."""
    return run.training.server.state()["model"]


def whole(run: Run, client: int = 0) -> State:
    """The model of one client together with the server's."""
    return {**client_state(run, client), **server_state(run)}


class Stream:
    """The batches of one client."""

    def __init__(self, batches: Batches, client: int) -> None:
        self.batches, self.client = batches, client
        self.per_epoch = int(batches.per_epoch[client])

    def next(self) -> Tensor:
        """Indices [b] of the next batch."""
        return self.batches.draw([self.client])[0]


def batches_of(sizes: Sequence[int], batch: int, seed: int = 0) -> list[Stream]:
    """The batches of the clients when `source(sizes)` deals the rows."""
    starts = np.cumsum([0, *sizes])
    batches = Batches([np.arange(a, b) for a, b in itertools.pairwise(starts)], batch, seed)
    return [Stream(batches, k) for k in range(len(sizes))]


def sgd(
    model: nn.Module, data: Samples, batches: Iterable[Tensor], optimizer: torch.optim.Optimizer | None = None
) -> State:
    """Train centrally by hand, a step per batch of row indices, by default with SGD at rate 0.1; returns the state."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    for rows in batches:
        optimizer.zero_grad()
        functional.cross_entropy(model(data.x[rows]), data.y[rows]).backward()
        optimizer.step()
    return {k: v.detach() for k, v in model.state_dict().items()}


def by_hand(
    algorithm: str,
    model: nn.Module,
    at: str,
    data: Samples,
    rows: Sequence[np.ndarray],
    *,
    rounds: int = 1,
    batch: int = 4,
    same_batches: bool = False,
    **options: Any,
) -> tuple[list[State], State, list[Step]]:
    """Run an algorithm on parts cut by hand, without the checks of `Run`. Returns client states, server state, records.

    With `same_batches`, all clients draw batches in the order of client 0 (for clients that have the same rows).
    """
    own = RunConfig(algorithm=algorithm, **options).thing("algorithm", algorithm)
    parts = cut(model, at, data.x[:3])
    maker = make_optimizer("sgd", 0.1, {})
    import copy

    models = [(copy.deepcopy(parts.client), None) for _ in rows]
    clients = LocalCohort(
        Clients(models, data, rows, maker, lr=0.1, batch=batch, local_steps=options.get("local_steps"))
    )
    if same_batches:
        clients._batches.names = [0] * len(rows)
    server = Server(parts.server, maker, 0.1)
    steps = []
    for index in range(rounds):
        steps += list(own.round(server, clients, clients.begin_round(index, rounds, 1.0)))
    return [clients.model_state(k) for k in range(len(rows))], server.state()["model"], steps


def same(a: Any, b: Any) -> bool:
    """Whether two trees are equal, with tensors compared bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def difference(a: State, b: State) -> float:
    """Largest absolute difference of two states with the same names."""
    assert a.keys() == b.keys()
    return max(((a[k] - b[k]).abs().max().item() for k in a), default=0.0)


class Done(NamedTuple):
    """The result of a command line."""

    returncode: int
    stdout: str
    stderr: str


# An image of one white pixel.
POINT = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAG7buVgAAAABJRU5ErkJggg==")


def call(*argv: str, cwd: Path | None = None, code: int | None = 0, plots: bool = False) -> Done:
    """Run `cutlayer ARGV` in this process, in the folder `cwd`. It must end with `code`, unless that is None.

    Drawing the plots of a report takes longer than a small run, so they are drawn only if `plots` is true.

    As in a separate process, the command's streams are pipes, and it shows Python's usual warnings. It changes no
    settings that outlast the command, such as the allocator's or those of warnings.
    """
    for module in ("cutlayer.report.planned", "cutlayer.reproduce.plots"):
        importlib.import_module(module)  # these import `drawn` by name, and must not keep the replacement
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        if cwd is not None:
            stack.enter_context(contextlib.chdir(cwd))
        stack.enter_context(mock.patch.object(sys, "argv", ["cutlayer", *argv]))
        stack.enter_context(mock.patch.object(cli, "keep_memory"))
        if not plots:
            stack.enter_context(mock.patch("cutlayer.report.curves.drawn", return_value=POINT))
        stack.enter_context(warnings.catch_warnings())
        warnings.resetwarnings()
        for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", kind)
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            cli.main()
        except SystemExit as end:
            ended = end.code
        except BaseException:
            traceback.print_exc()
            ended = 1
    assert isinstance(ended, int)
    done = Done(ended, out.getvalue(), err.getvalue())
    assert "--debug" in argv or "Traceback" not in done.stderr, done.stderr
    assert code in (None, done.returncode), done.stderr
    return done
