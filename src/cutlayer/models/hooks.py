"""Cutting by replaying: a part runs the model's own `forward`, without the other parts' layers.

The first part stops when the cut module returns its output (a forward hook raises). A later part runs from the start
with a made-up input: stand-ins return made-up tensors of the recorded shapes for the layers of earlier parts, and the
cut module returns the received tensors. Made-up values must not reach the result, which the proof checks. A layer whose
result depends on neither the data nor parameters (rotary positions) runs again in later parts.

Of the cut module's output, only the tensors that the later part uses cross, and a tensor that occurs twice crosses
once.

Works for models that `torch.fx` cannot trace (Hugging Face's, `nn.TransformerEncoder`, control flow on shapes).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from cutlayer.copies import deep_copy
from cutlayer.eager import gradients_of
from cutlayer.errors import CutError
from cutlayer.models.parts import (
    Arguments,
    CannotCutError,
    Part,
    SharedWeightError,
    batch_dimension,
    fill_owners,
    one_line,
    state_names,
    storage_of,
    taken_apart,
    tensors_in,
)
from cutlayer.types import Rows, is_continuous

_REPEATS = 7  # more recordings in training
_LARGE = 10_000_000  # parameters


def split_by_hooks(
    model: nn.Module, names: Sequence[str], x: Arguments, heard: dict[bool, list[_Call]] | None = None
) -> list[Part]:
    """The parts of `model` cut after each of `names` (none: the whole model as one part). Raises CannotCutError.

    `heard` is the result of `listen(model, x)`, for repeated cuts of the same model.
    """
    record = _Record(model, names, x, heard or listen(model, x))
    owners = _owners(model, names, x, record)
    record.outputs = [template.only(_used(model, names, k, x, template)) for k, template in enumerate(record.outputs)]
    record.sent = [_needed(model, names, k, x) for k in range(len(names))]
    return [_ReplayedPart(model, names, k, record, owners) for k in range(len(names) + 1)]


class _Reached(BaseException):
    """The module at which to stop has returned its output. Not an Exception, so that the user's code does not
    catch it.
    """

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


def _stop(module: nn.Module, args: Any, output: Any) -> None:
    raise _Reached(output)


# Recording


@dataclass(frozen=True)
class _Made:
    """A tensor in a recorded output: its shape for a batch of `batch` rows, and its type."""

    shape: tuple[int, ...]
    larger: tuple[int, ...]
    dtype: torch.dtype
    batch: int

    def make(self, replay: _Replay) -> Tensor:
        """A tensor of this shape for the replayed batch size."""
        pairs = zip(self.shape, self.larger, strict=True)
        shape = [a if a == b else a // self.batch * replay.batch for a, b in pairs]
        return replay.make(shape, self.dtype)


@dataclass
class _Call:
    """One execution of a module: its parent call, its start and end, and its output."""

    name: str
    parent: _Call | None
    start: int
    end: int = -1
    output: Any = None
    final: bool = False  # its output is the model's output
    fixed: bool = False  # its output depends on neither the data nor parameters, and it drew nothing


class _Record:
    """The modules that run in each part, in training and in evaluation, with their outputs."""

    def __init__(self, model: nn.Module, names: Sequence[str], x: Arguments, heard: dict[bool, list[_Call]]) -> None:
        self.names, self.inputs = names, x
        self.sent: list[list[int]] = []  # the inputs that cross each cut as they are
        self.calls = heard
        if last := [call.name for calls in heard.values() for call in calls if call.name in names and call.final]:
            raise CannotCutError(f"nothing is computed after {last[0]!r}")
        self.ends = {t: [self._cut_call(c, n).end for n in names] for t, c in self.calls.items()}
        if any(ends != sorted(set(ends)) for ends in self.ends.values()):
            raise CannotCutError(f"{names[1]!r} does not come after {names[0]!r}")
        outputs = [[self._cut_call(self.calls[t], n).output for n in names] for t in (True, False)]
        if outputs[0] != outputs[1]:
            raise CannotCutError("different tensors cross the cut in training and in evaluation")
        self.outputs: list[_Template] = outputs[0]

    def runs_again(self, name: str, k: int) -> bool:
        """Whether module `name`, of an earlier part, has the same output for all data, so that part k can run
        it again.
        """
        found = [call for calls in self.calls.values() for call in calls if call.name == name]
        return all(call.fixed for call in found) and any(self.made_up(name, k).values())

    def runs_in(self, name: str, k: int) -> bool:
        """Whether module `name` runs in part k, from start to end or in part."""
        return any(
            self._part(t, call.start) <= k <= self._part(t, call.end)
            for t, calls in self.calls.items()
            for call in calls
            if call.name == name
        )

    def containers(self) -> set[str]:
        """Modules that are never executed themselves but contain executed ones: lists of layers."""
        run = {call.name for calls in self.calls.values() for call in calls}
        return {up for name in run for up in _above(name)} - run

    def made_up(self, name: str, k: int) -> dict[bool, list[Any]]:
        """The outputs of the stand-in for `name` in part k, call by call, by mode."""
        return {
            t: [c.output for c in calls if c.name == name and self._stands_in(t, c, k)]
            for t, calls in self.calls.items()
        }

    def _stands_in(self, training: bool, call: _Call, k: int) -> bool:
        """Whether a call was over before part k, made by a call that was not."""
        if self._part(training, call.end) >= k:
            return False
        return call.parent is None or self._part(training, call.parent.end) >= k

    def _part(self, training: bool, moment: int) -> int:
        return sum(end < moment for end in self.ends[training])

    @staticmethod
    def _cut_call(calls: list[_Call], name: str) -> _Call:
        found = [call for call in calls if call.name == name]
        if not found:
            inside = [call.name for call in calls if call.name.startswith(name + ".")]
            hint = f" (it only holds modules: the last of them is {inside[-1]!r})" if inside else ""
            raise CannotCutError(f"{name!r} is never executed{hint}")
        if len(found) > 1:
            raise CannotCutError(f"{name!r} is executed {len(found)} times")
        return found[0]


def listen(model: nn.Module, x: Arguments) -> dict[bool, list[_Call]]:
    """The executed modules, in training and in evaluation, with their outputs. Raises CannotCutError."""
    return {training: _calls(model, training, x) for training in (True, False)}


def _calls(model: nn.Module, training: bool, x: Arguments) -> list[_Call]:
    model = deep_copy(model).train(training)  # one copy for all, since copying many layers takes time
    small, large = (_listen(model, batch) for batch in (x, x.with_one_more()))
    outputs = taken_apart(small[-1].output)[0]
    for call in small:
        call.final = any(t is output for t in tensors_in(call.output) for output in outputs)
    # Once more with other random numbers: layers may be skipped by chance.
    others = [large] + [_listen(model, x, follow=False) for _ in range(_repeats(model) if training else 0)]
    if any([c.name for c in small] != [c.name for c in other] for other in others):
        raise CannotCutError("which layers run depends on the batch, or on chance")
    for a, b in zip(small, large, strict=True):
        a.output = _template(a, b, len(x))
        a.fixed = a.fixed and b.fixed
    return small


def _template(a: _Call, b: _Call, batch: int) -> _Template:
    """The output of a call, with descriptions in place of tensors."""
    (left, spec), (right, other) = pytree.tree_flatten(a.output), pytree.tree_flatten(b.output)
    if spec != other:
        return _Template(None, (), f"what {a.name!r} gives depends on the batch")
    leaves: list[Any] = []
    places: list[Any] = []
    for small, large in zip(left, right, strict=True):
        if isinstance(small, Tensor) and not small.is_nested:
            leaves.append(_Made(tuple(small.shape), tuple(large.shape), small.dtype, batch))
            places.append((_place(small), _place(large)))
        elif isinstance(small, (int, float, str, bool, type(None))) and small == large:
            leaves.append(small)
        else:
            return _Template(None, (), f"{a.name!r} gives a {type(small).__name__}, which cannot be sent")
    first = tuple(places.index(place) for place in places)
    return _Template(spec, tuple(leaves), first=first, crossing=tuple(sorted(set(first))))


def _place(tensor: Tensor) -> Any:
    """Equal for two tensors that are one and the same."""
    return storage_of(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


@dataclass(frozen=True)
class _Template:
    """The structure of a module's output, with `_Made` for its tensors; or why it cannot be described.

    Of its tensors, counted in order, `first` says for each which is the first that is the same one, and `crossing`
    which are sent.
    """

    spec: Any
    leaves: tuple[Any, ...]
    trouble: str = ""
    first: tuple[int, ...] = ()
    crossing: tuple[int, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Template:
        return self  # immutable

    def make(self, replay: _Replay) -> Any:
        if self.trouble:
            raise CannotCutError(self.trouble)
        return pytree.tree_unflatten([m.make(replay) if isinstance(m, _Made) else m for m in self.leaves], self.spec)

    @property
    def made(self) -> list[_Made]:
        return [leaf for leaf in self.leaves if isinstance(leaf, _Made)]

    def only(self, tensors: Sequence[int]) -> _Template:
        """The same with these of its tensors crossing."""
        return replace(self, crossing=tuple(tensors))

    def dimensions(self, name: str) -> tuple[int, ...]:
        """Which dimension of every tensor that crosses is the batch."""
        if self.trouble or not self.made:
            raise CannotCutError(self.trouble or f"{name!r} gives no tensor")
        if not self.crossing:
            raise CannotCutError(f"nothing that {name!r} gives is used after it")
        sent = [self.made[i] for i in self.crossing]
        found = [batch_dimension(m.shape, m.larger, m.batch) for m in sent]
        for made, dimension in zip(sent, found, strict=True):
            if dimension is None:
                raise CannotCutError(f"{name!r} gives a tensor without a batch dimension (shape {list(made.shape)})")
        return tuple(d for d in found if d is not None)

    def sent(self, output: Any) -> Rows:
        """The tensors of an output that cross."""
        tensors = tensors_in(output)
        return tuple(tensors[i] for i in self.crossing)

    def fill(self, rows: Rows, replay: _Replay) -> Any:
        """The output again, from received tensors, and from made-up ones if nothing was sent."""
        received = dict(zip(self.crossing, rows, strict=True))
        tensors = [received[i] if i in received else self.made[i].make(replay) for i in self.first]
        filled = iter(tensors)
        return pytree.tree_unflatten([next(filled) if isinstance(m, _Made) else m for m in self.leaves], self.spec)


def _repeats(model: nn.Module) -> int:
    """The number of further recordings to find layers that are skipped at random: fewer for large models."""
    return _REPEATS if sum(p.numel() for p in model.parameters()) < _LARGE else 1


@contextlib.contextmanager
def _buffers_restored(model: nn.Module) -> Iterator[None]:
    """Restores the model's buffers after the body."""
    before = [(m, n, b, b.clone()) for m in model.modules() for n, b in m._buffers.items() if b is not None]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in before:
                module._buffers[name] = buffer
                buffer.copy_(value)


