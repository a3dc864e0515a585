"""The meaning of targets: classes by name, classes by number, or quantities; and checks of which of these they look
like.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from cutlayer.data.samples import Samples, Source
from cutlayer.data.unsplit import Array, Raw, Section
from cutlayer.errors import DataError

Targets = Literal["class", "classes", "numbers"]
"""One class per row, which may have a name; integers of any shape, taken as they are; numbers."""

_USUAL = -100  # used by libraries for a target that does not count
_MANY = 20  # classes: this many with few rows each are a sign of a quantity
_ROWS_PER_CLASS = 4


def encoded(raw: Raw, targets: Targets) -> tuple[dict[str, Array], tuple[str, ...]]:
    """The targets of every part, and the names of the K classes, if any: classes as their ranks 0..K-1 among all
    labels, other integers unchanged (int64), numbers as float32. Raises DataError.
    """
    if targets == "class":
        return _ranks(raw)
    if targets == "numbers" and raw.class_names:
        raise refused_classes(raw.name, raw.class_names)
    change = _integers if targets == "classes" else _numbers
    parts = {part: change(section.y, raw.name) for part, section in raw.parts().items()}
    for part, values in parts.items():
        if values.shape[1:] != parts["train"].shape[1:]:
            raise DataError(
                f"the targets of the {part} part of {raw.name} have shape {values.shape[1:]}, those of the training "
                f"part {parts['train'].shape[1:]}: make them equal"
            )
    return parts, raw.class_names or ()


def _ranks(raw: Raw) -> tuple[dict[str, Array], tuple[str, ...]]:
    """The labels of every part as 0..K-1, and the names of the K classes."""
    found = {part: words(samples.y, f"labels of {raw.name}") for part, samples in raw.parts().items()}
    kinds = {values.dtype.kind in "UST" for values in found.values()}
    if len(kinds) > 1:
        raise DataError(f"the labels of {raw.name} are integers in one part and strings in another: use one kind")
    present = np.unique(np.concatenate(list(found.values())))
    if raw.class_names is not None:
        last = len(raw.class_names) - 1
        if present[0] < 0 or present[-1] > last:
            raise DataError(f"{raw.name} has labels {present[0]} to {present[-1]}, expected 0 to {last}: fix them")
        return {part: values.astype(np.int64) for part, values in found.items()}, raw.class_names
    _refuse_quantity(raw, found["train"], len(present))
    ranks = {part: np.searchsorted(present, values).astype(np.int64) for part, values in found.items()}
    return ranks, tuple(value.decode() if isinstance(value, bytes) else str(value) for value in present)


def words(values: Array, what: str) -> Array:
    """`values` [n] as integers or strings, so that they can be sorted. Raises DataError if they are neither."""
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1:
        raise DataError(f"the {what} have shape {values.shape}, expected [n]: for one-hot labels pass their argmax(1)")
    if values.dtype.kind == "f":
        odd = values[~(np.isfinite(values) & (values == np.round(values)))]
        if len(odd):
            raise DataError(
                f"the {what} hold {odd[0]}, which is not a class: use integers or strings; for a quantity choose "
                "--task regression"
            )
        return values.astype(np.int64)
    if values.dtype.kind == "O" and all(isinstance(value, str) for value in values):
        return values.astype(np.str_)
    if values.dtype.kind not in "biuUST":
        raise DataError(f"the {what} are of type {values.dtype}: use integers or strings")
    return values


def counting(raw: Raw, ignored: int | None) -> Raw:
    """The same without the rows whose label says that they do not count. Raises DataError if there are such rows
    without the option for them.
    """
    keep = {part: _counts(section.y, _USUAL if ignored is None else ignored) for part, section in raw.parts().items()}
    left_out = sum(int((~mask).sum()) for mask in keep.values())
    if not left_out:
        return raw
    if ignored is None:
        raise DataError(
            f"{left_out} rows of {raw.name} have the label {_USUAL}, which usually marks rows that do not count: leave "
            f"them out with ignore_index = {_USUAL}, or give class_names"
        )
    owners = {"train": "client", "validation": "validation_client", "test": "test_client"}
    changes: dict[str, Any] = {
        part: Section(section.x[keep[part]], section.y[keep[part]]) for part, section in raw.parts().items()
    }
    changes |= {owners[part]: owner[keep[part]] for part, owner in raw.owners().items()}
    remark = f"left out {left_out} rows with the label {ignored}"
    return dataclasses.replace(raw, **changes, remarks=(*raw.remarks, remark))


def _counts(labels: Array, ignored: int) -> npt.NDArray[np.bool_]:
    numbers = labels.ndim == 1 and labels.dtype.kind in "iuf"
    return labels != ignored if numbers else np.ones(len(labels), bool)


def as_indices(source: Source, width: int) -> Source:
    """The same with integer labels as class numbers, if a model with `width` scores has all of them: labels 1, 3 and 7
    of ten are these classes, and not the first three. Other integers stay names, and the account says which classes
    they become.
    """
    names = source.class_names
    if not all(name.lstrip("-").isdecimal() and str(int(name)) == name for name in names):
        return source
    labels = [int(name) for name in names]
    if labels == list(range(len(labels))):
        return source
    shown = f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
    if min(labels) < 0 or max(labels) >= width:
        return _told(source, f"the labels {shown} become the classes 0 to {len(names) - 1}")
    numbers = torch.tensor(labels)

    def renamed(samples: Samples) -> Samples:
        return dataclasses.replace(samples, y=numbers[samples.y])

    told = _told(source, f"the labels {shown} are taken as classes of the model's {width}")
    return dataclasses.replace(
        told,
        train=renamed(source.train),
        validation=renamed(source.validation),
        test=renamed(source.test),
        class_names=tuple(map(str, range(width))),
    )


def _told(source: Source, remark: str) -> Source:
    return dataclasses.replace(source, account="; ".join(filter(None, (source.account, remark))))


def fitting(source: Source, targets: Targets) -> Source:
    """The same source, if its targets suit the task. Raises DataError."""
    y = source.train.y
    if targets == "class" and not (source.class_names and y.dim() == 1 and not y.is_floating_point()):
        raise DataError(
            f"the targets of {source.name} are not named classes, one per row, but {y.dtype} of shape "
            f"{tuple(y.shape)}: give class_names, or choose another task"
        )
    if targets == "classes" and y.is_floating_point():
        raise DataError(f"the targets of {source.name} are {y.dtype}, but this task needs integers: give classes")
    if targets == "numbers" and source.class_names:
        raise refused_classes(source.name, source.class_names)
    if targets == "numbers" and not y.is_floating_point():
        raise DataError(f"the targets of {source.name} are {y.dtype}, but this task needs real numbers: convert them")
    return source


def refused_classes(name: str, class_names: tuple[str, ...]) -> DataError:
    """Why named classes cannot be targets of a task that needs numbers."""
    return DataError(
        f"the targets of {name} are classes ({', '.join(class_names[:3])}{', ...' if len(class_names) > 3 else ''}), "
        "but this task needs numbers: choose --task classification"
    )


def _refuse_quantity(raw: Raw, labels: Array, classes: int) -> None:
    """Raises DataError if the labels look like measurements: numbers, most of them rare."""
    if labels.dtype.kind in "iuf" and classes > _MANY and classes * _ROWS_PER_CLASS > len(labels):
        raise DataError(
            f"the labels of {raw.name} take {classes} different values in {len(labels)} rows, from {labels.min()} to "
            f"{labels.max()}: for a quantity choose --task regression; if they do name classes, give class_names"
        )


def _integers(values: Array, name: str) -> Array:
    if values.dtype.kind == "f" and np.isfinite(values).all() and (values == np.round(values)).all():
        values = values.astype(np.int64)
    if values.dtype.kind not in "biu":
        raise DataError(
            f"the targets of {name} are of type {values.dtype}: this task needs integers, one class for each place"
        )
    return values.astype(np.int64)


def _numbers(values: Array, name: str) -> Array:
    if values.dtype.kind == "O":
        values = _as_floats(values)
    if values.dtype.kind not in "biuf":
        raise DataError(
            f"the targets of {name} are of type {values.dtype}: this task needs numbers; for names choose --task "
            "classification"
        )
    with np.errstate(over="ignore"):  # overflow in float32 is reported below
        found = values.astype(np.float32)
    if not np.isfinite(found).all():
        row = int(np.argwhere(~np.isfinite(found))[0][0])
        raise DataError(
            f"the targets of {name} are NaN or infinite (in float32) in row {row} (from 0): fill them in or remove "
            "those rows"
        )
    return found


def _as_floats(values: Any) -> Array:
    try:
        return np.asarray(values, np.float64)
    except (TypeError, ValueError):
        return np.asarray(values, np.str_)
