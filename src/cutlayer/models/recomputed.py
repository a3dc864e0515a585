"""Gradient checkpointing (arXiv 1604.06174): blocks only keep their inputs, and are computed again in the backward
pass.

The blocks are those of `blocks`: the layers of a transformer, say. Results are the same, with the same dropout masks. A
part that runs the model's own modules has its blocks wrapped; one that runs a traced graph has the graph divided into
stages, one for each block. In evaluation nothing changes.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from torch import fx, is_grad_enabled, nn
from torch.utils import checkpoint as torchs

from cutlayer.errors import ConfigError
from cutlayer.models.blocks import blocks_of
from cutlayer.models.depths import Depths
from cutlayer.models.trace import ROOT, GraphCode, TracedPart
from cutlayer.types import Rows

State = dict[str, Any]
"""Parameters or buffers of a module, by name, in the module's own dictionary."""
Sides = Literal["none", "client", "server", "both"]
_checkpoint: Callable[..., Any] = inspect.unwrap(torchs.checkpoint)  # the decorated one loads torch's compiler


def recompute(depths: Depths, model: nn.Module, sides: Sides) -> Depths:
    """Make the blocks of `model`, in the parts of these `sides`, compute again in the backward pass. The changed parts
    have no likeness to others.

    Raises ConfigError if there are none, or if computing one twice would count its batches twice.
    """
    if sides == "none":
        return depths
    check_blocks(model, sides)
    blocks, found = blocks_of(model), 0
    for part in _parts(depths, sides):
        found += _in_graph(part, blocks) if isinstance(part, TracedPart) else _in_modules(part, model, blocks)
    if not found:
        raise ConfigError(
            f"gradient_checkpointing = {sides!r} has no effect: {none_whole(sides)}; leave it out, or cut elsewhere"
        )
    alone = {name: replace(depth, parts=replace(depth.parts, likeness=None)) for name, depth in depths.each.items()}
    return replace(depths, each=alone)


def none_whole(sides: Sides) -> str:
    """Why nothing is computed again, in a sentence without its end."""
    where = "either side" if sides == "both" else f"the {sides}'s side"
    return f"no whole block lies on {where} of the cut"


def check_blocks(model: nn.Module, sides: Sides) -> None:
    """Raises ConfigError for a model without blocks, and for one in which computing them again changes the results."""
    blocks = blocks_of(model)
    if not blocks:
        raise ConfigError(
            f"gradient_checkpointing = {sides!r} has no effect on {type(model).__name__}, which has no blocks (an "
            "nn.ModuleList of layers of one class): leave it out"
        )
    for block in blocks:
        for name, module in model.get_submodule(block).named_modules(prefix=block):
            if getattr(module, "track_running_stats", False):
                raise ConfigError(
                    f"gradient_checkpointing = {sides!r} is not possible: {name!r} keeps running statistics, and would "
                    "see each batch twice; leave it out"
                )


def _parts(depths: Depths, sides: Sides) -> list[nn.Module]:
    """The parts of these sides, at all cuts."""
    found: list[nn.Module | None] = []
    for depth in depths.each.values():
        if sides != "server":
            found += [depth.parts.client, depth.parts.tail]
        if sides != "client":
            found += [depth.parts.server, depth.between]
    return [part for part in found if part is not None]


