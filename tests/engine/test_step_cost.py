"""Operations and copies of a step on the default engine; and no way is chosen that was measured as slower.

The counts do not depend on the machine. A change that makes a step cheaper should lower the bounds; one that raises a
bound should say why.
"""

from collections import Counter
from typing import Any

import pytest
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cutlayer import Run
from cutlayer.engine import choice
from cutlayer.engine.tuning import MARGIN, Timed, Tuner

COPIES = {"clone", "copy_", "_to_copy", "cat", "stack", "index_select", "index", "repeat"}


class Counted(TorchDispatchMode):
    """Counts the operations that compute something, and the bytes that copies write."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.copied = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        given = func(*args, **(kwargs or {}))
        if not func.is_view and name not in ("detach", "empty", "empty_like", "new_empty"):
            self.names[name] += 1
        if name in COPIES and isinstance(given, Tensor):
            self.copied += given.nbytes
        return given


def lenet(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """LeNet-5 for images of 8 x 8."""
    first = nn.Sequential(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2))
    second = nn.Sequential(nn.Conv2d(6, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(first, second, nn.Flatten(), nn.Linear(64, 84), nn.ReLU(), nn.Linear(84, classes))


def cost(model: Any, clients: int = 6, **options: Any) -> Counted:
    """Counts one step in the middle of a round."""
    cut = {"cut": "0"} if model is lenet else {}
    run = Run(
        algorithm="sglr", model=model, data="digits", clients=clients, samples_per_client=32, batch=8, test=20,
        validation=20, **cut, **options,
    )  # fmt: skip
    t = run.training
    steps = t.algorithm.round(t.server, t.clients, t.clients.begin_round(0, 1, 1.0))
    next(steps)
    with Counted() as counted:
        next(steps)
    return counted


@pytest.mark.parametrize(
    ("model", "optimizer", "operations", "copied"),
    [("mlp", "sgd", 76, 80), ("mlp", "adam", 90, 80), ("cnn", "sgd", 92, 290), (lenet, "sgd", 152, 120)],
)
def test_a_step_has_so_many_operations_and_copies(model: Any, optimizer: str, operations: int, copied: int) -> None:
    counted = cost(model, client_optimizer=optimizer)
    assert sum(counted.names.values()) <= operations, counted.names
    assert counted.copied <= copied * 1000


@pytest.mark.parametrize("model", ["mlp", "cnn", lenet])
@pytest.mark.parametrize("algorithm", ["sglr", "sflv1"])
def test_what_is_taken_is_no_slower_than_each_by_itself(
    algorithm: str, model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """By the tuner's own clock. The local engine computes with the plain layout and each client by itself."""
    monkeypatch.setenv("CUTLAYER_TUNE", "on")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choice, "_FEWEST", 0)
    monkeypatch.setattr(choice, "_SHORTEST", 0.0)
    monkeypatch.setattr(choice.Choice, "_budget", lambda self: 60.0)
    tried: dict[tuple[str, str, str], float] = {}
    real = Tuner.copies

    def copies(self: Tuner, part: nn.Module, *args: Any, data: bool) -> Timed:
        timed = real(self, part, *args, data=data)
        layout = next(name for (side, name), p in chooser[-1]._parts.items() if p is part)
        tried["clients" if data else "copies", layout, timed.how.way] = timed.seconds
        return timed

    chooser: list[choice.Choice] = []
    began = choice.Choice._quickest
    monkeypatch.setattr(Tuner, "copies", copies)
    monkeypatch.setattr(choice.Choice, "_quickest", lambda self, *a: (chooser.append(self), began(self, *a))[1])
    cut = {"cut": "0"} if model is lenet else {}
    ways = Run(
        algorithm=algorithm, model=model, data="digits", clients=6, samples_per_client=32, batch=8, test=20,
        validation=20, **cut,
    ).training.ways  # fmt: skip
    sides = {"clients": (ways.client_layout, ways.clients.way)}
    if algorithm == "sflv1":
        sides["copies"] = (ways.server_layout, ways.copies.way)
    taken = sum(tried[side, *how] for side, how in sides.items())
    plainly = sum(tried[side, "plain", "each"] for side in sides)
    if algorithm == "sflv1":  # otherwise the server's layout counts too
        assert taken <= plainly / MARGIN
    assert tried["clients", ways.client_layout, ways.clients.way] <= (
        tried["clients", ways.client_layout, "each"] / MARGIN
    )
