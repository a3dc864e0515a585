"""The stacked engine equals the local one: same batches and seeds, twenty steps; float64 to 1e-10, float32 to 1e-4."""

from __future__ import annotations

import warnings
from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import MODELS, ZOO, client_state, difference, make, mlp, server_state, simulated, source
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cutlayer import Run, Samples, Source
from cutlayer.engine.choice import Choice
from cutlayer.engine.stackable import stackable
from cutlayer.engine.ways import Stacking, Way
from cutlayer.errors import ConfigError, CutlayerWarning
from cutlayer.optim import make_optimizer

STACKED: list[tuple[str, dict[str, Any]]] = [
    ("fl", {"local_steps": 3}),
    ("fl", {"local_epochs": 2}),
    ("psl", {}),
    ("sfl", {"average_every": "step"}),
    ("sfl", {"average_every": "round"}),
    ("sflv1", {"local_epochs": 2}),
    ("sflv2", {}),
    ("sflv3", {}),
    ("slr", {"alpha": 0.5}),
    ("sgl", {"phi": 0.7, "average_over": "clients-and-rows"}),
    ("sglr", {"phi": 0.5}),
    ("sglr", {"phi": 1.0, "average_reduce": "sum"}),
]
LARGE = ("resnet16", "alexnet")
algorithms = pytest.mark.parametrize(("algorithm", "options"), STACKED, ids=[f"{a} {o}" for a, o in STACKED])


def both(steps: int, other: str = "stacked", **options: Any) -> tuple[Run, Run]:
    """Runs the same training on two engines for this number of steps, and compares their records."""
    runs = tuple(Run(engine=engine, **options) for engine in ("local", other.replace("union", "auto")))
    assert [run.training.engine for run in runs] == ["local", other]
    for (a, b), _ in zip(zip(*runs, strict=True), range(steps), strict=False):
        assert (a.clients, a.active, a.samples, a.bytes_up, a.bytes_down) == (
            b.clients, b.active, b.samples, b.bytes_up, b.bytes_down
        )  # fmt: skip
        assert a.loss == pytest.approx(b.loss, rel=1e-3, abs=1e-3)
    return runs[0], runs[1]


def worst(a: Run, b: Run) -> float:
    """Largest difference of all weights and buffers, relative to the largest value."""
    clients = range(len(a.training.clients.samples))
    pairs = [(client_state(a, k), client_state(b, k)) for k in clients] + [(server_state(a), server_state(b))]
    scale = max((v.abs().max().item() for x, _ in pairs for v in x.values()), default=1.0)
    return max(difference(x, y) for x, y in pairs) / max(scale, 1.0)


def small(**options: Any) -> dict[str, Any]:
    """Options of a small run on random features that is evaluated only at its end."""
    common = {"partition": "column", "precision": "float64", "batch": 4, "rounds": 8, "client_lr": 0.01}
    return {**common, "eval_every": 100, **options}


EQUAL, UNEQUAL = [8, 8, 8], [10, 5, 7, 1]
# Every model has unequal clients, which also cover what equal clients have. Two models, one for each way of stacking a
# layer, also have equal clients.
SIZED = [(*m[1:], UNEQUAL) for m in MODELS] + [(*m[1:], EQUAL) for m in MODELS if m[0] in ("mlp cut 2", "conv cut 2")]


