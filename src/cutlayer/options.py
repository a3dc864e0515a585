"""Every option of a run: one flat set of names, the same in Python, in a TOML file and (with dashes) as flags.

A field's own range is checked when it is set; what concerns several fields is checked by `check()`, once file and flags
have been merged. Only what applies to the chosen algorithm is kept in the resolved configuration.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from cyclopts import Group, Parameter
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from cutlayer.catalog import ALGORITHMS, MODELS
from cutlayer.errors import ConfigError, unknown

DATA = Group("Data", sort_key=1)
CLIENTS = Group("Clients and partition", sort_key=2)
MODEL = Group("Model and cut", sort_key=3)
TRAINING = Group("Training", sort_key=4)
SPLIT_LR = Group("SplitLr (slr, sglr)", sort_key=5)
SPLIT_AVG = Group("SplitAvg (sgl, sglr)", sort_key=6)
OTHERS = Group("Other algorithms", sort_key=7)
CROSSING = Group("What crosses the cut", sort_key=8)
DEFENCES = Group("Defences of the smashed data", sort_key=9)
COSTS = Group("Virtual clock and energy model (none without a client device)", sort_key=10)
OUTPUT = Group("Output", sort_key=11)
FAULTS = Group("Faults", sort_key=12)


def _typed(options: Any) -> Any:
    """Options given as flags are texts: those that say true, 0.9 or [0.9, 0.99] become that."""
    if not isinstance(options, Mapping):
        return options
    return {name: _value(v) if isinstance(v, str) else v for name, v in options.items()}


def _value(text: str) -> Any:
    try:
        value = json.loads(text.lower() if text.lower() in ("true", "false") else text)
    except ValueError:
        return text
    finite = isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value))
    return value if finite or isinstance(value, list) else text


Options = Annotated[dict[str, bool | int | float | str | list[float]], BeforeValidator(_typed)]
_options_flag = Parameter(group=TRAINING, negative=())


class _Config(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Build from plain values. Raises ConfigError with the value, the reason and the remedy."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise explain(error, cls) from None


class FleetConfig(_Config):
    """The machines and links that a virtual clock and an energy model reckon with."""

    client_device: Annotated[str | None, Parameter(group=COSTS)] = None
    """What clients compute on, a profile (see `cutlayer list profiles`). Gives every run virtual time and energy."""
    server_device: Annotated[str | None, Parameter(group=COSTS)] = None
    """What the server computes on. Default: its computing takes no time, its energy is not known."""
    link: Annotated[str | None, Parameter(group=COSTS)] = None
    """The clients' link, a profile. Default: rates as given, its energy not known."""
    up_mbps: Annotated[float | None, Parameter(group=COSTS)] = Field(None, gt=0)
    """A client's rate of sending in Mbit/s. Default: the link's."""
    down_mbps: Annotated[float | None, Parameter(group=COSTS)] = Field(None, gt=0)
    """A client's rate of receiving in Mbit/s. Default: the link's."""
    latency_ms: Annotated[float | None, Parameter(group=COSTS)] = Field(None, ge=0)
    """Milliseconds that each message takes besides, one way. Default: the link's."""
    server_mbps: Annotated[float | None, Parameter(group=COSTS)] = Field(None, gt=0)
    """What all clients together can send to the server, and receive, in Mbit/s. Default: no limit."""
    multicast: Annotated[bool, Parameter(group=COSTS)] = False
    """A message that is the same for several clients leaves the server once."""
    utilisation: Annotated[float, Parameter(group=COSTS)] = Field(1.0, gt=0, le=1)
    """Fraction of the profiles' FLOP/s that training reaches."""
    speed_spread: Annotated[float, Parameter(group=COSTS)] = Field(0.0, ge=0, le=5)
    """Clients' speeds differ: standard deviation of their logarithm (.5: most within a factor of 2.7)."""
    rate_spread: Annotated[float, Parameter(group=COSTS)] = Field(0.0, ge=0, le=5)
    """Clients' link rates differ: standard deviation of their logarithm."""
    stragglers: Annotated[float, Parameter(group=COSTS)] = Field(0.0, ge=0, le=1)
    """Fraction of the clients that are slower than the rest, in computing and on their link."""
    straggler_slowdown: Annotated[float, Parameter(group=COSTS)] = Field(10.0, ge=1)
    """How many times slower stragglers are."""
    profiles: Annotated[str | None, Parameter(group=COSTS)] = None
    """A TOML file with profiles of your own: tables [device.NAME] and [link.NAME]."""

    def check_fleet(self, given: frozenset[str]) -> None:
        """Without a client device the rest has no effect. `given` are what the user set. Raises ConfigError."""
        if self.client_device is None and (idle := sorted(given & set(FleetConfig.model_fields))):
            raise ConfigError(
                f"{idle[0]} = {getattr(self, idle[0])!r} has no effect without client_device: name what the clients "
                "compute on, e.g. raspberry-pi-4 (see `cutlayer list profiles`), or leave it out"
            )


