"""Cutting by tracing: `torch.fx` or the tape (`tape.py`) records every operation, and each part gets its share.

A trace is only valid for training or for evaluation (because of functional dropout), so there are two, and a part runs
the one of its mode. Both use the same parameters, under their names in the whole model.

Values that a part needs from an earlier one cross, except those that it can compute itself: parameters and constants,
sizes (the batch size is read from a crossing tensor), and tensors that only depend on sizes and constants, such as
positions. If a later part uses something that only depends on a mask, the mask crosses, and that part computes the
rest itself.
"""

from __future__ import annotations

import contextlib
import operator
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from cutlayer import seeds
from cutlayer.copies import deep_copy
from cutlayer.models.parts import (
    RAW_INPUT,
    Arguments,
    CannotCutError,
    Crossing,
    Part,
    SharedWeightError,
    batch_dimension,
    fill_owners,
    one_line,
    state_names,
    storage_of,
    taken_apart,
)
from cutlayer.types import Rows

_OPERATIONS = ("call_module", "call_function", "call_method")
ROOT = "model."  # the prefix of every name in a trace of a `Root`

# These attributes do not depend on a tensor's values, so their results need not cross.
_SHAPE_METHODS = frozenset({"size", "dim", "ndimension", "numel", "nelement", "__len__"})
_SAME_FOR_ALL = -1  # instead of the batch's dimension: a tensor [1, s...] that all rows share
_SHAPE_ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device"})


def split_by_trace(model: nn.Module, names: Sequence[str], x: Arguments) -> list[Part]:
    """The parts of `model` (which the parts keep: pass a copy) cut after each of `names`. Raises CannotCutError."""
    return Traced(model, names, x).split(names)


class Traced:
    """A model's two traces, each made once and cut any number of times, after any of the visible `names`."""

    def __init__(self, model: nn.Module, names: Sequence[str], x: Arguments, trace: Trace | None = None) -> None:
        self.model, self.names, self.x = model, names, x
        self._trace = trace or _trace
        self._runs: dict[bool, _Ran] = {}

    def split(self, names: Sequence[str]) -> list[Part]:
        """The parts, which keep the model. Raises CannotCutError."""
        programs = self._programs(names)
        graphs = [[program.graph_of(k) for program in programs] for k in range(len(names) + 1)]
        parts: list[Part] = [TracedPart(GraphCode(training), GraphCode(evaluating)) for training, evaluating in graphs]
        _share_out(self.model, parts, graphs)
        for k, part in enumerate(parts[:-1]):
            part.crossing_names = programs[0].names_of(k)
        # Several parts may share modules without state, and one part must not set the mode for the others.
        return [deep_copy(part) for part in parts]

    def look(self, name: str) -> tuple[list[nn.Module], tuple[Crossing, ...]]:
        """The parameters of each part of a cut after `name`, in modules that cannot be run, and the crossing tensors.
        Takes a fraction of `split`'s time. Raises CannotCutError.
        """
        program = self._programs([name])[0]
        owners = [nn.Module(), nn.Module()]
        _share_out(self.model, owners, [[program.graph_of(k)] for k in range(2)])
        crossing = program.describe(0)
        if any(meta.raw for meta, _ in crossing):
            raise CannotCutError(RAW_INPUT)
        shapes = [meta.shape[: max(d, 0)] + meta.shape[max(d, 0) + 1 :] for meta, d in crossing]
        return owners, tuple(Crossing(shape, meta.dtype) for shape, (meta, _) in zip(shapes, crossing, strict=True))

    def _programs(self, names: Sequence[str]) -> list[_Program]:
        """One for training, one for evaluation, between which the same tensors cross."""
        for merge in (True, False):  # one tensor in evaluation may be two in training
            programs = self._in_both_modes(names, merge)
            if all(programs[0].describe(b) == programs[1].describe(b) for b in range(len(names))):
                return programs
        raise CannotCutError("different tensors cross the cut in training and in evaluation")

    def _in_both_modes(self, names: Sequence[str], merge: bool) -> list[_Program]:
        was_training = self.model.training
        programs = []
        for training in (True, False):
            self.model.train(training)
            programs.append(_Program(self.model, names, self.x, self._ran(training), merge))
        self.model.train(was_training)
        return programs

    def run(self) -> None:
        """Trace, if this was not done yet. Raises CannotCutError."""
        was_training = self.model.training
        for training in (True, False):
            self.model.train(training)
            self._ran(training)
        self.model.train(was_training)

    def _ran(self, training: bool) -> _Ran:
        if training not in self._runs:
            graph = self._trace(self.model, self.names, self.x)
            seen = [_run(self.model, graph, x) for x in (self.x, self.x.with_one_more())]
            outputs: Any = list(graph.nodes)[-1].args[0]
            if not all(isinstance(node, fx.Node) and seen[0][node].is_tensor for node in outputs):
                raise CannotCutError("the model returns something beside tensors")
            self._runs[training] = _Ran(graph, *seen)
        return self._runs[training]


