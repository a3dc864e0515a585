"""Gradient ascent: the sign is flipped (as in Li et al. 2018, arXiv 1811.03761)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cutlayer.attacks.behaviour import Attack, attack

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cutlayer.types import Rows
    from cutlayer.verbs import Traits


@attack("sign", title="Flipped sign", paper="arXiv 1811.03761")
class Sign(Attack):
    """The client increases the loss instead of decreasing it.

    In split learning, it back-propagates the cut gradient times minus the parameter. A client that trains a whole model
    sends its update times minus the parameter.
    """

    def gradient(self, gradient: Rows, draw: torch.Generator) -> Rows:
        """Negated."""
        return tuple(g * -self.parameter for g in gradient)

    def update(self, update: Tensor, draw: torch.Generator) -> Tensor:
        """Negated."""
        return update * -self.parameter

    def acts_on(self, traits: Traits) -> frozenset[str]:
        """One of the two: both would cancel."""
        return super().acts_on(traits) - ({"update"} if traits.split else set())
