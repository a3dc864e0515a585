"""All measurements on one client of a trained run, and comparisons of several runs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from cutlayer import defences, seeds
from cutlayer.defences.dp import Statement
from cutlayer.defences.feature_dropout import FeatureDropout
from cutlayer.defences.noise import Noise
from cutlayer.errors import ConfigError, DataError, unknown
from cutlayer.files import finite_or_null
from cutlayer.leakage import mutual
from cutlayer.leakage.calibration import Calibrated, calibrate, rank
from cutlayer.leakage.calibration import Estimator as KnownEstimator
from cutlayer.leakage.information import LEAST, Usable, usable
from cutlayer.leakage.inputs import smash
from cutlayer.leakage.mutual import UpperBound, View
from cutlayer.leakage.ranks import Dependence, LabelLeakage, dependence, label_leakage
from cutlayer.leakage.reconstruct import LEAST as ENOUGH
from cutlayer.leakage.reconstruct import Knowledge, Reconstructed, Reconstruction, reconstruct
from cutlayer.leakage.recovery import ATTACKS, Recovered, recover
from cutlayer.leakage.recovery import LEAST as ENOUGH_ROWS
from cutlayer.leakage.seen import Words
from cutlayer.leakage.subject import Subject
from cutlayer.models.parts import load_own
from cutlayer.types import as_tuple
from cutlayer.wire import Codec
from cutlayer.wire.codecs import payload_bytes

Estimator = Literal["usable", "infonce", "smile", "mine", "ksg"]
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)


@dataclass(frozen=True)
class Asked:
    """The measurements: the attackers' `knowledge`, the `estimators` (each beside its readings for known answers), and
    the projection for mutual information (`view`); the `attacks` on inputs that are tokens.
    """

    knowledge: tuple[Knowledge, ...] = ("model", "smashed")
    estimators: tuple[Estimator, ...] = ("usable", "infonce", "ksg")
    seed: int = 0
    view: View = "cca"
    attacks: tuple[str, ...] = ("nearest", "inversion")

    def __post_init__(self) -> None:
        for name in self.estimators:
            if name not in ESTIMATORS:
                raise ConfigError(unknown("estimator", name, ESTIMATORS))
        for known in self.knowledge:
            if known not in get_args(Knowledge):
                raise ConfigError(unknown("knowledge", known, get_args(Knowledge)))
        for attack in self.attacks:
            if attack not in ATTACKS:
                raise ConfigError(unknown("attack on tokens", attack, ATTACKS))
        if self.view not in get_args(View):
            raise ConfigError(unknown("view", self.view, get_args(View)))


@dataclass(frozen=True)
class Finding:
    """The results for one client after `rounds` rounds. `score` is the run's leading `metric` on the test samples
    (`share`: a fraction), `accuracy` in [0, 1] the same where it is one. `not_measured` says why measures about classes
    are missing.

    `upper` bounds and attacks are about a single release of a sample. It was sent `releases` times so far, by a client
    part that changed in between, so the total is at most this number times the bound.

    For tokens, the share that attackers `recovered` is measured, and not the measures that need real numbers
    (`attacks`, `usable`, `estimates`, `dependence`).
    """

    run: str
    algorithm: str
    seed: int
    rounds: int
    client: int
    metric: str
    share: bool
    score: float | None
    accuracy: float | None
    samples: int
    auxiliary: int
    releases: int
    upper: tuple[UpperBound, ...]
    attacks: dict[str, Reconstruction]
    usable: Usable | None
    estimates: tuple[Calibrated, ...]
    dependence: Dependence | None
    labels: LabelLeakage | None
    privacy: Statement | None
    not_measured: Mapping[str, str] = field(default_factory=dict)
    recovered: tuple[Recovered, ...] = ()

    @property
    def plain(self) -> dict[str, Any]:
        """For JSON, which has no infinity: null stands for it."""
        return dict(finite_or_null(asdict(self)))


@dataclass(frozen=True)
class Examined:
    """A finding, and pictures by the attacker's knowledge."""

    finding: Finding
    pictures: Mapping[str, Reconstructed]


