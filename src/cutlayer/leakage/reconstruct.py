"""How well an honest-but-curious server reconstructs inputs from smashed data: a decoder z -> x, trained on auxiliary
data.

Auxiliary data are of the clients' distribution and share no sample with them. What the attacker knows:
- "model": the client part. It makes pairs (z, x) at will, with fresh noise each time, and trains a decoder on them
  (He, Zhang & Lee, ACSAC 2019: "black box" with query access). A server that receives client models, or that also
  controls a client, has this knowledge.
- "smashed": only the smashed data observed, their labels, and its own server part. It trains a surrogate client part on
  auxiliary data so that the server part solves the task on its output (PCAT, Gao & Zhang, USENIX Security 2023) and so
  that that output is distributed as the observed smashed data. SDAR (Zhu et al., arXiv 2310.10483) does the latter with
  a discriminator; here it is the mean and the deviation of every value, class by class (over all rows if labels are not
  classes): weaker, but it cannot diverge. The decoder is trained on the surrogate's output. Without a server part only
  the matching is left.

The report is the result of THIS attacker with this budget: a lower bound on possible attacks, never a guarantee.

Shape legend: n targets, N auxiliary samples, s... one sample's smashed data.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cutlayer import seeds
from cutlayer.data.samples import Samples
from cutlayer.errors import ConfigError, DataError, unknown
from cutlayer.gradients import mean_loss
from cutlayer.leakage.fitting import Budget, fit
from cutlayer.leakage.inputs import Client, Scale, check_real, is_random, smash, split
from cutlayer.leakage.networks import Classifier, Encoder, decoder
from cutlayer.rows import check_rows, flat
from cutlayer.tasks import Task
from cutlayer.tasks.classification import Classification
from cutlayer.types import as_tuple

Knowledge = Literal["model", "smashed"]

LEAST = 100  # auxiliary samples
BUDGET = Budget(steps=800, batch=64, lr=2e-3, check_every=80, patience=4)
_CLASSIFIER = Budget(steps=400, batch=64, lr=2e-3, check_every=50, patience=4)
_JITTER = 0.3


@dataclass(frozen=True)
class Quality:
    """The distance of reconstructions from the inputs.

    `mse` in squared units of x; `psnr` in dB, 10 log10(range^2 / mse) with the auxiliary data's range; `ssim` the mean
    structural similarity (Wang et al. 2004), None if x are not pictures of at least 3x3; `accuracy` of a classifier
    that was trained on true auxiliary inputs, None if labels are not classes.
    """

    mse: float
    psnr: float
    ssim: float | None
    accuracy: float | None

    def explained(self, mean_input: Quality) -> float:
        """1 - mse / mse of the mean input."""
        return 1 - self.mse / mean_input.mse if mean_input.mse else 0.0


@dataclass(frozen=True)
class Reconstruction:
    """The attack beside attackers that do nothing: all of them guess the same n targets.

    `mean_input` answers with the mean auxiliary input, `nearest` with the auxiliary input whose smashed data (by the
    client part, or by the surrogate) lie nearest. `true_accuracy` is the classifier's on the true inputs (None if
    labels are not classes). `explained` is 1 - mse / mse of the mean input: 0 for an attack that learned nothing, 1 for
    a perfect one.
    """

    knowledge: Knowledge
    attack: Quality
    mean_input: Quality
    nearest: Quality
    true_accuracy: float | None
    explained: float
    steps: int
    auxiliary: int
    targets: int


@dataclass(frozen=True)
class Reconstructed:
    """The report, and for a grid of pictures the first inputs and reconstructions [at most 64, ...], on the CPU."""

    report: Reconstruction
    inputs: Tensor
    reconstructions: Tensor


def reconstruct(
    x: Tensor,
    z: Tensor,
    y: Tensor,
    auxiliary: Samples,
    *,
    client: Client | None = None,
    server: nn.Module | None = None,
    surrogate: nn.Module | None = None,
    defence: Client | None = None,
    knowledge: Knowledge = "model",
    labelled: bool = True,
    task: Task | None = None,
    seed: int = 0,
    budget: Budget = BUDGET,
) -> Reconstructed:
    """Attack the smashed data z [n, s...] of x [n, ...] with labels y [n, t...], which are those of `task`
    (classification by default).

    "model" needs `client` (deterministic or with noise of its own; only called). "smashed" may have `server` (smashed
    data to the model's outputs; not trained here) and `surrogate` (the attacker's guess at the client part's
    architecture, fresh weights; trained in place; by default a small network fitted to the shapes) and `defence`: the
    changes to the client part's output before it is sent, such as noise, since a defence's settings are not a secret. x
    is only used for scoring, as is y if labels stay with the clients (not `labelled`). Raises DataError: fewer than 100
    auxiliary samples, shapes that differ, NaN, tokens; ConfigError: no `client`.
    """
    task = task or Classification()
    if knowledge not in get_args(Knowledge):
        raise ConfigError(unknown("knowledge", knowledge, get_args(Knowledge)))
    if knowledge == "model" and client is None:
        raise ConfigError(
            "knowledge='model' means that the attacker has the client part: give client=..., or 'smashed'"
        )
    check_real(x, "the inputs")
    check_real(z, "the smashed data")
    n = check_rows(1, "to reconstruct", x=x, z=z, y=y)
    count = check_rows(LEAST, "for an attacker's auxiliary data", auxiliary=auxiliary.x, labels=auxiliary.y)
    if auxiliary.x.shape[1:] != x.shape[1:]:
        raise DataError(
            f"auxiliary inputs have shape {tuple(auxiliary.x.shape[1:])}, the clients' {tuple(x.shape[1:])}: give "
            "auxiliary data of the clients' kind"
        )
    train, held = _halves(auxiliary, seed)
    if knowledge == "model":
        assert client is not None
        encode: Client = client
    else:
        used = task if labelled else None
        encode = _surrogate(z, y, train, held, server, surrogate, defence, used, seed, budget)
    attack, steps = _decoder(encode, z if knowledge == "smashed" else None, train, held, seed, budget)

    judge = _judge(train, held, task, seed)
    guess = attack(z)
    with torch.no_grad():
        found = _nearest(smash(encode, train.x, seed, "neighbours"), z)
    quality = judge.quality(x, guess, y)
    zero = judge.quality(x, train.x.mean(0).expand_as(x), y)
    report = Reconstruction(
        knowledge=knowledge,
        attack=quality,
        mean_input=zero,
        nearest=judge.quality(x, train.x[found], y),
        true_accuracy=judge.accuracy(x, y),
        explained=quality.explained(zero),
        steps=steps,
        auxiliary=count,
        targets=n,
    )
    return Reconstructed(report, x[:64].detach().cpu(), guess[:64].cpu())


def score(
    x: Tensor, y: Tensor, guess: Tensor, auxiliary: Samples, seed: int = 0, task: Task | None = None
) -> tuple[Quality, Quality]:
    """How near guesses [n, ...] at x [n, ...] with labels y [n, t...] are, and how near the mean auxiliary input is.

    The judge is trained on the auxiliary samples; the labels are those of `task` (classification by default).
    """
    train, held = _halves(auxiliary, seed)
    judge = _judge(train, held, task or Classification(), seed)
    return judge.quality(x, guess, y), judge.quality(x, train.x.mean(0).expand_as(x), y)


def _halves(auxiliary: Samples, seed: int) -> tuple[Samples, Samples]:
    """The attackers' training rows, and their validation rows."""
    parts = split(len(auxiliary), seed, "auxiliary", shares=(0.8, 0.2))
    device = auxiliary.x.device
    return auxiliary[parts.train.to(device)], auxiliary[parts.validation.to(device)]


