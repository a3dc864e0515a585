"""Several processes that train one run together: its ranks, as `torchrun` or `srun` starts them.

All ranks run the same program. They exchange data in collective operations, which all of them call in the same order,
over gloo on CPUs and over NCCL on GPUs. Bytes are counted as a ring of ranks sends them: 2 (R - 1) / R times the summed
bytes, and R - 1 times the gathered bytes.

A rank that ends is noticed by the others in their next collective operation, since its connections close. One that
hangs, or whose machine is gone, is noticed after `TIMEOUT` seconds, or as many as `joined` is given.
"""

from __future__ import annotations

import os
import pickle
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from cutlayer.errors import ConfigError, CutlayerError, LostRankError
from cutlayer.signs import Signs

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from torch.distributed import Work

T = TypeVar("T")

_KNOWN = "known_to_all"
_UNSET = "start them with torchrun or srun, or unset these variables"

TIMEOUT = 300.0
"""Seconds after which a rank that does not answer counts as lost, unless another time is given."""


@dataclass(frozen=True)
class Place:
    """This process among those of a launcher: number `rank` of `size`, number `local` of the `beside` on its machine;
    rank 0 listens at `address`.
    """

    rank: int
    size: int
    local: int
    beside: int
    address: str


def place(environ: Mapping[str, str] = os.environ) -> Place | None:
    """The place that a launcher gives in the environment: `torchrun` in RANK and WORLD_SIZE, `srun` in SLURM's
    variables. None if this process is alone. Raises ConfigError if the values are impossible.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        host, port = environ.get("MASTER_ADDR", "127.0.0.1"), environ.get("MASTER_PORT", "29500")
    elif int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in environ:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_TASKS_HERE")
        host = environ.get("MASTER_ADDR") or first_host(environ.get("SLURM_STEP_NODELIST", "127.0.0.1"))
        job = int(environ.get("SLURM_JOB_ID", "0")) + int(environ.get("SLURM_STEP_ID", "0"))
        port = environ.get("MASTER_PORT") or str(20000 + job % 20000)
    else:
        return None
    numbers = [environ.get(name, default) for name, default in zip(names, "0101", strict=True)]
    if not all(number.isdecimal() for number in numbers):
        raise ConfigError(f"{', '.join(names)} = {', '.join(numbers)} are not whole numbers: {_UNSET}")
    rank, size, local, beside = map(int, numbers)
    if not 0 <= rank < size:
        raise ConfigError(f"{names[0]} = {rank} is not one of {names[1]} = {size} ranks: {_UNSET}")
    return Place(rank, size, local, beside, f"tcp://{host}:{port}") if size > 1 else None


def first_host(hosts: str) -> str:
    """The first of SLURM's list of hosts, such as gpu[03-05,09],login1."""
    found = re.match(r"([^,\[]*)(?:\[(\w+)[^\]]*\]([^,\[]*))?", hosts)
    assert found is not None, "the pattern matches anything"
    return "".join(part or "" for part in found.groups())