def check(subject: Subject, asked: Asked) -> None:
    """Raises DataError, before anything is measured, if there are too few samples, or if smashed data of tokens are not
    one vector for each.
    """
    s, run = subject, f"client {subject.name} of {str(subject.moment.out)!r}"
    if s.moment.tokens:
        _check_tokens(s, run)
        return
    neural = [name for name in asked.estimators if name != "usable"]
    if neural and len(s.samples) < mutual.LEAST:
        raise DataError(
            f"{run} is examined on {len(s.samples)} samples, too few for {' and '.join(neural)}: they take "
            f"{mutual.LEAST}; ask for other clients, or leave them out with --estimators usable"
        )
    if len(s.auxiliary) < ENOUGH:
        raise DataError(
            f"{run} is attacked with {len(s.auxiliary)} auxiliary samples, too few to train an attacker on: give at "
            f"least {ENOUGH}, or train with a larger test or validation set"
        )


def _check_tokens(s: Subject, run: str) -> None:
    """Raises DataError."""
    length = Words.of(s.samples.inputs).ids.shape[1]
    if s.z.dim() != 3 or s.z.shape[1] != length:
        raise DataError(
            f"{run} sends smashed data of shape {tuple(s.z.shape[1:])} for {length} tokens, but tokens are looked for "
            "in one vector for each: name runs that are cut where each token has a vector of its own"
        )
    if len(s.auxiliary) < ENOUGH_ROWS:
        raise DataError(
            f"{run} is attacked with {len(s.auxiliary)} auxiliary rows of tokens, too few to train an attacker on: "
            f"give at least {ENOUGH_ROWS}, or train with a larger test or validation set"
        )


def examine(subject: Subject, asked: Asked) -> Examined:
    """Do all requested measurements. Raises DataError if there are too few samples."""
    if subject.moment.tokens:
        return Examined(_of_tokens(subject, asked), {})
    s, x, z = subject, subject.samples.x, subject.z
    pictures: dict[str, Reconstructed] = {}
    for knowledge in asked.knowledge:
        pictures[knowledge] = reconstruct(
            x,
            z,
            s.samples.y,
            s.auxiliary,
            client=s.client if knowledge == "model" else None,
            server=s.server,
            surrogate=s.fresh if knowledge == "smashed" else None,
            defence=s.defence,
            knowledge=knowledge,
            labelled=s.labelled,
            task=s.moment.training.task,
            seed=asked.seed,
        )
    read = usable(x, z, seed=asked.seed) if "usable" in asked.estimators and len(x) >= LEAST else None
    labels, missing = _labels(s, asked.seed)
    finding = replace(
        _about(s, asked),
        attacks={knowledge: p.report for knowledge, p in pictures.items()},
        usable=read,
        estimates=tuple(_calibrated(s, asked, read)),
        dependence=dependence(x, z, seed=asked.seed),
        labels=labels,
        not_measured=missing,
    )
    return Examined(finding, pictures)


def _about(s: Subject, asked: Asked) -> Finding:
    """The facts about every subject, before any attack."""
    moment = s.moment
    return Finding(
        run=str(moment.out),
        algorithm=moment.config.algorithm,
        seed=moment.config.seed,
        rounds=moment.rounds,
        client=s.name,
        metric=moment.training.task.leading,
        share=moment.training.task.share,
        score=moment.score,
        accuracy=moment.accuracy,
        samples=len(s.samples),
        auxiliary=len(s.auxiliary),
        releases=s.releases,
        upper=tuple(_upper(s, asked.seed)),
        attacks={},
        usable=None,
        estimates=(),
        dependence=None,
        labels=None,
        privacy=s.statement,
    )


def _of_tokens(s: Subject, asked: Asked) -> Finding:
    """Every attack on tokens, by every attacker."""
    words, counting = Words.of(s.samples.inputs), s.counting(s.samples)
    found, missing = [], {"information": "inputs are tokens, and its instruments take real numbers"}
    for knowledge in asked.knowledge:
        seen = s.seen(begun=knowledge == "smashed", seed=asked.seed)
        for attack in asked.attacks:
            made = recover(seen, words, counting, attack, knowledge)
            if made is None:
                missing[attack] = "what is sent for a token depends on later ones, so they cannot be found in turn"
            else:
                found.append(made)
    return replace(_about(s, asked), recovered=tuple(found), not_measured=missing)


