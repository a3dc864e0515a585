"""The wire: tensors and codecs, frames, the handshake, and which message is allowed when."""

from __future__ import annotations

import copy
import math
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import conv, make, mlp
from torch import Tensor, nn

from cutlayer import plugins
from cutlayer.errors import ConfigError, WireError
from cutlayer.models import Crossing, cut
from cutlayer.remote.network import HELLO_BYTES
from cutlayer.wire import (
    RAW,
    ClientSide,
    Codec,
    Limits,
    ServerSide,
    agree,
    decode,
    decode_named,
    described,
    encode,
    encode_named,
    encoded_bytes,
    encoded_bytes_named,
    error_bound,
    fingerprint,
    pack,
    specs,
    unpack,
)
from cutlayer.wire import messages as m
from cutlayer.wire.names import named
from cutlayer.wire.tensors import TYPES

LOSSY = ["bfloat16", "float16", "int8", "float8", "top-k:0.1", "top-k:0.7", "top-k:1.0", "rand-top-k:0.4:0.3"]
ALL = ["raw", *LOSSY]
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
CODECS = [Codec.parse(name + zstd) for name in ALL for zstd in ("", "+zstd")]

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
codecs = st.sampled_from(CODECS)


def bytes_of(tensor: Tensor) -> bytes:
    """The tensor's bytes, in the order of its indices."""
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Random bit patterns of this type, including NaN with payloads."""
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(shape) * dtype.itemsize
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8, generator=generator)
    return bits.view(dtype).view(shape) if size else torch.empty(shape, dtype=dtype)


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    """Random finite numbers of about the size of `scale`; a third of them are zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, dtype=torch.float64, generator=generator) * scale
    x = x * (torch.rand(shape, generator=generator) > 1 / 3)
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype)


def through(tensor: Tensor, codec: Codec = RAW) -> Tensor:
    """The tensor that a receiver gets for `tensor` [n, ...]."""
    body = b"".join(encode([tensor], codec))
    (received,) = decode(body, [Crossing(tuple(tensor.shape[1:]), tensor.dtype)], len(tensor), codec)
    return received


# Tensors


@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
@given(shape=shapes, seed=st.integers(0, 99), zstd=st.booleans())
@settings(max_examples=15)
def test_raw_is_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...], seed: int, zstd: bool) -> None:
    x = random_bits(shape, dtype, seed)
    like, codec = {"x": Crossing(shape, dtype)}, Codec.parse("raw+zstd" if zstd else "raw")
    for buffer in (bytes, bytearray):
        received = decode_named(buffer(b"".join(encode_named({"x": x}, codec))), like, codec)["x"]
        assert received.dtype == dtype
        assert received.shape == x.shape
        assert bytes_of(received) == bytes_of(x)


def test_raw_of_views_and_layouts() -> None:
    images = torch.randn(3, 4, 5, 6)
    assert torch.equal(through(images.to(memory_format=torch.channels_last)), images)
    assert torch.equal(through(images.transpose(0, 3)), images.transpose(0, 3))
    assert torch.equal(through(images[:, 1:3, ::2]), images[:, 1:3, ::2])
    assert torch.equal(through(torch.zeros(1, 3).expand(4, 3)), torch.zeros(4, 3))
    assert torch.equal(through(torch.tensor(3.0).expand(1)), torch.tensor([3.0]))
    assert torch.equal(through(images.requires_grad_()), images)
    complex_numbers = torch.randn(3, 2, dtype=torch.complex64)
    assert torch.equal(through(complex_numbers.conj()), complex_numbers.conj())
    assert torch.equal(through(complex_numbers.conj().imag), complex_numbers.conj().imag)


def test_raw_is_not_copied_where_that_is_possible() -> None:
    x = torch.arange(12.0).view(3, 4)
    body = bytearray(b"".join(encode([x])))
    (received,) = decode(body, [Crossing((4,), x.dtype)], 3)
    received[0, 0] = 77.0
    assert decode(body, [Crossing((4,), x.dtype)], 3)[0][0, 0] == 77
    frozen = bytes(body)
    (own,) = decode(frozen, [Crossing((4,), x.dtype)], 3)
    own[0, 0] = 5.0  # its own memory, since the message's must not change
    assert decode(frozen, [Crossing((4,), x.dtype)], 3)[0][0, 0] == 77
    shifted = memoryview(bytearray(b"x" + frozen))[1:]  # not aligned, so it is copied
    assert decode(shifted, [Crossing((4,), x.dtype)], 3)[0].data_ptr() % 4 == 0


@given(
    shape=shapes,
    dtype=st.sampled_from([*FLOATS, torch.int64, torch.bool]),
    codec=codecs,
    rows=st.integers(0, 6),
    seed=st.integers(0, 99),
)
def test_shapes_types_and_exact_sizes(
    shape: tuple[int, ...], dtype: torch.dtype, codec: Codec, rows: int, seed: int
) -> None:
    x = numbers((rows, *shape), torch.float32, seed).to(dtype)
    like = [Crossing(shape, dtype), Crossing((), torch.int64)]
    body = b"".join(encode([x, torch.arange(rows)], [codec, RAW]))
    received, labels = decode(body, like, rows, [codec, RAW])
    assert received.dtype == dtype
    assert received.shape == x.shape
    assert labels.tolist() == list(range(rows))
    if not dtype.is_floating_point:
        assert torch.equal(received, x)
    assert encoded_bytes(like, rows, [codec, RAW]) == (None if codec.zstd else len(body))


