"""Data sets that are not in memory: items are read again for each batch, by the processes of torch's DataLoader during
the training on earlier batches, or by this process.

The items of a batch, and the draws of random transforms for an item, depend on the run's seed, the epoch and the row.
So they are the same with any number of worker processes, on every engine, and after an interruption.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from cutlayer import seeds
from cutlayer.data.ahead import ReadAhead
from cutlayer.data.arrays import as_array
from cutlayer.data.conversion import Conversion, divisor
from cutlayer.data.formats._pictures import one_picture, stack_pictures
from cutlayer.data.own import own_code
from cutlayer.data.samples import Inputs, Samples, inputs_of
from cutlayer.data.several import numbered, stacked, taken
from cutlayer.data.unsplit import Array
from cutlayer.errors import CutlayerError, DataError
from cutlayer.types import Rows

InMemory = Literal["auto", "always", "never"]
"""Whether all items are read once and kept; auto: if they fit."""

_SHARE = 4  # the share of the free memory that all items may take
_LABELS = 64  # items whose labels a worker reads at a time
_STILL = -1  # the epoch for reading outside of training


@dataclass(frozen=True)
class ItemReading:
    """How the items of data sets are read: whether all are kept `in_memory`, and how many `workers` (processes) read
    those that are not. `seed` names the draws of random transforms.
    """

    in_memory: InMemory = "always"
    workers: int = 0
    seed: int = 0


class _Wanted(NamedTuple):
    """Items of a part: `rows` and `epochs` are the bytes of int64 [R]. Also whether their labels are requested, or
    their inputs.
    """

    part: str
    rows: bytes
    epochs: bytes
    labels: bool = False

    @classmethod
    def of(cls, part: str, rows: np.ndarray, epochs: np.ndarray | None, *, labels: bool = False) -> _Wanted:
        """The `rows` [R] as they are in `epochs` [R] (None: out of training)."""
        often = np.full(len(rows), _STILL) if epochs is None else epochs
        return cls(part, rows.astype(np.int64).tobytes(), often.astype(np.int64).tobytes(), labels)

    @property
    def items(self) -> list[tuple[int, int]]:
        """(row, epoch) of each."""
        rows, epochs = (np.frombuffer(numbers, np.int64).tolist() for numbers in (self.rows, self.epochs))
        return list(zip(rows, epochs, strict=True))


@dataclass(frozen=True)
class _Refused:
    """An error in a worker process, in the form that is sent to this one."""

    kind: type[CutlayerError]
    sentence: str


class _Fetch:
    """Reads items, in this process or in a worker."""

    def __init__(self, parts: Mapping[str, Any], seed: int) -> None:
        self.parts, self.seed = parts, seed
        self.tensors: Callable[[Sequence[Any], Sequence[str]], Inputs] | None = None

    def __call__(self, wanted: _Wanted) -> Any:
        """Tensors of items' inputs, or a list of their labels."""
        assert self.tensors is not None
        try:
            pairs = [self.pair(wanted.part, row, epoch) for row, epoch in wanted.items]
            if wanted.labels:
                return [as_array(y, "a label") if isinstance(y, Tensor) else y for _, y in pairs]
            names = [f"item {row} of the {called(wanted.part)}" for row, _ in wanted.items]
            return self.tensors([x for x, _ in pairs], names)
        except CutlayerError as error:
            return _Refused(type(error), str(error))

    def pair(self, part: str, row: int, epoch: int = _STILL) -> tuple[Any, Any]:
        """An item as (input, label)."""
        dataset = self.parts[part]
        seeds.seed_all(self.seed, "item", epoch, row)
        with own_code(dataset, f"item {row} of the {called(part)}"):
            item = dataset[row]
        return pair(item, f"item {row} of the {called(part)}")


