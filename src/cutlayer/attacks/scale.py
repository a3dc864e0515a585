"""What is sent is scaled: model replacement (Bagdasaryan et al. 2018, arXiv 1807.00459), without a second goal."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from cutlayer.attacks.behaviour import Attack, attack

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cutlayer.types import Rows


@attack("scale", title="Scaling", paper="arXiv 1807.00459")
class Scaling(Attack):
    """Smashed data are multiplied by the parameter, and so are updates of models that leave the client.

    The client trains on the gradients that it receives as if it had sent correct data.
    """

    default: ClassVar[float] = 1e6

    def rows(self, rows: Rows, draw: torch.Generator) -> Rows:
        """Times the parameter."""
        return tuple(r.double() * self.parameter for r in rows)

    def update(self, update: Tensor, draw: torch.Generator) -> Tensor:
        """Times the parameter."""
        return update * self.parameter
