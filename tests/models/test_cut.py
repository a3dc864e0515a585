"""Cuts of common kinds of models: the parts equal the whole at every cut, and refusals give the reason."""

import copy
import io
import random
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support import ZOO
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional
from torch.utils import _pytree as pytree

from cutlayer.errors import CutError
from cutlayer.models import Crossing, Parts, build, cut, cut_points
from cutlayer.run import Run
from cutlayer.seeds import torch_seeded

ZOO_SHAPES = {"mlp": (1, 8, 8), "cnn": (1, 8, 8), "resnet16": (1, 8, 8), "alexnet": (1, 8, 8)}
IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 0, 0], [8, 9, 7, 0, 0, 0], [3, 2, 3, 8, 4, 6]])  # 0 is padding


# Models in the style of users


class Block(nn.Module):
    """A residual block with in-place operations, as in torchvision."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x
        return self.relu(y)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.layer1 = nn.Sequential(Block(4), Block(4))
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        z = self.pool(self.layer1(self.stem(x)))
        return self.fc(z.view(x.size(0), -1))  # reads the size of the raw input after the cut


class Dense(nn.Module):
    """Each layer receives the outputs of all earlier ones. Has functional dropout and group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(1, 4, 3, padding=1)
        self.c2 = nn.Conv2d(4, 4, 3, padding=1)
        self.c3 = nn.Conv2d(8, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 12)
        self.fc = nn.Linear(12 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = self.c1(x)
        b = functional.relu(self.c2(a))
        c = functional.relu(self.c3(torch.cat([a, b], 1)))
        h = functional.dropout(self.norm(torch.cat([a, b, c], 1)), 0.3, self.training)
        return self.fc(h.flatten(1))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.drop = nn.Dropout(0.1)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.heads = heads
        self.register_buffer("mask", torch.tril(torch.ones(length, length)))

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm(x)).split(d, dim=2)
        q, k, v = (y.view(b, t, self.heads, d // self.heads).transpose(1, 2) for y in (q, k, v))
        scores = (q @ k.transpose(-2, -1)).masked_fill(self.mask[:t, :t] == 0, float("-inf"))
        y = (self.drop(scores.softmax(-1)) @ v).transpose(1, 2).contiguous().view(b, t, d)
        x = x + self.proj(y)
        return x + self.mlp(x)


class Gpt(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(10, 8)
        self.positions = nn.Embedding(6, 8)
        self.blocks = nn.ModuleList(Attention(8, 2, 6) for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 10, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, -1])


class Encoder(nn.Module):
    """nn.TransformerEncoder with a class token and optionally a padding mask made from the token ids."""

    def __init__(self, padding: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.1)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 5)
        self.padding = padding

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(ids.shape[0], -1, -1), self.embed(ids)], 1)
        mask = torch.cat([torch.ones_like(ids[:, :1]), ids], 1) == 0 if self.padding else None
        return self.head(self.encoder(x, src_key_padding_mask=mask)[:, 0])


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU], batch_first: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.rnn = kind(6, 8, num_layers=2, batch_first=batch_first, dropout=0.1)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)
        self.batch_first = batch_first

    def forward(self, ids: Tensor) -> Tensor:
        e = self.embed(ids)
        out, _ = self.rnn(e if self.batch_first else e.transpose(0, 1))
        h = torch.tanh(self.middle(out))
        return self.head(h[:, -1] if self.batch_first else h[-1])


class LastState(nn.Module):
    """The recurrent state crosses, with the batch in its second dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, num_layers=2, batch_first=True)
        self.decoder = nn.LSTM(6, 8, num_layers=2, batch_first=True)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(x)
        _, state = self.lstm(x)
        out, _ = self.decoder(x.flip(1), state)
        return self.head(out[:, -1])


class ControlFlow(nn.Module):
    """A branch depends on a shape or on the data."""

    def __init__(self, by_data: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.by_data = by_data

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        condition = y.mean() > 0 if self.by_data else x.shape[1] > 4
        return self.c(functional.relu(self.b(y) if condition else -self.b(y)))


class Norms(nn.Module):
    """Weight norm, spectral norm, frozen parameters, an unused layer and a constant that is not in the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.unused = nn.Linear(3, 3)
        self.b = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
        self.c = nn.Linear(8, 5)
        self.scale = torch.arange(8.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(self.frozen(torch.tanh(self.a(x)) * self.scale))))


