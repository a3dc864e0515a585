"""Usable information: the reduction in the coding cost of x, in nats, for a predictor that sees z.

V-information (Xu et al., arXiv 2002.10689): I_V(z -> x) = H_V(x) - H_V(x | z), where H_V is the least expected coding
cost -log q(x) that a predictor of the family V reaches. V here: Gaussian predictive densities, - without z: a mean and
a covariance; - with z: a mean that depends on z (a network's or a ridge regression's), or does not, and the residuals'
covariance. Covariances are diagonal, shrunk full (Ledoit & Wolf), or low-rank plus diagonal (factor analysis); each
side uses the predictor that codes best on validation rows (z is used only if it saves more than a standard error
there), and the cost is that of test rows.

What it bounds: the cost with z is that of a predictor that was really found, so better predictors may exist, and the
CONDITIONAL cost is an upper bound. For Gaussian x the drop is then a lower estimate of I(x; z), up to the error of the
marginal's fit. For other x it is not a bound on I(x; z): the marginal cost of a Gaussian exceeds x's entropy, and a z
that only says which cluster x is in may save more than the clusters' entropy.

Continuous values have no coding cost without a resolution, and pixels that never change have no density: the coded
value is x + N(0, resolution^2), drawn once. By the data-processing inequality that can only lower the information.

Shape legend: n samples, d values of x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from cutlayer import seeds
from cutlayer.errors import ConfigError
from cutlayer.leakage.fitting import Budget, fit
from cutlayer.leakage.inputs import Scale, check_real, split
from cutlayer.leakage.networks import decoder
from cutlayer.rows import check_rows, flat

Array = npt.NDArray[np.float64]

LEAST = 200  # samples: a mean, a covariance, a choice and a report each need some of their own
BUDGET = Budget(steps=600, batch=64, lr=1e-3, check_every=40, patience=4)


@dataclass(frozen=True)
class Usable:
    """The drop in held-out coding cost of x when z is known.

    `nats` per sample (may be below 0 by chance) with a 95 % interval `low`..`high` from resampling test samples: it
    shows the uncertainty of the mean over samples, not how much better another training would be. `bits_per_dimension`
    is nats / (d ln 2). `cost` and `cost_given_z` are nats per sample at `resolution` (in units of x); `marginal`,
    `mean` and `residual` name what coded best.
    """

    nats: float
    low: float
    high: float
    bits_per_dimension: float
    cost: float
    cost_given_z: float
    marginal: str
    mean: str
    residual: str
    resolution: float
    dimensions: int
    samples: int
    test_samples: int


def usable(
    x: Tensor,
    z: Tensor,
    *,
    resolution: float = 0.05,
    seed: int = 0,
    budget: Budget = BUDGET,
    resamples: int = 1000,
) -> Usable:
    """The usable information of z [n, ...] about x [n, ...]; `resolution` as a share of x's overall deviation.

    Rows: 50 % train the means, 20 % (validation) stop them early and fit the covariances of what they leave, 10 %
    choose, the rest (test) is coded. Raises DataError: fewer than 200 samples, unequal rows, NaN, x not real;
    ConfigError: resolution <= 0.
    """
    check_real(x, "x")
    check_real(z, "z")
    n = check_rows(LEAST, "to code", x=x, z=z)
    if not 0 < resolution < math.inf:
        raise ConfigError(f"resolution={resolution}: give a share of x's deviation above 0, such as 0.05")
    target, unit = flat(x), float(x.detach().float().std()) or 1.0
    noise = torch.randn(target.shape, generator=seeds.torch_generator(seed, "leakage", "resolution"))
    target = target / unit + resolution * noise.to(target)  # [n, d], in units of x's deviation
    parts = split(n, seed, "usable", shares=(0.5, 0.3))
    train, held, test = (rows.to(x.device) for rows in (parts.train, parts.validation, parts.test))
    fitting, choosing = held[: len(held) * 2 // 3], held[len(held) * 2 // 3 :]

    floor = resolution**2
    known = torch.cat([train, fitting])
    mean = target[known].mean(0)
    judges = _numpy(choosing)
    around = _array(target - mean)
    marginal = _best(around[_numpy(known)], around[judges], floor)
    ridge, left_out = _ridge(flat(z), target, known)
    network = _network(z, target, x.shape[1:], train, fitting, seed, budget)
    means = {"none": around, "ridge": _array(target - ridge), "network": _array(target - network)}  # what they leave
    fits = {"ridge": _array(left_out), "network": means["network"][_numpy(fitting)]}  # the same on rows not trained on
    chosen = {"none": marginal}
    for name, rows in fits.items():
        code = _best(rows, means[name][judges], floor, marginal)
        saved = marginal.cost(around[judges]) - code.cost(means[name][judges])
        # Within a standard error of the validation mean, a predictor is noise, and would only cost more on the test
        # rows.
        if saved.mean() > saved.std() / math.sqrt(len(saved)):
            chosen[name] = code
    best = min(chosen, key=lambda name: chosen[name].judged)
    tested = _numpy(test)
    without = marginal.cost(around[tested])
    with_z = chosen[best].cost(means[best][tested])
    drop = without - with_z  # [test]
    low, high = _interval(drop, seed, resamples)
    d = target.shape[1]
    return Usable(
        nats=float(drop.mean()),
        low=low,
        high=high,
        bits_per_dimension=float(drop.mean()) / d / math.log(2),
        cost=float(without.mean()) + d * math.log(unit),
        cost_given_z=float(with_z.mean()) + d * math.log(unit),
        marginal=marginal.name,
        mean=best,
        residual=chosen[best].name,
        resolution=resolution * unit,
        dimensions=d,
        samples=n,
        test_samples=len(test),
    )


@dataclass(frozen=True)
class _Code:
    """A Gaussian code for rows of mean 0: its kind, its covariance [d, d], the mean cost of the rows that chose it."""

    name: str
    covariance: Array
    judged: float

    def cost(self, rows: Array) -> Array:
        """Nats of rows [n, d]: [n]."""
        return _cost(self.covariance, rows)


def _best(rows: Array, judges: Array, floor: float, prior: _Code | None = None) -> _Code:
    """The covariance, fitted to rows [n, d], with the lowest cost on the validation rows. Variances are at least
    `floor`.

    With `prior`, mixtures of the best one with the prior's covariance compete too: few rows fit a covariance badly.
    """
    n, d = rows.shape
    variances = np.maximum((rows**2).mean(0), floor)
    candidates = {"diagonal": np.diag(variances)}
    if d > 1:
        from sklearn.covariance import ledoit_wolf  # type: ignore[import-untyped]

        # Shrunk as a correlation matrix, so that quiet values stay quiet.
        scale = np.sqrt(variances)
        correlations = ledoit_wolf(rows / scale, assume_centered=True)[0]
        candidates["full"] = _raised(correlations * np.outer(scale, scale), floor)
    for rank in (5, 20):
        if d > 3 * rank and n > 5 * rank:
            candidates[f"rank {rank}"] = _factors(rows, variances, rank, floor)
    best = _cheapest(candidates, judges)
    if prior is None:
        return best
    mixed = {
        f"{best.name}, {share:.0%} of the marginal": (1 - share) * best.covariance + share * prior.covariance
        for share in (0.1, 0.3, 0.6)
    }
    return _cheapest({best.name: best.covariance, **mixed}, judges)


def _cheapest(candidates: dict[str, Array], judges: Array) -> _Code:
    codes = [_Code(name, c, float(_cost(c, judges).mean())) for name, c in candidates.items()]
    return min(codes, key=lambda code: code.judged)


def _factors(rows: Array, variances: Array, rank: int, floor: float) -> Array:
    """Factor analysis: low rank plus diagonal, [d, d]."""
    from sklearn.decomposition import FactorAnalysis  # type: ignore[import-untyped]

    scale = np.sqrt(variances)
    model = FactorAnalysis(rank, max_iter=30, tol=1e9, svd_method="randomized", random_state=0).fit(rows / scale)
    covariance: Array = model.get_covariance() * np.outer(scale, scale)
    return _raised(covariance, floor)


def _raised(covariance: Array, floor: float) -> Array:
    """The covariance with eigenvalues of at least `floor`: the resolution's noise is in every direction."""
    values, vectors = np.linalg.eigh(covariance)
    raised: Array = (vectors * np.maximum(values, floor)) @ vectors.T
    return raised


