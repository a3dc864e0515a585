"""Tensors of many clients in memory-mapped safetensors files, which only have the rows that differ.

A shelf holds the same tensors for every client: one file per tensor, [S, ...], a row for each client that has values of
its own. All other clients have the `common` row, which is kept in memory once. A row is written when a client's values
first differ from the common ones, and released when all clients get a common row again. Files grow as rows are needed.

Rows that a checkpoint refers to are not overwritten: a client that changes gets another row, and the old one is free
once a later checkpoint has been written. So a checkpoint only writes changes since the last one.

Shape legend: C clients, c of them that are asked for, S rows of a file.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cutlayer.errors import CutlayerError
from cutlayer.files import STATES, sync_folder, unwritable
from cutlayer.stored import MalformedError, Stored, checked, fits

_HEADER = 4096  # bytes of the header: of fixed length, so that it can be rewritten as the file grows
_FEWEST = 64  # rows by which a file grows, at least
_BLOCK = 64 << 20  # bytes of rows that are read or written at a time
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.complex64: "C64",
}  # fmt: skip


class StatesFolder:
    """The place of the files of states: the folder of the run after `settle` has named it; before that, a temporary
    folder, which is removed when the files leave it or with this object.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._remove: Callable[[], object] = bool
        self.shelves: weakref.WeakSet[Shelf] = weakref.WeakSet()

    def settle(self, run: Path, *, begin: bool) -> None:
        """From now on, files are in the folder of this run. If the run is to `begin`, existing files move there, and
        files of an earlier attempt are removed; otherwise the run's own state is about to be loaded from there.

        Raises DiskFullError, or RunFolderError if the folder cannot be written to.
        """
        if self._folder == run / STATES:
            return
        self._folder = run / STATES
        if begin:
            try:
                for stale in self._folder.glob("*.safetensors"):
                    stale.unlink()
            except OSError as error:
                raise unwritable(self._folder, error) from None
        for shelf in self.shelves:
            if begin:
                shelf.move()
            else:
                shelf.forget()
        self._remove()

    @property
    def folder(self) -> Path:
        """The folder, which is there."""
        try:
            if self._folder is None:
                scratch = tempfile.TemporaryDirectory(prefix="cutlayer-states-")
                self._remove = weakref.finalize(self, scratch.cleanup)
                self._folder = Path(scratch.name)
            self._folder.mkdir(exist_ok=True)
        except OSError as error:
            raise unwritable(self._folder or Path(tempfile.gettempdir()), error) from None
        return self._folder