class FaultConfig(_Config):
    """What a server does about clients that are late, away or faulty: the table [faults] of a file, or flags."""

    deadline: Annotated[float | None, Parameter(group=FAULTS)] = Field(None, gt=0)
    """Seconds for a step, after which it goes on with the clients that have answered, if they are a quorum. Default: as
    long as it takes."""
    quorum: Annotated[float, Parameter(group=FAULTS)] = Field(0.5, gt=0, le=1)
    """Fraction of the clients that a step needs after the deadline, and a round to begin."""
    patience: Annotated[float | None, Parameter(group=FAULTS)] = Field(None, gt=0)
    """Seconds to wait for clients that are missing: all of them at the start, a quorum later. Default: for ever."""
    faulty: Annotated[Literal["exclude", "readmit", "stop"], Parameter(group=FAULTS)] = "exclude"
    """A client that sends NaN, wrong shapes or no message at all is excluded from the run; or it loses its connection,
    and may come back; or the run ends."""


class CommonConfig(FleetConfig):
    """What all commands that train share."""

    data: Annotated[str, Parameter(group=DATA)] = "digits"
    """A built-in data set (see `cutlayer list data`) or the path of your own."""
    data_format: Annotated[Literal["auto", "npz", "csv", "idx", "images", "huggingface"], Parameter(group=DATA)] = (
        "auto"
    )
    """How to read a path; auto looks at the file."""
    label_column: Annotated[str, Parameter(group=DATA)] = "label"
    """The label's column (CSV, Hugging Face)."""
    client_column: Annotated[str | None, Parameter(group=DATA)] = None
    """The column that says whose sample a row is (CSV, Hugging Face), for the partition `column`."""
    class_names: Annotated[tuple[str, ...], Parameter(group=DATA, negative=(), consume_multiple=True)] = ()
    """All labels, in order, where the data at hand may lack some (a client's own). Default: those in the data."""
    validation: Annotated[float, Parameter(group=DATA)] = Field(0.1, ge=0)
    """Held out of training to choose by: a fraction below 1, or a number of samples."""
    test: Annotated[float, Parameter(group=DATA)] = Field(0.2, gt=0)
    """Held out for the reported accuracy where the data bring no test set: a fraction below 1, or a number."""

    clients: Annotated[int, Parameter(group=CLIENTS)] = Field(10, ge=1)
    """Number of clients, C."""
    partition: Annotated[Literal["iid", "dirichlet", "shards", "quantity", "column"], Parameter(group=CLIENTS)] = "iid"
    """How samples are dealt to clients: evenly, by label skew (dirichlet, shards), by size, or by the data's column."""
    dirichlet_alpha: Annotated[float, Parameter(group=CLIENTS)] = Field(0.5, gt=0)
    """Label skew of the partition `dirichlet`: small is skewed (.1), large is iid (100)."""
    shards_per_client: Annotated[int, Parameter(group=CLIENTS)] = Field(2, ge=1)
    """Label-sorted shards that each client gets in the partition `shards`."""
    quantity: Annotated[Literal["linear", "square", "exponential"], Parameter(group=CLIENTS)] = "linear"
    """How client sizes grow in the partition `quantity`."""
    samples_per_client: Annotated[int | None, Parameter(group=CLIENTS)] = Field(None, ge=1)
    """Use only so many samples per client, on average where sizes differ (the paper: 1000). Default: share out all."""
    participation: Annotated[float, Parameter(group=CLIENTS)] = Field(1.0, gt=0, le=1)
    """Fraction of the clients that takes part in a round, drawn afresh each round."""

    model: Annotated[str, Parameter(group=MODEL)] = "cnn"
    """A model of the zoo (see `cutlayer list models`)."""
    cut: Annotated[str | None, Parameter(group=MODEL)] = None
    """The module after which the model is cut. Default: the model's own."""
    tail_cut: Annotated[str | None, Parameter(group=MODEL)] = None
    """U-shaped split (ussl): the module after which the client takes over again."""
    start: Annotated[Literal["equal", "independent"], Parameter(group=MODEL)] = "equal"
    """Client models start equal, or each from its own random initialisation."""

    epochs: Annotated[int, Parameter(group=TRAINING)] = Field(20, ge=1)
    """Passes over every client's data."""
    rounds: Annotated[int | None, Parameter(group=TRAINING)] = Field(None, ge=1)
    """Number of rounds, instead of epochs. A round is one local epoch unless local_epochs or local_steps say more."""
    batch: Annotated[int, Parameter(group=TRAINING)] = Field(8, ge=1)
    """Batch size of a client, b (in cl: of the one model)."""
    client_optimizer: Annotated[str, Parameter(group=TRAINING)] = "adam"
    """A class of torch.optim in lower case: adam, sgd, adamw, rmsprop... For cl and fl: of the whole model."""
    client_optimizer_options: Annotated[Options, _options_flag] = {}
    """Its further arguments, e.g. --client-optimizer-options.momentum 0.9."""
    client_lr: Annotated[float, Parameter(group=TRAINING)] = Field(1e-3, gt=0)
    """The clients' learning rate, eta_c."""
    server_optimizer: Annotated[str | None, Parameter(group=TRAINING)] = None
    """The server's optimiser. Default: client_optimizer."""
    server_optimizer_options: Annotated[Options | None, _options_flag] = None
    """Its further arguments. Default: client_optimizer_options where the optimiser is the same."""
    server_lr: Annotated[float | None, Parameter(group=TRAINING)] = Field(None, gt=0)
    """The server's learning rate before SplitLr. Default: client_lr."""
    lr_schedule: Annotated[Literal["step", "cosine", "constant"], Parameter(group=TRAINING)] = "step"
    """How the learning rates fall over the rounds."""
    server_lr_schedule: Annotated[Literal["step", "cosine", "constant"] | None, Parameter(group=TRAINING)] = None
    """The server's schedule. Default: lr_schedule."""
    lr_decay: Annotated[float, Parameter(group=TRAINING)] = Field(0.1, gt=0, le=1)
    """Schedule `step`: factor at each of lr_decay_at."""
    lr_decay_at: Annotated[tuple[float, ...], Parameter(group=TRAINING, negative=())] = (0.8,)
    """Schedule `step`: fractions of the rounds."""
    local_epochs: Annotated[int, Parameter(group=TRAINING)] = Field(1, ge=1)
    """Local epochs per round (fl, sfl, sflv1-3)."""
    local_steps: Annotated[int | None, Parameter(group=TRAINING)] = Field(None, ge=1)
    """Local steps per round instead of epochs (fl, sfl, sflv1-3); fl with 1 is FedSGD."""

    alpha: Annotated[float, Parameter(group=SPLIT_LR)] = Field(1.0, ge=0)
    """Rate exponent: the server's rate is server_lr x C^alpha (eq. 13)."""
    alpha_clients: Annotated[Literal["participating", "enrolled"], Parameter(group=SPLIT_LR)] = "participating"
    """Which C: the clients in the step, or all enrolled."""

    phi: Annotated[float, Parameter(group=SPLIT_AVG)] = Field(0.5, ge=0, le=1)
    """Active fraction: so many clients share one common cut gradient in each step."""
    phi_when: Annotated[Literal["always", "initial", "final"], Parameter(group=SPLIT_AVG)] = "always"
    """Average during all of the training, or only its initial or final part (the phased variants)."""
    phi_until: Annotated[float, Parameter(group=SPLIT_AVG)] = Field(0.6, ge=0, le=1)
    """How large that initial or final part is, as a fraction of the training."""
    average_over: Annotated[Literal["clients", "clients-and-rows"], Parameter(group=SPLIT_AVG)] = "clients"
    """Average row by row over the active clients, or over all their rows into one gradient for every row."""
    average_reduce: Annotated[Literal["mean", "sum"], Parameter(group=SPLIT_AVG)] = "mean"
    """Mean of the clients' gradients, or sum of the concatenated loss's slices (eq. 15 to the letter)."""
    gradient_scale: Annotated[Literal["own", "union"], Parameter(group=SPLIT_AVG)] = "own"
    """A client's cut gradient is that of its own mean loss, or of the mean loss over all rows (psl, sfl too)."""

    up_codec: Annotated[str, Parameter(group=CROSSING)] = "raw"
    """How smashed data are written (in ussl gradients too): raw, bfloat16, float16, int8, float8 or top-k:FRACTION,
    with +zstd or without."""
    down_codec: Annotated[str, Parameter(group=CROSSING)] = "raw"
    """How cut gradients are written (in ussl features too), likewise."""

    clip: Annotated[float | None, Parameter(group=DEFENCES)] = Field(None, gt=0)
    """Clip each sample's smashed data to this length: the Euclidean norm, or with laplace_noise the sum of absolute
    values."""
    gaussian_noise: Annotated[float, Parameter(group=DEFENCES)] = Field(0.0, ge=0)
    """Add Gaussian noise to smashed data: its standard deviation, in units of clip."""
    laplace_noise: Annotated[float, Parameter(group=DEFENCES)] = Field(0.0, ge=0)
    """Add Laplace noise to smashed data: its scale, in units of clip."""
    feature_dropout: Annotated[float, Parameter(group=DEFENCES)] = Field(0.0, ge=0, lt=1)
    """Zero each number of the smashed data with this probability, also in evaluation."""
    nopeek: Annotated[float, Parameter(group=DEFENCES)] = Field(0.0, ge=0)
    """Weight of NoPeek: a penalty on the distance correlation of inputs and smashed data, in the client's loss."""

    average_every: Annotated[Literal["step", "round"], Parameter(group=OTHERS)] = "round"
    """sfl: when client models are averaged."""
    hand_over: Annotated[Literal["batch", "epoch"], Parameter(group=OTHERS)] = "epoch"
    """ssl, ussl: when the client model moves on."""
    hand_over_optimizer: Annotated[bool, Parameter(group=OTHERS)] = False
    """ssl, ussl: the optimiser's state moves on with the client model."""
    visit_order: Annotated[Literal["fixed", "random"], Parameter(group=OTHERS)] = "fixed"
    """ssl, ussl: the order in which clients are visited in a round."""

    engine: Annotated[Literal["auto", "local", "stacked"], Parameter(group=OUTPUT)] = "auto"
    """How clients are simulated: one after another (local), all at once (stacked), at once where possible (auto)."""
    device: Annotated[str, Parameter(group=OUTPUT)] = "cpu"
    """Where everything is computed: cpu, cuda (cuda:1...) or mps."""
    precision: Annotated[Literal["float32", "float64", "bfloat16", "tf32"], Parameter(group=OUTPUT)] = "float32"
    """Floating point type of models and data; bfloat16: products in mixed precision; tf32: CUDA's faster products."""
    memory_limit: Annotated[float | None, Parameter(group=OUTPUT)] = Field(None, gt=0)
    """Gigabytes for what the clients' forward passes leave; beyond, they run twice. Default: half of what is free."""
    eval_every: Annotated[int | None, Parameter(group=OUTPUT)] = Field(None, ge=1)
    """Evaluate every so many rounds (and at the end). Default: about once per epoch."""
    eval_clients: Annotated[int | None, Parameter(group=OUTPUT)] = Field(None, ge=1)
    """Evaluate the models of so many clients, drawn once, where all would take long. Default: all."""
    checkpoint_every: Annotated[int | None, Parameter(group=OUTPUT)] = Field(None, ge=1)
    """Write the checkpoint every so many rounds (and at the end). Default: about once per epoch."""
    snapshot_every: Annotated[int | None, Parameter(group=OUTPUT)] = Field(None, ge=1)
    """Keep the client models of every so many rounds in the run folder, for `cutlayer leakage`. Default: the last."""

    def check(self, algorithms: tuple[str, ...], given: frozenset[str]) -> None:
        """Check what concerns several fields. `given` are the fields that the user set. Raises ConfigError."""
        for name in algorithms:
            if name not in ALGORITHMS:
                raise ConfigError(unknown("algorithm", name, ALGORITHMS))
        useful = frozenset[str]().union(*(applicable(a) for a in algorithms))
        for option in sorted(given & (all_specific() - useful)):
            users = ", ".join(a for a in ALGORITHMS if option in applicable(a))
            raise ConfigError(
                f"{option} = {getattr(self, option)!r} has no effect on {', '.join(algorithms)}: it belongs to "
                f"{users}; leave it out or choose one of these"
            )
        self.check_fleet(given)
        self._check_noise()
        for fraction in self.lr_decay_at:
            if not 0 < fraction < 1:
                raise ConfigError(
                    f"lr_decay_at = {fraction} is no fraction of the rounds: give values between 0 and 1, e.g. 0.8"
                )
        if {"epochs", "rounds"} <= given and self.rounds is not None:
            raise ConfigError(f"epochs = {self.epochs} and rounds = {self.rounds} say the same thing twice: give one")
        if {"local_epochs", "local_steps"} <= given and self.local_steps is not None:
            raise ConfigError(
                f"local_epochs = {self.local_epochs} and local_steps = {self.local_steps} exclude each other: give one"
            )

    def _check_noise(self) -> None:
        """Noise has a meaning relative to what it hides. Raises ConfigError."""
        for option in ("gaussian_noise", "laplace_noise"):
            if getattr(self, option) and self.clip is None:
                raise ConfigError(
                    f"{option} = {getattr(self, option)!r} needs clip, in units of which it is: give e.g. clip = 1.0"
                )
        if self.gaussian_noise and self.laplace_noise:
            raise ConfigError(
                f"gaussian_noise = {self.gaussian_noise!r} and laplace_noise = {self.laplace_noise!r} exclude each "
                "other: give one"
            )


