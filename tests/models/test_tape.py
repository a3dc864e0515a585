"""The tape: models that it can follow and torch.fx cannot, refusals, and cuts of many architectures."""

import copy
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cut import assert_partitioned, assert_whole, parts_in_mode, vector
from torch import Tensor, nn
from torch.nn import functional

from cutlayer.errors import CutError
from cutlayer.models import Parts, cut
from cutlayer.models.cut import _cut, _undisturbed
from cutlayer.models.parts import Arguments, CannotCutError
from cutlayer.models.tape import split_by_tape
from cutlayer.seeds import torch_seeded

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def _load(name: str) -> Any:
    """A module of the folder of benchmarks."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


ARCHITECTURES = _load("architectures")
SWEEP = _load("cuts")


def by_tape(model: nn.Module, at: str, example: Any) -> Parts:
    """A cut that uses only the tape. Raises CannotCutError."""
    with _undisturbed():
        return _cut(model, (at,), Arguments.of(example), (("tape", split_by_tape),))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# Many architectures


REPRESENTATIVE = [
    "MLP, spectral norm",
    "MLP, two outputs by name",
    "MLP, buffer reassigned",
    "Wide and deep, two inputs by name",
    "LSTM to LSTM",
    "GRU, packed sequences",
    "CNN, lazy",
    "DenseNet-like, inside a block",
    "U-Net, in the middle",
    "TCN",
    "Graph, dense adjacency",
    "Mixture of experts, routed",
    "Rotary decoder by hand",
    "Attention by hand, U-shaped, tied",
    "nn.TransformerEncoder, padding mask",
]


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_architectures_are_cut_and_equal(name: str) -> None:
    (architecture,) = (a for a in ARCHITECTURES.architectures() if a.name == name)
    assert SWEEP.look_at(architecture).trouble == ""


@pytest.mark.slow
def test_nearly_all_architectures_are_cut() -> None:
    found = [SWEEP.look_at(architecture) for architecture in ARCHITECTURES.architectures()]
    assert len(found) >= 60
    refused = [f.of.name for f in found if f.trouble]
    assert len(refused) <= len(found) / 10, refused


# What crosses the cut


def test_positions_are_computed_again_and_one_tensor_crosses() -> None:
    example = torch.randint(0, 16, (4, 5))
    parts = cut(ARCHITECTURES.RotaryDecoder(), "first", example)
    assert [c.name for c in parts.crossing] == ["first"]


class Masked(nn.Module):
    """Two attention layers share one mask, which is made from an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.a, self.b, self.head = (
            nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        )  # fmt: skip

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        bias = (1.0 - attention_mask[:, None, :].to(self.head.weight.dtype)) * -1e4
        h = self.embed(input_ids)
        for layer in (self.a, self.b):
            h = layer((h @ h.transpose(1, 2) + bias).softmax(-1) @ h)
        return self.head(h[:, 0])


def masked_batch(rows: int) -> dict[str, Tensor]:
    ids = torch.randint(1, 16, (rows, 6))
    ids[0, 4:] = 0
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@pytest.mark.parametrize("how", ["hooks", "tape"])
def test_a_mask_that_is_an_argument_crosses_as_it_is(how: str) -> None:
    model = Masked()
    batch = masked_batch(4)
    parts = cut(model, "a", batch) if how == "hooks" else by_tape(model, "a", batch)
    assert {c.name for c in parts.crossing} == {"a", "attention_mask"}
    assert {c.shape for c in parts.crossing} == {(6, 8), (6,)}
    other = masked_batch(3)
    assert torch.allclose(parts.server(parts.client(other)), model(**other))
    as_rows = tuple(other.values())
    assert torch.equal(parts.server(parts.client(as_rows)), parts.server(parts.client(other)))


def test_ids_that_are_an_argument_do_not_cross() -> None:
    class Late(Masked):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return super().forward(input_ids, attention_mask) + self.head(self.embed(input_ids * 2 % 16)[:, 1])

    with pytest.raises(CutError, match=r"both sides|raw input"):
        cut(Late(), "a", masked_batch(4))


