"""Checks, before the stacked engine is used for a model, that several copies run as one give the same as each alone.

Three copies with different weights, on a few different rows: outputs, all gradients and buffers in training mode
(dropout masks included), outputs in evaluation mode, compared in double precision, so that rounding cannot hide an
error. Operations that differ, draw random numbers themselves, or cannot be run in this way are named. Behaviour that
depends on values that these rows do not have is not seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cutlayer.copies import deep_copy
from cutlayer.eager import backward
from cutlayer.engine.lowering import EMBEDDING, NotStackableError
from cutlayer.engine.stack import Group, Stack
from cutlayer.engine.ways import Stacking, Way
from cutlayer.gradients import gradient_of
from cutlayer.models.parts import Part, one_line
from cutlayer.optim import MakeOptimizer
from cutlayer.types import Rows, as_tuple, channels_last, is_continuous, select

_COPIES = 3
_EMBEDDING = f"it has {EMBEDDING}"


@dataclass(frozen=True)
class Stackability:
    """The `ways` in which a module can be stacked, with the default first; if there are none, `reason` says why, as a
    clause. `unlowered` and `unmapped` say why these ways are not possible.
    """

    ways: tuple[Way, ...] = ()
    reason: str = ""
    unlowered: str = ""
    unmapped: str = ""


def stackable(module: nn.Module, rows: Rows, make_optimizer: MakeOptimizer, *, data: bool) -> Stackability:
    """Try it, with `rows` (each [b, s...]) as an example of a client's batch (`data` needs no gradient)."""
    for named in (module.named_parameters, module.named_buffers):
        if len(list(named())) < len(list(named(remove_duplicate=False))):
            return Stackability(reason="it has tied weights")

    def obstacle(way: Way) -> str:
        return _obstacle(module, rows, make_optimizer, way, data)

    unlowered, apart = obstacle("lowered"), obstacle("each")
    each: tuple[Way, ...] = () if apart else ("each",)
    if not unlowered:
        return Stackability(("lowered", *each))
    if unlowered == _EMBEDDING:  # vmap accepts it, but ignores what makes it special
        return Stackability(each, apart and unlowered, unlowered)
    unmapped = obstacle("mapped")
    if not unmapped:
        return Stackability(("mapped", *each), unlowered=unlowered)
    also = f", and torch.func.vmap cannot map it: {unmapped}" if unmapped != unlowered else ""
    return Stackability(each, apart and unlowered + also, unlowered, unmapped)


def unlike_alone(make: MakeOptimizer) -> str:
    """Why steps of an optimiser on stacked tensors differ from every copy's own steps, as a clause; empty if they are
    equal. Tested with several parameters and copies, which have taken different numbers of steps, in double precision.
    """
    make = replace(make, groups=(), clip=None, accumulate=1)
    noise = torch.Generator().manual_seed(0)
    copies = [_SomeShapes(noise) for _ in range(_COPIES)]
    try:
        stack = Stack(copies[0], _COPIES, make)
        for k, one in enumerate(copies):
            stack.load_one(k, one.state_dict())
        alone = [make(one.named_parameters()) for one in copies]
        for who in ([0, 1, 2], [0, 2], [0, 1, 2], [1], [0, 1, 2]):
            (group,) = stack.groups(who, torch.ones(len(who)).numpy())
            for name, p in group.parameters.items():
                p.grad = torch.randn(p.shape, generator=noise, dtype=p.dtype)
                for grad, k in zip(p.grad, who, strict=True):
                    copies[k].get_parameter(name).grad = grad.clone()
            stack.step(group, make.lr, last=torch.ones(len(who), dtype=torch.bool).numpy())
            for optimizer in (alone[k] for k in who):
                assert optimizer is not None, "there are parameters"
                optimizer.step()
        pairs = [(p, stack.state_of(k)[name]) for k, c in enumerate(copies) for name, p in c.state_dict().items()]
    except Exception as error:  # a user's optimiser can raise any error
        return f"it cannot step stacked tensors ({one_line(error)})"
    return "" if close(pairs) else "it does not step stacked tensors as it steps each alone"