def sequential() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Dropout(0.2), nn.Linear(144, 8), nn.Linear(8, 5)
    )


def tiny_bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=10,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        num_labels=5,
    )
    return transformers.BertForSequenceClassification(config)


def tiny_vit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=5,
    )
    return transformers.ViTForImageClassification(config)


def tiny_gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=10, n_positions=8, n_embd=8, n_layer=2, n_head=2, num_labels=5, pad_token_id=0, bos_token_id=1,
        eos_token_id=1,
    )  # fmt: skip
    return transformers.GPT2ForSequenceClassification(config)


def picture(rows: int = 4) -> Tensor:
    return torch.randn(rows, 1, 8, 8)


def vector(rows: int = 4) -> Tensor:
    return torch.randn(rows, 8)


def series(rows: int = 4) -> Tensor:
    return torch.randn(rows, 5, 6)


def ids(rows: int = 4) -> Tensor:
    return IDS.repeat(3, 1)[:rows]


def encoder() -> nn.Module:
    return Encoder(padding=False)


def padded_encoder() -> nn.Module:
    return Encoder(padding=True)


def lstm() -> nn.Module:
    return Recurrent(nn.LSTM, batch_first=True)


def gru() -> nn.Module:
    return Recurrent(nn.GRU, batch_first=False)


def by_shape() -> nn.Module:
    return ControlFlow(by_data=False)


def by_data() -> nn.Module:
    return ControlFlow(by_data=True)


# model, batches, cut, method, number of tensors that cross, a parameter of the client, a parameter of the server
USERS: list[tuple[Any, Any, str, str, int, str, str]] = [
    (sequential, picture, "0", "fx", 1, "0.weight", "4.weight"),  # followed by an in-place ReLU
    (sequential, picture, "2", "fx", 1, "0.weight", "4.weight"),
    (Residual, picture, "layer1", "fx", 1, "layer1.1.conv2.weight", "fc.weight"),
    (Residual, picture, "pool", "fx", 1, "layer1.1.conv2.weight", "fc.weight"),  # x.size(0) after the cut
    (Residual, picture, "layer1.0", "fx", 1, "layer1.0.bn2.weight", "layer1.1.conv1.weight"),
    (Residual, picture, "layer1.0.bn1", "fx", 2, "layer1.0.bn1.weight", "layer1.0.conv2.weight"),  # in-place ReLU next
    (Residual, picture, "layer1.1.conv1", "fx", 2, "layer1.1.conv1.weight", "layer1.1.bn1.weight"),
    (Dense, picture, "c2", "fx", 2, "c2.weight", "c3.weight"),
    (Dense, picture, "c3", "fx", 3, "c3.weight", "norm.weight"),
    (Gpt, ids, "tokens", "fx", 1, "tokens.weight", "positions.weight"),
    (Gpt, ids, "blocks.0", "fx", 1, "blocks.0.mlp.0.weight", "blocks.1.norm.weight"),
    (Gpt, ids, "blocks.1.qkv", "fx", 2, "blocks.1.qkv.weight", "blocks.1.proj.weight"),
    (encoder, ids, "encoder.layers.0", "hooks", 1, "encoder.layers.0.linear1.weight", "encoder.layers.1.norm1.weight"),
    (encoder, ids, "encoder", "fx", 1, "encoder.layers.1.linear1.weight", "head.weight"),
    (padded_encoder, ids, "embed", "fx", 3, "embed.weight", "head.weight"),
    (padded_encoder, ids, "encoder.layers.0", "tape", 2, "token", "encoder.layers.1.norm1.weight"),
    (lstm, ids, "rnn", "fx", 1, "rnn.weight_hh_l1", "middle.weight"),
    (gru, ids, "rnn", "fx", 1, "rnn.weight_hh_l1", "middle.weight"),
    (gru, ids, "embed", "fx", 1, "embed.weight", "rnn.weight_hh_l1"),
    (LastState, series, "lstm", "fx", 3, "lstm.weight_hh_l0", "decoder.weight_hh_l0"),
    (by_shape, vector, "a", "hooks", 1, "a.weight", "b.weight"),
    (by_shape, vector, "b", "hooks", 1, "b.weight", "c.weight"),
    (by_data, vector, "a", "hooks", 1, "a.weight", "b.weight"),
    (Norms, vector, "a", "fx", 1, "a.parametrizations.weight.original0", "c.weight"),
    (Norms, vector, "frozen", "fx", 1, "frozen.weight", "c.weight"),
    (tiny_bert, ids, "bert.embeddings", "hooks", 1, "bert.embeddings.word_embeddings.weight", "classifier.weight"),
    (tiny_bert, ids, "bert.encoder.layer.0", "hooks", 1, "bert.embeddings.LayerNorm.weight", "bert.pooler.dense.bias"),
    (tiny_vit, picture, "vit.embeddings", "hooks", 1, "vit.embeddings.cls_token", "classifier.weight"),
    (tiny_gpt2, ids, "transformer.h.0", "tape", 2, "transformer.wpe.weight", "score.weight"),
]  # fmt: skip
USER_NAMES = [f"{make.__name__}-{at}" for make, _, at, *_ in USERS]


