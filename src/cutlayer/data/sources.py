"""Data sets by name, from disk, or from memory; checked, split three ways, and converted to tensors.

What happens to the inputs, whatever their source:
- 8-bit inputs are scaled to [0, 1]; idx files (Fashion-MNIST too) to [-1, 1], as (x/255 - .5)/.5;
- floating point inputs and booleans become float32 and are otherwise taken as they are;
- other integers stay integers (int64): they are tokens;
- the columns of a table (CSV, or numeric columns of a Hugging Face data set) are standardised by the mean and the
  standard deviation of the training part; a column that is constant there becomes 0.

What happens to the labels: integers or words are mapped to their rank 0..K-1 among all labels, and keep their names.

How it is split: a test set that the data bring is used, and `test` then ignored; the same for a validation set.
Otherwise `test` is taken from everything, then `validation` from what remains; each is a fraction below 1 or a whole
number of samples. Splits keep the shares of the classes, if every class is large enough for that.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cutlayer import seeds
from cutlayer.catalog import DATA_FORMATS, DATASETS
from cutlayer.data import formats
from cutlayer.data.formats import Array, Part, Raw
from cutlayer.data.samples import Samples, Source
from cutlayer.errors import ConfigError, DataError, unknown

ArrayOrTensor = npt.ArrayLike | Tensor

FASHION_MNIST_FOLDER = "/usr/share/datasets/fashion-mnist"
"""Where Debian's package puts the files; the environment variable CUTLAYER_FASHION_MNIST names another folder."""

FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def load(
    data: str,
    *,
    data_format: str = "auto",
    label_column: str = "label",
    client_column: str | None = None,
    class_names: Sequence[str] = (),
    validation: float = 0.1,
    test: float = 0.2,
    seed: int = 0,
) -> Source:
    """Load a built-in data set (`catalog.DATASETS`) or a path in one of the formats of `catalog.DATA_FORMATS`.

    `label_column` and `client_column` name columns of CSV and Hugging Face data; an .npz file has its owners in an
    array `client` (or `client_train`). `class_names`: all labels in order, where the data may lack some. Inputs come as
    [n, ...]: pictures [n, c, h, w], tables [n, columns].

    Raises DataError if the data are missing, damaged, or not fit for classification; ConfigError if an option is out
    of range or has no effect on these data.
    """
    return _source(_read(data, data_format, label_column, client_column, class_names), validation, test, seed)


def load_whole(
    data: str, *, data_format: str = "auto", label_column: str = "label", class_names: Sequence[str] = ()
) -> Source:
    """The same with nothing held out, and without what the data bring to test with: what a client trains on, alone.

    Data of one class need `class_names`. Raises DataError and ConfigError as `load` does.
    """
    raw = dataclasses.replace(_read(data, data_format, label_column, None, class_names), test=None, validation=None)
    _check(raw)
    y, class_names = _encode(raw)
    if len(class_names) < 2:
        _refuse_single(raw, class_names[0])
    x = _Converter(raw, np.arange(len(y["train"])))(raw.train.x)
    whole = Samples(x, torch.from_numpy(y["train"]))
    return Source(raw.name, whole, whole[:0], whole[:0], class_names)


def _refuse_single(raw: Raw, name: str) -> NoReturn:
    raise DataError(f"{raw.name} has one class only, {name}: classification needs at least two")


def _read(data: str, data_format: str, label_column: str, client_column: str | None, class_names: Sequence[str]) -> Raw:
    """What a reader finds. Raises DataError, ConfigError."""
    if data_format not in ("auto", *DATA_FORMATS):
        raise ConfigError(unknown("data_format", data_format, ["auto", *DATA_FORMATS]))
    path = Path(data).expanduser()
    if data in DATASETS:
        what = f"the built-in data set {data!r}"
        _no_effect(data_format != "auto", f"data_format={data_format!r}", what)
    elif path.exists():
        data_format = formats.detect(path) if data_format == "auto" else data_format
        what = f"data of the format {data_format!r}"
    else:
        raise DataError(f"{unknown('data set', data, DATASETS)}; nor is there a file or folder of that path")
    if data_format not in ("csv", "huggingface"):
        _no_effect(label_column != "label", f"label_column={label_column!r}", what)
        _no_effect(client_column is not None, f"client_column={client_column!r}", what)
    try:
        raw = _BUILT_IN[data]() if data in DATASETS else formats.READERS[data_format](path, label_column, client_column)
    except OSError as error:
        reason = f"{error.strerror or error} ({error.filename})"
        raise DataError(f"{data!r} cannot be read as {what}: {reason}; name another data_format or path") from None
    return _named(raw, class_names) if class_names else raw