class _SomeShapes(nn.Module):
    """Parameters as layers have them."""

    def __init__(self, noise: torch.Generator) -> None:
        super().__init__()
        for name, shape in (("weight", (4, 3)), ("kernel", (3, 2, 2, 2)), ("bias", (4,))):
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=noise, dtype=torch.float64)))


def exact(module: nn.Module) -> nn.Module:
    """A copy that computes in double precision, so that rounding cannot hide an error."""
    twin = deep_copy(module).double()
    if isinstance(twin, Part):
        twin.narrow_to = None
    return twin


def bytes_per_row(module: nn.Module, rows: Rows) -> int:
    """Bytes that a forward pass of `module` produces per row, if nothing is freed: an upper bound of the memory until
    the backward pass.
    """
    return made_per_row(module, rows)[0]


def made_per_row(module: nn.Module, rows: Rows) -> tuple[int, int]:
    """Bytes that a forward pass of `module` produces per row: in total, and in its largest tensor."""
    counted = _Counted()
    module = deep_copy(module).train()
    with torch.random.fork_rng(devices=[]), torch.no_grad(), counted:
        module(rows)
    return -(-counted.bytes // len(rows[0])), -(-counted.largest // len(rows[0]))


def jittered(rows: Rows) -> Rows:
    """Rows in double precision with a little noise: if two values are equal, as in the background of an image, rounding
    decides which of them is the maximum.
    """
    noise = torch.Generator().manual_seed(1)
    made = []
    for r in rows:
        if not r.is_floating_point():
            made.append(r)
            continue
        moved = r.detach().double() + 1e-3 * torch.randn(r.shape, generator=noise, dtype=torch.float64).to(r.device)
        layout = torch.channels_last if channels_last(r) else torch.contiguous_format
        made.append(moved.contiguous(memory_format=layout))
    return tuple(made)


def _obstacle(module: nn.Module, rows: Rows, make_optimizer: MakeOptimizer, way: Way, data: bool) -> str:
    """Why it cannot be stacked this way; empty if it can."""
    copies = [exact(module) for _ in range(_COPIES)]
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in (p for c in copies for p in c.parameters() if p.requires_grad):
            p.add_(0.1 * torch.randn(p.shape, generator=noise, dtype=p.dtype).to(p.device))
    order = torch.randperm(_COPIES * len(rows[0]), generator=noise) % len(rows[0])
    merged = jittered(tuple(select(r, order) for r in rows))
    merged = tuple(r.requires_grad_(r.is_floating_point() and not data) for r in merged)
    try:
        stack = Stack(copies[0], _COPIES, make_optimizer, Stacking(way))
        for k, c in enumerate(copies):
            stack.load_one(k, c.state_dict())
        return _difference(stack, copies, merged)
    except NotStackableError as error:
        prefix, _, key = error.name.rpartition(".")
        owner = type(module.get_submodule(prefix)).__name__
        return f"{owner} {prefix!r} uses its {key!r} in {error.operation!r}" if key else f"it has {error.operation}"
    except Exception as error:  # a user's module can raise any error; the local engine can still run it
        reason = str(error).strip().splitlines()
        return f"{reason[0] if reason else type(error).__name__}"


def _difference(stack: Stack, copies: list[nn.Module], rows: Rows) -> str:
    """The difference between the stack and its copies run one by one; empty if there is none."""
    size = len(rows[0]) // len(copies)
    (group,) = stack.groups(range(len(copies)), torch.full((len(copies),), size).numpy())
    stack.watch = log = _Log()
    with drawing(stack.device) as drew:
        given = stack.forward(group, rows, lambda k: torch.Generator(stack.device).manual_seed(k))
    stack.watch = nullcontext()
    if drew:
        return "it draws random numbers otherwise than by dropout"
    trained = [g for g in given if g.requires_grad]
    weights = [torch.linspace(0.5, 1.5, g.numel(), dtype=g.dtype, device=g.device).view(g.shape) for g in trained]
    if trained:
        backward(trained, weights)
    for k, module in enumerate(copies):
        span = slice(k * size, (k + 1) * size)
        mine = tuple(r[span].detach().requires_grad_(r.requires_grad) for r in rows)
        alone_log = _Log()
        alone = run_alone(module.train(), mine, k, alone_log)
        if trained:
            backward([a for a in alone if a.requires_grad], [w[span] for w in weights])
        pairs = [(a, g[span]) for a, g in zip(alone, given, strict=True)]
        pairs += [(gradient_of(m), gradient_of(r)[span]) for m, r in zip(mine, rows, strict=True) if r.requires_grad]
        own = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        pairs += [(gradient_of(p), _stacked_gradient(group, name)[k]) for name, p in own]
        pairs += [(b, group.buffers[name][k]) for name, b in module.named_buffers()]
        if not close(pairs, log.single):
            mixing = _first_mixing(log, alone_log, span) if stack.way == "lowered" else ""
            return mixing or "it keeps state of its own, or its rows influence each other"
    predicted = stack.predict(range(len(copies)), tuple(r.detach() for r in rows))
    for k, module in enumerate(copies):
        span = slice(k * size, (k + 1) * size)
        alone = run_alone(module.eval(), tuple(r[span].detach() for r in rows), k)
        if not close([(a, p[span]) for a, p in zip(alone, predicted, strict=True)], log.single):
            return "in evaluation its rows influence each other"
    return ""


@contextmanager
def drawing(device: torch.device) -> Iterator[list[str]]:
    """A list that is filled at the end if anything in here drew from torch's global generators."""
    found: list[str] = []
    kinds = {"cpu", device.type}

    def states() -> list[Tensor]:
        return [torch.get_rng_state() if k == "cpu" else torch.get_device_module(k).get_rng_state() for k in kinds]

    before = states()
    yield found
    if not all(torch.equal(a, b) for a, b in zip(before, states(), strict=True)):
        found.append("something")


def run_alone(module: nn.Module, rows: Rows, seed: int, mode: AbstractContextManager[Any] | None = None) -> Rows:
    """A module on its own rows, drawing (dropout) from a generator with this seed."""
    with torch.random.fork_rng(devices=[]), mode or nullcontext():
        torch.default_generator.manual_seed(seed)
        return as_tuple(module(rows))


def close(pairs: Sequence[tuple[Tensor, Tensor]], single: bool = False) -> bool:
    """Equal except for rounding, relative to the largest of all values (a gradient can consist only of rounding
    errors). `single`: something in between is computed in single precision.
    """
    floats = [(a, b) for a, b in pairs if is_continuous(a) and a.numel()]
    scale = max((float(a.detach().abs().max()) for a, _ in floats), default=0.0)
    allowed = (1e2 * torch.finfo(torch.float32).eps if single else 1e4 * torch.finfo(torch.float64).eps) * scale
    return all(torch.equal(a, b) for a, b in pairs if not is_continuous(a)) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=0.0, atol=allowed) for a, b in floats
    )


