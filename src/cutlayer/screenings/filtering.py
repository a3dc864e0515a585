"""What a screening is: a change that the server makes to received rows before it uses them.

A row consists of all real tensors that cross for one sample; its length is the Euclidean norm. A screening of your own
is a subclass of `Screening` under `@screening("name")`, in a file that the configuration names:
`screening = "path/to/file.py:Name"`. It defines one of two methods, and its options with `plugins.option`:

- `bound`: the length B that rows may have. A longer row z is used as z' = c z, c = B / |z|, as if its client had
  clipped it. The gradient that goes back to that client is that with respect to z, by the chain rule with B fixed:

      dL/dz = c (g - (g.u) u),   g = dL/dz',   u = z / |z|

- `screen`: any rows in place of the received ones. Autograd computes the gradient that goes back.

A gradient that several clients share (a common gradient) does not belong to one row and stays as it is.

Shape legend: R rows of a step, n of them that are meant, s... the shape of one row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from cutlayer import plugins
from cutlayer.data.own import own_code
from cutlayer.errors import ConfigError
from cutlayer.gradients import column
from cutlayer.types import Rows


class Back(Protocol):
    """The backward pass from screened rows to sent rows."""

    def __call__(self, own: Rows, at: Sequence[int]) -> Rows:
        """The gradients [n, s...] with respect to the sent rows, from those of the screened rows; `at`: which rows
        these are.
        """


class Screened(NamedTuple):
    """Screened rows, and the backward pass through the screening; None if nothing was changed."""

    rows: Rows
    back: Back | None = None


class Screening(plugins.Thing):
    """Base of screenings. One that defines neither `bound` nor `screen` changes nothing."""

    compares: ClassVar[bool] = False
    """Whether a row is compared with the others of its step. Then the screening has no effect if clients take turns. In
    the U-shaped split it is applied to the gradients that clients send, too.
    """

    def bound(self, lengths: Tensor, sizes: Sequence[int]) -> Tensor | float | None:
        """The length that rows may have: one number, or one for each row [R]; 0 drops a row, None bounds nothing.

        `lengths` [R] are those of the rows of a step, in double precision, one client after another; `sizes` are the
        clients' numbers of rows. The result counts as fixed: gradients do not pass through it.
        """
        return None

    def screen(self, rows: Rows, sizes: Sequence[int]) -> Rows:
        """The rows that the server uses instead of these, each [R, s...], one client after another, `sizes` of each.
        They have the same shapes and types, and are differentiable in the real ones. Detach values that count as fixed.
        """
        return rows

    @property
    def active(self) -> bool:
        """Whether it has an effect."""
        return self._bounds or self._screens

    @property
    def _bounds(self) -> bool:
        return type(self).bound is not Screening.bound

    @property
    def _screens(self) -> bool:
        return type(self).screen is not Screening.screen

    def apply(self, rows: Rows, lengths: Tensor, sizes: Sequence[int]) -> Screened:
        """The screened rows [R, s...]. Raises ConfigError for a screening that fails, or gives something else."""
        if self._screens:
            return _through_autograd(self, rows, sizes)
        found = self._bound(lengths, sizes)
        return Screened(rows) if found is None else _bounded(rows, lengths, found)

    def _bound(self, lengths: Tensor, sizes: Sequence[int]) -> Tensor | None:
        """The result of `bound`, as a number for each row [R]. Raises ConfigError."""
        what = f"`bound` of the screening {self.entry.name!r}"
        with own_code(self, what):
            given = self.bound(lengths, sizes)
            if given is None:
                return None
            found = torch.as_tensor(given, dtype=torch.float64, device=lengths.device).detach()
        if found.shape not in ((), lengths.shape) or bool((found < 0).any()):  # NaN, of NaN rows, bounds nothing
            raise ConfigError(
                f"{what} gives {_shown(found)} for {len(lengths)} rows: return one length, 0 or more, one for each "
                "row, or None"
            )
        return found.expand_as(lengths)


def _shown(found: Tensor) -> str:
    return f"{found.item():g}" if not found.dim() else f"a tensor of the shape {tuple(found.shape)}"


@dataclass(frozen=True)
class _Scaled:
    """Rows [n] of a step that were too long: their positions, factors [n] and directions."""

    at: Sequence[int]
    factors: Tensor
    directions: Rows

    def __call__(self, own: Rows, at: Sequence[int]) -> Rows:
        """By the chain rule, with the bound fixed."""
        found = {place: number for number, place in enumerate(self.at)}
        pairs = [(mine, found[place]) for mine, place in enumerate(at) if place in found]
        if not pairs:
            return own
        here, number = (torch.tensor(part, device=own[0].device) for part in zip(*pairs, strict=True))
        mine = [g[here].double() for g in own]
        along = [u[number] for u in self.directions]
        dots = torch.stack([(g * u).flatten(1).sum(1) for g, u in zip(mine, along, strict=True)]).sum(0)
        back = tuple(g.clone() for g in own)
        for rows, g, u in zip(back, mine, along, strict=True):
            rows[here] = (column(self.factors[number], g) * (g - column(dots, g) * u)).to(rows.dtype)
        return back


def _bounded(rows: Rows, lengths: Tensor, bound: Tensor) -> Screened:
    """The rows, after those longer than `bound` [R] are scaled down to it."""
    long = ((lengths > bound) & torch.isfinite(lengths)).nonzero().flatten()
    if not len(long):
        return Screened(rows)
    most = bound[long]
    wide = [r[long].double() for r in rows if r.is_floating_point()]
    directions = tuple(r / column(lengths[long], r) for r in wide)
    shorter = iter(directions)
    scaled = [r.clone() if r.is_floating_point() else r for r in rows]
    for r in scaled:
        if r.is_floating_point():
            u = next(shorter)
            r[long] = (u * column(most, u)).to(r.dtype)
    return Screened(tuple(scaled), _Scaled(long.tolist(), most * lengths[long].reciprocal(), directions))


@dataclass(frozen=True)
class _Graph:
    """Rows that a function has made from the received ones, with their graph."""

    sent: Rows
    used: Rows

    def __call__(self, own: Rows, at: Sequence[int]) -> Rows:
        """By autograd: rows without a gradient of their own have none."""
        place = torch.tensor(list(at), dtype=torch.int64, device=own[0].device)
        whole = [torch.zeros_like(u).index_add(0, place, g.to(u)) for u, g in zip(self.used, own, strict=True)]
        given = [(u, g) for u, g in zip(self.used, whole, strict=True) if u.requires_grad]
        if not given:
            return tuple(torch.zeros_like(g) for g in own)
        used, gradients = zip(*given, strict=True)
        found = torch.autograd.grad(used, self.sent, gradients, retain_graph=True, materialize_grads=True)
        return tuple(f[place].to(g) for f, g in zip(found, own, strict=True))


def _through_autograd(rule: Screening, rows: Rows, sizes: Sequence[int]) -> Screened:
    """The result of `screen`. Raises ConfigError."""
    what = f"`screen` of the screening {rule.entry.name!r}"
    leaves = tuple(r.detach().clone().requires_grad_() if r.is_floating_point() else r for r in rows)
    with own_code(rule, what), torch.enable_grad():
        used = tuple(rule.screen(leaves, sizes))
        forms = [(tuple(u.shape), u.dtype) for u in used]
    wanted = [(tuple(r.shape), r.dtype) for r in rows]
    if forms != wanted:
        raise ConfigError(
            f"{what} gives {_forms(forms)} for {_forms(wanted)}: return rows of the same shapes and types"
        )
    if all(leaf is u for leaf, u in zip(leaves, used, strict=True)):
        return Screened(rows)
    sent = tuple(leaf for leaf in leaves if leaf.is_floating_point())
    return Screened(tuple(u.detach() for u in used), _Graph(sent, tuple(u for u in used if u.is_floating_point())))


def _forms(forms: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> str:
    return ", ".join(f"{str(dtype).removeprefix('torch.')} {shape}" for shape, dtype in forms) or "nothing"


S = TypeVar("S", bound=type[Screening])


def screening(name: str, *, title: str = "", paper: str = "") -> Callable[[S], S]:
    """A decorator that registers a subclass of `Screening`."""

    def decorate(made: S) -> S:
        when = "together" if made.compares else "split"
        return plugins.register("screening", name, title=title, paper=paper, when=when)(made)

    return decorate
