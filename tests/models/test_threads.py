"""Clients that are built and train in threads of one process do not disturb each other."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cutlayer.options import RunConfig
from cutlayer.remote.sides import worker_of
from cutlayer.seeds import torch_seeded

CONFIG = RunConfig.of(
    {
        "algorithm": "psl",
        "data": "digits",
        "model": "mlp",
        "clients": 3,
        "samples_per_client": 20,
        "start": "independent",
    }
)


@pytest.fixture(autouse=True)
def _restless() -> Iterator[None]:
    """Lets Python switch threads as often as possible."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def at_once(*functions: Callable[[], Any]) -> list[Any]:
    """The results of the functions, each called in its own thread, or the errors that they raised."""
    found: list[Any] = [None] * len(functions)
    together = threading.Barrier(len(functions))

    def work(number: int) -> None:
        together.wait()
        try:
            found[number] = functions[number]()
        except BaseException as error:
            found[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def weights(client: int) -> dict[str, Tensor]:
    return dict(worker_of(CONFIG, client, name=f"client-{client}").client.module.state_dict())


def test_clients_are_built_at_once() -> None:
    """Each client gets the same weights as if it were built alone."""
    alone = [weights(k) for k in range(3)]
    for found, expected in zip(at_once(*(lambda k=k: weights(k) for k in range(3))), alone, strict=True):  # type: ignore[misc]
        assert isinstance(found, dict), found
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_model_runs_while_another_is_cut() -> None:
    """torch.fx changes how all modules are called while it traces. A model in another thread must not notice."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.ones(3, 4)
    expected = model(x)
    over = threading.Event()

    def build() -> dict[str, Tensor]:
        try:
            return weights(0)
        finally:
            over.set()

    def train() -> int:
        count = 0
        while not over.is_set() or not count:
            assert torch.equal(model(x), expected)
            count += 1
        return count

    built, count = at_once(build, train)
    assert isinstance(built, dict), built
    assert isinstance(count, int), count


def test_each_draws_its_own_numbers() -> None:
    def draw(name: str) -> list[float]:
        found = []
        for step in range(50):
            with torch_seeded(0, name, step):
                found += [torch.rand(1).item() for _ in range(5)]
        return found

    alone = [draw("a"), draw("b")]
    assert at_once(lambda: draw("a"), lambda: draw("b")) == alone