class Judge:
    """Scores reconstructions; its range comes from true auxiliary inputs, and so does its classifier, which exists only
    where labels are `classes`. Rows whose class does not count (below 0) it leaves out.
    """

    def __init__(self, train: Samples, held: Samples, classes: bool, seed: int) -> None:
        self._centre, self._unit = float(train.x.mean()), float(train.x.std()) or 1.0
        self._range = float(train.x.max() - train.x.min()) or 1.0
        self._classifier: Classifier | None = None
        if classes:
            self._learn(_classed(train), _classed(held), seed)

    def _learn(self, train: Samples, held: Samples, seed: int) -> None:
        if not (len(train) and len(held)):
            return
        scored = int(max(train.y.max(), held.y.max())) + 1
        with seeds.torch_seeded(seed, "leakage", "classifier"):
            classifier = Classifier(tuple(train.x.shape[1:]), scored).to(train.x.device)
        self._classifier = classifier
        fit(
            classifier,
            lambda rows: functional.cross_entropy(self._logits(classifier, train.x[rows]), train.y[rows]),
            lambda: functional.cross_entropy(self._logits(classifier, held.x), held.y),
            len(train),
            _CLASSIFIER,
            seed,
            "classifier",
            device=train.x.device,
        )

    def _logits(self, classifier: Classifier, x: Tensor) -> Tensor:
        logits: Tensor = classifier((x.float() - self._centre) / self._unit)
        return logits

    @torch.no_grad()
    def accuracy(self, x: Tensor, y: Tensor) -> float | None:
        """The classifier's accuracy on x [n, ...] with labels y [n]; None without a classifier, or rows that count."""
        judged = None if self._classifier is None else _classed(Samples(x, y))
        if self._classifier is None or not judged:
            return None
        parts = zip(judged.x.split(256), judged.y.split(256), strict=True)
        return float(sum((self._logits(self._classifier, a).argmax(1) == b).sum() for a, b in parts)) / len(judged)

    def quality(self, x: Tensor, guess: Tensor, y: Tensor) -> Quality:
        """How near `guess` [n, ...] is to x [n, ...]."""
        mse = float((guess - x).double().square().mean())
        psnr = 10 * math.log10(self._range**2 / mse) if mse else math.inf
        return Quality(mse, psnr, ssim(x, guess, self._range), self.accuracy(guess, y))