# The definition of equal parts


def together(parts: Parts, x: Tensor) -> Tensor:
    """The output of the parts, called one after another."""
    value: Any = x
    for part in parts.all:
        value = part(value)
    return value


def over_the_wire(parts: Parts, x: Tensor) -> tuple[Tensor, list[tuple[Tensor, ...]], list[tuple[Tensor, ...]]]:
    """Logits, and what every part sent and received. Received rows have no autograd history."""
    given, received = [], []
    value: Any = x
    for part in parts.all[:-1]:
        given.append(part(value))
        received.append(tuple(r.detach().clone().requires_grad_(r.requires_grad) for r in given[-1]))
        value = received[-1]
    return parts.all[-1](value), given, received


def gradients_of_parts(parts: Parts, x: Tensor) -> dict[str, Tensor | None]:
    logits, given, received = over_the_wire(parts, x)
    torch.cos(logits).sum().backward()
    for g, r in zip(reversed(given), reversed(received), strict=True):
        pairs = [(a, b.grad) for a, b in zip(g, r, strict=True) if a.requires_grad]
        torch.autograd.backward([a for a, _ in pairs], [b for _, b in pairs])
    return {name: p.grad for part in parts.all for name, p in part.named_parameters()}


def assert_whole(model: nn.Module, parts: Parts, x: Tensor, close: bool = False) -> None:
    """Checks that logits, gradients and buffers equal the model's, in training and evaluation. Works on copies."""
    for training in (True, False):
        whole, pieces = copy.deepcopy(model).train(training), copy.deepcopy(parts)
        for part in pieces.all:
            part.train(training)
        with torch_seeded(7, "test"):
            output = whole(x)
        output = getattr(output, "logits", output)
        torch.cos(output).sum().backward()
        with torch_seeded(7, "test"):
            gradients = gradients_of_parts(pieces, x)
        with torch_seeded(7, "test"), torch.no_grad():
            again = together(copy.deepcopy(parts_in_mode(parts, training)), x)
        tolerance = (
            {"rtol": 1e-4, "atol": 1e-5} if close or x.dtype != torch.float64 else {"rtol": 1e-10, "atol": 1e-12}
        )
        torch.testing.assert_close(again, output.detach(), **tolerance)
        expected = {name: p.grad for name, p in whole.named_parameters()}
        assert {n for n, g in gradients.items() if g is not None} == {n for n, g in expected.items() if g is not None}
        for name, gradient in gradients.items():
            if gradient is not None:
                torch.testing.assert_close(gradient, expected[name], **tolerance, msg=name)
        state = {name: value for part in pieces.all for name, value in part.state_dict().items()}
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(state[name], value, **tolerance, msg=name)


def parts_in_mode(parts: Parts, training: bool) -> Parts:
    for part in parts.all:
        part.train(training)
    return parts


def assert_partitioned(model: nn.Module, parts: Parts) -> None:
    """Checks that every name of the state belongs to exactly one part and has the model's value."""
    names = [name for part in parts.all for name in part.state_dict()]
    assert sorted(names) == sorted(model.state_dict())
    for part in parts.all:
        for name, value in part.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), name
    parameters = {name for part in parts.all for name, _ in part.named_parameters()}
    assert parameters == {name for name, _ in model.named_parameters()}


@pytest.fixture(autouse=True)
def _seeded() -> Any:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# The zoo


