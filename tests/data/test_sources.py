"""Sources: every format, with files made here; disjoint, seeded and stratified splits; errors with a remedy."""

from __future__ import annotations

import gzip
import itertools
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cutlayer import Run, plugins
from cutlayer.data import Source, from_arrays, from_dataset, from_memory, load, load_whole, preprocessed
from cutlayer.data.built_in.fashion_mnist import FASHION_MNIST_FOLDER
from cutlayer.errors import ConfigError, CutlayerError, DataError

RNG = np.random.default_rng(0)


def refused(call: Callable[[], object], *words: str, error: type[CutlayerError] = DataError) -> None:
    """Checks that `call` raises `error`, with all `words` in its message."""
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value), str(caught.value)


def ids(source: Source) -> tuple[list[float], list[float], list[float]]:
    """The first feature of every sample of each part, which tests make unique."""
    return tuple(part.x.flatten(1)[:, 0].tolist() for part in (source.train, source.validation, source.test))  # type: ignore[return-value]


def disjoint(source: Source, total: int) -> None:
    """Checks that the parts share no sample, lose none, and are well-formed."""
    every = list(itertools.chain(*ids(source)))
    assert len(every) == len(set(every)) == total
    for part in (source.train, source.validation, source.test):
        assert len(part.x) == len(part.y)
        assert part.y.dtype == torch.int64
        assert part.x.dtype in (torch.float32, torch.int64)
        assert part.x.is_contiguous()
        assert len(part) == 0 or 0 <= int(part.y.min()) <= int(part.y.max()) < source.classes


def equal(a: Source, b: Source) -> bool:
    return all(
        torch.equal(p.x, q.x) and torch.equal(p.y, q.y)
        for p, q in ((a.train, b.train), (a.validation, b.validation), (a.test, b.test))
    )


# --- from memory, and splits -------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.integers(4, 80),
    classes=st.integers(2, 6),
    validation=st.one_of(st.just(0.0), st.floats(0.01, 0.4), st.just(1)),
    test=st.one_of(st.floats(0.01, 0.4), st.just(1), st.just(2)),
    seed=st.integers(0, 2**40),
)
def test_splits_are_disjoint_complete_and_seeded(
    rows: int, classes: int, validation: float, test: float, seed: int
) -> None:
    x = np.arange(rows, dtype=np.float32)[:, None]
    y = np.arange(rows) % classes
    source = from_arrays(x, y, validation=validation, test=test, seed=seed)
    disjoint(source, rows)
    for part in (source.train, source.validation, source.test):  # labels stay with their inputs
        assert torch.equal(part.y, part.x[:, 0].long() % classes)
    held = int(test) if test >= 1 else max(1, round(test * rows))
    assert len(source.test) == held
    assert (len(source.validation) == 0) == (validation == 0)
    assert equal(source, from_arrays(x, y, validation=validation, test=test, seed=seed))


def test_another_seed_splits_otherwise() -> None:
    x, y = np.arange(200.0)[:, None], np.arange(200) % 4
    assert not equal(from_arrays(x, y, seed=0), from_arrays(x, y, seed=1))


def test_splits_keep_the_shares_of_classes() -> None:
    y = np.repeat([0, 1, 2], [700, 200, 100])
    source = from_arrays(np.arange(1000.0)[:, None], y, validation=100, test=0.2)
    assert torch.bincount(source.test.y).tolist() == [140, 40, 20]
    assert torch.bincount(source.validation.y).tolist() == [70, 20, 10]
    assert torch.bincount(source.train.y).tolist() == [490, 140, 70]


def test_a_class_of_one_sample_is_split_without_strata() -> None:
    disjoint(from_arrays(np.arange(50.0)[:, None], [0] * 25 + [1] * 24 + [2]), 50)


def test_own_test_set_is_used_and_test_ignored() -> None:
    x, y = np.arange(20.0)[:, None], np.arange(20) % 2
    source = from_arrays(x, y, x_test=x[:4] + 100, y_test=y[:4], validation=5, test=0.9)
    assert (len(source.train), len(source.validation)) == (15, 5)
    assert source.test.x[:, 0].tolist() == [100, 101, 102, 103]


def test_labels_of_any_kind_are_ranked_and_keep_their_names() -> None:
    x = np.arange(12.0)[:, None]
    assert from_arrays(x, [10, 9, -1] * 4).class_names == ("-1", "9", "10")
    assert from_arrays(x, np.array([2.0, 4.0] * 6)).class_names == ("2", "4")
    assert from_arrays(x, torch.tensor([True, False] * 6)).class_names == ("False", "True")
    source = from_arrays(x, np.array(["dog", "cat", "eel"] * 4, dtype=object), validation=0, test=1)
    assert source.class_names == ("cat", "dog", "eel")
    assert source.train.y.tolist() == [[1, 0, 2][int(at) % 3] for at in source.train.x[:, 0]]


def test_a_class_only_in_the_test_set_counts() -> None:
    source = from_arrays(np.ones((6, 1)), [0, 2] * 3, x_test=np.ones((1, 1)), y_test=[1])
    assert source.class_names == ("0", "1", "2")
    assert source.test.y.tolist() == [1]


def test_owners_of_training_rows_are_ranked() -> None:
    owners = np.array(["zoe", "amy", "bob"])[np.arange(60) % 3]
    source = from_arrays(np.arange(60.0)[:, None], np.arange(60) % 2, client=owners)
    assert source.client_column is not None
    assert source.client_column.dtype == torch.int64
    assert source.client_column.tolist() == [[2, 0, 1][int(at) % 3] for at in source.train.x[:, 0]]


def test_inputs_by_type() -> None:
    y = [0, 1] * 10
    as_bytes = from_arrays(np.full((20, 2), 51, np.uint8), y).train.x
    assert as_bytes.dtype == torch.float32
    assert torch.all(as_bytes == 0.2)
    tokens = from_arrays(torch.arange(40).reshape(20, 2).int(), y).train.x
    assert tokens.dtype == torch.int64
    assert tokens.max() > 30
    assert from_arrays(np.ones((20, 2), bool), y).train.x.dtype == torch.float32
    assert from_arrays(np.ones((20, 3, 4, 5), np.float64), y).train.x.shape[1:] == (3, 4, 5)


def test_the_callers_arrays_are_neither_changed_nor_shared() -> None:
    x = np.arange(20, dtype=np.float32)[:, None]
    before = x.copy()
    source = from_arrays(x, [0, 1] * 10, x_test=x, y_test=[0, 1] * 10, validation=0)
    source.train.x.zero_()
    source.test.x.zero_()
    assert np.array_equal(x, before)


def holed(value: float) -> np.ndarray:
    x = np.ones((10, 2, 3), np.float64)
    x[4, 1, 2] = x[7, 0, 0] = value
    return x


Y = [0, 1] * 5
ONES = np.ones((10, 2))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: from_arrays(ONES, Y[:9]), ["10 inputs but 9 labels"]),
        (lambda: from_arrays(np.ones((0, 2)), []), ["no rows", "add samples"]),
        (lambda: from_arrays(np.ones(10), Y), ["(10,)", "at least one feature"]),
        (lambda: from_arrays(3.0, 1), ["single values"]),
        (lambda: from_arrays(holed(np.nan), Y), ["2 values", "NaN or infinite", "row 4", "(1, 2)", "remove"]),
        (lambda: from_arrays(holed(-np.inf), Y), ["2 values", "row 4"]),
        (lambda: from_arrays(holed(1e300), Y), ["2 values", "infinite (in float32)"]),
        (lambda: from_arrays(np.full((10, 2), "a"), Y), ["<U1", "real numbers"]),
        (lambda: from_arrays(np.ones((10, 2), complex), Y), ["complex128", "real numbers"]),
        (lambda: from_arrays(ONES, [7] * 10), ["one class only, 7", "at least two"]),
        (lambda: from_arrays(ONES, np.eye(10)), ["(10, 10)", "argmax(1)"]),
        (lambda: from_arrays(ONES, [0, 0.5] * 5), ["0.5", "integers or strings"]),
        (lambda: from_arrays(ONES, [0, np.nan] * 5), ["nan", "integers or strings"]),
        (lambda: from_arrays(ONES, np.array([0, None] * 5)), ["object", "integers or strings"]),
        (lambda: from_arrays(ONES, Y, x_test=ONES), ["x_test", "without y_test"]),
        (lambda: from_arrays(ONES, Y, y_test=Y), ["y_test", "without x_test"]),
        (lambda: from_arrays(ONES, Y, x_test=np.ones((4, 3)), y_test=[0, 1] * 2), ["test part", "(3,)", "(2,)"]),
        (lambda: from_arrays(ONES, Y, x_test=ONES, y_test=["a"] * 10), ["integers in one part and strings"]),
        (lambda: from_arrays(ONES, Y, client=[1, 2]), ["(2,)", "(10,)", "one owner per training row"]),
        (lambda: from_arrays(ONES, Y, test=10), ["test=10", "10 of 10", "lower"]),
        (lambda: from_arrays(ONES, Y, test=5, validation=5), ["validation=5", "5 of 5", "lower"]),
    ],
)
def test_unfit_arrays_are_refused_with_a_remedy(call: Callable[[], object], words: list[str]) -> None:
    refused(call, *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"test": 0}, ["test=0", "test=0.2"]),
        ({"test": -0.1}, ["test=-0.1", "fraction below 1"]),
        ({"test": float("nan")}, ["test=nan"]),
        ({"test": float("inf")}, ["test=inf"]),
        ({"validation": 1.5}, ["validation=1.5", "whole number"]),
    ],
)
def test_unfit_split_sizes_are_refused(options: dict[str, float], words: list[str]) -> None:
    refused(lambda: from_arrays(ONES, Y, **options), *words, error=ConfigError)  # type: ignore[arg-type]


# --- built-in ----------------------------------------------------------------------------------------------------


def test_digits() -> None:
    source = load("digits")
    assert [len(source.train), len(source.validation), len(source.test)] == [1294, 144, 359]
    assert source.train.x.shape[1:] == (1, 8, 8)
    assert source.train.x.dtype == torch.float32
    assert source.train.x.min() == 0
    assert source.train.x.max() == 1
    assert source.class_names == tuple("0123456789")
    assert source.client_column is None
    assert equal(source, load("digits"))
    assert not equal(source, load("digits", seed=1))