class RunConfig(CommonConfig):
    """One training run."""

    algorithm: Annotated[str, Parameter(group=Group("What to train", sort_key=0))] = "sglr"
    """The algorithm (see `cutlayer list algorithms`)."""
    seed: Annotated[int, Parameter(group=TRAINING)] = Field(0, ge=0)
    """Names all randomness: splits, partition, initial weights, batches, active clients."""

    def check(self, algorithms: tuple[str, ...], given: frozenset[str]) -> None:
        """Also that the U-shape has its second cut."""
        super().check(algorithms, given)
        if self.algorithm == "ussl" and self.tail_cut is None:
            raise ConfigError(
                "ussl needs tail_cut: name the module after which the client takes over again, e.g. --tail-cut hidden3 "
                "for the mlp"
            )

    def resolved(self) -> dict[str, Any]:
        """The options that decide this run, defaults written out, those without effect left out. TOML-ready."""
        named = self.cut is not None or self.model not in MODELS
        whole = self if named else self.model_copy(update={"cut": MODELS[self.model].default_cut})
        return _written_out(whole, applicable(self.algorithm))


class CompareConfig(CommonConfig):
    """Several algorithms, several seeds, the same data, partitions, initial models and batches for all."""

    algorithms: Annotated[
        tuple[str, ...], Parameter(group=Group("What to compare", sort_key=0), negative=(), consume_multiple=True)
    ] = ("cl", "fl", "ssl", "psl", "sfl", "sglr")
    """The algorithms to compare."""
    seeds: Annotated[
        tuple[int, ...], Parameter(group=Group("What to compare", sort_key=0), negative=(), consume_multiple=True)
    ] = (0, 1, 2)
    """One run of each algorithm per seed."""
    variant: Annotated[dict[str, dict[str, Any]], Parameter(show=False, parse=False)] = {}
    """TOML tables [variant.NAME]: further entries, each an algorithm with options of its own."""

    def resolved(self) -> dict[str, Any]:
        """The options that decide this comparison, defaults written out, those without effect left out. TOML-ready."""
        own = [str(v.get("algorithm", "sglr")) for v in self.variant.values()]
        return _written_out(self, frozenset[str]().union(*(applicable(a) for a in (*self.algorithms, *own))))

    def runs(self, given: frozenset[str]) -> dict[str, dict[int, RunConfig]]:
        """The runs to make: entry name -> seed -> configuration. Raises ConfigError."""
        base = self.model_dump(include=set(given & set(CommonConfig.model_fields)))
        if not self.algorithms and not self.variant:
            raise ConfigError("algorithms is empty: name at least one, e.g. --algorithms psl sglr")
        if not self.seeds:
            raise ConfigError("seeds is empty: name at least one, e.g. --seeds 0 1 2")
        listed: dict[str, tuple[int | str, ...]] = {"seeds": self.seeds, "algorithms": self.algorithms}
        for option, chosen in listed.items():
            twice = [value for value in chosen if chosen.count(value) > 1]
            if twice:
                raise ConfigError(f"{option} names {twice[0]!r} twice: name it once")
        if min(self.seeds) < 0:
            raise ConfigError(f"seeds = {min(self.seeds)} is not possible: a seed must be 0 or greater")
        names = tuple(str(v.get("algorithm", "sglr")) for v in self.variant.values())
        self.check((*self.algorithms, *names), given & frozenset(CommonConfig.model_fields))
        entries: dict[str, dict[int, RunConfig]] = {}
        for algorithm in self.algorithms:
            own = {k: v for k, v in base.items() if k not in all_specific() or k in applicable(algorithm)}
            first = RunConfig.of({**own, "algorithm": algorithm})
            first.check((algorithm,), frozenset(own))
            entries[algorithm] = {s: first.model_copy(update={"seed": s}) for s in self.seeds}
        for name, values in self.variant.items():
            if name in entries:
                raise ConfigError(f"variant {name!r} has the name of an algorithm that is compared too: rename it")
            try:
                first = _variant(base, normalised(values))
            except ConfigError as error:
                raise ConfigError(f"variant {name!r}: {error}") from None
            entries[name] = {s: first.model_copy(update={"seed": s}) for s in self.seeds}
        return entries