def _cost(covariance: Array, rows: Array) -> Array:
    """-log N(row; 0, covariance) of rows [n, d]: [n]."""
    from scipy.linalg import solve_triangular  # type: ignore[import-untyped]

    factor = np.linalg.cholesky(covariance)
    white = solve_triangular(factor, rows.T, lower=True)
    constant = np.log(np.diag(factor)).sum() + 0.5 * len(factor) * math.log(2 * math.pi)
    return np.asarray(constant + 0.5 * (white**2).sum(0), dtype=np.float64)


def _ridge(z: Tensor, target: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Ridge regression of target [n, d] on z: predictions for all rows, and the known rows' leave-one-out residuals.

    The penalty is the one with the least leave-one-out error; both in closed form, in the eigenbasis of the Gram
    matrix.
    """
    z = Scale.of(z[known])(z)
    centre, wanted = target[known].mean(0), target[known]
    gram = (z @ z[known].T).double()  # [n, known]
    values, vectors = torch.linalg.eigh(gram[known])
    values = values.clamp_min(0)
    code = vectors.T @ (wanted - centre).double()
    best, least = 0.0, math.inf
    left_out = wanted - centre
    for penalty in (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0):
        share = values / (values + penalty * z.shape[1] * len(known) / 100)
        leverage = (vectors**2 @ share + 1 / len(known)).clamp_max(1 - 1e-6)
        left = ((wanted - centre).double() - (vectors * share) @ code) / (1 - leverage)[:, None]
        error = float((left**2).mean())
        if error < least:
            best, least, left_out = penalty, error, left.float()
    weights = vectors / (values + best * z.shape[1] * len(known) / 100)
    return centre + (gram @ (weights @ code)).float(), left_out


def _network(
    z: Tensor, target: Tensor, shape: torch.Size, train: Tensor, judges: Tensor, seed: int, budget: Budget
) -> Tensor:
    """The predictions [n, d] of a decoder trained on squared error, with early stopping by the validation rows."""
    z = Scale.of(flat(z)[train])(flat(z)).view(z.shape)
    mean = target[train].mean(0)
    wanted = (target - mean).view(-1, *shape)
    with seeds.torch_seeded(seed, "leakage", "usable decoder"):
        model = decoder(tuple(z.shape[1:]), tuple(shape)).to(z.device)

    def loss(rows: Tensor) -> Tensor:
        chosen = train[rows]
        return functional.mse_loss(model(z[chosen]), wanted[chosen])

    fit(
        model,
        loss,
        lambda: functional.mse_loss(model(z[judges]), wanted[judges]),
        len(train),
        budget,
        seed,
        "usable",
        device=z.device,
    )
    with torch.no_grad():
        predicted = torch.cat([model(rows) for rows in z.split(256)]).flatten(1)
    return predicted + mean


def _interval(values: Array, seed: int, resamples: int) -> tuple[float, float]:
    """A 95 % bootstrap interval of the mean of values [n]."""
    draw = seeds.generator(seed, "leakage", "bootstrap")
    means = values[draw.integers(0, len(values), (resamples, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _array(t: Tensor) -> Array:
    return t.detach().double().cpu().numpy()


def _numpy(rows: Tensor) -> npt.NDArray[np.int64]:
    return rows.cpu().numpy()