def _listen(model: nn.Module, x: Arguments, follow: bool = True) -> list[_Call]:
    """The calls of one forward pass of the model, in order of their ends; with `follow`, also which are fixed."""
    clock, stack, done = iter(range(10**9)), [], []  # type: ignore[var-annotated]
    watch, states = _Watch(), []

    def begin(name: str) -> Any:
        def began(module: nn.Module, args: Any) -> None:
            stack.append(_Call(name, stack[-1] if stack else None, next(clock)))
            unfit = not follow or any(True for _ in module.parameters())
            states.append(None if unfit else torch.get_rng_state())

        return began

    def end(module: nn.Module, args: Any, output: Any) -> None:
        call, state = stack.pop(), states.pop()
        call.end, call.output = next(clock), output
        if state is not None and tensors_in(output) and not watch.holds_made_up(output):
            call.fixed = torch.equal(state, torch.get_rng_state())
        done.append(call)

    handles: list[Any] = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(begin(name), prepend=True))
        handles.append(module.register_forward_hook(end))
    try:
        # Without gradients, some layers take a faster path on which inner layers do not run.
        with _buffers_restored(model), torch.enable_grad(), watch if follow else contextlib.nullcontext():
            for tensor in (*model.parameters(), *(rows := tuple(row.clone() for row in x.rows))):
                watch.mark(tensor)
            x.give(model, rows)
    except Exception as error:  # the user's code: any error is possible
        raise CannotCutError(f"its forward fails on the example ({one_line(error)})") from error
    finally:
        for handle in handles:
            handle.remove()
    return done