@pytest.fixture(autouse=True)
def lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies are computed together wherever possible, even where computing each by itself is usually faster."""
    monkeypatch.setattr(Choice, "_usual", lambda self, side, layout: self._verdict(side, layout).ways[0])


def computed(monkeypatch: pytest.MonkeyPatch, way: Way, **how: Any) -> None:
    """Copies are computed in this way, with the options in `how`."""
    monkeypatch.setattr(Choice, "_usual", lambda *_: way)
    monkeypatch.setattr(Choice, "_stacking", lambda self, side, way: Stacking(way, **how))


@algorithms
@pytest.mark.parametrize(("model", "shape", "at", "sizes"), SIZED)
def test_small_models(
    algorithm: str, options: dict[str, Any], model: Any, shape: tuple[int, ...], at: str, sizes: list[int]
) -> None:
    cut = {} if algorithm == "fl" else {"cut": at}
    a, b = both(
        20,
        algorithm=algorithm,
        model=make(model),
        data=source(sizes, shape),
        clients=len(sizes),
        **small(**cut, **options),
    )
    assert worst(a, b) < 1e-10


def zoo(steps: int, algorithm: str, options: dict[str, Any], name: str) -> float:
    """Batch normalisation (with buffers) and dropout (with masks), default cuts, 3 of 4 clients in each round."""
    a, b = both(
        steps, algorithm=algorithm, model=name, data="digits", clients=4, samples_per_client=7, batch=3, rounds=7,
        participation=0.75, precision="float64", test=30, eval_every=100, **options,
    )  # fmt: skip
    return worst(a, b)


# All algorithms run on images with the cnn; one algorithm of each kind also runs with dropout and without convolutions.
# The tests of resnet16 are slow.
SOME = [case for case in STACKED if case[0] in ("psl", "sflv2", "sflv3") or case[1].get("local_steps")]
PLACES = [*((*c, "cnn", 10) for c in STACKED), *((*c, "alexnet", 4) for c in SOME), *((*c, "mlp", 10) for c in SOME)]


def test_the_zoo_is_looked_at() -> None:
    assert {name for *_, name, _ in PLACES} == {name for name in ZOO if name != "resnet16"}
    assert [algorithm for algorithm, _ in SOME] == ["fl", "psl", "sflv2", "sflv3"]


@pytest.mark.parametrize(("algorithm", "options", "name", "steps"), PLACES)
def test_zoo(algorithm: str, options: dict[str, Any], name: str, steps: int) -> None:
    assert zoo(steps, algorithm, options, name) < 1e-10


@pytest.mark.slow
@algorithms
@pytest.mark.parametrize("name", LARGE)
def test_twenty_steps_of_large_models(algorithm: str, options: dict[str, Any], name: str) -> None:
    assert zoo(20, algorithm, options, name) < 1e-10


@pytest.mark.parametrize(
    "optimizer", ["sgd", "adam", "adamw", "rmsprop", "adagrad", "adadelta", "adamax", "rprop", "radam"]
)
@pytest.mark.parametrize("algorithm", ["sglr", "fl", "sflv1"])
def test_optimizers(optimizer: str, algorithm: str) -> None:
    """Each client has its own optimiser state and clock: clients are unequal and sampled."""
    more: dict[str, Any] = {"sgd": {"momentum": 0.9, "weight_decay": 0.01}}.get(optimizer, {})
    cut = {} if algorithm == "fl" else {"cut": "2"}
    a, b = both(
        16, algorithm=algorithm, model=make(mlp), data=source([10, 5, 7, 9], (6,)), clients=4, participation=0.7,
        **small(client_optimizer=optimizer, client_optimizer_options=more, **cut),
    )  # fmt: skip
    assert worst(a, b) < 1e-10


@pytest.mark.parametrize(
    ("optimizer", "more"),
    [("sgd", {}), ("sgd", {"momentum": 0.9}), ("adam", {}), ("rmsprop", {}), ("adagrad", {}), ("radam", {})],
)
def test_a_clients_state_weighs_what_it_weighs_alone(optimizer: str, more: dict[str, Any]) -> None:
    """Model and optimiser, with its step counters, of clients that have taken different numbers of steps."""
    a, b = both(
        9, algorithm="sglr", model=make(mlp), data=source([10, 5, 7], (6,)), clients=3, cut="2",
        **small(client_optimizer=optimizer, client_optimizer_options=more),
    )  # fmt: skip
    alone, stacked = ([run.training.clients.footprint(k) for k in range(3)] for run in (a, b))
    assert stacked == alone
    assert (alone[0].optimizer > 0) == (optimizer != "sgd" or bool(more))


@pytest.mark.parametrize(("algorithm", "engine"), [("sflv3", "local"), ("sfl", "stacked")])
@pytest.mark.parametrize("side", ["client", "server"])
def test_a_rule_that_is_not_elementwise(algorithm: str, engine: str, side: str) -> None:
    """On the server, this matters only for copies, which are stacked."""
    options: dict[str, Any] = {f"{side}_optimizer": "adafactor"}
    if side == "client":
        options["server_optimizer"], engine = "adam", "local"
    warned = pytest.warns(CutlayerWarning, match="adafactor is not elementwise") if engine == "local" else nullcontext()
    with warned:
        run = Run(
            algorithm=algorithm, model=mlp(), data=source([8, 8], (6,)), clients=2, partition="column", cut="2",
            **options,
        )  # fmt: skip
    assert run.training.engine == engine


@pytest.mark.parametrize("algorithm", ["sglr", "fl", "sflv1"])
def test_gradient_ascent(algorithm: str) -> None:
    """Gradient descent with the opposite sign."""
    cut = {} if algorithm == "fl" else {"cut": "2"}
    a, b = both(
        6, algorithm=algorithm, model=make(mlp), data=source([10, 5, 7], (6,)), clients=3,
        **small(client_optimizer="sgd", client_optimizer_options={"maximize": True}, **cut),
    )  # fmt: skip
    assert worst(a, b) < 1e-10


class Twice(nn.Module):
    """One layer used twice, so the gradient of its weights has two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, 8] -> [n, 8]."""
        return self.inner(torch.tanh(self.inner(x)))


@pytest.mark.parametrize("algorithm", ["fl", "psl", "sfl", "sflv1", "sflv2", "sflv3", "sglr"])
def test_plain_descent_with_weight_decay(algorithm: str) -> None:
    """Weights decay once per step on both sides of the cut, strongly enough that forgetting it would show."""
    options: dict[str, Any] = {
        "algorithm": algorithm, "model": make(lambda: nn.Sequential(*with_layer(Twice()), nn.Tanh(), nn.Linear(4, 4))),
        "data": source([10, 5, 7], (6,)), "clients": 3, **({} if algorithm == "fl" else {"cut": "1"}),
    }  # fmt: skip
    decay = {"client_optimizer": "sgd", "client_optimizer_options": {"weight_decay": 0.5}}
    a, b = both(12, **options, **small(client_lr=0.1, **decay))
    assert worst(a, b) < 1e-10
    plain, _ = both(12, **options, **small(client_lr=0.1, client_optimizer="sgd"))
    assert difference(server_state(a), server_state(plain)) > 1e-2 or algorithm == "fl"
    assert difference(client_state(a), client_state(plain)) > 1e-2


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=2, max_size=5),
    batch=st.integers(1, 5),
    width=st.integers(1, 5),
    seed=st.integers(0, 3),
)
def test_random_shapes(sizes: list[int], batch: int, width: int, seed: int) -> None:
    net = nn.Sequential(nn.Linear(width, 5), nn.GroupNorm(1, 5), nn.ReLU(), nn.Dropout(0.3), nn.Linear(5, 4)).double()
    a, b = both(
        20, algorithm="sglr", model=net, cut="3", data=source(sizes, (width,)), clients=len(sizes),
        **small(batch=batch, seed=seed),
    )  # fmt: skip
    assert worst(a, b) < 1e-10


@pytest.mark.parametrize("algorithm", ["sglr", "fl", "sflv3"])
def test_float32(algorithm: str) -> None:
    a, b = both(
        20, algorithm=algorithm, model="cnn", data="digits", clients=5, samples_per_client=16, rounds=10, test=30
    )
    assert worst(a, b) < 1e-4


def test_independent_starts_and_scores() -> None:
    """Clients start from different models, and the evaluations agree client by client."""
    options: dict[str, Any] = {
        "algorithm": "psl",
        "model": mlp,
        "data": source([8, 8, 8], (6,)),
        "clients": 3,
        "cut": "2",
    }
    a, b = (Run(engine=e, start="independent", **options, **small()) for e in ("local", "stacked"))
    assert (a.run().test_score, a.evaluations[-1].test_score_worst) == (
        b.run().test_score,
        b.evaluations[-1].test_score_worst,
    )
    assert worst(a, b) < 1e-10


@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.parametrize(
    ("algorithm", "options"),
    [("fl", {"local_steps": 1}), ("sflv1", {"local_steps": 1}), ("sfl", {"average_every": "step"})],
)
@pytest.mark.parametrize("sizes", [[8, 8, 8], [10, 5, 7, 1]], ids=["equal", "unequal"])
def test_one_union_step(algorithm: str, options: dict[str, Any], name: str, sizes: list[int]) -> None:
    """One local step and then averaging equal one step on the union of the batches."""
    data = source(sizes, (1, 8, 8))
    a, b = both(
        20, other="union", algorithm=algorithm, model=name, data=data, clients=len(sizes), participation=0.75,
        **small(client_optimizer="sgd", client_optimizer_options={"weight_decay": 0.1}, rounds=20, **options),
    )  # fmt: skip
    assert worst(a, b) < 1e-10


@pytest.mark.parametrize(
    ("options", "engine"),
    [
        ({}, "union"),
        ({"local_steps": 2}, "stacked"),
        ({"client_optimizer": "adam"}, "stacked"),
        ({"client_optimizer_options": {"momentum": 0.9}}, "stacked"),
        ({"model": "alexnet"}, "stacked"),  # draws (dropout)
        ({"model": "resnet16"}, "stacked"),  # mixes rows (batch normalisation)
        ({"start": "independent"}, "stacked"),
        ({"engine": "stacked"}, "stacked"),
        ({"algorithm": "sfl", "average_every": "step"}, "union"),
        ({"algorithm": "sfl", "average_every": "round", "local_steps": 2}, "stacked"),
        ({"algorithm": "sflv1"}, "union"),
        ({"algorithm": "sflv1", "server_optimizer": "adam"}, "stacked"),
    ],
)
def test_a_union_step_only_where_it_is_exact(options: dict[str, Any], engine: str) -> None:
    base = {"algorithm": "fl", "model": "mlp", "client_optimizer": "sgd", "local_steps": 1, "clients": 3}
    assert Run(data="digits", samples_per_client=9, **{**base, **options}).training.engine == engine


@pytest.mark.long
@pytest.mark.parametrize(("algorithm", "options"), [("sglr", {"phi": 0.5}), ("sflv1", {"local_epochs": 2})])
def test_the_papers_model(algorithm: str, options: dict[str, Any]) -> None:
    assert zoo(4, algorithm, options, "resnet16") < 1e-10


@pytest.mark.parametrize("algorithm", ["sglr", "fl", "sflv1", "sflv3"])
@pytest.mark.parametrize("name", ["mlp", pytest.param("resnet16", marks=pytest.mark.slow)])
def test_a_single_client(algorithm: str, name: str) -> None:
    a, b = both(
        6, algorithm=algorithm, model=name, data="digits", clients=1, samples_per_client=9, batch=3, rounds=2,
        precision="float64", test=30, validation=30, eval_every=2,
    )  # fmt: skip
    assert worst(a, b) < 1e-10


@pytest.mark.parametrize("algorithm", ["sglr", "fl"])
def test_evaluating_some_clients(algorithm: str) -> None:
    """All engines evaluate the same clients, and each client has the same score as when all are evaluated."""
    options: dict[str, Any] = {
        "algorithm": algorithm, "model": "mlp", "data": "digits", "clients": 9, "samples_per_client": 9, "rounds": 3,
    }  # fmt: skip

    def scores(**more: Any) -> dict[int, float]:
        run = Run(**options, **more)
        run.run()
        t = run.training
        return dict(t.clients.evaluate(t.source.test, t.server.predict).each("accuracy"))

    everybody = scores()
    some, same = scores(eval_clients=4), scores(eval_clients=4, engine="local")
    assert len(everybody) == 9
    assert len(some) == 4
    assert some.items() <= everybody.items()
    assert some == same


class Everything(nn.Module):
    """All kinds of layers that are lowered, in the order of their rows' sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(4, 8, 3, padding=1, groups=2, bias=False), nn.GroupNorm(2, 8), nn.GELU(), nn.Dropout2d(0.2),
            nn.Conv2d(8, 40, (1, 3), stride=(1, 2), padding=(0, 2), dilation=(1, 2)), nn.AvgPool2d(2),
        )  # fmt: skip
        self.sequence = nn.Conv1d(40, 6, 1)
        self.norm = nn.LayerNorm(6)
        self.out = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, 2, 8, 8] -> [n, 4]."""
        y = self.sequence(self.conv(x).flatten(2))
        return self.out(self.norm(y.mean(2)))


@pytest.mark.parametrize("optimizer", [pytest.param("sgd", marks=pytest.mark.long), "adamw"])
@pytest.mark.parametrize("at", ["conv.0", "conv.5", "norm"])
@pytest.mark.parametrize("algorithm", ["sglr", "fl", "sflv1"])
def test_layers_of_all_kinds(algorithm: str, at: str, optimizer: str) -> None:
    cut = {} if algorithm == "fl" else {"cut": at}
    sizes = [9, 9, 6, 3]
    a, b = both(
        10, algorithm=algorithm, model=make(Everything), data=source(sizes, (2, 8, 8)), clients=4,
        **small(batch=3, rounds=9, client_optimizer=optimizer, **cut),
    )  # fmt: skip
    assert worst(a, b) < 1e-10
    assert simulated(b)._stack.way == "lowered"  # a layer that fails the proof would be computed in another, slower way


@pytest.mark.parametrize("algorithm", ["sglr", "fl", "sflv1"])
@pytest.mark.parametrize(
    ("way", "keep"),
    [("lowered", True), ("lowered", False), ("each", False)],
    ids=["kept", "run twice", "each, run twice"],
)
def test_in_groups_and_within_memory(algorithm: str, way: Way, keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clients at a time. Without memory for graphs, forward passes run twice, with the same masks and buffers."""
    computed(monkeypatch, way, chunk=2, keep=keep)
    cut = {} if algorithm == "fl" else {"cut": "conv.9"}
    a, b = both(
        8, algorithm=algorithm, model=make(Everything), data=source([9, 9, 6, 6, 3], (2, 8, 8)), clients=5,
        **small(batch=3, rounds=4, **cut),
    )  # fmt: skip
    assert worst(a, b) < 1e-10


