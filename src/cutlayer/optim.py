"""Optimisers by name or the user's own, and the preparation of a step: accumulation, clipping, groups of parameters."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cutlayer import plugins
from cutlayer.eager import eager
from cutlayer.errors import ConfigError, unknown
from cutlayer.stored import Amount, Count, MalformedError, Stored, all_finite, checked, fits

Named = Iterable[tuple[str, Tensor]]
"""Parameters with their names in the whole model."""

# LBFGS needs a closure, SparseAdam sparse gradients, Muon only matrices: none of them suits the steps here.
_UNFIT = {"optimizer", "lbfgs", "sparseadam", "muon"}

# The engine decides how an optimiser is computed.
_OURS = {"params", "lr", "foreach", "fused", "capturable", "differentiable"}

# Optimisers whose rule is elementwise, so that one step on stacked tensors is every client's own step. The others
# (Adafactor's row means, ASGD's and NAdam's history of rates) are the local engine's.
ELEMENTWISE = {"adadelta", "adagrad", "adam", "adamax", "adamw", "radam", "rmsprop", "rprop", "sgd"}

MOMENTUM = ("momentum_buffer", "exp_avg")
"""The optimisers' names for the mean of past gradients."""


def optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    """The classes of torch.optim that can be named, in lower case."""
    found = {
        n.lower(): c
        for n, c in vars(torch.optim).items()
        if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer)
    }
    return {n: c for n, c in found.items() if n not in _UNFIT}


@dataclass(frozen=True)
class ParamGroup:
    """Parameters whose names the regular expression `match` finds: a factor `lr` of the rate, and a weight decay of
    their own (None: the optimiser's).
    """

    match: str
    lr: float = 1.0
    weight_decay: float | None = None

    def has(self, name: str) -> bool:
        """Whether a parameter belongs to it."""
        return re.search(self.match, name) is not None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> ParamGroup:
        """From a table of a configuration. Raises ConfigError."""
        known = tuple(cls.__dataclass_fields__)
        if strange := [name for name in values if name not in known]:
            raise ConfigError(f"param_groups: {unknown('key', strange[0], known)}")
        if not isinstance(match := values.get("match"), str):
            raise ConfigError(f'param_groups: {dict(values)} names no parameters: give match, e.g. match = "bias|norm"')
        for name in ("lr", "weight_decay"):
            value = values.get(name, 1.0)
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or value < 0
                or (name == "lr" and not value)
            ):
                least = "greater than 0" if name == "lr" else "0 or greater"
                raise ConfigError(f"param_groups: {name} = {value!r} is not possible: it must be a number, {least}")
        _check_pattern("param_groups", match)
        return cls(**values)


def check_groups(groups: Sequence[ParamGroup], names: Sequence[str]) -> None:
    """Every group must have some of the trained parameters called `names`. Raises ConfigError."""
    for number, group in enumerate(groups):
        earlier = groups[:number]
        if not any(group.has(n) and not any(e.has(n) for e in earlier) for n in names):
            taken = " that an earlier group has not taken" if any(map(group.has, names)) else ""
            raise ConfigError(
                f"param_groups: match = {group.match!r} matches none of the trained parameters{taken}: they are "
                f"{', '.join(names) or 'none'}"
            )


def _check_pattern(option: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"{option}: {pattern!r} is not a regular expression ({error}): correct it, e.g. 'bias|norm'"
        ) from None


