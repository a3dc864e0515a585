"""An active attack: a server that does not train the task, but its own ability to read the clients' data.

Feature-space hijacking (Pasquini, Ateniese & Bernaschi, arXiv 2012.02670): the server does not train the task. On
auxiliary data it trains an autoencoder, x -> f~(x) -> x, and a discriminator that tells f~(x) from the clients'
smashed data. The gradients that it sends down make the clients' smashed data look like f~(x) to the discriminator; its
decoder then reads them. As in the paper's code the discriminator is a Wasserstein critic with gradient penalty
(Gulrajani et al., arXiv 1704.00028). Two improvements are added, which any attacker can make: the autoencoder is
trained in advance, so that the clients do not follow a moving target, and the critic may see the labels (`classes`),
which go up unprotected: codes of a class then come to lie where the attacker's own codes of that class lie, and the
gradients depend on labels as an honest server's do.

A client can notice it with `watch`.

Shape legend: R rows, s... one sample's smashed data.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cutlayer import seeds
from cutlayer.data.samples import Samples
from cutlayer.errors import DataError
from cutlayer.gradients import RowLoss
from cutlayer.leakage.inputs import check_real
from cutlayer.leakage.networks import Encoder, SkipMLP, decoder
from cutlayer.optim import make_optimizer
from cutlayer.rows import check_rows
from cutlayer.server import Server, ServerStep
from cutlayer.types import Smashed

Shape = tuple[int, ...]

LEAST = 100  # auxiliary samples


class Hijack:
    """A malicious server: returns its own gradients for smashed rows, and reconstructs their inputs.

    Raises DataError: fewer than 100 auxiliary samples, NaN, tokens.
    """

    def __init__(
        self,
        auxiliary: Samples,
        code: Shape,
        *,
        labelled: bool = False,
        nonnegative: bool = False,
        seed: int = 0,
        lr: float = 1e-3,
        batch: int = 64,
        ahead: int = 500,
        critic_steps: int = 3,
    ) -> None:
        """`auxiliary` are N samples of the clients' kind, `code` is the shape s... of smashed data.

        `labelled`: the critic sees labels, too, which are classes. `nonnegative` if the client part ends in a ReLU: it
        could never reach other codes. The autoencoder makes `ahead` steps of `batch` rows before it begins, then one
        with each of the critic's `critic_steps` per call of `gradients`.
        """
        check_real(auxiliary.x, "the auxiliary inputs")
        check_rows(LEAST, "for an attacker's auxiliary data", auxiliary=auxiliary.x, labels=auxiliary.y)
        self._x, self._y, self._batch, self._code = auxiliary.x.float(), auxiliary.y, batch, code
        self._classes = int(auxiliary.y.max()) + 1 if labelled else 0
        self._critic_steps = critic_steps
        device, shape = self._x.device, tuple(self._x.shape[1:])
        self._centre, self._unit = self._x.mean(), self._x.std().clamp_min(1e-6)
        with seeds.torch_seeded(seed, "leakage", "hijack"):
            self.encoder = nn.Sequential(Encoder(shape, code, nonnegative), nn.Tanh()).to(device)
            self.decoder = decoder(code, shape).to(device)
            self.critic = _critic((code[0] + self._classes, *code[1:])).to(device)
        self._draw = seeds.torch_generator(seed, "leakage", "hijack batches")
        own = [*self.encoder.parameters(), *self.decoder.parameters()]
        self._own = torch.optim.Adam(own, lr=lr)
        self._critic = torch.optim.Adam(self.critic.parameters(), lr=lr, betas=(0.5, 0.9))
        for _ in range(ahead):
            self._autoencode()

    def gradients(self, rows: Tensor, labels: Tensor) -> Tensor:
        """One step of the attack on smashed rows [R, s...] with labels [R]: d(mean over rows of the attacker's loss) /
        d rows, [R, s...].

        Scaled as the gradient of the clients' own mean loss would be. Raises DataError: rows of another shape.
        """
        self._check(rows)
        given, rows = rows, rows.detach().float()
        for _ in range(self._critic_steps):
            self._teach_critic(self._autoencode(), self._seen(rows, labels))
        wanted = rows.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(-self.critic(self._seen(wanted, labels)).mean(), wanted)
        return gradient.to(given.dtype)

    @torch.no_grad()
    def reconstruct(self, z: Tensor) -> Tensor:
        """The attacker's reconstruction of the inputs of smashed data z [n, s...]: [n, ...]."""
        self._check(z)
        low, high = self._x.amin(), self._x.amax()
        return torch.cat(
            [(self.decoder(rows.float()) * self._unit + self._centre).clamp(low, high) for rows in z.split(256)]
        )

    def _autoencode(self) -> Tensor:
        """One step of the autoencoder on auxiliary rows; their codes, as the critic sees them."""
        chosen = torch.randint(len(self._x), (self._batch,), generator=self._draw).to(self._x.device)
        x = (self._x[chosen] - self._centre) / self._unit
        code = self.encoder(x)
        self._own.zero_grad()
        functional.mse_loss(self.decoder(code), x).backward()
        self._own.step()
        return self._seen(code.detach(), self._y[chosen])

    def _seen(self, code: Tensor, labels: Tensor) -> Tensor:
        """Codes [R, s...], and if labels are used, a plane for each class: [R, channels + classes, ...]."""
        if not self._classes:
            return code
        ones = functional.one_hot(labels.clamp(0, self._classes - 1), self._classes).to(code)
        ones = ones * (labels >= 0).to(code)[:, None]  # a class that does not count has no plane
        planes = ones.view(*ones.shape, *[1] * (code.dim() - 2)).expand(-1, -1, *code.shape[2:])
        return torch.cat([code, planes], 1)

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


class HijackingServer(Server):
    """Takes the place of a server: for every request of the algorithm, it returns the attacker's gradients. It has no
    model, and so no losses to report (it reports zeros).
    """

    def __init__(self, attacker: Hijack) -> None:
        super().__init__(nn.Identity(), make_optimizer("sgd", 1.0, {}), lr=0.0)
        self.attacker = attacker

    def step(self, smashed: Smashed, factor: float = 1.0, loss: RowLoss | None = None) -> ServerStep:
        """One step of the attack on all rows together."""
        at = next(i for i, rows in enumerate(smashed.rows) if rows.is_floating_point())
        gradient = self.attacker.gradients(smashed.rows[at], smashed.labels)
        return ServerStep(torch.zeros(1 + len(smashed.sizes)), (gradient,), 0.0)

    def step_copies(self, smashed: Smashed) -> ServerStep:
        """The attacker has no copies of the server: it makes one step on all rows together."""
        return self.step(smashed)

    def average_copies(self, weights: Any) -> None:
        """There are none."""


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