HAS_FASHION = Path(FASHION_MNIST_FOLDER, "train-images-idx3-ubyte.gz").exists()


@pytest.mark.skipif(not HAS_FASHION, reason=f"Fashion-MNIST is not in {FASHION_MNIST_FOLDER}")
def test_fashion_mnist_as_the_paper_splits_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUTLAYER_FASHION_MNIST", raising=False)
    source = load("fashion-mnist", validation=10_000)
    assert [len(source.train), len(source.validation), len(source.test)] == [50_000, 10_000, 10_000]
    assert source.train.x.shape[1:] == (1, 28, 28)
    assert source.train.x.min() == -1
    assert source.train.x.max() == 1
    assert torch.bincount(source.train.y).tolist() == [5000] * 10
    assert source.class_names[0] == "T-shirt/top"
    assert source.class_names[9] == "Ankle boot"
    assert source.test.y[:5].tolist() == [9, 2, 1, 1, 6]  # the published order
    named = load(FASHION_MNIST_FOLDER, validation=10_000)
    assert torch.equal(named.test.x, source.test.x)
    assert torch.equal(named.train.y, source.train.y)


def test_fashion_mnist_that_is_absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUTLAYER_FASHION_MNIST", str(tmp_path / "nowhere"))
    refused(lambda: load("fashion-mnist"), "apt-get install dataset-fashion-mnist", "four idx files", "nowhere")


def test_fashion_mnist_from_the_folder_that_the_environment_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    idx_folder(tmp_path)
    monkeypatch.setenv("CUTLAYER_FASHION_MNIST", str(tmp_path))
    source = load("fashion-mnist")
    assert source.name == "fashion-mnist"
    assert source.classes == 10
    assert len(source.test) == 6


def test_unknown_names_and_options(tmp_path: Path) -> None:
    refused(lambda: load("fashion-minst"), "'fashion-minst'", "did you mean 'fashion-mnist'?", "file or folder")
    refused(lambda: load(str(tmp_path / "no.csv")), "no.csv", "known: digits", "file or folder")
    refused(lambda: load("digits", data_format="cvs"), "'cvs'", "did you mean 'csv'?", error=ConfigError)
    refused(lambda: load("digits", data_format="csv"), "data_format='csv'", "no effect", error=ConfigError)
    refused(lambda: load("digits", client_column="who"), "client_column='who'", "no effect", error=ConfigError)
    refused(lambda: load("digits", label_column="class"), "label_column='class'", "no effect", error=ConfigError)
    (tmp_path / "data.log").write_text("1")
    refused(lambda: load(str(tmp_path / "data.log")), "data.log", "data_format")
    (tmp_path / "empty").mkdir()
    refused(lambda: load(str(tmp_path / "empty")), "empty", "data_format")
    refused(lambda: load(str(tmp_path), data_format="csv"), "cannot be read", "'csv'", "directory")


# --- npz ---------------------------------------------------------------------------------------------------------


def npz(path: Path, **arrays: Any) -> str:
    np.savez(path / "data.npz", **arrays)
    return str(path / "data.npz")


def test_npz_of_one_part(tmp_path: Path) -> None:
    x = np.arange(60, dtype=np.float64)[:, None] * [1.0, 2.0]
    source = load(npz(tmp_path, x=x, y=np.arange(60) % 3, client=np.arange(60) % 5 + 7))
    disjoint(source, 60)
    assert source.name == "data"
    assert source.client_column is not None
    assert source.client_column.tolist() == [int(at) % 5 for at in ids(source)[0]]
    assert torch.equal(source.train.x[:, 1], source.train.x[:, 0] * 2)  # values are not scaled


def test_npz_with_its_own_parts(tmp_path: Path) -> None:
    x, y = np.arange(30, dtype=np.float32)[:, None], np.array(["b", "a", "c"] * 10)
    path = npz(tmp_path, x_train=x[:20], y_train=y[:20], x_test=x[20:26], y_test=y[20:26], client_train=y[:20])
    source = load(path, test=0.9, validation=4)
    disjoint(source, 26)
    assert (len(source.train), len(source.validation), ids(source)[2]) == (16, 4, list(range(20, 26)))
    assert source.client_column is not None
    assert torch.equal(source.client_column, source.train.y)
    own = npz(tmp_path, x=x[:20], y=y[:20], x_val=x[20:26], y_val=y[20:26], x_test=x[26:], y_test=y[26:])
    assert ids(load(own, validation=0.9)) == (list(range(20)), list(range(20, 26)), list(range(26, 30)))


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        ((20, 6), np.float32, (6,)),
        ((20, 5, 6), np.float32, (1, 5, 6)),
        ((20, 5, 6), np.uint8, (1, 5, 6)),
        ((20, 5, 6), np.int32, (5, 6)),
        ((20, 5, 6, 1), np.uint8, (1, 5, 6)),
        ((20, 5, 6, 3), np.float64, (3, 5, 6)),
        ((20, 5, 6, 4), np.uint8, (4, 5, 6)),
        ((20, 3, 6, 4), np.uint8, (3, 6, 4)),
        ((20, 5, 6, 7), np.float32, (5, 6, 7)),
    ],
)
def test_npz_layouts(tmp_path: Path, shape: tuple[int, ...], dtype: type, expected: tuple[int, ...]) -> None:
    source = load(npz(tmp_path, x=np.ones(shape, dtype), y=np.arange(20) % 2))
    assert source.train.x.shape[1:] == expected
    assert source.train.x.dtype == (torch.int64 if dtype is np.int32 else torch.float32)


def test_npz_channels_last_moves_the_right_pixels(tmp_path: Path) -> None:
    x = RNG.integers(0, 256, (10, 5, 6, 3), dtype=np.uint8)
    source = load(npz(tmp_path, x=x, y=np.arange(10) % 2), validation=0, test=1)
    kept = [row for row in range(10) if any(np.isclose(x[row, 2, 3, 1] / 255, source.train.x[:, 1, 2, 3]))]
    assert len(kept) >= 9


def test_npz_that_cannot_be_read(tmp_path: Path) -> None:
    y = np.arange(10) % 2
    refused(lambda: load(npz(tmp_path, x=np.array([{}] * 10, dtype=object), y=y)), "'x'", "data.npz", "never unpickles")
    refused(lambda: load(npz(tmp_path, features=ONES, y=y)), "'y'", "no 'x'")
    refused(lambda: load(npz(tmp_path, x=ONES)), "'x'", "no 'y'")
    refused(lambda: load(npz(tmp_path, x=ONES, y=y, x_test=ONES)), "'x_test'", "no 'y_test'")
    refused(lambda: load(npz(tmp_path, features=ONES)), "features", "np.savez")
    refused(lambda: load(npz(tmp_path, x=ONES, y=y), client_column="a"), "no effect", error=ConfigError)
    path = Path(npz(tmp_path, x=RNG.normal(size=(100, 9)), y=np.arange(100) % 2))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(lambda: load(str(path)), "data.npz", "truncated")
    path.write_bytes(whole[:300] + bytes(200) + whole[500:])
    refused(lambda: load(str(path)), "data.npz", "damaged")
    path.write_bytes(b"")
    refused(lambda: load(str(path)), "data.npz", "truncated")
    path.write_text("hello, this is no archive", encoding="utf-8")
    refused(lambda: load(str(path)), "data.npz", "not an .npz archive")
    with path.open("wb") as file:
        np.save(file, ONES)
    refused(lambda: load(str(path)), "one array", "np.savez")


