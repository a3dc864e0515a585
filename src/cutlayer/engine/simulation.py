"""Builds the simulating cohort and server from the choices: the engine, and the wrappers for its rows and bounds."""

from __future__ import annotations

from typing import cast

from cutlayer import defences
from cutlayer.algorithms import Algorithm
from cutlayer.attacks import Attacks
from cutlayer.attacks.hostile import HostileCohort
from cutlayer.cohort import Cohort
from cutlayer.defences.defended import DefendedCohort
from cutlayer.engine.bounded import BoundedCohort
from cutlayer.engine.choice import Chosen
from cutlayer.engine.distributed import Sharing
from cutlayer.engine.local import LocalCohort
from cutlayer.engine.replicas import ReplicaServer, StackedReplica
from cutlayer.engine.shares import NamedCohort
from cutlayer.engine.simulated import Clients
from cutlayer.engine.stacked import StackedCohort, StackedServer
from cutlayer.engine.union import UnionCohort, UnionServer
from cutlayer.errors import ConfigError
from cutlayer.frozen import frozen_names, trains
from cutlayer.optim import MakeOptimizer
from cutlayer.options import RunConfig
from cutlayer.server import Server
from cutlayer.verbs import LEARN


def simulate(
    config: RunConfig,
    algorithm: Algorithm,
    chosen: Chosen,
    setup: Clients,
    make_server: MakeOptimizer,
    seed: int,
    attacks: Attacks | None = None,
    sharing: Sharing | None = None,
) -> tuple[Cohort, Server, LocalCohort | StackedCohort | UnionCohort]:
    """(clients, server, the clients' engine), computed as chosen; some clients attack if `attacks` says so. With
    `sharing`, they are the clients of a rank. Raises ConfigError.
    """
    setup = setup if sharing is None else sharing.own
    simulated, server = _engine(config, algorithm, chosen, setup, make_server, seed, sharing)
    cohort = cast(Cohort, simulated)  # its verbs are those that the algorithm needs
    if sharing is not None:
        cohort = NamedCohort(cohort, sharing.own.mine)
    protection = defences.of(config)
    if protection.penalised and LEARN in algorithm.traits.needs:
        raise ConfigError(
            f"{protection.penalised} adds to the loss that comes through the server, but the clients of "
            f"{config.algorithm} train on a loss of their own: leave it out"
        )
    if protection.penalised and not trains(chosen.split.client):
        raise ConfigError(
            f"{protection.penalised} adds to the loss that the client part is trained on, but nothing of that part is "
            "trained: leave it out, or freeze less"
        )
    if protection.active:
        cohort = DefendedCohort(cohort, simulated.keep_batches(), protection)
    if attacks:
        assert not isinstance(simulated, UnionCohort), "hostile clients need models of their own"
        frozen = {name for part in chosen.split.all for name in frozen_names(part)}
        cohort = HostileCohort(cohort, simulated, attacks, frozen=frozen, eval_clients=setup.eval_clients)
    return BoundedCohort(cohort, config.algorithm, algorithm.traits.needs), server, simulated


def _engine(
    config: RunConfig,
    algorithm: Algorithm,
    chosen: Chosen,
    setup: Clients,
    make_server: MakeOptimizer,
    seed: int,
    sharing: Sharing | None,
) -> tuple[LocalCohort | StackedCohort | UnionCohort, Server]:
    lr, copies = config.server_lr or config.client_lr, algorithm.traits.server_copies
    model, ways = chosen.split.server, chosen.ways
    if ways.engine == "stacked":
        everybody = setup if sharing is None or sharing.apart else sharing.whole
        count = len(everybody.rows) if copies else 0
        stacked = StackedReplica if sharing is not None and sharing.apart else StackedServer
        return StackedCohort(setup, ways.clients), stacked(
            model, make_server, lr, seed, count, ways.copies, setup.task, setup.place
        )
    if ways.engine == "local":
        one = ReplicaServer if sharing is not None and sharing.apart else Server
        return LocalCohort(setup), one(model, make_server, lr, seed, setup.task)
    union = UnionCohort(setup)
    if copies:
        return union, UnionServer(model, make_server, lr, seed, union.masses, setup.task)
    return union, Server(model, make_server, lr, seed, setup.task)
