"""Proofs of algorithms."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.nn import functional

from cutlayer import checkpoint
from cutlayer.build import Training
from cutlayer.cohort import Cohort, Direction
from cutlayer.costs.expect import Workload, expect
from cutlayer.data.batches import Batches
from cutlayer.errors import ConfigError
from cutlayer.files import read_records
from cutlayer.folder import CHECKPOINT, EVALUATIONS, STEPS
from cutlayer.frozen import frozen_names, trains
from cutlayer.run import Run, rate_factors
from cutlayer.seeds import torch_seeded
from cutlayer.testing.candidate import SIZES, Candidate, timeless
from cutlayer.testing.material import demand_equal, fail, random_source, smooth, stateful
from cutlayer.testing.recording import RecordedServer, Recording
from cutlayer.verbs import VERBS

_EQUAL = 10  # samples of each of two clients, if all have the same number


def check_algorithm(algorithm: Any, *, one_client_is_sgd: bool = True, **options: Any) -> None:
    """Test that an algorithm keeps the promises of all algorithms. `options` are its own, or those of a run.

    - Its round uses all the verbs that it needs, and no others.
    - The bytes of the tensors that cross are those that the ledger counts.
    - The stacked engine (if it can run the algorithm) and remote clients give the results of the local engine: records,
      losses, client models and server model, up to rounding.
    - A run that is interrupted and resumed ends bit for bit like one that is not.
    - If `traffic` states what an epoch of equal clients sends and computes, the statement is true.
    - With `one_client_is_sgd`: with a single client, the algorithm is centralised gradient descent, step by step.

    Raises AssertionError, which says what does not hold and by how much, and ConfigError for an algorithm that cannot
    be found or an option that it does not have.
    """
    candidate = Candidate.of(algorithm, options)
    _check_verbs_and_bytes(candidate)
    for engine in candidate.engines:
        candidate.check_engine(engine)
    _check_resume(candidate)
    _check_traffic(candidate)
    if one_client_is_sgd:
        _check_one_client(candidate)


# Verbs and bytes


def _check_verbs_and_bytes(candidate: Candidate) -> None:
    run = candidate.run("local")
    clients, server = recorded(run.training)
    needs, used = candidate.traits.needs, (clients.used | server.used) & VERBS
    for extra in sorted(used - needs):
        fail(candidate.name, f"its round uses {extra!r}, which its needs do not name: add it to them")
    for idle in sorted(needs - used):
        fail(candidate.name, f"its needs name {idle!r}, which its round does not use: take it out of them")
    for stranger in sorted(clients.strangers):
        fail(
            candidate.name,
            f"its round uses {stranger!r} of the clients, which is not a verb of the seam, so its bytes are not "
            f"counted; the verbs are {', '.join(sorted(VERBS))}",
        )
    ledger = run.training.ledger
    crossings: tuple[tuple[Direction, int], ...] = (("up", clients.up), ("down", clients.down))
    for direction, crossed in crossings:
        counted = ledger.total(direction) - ledger.total(direction, kind="raw data")
        if counted != crossed:
            fail(
                candidate.name,
                f"{crossed} bytes of tensors went {direction}, the ledger has counted {counted}, {crossed - counted} "
                "fewer",
            )


def recorded(training: Training) -> tuple[Recording, RecordedServer]:
    """Train, round after round, past the run's own loop, until a verb is refused that the algorithm does not need."""
    t = training
    frozen = {name for part in t.parts.all for name in frozen_names(part)}
    frozen |= {f"auxiliary.{name}" for name in (() if t.head is None else frozen_names(t.head))}
    how = {"trains": trains(t.parts.client), "asynchronous": t.algorithm.traits.asynchronous}
    clients = Recording(t.clients, frozen, **how)
    server = RecordedServer(t.server)
    for index in range(t.rounds):
        factor, t.server.lr_factor = rate_factors(t, index)
        this = t.clients.begin_round(index, t.rounds, factor)
        clients.began(this.clients)
        try:
            for _ in t.algorithm.round(t.server, cast(Cohort, clients), this):
                pass
            t.server.end_round()
        except ConfigError:
            if not ((clients.used | server.used) & VERBS) - t.algorithm.traits.needs:
                raise
            break
    return clients, server