_PLANNED = Group("What is planned", sort_key=0)
_BUDGETS = Group("Budgets of a client", sort_key=7)


class PlanConfig(FleetConfig):
    """What split learning would cost, without training."""

    model: Annotated[str, Parameter(group=_PLANNED)] = "cnn"
    """A model of the zoo, or your own: path/to/file.py:function or package.module:function, without arguments."""
    cut: Annotated[str | None, Parameter(group=_PLANNED)] = None
    """The module after which the model is cut, or all. Default: the zoo's own; all for a model of yours."""
    algorithms: Annotated[tuple[str, ...], Parameter(group=_PLANNED, negative=(), consume_multiple=True)] = (
        "cl",
        "fl",
        "ssl",
        "psl",
        "sfl",
        "sglr",
    )
    """The algorithms whose costs are told."""
    input: Annotated[tuple[int, ...], Parameter(group=DATA, negative=(), consume_multiple=True)] = (1, 28, 28)
    """The shape of one sample."""
    input_type: Annotated[Literal["float32", "int64"], Parameter(group=DATA)] = "float32"
    """Real numbers, in the type that precision says, or integers, such as token ids."""
    classes: Annotated[int, Parameter(group=DATA)] = Field(10, ge=2)
    """Classes that a model of the zoo tells apart."""
    label_bytes: Annotated[int, Parameter(group=DATA)] = Field(8, ge=0)
    """Bytes of one sample's label."""
    clients: Annotated[int, Parameter(group=CLIENTS)] = Field(10, ge=1)
    """Number of clients, C."""
    samples_per_client: Annotated[int, Parameter(group=CLIENTS)] = Field(1000, ge=1)
    """Samples that each client holds."""
    batch: Annotated[int, Parameter(group=TRAINING)] = Field(8, ge=1)
    """Batch size of a client, b."""
    phi: Annotated[float, Parameter(group=TRAINING)] = Field(0.5, ge=0, le=1)
    """sgl, sglr: the active fraction, so many clients share one common cut gradient in each step."""
    precision: Annotated[Literal["float32", "bfloat16", "float16"], Parameter(group=TRAINING)] = "float32"
    """The type of weights and of what crosses."""
    client_optimizer: Annotated[Literal["adam", "sgd"], Parameter(group=TRAINING)] = "adam"
    """What the clients' memory holds besides weights and gradients: adam two numbers per parameter, sgd none."""
    memory_budget: Annotated[float | None, Parameter(group=_BUDGETS)] = Field(None, gt=0)
    """Gigabytes (1e9 bytes) that a client has for training."""
    energy_budget: Annotated[float | None, Parameter(group=_BUDGETS)] = Field(None, gt=0)
    """Joules that a client may spend in an epoch, marginal: what training itself adds."""
    servers: Annotated[int, Parameter(group=COSTS)] = Field(1, ge=1)
    """So many server devices share the server's work."""
    seed: Annotated[int, Parameter(group=COSTS)] = Field(0, ge=0)
    """Names the draw of clients' speeds, rates and stragglers."""

    def check(self, given: frozenset[str]) -> None:
        """Check what concerns several fields. `given` are the fields that the user set. Raises ConfigError."""
        if not self.algorithms:
            raise ConfigError("algorithms is empty: name at least one, e.g. --algorithms fl sglr")
        for name in self.algorithms:
            if name not in ALGORITHMS or name == "ussl":
                raise ConfigError(unknown("algorithm", name, (a for a in ALGORITHMS if a != "ussl")))
            if self.algorithms.count(name) > 1:
                raise ConfigError(f"algorithms names {name!r} twice: name it once")
        if not self.input or min(self.input) < 1:
            raise ConfigError(f"input = {list(self.input)} is no shape: give sizes of 1 or more, e.g. --input 1 28 28")
        if "classes" in given and self.model not in MODELS:
            raise ConfigError(f"classes = {self.classes} has no effect on a model of your own: leave it out")
        self.check_fleet(given)
        needs = (("servers", "server_device"), ("energy_budget", "client_device"), ("seed", "client_device"))
        for option, needed in needs:
            if option in given and getattr(self, needed) is None:
                raise ConfigError(
                    f"{option} = {getattr(self, option)!r} has no effect without {needed}: name one "
                    "(see `cutlayer list profiles`), or leave it out"
                )