@pytest.mark.parametrize(
    ("name", "at"), [(name, at) for name, info in ZOO.items() for at in ("input", *info.facts["cuts"], "output")]
)
def test_zoo_parts_are_the_whole_bit_for_bit(name: str, at: str) -> None:
    shape = ZOO_SHAPES[name]
    model = build(name, shape, 10)
    parts = cut(model, at, torch.randn(4, *shape))
    assert parts.method == ("whole" if at in ("input", "output") else "fx")
    assert_partitioned(model, parts)
    x = torch.randn(3, *shape)
    for training in (True, False):
        whole = copy.deepcopy(model).train(training)
        pieces = copy.deepcopy(parts_in_mode(parts, training))
        with torch_seeded(3, "test"):
            expected = whole(x)
        with torch_seeded(3, "test"):
            rows = pieces.client(x)
            assert isinstance(rows, tuple)
            assert torch.equal(pieces.server(rows), expected)
        assert [Crossing(tuple(r.shape[1:]), r.dtype) for r in rows] == list(parts.crossing)


@pytest.mark.parametrize("name", ZOO)
def test_zoo_parts_train_as_the_whole(name: str) -> None:
    shape = ZOO_SHAPES[name]
    model = build(name, shape, 10)
    assert_whole(model, cut(model, ZOO[name].facts["default_cut"], torch.randn(4, *shape)), torch.randn(5, *shape))


@pytest.mark.parametrize("name", ZOO)
def test_zoo_parts_survive_conversion_to_float64(name: str) -> None:
    shape = ZOO_SHAPES[name]
    model = build(name, shape, 10)
    parts = cut(model, ZOO[name].facts["default_cut"], torch.randn(4, *shape))
    for part in parts.all:
        part.to(torch.float64)
    assert_whole(copy.deepcopy(model).double(), parts, torch.randn(3, *shape, dtype=torch.float64))


@pytest.mark.parametrize("name", ZOO)
def test_u_shaped_cuts_of_the_zoo(name: str) -> None:
    shape = ZOO_SHAPES[name]
    model = build(name, shape, 10)
    first, last = ZOO[name].facts["cuts"][0], ZOO[name].facts["cuts"][-1]
    parts = cut(model, (first, last), torch.randn(4, *shape))
    assert parts.tail is not None
    assert set(parts.tail.state_dict()) == {n for n in model.state_dict() if n.startswith("head.")}
    assert_partitioned(model, parts)
    assert_whole(model, parts, torch.randn(5, *shape))
    features = parts.server(parts.client(torch.randn(2, *shape)))
    assert isinstance(features, tuple)
    assert [tuple(f.shape[1:]) for f in features] == [c.shape for c in parts.returning]


@pytest.mark.parametrize("at", [("input", "block1"), ("block1", "output"), ("input", "output")])
def test_u_shaped_cuts_with_an_empty_end(at: tuple[str, str]) -> None:
    model = build("cnn", (1, 8, 8), 10)
    parts = cut(model, at, picture())
    assert_partitioned(model, parts)
    assert_whole(model, parts, picture(3))
    if at[0] == "input":
        assert not list(parts.client.parameters())
    if at[1] == "output":
        assert parts.tail is not None
        assert not list(parts.tail.parameters())


# Users' models


@pytest.mark.parametrize(("make", "batch", "at", "method", "crossing", "mine", "yours"), USERS, ids=USER_NAMES)
def test_users_models(make: Any, batch: Any, at: str, method: str, crossing: int, mine: str, yours: str) -> None:
    model = make()
    parts = cut(model, at, batch(4))
    assert parts.method == method
    assert len(parts.crossing) == crossing
    assert_partitioned(model, parts)
    assert mine in parts.client.state_dict()
    assert yours in parts.server.state_dict()
    for rows in (2, 5):
        assert_whole(model, parts, batch(rows))
    for row, described in zip(parts.client(batch(3)), parts.crossing, strict=True):
        assert row.shape == (3, *described.shape)
        assert described.differentiable == row.is_floating_point()


U_SHAPED: list[tuple[Any, Any, tuple[str, str], str]] = [
    (Residual, picture, ("layer1.0.conv1", "layer1.1.conv1"), "fx"),
    (Dense, picture, ("c1", "c3"), "fx"),
    (Gpt, ids, ("blocks.0", "norm"), "fx"),
    (encoder, ids, ("encoder.layers.0", "encoder.layers.1"), "hooks"),
    (padded_encoder, ids, ("encoder.layers.0", "encoder"), "tape"),
    (LastState, series, ("mix", "decoder"), "fx"),
    (by_shape, vector, ("a", "b"), "hooks"),
    (tiny_bert, ids, ("bert.embeddings", "bert.pooler"), "hooks"),
]


