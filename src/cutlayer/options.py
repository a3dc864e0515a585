"""Every option of a run: one flat set of names, the same in Python, in a TOML file and (with dashes) as flags.

What belongs to a thing that is chosen (an algorithm, a partition, a schedule, a defence, ...) is declared with that
thing and found through the registries; here are the options that all runs have. A field's own range is checked when it
is set; what concerns several fields is checked by `check()`, once file and flags have been merged. Only what has an
effect is kept in the resolved configuration.
"""

from __future__ import annotations

import inspect
import math
import re
import tomllib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from cutlayer import plugins
from cutlayer.errors import ConfigError, CutlayerWarning, unknown
from cutlayer.plugins import Entry, explain
from cutlayer.verbs import Traits

# Groups of the command line's help, in order.
WHAT, DATA, CLIENTS, MODEL, TRAINING = "What to train", "Data", "Clients and partition", "Model and cut", "Training"
TASK = "Task: what is learnt from the targets"
CROSSING, DEFENCES = "What crosses the cut", "Defences of the smashed data"
COSTS = "Virtual clock and energy model (none without a client device)"
ATTACKS = "Hostile clients (simulations only)"
OUTPUT, FAULTS = "Computing, evaluation and checkpoints", "Faults"
BUDGETS = "Budgets of a client"
ALLOWED = "What the server may ask of this client"
GROUPS = (
    WHAT, DATA, TASK, CLIENTS, MODEL, TRAINING, "", CROSSING, DEFENCES, ATTACKS, BUDGETS, COSTS, OUTPUT, FAULTS, ALLOWED
)  # fmt: skip

When = Literal["", "split", "lower", "mixed", "together", "u-shaped", "group", "averages"]
"""With which algorithms an option has an effect: all; those that cut the model; those whose clients hold what is below
a cut and no more; those whose clients can have cuts of their own; those whose server gets the rows of several clients
at once; those whose clients finish the forward pass; those that have a group of clients; those that average client
models or the server's copies."""
_WHEN: dict[str, Callable[[Traits], bool]] = {
    "": lambda traits: True,
    "split": lambda traits: traits.split,
    "lower": lambda traits: traits.lower_only,
    "mixed": lambda traits: traits.mixes_cuts,
    "together": lambda traits: traits.split and not traits.takes_turns,
    "u-shaped": lambda traits: traits.u_shaped,
    "group": lambda traits: not traits.central,
    "averages": lambda traits: traits.averages or traits.server_copies,
}


def _field(default: Any, group: str, when: When = "", *, shared: bool = False, **bounds: Any) -> Any:
    """An option of all runs. `shared`: clients on other machines must have the same value."""
    return Field(default, json_schema_extra={"group": group, "when": when, "shared": shared}, **bounds)


def about(info: FieldInfo, what: str) -> Any:
    """What `_field` noted of a field: its group, when it has an effect, whether it is shared."""
    extra = info.json_schema_extra
    return extra.get(what) if isinstance(extra, dict) else None


def _optimizer_name(name: Any) -> Any:
    """torch.optim's optimisers in lower case, whether they are called Adam, adam or torch.optim.Adam."""
    if not isinstance(name, str):
        return name
    if found := re.fullmatch(r"torch\.optim(?:\.\w+)*[.:](\w+)", name):
        return found[1].lower()
    return name if ":" in name or plugins.known("optimizer", name) else name.lower()


OptimizerName = Annotated[str, BeforeValidator(_optimizer_name)]
ParamGroups = tuple[dict[str, int | float | str], ...]
SweepTable = dict[str, bool | int | float | str | list[Any] | dict[str, int | float | bool]]
TuningTable = dict[str, bool | int | float | str | list[Any] | dict[str, Any]]
OptimizerOptions = dict[str, bool | int | float | str | list[float]]


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


class _Config(plugins.Typed):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """What `help` shows: one line per option instead of a signature of a hundred types."""
        options = inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD, annotation=Any)
        cls.__signature__ = inspect.Signature([options])
        about_it = inspect.cleandoc(cls.__doc__ or "").split("\n\nOptions, ", 1)[0]
        lines = [f"{name} = {f.get_default()!r}: {_one_line(f.description)}" for name, f in cls.model_fields.items()]
        cls.__doc__ = "\n".join([about_it, "", "Options, with their defaults:", *lines])

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Build from plain values. Raises ConfigError with the value, the reason and the remedy."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise explain(error, cls) from None


class _Chooser(_Config):
    """A configuration that chooses things, whose options are among its values: flat, and complete once it is made."""

    model_config = ConfigDict(extra="allow")
    kinds: ClassVar[tuple[str, ...]] = ()
    """Kinds of things that it can choose and whose options it can have."""

    def chosen(self) -> list[Entry]:
        """The things that are chosen. Raises ConfigError for one that cannot be found."""
        return []

    @model_validator(mode="after")
    def _settle(self) -> Self:
        extra = self.__pydantic_extra__
        assert extra is not None, "extra values are allowed"
        settled = _settled({entry: self.replaced(entry) for entry in self.chosen()}, extra, type(self))
        extra.clear()
        extra.update(settled)
        return self

    def replaced(self, entry: Entry) -> set[str]:
        """Those options of a chosen thing whose values here never reach it, since others stand in their place."""
        return set()

    def options_of(self, entry: Entry) -> dict[str, Any]:
        """The values of a thing's options: as given, or its defaults."""
        extra = self.__pydantic_extra__ or {}
        return {o.name: extra.get(o.name, o.default) for o in entry.options}

    @property
    def specific(self) -> dict[str, Any]:
        """The options of all chosen things."""
        return dict(self.__pydantic_extra__ or {})