def _calibrated(s: Subject, asked: Asked, read: Usable | None) -> Iterator[Calibrated]:
    """Each estimator beside its readings of known answers of the same size; `read` is the reading of usable
    information, if there were enough samples.
    """

    def by_code(x: Tensor, z: Tensor, seed: int) -> float:
        return usable(x, z, seed=seed).nats

    def calibrated(name: str, by: KnownEstimator, reading: float, levels: tuple[float, ...] | None) -> Calibrated:
        x, z, seed = s.samples.x, s.z, asked.seed
        return calibrate(name, by, x, z, client=s.bare, levels=levels, seed=seed, reading=reading)

    for name in asked.estimators:
        if name == "usable":
            if read is not None:  # only one level, because it is slow
                yield calibrated(name, by_code, read.nats, (max(read.nats, 0.5),))
            continue
        found = mutual.estimate(s.samples.x, s.z, method=name, view=asked.view, seed=asked.seed)
        by = mutual.reader(name, asked.view)
        yield replace(calibrated(name, by, found.nats, None), null=found.null, cap=found.cap, warning=found.warning)


def _upper(s: Subject, seed: int) -> Iterator[UpperBound]:
    """All available bounds; without noise and codec, the statement that there is none. Tokens are bounded by their
    number.
    """
    config = s.moment.config
    d, codec = defences.of(config), Codec.parse(config.up_codec)
    if s.moment.tokens:
        yield mutual.chosen(Words.of(s.samples.inputs).ids.shape[1], s.moment.vocabulary)
    noise = d.get(Noise)
    if noise is not None and noise.scale:
        silent = replace(d, parts=(*d.before(noise), noise.silent))
        with seeds.torch_seeded(seed, "leakage", "dropout"):
            (clipped,) = silent.fresh((smash(s.bare, s.samples.inputs, seed, "bare"),))
        channel = mutual.laplace_channel if noise.laplace_noise else mutual.gaussian_channel
        yield channel(clipped, noise.scale)
    elif not (codec.lossy or s.moment.tokens) and all(part.exact for part in d.in_order):
        yield mutual.deterministic(dropout=d.get(FeatureDropout) is not None)
    if codec.lossy:
        size = payload_bytes(codec, s.z.shape, s.z.dtype)
        yield mutual.bits_sent(size, len(s.z), str(codec.plain))


def _labels(s: Subject, seed: int) -> tuple[LabelLeakage | None, dict[str, str]]:
    """If labels stay with the client: what the gradients that it sends reveal; and why measures about classes are
    missing.
    """
    if not s.moment.classes:
        whose = s.moment.task_title
        missing = {"classified": f"a classifier judges reconstructions by their class, and {whose}"}
        if not s.labelled:
            missing["labels"] = f"label leakage tells classes apart, and {whose}"
        return None, missing
    if s.moment.training.parts.tail is None or s.moment.server is None:
        return None, {}
    try:
        return _read_labels(s, s.moment.server, seed), {}
    except DataError as error:  # too few samples of a class
        return None, {"labels": str(error)}


def _read_labels(s: Subject, server: nn.Module, seed: int) -> LabelLeakage:
    """Label leakage of the samples whose class counts."""
    tail, task = copy.deepcopy(s.moment.training.parts.tail), s.moment.training.task
    assert tail is not None, "labels stay with the client"
    load_own(tail, s.moment.model_of(s.name))
    server.eval()
    tail.eval()
    with torch.no_grad():
        features = as_tuple(server((s.bare(s.samples.x),)))
    leaves = tuple(f.detach().requires_grad_(f.is_floating_point()) for f in features)
    with torch.enable_grad():
        loss = task.row_losses(as_tuple(tail(leaves)), s.samples.y).sum()
        found = torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad])
    counting = s.samples.y >= 0
    gradients = torch.cat([g.flatten(1) for g in found], 1)
    return label_leakage(gradients[counting], s.samples.y[counting], seed=seed)


def comparisons(findings: Sequence[Finding]) -> list[str]:
    """Whether runs may be ranked: a sentence per estimator and pair of runs, of their first clients."""
    first: dict[tuple[str, int], Finding] = {}
    for finding in findings:
        first.setdefault((finding.run, finding.rounds), finding)
    sentences = []
    for (one, at), (two, later) in combinations(first, 2):
        others = {b.name: b for b in first[two, later].estimates}
        for a in first[one, at].estimates:
            if (b := others.get(a.name)) is None:
                continue
            try:
                why = rank(a, b).sentence
            except ConfigError as error:
                why = f"not ranked: {error}"
            sentences.append(f"{one} (round {at}) and {two} (round {later}): {why}")
    return sentences