def test_positional_arguments() -> None:
    model = ARCHITECTURES.Siamese()
    example = (vector(), vector())
    parts = cut(model, "encoder", example)
    assert torch.equal(parts.server(parts.client(example)), model(*example))
    with pytest.raises(CutError, match="at least two samples, in all its tensors alike"):
        cut(model, "encoder", (vector(4), vector(3)))


class Biased(nn.Module):
    """Attention with one bias for all rows, computed from a parameter before the first layer, as in T5."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.table = nn.Embedding(16, 8), nn.Embedding(11, 1)
        self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        at = torch.arange(ids.shape[1])
        bias = self.table(at[:, None] - at[None, :] + 5)[None, :, :, 0]
        h = self.embed(ids)
        for layer in (self.a, self.b):
            h = layer((h @ h.transpose(1, 2) + bias).softmax(-1) @ h)
        return self.head(h[:, 0])


def test_what_all_rows_share_crosses_with_every_row() -> None:
    model = Biased()
    parts = cut(model, "a", torch.randint(0, 16, (4, 6)))
    assert sorted(c.shape for c in parts.crossing) == [(6, 6), (6, 8)]
    assert_whole(model, parts, torch.randint(0, 16, (3, 6)))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.table.weight.add_(1.0 * torch.arange(11)[:, None])
    client = cut(other, "a", torch.randint(0, 16, (4, 6))).client
    ids = torch.randint(0, 16, (2, 6))
    both = tuple(torch.cat(rows) for rows in zip(parts.client(ids), client(ids), strict=True))
    alone = torch.cat([parts.server(parts.client(ids)), parts.server(client(ids))])
    torch.testing.assert_close(parts.server(both), alone)


# What the tape follows


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 3  # deliberately not the derivative, to notice a tape that records the inside of the function


class Odd(nn.Module):
    """A view by a size, a passage without gradients, an autograd.Function, an in-place sum and one of two results."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count += len(x)
        h = Doubling.apply(self.a(x))
        with torch.no_grad():
            frozen, _ = self.b(h).max(1, keepdim=True)
        h = functional.dropout(h.view(len(x) * 2, -1), 0.3, self.training).view(len(x), -1)
        h += frozen + torch.arange(len(x), device=x.device, dtype=x.dtype)[:, None] * 0.01
        return self.c(torch.tanh(self.b(h)))


@pytest.mark.parametrize("training", [True, False])
def test_an_odd_model(training: bool) -> None:
    model = Odd()
    parts = by_tape(model, "a", vector())
    assert_partitioned(model, parts)
    parts_in_mode(parts, training)
    x = vector(6)
    with torch_seeded(2, "odd"):
        expected = copy.deepcopy(model).train(training)(x)
    with torch_seeded(2, "odd"):
        assert torch.equal(parts.server(parts.client(x)), expected)


def test_types_follow_the_model() -> None:
    class Typed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Embedding(16, 8), nn.Linear(8, 5)

        def forward(self, ids: Tensor) -> Tensor:
            scale = torch.ones(ids.shape[1], dtype=self.b.weight.dtype, device=ids.device)
            return self.b((self.a(ids) * scale[:, None]).mean(1))

    model = Typed()
    parts = by_tape(model, "a", torch.randint(0, 16, (4, 5)))
    for part in parts.all:
        part.double()
    ids = torch.randint(0, 16, (3, 5))
    assert torch.equal(parts.server(parts.client(ids)), model.double()(ids))


# What the tape refuses


@pytest.mark.parametrize(
    ("look", "words"),
    [
        (lambda h: h * 2 if h.mean() > 0 else h, "depends on values of the data"),
        (lambda h: h * float(h.detach().max()), "depends on values of the data"),
        (lambda h: h[h[:, 0] > 0].sum() / len(h[h[:, 0] > 0]) + h, "depends on values of the data"),
        (lambda h: h * 2 if torch.rand(()) > 0.5 else h, "draws random numbers"),
        (lambda h: h * (2 if len(h) > 4 else 1), "size of the batch"),
        (lambda h: h + torch.from_numpy(h.detach().numpy()), "depends on values of the data"),
    ],
)
def test_what_a_tape_cannot_hold(look: Any, words: str) -> None:
    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(look(self.a(x)))

    with pytest.raises(CannotCutError, match=words):
        by_tape(Looking(), "a", vector())
