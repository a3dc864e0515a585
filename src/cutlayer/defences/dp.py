"""What noise on clipped smashed data guarantees: differential privacy of a sample against the server.

The mechanism: at every release the client clips the smashed data of each of its samples to norm `clip` (all tensors
that cross taken together; L2 for Gaussian noise, L1 for Laplace) and adds independent noise to every value. Replacing a
sample by any other moves its clipped row by at most 2 clip: that is the sensitivity, and the adjacency is "replace
one".

Composition: batches are shuffled epochs without replacement, so a sample is released exactly once per epoch; within an
epoch the rows of different samples are different data (parallel composition), over T epochs T releases compose.
Sampling does NOT amplify: the server sees every single row, and knows that each sample is sent once per epoch.

- Gaussian: T releases of deviation sigma are one of deviation sigma / sqrt(T), adaptive or not (Dong, Roth & Su,
  arXiv 1905.02383, corollary 3.3), whose epsilon at a delta is exact (Balle & Wang, arXiv 1805.06530, theorem 8).
- Laplace of scale s: T 2 clip / s, delta 0 (Dwork & Roth 2014, theorems 3.6 and 3.14).

`Statement.protects` and `Statement.not_covered` say what the statement covers and what it does not: read them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from cutlayer.errors import ConfigError

Noise = Literal["gaussian", "laplace"]

PROTECTS = (
    "the smashed data of one sample against the server, at every release, given the weights that the client part has "
    "then: replacing the sample by any other changes the probability of what the server sees of it by at most this"
)
LABELS = "the labels, which go up in clear"
TAILS = "the gradients that the client's tail sends up, which depend on labels and have no noise"
NOT_COVERED = (
    "what a sample does to other rows through the client part's weights, which are trained on it without noise "
    "(a frozen client part has no such path)",
    "batch normalisation in training mode, which lets a sample change the other rows of its batch",
    "client models that leave the client, as where they are averaged or handed over",
    "several samples of one person: k samples cost k times epsilon",
    "an observer who can draw the noise again: torch's generator is not cryptographic, and in a simulation it is "
    "seeded by the run's seed (clients on other machines draw from a secret of their own)",
    "whole numbers and masks that cross beside the smashed data",
)


@dataclass(frozen=True)
class Statement:
    """(epsilon, delta)-differential privacy, replace-one adjacency, of `releases` releases of one sample.

    `scale` is the noise's standard deviation (Gaussian) or its scale (Laplace), `norm` the norm that is clipped to
    `clip`, `sensitivity` = 2 clip. `epsilon` is infinite without noise. `once` is the epsilon of a single release.
    """

    noise: Noise
    scale: float
    norm: Literal["L2", "L1"]
    clip: float
    sensitivity: float
    releases: int
    epsilon: float
    delta: float
    once: float
    protects: str = PROTECTS
    not_covered: tuple[str, ...] = (LABELS, *NOT_COVERED)

    def __str__(self) -> str:
        """One sentence."""
        if math.isinf(self.epsilon):
            return "No noise is added: nothing is guaranteed (epsilon is infinite)."
        return (
            f"{self.noise.capitalize()} noise of scale {self.scale:.4g} on smashed data clipped to {self.norm} norm "
            f"{self.clip:.4g}, each sample sent {self.releases} times: epsilon = {self.epsilon:.4g} at delta = "
            f"{self.delta:.2g} (replace one sample; no amplification by sampling)."
        )


def gaussian(sigma: float, clip: float, epochs: int, delta: float = 1e-5, *, labels: bool = True) -> Statement:
    """The statement for Gaussian noise of standard deviation `sigma` per value, L2 clipping, one release per epoch.
    `labels` go up, or stay.

    Raises ConfigError: sigma < 0, clip <= 0, epochs < 1, delta outside (0, 1).
    """
    _check(clip, epochs)
    _check_delta(delta)
    _check_scale("sigma", sigma)
    step = 2 * clip / sigma if sigma else math.inf
    epsilon, once = _epsilon(step * math.sqrt(epochs), delta), _epsilon(step, delta)
    return Statement(
        "gaussian", sigma, "L2", clip, 2 * clip, epochs, epsilon, delta, once, not_covered=_not_covered(labels)
    )


def laplace(scale: float, clip: float, epochs: int, *, labels: bool = True) -> Statement:
    """The statement for Laplace noise of scale `scale` (deviation sqrt(2) scale) per value, L1 clipping; delta is 0.
    `labels` go up, or stay.

    Raises ConfigError: scale < 0, clip <= 0, epochs < 1.
    """
    _check(clip, epochs)
    _check_scale("scale", scale)
    once = 2 * clip / scale if scale else math.inf
    return Statement(
        "laplace", scale, "L1", clip, 2 * clip, epochs, epochs * once, 0.0, once, not_covered=_not_covered(labels)
    )


def _not_covered(labels: bool) -> tuple[str, ...]:
    return (LABELS if labels else TAILS, *NOT_COVERED)


def gaussian_for(epsilon: float, clip: float, epochs: int, delta: float = 1e-5) -> Statement:
    """The least Gaussian noise that gives `epsilon` at `delta` over all epochs.

    Raises ConfigError as `gaussian` does, and for an epsilon <= 0 or not finite.
    """
    _check(clip, epochs)
    _check_delta(delta)
    _check_epsilon(epsilon)
    mu = _solve(lambda m: _delta(epsilon, m) - delta)
    return gaussian(2 * clip * math.sqrt(epochs) / mu, clip, epochs, delta)


def laplace_for(epsilon: float, clip: float, epochs: int) -> Statement:
    """The least Laplace noise that gives `epsilon` over all epochs. Raises ConfigError as `gaussian_for` does."""
    _check(clip, epochs)
    _check_epsilon(epsilon)
    return laplace(2 * clip * epochs / epsilon, clip, epochs)


@dataclass(frozen=True)
class Sampled:
    """Epsilon at `delta` of the sampled Gaussian mechanism, by two accountants of opacus; both are upper bounds."""

    rdp: float
    prv: float
    delta: float


def sampled_gaussian(multiplier: float, rate: float, steps: int, delta: float = 1e-5) -> Sampled:
    """What `steps` noisy SUMS over Poisson samples (each sample with probability `rate`) cost; add-or-remove adjacency.

    `multiplier` is sigma / sensitivity. This is the setting of DP-SGD and of published numbers, to compare with. It is
    NOT a statement about smashed data, which are sent row by row and in shuffled epochs. With rate = 1, both settings
    are equal. Accountants: Mironov et al., arXiv 1908.10530 (RDP); Gopi et al., arXiv 2106.02848 (PRV, error 0.01).
    Raises ConfigError: multiplier <= 0, rate outside (0, 1], steps < 1, delta outside (0, 1).
    """
    _check_delta(delta)
    if not (0 < multiplier < math.inf and 0 < rate <= 1 and steps >= 1):
        raise ConfigError(
            f"multiplier={multiplier}, rate={rate}, steps={steps}: give a noise multiplier above 0, a sampling rate in "
            "(0, 1] and at least one step"
        )
    import numpy as np
    from opacus.accountants import PRVAccountant, RDPAccountant  # type: ignore[import-untyped]

    rdp, prv = RDPAccountant(), PRVAccountant()
    rdp.history = prv.history = [(multiplier, rate, steps)]
    # With rate = 1 the PRV accountant takes log(0), whose limit is right; the warning is about a bound that only sizes
    # its grid, and stays valid.
    with np.errstate(divide="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Optimal order is the", UserWarning)
        return Sampled(float(rdp.get_epsilon(delta)), float(prv.get_epsilon(delta)), delta)


def _delta(epsilon: float, mu: float) -> float:
    """The least delta at `epsilon` of a Gaussian release whose sensitivity is `mu` deviations."""
    from scipy.special import log_ndtr  # type: ignore[import-untyped]

    high, low = mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu
    return math.exp(log_ndtr(high)) - math.exp(min(epsilon + log_ndtr(low), 0.0))


def _epsilon(mu: float, delta: float) -> float:
    """The least epsilon at `delta` of a Gaussian release whose sensitivity is `mu` deviations."""
    if math.isinf(mu):
        return math.inf
    if _delta(0.0, mu) <= delta:
        return 0.0
    return _solve(lambda epsilon: delta - _delta(epsilon, mu))


def _solve(rising: Callable[[float], float]) -> float:
    """The zero, on the positive axis, of a rising function that starts below 0."""
    from scipy.optimize import brentq  # type: ignore[import-untyped]

    high = 1.0
    while rising(high) < 0:
        high *= 2
    low = high
    while rising(low) > 0:
        low /= 2
    return float(brentq(rising, low, high, xtol=1e-300, rtol=1e-12)) if low < high else high


def _check(clip: float, epochs: int) -> None:
    if not 0 < clip < math.inf:
        raise ConfigError(f"clip={clip}: without a finite bound on a row no noise guarantees anything; give clip > 0")
    if epochs < 1:
        raise ConfigError(f"epochs={epochs}: a sample that is never sent needs no statement; give at least 1")


def _check_scale(name: str, scale: float) -> None:
    if not 0 <= scale < math.inf:
        raise ConfigError(f"{name}={scale}: noise has a finite scale of at least 0")


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        hint = "no Gaussian noise gives delta = 0: use Laplace noise, or a delta such as 1e-5"
        raise ConfigError(f"delta={delta}: {hint if delta == 0 else 'give a number between 0 and 1, such as 1e-5'}")


def _check_epsilon(epsilon: float) -> None:
    if not 0 < epsilon < math.inf:
        raise ConfigError(
            f"epsilon={epsilon}: no noise with a finite scale reaches it; give a finite epsilon above 0, or add no "
            "noise"
        )