@dataclass(frozen=True)
class MakeOptimizer:
    """Makes the optimiser of a model's parameters, and says how its steps are prepared.

    `kind` is called with parameters, the rate `lr` and `options`. `own`: it is the user's. `groups` have their own
    rates and weight decays. A step is taken after `accumulate` batches, on the mean of their gradients, whose norm is
    clipped to `clip`.
    """

    name: str
    kind: Callable[..., torch.optim.Optimizer]
    lr: float
    options: Mapping[str, Any] = field(default_factory=dict)
    own: bool = False
    groups: tuple[ParamGroup, ...] = ()
    clip: float | None = None
    accumulate: int = 1

    def __call__(self, named: Named) -> torch.optim.Optimizer | None:
        """The optimiser of those parameters that are trained; None if there are none."""
        trained = [(n, p) for n, p in named if p.requires_grad]
        if not trained:
            return None
        optimizer = self.made(self._grouped(trained))
        for group in optimizer.param_groups:
            if "lr_factor" not in group and group["lr"] != self.lr:  # a user's optimiser has its own groups
                group["lr_factor"] = group["lr"] / self.lr
        return optimizer

    def made(self, params: list[Any]) -> torch.optim.Optimizer:
        """The optimiser of parameters, or of groups of them. One of torch's is made without torch's compiler."""
        kind = self.kind if self.own else eager(self.kind)
        return kind(params, self.lr, **self.options)

    def _grouped(self, trained: list[tuple[str, Tensor]]) -> list[Any]:
        """Parameters, or groups of them if some have their own rate or weight decay."""
        if not self.groups:
            return [p for _, p in trained]
        members: dict[ParamGroup | None, list[Tensor]] = {}
        for name, p in trained:
            members.setdefault(self.group_of(name), []).append(p)
        return [self._as_group(group, params) for group, params in members.items()]

    def _as_group(self, group: ParamGroup | None, params: list[Tensor]) -> dict[str, Any]:
        made: dict[str, Any] = {"params": params}
        if group is not None:
            made |= {"lr": self.lr * group.lr, "lr_factor": group.lr}
            if group.weight_decay is not None:
                made["weight_decay"] = group.weight_decay
        return made

    def group_of(self, name: str) -> ParamGroup | None:
        """The first group that has the parameter called `name`."""
        return next((group for group in self.groups if group.has(name)), None)


def make_optimizer(
    name: str,
    lr: float,
    options: Mapping[str, Any],
    *,
    groups: Sequence[ParamGroup] = (),
    clip: float | None = None,
    accumulate: int = 1,
) -> MakeOptimizer:
    """The maker for `name` with rate `lr`: a class of torch.optim in lower case ("adam"), or path/to/file.py:name of a
    class or a function (params, lr, **options). Raises ConfigError before anything is trained.
    """
    known = optimizers()
    own = name not in known and (plugins.known("optimizer", name) or plugins.is_reference(name))
    if not own and name not in known:
        raise ConfigError(f"{unknown('optimizer', name, sorted(known))}; or your own: path/to/file.py:name")
    kind = plugins.load("optimizer", name) if own else known[name]
    _check_options(kind, name, options)
    made = MakeOptimizer(name, kind, lr, dict(options), own, tuple(groups), clip, accumulate)
    defaults = _probed(made)
    if any(g.weight_decay is not None for g in groups) and "weight_decay" not in defaults:
        raise ConfigError(f"param_groups: {name} has no weight_decay: leave it out, or choose another optimizer")
    return made


def _check_options(kind: Callable[..., Any], name: str, options: Mapping[str, Any]) -> None:
    """Raises ConfigError for an option that the optimiser does not have."""
    try:
        parameters = list(inspect.signature(kind).parameters.values())
    except (TypeError, ValueError):
        raise ConfigError(f"the optimizer {name!r} is not a class or a function (params, lr): name one") from None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    names = [p.name for p in parameters if p.name not in _OURS and p.kind is not p.VAR_POSITIONAL]
    for option in options:
        if option not in names:
            raise ConfigError(unknown(f"option of {name}", option, names))


def _probed(make: MakeOptimizer) -> dict[str, Any]:
    """The optimiser's defaults, after one idle step. This step also imports everything that torch or the user's own
    optimiser imports at the first step, so that no run's clock counts it. Raises ConfigError.
    """
    shapes = ((2, 2), (2,)) if make.own else ((1,),)
    probes = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for probe in probes:
        probe.grad = torch.zeros_like(probe)
    expected: tuple[type[Exception], ...] = (Exception,) if make.own else (ValueError, TypeError, RuntimeError)
    try:
        made = make.made(list(probes))
        if isinstance(made, torch.optim.Optimizer):
            made.step()
    except expected as error:
        given = f" {dict(make.options)}" if make.options else ""
        raise ConfigError(
            f"the optimizer {make.name!r} refuses{given}: {type(error).__name__ + ': ' if make.own else ''}{error}; "
            f"correct {'it or its options' if make.own else 'these options'}"
        ) from None
    if not isinstance(made, torch.optim.Optimizer):
        raise ConfigError(
            f"the optimizer {make.name!r} gives {type(made).__name__}: return a torch.optim.Optimizer of (params, lr)"
        )
    return made.defaults