def _named(raw: Raw, class_names: Sequence[str]) -> Raw:
    """The same with labels counted as `class_names` name them. Raises DataError for a label that they lack."""
    numbers = {name: number for number, name in enumerate(class_names)}
    if len(numbers) < max(2, len(class_names)):
        raise ConfigError(f"class_names = {list(class_names)}: name at least two, each once")

    def counted(part: Part | None) -> Part | None:
        if part is None:
            return None
        labels = _words(part.y, f"labels of {raw.name}").tolist()
        own = raw.class_names
        words = [own[w] if own else w.decode() if isinstance(w, bytes) else str(w) for w in labels]
        if unheard := sorted(set(words) - set(numbers)):
            raise DataError(
                f"{raw.name} has the label {unheard[0]!r}, which is none of class_names = {list(class_names)}: mend one"
            )
        return dataclasses.replace(part, y=np.array([numbers[w] for w in words]))

    train = counted(raw.train)
    assert train is not None
    validation, test = counted(raw.validation), counted(raw.test)
    return dataclasses.replace(raw, train=train, validation=validation, test=test, class_names=tuple(class_names))


def from_arrays(
    x: ArrayOrTensor,
    y: ArrayOrTensor,
    *,
    x_test: ArrayOrTensor | None = None,
    y_test: ArrayOrTensor | None = None,
    client: ArrayOrTensor | None = None,
    validation: float = 0.1,
    test: float = 0.2,
    seed: int = 0,
    name: str = "arrays",
) -> Source:
    """Inputs `x` [n, ...] and labels `y` [n] from memory; the axes stay as they are.

    `x_test`, `y_test`: the test set (`test` is then ignored). `client` [n]: whose sample each row of `x` is.
    Raises DataError and ConfigError as `load` does.
    """
    if (x_test is None) != (y_test is None):
        given, absent = ("x_test", "y_test") if y_test is None else ("y_test", "x_test")
        raise DataError(f"{given} is given without {absent}: pass both or neither")
    tested = None if x_test is None or y_test is None else Part(_array(x_test), _array(y_test))
    owners = None if client is None else _array(client)
    return _source(Raw(name, Part(_array(x), _array(y)), test=tested, client=owners), validation, test, seed)


def from_dataset(
    dataset: Any,
    *,
    test_dataset: Any = None,
    label_column: str = "label",
    client_column: str | None = None,
    validation: float = 0.1,
    test: float = 0.2,
    seed: int = 0,
    name: str = "dataset",
) -> Source:
    """A map-style `torch.utils.data.Dataset` of pairs (x, label), or a local `datasets.Dataset` (or DatasetDict).

    x may be a tensor, an array, a number, or a picture (PIL). All items are read once, and kept in memory.
    `test_dataset`, of the same kind: the test set (`test` is then ignored). `label_column` and `client_column` are of
    `datasets.Dataset` only. Raises DataError and ConfigError as `load` does.
    """
    hugging = sys.modules.get("datasets")  # whoever holds such a data set has imported the package
    if hugging is not None and isinstance(dataset, hugging.Dataset | hugging.DatasetDict):
        splits = dict(dataset) if isinstance(dataset, dict) else {"train": dataset}
        if test_dataset is not None:
            splits["test"] = test_dataset
        return _source(formats.from_huggingface(splits, name, label_column, client_column), validation, test, seed)
    _no_effect(label_column != "label", f"label_column={label_column!r}", "a data set of pairs (x, label)")
    _no_effect(client_column is not None, f"client_column={client_column!r}", "a data set of pairs (x, label)")
    tested = None if test_dataset is None else formats.from_pairs(test_dataset, "test data set")
    return _source(Raw(name, formats.from_pairs(dataset, "data set"), test=tested), validation, test, seed)


def _no_effect(given: bool, option: str, what: str) -> None:
    if given:
        raise ConfigError(f"{option} has no effect on {what}: leave it out")


def _array(values: ArrayOrTensor) -> Array:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


# --- built-in ----------------------------------------------------------------------------------------------------


def _digits() -> Raw:
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    bundled = load_digits()
    x = (bundled.images / 16).astype(np.float32)[:, None]  # [n, 1, 8, 8]
    return Raw("digits", Part(x, bundled.target))