# The owners of parameters


def _owners(model: nn.Module, names: Sequence[str], x: Arguments, record: _Record) -> dict[str, int]:
    """The part of every name of the state: parameters by the part whose gradients reach them, buffers by the part that
    runs their module.
    """
    used: dict[int, set[int]] = {}
    for training in (True, False):
        for k, parameters in enumerate(_reached(model, names, x, training)):
            for i in parameters:
                used.setdefault(i, set()).add(k)
    order = [p for _, p in model.named_parameters()]
    position = {id(p): i for i, p in enumerate(order)}
    owners = {}
    for name, tensor, _ in state_names(model):
        parts = used.get(position.get(id(tensor), -1), set())
        if len(parts) > 1:
            parts = parts & _runners(record, name)  # the two ends of a U-shape may share a parameter under two names
            aliases = [n for n, t, _ in state_names(model) if t is tensor]
            if len(parts) != 1 or len(names) < 2 or used[position[id(tensor)]] != {0, 2} or len(aliases) < 2:
                raise SharedWeightError(aliases, tensor)
        parts = parts or _runners(record, name)  # buffers, and parameters that gradients do not reach
        if parts:
            owners[name] = min(parts)
    return fill_owners((name for name, _, _ in state_names(model)), owners, len(names) + 1)


def _runners(record: _Record, name: str) -> set[int]:
    module = name.rpartition(".")[0]
    return {k for k in range(len(record.names) + 1) if record.runs_in(module, k)}


