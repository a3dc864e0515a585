"""What an active server would have learned: a run's clients are trained again under a server that hijacks them.

Each training has the same start and the run's own algorithm, data, defence and number of rounds: under the honest
server, and under a `HijackingServer` without and with labels. All clients watch, which shows how useful their watch is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from cutlayer.build import Training, assemble
from cutlayer.defences.watch import WatchedCohort
from cutlayer.errors import ConfigError
from cutlayer.files import finite_or_null
from cutlayer.leakage.hijack import Hijack, HijackingServer
from cutlayer.leakage.reconstruct import Quality, score
from cutlayer.leakage.subject import Moment, Subject, subjects
from cutlayer.run import round_of
from cutlayer.server import Server

_KNOWING = "hijacker that knows labels"


@dataclass(frozen=True)
class Watched:
    """The final state of one client's watch: its `score` over the last `batches` (None: it saw no gradient of
    its own).
    """

    client: int
    score: float | None
    batches: int
    suspicious: bool


@dataclass(frozen=True)
class Hijacked:
    """The hijacker's reconstruction of `samples` private inputs of one client after `rounds` rounds, beside an attacker
    who answers with the mean input, as in `Reconstruction`; and the scores of the clients' watches for it and for an
    honest server. `labelled`: its critic saw the labels. If labels are not classes, no critic sees them and no client
    watches: `not_measured` says what is missing, and why.
    """

    run: str
    algorithm: str
    seed: int
    rounds: int
    client: int
    samples: int
    auxiliary: int
    labelled: bool
    attack: Quality
    mean_input: Quality
    explained: float
    honest: tuple[Watched, ...]
    hijacked: tuple[Watched, ...]
    not_measured: Mapping[str, str] = field(default_factory=dict)

    @property
    def plain(self) -> dict[str, Any]:
        """For JSON, which has no infinity: null means infinity."""
        return dict(finite_or_null(asdict(self)))


def check_hijackable(moment: Moment) -> None:
    """Raises ConfigError if labels stay with the clients, if inputs are tokens, or if the number of crossing real
    tensors is not one.
    """
    parts = moment.training.parts
    if moment.tokens:
        raise ConfigError(
            f"{str(moment.out)!r} cannot be hijacked: its inputs are tokens, and the attack is made for real numbers: "
            "leave hijack out, or name other runs"
        )
    if parts.tail is not None or len(parts.crossing) != 1 or not parts.crossing[0].differentiable:
        labels = " and labels stay with the clients" if parts.tail is not None else ""
        raise ConfigError(
            f"{str(moment.out)!r} cannot be hijacked: the attack is made for one real tensor that crosses one cut, "
            f"here {len(parts.crossing)} cross{labels}: leave hijack out, or name other runs"
        )


def hijack(
    moment: Moment, samples: int, auxiliary: int | None, seed: int, tell: Callable[[str], None] = lambda _: None
) -> list[tuple[Hijacked, dict[str, Tensor]]]:
    """Train the run's clients again for the same number of rounds, under an honest and under two hijacking servers,
    without labels and with them (if labels are not classes, only under one that ignores them). Returns the results of
    each, and the first `inputs` and `reconstructions` [at most 64, ...], on the CPU. `tell` is called with the
    progress.

    Raises ConfigError as `check_hijackable` does; DataError as `Hijack` does.
    """
    check_hijackable(moment)
    (before,) = subjects(moment, 1, samples, auxiliary, seed)
    if not moment.classes:
        return [_hijacked(moment, before, False, (), seed, tell)]
    tell(f"{moment.out}: {moment.rounds} rounds under an honest server")
    training = assemble(moment.config)
    honest = _trained(moment, training, training.server)
    return [_hijacked(moment, before, labelled, honest, seed, tell) for labelled in (False, True)]


def _hijacked(
    moment: Moment, before: Subject, labelled: bool, honest: tuple[Watched, ...], seed: int, tell: Callable[[str], None]
) -> tuple[Hijacked, dict[str, Tensor]]:
    """The result under one hijacking server; `before` is the victim at the end of the run."""
    kind = "knows labels" if labelled else "ignores labels"
    tell(f"{moment.out}: {moment.rounds} rounds under a hijacking server that {kind}")
    training, known = assemble(moment.config), before.auxiliary
    code, nonnegative = tuple(before.z.shape[1:]), bool((before.z >= 0).all())
    attacker = Hijack(known, code, labelled=labelled, nonnegative=nonnegative, seed=seed)
    bent = _trained(moment, training, HijackingServer(attacker))
    holder = training.clients.holder
    whose = moment.models if holder is None else [holder]
    models = {k: dict(training.clients.model_state(k)) for k in whose}
    after = replace(moment, models=models, server=None)
    (victim,) = subjects(after, 1, len(before.samples), len(known), seed)
    guess = attacker.reconstruct(victim.z)
    attack, nothing = score(victim.samples.x, victim.samples.y, guess, known, seed, moment.training.task)
    found = Hijacked(
        run=str(moment.out),
        algorithm=moment.config.algorithm,
        seed=moment.config.seed,
        rounds=moment.rounds,
        client=victim.name,
        samples=len(victim.samples),
        auxiliary=len(known),
        labelled=labelled,
        attack=attack,
        mean_input=nothing,
        explained=attack.explained(nothing),
        honest=honest,
        hijacked=bent,
        not_measured={} if moment.classes else {name: _why(name, moment) for name in (_KNOWING, "watch")},
    )
    return found, {"inputs": victim.samples.x[:64].cpu(), "reconstructions": guess[:64].cpu()}


def _why(name: str, moment: Moment) -> str:
    what = {_KNOWING: "its critic sorts codes", "watch": "it sorts gradients"}[name]
    return f"{what} by class, and {moment.task_title}"


def _trained(moment: Moment, training: Training, server: Server) -> tuple[Watched, ...]:
    """Train the clients with that server until the moment. Returns the results of their watches (empty if labels are
    not classes).
    """
    clients = WatchedCohort(training.clients) if moment.classes else training.clients
    algorithm = training.algorithm
    if isinstance(server, HijackingServer) and algorithm.shares_gradients:
        algorithm = algorithm.without_sharing()  # a hostile server does not average
    watched = replace(training, clients=clients, server=server, algorithm=algorithm)
    for index in range(moment.rounds):
        for _ in round_of(watched, index):
            pass
    if not isinstance(clients, WatchedCohort):
        return ()
    return tuple(
        Watched(k, None if math.isnan(w.score) else w.score, w.observed, w.suspicious)
        for k, w in clients.watches.items()
    )