def _variant(base: Mapping[str, Any], values: Mapping[str, Any]) -> RunConfig:
    """A variant's configuration: its own `values` over those of `base` that its algorithm has. Raises ConfigError."""
    if "seed" in values:
        raise ConfigError(f"seed = {values['seed']!r} is not a variant's to choose: use seeds, which all entries share")
    algorithm = str(values.get("algorithm", "sglr"))
    own = {k: v for k, v in base.items() if k not in all_specific() or k in applicable(algorithm)}
    first = RunConfig.of(overlaid(own, values))
    first.check((algorithm,), frozenset(values))
    return first


_DEFENCES = frozenset({"clip", "gaussian_noise", "laplace_noise", "feature_dropout", "nopeek"})
_EVERY_SPLIT = _DEFENCES | {
    "cut",
    "server_lr",
    "server_optimizer",
    "server_optimizer_options",
    "server_lr_schedule",
    "up_codec",
    "down_codec",
}
_EVERY_GROUP = frozenset({"participation", "start"})


def applicable(algorithm: str) -> frozenset[str]:
    """The options beyond the common ones that change what `algorithm` does."""
    info = ALGORITHMS[algorithm]
    groups = _EVERY_GROUP if algorithm != "cl" else frozenset[str]()
    return info.options | groups | (frozenset() if info.whole else _EVERY_SPLIT)


