"""Fast copies of modules equal those of `copy.deepcopy`."""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support import mlp, residual
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from cutlayer.copies import deep_copy
from cutlayer.models import build, cut


class Odd(nn.Module):
    """A module with many kinds of state, partly shared and partly circular."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.again = self.first
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.first.weight
        self.nothing = None
        self.register_buffer("count", torch.zeros(2))
        self.register_buffer("missing", None)
        self.plain = {"layers": [self.first, (self.tied, {1, 2})], "empty": OrderedDict(), ("a", 1): None}
        self.circle = [self.plain]
        self.circle.append(self)  # type: ignore[arg-type]
        self.state = self.first.state_dict()
        self.function = torch.relu
        self.first.register_forward_hook(self.hook)

    def hook(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """A bound method: the hook of the copy belongs to the copy."""
        return output + len(self.circle)

    def forward(self, x: Tensor) -> Tensor:
        """Both layers."""
        return self.tied(self.first(x))  # type: ignore[no-any-return]


class Singular(nn.Module):
    """Defines `__deepcopy__`."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Singular:
        made = Singular()
        made.copies = self.copies + 1
        return made


class Told(nn.Module):
    """Defines `__getstate__` and `__setstate__`."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "told": ["so"]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "taken": True})


class Reduced(nn.Module):
    """Defines `__reduce__`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return nn.Identity, ()


def lstm() -> nn.Module:
    """A module with weak references to its weights."""
    return nn.LSTM(3, 4, 2)


def parametrized() -> nn.Module:
    """A module of a class that was created for it alone."""
    return parametrizations.weight_norm(nn.Linear(3, 3))


def traced() -> nn.Module:
    """A module that copies its graph itself."""
    return torch.fx.symbolic_trace(mlp())


def part() -> nn.Module:
    """A part of a cut model."""
    return cut(residual(), "1.first", torch.rand(3, 6)).server


def same(a: Any, b: Any, seen: dict[int, int]) -> bool:
    """Whether two copies are equal and share their parts in the same way."""
    if type(a) is not type(b):
        return False
    if isinstance(a, weakref.ref):
        return same(a(), b(), seen)
    if isinstance(a, (str, int, float, bool, type(None), type, torch.dtype)):
        return bool(a == b)
    if id(a) in seen:
        return seen[id(a)] == id(b)
    seen[id(a)] = id(b)
    if isinstance(a, Tensor):
        return torch.equal(a, b) and a.requires_grad == b.requires_grad
    if isinstance(a, dict):
        both = zip(a.items(), b.items(), strict=True)
        items = len(a) == len(b) and all(k == n and same(x, y, seen) for (k, x), (n, y) in both)
        return items and same(getattr(a, "__dict__", 0), getattr(b, "__dict__", 0), seen)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y, seen) for x, y in zip(a, b, strict=True))
    return not isinstance(a, nn.Module) or same(a.__dict__, b.__dict__, seen)


MADE = [Odd, lstm, parametrized, mlp, part, Told, partial(build, "cnn", (1, 8, 8), 10)]


@pytest.mark.parametrize("make", MADE)
def test_a_copy_is_that_of_deepcopy(make: Callable[[], nn.Module]) -> None:
    model = make()
    quick, slow = deep_copy(model), copy.deepcopy(model)
    assert same(slow, quick, {})
    assert same(slow, copy.deepcopy(quick), {})
    theirs = {t.data_ptr() for t in model.state_dict().values()}
    assert theirs.isdisjoint(t.data_ptr() for t in quick.state_dict().values())
    assert {id(m) for m in model.modules()}.isdisjoint(id(m) for m in quick.modules())


def test_alike_is_not_said_of_others() -> None:
    """Checks `same`, which the test above uses."""
    model = Odd()
    for change in ("count", "plain", "again"):
        other = copy.deepcopy(model)
        setattr(other, change, torch.ones(2) if change == "count" else copy.deepcopy(getattr(other, change)))
        assert not same(model, other, {})


def test_what_is_shared_and_what_runs_in_a_circle_stays_so() -> None:
    model = Odd()
    made = deep_copy([model, model.first, model])
    assert made[0] is made[2]
    odd = made[0]
    assert isinstance(odd, Odd)
    assert odd.again is odd.first is made[1] is odd.plain["layers"][0]  # type: ignore[index]
    assert odd.tied.weight is odd.first.weight is not model.first.weight
    assert odd.circle[1] is odd
    assert odd.state._metadata == model.state._metadata  # type: ignore[attr-defined]
    odd.circle.append({})
    x = torch.ones(1, 3)
    assert not torch.equal(odd(x), model(x))  # the copy has its own hook


def test_what_says_itself_how_it_is_copied_is_asked() -> None:
    assert deep_copy(Singular()).copies == 1
    held = deep_copy(nn.Sequential(Singular()))
    assert held[0].copies == 1
    told = deep_copy(Told())
    assert told.told == ["so"]
    assert told.taken
    assert isinstance(deep_copy(nn.Sequential(Reduced()))[0], nn.Identity)
    alone = mlp()
    alone.__deepcopy__ = lambda memo: "asked"
    assert deep_copy(alone) == "asked"
    assert isinstance(deep_copy(traced()), torch.fx.GraphModule)


def test_modules_are_not_left_to_the_slow_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """`copy.deepcopy` is used only for tensors and rare types."""
    asked = list[type]()
    real = copy.deepcopy

    def counted(thing: Any, memo: Any = None) -> Any:
        asked.append(type(thing))
        return real(thing, memo)

    monkeypatch.setattr(copy, "deepcopy", counted)
    deep_copy([mlp(), part(), build("cnn", (1, 8, 8), 10)])
    assert nn.Parameter in asked
    assert not any(issubclass(kind, nn.Module | dict | list) for kind in asked)


def test_what_is_known_is_not_copied() -> None:
    model = mlp()
    shared = model[0].weight
    made = deep_copy(model, {id(shared): shared})
    assert made[0].weight is shared
    assert made[0].bias is not model[0].bias