@pytest.mark.long
@pytest.mark.parametrize("algorithm", ["sglr", "fl", "sflv1"])
def test_alexnet_in_groups_and_within_memory(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    computed(monkeypatch, "lowered", chunk=2, keep=False)
    few = {"partition": "iid", "samples_per_client": 7, "test": 30, "validation": 30, "eval_every": 4}
    options = {**small(batch=3, rounds=4), **few}
    a, b = both(8, algorithm=algorithm, model="alexnet", data="digits", clients=5, **options)
    assert worst(a, b) < 1e-10


def test_memory_limit_decides_what_is_kept() -> None:
    def how(limit: float) -> tuple[bool, int]:
        run = Run(
            algorithm="sglr", model="cnn", data="digits", clients=50, samples_per_client=9, memory_limit=limit,
            eval_every=100, rounds=1,
        )  # fmt: skip
        cohort = simulated(run)
        run.run()
        return cohort._keep, cohort._stack.chunk

    assert how(1.0) == (True, 50)
    keep, chunk = how(0.001)
    assert (keep, chunk < 10) == (False, True)


def test_bfloat16_is_near_float32() -> None:
    """With mixed precision, half of the bytes cross, and losses agree to two digits on all engines."""
    base: dict[str, Any] = {
        "algorithm": "sglr", "model": "mlp", "data": "digits", "clients": 4, "samples_per_client": 40, "rounds": 4,
        "client_optimizer": "sgd", "client_lr": 0.05,
    }  # fmt: skip
    runs = {
        (engine, precision): Run(engine=engine, precision=precision, **base)
        for engine in ("local", "stacked")
        for precision in ("float32", "bfloat16")
    }
    losses = {name: torch.tensor([r.loss for r in run]) for name, run in runs.items()}
    exact = losses["local", "float32"]
    for name, found in losses.items():
        assert torch.allclose(found, exact, rtol=1e-5 if name[1] == "float32" else 3e-2), name
    assert not torch.equal(losses["stacked", "bfloat16"], losses["stacked", "float32"])
    sent = {p: runs["stacked", p].training.ledger.total("up", kind="smashed data") for p in ("float32", "bfloat16")}
    assert sent["float32"] == 2 * sent["bfloat16"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"device": "cuda:7"}, "device = 'cuda:7' cannot be used here"),
        ({"device": "abacus"}, "device = 'abacus' cannot be used here"),
        ({"precision": "tf32"}, "precision = 'tf32' works only with CUDA"),
    ],
)
def test_devices_and_precisions_that_are_not_there(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Run(model="mlp", data="digits", **options)


class Counted(TorchDispatchMode):
    """Counts the operations that reach the device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def operations(clients: int, **options: Any) -> Counter[str]:
    """The operations of one step in the middle of a round."""
    run = Run(data="digits", engine="stacked", clients=clients, samples_per_client=16, batch=4, test=30, **options)
    t = run.training
    this = t.clients.begin_round(0, 1, 1.0)
    steps = t.algorithm.round(t.server, t.clients, this)
    next(steps)
    with Counted() as counted:
        next(steps)
    return counted.names


@pytest.mark.parametrize("model", ["mlp", "cnn"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(("algorithm", "options"), [("psl", {}), ("sglr", {}), ("sfl", {"average_every": "step"})])
def test_the_number_of_operations_does_not_depend_on_the_number_of_clients(
    algorithm: str, options: dict[str, Any], model: str, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Do not count the operations that read ahead or compute in blocks to make use of the cache.
    for size in ("kernels._NEAR", "descent._BLOCK"):
        monkeypatch.setattr(f"cutlayer.engine.{size}", 1 << 40)
    few, many = (
        operations(c, algorithm=algorithm, model=model, client_optimizer=optimizer, **options) for c in (4, 60)
    )
    assert few == many
    assert sum(few.values()) < 300


@pytest.mark.parametrize("model", ["mlp", "cnn"])
@pytest.mark.parametrize("algorithm", ["psl", "sglr", "sflv1"])
def test_no_step_waits_for_the_device(algorithm: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An accelerator would have to stop for operations that read a number or ask for positions.

    On the CPU, the checks for NaN do read numbers. They are left out here, as they are on an accelerator.
    """
    monkeypatch.setattr("cutlayer.server.finite", lambda *_: True)
    monkeypatch.setattr("cutlayer.engine.stacked.finite", lambda *_: True)
    monkeypatch.setattr("cutlayer.engine.stacked.check_weights", lambda *_: None)
    counted = operations(6, algorithm=algorithm, model=model)
    assert not {"_local_scalar_dense", "nonzero", "is_nonzero", "_unique2", "equal"} & set(counted)


class Mixing(nn.Module):
    """Subtracts the mean over rows: stacking it gives no error, but wrong results."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, d] -> [n, d]."""
        return x - x.mean(0)


class Gate(nn.Module):
    """Uses a parameter directly."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, 8] -> [n, 8]."""
        return x * self.gate


class Branch(nn.Module):
    """Takes different branches for different values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, 8] -> [n, 8]."""
        return x * 2 if x.detach().sum() > 0 else x


class Replacing(nn.Module):
    """Replaces its buffer by a new one in each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, 8] -> [n, 8]."""
        self.seen = self.seen + x.detach().mean()
        return x + self.seen


def shared_norm() -> nn.Module:
    """One normalisation that is used twice."""
    norm = nn.BatchNorm1d(8, affine=False)
    return nn.Sequential(norm, nn.Linear(8, 8), norm)


def with_layer(layer: nn.Module) -> nn.Module:
    """Features [n, 6] -> scores [n, 4], with the layer on the client's side."""
    return nn.Sequential(nn.Linear(6, 8), layer, nn.Linear(8, 4))


@pytest.mark.parametrize("layer", [Mixing(), Gate()])
def test_what_is_not_lowered_is_mapped(layer: nn.Module) -> None:
    """Parameters used directly, and operations that mix rows: vmap keeps the clients apart."""
    a, b = both(
        20, algorithm="sglr", model=with_layer(layer).double(), cut="1", data=source([8, 8, 8], (6,)), clients=3,
        **small(client_optimizer="sgd"),
    )  # fmt: skip
    assert simulated(b)._stack.way == "mapped"
    assert worst(a, b) < 1e-10


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Replacing(), "Replacing '1.layer' uses its 'seen' in 'add'"),
        (shared_norm(), "client part cannot be stacked: it has tied weights"),
    ],
)
def test_what_cannot_be_stacked_runs_locally_and_says_why(layer: nn.Module, reason: str) -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layer(x)
            return y[0] if isinstance(y, tuple) else y

    with pytest.warns(CutlayerWarning, match=reason):
        run = Run(
            algorithm="psl", model=with_layer(First()), data=source([4, 4], (6,)), cut="1", clients=2,
            partition="column", rounds=1,
        )  # fmt: skip
    assert run.training.engine == "local"
    assert run.run().engine == "local"