def is_within_layer(model: nn.Module, name: str) -> bool:
    """Whether the module called `name` is inside one of torch's own layers, which a trace shows as one operation."""
    tracer, path = _Tracer(()), name.split(".")[:-1]
    above = {".".join(path[:i]): model.get_submodule(".".join(path[:i])) for i in range(1, len(path) + 1)}
    lists = (nn.ModuleList, nn.ModuleDict)  # never executed themselves
    return any(tracer.is_leaf_module(m, n) for n, m in above.items() if not isinstance(m, lists))


class TracedPart(Part):
    """Runs its share of the traced operations."""

    def __init__(self, training: GraphCode, evaluating: GraphCode) -> None:
        super().__init__()
        self._codes = {True: training, False: training if training.source == evaluating.source else evaluating}
        self._draws: tuple[GraphCode, bool] | None = None

    @property
    def draws(self) -> bool:  # type: ignore[override]
        """Whether an operation in training may draw random numbers: all except those known not to."""
        code = self._codes[True]
        if self._draws is None or self._draws[0] is not code:
            self._draws = (code, any(_may_draw(self, node) for node in code.graph.nodes))
        return self._draws[1]

    @property
    def training_code(self) -> GraphCode:
        """The graph for training."""
        return self._codes[True]

    @training_code.setter
    def training_code(self, code: GraphCode) -> None:
        self._codes = {True: code, False: self._codes[False]}

    def run_rows(self, rows: Rows) -> Rows:
        """The graph of the present mode: from received tensors, [R, s...] each, to outputs, [R, s...] each."""
        return cast(Rows, self._codes[self.training](self, rows))


def pool_first(part: Part, by_two: Callable[[Tensor], Tensor] | None = None) -> Part:
    """A copy of a part in which max pooling comes before `relu` instead of directly after it, with the same numbers.
    `by_two` computes poolings by two.
    """
    changed = deep_copy(part)
    if isinstance(changed, TracedPart):
        codes = {code: GraphCode(_pool_first(part, code.graph, by_two)) for code in set(changed._codes.values())}
        changed._codes = {mode: codes[code] for mode, code in changed._codes.items()}
    return changed


def _pool_first(part: nn.Module, graph: fx.Graph, by_two: Callable[[Tensor], Tensor] | None) -> fx.Graph:
    graph = deep_copy(graph)
    for pool in list(graph.nodes):
        if not _is_max_pool(part, pool):
            continue
        relu = pool.args[0] if pool.args else None
        if isinstance(relu, fx.Node) and _is_relu(part, relu):
            _swap(graph, relu, pool)
        if by_two is not None and _is_by_two(part, pool):
            with graph.inserting_after(pool):
                quick = graph.call_function(by_two, pool.args[:1])
            pool.replace_all_uses_with(quick)
            graph.erase_node(pool)
    return graph


def _swap(graph: fx.Graph, relu: fx.Node, pool: fx.Node) -> None:
    """Pooling first, unless another operation uses the value in between."""
    source = relu.args[0]
    if isinstance(source, fx.Node) and len(relu.users) == len(source.users) == 1:
        pool.replace_input_with(relu, source)
        with graph.inserting_after(pool):
            after = graph.node_copy(relu, {source: pool}.__getitem__)
        pool.replace_all_uses_with(after, delete_user_cb=lambda user: user is not after)
        graph.erase_node(relu)


