"""Mutual information of inputs and smashed data, in nats: held-out lower estimates and upper bounds.

Estimators, on pairs (a, b) of few dimensions (see `calibration` for what they read where the answer is known):
- KSG: nearest neighbours (Kraskov, Stoegbauer & Grassberger 2004, algorithm 1); no bound, biased down in high
  dimension;
- InfoNCE (van den Oord et al., arXiv 1807.03748): a lower bound, at most ln N for N test rows;
- MINE (Belghazi et al., arXiv 1801.04062): Donsker-Varadhan, its gradient's bias corrected by a moving average;
- SMILE (Song & Ermon, arXiv 1910.06222): clipped densities, trained on the Jensen-Shannon bound. Not a bound.
MINE's expression is a lower bound for infinitely many test rows only: for few, the logarithm of a mean reads low and
the estimate high. No estimator of this kind can certify more than O(ln N) (McAllester & Stratos, arXiv 1811.04251).

Views: high-dimensional x and z are first projected on k dimensions each. Projecting never adds information, so a lower
bound for the projections is also a lower bound for x and z.
- "random": the mean over random k-dimensional subspaces (k-sliced mutual information, Goldfeld et al., arXiv
  2206.08526); it is a quantity of its own, usually far below that of x and z;
- "pca": the leading principal components of each; "cca": the leading canonical pairs (of principal components);
- "raw": the tensors themselves, flagged: with a few thousand samples no estimator is reliable there.

Shape legend: n samples, S slices, k dimensions of a slice, e dimensions of an embedding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cutlayer import seeds
from cutlayer.errors import ConfigError, unknown
from cutlayer.leakage.calibration import Estimator
from cutlayer.leakage.fitting import Budget
from cutlayer.leakage.inputs import Scale, Split, check_real, split
from cutlayer.rows import check_rows, flat

Method = Literal["ksg", "infonce", "smile", "mine"]
View = Literal["random", "pca", "cca", "raw"]

LEAST = 100  # samples: with fewer, a fifth of them is too few for a test
NEURAL = Budget(steps=600, batch=128, lr=3e-3, check_every=50, patience=4)
_CLIP = 5.0  # SMILE's tau


@dataclass(frozen=True)
class Estimate:
    """A held-out reading, in nats.

    `nats` is the mean over the view's slices, `null` the same procedure's reading after z's rows are shuffled (about 0;
    the rest is noise), `cap` the largest possible reading of this estimator (None: no cap). `bound` says whether the
    expected reading is a lower bound on the view's information. `warning` is None or a reason not to trust it.
    """

    method: Method
    view: View
    dimensions: tuple[int, int]
    slices: int
    nats: float
    null: float
    cap: float | None
    bound: bool
    samples: int
    test_samples: int
    warning: str | None


@dataclass(frozen=True)
class UpperBound:
    """An upper bound on the information about x that crosses the cut, in nats per sample, with the reason and the
    assumptions.
    """

    kind: Literal["gaussian channel", "laplace channel", "quantisation", "tokens", "deterministic"]
    nats: float
    reason: str


# --- lower estimates ---------------------------------------------------------------------------------------------


def estimate(
    x: Tensor,
    z: Tensor,
    *,
    method: Method,
    view: View = "cca",
    k: int = 2,
    slices: int = 8,
    seed: int = 0,
    budget: Budget = NEURAL,
) -> Estimate:
    """The reading of one estimator on one view of x [n, ...] and z [n, ...].

    Projections and critics are fitted on 60 % of the rows, chosen on 20 %, reported on the rest. `slices` counts for
    the random view only. Raises ConfigError: unknown method or view, k or slices < 1; DataError: fewer than 100
    samples, unequal rows, NaN.
    """
    if method not in get_args(Method):
        raise ConfigError(unknown("method", method, get_args(Method)))
    if view not in get_args(View):
        raise ConfigError(unknown("view", view, get_args(View)))
    if k < 1 or slices < 1:
        raise ConfigError(f"k={k}, slices={slices}: give at least one dimension and one slice")
    for name, t in (("x", x), ("z", z)):
        check_real(t, name)
    n = check_rows(LEAST, "to estimate mutual information from", x=x, z=z)
    parts = split(n, seed, "mutual")
    a, b = _views(flat(x), flat(z), view, k, slices, parts, seed)  # [S, n, k] each
    shuffled = b.clone()
    for name, rows in (("train", parts.train), ("validation", parts.validation), ("test", parts.test)):
        order = torch.from_numpy(seeds.generator(seed, "leakage", "null", name).permutation(len(rows)))
        shuffled[:, rows] = b[:, rows[order]]
    count = len(a)
    both = torch.cat([a, a]), torch.cat([b, shuffled])  # [2S, n, k]: the null is so many slices more
    if method == "ksg":
        test = parts.test.numpy()
        pairs = zip(*(t[:, test].cpu().double().numpy() for t in both), strict=True)
        readings = np.array([ksg(*pair) for pair in pairs])
    else:
        readings = _neural(*both, method, parts, seed, budget)
    tested = len(parts.test)
    return Estimate(
        method=method,
        view=view,
        dimensions=(a.shape[2], b.shape[2]),
        slices=count,
        nats=float(readings[:count].mean()),
        null=float(readings[count:].mean()),
        cap=math.log(tested) if method == "infonce" else None,
        bound=method == "infonce",
        samples=n,
        test_samples=tested,
        warning=_warning(method, view, a.shape[2] + b.shape[2], n),
    )


def _warning(method: Method, view: View, dimensions: int, n: int) -> str | None:
    if view == "raw" and dimensions > 10:
        return (
            f"{dimensions} dimensions and {n} samples: such a reading can be far too low; take it only beside what "
            "calibration.calibrate reads at these sizes"
        )
    if method == "ksg" and dimensions > 10:
        return f"KSG is biased down in {dimensions} dimensions: use few, or a critic"
    return None


def ksg(a: np.ndarray, b: np.ndarray, neighbours: int = 3) -> float:
    """Kraskov's first estimator on a [n, k], b [n, l]: nats, may be below 0.

    psi(K) + psi(n) - <psi(n_a + 1) + psi(n_b + 1)>, n_a and n_b counting points strictly nearer, in the maximum norm,
    than the K-th neighbour in the joint space. Distinct values are assumed: ties (discrete data) read too high.
    """
    from scipy.spatial import cKDTree  # type: ignore[import-untyped]
    from scipy.special import digamma  # type: ignore[import-untyped]

    n = len(a)
    joint = np.concatenate([a, b], axis=1)
    radius = cKDTree(joint).query(joint, neighbours + 1, p=math.inf)[0][:, -1]
    inside = np.nextafter(radius, 0)
    counts = [cKDTree(side).query_ball_point(side, inside, p=math.inf, return_length=True) for side in (a, b)]
    return float(digamma(neighbours) + digamma(n) - sum(digamma(c).mean() for c in counts))


def _views(x: Tensor, z: Tensor, view: View, k: int, slices: int, parts: Split, seed: int) -> tuple[Tensor, Tensor]:
    """The slices of x and z, standardised by the training rows: [S, n, k] each."""
    train = parts.train.to(x.device)
    x, z = Scale.of(x[train])(x), Scale.of(z[train])(z)
    if view == "raw":
        return x[None], z[None]
    if view == "random":
        sides = [
            torch.stack([t @ _directions(t.shape[1], k, seed, side, s).to(t) for s in range(slices)])
            for side, t in (("x", x), ("z", z))
        ]
    elif view == "pca":
        sides = [(t @ _principal(t[train], k))[None] for t in (x, z)]
    else:
        sides = [t[None] for t in _canonical(x, z, train, k)]
    a, b = (torch.stack([Scale.of(one[train])(one) for one in side]) for side in sides)
    return a, b


def _directions(d: int, k: int, seed: int, side: str, index: int) -> Tensor:
    """Uniformly random orthonormal directions: [d, min(k, d)]."""
    draw = seeds.torch_generator(seed, "leakage", "slice", side, index)
    directions: Tensor = torch.linalg.qr(torch.randn(d, min(k, d), generator=draw))[0]
    return directions


def _principal(rows: Tensor, k: int) -> Tensor:
    """The leading principal directions of rows [n, d], scaled to unit variance: [d, min(k, rank)]."""
    _, size, right = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    keep = min(k, max(1, int((size > 1e-4 * size[0]).sum())))
    directions: Tensor = right[:keep].T / size[:keep].clamp_min(1e-12) * math.sqrt(len(rows))
    return directions


def _canonical(x: Tensor, z: Tensor, train: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The leading k canonical pairs, from as many principal components as a tenth of the training rows can bear."""
    rank = max(k, len(train) // 10)
    whitened = [t @ _principal(t[train], rank) for t in (x, z)]
    left, _, right = torch.linalg.svd(whitened[0][train].T @ whitened[1][train], full_matrices=False)
    return whitened[0] @ left[:, :k], whitened[1] @ right[:k].T


# --- critics -----------------------------------------------------------------------------------------------------


class _Critics(nn.Module):
    """S separable critics at once: scores f_s(a_i) . g_s(b_j) of rows a [S, R, k] and b [S, R, l]: [S, R, R]."""

    def __init__(self, slices: int, dimensions: tuple[int, int], hidden: int, embedding: int = 16) -> None:
        super().__init__()
        self.layers = nn.ParameterList()
        for d in dimensions:
            # The last layer starts small: large first scores make the mean of exp(score) explode (MINE, SMILE).
            for inputs, outputs, gain in ((d, hidden, 1.0), (hidden, hidden, 1.0), (hidden, embedding, 0.3)):
                weight = torch.randn(slices, inputs, outputs) * gain * math.sqrt(2 / inputs)
                self.layers.extend([nn.Parameter(weight), nn.Parameter(torch.zeros(slices, 1, outputs))])

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """[S, R, k], [S, R, l] -> [S, R, R]."""
        f, g = self._embed(a, self.layers[:6]), self._embed(b, self.layers[6:])
        return f @ g.transpose(1, 2) / math.sqrt(f.shape[2])

    @staticmethod
    def _embed(rows: Tensor, layers: nn.ParameterList) -> Tensor:
        for at in (0, 2):
            rows = functional.relu(torch.baddbmm(layers[at + 1], rows, layers[at]))
        return torch.baddbmm(layers[5], rows, layers[4])


def _neural(a: Tensor, b: Tensor, method: Method, parts: Split, seed: int, budget: Budget) -> np.ndarray:
    """The readings [S] of critics, one per slice, trained side by side: each keeps its own best weights."""
    device, slices = a.device, len(a)
    train, validation, test = (rows.to(device) for rows in (parts.train, parts.validation, parts.test))
    with seeds.torch_seeded(seed, "leakage", "critic", method):
        hidden = 64 if a.shape[2] + b.shape[2] <= 64 else 256
        critics = _Critics(slices, (a.shape[2], b.shape[2]), hidden).to(device)
    optimizer = torch.optim.Adam(critics.parameters(), lr=budget.lr, weight_decay=1e-4)
    loss = _Loss(method)
    draw = seeds.torch_generator(seed, "leakage", "critic batches", method)
    best = torch.full((slices,), -math.inf, device=device)
    kept = [p.detach().clone() for p in critics.parameters()]
    left = budget.patience
    for step in range(1, budget.steps + 1):
        rows = train[torch.randperm(len(train), generator=draw)[: budget.batch].to(device)]
        optimizer.zero_grad()
        loss(critics(a[:, rows], b[:, rows])).backward()
        optimizer.step()
        if step % budget.check_every and step != budget.steps:
            continue
        with torch.no_grad():
            score = _reading(critics(a[:, validation], b[:, validation]), method)
        better = score > best
        best = torch.where(better, score, best)
        for old, new in zip(kept, critics.parameters(), strict=True):
            old[better] = new.detach()[better]
        left = budget.patience if bool(better.any()) else left - 1
        if left == 0:
            break
    with torch.no_grad():
        for weight, saved in zip(critics.parameters(), kept, strict=True):
            weight.copy_(saved)
        readings = _reading(critics(a[:, test], b[:, test]), method)
    # A critic that found nothing on validation is not better than the constant one, whose reading is 0.
    return torch.where(best > 0, readings, torch.zeros_like(readings)).double().cpu().numpy()


def _apart(scores: Tensor) -> Tensor:
    """The scores of rows that do not belong together: [S, R, R] -> [S, R (R - 1)]."""
    slices, rows, _ = scores.shape
    off = ~torch.eye(rows, dtype=torch.bool, device=scores.device)
    return scores[:, off].view(slices, rows * (rows - 1))


def _log_mean_exp(values: Tensor) -> Tensor:
    return values.logsumexp(1) - math.log(values.shape[1])


def _reading(scores: Tensor, method: Method) -> Tensor:
    """The estimate [S] of each critic from its scores [S, R, R] on held-out rows."""
    together = scores.diagonal(dim1=1, dim2=2)  # [S, R]
    if method == "infonce":
        return (together - scores.logsumexp(2)).mean(1) + math.log(scores.shape[1])
    apart = _apart(scores)
    return together.mean(1) - _log_mean_exp(apart.clamp(-_CLIP, _CLIP) if method == "smile" else apart)


class _Loss:
    """The training loss, summed over slices, of scores [S, R, R]; MINE keeps a moving average."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.average: Tensor | None = None  # [S], the logarithm of the average of exp(score)

    def __call__(self, scores: Tensor) -> Tensor:
        together = scores.diagonal(dim1=1, dim2=2)
        if self.method == "infonce":
            return (scores.logsumexp(2) - together).mean(1).sum()
        apart = _apart(scores)
        if self.method == "smile":
            return (functional.softplus(-together).mean(1) + functional.softplus(apart).mean(1)).sum()
        now = _log_mean_exp(apart)
        fresh = now.detach()
        if self.average is None:
            self.average = fresh
        else:
            self.average = torch.logaddexp(self.average + math.log(0.99), fresh + math.log(0.01))
        # The gradient of log E[exp T] is E[grad exp T] / E[exp T]: the denominator from many batches, not from one.
        ratio = (apart - self.average[:, None]).clamp_max(20).exp().mean(1)
        return (ratio - together.mean(1)).sum()


# --- upper bounds ------------------------------------------------------------------------------------------------


def gaussian_channel(f: Tensor, sigma: float, releases: int = 1) -> UpperBound:
    """For z = f(x) + N(0, sigma^2): I(x; z) <= 1/2 log det(1 + Cov f(x) / sigma^2), whatever the distribution of x.

    `f` [n, ...] are (clipped) smashed data without the noise; `releases` independent noisy copies of one sample, by a
    client part that does not change, are one of deviation sigma / sqrt(releases). A covariance from few samples makes
    the determinant too small; with fewer than 10 samples per dimension the sum over dimensions of
    1/2 log(1 + variance / sigma^2), which is never smaller (Hadamard), is given instead.
    sigma = 0 gives infinity. Raises ConfigError: sigma < 0, releases < 1.
    """
    if sigma < 0 or releases < 1:
        raise ConfigError(
            f"sigma={sigma}, releases={releases}: give a deviation of at least 0 and at least one release"
        )
    if sigma == 0:
        return deterministic()
    n = check_rows(2, "for a covariance", f=f)
    rows = flat(f).double()
    noise = sigma**2 / releases
    d = rows.shape[1]
    if n < 10 * d:
        nats = 0.5 * torch.log1p(rows.var(0) / noise).sum()
        how = f"the variances of {d} dimensions ({n} samples are too few for their covariance)"
    else:
        nats = 0.5 * torch.log1p(torch.linalg.eigvalsh(torch.atleast_2d(rows.T.cov())).clamp_min(0) / noise).sum()
        how = f"the covariance of {d} dimensions, from {n} samples"
    return UpperBound("gaussian channel", float(nats), f"Gaussian noise of deviation {sigma:.4g}; computed from {how}")


def laplace_channel(f: Tensor, scale: float) -> UpperBound:
    """For z = f(x) + Laplace noise of `scale` on each of d values: I(x; z) = h(z) - h(noise), and h(z) is at most the
    sum of the entropies of Gaussians with its variances: sum of 1/2 log(2 pi e (variance + 2 s^2)) - log(2 e s).

    `f` [n, ...] are (clipped) smashed data without the noise. Raises ConfigError: scale <= 0.
    """
    if scale <= 0:
        raise ConfigError(f"scale={scale}: give a scale above 0")
    check_rows(2, "for variances", f=f)
    variance = flat(f).double().var(0) + 2 * scale**2
    nats = (0.5 * torch.log(2 * math.pi * math.e * variance) - math.log(2 * math.e * scale)).sum()
    reason = f"Laplace noise of scale {scale:.4g}; computed from the variances of {len(variance)} dimensions"
    return UpperBound("laplace channel", float(nats), reason)


def bits_sent(size: int, samples: int, codec: str) -> UpperBound:
    """At most the bits of `samples` samples, which were written in `size` bytes together: in nats per sample."""
    nats = 8 * size / samples * math.log(2)
    return UpperBound("quantisation", nats, f"{8 * size / samples:.0f} bits cross per sample, written by {codec}")


def quantised(codes: Tensor, levels: int) -> UpperBound:
    """For z quantised to integers `codes` [n, ...] in [0, levels): I(x; z) <= H(z) <= the sum of marginal entropies.

    Entropies from counts, with Miller and Madow's correction ((occupied levels - 1) / 2n, since counts read low); never
    above d ln(levels), which holds without any samples. Raises ConfigError: levels < 2, or a code outside.
    """
    if levels < 2 or codes.is_floating_point() or int(codes.min()) < 0 or int(codes.max()) >= levels:
        raise ConfigError(
            f"codes from {codes.min().item()} to {codes.max().item()} of type {codes.dtype} with levels={levels}: give "
            "integers from 0 to levels - 1, levels of at least 2"
        )
    rows = codes.detach().reshape(len(codes), -1).long()
    n, d = rows.shape
    counts = torch.zeros(d, levels, dtype=torch.float64, device=rows.device)
    counts.scatter_add_(1, rows.T, torch.ones(d, n, dtype=torch.float64, device=rows.device))
    entropies = math.log(n) - torch.special.xlogy(counts, counts).sum(1) / n + ((counts > 0).sum(1) - 1) / (2 * n)
    nats = float(entropies.clamp_max(math.log(levels)).sum())
    return UpperBound(
        "quantisation",
        nats,
        f"{d} values of {levels} levels: marginal entropies from {n} samples, {nats / math.log(2):.0f} bits; without "
        f"samples at most {d * math.log2(levels):.0f} bits",
    )


def chosen(tokens: int, vocabulary: int) -> UpperBound:
    """A row of T tokens is one of V^T, so at most T log V nats can be learnt about it."""
    return UpperBound(
        "tokens", tokens * math.log(vocabulary), f"a row is {tokens} tokens, each of {vocabulary} that there are"
    )


def deterministic(*, dropout: bool = False) -> UpperBound:
    """Without noise and quantisation, there is no finite bound. With `dropout` there is none either, since the kept
    values are exact.
    """
    what = "keeps some features exactly" if dropout else "is a deterministic continuous map"
    return UpperBound(
        "deterministic",
        math.inf,
        f"the client part {what}: the information that smashed data carry about a continuous input is infinite, unless "
        "the map is constant; only noise or quantisation makes it finite",
    )


def reader(method: Method, view: View = "cca", k: int = 2, slices: int = 8, budget: Budget = NEURAL) -> Estimator:
    """The estimator as a function of (x, z, seed), to be calibrated."""
    return lambda x, z, seed: (
        estimate(x, z, method=method, view=view, k=k, slices=slices, seed=seed, budget=budget).nats
    )