def _reached(model: nn.Module, names: Sequence[str], x: Arguments, training: bool) -> Iterator[set[int]]:
    """For every part, the positions of the parameters that its outputs depend on."""
    model = deep_copy(model).train(training)
    crossed: list[Rows] = []

    def cross(module: nn.Module, args: Any, output: Any) -> Any:
        """Keep the crossing tensors, and continue with a copy without history."""
        leaves, spec = pytree.tree_flatten(output)
        crossed.append(tuple(leaf for leaf in leaves if isinstance(leaf, Tensor)))
        fresh = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return pytree.tree_unflatten(fresh, spec)

    for name in names:
        model.get_submodule(name).register_forward_hook(cross)
    parameters = {i: p.requires_grad_() for i, p in enumerate(model.parameters()) if is_continuous(p)}
    with torch.enable_grad():
        outputs, _ = taken_apart(x.run(model))
    for rows in [*crossed, outputs]:
        roots = [row for row in rows if row.requires_grad]
        if not roots or not parameters:
            yield set()
            continue
        seeds = [torch.ones_like(root) for root in roots]
        found = gradients_of(roots, list(parameters.values()), seeds)
        yield {i for i, gradient in zip(parameters, found, strict=True) if gradient is not None}


def _used(model: nn.Module, names: Sequence[str], k: int, x: Arguments, template: _Template) -> list[int]:
    """The tensors of the k-th cut module's output on which the next part's output depends."""
    if template.trouble or len(template.crossing) < 2:
        return list(template.crossing)
    return [i for i in template.crossing if any(_reaches(model, names, k, x, i, t) for t in (True, False))]


def _needed(model: nn.Module, names: Sequence[str], k: int, x: Arguments) -> list[int]:
    """Of the inputs that may cross, those that something after the k-th cut depends on, apart from its output."""
    found = [i for i in range(len(x.rows)) if x.may_cross(i)]
    return [i for i in found if any(_bypasses(model, names[k], x, i, t) for t in (True, False))]


