"""Modules with the same key compute alike, so what was proved for one is not proved again for another."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from cutlayer import CutError
from cutlayer.models import build, cut
from cutlayer.models.likeness import Established, likeness

CUT = importlib.import_module("cutlayer.models.cut")  # importing the name gives the function


def net(**options: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(options.get("dropout", 0.1)), nn.Linear(4, 2)
    )


def changed(change: Callable[[nn.Sequential], object]) -> nn.Sequential:
    made = net()
    change(made)
    return made


class Own(nn.Linear):
    """A subclass, whose forward pass could do anything."""


def test_other_values_of_parameters_are_alike() -> None:
    assert likeness(net()) == likeness(net()) is not None
    for name in ("mlp", "cnn", "alexnet"):
        assert likeness(build(name, (3, 32, 32), 10)) == likeness(build(name, (3, 32, 32), 10)) is not None


@pytest.mark.parametrize(
    "other",
    [
        net(dropout=0.2),
        nn.Sequential(*net(), nn.ReLU()),
        changed(lambda m: m.eval()),
        changed(lambda m: m.double()),
        changed(lambda m: m[0].requires_grad_(False)),
        changed(lambda m: nn.init.zeros_(m[4].weight)),
        changed(lambda m: nn.init.constant_(m[4].weight, float("nan"))),
        changed(lambda m: m[1].running_mean.fill_(1.0)),
        changed(lambda m: setattr(m[4], "weight", nn.Parameter(m[4].weight.detach().t().contiguous().t()))),
        changed(lambda m: setattr(m[1], "eps", float("nan"))),
    ],
)
def test_what_matters_is_in_the_key(other: nn.Module) -> None:
    assert likeness(other) is not None
    assert likeness(other) != likeness(net())
    assert likeness(other) == likeness(other)


def test_tied_weights_are_unlike_others() -> None:
    apart, tied = (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(2))
    tied[1].weight = tied[0].weight
    assert likeness(apart) != likeness(tied) is not None


@pytest.mark.parametrize(
    "unknown",
    [
        nn.Sequential(nn.Linear(3, 4), Own(4, 2)),
        changed(lambda m: m[2].register_forward_hook(lambda *_: None)),
        changed(lambda m: setattr(m[2], "forward", lambda x: x)),
        changed(lambda m: nn.utils.parametrizations.weight_norm(m[0])),
        changed(lambda m: m.to("meta")),
    ],
    ids=["own class", "hook", "own forward", "parametrised", "meta"],
)
def test_no_key_for_what_it_cannot_hold(unknown: nn.Module) -> None:
    assert likeness(unknown) is None


def test_a_cut_is_proved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A repeated cut gives the parts of the new model. Another cut, or a user's own class, needs a new proof."""
    proofs: list[int] = []
    prove = CUT.prove
    monkeypatch.setattr(CUT, "_MOULDS", Established())
    monkeypatch.setattr(CUT, "prove", lambda *args, **kwargs: proofs.append(1) or prove(*args, **kwargs))
    x = torch.randn(5, 3)
    for _ in range(3):
        model = net()
        parts = cut(model, "0", x)
        assert parts.likeness is not None
        assert torch.equal(parts.server.eval()(parts.client.eval()(x)), model.eval()(x))
    assert len(proofs) == 1
    cut(net(), "2", x)
    cut(net(), "0", x.double().float()[:3])
    assert len(proofs) == 3
    for _ in range(2):
        assert cut(nn.Sequential(Own(3, 4), nn.Linear(4, 2)), "0", x).likeness is None
    assert len(proofs) == 5


def test_a_refusal_is_found_out_each_time() -> None:
    def tied() -> nn.Module:
        made = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
        made[2].weight = made[0].weight
        return made

    for _ in range(2):
        with pytest.raises(CutError, match="used on both sides"):
            cut(tied(), "0", torch.randn(4, 3))


def test_the_oldest_is_forgotten() -> None:
    known = Established()
    assert [known.of(i % 600, lambda i=i: i) for i in range(601)][-1] == 600  # 0 was dropped
    assert known.of(599, lambda: -1) == 599
    assert len(known) == 512
    assert known.of(None, lambda: 1) == 1
    assert known.of(None, lambda: 2) == 2