def _fashion_mnist() -> Raw:
    folder = Path(os.environ.get("CUTLAYER_FASHION_MNIST") or FASHION_MNIST_FOLDER).expanduser()
    if not folder.is_dir():
        raise DataError(
            f"Fashion-MNIST is not in {str(folder)!r}: `apt-get install dataset-fashion-mnist` on Debian, or name a "
            "folder with the four idx files (as data, or in the environment variable CUTLAYER_FASHION_MNIST)"
        )
    return dataclasses.replace(formats.read_idx(folder), name="fashion-mnist", class_names=FASHION_MNIST_CLASSES)


_BUILT_IN = {"digits": _digits, "fashion-mnist": _fashion_mnist}


# --- checks ------------------------------------------------------------------------------------------------------


def _check(raw: Raw) -> None:
    for part, samples in raw.parts().items():
        where = raw.name if part == "train" else f"the {part} part of {raw.name}"
        if samples.x.ndim == 0 or samples.y.ndim == 0:
            raise DataError(f"the inputs and labels of {where} are single values: give x [n, ...] and y [n]")
        if len(samples.x) != len(samples.y):
            raise DataError(f"{where} has {len(samples.x)} inputs but {len(samples.y)} labels: give one label each")
        if len(samples.y) == 0:
            raise DataError(f"{where} has no rows: add samples")
        if samples.x.shape[1:] != raw.train.x.shape[1:]:
            raise DataError(
                f"the inputs of {where} have shape {samples.x.shape[1:]}, those of the training part "
                f"{raw.train.x.shape[1:]}: make them equal"
            )
        if samples.x.ndim == 1 or 0 in samples.x.shape:
            raise DataError(f"the inputs of {where} have shape {samples.x.shape}: give at least one feature, x [n, d]")
        _check_numbers(samples.x, where, raw.columns)
    if raw.client is not None and raw.client.shape != raw.train.y.shape[:1]:
        raise DataError(
            f"the client column of {raw.name} has shape {raw.client.shape}, expected ({len(raw.train.y)},): give one "
            "owner per training row"
        )


def _check_numbers(x: Array, where: str, columns: tuple[str, ...]) -> None:
    if x.dtype.kind not in "fiub":
        raise DataError(f"the inputs of {where} are of type {x.dtype}: give integers or real numbers")
    if x.dtype.kind != "f":
        return
    with np.errstate(over="ignore"):  # what overflows in float32 is reported below
        bad = ~np.isfinite(x.astype(np.float32, copy=False))
    if bad.any():
        first = [int(at) for at in np.unravel_index(int(bad.argmax()), x.shape)]
        at = f"column {columns[first[1]]!r}" if columns else f"position {tuple(first[1:])}"
        raise DataError(
            f"the inputs of {where} have {int(bad.sum())} values that are NaN or infinite (in float32), the first in "
            f"row {first[0]} (from 0), {at}: fill them in or remove those rows"
        )


def _words(values: Array, what: str) -> Array:
    """`values` [n] as integers or strings, so that they can be sorted. Raises DataError if they are neither."""
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1:
        raise DataError(f"the {what} have shape {values.shape}, expected [n]: for one-hot labels pass their argmax(1)")
    if values.dtype.kind == "f":
        odd = values[~(np.isfinite(values) & (values == np.round(values)))]
        if len(odd):
            raise DataError(f"the {what} hold {odd[0]}, which names nothing: use integers or strings")
        return values.astype(np.int64)
    if values.dtype.kind == "O" and all(isinstance(value, str) for value in values):
        return values.astype(np.str_)
    if values.dtype.kind not in "biuUST":
        raise DataError(f"the {what} are of type {values.dtype}: use integers or strings")
    return values


def _encode(raw: Raw) -> tuple[dict[str, npt.NDArray[np.int64]], tuple[str, ...]]:
    """The labels of every part as 0..K-1, and the names of the K classes."""
    words = {part: _words(samples.y, f"labels of {raw.name}") for part, samples in raw.parts().items()}
    kinds = {values.dtype.kind in "UST" for values in words.values()}
    if len(kinds) > 1:
        raise DataError(f"the labels of {raw.name} are integers in one part and strings in another: use one kind")
    present = np.unique(np.concatenate(list(words.values())))
    if raw.class_names is not None:
        last = len(raw.class_names) - 1
        if present[0] < 0 or present[-1] > last:
            raise DataError(f"{raw.name} has labels {present[0]} to {present[-1]}, expected 0 to {last}: mend them")
        return {part: values.astype(np.int64) for part, values in words.items()}, raw.class_names
    ranks = {part: np.searchsorted(present, values).astype(np.int64) for part, values in words.items()}
    return ranks, tuple(value.decode() if isinstance(value, bytes) else str(value) for value in present)