def _bypasses(model: nn.Module, name: str, x: Arguments, i: int, training: bool) -> bool:
    """Whether input `i` reaches the end of the model by another way than the output of the module called `name`."""
    model, watch = deep_copy(model).train(training), _Watch()

    def forget(module: nn.Module, args: Any, output: Any) -> Any:
        return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)

    rows = tuple(row.clone() for row in x.rows)
    watch.mark(rows[i])
    handle = model.get_submodule(name).register_forward_hook(lambda m, a, out: _apart(watch, forget, m, a, out))
    with handle, torch.enable_grad(), watch:
        return watch.holds_made_up(taken_apart(x.give(model, rows))[0])


def _apart(watch: _Watch, run: Any, *args: Any) -> Any:
    """The result of `run`, hidden from the watch."""
    with torch._C.DisableTorchFunction():
        return run(*args)


def _reaches(model: nn.Module, names: Sequence[str], k: int, x: Arguments, i: int, training: bool) -> bool:
    """Whether tensor `i` of the k-th cut module's output reaches the end of the part after it."""
    model, watch = deep_copy(model).train(training), _Watch()

    def follow(module: nn.Module, args: Any, output: Any) -> Any:
        """Continue with copies that share no memory, and follow one of them."""
        leaves, spec = pytree.tree_flatten(output)
        same = {id(leaf): leaf.clone() for leaf in leaves if isinstance(leaf, Tensor)}
        fresh = [same.get(id(leaf), leaf) for leaf in leaves]
        watch.mark(tensors_in(fresh)[i])
        return pytree.tree_unflatten(fresh, spec)

    model.get_submodule(names[k]).register_forward_hook(follow)
    if k + 1 < len(names):
        model.get_submodule(names[k + 1]).register_forward_hook(_stop)
    try:
        with torch.enable_grad(), watch:
            return watch.holds_made_up(taken_apart(x.run(model))[0])
    except _Reached as reached:
        return watch.holds_made_up(reached.output)


# Replaying


