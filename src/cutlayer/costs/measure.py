"""What a model is at its cuts: sizes, FLOPs and memory, measured on torch's meta device, where tensors have shapes and
no values. Billions of parameters take no memory there and no time.

One forward and backward pass of the whole model serves all cuts: what has happened when a module gives its output is
the client's part, the rest is the server's. A test shows that the parts, cut and counted, come to the same.

Shape legend: R rows of the batch, s... the shape of one sample.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from cutlayer.copies import deep_copy
from cutlayer.costs.expect import Workload
from cutlayer.costs.flops import Flops, ModelFlops, count
from cutlayer.eager import FlopCount
from cutlayer.errors import ConfigError, CutError
from cutlayer.models import Crossing, Parts, build
from cutlayer.models import make as make_own
from cutlayer.models.blocks import blocks_of
from cutlayer.models.cut import INPUT, OUTPUT, UnprovedCuts, cut_unproved
from cutlayer.models.depths import one_depth
from cutlayer.models.halved import Halved
from cutlayer.models.parts import CannotCutError, crossing_bytes, logits, one_line, storage_of, tensors_in
from cutlayer.models.recomputed import Sides, recompute
from cutlayer.models.tape import as_if_compiled
from cutlayer.wire.codecs import RAW, Codec, payload_bytes

Optimizer = Literal["adam", "sgd"]
_STATES: dict[Optimizer, int] = {"adam": 2, "sgd": 0}  # numbers that an optimiser keeps per parameter
_CONTAINERS = (nn.Sequential, nn.ModuleList)
_META = torch.device("meta")


@dataclass(frozen=True)
class Footing:
    """Bytes that training a model (or a part of one) keeps: `state` of parameters and buffers, `trainable` of the
    parameters that have gradients, and what the forward pass saves for the backward pass: `fixed` + `per_row` x rows.

    With checkpointed activations, each block keeps only its inputs and is computed again in the backward pass. Then the
    forward pass saves `held` + `held_per_row` x rows, and the block under way adds at most `block` + `block_per_row` x
    rows. Without blocks both are what is saved anyway, and nothing.
    """

    state: int
    trainable: int
    fixed: int
    per_row: int
    moving: int  # bytes of the state without frozen parameters: what crosses where models do
    held: int
    held_per_row: int
    block: int
    block_per_row: int

    @property
    def frozen(self) -> int:
        """Bytes of the parameters that are not trained."""
        return self.state - self.moving

    def moments(self, optimizer: Optimizer) -> int:
        """Bytes that the optimiser keeps: two numbers per parameter for Adam, none for plain SGD."""
        return self.trainable * _STATES[optimizer]

    def saved(self, rows: int, *, checkpointed: bool = False) -> int:
        """Bytes that are kept for the backward pass of a batch of `rows` rows."""
        if checkpointed:
            return self.held + self.block + rows * (self.held_per_row + self.block_per_row)
        return self.fixed + rows * self.per_row

    def peak(self, batch: int, optimizer: Optimizer, *, checkpointed: bool = False) -> int:
        """Bytes with a batch of `batch` rows under way: the state, gradients, what the optimiser keeps and all that is
        saved. Left out: what is freed again at once.
        """
        return self.state + self.trainable + self.moments(optimizer) + self.saved(batch, checkpointed=checkpointed)

    def __add__(self, other: Footing) -> Footing:
        """Both parts, whose blocks are computed again one at a time."""
        return self._with(other, 1)

    def __sub__(self, other: Footing) -> Footing:
        """This part without the `other`, which is in it; blocks are taken to be alike."""
        return self._with(other, -1)

    def _with(self, other: Footing, sign: int) -> Footing:
        found = {name: own + sign * getattr(other, name) for name, own in vars(self).items()}
        largest = {name: max(getattr(self, name), getattr(other, name)) for name in ("block", "block_per_row")}
        return Footing(**{**found, **largest})


@dataclass(frozen=True)
class Measured:
    """A model at a cut. Counts of `parameters` (of the whole and of the client's part); FLOPs per sample; `client` and
    `whole` as they train; `crossing` is what goes up. With a second cut, the `client` has the tail too, and
    `returning` is what comes down to it. `lower_trains`: something below the first cut is trained. `again`: some
    blocks are computed again in the backward pass.
    """

    name: str
    crossing: tuple[Crossing, ...]
    parameters: int
    client_parameters: int
    flops: ModelFlops
    client: Footing
    whole: Footing
    returning: tuple[Crossing, ...] = ()
    lower_trains: bool = True
    again: bool = False

    @property
    def server(self) -> Footing:
        """As the server's part trains."""
        return self.whole - self.client

    @property
    def smashed(self) -> int:
        """Bytes of one sample that go up."""
        return crossing_bytes(self.crossing)

    @property
    def gradient(self) -> int:
        """Bytes of one sample that come down to the first cut: tensors that are not floating point have no gradient,
        and a part that trains nothing needs none.
        """
        if not self.lower_trains:
            return 0
        return crossing_bytes(c for c in self.crossing if c.differentiable)

    def workload(
        self,
        *,
        clients: int,
        samples_per_client: int,
        batch: int,
        label: int,
        raw: int,
        up: Codec = RAW,
        down: Codec = RAW,
    ) -> Workload:
        """What `expect` takes: an epoch of training this. `label` and `raw` are bytes of one sample; rows go `up` and
        `down` as these codecs write them. Raises ConfigError for a codec whose bytes depend on the numbers.
        """
        gradients = [c for c in self.crossing if c.differentiable] if self.lower_trains else []
        smashed, gradient = _written(up, self.crossing, batch), _written(down, gradients, batch)
        features = _written(down, self.returning, batch)
        returned = _written(up, [c for c in self.returning if c.differentiable], batch)
        return Workload(
            clients=clients,
            samples_per_client=samples_per_client,
            batch=batch,
            smashed=smashed.each,
            gradient=gradient.each,
            label=label,
            raw=raw,
            model=self.whole.moving,
            client_model=self.client.moving,
            client_gradient=self.client.trainable,
            features=features.each,
            returned=returned.each,
            flops=self.flops,
            smashed_besides=smashed.besides,
            gradient_besides=gradient.besides,
            features_besides=features.besides,
            returned_besides=returned.besides,
        )

    def with_tail(self, tail: Measured, beyond: Measured | None = None) -> Measured:
        """The same model with a second cut, where `tail` is cut; `beyond` is that with the FLOPs which it has in what
        comes after the first cut here, if they are others.
        """
        after = (beyond or tail).flops.server
        middle = Flops(self.flops.server.forward - after.forward, self.flops.server.backward - after.backward)
        return replace(
            self,
            client_parameters=self.client_parameters + tail.parameters - tail.client_parameters,
            flops=ModelFlops(self.flops.client, middle, tail.flops.server, uncut=self.flops.uncut),
            client=self.client + (tail.whole - tail.client),
            returning=tail.crossing,
            again=self.again or tail.again,
        )


@dataclass(frozen=True)
class _Written:
    """Bytes that a codec writes rows in: for each of them, and for a batch besides."""

    each: int
    besides: int


def _written(codec: Codec, crossing: Sequence[Crossing], batch: int) -> _Written:
    """The bytes of rows of these tensors. Raises ConfigError if they are not known from the tensors' shapes."""
    if codec.zstd and crossing:
        raise ConfigError(
            f"codec {str(codec)!r} cannot be planned, since what zstd saves depends on the numbers: plan "
            f"{str(codec.plain)!r}, and measure the rest in a run"
        )
    one, two, all_ = (sum(payload_bytes(codec, (rows, *c.shape), c.dtype) for c in crossing) for rows in (1, 2, batch))
    found = _Written(two - one, 2 * one - two)
    if all_ != found.besides + batch * found.each:
        raise ConfigError(
            f"codec {str(codec)!r} cannot be planned: its bytes do not grow in equal steps with the rows of a batch; "
            "leave it out, and count them in a run"
        )
    return found


@dataclass(frozen=True)
class Survey:
    """All cuts of a model in the order data flows, and the names at which it cannot be cut, with the reasons."""

    cuts: tuple[Measured, ...]
    refused: dict[str, str]


# The model


def load_model(name: str, shape: Sequence[int], classes: int, *, at: Sequence[str] = (), **options: Any) -> nn.Module:
    """A model on the meta device, found and made as `models.build` does. Raises ConfigError also if it needs values."""
    with _META:
        return build(name, tuple(shape), classes, at=at, **options)


def make(function: Callable[..., nn.Module], shape: Sequence[int], classes: int) -> nn.Module:
    """What a user's `function` makes on the meta device. Raises ConfigError."""
    with _META:
        return make_own(function, shape, classes)


def placed(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy on the meta device with its real numbers in `dtype`, but for a base that is kept in half the memory; tied
    weights stay tied, the model as it is.
    """
    new: dict[int, Any] = {}

    def moved(tensor: Tensor, kept: bool) -> Tensor:
        return tensor.detach().to(_META, dtype if tensor.is_floating_point() and not kept else tensor.dtype)

    for module in model.modules():
        kept = isinstance(module, Halved)
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in new:
                new[id(parameter)] = nn.Parameter(moved(parameter, kept), parameter.requires_grad)
        for buffer in module._buffers.values():
            if buffer is not None and id(buffer) not in new:
                new[id(buffer)] = moved(buffer, kept)
    return deep_copy(model, new)


# Measuring


def example(shape: Sequence[int], dtype: torch.dtype, rows: int = 2) -> Tensor:
    """A batch [R, s...] on the meta device."""
    return torch.zeros(rows, *shape, dtype=dtype, device=_META)


def measure(model: nn.Module, name: str, x: Tensor, sides: Sides = "none") -> Measured:
    """`model` (on the meta device, as `x` [R >= 2, ...]) cut after the module called `name`, or at "input" or "output".
    The FLOPs are those with blocks of these `sides` computed again in the backward pass, where there are some.

    Raises CutError where it cannot be cut there, ConfigError where it does not take such a batch.
    """
    with _runnable(model, x):
        parts = cut_unproved(model, name, x)
        inner = [] if name in (INPUT, OUTPUT) else [name]
        return _Measurement(model, x, inner, sides).at(name, parts, lambda: parts)


def measure_twice(model: nn.Module, name: str, tail: str, x: Tensor, sides: Sides = "none") -> Measured:
    """`model` cut after `name`, and after `tail` again, from where on it is the client's. Raises as `measure`."""
    plain: Sides = "none"
    again: Sides = "server"  # with one cut, what comes after it
    first, last = measure(model, name, x, sides), measure(model, tail, x, again if at_client(sides) else plain)
    beyond = (
        last if at_client(sides) == at_server(sides) else measure(model, tail, x, again if at_server(sides) else plain)
    )
    with _runnable(model, x):
        order = _Measurement(model, x, [n for n in (name, tail) if n not in (INPUT, OUTPUT)], plain).order
    if order[-1:] != [tail] or (name != INPUT and len(order) < 2):
        raise CutError(f"tail_cut = {tail!r} does not come after cut = {name!r}: name a later module")
    return first.with_tail(last, beyond)


def measure_whole(model: nn.Module, x: Tensor, sides: Sides = "none") -> tuple[Footing, Flops]:
    """What the uncut model keeps and computes per sample."""
    with _runnable(model, x):
        found = _Measurement(model, x, [], sides)
        return found.whole, found.uncut


def at_client(sides: Sides) -> bool:
    """Whether the client's blocks are computed again in the backward pass."""
    return sides in ("client", "both")


def at_server(sides: Sides) -> bool:
    """Whether the server's blocks are."""
    return sides in ("server", "both")


def names_of_client(model: nn.Module, name: str, tail: str | None, x: Tensor) -> set[str]:
    """The names of the parameters that a client has with these cuts. Raises CutError."""
    with _runnable(model, x):
        found = {n for n, _ in cut_unproved(model, name, x).client.named_parameters()}
        return found | ({n for n, _ in cut_unproved(model, tail, x).server.named_parameters()} if tail else set())


def deepest(model: nn.Module, names: Sequence[str], x: Tensor) -> str:
    """The one of `names`, at which the model can be cut, that comes last as data flows."""
    inner = [name for name in names if name not in (INPUT, OUTPUT)]
    if OUTPUT in names or not inner:
        return OUTPUT
    with _runnable(model, x):
        return _counted(model, x, inner).order[-1]


def survey(model: nn.Module, x: Tensor, names: Sequence[str] | None = None, sides: Sides = "none") -> Survey:
    """`model` at all its cuts: `names`, by default those of `candidates`; `sides` as for `measure`. Raises ConfigError
    as `measure`, CutError where it can be cut nowhere.
    """
    with _runnable(model, x):
        return _surveyed(model, x, candidates(model) if names is None else names, sides)


def _surveyed(model: nn.Module, x: Tensor, names: Sequence[str], sides: Sides) -> Survey:
    measurement = _Measurement(model, x, names, sides)
    cuts = UnprovedCuts(model, measurement.order, x)
    found: list[Measured] = []
    refused = {name: f"nothing is computed after {name!r}" for name in measurement.counted.last}
    for name in measurement.order:
        if name in refused:
            continue
        try:
            found.append(measurement.at(name, cuts.look(name), lambda name=name: cuts.at(name)))  # type: ignore[misc]
        except CannotCutError as reason:
            refused[name] = str(reason)
    if not found:
        tried = "; ".join(f"{name!r}: {why}" for name, why in list(refused.items())[:3])
        raise CutError(
            f"{type(model).__name__} cannot be cut at its children ({tried or 'none is ever executed'}): name a module "
            "inside one of them as --cut"
        )
    return Survey(tuple(found), refused)


def candidates(model: nn.Module) -> list[str]:
    """Where one might cut: direct children, members of lists and sequences of layers, but not what lies in those."""

    def inside(module: nn.Module, prefix: str, wrapped: bool) -> Iterator[str]:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if not isinstance(child, nn.ModuleList) and (not wrapped or isinstance(module, _CONTAINERS)):
                yield path
            if isinstance(child, _CONTAINERS) or not isinstance(module, _CONTAINERS):  # or what wraps them
                yield from inside(child, f"{path}.", True)

    return list(inside(model, "", False))


@contextlib.contextmanager
def _runnable(model: nn.Module, x: Tensor) -> Iterator[None]:
    """In here the model can be run on such a batch. One that looks at values (a transformer, for the marks between
    packed texts), but not while it is compiled, is told that it is. Raises ConfigError.
    """
    with as_if_compiled() if _looks_at_values(model, x) else contextlib.nullcontext():
        yield


def _looks_at_values(model: nn.Module, x: Tensor) -> bool:
    """Whether the model runs only if it is told that it is compiled. Raises ConfigError if it does not run at all."""
    try:
        check_takes(model, x)
    except ConfigError as reason:
        try:
            with as_if_compiled():
                check_takes(model, x)
        except ConfigError:
            raise reason from None
        return True
    return False


def check_takes(model: nn.Module, x: Tensor) -> None:
    """The model takes such a batch and gives a row of scores per sample. Raises ConfigError."""
    shape, kind = tuple(x.shape[1:]), str(x.dtype).removeprefix("torch.")
    try:
        with torch.no_grad(), x.device:  # where it makes tensors of its own, too
            out = logits(deep_copy(model).eval()(x))
    except Exception as error:  # the user's module: anything can come out
        raise ConfigError(
            f"the model does not take samples of shape {shape} and type {kind} ({one_line(error)}): choose a "
            "model that does, or what it takes: other data, or with plan and calibrate e.g. --input 3 32 32 (token "
            "ids: --input 128 --input-type int64)"
        ) from None
    if not isinstance(out, Tensor) or out.dim() < 1 or len(out) != len(x):
        given = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ConfigError(
            f"the model turns {len(x)} samples of shape {shape} into {given}, not into a row of scores per sample: "
            "check the samples' shape, or have it return [rows, classes]"
        )


class _Measurement:
    """Passes of the whole model with a note at the end of each of `names`; `order` are those executed, as data flows,
    without those that end where one above them does.
    """

    def __init__(self, model: nn.Module, x: Tensor, names: Sequence[str], sides: Sides) -> None:
        self.model, self.x, self.sides = model, x, sides
        self.counted = _counted(model, x, names)
        self.kept = [_kept(model, torch.cat([x, x[:1]]) if more else x, names) for more in (False, True)]
        self.order = self.counted.order

    @property
    def whole(self) -> Footing:
        """What the uncut model keeps."""
        return _footing(_state(self.model)[0], [k.total for k in self.kept], len(self.x))

    @cached_property
    def uncut(self) -> Flops:
        """FLOPs of the uncut model per sample, which a client computes alone."""
        if not at_client(self.sides):
            return self.counted.whole
        parts, again = _recomputed(UnprovedCuts(self.model, (OUTPUT,), self.x).at(OUTPUT), self.model, "client")
        return _directly(parts, self.x).client if again else self.counted.whole

    def at(self, name: str, parts: Parts, runnable: Callable[[], Parts]) -> Measured:
        """The model cut after `name`. `parts` are looked at; `runnable` gives some that can be run, if need be."""
        sizes, parameters = _state(parts.client)
        trainable, again = sizes[1], False
        if name in (INPUT, OUTPUT):
            saved = [_Saved() if name == INPUT else k.total for k in self.kept]
            flops = _directly(runnable(), self.x)
        else:
            saved = [k.marks[name] for k in self.kept]
            backward = self.counted.backward.get(name)
            # A server computes gradients of all that it receives, also where the whole model would not.
            exact = backward is not None and trainable and len(parts.crossing) == 1
            if exact and backward is not None:
                flops = self.counted.split(name, backward)
            else:
                flops = _directly(runnable(), self.x)
        if self.sides != "none":
            parts, again = _recomputed(runnable(), self.model, self.sides)
            flops = _directly(parts, self.x) if again else flops
        return Measured(
            name,
            parts.crossing,
            _state(self.model)[1],
            parameters,
            replace(flops, uncut=self.uncut),
            _footing(sizes, saved, len(self.x)),
            self.whole,
            lower_trains=bool(trainable),
            again=again,
        )


def _recomputed(parts: Parts, model: nn.Module, sides: Sides) -> tuple[Parts, bool]:
    """The parts, with their blocks on these sides computed again in the backward pass; whether there are some."""
    try:
        return recompute(one_depth("", parts, 1), model, sides).deepest.parts, True
    except ConfigError:
        return parts, False


def _footing(sizes: tuple[int, int, int], saved: Sequence[_Saved], rows: int) -> Footing:
    """From the sizes that `_state` gives, and what is saved for `rows` rows and for one more."""
    state, trainable, frozen = sizes
    few, more = (vars(one) for one in saved)
    each = {name: more[name] - few[name] for name in few}
    fixed = {name: few[name] - rows * each[name] for name in few}
    return Footing(
        state,
        trainable,
        fixed["all"],
        each["all"],
        state - frozen,
        fixed["held"],
        each["held"],
        fixed["block"],
        each["block"],
    )


def _state(module: nn.Module) -> tuple[tuple[int, int, int], int]:
    """Bytes of parameters and buffers, of trained parameters, of frozen ones; number of parameters: tied ones once."""
    tensors = {id(t): t for t in module.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    parameters = list(module.parameters())
    trainable = sum(p.nbytes for p in parameters if p.requires_grad)
    frozen = sum(p.nbytes for p in parameters if not p.requires_grad)
    return (sum(t.nbytes for t in tensors.values()), trainable, frozen), sum(p.numel() for p in parameters)


def _directly(parts: Parts, x: Tensor) -> ModelFlops:
    with warnings.catch_warnings(), _META:
        warnings.simplefilter("ignore")  # that a part has none is for the user to see
        return count(parts, x)


@dataclass
class _Counted:
    """FLOPs of a batch of `rows`: until each module gave its last output, and until its gradient came back."""

    rows: int
    forward: dict[str, int] = field(default_factory=dict)
    backward: dict[str, int] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    last: list[str] = field(default_factory=list)  # those that give what the model gives
    total: tuple[int, int] = (0, 0)

    @property
    def whole(self) -> Flops:
        """Of the model as one, per sample."""
        return Flops(*(total / self.rows for total in self.total))

    def split(self, name: str, server_backward: int) -> ModelFlops:
        """Of both parts, per sample."""
        forward, backward = self.total
        client = Flops(self.forward[name] / self.rows, (backward - server_backward) / self.rows)
        return ModelFlops(client, Flops((forward - self.forward[name]) / self.rows, server_backward / self.rows))


def _counted(model: nn.Module, x: Tensor, names: Sequence[str]) -> _Counted:
    """The FLOPs of one forward and one backward pass in training."""
    model = deep_copy(model).train()
    counter = FlopCount(display=False)
    found = _Counted(len(x))
    given: dict[int, str] = {}  # the mark of an output -> whose it is
    alive: list[Tensor] = []

    def mark(name: str, output: Any) -> Any:
        leaves, spec = pytree.tree_flatten(output)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        found.forward[name] = counter.get_total_flops()
        if name in found.order:  # its last time counts
            found.order.remove(name)
        if tensors and all(id(t) in given for t in tensors):  # an inner module ended right here
            inner = given[id(tensors[0])]
            if inner in found.order:
                found.order[found.order.index(inner)] = name
        else:
            found.order.append(name)
        leaves = [_noticed(leaf, name) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return pytree.tree_unflatten(leaves, spec)

    def _noticed(tensor: Tensor, name: str) -> Tensor:
        """The tensor in the clothes of another, whose gradient is noticed when all that comes later has its own."""
        if not tensor.requires_grad:
            return tensor
        same = tensor.view_as(tensor)
        same.register_hook(lambda _: arrived(name))
        given[id(same)] = name
        alive.append(same)
        return same

    def arrived(name: str) -> None:
        found.backward.setdefault(name, counter.get_total_flops() - forward)

    for name in names:
        model.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: mark(name, out))
    forward = 0
    with _META, torch.enable_grad(), counter:
        result = logits(model(x))
        forward = counter.get_total_flops()
        if id(result) in given:
            found.last.append(given[id(result)])
        if result.requires_grad:
            result.sum().backward()
    found.total = (forward, counter.get_total_flops() - forward)
    return found


@dataclass(frozen=True)
class _Saved:
    """Bytes that are saved for the backward pass: `all`; and if blocks are computed again, what is `held` until then
    and what the largest `block` adds.
    """

    all: int = 0
    held: int = 0
    block: int = 0


@dataclass
class _Kept:
    """What is saved until each module gave its last output, and in all."""

    marks: dict[str, _Saved] = field(default_factory=dict)
    total: _Saved = field(default_factory=_Saved)


def _kept(model: nn.Module, x: Tensor, names: Sequence[str]) -> _Kept:
    """What a forward pass saves: every memory once, parameters and buffers not."""
    model = deep_copy(model).train()
    found, saving = _Kept(), _Saving(storage_of(t) for t in [*model.parameters(), *model.buffers()])
    for name in blocks_of(model):
        block = model.get_submodule(name)
        block.register_forward_pre_hook(saving.begin, with_kwargs=True)
        block.register_forward_hook(saving.end)
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda m, args, out, name=name: found.marks.__setitem__(name, saving.so_far)
        )
    with _META, torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(saving.save, lambda t: t), _Fused():
        model(x)
    found.total = saving.so_far
    return found


class _Saving:
    """Adds up what is saved, and what of it would be held if blocks were computed again."""

    def __init__(self, state: Iterable[int]) -> None:
        self._seen = dict.fromkeys(state, 0)  # bytes by memory; those of the state are there anyway
        self._held = dict(self._seen)
        self._within: dict[int, int] | None = None  # what the present block saves
        self._largest = 0
        self._alive: list[Tensor] = []  # so that no memory is used again

    @property
    def so_far(self) -> _Saved:
        """What has been saved until now."""
        return _Saved(sum(self._seen.values()), sum(self._held.values()), self._largest)

    def save(self, tensor: Tensor) -> Tensor:
        """A tensor is saved."""
        self._note(self._seen, tensor)
        self._note(self._held if self._within is None else self._within, tensor)
        return tensor

    def begin(self, block: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        """A block begins: its inputs are held."""
        for tensor in tensors_in((args, dict(kwargs))):
            self._note(self._held, tensor)
        self._within = {}

    def end(self, block: nn.Module, args: Any, output: Any) -> None:
        """A block has ended."""
        added = [size for memory, size in (self._within or {}).items() if memory not in self._held]
        self._largest, self._within = max(self._largest, sum(added)), None

    def _note(self, place: dict[int, int], tensor: Tensor) -> None:
        self._alive.append(tensor)
        place.setdefault(storage_of(tensor), tensor.untyped_storage().nbytes())


class _Fused(TorchFunctionMode):
    """Attention as a fused kernel does it, which keeps no scores: on the meta device torch would take products."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            with contextlib.suppress(Exception):
                return _fused(*args, **kwargs)
        return func(*args, **kwargs)


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """[R, heads, n, d] each; fewer heads of keys and values if `enable_gqa`. Raises where the kernel cannot do what is
    asked.
    """
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if enable_gqa:  # views, so that what is saved is that of the fewer heads
        key, value = (t[:, :1].expand(-1, query.shape[1], -1, -1) for t in (key, value))
    out: Tensor = kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return out