def _settled(things: Mapping[Entry, set[str]], values: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """`values`, checked and complete, of `things` and those options of each that other values replace. Raises
    ConfigError for a wrong value, or one of an option that no thing has.
    """
    left, settled = dict(values), dict[str, Any]()
    for entry, replaced in things.items():
        _refuse_taken(entry, model)
        mine = {name: values[name] for name in (entry.option_names - replaced) & set(values)}
        for name, value in entry.checked(mine).items():
            if name not in model.model_fields and (name in mine or name not in settled):
                settled[name] = value
        for name in mine:
            left.pop(name, None)
    for name in set.union(set(), *things.values()) & set(left):  # nobody else has it: it stays as it is
        settled[name] = left.pop(name)
    for name, value in left.items():
        raise _useless(name, value, list(things), model)
    return settled


def _refuse_taken(entry: Entry, model: type[BaseModel]) -> None:
    """Raises ConfigError if a thing from outside has an option that would be mistaken for one of all runs."""
    taken = sorted(entry.option_names & set(model.model_fields))
    if taken and plugins.index(entry.kind).get(entry.name) is not entry:
        word = plugins.KINDS[entry.kind].word
        raise ConfigError(
            f"the option {taken[0]!r} of the {word} {entry.name!r} has the name of an option of all runs: rename it"
        )


def _useless(name: str, value: Any, things: list[Entry], model: type[BaseModel]) -> ConfigError:
    """Why an option has no place in a configuration of these `things`."""
    owners = owners_of(name)
    if not owners:
        known = [*model.model_fields, *(o.name for entry in things for o in entry.options)]
        return ConfigError(called_here(name, known) or unknown("option", name, known))
    kind = owners[0].kind
    chosen = [entry.name for entry in things if entry.kind == kind]
    word = plugins.KINDS[kind].word
    what = ", ".join(chosen) if kind == "algorithm" else f"the {word} {', '.join(chosen)}"
    what = what if chosen else f"a run without this {word}"
    return ConfigError(
        f"{name} = {value!r} has no effect on {what}: it belongs to {', '.join(o.name for o in owners)}; leave it out "
        "or choose one of these"
    )


def owners_of(name: str) -> list[Entry]:
    """The things of this package and of installed ones that have an option called `name`."""
    return [e for e in (*plugins.flat(), *plugins.installed()) if name in e.option_names]


_ELSEWHERE = {
    "lr": ("client_lr", "server_lr"),
    "learning_rate": ("client_lr", "server_lr"),
    "optimizer": ("client_optimizer", "server_optimizer"),
    "optim": ("client_optimizer", "server_optimizer"),
    "momentum": ("client_optimizer_options",),
    "weight_decay": ("client_optimizer_options",),
    "scheduler": ("lr_schedule",),
    "lr_scheduler": ("lr_schedule",),
    "batch_size": ("batch",),
    "num_clients": ("clients",),
    "n_clients": ("clients",),
    "num_rounds": ("rounds",),
    "num_epochs": ("epochs",),
    "dataset": ("data",),
    "codec": ("up_codec", "down_codec"),
}
"""What other libraries call an option."""


def called_here(name: str, known: Iterable[str], *, flags: bool = False) -> str:
    """The sentence for an option that has another name here, among those `known`; empty if it has none. `flags`: names
    are shown as those of flags.
    """
    found = [here for here in _ELSEWHERE.get(name, ()) if here in known]
    names = [f"{here}.{name}" if here.endswith("_options") else here for here in found]
    shown = [f"--{n.replace('_', '-')}" if flags else n for n in (name, *names)]
    return f"unknown option {shown[0]!r}: here it is called {' and '.join(shown[1:])}" if names else ""


def traits(algorithm: str) -> Traits:
    """What follows from the needs of an algorithm. Raises ConfigError where it is unknown."""
    facts = plugins.find("algorithm", algorithm).facts
    return Traits.of(facts["needs"], facts["central"])


class _CutConfig(_Chooser):
    """A configuration with an option `cut`: one name for all clients, or a list of names as one text."""

    if TYPE_CHECKING:
        cut: str | None

    @field_validator("cut", mode="before", check_fields=False)
    @classmethod
    def _joined(cls, names: Any) -> Any:
        """A list of names as one text."""
        several = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
        return ",".join(names) if several else names

    @property
    def cuts(self) -> tuple[str, ...]:
        """The cuts that are named: none, one for all clients, or one for each; NAME*3 is NAME three times."""
        found: list[str] = []
        for name in () if self.cut is None else self.cut.split(","):
            repeated = re.fullmatch(r"(.+?)\s*\*\s*(\d{1,7})", name.strip())
            found += [repeated[1]] * int(repeated[2]) if repeated else [name.strip()]
        return tuple(found)


class FleetConfig(_Chooser):
    """The machines and links of the virtual clock and the energy model."""

    client_device: str | None = _field(None, COSTS)
    """The device profile of the clients (see `cutlayer list profiles`). With it, every run reports virtual time and
    energy."""
    server_device: str | None = _field(None, COSTS)
    """The device profile of the server. Default: none; server computation then takes no virtual time, and its energy is
    not known."""
    link: str | None = _field(None, COSTS)
    """The link profile of the clients. Default: none; rates are those given, and the energy of sending is not known."""
    up_mbps: float | None = _field(None, COSTS, gt=0)
    """A client's upload rate in Mbit/s. Default: the link's."""
    down_mbps: float | None = _field(None, COSTS, gt=0)
    """A client's download rate in Mbit/s. Default: the link's."""
    latency_ms: float | None = _field(None, COSTS, ge=0)
    """One-way latency of each message in milliseconds. Default: the link's."""
    server_mbps: float | None = _field(None, COSTS, gt=0)
    """The server's total rate to and from all clients in Mbit/s, in each direction. Default: no limit."""
    multicast: bool = _field(False, COSTS)
    """Send a message that is the same for several clients only once from the server."""
    utilisation: float = _field(1.0, COSTS, gt=0, le=1)
    """Fraction of the profiles' FLOP/s that training reaches."""
    speed_spread: float = _field(0.0, COSTS, ge=0, le=5)
    """How much clients differ in speed: the standard deviation of the logarithm (0.5: most lie within a factor of
    2.7)."""
    rate_spread: float = _field(0.0, COSTS, ge=0, le=5)
    """How much clients differ in link rate: the standard deviation of the logarithm."""
    stragglers: float = _field(0.0, COSTS, ge=0, le=1)
    """Fraction of the clients that are slower than the rest, in computing and on their link."""
    straggler_slowdown: float = _field(10.0, COSTS, ge=1)
    """Factor by which stragglers are slower."""
    profiles: str | None = _field(None, COSTS)
    """A TOML file with your own profiles, in tables [device.NAME] and [link.NAME]."""

    def check_fleet(self, given: frozenset[str]) -> None:
        """Without a client device the rest has no effect. `given` are what the user set. Raises ConfigError."""
        if self.client_device is None and (idle := sorted(given & set(TracedConfig.model_fields))):
            raise ConfigError(
                f"{idle[0]} = {getattr(self, idle[0])!r} has no effect without client_device: name what the clients "
                "compute on, e.g. raspberry-pi-4 (see `cutlayer list profiles`), or leave it out"
            )


class TracedConfig(FleetConfig):
    """The same, where links may follow a trace."""

    trace: str | None = _field(None, COSTS)
    """A CSV file with the columns client, from, to, up, down: the times at which each client can be reached (virtual
    seconds), and its rates then (Mbit/s). It replaces the link's rates. Each round draws its participants from the
    clients that can be reached."""
    trace_period: float | None = _field(None, COSTS, ge=1e-3)
    """Seconds after which the trace starts again. Default: it does not repeat, and the last row of each client must end
    at inf."""

    def check_fleet(self, given: frozenset[str]) -> None:
        """The same, and beside a trace some of it has no effect. Raises ConfigError."""
        super().check_fleet(given)
        if self.trace is None and self.trace_period is not None:
            raise ConfigError(
                f"trace_period = {self.trace_period:g} has no effect without trace: name a file, or leave it out"
            )
        idle = [name for name in ("up_mbps", "down_mbps", "rate_spread") if name in given and getattr(self, name)]
        if self.trace is not None and idle:
            raise ConfigError(
                f"{idle[0]} = {getattr(self, idle[0])!r} has no effect beside trace = {self.trace!r}, which gives the "
                "clients' rates: leave one of them out"
            )


class FaultConfig(_Config):
    """What a server does about clients that are late, away or faulty: the table [faults] of a file, or flags."""

    deadline: float = _field(600.0, FAULTS, ge=0)
    """Seconds that a step may take. After that, the server continues with the clients that have answered, if they are a
    quorum. 0: no limit. By default, local training gets one more minute for each of its steps."""
    quorum: float = _field(0.5, FAULTS, gt=0, le=1)
    """Fraction of the clients that must have answered for a step to go on after its deadline, and that must be present
    to start a round."""
    patience: float = _field(3600.0, FAULTS, ge=0)
    """Seconds to wait for missing clients: for all clients at the start, for a quorum later. 0: no limit."""
    most_samples: int | None = _field(None, FAULTS, ge=1)
    """The largest number of samples that a client may claim to hold; a client that claims more is refused. Default:
    10000 times the median of the other clients."""
    faulty: Literal["exclude", "readmit", "stop"] = _field("exclude", FAULTS)
    """What to do with a client that sends NaN, wrong shapes or an invalid message: exclude it from the run (exclude),
    disconnect it and let it come back (readmit), or end the run (stop)."""


class BudgetConfig(_Config):
    """The most that a client answers, by its own file: the table [budget], or flags of `join`. What is not given
    follows from the study, with room for what is repeated after restarts.
    """

    max_rounds: int | None = _field(None, ALLOWED, ge=1)
    """Rounds that the server may start. Default: twice the study's number of rounds, plus five."""
    max_passes: int | None = _field(None, ALLOWED, ge=0)
    """Batches of this client's own rows whose smashed data it sends. Default: as many as those rounds need."""
    max_batches: int | None = _field(None, ALLOWED, ge=0)
    """Batches that this client trains on. Default: as many as those rounds need."""
    max_evaluations: int | None = _field(None, ALLOWED, ge=0)
    """Requests to evaluate up to 1024 rows. Default: as many as one evaluation per round needs."""
    max_models: int | None = _field(None, ALLOWED, ge=0)
    """Number of times that this client sends its model. Default: as often as the algorithm needs; never if the
    algorithm does not collect models."""
    max_seconds: float | None = _field(None, ALLOWED, gt=0)
    """Seconds that this client computes for the server. Default: no limit."""
    max_epsilon: float | None = _field(None, ALLOWED, gt=0)
    """Total epsilon that the smashed data of a sample may cost; needs noise. Default: no limit."""
    delta: float = _field(1e-5, ALLOWED, gt=0, lt=1)
    """The delta for which epsilon is stated, with Gaussian noise."""
    give_model_despite_noise: bool = _field(False, ALLOWED)
    """Send the model, which has no noise, even though noise is added to smashed data."""


class CommonConfig(TracedConfig, _CutConfig):
    """What all commands that train share."""

    kinds = (
        "algorithm",
        "task",
        "partition",
        "schedule",
        "averaging",
        "screening",
        "model",
        "data",
        "format",
        "defence",
        "logger",
    )

    data: str = _field("digits", DATA)
    """The name of a data set (see `cutlayer list data`), the path of your own data, or a function:
    path/to/file.py:name."""
    data_format: str = _field("auto", DATA)
    """The format of the file or folder (see `cutlayer list formats`), or your own: path/to/file.py:name. auto: look at
    the file."""
    label_column: str = _field("label", DATA)
    """The column with the label (CSV, Hugging Face, text)."""
    client_column: str | None = _field(None, DATA)
    """The column that names the client to which a row belongs (CSV, Hugging Face, text), for the partition `column`."""
    class_names: tuple[str, ...] = _field((), DATA)
    """All labels, in order, for data that may lack some of them (such as one client's data). Default: the labels found
    in the data."""
    validation: float = _field(0.1, DATA, ge=0)
    """Rows held out of training as validation set: a fraction below 1, or a number of samples."""
    test: float = _field(0.2, DATA, gt=0)
    """Rows held out as test set if the data have none: a fraction below 1, or a number of samples."""
    test_seed: int | None = _field(None, DATA, ge=0)
    """Seed for drawing the test rows, so that runs with different seeds can share them. Default: seed."""
    data_in_memory: Literal["auto", "always", "never"] = _field("auto", DATA)
    """Whether to read the items of a map-style Dataset once and keep them, or to read them again for each batch, so
    that random transforms take effect. auto: keep them if they take less than a quarter of the free memory."""
    data_workers: int = _field(0, DATA, ge=0)
    """Worker processes that read items that are not kept in memory."""

    clients: int = _field(10, CLIENTS, shared=True, ge=1)
    """Number of clients, C."""
    partition: str = _field("iid", CLIENTS)
    """How samples are divided among clients (see `cutlayer list partitions`), or your own: path/to/file.py:name."""
    samples_per_client: int | None = _field(None, CLIENTS, ge=1)
    """Samples per client (the mean if sizes differ). Default: all samples. The paper uses 1000."""
    participation: float = _field(1.0, CLIENTS, "group", shared=True, gt=0, le=1)
    """Fraction of the clients that take part in a round, drawn anew each round."""
    sampling: Literal["fixed", "proportional", "global"] = _field("fixed", CLIENTS, "group", shared=True)
    """How many rows a client brings to a step. fixed: `batch` rows. proportional: a share of clients x batch in
    proportion to its number of samples. global: as many as a draw from all clients' data gives it. With the last two,
    all clients finish an epoch at the same time."""

    task: str = _field("classification", TASK, shared=True)
    """The task, with its loss and metrics (see `cutlayer list tasks`), or your own: path/to/file.py:name."""
    metrics: tuple[str, ...] = _field((), TASK)
    """Additional metrics by name (see `cutlayer list metrics`), or your own functions of predictions and targets:
    path/to/file.py:name."""
    primary_metric: str | None = _field(None, TASK)
    """The metric by which the best evaluation is chosen. Default: the task's own (accuracy, rmse, ...)."""
    model: str = _field("cnn", MODEL)
    """The name of a model (see `cutlayer list models`), or your own: path/to/file.py:function."""
    cut: str | None = _field(None, MODEL)
    """The module after which the model is cut. Several names, separated by commas (in a file: a list), give each client
    a cut of its own; NAME*20 gives this cut to 20 clients. Default: the model's own cut. Has no effect on algorithms
    that train whole models."""
    cut_by: Literal["memory", "time", "profile"] | None = _field(None, MODEL, "mixed")
    """Choose each client's cut: the deepest within client_memory (memory) or client_seconds (time), or the one with the
    fastest step on its machine and link (profile). Default: the cuts are those named by `cut`."""
    client_memory: tuple[float, ...] = _field((), MODEL, "lower")
    """Memory of a client for training in gigabytes (1e9 bytes): one number for all clients, or one for each. Cuts must
    fit."""
    client_seconds: tuple[float, ...] = _field((), MODEL, "lower")
    """Seconds that a client's step may take, sending and receiving included: one number for all clients, or one for
    each. Cuts must fit. Needs client_device."""
    tail_cut: str | None = _field(None, MODEL, "u-shaped")
    """For U-shaped algorithms: the module after which the client takes over again."""
    untie: bool = _field(False, MODEL)
    """If layers on both sides of the cut share a weight (input and output embeddings), give each side its own copy."""
    weights: str | None = _field(None, MODEL)
    """Initial weights of the whole model: a .safetensors file, or a state dict written by torch.save."""
    weights_strict: bool = _field(True, MODEL, shared=True)
    """Require weights for the whole model. False: take those that fit by name and shape (for example a backbone)."""
    start: Literal["equal", "independent"] = _field("equal", MODEL, "group", shared=True)
    """Start all client models from the same weights (equal), or each from its own random initialisation
    (independent)."""

    freeze: str | None = _field(None, MODEL, shared=True)
    """Do not train parameters whose names match this regular expression (anywhere in the name). All clients share them,
    and they are not sent. Default: the parameters that the model itself freezes."""

    epochs: int = _field(20, TRAINING, ge=1)
    """Passes over every client's data."""
    rounds: int | None = _field(None, TRAINING, ge=1)
    """Number of rounds, instead of epochs. A round is one local epoch unless options of the algorithm say otherwise."""
    batch: int = _field(8, TRAINING, ge=1)
    """Batch size of a client, b (in centralised learning: of the one model)."""
    client_optimizer: OptimizerName = _field("adam", TRAINING, shared=True)
    """The clients' optimiser: a class of torch.optim (adam, sgd, adamw, rmsprop, ...), or your own class or function of
    (params, lr): path/to/file.py:name. If clients train whole models, it trains the whole model."""
    client_optimizer_options: OptimizerOptions = _field({}, TRAINING, shared=True)
    """Further arguments of the clients' optimiser, e.g. --client-optimizer-options.momentum 0.9."""
    client_lr: float = _field(1e-3, TRAINING, shared=True, gt=0)
    """The clients' learning rate, eta_c."""
    client_clip_grad_norm: float | None = _field(None, TRAINING, shared=True, gt=0)
    """Scale a client's gradient down to this norm, taken over all its parameters. Default: no limit."""
    server_optimizer: OptimizerName | None = _field(None, TRAINING, "split")
    """The server's optimiser. Default: client_optimizer."""
    server_optimizer_options: OptimizerOptions | None = _field(None, TRAINING, "split")
    """Further arguments of the server's optimiser. Default: client_optimizer_options if both optimisers are the
    same."""
    server_lr: float | None = _field(None, TRAINING, "split", gt=0)
    """The server's learning rate, before SplitLr scales it. Default: client_lr."""
    server_clip_grad_norm: float | None = _field(None, TRAINING, "split", gt=0)
    """Scale the server's gradient, or that of each of its copies, down to this norm. Default: no limit."""
    accumulate: int = _field(1, TRAINING, shared=True, ge=1)
    """Batches per optimiser step of a client; the step uses the mean of their gradients. The last step of a round may
    use fewer."""
    gradient_checkpointing: Literal["none", "client", "server", "both"] = _field("none", TRAINING)
    """Sides whose blocks (for example of a transformer) keep only their inputs and are computed again in the backward
    pass. This saves memory and takes more time; the results are the same."""
    server_accumulate: int | None = _field(None, TRAINING, "split", ge=1)
    """Batches per optimiser step of the server. Default: accumulate."""
    param_groups: ParamGroups = _field((), TRAINING, shared=True)
    """Groups of parameters with their own factor of the learning rate, or their own weight decay: tables with match (a
    regular expression for names), lr and weight_decay. On the command line in JSON, e.g. '{"match": "bias|norm",
    "weight_decay": 0}'."""
    lr_schedule: str = _field("step", TRAINING, shared=True)
    """How the learning rates change over the rounds (see `cutlayer list schedules`), or your own class or function of
    the progress in [0, 1): path/to/file.py:name."""
    server_lr_schedule: str | None = _field(None, TRAINING, "split")
    """The server's schedule. Default: lr_schedule."""
    lr_warmup: float = _field(0.0, TRAINING, shared=True, ge=0, lt=1)
    """Fraction of the rounds in which the rates rise to their starting values. The schedules cover the remaining
    rounds."""

    averaging: str = _field("mean", TRAINING, "averages")
    """How client models, and copies of the server's model, are averaged (see `cutlayer list averagings`), or your own:
    path/to/file.py:name. In a deployment, only the server sets it."""
    logit_adjust: Literal["none", "client", "server", "both"] = _field("none", TRAINING, "group", shared=True)
    """Against label skew, add the logarithm of the class shares to the scores in a loss. client: in the gradients that
    a client receives, with the shares in its own data. server: in the server's own step, with the shares of all
    participants. both: in both. If labels stay with the clients, only client is possible."""
    tau: float = _field(1.0, TRAINING, "group", shared=True, ge=0)
    """Factor of that logarithm; 0 changes nothing."""

    up_codec: str = _field("raw", CROSSING, "split")
    """The codec of smashed data (U-shaped: also of gradients); see `cutlayer list codecs`. Append +zstd to compress the
    bytes as well."""
    cache_features: bool = _field(False, CROSSING, "split", shared=True)
    """Keep the outputs of a frozen client part on the server, so that each row's smashed data are computed and sent
    only once."""
    down_codec: str = _field("raw", CROSSING, "split")
    """The codec of cut gradients (U-shaped: also of features); see `up_codec`."""
    screening: str = _field("none", CROSSING, "split")
    """What the server does to rows (the smashed data of one sample) before it uses them (see `cutlayer list
    screenings`), or your own: path/to/file.py:name. In a deployment, only the server sets it."""
    defences: tuple[str, ...] = _field((), DEFENCES, "split")
    """Your own defences: path/to/file.py:name. A built-in defence is active as soon as one of its options is set."""

    attack: tuple[str, ...] = _field((), ATTACKS, "group")
    """What hostile clients do, as NAME:PARAMETER@CLIENTS (see `cutlayer list attacks`), such as scale:1e6@3 or
    labels@0,4-6, or your own: path/to/file.py:name@3."""

    engine: Literal["auto", "local", "stacked"] = _field("auto", OUTPUT)
    """How clients are simulated: one after another (local), all at once (stacked), or all at once if possible
    (auto)."""
    tune: Literal["off", "cached", "on"] = _field("on", OUTPUT)
    """How to choose the fastest of several equivalent ways of computing. on: use an earlier measurement, or measure
    when the run is built, for at most 1 % of the run or half a second. cached: use an earlier measurement only. off:
    use fixed rules. The variable CUTLAYER_TUNE sets the default."""
    deterministic: bool = _field(False, OUTPUT)
    """With several ranks: add up the ranks' values in a fixed order, so that a run repeats bit for bit."""
    device: str = _field("cpu", OUTPUT)
    """The device that computes: cpu, cuda (cuda:1, ...) or mps."""
    precision: Literal["float32", "float64", "bfloat16", "tf32"] = _field("float32", OUTPUT, shared=True)
    """Floating point type of models and data. bfloat16: mixed precision. tf32: float32 with CUDA's faster matrix
    products."""
    memory_limit: float | None = _field(None, OUTPUT, gt=0)
    """Activation memory of the clients in GB. Above it, forward passes are recomputed in the backward pass. Default:
    half of the free memory."""
    client_states: Literal["auto", "memory", "disk"] = _field("auto", OUTPUT, "group")
    """Where to keep the states of simulated clients that do not take part in a round: in memory, on disk (in the run's
    folder), or on disk if memory may be too small (auto). Results are the same. `resume` may change it."""
    eval_every: int | None = _field(None, OUTPUT, ge=1)
    """Rounds between two evaluations (the end is always evaluated). Default: about once per epoch, or less often if
    evaluation would take more than a fifth of the training."""
    eval_clients: int | None = _field(None, OUTPUT, ge=1)
    """Number of clients whose models are evaluated; they are drawn once. Default: all. If evaluation would take more
    than a fifth of the training, fewer before the last evaluation, unless eval_every is given."""
    judge: Literal["mean", "average", "ensemble"] = _field("mean", OUTPUT)
    """What the scores measure if the clients' models differ: the mean of the models' scores (mean), the score of the
    averaged model (average), or the score of the mean of their predictions (ensemble)."""
    evaluate_on: Literal["global", "own", "both"] = _field("global", OUTPUT, shared=True)
    """The rows that a client's model is tested on: test rows that all clients share (global), test rows of the client's
    own (own), or both."""
    own_test: float = _field(0.2, OUTPUT, shared=True, gt=0, lt=1)
    """Fraction of each client's rows that is held out for evaluate_on, if the data do not say which client owns a test
    row."""
    log_to: tuple[str, ...] = _field((), OUTPUT)
    """Loggers that the run is written to while it trains (see `cutlayer list loggers`), or your own:
    path/to/file.py:Name. The run folder contains everything in any case."""
    stop_after: int | None = _field(None, OUTPUT, ge=1)
    """Early stopping: stop after this many evaluations in a row without a better primary metric on the validation rows.
    Default: train to the end."""
    checkpoint_every: int | None = _field(None, OUTPUT, ge=1)
    """Rounds between two checkpoints (there is always one at the end). Default: about once per epoch."""
    keep_best: bool = _field(True, OUTPUT)
    """Keep the model of the best evaluation on the validation set in the run folder, for `export` and `predict`."""
    snapshot_every: int | None = _field(None, OUTPUT, ge=1)
    """Rounds between two snapshots of the client models in the run folder, for `cutlayer leakage`. Default: none."""

    @field_validator("client_optimizer", "server_optimizer", mode="before")
    @classmethod
    def _lower_case(cls, name: Any) -> Any:
        """Adam and SGD may be spelled as torch spells them."""
        return name.lower() if isinstance(name, str) and name.isidentifier() else name

    @field_validator("tune", mode="before")
    @classmethod
    def _not_a_table(cls, value: Any) -> Any:
        """What is to be tuned stands in another table. Raises ConfigError."""
        if isinstance(value, Mapping):
            raise ConfigError(
                "tune is not a table, since it says how the quickest way to compute is chosen: write the options of a "
                "comparison that are to be tuned below [tuning]"
            )
        return value

    def algorithm_names(self) -> tuple[str, ...]:
        """The algorithms that are trained."""
        raise TypeError(f"{type(self).__name__} names no algorithms")

    def chosen(self) -> list[Entry]:
        """Algorithms, partition, schedules, averaging rule, screening, task, model, data, defences, loggers."""
        found = [plugins.find("algorithm", name) for name in dict.fromkeys(self.algorithm_names())]
        found.append(plugins.find("partition", self.partition))
        found += [plugins.find("schedule", name) for name in (self.lr_schedule, self.server_lr_schedule) if name]
        found += [plugins.find("averaging", self.averaging), plugins.find("screening", self.screening)]
        found += [plugins.find("task", self.task), *_models(self.model), *self.reading()]
        found += [plugins.find("logger", name) for name in dict.fromkeys(self.log_to)]
        return found + self._defending() + self._own_optimizers() + self._asked_metrics()

    def reading(self, given: Iterable[str] | None = None) -> list[Entry]:
        """What reads the data: a source, a format, or (where the file must tell) those formats that have an option
        that was `given` (by default: to this configuration).
        """
        if self.data_format != "auto":
            return [plugins.find("format", self.data_format)]
        if plugins.known("data", self.data) or plugins.is_reference(self.data):
            return [plugins.find("data", self.data)]
        named = set(self.__pydantic_extra__ or {}) if given is None else set(given)
        return [entry for entry in plugins.index("format").values() if entry.option_names & named]

    def _asked_metrics(self) -> list[Entry]:
        """The metrics named, without those that only a task of the user's own has."""
        named = dict.fromkeys([*self.metrics, *([self.primary_metric] if self.primary_metric else [])])
        return [plugins.find("metric", n) for n in named if plugins.known("metric", n) or plugins.is_reference(n)]

    def _own_optimizers(self) -> list[Entry]:
        """The user's own optimisers: torch's are not registered."""
        named = dict.fromkeys(name for name in (self.client_optimizer, self.server_optimizer) if name)
        return [
            plugins.find("optimizer", name)
            for name in named
            if plugins.is_reference(name) or plugins.known("optimizer", name)
        ]

    def _defending(self) -> list[Entry]:
        """The defences named, and those of which an option is given."""
        given = set(self.__pydantic_extra__ or {})
        named = [plugins.find("defence", name) for name in self.defences]
        return named + [e for e in plugins.index("defence").values() if e.option_names & given and e not in named]

    def check_common(self, algorithms: Iterable[str], given: frozenset[str]) -> None:
        """Check what concerns several fields, for these algorithms. `given`: what the user set. Raises ConfigError."""
        found = {name: traits(name) for name in algorithms}
        if any(t.split for t in found.values()):
            _check_cuts(self, found, strict=True)
        for option in sorted(given & set(CommonConfig.model_fields)):
            when = _when(option, getattr(self, option))
            if not any(_WHEN[when](t) for t in found.values()):
                raise _idle(option, getattr(self, option), found, when)
        for entry in self._defending():
            if not any(t.split for t in found.values()):
                option = sorted(entry.option_names & given or entry.option_names)[0]
                raise _idle(option, getattr(self, option, None), found, "split")
        self.check_fleet(given)
        if "tau" in given and self.logit_adjust == "none":
            raise ConfigError(
                f"tau = {self.tau:g} has no effect without logit_adjust: choose client, server or both, or leave it out"
            )
        if self.weights is None and not self.weights_strict:
            raise ConfigError("weights_strict = False has no effect without weights: name a file, or leave it out")
        for first, second in exclusive_pairs():
            if {first, second} <= given and getattr(self, second) is not None and getattr(self, first):
                raise ConfigError(
                    f"{first} = {getattr(self, first)} and {second} = {getattr(self, second)} exclude each other: "
                    "give one"
                )


def _check_cuts(config: CommonConfig | PlanConfig, found: Mapping[str, Traits], *, strict: bool) -> None:
    """Raises ConfigError for cuts that are not one for each client, or that an algorithm cannot have (any, if `strict`,
    else all). In a comparison, those algorithms that an option has no effect on go without it.
    """
    cuts, by = config.cuts, config.cut_by
    if len(cuts) > 1 and not all(cuts):
        raise ConfigError(f"cut = {config.cut!r} has an empty name: name a module for each client")
    for name, given in (("cut", cuts), *_cut_budgets(config).items()):
        if len(given) not in (0, 1, config.clients):
            raise ConfigError(
                f"{name} has {len(given)} entries for {config.clients} clients: give one for all, or one for each"
            )
    split = {name: t for name, t in found.items() if t.split}
    cannot = [name for name, t in split.items() if not t.mixes_cuts]
    listed = len(set(cuts)) > 1
    if cannot and ((listed and strict) or ((by or listed) and len(cannot) == len(split))):
        raise ConfigError(
            f"{'a list of cuts' if listed else f'cut_by = {by!r}'} is not possible with "
            f"{', '.join(cannot)}: {found[cannot[0]].one_cut}; name one cut for all, or choose another algorithm"
        )
    _check_cut_budgets(config, [name for name, t in split.items() if not t.lower_only], alone=len(split))


def _cut_budgets(config: CommonConfig | PlanConfig) -> dict[str, tuple[float, ...]]:
    """What each client's cut has to fit into."""
    return {"client_memory": config.client_memory, "client_seconds": config.client_seconds}


def _check_cut_budgets(config: CommonConfig | PlanConfig, unreckoned: Sequence[str], alone: int) -> None:
    """Raises ConfigError for budgets that cannot be held against anything, or that nothing can keep. Of `alone`
    algorithms that cut the model, what the clients of those that are `unreckoned` hold is not known.
    """
    for name, given in _cut_budgets(config).items():
        if wrong := [value for value in given if not 0 < value < math.inf]:
            raise ConfigError(f"{name} = {wrong[0]:g} is not possible: give numbers above 0")
        if given and len(unreckoned) == alone:
            raise ConfigError(
                f"{name} = {list(given)} is not possible with {', '.join(unreckoned)}, whose clients hold more "
                "than the part below one cut: leave it out, or choose another algorithm"
            )
    by = config.cut_by
    needs = {"memory": "client_memory", "time": "client_seconds"}.get(by or "")
    if needs and not getattr(config, needs):
        raise ConfigError(f"cut_by = {by!r} needs {needs}: give one number for all clients, or one for each")
    if config.client_device is None and (by in ("time", "profile") or config.client_seconds):
        what = f"cut_by = {by!r}" if by in ("time", "profile") else f"client_seconds = {list(config.client_seconds)}"
        raise ConfigError(
            f"{what} needs client_device: name what the clients compute on (see `cutlayer list profiles`)"
        )


def _when(option: str, value: Any) -> str:
    """With which algorithms an option of all runs has an effect: what it names may say more than the option."""
    if option == "screening":
        return str(plugins.find("screening", value).facts["when"])
    return str(about(CommonConfig.model_fields[option], "when") or "")


def _idle(option: str, value: Any, found: Mapping[str, Traits], when: str) -> ConfigError:
    users = [name for name in plugins.names("algorithm") if name not in found and _fits(name, when)]
    return ConfigError(
        f"{option} = {value!r} has no effect on {', '.join(found)}: it belongs to {', '.join(users)}; leave it out or "
        "choose one of these"
    )


def _fits(algorithm: str, when: str) -> bool:
    try:
        return _WHEN[when](traits(algorithm))
    except ConfigError:  # of an installed package that cannot be imported
        return False


class RunConfig(CommonConfig):
    """One training run.

    Options are keywords: those below, and those of the things that are chosen (`cutlayer list` names them all; for
    algorithm="sglr": phi, alpha, ...). `RunConfig.of(mapping)` gives errors in a sentence.
    """

    algorithm: str = _field("sglr", WHAT)
    """The algorithm (see `cutlayer list algorithms`), or your own: path/to/file.py:name."""
    seed: int = _field(0, TRAINING, shared=True, ge=0)
    """Seed of all randomness: splits, partition, initial weights, batches, active clients."""
    share_server_model: bool = _field(False, OUTPUT)
    """`serve`: at the end, send the server's part to clients that ask for it. `join`: ask for it, and keep the whole
    model in the folder. Both sides must set it. Has no effect in a simulation."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        """What the algorithm presets, unless it is given."""
        name = values.get("algorithm", cls.model_fields["algorithm"].get_default())
        return {**plugins.find("algorithm", name).facts["presets"], **values} if isinstance(name, str) else values

    def algorithm_names(self) -> tuple[str, ...]:
        """The one algorithm."""
        return (self.algorithm,)

    @property
    def traits(self) -> Traits:
        """What follows from the needs of the algorithm."""
        return traits(self.algorithm)

    @property
    def title(self) -> str:
        """The algorithm's title."""
        return plugins.find("algorithm", self.algorithm).title

    @property
    def given(self) -> frozenset[str]:
        """The options that are set to something else than their default."""
        things = {o.name: o.default for entry in self.chosen() for o in entry.options}
        defaults = {**things, **{n: f.get_default() for n, f in type(self).model_fields.items()}}
        return frozenset(n for n in self.model_fields_set if getattr(self, n) != defaults.get(n))

    def check(self, given: frozenset[str]) -> None:
        """Check what concerns several fields. `given` are those that the user set. Raises ConfigError."""
        self.check_common((self.algorithm,), given)
        if self.traits.u_shaped and self.tail_cut is None:
            raise ConfigError(
                f"{self.algorithm} needs tail_cut: name the module after which the client takes over again, e.g. "
                "--tail-cut hidden3 for the mlp"
            )
        labels_stay = self.traits.whole or self.traits.u_shaped
        if self.logit_adjust in ("server", "both") and labels_stay:
            raise ConfigError(
                f"logit_adjust = {self.logit_adjust!r} has no effect on {self.algorithm}, whose server sees no labels: "
                "choose client, or leave it out"
            )

    def thing(self, kind: str, reference: str) -> Any:
        """The chosen thing itself, with its options. Raises ConfigError."""
        made = plugins.load(kind, reference)
        entry = plugins.find(kind, reference)
        values = {o.name: getattr(self, o.name, o.default) for o in entry.options}
        return made.of(values) if isinstance(made, type) and issubclass(made, plugins.Thing) else made

    def resolved(self) -> dict[str, Any]:
        """The options that decide this run, defaults written out, those without effect left out. TOML-ready."""
        default = default_cut(self.model)
        whole = (
            self if self.cut is not None or self.cut_by or default is None else self.model_copy(update={"cut": default})
        )
        return _written_out(whole, [self.traits])


def _models(name: str) -> list[Entry]:
    """The model of that name; none if there is none: the model's own error says more."""
    found = plugins.known("model", name) or plugins.is_reference(name)
    return [plugins.find("model", name)] if found else []


def default_cut(model: str) -> str | None:
    """Where a model is cut unless told otherwise; None for a model that does not say."""
    can_be_found = plugins.known("model", model) or plugins.is_reference(model)
    found = plugins.find("model", model).facts.get("default_cut") if can_be_found else None
    return None if found is None else str(found)


def cuts_of(model: str) -> tuple[str, ...]:
    """The named cut points of a model of the registry, in the order data flows."""
    return tuple(plugins.find("model", model).facts.get("cuts", ()))


class CompareConfig(CommonConfig):
    """Several algorithms, several seeds, the same data, partitions, initial models and batches for all."""

    algorithms: tuple[str, ...] = _field(("cl", "fl", "ssl", "psl", "sfl", "sglr"), WHAT)
    """The algorithms to compare."""
    seeds: tuple[int, ...] = _field((0, 1, 2), WHAT)
    """The seeds; each algorithm is trained once per seed."""
    variant: dict[str, dict[str, Any]] = _field({}, "")
    """TOML tables [variant.NAME]: additional entries, each an algorithm with its own options."""
    sweep: SweepTable = _field({}, WHAT)
    """The TOML table [sweep], or --sweep.phi 0.25,0.5: train each entry with all these values. how: grid (all
    combinations), zip (the first values of all, then the second) or random (draws combinations, drawn with
    draw_seed)."""
    tuning: TuningTable = _field({}, WHAT)
    """The TOML table [tuning], or --tuning.client-lr 0.001,0.01: values or ranges. Before the seeds are trained, each
    entry is tuned over them by its score on validation rows. how: grid, random, halving or optuna (see `cutlayer list
    searches`). trials: the number for each entry. seed: the seed of the tuning. by: last or best evaluation."""

    def algorithm_names(self) -> tuple[str, ...]:
        """Those compared and those of the variants."""
        return (*self.algorithms, *self._variant_algorithms())

    def _variant_algorithms(self) -> tuple[str, ...]:
        default = RunConfig.model_fields["algorithm"].get_default()
        return tuple(str(v.get("algorithm", default)) for v in self.variant.values())

    def replaced(self, entry: Entry) -> set[str]:
        """What every variant of an algorithm says for itself, if the algorithm is not compared without one."""
        if entry.kind != "algorithm" or entry in [plugins.find("algorithm", name) for name in self.algorithms]:
            return set()
        variants = zip(self.variant.values(), self._variant_algorithms(), strict=True)
        own = [set(normalised(v)) for v, name in variants if entry is plugins.find("algorithm", name)]
        return set.intersection(*own) & entry.option_names if own else set()

    def resolved(self) -> dict[str, Any]:
        """The options that decide this comparison, defaults written out, those without effect left out. TOML-ready. A
        default that is not the same for all things that have the option is left to each of them.
        """
        written = _written_out(self, [traits(name) for name in self.algorithm_names()])
        return {k: v for k, v in written.items() if k in self.model_fields_set or k not in self._disputed()}

    def _disputed(self) -> set[str]:
        """The options that several of the chosen things have, with different defaults, or that algorithms preset."""
        things = self.chosen()
        defaults: dict[str, list[Any]] = {}
        for entry in things:
            for option in entry.options:
                defaults.setdefault(option.name, []).append(option.default)
        preset = {name for entry in things for name in entry.facts.get("presets", {})}
        return preset | {name for name, values in defaults.items() if any(v != values[0] for v in values)}

    def runs(self, given: frozenset[str]) -> dict[str, dict[int, RunConfig]]:
        """The runs to make: entry name -> seed -> configuration. Raises ConfigError."""
        given = given - {"algorithms", "seeds", "variant", "sweep", "tuning"}
        base = self.model_dump(include=set(given))
        if not self.algorithms and not self.variant:
            raise _none_named()
        if not self.seeds:
            raise ConfigError("seeds is empty: name at least one, e.g. --seeds 0 1 2")
        listed: dict[str, tuple[int | str, ...]] = {"seeds": self.seeds, "algorithms": self.algorithms}
        for option, chosen in listed.items():
            twice = [value for value in chosen if chosen.count(value) > 1]
            if twice:
                again = (
                    ", or make each a variant with options of its own: [variant.NAME] in a file, variant = {NAME: ...} "
                    "in Python"
                )
                raise ConfigError(
                    f"{option} names {twice[0]!r} twice: name it once{again if option == 'algorithms' else ''}"
                )
        if min(self.seeds) < 0:
            raise ConfigError(f"seeds = {min(self.seeds)} is not possible: a seed must be 0 or greater")
        self.check_common(self.algorithm_names(), given)
        entries: dict[str, dict[int, RunConfig]] = {}
        for algorithm in self.algorithms:
            own = self.fitting(base, algorithm)
            first = RunConfig.of({**own, "algorithm": algorithm})
            first.check(frozenset(own))
            name = plugins.label(algorithm)
            if name in entries:
                raise ConfigError(
                    f"algorithms names {name!r} twice, in two files: make one a variant, [variant.NAME], with the "
                    f"algorithm {algorithm!r}"
                )
            entries[name] = {s: first.model_copy(update={"seed": s}) for s in self.seeds}
        for name, values in self.variant.items():
            if name in entries:
                raise ConfigError(f"variant {name!r} has the name of an algorithm that is compared too: rename it")
            try:
                first = self._variant(base, normalised(values))
            except ConfigError as error:
                raise ConfigError(f"variant {name!r}: {error}") from None
            entries[name] = {s: first.model_copy(update={"seed": s}) for s in self.seeds}
        for name in (name for name, values in self.variant.items() if "algorithm" not in normalised(values)):
            algorithm = next(iter(entries[name].values())).algorithm
            note = f"the variant {name!r} names no algorithm and trains {algorithm}, the default of a run"
            warnings.warn(CutlayerWarning(note), stacklevel=2)
        return entries

    def fitting(
        self, base: Mapping[str, Any], algorithm: str, over: Mapping[str, Any] = MappingProxyType({})
    ) -> dict[str, Any]:
        """Those values of `base` that have an effect on a run of `algorithm` with the values `over` them: all but those
        of things that the run does not choose.
        """
        mine = traits(algorithm)

        def fits(name: str, value: Any) -> bool:
            return name not in CommonConfig.model_fields or _WHEN[_when(name, value)](mine)

        kept = {name: value for name, value in base.items() if fits(name, value)}
        plain = {k: v for k, v in {**kept, **over, "algorithm": algorithm}.items() if k in RunConfig.model_fields}
        run = RunConfig.of(plain)
        things = [*run.chosen(), *run.reading(kept), *(self._defending() if mine.split else ())]
        options = {option for entry in things for option in entry.option_names}
        return {name: value for name, value in kept.items() if name in CommonConfig.model_fields or name in options}

    def entry(self, values: Mapping[str, Any]) -> RunConfig:
        """The configuration of an entry with these `values` of its own, with its algorithm. Raises ConfigError."""
        given = self.model_fields_set - {"algorithms", "seeds", "variant", "sweep", "tuning"}
        return self._variant(self.model_dump(include=given), values)

    def _variant(self, base: Mapping[str, Any], values: Mapping[str, Any]) -> RunConfig:
        """A variant's configuration: its own `values` over those of `base` that fit it. Raises ConfigError."""
        if "seed" in values:
            raise ConfigError(
                f"seed = {values['seed']!r} cannot be chosen by a variant: use seeds, which all entries share"
            )
        algorithm = str(values.get("algorithm", RunConfig.model_fields["algorithm"].get_default()))
        first = RunConfig.of(overlaid(self.fitting(base, algorithm, values), values))
        first.check(frozenset(values))
        return first


class PlanConfig(FleetConfig, _CutConfig):
    """What split learning would cost, without training."""

    kinds = ("algorithm", "model")

    model: str = _field("cnn", WHAT)
    """The name of a model (see `cutlayer list models`), or your own: path/to/file.py:name or package.module:name."""
    cut: str | None = _field(None, WHAT)
    """The module after which the model is cut, or all. Several names, separated by commas (in a file: a list), give
    each client a cut of its own; NAME*20 gives this cut to 20 clients. Default: the model's own cut, or all for a model
    without one."""
    cut_by: Literal["memory", "time", "profile"] | None = _field(None, WHAT)
    """Choose each client's cut, as in a run: the deepest within client_memory (memory) or client_seconds (time), or the
    one with the fastest step on its machine and link (profile)."""
    client_memory: tuple[float, ...] = _field((), BUDGETS)
    """Memory of a client for training in gigabytes (1e9 bytes): one number for all clients, or one for each. Cuts must
    fit."""
    client_seconds: tuple[float, ...] = _field((), BUDGETS)
    """Seconds that a client's step may take, sending and receiving included: one number for all clients, or one for
    each. Cuts must fit. Needs client_device."""
    tail_cut: str | None = _field(None, WHAT)
    """For U-shaped algorithms, with one cut: the module after which the client takes over again."""
    algorithms: tuple[str, ...] = _field(("cl", "fl", "ssl", "psl", "sfl", "sglr"), WHAT)
    """The algorithms to plan."""
    input: tuple[int, ...] = _field((1, 28, 28), DATA)
    """Shape of one sample."""
    input_type: Literal["float32", "int64"] = _field("float32", DATA)
    """Type of the inputs: real numbers (of the type that precision names), or integers such as token ids."""
    freeze: str | None = _field(None, WHAT)
    """Do not train or send parameters whose names match this regular expression (anywhere in the name)."""
    task: str = _field("classification", DATA)
    """The task (see `cutlayer list tasks`), or your own: path/to/file.py:name. It determines the number of outputs of a
    built-in model and the size of a label."""
    target: tuple[int, ...] | None = _field(None, DATA)
    """Shape of one sample's target, if it is not one class or number, such as 3 for three quantities. Default for one
    class per place: the input's shape without its channels."""
    classes: int = _field(10, DATA, ge=2)
    """Number of classes of a built-in model."""
    label_bytes: int | None = _field(None, DATA, ge=0)
    """Bytes of one sample's label. Default: 8 for each class, 4 for each number of the target."""
    clients: int = _field(10, CLIENTS, ge=1)
    """Number of clients, C."""
    samples_per_client: int = _field(1000, CLIENTS, ge=1)
    """Samples that each client holds."""
    batch: int = _field(8, TRAINING, ge=1)
    """Batch size of a client, b."""
    precision: Literal["float32", "bfloat16", "float16"] = _field("float32", TRAINING)
    """Type of the weights and of what crosses the cut."""
    up_codec: str = _field("raw", CROSSING)
    """The codec of smashed data (U-shaped: also of gradients); see `cutlayer list codecs`."""
    down_codec: str = _field("raw", CROSSING)
    """The codec of cut gradients (U-shaped: also of features)."""
    client_optimizer: Literal["adam", "sgd"] = _field("adam", TRAINING)
    """The clients' optimiser, for their memory: adam keeps two more numbers per parameter, sgd none."""
    gradient_checkpointing: Literal["none", "client", "server", "both"] = _field("none", TRAINING)
    """Sides whose blocks (for example of a transformer) keep only their inputs and are computed again in the backward
    pass: less memory, and more computation and time."""
    memory_budget: float | None = _field(None, BUDGETS, gt=0)
    """Memory of a client for training in gigabytes (1e9 bytes)."""
    energy_budget: float | None = _field(None, BUDGETS, gt=0)
    """Energy that a client may spend in an epoch in joules; only what training adds to idling counts."""
    servers: int = _field(1, COSTS, ge=1)
    """Number of server devices that share the server's work."""
    ranks: int = _field(1, COSTS, ge=1)
    """Processes that simulate the clients together. With more than 1, the plan also shows what each holds in memory and
    sends."""
    seed: int = _field(0, COSTS, ge=0)
    """Seed for drawing the clients' speeds, rates and stragglers."""

    @field_validator("client_optimizer", mode="before")
    @classmethod
    def _lower_case(cls, name: Any) -> Any:
        """Adam and SGD may be spelled as torch spells them."""
        return name.lower() if isinstance(name, str) else name

    def chosen(self) -> list[Entry]:
        """The algorithms, with those of their options that `traffic` reads, and the model."""
        return [_planned(plugins.find("algorithm", name)) for name in self.algorithms] + _models(self.model)

    def _check_tail(self) -> None:
        """Raises ConfigError for a second cut without a use, and for a use without one."""
        bent = [name for name in self.algorithms if traits(name).u_shaped]
        if bent and self.tail_cut is None:
            raise ConfigError(
                f"{bent[0]} needs tail_cut: name the module after which the client takes over again, e.g. "
                "--cut hidden1 --tail-cut hidden3 for the mlp"
            )
        if self.tail_cut is not None and not bent:
            raise ConfigError(
                f"tail_cut = {self.tail_cut!r} has no effect on {', '.join(self.algorithms)}: it belongs to U-shaped "
                "algorithms; leave it out or name one of these"
            )

    def _check_own_cuts(self) -> None:
        """Raises ConfigError for cuts, or budgets of clients' cuts, that a run could not have either, and for what can
        only be planned with one cut for all.
        """
        _check_cuts(self, {name: traits(name) for name in self.algorithms}, strict=False)
        if self.cut_by is not None and self.cut is not None:
            raise ConfigError(f"cut = {self.cut} and cut_by = {self.cut_by} exclude each other: give one")
        if self.cut == "all" and (self.client_memory or self.client_seconds):
            option = "client_memory" if self.client_memory else "client_seconds"
            raise ConfigError(
                f"{option} = {list(getattr(self, option))} has no effect with cut = 'all': choose cut_by, or give "
                "memory_budget"
            )
        if self.cut_by is None and len(set(self.cuts)) < 2:
            return
        what = f"cut_by = {self.cut_by!r}" if self.cut_by else "a list of cuts"
        for option in ("memory_budget", "energy_budget", "tail_cut"):
            if (value := getattr(self, option)) is not None:
                raise ConfigError(
                    f"{option} = {value!r} belongs to one cut for all, and {what} gives each client its own: leave one "
                    "of them out (client_memory is a budget of each client)"
                )
        if self.ranks > 1:
            raise ConfigError(f"ranks = {self.ranks} is not possible with {what}: leave it out, or name one cut")

    def _check_targets(self, given: frozenset[str]) -> None:
        """Raises ConfigError for a task that there is not, or options of targets without effect."""
        targets = plugins.find("task", self.task).facts["targets"]
        if "classes" in given and targets == "numbers":
            raise ConfigError(
                f"classes = {self.classes} has no effect on the task {self.task!r}, whose targets are numbers: leave "
                "it out, and give their shape with target"
            )
        if "target" in given and targets == "class":
            raise ConfigError(
                f"target = {list(self.target or ())} has no effect on the task {self.task!r}, which has one class per "
                "sample: leave it out"
            )
        if self.target and min(self.target) < 1:
            raise ConfigError(f"target = {list(self.target)} is not a shape: give sizes of 1 or more, e.g. --target 3")

    @property
    def targets(self) -> tuple[int, ...]:
        """The shape of one sample's target."""
        kind = plugins.find("task", self.task).facts["targets"]
        if self.target is not None or kind != "classes":
            return self.target or ()
        return self.input[1:] or self.input

    def algorithm(self, name: str) -> Any:
        """One of the algorithms, with its options. Raises ConfigError."""
        reference = self.reference(name)
        return plugins.load("algorithm", reference).of(self.options_of(_planned(plugins.find("algorithm", reference))))

    def reference(self, name: str) -> str:
        """How the algorithm that is registered under `name` was named here."""
        return next((a for a in self.algorithms if plugins.registered_name("algorithm", a) == name), name)

    def check(self, given: frozenset[str]) -> None:
        """Check what concerns several fields. `given` are the fields that the user set. Raises ConfigError."""
        if not self.algorithms:
            raise _none_named()
        for name in self.algorithms:
            if self.algorithms.count(name) > 1:
                raise ConfigError(f"algorithms names {name!r} twice: name it once")
        self._check_tail()
        if not self.input or min(self.input) < 1:
            raise ConfigError(
                f"input = {list(self.input)} is not a shape: give sizes of 1 or more, e.g. --input 1 28 28"
            )
        if "classes" in given and not plugins.known("model", self.model):
            raise ConfigError(f"classes = {self.classes} has no effect on a model of your own: leave it out")
        self._check_targets(given)
        self._check_own_cuts()
        self.check_fleet(given)
        needs = (("servers", "server_device"), ("energy_budget", "client_device"), ("seed", "client_device"))
        for option, needed in needs:
            if option in given and getattr(self, needed) is None:
                raise ConfigError(
                    f"{option} = {getattr(self, option)!r} has no effect without {needed}: name one "
                    "(see `cutlayer list profiles`), or leave it out"
                )


class CalibrateConfig(_Chooser):
    """The model that a machine is calibrated with."""

    kinds = ("model",)

    model: str = _field("cnn", MODEL)
    """The model that is trained (see `cutlayer list models`), or your own: path/to/file.py:function."""
    input: tuple[Annotated[int, Field(ge=1)], ...] = _field((1, 28, 28), DATA)
    """Shape of one sample."""
    input_type: Literal["float32", "int64"] = _field("float32", DATA)
    """Type of the inputs: real numbers, or integers such as token ids."""

    def chosen(self) -> list[Entry]:
        """The model."""
        return _models(self.model)


class ReproduceConfig(_Chooser):
    """What a reproduction trains: the data, and a model and a task instead of the paper's."""

    kinds = ("data", "model", "task")

    data: str = _field("fashion-mnist", DATA)
    """The name of a data set, the path of your own data, such as a folder of idx files, or a function:
    path/to/file.py:name."""
    task: str = _field("classification", TASK)
    """A task with one class per row that is scored by accuracy, or your own: path/to/file.py:name."""
    model: str | None = _field(None, MODEL)
    """The name of a model, or your own: path/to/file.py:function. It replaces the models of the chosen size in every
    table. Default: the models of the size."""
    cut: str | None = _field(None, MODEL)
    """The module after which the model is cut. Default: the model's own."""

    def chosen(self) -> list[Entry]:
        """The task, the model if one is given, and the data set, unless it is a path."""
        found = plugins.known("data", self.data) or plugins.is_reference(self.data)
        data = [plugins.find("data", self.data)] if found else []
        return [plugins.find("task", self.task), *(_models(self.model) if self.model else []), *data]

    @property
    def things(self) -> dict[str, Any]:
        """Model, cut and task, those that are not at their defaults."""
        fields = {name: info.get_default() for name, info in type(self).model_fields.items() if name != "data"}
        return {name: getattr(self, name) for name, default in fields.items() if getattr(self, name) != default}

    @property
    def given(self) -> dict[str, Any]:
        """The options of the chosen things that are not at their defaults."""
        defaults = {o.name: o.default for entry in self.chosen() for o in entry.options}
        return {name: value for name, value in self.specific.items() if value != defaults[name]}


def _none_named() -> ConfigError:
    default = RunConfig.model_fields["algorithm"].get_default()
    return ConfigError(f"algorithms is empty: name at least one, e.g. --algorithms {default}")


@cache
def _planned(entry: Entry) -> Entry:
    return replace(entry, options=tuple(o for o in entry.options if o.planned))


def _written_out(config: CommonConfig, found: list[Traits]) -> dict[str, Any]:
    """The options that `config` is decided by: all but those without effect, and those that another one replaces."""
    dumped = config.model_dump(mode="json")
    drop = {
        name
        for name in CommonConfig.model_fields
        if not any(_WHEN[_when(name, getattr(config, name))](t) for t in found)
    }
    drop |= {first for first, second in exclusive_pairs() if dumped.get(second)}
    drop |= set(TracedConfig.model_fields) if config.client_device is None else set()
    drop |= {"rate_spread"} if config.trace is not None else set()
    drop |= {"tau"} if config.logit_adjust == "none" else set()
    own = [name for name in type(config).model_fields if name not in CommonConfig.model_fields]
    order = [*own, *CommonConfig.model_fields, *config.specific]
    unset: dict[str, tuple[Any, ...]] = {
        k: (None, {}, []) if f.default in ({}, ()) else (None,) for k, f in type(config).model_fields.items()
    }
    return {k: dumped[k] for k in order if k not in drop and dumped[k] not in unset.get(k, (None,))}


_COMMON_PAIRS = (("epochs", "rounds"), ("cut", "cut_by"))


def exclusive_pairs() -> list[tuple[str, str]]:
    """Pairs of options that exclude each other; the second replaces the default of the first."""
    things = [pair for e in plugins.flat() for pair in e.facts["exclusive"]]
    return list(dict.fromkeys([*_COMMON_PAIRS, *((first, second) for first, second in things)]))


def overlaid(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`; with rounds on top, the epochs below are gone, and so on."""
    gone = {
        below
        for pair in exclusive_pairs()
        for above, below in (pair, pair[::-1])
        if over.get(above) and below not in over
    }
    return {**{k: v for k, v in base.items() if k not in gone}, **over}


NAMING = {
    "algorithm": "algorithm",
    "algorithms": "algorithm",
    "model": "model",
    "task": "task",
    "metrics": "metric",
    "data": "data",
    "data_format": "format",
    "partition": "partition",
    "lr_schedule": "schedule",
    "server_lr_schedule": "schedule",
    "averaging": "averaging",
    "screening": "screening",
    "up_codec": "codec",
    "down_codec": "codec",
    "defences": "defence",
    "attack": "attack",
    "log_to": "logger",
    "client_optimizer": "optimizer",
    "server_optimizer": "optimizer",
    "aux": "head",
    "how": "search",
}
"""Options that name things, and of which kind."""
_PATHS = ("data", "profiles", "tokenizer", "trace", "weights")  # options that may name a file or folder


def from_anywhere(values: Mapping[str, Any]) -> dict[str, Any]:
    """Options to be stored: what is named by a relative path gets its whole path, so that a run can be resumed from
    every working directory.
    """
    return {name: _from_anywhere(name, value) for name, value in values.items()}


def _from_anywhere(name: str, value: Any) -> Any:
    if name == "variant" and isinstance(value, Mapping):
        return {k: from_anywhere(normalised(v)) if isinstance(v, Mapping) else v for k, v in value.items()}
    if name == "tuning" and isinstance(value, Mapping):
        return from_anywhere(normalised(value))
    if name not in NAMING and name not in _PATHS:
        return value
    if isinstance(value, list | tuple):
        return [_from_anywhere(name, one) for one in value]
    if not isinstance(value, str):
        return value
    named = name == "data" and (plugins.known("data", value) or plugins.is_reference(value))
    if name in _PATHS and not named and Path(value).expanduser().exists():
        return str(Path(value).expanduser().resolve())
    return plugins.absolute(value)


# Kinds that may be given as objects of Python.
_OBJECTS = {"algorithm", "partition", "schedule", "averaging", "screening", "defence", "task", "optimizer", "logger"}


def by_reference(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values given from Python, things among them as objects (classes or configured instances): their names instead,
    with the options that an instance has.
    """
    named: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for name, value in values.items():
        if name == "variant" and isinstance(value, Mapping):
            named[name] = {k: by_reference(v) if isinstance(v, Mapping) else v for k, v in value.items()}
            continue
        kind = NAMING.get(name, "")
        if kind not in _OBJECTS or value is None or isinstance(value, str):
            named[name] = value
            continue
        several = isinstance(value, tuple | list)
        adopted = [plugins.adopt(kind, one) for one in (value if several else [value])]
        named[name] = tuple(reference for reference, _ in adopted) if several else adopted[0][0]
        for _, own in adopted:
            options |= own
    return {**options, **named}


def normalised(values: Mapping[str, Any]) -> dict[str, Any]:
    """TOML keys may be written with dashes, as the flags are."""
    return {key.replace("-", "_"): value for key, value in values.items()}


def read_toml(path: Path) -> dict[str, Any]:
    """The values of a configuration file. Raises ConfigError where it is missing or not TOML."""
    try:
        return normalised(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {str(path)!r}: {error.strerror}; check the path") from None
    except RecursionError:
        raise ConfigError(f"the configuration {str(path)!r} is nested too deeply: correct it") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration {str(path)!r} is not valid TOML: {error}; correct that line") from None