@dataclass
class _Replay:
    """One run of a part: the received tensors, and the form of made-up tensors."""

    sent_dtype: torch.dtype  # of the first tensor received, when the model was cut
    batch: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    sent_now: torch.dtype = torch.float32
    rows: Rows = ()
    fill: int = 0
    calls: dict[str, int] = field(default_factory=dict)
    watch: _Watch | None = None

    def begin(self, rows: Rows) -> None:
        self.rows, self.batch, self.device, self.sent_now = rows, len(rows[0]), rows[0].device, rows[0].dtype
        self.calls.clear()

    def next_call(self, name: str) -> int:
        """How often the stand-in `name` was called before in this run."""
        self.calls[name] = self.calls.get(name, -1) + 1
        return self.calls[name]

    def make(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A made-up tensor. Its type follows the model's, if the model was converted (to float64, say)."""
        dtype = self.sent_now if dtype == self.sent_dtype else dtype
        made = torch.full(tuple(shape), self.fill, dtype=dtype, device=self.device)
        if self.watch is not None:
            self.watch.mark(made)
        return made


# Operations that read no value of their operands, so that made-up operands do no harm.
_KINDS = ("zeros", "ones", "full", "empty", "rand", "randn")
_VALUE_FREE = frozenset(f"{kind}_like" for kind in _KINDS) | frozenset(f"new_{kind}" for kind in _KINDS)


class _Watch(TorchFunctionMode):
    """Follows made-up values through every operation."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: set[int] = set()
        self._kept: list[Tensor] = []  # so that no storage is freed and reused

    def mark(self, tensor: Tensor) -> None:
        if not tensor.is_nested:
            self._storages.add(storage_of(tensor))
            self._kept.append(tensor)

    def holds_made_up(self, values: Any) -> bool:
        """Whether any of the tensors has made-up values, or values computed from such."""
        return any(not t.is_nested and storage_of(t) in self._storages for t in tensors_in(values))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name not in _VALUE_FREE and self.holds_made_up((args, kwargs)):
            for tensor in tensors_in(args[0] if name == "__setitem__" else result):
                self.mark(tensor)
        return result


class _StandIn(nn.Module):
    """Takes the place of a module of an earlier part, or of a later one (then it is never called).

    Attributes of the module that are not tensors, which some models look at, can still be read. A module without
    state that runs again in this part does so after its made-up calls.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        outputs: dict[bool, list[_Template]],
        replay: _Replay,
        runs_again: bool = False,
    ) -> None:
        super().__init__()
        self._name, self._outputs, self._replay, self._runs_again = name, outputs, replay, runs_again
        self.__dict__["_shell"] = _without_values(module)  # not a child: its placeholders are not part of any state

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        made_up, i = self._outputs[self.training], self._replay.next_call(self._name)
        if i < len(made_up):
            return made_up[i].make(self._replay)
        if self._runs_again:
            return self._shell(*args, **kwargs)
        raise CutError(
            f"layer {self._name!r} belongs to another part, and did not run here when the model was cut: which layers "
            "run must not depend on the batch or on chance"
        )

    def __getattr__(self, name: str) -> Any:
        if "_shell" not in self.__dict__ or name.startswith("__"):
            return super().__getattr__(name)
        return getattr(self.__dict__["_shell"], name)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._shell._apply(fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> Any:
        self._shell.train(mode)
        return super().train(mode)


class _Injector(_StandIn):
    """Takes the place of the cut module: returns the received tensors."""

    def __init__(self, name: str, module: nn.Module, template: _Template, replay: _Replay) -> None:
        super().__init__(name, module, {}, replay)
        self._template, self._dimensions = template, template.dimensions(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rows = zip(self._replay.rows, self._dimensions, strict=True)
        return self._template.fill(tuple(r.movedim(0, d).contiguous() if d else r for r, d in rows), self._replay)


class _ReplayedPart(Part):
    """Part k of a model that runs unchanged."""

    _model: nn.Module

    def __init__(self, model: nn.Module, names: Sequence[str], k: int, record: _Record, owners: dict[str, int]) -> None:
        super().__init__()
        model = deep_copy(model)
        self._inputs = [(tuple(row.shape[1:]), row.dtype) for row in record.inputs.rows]
        self._input_names = record.inputs.names
        self._stop_at = names[k] if k < len(names) else None
        self._template = record.outputs[k] if k < len(names) else None
        self._given = self._template.dimensions(names[k]) if self._template is not None else ()
        self._passed_on = record.sent[k] if k < len(names) else []  # inputs that cross unchanged
        self._received = record.sent[k - 1] if k else []
        self.crossing_names = _in_words(names[k], self._template, record, k) if self._template is not None else ()
        self._replay: _Replay | None = None
        if k:
            name, before = names[k - 1], record.outputs[k - 1]
            before.dimensions(name)  # raises if nothing can be sent
            self._replay = _Replay(before.made[before.crossing[0]].dtype)
            _replace(model, name, _Injector(name, model.get_submodule(name), before, self._replay))
        _remove_foreign(model, k, record, owners, self._replay)
        _disown(model, k, owners)
        if self._stop_at is not None:
            model.get_submodule(self._stop_at).register_forward_hook(_stop)
        # The part has the model's state as its own, under the same names: the dictionaries are one and the same.
        self.__dict__["_model"] = model
        for of_module in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[of_module] = model.__dict__[of_module]
        self.train(model.training)

    def run_rows(self, rows: Rows) -> Rows:
        try:
            output = Arguments(rows, self._input_names).give(self._model, self._input(rows))
        except _Reached as reached:
            assert self._template is not None
            given = self._template.sent(reached.output)
            crossing = tuple(g.movedim(d, 0) if d else g for g, d in zip(given, self._given, strict=True))
            return crossing + self._inputs_among(rows)
        finally:
            if self._replay is not None:
                self._replay.rows = ()
        return taken_apart(output)[0]

    def _input(self, rows: Rows) -> Rows:
        if self._replay is None:
            return rows
        count = len(rows) - len(self._received)
        self._replay.begin(rows[:count])
        real = dict(zip(self._received, rows[count:], strict=True))
        return tuple(
            real[i] if i in real else self._replay.make((len(rows[0]), *sample), dtype)
            for i, (sample, dtype) in enumerate(self._inputs)
        )

    def _inputs_among(self, rows: Rows) -> Rows:
        """Of what this part received, the inputs that it passes on."""
        at = range(len(rows)) if self._replay is None else self._received
        here = dict(zip(at, rows[len(rows) - len(at) :], strict=True))
        return tuple(here[i] for i in self._passed_on)

    def train(self, mode: bool = True) -> Any:
        self.training = mode
        if "_model" in self.__dict__:
            self._model.train(mode)  # the user's own train() decides its meaning
        return self


def make_up_with(part: Part, fill: int) -> None:
    """Fill a part's made-up tensors with `fill` from now on. Results do not depend on it; the proof checks that."""
    if isinstance(part, _ReplayedPart) and part._replay is not None:
        part._replay.fill = fill


def uses_made_up(part: Part, rows: Rows) -> bool:
    """Whether made-up values reach the part's output: a mask, say, that the model computes from its input."""
    if not isinstance(part, _ReplayedPart) or part._replay is None:
        return False
    part._replay.watch = watch = _Watch()
    try:
        with torch.enable_grad(), watch:
            given = part(rows)
        return watch.holds_made_up(given)
    finally:
        part._replay.watch = None


def _remove_foreign(model: nn.Module, k: int, record: _Record, owners: dict[str, int], replay: _Replay | None) -> None:
    """Put stand-ins in the place of modules that neither run in part k nor hold state of it."""
    needed = {"", *(name.rpartition(".")[0] for name, owner in owners.items() if owner == k)}
    needed |= {n for n, _ in model.named_modules() if record.runs_in(n, k) and not _only_borrowed(n, k, record)}
    needed |= {n for n, _ in model.named_modules() if record.runs_again(n, k)}
    keep = needed | {up for name in needed for up in _above(name)} | record.containers()
    gone: list[str] = []
    for name, module in list(model.named_modules()):
        if name in keep or isinstance(module, _Injector) or any(name.startswith(g + ".") for g in gone):
            continue
        gone.append(name)
        outputs, runs_again = record.made_up(name, k), record.runs_in(name, k)
        _replace(model, name, _StandIn(name, module, outputs, replay or _Replay(torch.float32), runs_again))


def _above(name: str) -> Iterator[str]:
    """The names of the modules that contain module `name`."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _in_words(name: str, template: _Template, record: _Record, k: int) -> tuple[str, ...]:
    """The crossing tensors, in words."""
    many = len(template.made) > 1
    names = record.inputs.names
    inputs = [f"input {i}" if names is None else names[i] for i in record.sent[k]]
    return (*(f"{name}: output {i}" if many else name for i in template.crossing), *inputs)


def _only_borrowed(name: str, k: int, record: _Record) -> bool:
    """Whether a module of part k runs in an earlier part too: then a stand-in answers the earlier calls."""
    return k > 0 and any(outputs for outputs in record.made_up(name, k).values())


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Replace the module called `name` by `new`, also under its other names."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for child, module in parent._modules.items():
            if module is old:
                parent._modules[child] = new


def _disown(model: nn.Module, k: int, owners: dict[str, int]) -> None:
    """Turn remaining parameters of other parts into constants outside the state."""
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and owners[dot + name] != k:
                del module._parameters[name]
                module.register_buffer(name, _placeholder(parameter), persistent=False)
        for name in module._buffers:
            if owners.get(dot + name, k) != k:
                module._non_persistent_buffers_set.add(name)


def _placeholder(tensor: Tensor) -> Tensor:
    """A constant of the same shape that takes no memory: NaN where possible, so that no use of it goes unnoticed."""
    value = float("nan") if tensor.is_floating_point() else 0
    return torch.full((), value, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


def _without_values(module: nn.Module) -> nn.Module:
    """The module with placeholders for its parameters and buffers."""
    for inner in module.modules():
        for name, parameter in list(inner._parameters.items()):
            if parameter is not None:
                del inner._parameters[name]
                inner.register_buffer(name, _placeholder(parameter), persistent=False)
        for name, buffer in inner._buffers.items():
            if buffer is not None:
                inner._buffers[name] = _placeholder(buffer)
    return module