class _Log(TorchFunctionMode):
    """Records the tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, Tensor]] = []
        self.single = False  # some were in single precision

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call, and note the result."""
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):  # only recorded: asking it anything would be another operation
            self.made.append((getattr(func, "__name__", str(func)), result))
            with torch._C.DisableTorchFunction():
                self.single |= result.dtype in (torch.float32, torch.bfloat16, torch.float16)
        return result


class _Counted(TorchFunctionMode):
    """Adds up the bytes of the tensors that operations return (views of others count again)."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.largest = 0

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call, and count the result."""
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            self.bytes += result.nbytes
            self.largest = max(self.largest, result.nbytes)
        return result


def _first_mixing(together: _Log, alone: _Log, span: slice) -> str:
    """The first operation whose rows differ between clients together and clients alone."""
    for (name, a), (_, b) in zip(together.made, alone.made, strict=False):
        if not a.dim() or not b.dim():
            continue
        fits = a.dim() == b.dim() and a.shape[1:] == b.shape[1:] and len(a) == _COPIES * len(b)
        if not fits or not close([(b, a[span])]):
            return f"{name!r} does not give clients together what it gives each alone: it mixes rows, or draws"
    return ""


def _stacked_gradient(group: Group, name: str) -> Tensor:
    """The gradient of a stacked parameter, its factors multiplied."""
    total = gradient_of(group.parameters[name])
    for left in group.factors.get(name, []):
        total = total + left.product()
    return total
