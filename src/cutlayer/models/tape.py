"""Tracing by running: every operation of two runs is recorded, and values that differ between them depend on the batch.

The runs have different numbers of rows, and one is in double precision. A number that grows with the batch becomes a
multiple of the batch size, and a type that changed becomes the model's type. Any other difference is a reason not to
cut: control flow that depends on the data, or a random number that the model draws itself. Other sizes, such as the
length of a sequence, are fixed to those of the example.

Works for models that `torch.fx` cannot trace, in the time of a few forward passes. Masks and positions that the model
computes beside the cut cross, or are computed again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from cutlayer.copies import deep_copy
from cutlayer.models.parts import (
    Arguments,
    CannotCutError,
    Part,
    state_names,
    storage_of,
    tensors_in,
)
from cutlayer.models.trace import ROOT, Root, Traced, adopt_constants, following
from cutlayer.types import Rows

_VALUE = "the way that it computes depends on values of the data"
_DRAWN = "it draws random numbers that a trace would freeze"
_BATCH = "what it computes depends on the size of the batch in an unknown way"

# Turning values into Python's numbers: later operations may depend on them.
_REVEALING = frozenset({"__bool__", "__int__", "__float__", "__complex__", "__index__", "__contains__", "__array__"})
_REVEALING |= {"item", "tolist", "numpy", "is_nonzero", "equal", "allclose"}
_RANDOM = ("rand", "dropout", "bernoulli", "normal", "multinomial", "uniform", "exponential", "poisson")
# Operations whose results have sizes that depend on values, and those that read sizes.
_SHAPING = frozenset({"nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "_unique2", "bincount"})
_SHAPING |= {"repeat_interleave", "_pack_padded_sequence"}
_SIZES = frozenset(["size", "numel", "nelement", "__len__", "__iter__", "unbind", "split", "chunk", "tensor_split"])
_CONVERSIONS = frozenset(["to", "float", "double", "half", "bfloat16", "type", "type_as", "cpu", "cuda"])
_OPERATORS: dict[str, Callable[..., Any]] = {
    "__getitem__": operator.getitem,
    "__setitem__": operator.setitem,
    "__iadd__": operator.iadd,
    "__isub__": operator.isub,
    "__imul__": operator.imul,
    "__itruediv__": operator.itruediv,
    "__iand__": operator.iand,
    "__ior__": operator.ior,
}
_PLAIN = (int, float, complex, bool, str, type(None), type(Ellipsis), torch.memory_format, torch.layout)


def split_by_tape(model: nn.Module, names: Sequence[str], x: Arguments) -> list[Part]:
    """The parts of `model` (which the parts keep: pass a copy) cut after each of `names`. Raises CannotCutError."""
    return Traced(model, names, x, record).split(names)


def record(model: nn.Module, names: Sequence[str], x: Arguments) -> fx.Graph:
    """The model's operations in its present mode, as a graph. Raises CannotCutError."""
    try:
        return _record(model, x)
    except CannotCutError as reason:
        if str(reason) != _VALUE:
            raise
    with as_if_compiled():
        return _record(model, x)


@contextmanager
def as_if_compiled() -> Iterator[None]:
    """In here, a model that asks whether it is being compiled is told that it is, so that it leaves out operations that
    read values.
    """
    real = torch.compiler.is_compiling
    torch.compiler.is_compiling = lambda: True
    try:
        yield
    finally:
        torch.compiler.is_compiling = real


def _record(model: nn.Module, x: Arguments) -> fx.Graph:
    first, other = _recorded(model, x), x.shuffled()
    root = Root(model, x)
    try:
        second = _recorded(deep_copy(model).double(), _doubled(other))
        graph = _Writer(first, second, len(x), len(other), root).written()
    except CannotCutError:  # a model with its own types: they are fixed
        graph = _Writer(first, _recorded(model, other), len(x), len(other), root).written()
    adopt_constants(model, root, graph)
    return graph


def _doubled(x: Arguments) -> Arguments:
    return Arguments(tuple(row.double() if row.is_floating_point() else row for row in x.rows), x.names)


# The record of a run


@dataclass(frozen=True)
class _Made:
    """The result of operation `step`; `path` leads to a tensor in it."""

    step: int
    path: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Input:
    index: int


@dataclass(frozen=True)
class _State:
    """A parameter or buffer of the model, or an existing constant."""

    name: str