@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple),
    dtype=st.sampled_from(FLOATS),
    codec=st.sampled_from([Codec.parse(name) for name in LOSSY]),
    exponent=st.integers(-44, 38),
    spread=st.booleans(),
    seed=st.integers(0, 1 << 20),
)
@settings(max_examples=400)
def test_errors_stay_within_the_bound(
    shape: tuple[int, ...], dtype: torch.dtype, codec: Codec, exponent: int, spread: bool, seed: int
) -> None:
    """For all magnitudes: small, large, and both in one tensor."""
    x = numbers(shape, dtype, seed, 10.0**exponent)
    if spread:  # numbers of very different magnitudes in one tensor
        largest = torch.finfo(dtype).max
        factors = 10.0 ** torch.randint(-30, 31, shape, generator=torch.Generator().manual_seed(seed))
        x = (x.double() * factors).clamp(-largest, largest).to(dtype)
    received = through(x, codec)
    assert torch.isfinite(received).all()
    assert bool(((received.double() - x.double()).abs() <= error_bound(codec, x)).all())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", LOSSY)
def test_the_largest_numbers_stay_finite(name: str, dtype: torch.dtype) -> None:
    codec, largest = Codec.parse(name), torch.finfo(dtype).max
    for x in (torch.full((2, 3), largest, dtype=dtype), -torch.full((2, 3, 2), largest, dtype=dtype)):
        received = through(x, codec)
        assert torch.isfinite(received).all()
        assert bool(((received.double() - x.double()).abs() <= error_bound(codec, x)).all())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (4, 9), (5,)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_and_inf_are_found_by_the_receiver(
    name: str, bad: float, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = numbers(shape, dtype, 3)
    x.view(-1)[4] = bad
    received = through(x, Codec.parse(name))
    assert not torch.isfinite(received.view(-1)[4])
    if len(shape) == 4:  # NaN and infinity spread no further than the codec's row or channel
        assert torch.isfinite(received[:, [0, 2]]).all() or name == "float8"
        assert torch.isfinite(received[1:]).all() or name == "int8"


def test_every_code_of_float8() -> None:
    """Codes are decoded by arithmetic on their bits; the results equal torch's."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]  # all but NaN
    x = codes.view(torch.float8_e4m3fn).float()
    x = torch.cat([x, torch.tensor([448.001])])[None]  # so that the scale is exactly one
    assert torch.equal(through(x, Codec.parse("float8"))[0, :-1], x[0, :-1])


def test_what_the_codecs_are_relative_to() -> None:
    """int8 scales a channel of images or a row of features, float8 a row. Large numbers elsewhere cost no accuracy."""
    images = torch.ones(2, 3, 2, 2)
    images[:, 1] = 1e6
    assert (through(images, Codec.parse("int8")) - images).abs()[:, [0, 2]].max() < 0.01
    rows = torch.ones(3, 8)
    rows[1] = 1e6
    for name in ("int8", "float8"):
        assert (through(rows, Codec.parse(name)) - rows).abs()[[0, 2]].max() < 0.07


def test_top_k_keeps_the_largest_of_each_row() -> None:
    x = torch.tensor([[1.0, -5.0, 0.5, 4.0], [0.0, 0.0, 0.1, 0.0]])
    assert torch.equal(through(x, Codec.parse("top-k:0.5"))[0], torch.tensor([0.0, -5.0, 0.0, 4.0]))
    assert torch.equal(through(x, Codec.parse("top-k:0.01")), torch.tensor([[0.0, -5.0, 0.0, 0.0], [0, 0, 0.1, 0]]))
    wide = numbers((2, (1 << 16) + 5), torch.float32, 0)
    assert torch.equal(through(wide, Codec.parse("top-k:1.0")), wide)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rand_top_k_without_a_chance_is_top_k(dtype: torch.dtype) -> None:
    x = numbers((5, 7, 3), dtype, 1)
    drawn, largest = (Codec.parse(text).write(x) for text in ("rand-top-k:0.3:0", "top-k:0.3"))
    assert [bytes_of(piece) for piece in drawn] == [bytes_of(piece) for piece in largest]
    assert torch.equal(through(x, Codec.parse("rand-top-k:0.3:0")), through(x, Codec.parse("top-k:0.3")))


@pytest.mark.parametrize("dtype", FLOATS)
def test_rand_top_k_draws_as_many_others_as_its_chance_says(dtype: torch.dtype) -> None:
    """4 of 20 numbers are kept in each of 4000 rows. The number of others has mean 4 x 0.3 and variance 4 x 0.21."""
    x = numbers((4000, 20), dtype, 2).abs() + torch.arange(1, 21).to(dtype) * 20
    kept = through(x, Codec.parse("rand-top-k:0.2:0.3")) != 0
    assert (kept.sum(1) == 4).all()
    others = kept[:, :16].sum(1).double()
    assert others.mean().item() == pytest.approx(1.2, abs=0.06)
    assert others.var().item() == pytest.approx(0.84, abs=0.1)
    each = kept.double().mean(0)  # all numbers of a group are equally likely
    assert each[:16].tolist() == pytest.approx([1.2 / 16] * 16, abs=0.025)
    assert each[16:].tolist() == pytest.approx([0.7] * 4, abs=0.04)


def test_rand_top_k_keeps_its_edges() -> None:
    """With chance 1, it keeps other numbers while there are any. It never drops NaN, and draws for each row alone."""
    x = torch.arange(1.0, 6.0).repeat(3, 1)
    assert (through(x, Codec.parse("rand-top-k:0.4:1"))[:, 3:] == 0).all()
    assert (through(x, Codec.parse("rand-top-k:0.8:1"))[:, 0] == 1).all()
    assert torch.equal(through(x, Codec.parse("rand-top-k:1:1")), x)
    x[1, 0] = math.nan
    assert through(x, Codec.parse("rand-top-k:0.2:1")).isnan().any(1).tolist() == [False, True, False]
    x = numbers((50, 30), torch.float32, 3)
    codec = Codec.parse("rand-top-k:0.2:0.5")
    assert torch.equal(through(x, codec), torch.cat([through(part, codec) for part in x.split(7)]))
    assert not torch.equal(through(x, codec), through(x.nextafter(2 * x), codec))
    assert str(Codec.parse("rand-top-k:0.2:0.5:support+zstd").evaluating) == "rand-top-k:0.2:0.0:support"


@pytest.mark.parametrize(
    "text", [*ALL, "int8+zstd", "top-k:0.25+zstd", "top-k:0.1:support+zstd", "rand-top-k:0.1:0.0:support"]
)
def test_codecs_have_names(text: str) -> None:
    assert str(Codec.parse(text)) == text
    assert Codec.parse(text) == Codec.parse(str(Codec.parse(text)))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("int9", "did you mean 'int8'"),
        ("int8:3", "takes no '3'"),
        ("int8:some", "takes no 'some'"),
        ("int8+gzip", "only zstd can follow"),
        ("raw+", "only zstd can follow"),
        ("top-k", "needs the fraction"),
        ("top-k:", "not a fraction"),
        ("top-k:0", "not a fraction"),
        ("top-k:nan", "not a fraction"),
        ("top-k:1.5+zstd", "not a fraction"),
        ("top-k:0.1:0.2", "not a fraction"),
        ("rand-top-k:0.1", "needs the fraction that is kept and the chance"),
        ("rand-top-k:0:0.1", "not a fraction"),
        ("rand-top-k:0.1:1.1", "not a chance"),
        ("rand-top-k:0.1:support", "needs the fraction"),
        ("", "unknown codec"),
    ],
)
def test_wrong_codecs(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Codec.parse(text)


OWN = f"{Path(__file__).parents[1] / 'own.py'}:Grid"


@pytest.mark.parametrize(
    ("text", "called"),
    [
        (OWN, "grid:0.001"),
        (f"{OWN}:0.25+zstd", "grid:0.25+zstd"),
        ("own:Grid", "grid:0.001"),
        ("top-l:Grid", "unknown"),
        ("test_wire_package.own:Grid:0.5", "grid:0.5"),
        ("installed:0.5", "grid:0.5"),
    ],
)
def test_codecs_of_ones_own_are_named_by_file_module_or_entry_point(
    text: str, called: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "test_wire_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "own.py").write_text((Path(__file__).parents[1] / "own.py").read_text())
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own", raising=False)  # other tests have files with this name
    point = EntryPoint("installed", "test_wire_package.own:Grid", "cutlayer.codecs")
    monkeypatch.setattr(plugins, "_entry_points", lambda kind: {"installed": point} if kind == "codec" else {})
    if called == "unknown":
        with pytest.raises(ConfigError, match=r"unknown codec 'top-l'.*or your own: path/to/file.py:name"):
            Codec.parse(text)
        return
    found = Codec.parse(text)
    assert str(found) == called
    assert found.plain == Codec.parse(text.removesuffix("+zstd"))
    assert found.zstd == text.endswith("+zstd")


@pytest.mark.parametrize("zstd", ["", "+zstd"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_codec_of_ones_own(dtype: torch.dtype, zstd: str) -> None:
    found, x = Codec.parse(f"{OWN}:0.01{zstd}"), numbers((4, 3, 2), dtype, 1).clamp(-50, 50)
    body = b"".join(encode([x], found))
    like = [Crossing((3, 2), dtype)]
    (received,) = decode(body, like, 4, found)
    assert bool(((received.double() - x.double()).abs() <= error_bound(found, x)).all())
    assert encoded_bytes(like, 4, found) == (None if zstd else len(body))
    with pytest.raises(WireError, match=r"came as codec 127.* where raw was agreed"):
        decode(body, like, 4)


def test_both_sides_compare_the_file_of_a_codec(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "own.py").read_text()
    for name, content in (("a", text), ("b", text), ("c", text + "# changed\n")):
        (tmp_path / f"{name}.py").write_text(content)
    a, b, c = (Codec.parse(f"{tmp_path / name}.py:Grid:0.1").agreed for name in "abc")
    assert a == b != c
    assert a.startswith("grid:0.1 (file ")
    assert Codec.parse("top-k:0.1+zstd").agreed == "top-k:0.1+zstd"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"{OWN}:far", "codec '.*own.py:Grid:far': 'far' is not a step"),
        (OWN.replace("Grid", "Careless") + ":3", "careless takes no '3'"),
        (OWN.replace("Grid", "Shrink"), "is a defence, not a codec"),
        (OWN.replace("Grid", "math"), "is not registered"),
        (OWN.replace("own.py", "owns.py"), "there is no file"),
    ],
)
def test_wrong_codecs_of_ones_own(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Codec.parse(text)


def test_a_codec_that_writes_another_size_than_it_says() -> None:
    with pytest.raises(ConfigError, match=r"careless wrote 12 bytes .* `size` says 11"):
        encode([torch.ones(2, 3)], Codec.parse(OWN.replace("Grid", "Careless")))


def test_codes_of_codecs_stay() -> None:
    names = ["raw", "bfloat16", "float16", "int8", "float8", "top-k", "rand-top-k"]
    codes = {entry.name: entry.facts["code"] for entry in plugins.index("codec").values()}
    assert codes == {name: code for code, name in enumerate(names)}


def test_named_tensors() -> None:
    state = {**make(conv).state_dict(), "größe": torch.tensor(3), "": torch.zeros(0, 2)}
    body = b"".join(encode_named(state))
    assert encoded_bytes_named(described(state)) == len(body)
    received = decode_named(body, described(state))
    assert list(received) == list(state)
    assert all(torch.equal(received[k], state[k]) for k in state)
    swapped = dict(reversed(list(described(state).items())))
    with pytest.raises(WireError, match="was expected"):
        decode_named(body, swapped)


GOOD = [torch.zeros(2, 3), torch.arange(2)]
LIKE = [Crossing((3,), torch.float32), Crossing((), torch.int64)]


@pytest.mark.parametrize(
    ("like", "rows", "codec", "limits", "says"),
    [
        (LIKE[:1], 2, RAW, {}, "2 tensors came where 1 were expected"),
        ([*LIKE, LIKE[0]], 2, RAW, {}, "2 tensors came where 3"),
        (LIKE, 3, RAW, {}, r"must be float32 \[3, 3\], float32 \[2, 3\] came"),
        ([Crossing((3,), torch.float64), LIKE[1]], 2, RAW, {}, r"must be float64 \[2, 3\], float32"),
        ([Crossing((3, 1), torch.float32), LIKE[1]], 2, RAW, {}, r"must be float32 \[2, 3, 1\]"),
        (LIKE, 2, Codec.parse("int8"), {}, "came as raw where int8 was agreed"),
        (LIKE, 2, Codec.parse("raw+zstd"), {}, r"came as raw where raw\+zstd was agreed"),
        (LIKE, 2, RAW, {"rows": 1}, "2 rows"),
        (LIKE, -1, RAW, {}, "-1 rows"),
        (LIKE, 2, RAW, {"rank": 1}, "2 dimensions"),
        (LIKE, 2, RAW, {"tensors": 1}, "2 tensors are expected"),
        (LIKE, 2, RAW, {"message_bytes": 39}, "tensors of 40 bytes"),
        (LIKE, 2, RAW, {"message_bytes": 100}, "in 112: 100 are accepted"),
    ],
)
def test_what_was_expected_and_what_came(
    like: list[Crossing], rows: int, codec: Codec, limits: dict[str, int], says: str
) -> None:
    with pytest.raises(WireError, match=says):
        decode(b"".join(encode(GOOD)), like, rows, codec, Limits(**limits))


def test_names_are_limited() -> None:
    state = {"a" * 30: torch.zeros(1)}
    with pytest.raises(WireError, match="30 bytes: 29 are accepted"):
        decode_named(b"".join(encode_named(state)), described(state), limits=Limits(name_bytes=29))
    with pytest.raises(WireError, match="65535 are possible"):
        encode_named({"a" * 70000: torch.zeros(1)})


def test_what_cannot_be_sent() -> None:
    with pytest.raises(WireError, match="make it dense"):
        encode([torch.eye(3).to_sparse()])


def test_truth_values_are_zero_or_one() -> None:
    body = bytearray(b"".join(encode([torch.tensor([True, False])])))
    body[body.index(b"\1\0", 32)] = 2
    with pytest.raises(WireError, match="other than 0 and 1"):
        decode(body, [Crossing((), torch.bool)], 2)


# Messages and frames

TERMS = m.Terms(
    run="digits",
    algorithm="sglr",
    part="f" * 64,
    crossing=specs([Crossing((8,), torch.float32)]),
    returning=[],
    step=m.StepTerms(batch=4, options={"alpha": "1.0"}),
)
TO_SERVER = [
    m.Hello("ada", TERMS, 100, 100, 3, "secret", tests=9, metrics=["loss", "accuracy"]),
    m.SmashedUp(1, 4),
    m.TailUp(1, 4, math.inf, 4),
    m.Settled(1),
    m.Fitted(1, [(0.5, 4, 4), (0.25, 3, 2.5)]),
    m.ModelUp(1),
    m.OptimizerUp(1),
    m.GradientUp(1),
    m.EvaluationRows(1, 9),
    m.ScoresUp(1, 9, {"loss": 0.5, "recall": [0.25, None], "auroc": None}),
    m.Saved(1, "prepare"),
    m.Failed(1, "NonFiniteError", "the loss is NaN"),
]
TO_CLIENT = [
    m.Welcome(0, 3, 0, TERMS, {"lr": 0.1, "seed": 3, "x": None, "l": [1, "a"], "d": {"momentum": 0.9, "nag": True}}),
    m.Refused("model", "no"),
    m.BeginRound(0, 9, 0.5, 12),
    m.Forward(1),
    m.Tail(1, 4),
    m.Backward(1, "common", 1),
    m.Settle(1),
    m.Fit(1),
    m.Learn(1, 3),
    m.GiveModel(1),
    m.TakeModel(1),
    m.TakeServer(1, 9),
    m.GiveOptimizer(1),
    m.TakeOptimizer(1),
    m.GiveGradient(1),
    m.TakeGradient(1, 0.5, True),
    m.Evaluate(1, "whole", 9),
    m.OwnForward(1, 9, 0),
    m.OwnFinish(1, 9, 0),
    m.GiveScores(1),
    m.Save(1, "commit"),
    m.TakeHead(3),
    m.Bye("done"),
]


def other_way(direction: m.Direction) -> m.Direction:
    return "to client" if direction == "to server" else "to server"


@pytest.mark.parametrize(
    ("message", "direction"),
    [*((x, "to server") for x in TO_SERVER), *((x, "to client") for x in TO_CLIENT)],
    ids=lambda x: type(x).__name__,
)
def test_every_message(message: m.Message, direction: m.Direction) -> None:
    body = encode([torch.arange(5.0)])
    data = pack(message, body, 7, 1 << 63)
    frame = unpack(data, direction)
    assert frame.message == message
    assert type(frame.message) is type(message)
    assert (frame.number, frame.conversation) == (7, 1 << 63)
    assert bytes(frame.body) == b"".join(body)
    assert (len(data) - len(frame.body)) % 16 == 0  # so that tensors are aligned
    with pytest.raises(WireError, match="cannot be understood"):
        unpack(data, other_way(direction))


def test_all_messages_are_tested() -> None:
    assert {type(x) for x in TO_SERVER} == set(m.FromClient.__args__)
    assert {type(x) for x in TO_CLIENT} == set(m.FromServer.__args__)


def test_the_token_is_not_shown() -> None:
    assert "secret" not in repr(TO_SERVER[0])


@pytest.mark.parametrize(
    "message",
    [
        m.Failed(1, "k" * 257, ""),
        m.Failed(1, "k", "s" * 4097),
        m.Failed(1, "k", "\ud800"),
        m.ModelUp(-1),
        m.ModelUp(1 << 60),
        m.ModelUp(1 << 70),
        m.Saved(1, "perhaps"),  # type: ignore[arg-type]
        m.BeginRound(0, 1, math.nan, 1),
        m.Fitted(1, [(0.5, 4, 4)] * ((1 << 16) + 1)),
        m.ScoresUp(1, 1, {"recall": [0.5] * ((1 << 16) + 1)}),
        m.ScoresUp(1, 1, {str(i): 0.5 for i in range(257)}),
        m.ScoresUp(1, 1, {"confusion": [[1.0]]}),  # type: ignore[list-item]
        m.Hello("ada", TERMS, 1, 1, metrics=["loss"] * 257),
        m.Welcome(0, 1, 0, TERMS, {str(i): i for i in range(257)}),
        m.Welcome(0, 1, 0, TERMS, {"a": [[1]]}),  # type: ignore[dict-item]
    ],
    ids=repr,
)
def test_bounds_are_kept_by_the_sender_too(message: m.Message) -> None:
    with pytest.raises(WireError):
        pack(message)


def test_an_error_of_any_length_can_be_told() -> None:
    told = m.failed(3, type("E" * 999, (Exception,), {})("x" * 9999))
    assert unpack(pack(told), "to server").message == told


def test_other_protocols_and_other_programs() -> None:
    data = pack(m.ModelUp(1))
    with pytest.raises(WireError, match="protocol 1, this side speaks 6"):
        unpack(b"CUT1" + data[4:], "to server")
    with pytest.raises(WireError, match="another program"):
        unpack(b"HTTP/1.1 400 Bad Request" * 4, "to server")
    with pytest.raises(WireError, match=r"bytes: \d+ are accepted"):
        unpack(data, "to server", Limits(message_bytes=len(data) - 1))
    with pytest.raises(WireError, match="header of"):
        unpack(data, "to server", Limits(header_bytes=3))


# The handshake


def changed(**fields: Any) -> m.Terms:
    """TERMS with some fields changed."""
    terms = copy.deepcopy(TERMS)
    for name, value in fields.items():
        setattr(terms.step if hasattr(terms.step, name) else terms, name, value)
    return terms


@pytest.mark.parametrize(
    ("field", "value", "reason", "says"),
    [
        ("protocol", 1, "protocol", "the protocol is 1 for the client and 6 for the server: install"),
        ("run", "mnist", "run", "the run is mnist for the client and digits for"),
        ("algorithm", "psl", "algorithm", "the algorithm is psl for the client and sglr for the server"),
        ("part", "0" * 64, "model", "fingerprint of the client's model is 0000"),
        ("crossing", specs([Crossing((9,), torch.float32)]), "crossing", r"is float32 \[9\] for the client"),
        ("crossing", specs([Crossing((8,), torch.float64)]), "crossing", r"is float64 \[8\] for the client"),
        ("returning", specs([Crossing((8,), torch.float32)]), "crossing", r"\[8\] for the client and nothing for the"),
        ("batch", 5, "step", "batch is 5 for the client and 4 for the server"),
        ("options", {"alpha": "2.0"}, "step", "alpha is 2.0 for the client and 1.0 for"),
        ("options", {"alpha": "1.0", "beta": "3"}, "step", "beta is 3 for the client and not known for"),
        ("classes", named(["b", "c"]), "data", r"classes is 'b', 'c' for the client and not known .* class_names"),
        (
            "features",
            named(["x"]),
            "data",
            r"list of the features is 'x' for the client and not known for the .* ignore_columns",
        ),
        ("up", "int8", "codec", "codec of what goes up is int8 for the client and raw for"),
        ("down", "top-k:0.1", "codec", "codec of what comes down is top-k:0.1 for"),
    ],
)
def test_what_differs_is_named(field: str, value: Any, reason: str, says: str) -> None:
    assert agree(TERMS, copy.deepcopy(TERMS)) is None
    theirs = changed(**{field: value})
    refused = agree(theirs, TERMS)
    assert refused is not None
    assert refused.reason == reason
    with pytest.raises(RuntimeError, match=says):
        raise RuntimeError(refused.sentence)
    mirrored = agree(TERMS, theirs, "the server", "the client")  # from the client's point of view
    assert mirrored is not None
    assert mirrored.reason == reason
    assert unpack(pack(refused), "to client").message == refused


def test_every_term_is_compared() -> None:
    tested = {"protocol", "run", "algorithm", "part", "crossing", "returning", "classes", "features"}
    assert set(m.Terms.__struct_fields__) == tested | {"step"}
    step = {"batch", "up", "down", "options"}
    assert set(m.StepTerms.__struct_fields__) == step


LONG = [f"column {k}" for k in range(3000)]


@pytest.mark.parametrize(
    ("theirs", "ours", "says"),
    [
        (["b", "a"], ["a", "b"], "classes is 'b', 'a' for the client and 'a', 'b' for the server: set class_names"),
        (["a, b", "c"], ["a", "b, c"], "classes is 'a, b', 'c' for the client and 'a', 'b, c' for the server"),
        (
            [*"abcdefgh", "j", "i", *"klmno"],
            list("abcdefghijklmno"),
            r"\.\.\., 'f', 'g', 'h', 'j', 'i', 'k', 'l', \.\.\. \(15 in all, the first 8 alike\) for the client and "
            r"\.\.\., 'f', 'g', 'h', 'i', 'j', 'k', 'l', \.\.\. \(15 in all",
        ),
        (LONG[:-1], LONG, r"\(2999 in all, the first \d+ alike\) for the client and .*\(3000 in all"),
        ([*LONG[:-1], "else"], LONG, r"SHA-256 of all: [0-9a-f]{64}\) for .*SHA-256 of all: [0-9a-f]{64}\)"),
        (["a" * 5000 + "1"], ["a" * 5000 + "2"], r"'a{60}\.\.\.' \(SHA-256"),
        (["\udc80", "b"], ["?", "b"], "SHA-256"),
        (["\x1b[2J", "b"], ["a", "b"], r"is '\\x1b\[2J', 'b' for the client"),
    ],
)
def test_lists_of_names_are_shown_where_they_differ(theirs: list[str], ours: list[str], says: str) -> None:
    refused = agree(changed(classes=named(theirs)), changed(classes=named(ours)))
    assert refused is not None
    assert refused.reason == "data"
    assert re.search(says, refused.sentence), refused.sentence
    assert unpack(pack(refused), "to client").message == refused
    assert agree(changed(classes=named(theirs)), changed(classes=named(theirs))) is None


def test_names_find_room_in_a_hello() -> None:
    wide = named(["\U0001f600" * 300 for _ in range(400)])
    hello = m.Hello("client-0", changed(classes=wide, features=named(LONG)), 1, 1)
    assert len(pack(hello)) < HELLO_BYTES / 2
    assert unpack(pack(hello), "to server").message == hello


def lower(model: nn.Module, at: str, x: Tensor) -> nn.Module:
    return cut(model, at, x).client


def test_fingerprints() -> None:
    """Equal for equal models, whatever their weights; different for models that cannot replace each other."""
    x = torch.randn(3, 6)
    print_of: Callable[[str], str] = lambda at: fingerprint(lower(mlp(), at, x))  # noqa: E731
    assert print_of("0") == print_of("0")
    assert len({print_of(at) for at in "0123"}) == 4

    def net(width: int = 8, p: float = 0.5, act: type[nn.Module] = nn.ReLU, norm: bool = True) -> nn.Module:
        middle = nn.BatchNorm1d(width, track_running_stats=norm)
        return nn.Sequential(nn.Linear(6, width), middle, act(), nn.Dropout(p), nn.Linear(width, 4))

    variants = [net(), net(9), net(p=0.4), net(act=nn.Tanh), net(norm=False), net().double()]
    prints = [fingerprint(lower(v, "3", x.to(next(v.parameters()).dtype))) for v in variants]
    assert len(set(prints)) == len(variants)
    assert fingerprint(net(), net()) != fingerprint(net())
    assert fingerprint(net()) == fingerprint(copy.deepcopy(net()).eval())


# The conversation


class Pair:
    """Both sides of a conversation after the handshake. `up` and `down` return the bytes of a message."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.server, self.client = ServerSide(limits), ClientSide(limits)
        self.up(m.Hello("ada", TERMS, 100, 100))
        self.down(m.Welcome(0, 3, 0, TERMS))

    def up(self, message: m.Message) -> bytes:
        data = self.client.send(message)
        assert self.server.receive(data).message == message
        return data

    def down(self, message: m.Message) -> bytes:
        data = self.server.send(message)
        assert self.client.receive(data).message == message
        return data


def test_a_whole_conversation() -> None:
    pair = Pair()
    pair.down(m.BeginRound(0, 2, 1.0, 2))
    pair.down(m.Forward(0))
    pair.up(m.SmashedUp(0, 4))
    pair.down(m.Backward(0, "own", 4))
    pair.down(m.Forward(1, labels=False))  # at once, since a backward pass has no answer
    assert len(pair.client.asked) == 1
    pair.up(m.SmashedUp(1, 3))
    pair.down(m.Tail(1, 3))
    pair.up(m.TailUp(1, 3, 0.5, 3))
    pair.down(m.Backward(1, "common", 1))
    pair.down(m.Settle(1))
    pair.up(m.Settled(1))
    pair.down(m.Fit(1))
    pair.up(m.Fitted(1, [(0.1, 3, 3)]))
    pair.down(m.GiveModel(2))
    pair.up(m.ModelUp(2))
    pair.down(m.TakeModel(2))
    pair.down(m.GiveOptimizer(2))
    pair.up(m.OptimizerUp(2))
    pair.down(m.TakeOptimizer(2))
    pair.down(m.Evaluate(2, "lower", 5))
    pair.up(m.EvaluationRows(2, 5))
    pair.down(m.Save(2, "prepare"))
    pair.up(m.Saved(2, "prepare"))
    pair.down(m.Save(2, "commit"))
    pair.up(m.Saved(2, "commit"))
    pair.down(m.Bye("done"))
    assert pair.server.state == pair.client.state == "closed"


def test_frames_that_are_repeated_lost_overtaken_or_foreign() -> None:
    pair = Pair()
    first = pair.down(m.Forward(0))
    for data in (first, pair.server.send(m.Forward(1)) and pair.server.send(m.Forward(2))):
        with pytest.raises(WireError, match="repeated, lost or overtaken"):
            copy.deepcopy(pair.client).receive(data)
    other = Pair()
    other.down(m.Forward(0))
    with pytest.raises(WireError, match="belongs to another conversation"):
        pair.server.receive(other.client.send(m.SmashedUp(0, 4)))
    with pytest.raises(WireError, match="after the end"):  # nothing more is accepted
        pair.server.receive(pair.client.send(m.SmashedUp(0, 4)))


def test_only_an_open_connection_needs_checksums() -> None:
    plain, sealed = (pack_hello(encrypted) for encrypted in (False, True))
    assert plain[32:40] != sealed[32:40] == bytes(8)
    assert plain[:32] + plain[40:] == sealed[:32] + sealed[40:]
    for data in (plain, sealed):  # the receiver need not know which kind it is
        assert ServerSide().receive(data).message.client == "ada"
    for data, refused in ((plain, True), (sealed, False)):
        damaged = data.replace(b"ada", b"eda")
        with pytest.raises(WireError, match="damaged on its way") if refused else nullcontext():
            ServerSide(encrypted=True).receive(damaged)


def pack_hello(encrypted: bool) -> bytes:
    return ClientSide(encrypted=encrypted).send(m.Hello("ada", TERMS, 1, 1))


@pytest.mark.parametrize("message", TO_CLIENT[2:], ids=lambda x: type(x).__name__)
def test_nothing_is_asked_before_welcome(message: m.Message) -> None:
    if isinstance(message, m.Bye):
        return
    server, client = ServerSide(), ClientSide()
    with pytest.raises(WireError, match="not expected before Hello"):
        server.send(message)
    server.receive(client.send(m.Hello("ada", TERMS, 1, 1)))
    with pytest.raises(WireError, match="not expected before Welcome"):
        server.send(message)
    with pytest.raises(WireError, match="not expected before Welcome"):
        client.receive(pack(message))


def test_hello_and_welcome_come_once() -> None:
    with pytest.raises(WireError, match="not expected before Hello"):
        ServerSide().receive(pack(m.ModelUp(0)))
    with pytest.raises(WireError, match="Welcome is not expected before Hello"):
        ClientSide().receive(pack(m.Welcome(0, 1, 0, TERMS), conversation=0))
    pair = Pair()
    again = m.Hello("ada", TERMS, 1, 1)
    with pytest.raises(WireError, match="Hello is not expected after Welcome"):
        pair.client.send(again)
    with pytest.raises(WireError, match="Hello is not expected after Welcome"):
        pair.server.receive(pack(again, (), 1, pair.server.conversation))
    with pytest.raises(WireError, match="Welcome is not expected after Welcome"):
        pair.client.receive(pack(m.Welcome(0, 1, 0, TERMS), (), 1, pair.client.conversation))
    client = ClientSide()
    client.send(again)
    with pytest.raises(WireError, match="does not number"):
        client.receive(pack(m.Welcome(0, 1, 0, TERMS)))


def test_refused_and_failed_end_it() -> None:
    server, client = ServerSide(), ClientSide()
    server.receive(client.send(m.Hello("ada", TERMS, 1, 1)))
    refused = server.send(m.Refused("full", "no place is left"))
    assert client.receive(refused).message.reason == "full"
    assert client.state == server.state == "closed"
    pair = Pair()
    pair.down(m.Forward(0))
    pair.up(m.Failed(0, "DataError", "the file is gone"))
    for side, message in ((pair.server, m.Forward(1)), (pair.client, m.SmashedUp(0, 4))):
        with pytest.raises(WireError, match="after the end"):
            side.send(message)


@pytest.mark.parametrize(
    ("asked", "answer", "says"),
    [
        (m.Forward(3), m.ModelUp(3), "Model of step 3 came in answer to Forward of step 3"),
        (m.Forward(3), m.SmashedUp(2, 4), "Smashed of step 2 came in answer to Forward of step 3"),
        (m.Forward(3), m.SmashedUp(3, 0), "Smashed of 0 rows"),
        (m.Forward(3), m.SmashedUp(3, 101), "Smashed of 101 rows"),
        (m.Evaluate(3, "lower", 5), m.EvaluationRows(3, 4), "has 4 rows, Evaluate had 5"),
        (m.OwnForward(3, 5, 0), m.EvaluationRows(3, 4), "has 4 rows, OwnForward had 5"),
        (m.GiveScores(3), m.EvaluationRows(3, 4), "EvaluationRows of step 3 came in answer to GiveScores"),
        (m.Save(3, "prepare"), m.Saved(3, "commit"), "commit came in answer to Save of phase prepare"),
        (m.TakeModel(3), m.ModelUp(3), "was not asked for"),
    ],
)
def test_only_the_answer_that_was_asked_for(asked: m.Message, answer: m.Message, says: str) -> None:
    """The client does not send it, and the server does not accept it."""
    pair = Pair(Limits(rows=100))
    pair.down(asked)
    with pytest.raises(WireError, match=says):
        pair.client.send(answer)
    with pytest.raises(WireError, match=says):
        pair.server.receive(pack(answer, (), 1, pair.server.conversation))
    assert pair.client.send(m.failed(3, WireError("so")))


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (m.Backward(5, "own", 3), "has 3 rows, its batch 4"),
        (m.Backward(5, "common", 3), "has 3 rows, its batch 4"),
        (m.Backward(4, "own", 4), "steps only go on"),
        (m.Backward(6, "own", 4), "no forward pass"),
        (m.Tail(5, 3), "has 3 rows, its batch 4"),
        (m.Forward(4), "steps only go on"),
    ],
)
def test_only_requests_that_make_sense(request_: m.Message, says: str) -> None:
    """The server does not send it, and the client does not accept it."""
    pair = Pair()
    pair.down(m.Forward(5))
    pair.up(m.SmashedUp(5, 4))
    with pytest.raises(WireError, match=says):
        pair.server.send(request_)
    with pytest.raises(WireError, match=says):
        pair.client.receive(pack(request_, (), 2, pair.client.conversation))


def test_a_batch_goes_back_once() -> None:
    pair = Pair()
    pair.down(m.Forward(5))
    pair.up(m.SmashedUp(5, 4))
    pair.down(m.Backward(5, "common", 6))
    with pytest.raises(WireError, match="no forward pass"):
        pair.server.send(m.Backward(5, "own", 4))


def test_requests_and_messages_are_limited() -> None:
    pair = Pair(Limits(asked=2, message_bytes=2000))
    pair.down(m.Forward(0))
    pair.down(m.Forward(1))
    with pytest.raises(WireError, match="2 requests wait"):
        pair.server.send(m.Forward(2))
    with pytest.raises(WireError, match="would have"):
        pair.client.send(m.SmashedUp(0, 4), encode([torch.zeros(999)]))