@pytest.mark.parametrize(("make", "batch", "at", "method"), U_SHAPED, ids=[make.__name__ for make, *_ in U_SHAPED])
def test_u_shaped_cuts_of_users_models(make: Any, batch: Any, at: tuple[str, str], method: str) -> None:
    model = make()
    parts = cut(model, at, batch(4))
    assert parts.method == method
    assert_partitioned(model, parts)
    assert_whole(model, parts, batch(3))


@pytest.mark.parametrize("index", [2, 5, 10, 12, 15, 20, 23, 25])
def test_parts_survive_copies_conversions_and_checkpoints(index: int) -> None:
    make, batch, at, method, *_ = USERS[index]
    model = make()
    parts = cut(model, at, batch(4))
    other = make()  # with other weights
    for part in parts.all:
        part.load_state_dict({name: other.state_dict()[name] for name in part.state_dict()})
    assert_whole(other, parts, batch(3))
    if method == "tape":
        return  # a tape fixes types
    x = batch(3)
    doubled = copy.deepcopy(parts)
    for part in doubled.all:
        part.to(torch.float64)
    assert_whole(copy.deepcopy(other).double(), doubled, x.double() if x.is_floating_point() else x)


@pytest.mark.parametrize("index", [2, 5, 10, 12, 15, 20, 25])
def test_functional_call_swaps_parameters_in_both_modes(index: int) -> None:
    make, batch, at, *_ = USERS[index]
    model, other = make(), make()
    parts = cut(model, at, batch(4))
    x = batch(3)
    for training in (True, False):
        parts_in_mode(parts, training)
        before = copy.deepcopy([dict(part.state_dict()) for part in parts.all])
        with torch_seeded(1, "test"):
            output = copy.deepcopy(other).train(training)(x)
        with torch_seeded(1, "test"):
            value: Any = x
            for part in parts.all:
                names = part.state_dict()
                value = functional_call(
                    part, {n: v.clone() for n, v in other.state_dict().items() if n in names}, (value,)
                )
        torch.testing.assert_close(value, getattr(output, "logits", output), rtol=1e-4, atol=1e-5)
        for part, state in zip(parts.all, before, strict=True):
            for name, saved in state.items():
                assert torch.equal(part.state_dict()[name], saved), name


@pytest.mark.parametrize(
    ("model", "at", "batch"),
    [(build("cnn", (1, 8, 8), 10), "block1", picture), (by_shape(), "a", vector)],
    ids=["fx", "hooks"],
)
def test_vmap_over_stacked_copies_is_the_loop(model: nn.Module, at: str, batch: Any) -> None:
    client = cut(model, at, batch(4)).client
    copies = [copy.deepcopy(client) for _ in range(2)]
    for i, piece in enumerate(copies):
        for p in piece.parameters():
            p.data.add_(i * 0.1)
    parameters, buffers = stack_module_state(copies)
    x = torch.stack([batch(3), batch(3)])
    stacked = vmap(lambda p, b, rows: functional_call(copies[0], (p, b), (rows,)))(parameters, buffers, x)
    for i, piece in enumerate(copies):
        for fast, slow in zip(stacked, piece(x[i]), strict=True):
            torch.testing.assert_close(fast[i], slow)


def test_traced_parts_can_be_saved_whole() -> None:
    model = build("cnn", (1, 8, 8), 10)
    parts = cut(model, "block1", picture())
    file = io.BytesIO()
    torch.save(parts.client, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = picture(2)
    assert torch.equal(loaded(x)[0], parts.client(x)[0])


def test_a_part_does_not_write_to_what_it_receives() -> None:
    model = sequential()
    parts = cut(model, "0", picture())  # followed by an in-place ReLU
    (rows,) = parts.client(picture())
    before = rows.clone()
    parts.server((rows,))
    assert torch.equal(rows, before)


# The user's objects do not change


def test_the_users_model_and_generators_are_left_alone() -> None:
    model = Residual()
    model(picture()).sum().backward()
    model.layer1.eval()  # training and evaluation mode mixed
    state = copy.deepcopy(model.state_dict())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    modes = {name: m.training for name, m in model.named_modules()}
    example = picture()
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()
    kept = example.clone()
    parts = cut(model, "layer1", example)
    with pytest.raises(CutError):
        cut(model, "fc", example)
    assert torch.equal(example, kept)
    assert {name: m.training for name, m in model.named_modules()} == modes
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, gradients[name])
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == generators[1:]
    assert all(p.grad is None for part in parts.all for p in part.parameters())
    with torch.no_grad():
        for part in parts.all:
            for p in part.parameters():
                p.zero_()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_cut_within_no_grad_is_the_same_cut() -> None:
    model = Residual()
    with torch.no_grad():
        parts = cut(model, "layer1", picture())
    assert_whole(model, parts, picture(3))


