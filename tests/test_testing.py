"""The public checks: all built-in things pass them, and each check catches broken ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from own import Careless, Grid, Shrink
from pydantic import PrivateAttr
from support import ALGORITHMS, conv
from torch import Tensor, nn

from cutlayer import plugins
from cutlayer.algorithms import Algorithm, algorithm
from cutlayer.algorithms.common import report, sample_weights
from cutlayer.algorithms.parallel import Psl
from cutlayer.algorithms.sglr import Sglr
from cutlayer.data.partitions import Partition, partition_scheme
from cutlayer.defences import Defence, defence
from cutlayer.errors import ConfigError
from cutlayer.gradients import own
from cutlayer.options import RunConfig
from cutlayer.plugins import option
from cutlayer.server import Server
from cutlayer.testing import (
    ENGINES,
    check_algorithm,
    check_codec,
    check_defence,
    check_engine,
    check_model,
    check_partition,
    random_source,
    train_in_memory,
)
from cutlayer.traffic import Epoch, Traffic
from cutlayer.types import CutGradients, Round, Rows, Step
from cutlayer.verbs import AVERAGE, BACKWARD, FORWARD
from cutlayer.wire import Codec, codec

# Options with which algorithms behave differently than by default.
OTHERWISE: list[tuple[str, dict[str, Any]]] = [
    ("fl", {"local_steps": 1}),
    ("ssl", {"hand_over": "batch", "hand_over_optimizer": True, "visit_order": "random"}),
    ("sgl", {"phi": 1.0, "average_over": "clients-and-rows"}),
    ("sflv1", {"local_steps": 1}),
    ("cse-fsl", {"upload_every": 1, "local_epochs": 2}),
    ("fsl-sage", {"upload_every": 2, "align_every": 2, "align_scale": "mean"}),
]


# With one client, these adjust scores, answer after the server has trained, or receive no gradients.
NOT_SGD = {"scala", "gscala", "gas", "cyclepsl", "cyclesfl", "cyclesglr", "cse-fsl", "fsl-sage", "ampere"}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithms(name: str) -> None:
    """One client is centralised gradient descent only if clients receive their own gradients."""
    # The models of the check cannot train on the single rows of global sampling.
    own = {"sampling": "fixed"} if "sampling" in plugins.index("algorithm")[name].facts["presets"] else {}
    check_algorithm(name, one_client_is_sgd=name not in NOT_SGD, **own)


@pytest.mark.parametrize(("name", "options"), OTHERWISE)
def test_algorithms_with_options(name: str, options: dict[str, Any]) -> None:
    # A gradient that is shared by all rows is not gradient descent.
    check_algorithm(name, one_client_is_sgd="average_over" not in options and name not in NOT_SGD, **options)


def test_a_configured_object() -> None:
    check_algorithm(Sglr(phi=0.0, alpha=0.5))


@pytest.mark.parametrize("name", ["union"])
def test_engines(name: str) -> None:
    """`check_algorithm` compares the other engines."""
    assert name in ENGINES
    check_engine(name)


@pytest.mark.parametrize("name", [*plugins.index("codec"), Grid])
def test_codecs(name: Any) -> None:
    check_codec({"top-k": "top-k:0.3", "rand-top-k": "rand-top-k:0.3:0.4"}.get(name, name))


@pytest.mark.parametrize("name", [*plugins.index("partition")])
def test_partitions(name: str) -> None:
    check_partition(name)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("noise", {"clip": 0.5, "gaussian_noise": 0.2}),
        ("noise", {"clip": 0.5, "laplace_noise": 0.2}),
        ("feature-dropout", {"feature_dropout": 0.4}),
        ("nopeek", {"nopeek": 0.5}),
        (Shrink, {}),
    ],
)
def test_defences(name: Any, options: dict[str, Any]) -> None:
    check_defence(name, **options)


@pytest.mark.parametrize(
    ("name", "shape", "more"),
    [
        ("mlp", (1, 3, 3), {}),
        ("cnn", (1, 8, 8), {}),
        ("alexnet", (1, 8, 8), {"cuts": ["block1"], "stacked": False}),
        ("resnet16", (1, 8, 8), {"cuts": ["block4"], "stacked": False}),
        (conv, (1, 6, 6), {}),
    ],
)
def test_models(name: Any, shape: tuple[int, ...], more: dict[str, Any]) -> None:
    check_model(name, shape, 4, **more)


def test_training_in_memory() -> None:
    options = {"algorithm": "psl", "clients": 2, "partition": "column", "rounds": 2, "cut": "0"}
    run = train_in_memory(RunConfig.of(options), model=conv(), data=random_source((5, 6), (1, 6, 6)))
    assert run.result is not None
    assert run.result.engine == "remote"


# Broken things


def psl(clients: Any, server: Server, scale: float = 1.0) -> Iterator[Step]:
    while smashed := clients.forward():
        step = server.step(smashed)
        down = own(step.gradient, smashed)
        clients.backward(CutGradients(tuple(scale * g for g in down.own), down.clients, down.sizes))
        yield report(step, smashed)


@algorithm("undeclared", title="Undeclared", needs={FORWARD, BACKWARD})
class Undeclared(Algorithm):
    """Averages without declaring it."""

    def round(self, server: Server, clients: Any, this: Round) -> Iterator[Step]:
        yield from psl(clients, server)
        clients.average(sample_weights(clients, this.clients))


@algorithm("idle", title="Idle", needs={FORWARD, BACKWARD, AVERAGE})
class Idle(Algorithm):
    """Declares that it averages, but does not."""

    def round(self, server: Server, clients: Any, this: Round) -> Iterator[Step]:
        yield from psl(clients, server)


@algorithm("curious", title="Curious", needs={FORWARD, BACKWARD})
class Curious(Algorithm):
    """Accesses the clients' models past the seam."""

    def round(self, server: Server, clients: Any, this: Round) -> Iterator[Step]:
        yield from psl(clients, server)
        clients.model_state(0)


