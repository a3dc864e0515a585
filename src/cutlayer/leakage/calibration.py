"""The readings of an estimator for known answers, and whether two readings may be ranked.

Known answers, of the sizes of the run at hand: - "pairs": x and z are Gaussian vectors whose leading coordinates are
correlated one to one; - "channel": x is Gaussian with the data's own covariance (pictures stay smooth), z = A x + N(0,
s^2) with A the client part's Jacobian at the mean input, or a random matrix of its shape; I(x; z) = 1/2 log det(1 + A
Cov(x) A^T / s^2). The strength (correlation, or s) is set so that the true information has a given number of nats.

The error of an estimator is the distance of its reading from this truth. It is mostly bias: it hardly shrinks with more
seeds, and is large for high-dimensional data and strong leakage. Two runs are ranked only if they differ by more.

Shape legend: n samples, d values of x, m values of z.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cutlayer import seeds
from cutlayer.errors import ConfigError
from cutlayer.leakage.inputs import Client, check_real, width
from cutlayer.rows import check_rows, flat

Case = Literal["pairs", "channel"]
Estimator = Callable[[Tensor, Tensor, int], float]  # (x, z, seed) -> nats


@dataclass(frozen=True)
class Known:
    """One known answer: `truth` and `reading` in nats, `error` = reading - truth."""

    case: Case
    truth: float
    reading: float
    error: float


@dataclass(frozen=True)
class Calibrated:
    """A reading (nats) beside the same estimator's readings for known answers.

    `error` is the largest absolute error among `known`; it is `reliable` if that is below half of the largest truth. If
    the estimator has them: `null` is its reading after z's rows are shuffled, `cap` its largest possible reading, and
    `warning` a reason not to trust it.
    """

    name: str
    reading: float
    known: tuple[Known, ...]
    error: float
    reliable: bool
    dimensions: tuple[int, int]
    samples: int
    null: float | None = None
    cap: float | None = None
    warning: str | None = None

    def __str__(self) -> str:
        """One sentence."""
        worst = max(self.known, key=lambda k: abs(k.error))
        verdict = "" if self.reliable else "; do not take the reading for an amount of information"
        return (
            f"{self.name} reads {self.reading:.2f} nats; with {self.samples} samples of {self.dimensions[0]} and "
            f"{self.dimensions[1]} values, where the truth is {worst.truth:.2f} nats, it reads "
            f"{worst.reading:.2f} ({worst.case}){verdict}{f'; {self.warning}' if self.warning else ''}."
        )


def calibrate(
    name: str,
    estimator: Estimator,
    x: Tensor,
    z: Tensor,
    *,
    client: Client | None = None,
    levels: tuple[float, ...] | None = None,
    seed: int = 0,
    reading: float | None = None,
) -> Calibrated:
    """Read (x [n, ...], z [n, ...]), then known answers of the same sizes, with the same estimator.

    `levels` are the true informations in nats; by default the reading itself and twice that (at least 0.5 and 1), since
    a reading may be far too low. `reading` is given if it was already taken. With `client`, its Jacobian makes the
    channel. Costs 1 + 2 len(levels) estimates. Raises ConfigError for a level <= 0; DataError as the estimator does.
    """
    check_real(x, "x")
    check_real(z, "z")
    n = check_rows(20, "to calibrate with", x=x, z=z)
    reading = estimator(x, z, seed) if reading is None else reading
    if levels is None:
        levels = (max(reading, 0.5), max(2 * reading, 1.0))
    matrix = jacobian(client, x.mean(0)) if client is not None else None
    known = []
    for at, level in enumerate(levels):
        cases: dict[Case, tuple[Tensor, Tensor, float]] = {
            "pairs": pairs(n, width(x), width(z), level, seed + at),
            "channel": channel(x, width(z), level, seed + at, matrix),
        }
        for case, (a, b, truth) in cases.items():
            answer = estimator(a.view(x.shape).to(x), b.view(z.shape).to(z), seed)
            known.append(Known(case, truth, answer, answer - truth))
    error = max(abs(k.error) for k in known)
    return Calibrated(
        name=name,
        reading=reading,
        known=tuple(known),
        error=error,
        reliable=error < max(k.truth for k in known) / 2,
        dimensions=(width(x), width(z)),
        samples=n,
    )


def pairs(n: int, d: int, m: int, nats: float, seed: int = 0) -> tuple[Tensor, Tensor, float]:
    """Gaussian a [n, d], b [n, m] with I(a; b) = `nats`: the first min(d, m) coordinates are equally correlated.

    Raises ConfigError for nats <= 0.
    """
    _check_level(nats)
    k = min(d, m)
    rho = math.sqrt(-math.expm1(-2 * nats / k))
    draw = seeds.torch_generator(seed, "leakage", "pairs")
    a, b = torch.randn(n, d, generator=draw), torch.randn(n, m, generator=draw)
    b[:, :k] = rho * a[:, :k] + math.sqrt(1 - rho**2) * b[:, :k]
    return a, b, nats


def channel(
    x: Tensor, m: int, nats: float, seed: int = 0, matrix: Tensor | None = None
) -> tuple[Tensor, Tensor, float]:
    """Gaussian a [n, d] with the covariance of x [n, ...], and b = matrix a + noise [n, m], with I(a; b) = `nats`.

    The covariance is the samples' (its rank is below n). `matrix` [m, d] is random if it is not given. Raises
    ConfigError for nats <= 0, or if x or the matrix lets nothing through.
    """
    _check_level(nats)
    rows = flat(x).cpu()
    n, d = rows.shape
    draw = seeds.torch_generator(seed, "leakage", "channel")
    if matrix is None:
        matrix = torch.randn(m, d, generator=draw) / math.sqrt(d)
    matrix = matrix.cpu()
    root = (rows - rows.mean(0)) / math.sqrt(n - 1)  # [n, d]: root^T root is the covariance
    power = torch.linalg.eigvalsh(_smaller_gram(root @ matrix.T)).clamp_min(0)
    if not float(power.max()) > 0:
        raise ConfigError("the channel passes nothing: x is constant, or the client part's Jacobian is 0 at its mean")
    sigma = _noise(power, nats)
    a = torch.randn(n, n, generator=draw) @ root + rows.mean(0)
    b = (a - rows.mean(0)) @ matrix.T + sigma * torch.randn(n, m, generator=draw)
    return a, b, 0.5 * float(torch.log1p(power / sigma**2).sum())


def _smaller_gram(rows: Tensor) -> Tensor:
    rows = rows.double()
    return rows.T @ rows if rows.shape[1] <= rows.shape[0] else rows @ rows.T


def _noise(power: Tensor, nats: float) -> float:
    """The deviation at which 1/2 sum log(1 + power / deviation^2) = nats."""
    from scipy.optimize import brentq  # type: ignore[import-untyped]

    def excess(log_sigma: float) -> float:
        return 0.5 * float(torch.log1p(power * math.exp(-2 * log_sigma)).sum()) - nats

    centre = 0.5 * math.log(float(power.max()))
    return math.exp(float(brentq(excess, centre - 200, centre + 50)))


def jacobian(client: Client, at: Tensor) -> Tensor:
    """The client part's derivative at one input `at` [...]: [m, d]; its random draws, if any, are kept fixed.

    A module must be in evaluation mode: batch normalisation would normalise the one row to 0.
    """

    def once(v: Tensor) -> Tensor:
        with seeds.torch_seeded(0, "leakage", "jacobian", device=at.device):
            return client(v[None]).flatten()

    with torch.enable_grad():
        derivative: Tensor = torch.func.jacrev(once, chunk_size=256)(at)
    return derivative.detach().flatten(1)


@dataclass(frozen=True)
class Ranking:
    """Which of two runs leaks more: 1 the first, -1 the second, 0 not distinguishable; and why, in one sentence."""

    order: Literal[-1, 0, 1]
    difference: float
    error: float
    sentence: str


def rank(a: Calibrated, b: Calibrated) -> Ranking:
    """Rank two runs read by the same estimator, if they differ by more than the larger error.

    Raises ConfigError if the two are not comparable: other estimators, dimensions or sample sizes.
    """
    if (a.name, a.samples) != (b.name, b.samples) or a.dimensions[0] != b.dimensions[0]:
        raise ConfigError(
            f"{a.name} of {a.samples} samples of {a.dimensions[0]} values and {b.name} of {b.samples} samples of "
            f"{b.dimensions[0]} values cannot be ranked: read both runs with one estimator on inputs of one size"
        )
    difference, error = a.reading - b.reading, max(a.error, b.error)
    if abs(difference) <= error:
        sentence = (
            f"not ranked: {a.reading:.2f} and {b.reading:.2f} nats by {a.name} differ by {abs(difference):.2f}, and "
            f"where the answer is known it is wrong by up to {error:.2f}"
        )
        return Ranking(0, difference, error, sentence)
    more, less = ("first", "second") if difference > 0 else ("second", "first")
    sentence = (
        f"the {more} run leaks more than the {less} by {a.name}: {a.reading:.2f} and {b.reading:.2f} nats differ by "
        f"{abs(difference):.2f}, more than its error of {error:.2f} where the answer is known"
    )
    return Ranking(1 if difference > 0 else -1, difference, error, sentence)


def _check_level(nats: float) -> None:
    if not 0 < nats < math.inf:
        raise ConfigError(f"{nats} nats cannot be a level of calibration: give one above 0")