def test_an_npz_with_pickled_code_does_not_run_it(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    refused(lambda: load(npz(tmp_path, x=np.array([Evil()] * 4, dtype=object), y=[0, 1, 0, 1])), "never unpickles")
    assert not (tmp_path / "ran").exists()


def test_npz_by_other_usual_names(tmp_path: Path) -> None:
    x, y = np.arange(30, dtype=np.uint8).reshape(30, 1, 1, 1) * np.ones((6, 5, 3), np.uint8), np.arange(30)[:, None] % 2
    parts = {"train": slice(0, 20), "val": slice(20, 24), "test": slice(24, 30)}
    medical = {f"{p}_images": x[at] for p, at in parts.items()} | {f"{p}_labels": y[at] for p, at in parts.items()}
    source = load(npz(tmp_path, **medical))
    assert source.train.x.shape == (20, 3, 6, 5)
    assert (len(source.validation), len(source.test)) == (4, 6)
    source = load(npz(tmp_path, X=x, Y=y, weights=np.ones(3), notes=np.ones(3)))
    disjoint(source, 30)
    assert "ignored the arrays 'weights', 'notes'" in source.account
    refused(lambda: load(npz(tmp_path, X=x, x=x, y=y)), "'X' and 'x'", "keep one")
    refused(lambda: load(npz(tmp_path, x=x, y=y, x_holdout=x)), "'x_holdout'", "known: x, y, client, x_train")
    refused(lambda: load(npz(tmp_path, x=x, y=y, x_val=x, x_validation=x)), "'x_val' and 'x_validation'", "keep one")
    owners = npz(tmp_path, x_train=x, y_train=y, client_train=y[:, 0], x_test=x, y_test=y, client_test=1 - y[:, 0])
    source = load(owners)
    assert source.test_clients is not None
    assert torch.equal(source.test_clients, 1 - source.test.y)


# --- csv ---------------------------------------------------------------------------------------------------------


def table(path: Path, rows: list[list[object]], header: str = "age,weight,who,label", separator: str = ",") -> str:
    file = path / "people.csv"
    lines = [header.replace(",", separator), *(separator.join(map(str, row)) for row in rows)]
    file.write_text("\n".join(lines) + "\n")
    return str(file)


PEOPLE: list[list[object]] = [[n, n * n / 7, f"user{n % 4}", ["yes", "no"][n % 2]] for n in range(50)]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_csv_is_standardised_by_the_training_part(tmp_path: Path, separator: str) -> None:
    source = load(table(tmp_path, PEOPLE, separator=separator), client_column="who")
    disjoint(source, 50)
    assert source.class_names == ("no", "yes")
    assert source.train.x.shape[1:] == (2,)
    assert torch.allclose(source.train.x.mean(0), torch.zeros(2), atol=1e-6)
    assert torch.allclose(source.train.x.std(0, correction=0), torch.ones(2), atol=1e-6)
    # Age and its rank lie on the same line in all parts.
    ages = sorted(itertools.chain(*ids(source)))
    assert np.allclose(np.diff(ages), ages[1] - ages[0], atol=1e-5)
    age = [round((value - ages[0]) / (ages[1] - ages[0])) for value in ids(source)[0]]
    assert source.client_column is not None
    assert source.client_column.tolist() == [n % 4 for n in age]
    assert source.train.y.tolist() == [1 - n % 2 for n in age]


def test_csv_constant_columns_become_zero_and_whole_labels_are_numbers(tmp_path: Path) -> None:
    rows: list[list[object]] = [[n, 0.1, n % 3, [10, 9][n % 2]] for n in range(40)]
    source = load(table(tmp_path, rows))
    assert source.class_names == ("9", "10")  # sorted as numbers, not as words
    assert source.train.x.shape[1:] == (3,)
    assert torch.all(source.train.x[:, 1] == 0)
    assert torch.isfinite(source.test.x).all()


def test_csv_with_byte_order_mark_quotes_spaces_and_empty_lines(tmp_path: Path) -> None:
    text = '\ufeff"a", label\n' + "".join(f'{n},"{["x, y", "z"][n % 2]}"\n\n' for n in range(20))
    (tmp_path / "odd.csv").write_text(text, encoding="utf-8")
    source = load(str(tmp_path / "odd.csv"))
    disjoint(source, 20)
    assert source.class_names == ("x, y", "z")


def test_csv_that_cannot_be_read(tmp_path: Path) -> None:
    path = table(tmp_path, PEOPLE)
    refused(lambda: load(path, label_column="lable"), "'lable'", "did you mean 'label'?", "age, weight", "label_column")
    refused(lambda: load(path, client_column="whom"), "'whom'", "did you mean 'who'?", "client_column")
    changed = [*PEOPLE[:5], [5, "", "user1", "no"], *PEOPLE[6:]]
    refused(lambda: load(table(tmp_path, changed), client_column="who"), "'weight'", "line 7", "empty", "fill it in")
    refused(lambda: load(table(tmp_path, changed), client_column="who"), "ignore_columns", "impute (mean")
    changed = [*PEOPLE[:5], [5, "1 kg", "user1", "no"], *PEOPLE[6:]]
    refused(lambda: load(table(tmp_path, changed)), "'weight'", "not numeric", "line 7", "'1 kg'", "ignore_columns")
    changed = [*PEOPLE[:5], [5, "nan", "user1", "no"], [6, "inf", "user1", "no"], *PEOPLE[7:]]
    refused(lambda: load(table(tmp_path, changed), client_column="who"), "2 values", "row 5", "'weight'", "fill")
    changed = [*PEOPLE[:5], [5, 1, "user1", ""]]
    refused(lambda: load(table(tmp_path, changed), client_column="who"), "'label'", "line 7", "fill it in")
    changed = [*PEOPLE[:5], [5, 1, "user1"]]
    refused(lambda: load(table(tmp_path, changed), client_column="who"), "line 7", "3 fields", "4")
    path = table(tmp_path, PEOPLE)
    refused(lambda: load(path, client_column="who", label_column="weight"), "0.14", "is not a class")
    refused(lambda: load(table(tmp_path, [])), "people.csv", "no rows")
    refused(lambda: load(table(tmp_path, PEOPLE, "age,age,who,label")), "'age' twice", "rename")
    refused(lambda: load(table(tmp_path, [["a"], ["b"]], "label")), "no feature column")
    refused(lambda: load(table(tmp_path, [[1, "a"]] * 9, "x,label")), "one class only, a")
    wide = ",".join(f"pixel{n}" for n in range(784))
    refused(lambda: load(table(tmp_path, [[1] * 784], wide), label_column="pixle783"), "'pixel783'", "784 in all")
    (tmp_path / "people.csv").write_bytes(b"a,label\n\xff\xfe,1\n")
    refused(lambda: load(path), "people.csv", "UTF-8")
    (tmp_path / "people.csv").write_text("")
    refused(lambda: load(path), "people.csv", "no rows")


@pytest.mark.parametrize("name", ["people.csv", "people.tsv", "PEOPLE.CSV", "people.csv.gz", "people.tsv.gz"])
def test_csv_by_its_name_packed_or_not(tmp_path: Path, name: str) -> None:
    plain = Path(table(tmp_path, PEOPLE, separator="\t" if ".tsv" in name else ",")).read_bytes()
    (tmp_path / "people.csv").unlink()
    (tmp_path / name).write_bytes(gzip.compress(plain) if name.endswith(".gz") else plain)
    source = load(str(tmp_path / name), client_column="who")
    disjoint(source, 50)
    assert source.name.lower() == "people"
    assert source.preprocessing["columns"] == [{"name": "age"}, {"name": "weight"}]


def test_csv_that_is_packed_badly(tmp_path: Path) -> None:
    packed = gzip.compress(Path(table(tmp_path, PEOPLE)).read_bytes())
    (tmp_path / "x.csv.gz").write_bytes(packed[:-20])
    refused(lambda: load(str(tmp_path / "x.csv.gz")), "x.csv.gz", "gzip", "copy it again")
    (tmp_path / "x.csv.gz").write_bytes(b"age,label")
    refused(lambda: load(str(tmp_path / "x.csv.gz")), "x.csv.gz", "gzip", "copy it again")


@pytest.mark.parametrize(
    ("header", "separator", "feature"),
    [
        ('"temp (min;mean;max)",label', ",", "temp (min;mean;max)"),
        ('"income, gross, EUR";label', ";", "income, gross, EUR"),
        ("temp (min;mean;max),label", ",", "temp (min;mean;max)"),
        ('"a\tb\tc\td",label', ",", "a\tb\tc\td"),
    ],
)
def test_csv_separators_within_names_do_not_count(tmp_path: Path, header: str, separator: str, feature: str) -> None:
    rows = "".join(f"{n}.5{separator}{'ab'[n % 2]}\n" for n in range(20))
    (tmp_path / "odd.csv").write_text(f"{header}\n{rows}")
    source = load(str(tmp_path / "odd.csv"))
    assert source.preprocessing["columns"] == [{"name": feature}]
    assert source.class_names == ("a", "b")


def test_csv_decimal_commas_are_numbers_where_another_separator_divides(tmp_path: Path) -> None:
    rows = [[f"{n},5", ["yes", "no"][n % 2]] for n in range(20)]
    source = load(table(tmp_path, rows, "x,label", ";"), validation=0, test=1)
    assert source.train.x.shape[1:] == (1,)
    values = torch.cat([source.train.x, source.test.x])[:, 0].sort().values
    assert torch.allclose(values.diff(), values.diff()[0], atol=1e-5)


def test_csv_owners_keep_their_names(tmp_path: Path) -> None:
    owners = ["01", "1", "10", "1e1", "1E1", "2023_01", "202301"]
    rows = [[n, owners[n % 7], "ab"[n // 7 % 2]] for n in range(70)]
    source = load(table(tmp_path, rows, "x,site,label"), client_column="site")
    assert source.owner_names == ("01", "1", "10", "1E1", "1e1", "202301", "2023_01")
    assert source.client_column is not None
    assert len(torch.unique(source.client_column)) == 7
    plain = load(
        table(tmp_path, [[n, 9 + n % 3, "ab"[n % 2]] for n in range(60)], "x,site,label"), client_column="site"
    )
    assert plain.owner_names == ("9", "10", "11")  # all are integers, so they are sorted as numbers


def test_csv_labels_keep_their_names(tmp_path: Path) -> None:
    names = ["01", "1", "1e1"]
    source = load(table(tmp_path, [[n, names[n % 3]] for n in range(60)], "x,label"))
    assert source.class_names == ("01", "1", "1e1")
    source = load(table(tmp_path, [[n, f"{n % 3}.0"] for n in range(60)], "x,label"))
    assert source.class_names == ("0", "1", "2")  # pandas writes integers like this if a value is missing


def test_csv_index_that_pandas_saved_is_not_a_feature(tmp_path: Path) -> None:
    for first in ("", "Unnamed: 0"):
        rows = [[n, n * n / 7, "ab"[n // 30]] for n in range(60)]
        source = load(table(tmp_path, rows, f"{first},noise,label"))
        assert source.preprocessing["columns"] == [{"name": "noise"}]
        assert f"ignored the column {first!r} (a saved index)" in source.account
    named = [[f"patient {n}", n * n / 7, "ab"[n // 30]] for n in range(60)]
    assert load(table(tmp_path, named, ",noise,label")).preprocessing["columns"] == [{"name": "noise"}]
    counted = [[60 - n, n * n / 7, "ab"[n // 30]] for n in range(60)]  # named like an index, but not a count
    assert len(load(table(tmp_path, counted, "Unnamed: 0,noise,label")).preprocessing["columns"]) == 2
    refused(lambda: load(table(tmp_path, counted, "noise,,label")), "column 2", "no name")
    trailing = [[n, "ab"[n % 2], ""] for n in range(60)]
    assert "ignored the column '' (empty)" in load(table(tmp_path, trailing, "noise,label,")).account


def test_csv_columns_can_be_chosen(tmp_path: Path) -> None:
    path = table(tmp_path, PEOPLE)
    assert load(path, columns=("weight",)).preprocessing["columns"] == [{"name": "weight"}]
    chosen = load(path, columns=("weight", "age"))
    assert [c["name"] for c in chosen.preprocessing["columns"]] == ["weight", "age"]
    ignoring = load(path, ignore_columns=("age", "who"))
    assert ignoring.preprocessing["columns"] == [{"name": "weight"}]
    assert "ignored the columns 'age', 'who'" in ignoring.account
    refused(lambda: load(path, columns=("wieght",)), "'wieght'", "did you mean 'weight'?", "set columns")
    refused(lambda: load(path, ignore_columns=("whom",)), "'whom'", "did you mean 'who'?", "set ignore_columns")
    refused(lambda: load(path, columns=("label",)), "'label'", "is the label_column", error=ConfigError)
    refused(lambda: load(path, ignore_columns=("age", "weight", "who")), "no feature column")
    both = {"columns": ("age",), "ignore_columns": ("who",)}
    refused(lambda: load(path, **both), "exclude each other", error=ConfigError)  # type: ignore[arg-type]


def test_csv_identifiers_are_remarked_on(tmp_path: Path) -> None:
    rows = [[1000 - n, 7 + n % 3, n % 5, n / 7, f"s{n % 3}", "ab"[n // 30]] for n in range(60)]
    path = table(tmp_path, rows, "patient_id,site_id,ward,noise,site,label")
    account = load(path, client_column="site").account
    assert "'patient_id' has another whole number in every row: if it is an identifier" in account
    assert "'site_id' is the same in all rows of an owner: if it is an identifier" in account
    assert "'ward'" not in account
    assert "'noise'" not in account
    left = load(path, client_column="site", ignore_columns=("patient_id", "site_id")).account
    assert "identifier" not in left


def test_csv_of_one_client_may_have_the_client_column_or_not(tmp_path: Path) -> None:
    mine = [[n, "Bonn", "ab"[n % 2]] for n in range(20)]
    for path in (
        table(tmp_path, mine, "x,site,label"),
        table(tmp_path, [[n, label] for n, _, label in mine], "x,label"),
    ):
        source = load_whole(path, client_column="site")
        assert source.preprocessing["columns"] == [{"name": "x"}]
        assert source.client_column is None
    np.savez(tmp_path / "mine.npz", x=np.ones((4, 2)), y=[0, 1, 0, 1])
    assert len(load_whole(str(tmp_path / "mine.npz"), client_column="site").train) == 4


def test_csv_text_becomes_categories(tmp_path: Path) -> None:
    rows = [[["red", "blue", "green"][n % 3], n, "ab"[n % 2]] for n in range(60)]
    source = load(table(tmp_path, rows, "colour,n,label"), validation=0)
    assert source.preprocessing["columns"] == [
        {"name": "colour", "categories": ["blue", "green", "red"]},
        {"name": "n"},
    ]
    assert "one column of 0 and 1 for each category of 'colour' (3)" in source.account
    hot, n = source.train.x[:, :3], source.train.x[:, 3]
    assert set(hot.flatten().tolist()) == {0, 1}
    assert torch.all(hot.sum(1) == 1)
    assert abs(float(n.mean())) < 1e-6
    order = torch.cat([source.train.x, source.test.x])
    order = order[order[:, 3].argsort()]
    assert order[:6, :3].argmax(1).tolist() == [2, 0, 1, 2, 0, 1]
    names = [[f"name {n}", n, "ab"[n % 2]] for n in range(60)]
    refused(lambda: load(table(tmp_path, names, "who,n,label")), "'who'", "60 different values", "ignore_columns")


def test_csv_missing_values_are_filled_in_if_asked(tmp_path: Path) -> None:
    values = [1.0, 2.0, 3.0, 100.0] * 15
    rows: list[list[object]] = [[v, ["red", "blue"][n % 2], "ab"[n % 2]] for n, v in enumerate(values)]
    for row, text in ((7, ""), (11, "NA"), (13, "?")):
        rows[row] = [text, "red", "ab"[row % 2]]
    rows[20] = [5.0, "", "a"]
    path = table(tmp_path, rows, "x,colour,label")
    refused(lambda: load(path), "'x'", "line 9", "empty", "impute (mean, median or zero)")
    refused(lambda: load(path, impute="mode"), "'mode'", error=ConfigError)
    for impute, wanted in (("mean", np.nanmean), ("median", np.nanmedian), ("zero", lambda x: 0.0)):
        source = load(path, impute=impute, validation=0)
        becomes = "zero" if impute == "zero" else f"the {impute} of their column"
        assert f"missing numbers become {becomes}: 'x' (3)" in source.account
        conversion = source.preprocessing["conversion"]
        train = source.train.x[:, 0].double() * conversion["std"][0] + conversion["mean"][0]
        filled = conversion["fill"][0]
        known = train[(train - filled).abs() > 1e-3].numpy()
        if impute == "mean":
            assert abs(filled - wanted(known)) < 1e-4
        elif impute == "zero":
            assert filled == 0
        else:
            assert filled in (2.0, 2.5, 3.0)
        both = torch.cat([source.train.x, source.test.x])
        assert int((both[:, 1:].sum(1) == 0).sum()) == 1  # a row without a colour is in no category
    empty = [["", n, "ab"[n % 2]] for n in range(20)]
    refused(lambda: load(table(tmp_path, empty, "x,n,label"), impute="mean"), "'x'", "no value", "ignore_columns")


# --- idx ---------------------------------------------------------------------------------------------------------


def idx(array: np.ndarray, code: int = 8) -> bytes:
    return bytes((0, 0, code, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def idx_folder(folder: Path, gzipped: bool = True) -> np.ndarray:
    """Files with twenty training pictures of 3 x 4 and six test pictures in two classes. Returns the pictures."""
    pictures = np.arange(26, dtype=np.uint8)[:, None, None] * np.ones((3, 4), np.uint8)
    labels = (np.arange(26) % 2).astype(np.uint8)
    for prefix, part in (("train", slice(0, 20)), ("t10k", slice(20, 26))):
        for what, array in (("images-idx3", pictures[part]), ("labels-idx1", labels[part])):
            content = idx(array)
            name = folder / f"{prefix}-{what}-ubyte{'.gz' if gzipped else ''}"
            name.write_bytes(gzip.compress(content) if gzipped else content)
    return pictures


@pytest.mark.parametrize("gzipped", [False, True])
def test_idx(tmp_path: Path, gzipped: bool) -> None:
    pictures = idx_folder(tmp_path, gzipped)
    source = load(str(tmp_path), validation=3)
    disjoint(source, 26)
    assert (len(source.train), len(source.validation), len(source.test)) == (17, 3, 6)
    expected = (pictures[20:].astype(np.float32) / 255 - 0.5) / 0.5
    assert torch.allclose(source.test.x, torch.from_numpy(expected)[:, None])
    assert source.test.y.tolist() == [0, 1] * 3


def test_idx_prefers_the_unpacked_file_and_refuses_two_data_sets(tmp_path: Path) -> None:
    idx_folder(tmp_path, gzipped=True)
    idx_folder(tmp_path, gzipped=False)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(b"not read")
    disjoint(load(str(tmp_path)), 26)
    (tmp_path / "emnist-train-labels-idx1-ubyte").write_bytes(b"")
    refused(lambda: load(str(tmp_path)), "both", "emnist-train-labels-idx1-ubyte", "one data set per folder")


def test_idx_that_cannot_be_read(tmp_path: Path) -> None:
    idx_folder(tmp_path, gzipped=False)
    file = tmp_path / "t10k-images-idx3-ubyte"
    whole = file.read_bytes()
    size = 16 + 6 * 12

    def broken(content: bytes, *words: str, packed: bytes | None = None) -> None:
        file.unlink(missing_ok=True)
        Path(f"{file}.gz").unlink(missing_ok=True)
        (file if packed is None else Path(f"{file}.gz")).write_bytes(content if packed is None else packed)
        refused(lambda: load(str(tmp_path)), file.name, *words)

    broken(whole[:50], "truncated", "50 bytes", f"{size} expected")
    broken(whole + b"!", "too long", f"{size + 1} bytes", f"{size} expected")
    broken(whole[:10], "truncated", "10 bytes", "16")
    broken(b"", "truncated", "0 bytes")
    broken(b"\x00\x00\x0d\x03" + whole[4:], "00 00 0d 03", "00 00 08 03")
    broken(b"\x00\x00\x08\x01" + whole[4:], "00 00 08 01")
    noise = idx(RNG.integers(0, 256, (6, 30, 40), dtype=np.uint8))
    packed = gzip.compress(noise)
    broken(b"", "truncated", f"{len(noise)} expected", packed=packed[: len(packed) // 2])
    broken(b"", "gzip", packed=packed[:-8] + bytes(8))
    broken(b"", "gzip", packed=b"hello")
    Path(f"{file}.gz").unlink()
    refused(lambda: load(str(tmp_path)), "lacks the test images", "t10k-images-idx3-ubyte")
    file.write_bytes(idx(np.ones((5, 3, 4), np.uint8)))
    refused(lambda: load(str(tmp_path)), "5 inputs but 6 labels")


# --- pictures ----------------------------------------------------------------------------------------------------


def picture(path: Path, value: int, mode: str = "L", size: tuple[int, int] = (5, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value,) * len(mode)).save(path)


def test_images_by_class_folder(tmp_path: Path) -> None:
    for n in range(40):
        picture(tmp_path / "pets" / ["dog", "cat"][n % 2] / f"{n:02}.png", n)
    (tmp_path / "pets" / "cat" / "notes.txt").write_text("not a picture")
    (tmp_path / "pets" / ".hidden").mkdir()
    source = load(str(tmp_path / "pets"))
    disjoint(source, 40)
    assert source.name == "pets"
    assert source.class_names == ("cat", "dog")
    assert source.train.x.shape[1:] == (1, 4, 5)
    values = (source.train.x[:, 0, 0, 0] * 255).round().long()
    assert torch.equal(source.train.y, 1 - values % 2)


def test_images_with_their_own_parts_take_the_mode_of_the_first(tmp_path: Path) -> None:
    for n in range(30):
        part = "train" if n < 20 else "val" if n < 24 else "test"
        picture(tmp_path / part / f"class{n % 2}" / f"{n:02}.png", n, ["RGB", "L", "RGBA"][n % 3])
    source = load(str(tmp_path), validation=0.9, test=0.9)
    disjoint(source, 30)
    assert (len(source.train), len(source.validation), len(source.test)) == (20, 4, 6)
    assert source.train.x.shape[1:] == (3, 4, 5)
    assert sorted(round(value * 255) for value in ids(source)[2]) == list(range(24, 30))


def test_images_that_cannot_be_read(tmp_path: Path) -> None:
    for n in range(10):
        picture(tmp_path / ["a", "b"][n % 2] / f"{n}.png", n)
    picture(tmp_path / "b" / "odd.png", 1, size=(7, 4))
    refused(lambda: load(str(tmp_path)), "odd.png", "4x7", "0.png", "4x5", "height x width", "resize = '4x5'")
    refused(lambda: load(str(tmp_path), resize="4"), "'4'", "224x224", error=ConfigError)
    assert load(str(tmp_path), resize="6x3").train.x.shape[1:] == (1, 6, 3)
    whole = (tmp_path / "b" / "1.png").read_bytes()
    (tmp_path / "b" / "odd.png").write_bytes(whole[:40])
    refused(lambda: load(str(tmp_path)), "odd.png", "cannot be read")
    (tmp_path / "b" / "odd.png").write_bytes(b"")
    refused(lambda: load(str(tmp_path)), "odd.png", "cannot be read")
    Image.fromarray(np.full((4, 5), 1 << 20, np.int32)).save(tmp_path / "b" / "odd.tif")
    (tmp_path / "b" / "odd.png").unlink()
    refused(lambda: load(str(tmp_path)), "odd.tif", "more than 16 bits")
    Image.fromarray(np.zeros((4, 5), np.float32)).save(tmp_path / "b" / "odd.tif")
    refused(lambda: load(str(tmp_path)), "odd.tif", "real numbers")
    (tmp_path / "b" / "odd.tif").rename(tmp_path / "b" / "odd.png")
    (tmp_path / "b" / "odd.png").unlink()
    (tmp_path / "c").mkdir()
    refused(lambda: load(str(tmp_path)), "class folder", "no pictures")
    (tmp_path / "c").rmdir()
    (tmp_path / "a").rename(tmp_path / "kept")
    for file in (tmp_path / "b").iterdir():
        file.unlink()
    (tmp_path / "b").rmdir()
    refused(lambda: load(str(tmp_path)), "one class only")


def test_images_with_a_folder_beside_train(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "a" / "0.png", 1)
    picture(tmp_path / "extra" / "a" / "0.png", 1)
    refused(lambda: load(str(tmp_path)), "'extra'", "beside train/")


@pytest.mark.parametrize("grey", [0, 5, 9])
@pytest.mark.parametrize("place", ["red", "green"])
def test_images_have_colour_as_soon_as_one_has(tmp_path: Path, grey: int, place: str) -> None:
    """Both colours have the same grey, so the result must not depend on the first picture."""
    for name, colour in (("red", (255, 0, 0)), ("green", (0, 130, 0))):
        for n in range(10):
            (tmp_path / name).mkdir(exist_ok=True)
            made = Image.new("L", (4, 4), 76) if (name, n) == (place, grey) else Image.new("RGB", (4, 4), colour)
            made.save(tmp_path / name / f"{n:02}.png")
    source = load(str(tmp_path), validation=0)
    assert source.train.x.shape[1:] == (3, 4, 4)
    assert len(torch.unique(torch.cat([source.train.x, source.test.x]).flatten(1), dim=0)) == 3


def test_images_of_16_bits(tmp_path: Path) -> None:
    for n in range(20):
        (tmp_path / "ab"[n % 2]).mkdir(exist_ok=True)
        Image.fromarray(np.full((4, 5), 13107 + n, np.uint16)).save(tmp_path / "ab"[n % 2] / f"{n}.png")
    picture(tmp_path / "a" / "shallow.png", 51)
    source = load(str(tmp_path), validation=0)
    assert source.train.x.shape[1:] == (1, 4, 5)
    values = torch.cat([source.train.x, source.test.x])[:, 0, 0, 0].sort().values
    assert torch.allclose(values, torch.tensor([13107, *range(13107, 13127)]) / 65535)
    assert load(str(tmp_path), resize="2x2").train.x.shape[1:] == (1, 2, 2)
    picture(tmp_path / "a" / "colour.png", 51, "RGB")
    refused(lambda: load(str(tmp_path)), "colour", "16 bits")


def test_images_are_turned_upright(tmp_path: Path) -> None:
    for n in range(20):
        made = Image.fromarray(np.arange(20, dtype=np.uint8).reshape(4, 5) + n)
        (tmp_path / "ab"[n % 2]).mkdir(exist_ok=True)
        turned = n in (3, 4, 5)
        exif = Image.Exif()
        exif[0x0112] = 6 if turned else 1  # of a camera held upright: to be turned clockwise
        (made.transpose(Image.Transpose.ROTATE_90) if turned else made).save(
            tmp_path / "ab"[n % 2] / f"{n:02}.png", exif=exif
        )
    source = load(str(tmp_path), validation=0)
    assert source.train.x.shape[1:] == (1, 4, 5)
    every = torch.cat([source.train.x, source.test.x]) * 255
    every = (every - every[:, :, :1, :1]).round().long()
    assert torch.equal(every, torch.arange(20).reshape(1, 1, 4, 5).expand(20, -1, -1, -1))
    assert "pictures turned upright by their EXIF orientation: 3" in source.account


def test_images_that_are_left_out_are_named(tmp_path: Path) -> None:
    for n in range(48):
        picture(tmp_path / ["cat", "dog"][n % 2] / f"{n:02}.png", n)
    picture(tmp_path / "cat" / "old" / "more.JFIF", 50)
    picture(tmp_path / "cat" / "clear.png", 60, "RGBA")
    for n in range(5):
        (tmp_path / "cat" / f"{n}.heic").write_bytes(b"?")
    for n in range(4):
        (tmp_path / "dog" / f"broken{n}.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "dog" / "notes.txt").write_text("?")
    (tmp_path / "dog" / ".DS_Store").write_text("?")
    account = load(str(tmp_path)).account
    assert "50 pictures (3x4x5) in 2 classes" in account
    assert "ignored 10 files: 5 .heic, 4 broken links, 1 .txt" in account
    assert "pictures whose transparency is left out: 1" in account
    for n in range(5, 9):
        (tmp_path / "cat" / f"{n}.heic").write_bytes(b"?")
    refused(lambda: load(str(tmp_path)), "cat", "26 pictures", "9 files: 9 .heic", "convert")


@pytest.mark.parametrize(
    "names", [("Training", "Testing"), ("Train", "Test"), ("training", "test"), ("TRAIN", "testing", "Val")]
)
def test_images_of_parts_by_any_usual_name(tmp_path: Path, names: tuple[str, ...]) -> None:
    for n in range(24):
        picture(tmp_path / names[n % len(names)] / "ab"[n // 3 % 2] / f"{n}.png", n)
    source = load(str(tmp_path), validation=0.3)
    assert source.class_names == ("a", "b")
    assert len(source.test) == 24 // len(names)
    if len(names) == 3:
        assert len(source.validation) == 8


def test_images_of_parts_that_cannot_be_told_apart(tmp_path: Path) -> None:
    for n, part in enumerate(("train", "val", "validation")):
        picture(tmp_path / "two" / part / "a" / "0.png", n)
        picture(tmp_path / "two" / part / "b" / "1.png", n)
    refused(lambda: load(str(tmp_path / "two")), "'val'", "'validation'", "validation part", "keep one")
    for part in ("Test", "val"):
        picture(tmp_path / "none" / part / "a" / "0.png", 1)
    refused(lambda: load(str(tmp_path / "none")), "no train folder")
    for n in range(4):
        picture(tmp_path / "flat" / "train" / "ab"[n % 2] / f"{n}.png", n)
        picture(tmp_path / "flat" / "val" / "images" / f"{n}.png", n)
    refused(lambda: load(str(tmp_path / "flat")), "validation part", "'images'", "<class>/<picture>")
    for n in range(4):
        picture(tmp_path / "case" / ["Cat", "cat"][n % 2] / f"{n}.png", n)
    refused(lambda: load(str(tmp_path / "case")), "several spellings", "'Cat'")


# --- Hugging Face ------------------------------------------------------------------------------------------------

try:
    import datasets  # type: ignore[import-untyped]
except ImportError:
    datasets = None
needs_datasets = pytest.mark.skipif(datasets is None, reason="the extra cutlayer[datasets] is not installed")


def hugging(rows: int = 40, start: int = 0, **features: Any) -> Any:
    columns = {
        "a": [float(n) for n in range(start, start + rows)],
        "b": [n % 5 for n in range(start, start + rows)],
        "who": [f"user{n % 3}" for n in range(start, start + rows)],
        "label": [["no", "yes"][n % 2] for n in range(start, start + rows)],
    }
    return datasets.Dataset.from_dict(columns)


@needs_datasets
def test_huggingface_folder_of_a_table(tmp_path: Path) -> None:
    hugging().save_to_disk(str(tmp_path / "set"))
    source = load(str(tmp_path / "set"), client_column="who")
    disjoint(source, 40)
    assert source.train.x.shape[1:] == (2,)
    assert source.class_names == ("no", "yes")
    assert torch.allclose(source.train.x.mean(0), torch.zeros(2), atol=1e-6)
    assert source.client_column is not None
    assert set(source.client_column.tolist()) == {0, 1, 2}


@needs_datasets
def test_huggingface_dictionary_with_its_own_parts(tmp_path: Path) -> None:
    parts = {"train": hugging(30), "validation": hugging(4, 30), "test": hugging(6, 34)}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "set"))
    source = load(str(tmp_path / "set"), test=0.9, validation=0.9)
    disjoint(source, 40)
    assert (len(source.train), len(source.validation), len(source.test)) == (30, 4, 6)


@needs_datasets
def test_huggingface_parquet(tmp_path: Path) -> None:
    (tmp_path / "set" / "data").mkdir(parents=True)
    hugging(20).to_parquet(str(tmp_path / "set" / "data" / "train-00000-of-00002.parquet"))
    hugging(10, 20).to_parquet(str(tmp_path / "set" / "data" / "train-00001-of-00002.parquet"))
    hugging(6, 30).to_parquet(str(tmp_path / "set" / "data" / "test-00000-of-00001.parquet"))
    source = load(str(tmp_path / "set"))
    disjoint(source, 36)
    assert len(source.test) == 6
    only = load(
        str(tmp_path / "set" / "data" / "test-00000-of-00001.parquet"), test=1
    )  # a single file is the training part
    disjoint(only, 6)


@needs_datasets
def test_huggingface_index_that_pandas_saved_is_not_a_feature(tmp_path: Path) -> None:
    import pandas

    noise = [n * n / 7 for n in range(60)]
    frame = pandas.DataFrame({"noise": noise, "label": ["ab"[n // 30] for n in range(60)]})
    frame.set_index(pandas.Index([(7 * n) % 60 for n in range(60)])).to_parquet(tmp_path / "a.parquet")
    frame.set_index(pandas.Index([100 + (7 * n) % 60 for n in range(60)], name="patient")).to_parquet(
        tmp_path / "b.parquet"
    )
    for file, column in (("a", "__index_level_0__"), ("b", "patient")):
        source = load(str(tmp_path / f"{file}.parquet"))
        assert source.preprocessing["columns"] == [{"name": "noise"}]
        assert f"ignored the column {column!r} (a saved index)" in source.account


@needs_datasets
def test_huggingface_text_becomes_categories_and_columns_can_be_chosen() -> None:
    source = from_dataset(hugging())
    assert [c["name"] for c in source.preprocessing["columns"]] == ["a", "b", "who"]
    assert source.train.x.shape[1] == 5
    assert from_dataset(hugging(), columns=["b"]).train.x.shape[1] == 1
    assert from_dataset(hugging(), ignore_columns=["who"]).train.x.shape[1] == 2
    holed = datasets.Dataset.from_dict({"x": [1.0, None, 3.0, 5.0] * 5, "label": [0, 1] * 10})
    source = from_dataset(holed, impute="zero", validation=0)
    assert source.preprocessing["conversion"]["fill"] == [0.0]
    days = datasets.Dataset.from_dict({"x": [1.0] * 20, "day": [b"1"] * 20, "label": [0, 1] * 10})
    refused(lambda: from_dataset(days), "'day'", "neither a number nor a text", "ignore_columns")


@needs_datasets
@pytest.mark.parametrize("parquet", [False, True])
def test_huggingface_pictures_and_class_labels(tmp_path: Path, parquet: bool) -> None:
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog", "emu"]),
            "path": datasets.Value("string"),
        }
    )
    pictures = [Image.new("L", (5, 4), n) for n in range(30)]
    rows = {"img": pictures, "label": [n % 2 for n in range(30)], "path": [str(n) for n in range(30)]}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    if parquet:
        (tmp_path / "set").mkdir()
        dataset.to_parquet(str(tmp_path / "set" / "all.parquet"))
    else:
        dataset.save_to_disk(str(tmp_path / "set"))
    source = load(str(tmp_path / "set"))
    disjoint(source, 30)
    assert source.class_names == ("cat", "dog", "emu")
    assert source.train.x.shape[1:] == (1, 4, 5)
    assert torch.equal(source.train.y, (source.train.x[:, 0, 0, 0] * 255).round().long() % 2)


@needs_datasets
@pytest.mark.parametrize(
    ("feature", "shape", "expected"),
    [
        (lambda: datasets.Array2D((3, 2), "uint8"), (3, 2), torch.float32),
        (lambda: datasets.List(datasets.Value("float32")), (6,), torch.float32),
        (lambda: datasets.List(datasets.Value("int64"), length=6), (6,), torch.int64),
        (lambda: datasets.List(datasets.List(datasets.Value("uint8"))), (3, 2), torch.float32),
    ],
)
def test_huggingface_arrays_and_lists(
    feature: Callable[[], Any], shape: tuple[int, ...], expected: torch.dtype
) -> None:
    rows = np.arange(20)[:, None] * np.ones(shape, int).reshape(1, -1)
    features = datasets.Features({"x": feature(), "id": datasets.Value("int64"), "label": datasets.Value("int64")})
    columns = {"x": rows.reshape(20, *shape).tolist(), "id": list(range(20)), "label": [n % 2 for n in range(20)]}
    source = from_dataset(datasets.Dataset.from_dict(columns, features=features))
    disjoint(source, 20)
    assert source.train.x.shape[1:] == shape
    assert source.train.x.dtype == expected


@needs_datasets
def test_huggingface_rows_that_were_filtered_out_do_not_matter() -> None:
    dataset = datasets.Dataset.from_dict({"x": [1.0, None, *range(20)], "label": [None, 0, *([0, 1] * 10)]})
    refused(lambda: from_dataset(dataset.select(range(1, 22))), "'x'", "missing values")
    refused(lambda: from_dataset(dataset.select([0, *range(2, 22)])), "'label'", "row 0", "fill it in")
    disjoint(from_dataset(dataset.select(range(2, 22))), 20)


@needs_datasets
def test_huggingface_that_cannot_be_read(tmp_path: Path) -> None:
    dataset = hugging()
    refused(lambda: from_dataset(dataset, label_column="lable"), "'lable'", "did you mean 'label'?", "label_column")
    refused(lambda: from_dataset(dataset, client_column="whom"), "'whom'", "did you mean 'who'?", "client_column")
    refused(lambda: from_dataset(dataset.remove_columns(["a", "b", "who"])), "no input column", "text column")
    labels = [n % 2 for n in range(4)]
    two = datasets.Dataset.from_dict({"x": [[1, 2]] * 4, "z": [[1, 2]] * 4, "label": labels})
    refused(lambda: from_dataset(two), "x, z", "remove_columns")
    ragged = datasets.Dataset.from_dict({"x": [[1], [1, 2]] * 2, "label": labels})
    refused(lambda: from_dataset(ragged), "'x'", "equal")
    refused(lambda: from_dataset(datasets.DatasetDict({"train": dataset, "odd": dataset})), "odd", "keep only train")
    refused(lambda: from_dataset(dataset, test_dataset=dataset.remove_columns("a")), "'a'", "'test'")
    refused(lambda: from_dataset(dataset.select([])), "no rows")
    unlabelled = dataset.map(lambda row, n: {"label": -1 if n == 3 else n % 2}, with_indices=True).cast_column(
        "label", datasets.ClassLabel(names=["no", "yes"])
    )
    refused(lambda: from_dataset(unlabelled), "-1", "remove")
    holed = dataset.map(lambda row, n: {"a": float("nan") if n == 3 else row["a"]}, with_indices=True)
    refused(lambda: from_dataset(holed), "1 values", "row 3", "'a'")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 hello")
    refused(lambda: load(str(tmp_path / "bad.parquet")), "bad.parquet", "save_to_disk or as parquet")
    refused(lambda: load(str(tmp_path), data_format="huggingface"), "save_to_disk or as parquet")
    (tmp_path / "bad.parquet").unlink()
    (tmp_path / "dataset_info.json").write_text("{")
    refused(lambda: load(str(tmp_path)), "save_to_disk or as parquet")


@needs_datasets
def test_without_the_package_datasets_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hugging().save_to_disk(str(tmp_path / "set"))
    monkeypatch.setitem(sys.modules, "datasets", None)  # makes Python not find the module
    refused(lambda: load(str(tmp_path / "set")), "pip install 'cutlayer[datasets]'")


# --- torch data sets ---------------------------------------------------------------------------------------------


class Pairs(torch.utils.data.Dataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> Any:
        return self.items[row]


@pytest.mark.parametrize(
    "make",
    [
        lambda n: (torch.full((3, 4), float(n)), n % 2),
        lambda n: (np.full((3, 4), n, np.int64), torch.tensor(n % 2)),
        lambda n: [np.full((3, 4), float(n)), np.int32(n % 2)],
        lambda n: (Image.new("L", (4, 3), n), str(n % 2)),
    ],
)
def test_dataset_of_pairs(make: Callable[[int], Any]) -> None:
    source = from_dataset(Pairs([make(n) for n in range(30)]))
    disjoint(source, 30)
    assert source.train.x.shape[-2:] == (3, 4)
    assert source.class_names == ("0", "1")
    given = from_dataset(Pairs([make(n) for n in range(20)]), test_dataset=Pairs([make(n) for n in range(20, 26)]))
    assert len(given.test) == 6
    disjoint(given, 26)


def test_dataset_of_pairs_that_cannot_be_read() -> None:
    good = (torch.ones(2), 0)
    refused(lambda: from_dataset(Pairs([])), "no rows")
    refused(lambda: from_dataset(Pairs([good, torch.ones(3)])), "item 1", "Tensor", "pairs")
    refused(lambda: from_dataset(Pairs([good, (torch.ones(3), 1)])), "item 1", "(3,)", "(2,)")
    refused(lambda: from_dataset(x for x in [good]), "no length", "map-style")
    refused(lambda: from_dataset(Pairs([good] * 5)), "one class only")
    refused(lambda: from_dataset(Pairs([good]), label_column="y"), "label_column='y'", "no effect", error=ConfigError)


# --- data of the user's own --------------------------------------------------------------------------------------

OWN = """
import numpy as np
import torch
from cutlayer.data import Format, Raw, Section, data_format, data_set, from_arrays
from cutlayer.plugins import option

X, Y = np.arange(40.0)[:, None], np.arange(40) % 2


@data_format("lines", title="Lines", summary="a number a line")
class Lines(Format):
    skip: int = option(0, ge=0, help="Lines to leave out at the beginning.")

    @classmethod
    def fits(cls, path):
        return path.suffix == ".lines"

    def read(self, path):
        x = np.array([float(line) for line in path.read_text().split()[self.skip:]])[:, None]
        return Raw(path.stem, Section(x, (x[:, 0] % 2).astype(int)))


@data_format("short", title="Short", summary="returns arrays")
class Short(Format):
    def read(self, path):
        return X, Y


class Unregistered(Format):
    def read(self, path):
        return X, Y


def pair():
    return X, Y


def arrays():
    return {"x": X[:30], "y": Y[:30], "x_test": X[30:], "y_test": Y[30:], "client": Y[:30]}


def source():
    return from_arrays(X, Y, name="whole", validation=4, test=6)


class Pairs(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, row):
        return X[row], int(Y[row])


@data_set("some", title="Some")
def some(*, rows: int = 40):
    return X[:rows], Y[:rows]


def odd():
    return {"x": X, "z": Y}


def nothing():
    return None


def broken():
    raise RuntimeError("the disk is full")


def greedy(folder):
    return X, Y
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    """A file with the user's own formats and data."""
    (tmp_path / "own.py").write_text(OWN)
    return str(tmp_path / "own.py")


@pytest.mark.parametrize(("name", "test"), [("pair", 8), ("arrays", 10), ("source", 6), ("Pairs", 8), ("some", 8)])
def test_a_function_of_ones_own(own: str, name: str, test: int) -> None:
    data = load(f"{own}:{name}")
    disjoint(data, 40)
    assert len(data.test) == test
    assert data.class_names == ("0", "1")
    assert (data.client_column is not None) == (name == "arrays")
    whole = load_whole(f"{own}:{name}")
    assert len(whole.train) == {"arrays": 30, "source": 30}.get(name, 40)
    assert len(whole.validation) == len(whole.test) == 0


def test_a_function_of_ones_own_has_options(own: str) -> None:
    disjoint(load(f"{own}:some", rows=20), 20)
    refused(lambda: load(f"{own}:some", rows="many"), "rows = 'many'", error=ConfigError)
    refused(lambda: load(f"{own}:some", row=20), "row=20", "no effect", "own.py:some", error=ConfigError)


def test_a_function_is_found_in_a_module(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(own).parent
    (folder / "own_things").mkdir()
    (folder / "own_things" / "__init__.py").write_text("")
    (folder / "own_things" / "here.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(folder))
    disjoint(load("own_things.here:pair"), 40)


@needs_datasets
def test_a_function_may_return_hugging_face_data(tmp_path: Path) -> None:
    (tmp_path / "hugging.py").write_text(
        "import datasets\n\n\ndef table():\n    rows = list(range(40))\n"
        "    return datasets.Dataset.from_dict({'a': rows, 'kind': [n % 2 for n in rows]})\n"
    )
    disjoint(load(f"{tmp_path / 'hugging.py'}:table", label_column="kind"), 40)
    refused(lambda: load(f"{tmp_path / 'hugging.py'}:table"), "'label'", "label_column")


def test_functions_that_cannot_be_used(own: str) -> None:
    refused(lambda: load(f"{own}:odd"), "'z'", "known: x, y")
    refused(lambda: load(f"{own}:nothing"), "NoneType", "own.py:nothing", "return a Source")
    refused(lambda: load(f"{own}:broken"), "RuntimeError: the disk is full", "correct", error=ConfigError)
    refused(lambda: load(f"{own}:greedy"), "missing 1 required", "'folder'", error=ConfigError)
    refused(lambda: load(f"{own}:pear"), "'pear'", "did you mean 'pair'?", error=ConfigError)
    refused(lambda: load("nowhere.py:pair"), "no file 'nowhere.py'", error=ConfigError)
    refused(lambda: load(f"{own}:pair", data_format="csv"), "data_format='csv'", "no effect", error=ConfigError)
    refused(lambda: load(f"{own}:pair", label_column="y"), "label_column='y'", "csv and huggingface", error=ConfigError)
    refused(lambda: load(f"{own}:source", class_names=("a", "b")), "class_names", "['0', '1']", error=ConfigError)
    refused(lambda: load(f"{own}:Lines"), "data format", "data set", error=ConfigError)
    assert load(f"{own}:source", class_names=("0", "1")).classes == 2
    assert load(f"{own}:pair", class_names=("0", "1", "2")).classes == 3


def test_a_format_of_ones_own(own: str, tmp_path: Path) -> None:
    path = tmp_path / "numbers.lines"
    path.write_text("\n".join(map(str, range(40))))
    disjoint(load(str(path), data_format=f"{own}:Lines"), 40)
    disjoint(load(str(path), data_format=f"{own}:Lines", skip=10), 30)
    disjoint(load(str(path), data_format=f"{own}:Short"), 40)
    assert len(load_whole(str(path), data_format=f"{own}:Lines", skip=10).train) == 30
    refused(lambda: load(str(path), data_format=f"{own}:Lines", skip=-1), "skip = -1", "Lines to", error=ConfigError)
    refused(lambda: load(str(path), data_format=f"{own}:Lines", skpi=1), "skpi=1", "no effect", error=ConfigError)
    refused(lambda: load(str(path), data_format=f"{own}:pair"), "not registered", error=ConfigError)
    refused(lambda: load(str(path), data_format=f"{own}:Unregistered"), "not registered", error=ConfigError)
    path.write_text("1\ntwo")
    refused(lambda: load(str(path), data_format=f"{own}:Lines"), "ValueError", "'two'", error=ConfigError)


def test_detection_asks_every_format(own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Formats of installed packages are asked, too."""
    path = tmp_path / "numbers.lines"
    path.write_text("\n".join(map(str, range(40))))
    refused(lambda: load(str(path)), "not recognised", "npz")
    monkeypatch.delitem(sys.modules, "own", raising=False)  # other tests have files of this name
    point = EntryPoint("lines", "own:Lines", "cutlayer.formats")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(plugins, "_entry_points", lambda kind: {"lines": point} if kind == "format" else {})
    disjoint(load(str(path)), 40)
    disjoint(load(str(path), data_format="lines", skip=10), 30)


def test_a_part_that_the_data_bring_is_not_held_out(own: str, tmp_path: Path) -> None:
    asked = frozenset({"test", "validation"})
    disjoint(load(f"{own}:pair", given=asked), 40)
    refused(
        lambda: load(f"{own}:arrays", test=0.3, given=asked), "test=0.3", "no effect", "own test", error=ConfigError
    )
    refused(lambda: load(f"{own}:source", given=frozenset({"validation"})), "validation=0.1", "own", error=ConfigError)
    disjoint(load(f"{own}:arrays", test=0.3), 40)
    path = npz(tmp_path, x=ONES, y=Y, x_val=ONES, y_val=Y)
    refused(lambda: load(path, given=asked), "validation=0.1", "own validation set", error=ConfigError)
    assert len(load(path, given=frozenset({"test"})).validation) == 10


def test_nothing_imports_the_package_datasets_unasked() -> None:
    code = "import sys, cutlayer.run, cutlayer.data, cutlayer.plugins as p; p.index('format')"
    code += "; cutlayer.data.load('digits'); sys.exit('datasets' in sys.modules or 'flwr_datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


# --- forms from Python -------------------------------------------------------------------------------------------


def test_forms_of_arrays_in_memory() -> None:
    x, y = np.arange(20.0, dtype=np.float32)[:, None], np.arange(20) % 2
    wanted = from_arrays(x, y, x_test=x[:4] + 100, y_test=y[:4])
    for data in (
        (x, y, x[:4] + 100, y[:4]),
        ((x, y), (x[:4] + 100, y[:4])),
        {"x": x, "y": y, "x_test": x[:4] + 100, "y_test": y[:4]},
        (torch.tensor(x), torch.tensor(y), torch.tensor(x[:4] + 100), y[:4].tolist()),
    ):
        assert equal(from_memory(data), wanted)
    assert equal(from_memory([x, y]), from_arrays(x, y))
    assert equal(from_memory(wanted), wanted)


def test_forms_of_data_sets_in_memory() -> None:
    def made(start: int, stop: int) -> torch.utils.data.TensorDataset:
        x = torch.arange(start, stop).float()[:, None]
        return torch.utils.data.TensorDataset(x, torch.arange(start, stop) % 2)

    for data in ((made(0, 20), made(20, 26)), {"Train": made(0, 20), "testing": made(20, 26)}):
        source = from_memory(data)
        disjoint(source, 26)
        assert ids(source)[2] == list(range(20, 26))
    three = from_memory((made(0, 20), made(20, 24), made(24, 30)))
    assert ids(three) == (list(range(20)), list(range(20, 24)), list(range(24, 30)))
    clients = from_memory([made(0, 10), made(10, 40), made(40, 43)])
    assert clients.client_column is not None
    assert clients.owner_names == ("0", "1", "2")
    for row, owner in zip(ids(clients)[0], clients.client_column.tolist(), strict=True):
        assert owner == (0 if row < 10 else 1 if row < 40 else 2)
    assert from_memory({"Köln": made(0, 10), "Bonn": made(10, 40)}).owner_names == ("Bonn", "Köln")


@needs_datasets
def test_forms_of_hugging_face_data_in_memory() -> None:
    source = from_memory((hugging(30), hugging(6, 30)))
    assert len(source.test) == 6
    clients = from_memory([hugging(10), hugging(20, 10)], ignore_columns=("who",))
    assert clients.owner_names == ("0", "1")
    assert clients.train.x.shape[1] == 2


def test_data_sets_of_clients_are_not_dealt_anew() -> None:
    torch.manual_seed(0)
    sets = [torch.utils.data.TensorDataset(torch.randn(n, 3), torch.arange(n) % 2) for n in (12, 20, 30)]
    run: dict[str, Any] = {"model": "mlp", "data": sets, "algorithm": "psl", "rounds": 1, "test": 6, "validation": 0}
    refused(lambda: Run(**run, clients=3), "'iid'", "partition='column'", "clients=3", error=ConfigError)
    training = Run(**run, clients=3, partition="column").training
    assert 10 <= training.clients.samples[0] <= 11
    assert sum(training.clients.samples) == 56


def test_bfloat16_is_read_as_float32() -> None:
    x = torch.arange(20).to(torch.bfloat16)[:, None]
    source = from_memory((x, torch.arange(20) % 2))
    assert source.train.x.dtype == torch.float32
    assert sorted(itertools.chain(*ids(source))) == list(range(20))
    pairs = [(x[row], row % 2) for row in range(20)]
    disjoint(from_dataset(Pairs(pairs)), 20)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lambda: ([[1.0], [1.0, 2.0]], [0, 1]), ["x cannot be read as an array", "one shape"]),
        (lambda: (ONES, [[1], [1, 2]] * 5), ["y cannot be read as an array", "one shape"]),
        (
            lambda: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(4, 2), torch.ones(4))),
            ["DataLoader", "give its .dataset"],
        ),
        (lambda: 3, ["gives a int", "list of one for each client"]),
        (lambda: ONES, ["gives a ndarray", "arrays (x, y)"]),
        (lambda: {"x": ONES, "lables": Y}, ["'lables'", "known: x, y"]),
    ],
)
def test_other_forms_are_refused_with_a_remedy(data: Callable[[], Any], words: list[str]) -> None:
    refused(lambda: from_memory(data()), *words)


def test_a_data_frame_is_refused_with_a_remedy() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": [1.0, 2.0] * 10, "label": [0, 1] * 10})
    refused(lambda: from_memory(frame), "DataFrame", "frame[columns], frame[label]", "CSV")
    disjoint(from_memory((frame.assign(a=range(20))[["a"]], frame["label"])), 20)


def test_an_item_that_fails_is_named() -> None:
    class Failing(Pairs):
        def __getitem__(self, row: int) -> Any:
            if row == 3:
                raise OSError("no such scan")
            return super().__getitem__(row)

    data = Failing([(np.ones(2), row % 2) for row in range(6)])
    refused(lambda: from_memory(data), "item 3", "OSError: no such scan", error=ConfigError)


# --- new rows are prepared in the same way ---------------------------------------------------------------------


def kept(source: Source) -> dict[str, Any]:
    """The preprocessing as stored in a run's folder."""
    told: dict[str, Any] = json.loads(json.dumps(source.described()))["preprocessing"]
    return told


def same_rows(a: torch.Tensor, source: Source) -> None:
    """Checks that the rows are those of the source's parts, in any order."""
    b = torch.cat([source.train.x, source.validation.x, source.test.x]).flatten(1)
    a = a.flatten(1)
    assert a.dtype == b.dtype
    assert torch.equal(torch.unique(a, dim=0), torch.unique(b, dim=0))
    assert len(a) == len(b)


def test_new_rows_of_a_table(tmp_path: Path) -> None:
    rows: list[list[object]] = [[n, ["", n * n / 7][n % 9 > 0], ["red", "blue"][n % 2], "ab"[n % 2]] for n in range(50)]
    path = table(tmp_path, rows, "age,weight,colour,label")
    source = load(path, impute="median")
    same_rows(preprocessed(kept(source), path), source)
    columns = {"colour": [row[2] for row in rows], "weight": [row[1] or None for row in rows], "age": np.arange(50)}
    same_rows(preprocessed(kept(source), columns), source)
    shuffled = [[row[2], row[1], 1, row[0]] for row in rows]  # in another order, without labels
    (tmp_path / "new").mkdir()
    same_rows(preprocessed(kept(source), table(tmp_path / "new", shuffled, "colour,weight,extra,age", ";")), source)
    refused(lambda: preprocessed(kept(source), {"age": [1], "colour": ["red"]}), "'weight'", "trained on")
    pink = {"age": [1], "weight": [2], "colour": ["pink"]}
    refused(lambda: preprocessed(kept(source), pink), "'pink'", "row 0", "blue, red")
    words = {"age": ["old"], "weight": [2], "colour": ["red"]}
    refused(lambda: preprocessed(kept(source), words), "'age'", "not numeric")
    without = load(table(tmp_path, PEOPLE), ignore_columns=("who",))
    refused(lambda: preprocessed(kept(without), {"age": [1.0, None], "weight": [1, 2]}), "'age'", "row 1", "impute")


def test_new_pictures(tmp_path: Path) -> None:
    for n in range(20):
        picture(tmp_path / "ab"[n % 2] / f"{n:02}.png", n, ["L", "RGB"][n % 2], (8, 6))
    source = load(str(tmp_path), resize="3x4")
    assert kept(source)["mode"] == "RGB"
    same_rows(preprocessed(kept(source), tmp_path), source)
    one = preprocessed(kept(source), str(tmp_path / "b" / "07.png"))
    assert one.shape == (1, 3, 3, 4)
    assert torch.allclose(one, torch.tensor(7 / 255))
    assert torch.equal(preprocessed(kept(source), [tmp_path / "b" / "07.png", str(tmp_path / "b" / "07.png")])[1:], one)
    assert torch.equal(preprocessed(kept(source), [Image.new("RGB", (8, 6), (7, 7, 7))]), one)
    refused(lambda: preprocessed(kept(source), tmp_path / "nowhere"), "nowhere", "does not exist")
    (tmp_path / "empty").mkdir()
    refused(lambda: preprocessed(kept(source), tmp_path / "empty"), "no pictures")
    grey = dict(kept(source), mode="L")
    refused(lambda: preprocessed(grey, tmp_path / "b" / "07.png"), "07.png", "mode RGB", "L")


def test_new_arrays(tmp_path: Path) -> None:
    x = RNG.integers(0, 256, (20, 6, 5, 3), dtype=np.uint8)
    path = npz(tmp_path, x=x, y=np.arange(20) % 2)
    source = load(path)
    same_rows(preprocessed(kept(source), path), source)
    same_rows(preprocessed(kept(source), x), source)
    same_rows(preprocessed(kept(source), np.moveaxis(x, 3, 1)), source)
    refused(lambda: preprocessed(kept(source), np.ones((2, 7))), "(7,)", "(3, 6, 5)")
    idx_folder(tmp_path)
    source = load(str(tmp_path), validation=0)
    pictures = np.arange(26, dtype=np.uint8)[:, None, None, None] * np.ones((1, 3, 4), np.uint8)
    same_rows(preprocessed(kept(source), pictures), source)  # in [-1, 1]


# --- owners ------------------------------------------------------------------------------------------------------


def test_whole_numbers_are_features_unless_the_model_embeds_them() -> None:
    x, y = np.arange(80).reshape(40, 2), np.arange(40) % 2
    run: dict[str, Any] = {"algorithm": "psl", "clients": 2, "rounds": 1, "validation": 0, "test": 8}
    source = Run(data=(x, y), model="mlp", **run).training.source
    assert source.train.x.dtype == torch.float32
    assert kept(source)["conversion"] == {"real": True}
    assert preprocessed(kept(source), x).dtype == torch.float32
    embedding = torch.nn.Sequential(torch.nn.Embedding(80, 4), torch.nn.Flatten(), torch.nn.Linear(8, 2))
    assert Run(data=(x, y), model=embedding, cut="1", **run).training.source.train.x.dtype == torch.int64
    small = torch.nn.Sequential(torch.nn.Embedding(60, 4), torch.nn.Flatten(), torch.nn.Linear(8, 2))
    refused(
        lambda: Run(data=(x, y), model=small, cut="1", **run),
        "does not take",
        "go up to 7",
        "vocabulary",
        error=ConfigError,
    )
    deep = np.full((40, 5, 4), 65535, np.uint16)
    assert Run(data=(deep[:, None], y), model="cnn", **run).training.source.train.x.max() == 1


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    sizes=st.lists(st.integers(1, 30), min_size=2, max_size=9),
    test=st.sampled_from([0.1, 0.3, 1, 3]),
    validation=st.sampled_from([0.0, 0.1, 2]),
    seed=st.integers(0, 2**40),
)
def test_every_owner_keeps_a_row_and_loses_a_fair_share(
    sizes: list[int], test: float, validation: float, seed: int
) -> None:
    owners = np.repeat(np.arange(len(sizes)), sizes)
    rows = len(owners)
    x, y = np.arange(rows, dtype=np.float32)[:, None], np.arange(rows) % 2
    held = [int(n) if n >= 1 else max(1, round(n * rows)) if n else 0 for n in (test, validation)]
    held[1] = int(validation) if validation >= 1 else max(1, round(validation * (rows - held[0]))) if validation else 0
    if rows < 3 or sum(held) > rows - len(sizes):
        return
    source = from_arrays(x, y, client=owners, test=test, validation=validation, seed=seed)
    disjoint(source, rows)
    assert [len(source.test), len(source.validation)] == held
    for part, whose in (
        (source.train, source.client_column),
        (source.validation, source.validation_clients),
        (source.test, source.test_clients),
    ):
        assert whose is not None
        assert whose.tolist() == owners[part.x[:, 0].long().numpy()].tolist()
    assert source.client_column is not None
    assert source.test_clients is not None
    assert torch.unique(source.client_column).tolist() == list(range(len(sizes)))
    lost = np.bincount(source.test_clients.numpy(), minlength=len(sizes))
    fair = (np.array(sizes) - 1) * held[0] / (rows - len(sizes))
    assert (np.abs(lost - fair) < 1).all()


def test_the_split_of_owners_keeps_their_classes() -> None:
    y = np.tile(np.repeat([0, 1], [80, 20]), 5)
    source = from_arrays(np.arange(500.0)[:, None], y, client=np.repeat(np.arange(5), 100), test=100, validation=0)
    assert source.test_clients is not None
    for owner in range(5):
        mine = source.test.y[source.test_clients == owner]
        assert 19 <= len(mine) <= 21
        assert 3 <= int(mine.sum()) <= 5


def test_more_than_owners_can_spare_is_refused() -> None:
    x, y = np.arange(10.0)[:, None], [0, 1] * 5
    refused(lambda: from_arrays(x, y, client=[0] * 5 + [1, 2, 3, 4, 5], test=5), "test=5", "6 owners", "at most 4")


def test_owners_of_all_parts_have_names() -> None:
    x, y = np.arange(12.0)[:, None], np.arange(12) % 2
    owners = np.array(["zoe", "amy", "bob"])[np.arange(12) % 3]
    source = from_arrays(x, y, client=owners, x_test=x[:4], y_test=y[:4], client_test=["amy", "carl", "zoe", "amy"])
    assert source.owner_names == ("amy", "bob", "zoe")
    assert source.test_clients is not None
    assert source.test_clients.tolist() == [0, -1, 2, 0]  # carl has no training rows
    alone = from_arrays(x, y, client=owners, x_test=x[:4], y_test=y[:4])
    assert alone.test_clients is None
    assert alone.validation_clients is not None
    few = {"x_test": x[:4], "y_test": y[:4], "client_test": ["amy"]}
    refused(lambda: from_arrays(x, y, client=owners, **few), "(1,)", "(4,)", "one owner per test row")


def test_16_bit_pictures_are_scaled_and_other_whole_numbers_are_not() -> None:
    y = [0, 1] * 10
    assert torch.all(from_arrays(np.full((20, 1, 3, 4), 13107, np.uint16), y).train.x == 0.2)
    assert from_arrays(np.full((20, 3), 13107, np.uint16), y).train.x.dtype == torch.int64


def test_the_account_says_what_was_used() -> None:
    x, y = np.zeros((50, 1, 4, 5)), ["a"] * 47 + ["b"] * 3
    source = from_arrays(x, y, client=np.arange(50) % 5, name="scans")
    assert source.account == (
        "scans: 50 rows (1x4x5) in 2 classes; 36 to train, 4 to validate, 10 to test; 5 owners; "
        f"the largest class, 'a', has {float((source.test.y == 0).float().mean()):.1%} of the test rows"
    )


def test_arrays_of_each_client() -> None:
    """A list of (x, y), or a dictionary of them by name, gives the same as all rows with their owners."""
    x, y = torch.randn(60, 3, dtype=torch.float64), torch.arange(60) % 2
    parts = [(x[:20], y[:20]), (x[20:], y[20:])]
    numbered = from_memory(parts, seed=3)
    wanted = from_arrays(x, y, client=np.repeat([0, 1], [20, 40]), seed=3)
    assert torch.equal(numbered.train.x, wanted.train.x)
    assert torch.equal(numbered.test.x, wanted.test.x)
    named = from_memory({"b": parts[0], "a": (parts[1][0].numpy(), parts[1][1].numpy())})
    assert list(named.owner_names) == ["a", "b"]
    refused(lambda: from_memory([parts[0], (x[:9, :2], y[:9])]), "client 1", "(9, 2)", "rows of one shape")
    refused(lambda: from_memory([parts[0], (x[:9], y[:8])]), "client 1", "(8,)", "as many of x as of y")