@dataclass(frozen=True)
class _Device:
    """The device of the batch."""


@dataclass
class _Step:
    """One operation: a function, or the name of a method, on earlier results; and the modules around it."""

    target: Any
    args: Any
    kwargs: Any
    modules: tuple[str, ...]
    detached: bool = False  # computed without gradients although its operands have some
    single: bool = True  # it gave one tensor


@dataclass
class _Tape:
    steps: list[_Step] = field(default_factory=list)
    outputs: tuple[Any, ...] = ()
    aliases: dict[Any, Any] = field(default_factory=dict)  # results of conversions that had nothing to convert
    constants: list[Tensor] = field(default_factory=list)
    buffers: list[tuple[str, _Made]] = field(default_factory=list)  # those that were given a new tensor


def _recorded(model: nn.Module, x: Arguments) -> _Tape:
    """The record of a run of a copy of the model. Raises CannotCutError."""
    root = Root(deep_copy(model), x)
    rows = tuple(row.clone() for row in x.rows)
    recorder = _Recorder(root, rows)
    with following("a tape"), torch.random.fork_rng(devices=[]), _paths(root.model, recorder), torch.enable_grad():
        with recorder, _functions_noted(recorder):
            outputs = root.give(rows)
        recorder.finish(outputs)
    return recorder.tape


