"""Parts made from a mould equal those of a cut of the same model, and the mould holds no values."""

from __future__ import annotations

import gc
import importlib
import weakref

import pytest
import torch
from torch import nn

from cutlayer.models import cut
from cutlayer.models.likeness import Established
from cutlayer.models.mould import Mould
from cutlayer.models.parts import Parts, state_names

CUT = importlib.import_module("cutlayer.models.cut")  # importing the name gives the function


def net() -> nn.Sequential:
    made = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    made[4].weight = made[2].weight  # tied within one part
    made[0].bias.requires_grad_(False)
    made[1].register_buffer("scratch", torch.zeros(2), persistent=False)
    return made


def trained(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.copy_(torch.randn(tensor.shape) if tensor.is_floating_point() else tensor + 3)
    return model


def told(parts: Parts) -> list[list[tuple[str, list[float], bool, bool]]]:
    return [
        [(name, t.flatten().tolist(), t.requires_grad, kept) for name, t, kept in state_names(p)] for p in parts.all
    ]


@pytest.mark.parametrize("at", ["0", "1", ("0", "1"), "output"])
def test_it_gives_the_parts_of_a_cut(at: str | tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 3)
    mould = Mould(cut(net(), at, x), net())
    model = trained(net())
    monkeypatch.setattr(CUT, "_MOULDS", Established())
    cast, plain = mould.cast(model), cut(model, at, x)
    assert told(cast) == told(plain)
    assert (cast.crossing, cast.returning, cast.method) == (plain.crossing, plain.returning, plain.method)
    assert [p.training for p in cast.all] == [p.training for p in plain.all]
    received, expected = x, x
    for ours, theirs in zip(cast.all, plain.all, strict=True):
        received, expected = ours(received), theirs(expected)
    assert torch.equal(received, expected)
    assert [b.tolist() for p in cast.all for b in p.buffers()] == [b.tolist() for p in plain.all for b in p.buffers()]


def test_what_parts_share_they_share_among_themselves_alone() -> None:
    model, x = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6, bias=False)), torch.zeros(4, 2).long()
    model[2].weight = model[0].weight
    mould = Mould(cut(model, ("0", "1"), x), model)
    one, two = mould.cast(model), mould.cast(model)
    ends = [[p for part in (parts.client, parts.tail) for p in part.parameters()] for parts in (one, two)]  # type: ignore[union-attr]
    assert ends[0][0] is ends[0][1]
    assert ends[1][0] is ends[1][1]
    assert len({t.data_ptr() for t in (ends[0][0], ends[1][0], model[0].weight)}) == 3


class Scaled(nn.Module):
    """Has a constant that is not part of its state."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.other = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.layer(x) * torch.tensor([1.0, 2.0, 3.0]))


def test_constants_come_along() -> None:
    x = torch.randn(5, 3)
    parts, model = cut(Scaled(), "layer", x), Scaled()
    assert {name for name, _, _ in state_names(parts.server)} != {name for name, _, _ in state_names(model.other)}
    cast = Mould(parts, model).cast(model)
    assert torch.equal(cast.server(cast.client(x)), model(x))


def test_it_keeps_no_values() -> None:
    parts, model = cut(net(), "1", torch.randn(5, 3)), net()
    mould = Mould(parts, model)
    everything = (model, parts.client, parts.server)
    held = [weakref.ref(t) for m in everything for t in (*m.parameters(), *m.buffers(), *m.modules())]
    del model, parts, everything
    gc.collect()
    assert [h for h in held if h() is not None] == []
    assert torch.isfinite(mould.cast(net()).client(torch.randn(4, 3))[0]).all()


def test_what_was_cut_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CUT, "_MOULDS", Established())
    model = net()
    cut(model, "1", torch.randn(5, 3))
    held = [weakref.ref(m) for m in model.modules()]
    del model
    gc.collect()
    assert len(CUT._MOULDS) == 1
    assert [h for h in held if h() is not None] == []
