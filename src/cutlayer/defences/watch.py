"""What a client can do to notice a server that does not train the task.

It rests on the observation of the Gradients Scrutinizer (Fu et al., NDSS 2023): under the task, gradients of rows with
the same label resemble each other more than those of different labels; a hijacker ignores labels. Their score consists
of means, spread and overlap. But inputs of one class are similar, so a hijacker's gradients for them are similar, too.
Therefore the score here measures what labels explain beyond the similarity of the smashed rows, which the client knows.

Limits: an attacker that mixes in the task's gradient evades it; so does one that knows of the test (SplitSpy, ibid.,
evades the older SplitGuard, arXiv 2108.09052). Gradients that are averaged over clients or rows, or noisy, have no
labels of their own. With them, an honest server would look suspicious, so only gradients for this client's own rows may
be observed.

Shape legend: R rows, s... one sample's smashed data.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from cutlayer.cohort import Cohort, CohortAround, Summed
from cutlayer.errors import ConfigError
from cutlayer.rows import check_rows, flat
from cutlayer.types import CutGradients, Smashed, as_real, is_continuous, joined


class Watch:
    """A client's check on the cut gradients that it receives, over the last `window` batches.

    In each batch the cosines of all pairs of gradients are regressed (quadratically) on the cosines of the pairs of
    smashed rows; `score` is the probability that a same-label pair lies higher above that curve than a pair of
    different labels: about 0.5 if labels play no part. Below `least` after at least `after` batches the server is
    `suspicious`. Honest servers have been seen as low as 0.65 (clients with two labels each), hijackers as high as
    0.75. A suspicion is not a proof, and the absence of one is not either.
    """

    def __init__(self, *, window: int = 50, least: float = 0.65, after: int = 10) -> None:
        """Raises ConfigError: window or after < 1, window < after, least outside (0.5, 1)."""
        if not (1 <= after <= window and 0.5 < least < 1):
            raise ConfigError(
                f"window={window}, after={after}, least={least}: give 1 <= after <= window and a threshold "
                "between 0.5 and 1"
            )
        self.least, self._after = least, after
        self._scores: deque[float] = deque(maxlen=window)

    def observe(self, gradients: Tensor, rows: Tensor, labels: Tensor) -> None:
        """Note one batch: gradients [R, s...] received for smashed rows [R, s...] with labels [R].

        Batches that lack pairs of either kind are left out, as are rows whose class does not count (below 0). Raises
        DataError: unequal numbers of rows, NaN.
        """
        check_rows(1, "to watch", gradients=gradients, rows=rows, labels=labels)
        if bool((labels < 0).any()):
            counting = labels >= 0
            gradients, rows, labels = gradients[counting], rows[counting], labels[counting]
        above = torch.ones(len(labels), len(labels), dtype=torch.bool, device=labels.device).triu(1)
        same = (labels[:, None] == labels[None])[above]
        if not bool(same.any()) or bool(same.all()):
            return
        alike, near = (_cosines(t)[above].double() for t in (gradients, rows))
        curve = torch.stack([torch.ones_like(near), near, near**2], dim=1)
        beyond = alike - curve @ (torch.linalg.pinv(curve) @ alike)
        from sklearn.metrics import roc_auc_score  # type: ignore[import-untyped]

        self._scores.append(float(roc_auc_score(same.cpu().numpy(), beyond.cpu().numpy())))

    @property
    def observed(self) -> int:
        """How many batches the score rests on."""
        return len(self._scores)

    @property
    def score(self) -> float:
        """The mean over the window; NaN before the first batch."""
        return sum(self._scores) / len(self._scores) if self._scores else math.nan

    @property
    def suspicious(self) -> bool:
        """Whether enough batches were seen and their gradients do not look like those of the task."""
        return self.observed >= self._after and self.score < self.least


@dataclass(frozen=True)
class ModelLook:
    """What a client sees of a model that it is to take: its `distance` from the client's own, in units of the own
    model's norm; and of the weight `name`, in which they are most, the share of rows that pass a single input on
    (`passing`), compared with the share in the client's own model (`own`).

    An average of models that started alike, or a model that was trained elsewhere, is about as near as training went:
    distances below 1 have been seen, and no such rows in dense layers. A model that is made to read inputs has rows
    that copy them, or biases that keep all activations alive, which are large. A model that mixes its inputs by a
    rotation has neither: that is not noticed.
    """

    distance: float
    passing: float
    own: float
    name: str

    @property
    def suspicious(self) -> bool:
        """Whether no honest training is known to produce this kind of model."""
        return self.distance > _FAR or self.passing > max(_PASSING, self.own + _PASSING)


_FAR, _PASSING = 2.0, 0.25
_ALONE = 0.9  # of a row's energy that is in a single weight


def look_at(received: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> ModelLook:
    """Compare a received model with the client's own: tensors of the same names and shapes."""
    real = [name for name, tensor in own.items() if is_continuous(tensor)]
    apart = sum(float((as_real(received[n]).double() - as_real(own[n]).double()).square().sum()) for n in real)
    size = sum(float(as_real(own[n]).double().square().sum()) for n in real)
    distance = math.sqrt(apart / size) if size else math.sqrt(apart)
    shares = [(_passing(received[n]), _passing(own[n]), n) for n in real if own[n].dim() > 1]
    passing, before, name = max(shares, key=lambda share: share[0] - share[1], default=(0.0, 0.0, ""))
    return ModelLook(distance, passing, before, name)


def _passing(weight: Tensor) -> float:
    """The share of a weight's rows that have nearly all their energy in one entry; 0 for rows that are too short to
    tell.
    """
    rows = weight.flatten(1).abs().double()
    if rows.shape[1] < _SHORTEST:
        return 0.0
    energy = rows.square()
    return float((energy.amax(1) > _ALONE * energy.sum(1)).double().mean())


_SHORTEST = 8


def _cosines(rows: Tensor) -> Tensor:
    """The cosines of all pairs of rows [R, s...]: [R, R]."""
    directions = functional.normalize(flat(rows), dim=1)
    return directions @ directions.T


class WatchedCohort(CohortAround):
    """Simulated clients that watch the server, each for itself: `watches` by client. Gradients that a client shares
    with others are not examined.
    """

    def __init__(self, inner: Cohort) -> None:
        super().__init__(inner)
        self.watches = {k: Watch() for k in range(len(inner.samples))}
        self._smashed: Smashed | None = None

    def forward(self, clients: Sequence[int] | None = None, *, labels: bool = True) -> Smashed:
        """Passed on, and remembered."""
        self._smashed = self.inner.forward(clients, labels=labels)
        return self._smashed

    def backward(self, gradients: CutGradients) -> None:
        """Passed on, and looked at."""
        self._look(gradients)
        self.inner.backward(gradients)

    def backward_together(self, gradients: CutGradients) -> Summed:
        """Passed on, and looked at."""
        self._look(gradients)
        return self.inner.backward_together(gradients)

    def _look(self, gradients: CutGradients) -> None:
        assert self._smashed is not None, "a backward pass follows a forward pass"
        for k, size in zip(gradients.clients, gradients.sizes, strict=True):
            own = self._smashed.only(k)
            self.watches[k].observe(joined(gradients.for_client(k, size)), joined(own.rows), own.labels)
