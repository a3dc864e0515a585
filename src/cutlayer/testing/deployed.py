"""Training with the clients of a deployment in this process, over frames in memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor

from cutlayer.build import Data, Model
from cutlayer.engine.local import named_as_whole
from cutlayer.errors import RefusedError
from cutlayer.options import RunConfig
from cutlayer.remote.far import RemoteCohort
from cutlayer.remote.sides import Greet, client_name, remote_training, worker_of
from cutlayer.remote.transports.memory import MemoryCarrier
from cutlayer.remote.worker import Worker
from cutlayer.run import Run

C = TypeVar("C", bound=MemoryCarrier)


@dataclass(frozen=True)
class InMemory(Generic[C]):
    """A run with its clients in one process. The `carrier` passes requests to `workers`; `greet` admits a client."""

    run: Run
    carrier: C
    workers: Mapping[int, Worker]
    cohort: RemoteCohort
    greet: Greet

    def catch_up(self, client: int) -> None:
        """Deliver what has been posted to a client, and the average that it has missed."""
        self.cohort._catch_up([client])
        self.cohort.finish()

    def model(self, client: int) -> dict[str, Tensor]:
        """A client's own model, under the names of the whole model, with everything that was posted to it."""
        self.catch_up(client)
        return named_as_whole(self.workers[client].client.module.state_dict(), self.cohort.shape)


def in_memory(
    config: RunConfig,
    *,
    model: Model | None = None,
    data: Data | None = None,
    folder: Path | None = None,
    resume: bool = False,
    workers: Mapping[int, Worker] | None = None,
    carrier: Callable[[Mapping[int, Worker]], C] = MemoryCarrier,  # type: ignore[assignment]
    gone: Callable[[], Collection[int]] = tuple,
    **options: Any,
) -> InMemory[C]:
    """A run that has not begun, with its own clients or with the `workers` of an earlier one.

    The run and the clients are stored in `folder` (`run`, `client-0`, ...), and with `resume` they continue from there.
    All clients join before each round, except those in `gone`. `options` are those of `remote.sides.remote_training`.
    Raises UsageError as a deployment does, and RefusedError, when the run begins, for a client that is not let in.
    """
    places = {k: None if folder is None else folder / client_name(k) for k in range(config.clients)}
    for place in places.values():
        if place is not None:
            place.mkdir(parents=True, exist_ok=True)
    made = workers or {
        k: worker_of(config, k, name=client_name(k), folder=places[k], model=model, data=data) for k in places
    }
    hub = carrier(made)

    def ready(wanted: frozenset[int]) -> None:
        for k in set(made) - hub.present - set(gone()):
            if refused := hub.join(k, greet):
                raise RefusedError(refused.reason, refused.sentence)

    samples = [0] * config.clients  # they state it when they join
    training, cohort, greet = remote_training(config, hub, samples, ready=ready, model=model, data=data, **options)
    if resume:
        assert folder is not None, "only what was kept can be resumed"
        run = Run.resume(folder / "run", training=training, model=model, data=data)
    else:
        out = None if folder is None else folder / "run"
        run = Run(config, training=training, model=model, data=data, out=out)
    return InMemory(run, hub, made, cohort, greet)


def train_in_memory(config: RunConfig, *, model: Model | None = None, data: Data | None = None) -> Run:
    """Train a configuration with the clients of a deployment, all of them in this process, and return the finished run.

    Every request and every answer is written as on a network, and read again by the rules of both sides.
    """
    run = in_memory(config, model=model, data=data).run
    run.run()
    return run