# --- splits ------------------------------------------------------------------------------------------------------


def _count(size: float, option: str, rows: int) -> int:
    """How many of `rows` samples the fraction or number `size` stands for."""
    if not size >= 0 or (size >= 1 and size != int(min(size, 2**62))):
        raise ConfigError(f"{option}={size} is neither a fraction below 1 nor a whole number of samples: mend it")
    count = int(size) if size >= 1 else round(size * rows)
    if size > 0:
        count = max(count, 1)
    if count >= rows:
        raise DataError(f"{option}={size} holds out {count} of {rows} samples and leaves none to train on: lower it")
    return count


def _split(
    rows: npt.NDArray[np.int64], y: npt.NDArray[np.int64], count: int, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """`rows` in two, both ascending: the kept ones, and `count` held out. `y` are the labels of all samples."""
    if count == 0:
        return rows, rows[:0]
    from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]

    state = seed % 2**32  # scikit-learn takes 32 bits
    try:
        kept, held = train_test_split(rows, test_size=count, random_state=state, stratify=y[rows])
    except ValueError:  # a class has too few samples to be in both halves
        kept, held = train_test_split(rows, test_size=count, random_state=state)
    return np.sort(kept), np.sort(held)


def _source(raw: Raw, validation: float, test: float, seed: int) -> Source:
    """Check, split and convert what a reader found."""
    _check(raw)
    y, class_names = _encode(raw)
    if len(np.unique(y["train"])) < 2:
        _refuse_single(raw, class_names[int(y["train"][0])])
    rows = np.arange(len(y["train"]))
    held: dict[str, npt.NDArray[np.int64]] = {}
    for part, size in (("test", test), ("validation", validation)):
        if part in y:
            continue
        if part == "test" and size == 0:
            raise ConfigError(f"test=0 leaves {raw.name} without a test set: hold some samples out, such as test=.2")
        count = _count(size, part, len(rows))
        rows, held[part] = _split(rows, y["train"], count, seeds.derive(seed, "split", part))
    to_tensor = _Converter(raw, rows)

    def samples(part: str) -> Samples:
        if part in y and part != "train":
            own = raw.parts()[part]
            return Samples(to_tensor(own.x), torch.from_numpy(y[part]))
        at = rows if part == "train" else held[part]
        return Samples(to_tensor(raw.train.x[at]), torch.from_numpy(y["train"][at]))

    return Source(raw.name, samples("train"), samples("validation"), samples("test"), class_names, _owners(raw, rows))


def _owners(raw: Raw, rows: npt.NDArray[np.int64]) -> Tensor | None:
    """The owner 0..K-1 of each training row: the rank of its name among the owners that training rows have."""
    if raw.client is None:
        return None
    names = _words(raw.client, f"client column of {raw.name}")[rows]
    return torch.from_numpy(np.unique(names, return_inverse=True)[1].astype(np.int64))


class _Converter:
    """From arrays [n, ...] to tensors, as the top of this file says. A table's mean and deviation are of `rows`."""

    def __init__(self, raw: Raw, rows: npt.NDArray[np.int64]) -> None:
        self.symmetric = raw.symmetric
        self.mean: Array | None = None
        if raw.columns:
            train = raw.train.x[rows].astype(np.float64)  # [n, columns]
            self.mean, self.std = train.mean(0), train.std(0)
            # The mean and deviation of a constant column carry rounding errors, which the division would blow up.
            constant = train.min(0) == train.max(0)
            self.mean[constant], self.std[constant] = train[0, constant], 1

    def __call__(self, x: Array) -> Tensor:
        if self.mean is not None:
            return torch.from_numpy(((x - self.mean) / self.std).astype(np.float32))
        if x.dtype == np.uint8:
            unit = torch.from_numpy(x.astype(np.float32, order="C")).div_(255)
            return unit.sub_(0.5).div_(0.5) if self.symmetric else unit
        wanted = np.float32 if x.dtype.kind in "fb" else np.int64
        return torch.from_numpy(np.array(x, dtype=wanted, order="C"))  # a copy: the caller keeps theirs
