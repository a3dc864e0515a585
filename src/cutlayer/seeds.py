"""All randomness comes from here.

Every random decision has a name: (seed, "active", round, step), (seed, "batches", client, epoch), and so on. A seed is
derived only from the name, so a decision does not depend on the engine, on the order of decisions, or on earlier draws.
A resumed run draws the same numbers as an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


_ALONE = threading.RLock()
if hasattr(os, "register_at_fork"):  # a child process must not wait for a thread that it does not have
    os.register_at_fork(before=_ALONE.acquire, after_in_parent=_ALONE.release, after_in_child=_ALONE.release)


def alone() -> contextlib.AbstractContextManager[object]:
    """Only one thread of the process is in a body of this kind at a time. It protects state that all threads share,
    such as torch's global generator. A thread that is in one body may enter another.
    """
    return _ALONE


def derive(seed: int, *name: str | int) -> int:
    """A 63-bit seed for the decision called `name`, e.g. `derive(0, "batches", client, epoch)`."""
    text = "/".join(str(part) for part in (seed, *name))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *name: str | int) -> np.random.Generator:
    """A NumPy generator for the decision called `name`."""
    return np.random.default_rng(derive(seed, *name))


def torch_generator(seed: int, *name: str | int, device: torch.device | None = None) -> torch.Generator:
    """A generator of torch's, on `device` (default: the CPU), for the decision called `name`."""
    import torch  # here, not above: the command line's help must not wait for torch

    return torch.Generator("cpu" if device is None else device).manual_seed(derive(seed, *name))


@contextlib.contextmanager
def torch_seeded(seed: int, *name: str | int, device: torch.device | None = None) -> Iterator[None]:
    """Run the body under torch's global generator of `device` (default: the CPU's) seeded by `name`; the caller's
    global state is restored afterwards.

    Modules such as dropout draw from the global generator; only this function and `seed_all` change it.
    """
    import torch

    if device is not None and device.type != "cpu":
        with torch.random.fork_rng([device], device_type=device.type):
            torch.get_device_module(device.type).manual_seed(derive(seed, *name))
            yield
        return
    with alone():
        before = torch.get_rng_state()
        # Not torch.manual_seed: without a GPU, it stores the seed with a stack trace for a GPU that never exists.
        torch.default_generator.manual_seed(derive(seed, *name))
        try:
            yield
        finally:
            torch.set_rng_state(before)


def seeded_for(
    module: object, seed: int, *name: str | int, device: torch.device | None = None
) -> contextlib.AbstractContextManager[None]:
    """`torch_seeded` for a forward pass of `module`; does nothing if the module states that it draws nothing
    (`draws`).
    """
    return torch_seeded(seed, *name, device=device) if getattr(module, "draws", True) else contextlib.nullcontext()


@contextlib.contextmanager
def streams(device: torch.device) -> Iterator[Callable[[torch.Generator], None]]:
    """A function that makes torch's global generator of `device` draw the numbers of the generator given to it; the
    caller's global state is restored after the body.
    """
    import torch

    kind = torch if device.type == "cpu" else torch.get_device_module(device.type)
    before = kind.get_rng_state()
    try:
        yield lambda generator: kind.set_rng_state(generator.get_state())
    finally:
        kind.set_rng_state(before)


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """The global generators of torch (the CPU's), NumPy and Python are restored after the body."""
    import torch

    with alone():
        before = torch.get_rng_state(), np.random.get_state(), random.getstate()
        try:
            yield
        finally:
            torch.set_rng_state(before[0])
            np.random.set_state(before[1])
            random.setstate(before[2])


def seed_all(seed: int, *name: str | int) -> None:
    """Seed the global generators of torch (the CPU's), NumPy and Python by `name`: transforms draw from any of them."""
    import torch

    derived = derive(seed, *name)
    torch.default_generator.manual_seed(derived)
    np.random.seed(derived % 2**32)
    random.seed(derived)
