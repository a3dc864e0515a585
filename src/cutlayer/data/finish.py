"""Makes a data set from the result of a reader: checks it, numbers labels from 0, splits it three ways, converts it to
tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cutlayer import seeds
from cutlayer.data.account import account
from cutlayer.data.conversion import Conversion
from cutlayer.data.lazy import Items
from cutlayer.data.samples import Samples, Source
from cutlayer.data.several import taken
from cutlayer.data.stratified import held_out
from cutlayer.data.targets import Targets, counting, encoded, words
from cutlayer.data.unsplit import Array, Raw, Section
from cutlayer.errors import ConfigError, DataError


def finished(
    raw: Raw,
    validation: float,
    test: float,
    seed: int,
    targets: Targets = "class",
    ignored: int | None = None,
    test_seed: int | None = None,
) -> Source:
    """Check, split and convert the result of a reader. Rows of the class `ignored` are left out. `seed` draws the
    held-out rows; if there is a `test_seed`, it draws the test rows.
    """
    _check(raw)
    raw = counting(raw, ignored) if targets == "class" else raw
    y, class_names = encoded(raw, targets)
    if targets == "class" and len(np.unique(y["train"])) < 2:
        _refuse_single(raw, class_names[int(y["train"][0])])
    owners, names = _owners(raw)
    rows = np.arange(len(y["train"]))
    held: dict[str, npt.NDArray[np.int64]] = {}
    for part, size in (("test", test), ("validation", validation)):
        if part in y:
            continue
        if part == "test" and size == 0:
            raise ConfigError(f"test=0 leaves {raw.name} without a test set: hold some samples out, such as test=0.2")
        count = _count(size, part, len(rows))
        classes = y["train"] if targets == "class" else None
        drawn = seed if part != "test" or test_seed is None else test_seed
        if "train" in owners:
            rows, held[part] = _split_owned(rows, classes, owners["train"], count, f"{part}={size}", drawn)
        else:
            rows, held[part] = _split(rows, classes, count, seeds.derive(drawn, "split", part))
    convert = Conversion.of(raw, rows)

    def samples(part: str) -> Samples:
        if part in y and part != "train":
            return _samples(raw, part, convert, raw.parts()[part].x, y[part])
        at = rows if part == "train" else held[part]
        return _samples(raw, "train", convert, raw.train.x[at], y["train"][at])

    def whose(part: str) -> Tensor | None:
        if part in owners and part != "train":
            return torch.from_numpy(owners[part])
        if "train" not in owners or (part in y and part != "train"):
            return None
        return torch.from_numpy(owners["train"][rows if part == "train" else held[part]])

    source = Source(
        raw.name,
        samples("train"),
        samples("validation"),
        samples("test"),
        class_names,
        whose("train"),
        owner_names=names,
        validation_clients=whose("validation"),
        test_clients=whose("test"),
        preprocessing=_preprocessing(raw, convert, class_names),
        cited=raw.cited,
        test_drawn="test" in held,
    )
    return dataclasses.replace(source, account=account(raw, source))


def finished_whole(raw: Raw, targets: Targets = "class", ignored: int | None = None) -> Source:
    """Check and convert the result of a reader, without holding out rows, except for its own test part. Data of one
    class need class names.
    """
    _check(raw)
    raw = counting(raw, ignored) if targets == "class" else raw
    y, class_names = encoded(raw, targets)
    if targets == "class" and len(class_names) < 2:
        raise DataError(
            f"{raw.name} has one class only, {class_names[0]}: name all classes of the run, in order, with class_names"
        )
    convert = Conversion.of(raw, np.arange(len(y["train"])))
    whole = _samples(raw, "train", convert, raw.train.x, y["train"])
    test = _samples(raw, "test", convert, raw.test.x, y["test"]) if raw.test is not None else whole[:0]
    preprocessing = _preprocessing(raw, convert, class_names)
    source = Source(raw.name, whole, whole[:0], test, class_names, preprocessing=preprocessing, cited=raw.cited)
    return dataclasses.replace(source, account=account(raw, source))


def _samples(raw: Raw, part: str, convert: Conversion, x: Array, y: Array) -> Samples:
    """The samples with inputs `x` of a part (or their numbers, if the part is read lazily) and targets `y`."""
    several, targets = raw.several.get(part), torch.from_numpy(y)
    if isinstance(several, Items):
        return several.samples(part, torch.from_numpy(x[:, 0]), targets)
    return Samples(taken(several, x) if several is not None else convert(x), targets)


def _preprocessing(raw: Raw, convert: Conversion, class_names: tuple[str, ...]) -> dict[str, Any]:
    """The conversion of new rows, in plain values."""
    shape = list(raw.train.x.shape[1:])
    if isinstance(items := raw.several.get("train"), Items) and items.convert is not None:
        shape, convert = items.shape, items.convert
    return {**raw.recipe, "shape": shape, "conversion": convert.plain(), "class_names": list(class_names)}


def _refuse_single(raw: Raw, name: str) -> NoReturn:
    raise DataError(f"{raw.name} has one class only, {name}: classification needs at least two")


def named(raw: Raw, class_names: Sequence[str]) -> Raw:
    """The same with labels numbered by `class_names`. Raises DataError for a label that they lack."""
    numbers = {name: number for number, name in enumerate(class_names)}
    if len(numbers) < max(2, len(class_names)):
        raise ConfigError(f"class_names = {list(class_names)}: name at least two, each once")

    def counted(part: Section | None) -> Section | None:
        if part is None:
            return None
        labels = words(part.y, f"labels of {raw.name}").tolist()
        own = raw.class_names
        heard = [own[w] if own else w.decode() if isinstance(w, bytes) else str(w) for w in labels]
        if unheard := sorted(set(heard) - set(numbers)):
            raise DataError(
                f"{raw.name} has the label {unheard[0]!r}, which is not in class_names = {list(class_names)}: correct "
                "one of them"
            )
        return dataclasses.replace(part, y=np.array([numbers[w] for w in heard]))

    train = counted(raw.train)
    assert train is not None
    validation, test = counted(raw.validation), counted(raw.test)
    return dataclasses.replace(raw, train=train, validation=validation, test=test, class_names=tuple(class_names))


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
        _check_numbers(samples.x, where, raw.columns, missing=raw.impute is not None)
    for part, owner in raw.owners().items():
        rows = raw.parts()[part].y.shape[:1] if part in raw.parts() else (0,)
        if owner.shape != rows:
            which = "training" if part == "train" else part
            raise DataError(
                f"the client column of {raw.name} has shape {owner.shape}, expected {rows}: give one owner per {which} "
                "row"
            )


def _check_numbers(x: Array, where: str, columns: tuple[str, ...], *, missing: bool) -> None:
    if x.dtype.kind not in "fiub":
        raise DataError(f"the inputs of {where} are of type {x.dtype}: give integers or real numbers")
    if x.dtype.kind != "f":
        return
    with np.errstate(over="ignore"):  # overflow in float32 is reported below
        single = x.astype(np.float32, copy=False)
        bad = np.isinf(single) if missing else ~np.isfinite(single)
    if bad.any():
        first = [int(at) for at in np.unravel_index(int(bad.argmax()), x.shape)]
        at = f"column {columns[first[1]]!r}" if columns else f"position {tuple(first[1:])}"
        raise DataError(
            f"the inputs of {where} have {int(bad.sum())} values that are NaN or infinite (in float32), the first in "
            f"row {first[0]} (from 0), {at}: fill them in or remove those rows"
        )


def _count(size: float, option: str, rows: int) -> int:
    """The number of samples, of `rows`, that the fraction or number `size` means."""
    if not size >= 0 or (size >= 1 and size != int(min(size, 2**62))):
        raise ConfigError(f"{option}={size} is neither a fraction below 1 nor a whole number of samples: fix it")
    count = int(size) if size >= 1 else round(size * rows)
    if size > 0:
        count = max(count, 1)
    if count >= rows:
        raise DataError(f"{option}={size} holds out {count} of {rows} samples and leaves none to train on: lower it")
    return count


def _split(
    rows: npt.NDArray[np.int64], y: npt.NDArray[np.int64] | None, count: int, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """`rows` in two, both ascending: the kept ones, and `count` held out. `y` are the classes of all samples, if they
    have some, whose shares are kept.
    """
    if count == 0:
        return rows, rows[:0]
    at = held_out(len(rows), count, None if y is None else y[rows], seed % 2**32)  # a state has 32 bits
    held = np.zeros(len(rows), bool)
    held[at] = True
    return rows[~held], rows[held]


def _split_owned(
    rows: npt.NDArray[np.int64],
    y: npt.NDArray[np.int64] | None,
    owners: npt.NDArray[np.int64],
    count: int,
    size: str,
    seed: int,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """`rows` in two, both ascending: the kept ones, and `count` held out, of each owner and each class in proportion.

    Every owner keeps a row to train on, the same one in every split. `y` (the classes, if there are some) and `owners`
    are those of all samples.
    """
    if count == 0:
        return rows, rows[:0]
    order = seeds.generator(seed, "split", "owners").permutation(len(owners))[
        rows
    ]  # of all samples: the same in all splits
    _, first = np.unique(owners[rows[np.argsort(order)]], return_index=True)
    pool = np.delete(np.argsort(order), first)  # places in `rows`
    if count > len(pool):
        raise DataError(
            f"{size} holds out {count} of {len(rows)} samples, but each of the {len(first)} owners keeps one to train "
            f"on: hold out at most {len(pool)}"
        )
    drawn = seeds.generator(seed, "split", size.partition("=")[0])
    pool = drawn.permutation(pool)
    keys = (owners[rows[pool]],) if y is None else (y[rows[pool]], owners[rows[pool]])
    pool = pool[np.lexsort(keys)]  # stable: equal ones stay shuffled
    at = ((np.arange(count) + drawn.random()) * len(pool) / count).astype(np.int64)  # evenly over owners and classes
    held = np.zeros(len(rows), bool)
    held[pool[at]] = True
    return rows[~held], rows[held]


def _owners(raw: Raw) -> tuple[dict[str, npt.NDArray[np.int64]], tuple[str, ...]]:
    """For each part whose owners are known the owner of every row, and the owners' names. A number is the rank of a
    name among the owners of training rows; -1 stands for an owner who has none.
    """
    found = {part: words(owner, f"client column of {raw.name}") for part, owner in raw.owners().items()}
    if "train" not in found:
        return {}, ()
    if len({value.dtype.kind in "UST" for value in found.values()}) > 1:
        found = {part: values.astype(np.str_) for part, values in found.items()}
    present = np.unique(found["train"])
    numbers = {}
    for part, values in found.items():
        rank = np.minimum(np.searchsorted(present, values), len(present) - 1)
        numbers[part] = np.where(present[rank] == values, rank, -1).astype(np.int64)
    return numbers, tuple(value.decode() if isinstance(value, bytes) else str(value) for value in present)