# Refusals and their reasons


def refused(model: nn.Module, at: str | Sequence[str], example: Tensor) -> str:
    with pytest.raises(CutError) as error:
        cut(model, at, example)
    return str(error.value)


def test_an_unknown_name_has_the_nearest_one() -> None:
    message = refused(build("cnn", (1, 8, 8), 10), "blok1", picture())
    assert "unknown module 'blok1': did you mean 'block1'?" in message
    assert "input" in message


def test_tied_weights_are_refused_by_name() -> None:
    message = refused(Gpt(tied=True), "blocks.0", ids())
    assert "cannot cut Gpt at 'blocks.0'" in message
    assert "'tokens.weight'" in message
    assert "'head.weight'" in message
    assert "used on both sides" in message


def test_tied_weights_are_untied_on_demand() -> None:
    model = Gpt(tied=True)
    assert "untie=True gives each side one of its own, for 0.00032 MB more" in refused(model, "blocks.0", ids())
    parts = cut(model, "blocks.0", ids(), untie=True)
    assert model.head.weight is model.tokens.weight
    apart = copy.deepcopy(model)
    apart.head.weight = nn.Parameter(model.head.weight.detach().clone())
    assert_partitioned(apart, parts)
    assert_whole(apart, parts, ids(3))


def test_a_module_on_both_sides_cannot_be_untied() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(torch.tanh(self.b(torch.tanh(self.a(x))))))

    with pytest.raises(CutError, match=r"'a.weight' is used on both sides of the cut, and a parameter can live on one"):
        cut(Twice(), "b", vector(), untie=True)


class ByLength(Gpt):
    """torch.fx cannot trace it, since a branch depends on a shape."""

    def forward(self, ids: Tensor) -> Tensor:
        if len(ids) > 100:
            return self.head(self.tokens(ids)).mean(1)
        return super().forward(ids)


@pytest.mark.parametrize(("kind", "method"), [(Gpt, "fx"), (ByLength, "hooks")])
def test_the_client_of_a_u_shape_keeps_its_tied_weight(kind: Any, method: str) -> None:
    model = kind(tied=True).eval()
    parts = cut(model, ("blocks.0", "norm"), ids())
    assert parts.method == method
    assert parts.tail is not None
    assert parts.client.get_parameter("tokens.weight") is parts.tail.get_parameter("head.weight")
    x = ids(3)
    logits, given, received = over_the_wire(parts, x)
    torch.cos(logits).sum().backward()
    for g, r in zip(reversed(given), reversed(received), strict=True):
        pairs = [(a, b.grad) for a, b in zip(g, r, strict=True) if a.requires_grad]
        torch.autograd.backward([a for a, _ in pairs], [b for _, b in pairs])
    torch.cos(model(x)).sum().backward()
    torch.testing.assert_close(parts.client.get_parameter("tokens.weight").grad, model.tokens.weight.grad)


@pytest.mark.parametrize(("algorithm", "options"), [("ussl", {"tail_cut": "norm"}), ("psl", {"untie": True})])
def test_tied_weights_in_a_run(algorithm: str, options: dict[str, Any]) -> None:
    model, x = Gpt(tied=True), ids(12)
    data = (x, x[:, 0], x[:4], x[:4, 0])
    run = Run(algorithm=algorithm, model=model, data=data, clients=2, cut="blocks.0", batch=3, rounds=2, **options)
    assert all(np.isfinite(record.loss) for record in run)
    t = run.training
    state = {**t.clients.model_state(0), **t.server.state()["model"]}
    assert set(state) == set(model.state_dict())
    assert not torch.equal(state["tokens.weight"], model.tokens.weight)
    assert torch.equal(state["tokens.weight"], state["head.weight"]) == (algorithm == "ussl")


class Generous(nn.Module):
    """Its first layer returns outputs that are not used, and one tensor twice."""

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.other = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
            h = torch.tanh(self.inner(x))
            return self.other(h).detach(), h, [h, h * 0], x.new_zeros(7)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = self.First(), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        _, h, (again, _), _ = self.first(x)
        if x.shape[1] > 100:  # torch.fx cannot trace this
            return self.head(h)
        return self.head(self.second(h) + again)