class Stepping:
    """The optimiser of one model's parameters, with the preparation of its steps."""

    def __init__(self, make: MakeOptimizer, named: Named) -> None:
        named = list(named)
        self.make = make
        self.weights = [p for _, p in named if p.requires_grad]
        self.optimizer = make(named)
        self.advance: Callable[[float], None] = self._descend if self._is_plain() else self._advance
        self._held: list[Tensor | None] = []  # sums of the gradients of the batches that wait
        self._waiting = 0  # batches
        self._lr = 0.0  # of the last of them

    def take(self, lr: float, *, last: bool) -> None:
        """Use the gradients of a batch: step at rate `lr`, unless more batches belong to the step. `last`: there are no
        more.
        """
        if self._waiting:
            self._add_held()
        self._waiting += 1
        if self._waiting < self.make.accumulate and not last:
            self._held, self._lr = [p.grad for p in self.weights], lr
            return
        self._step(lr)

    def settle(self) -> None:
        """Step if batches wait, because the model is about to be read, or the round is over."""
        if self._waiting:
            for p in self.weights:
                p.grad = None
            self._add_held()
            self._step(self._lr)

    def _add_held(self) -> None:
        for p, held in zip(self.weights, self._held, strict=True):
            if held is not None:
                p.grad = held if p.grad is None else p.grad.add_(held)

    def _step(self, lr: float) -> None:
        if self._waiting > 1:
            for p in self.weights:
                if p.grad is not None:
                    p.grad.div_(self._waiting)
        self._held, self._waiting = [], 0
        if self.make.clip is not None:
            nn.utils.clip_grad_norm_(self.weights, self.make.clip)
        self.advance(lr)

    def _is_plain(self) -> bool:
        """Whether a step is w <- w - lr (g + decay w) and nothing else."""
        if self.optimizer is None or self.make.kind is not torch.optim.SGD:
            return False
        return not any(g["momentum"] or g["nesterov"] or g["maximize"] for g in self.optimizer.param_groups)

    def _descend(self, lr: float) -> None:
        """torch's step of plain gradient descent, bit for bit, without torch's bookkeeping, which takes longer for a
        small model.
        """
        assert self.optimizer is not None, "who steps has parameters that are trained"
        with torch.no_grad():
            for group in self.optimizer.param_groups:
                rate, decay = lr * group.get("lr_factor", 1.0), group["weight_decay"]
                for p in group["params"]:
                    if p.grad is not None:
                        p.add_(p.grad.add(p, alpha=decay) if decay else p.grad, alpha=-rate)

    def _advance(self, lr: float) -> None:
        assert self.optimizer is not None, "who steps has parameters that are trained"
        set_lr(self.optimizer, lr)
        self.optimizer.step()


@dataclass(frozen=True)
class Rule:
    """The facts about an elementwise optimiser that the stacked engine needs.

    `plain`: gradient descent and nothing else, w <- w - lr (g + weight_decay w). `fused`: torch has it as one operation
    per tensor, here.
    """

    plain: bool
    weight_decay: float
    fused: bool
    make: MakeOptimizer

    def rates_of(self, name: str) -> tuple[float, float]:
        """The factor of the rate, and the weight decay, of the parameter called `name`."""
        group = self.make.group_of(name)
        if group is None:
            return 1.0, self.weight_decay
        return group.lr, self.weight_decay if group.weight_decay is None else group.weight_decay

    def quicken(self, optimizer: torch.optim.Optimizer) -> None:
        """Compute the steps as one operation per tensor, if torch can; not for complex numbers."""
        for group in optimizer.param_groups:
            if self.fused and not any(p.is_complex() for p in group["params"]):
                group["fused"], group["foreach"] = True, False

    def clock_device(self, parameter: Tensor) -> torch.device:
        """The device on which torch needs this optimiser's step counter."""
        return parameter.device if self.fused and not parameter.is_complex() else torch.device("cpu")


