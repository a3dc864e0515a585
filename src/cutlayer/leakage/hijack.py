"""An active attack, and what a client can do to notice it.

Feature-space hijacking (Pasquini, Ateniese & Bernaschi, arXiv 2012.02670): the server does not train the task. On
auxiliary data it trains an autoencoder, x -> f~(x) -> x, and a discriminator that tells f~(x) from the clients'
smashed data. The gradients that it sends down make the clients' smashed data look like f~(x) to the discriminator; its
decoder then reads them. As in the paper's code the discriminator is a Wasserstein critic with gradient penalty
(Gulrajani et al., arXiv 1704.00028).

What a client can see (`Watch`) rests on the observation of the Gradients Scrutinizer (Fu et al., NDSS 2023): under the
task, gradients of rows with the same label resemble each other more than those of different labels; a hijacker ignores
labels. Theirs is a score of means, spread and overlap. But inputs of one class are alike, so a hijacker's gradients
for them are alike too. The score here is therefore about what labels explain beyond the smashed rows' own likeness,
which the client knows.

Limits: an attacker that mixes in the task's gradient evades it; so does one that knows of the test (SplitSpy, ibid.,
evades the older SplitGuard, arXiv 2108.09052). Gradients that are averaged over clients or rows, or noisy, carry no
labels of their own: an honest server then looks suspicious, so only rows that were sent for the client alone may be
observed.

Shape legend: R rows, s... one sample's smashed data.
"""

from __future__ import annotations

import math
from collections import deque

import torch
from torch import Tensor, nn
from torch.nn import functional

from cutlayer import seeds
from cutlayer.errors import ConfigError, DataError
from cutlayer.leakage.inputs import check_real, check_rows, flat
from cutlayer.leakage.networks import Encoder, SkipMLP, decoder

Shape = tuple[int, ...]

LEAST = 100  # auxiliary samples


class Hijack:
    """A malicious server: gives gradients of its own for given smashed rows, and reads them.

    One call of `gradients` makes one step of the attacker's networks on `batch` auxiliary rows. Raises DataError: fewer
    than 100 auxiliary samples, NaN, tokens.
    """

    def __init__(
        self,
        auxiliary: Tensor,
        code: Shape,
        *,
        nonnegative: bool = False,
        seed: int = 0,
        lr: float = 1e-3,
        batch: int = 64,
    ) -> None:
        """`auxiliary` [N, ...] are inputs of the clients' kind, `code` is the shape s... of smashed data.

        `nonnegative` where the client part ends in a ReLU: codes that it cannot take would never be reached.
        """
        check_real(auxiliary, "the auxiliary inputs")
        check_rows(LEAST, "for an attacker's auxiliary data", auxiliary=auxiliary)
        self._x, self._batch, self._code = auxiliary, batch, code
        device, shape = auxiliary.device, tuple(auxiliary.shape[1:])
        self._centre, self._unit = auxiliary.mean(), auxiliary.std().clamp_min(1e-6)
        with seeds.torch_seeded(seed, "leakage", "hijack"):
            self.encoder = nn.Sequential(Encoder(shape, code, nonnegative), nn.Tanh()).to(device)
            self.decoder = decoder(code, shape).to(device)
            self.critic = _critic(code).to(device)
        self._draw = seeds.torch_generator(seed, "leakage", "hijack batches")
        own = [*self.encoder.parameters(), *self.decoder.parameters()]
        self._own = torch.optim.Adam(own, lr=lr)
        self._critic = torch.optim.Adam(self.critic.parameters(), lr=lr, betas=(0.5, 0.9))

    def gradients(self, rows: Tensor) -> Tensor:
        """One step of the attack on smashed rows [R, s...]: d(mean over rows of the attacker's loss) / d rows, [R,
        s...].

        Scaled as the gradient of the clients' own mean loss would be. Raises DataError: rows of another shape.
        """
        self._check(rows)
        rows = rows.detach().float()
        chosen = torch.randint(len(self._x), (self._batch,), generator=self._draw).to(self._x.device)
        x = (self._x[chosen] - self._centre) / self._unit
        code = self.encoder(x)
        self._own.zero_grad()
        functional.mse_loss(self.decoder(code), x).backward()
        self._own.step()
        self._teach_critic(code.detach(), rows)
        wanted = rows.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(-self.critic(wanted).mean(), wanted)
        return gradient

    @torch.no_grad()
    def reconstruct(self, z: Tensor) -> Tensor:
        """What the attacker takes the inputs of smashed data z [n, s...] for: [n, ...]."""
        self._check(z)
        low, high = self._x.amin(), self._x.amax()
        return torch.cat(
            [(self.decoder(rows.float()) * self._unit + self._centre).clamp(low, high) for rows in z.split(256)]
        )

    def _teach_critic(self, own: Tensor, theirs: Tensor) -> None:
        """One step of the critic: high on the attacker's codes, low on the clients', slope 1 in between."""
        count = min(len(own), len(theirs))
        share = torch.rand(count, *[1] * (own.dim() - 1), generator=self._draw).to(own.device)
        between = (share * own[:count] + (1 - share) * theirs[:count]).requires_grad_()
        (slope,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        self._critic.zero_grad()
        (self.critic(theirs).mean() - self.critic(own).mean() + 10 * penalty).backward()
        self._critic.step()

    def _check(self, rows: Tensor) -> None:
        if tuple(rows.shape[1:]) != self._code:
            raise DataError(
                f"smashed rows have shape {tuple(rows.shape[1:])}, the attacker was made for {self._code}: give "
                "the cut's own shape"
            )


def _critic(code: Shape) -> nn.Module:
    """Smashed data [R, s...] -> scores [R, 1]."""
    if len(code) != 3:
        return SkipMLP(code, (1,))
    return nn.Sequential(
        nn.Conv2d(code[0], 32, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(32, 32, 3, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(32 * math.ceil(code[1] / 2) * math.ceil(code[2] / 2), 1),
    )


class Watch:
    """A client's check on the cut gradients that it receives, over the last `window` batches.

    In each batch the cosines of all pairs of gradients are regressed (quadratically) on the cosines of the pairs of
    smashed rows; `score` is the probability that a same-label pair lies higher above that curve than a pair of
    different labels: about .5 where labels play no part. Below `least` after at least `after` batches the server is
    `suspicious`.
    """

    def __init__(self, *, window: int = 50, least: float = 0.75, after: int = 10) -> None:
        """Raises ConfigError: window or after < 1, window < after, least outside (.5, 1)."""
        if not (1 <= after <= window and 0.5 < least < 1):
            raise ConfigError(
                f"window={window}, after={after}, least={least}: give 1 <= after <= window and a threshold "
                "between .5 and 1"
            )
        self._least, self._after = least, after
        self._scores: deque[float] = deque(maxlen=window)

    def observe(self, gradients: Tensor, rows: Tensor, labels: Tensor) -> None:
        """Note one batch: gradients [R, s...] received for smashed rows [R, s...] with labels [R].

        Batches that lack pairs of either kind tell nothing and are left out. Raises DataError: unequal numbers of
        rows, NaN.
        """
        check_rows(1, "to watch", gradients=gradients, rows=rows, labels=labels)
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
        """Whether enough was seen and it does not look like the task's gradients."""
        return self.observed >= self._after and self.score < self._least


def _cosines(rows: Tensor) -> Tensor:
    """Of all pairs of rows [R, s...]: [R, R]."""
    directions = functional.normalize(flat(rows), dim=1)
    return directions @ directions.T