def test_only_what_is_used_crosses_and_only_once() -> None:
    model = Generous()
    parts = cut(model, "first", vector())
    assert parts.method == "hooks"
    assert [(c.shape, c.name) for c in parts.crossing] == [((8,), "first: output 1")]
    assert_whole(model, parts, vector(3))


def test_positions_run_again_on_the_servers_side() -> None:
    """All layers use the result of a layer without parameters that is called once."""

    class Rope(nn.Module):
        def forward(self, length: int) -> tuple[Tensor, Tensor]:
            angle = torch.arange(length)[:, None] * 10.0 ** -torch.arange(4)
            return angle.cos()[None], angle.sin()[None]

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, h: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
            (cos, sin), (p, q) = turns, self.inner(h).chunk(2, -1)
            return h + torch.cat([p * cos - q * sin, p * sin + q * cos], -1)

    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.rope, self.a, self.b = nn.Embedding(16, 8), Rope(), Layer(), Layer()
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            h, turns = self.embed(x), self.rope(x.shape[1])
            if x.min() < 0:
                return h.mean((1, 2))
            return self.head(self.b(self.a(h, turns), turns).mean(1))

    model = Rotary()
    parts = cut(model, "a", ids())
    assert [c.name for c in parts.crossing] == ["a"]
    assert_whole(model, parts, ids(3))


def test_a_refusal_comes_soon_and_on_one_line() -> None:
    model = tiny_bert()
    example = ids()
    begin = time.monotonic()
    message = refused(model, "classifier", example)
    assert time.monotonic() - begin < 10  # takes a second or two on an idle machine
    assert "\n" not in message
    assert len(message) < 800


def test_tied_weights_on_one_side_are_no_obstacle() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
            self.d.weight = self.c.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.d(torch.tanh(self.c(self.b(torch.tanh(self.a(x))))))

    model = Tied()
    parts = cut(model, "b", vector())
    assert sorted([*parts.client.state_dict(), *parts.server.state_dict()]) == sorted(model.state_dict())
    assert_whole(model, parts, vector(3))


def test_the_raw_input_does_not_cross() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.cat([self.a(x), x], 1))

    message = refused(Skip(), "a", vector())
    assert "raw input" in message
    assert "privacy" in message
    assert "only 'input' and 'output' work" in message


def test_a_flattened_input_is_still_the_raw_input() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 5))
    message = refused(model, "0", picture())
    assert "raw input" in message
    assert "Names that work: 1" in message


def test_token_ids_do_not_cross_in_disguise() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Embedding(10, 8), nn.Embedding(20, 8), nn.Linear(8, 5)

        def forward(self, ids: Tensor) -> Tensor:
            doubled = ids * 2
            return self.c((self.a(ids) + self.b(doubled)).mean(1))

    assert "raw input" in refused(Twice(), "a", ids())


def test_a_mask_that_no_example_shows_is_still_noticed() -> None:
    """The example has no padding, so a comparison of outputs alone would not notice the mask."""

    class ByShape(Encoder):
        def forward(self, ids: Tensor) -> Tensor:
            if ids.shape[1] > 100:  # torch.fx cannot trace this
                return self.head(self.embed(ids).mean(1))
            return super().forward(ids)

    full = torch.randint(1, 10, (4, 6))
    model = ByShape(padding=True)
    parts = cut(model, "encoder.layers.0", full)
    assert parts.method == "tape"
    assert_whole(model, parts, ids(4))


def test_nothing_after_the_cut() -> None:
    for make, at, example in ((lstm, "head", ids()), (by_shape, "c", vector())):
        message = refused(make(), at, example)
        assert f"nothing is computed after '{at}'" in message
    assert "Names that work: a, b" in refused(by_shape(), "c", vector())


def test_a_list_of_modules_is_never_executed() -> None:
    message = refused(Gpt(), "blocks", ids())
    assert "never executed" in message
    assert "blocks.1" in message


def test_a_module_that_is_never_executed() -> None:
    assert "never executed" in refused(Norms(), "unused", vector())


def test_data_dependent_control_flow_that_no_part_can_follow() -> None:
    message = refused(by_data(), "b", vector())
    assert "torch.fx cannot follow it" in message
    assert "Names that work: a" in message