def _again(run: Callable[..., Any], places: Sequence[State], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The result of `run`, computed again in the backward pass with the tensors that are now in these `places`. (In
    between, copies of a stacked model take turns in them.)
    """
    held = [(place, dict(place)) for place in places if place]
    both = partial(_twice, held)
    return _checkpoint(run, *args, use_reentrant=False, context_fn=both, **kwargs)


def _twice(held: Sequence[tuple[State, State]]) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts for the forward pass and its repetition."""
    return nullcontext(), _restored(held)


@contextmanager
def _restored(held: Sequence[tuple[State, State]]) -> Iterator[None]:
    """In here, places have their earlier tensors."""
    now = [(place, dict(place)) for place, _ in held]
    try:
        for place, tensors in held:
            place.update(tensors)
        yield
    finally:
        for place, tensors in now:
            place.update(tensors)


# A part that runs the model's modules


class Recomputed:
    """A mark of layers that are computed again in the backward pass."""


def _in_modules(part: nn.Module, model: nn.Module, blocks: Sequence[str]) -> int:
    """Wrap the model's blocks that are complete in this part; returns their number."""
    modules = dict(part.named_modules())
    whole = [
        modules[name] for name in blocks if name in modules and _is_whole(modules[name], model.get_submodule(name))
    ]
    for block in whole:
        block.__class__ = _wrapped(type(block))
    return len(whole)


def _is_whole(block: nn.Module, of_model: nn.Module) -> bool:
    """Whether a part runs a block from its start to its end: it has all its parameters, and no cut lies within."""
    own, all_ = ([name for name, _ in module.named_parameters()] for module in (block, of_model))
    return bool(own) and own == all_ and not any(m._forward_hooks for m in block.modules() if m is not block)


def _wrapped(kind: type[nn.Module]) -> type[nn.Module]:
    """A class of layers that do the same, and again in the backward pass."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = partial(kind.forward, self)
        if not (self.training and is_grad_enabled()):
            return run(*args, **kwargs)
        places = [place for module in self.modules() for place in (module._parameters, module._buffers)]
        return _again(run, places, args, kwargs)

    if kind not in _made:
        _made[kind] = type(kind.__name__, (Recomputed, kind), {"forward": forward})
    return _made[kind]


_made: dict[type[nn.Module], type[nn.Module]] = {}


# A part that runs a graph


def _in_graph(part: TracedPart, blocks: Sequence[str]) -> int:
    """Divide the part's training graph; returns the number of its blocks."""
    code = Staged(part.training_code.graph, tuple(blocks))
    part.training_code = code
    return sum(stage.again for stage in code.stages)


@dataclass(frozen=True)
class _Stage:
    """A piece of a graph: its inputs and outputs, as numbers of nodes of the whole; `again`: it is also computed in the
    backward pass. `over` are nodes that are not needed after it. It `reads` parameters and buffers of these names.
    """

    code: GraphCode
    takes: tuple[int, ...]
    gives: tuple[int, ...]
    over: tuple[int, ...]
    again: bool
    reads: tuple[str, ...]

    def run(self, part: nn.Module, values: list[Any]) -> tuple[Any, ...]:
        """Its outputs for its inputs."""

        def computed(*taken: Any) -> Any:
            return self.code(part, taken)

        if not (self.again and is_grad_enabled()):
            return tuple(computed(*values))
        owners = {id(owner): owner for name in self.reads if (owner := part.get_submodule(name.rpartition(".")[0]))}
        places = [place for owner in owners.values() for place in (owner._parameters, owner._buffers)]
        return tuple(_again(computed, places, values, {}))


class Staged(GraphCode):
    """A graph that runs stage by stage: its `blocks`, and the pieces between them."""

    def __init__(self, graph: fx.Graph, blocks: tuple[str, ...]) -> None:
        super().__init__(graph)
        self.blocks = blocks
        self.stages = _stages(graph, blocks)

    def __call__(self, part: nn.Module, rows: Rows) -> Any:
        """The outputs of the graph for the rows."""
        known: dict[int, Any] = {0: rows}
        *stages, last = self.stages
        for stage in stages:
            found = stage.run(part, [known[i] for i in stage.takes])
            for i in stage.over:
                del known[i]
            known.update(zip(stage.gives, found, strict=True))
        return last.run(part, [known[i] for i in last.takes])

    def __reduce__(self) -> tuple[Any, ...]:
        return Staged, (self.graph, self.blocks)


def _stages(graph: fx.Graph, blocks: Sequence[str]) -> list[_Stage]:
    """The graph's stages, in order. The last one returns the graph's outputs."""
    nodes = list(graph.nodes)
    number = {node: i for i, node in enumerate(nodes)}
    last_use = {i: max((number[user] for user in node.users), default=i) for i, node in enumerate(nodes)}
    found = []
    for first, end, again in _spans(nodes, blocks):
        inside = [node for node in nodes[first:end] if node.op not in ("placeholder", "get_attr")]
        taken = dict.fromkeys(
            number[source]
            for node in inside
            for source in node.all_input_nodes
            if source.op != "get_attr" and number[source] < first
        )
        gives = [number[node] for node in inside if node.op != "output" and last_use[number[node]] >= end]
        over = [i for i in taken if last_use[i] < end]
        piece = _piece(inside, [nodes[i] for i in taken], [nodes[i] for i in gives])
        reads = tuple(str(node.target) for node in piece.nodes if node.op == "get_attr")
        found.append(_Stage(GraphCode(piece), tuple(taken), tuple(gives), tuple(over), again, reads))
    return found


def _spans(nodes: Sequence[fx.Node], blocks: Sequence[str]) -> list[tuple[int, int, bool]]:
    """Ranges of nodes that follow one another: (first, end, whether it is a block)."""
    within: dict[str, list[int]] = {}
    for i, node in enumerate(nodes):
        if node.op not in ("get_attr", "output") and (block := _block_of(node, blocks)):
            within.setdefault(block, []).append(i)
    spans, at = [], 1  # node 0 is the part's input
    for places in sorted(within.values()):
        first, end = places[0], places[-1] + 1
        if first < at:  # it overlaps with another one
            continue
        if first > at:
            spans.append((at, first, False))
        spans.append((first, end, True))
        at = end
    return [*spans, (at, len(nodes), False)]


def _block_of(node: fx.Node, blocks: Iterable[str]) -> str:
    """The block that a node was traced in; empty if it was in none."""
    stack = node.meta.get("nn_module_stack") or {}
    inside = {str(path).removeprefix(ROOT) for path, _ in stack.values()}
    return next((block for block in blocks if block in inside), "")


def _piece(inside: Sequence[fx.Node], takes: Sequence[fx.Node], gives: Sequence[fx.Node]) -> fx.Graph:
    """A graph of some nodes, from a tuple of their inputs to a tuple of their outputs."""
    graph = fx.Graph()
    rows = graph.placeholder("rows")
    made: dict[fx.Node, Any] = {node: graph.call_function(operator.getitem, (rows, i)) for i, node in enumerate(takes)}

    def value(node: fx.Node) -> Any:
        if node not in made:  # a parameter or buffer, which each piece reads itself
            made[node] = graph.node_copy(node, value)
        return made[node]

    for node in inside:
        if node.op == "output":
            graph.output(fx.node.map_arg(node.args[0], value))
            return graph
        made[node] = graph.node_copy(node, value)
    graph.output(tuple(made[node] for node in gives))
    return graph