def rule_of(make: MakeOptimizer) -> Rule:
    """The rule of the optimisers from `make`. None for the user's own."""
    if make.own:
        return Rule(False, 0.0, False, make)
    optimizer = make([("", torch.zeros(1, requires_grad=True))])
    assert optimizer is not None, "a parameter that is trained has an optimiser"
    d, kind = optimizer.defaults, make.kind
    plain = kind is torch.optim.SGD and not (d["momentum"] or d["nesterov"] or d["maximize"])
    fused = kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
    return Rule(plain, d.get("weight_decay", 0.0), fused, make)


class _OptimizerState(Stored):
    state: dict[Count, dict[str, Any]]
    param_groups: list[dict[str, Any]]


def restore_optimizer(optimizer: torch.optim.Optimizer | None, state: Mapping[str, Any], what: str) -> None:
    """Take a `state_dict()` from a file; `optimizer` is None if nothing is trained. Raises MalformedError if it is not
    the state of this kind of optimiser.
    """
    if optimizer is not None:
        _check_state(optimizer, checked(state, _OptimizerState, what), what)
        load_optimizer(optimizer, state)
    elif state:
        raise MalformedError(f"{what} has a state, but nothing is trained")


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Take a `state_dict()`, tensors as they are: torch's own loading casts them to the parameters' type, which changes
    numbers that an optimiser keeps in another one (NAdam's)."""
    optimizer.load_state_dict(copy.deepcopy(dict(state)))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in state["state"].items():
        p = parameters[index]
        optimizer.state[p] = {n: laid_as(v.clone(), p) if isinstance(v, Tensor) else v for n, v in values.items()}


def _check_state(optimizer: torch.optim.Optimizer, given: _OptimizerState, what: str) -> None:
    """Check that groups are as they were made, except for the rate, and that the state of each parameter has the form
    of one after a step.
    """
    groups = optimizer.state_dict()["param_groups"]
    if [{**group, "lr": 0} for group in given.param_groups] != [{**group, "lr": 0} for group in groups]:
        raise MalformedError(f"{what} has other groups of parameters, or other settings, than it is made with")
    for group in given.param_groups:
        checked(group.get("lr"), Amount, f"{what}: lr")
    like = after_a_step(optimizer)
    for index, values in given.state.items():
        if like is not None and (index not in like or values.keys() != like[index].keys()):
            raise MalformedError(f"{what} keeps {sorted(values)} of parameter {index}, not what its steps leave behind")
        for name, value in values.items():
            _check_value(value, None if like is None else like[index][name], f"{what}: {name!r} of parameter {index}")


def _check_value(value: Any, like: Any, what: str) -> None:
    """Raises MalformedError unless `value` is of the kind of `like`, if that is known, and finite; a clock counts."""
    if isinstance(value, Tensor) and isinstance(like, Tensor):
        fits(value, like, what)
    if like is not None and value is not None and isinstance(value, Tensor) != isinstance(like, Tensor):
        raise MalformedError(f"{what} is a {type(value).__name__}, not a {type(like).__name__}")
    if isinstance(value, Tensor):
        clock = what.partition(": ")[2].startswith("'step'")
        if not all_finite(value) or (clock and bool((value < 0).any())):
            raise MalformedError(f"{what} holds numbers that are negative or not finite")
    elif like is not None and value is not None:
        checked(value, Amount if isinstance(like, float) else type(like), what)


def after_a_step(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]] | None:
    """The state that torch's own optimiser has of each parameter after a step, from a copy. None for other optimisers,
    whose state is not known.
    """
    if not type(optimizer).__module__.startswith("torch.optim"):
        return None
    twin = copy.deepcopy(optimizer)
    twin.state.clear()
    for group in twin.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    twin.step()
    found: dict[int, dict[str, Any]] = twin.state_dict()["state"]
    return found


def laid_as(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor in the memory layout of `like`, if they have the same shape. torch's fused steps go through memory
    without looking at strides, so a checkpoint's moments would be applied to other weights.
    """
    if tensor.shape != like.shape or tensor.stride() == like.stride():
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype, requires_grad=False).copy_(tensor)


def as_tensor(value: Any) -> Tensor:
    """A value of an optimiser's state as it is sent: Python's numbers keep their precision."""
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of the next step; groups of parameters may have their own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)
