"""All defences of a run's clients, one after another, which change smashed data before they are sent.

The client's own backward pass goes through all of them, and their penalties are added. Two related options belong
elsewhere: the precision of sent rows to the codec (`up_codec`), and averaged gradients (`phi`) to SplitAvg.

Draws are named by client and batch, so every engine, and a client on another machine, draws the same numbers.

Shape legend: R rows of all clients, b_k those of client k, s... the shape of one row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from cutlayer import plugins, seeds
from cutlayer.data.own import own_code
from cutlayer.defences.protection import Defence
from cutlayer.errors import ConfigError
from cutlayer.types import Rows, as_tuple, joined

D = TypeVar("D", bound=Defence)


class Seeded(Protocol):
    """A configuration, as far as `of` needs it: defences' options are read from it by name."""

    @property
    def seed(self) -> int:
        """Names all draws."""


def of(config: Seeded) -> Defences:
    """The defences whose options the configuration sets, and those that it names in `defences`.

    Raises ConfigError where a name is unknown, options do not go together, or a defence that is named does nothing.
    """
    named = tuple(getattr(config, "defences", ()))
    given: frozenset[str] | set[str] = getattr(config, "model_fields_set", frozenset())
    parts = []
    for reference in dict.fromkeys([*plugins.index("defence"), *named]):
        entry = plugins.find("defence", reference)
        values = {name: getattr(config, name, default) for name, default in entry.defaults.items()}
        if reference in named or values != entry.defaults:
            parts.append(_made(reference, values))
            if not (parts[-1].active or entry.option_names & given):
                raise _idle(reference, entry)
    return Defences(config.seed, tuple(parts))


def _idle(reference: str, entry: plugins.Entry) -> ConfigError:
    """Why naming a defence alone is not enough."""
    options = sorted(entry.option_names)
    flags = " or ".join(f"--{name.replace('_', '-')}" for name in options)
    need = f"set {flags}" if options else "have its `active` return true"
    return ConfigError(
        f"defences names {reference!r}, which does nothing with the defaults of its options: {need}, or leave it out"
    )


def _made(reference: str, values: dict[str, Any]) -> Defence:
    """A defence with these options. Raises ConfigError."""
    kind = plugins.load("defence", reference)
    if not (isinstance(kind, type) and issubclass(kind, Defence)):
        raise ConfigError(f"defence {reference!r} is not a subclass of cutlayer.defences.Defence; make it one")
    made = kind.of(values)
    defaults = plugins.find("defence", reference).defaults
    with own_code(made, f"`check` of the defence {reference!r}"):
        made.check(frozenset(n for n, default in defaults.items() if values[n] != default))
    return made