def _is_by_two(part: nn.Module, node: fx.Node) -> bool:
    """Whether a max pooling has disjoint pairs, or squares of 2 x 2."""
    if node.op == "call_module":
        layer = part.get_submodule(str(node.target))
        given = [getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation", "ceil_mode")]
    else:
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
        usual = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False}
        given_by_name = {**usual, **dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
        given = [given_by_name.get(name) for name in names]
    kernel, stride, padding, dilation, ceil = given
    stride = kernel if stride in (None, []) else stride

    def are(value: int, *given: Any) -> bool:
        return all(set(v) == {value} if isinstance(v, tuple | list) else v == value for v in given)

    return are(2, kernel, stride) and are(0, padding) and are(1, dilation) and ceil is False


def _is_max_pool(part: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        layer = part.get_submodule(str(node.target))
        return type(layer) in (nn.MaxPool1d, nn.MaxPool2d) and not layer.return_indices
    functions = (functional.max_pool1d, functional.max_pool2d, torch.max_pool1d, torch.max_pool2d)
    return node.op == "call_function" and node.target in functions and not node.kwargs.get("return_indices")


def _is_relu(part: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(part.get_submodule(str(node.target))) is nn.ReLU
    return node.op == "call_function" and node.target in (functional.relu, torch.relu)


def chain_of(part: nn.Module) -> list[tuple[type[nn.Module], str]] | None:
    """A part's layers from first to last, each with its name, if in training it is only a chain of torch's own layers,
    without hooks, from one tensor to one tensor; otherwise None. An activation written as a function has no name.
    """
    if not isinstance(part, TracedPart) or part.copies_rows or part.structure is not None:
        return None
    found: list[tuple[type[nn.Module], str]] = []
    previous: fx.Node | None = None
    for node in part._codes[True].graph.nodes:
        if node.op == "placeholder":
            previous = node
        elif node.op == "output":
            return found if node.args == ((previous,),) else None
        elif node.op == "call_function" and node.target is operator.getitem:
            if node.args != (previous, 0) or found:
                return None
            previous = node
        else:
            layer = _layer_of(part, node)
            if layer is None or node.args != (previous,) or set(node.kwargs) - {"inplace"} or len(node.users) != 1:
                return None
            found.append(layer)
            previous = node
    return None


def _layer_of(part: nn.Module, node: fx.Node) -> tuple[type[nn.Module], str] | None:
    """(kind, name) of a node's layer."""
    if node.op == "call_module":
        layer = part.get_submodule(str(node.target))
        hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
        return None if hooked else (type(layer), str(node.target))
    named: dict[Any, type[nn.Module]] = {
        functional.relu: nn.ReLU,
        torch.relu: nn.ReLU,
        torch.tanh: nn.Tanh,
        torch.sigmoid: nn.Sigmoid,
    }
    kind = named.get(node.target) if node.op == "call_function" else None
    return None if kind is None else (kind, "")


_DRAWING = ("drop", "rand", "bernoulli", "normal_", "uniform", "multinomial", "exponential", "cauchy", "geometric",
            "poisson", "gumbel", "rrelu", "fractional", "attention", "lstm", "gru", "rnn")  # fmt: skip


def _may_draw(part: nn.Module, node: fx.Node) -> bool:
    """Whether an operation may draw random numbers. One of torch's own operations does so only if its name says it."""
    if node.op == "call_module":
        return any(map(_layer_may_draw, part.get_submodule(str(node.target)).modules()))
    if node.op == "call_method":
        return _names_a_draw(str(node.target))
    if node.op == "call_function":
        name, home = getattr(node.target, "__name__", ""), getattr(node.target, "__module__", "") or ""
        ours = home.split(".")[0] in ("torch", "_operator", "operator", "builtins", "math", "cutlayer", "")
        return not (name and ours) or _names_a_draw(name)
    return False


def _layer_may_draw(layer: nn.Module) -> bool:
    kind, hooked = type(layer), bool(layer._forward_hooks or layer._forward_pre_hooks)
    return hooked or not kind.__module__.startswith("torch.nn.modules.") or _names_a_draw(kind.__name__)


def _names_a_draw(name: str) -> bool:
    return any(word in name.lower() for word in _DRAWING) or (name.lower().endswith("_") and "norm" in name.lower())


class GraphCode:
    """A graph compiled to a Python function. Immutable, so that copies of a part share it."""

    def __init__(self, graph: fx.Graph) -> None:
        graph.lint()
        self.graph = graph
        code = graph.python_code("self")
        self.source = code.src
        namespace = dict(code.globals)
        exec(compile(self.source, "<cutlayer part>", "exec"), namespace)
        self._function = namespace["forward"]

    def __call__(self, part: nn.Module, rows: Rows) -> Any:
        """The outputs of the graph, with the tensors of `part`."""
        return self._function(part, rows)

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphCode:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return GraphCode, (self.graph,)


class Root(nn.Module):
    """The model as a function from the batch's tensors to those of its output. Optional arguments keep their
    defaults.
    """

    model: nn.Module
    inputs: Arguments

    def __init__(self, model: nn.Module, inputs: Arguments) -> None:
        super().__init__()
        self.model = model
        self.__dict__["inputs"] = inputs  # not a tensor, even if nn.Module takes it for one

    def give(self, rows: Rows) -> Rows:
        """The tensors of the model's output for the batch's tensors `rows`."""
        return taken_apart(self.inputs.give(self.model, rows))[0]


def _with_arguments(root: Root) -> Root:
    """The same with a `forward` that has an argument per tensor, as torch.fx requires."""
    arguments = ", ".join(f"x{i}" for i in range(len(root.inputs.rows)))
    namespace: dict[str, Any] = {}
    exec(f"def forward(self, {arguments}):\n    return self.give(({arguments},))", namespace)
    root.__class__ = type("Root", (Root,), {"forward": namespace["forward"]})
    return root


class _Tracer(fx.Tracer):
    """Treats torch's own layers as single operations, except those with a cut inside.

    While torch.fx traces, it changes how all modules of the process are called. Modules called by other threads run as
    usual.
    """

    proxy_buffer_attributes = True  # so that slices of a buffer may have traced sizes

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self._inside = tuple(names)
        self._thread = threading.get_ident()

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if any(name.startswith(module_qualified_name + ".") for name in self._inside):
            return False
        return super().is_leaf_module(m, module_qualified_name)


@dataclass(frozen=True)
class _Seen:
    """A value when the graph ran: a tensor's shape and type, or the value itself."""

    value: Any

    @property
    def is_tensor(self) -> bool:
        return isinstance(self.value, _Meta)


@dataclass(frozen=True)
class _Meta:
    shape: tuple[int, ...]
    dtype: torch.dtype
    raw: bool  # it shares the memory of an input that must not cross
    place: Any = field(compare=False)  # its memory and layout, equal for two references to the same tensor


@dataclass(frozen=True)
class _Ran:
    """A trace, and the results of its operations for a batch and for one row more."""

    graph: fx.Graph
    seen: dict[fx.Node, _Seen]
    seen_larger: dict[fx.Node, _Seen]


class _Program:
    """One trace of the model, run for a batch, and which part each of its operations belongs to. `merge`: tensors that
    are one and the same cross once.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], x: Arguments, ran: _Ran, merge: bool) -> None:
        self.model, self.names, self.x, self.batch = model, names, x, len(x)
        self.graph, self.seen, self.seen_larger = ran.graph, ran.seen, ran.seen_larger
        self.nodes = list(self.graph.nodes)
        self.inputs = [n for n in self.nodes if n.op == "placeholder"]
        self.sealed = {self.inputs[i] for i in x.sealed()}
        self.output = self.nodes[-1]
        self.kinds: dict[fx.Node, set[str]] = {}
        self._sort_out()
        self.part = self._assign()
        self.same: dict[fx.Node, fx.Node] = {}  # a tensor that need not cross -> the same tensor, which crosses
        self.crossing = [self._crossing(b) for b in range(len(names))]
        if merge:
            self.crossing = [[n for n in nodes if self._first_of_its_kind(n, nodes)] for nodes in self.crossing]

    def describe(self, boundary: int) -> list[tuple[_Meta, int]]:
        """The tensors that cross after part `boundary`, and which of their dimensions is the batch."""
        return [(self.seen[n].value, self._batch_dimension(n)) for n in self.crossing[boundary]]

    def names_of(self, boundary: int) -> tuple[str, ...]:
        """A description of the tensors that cross after part `boundary`."""
        return tuple(self._name_of(n, self.names[boundary]) for n in self.crossing[boundary])

    def _name_of(self, node: fx.Node, cut: str) -> str:
        if node in self.inputs:
            i = self.inputs.index(node)
            return f"input {i}" if self.x.names is None else self.x.names[i]
        modules = [path.split("@")[0].removeprefix(ROOT) for path, _ in node.meta.get("nn_module_stack", {}).values()]
        inner = [name for name in modules if name and name != ROOT[:-1]]
        return cut if cut in inner else f"{inner[-1] if inner else 'the model'}: {node.name}"

    def _first_of_its_kind(self, node: fx.Node, nodes: Sequence[fx.Node]) -> bool:
        """Whether no tensor before it in `nodes` is the same one."""

        def places(n: fx.Node) -> Any:
            return self.seen[n].value.place, self.seen_larger[n].value.place

        first = next(n for n in nodes if places(n) == places(node))
        if first is not node:
            self.same[node] = first
        return first is node

    def graph_of(self, k: int) -> fx.Graph:
        """Part k's own graph: a function of the rows it receives, giving the tuple of those it passes on."""
        return _Builder(self, k).build()

    def _assign(self) -> dict[fx.Node, int]:
        """The part of each operation: that of the first cut which comes after it."""
        ends = [_last_inside(self.nodes, name) for name in self.names]
        if ends != sorted(set(ends)):
            raise CannotCutError(f"{self.names[1]!r} does not come after {self.names[0]!r}")
        part = {node: sum(end < i for end in ends) for i, node in enumerate(self.nodes)}
        for node in self.nodes:
            if self._picks_from_tuple(node):  # this belongs to the part that has the tuple
                part[node] = part[node.args[0]]
        self._mask_early(part)
        self._unpack(part)
        for k, name in enumerate(self.names, start=1):
            if not any(part[n] == k and n.op in _OPERATIONS and not self.from_sizes(n) for n in self.nodes):
                raise CannotCutError(
                    f"nothing is computed after {name!r}{' and before the next cut' if ends[k:] else ''}"
                )
        return part

    def _mask_early(self, part: dict[fx.Node, int]) -> None:
        """Masks that a later part computes from token ids (is it padding?) are the first part's work.

        The ids themselves then stay where they are.
        """
        if all(self.seen[node].value.dtype.is_floating_point for node in self.sealed):
            return
        for node in self.nodes:
            if part[node] and self._is_mask(node) and self.of_input(node) and not self.made_by_all(node):
                steps = _with_sources(node)
                if all(self.of_input(step) or self.from_sizes(step) for step in steps):
                    part.update(dict.fromkeys(steps, 0))

    def _is_mask(self, node: fx.Node) -> bool:
        return self.seen[node].is_tensor and self.seen[node].value.dtype == torch.bool

    def _unpack(self, part: dict[fx.Node, int]) -> None:
        """If a later part uses a whole tuple of tensors (a recurrent state), make it use the elements."""
        for node in self.nodes:
            for user in list(node.users):
                used_later = user in part and part[user] > part[node]
                if used_later and _holds_tensors(self.seen[node].value) and not self.seen[node].is_tensor:
                    elements = self._elements(node, part)
                    user.args, user.kwargs = (
                        fx.node.map_arg(a, lambda n, old=node, new=elements: new if n is old else n)  # type: ignore[misc]
                        for a in (user.args, user.kwargs)
                    )
        self.nodes = list(self.graph.nodes)

    def _elements(self, node: fx.Node, part: dict[fx.Node, int]) -> tuple[Any, ...]:
        elements = []
        for i in reversed(range(len(self.seen[node].value))):
            with self.graph.inserting_after(node):
                element = self.graph.call_function(operator.getitem, (node, i))
            part[element], self.kinds[element] = part[node], set()
            self.seen[element] = _Seen(self.seen[node].value[i])
            self.seen_larger[element] = _Seen(self.seen_larger[node].value[i])
            nested = not self.seen[element].is_tensor and _holds_tensors(self.seen[element].value)
            elements.append(self._elements(element, part) if nested else element)
        return tuple(reversed(elements))

    def _picks_from_tuple(self, node: fx.Node) -> bool:
        source = node.args[0] if node.target in (operator.getitem, getattr) else None
        if not isinstance(source, fx.Node) or self.seen[source].is_tensor:
            return False
        return _holds_tensors(self.seen[source].value)

    # Crossing tensors

    def _crossing(self, boundary: int) -> list[fx.Node]:
        needed: set[fx.Node] = set()
        for node in self.nodes:
            if self.part[node] > boundary and node.op != "get_attr" and not self.from_sizes(node):
                for source in node.all_input_nodes:
                    self._need(source, self.part[node], boundary, needed)
        if not needed:
            raise CannotCutError(f"nothing that {self.names[boundary]!r} gives is used after it")
        return [n for n in self.nodes if n in needed]

    def _need(self, source: fx.Node, k: int, boundary: int, needed: set[fx.Node]) -> None:
        if source.op == "get_attr" or self.part[source] > boundary or self.from_sizes(source):
            return
        if self.made_by_all(source) and source not in self.inputs:
            for inner in source.all_input_nodes:
                self._need(inner, k, boundary, needed)
        elif not self.seen[source].is_tensor:
            raise CannotCutError(f"a value that is neither a tensor nor a size crosses ({source.name})")
        elif source in self.sealed or self._is_disguised_input(source):
            raise CannotCutError(
                f"the layers after {self.names[boundary]!r} use the raw input, which would have to be sent along: "
                "no privacy would be left"
            )
        else:
            self._batch_dimension(source)
            needed.add(source)

    def _batch_dimension(self, node: fx.Node) -> int:
        small, large = self.seen[node].value, self.seen_larger[node].value
        dimension = batch_dimension(small.shape, large.shape, self.batch)
        if dimension is None and small.shape == large.shape and small.shape[:1] == (1,):
            return _SAME_FOR_ALL
        if dimension is None:
            raise CannotCutError(f"a tensor without a batch dimension crosses ({node.name}, shape {list(small.shape)})")
        return dimension

    def _is_disguised_input(self, node: fx.Node) -> bool:
        """Whether a tensor of integers is the input, or computed from it without any parameters."""
        dtype = self.seen[node].value.dtype
        known = self.of_input(node) and not self.made_by_all(node)
        return known and not dtype.is_floating_point and dtype != torch.bool

    # Values that a part can compute itself. Kinds are determined in the order of execution: inputs before results.

    def _sort_out(self) -> None:
        for node in self.nodes:
            kinds = self.kinds[node] = set()
            if self._is_from_sizes(node):
                kinds.add("from sizes")
            written = any(_writes(user) for user in node.users)
            if self._is_function_of(node, "made by all") and not written:
                kinds.add("made by all")
            if node in self.inputs:
                kinds.update({"of input"} if node in self.sealed or written else {"of input", "made by all"})
            if self._is_function_of(node, "of input"):
                kinds.add("of input")

    def from_sizes(self, node: fx.Node) -> bool:
        """Whether a value that is not a tensor only depends on shapes."""
        return "from sizes" in self.kinds[node]

    def made_by_all(self, node: fx.Node) -> bool:
        """Whether a tensor only depends on sizes, constants and inputs that may cross, so that each part can compute
        it.
        """
        return "made by all" in self.kinds[node]

    def of_input(self, node: fx.Node) -> bool:
        """Whether a tensor only depends on the input, without parameters and randomness."""
        return "of input" in self.kinds[node]

    def _is_from_sizes(self, node: fx.Node) -> bool:
        if node.op not in _OPERATIONS or _holds_tensors(self.seen[node].value):
            return False
        tensors = [n for n in node.all_input_nodes if self.seen[n].is_tensor]
        by_method = node.op == "call_method" and node.target in _SHAPE_METHODS
        by_attribute = node.target is getattr and node.args[1] in _SHAPE_ATTRIBUTES
        if tensors and not (by_method or by_attribute or node.target is torch.ops.aten.sym_size.int):
            return False
        return all(self.from_sizes(n) for n in node.all_input_nodes if n not in tensors)

    def _is_function_of(self, node: fx.Node, kind: str) -> bool:
        """Whether a tensor is computed, without parameters and randomness, from sizes and tensors of this kind."""
        if node.op == "get_attr":
            return not isinstance(_attribute(self.model, _without_root(node)), nn.Parameter)
        if node.op not in ("call_function", "call_method") or not self.seen[node].is_tensor:
            return False
        if _is_random(node) or _writes(node):
            return False
        kinds = {kind, "made by all"}
        return all(self.from_sizes(n) or not kinds.isdisjoint(self.kinds[n]) for n in node.all_input_nodes)


class _Builder:
    """Writes the graph of part k."""

    def __init__(self, program: _Program, k: int) -> None:
        self.program, self.k = program, k
        self.graph = fx.Graph()
        self.made: dict[fx.Node, Any] = {}
        self.first: Any = None  # the first tensor received, [R, s...]
        self.batch: Any = None  # R, when it is needed

    def build(self) -> fx.Graph:
        self._receive(self.graph.placeholder("rows"))
        for node in self.program.nodes:
            mine = self.program.part[node] == self.k and node.op in _OPERATIONS
            if mine and not self._is_remote_size(node):
                self._copy(node)
        self.graph.output(self._give())
        return self.graph

    def _receive(self, rows: fx.Node) -> None:
        program = self.program
        if self.k == 0:
            for i, node in enumerate(program.inputs):
                self.made[node] = self.graph.call_function(operator.getitem, (rows, i))
            return
        for i, (node, (_, dimension)) in enumerate(zip(self._crossing(-1), program.describe(self.k - 1), strict=True)):
            row = self.graph.call_function(operator.getitem, (rows, i))  # [R, s...]
            self.first = self.first or row
            if dimension > 0:
                row = self.graph.call_method("contiguous", (self.graph.call_method("movedim", (row, 0, dimension)),))
            self.made[node] = row
        for node, first in program.same.items():
            if first in self.made and node not in self.made:
                self.made[node] = self.made[first]

    def _give(self) -> tuple[Any, ...]:
        program = self.program
        if self.k == len(program.names):
            return tuple(self._value(node) for node in cast(Any, program.output.args[0]))
        given = []
        for node, (_, dimension) in zip(self._crossing(0), program.describe(self.k), strict=True):
            value = self._value(node)
            if dimension == _SAME_FOR_ALL:
                value = self._for_every_row(value, len(program.seen[node].value.shape))
            given.append(self.graph.call_method("movedim", (value, dimension, 0)) if dimension > 0 else value)
        return tuple(given)

    def _for_every_row(self, value: fx.Node, dimensions: int) -> fx.Node:
        """[1, s...] -> [R, s...]: rows of different clients must not share one client's tensor."""
        like = self.made[self.program.inputs[0]] if self.k == 0 else self.first
        rows = self.graph.call_method("size", (like, 0))
        return self.graph.call_method("expand", (value, rows, *[-1] * (dimensions - 1)))

    def _crossing(self, offset: int) -> list[fx.Node]:
        return self.program.crossing[self.k + offset]

    def _is_remote_size(self, node: fx.Node) -> bool:
        """Whether a size of an earlier part's tensor is read here (its tensor need not have crossed)."""
        if not self.program.from_sizes(node):
            return False
        return any(n not in self.made and not self._is_mine(n) for n in node.all_input_nodes)

    def _is_mine(self, node: fx.Node) -> bool:
        """Whether this part computes with a parameter or constant, instead of only reading its type."""
        users = [user for user in node.users if self.program.part[user] == self.k]
        return node.op == "get_attr" and any(not self.program.from_sizes(user) for user in users)

    def _copy(self, node: fx.Node) -> fx.Node:
        self.made[node] = self.graph.node_copy(node, self._value)
        self.made[node].target = _without_root(node)
        return cast(fx.Node, self.made[node])

    def _value(self, node: fx.Node) -> Any:
        if node not in self.made:
            if self.program.from_sizes(node):
                small, large = self.program.seen[node].value, self.program.seen_larger[node].value
                self.made[node] = self._size(small, large)
            else:  # a parameter or a constant, or a tensor made of constants and sizes
                self._copy(node)
        return self.made[node]

    def _size(self, small: Any, large: Any) -> Any:
        """A value seen for two batch sizes, as a constant or as a multiple of the batch size."""
        if isinstance(small, (tuple, list)):
            return tuple(self._size(a, b) for a, b in zip(small, large, strict=True))
        if isinstance(small, torch.device):
            return self.graph.call_function(getattr, (self.first, "device"))
        if isinstance(small, torch.dtype):
            received = [] if self.k == 0 else self._crossing(-1)
            like = [self.made[n] for n in received if self.program.seen[n].value.dtype == small]
            return self.graph.call_function(getattr, (like[0], "dtype")) if like else small
        if small == large:
            return small
        n = self.program.batch
        if isinstance(small, int) and small % n == 0 and large == small // n * (n + 1):
            if self.batch is None:
                self.batch = self.graph.call_method("size", (self.first, 0))
            return self.batch if small == n else self.graph.call_function(operator.mul, (self.batch, small // n))
        raise CannotCutError(f"a number that depends on the batch in an unknown way crosses ({small} for {n} rows)")


# Tracing and running


Trace = Callable[[nn.Module, Sequence[str], Arguments], fx.Graph]


def _trace(model: nn.Module, names: Sequence[str], x: Arguments) -> fx.Graph:
    root = _with_arguments(Root(model, x))
    with seeds.alone(), following("torch.fx"):
        graph = _Tracer([ROOT + name for name in names]).trace(root)
    adopt_constants(model, root, graph)
    return graph


@contextlib.contextmanager
def following(tracer: str) -> Iterator[None]:
    """Turns any error in the body, which traces the user's code, into a reason."""
    before = random.getstate(), _numpy_state(), torch.get_rng_state()
    try:
        yield
    except CannotCutError:
        raise
    except Exception as error:  # the user's code: any error is possible
        raise CannotCutError(f"{tracer} cannot follow it ({one_line(error)})") from error
    drawn = random.getstate() != before[0] or _numpy_state() != before[1]
    if drawn or not torch.equal(torch.get_rng_state(), before[2]):
        raise CannotCutError("it draws random numbers that a trace would freeze")


def adopt_constants(model: nn.Module, root: nn.Module, graph: fx.Graph) -> None:
    """Tensors made while tracing, which depend on no input, become buffers of the model that are not in its state."""
    for node in graph.nodes:
        if node.op == "get_attr" and not _exists(model, _without_root(node)):
            value = _attribute(root, str(node.target))
            name = f"traced_{'training' if model.training else 'evaluation'}_{str(node.target).replace('.', '_')}"
            if not isinstance(value, Tensor):
                raise CannotCutError("its trace has graphs inside graphs")
            if not hasattr(model, name):
                model.register_buffer(name, value, persistent=False)
            node.target = ROOT + name


def _numpy_state() -> bytes:
    state: Any = np.random.get_state()
    return bytes(state[1].tobytes()) + str(state[2:]).encode()


def _run(model: nn.Module, graph: fx.Graph, x: Arguments) -> dict[fx.Node, _Seen]:
    """The results of all operations for the batch `x`, without changing the model."""
    recorder = _Recorder(deep_copy(Root(model, x)), graph)
    try:
        with torch.no_grad():
            recorder.run_on(x)
    except Exception as error:
        raise CannotCutError(f"its trace does not run ({one_line(error)})") from error
    return recorder.seen


class _Recorder(fx.Interpreter):
    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__(root, graph=graph)
        self.seen: dict[fx.Node, _Seen] = {}

    def run_on(self, x: Arguments) -> None:
        """Run for a batch, and remember."""
        rows = [row.clone() for row in x.rows]
        self._sealed = {storage_of(rows[i]) for i in x.sealed()}
        self._kept: list[Any] = []  # so that no memory is reused
        self.run(*rows, enable_io_processing=False)
        self._kept.clear()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self._kept.append(value)
        self.seen[n] = _Seen(fx.node.map_aggregate(value, self._meta))
        return value

    def _meta(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.is_nested:
            return _Meta((), leaf.dtype, False, id(leaf))
        storage = storage_of(leaf)
        place = (storage, leaf.storage_offset(), leaf.shape, leaf.stride(), leaf.dtype)
        return _Meta(tuple(leaf.shape), leaf.dtype, storage in self._sealed, place)


def _holds_tensors(value: Any) -> bool:
    found: list[Any] = []
    fx.node.map_aggregate(value, found.append)
    return any(isinstance(leaf, _Meta) for leaf in found)


def _last_inside(nodes: Sequence[fx.Node], name: str) -> int:
    """The index of the last operation executed inside module `name`."""
    inside = [
        i
        for i, node in enumerate(nodes)
        if node.op in _OPERATIONS
        and any(path.split("@")[0] == ROOT + name for path, _ in node.meta.get("nn_module_stack", {}).values())
    ]
    if not inside:
        raise CannotCutError(f"no operation is traced inside {name!r}: it is never executed, or does nothing")
    return inside[-1]


def _with_sources(node: fx.Node) -> set[fx.Node]:
    """A node and everything on which it depends."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        step = pending.pop()
        if step not in found:
            found.add(step)
            pending += step.all_input_nodes
    return found


def _name(node: fx.Node) -> str:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.split(".")[0]


def _is_random(node: fx.Node) -> bool:
    name = _name(node)
    return any(word in name for word in ("rand", "dropout", "bernoulli", "normal", "multinomial", "uniform", "empty"))


def _writes(node: fx.Node) -> bool:
    """Whether an operation changes its operand in place."""
    name = _name(node)
    inplace = (name.endswith("_") and not name.endswith("__")) or node.kwargs.get("out") is not None
    return inplace or name == "setitem" or (name.startswith("i") and node.target in _IN_PLACE_OPERATORS)


_IN_PLACE_OPERATORS = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.iand, operator.ior)


def _without_root(node: fx.Node) -> Any:
    if node.op in ("call_module", "get_attr"):
        return str(node.target).removeprefix(ROOT)
    return node.target


# Dividing the state

Named = dict[str, tuple[Tensor, bool]]  # every name of the state: its tensor, and whether the state dict has it


def _share_out(model: nn.Module, parts: Sequence[nn.Module], graphs: Sequence[Sequence[fx.Graph]]) -> None:
    """Give every part the state that its graphs name; unnamed state goes with its neighbours."""
    named = {name: (tensor, persistent) for name, tensor, persistent in state_names(model)}
    owner: dict[int, int] = {}
    ends: dict[int, set[str]] = {}  # for a tensor that both ends of a U-shape use: its names at the second
    for k, part in enumerate(parts):
        for target, is_module in _targets(graphs[k]):
            for tensor in _attach(model, part, target, is_module, named, owner, k):
                if owner.setdefault(id(tensor), k) != k:
                    ends.setdefault(id(tensor), set()).update(_names_below(target, is_module, named, tensor))
    owners = {
        name: len(parts) - 1 if name in ends.get(id(tensor), ()) else owner[id(tensor)]
        for name, (tensor, _) in named.items()
        if id(tensor) in owner
    }
    for name, k in fill_owners(named, owners, len(parts)).items():
        if not _has(parts[k], name):
            _register(parts[k], name, *named[name])


def _names_below(target: str, is_module: bool, named: Named, tensor: Tensor) -> set[str]:
    """The names of the tensor that a graph's `target` means."""
    if not is_module:
        return {target}
    return {name for name, (t, _) in named.items() if t is tensor and name.startswith(f"{target}.")}


def _targets(graphs: Sequence[fx.Graph]) -> dict[tuple[str, bool], None]:
    return {
        (str(n.target), n.op == "call_module"): None
        for graph in graphs
        for n in graph.nodes
        if n.op in ("call_module", "get_attr")
    }


def _attach(
    model: nn.Module,
    part: nn.Module,
    target: str,
    is_module: bool,
    named: Named,
    owner: dict[int, int],
    k: int,
) -> list[Tensor]:
    """Register one module, parameter or buffer in a part; returns the tensors that the part now owns."""
    if is_module:
        module = model.get_submodule(target)
        for name, tensor, _ in state_names(module):
            _refuse_if_shared(named, f"{target}.{name}", tensor, owner, k)
        container, leaf = _container(part, target)
        container.add_module(leaf, module)
        return [tensor for _, tensor, _ in state_names(module)]
    value = _attribute(model, target)
    if target not in named:  # a constant met while tracing
        _register(part, target, value, False)
        return []
    if isinstance(value, nn.Parameter):
        _refuse_if_shared(named, target, value, owner, k)
    elif owner.get(id(value), k) != k:  # a constant buffer that several parts read: the first one owns it
        _register(part, target, value, False)
        return []
    if not _has(part, target):
        _register(part, target, *named[target])
    return [value]


def _refuse_if_shared(named: Named, name: str, tensor: Tensor, owner: dict[int, int], k: int) -> None:
    """Raises SharedWeightError, except for the two ends of a U-shape: they belong to one client, under their
    own names.
    """
    first = owner.get(id(tensor), k)
    if first == k:
        return
    names = [n for n, (t, _) in named.items() if t is tensor] or [name]
    if (first, k) != (0, 2) or names[0] == name or not isinstance(tensor, nn.Parameter):
        raise SharedWeightError(names, tensor)


def _attribute(root: Any, target: str) -> Any:
    for name in target.split("."):
        root = getattr(root, name)
    return root


def _exists(root: Any, target: str) -> bool:
    try:
        _attribute(root, target)
    except AttributeError:
        return False
    return True


def _container(part: nn.Module, target: str) -> tuple[nn.Module, str]:
    *path, leaf = target.split(".")
    for name in path:
        if name not in part._modules:
            part.add_module(name, nn.Module())
        part = cast(nn.Module, part._modules[name])
    return part, leaf


def _has(part: nn.Module, target: str) -> bool:
    *path, leaf = target.split(".")
    for name in path:
        if name not in part._modules:
            return False
        part = cast(nn.Module, part._modules[name])
    return leaf in part._parameters or leaf in part._buffers


def _register(part: nn.Module, target: str, value: Tensor, persistent: bool) -> None:
    if _has(part, target):
        return
    container, leaf = _container(part, target)
    if isinstance(value, nn.Parameter):
        container.register_parameter(leaf, value)
    else:
        container.register_buffer(leaf, value, persistent=persistent)