def _classed(samples: Samples) -> Samples:
    """The rows whose class counts."""
    return samples[(samples.y >= 0).nonzero()[:, 0]] if bool((samples.y < 0).any()) else samples


_LAST: list[tuple[Samples, Samples, tuple[bool, int], Judge]] = []


def _judge(train: Samples, held: Samples, task: Task, seed: int) -> Judge:
    """The judge for these samples; the last one is kept, since attacks on one run, or on like runs, share theirs."""
    classes = task.targets == "class"
    for a, b, of, judge in _LAST:
        mine, theirs = (train.x, train.y, held.x, held.y), (a.x, a.y, b.x, b.y)
        same = all(m.device == t.device and torch.equal(m, t) for m, t in zip(mine, theirs, strict=True))
        if of == (classes, seed) and same:
            return judge
    judge = Judge(train, held, classes, seed)
    _LAST[:] = [(train, held, (classes, seed), judge)]
    return judge


def ssim(x: Tensor, guess: Tensor, value_range: float, at_most: int = 500) -> float | None:
    """The mean structural similarity of pictures [n, C, H, W], over the first 500; None for anything else.

    The window is 7x7, or the largest odd one that fits smaller pictures (at least 3x3).
    """
    if x.ndim != 4 or min(x.shape[2:]) < 3:
        return None
    from skimage.metrics import structural_similarity

    side = min(7, *x.shape[2:])
    window = side if side % 2 else side - 1
    pairs = zip(x[:at_most].cpu().double().numpy(), guess[:at_most].cpu().double().numpy(), strict=True)
    values = [
        structural_similarity(a, b, win_size=window, data_range=value_range, channel_axis=0)  # type: ignore[no-untyped-call]
        for a, b in pairs
    ]
    return float(np.mean(values))


def _nearest(known: Tensor, z: Tensor) -> Tensor:
    """For each row of z [n, s...] the row of known [N, s...] that lies nearest: [n]."""
    return torch.cat([torch.cdist(rows, flat(known)).argmin(1) for rows in flat(z).split(256)])


