"""The observations of an attacker on tokens.

Shape legend: n attacked rows, N auxiliary rows, R rows of any, T tokens in a row, d values that are sent for a token,
V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cutlayer import seeds
from cutlayer.data.samples import Inputs, inputs_of

ROWS = 128  # that go through a client part at once


@dataclass(frozen=True)
class Words:
    """Rows of tokens: `ids` [R, T], and the `mask` [R, T] that the model receives with them (0: padding), if any."""

    ids: Tensor
    mask: Tensor | None = None

    @classmethod
    def of(cls, inputs: Inputs) -> Words:
        """Those that a model is given."""
        return cls(*inputs_of(inputs))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Tensor | slice) -> Words:
        return Words(self.ids[rows], None if self.mask is None else self.mask[rows])

    def split(self, rows: int = ROWS) -> Iterator[Words]:
        """The same rows, this number at a time."""
        return (self[a : a + rows] for a in range(0, len(self), rows))

    def given(self, form: Inputs) -> Inputs:
        """The model's input, in the form of its other inputs."""
        rows = (self.ids,) if self.mask is None else (self.ids, self.mask)
        if isinstance(form, Mapping):
            return dict(zip(form, rows, strict=True))
        return rows if isinstance(form, tuple) else self.ids


Reading = Callable[[Words], Tensor]
"""A client part as a function: words [R, T] to their smashed data [R, T, d]."""


@dataclass(frozen=True)
class Seen:
    """An attacker's means: what was sent, `z` [n, T, d], with the `mask` that went along; `auxiliary` words of which
    `learnt` [N, T] are tokens and not filling; a client part, as it sends (`client`: defences and codec draw anew at
    each call) and `bare`, without defences and codec; the number V of tokens in the `vocabulary`; what an attack has
    `kept` for others.
    """

    z: Tensor
    mask: Tensor | None
    auxiliary: Words
    learnt: Tensor
    client: Reading
    bare: Reading
    vocabulary: int
    seed: int
    kept: dict[str, Any] = field(default_factory=dict)

    @torch.no_grad()
    def smashed(self, words: Words, name: str, *, bare: bool = False) -> Tensor:
        """What is sent of words [R, T], with draws named by `name`: [R, T, d]."""
        client = self.bare if bare else self.client
        with seeds.torch_seeded(self.seed, "leakage", "smash", name, device=words.ids.device):
            return torch.cat([client(part) for part in words.split()])

    def scale(self) -> float:
        """What defences and codec multiply smashed data by, on average (clipping shortens them): the least-squares
        factor from the bare ones to those sent, on auxiliary words; 1 where it is not above 0.
        """
        few = self.auxiliary[:ROWS]
        sent, bare = self.smashed(few, "scale").double(), self.smashed(few, "scale", bare=True).double()
        factor = float((sent * bare).sum() / bare.square().sum().clamp_min(1e-30))
        return factor if factor > 0 else 1.0