@dataclass(frozen=True, eq=False)
class Kept:
    """Rows of a file, for a checkpoint: those at `slots` [n]; `order` is the order of a row's dimensions in memory."""

    path: Path
    slots: Tensor
    order: tuple[int, ...]

    def rows(self, row: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The rows, each of the shape and type of `row`, some at a time: (their places among the n, the rows). Raises
        MalformedError if the file does not have them.
        """
        if sorted(self.order) != list(range(row.dim())):
            raise MalformedError(f"{list(self.order)} is not an order of {row.dim()} dimensions")
        lying = torch.empty([row.shape[i] for i in self.order], dtype=row.dtype)
        file = _File(self.path, lying.permute(tuple(map(self.order.index, range(row.dim())))))
        if len(self.slots) and int(self.slots.max()) >= file.capacity:
            raise MalformedError(f"{str(self.path)!r} has {file.capacity} rows, not row {int(self.slots.max())}")
        some = max(1, _BLOCK // max(1, row.nbytes))
        for first in range(0, len(self.slots), some):
            span = slice(first, min(first + some, len(self.slots)))
            yield span, file.rows[self.slots[span]]


class _File:
    """One tensor of the clients, [S, ...], as a safetensors file that is mapped into memory; rows have the memory
    layout of `row` [...].
    """

    def __init__(self, path: Path, row: Tensor) -> None:
        self.path, self._row = path, torch.empty_like(row)  # dense, whatever the tensor's own strides
        self.capacity = 0
        self._map: mmap.mmap | None = None
        self.rows = row.new_empty((0, *row.shape))
        if path.exists():
            self._open((path.stat().st_size - _HEADER) // row.nbytes)

    @property
    def order(self) -> tuple[int, ...]:
        """The dimensions of a row, from the outermost in memory to the innermost."""
        strides: tuple[int, ...] = self._row.stride()
        return tuple(sorted(range(len(strides)), key=strides.__getitem__, reverse=True))

    def grow(self, capacity: int) -> None:
        """Have at least this many rows. Raises DiskFullError, or RunFolderError if the folder cannot be written to."""
        if capacity <= self.capacity:
            return
        length = _HEADER + capacity * self._row.nbytes
        try:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                before = os.fstat(file).st_size
                if hasattr(os, "posix_fallocate"):  # room that is only promised would be missed in the middle of a step
                    os.posix_fallocate(file, before, length - before)
                else:
                    os.truncate(file, length)
                os.pwrite(file, self._header(capacity), 0)
            finally:
                os.close(file)
        except OSError as error:
            raise unwritable(self.path, error) from None
        self._open(capacity)

    def sync(self) -> None:
        """Have all rows on disk. Raises DiskFullError or RunFolderError."""
        if self._map is not None:
            try:
                self._map.flush()
            except OSError as error:
                raise unwritable(self.path, error) from None

    def rest(self) -> None:
        """Let the system drop the rows from memory, since they are not used for a while."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def _open(self, capacity: int) -> None:
        with self.path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _HEADER + capacity * self._row.nbytes)
        if bytes(self._map[:_HEADER]) != self._header(capacity):  # it was interrupted while it grew, or is another's
            self._check(capacity)
        self.capacity = capacity
        flat = torch.frombuffer(self._map, dtype=torch.uint8, offset=_HEADER).view(self._row.dtype)
        shape, strides = (capacity, *self._row.shape), (self._row.numel(), *self._row.stride())
        self.rows = flat.as_strided(shape, strides)

    def _check(self, capacity: int) -> None:
        """The file is one of ours that has fewer rows by its header. Raises MalformedError."""
        assert self._map is not None, "it is open"
        try:
            said = json.loads(self._map[8:_HEADER])["rows"]
        except (ValueError, KeyError, TypeError):
            said = {}
        mine = json.loads(self._header(capacity)[8:])["rows"]
        if (said.get("dtype"), said.get("shape", [])[1:]) != (mine["dtype"], mine["shape"][1:]):
            raise MalformedError(f"{str(self.path)!r} does not hold {self._row.dtype} {tuple(self._row.shape)} rows")
        self._map[:_HEADER] = self._header(capacity)

    def _header(self, capacity: int) -> bytes:
        """The header of a safetensors file with one tensor, its dimensions in memory order."""
        shape = [capacity, *(self._row.shape[i] for i in self.order)]
        ends = [0, capacity * self._row.nbytes]
        text = json.dumps({"rows": {"dtype": _NAMES[self._row.dtype], "shape": shape, "data_offsets": ends}}).encode()
        return (_HEADER - 8).to_bytes(8, "little") + text.ljust(_HEADER - 8)


class _ShelfState(Stored):
    common: dict[str, Any]
    own: Any
    rows: dict[str, Any]