# Resuming


def _check_resume(candidate: Candidate) -> None:
    """On the engine that is chosen automatically."""
    with tempfile.TemporaryDirectory() as place:
        quiet, broken = Path(place, "quiet"), Path(place, "broken")
        steps = candidate.run("auto", out=quiet).run().steps
        _interrupt(candidate.run("auto", out=broken), steps // 2 + 1)
        Run.resume(broken, model=stateful, data=random_source(SIZES)).run()
        one, other = _kept(broken), _kept(quiet)
    for what in one:
        sentence = f"a run that was interrupted and resumed does not end like one that was not: other {what}"
        demand_equal(candidate.name, sentence, one[what], other[what], exact=True)


def _interrupt(run: Run, steps: int) -> None:
    for count, _ in enumerate(run, 1):
        if count == steps:
            return  # the iterator is closed: what Ctrl-C does


def _kept(folder: Path) -> dict[str, Any]:
    """The content of a run's folder, without the times."""
    state = checkpoint.read(folder / CHECKPOINT)
    return {
        "records": [timeless(r) for r in read_records(folder / STEPS)],
        "evaluations": [timeless(r) for r in read_records(folder / EVALUATIONS)],
        **{what: state[what] for what in ("clients", "server")},
    }


# Traffic


def _check_traffic(candidate: Candidate) -> None:
    """As in `plan`: only with the options that `traffic` reads."""
    planned = {o.name for o in candidate.entry.options if o.planned} & set(candidate.options)
    asked = replace(candidate, options={name: candidate.options[name] for name in planned})
    epochs = 2 * asked.algorithm.part_of_round[0]
    run = asked.smooth((_EQUAL, _EQUAL), epochs=epochs)
    t = run.training
    if (stating := t.algorithm.traffic(t.epoch)) is None:
        return
    _, server = recorded(t)
    stated = expect(t.algorithm, Workload(**vars(t.epoch), flops=t.flops, epochs=epochs))
    counted = {
        "bytes up": (stated.up + stated.once_up, t.ledger.total("up")),
        "bytes down": (stated.down, t.ledger.total("down")),
        "bytes down, a common message once": (stated.down_broadcast, t.ledger.total("down", "wire-broadcast")),
    }
    if candidate.traits.split:
        rows = epochs * t.epoch.clients * t.epoch.uploaded(stating.every)
        counted["rows that go through the server's part"] = (round(rows * t.server_passes), server.rows)
    for what, (said, found) in counted.items():
        if said != found:
            fail(candidate.name, f"its traffic states {said} {what} in {epochs} epochs, but there are {found}")


# One client


def _check_one_client(candidate: Candidate) -> None:
    run = candidate.smooth((_EQUAL,), rounds=2)
    sgd = _descent(run)
    for record, loss in zip(run, sgd, strict=False):
        sentence = f"with one client its step {record.step} is not that of centralised gradient descent: other loss"
        demand_equal(candidate.name, sentence, record.loss, loss)
    model = next(sgd)
    t = run.training
    found = {**t.clients.model_state(0), **t.server.state()["model"]}
    demand_equal(
        candidate.name, "with one client it does not end where centralised gradient descent ends", found, model
    )


def _descent(run: Run) -> Iterator[Any]:
    """Centralised gradient descent by hand, on the same batches: the loss of each step, then the trained weights."""
    t, config = run.training, run.config
    with torch_seeded(config.seed, "model"):
        model = smooth().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=config.client_lr)
    batches = Batches([np.arange(_EQUAL)], config.batch, config.seed)
    local_epochs, local_steps = t.algorithm.part_of_round
    for _ in range(t.rounds * (local_steps or local_epochs * int(batches.per_epoch[0]))):
        batch = t.source.train[batches.draw([0])[0]]
        loss = functional.cross_entropy(model(batch.x), batch.y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()
    yield {name: value.detach() for name, value in model.state_dict().items()}
