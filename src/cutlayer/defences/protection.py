"""What a defence is: a change to smashed data before it is sent, a penalty in the client's loss, or both.

A defence of your own is a subclass of `Defence` under `@defence("name")`, in a file that the configuration names:
`defences = ["path/to/file.py:Name"]`. Its options are declared with `plugins.option`.

Shape legend: R rows of all clients, b_k those of client k, s... the shape of one row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from cutlayer import plugins
from cutlayer.types import Rows


class Defence(plugins.Thing):
    """Base of defences. A method that a subclass does not define has no effect."""

    order: ClassVar[int] = 100
    """Defences are applied in this order, smallest first: features are dropped at 10, noise is added at 20."""

    @property
    def exact(self) -> bool:
        """Whether some features are still sent exactly, or as a continuous function of themselves. Then there is no
        finite bound on what they tell about the inputs. By default, this is not known.
        """
        return False

    @property
    def active(self) -> bool:
        """Whether it does anything with these options."""
        return True

    @property
    def weight(self) -> float:
        """How much the penalty counts in the client's loss."""
        return 1.0

    def protect(self, rows: Rows, sizes: Sequence[int], draws: Sequence[torch.Generator]) -> Rows:
        """What is sent instead of floating point rows, each [R, s...], differentiable in them.

        The rows are those of several clients, `sizes` of each, one client after another; each client draws from its
        own generator of `draws` (see `drawn`).
        """
        return rows

    def penalty(self, x: Tensor, z: Tensor) -> Tensor | None:
        """A term of one client's loss: a number, of its inputs x [b, d] and smashed data z [b, m], differentiable in
        z. None if there is none.
        """
        return None


def drawn(
    draw: Callable[[Sequence[int], torch.Generator], Tensor],
    rows: Tensor,
    sizes: Sequence[int],
    draws: Sequence[torch.Generator],
) -> Tensor:
    """What `draw(shape, generator)` gives for the rows of each client, together in the shape and type of `rows`."""
    return torch.cat([draw(rows[:n].shape, g) for n, g in zip(sizes, draws, strict=True)]).to(rows)


D = TypeVar("D", bound=type[Defence])


def defence(name: str, *, title: str = "", paper: str = "") -> Callable[[D], D]:
    """A decorator that registers a subclass of `Defence`."""

    def decorate(made: D) -> D:
        return plugins.register("defence", name, title=title, paper=paper, order=made.order)(made)

    return decorate
