"""How much a cut model computes: floating point operations of each part, forward and backward, per sample.

Counted by torch's own counter (`torch.utils.flop_counter`) while the real modules run: one multiply-add is two FLOPs;
matrix products, convolutions and attention count; elementwise operations (activations, normalisation, pooling,
optimiser steps) do not. This also works on the meta device, where nothing is computed or allocated.

The client part's first layer has no gradient of its input to compute, the server's has (the cut gradient), so a part's
backward pass is less than twice its forward pass. The paper (Table 4) counts three times the forward pass instead:
`Flops.three_forwards`.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cutlayer import seeds
from cutlayer.copies import deep_copy
from cutlayer.eager import FlopCount
from cutlayer.models.likeness import Established, of_tensor
from cutlayer.models.parts import Parts
from cutlayer.types import Rows, as_tuple

_COUNTED = Established()


@dataclass(frozen=True)
class Flops:
    """FLOPs per sample of one part."""

    forward: float
    backward: float

    @property
    def training(self) -> float:
        """Forward and backward pass, as counted."""
        return self.forward + self.backward

    @property
    def three_forwards(self) -> float:
        """The paper's count for training: three times the forward pass."""
        return 3 * self.forward

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs per sample of a cut model's parts. `tail` is the client's last part in the U-shape (else zero), `head` an
    auxiliary head, which does not belong to the model. `uncut` is the whole model, if it was counted: it computes no
    gradients at the cut if nothing before the cut is trained.
    """

    client: Flops
    server: Flops
    tail: Flops = Flops(0.0, 0.0)
    head: Flops = Flops(0.0, 0.0)
    uncut: Flops | None = field(default=None, compare=False)

    @property
    def whole(self) -> Flops:
        """The whole model: the FLOPs of a client of federated learning."""
        return self.uncut or self.client + self.server + self.tail

    @property
    def at_client(self) -> Flops:
        """All parts of a client of split learning."""
        return self.client + self.tail


def count(parts: Parts, example: Tensor | Rows, head: nn.Module | None = None) -> ModelFlops:
    """FLOPs per sample of `parts` on rows like `example`, each [n, ...] (two or more; on the parts' own device), and of
    an auxiliary `head`.

    Copies of the parts are run in training mode, so the parts do not change. Warns if a part has parameters but no
    operation that the counter knows (recurrent layers, say): its figure is then too low.
    """
    rows = as_tuple(example)
    found = _COUNTED.of(_key(parts, rows, head), lambda: _counted(parts, rows, head))
    for name, (_, known) in found.items():
        _say_unknown(name, known)
    return ModelFlops(**{name: flops for name, (flops, _) in found.items()})


def count_head(head: nn.Module, smashed: Rows) -> Flops:
    """FLOPs per sample of an auxiliary head on smashed data, each [n, s...]."""
    head = head.to(smashed[0].dtype) if smashed[0].is_floating_point() else head
    flops, known, _ = _part("head", head, smashed, len(smashed[0]))
    _say_unknown("head", known)
    return flops


def _key(parts: Parts, rows: Rows, head: nn.Module | None) -> Hashable | None:
    """Everything on which the FLOPs of parts depend; None if it is not known."""
    if parts.likeness is None or head is not None:
        return None
    trained = [p.requires_grad for part in parts.all for p in part.parameters()]
    return parts.likeness, tuple(trained), tuple(map(of_tensor, rows))


def _counted(parts: Parts, rows: Rows, head: nn.Module | None) -> dict[str, tuple[Flops, bool]]:
    """FLOPs per sample of the parts and of a head, by name, and whether they are known."""
    samples, found = len(rows[0]), {}
    with seeds.restored():
        for name, module in zip(("client", "server", "tail"), parts.all, strict=False):
            flops, known, rows = _part(name, module, rows, samples)
            found[name] = flops, known
            if name == "client" and head is not None:
                flops, known, _ = _part("head", head, rows, samples)
                found["head"] = flops, known
    return found


def _part(name: str, module: nn.Module, rows: Rows, samples: int) -> tuple[Flops, bool, Rows]:
    """FLOPs per sample of one part, whether they are known, and its outputs for the next part."""
    module = deep_copy(module).train()
    part, rows = _count(module, rows, samples, first=name == "client")
    return part, bool(part.forward) or not _multiplies(module), rows


def _say_unknown(name: str, known: bool) -> None:
    """Warn if the FLOPs of a part are not known."""
    if not known:
        what = "auxiliary head" if name == "head" else f"{name} part"
        warnings.warn(
            f"the FLOPs of the {what} are not known: torch's counter knows none of its operations", stacklevel=3
        )


_WITHOUT_PRODUCTS = (
    nn.Embedding,
    nn.EmbeddingBag,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,
    nn.PReLU,
)


def _multiplies(part: nn.Module) -> bool:
    """Whether a part has parameters of layers other than lookups and scalings."""
    idle = {id(p) for m in part.modules() if isinstance(m, _WITHOUT_PRODUCTS) for p in m.parameters(recurse=False)}
    return any(id(p) not in idle for p in part.parameters())


def _count(module: nn.Module, received: Rows, rows: int, *, first: bool) -> tuple[Flops, Rows]:
    """FLOPs per sample of one part, and its outputs for the next. The `first` part receives data, without gradients."""
    given = tuple(r.detach() for r in received)
    if not first:
        given = tuple(r.requires_grad_() if r.is_floating_point() else r for r in given)
    # The counter does not know the CPU's own attention. Plain products have the same count, and are known.
    with sdpa_kernel(SDPBackend.MATH), FlopCount(display=False) as forward:
        outputs = as_tuple(module(given))
    total = [o.sum() for o in outputs if o.is_floating_point() and o.requires_grad]
    with sdpa_kernel(SDPBackend.MATH), FlopCount(display=False) as backward:  # in which blocks may run again
        if total:
            torch.autograd.backward(total)
    flops = Flops(forward.get_total_flops() / rows, backward.get_total_flops() / rows)
    return flops, tuple(o.detach() for o in outputs)