@algorithm("remembering", title="Remembering", needs={FORWARD, BACKWARD})
class Remembering(Algorithm):
    """Its rate depends on the number of earlier rounds."""

    _rounds: int = PrivateAttr(0)

    def round(self, server: Server, clients: Any, this: Round) -> Iterator[Step]:
        yield from psl(clients, server, scale=1 / (1 + self._rounds))
        self._rounds += 1


@algorithm("doubling", title="Doubling", needs={FORWARD, BACKWARD})
class Doubling(Algorithm):
    """Sends twice the gradient."""

    def round(self, server: Server, clients: Any, this: Round) -> Iterator[Step]:
        yield from psl(clients, server, scale=2.0)


@algorithm("restless", title="Restless", needs={FORWARD, BACKWARD})
class Restless(Algorithm):
    """Each run differs from the others."""

    runs: ClassVar[Iterator[int]] = count()

    def round(self, server: Server, clients: Any, this: Round) -> Iterator[Step]:
        yield from psl(clients, server, scale=1.0 + next(self.runs))


class Bare(Algorithm):
    """Not registered."""


class Planned(Psl):
    """PSL with a statement of its traffic."""

    def traffic(self, epoch: Epoch) -> Traffic:
        return self.said

    said: ClassVar[Traffic]


@algorithm("boasting", title="Boasting", needs={FORWARD, BACKWARD})
class Boasting(Planned):
    """States that gradients are not sent."""

    said = Traffic("steps", gradients=False)


@algorithm("hiding", title="Hiding", needs={FORWARD, BACKWARD})
class Hiding(Planned):
    """States that labels are not sent."""

    said = Traffic("steps", labels=False)


@algorithm("slow", title="Slow", needs={FORWARD, BACKWARD})
class Slow(Planned):
    """States that the server trains twice on every sample."""

    said = Traffic("steps", server_passes=2.0)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (Undeclared, ["Undeclared", "uses 'average'", "needs do not name"]),
        (Idle, ["'average'", "does not use"]),
        (Curious, ["'model_state'", "not a verb"]),
        (Remembering, ["interrupted and resumed", "other records", "largest difference is"]),
        (Doubling, ["one client", "step 1", "largest difference is"]),
        (Restless, ["the stacked engine comes to other losses", "largest difference is"]),
        (Boasting, ["states 0 bytes down in 2 epochs"]),
        (Hiding, ["bytes up"]),
        (Slow, ["states 80 rows that go through the server's part", "40"]),
    ],
)
def test_broken_algorithms(broken: type[Algorithm], words: list[str]) -> None:
    with pytest.raises(AssertionError) as error:
        check_algorithm(broken)
    for word in words:
        assert word in str(error.value)


def test_an_algorithm_need_not_be_gradient_descent() -> None:
    check_algorithm(Doubling, one_client_is_sgd=False)


def test_bytes_past_the_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cutlayer.costs.ledger.Ledger.add", lambda *_: None)
    with pytest.raises(AssertionError, match="bytes of tensors went up, the ledger has counted 0"):
        check_algorithm("psl")


def test_what_cannot_be_checked() -> None:
    with pytest.raises(ConfigError, match=r"'psll'.*did you mean 'psl'"):
        check_algorithm("psll")
    with pytest.raises(ConfigError, match=r"phi = 0.5 has no effect on psl"):
        check_algorithm("psl", phi=0.5)
    with pytest.raises(ConfigError, match="not registered"):
        check_algorithm(Bare)
    with pytest.raises(ConfigError, match="'lokal'"):
        check_engine("lokal")
    with pytest.raises(ConfigError, match="no effect with these options"):
        check_defence("noise")


