"""Cheap measures that order runs, and the leakage of labels through cut gradients.

None of them is an amount of information. Distance correlation: Szekely, Rizzo & Bakirov 2007 (biased: independent data
of high dimension read far above 0) and Szekely & Rizzo 2014 (unbiased, squared); split learning uses the biased one as
a penalty (Vepakomma et al., NoPeek). Linear CKA: Kornblith et al., arXiv 1905.00414. Label leakage: Li et al., arXiv
2102.08504.

Shape legend: n samples, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cutlayer import seeds
from cutlayer.errors import DataError
from cutlayer.leakage.inputs import Scale, check_real, split
from cutlayer.rows import check_rows, flat

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Dependence:
    """How strongly z depends on x.

    `distance_correlation` in [0, 1], biased; `unbiased_squared` the unbiased squared one: 0 in expectation for
    independent data, and below 0 by chance. `linear_r2`: the share of x's held-out variance that a ridge regression on
    z explains (may be below 0). `cka` in [0, 1]: linear centred kernel alignment, biased up by few samples of many
    dimensions.
    """

    distance_correlation: float
    unbiased_squared: float
    linear_r2: float
    cka: float
    samples: int


def dependence(x: Tensor, z: Tensor, *, seed: int = 0, at_most: int = 400) -> Dependence:
    """All of them on x [n, ...], z [n, ...]; distance correlation on a random 400 of the samples (its memory is cubic).

    Raises DataError: fewer than 20 samples, unequal rows, NaN, tokens.
    """
    check_real(x, "x")
    check_real(z, "z")
    n = check_rows(20, "for a measure of dependence", x=x, z=z)
    a, b = flat(x).double(), flat(z).double()
    some = torch.from_numpy(seeds.generator(seed, "leakage", "dependence").permutation(n)[:at_most]).to(a.device)
    few = _narrow(a[some]), _narrow(b[some])
    dcor = dcor_library()
    return Dependence(
        distance_correlation=float(dcor.distance_correlation(*few)),
        unbiased_squared=float(dcor.u_distance_correlation_sqr(*few)),
        linear_r2=_linear_r2(a.cpu(), b.cpu(), seed),
        cka=_cka(a, b),
        samples=n,
    )


def dcor_library() -> Any:
    """dcor, which compiles for seconds when it is imported, and lets OpenMP use all cores: torch's threads, too."""
    threads = torch.get_num_threads()
    import dcor

    torch.set_num_threads(threads)
    return dcor


def _narrow(rows: Tensor) -> Array:
    """Rows [n, d] in the coordinates of the space that they span, at most n: their distances stay."""
    if rows.shape[1] <= len(rows):
        return np.asarray(rows.cpu().numpy())
    return np.asarray(torch.linalg.qr(rows.T).R.T.cpu().numpy())


def _linear_r2(x: Tensor, z: Tensor, seed: int) -> float:
    """Held-out R^2 of ridge regression x from z, all dimensions of x together."""
    from sklearn.linear_model import RidgeCV  # type: ignore[import-untyped]

    parts = split(len(x), seed, "linear", shares=(0.7, 0.0))
    z = Scale.of(z[parts.train])(z)
    model = RidgeCV(alphas=np.logspace(-2, 5, 8)).fit(z[parts.train].numpy(), x[parts.train].numpy())
    left = x[parts.test].numpy() - model.predict(z[parts.test].numpy()).reshape(len(parts.test), -1)
    around = x[parts.test] - x[parts.train].mean(0)
    total = float(around.square().sum())
    return 1 - float((left**2).sum()) / total if total else 0.0


def _cka(x: Tensor, z: Tensor) -> float:
    """|X^T Z|^2 / (|X^T X| |Z^T Z|), Frobenius norms, by Gram matrices [n, n] of centred rows."""
    x, z = x - x.mean(0), z - z.mean(0)
    left, right = x @ x.T, z @ z.T
    norms = float(left.norm() * right.norm())
    return float((left * right).sum()) / norms if norms else 0.0


@dataclass(frozen=True)
class LabelLeakage:
    """How well labels can be read from cut gradients, if they are meant to stay private.

    AUCs are one class against the rest, averaged over classes; 0.5 is chance. `norm_auc`: by the gradient's norm alone
    (whichever direction is right for a class: below 0.5 counts as above). `cosine_auc`: by the cosine with the gradient
    of ONE sample of the class whose label the attacker knows. `cluster_accuracy`: K-means on directions without any
    label, with the best match of clusters to classes; `majority` is the accuracy of always guessing the most frequent
    class.
    """

    norm_auc: float
    cosine_auc: float
    cluster_accuracy: float
    majority: float
    samples: int
    classes: int


def label_leakage(gradients: Tensor, y: Tensor, *, seed: int = 0) -> LabelLeakage:
    """Attack the labels y [n] by their cut gradients [n, ...] (one row per sample, as they cross).

    Raises DataError: fewer than 10 samples, unequal rows, NaN, fewer than two classes with two samples each.
    """
    check_real(gradients, "the gradients")
    n = check_rows(10, "to attack labels with", gradients=gradients, y=y)
    rows, labels = flat(gradients).double().cpu(), y.cpu().numpy()
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2 or counts.min() < 2:
        raise DataError(
            f"{len(classes)} classes, the smallest of {counts.min()} samples: label leakage needs at least two classes "
            "with two samples each"
        )
    from sklearn.metrics import roc_auc_score  # type: ignore[import-untyped]

    norms = rows.norm(dim=1)
    directions = rows / norms.clamp_min(1e-30)[:, None]
    draw = seeds.generator(seed, "leakage", "known labels")
    by_norm, by_cosine = [], []
    for label in classes:
        mine = labels == label
        auc = float(roc_auc_score(mine, norms.numpy()))
        by_norm.append(max(auc, 1 - auc))
        known = int(draw.choice(np.flatnonzero(mine)))
        others = np.arange(n) != known
        scores = (directions @ directions[known]).numpy()
        by_cosine.append(float(roc_auc_score(mine[others], scores[others])))
    return LabelLeakage(
        norm_auc=float(np.mean(by_norm)),
        cosine_auc=float(np.mean(by_cosine)),
        cluster_accuracy=_clusters(directions.numpy(), labels, classes, seed),
        majority=float(counts.max() / n),
        samples=n,
        classes=len(classes),
    )


def _clusters(directions: Array, labels: npt.NDArray[np.int64], classes: Array, seed: int) -> float:
    """The accuracy of K-means under the best assignment of clusters to classes."""
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
    from sklearn.cluster import KMeans  # type: ignore[import-untyped]

    state = seeds.derive(seed, "leakage", "clusters") % 2**32  # scikit-learn takes 32 bits
    found = KMeans(len(classes), n_init=5, random_state=state).fit_predict(directions)
    table = np.array([[(found[labels == label] == c).sum() for c in range(len(classes))] for label in classes])
    return float(table[linear_sum_assignment(-table)].sum() / len(labels))