class Shelf:
    """Tensors of `clients` clients in files whose names begin with `name`; `device` is where rows are computed with."""

    def __init__(self, place: StatesFolder, name: str, clients: int, device: torch.device | None = None) -> None:
        self._place, self.name = place, name
        self.device = device or torch.device("cpu")
        self.common: dict[str, Tensor] = {}  # [1, ...]
        self._files: dict[str, _File] = {}
        self._slots = np.full(clients, -1, np.int64)  # the row of each client; -1: the common one
        self._capacity = 0
        self._held: tuple[np.ndarray, ...] = ()  # slots of the last checkpoint, and of the one being written
        place.shelves.add(self)

    @property
    def own(self) -> np.ndarray:
        """The clients that have their own rows."""
        return np.flatnonzero(self._slots >= 0)

    @property
    def row_bytes(self) -> int:
        """Bytes of one client's tensors."""
        return sum(t.nbytes for t in self.common.values())

    def add(self, name: str, row: Tensor) -> None:
        """Another tensor, which is `row` [...] for all clients until they get their own."""
        self.common[name] = one = repeated(row, 1)
        if self._capacity and one.numel():
            file = self._file(name)
            file.grow(self._capacity)
            own = self._slots[self._slots >= 0]
            file.rows[torch.from_numpy(own)] = one.to(file.rows.device)

    def take(self, name: str, clients: np.ndarray) -> Tensor:
        """One tensor of some clients: a copy [c, ...]."""
        slots, one = self._slots[clients], self.common[name]
        if name not in self._files or (slots < 0).all():
            return one[torch.zeros(len(clients), dtype=torch.int64, device=one.device)]
        rows = self._files[name].rows[torch.from_numpy(slots.clip(0))].to(self.device)
        if (slots < 0).any():
            rows[torch.from_numpy(slots < 0).to(self.device)] = one
        return rows

    def put(self, clients: np.ndarray, tensors: Mapping[str, Tensor]) -> None:
        """Store some clients' own values [c, ...] of some of the tensors. Raises DiskFullError or RunFolderError."""
        if not tensors or not len(clients):
            return
        self._make_room(clients, tensors)
        at = torch.from_numpy(self._slots[clients])
        for name, rows in tensors.items():
            if self.common[name].numel():
                self._files[name].rows[at] = rows.detach().to("cpu")

    def set_common(self, rows: Mapping[str, Tensor]) -> None:
        """Give all clients these common tensors, [...] each, instead of their own."""
        for name, row in rows.items():
            self.common[name].copy_(row)
        self.drop()

    def drop(self, clients: np.ndarray | None = None) -> None:
        """Give these clients (None: all) the common tensors again."""
        self._slots[slice(None) if clients is None else clients] = -1

    def spread(self, whole: Mapping[str, Tensor], common: Mapping[str, Tensor] | None = None) -> None:
        """Take whole tensors [C, ...]: clients that equal the first one, or the `common` rows, get no rows."""
        self.set_common({name: t[0] for name, t in whole.items()} if common is None else common)
        some = max(1, _BLOCK // max(1, self.row_bytes))
        for first in range(0, len(self._slots), some):
            part = slice(first, first + some)
            unlike = np.zeros(len(self._slots[part]), bool)
            for name, t in whole.items():
                unlike |= _unlike(t[part], self.common[name])
            at = np.flatnonzero(unlike)
            self.put(first + at, {name: t[part][torch.from_numpy(at)] for name, t in whole.items()})

    def rest(self) -> None:
        """Nothing is used for a while: release memory for others."""
        for file in self._files.values():
            file.rest()

    def aside(self) -> Callable[[], None]:
        """A function that restores the present values. Until it is called, no present row is overwritten."""
        common, slots, held = {n: t.clone() for n, t in self.common.items()}, self._slots.copy(), self._held
        self._held = (*held, slots[slots >= 0])

        def back() -> None:
            for name, row in common.items():
                self.common[name].copy_(row)
            self._slots, self._held = slots, held

        return back

    def move(self) -> None:
        """Move the files to the place's new folder. Raises DiskFullError or RunFolderError."""
        some = max(1, _BLOCK // max(1, self.row_bytes))
        before, self._files = self._files, {}
        for name, old in before.items():
            new = self._file(name)
            new.grow(old.capacity)
            for first in range(0, old.capacity, some):
                new.rows[first : first + some] = old.rows[first : first + some]

    def forget(self) -> None:
        """No client has rows of its own, and there are no files."""
        self._files, self._capacity, self._held = {}, 0, ()
        self.drop()

    # Checkpoints

    def state(self) -> dict[str, Any]:
        """For a checkpoint: the common tensors, the clients with own ones, and the places of these. They stay unchanged
        until the checkpoint after the next one is made.
        """
        own = self.own
        slots = self._slots[own]
        for file in self._files.values():
            file.sync()
        if self._files:
            sync_folder(self._place.folder)
        self._held = (*self._held[-1:], slots)
        kept = {name: Kept(file.path, torch.from_numpy(slots), file.order) for name, file in self._files.items()}
        common = {name: one[0] for name, one in self.common.items()}
        return {"common": common, "own": torch.from_numpy(own), "rows": kept if len(own) else {}}

    def load(self, state: Mapping[str, Any], what: str) -> None:
        """Take a state that `state()` returned. Raises MalformedError."""
        found = shelved(state, len(self._slots), what)
        for name, row in found.common.items():
            if name not in self.common:
                raise MalformedError(f"{what} has {name!r}")
            fits(row, self.common[name][0], f"{what}: {name!r}")
        if lacking := sorted(self.common.keys() - found.common.keys()):
            raise MalformedError(f"{what} lacks {lacking[0]!r}")
        self.set_common({name: row.to(self.device) for name, row in found.common.items()})
        self._held = ()
        if not found.rows:
            return
        own = found.own.numpy()
        if all(kept.path == self._path(name) for name, kept in found.rows.items()):
            self._adopt(own, next(iter(found.rows.values())).slots.numpy())
            if any(kept.order != self._files[name].order for name, kept in found.rows.items()):
                raise MalformedError(f"{what} lies in memory in another order")
            return
        for name, kept in found.rows.items():
            for span, rows in kept.rows(self.common[name][0].cpu()):
                self.put(own[span], {name: rows})

    # Inside

    def _adopt(self, own: np.ndarray, slots: np.ndarray) -> None:
        """The files belong to the continued run: its rows stay in place. Raises MalformedError."""
        files = [self._file(name) for name, one in self.common.items() if one.numel()]
        if min(file.capacity for file in files) <= slots.max():
            raise MalformedError(f"{str(files[0].path.parent)!r} lacks rows that the checkpoint refers to")
        self._capacity = max(file.capacity for file in files)
        for file in files:
            file.grow(self._capacity)
        self._slots[own], self._held = slots, (slots,)

    def _path(self, name: str) -> Path:
        place = self._place.folder
        return place / f"{self.name}-{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.safetensors"

    def _file(self, name: str) -> _File:
        """The file of a tensor. Raises MalformedError for a file of another tensor."""
        if name not in self._files:
            self._files[name] = _File(self._path(name), self.common[name][0].cpu())
        return self._files[name]

    def _make_room(self, clients: np.ndarray, filled: Iterable[str]) -> None:
        """Rows that may be written for these clients; rows that will not be `filled` keep their values."""
        slots = self._slots[clients]
        fixed = np.zeros(self._capacity, bool)
        for held in self._held:
            fixed[held] = True
        fresh = clients[(slots < 0) | fixed[slots.clip(0)] if self._capacity else slots < 0]
        if not len(fresh):
            return
        fixed[self._slots[self._slots >= 0]] = True
        free = np.flatnonzero(~fixed)
        if len(free) < len(fresh):
            free = np.concatenate([free, self._more(len(fresh) - len(free))])
        before = {name: self.take(name, fresh) for name in self.common.keys() - set(filled)}
        self._slots[fresh] = free[: len(fresh)]
        at = torch.from_numpy(self._slots[fresh])
        for name, rows in before.items():
            if name in self._files:
                self._files[name].rows[at] = rows.cpu()

    def _more(self, rows: int) -> np.ndarray:
        """Reserve space for at least this number of further rows: their slots."""
        before = self._capacity
        capacity = before + max(rows, _FEWEST, before // 4)
        try:
            for name, one in self.common.items():
                if one.numel():
                    self._file(name).grow(capacity)
        except CutlayerError:
            if before:
                raise
            for file in self._files.values():  # they were empty
                file.path.unlink(missing_ok=True)
            raise
        self._capacity = capacity
        return np.arange(before, capacity)


def shelved(state: Mapping[str, Any], clients: int, what: str) -> _ShelfState:
    """A shelf's complete state. Raises MalformedError."""
    found = checked(state, _ShelfState, what)
    own = found.own
    if not isinstance(own, Tensor) or own.dtype != torch.int64 or own.dim() != 1:
        raise MalformedError(f"{what} does not say whose rows there are")
    if len(own) and (int(own[0]) < 0 or int(own[-1]) >= clients or bool((own[1:] <= own[:-1]).any())):
        raise MalformedError(f"{what} names clients that are not among the {clients}, or not in order")
    for name, kept in found.rows.items():
        if not isinstance(kept, Kept) or name not in found.common or kept.slots.shape != own.shape:
            raise MalformedError(f"{what} has no row of {name!r} for each of its clients")
        if len(kept.slots.unique()) < len(own) or bool((kept.slots < 0).any()):
            raise MalformedError(f"{what} has one row of {name!r} for two clients")
    return found


def _unlike(rows: Tensor, one: Tensor) -> np.ndarray:
    """Which of the rows [n, ...] differ from `one` [1, ...], bit by bit."""
    rows, one = (t.detach().cpu().reshape(len(t), -1).contiguous().view(torch.uint8) for t in (rows, one))
    found: np.ndarray = (rows != one).any(1).numpy()
    return found


def spread_out(state: Mapping[str, Any], clients: int, what: str) -> dict[str, Tensor]:
    """A shelf's state as whole tensors [C, ...] in memory. Raises MalformedError."""
    found, whole = shelved(state, clients, what), {}
    for name, row in found.common.items():
        whole[name] = repeated(row, clients)
        if name in found.rows:
            for span, rows in found.rows[name].rows(row):
                whole[name][found.own[span]] = rows
    return whole


def repeated(tensor: Tensor, count: int) -> Tensor:
    """[...] -> [count, ...], in its own memory, each with the same layout (a kernel with its channels last)."""
    alone = torch.empty_like(tensor)  # dense, whatever the tensor's own strides
    many = torch.empty_strided(
        (count, *tensor.shape), (tensor.numel(), *alone.stride()), dtype=tensor.dtype, device=tensor.device
    )
    return many.copy_(tensor.detach().expand_as(many))