def _decoder(
    encode: Client, observed: Tensor | None, train: Samples, held: Samples, seed: int, budget: Budget
) -> tuple[Callable[[Tensor], Tensor], int]:
    """Train a decoder on the pairs (encode(x), x); the attack z -> x, and the steps made.

    `observed` are smashed data of the real client part where `encode` is not: they are then brought to the same mean
    and deviation value by value, and the decoder is trained on jittered codes, to forgive what else differs.
    """
    device = train.x.device
    random = is_random(encode, train.x, seed)
    z, z_held = smash(encode, train.x, seed, "auxiliary"), smash(encode, held.x, seed, "held out")
    scale, code, shape = Scale.of(flat(z)), z.shape[1:], tuple(train.x.shape[1:])
    real = scale if observed is None else Scale.of(flat(observed))
    jitter = 0.0 if observed is None else _JITTER
    # Per value for vectors, whose units differ; one deviation for pictures, which keeps the error a plain squared
    # error.
    centre = train.x.mean(0)
    unit = train.x.std(0).clamp_min(1e-6) if len(shape) == 1 else train.x.std().clamp_min(1e-6)
    low, high = train.x.amin(), train.x.amax()
    with seeds.torch_seeded(seed, "leakage", "decoder"):
        model = decoder(tuple(code), shape).to(device)

    def answer(rows: Tensor, by: Scale = scale, jitter: float = 0.0) -> Tensor:
        normal = by(flat(rows))
        decoded: Tensor = model((normal + jitter * torch.randn_like(normal)).view(-1, *code))
        return decoded

    def loss(rows: Tensor) -> Tensor:
        if random:
            with torch.no_grad():
                given = encode(train.x[rows])
        else:
            given = z[rows]
        return functional.mse_loss(answer(given, jitter=jitter), (train.x[rows] - centre) / unit)

    steps = fit(
        model,
        loss,
        lambda: functional.mse_loss(answer(z_held), (held.x - centre) / unit),
        len(train),
        budget,
        seed,
        "decoder",
        device=device,
    )

    @torch.no_grad()
    def attack(rows: Tensor) -> Tensor:
        return torch.cat([(answer(part, real) * unit + centre).clamp(low, high) for part in rows.split(256)])

    return attack, steps


def _surrogate(
    z: Tensor,
    y: Tensor,
    train: Samples,
    held: Samples,
    server: nn.Module | None,
    surrogate: nn.Module | None,
    defence: Client | None,
    task: Task | None,
    seed: int,
    budget: Budget,
) -> Client:
    """Train a stand-in for the client part from observed (z, y), auxiliary data and the server part. Without a `task`
    the attacker has no labels.
    """
    of = _classes if task is not None and task.targets == "class" else _one_class
    device, code = z.device, tuple(z.shape[1:])
    with seeds.torch_seeded(seed, "leakage", "surrogate"):
        model = surrogate or Encoder(
            tuple(train.x.shape[1:]), code, nonnegative=defence is None and bool((z >= 0).all())
        )
        model.to(device)
    observed, centre, unit = _moments(flat(z), of(y)), train.x.mean(), train.x.std().clamp_min(1e-6)
    spread = flat(z).std(0).square().mean().clamp_min(1e-12)
    frozen = _frozen(server)

    def encode(x: Tensor) -> Tensor:
        given: Tensor = model(x) if surrogate is not None else model((x - centre) / unit)
        return given if defence is None else defence(given)

    def distance(samples: Samples) -> Tensor:
        given = encode(samples.x)
        apart = torch.zeros((), device=device)
        for label, (mean, deviation, share) in _moments(given.flatten(1), of(samples.y)).items():
            if label in observed:
                m, s, _ = observed[label]
                apart = apart + share * ((mean - m).square() + (deviation - s).square()).mean() / spread
        if frozen is None or task is None:
            return apart
        losses = task.row_losses(as_tuple(frozen(given)), samples.y)
        return apart + mean_loss(losses, task.weights(samples.y))

    # Moments per class need more rows than a decoder's step does.
    larger = replace(budget, steps=budget.steps // 2, batch=2 * budget.batch)
    fit(
        model,
        lambda rows: distance(train[rows]),
        lambda: distance(held),
        len(train),
        larger,
        seed,
        "surrogate",
        device=device,
    )
    return torch.no_grad()(encode)


def _frozen(server: nn.Module | None) -> nn.Module | None:
    """A copy of the server part in evaluation mode, whose weights take no gradients."""
    if server is None:
        return None
    return copy.deepcopy(server).eval().requires_grad_(False)


def _classes(y: Tensor) -> Tensor:
    return y


def _one_class(y: Tensor) -> Tensor:
    """Everything is of one class: [n]."""
    return torch.zeros(len(y), dtype=torch.int64, device=y.device)


def _moments(rows: Tensor, y: Tensor) -> dict[int, tuple[Tensor, Tensor, float]]:
    """For each class with at least two rows: mean [d], deviation [d], share of rows [n, d]."""
    found = {}
    for label in y.unique().tolist():
        own = rows[y == label]
        if len(own) > 1:
            found[int(label)] = own.mean(0), (own.var(0) + 1e-8).sqrt(), len(own) / len(rows)
    return found