def all_specific() -> frozenset[str]:
    """The options that only some algorithms have."""
    return frozenset[str]().union(*(applicable(a) for a in ALGORITHMS))


def _written_out(config: CommonConfig, useful: frozenset[str]) -> dict[str, Any]:
    """The options that `config` is decided by: all but those that only other algorithms have, or that another one
    replaces.
    """
    dumped = config.model_dump(mode="json")
    replaced = {"epochs"} if config.rounds is not None else set[str]()
    replaced |= {"local_epochs"} if config.local_steps is not None else set()
    drop = (all_specific() - useful) | replaced
    drop |= set(FleetConfig.model_fields) if config.client_device is None else set()
    own = [name for name in type(config).model_fields if name not in CommonConfig.model_fields]
    order = [*own, *CommonConfig.model_fields]
    unset: dict[str, tuple[Any, ...]] = {
        k: (None, {}, []) if f.default in ({}, ()) else (None,) for k, f in type(config).model_fields.items()
    }
    return {k: dumped[k] for k in order if k not in drop and dumped[k] not in unset[k]}


_EITHER_OR = (("epochs", "rounds"), ("local_epochs", "local_steps"), ("gaussian_noise", "laplace_noise"))


def overlaid(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`; with rounds on top, the epochs below are gone, and so on."""
    gone = {
        below for pair in _EITHER_OR for above, below in (pair, pair[::-1]) if over.get(above) and below not in over
    }
    return {**{k: v for k, v in base.items() if k not in gone}, **over}


def normalised(values: Mapping[str, Any]) -> dict[str, Any]:
    """TOML keys may be written with dashes, as the flags are."""
    return {key.replace("-", "_"): value for key, value in values.items()}


def read_toml(path: Path) -> dict[str, Any]:
    """The values of a configuration file. Raises ConfigError where it is missing or no TOML."""
    try:
        return normalised(tomllib.loads(path.read_text()))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {str(path)!r}: {error.strerror}; check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration {str(path)!r} is not valid TOML: {error}; mend that line") from None


def explain(error: ValidationError, model: type[BaseModel]) -> ConfigError:
    """One sentence for the first thing that pydantic found wrong: value, reason, remedy."""
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        return ConfigError(unknown("option", name, model.model_fields))
    if first["type"] == "literal_error" and isinstance(first["input"], str):
        return ConfigError(unknown(name, first["input"], _choices(model.model_fields[name].annotation)))
    field = model.model_fields.get(name)
    about = f" ({field.description})" if field is not None and field.description else ""
    message = str(first["msg"]).replace("Input should be", "it must be")
    message = message[:1].lower() + message[1:]
    return ConfigError(f"{name} = {first['input']} is not possible: {message}{about}")


def _choices(annotation: Any) -> list[str]:
    """The words of a Literal, also inside of a union."""
    return [word for part in get_args(annotation) for word in ([part] if isinstance(part, str) else _choices(part))]