class World:
    """This process's place among the ranks, and their collective operations. A single process is rank 0 of 1 and sends
    nothing.

    `deterministic`: sums are added in the order of the ranks.
    """

    def __init__(self, rank: int = 0, size: int = 1, signs: Signs | None = None) -> None:
        self.rank, self.size, self.deterministic, self._signs = rank, size, False, signs
        self.sent = 0.0
        """Bytes that this rank has sent, as a ring of ranks sends them."""

    @property
    def leads(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are other ranks."""
        return self.size > 1

    def total(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks. All tensors of a type are sent as one message."""
        self.totalling(tensors)()

    def totalling(self, tensors: Sequence[Tensor]) -> Callable[[], None]:
        """Begin what `total` does. The returned function, called once, waits for the sums and puts them in place."""
        import torch

        waiting = []
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            parts = [t for t in tensors if t.dtype == dtype]
            waiting.append((parts, self._summing(torch.cat([t.reshape(-1) for t in parts]))))

        def arrive() -> None:
            for parts, total in waiting:
                for t, part in zip(parts, total().split([t.numel() for t in parts]), strict=True):
                    t.copy_(part.view(t.shape))

        return arrive

    def _summing(self, flat: Tensor) -> Callable[[], Tensor]:
        """Begin to sum over the ranks; the sum."""
        if not self.several or not flat.numel():
            return lambda: flat
        if self.deterministic:
            return partial(_in_order, self._gathering(flat))
        from torch import distributed

        self.sent += 2 * (self.size - 1) / self.size * flat.nbytes
        return self._begun(partial(distributed.all_reduce, flat), flat, flat)

    @property
    def total_of(self) -> Callable[[np.ndarray], np.ndarray] | None:
        """A function that sums whole numbers over the ranks; None if there are no other ranks."""
        return self._numbers if self.several else None

    def _numbers(self, numbers: np.ndarray) -> np.ndarray:
        import torch

        tensor = torch.from_numpy(numbers.astype("int64"))
        self.total([tensor])
        found: np.ndarray = tensor.numpy()
        return found

    def largest(self, tensor: Tensor) -> None:
        """Replace each number of the tensor by its maximum over the ranks."""
        if self.several and tensor.numel():
            from torch import distributed

            self.sent += 2 * (self.size - 1) / self.size * tensor.nbytes
            self._done(partial(distributed.all_reduce, tensor, distributed.ReduceOp.MAX), tensor)

    def joined(self, own: np.ndarray, counts: Sequence[int]) -> np.ndarray:
        """The `own` numbers [c_r, m] of all ranks, one rank after another: [sum c_r, m]. `counts` [R] are the c_r."""
        import torch

        if not self.several:
            return own
        mine = torch.zeros(max(counts), own.shape[1], dtype=torch.float64)
        mine[: len(own)] = torch.as_tensor(own, dtype=torch.float64)
        parts = [part[:count] for part, count in zip(self._gathered(mine), counts, strict=True)]
        found: np.ndarray = torch.cat(parts).numpy()
        return found

    def rows(self, own: Tensor, counts: Sequence[int]) -> Tensor:
        """The `own` rows [c_r, s...] of all ranks, one rank after another. `counts` [R] are the c_r."""
        import torch

        if not self.several:
            return own
        mine = own.new_zeros(max(counts), *own.shape[1:])
        mine[: len(own)] = own
        return torch.cat([part[:count] for part, count in zip(self._gathered(mine), counts, strict=True)])

    def gathered(self, value: T) -> list[T]:
        """The ranks' values, in their order."""
        import torch

        if not self.several:
            return [value]
        packed = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = [int(size) for size in self._gathered(torch.tensor([len(packed)]))]
        rows = self.rows(packed, sizes).split(sizes)
        return [pickle.loads(part.numpy().tobytes()) for part in rows]  # noqa: S301 (from our own ranks)

    def collected(self, value: T) -> list[T]:
        """On rank 0, the values of all ranks in their order; on other ranks, only their own value."""
        import torch
        from torch import distributed

        if not self.several:
            return [value]
        packed = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = [int(size) for size in self._gathered(torch.tensor([len(packed)]))]
        mine = packed.new_zeros(max(sizes))
        mine[: len(packed)] = packed
        found = [torch.empty_like(mine) for _ in sizes] if self.leads else None
        self.sent += 0 if self.leads else len(mine)
        self._done(partial(distributed.gather, mine, found, dst=0), mine)
        if found is None:
            return [value]
        parts = zip(found, sizes, strict=True)
        return [pickle.loads(part[:size].numpy().tobytes()) for part, size in parts]  # noqa: S301 (our own ranks)

    def from_rank(self, rank: int, value: T) -> T:
        """The value on `rank`; the values of other ranks are ignored."""
        import torch
        from torch import distributed

        if not self.several:
            return value
        own = bytearray(pickle.dumps(value)) if self.rank == rank else bytearray()
        size = torch.tensor([len(own)])
        self._done(partial(distributed.broadcast, size, src=rank), size)
        packed = torch.frombuffer(own, dtype=torch.uint8) if own else torch.empty(int(size), dtype=torch.uint8)
        self._done(partial(distributed.broadcast, packed, src=rank), packed)
        self.sent += len(packed) + 8 if own else 0
        return value if own else pickle.loads(packed.numpy().tobytes())  # noqa: S301 (from our own ranks)

    def first(self, make: Callable[[], T]) -> T:
        """The result of `make` on rank 0, on all ranks. An error of Cutlayer on rank 0 is raised on all ranks."""
        if not self.several:
            return make()
        found = self.agreed(lambda: make() if self.leads else None)
        return self.from_rank(0, found)  # type: ignore[return-value]

    def agreed(self, make: Callable[[], T]) -> T:
        """The result of `make` on this rank, if it fails on no rank. Otherwise raises the error of this rank, or of the
        first rank on which it failed.
        """
        failed: CutlayerError | None = None
        try:
            made = make()
        except CutlayerError as error:
            if not self.several or is_known(error) or isinstance(error, LostRankError):
                raise
            failed = error
        if not self.several:
            return made
        for other in (failed, *self.gathered(failed)):
            if other is not None:
                raise known(other)
        return made

    def compare(self, what: str, facts: Mapping[str, Any]) -> None:
        """Raises ConfigError if the ranks do not agree on the facts, and names the first fact that differs."""
        for rank, theirs in enumerate(self.gathered(dict(facts))):
            for name in {**facts, **theirs} if theirs != facts else ():
                mine, other = (repr(each.get(name, "not set")) for each in (facts, theirs))
                if mine != other:
                    few, many = sorted((self.rank, rank))
                    here, there = (mine, other) if self.rank == few else (other, mine)
                    raise ConfigError(
                        f"the ranks do not agree on {what}: {name} is {here} on rank {few} and {there} on rank {many}; "
                        "start all with the same command and the same version"
                    )

    def _gathered(self, own: Tensor) -> list[Tensor]:
        return self._gathering(own)()

    def _gathering(self, own: Tensor) -> Callable[[], list[Tensor]]:
        """Begin to gather the tensors of all ranks; they, in their order."""
        import torch
        from torch import distributed

        self.sent += (self.size - 1) * own.nbytes
        found = [torch.empty_like(own) for _ in range(self.size)]
        if not own.numel():
            return lambda: found
        return self._begun(partial(distributed.all_gather, found, own.contiguous()), own, found)

    def _done(self, operation: Callable[..., Work], tensor: Tensor) -> None:
        """Do a collective operation on the tensor. Raises LostRankError if it fails."""
        self._begun(operation, tensor, None)()

    def _begun(self, operation: Callable[..., Work], tensor: Tensor, found: T) -> Callable[[], T]:
        """Begin a collective operation on the tensor. The returned function waits for its end, with signs of life if
        that takes long, and returns `found`. Both raise LostRankError if it fails.
        """
        with self._heard():
            work = operation(async_op=True)
        return partial(self._ended, work, tensor, found)

    def _ended(self, work: Work, tensor: Tensor, found: T) -> T:
        began = time.monotonic()
        try:
            if self._signs is None or tensor.is_cuda:  # NCCL itself ends what takes too long
                work.wait()
            else:
                _wait(work, self._signs)
        except RuntimeError as error:
            if self._signs is not None and time.monotonic() - began > self._signs.limit - self._signs.pause:
                self._hangs(self._signs.silent(), self._signs.limit, error)
            self._lost(error)
        return found

    @contextmanager
    def _heard(self) -> Iterator[None]:
        """Raises LostRankError if the ranks cannot be connected, or are not connected any more."""
        try:
            yield
        except RuntimeError as error:
            self._lost(error)

    def _hangs(self, silent: Sequence[int], seconds: float, error: Exception | None = None) -> None:
        """Raises LostRankError that names the silent ranks, if there are any."""
        if not silent:
            return
        who = f"rank {silent[0]}" if len(silent) == 1 else f"ranks {', '.join(map(str, silent))}"
        raise LostRankError(
            f"rank {self.rank} of {self.size} has had no answer from {who} for {seconds:g} seconds (a process that "
            "hangs, or a machine that is gone): end what is left of all ranks, and start them again"
        ) from error

    def _lost(self, error: RuntimeError) -> NoReturn:
        reason = str(error).strip().splitlines()[0].split("] ", 1)[-1].split(". ")[0]
        raise LostRankError(
            f"rank {self.rank} of {self.size} has lost another rank, whose own output may say why ({reason}): start "
            "the ranks again"
        ) from error


def _in_order(gathering: Callable[[], list[Tensor]]) -> Tensor:
    """The sum of the gathered tensors, added in the order of the ranks."""
    first, *others = gathering()
    for other in others:
        first += other
    return first


def _wait(work: Work, signs: Signs) -> None:
    """Wait for an operation on a CPU, with a sign of life after each pause. Raises RuntimeError if it fails."""
    pause = timedelta(seconds=signs.pause)
    while True:
        try:
            work.wait(pause)
        except RuntimeError:
            if work.is_completed():  # it has failed, or has just completed
                work.wait()
                return
            signs.give()
        else:
            return


_ALONE = World()
_current = _ALONE


E = TypeVar("E", bound=Exception)


def known(error: E) -> E:
    """The error, which all ranks raise: it is enough if one of them says it."""
    setattr(error, _KNOWN, True)
    return error


def is_known(error: BaseException) -> bool:
    """Whether all ranks have this error."""
    return bool(getattr(error, _KNOWN, False))


def world() -> World:
    """The ranks that this process has joined; if it has joined none, a single process."""
    return _current


@contextmanager
def joined(where: Place | None, *, store: str = "", timeout: float = TIMEOUT) -> Iterator[World]:
    """Inside, this process is one of the ranks (with `where` None: alone). `store` is where they meet in place of the
    address of rank 0 (file:///...). A rank that does not answer for `timeout` seconds counts as lost; at the start, all
    have `TIMEOUT` seconds if that is longer. Raises LostRankError if not all come.
    """
    global _current
    if where is None:
        yield _ALONE
        return
    import torch
    from torch import distributed

    from cutlayer.allocator import share_with, sharing

    cuda = torch.cuda.is_available() and distributed.is_nccl_available()
    if cuda:
        torch.cuda.set_device(where.local % torch.cuda.device_count())
    before = sharing()
    os.environ.setdefault("MASTER_ADDR", where.address.removeprefix("tcp://").rpartition(":")[0])
    os.environ.setdefault("MASTER_PORT", where.address.rpartition(":")[2])
    share_with(where.beside)
    try:
        found = _met(where, store or "env://", "cpu:gloo,cuda:nccl" if cuda else "gloo", timeout)
        _current = found
        try:
            yield found
        finally:
            _current = _ALONE
            distributed.destroy_process_group()
    finally:
        share_with(before)


def _met(where: Place, meeting: str, backend: str, timeout: float) -> World:
    """All ranks at their meeting place, connected. Raises LostRankError if not all come."""
    from torch import distributed
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    start = max(timeout, TIMEOUT)
    alone = World(where.rank, where.size)
    with alone._heard():
        store, _, _ = next(rendezvous(meeting, where.rank, where.size, timeout=timedelta(seconds=start)))
        signs = Signs(PrefixStore("signs", store), where.rank, where.size, timeout)
        alone._hangs(signs.meet(start), start)
        limit, own = timedelta(seconds=timeout), PrefixStore("ranks", store)
        distributed.init_process_group(backend, store=own, rank=where.rank, world_size=where.size, timeout=limit)
    return World(where.rank, where.size, signs)