class Items:
    """The items of the data sets `parts`, converted like the first item of the training part.

    `shape` is that of an input as it was read, `convert` its conversion; None if an input has several tensors.
    """

    def __init__(self, parts: Mapping[str, Any], reading: ItemReading) -> None:
        self._fetch = _Fetch(parts, reading.seed)
        self._reader = ReadAhead(self._fetch, reading.workers)
        self.convert: Conversion | None = None
        self.shape: list[int] = []
        self.recipe: dict[str, Any] = {}
        with seeds.restored():
            x, _ = self._fetch.pair("train", 0)
            self._fetch.tensors = self._tensors_of(x)
            self.first = self._fetch.tensors([x], [f"item 0 of the {called('train')}"])
        form = [(t.shape[1:], t.dtype) for t in inputs_of(self.first)]
        self._fetch.tensors = _Alike(self._fetch.tensors, form)

    @property
    def nbytes(self) -> int:
        """Bytes of all inputs, if all are as large as the first."""
        return sum(x.nbytes for x in inputs_of(self.first)) * sum(map(len, self._fetch.parts.values()))

    def samples(self, part: str, at: Tensor, y: Tensor) -> Lazy:
        """The samples of a part with the row numbers `at` and targets `y`."""
        return Lazy(self.first, y, self, part, at)

    @property
    def ahead(self) -> int:
        """The useful number of batches to announce; 0 if no process would read them in the meantime."""
        return self._reader.depth

    def foresee(self, part: str, batches: Iterable[tuple[Tensor, np.ndarray]]) -> None:
        """Read these batches next, in this order; each has the rows [R] of a part in their epochs [R]."""
        self._reader.ask([_Wanted.of(part, at.numpy(), epochs) for at, epochs in batches])

    def read(self, part: str, at: Tensor, epochs: np.ndarray | None, sizes: Sequence[int] = ()) -> Inputs:
        """The inputs of the rows `at` [R > 0] of a part, as they are in `epochs` [R] (None: out of training). They are
        batches of `sizes`, which were announced (without sizes: all workers share the reading).
        """
        share = -(-len(at) // max(1, self._reader.workers))
        ends = np.cumsum(sizes) if len(sizes) else np.arange(share, len(at) + share, share)
        rows, often = at.numpy(), np.full(len(at), _STILL) if epochs is None else epochs
        spans = [slice(start, end) for start, end in itertools.pairwise([0, *ends.tolist()])]
        return _joined(self._load([_Wanted.of(part, rows[span], often[span]) for span in spans]))

    def labels(self, part: str) -> tuple[list[Any] | Array, str]:
        """The labels of all items, and the attribute with the labels (empty: the items were read)."""
        dataset = self._fetch.parts[part]
        for name in ("targets", "labels"):
            known = _attribute(dataset, name)
            if known is not None and self._agrees(part, known):
                return known, name
        rows = np.arange(len(dataset))
        spans = [slice(start, start + _LABELS) for start in range(0, len(rows), _LABELS)]
        return [y for ys in self._load([_Wanted.of(part, rows[s], None, labels=True) for s in spans]) for y in ys], ""

    def close(self) -> None:
        """End the worker processes. They start again when something is read."""
        self._reader.close()

    def _agrees(self, part: str, known: Array) -> bool:
        """Whether the labels of a few items equal the known ones, since labels may go through a transform."""
        with seeds.restored():
            few = {row: self._fetch.pair(part, row)[1] for row in {0, len(known) // 2, len(known) - 1}}
        return all(np.array_equal(as_array(y, "a label"), known[row]) for row, y in few.items())

    def _load(self, wanted: Sequence[_Wanted]) -> list[Any]:
        self._reader.ask(wanted)
        found = []
        for one in wanted:
            with seeds.restored() if not self._reader.workers else nullcontext():
                answer = self._reader.take(one)
            if isinstance(answer, _Refused):
                raise answer.kind(answer.sentence)
            found.append(answer)
        return found

    def _tensors_of(self, x: Any) -> Callable[[Sequence[Any], Sequence[str]], Inputs]:
        """How inputs such as `x` become tensors."""
        if isinstance(x, Mapping | tuple):
            return _several
        if hasattr(x, "getbands"):
            pictures = stack_pictures({"train": [("item 0", x)]})
            array, self.recipe = pictures.x["train"][0], pictures.recipe
        else:
            array = as_array(x, "x of item 0 of the data set")
            if array.ndim == 0 or 0 in array.shape:
                raise DataError(f"the inputs of the data set have shape {array.shape}: give at least one feature")
        if array.dtype.kind not in "fiub":
            raise DataError(f"the inputs of the data set are of type {array.dtype}: give integers or real numbers")
        self.shape, self.convert = list(array.shape), Conversion(divisor=divisor(array[None]))
        return _One(self.convert, self.recipe, array.shape, array.dtype)


@dataclass(frozen=True)
class Lazy(Samples):
    """Samples whose inputs are read on demand: those at the places `at` in a part of `items`.

    `inputs` are only those of the first item, with the shape, type and device of all.
    """

    items: Items
    part: str
    at: Tensor

    @property
    def in_memory(self) -> bool:
        """They are not in memory."""
        return False

    @property
    def form(self) -> Samples:
        """The first item of the data set, with a target of these samples."""
        return Samples(self.inputs, self.y[:1])

    @property
    def rows(self) -> Rows:
        """Raises DataError: the inputs are there in batches alone."""
        self._refuse()

    @property
    def x(self) -> Tensor:
        """Raises DataError: the inputs are there in batches alone."""
        self._refuse()

    def __getitem__(self, rows: Tensor | slice) -> Samples:
        """The samples at `rows` (an index tensor or a slice), read now."""
        return self._read(rows, None)

    @property
    def ahead(self) -> int:
        """The useful number of batches to announce."""
        return self.items.ahead

    def foresee(self, batches: Iterable[tuple[Tensor, np.ndarray]]) -> None:
        """These batches are requested next, in this order, so worker processes read them in advance."""
        self.items.foresee(self.part, [(self.at[rows], epochs) for rows, epochs in batches])

    def batch(self, rows: Tensor, epochs: np.ndarray, sizes: Sequence[int] = ()) -> Samples:
        """The samples at `rows` [R], with random transforms as in these `epochs` [R]: announced batches of `sizes`."""
        return self._read(rows, epochs, sizes)

    def share(self, rows: Tensor) -> Samples:
        """The samples at `rows`, read on demand."""
        return replace(self, y=self.y[rows.to(self.y.device)], at=self.at[rows.cpu()])

    def close(self) -> None:
        """End the worker processes."""
        self.items.close()

    def _read(self, rows: Tensor | slice, epochs: np.ndarray | None, sizes: Sequence[int] = ()) -> Samples:
        at = self.at[rows] if isinstance(rows, slice) else self.at[rows.cpu()]
        y = self.y[rows] if isinstance(rows, slice) else self.y[rows.to(self.y.device)]
        if not len(at):
            return Samples(_each_like(self.inputs, self.inputs, lambda x, _: x[:0]), y)
        found = self.items.read(self.part, at, epochs, sizes)
        return Samples(_each_like(found, self.inputs, lambda x, like: x.to(like.device, like.dtype)), y)

    def _refuse(self) -> NoReturn:
        raise DataError(
            "this needs all inputs at once, but they are read batch by batch: pass data_in_memory = 'always'"
        )


@dataclass(frozen=True)
class _One:
    """Inputs of one array each, or pictures, as a tensor."""

    convert: Conversion
    recipe: Mapping[str, Any]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __call__(self, xs: Sequence[Any], names: Sequence[str]) -> Tensor:
        arrays = [self._array(x, name) for x, name in zip(xs, names, strict=True)]
        for array, name in zip(arrays, names, strict=True):
            if array.shape != self.shape or array.dtype != self.dtype:
                raise DataError(
                    f"x of {name} has shape {array.shape} and type {array.dtype}, item 0 has {self.shape} and "
                    f"{self.dtype}: make them equal"
                )
            if array.dtype.kind == "f" and not np.isfinite(array.astype(np.float32, copy=False)).all():
                raise DataError(f"x of {name} holds NaN or infinite numbers (in float32): correct them")
        return self.convert(np.stack(arrays))

    def _array(self, x: Any, name: str) -> Array:
        if self.recipe:
            return one_picture(name, x, self.recipe, resized=False)
        return as_array(x, f"x of {name}")


def _several(xs: Sequence[Any], names: Sequence[str]) -> Inputs:
    """Inputs of several arrays each."""
    rows, arrays = numbered(stacked(list(xs), f"batch of {names[0]}"), f"the inputs of {names[0]} and its batch")
    return taken(arrays, rows)


@dataclass(frozen=True)
class _Alike:
    """Makes tensors, and refuses those whose form differs from the first item's."""

    tensors: Callable[[Sequence[Any], Sequence[str]], Inputs]
    first: Sequence[tuple[torch.Size, torch.dtype]]

    def __call__(self, xs: Sequence[Any], names: Sequence[str]) -> Inputs:
        found = self.tensors(xs, names)
        here = [(x.shape[1:], x.dtype) for x in inputs_of(found)]
        if here != list(self.first):
            shown = [[(tuple(shape), str(kind)) for shape, kind in those] for those in (here, self.first)]
            raise DataError(
                f"the inputs of {names[0]} and its batch are {shown[0]}, item 0 has {shown[1]}: make them equal"
            )
        return found


def pair(item: Any, what: str) -> tuple[Any, Any]:
    """An item called `what` as (its input, its label). Raises DataError."""
    label = next((key for key in ("labels", "label") if isinstance(item, Mapping) and key in item), None)
    found = item if label is None else ({k: v for k, v in item.items() if k != label}, item[label])
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise DataError(
            f"{what} is not a pair (x, label) but a {type(found).__name__}: return pairs, or dictionaries of tensors "
            "with the target under 'labels' or 'label'"
        )
    y = found[1]
    return found[0], y.item() if hasattr(y, "item") and np.ndim(y) == 0 else y


def called(part: str) -> str:
    """The name of a part's data set in messages."""
    return "data set" if part == "train" else f"{part} data set"


def too_large(items: Items) -> bool:
    """Whether all items would exceed their share of the free memory."""
    free = _free_memory()
    return free is not None and items.nbytes >= free / _SHARE


def _free_memory() -> float | None:
    """Bytes that are free or can be freed; None if the system does not tell."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return None


def _attribute(dataset: Any, name: str) -> Array | None:
    """The labels of all items in an attribute of a data set; for subsets, those of the whole data set."""
    if isinstance(dataset, torch.utils.data.ConcatDataset):
        found = [_attribute(one, name) for one in dataset.datasets]
        known = [one for one in found if one is not None]
        return np.concatenate(known) if len(known) == len(found) else None
    if isinstance(dataset, torch.utils.data.Subset):
        whole = _attribute(dataset.dataset, name)
        return None if whole is None else whole[np.asarray(dataset.indices, np.int64)]
    values = getattr(dataset, name, None)
    if not isinstance(values, list | tuple | np.ndarray | Tensor) or len(values) != len(dataset):
        return None
    try:
        return as_array(values, name)
    except DataError:
        return None


def _each_like(x: Inputs, like: Inputs, change: Callable[[Tensor, Tensor], Tensor]) -> Inputs:
    """Inputs of the same form, each tensor converted like its counterpart in `like`."""
    made = [change(*both) for both in zip(inputs_of(x), inputs_of(like), strict=True)]
    if isinstance(like, Tensor):
        return made[0]
    return dict(zip(like, made, strict=True)) if isinstance(like, Mapping) else tuple(made)


def _joined(parts: Sequence[Inputs]) -> Inputs:
    """Parts of a batch as one."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat([inputs_of(part)[0] for part in parts])
    made = [torch.cat(tensors) for tensors in zip(*map(inputs_of, parts), strict=True)]
    return dict(zip(first, made, strict=True)) if isinstance(first, Mapping) else tuple(made)
