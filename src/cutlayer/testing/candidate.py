"""An algorithm under test, and the results of its runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from cutlayer import plugins
from cutlayer.algorithms import Algorithm
from cutlayer.engine.stacked import StackedCohort
from cutlayer.options import RunConfig
from cutlayer.plugins import Entry
from cutlayer.remote.far import RemoteCohort
from cutlayer.remote.transports.memory import MemoryCarrier
from cutlayer.run import Run
from cutlayer.testing.deployed import InMemory, in_memory
from cutlayer.testing.material import demand_equal, random_source, smooth, stateful
from cutlayer.verbs import SERVER_VERBS, Traits

SIZES = (10, 6, 7)  # samples of the clients: their last batches are smaller, and none has a single row
_COMMON: dict[str, Any] = {"partition": "column", "precision": "float64", "batch": 4}
_SGD: dict[str, Any] = {**_COMMON, "client_optimizer": "sgd", "client_lr": 0.1, "lr_schedule": "constant"}
_ADAM: dict[str, Any] = {**_COMMON, "client_optimizer": "adam", "client_lr": 0.01, "rounds": 3}
_UNTIMED = {"seconds"}  # fields of records that no two runs share


@dataclass(frozen=True)
class Trained:
    """The result of a run: the `parts` that are compared."""

    parts: dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """An algorithm under test: where it is found, with which options."""

    reference: str
    entry: Entry
    options: dict[str, Any]

    @classmethod
    def of(cls, algorithm: Any, options: dict[str, Any]) -> Candidate:
        """Raises ConfigError for an algorithm that cannot be found."""
        reference, values = plugins.adopt("algorithm", algorithm)
        return cls(reference, plugins.find("algorithm", reference), {**values, **options})

    @property
    def traits(self) -> Traits:
        """What follows from its needs."""
        return self.algorithm.traits

    @property
    def name(self) -> str:
        """Its name in a sentence."""
        return f"{self.entry.title} ({self.reference})"

    @cached_property
    def algorithm(self) -> Algorithm:
        """With its options."""
        return cast(Algorithm, self.config(**_SGD).thing("algorithm", self.reference))

    @property
    def engines(self) -> list[str]:
        """The engines that can run it, except the local one."""
        needs, found = self.traits.needs, []
        if self.traits.central:
            return []
        if needs <= StackedCohort.can and not self.traits.takes_turns:
            found.append("stacked")
        in_step = self.algorithm.averages_every_step or self.traits.gradients_cross
        if in_step and self.descent("auto").training.engine == "union":
            found.append("union")
        return [*found, "remote"] if needs <= RemoteCohort.can | SERVER_VERBS else found

    def config(self, *, clients: int = len(SIZES), **options: Any) -> RunConfig:
        """The configuration of a run."""
        return RunConfig.of({**options, **self.options, "algorithm": self.reference, "clients": clients})

    def run(self, engine: str, *, out: Path | None = None) -> Run:
        """A run of clients of unequal sizes, with partial participation and everything that has state."""
        return Run(self._stateful(engine), model=stateful, data=random_source(SIZES), out=out)

    def _stateful(self, engine: str) -> RunConfig:
        sampled = {} if self.traits.central else {"participation": 0.7}
        return self.config(**{**_ADAM, **sampled, **self.cuts("3", "5"), "engine": engine})

    def descent(self, engine: str) -> Run:
        """A run of clients of unequal sizes with plain gradient descent."""
        return self.smooth(SIZES, rounds=4, engine=engine)

    def smooth(self, sizes: tuple[int, ...], **options: Any) -> Run:
        """A run with plain gradient descent on a model that has weights only."""
        config = self.config(clients=len(sizes), **{**_SGD, **self.cuts("1", "3"), "engine": "local", **options})
        return Run(config, model=smooth, data=random_source(sizes))

    @cached_property
    def local(self) -> Trained:
        """The result of the local engine, the reference."""
        return trained(self.run("local"))

    def check_engine(self, engine: str) -> None:
        """Raises AssertionError unless an engine gives the result of the local one."""
        if engine == "union":
            self.demand_alike(engine, trained(self.descent("auto")), trained(self.descent("local")))
        elif engine == "remote":
            there: InMemory[MemoryCarrier] = in_memory(
                self._stateful("local"), model=stateful, data=random_source(SIZES)
            )
            self.demand_alike(engine, trained(there.run, there.model), self.local)
        else:
            self.demand_alike(engine, trained(self.run(engine)), self.local)

    def cuts(self, cut: str, tail: str) -> dict[str, str]:
        """Where the model is cut."""
        if self.traits.whole:
            return {}
        return {"cut": cut, "tail_cut": tail} if self.traits.u_shaped else {"cut": cut}

    def demand_alike(self, engine: str, found: Trained, local: Trained) -> None:
        """Raises AssertionError if the result differs from that of the local engine."""
        for what in local.parts:
            sentence = f"the {engine} engine comes to other {what} than the local one"
            demand_equal(self.name, sentence, found.parts[what], local.parts[what])


def trained(run: Run, model_of: Callable[[int], Any] | None = None) -> Trained:
    """Train to the end. If one model travels, the result has the holder's model."""
    records = [timeless(asdict(record)) for record in run]
    t = run.training
    losses = [record.pop("loss") for record in records] + [e.test_loss for e in run.evaluations]
    whose = range(len(t.clients.samples)) if t.clients.holder is None else [t.clients.holder]
    look = model_of or t.clients.model_state
    models = {f"client {k}": {n: v.clone() for n, v in look(k).items()} for k in whose}
    return Trained(
        {"records": records, "losses": losses, "client models": models, "server model": t.server.state()["model"]}
    )


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    """A record without the time that it took."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in record.items() if k not in _UNTIMED}