@contextmanager
def _paths(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """In here the recorder knows which modules are running."""

    def enter(name: str) -> Any:
        return lambda module, args: recorder.inside.append(name)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        recorder.inside.pop()

    handles = []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(enter(name), prepend=True))
            handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Applied:
    """A user's autograd.Function as a function that a graph can hold."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind
        self.__name__, self.__module__ = f"apply_{kind.__name__}", __name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.kind.apply(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Applied) and self.kind is other.kind

    def __hash__(self) -> int:
        return hash(self.kind)


@contextmanager
def _functions_noted(recorder: _Recorder) -> Iterator[None]:
    """In here, the recorder notices every use of an autograd.Function, which torch does not report."""
    real = torch.autograd.Function.__dict__["apply"]

    def apply(kind: Any, *args: Any, **kwargs: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            return real.__get__(None, kind)(*args, **kwargs)

        run.__name__ = kind.__name__
        if not tensors_in((args, kwargs)):
            return run(*args, **kwargs)
        return recorder.hear(run, _Applied(kind), args, kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = real  # type: ignore[method-assign]


class _Recorder(TorchFunctionMode):
    """Records every operation while it is active."""

    def __init__(self, root: Root, rows: Rows) -> None:
        super().__init__()
        self.tape = _Tape()
        self.inside: list[str] = []
        self._device = rows[0].device
        self._known: dict[int, Any] = {id(row): _Input(i) for i, row in enumerate(rows)}
        self._uncertain: dict[int, str] = {id(row): _VALUE for row in rows}
        self._shapeless: set[int] = set()  # tensors whose sizes depend on values
        self._state: dict[int, list[str]] = {}
        self._named = [(name, tensor) for name, tensor, _ in state_names(root.model)]
        for name, tensor in self._named:
            self._state.setdefault(id(tensor), []).append(name)
            if isinstance(tensor, nn.Parameter):
                self._uncertain[id(tensor)] = _VALUE
        self._root = root
        self._written: set[int] = set()  # memory of buffers that were written to
        self._kept: list[Any] = [*rows, self._named]  # so that no id is used twice
        self._trouble = ""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call, and record operations with tensors in their result or operands."""
        return self._noted(func, None, args, dict(kwargs or {}))

    def hear(self, run: Any, target: Any, args: Any, kwargs: Any) -> Any:
        """Call `run` without recording it, and record `target` instead."""
        with torch._C.DisableTorchFunction():
            return self._noted(run, target, args, kwargs)

    def _noted(self, func: Any, target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        name = getattr(func, "__name__", "")
        operands = tensors_in((args, kwargs))
        if name in _REVEALING:
            self._reveal(operands)
            return func(*args, **kwargs)
        reads = name in _SIZES or (name == "__get__" and func.__self__.__name__ == "shape")
        if reads and any(id(t) in self._shapeless for t in operands):
            self._trouble = self._trouble or _VALUE
        before = [(t, t._version) for t in operands]
        try:
            converted = self._convert(tuple(args)), self._convert(kwargs)
        except CannotCutError as error:
            self._trouble = self._trouble or str(error)
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        written = [t for t, version in before if t._version != version]
        self._written.update(storage_of(t) for t in written if not t.is_nested)
        if isinstance(result, Tensor) or tensors_in(result) or written:
            self._note(target or func, name, converted, operands, result, bool(written))
        return result

    def finish(self, outputs: Rows) -> None:
        """Record the model's output, and the buffers that it replaced by new tensors."""
        self.tape.outputs = tuple(self._convert(output) for output in outputs)
        for name, old in self._named:
            module, _, key = name.rpartition(".")
            new = self._root.model.get_submodule(module)._buffers.get(key, old)
            if new is not None and new is not old and self._state[id(old)][0] == name:
                made = self._convert(new)
                if not isinstance(made, _Made) or new.shape != old.shape:
                    raise CannotCutError(f"it puts another tensor in the place of its buffer {name!r}: write into it")
                self.tape.buffers.append((name, made))
        if self._trouble:
            raise CannotCutError(self._trouble)

    def _reveal(self, operands: Rows) -> None:
        for tensor in operands:
            why = self._uncertain.get(id(tensor), "")
            if not why and id(tensor) not in self._known and tensor.requires_grad:
                why = _VALUE
            if not why and not tensor.is_nested and storage_of(tensor) in self._written:
                why = _VALUE
            self._trouble = self._trouble or why

    def _note(self, func: Any, name: str, converted: Any, operands: Rows, result: Any, writes: bool) -> None:
        target: Any
        if name == "__get__":
            target, args = getattr, (converted[0][0], func.__self__.__name__)
        elif name in _OPERATORS:
            target, args = _OPERATORS[name], converted[0]
        else:
            method = getattr(Tensor, name, None)
            target, args = (name if method is func or method == func else func), converted[0]
        lost = not torch.is_grad_enabled() and any(t.requires_grad for t in operands)
        why = next((w for t in operands if (w := self._uncertain.get(id(t), ""))), "")
        if any(word in name for word in _RANDOM):
            why = why or _DRAWN
        if self._shapes(name, operands):
            self._shapeless.update(id(t) for t in tensors_in(result) if t.dim() and not any(t is o for o in operands))
        step = len(self.tape.steps)
        self.tape.steps.append(_Step(target, args, converted[1], tuple(self.inside)))
        self.tape.steps[-1].detached, self.tape.steps[-1].single = lost and not writes, isinstance(result, Tensor)
        self._kept.append(result)
        if name in _CONVERSIONS and result is operands[0]:
            self.tape.aliases[_Made(step)] = converted[0][0]
        self._remember(result, _Made(step), why, writes or name in _CONVERSIONS)

    def _shapes(self, name: str, operands: Rows) -> bool:
        """Whether the sizes of a result depend on the values of the operands."""
        if any(id(t) in self._shapeless for t in operands):
            return True
        masked = name == "__getitem__" and any(t.dtype in (torch.bool, torch.uint8) for t in operands[1:])
        return (name in _SHAPING or masked or (name == "where" and len(operands) == 1)) and any(
            id(t) in self._uncertain for t in operands
        )

    def _remember(self, value: Any, made: _Made, why: str, new: bool) -> None:
        """Register the tensors of a result, to recognise them later."""
        if isinstance(value, Tensor):
            if id(value) in self._state and not new:
                return  # a parameter stays one, whichever operation returned it
            self._known[id(value)] = made
            if why:
                self._uncertain[id(value)] = why
        elif isinstance(value, (tuple, list)):
            for i, inner in enumerate(value):
                self._remember(inner, _Made(made.step, (*made.path, i)), why, new)
        elif tensors_in(value):
            self._trouble = self._trouble or f"an operation gives a {type(value).__name__}, which no tape can hold"

    def _convert(self, value: Any) -> Any:
        """An operand in terms of earlier results. Raises CannotCutError."""
        if isinstance(value, Tensor):
            return self._of_tensor(value)
        if isinstance(value, (tuple, list)):
            converted = [self._convert(v) for v in value]
            return converted if isinstance(value, list) else tuple(converted)
        if isinstance(value, dict):
            return {k: self._convert(v) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(self._convert(value.start), self._convert(value.stop), self._convert(value.step))
        if isinstance(value, torch.device):
            return _Device() if value == self._device else value
        if isinstance(value, (*_PLAIN, torch.dtype)):
            return value
        if callable(value) and not isinstance(value, type) and hasattr(value, "__name__"):
            return value  # an activation function passed to a layer
        raise CannotCutError(f"an operation takes a {type(value).__name__}, which no tape can hold")

    def _of_tensor(self, tensor: Tensor) -> Any:
        if id(tensor) in self._known:
            return self._known[id(tensor)]
        if id(tensor) in self._state:
            names = self._state[id(tensor)]  # that of the running module, if there are several
            return _State(next((n for n in names if n.rpartition(".")[0] in self.inside), names[0]))
        if tensor.requires_grad and not tensor.is_leaf:
            where = f" in {self.inside[-1]!r}" if self.inside else ""
            raise CannotCutError(
                f"a result{where} was not made by torch's own functions (an autograd.Function or a scripted function, "
                "say), and no tape can hold it"
            )
        self._kept.append(tensor)
        self.tape.constants.append(tensor.detach().clone())
        self._known[id(tensor)] = _State(f"constant{len(self.tape.constants) - 1}")
        return self._known[id(tensor)]


# From two runs to one graph


class _Writer:
    """Writes the graph of the first of two runs, which have `small` and `large` rows; sizes follow the batch."""

    def __init__(self, first: _Tape, second: _Tape, small: int, large: int, root: Root) -> None:
        self.first, self.second, self.small, self.large, self.root = first, second, small, large, root
        self.graph = fx.Graph()
        self.inputs = [self.graph.placeholder(f"x{i}") for i in range(len(root.inputs.rows))]
        self.made: list[fx.Node] = []
        self.state: dict[str, fx.Node] = {}
        self.shared: dict[Any, fx.Node] = {}  # sizes, types and the device, by their values

    def written(self) -> fx.Graph:
        """The graph. Raises CannotCutError if the runs differ in more than sizes."""
        self._check_alike()
        buffers: dict[int, list[tuple[str, _Made]]] = {}
        for name, made in self.first.buffers:
            buffers.setdefault(made.step, []).append((name, made))
        for i, (a, b) in enumerate(zip(self.first.steps, self.second.steps, strict=True)):
            if a.target is not b.target and a.target != b.target:
                raise CannotCutError(_BATCH)
            self.made.append(self._write(a, self._lift(a.args, b.args), self._lift(a.kwargs, b.kwargs)))
            for name, made in buffers.get(i, ()):
                value = self._call("detach", (self._found(made),), a.modules)
                self._call("copy_", (self._of_state(name), value), a.modules)
        self.graph.output(tuple(self._lift(a, b) for a, b in zip(self.first.outputs, self.second.outputs, strict=True)))
        for node in reversed(self.graph.nodes):
            picked = node.target in (operator.getitem, getattr) and not node.users
            if picked and node.op == "call_function":
                self.graph.erase_node(node)
        return self.graph

    def _check_alike(self) -> None:
        a, b = self.first, self.second
        if len(a.steps) != len(b.steps) or len(a.outputs) != len(b.outputs) or a.buffers != b.buffers:
            raise CannotCutError(_BATCH)
        for x, y in zip(a.constants, b.constants, strict=False):
            if x.shape != y.shape or not torch.allclose(x.double(), y.double(), equal_nan=True):
                raise CannotCutError("a value that depends on the data comes from outside torch")
        for i, constant in enumerate(a.constants):
            self.root.register_buffer(f"constant{i}", constant, persistent=False)

    def _write(self, step: _Step, args: Any, kwargs: Any) -> fx.Node:
        node = self._call(step.target, args, step.modules, kwargs)
        return self._call("detach", (node,), step.modules) if step.detached and step.single else node

    def _call(self, target: Any, args: Any, modules: tuple[str, ...], kwargs: Any = None) -> fx.Node:
        create = self.graph.call_method if isinstance(target, str) else self.graph.call_function
        node: fx.Node = create(target, tuple(args), kwargs or {})
        node.meta["nn_module_stack"] = {name: (ROOT + name, None) for name in modules}
        return node

    def _lift(self, a: Any, b: Any) -> Any:
        """An operand of the graph, from those of the two runs. Raises CannotCutError."""
        if type(a) is not type(b):
            raise CannotCutError(_BATCH)
        if isinstance(a, (_Made, _Input, _State, _Device)):
            return self._found(self._reconciled(a, b))
        if isinstance(a, (tuple, list)):
            if len(a) != len(b):
                raise CannotCutError(_BATCH)
            lifted = [self._lift(p, q) for p, q in zip(a, b, strict=True)]
            return lifted if isinstance(a, list) else tuple(lifted)
        if isinstance(a, dict):
            if list(a) != list(b):
                raise CannotCutError(_BATCH)
            return {k: self._lift(a[k], b[k]) for k in a}
        if isinstance(a, slice):
            return slice(self._lift(a.start, b.start), self._lift(a.stop, b.stop), self._lift(a.step, b.step))
        return self._lift_value(a, b)

    def _reconciled(self, a: Any, b: Any) -> Any:
        """The earlier of two references, if one run had nothing to convert and the other had. Raises CannotCutError."""
        for tape, later, earlier in ((self.first, a, b), (self.second, b, a)):
            while later != earlier and later in tape.aliases:
                later = tape.aliases[later]
            if later == earlier:
                return earlier
        raise CannotCutError(_BATCH)

    def _lift_value(self, a: Any, b: Any) -> Any:
        if a is b or a == b or (a != a and b != b):
            return a
        if isinstance(a, torch.dtype):
            return self._dtype() if (a, b) == (torch.float32, torch.float64) else a
        if isinstance(a, bool) or not isinstance(a, (int, float)):
            raise CannotCutError(_BATCH)
        if isinstance(a, float):
            return self._lift_float(a, b)
        if a % self.small or b != a // self.small * self.large:
            raise CannotCutError(_BATCH)
        return self._size(a // self.small)

    def _lift_float(self, a: float, b: float) -> float:
        """A float: rounded otherwise in double precision, or a limit of the type."""
        single, double = torch.finfo(torch.float32), torch.finfo(torch.float64)
        limits = {(getattr(single, k), getattr(double, k)) for k in ("min", "max", "eps", "tiny")}
        if (a, b) in limits or abs(a - b) <= 1e-5 * max(abs(a), abs(b)):
            return a
        raise CannotCutError(_BATCH)

    def _found(self, reference: Any) -> fx.Node:
        if isinstance(reference, _Input):
            return self.inputs[reference.index]
        if isinstance(reference, _State):
            return self._of_state(reference.name)
        if isinstance(reference, _Device):
            return self._once("device", getattr, (self.inputs[0], "device"))
        node: fx.Node = self.made[reference.step]
        for depth, i in enumerate(reference.path):
            key = (reference.step, reference.path[: depth + 1])
            if key not in self.shared:
                self.shared[key] = self._picked(node, i, self.first.steps[reference.step])
            node = self.shared[key]
        return node

    def _picked(self, node: fx.Node, i: int, step: _Step) -> fx.Node:
        """Element `i` of a step's result, directly after it."""
        with self.graph.inserting_after(node):
            element = self._call(operator.getitem, (node, i), step.modules)
        if not step.detached:
            return element
        with self.graph.inserting_after(element):
            return self._call("detach", (element,), step.modules)

    def _of_state(self, name: str) -> fx.Node:
        if name not in self.state:
            constant = name in self.root._buffers
            self.state[name] = self.graph.create_node("get_attr", name if constant else ROOT + name)
        return self.state[name]

    def _size(self, factor: int) -> fx.Node:
        rows = self._once("rows", "size", (self.inputs[0], 0))
        return rows if factor == 1 else self._once(("rows", factor), operator.mul, (rows, factor))

    def _dtype(self) -> Any:
        """The model's type: that of the first available tensor of real numbers."""
        floats = [i for i, row in enumerate(self.root.inputs.rows) if row.is_floating_point()]
        if floats:
            return self._once("dtype", getattr, (self.inputs[floats[0]], "dtype"))
        parameter = next((p for s in self.first.steps for p in _states(s) if p in self._float_parameters()), "")
        return self._once("dtype", getattr, (self._of_state(parameter), "dtype")) if parameter else torch.float32

    def _float_parameters(self) -> set[str]:
        named = self.root.model.named_parameters(remove_duplicate=False)
        return {name for name, p in named if p.is_floating_point()}

    def _once(self, key: Any, target: Any, args: tuple[Any, ...]) -> fx.Node:
        if key not in self.shared:
            self.shared[key] = self._call(target, args, ())
        return self.shared[key]


def _states(step: _Step) -> list[str]:
    """The names of the model's state among a step's operands."""
    leaves = pytree.tree_leaves((step.args, step.kwargs))
    return [leaf.name for leaf in leaves if isinstance(leaf, _State)]