@codec("shy")
class Shy(Codec):
    """bfloat16 with a bound that is too small."""

    def size(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        return 2 * int(np.prod(shape))

    def write(self, x: Tensor) -> list[Tensor]:
        return [x.bfloat16()]

    def read(self, payload: memoryview, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.frombuffer(bytearray(payload), dtype=torch.bfloat16).view(tuple(shape)).to(dtype)

    def bound(self, x: Tensor) -> Tensor:
        return x.double().abs() / 2**12


@codec("deaf")
class Deaf(Shy):
    """Loses NaN."""

    def write(self, x: Tensor) -> list[Tensor]:
        return super().write(x.nan_to_num(0.0, 0.0, 0.0).clamp(-3e38, 3e38))

    def bound(self, x: Tensor) -> Tensor:
        return x.double().abs() / 2**7 + 1e-37


@codec("sociable")
class Sociable(Codec):
    """Claims to write rows independently, but writes a single row differently."""

    def row_by_row(self, dimensions: int) -> bool:
        return True

    def size(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        return 8 * int(np.prod(shape))

    def write(self, x: Tensor) -> list[Tensor]:
        return [x.double() * (1.0 if len(x) > 1 else 0.99)]

    def read(self, payload: memoryview, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.frombuffer(bytearray(payload), dtype=torch.float64).view(tuple(shape)).to(dtype)

    def bound(self, x: Tensor) -> Tensor:
        return x.double().abs() / 50 + 1e-5


@pytest.mark.parametrize(
    ("broken", "words"),
    [(Careless, "its size says"), (Shy, "its bound says"), (Deaf, "nan is lost"), (Sociable, "by themselves")],
)
def test_broken_codecs(broken: Any, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        check_codec(broken)


class Wide(nn.Module):
    """Returns one number too many."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 5), nn.Linear(5, classes + 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x))


def tied() -> nn.Module:
    twice = nn.Linear(6, 6)
    return nn.Sequential(twice, nn.Tanh(), twice, nn.Linear(6, 4))


@pytest.mark.filterwarnings("ignore:.*runs on the local engine")
@pytest.mark.parametrize(
    ("broken", "more", "words"),
    [
        (Wide, {}, r"gives \(4, 5\) for 4 samples"),
        (conv, {"cuts": ["9"]}, "unknown module '9'"),
        (tied, {"cuts": ["2"]}, "cannot be trained all at once"),
    ],
)
def test_broken_models(broken: Any, more: dict[str, Any], words: str) -> None:
    shape = (1, 6, 6) if broken is conv else (6,)
    with pytest.raises(AssertionError, match=words):
        check_model(broken, shape, 4, **more)


@partition_scheme("forgetful", title="Forgetful", summary="leaves a row over")
class Forgetful(Partition):
    """Leaves out one row."""

    def deal(self, labels: Any, order: Any, clients: int, seed: int, owners: Any) -> Any:
        return np.array_split(order[1:], clients)


@partition_scheme("fickle", title="Fickle", summary="deals otherwise each time")
class Fickle(Partition):
    """Deals differently each time."""

    turns: ClassVar[Iterator[int]] = count()

    def deal(self, labels: Any, order: Any, clients: int, seed: int, owners: Any) -> Any:
        return np.array_split(np.roll(order, next(self.turns)), clients)


@pytest.mark.parametrize(("broken", "words"), [(Forgetful, "leaves 1 of 120"), (Fickle, "same seed")])
def test_broken_partitions(broken: Any, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        check_partition(broken)


@defence("shared", title="Shared")
class Shared(Defence):
    """Uses the first client's generator for all clients."""

    def protect(self, rows: Rows, sizes: Sequence[int], draws: Sequence[torch.Generator]) -> Rows:
        return tuple(r + torch.rand(r.shape, generator=draws[0]).to(r) for r in rows)


@defence("stopped", title="Stopped")
class Stopped(Defence):
    """Halves the rows, but not the gradient."""

    part: float = option(0.5)

    def protect(self, rows: Rows, sizes: Sequence[int], draws: Sequence[torch.Generator]) -> Rows:
        return tuple(r - self.part * r.detach() for r in rows)


@pytest.mark.parametrize(("broken", "words"), [(Shared, "protected otherwise"), (Stopped, "not the derivative")])
def test_broken_defences(broken: Any, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        check_defence(broken)


def test_what_is_derived_is_another_thing() -> None:
    """A derived class is not confused with its base class and must be registered itself."""

    class Louder(Psl):
        volume: int = option(3)

    reference, values = plugins.adopt("algorithm", Louder(volume=4))
    assert values == {"volume": 4}
    assert plugins.load("algorithm", reference) is Louder
    with pytest.raises(ConfigError, match="not registered"):
        plugins.find("algorithm", reference)
    assert plugins.adopt("algorithm", Psl) == ("psl", {})