@dataclass(frozen=True)
class Defences:
    """The defences of all clients; `seed` names what they draw. `secret`: it is a client's own secret. Then the draws
    are also named by the rows, as for own test rows. If a server requests the same batch twice with other weights, it
    gets other noise, so the difference is not free of noise.
    """

    seed: int = 0
    parts: tuple[Defence, ...] = ()
    secret: bool = False

    @cached_property
    def in_order(self) -> tuple[Defence, ...]:
        """The defences that have an effect, in the order in which they are applied."""
        return tuple(sorted((p for p in self.parts if p.active), key=lambda p: p.order))

    @property
    def penalised(self) -> str:
        """The name of a defence that adds a penalty to the client's loss; empty if none does."""
        adding = [p.entry.name for p in self.in_order if type(p).penalty is not Defence.penalty]
        return adding[0] if adding else ""

    @property
    def noisy(self) -> bool:
        """Whether a defence adds noise, or hides features in an unknown way."""
        return any(not p.exact for p in self.in_order)

    @property
    def active(self) -> bool:
        """Whether any defence has an effect."""
        return bool(self.in_order)

    def get(self, kind: type[D]) -> D | None:
        """The active defence of this class; None if there is none."""
        return next((p for p in self.in_order if isinstance(p, kind)), None)

    def before(self, part: Defence) -> tuple[Defence, ...]:
        """The defences that are applied before `part`."""
        return self.in_order[: self.in_order.index(part)]

    def step(
        self,
        rows: Rows,
        x: Sequence[Tensor | Rows],
        clients: Sequence[int],
        sizes: Sequence[int],
        clocks: Sequence[int],
    ) -> Guarded:
        """Smashed data [R, s...] of one training step; `x` are each client's inputs, one tensor [b_k, ...] or several,
        `clocks` how many batches each had drawn before.
        """
        ends = np.cumsum(sizes).tolist()
        of = [tuple(r[end - n : end] for r in rows) for n, end in zip(sizes, ends, strict=True)] if self.secret else []
        names = [[_digest(own)] for own in of] or [[] for _ in clients]
        draws = [self._draw("step", k, t, *name) for k, t, name in zip(clients, clocks, names, strict=True)]
        leaves = tuple(r.detach().requires_grad_(r.is_floating_point()) for r in rows)
        with torch.enable_grad():
            sent = self._sent(leaves, sizes, draws)
        return Guarded(leaves, sent, tuple(x), tuple(sizes), self.in_order)

    def evaluation(self, rows: Rows, clients: Sequence[int], start: int) -> Rows:
        """Smashed data of held-out samples from number `start` on, as many rows of each of `clients`."""
        sizes = [len(rows[0]) // len(clients)] * len(clients)
        with torch.no_grad():
            return self._sent(rows, sizes, [self._draw("evaluation", k, start) for k in clients])

    def own_test(self, rows: Rows, client: int) -> Rows:
        """Smashed data of test rows that are the client's own. Draws are named by the rows. The same rows are sent with
        the same noise again, and rows of another model with other noise, so the difference is not free of noise.
        """
        with torch.no_grad():
            return self._sent(rows, [len(rows[0])], [self._draw("own test", client, _digest(rows))])

    def fresh(self, rows: Rows) -> Rows:
        """The same for any rows, with draws of torch's global generator. An attacker who knows the defences can do this
        as often as it likes.
        """
        return self._sent(rows, [len(rows[0])], [torch.default_generator])

    def _draw(self, *name: str | int) -> torch.Generator:
        return seeds.torch_generator(self.seed, "defence", *name)

    def _sent(self, rows: Rows, sizes: Sequence[int], draws: Sequence[torch.Generator]) -> Rows:
        """Floating point rows after all defences; other rows unchanged."""
        real = [i for i, r in enumerate(rows) if r.is_floating_point()]
        sent = tuple(rows[i] for i in real)
        for part in self.in_order:
            sent = _protected(part, sent, sizes, draws)
        done = dict(zip(real, sent, strict=True))
        return tuple(done.get(i, r) for i, r in enumerate(rows))


def _digest(rows: Rows) -> str:
    """SHA-256 of the rows' numbers."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _protected(part: Defence, rows: Rows, sizes: Sequence[int], draws: Sequence[torch.Generator]) -> Rows:
    """The tensors that a defence sends instead of `rows`. Raises ConfigError if it fails, or if their shapes differ."""
    what = f"`protect` of the defence {part.entry.name!r}"
    with own_code(part, what):
        sent = tuple(part.protect(rows, sizes, draws))
        shapes = [tuple(r.shape) for r in sent]
    if shapes != (given := [tuple(r.shape) for r in rows]):
        raise ConfigError(
            f"{what} makes tensors of the shapes {shapes} of {given}: return one of the same shape for each"
        )
    return sent


@dataclass(frozen=True)
class Guarded:
    """The smashed data of one step as they are `sent`, each [R, s...], and the backward pass through the defences."""

    leaves: Rows
    sent: Rows
    x: tuple[Tensor | Rows, ...]
    sizes: tuple[int, ...]
    parts: tuple[Defence, ...]

    @property
    def rows(self) -> Rows:
        """What is sent."""
        return tuple(r.detach() for r in self.sent)

    def back(self, gradients: Rows) -> Rows:
        """Turns gradients with respect to the sent rows, each [R, s...], into gradients with respect to the computed
        rows; None stays None.
        """
        if not gradients:
            return ()
        leaves = [r for r in self.leaves if r.requires_grad]
        sent = [r for r, leaf in zip(self.sent, self.leaves, strict=True) if leaf.requires_grad]
        total: Rows = torch.autograd.grad(sent, leaves, gradients)
        for part in self.parts:
            slopes = self._slopes(part, leaves)
            if slopes:
                total = tuple(g + part.weight * s for g, s in zip(total, slopes, strict=True))
        return total

    def _slopes(self, part: Defence, leaves: Sequence[Tensor]) -> Rows:
        """d(each client's penalty)/d(its smashed data), each [R, s...]; empty if the defence has no penalty."""
        found = []
        for x, *z in zip(self.x, *[leaf.detach().split(self.sizes) for leaf in leaves], strict=True):
            own = [piece.requires_grad_() for piece in z]
            with torch.enable_grad():
                with own_code(part, f"`penalty` of the defence {part.entry.name!r}"):
                    penalty = part.penalty(joined(as_tuple(x)), torch.cat([piece.flatten(1) for piece in own], 1))
                if penalty is None:
                    return ()
                found.append(torch.autograd.grad(penalty, own))
        return tuple(torch.cat(pieces) for pieces in zip(*found, strict=True))