def test_a_module_used_several_times_is_cut_after_the_last() -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.act, self.b, self.c = nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.act(self.b(self.act(self.a(x)))))

    model = Again()
    parts = cut(model, "act", vector())
    assert set(parts.server.state_dict()) == {"c.weight", "c.bias"}
    assert_whole(model, cut(model, "a", vector()), vector(3))  # both parts use it


def test_frozen_randomness_is_noticed() -> None:
    class LayerDrop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            if self.training and float(torch.rand(())) < 0.5:
                y = self.b(y)
            return self.c(y)

    message = refused(LayerDrop(), "a", vector())
    assert "draws random numbers that a trace would freeze" in message
    assert "which layers run depends on the batch, or on chance" in message


@pytest.mark.parametrize(
    ("at", "words"),
    [
        ((), "one name"),
        (("block1", "block2", "hidden"), "two"),
        (("block2", "block1"), "does not come after"),
        (("block1", "block1"), "must come after"),
        (("output", "block1"), "must come after"),
        (("block1", "input"), "must come after"),
    ],
)
def test_impossible_pairs_of_cuts(at: tuple[str, ...], words: str) -> None:
    assert words in refused(build("cnn", (1, 8, 8), 10), at, picture())


@pytest.mark.parametrize("example", [torch.randn(1, 1, 8, 8), torch.tensor(1.0)])
def test_an_example_is_a_batch_of_two_at_least(example: Tensor) -> None:
    assert "at least two samples" in refused(build("cnn", (1, 8, 8), 10), "block1", example)


def test_an_example_of_the_wrong_shape() -> None:
    message = refused(build("cnn", (1, 8, 8), 10), "block1", torch.randn(4, 3, 8, 8))
    assert "RuntimeError" in message


class Several(nn.Module):
    """Returns other things besides logits."""

    def __init__(self, give: Any) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 5), nn.Linear(8, 2)
        self.give = give

    def forward(self, x: Tensor) -> Any:
        y = torch.tanh(self.a(x))
        return self.give(self.b(y), self.c(y))


def as_pair(a: Tensor, b: Tensor) -> Any:
    return a, b


def by_name(a: Tensor, b: Tensor) -> Any:
    return {"scores": a, "more": [b, None]}


def test_a_model_that_returns_neither_rows_nor_tensors() -> None:
    def mean(a: Tensor, b: Tensor) -> Any:
        return a, b.mean()

    def words(a: Tensor, b: Tensor) -> Any:
        return "nothing"

    def thing(a: Tensor, b: Tensor) -> Any:
        return a, object()

    for at in ("a", "input"):
        assert "logits with a row for every sample" in refused(Several(mean), at, vector())
        assert "does not return logits" in refused(Several(words), at, vector())
        assert "holds a object" in refused(Several(thing), at, vector())


@pytest.mark.parametrize("give", [as_pair, by_name])
@pytest.mark.parametrize("at", ["input", "a", "output"])
def test_the_last_part_gives_what_the_model_gives(give: Any, at: str) -> None:
    model = Several(give)
    parts = cut(model, at, vector())
    x = vector(3)
    given, expected = together(parts, x), model(x)
    leaves, spec = pytree.tree_flatten(given)
    others, other = pytree.tree_flatten(expected)
    assert spec == other
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a is b for a, b in zip(leaves, others, strict=True))


def test_cut_points_are_those_that_work() -> None:
    model = Residual()
    names = cut_points(model, picture())
    assert {"stem", "layer1", "pool", "layer1.0", "layer1.0.conv1"} <= set(names)
    assert "fc" not in names
    order = [name for name, _ in model.named_modules()]
    assert names == sorted(names, key=order.index)
    assert cut_points(build("cnn", (1, 8, 8), 10), picture())[0] == "block1"


@pytest.mark.parametrize("name", ["last", "copies", "narrow", "channels_last", "run", "client"])
def test_children_may_be_called_anything(name: str) -> None:
    net = nn.Sequential(OrderedDict([("first", nn.Linear(4, 4)), (name, nn.Linear(4, 4)), ("head", nn.Linear(4, 2))]))
    x = torch.randn(3, 4)
    for at in ("first", name):
        parts = cut(net, at, x)
        assert torch.equal(parts.server(parts.client(x)), net(x))


def test_sparse_gradients_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises(CutError, match="Embedding '0' has sparse gradients"):
        cut(model, "0", torch.zeros(3, 3, dtype=torch.long))