@pytest.mark.parametrize("algorithm", ["ssl", "cl"])
def test_turns_are_local_without_a_warning(algorithm: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = Run(algorithm=algorithm, data="digits", model="mlp", clients=3, samples_per_client=9)
    assert run.training.engine == "local"


def test_automatic_choice_is_stacked() -> None:
    run = Run(algorithm="sglr", data="digits", model="cnn", clients=3, samples_per_client=9)
    assert run.training.engine == "stacked"


class Flattened(nn.Module):
    """Relies on the memory layout of the convolution's output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.out = nn.Conv2d(1, 8, 3, padding=1), nn.MaxPool2d(2), nn.Linear(8 * 16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, 1, 8, 8] -> [n, 10]."""
        x = self.pool(nn.functional.relu(self.conv(x)))
        return self.out(x.view(x.size(0), -1))


@pytest.mark.parametrize("algorithm", ["sglr", "ssl", "sflv3", "fl"])
@pytest.mark.parametrize("cut", ["conv", "pool"])
def test_views_behind_the_cut(algorithm: str, cut: str) -> None:
    """The layout that is fast on the CPU is chosen only if both parts can use it."""
    options: dict[str, Any] = {"clients": 3, "samples_per_client": 9, "rounds": 2, "data": "digits"}
    if algorithm != "fl":
        options["cut"] = cut
    torch.manual_seed(0)
    net = Flattened()
    a, b = (Run(algorithm=algorithm, model=net, engine=e, **options) for e in ("local", "auto"))
    a.run()
    b.run()
    assert worst(a, b) < 1e-4


class Temperature(nn.Module):
    """A parameter and a buffer that are scalars."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("shift", torch.tensor(0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, 8] -> [n, 8]."""
        return x * self.scale.exp() + self.shift


class Unsaved(nn.Module):
    """A running mean that is in no checkpoint and no averaging."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, 8] -> [n, 8]."""
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return x - self.mean


@pytest.mark.parametrize("layer", [Temperature(), Unsaved(), nn.BatchNorm1d(8)])
@pytest.mark.parametrize("algorithm", ["fl", "sfl", "sflv1", "sglr"])
def test_small_things_are_averaged_too(layer: nn.Module, algorithm: str) -> None:
    cut = {} if algorithm == "fl" else {"cut": "1"}
    a, b = both(
        20, algorithm=algorithm, model=with_layer(layer).double(), data=source([8, 8, 8], (6,)), clients=3,
        **small(client_optimizer="sgd", rounds=12, **cut),
    )  # fmt: skip
    assert worst(a, b) < 1e-10


@pytest.mark.parametrize("padding", [None, 0, 2, 7])
def test_padding_of_an_embedding_is_not_trained(padding: int | None) -> None:
    """Also if the first rows, which the proof uses, contain no padding."""
    numbers = torch.Generator().manual_seed(0)
    x = torch.randint(0, 10, (24, 5), generator=numbers)
    x[:3] = torch.tensor([[3, 4, 5, 6, 8]])
    y = torch.arange(24) % 4
    held_out = Samples(x[:12], y[:12])
    data = Source("tokens", Samples(x, y), held_out, held_out, tuple("0123"), torch.arange(24) // 8)
    net = nn.Sequential(nn.Embedding(10, 8, padding_idx=padding), nn.Flatten(), nn.Linear(40, 4)).double()
    a, b = both(
        20, algorithm="psl", model=net, data=data, cut="1", clients=3, **small(client_optimizer="sgd", client_lr=0.5)
    )
    assert worst(a, b) < 1e-10
    assert simulated(b)._stack.way == "lowered"


class DropPath(nn.Module):
    """Rarely drops rows, by random numbers that it draws itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, 8] -> [n, 8]."""
        return x * x.new_empty((len(x), 1)).bernoulli_(0.98) if self.training else x


class Evaluated(nn.Module):
    """Mixes rows in evaluation only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, 8] -> [n, 8]."""
        return x if self.training else x - x.mean()


class Judged(nn.Module):
    """Depends on values in evaluation only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, 8] -> [n, 8]."""
        return x * 2 if not self.training and x.abs().max() > 100 else x


class Last(nn.Module):
    """The outputs of a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.sequence = nn.LSTM(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, 8] -> [n, 8]."""
        return self.sequence(x.unsqueeze(0))[0].squeeze(0)


@pytest.mark.parametrize("layer", [Branch(), DropPath(), Judged(), Last(), nn.Dropout(0.4), nn.BatchNorm1d(8)])
@pytest.mark.parametrize("algorithm", ["sglr", "sflv1", "fl"])
def test_each_by_itself(algorithm: str, layer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also layers that draw random numbers, depend on values or have their own kernels."""
    computed(monkeypatch, "each")
    cut = {} if algorithm == "fl" else {"cut": "1"}
    a, b = both(
        12, algorithm=algorithm, model=with_layer(layer).double(), data=source([8, 6, 8], (6,)), clients=3,
        **small(client_optimizer="sgd", client_optimizer_options={"momentum": 0.9}, rounds=4, **cut),
    )  # fmt: skip
    assert simulated(b)._stack.way == "each"
    assert worst(a, b) < 1e-10


@pytest.mark.parametrize("layer", [Branch(), DropPath(), Judged(), Last()])
def test_what_cannot_be_computed_together_is_computed_each_by_itself(layer: nn.Module) -> None:
    run = Run(
        algorithm="psl", model=with_layer(layer), data=source([8, 8], (6,)), cut="1", clients=2, partition="column"
    )
    assert run.training.ways.clients.way == "each"


@pytest.mark.parametrize("optimizer", ["adam", "adagrad", "rprop", "sgd"])
def test_clients_weigh_what_they_weigh_alone(optimizer: str) -> None:
    """Models, gradients and optimisers. The engine keeps the clock of the optimisers only once for all clients."""
    a, b = both(
        3, algorithm="sglr", model=with_layer(nn.BatchNorm1d(8)).double(), data=source([8, 8, 8], (6,)), cut="1",
        clients=3, **small(client_optimizer=optimizer),
    )  # fmt: skip
    for client in range(3):
        assert simulated(a).footprint(client) == simulated(b).footprint(client)


@pytest.mark.parametrize("special", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_what_makes_an_embedding_special_is_kept(special: dict[str, Any]) -> None:
    """An embedding with a norm changes its weights in place, which works only with one module per client."""
    x = torch.arange(48).view(16, 3) % 7
    y = torch.arange(16) % 4
    held_out = Samples(x, y)
    data = Source("t", held_out, held_out, held_out, tuple("0123"), torch.arange(16) // 8)
    net = nn.Sequential(nn.Embedding(7, 4, **special), nn.Flatten(), nn.Linear(12, 4)).double()
    options: dict[str, Any] = {"algorithm": "fl", "model": net, "data": data, "clients": 2, **small()}
    if "max_norm" in special:
        with pytest.warns(CutlayerWarning, match="it has an embedding with norms, frequencies"):
            assert Run(**options).training.engine == "local"
        return
    a, b = (Run(engine=engine, **options) for engine in ("local", "stacked"))
    a.run()
    b.run()
    assert worst(a, b) < 1e-10
    found = stackable(net, (x[:4],), make_optimizer("sgd", 0.1, {}), data=True)
    assert found.unlowered == "it has an embedding with norms, frequencies or sparse gradients"  # found out at once


def test_rows_mixed_in_evaluation_alone() -> None:
    options: dict[str, Any] = {"algorithm": "psl", "cut": "1", "clients": 2, "data": source([8, 8], (6,)), **small()}
    net = with_layer(Evaluated()).double()
    a, b = (Run(model=net, engine=engine, **options) for engine in ("local", "stacked"))
    a.run()
    b.run()
    assert a.evaluations[-1].test_loss == pytest.approx(b.evaluations[-1].test_loss, rel=1e-12)


def test_a_union_step_is_refused_to_whatever_draws() -> None:
    """However rarely the model drops values, and whatever the caller's random state is."""
    net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.001), nn.Linear(8, 4))
    engines = set()
    for seed in range(8):
        torch.manual_seed(seed)
        run = Run(
            algorithm="fl", model=net, data=source([8, 8], (6,)), clients=2, partition="column", local_steps=1,
            client_optimizer="sgd",
        )  # fmt: skip
        engines.add(run.training.engine)
    assert engines == {"stacked"}


class Counting(nn.Module):
    """Counts the rows that it has seen, and returns them unchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, 8] -> [n, 8]."""
        if self.training:
            self.seen += len(x)
        return x


def test_a_union_step_is_refused_to_what_keeps_something() -> None:
    """Each client counts its own rows, not the rows of all clients."""
    run = Run(
        algorithm="fl", model=with_layer(Counting()), data=source([8, 4], (6,)), clients=2, partition="column",
        batch=8, local_steps=1, rounds=1, client_optimizer="sgd",
    )  # fmt: skip
    assert run.training.engine == "stacked"
    run.run()
    (seen,) = (value for name, value in client_state(run).items() if name.endswith("seen"))
    assert float(seen) == pytest.approx((8 * 8 + 4 * 4) / 12)  # averaged like the weights


@pytest.mark.parametrize("model", ["mlp", "cnn", "resnet16", "alexnet"])
def test_the_zoo_is_lowered(model: str) -> None:
    run = Run(algorithm="sglr", model=model, data="digits", clients=3, samples_per_client=9)
    assert run.training.engine == "stacked"
    assert simulated(run)._stack.way == "lowered"


def test_complex_buffers_stay_complex() -> None:
    net = nn.Sequential(nn.Linear(6, 4))
    net.register_buffer("angles", torch.ones(3, dtype=torch.complex64))
    run = Run(algorithm="fl", model=net, data=source([4, 4], (6,)), clients=2, partition="column")
    assert run.training.clients.model_state(0)["angles"].is_complex()
