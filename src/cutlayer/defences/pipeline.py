"""What a client does to its smashed data before they leave it, so that the server learns less about its inputs.

In this order: features are dropped at random, each sample's are clipped to a length, noise is added. The client's own
backward pass goes through all of it (noise has no derivative). NoPeek changes nothing that is sent: it adds a penalty
on the distance correlation of inputs and smashed data to the client's loss (Vepakomma et al. 2020, arXiv 2008.09161).
The precision of what is sent, another defence, is the codec's (`up_codec`); averaged gradients, `phi`, are SplitAvg's.

Noise on clipped features is differentially private, as `leakage.dp` states it. Draws are named by client and batch, so
that every engine, and a client on another machine, draws the same.

Shape legend: R rows of all clients, b_k those of client k, s... the shape of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cutlayer import seeds
from cutlayer.types import Rows


@dataclass(frozen=True)
class Defence:
    """How strongly smashed data are protected; 0 and None do nothing.

    `clip`: the length that a sample's smashed data have at most, by the Euclidean norm (with Laplace noise: the sum of
    absolute values), over all tensors that cross. `gaussian`: the noise's standard deviation, `laplace`: its scale,
    both in units of `clip`. `dropout`: probability that a feature is zeroed (others are scaled up). `nopeek`: weight of
    the penalty.
    """

    seed: int = 0
    clip: float | None = None
    gaussian: float = 0.0
    laplace: float = 0.0
    dropout: float = 0.0
    nopeek: float = 0.0

    @property
    def active(self) -> bool:
        """Does it do anything?"""
        return self.clip is not None or bool(self.dropout or self.nopeek)

    @property
    def noise(self) -> float:
        """The noise's standard deviation (Gaussian) or scale (Laplace), in units of smashed data; 0: there is none."""
        return (self.clip or 0.0) * (self.gaussian or self.laplace)

    def clipped(self, rows: Rows) -> Rows:
        """Real rows, each [R, s...], of which each sample is at most `clip` long, over all tensors."""
        if self.clip is None:
            return rows
        factor = self.clip / _length(rows, 1 if self.laplace else 2).clamp(min=self.clip)

        def shortened(r: Tensor) -> Tensor:
            f = factor.view(-1, *[1] * (r.dim() - 1))
            if r.element_size() >= 4:
                return r * f.to(r.dtype)
            slack = 1 - torch.finfo(r.dtype).eps  # what rounding to few digits may add again
            return (r.float() * torch.where(f < 1, f * slack, f)).to(r.dtype)

        return tuple(map(shortened, rows))

    def step(
        self, rows: Rows, x: Sequence[Tensor], clients: Sequence[int], sizes: Sequence[int], clocks: Sequence[int]
    ) -> Guarded:
        """Smashed data [R, s...] of one training step; `x` are the clients' inputs, each [b_k, ...], `clocks` how many
        batches each had drawn before.
        """
        draws = [self._draw("step", k, clock) for k, clock in zip(clients, clocks, strict=True)]
        leaves = tuple(r.detach().requires_grad_(r.is_floating_point()) for r in rows)
        with torch.enable_grad():
            sent = self._sent(leaves, sizes, draws)
        return Guarded(leaves, sent, tuple(x), tuple(sizes), self.nopeek)

    def evaluation(self, rows: Rows, clients: Sequence[int], start: int) -> Rows:
        """Smashed data of held-out samples from number `start` on, as many rows of each of `clients`."""
        sizes = [len(rows[0]) // len(clients)] * len(clients)
        with torch.no_grad():
            return self._sent(rows, sizes, [self._draw("evaluation", k, start) for k in clients])

    def fresh(self, rows: Rows) -> Rows:
        """The same for anyone's rows, with draws of torch's global generator: what an attacker who knows the defence
        can do as often as it likes.
        """
        return self._sent(rows, [len(rows[0])], [torch.default_generator])

    def _draw(self, *name: str | int) -> torch.Generator:
        return seeds.torch_generator(self.seed, "defence", *name)

    def _sent(self, rows: Rows, sizes: Sequence[int], draws: Sequence[torch.Generator]) -> Rows:
        real = [i for i, r in enumerate(rows) if r.is_floating_point()]
        sent = tuple(rows[i] for i in real)

        def drawn(draw: Callable[[Sequence[int], torch.Generator], Tensor], r: Tensor) -> Tensor:
            return torch.cat([draw(r[:n].shape, g) for n, g in zip(sizes, draws, strict=True)]).to(r)

        if self.dropout:
            sent = tuple(r * drawn(partial(_kept, self.dropout), r) for r in sent)
        sent = self.clipped(sent)
        if self.noise:
            sent = tuple(r + self.noise * drawn(_laplace if self.laplace else _gaussian, r) for r in sent)
        done = dict(zip(real, sent, strict=True))
        return tuple(done.get(i, r) for i, r in enumerate(rows))


@dataclass(frozen=True)
class Guarded:
    """The smashed data of one step as they are `sent`, each [R, s...], and the way back through what was done."""

    leaves: Rows
    sent: Rows
    x: tuple[Tensor, ...]
    sizes: tuple[int, ...]
    nopeek: float

    @property
    def rows(self) -> Rows:
        """What is sent."""
        return tuple(r.detach() for r in self.sent)

    def back(self, gradients: Rows) -> Rows:
        """From dLoss/d(what was sent), each [R, s...], to the gradients with respect to what the client computed."""
        leaves = [r for r in self.leaves if r.requires_grad]
        sent = [r for r, leaf in zip(self.sent, self.leaves, strict=True) if leaf.requires_grad]
        through = torch.autograd.grad(sent, leaves, gradients)
        if not self.nopeek:
            return through
        return tuple(g + self.nopeek * p for g, p in zip(through, self._penalties(leaves), strict=True))

    def _penalties(self, leaves: Sequence[Tensor]) -> Rows:
        """d(distance correlation of each client's inputs and smashed data)/d(smashed data)."""
        found = []
        for x, *z in zip(self.x, *[leaf.detach().split(self.sizes) for leaf in leaves], strict=True):
            own = [part.requires_grad_() for part in z]
            with torch.enable_grad():
                flat = torch.cat([part.flatten(1) for part in own], 1)
                found.append(torch.autograd.grad(distance_correlation(x.flatten(1), flat), own))
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def distance_correlation(x: Tensor, z: Tensor) -> Tensor:
    """Distance correlation, in [0, 1], of rows x [n, d] and z [n, m], by the biased estimator, differentiable in z
    (Szekely et al. 2007). 0 where one of them does not vary.
    """
    a, b = (_centred(r.double()) for r in (x, z))
    product = (a.square().mean() * b.square().mean()).sqrt()
    squared = (a * b).mean() / product.clamp(min=1e-30)
    return squared.clamp(min=1e-12).sqrt()


def _centred(rows: Tensor) -> Tensor:
    """Euclidean distances [n, n] between rows, their means taken out in both directions."""
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")  # the other way is inexact
    centred: Tensor = distances - distances.mean(0) - distances.mean(1, keepdim=True) + distances.mean()
    return centred


def _length(rows: Sequence[Tensor], order: int) -> Tensor:
    """The norm of each sample over all tensors: [R]."""
    flat = torch.cat([r.flatten(1) for r in rows], 1)
    lengths: Tensor = torch.linalg.vector_norm(flat if flat.element_size() >= 4 else flat.float(), order, 1)
    return lengths


def _kept(probability: float, shape: Sequence[int], draw: torch.Generator) -> Tensor:
    """Factors: 0 with this probability, else what keeps the mean."""
    return (torch.rand(tuple(shape), generator=draw) >= probability) / (1 - probability)


def _gaussian(shape: Sequence[int], draw: torch.Generator) -> Tensor:
    return torch.randn(tuple(shape), generator=draw)


def _laplace(shape: Sequence[int], draw: torch.Generator) -> Tensor:
    """Of scale 1: the difference of two exponential draws."""
    one, two = (torch.empty(tuple(shape)).exponential_(generator=draw) for _ in range(2))
    return one - two
