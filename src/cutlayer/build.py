"""Builds from a configuration everything that trains: data, partition, cut model, server, cohort.

It writes nothing. All errors in the input are found here, before a run folder exists.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from types import FunctionType
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from cutlayer import __version__, plugins, seeds
from cutlayer.adapters import narrow, numbers, of_rank, shrink
from cutlayer.adjustment import Adjustment, InformedCohort, log_prior
from cutlayer.algorithms import Algorithm, traffic_of
from cutlayer.allocator import keep_memory
from cutlayer.attacks import Attacks
from cutlayer.attacks import of as attacks_of
from cutlayer.attacks.hostile import with_targets
from cutlayer.averagings import Averaging
from cutlayer.checks import (
    as_the_model_takes,
    check_adjustable,
    check_averaged,
    check_cacheable,
    check_head,
    check_output,
    check_parts,
    check_rate,
    check_single_rows,
    check_start,
    check_starved,
    check_text,
    check_trained,
    given_for,
)
from cutlayer.cohort import Cohort, Tell
from cutlayer.collective import world
from cutlayer.copies import deep_copy
from cutlayer.costs.allotted import Allotment, refuse_mixed, remark
from cutlayer.costs.clock import Clock, ClockedCohort
from cutlayer.costs.fleet import Fleet, fleet
from cutlayer.costs.flops import ModelFlops, count
from cutlayer.costs.ledger import Ledger, MeteredCohort
from cutlayer.costs.traces import read_trace
from cutlayer.data import Source, class_counts, from_memory, load, load_whole, partition
from cutlayer.data.own import own_code
from cutlayer.data.samples import Samples
from cutlayer.data.sampling import per_epoch as steps_per_epoch
from cutlayer.data.targets import as_indices, fitting
from cutlayer.engine.between import BetweenCohort, Blocks
from cutlayer.engine.choice import Choice, Chosen, Work, one_by_one
from cutlayer.engine.distributed import Engine, Sharing, SpreadCohort, refuse
from cutlayer.engine.layout import smashed
from cutlayer.engine.replicas import DataParallel
from cutlayer.engine.shelf import StatesFolder
from cutlayer.engine.simulated import ClientModel, Clients, Shape, model_bytes
from cutlayer.engine.simulation import simulate
from cutlayer.engine.states import placed
from cutlayer.engine.ways import Ways
from cutlayer.errors import ConfigError, CutlayerWarning, DataError
from cutlayer.features import KeptFeatures
from cutlayer.frozen import freeze, load_moving, moving, replica, trains
from cutlayer.held_out import Pace, own_rows, paced, trained_rows
from cutlayer.models import Parts, build, cut
from cutlayer.models import make as make_own
from cutlayer.models.auxiliary import AuxiliaryHead
from cutlayer.models.blocks import places
from cutlayer.models.depths import Depths, cut_each, one_depth
from cutlayer.models.halved import single
from cutlayer.models.parts import Part, crossing_bytes
from cutlayer.models.recomputed import recompute
from cutlayer.models.weights import load_weights, read_weights
from cutlayer.optim import MakeOptimizer, ParamGroup, check_groups, make_optimizer
from cutlayer.options import RunConfig, default_cut
from cutlayer.schedules import FunctionSchedule, Schedule, WarmedUp
from cutlayer.scoring import asking, try_metrics
from cutlayer.screened import ScreenedCohort
from cutlayer.screenings import Screening
from cutlayer.server import Server
from cutlayer.tasks import Task
from cutlayer.tasks.own_loss import Loss, with_loss
from cutlayer.traffic import Epoch
from cutlayer.types import Rows
from cutlayer.verbs import AVERAGE, LEARN, Traits
from cutlayer.wire import Codec, Coding
from cutlayer.wire.coded import CodedCohort

R = TypeVar("R", Averaging, Screening)

_TYPICAL = 128  # rows for measuring engines

Model = nn.Module | Callable[..., nn.Module]
"""A module, or a function that makes one (needed for independent starts), without arguments or with `input_shape` and
`classes`."""

Data = Source | torch.utils.data.Dataset[Any] | tuple[Any, ...] | list[Any] | Mapping[str, Any]
"""A loaded source, a map-style dataset of (input, label) pairs, arrays or tensors (x, y), a list of data sets, one for
each client, or any other form that `data.from_memory` takes."""


def typed(model: nn.Module, config: RunConfig) -> nn.Module:
    """The model with its real numbers in the run's type (complex ones, and a base in bfloat16, stay as they are)."""
    return model.double() if dtype_of(config) == torch.float64 else single(model)


def by_name(model: Model | str | None, data: Data | str | None) -> tuple[Model | None, Data | None, dict[str, str]]:
    """(own model, own data, options): a text for `model` or `data` is the option of that name."""
    names = {k: v for k, v in (("model", model), ("data", data)) if isinstance(v, str)}
    return None if isinstance(model, str) else model, None if isinstance(data, str) else data, names


def dtype_of(config: RunConfig) -> torch.dtype:
    """The type of stored weights and data; lower precisions only apply to products."""
    return torch.float64 if config.precision == "float64" else torch.float32


@dataclass(frozen=True, eq=False)
class Making:
    """How the whole model is made: `make(*name)` makes it anew under the seed called `name`, for inputs of
    `input_shape` (the first, if a sample has several) and the number of `outputs` that the task needs. `weights` are
    its initial weights, if they were given.
    """

    make: Callable[..., nn.Module]
    input_shape: tuple[int, ...]
    outputs: int
    weights: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Training:
    """Everything that a run needs: the cohort counts into `ledger`; `rounds` to do; `counts` [C, K] samples per class;
    `engine` says how clients are simulated, and `ways` how it computes; `clock` runs if the machines are known. `parts`
    is the model as cut, with an `example` [n, ...] of its inputs; `schedules` are the clients' and the server's;
    `epoch` is an epoch of equal clients with the same total number of samples. `making` makes the whole model, without
    its trained weights. `own_tests` are the rows on which only that client's model is tested, if there are any;
    `eval_every` and `eval_clients` say how often and for how many clients models are judged, `eval_last` for how many
    at the end; `remarks` say which of this was chosen, a line each. `answers_apart`: the gradients that the server
    sends belong to another loss than its own. `head` is an auxiliary head, if clients have one. `place` is the place of
    the states of clients that do not take part (None: in memory).
    """

    source: Source
    server: Server
    clients: Cohort
    ledger: Ledger
    rounds: int
    rounds_per_epoch: int
    counts: np.ndarray
    engine: str
    ways: Ways
    parts: Parts
    example: Rows
    algorithm: Algorithm
    task: Task
    schedules: tuple[Schedule, Schedule]
    epoch: Epoch
    making: Making
    clock: Clock | None = None
    own_tests: Mapping[int, Samples] = field(default_factory=dict)
    eval_every: int = 1
    eval_clients: int | None = None
    eval_last: int | None = None
    remarks: tuple[str, ...] = ()
    answers_apart: bool = False
    head: nn.Module | None = None
    depths: Depths | None = None
    place: StatesFolder | None = None
    adapter_ranks: Sequence[int] = ()

    @cached_property
    def flops_each(self) -> tuple[ModelFlops, ...]:
        """FLOPs per sample at each client's own cut, or with adapters of its own rank, [C]; empty if all have
        the same.
        """
        if self.adapter_ranks:
            of = {rank: count(_of_rank(self.parts, rank), self.example) for rank in set(self.adapter_ranks)}
            return tuple(of[rank] for rank in self.adapter_ranks)
        if self.depths is None or not self.depths.mixed:
            return ()
        found = {name: count(depth.parts, self.example) for name, depth in self.depths.each.items()}
        return tuple(found[name] for name in self.depths.names)

    @cached_property
    def flops(self) -> ModelFlops:
        """FLOPs per sample of the parts, and of an auxiliary head."""
        return count(self.parts, self.example, self.head)

    @property
    def server_passes(self) -> float:
        """How often the server's part trains on each sample, as the algorithm states it; once if it states nothing."""
        traffic = traffic_of(self.algorithm, self.epoch)
        return 1.0 if traffic is None else traffic.server_passes

    @property
    def server_flops(self) -> float:
        """The server's FLOPs for each sample. Gradients of the clients' own loss need a second backward pass to the
        cut, about as much as a forward pass.
        """
        server = self.flops.server
        return server.training * self.server_passes + (server.forward if self.answers_apart else 0.0)


@dataclass(frozen=True, eq=False)
class Prepared:
    """Everything except the cohort and its server: the starting point of a simulation, of a remote run's server and of
    each of its clients.

    `owners` are the rows of each client of the cohort (in cl: of the one that holds all), `partition` those of each
    client that the configuration names. `class_counts` [C][K] are given if logits are adjusted. `make_head` makes an
    auxiliary head from a seed's name, if clients have one.
    """

    config: RunConfig
    algorithm: Algorithm
    source: Source
    split: Parts
    example: Rows
    clients: Clients
    chosen: Chosen
    make_server: MakeOptimizer
    partition: list[np.ndarray]
    rounds: int
    rounds_per_epoch: int
    fleet: Fleet | None
    coding: Coding
    making: Making
    own_tests: Mapping[int, Samples]
    pace: Pace
    remarks: tuple[str, ...]
    class_counts: list[list[int]]
    screening: Screening
    attacks: Attacks = field(default_factory=Attacks)
    make_head: Callable[..., nn.Module] | None = None
    depths: Depths | None = None

    def parts_of(self, client: int) -> Parts:
        """The model as it is cut for a client: at its own cut."""
        mixed = self.depths is not None and self.depths.mixed
        return self.depths.of(client).parts if mixed and self.depths is not None else self.split

    @property
    def deepest(self) -> int:
        """The number of the cut after which the server's model begins; 0 if all clients have it."""
        return list(self.depths.each).index(self.depths.deepest.name) if self.depths is not None else 0

    @cached_property
    def clock(self) -> Clock | None:
        """The clock of the run, if the machines are known."""
        return None if self.fleet is None else Clock(self.fleet)

    @property
    def attended(self) -> Clients:
        """The clients; with a trace, only reachable ones take part."""
        if self.clock is None or self.clock.attendance is None or self.algorithm.traits.central:
            return self.clients
        return replace(self.clients, present=self.clock.present)

    @property
    def server_seed(self) -> int:
        """Names the server's randomness."""
        return seeds.derive(self.config.seed, "server")

    @property
    def clients_train(self) -> bool:
        """Whether the clients' parts have parameters that are trained; if not, they take no steps."""
        return trains(*self._mixed_parts) if self._mixed_parts else trains(*self.clients.models[0])

    @property
    def lower_trains(self) -> bool:
        """Whether anything below the first cut is trained; if not, no gradients go down."""
        return trains(*self._mixed_parts) if self._mixed_parts else trains(self.clients.models[0][0])

    @property
    def _mixed_parts(self) -> list[nn.Module]:
        """The clients' parts at each cut; empty if all have the same."""
        mixed = self.depths is not None and self.depths.mixed
        return [depth.parts.client for depth in self.depths.each.values()] if mixed and self.depths else []

    @cached_property
    def head(self) -> nn.Module | None:
        """An auxiliary head as clients have it at the start; None if they have none."""
        return None if self.make_head is None else self.make_head("head")

    @property
    def adjusts_at_server(self) -> bool:
        """Whether logits are adjusted in losses that the server computes."""
        traits = self.algorithm.traits
        return bool(self.class_counts) and traits.split and not traits.u_shaped

    def training(
        self,
        cohort: Cohort,
        server: Server,
        engine: str,
        tell: Tell | None = None,
        class_counts: Sequence[Sequence[int]] | None = None,
        around: Callable[[CodedCohort], SpreadCohort] | None = None,
    ) -> Training:
        """The whole training, around this cohort and its server: with a ledger, and with a clock if the machines are
        known. `tell` is called for clients whose rows differ strongly from those of the others. `class_counts` replace
        those that are known here.
        """
        config, source, partition = self.config, self.source, self.partition
        server.serve(config.algorithm, self.algorithm.traits.needs, self.clients.rule)
        server.make_head, server.outputs = self.make_head, self.making.outputs
        adjustment = None
        if self.adjusts_at_server:
            adjustment = Adjustment(config.logit_adjust, config.tau, class_counts or self.class_counts)
            server.adjust(adjustment)
        ledger = Ledger(len(self.clients.rows))
        if self.algorithm.traits.central:
            ledger.add("up", "raw data", 0, _raw_bytes(source, self.clients.rows[0]))
        counts = _counts(source, partition)
        trained = {"trains": self.clients_train, "lower_trains": self.lower_trains}
        coded = CodedCohort(cohort, replace(self.coding, carried=engine == "remote"), **trained)
        crossing = coded if around is None else around(coded)
        asynchronous = self.algorithm.traits.asynchronous
        lifted = self._lifted(crossing)
        # The server's losses are told of the participants of all ranks.
        told = lifted if adjustment is None else InformedCohort(lifted, adjustment)
        metered = MeteredCohort(
            self._looked_at(told, engine, tell),
            ledger,
            crossing.crossed,
            self.clients.cuts or numbers(self.clients.ranks),
            total=world().total_of,
            asynchronous=asynchronous,
        )
        training = Training(
            source,
            server,
            self._kept(metered),
            ledger,
            self.rounds,
            self.rounds_per_epoch,
            counts,
            engine,
            self.chosen.ways,
            self.split,
            self.example,
            self.algorithm,
            self.clients.task,
            self._paced(),
            self._epoch(),
            self.making,
            own_tests=self.own_tests,
            eval_every=self.pace.every,
            eval_clients=self.pace.clients,
            eval_last=self.pace.last,
            remarks=self.remarks,
            answers_apart=adjustment is not None and adjustment.apart and not asynchronous,  # that steps by itself
            head=self.head,
            depths=self.depths,
            place=self.clients.place,
            adapter_ranks=self.clients.ranks,
        )
        if self.fleet is None:
            return training
        clock = self.clock
        assert clock is not None, "the machines are known"
        central = self.algorithm.traits.central
        if central:  # the server trains after all data have arrived
            clock.begin(range(config.clients))
            clock.upload(8.0 * np.array([_raw_bytes(source, p) for p in partition]))
        how: dict[str, Any] = {"central": central, "row_bytes": training.epoch.smashed + training.epoch.label}
        how["each"] = training.flops_each
        clocked = ClockedCohort(metered, clock, training.flops, config.batch, training.server_flops, **how)
        if (
            asynchronous or LEARN in self.algorithm.traits.needs
        ):  # rows that other algorithms generate belong to a step, and are stated with it
            server.made_up = lambda rows: clock.serve(rows * training.flops.server.training)
        return replace(training, clients=clocked, clock=clock)

    def _lifted(self, cohort: Cohort) -> Cohort:
        """The cohort, whose rows are computed up to the deepest cut if clients have different ones."""
        blocks = self.clients.beside
        lr, seed = self.config.client_lr, self.server_seed
        return BetweenCohort(cohort, blocks, lr, seed) if isinstance(blocks, Blocks) else cohort

    def _looked_at(self, cohort: Cohort, engine: str, tell: Tell | None) -> Cohort:
        """The cohort, whose rows the server screens if so configured. Rows of remote clients are always examined."""
        watched = self.screening.active or engine == "remote" or bool(self.attacks)
        return ScreenedCohort(cohort, self.screening, tell) if watched and self.algorithm.traits.split else cohort

    def _kept(self, cohort: Cohort) -> Cohort:
        """The cohort, whose smashed data the server keeps if so configured."""
        c = self.config
        return KeptFeatures(cohort, c.batch, c.seed, self.example[0].device) if c.cache_features else cohort

    def _paced(self) -> tuple[Schedule, Schedule]:
        """The clients' and the server's schedules over all rounds, with the warm-up before them."""
        clients, server = (one.over(self.rounds) for one in schedules(self.config))
        if not (warmup := self.config.lr_warmup):
            return clients, server
        rounds = self.rounds
        return (
            WarmedUp(then=clients, warmup=warmup, rounds=rounds),
            WarmedUp(then=server, warmup=warmup, rounds=rounds),
        )

    def _epoch(self) -> Epoch:
        """An epoch of equal clients with the same total number of samples."""
        train, client = self.source.train, [p for p in (self.split.client, self.split.tail) if p is not None]
        up, down = (
            crossing_bytes(self.split.crossing),
            crossing_bytes(c for c in self.split.crossing if c.differentiable),
        )
        return Epoch(
            clients=len(self.partition),
            samples_per_client=sum(map(len, self.partition)) // len(self.partition),
            batch=self.config.batch,
            smashed=up,
            gradient=down if self.lower_trains else 0,
            label=train.y[:1].nbytes,
            raw=sum(x.nbytes for x in train.form.rows),
            model=sum(map(model_bytes, self.split.all)),
            client_model=sum(map(model_bytes, client)),
            client_gradient=sum(p.nbytes for part in client for p in part.parameters() if p.requires_grad),
            features=crossing_bytes(self.split.returning),
            returned=crossing_bytes(c for c in self.split.returning if c.differentiable),
            head=0 if self.head is None else sum(t.nbytes for t in self.head.state_dict().values()),
        )


def assemble(
    config: RunConfig,
    model: Model | None = None,
    data: Data | None = None,
    *,
    loss: Loss | None = None,
    metrics: Mapping[str, Any] | None = None,
    ways: Ways | None = None,
) -> Training:
    """Build everything for a simulation. `model`, `data` and `loss` replace those named in `config`; `metrics` are
    reported, too. `ways` says how a continued run was computed so far.

    Raises UsageError (ConfigError, DataError, CutError) with the value, the reason and the remedy.
    """
    ranks = world()
    if ranks.several:
        ranks.compare("the configuration", {"version": __version__, **config.resolved()})
    return ranks.agreed(lambda: _assembled(config, model, data, loss=loss, metrics=metrics, ways=ways))


def _assembled(config: RunConfig, model: Model | None, data: Data | None, **given: Any) -> Training:
    ranks, sharing = world(), None
    if ranks.several:
        refuse(config, config.thing("algorithm", config.algorithm), config.clients, ranks.size)
    p = prepare(config, model, data, **given)
    if ranks.several:
        sharing = Sharing.of(ranks, config, p.algorithm, p.chosen, p.attended, p.example)
    cohort, server, engine = simulate(
        config, p.algorithm, p.chosen, p.attended, p.make_server, p.server_seed, p.attacks, sharing
    )
    if sharing is None:
        return p.training(cohort, server, p.chosen.ways.engine)
    example = p.example, p.source.train[slice(0, 1)].y
    if isinstance(server, DataParallel):
        server.share_by(sharing, smashed(p.split.client, p.example))

    def around(coded: CodedCohort) -> SpreadCohort:
        return SpreadCohort(coded, cast(Engine, engine), sharing, coded.crossed, p.split, example)

    training = p.training(cohort, server, p.chosen.ways.engine, around=around)
    return replace(training, remarks=(sharing.remark, *training.remarks))


def prepare(
    config: RunConfig,
    model: Model | None = None,
    data: Data | None = None,
    *,
    alone: int | None = None,
    loss: Loss | None = None,
    metrics: Mapping[str, Any] | None = None,
    ways: Ways | None = None,
) -> Prepared:
    """Build everything except the cohort; `alone`: all data are this client's own. Raises UsageError as `assemble`
    does.
    """
    algorithm: Algorithm = config.thing("algorithm", config.algorithm)
    if type(algorithm).round is Algorithm.round:
        raise ConfigError(f"{config.algorithm} has no round(): write the generator that trains one round")
    task: Task = config.thing("task", config.task)
    for thing in (algorithm, *schedules(config), task):
        with own_code(thing, f"`check` of {type(thing).__name__}"):
            thing.check(config.given)
    coding, attacks = Coding(*_codecs(config)), attacks_of(config)
    device = _device(config)
    if device.type == "cpu":
        keep_memory()
    machines = fleet(config, config.clients)
    for note in machines.notes if machines is not None else ():
        warnings.warn(CutlayerWarning(note), stacklevel=2)
    source = load_source(config, data, task)
    machines = _traced(config, machines, source)
    making = _making(config, model, source, task, _named_cuts(config, algorithm.traits, model))
    make_model = making.make
    whole = make_model("model")
    check_text(whole, source, task)
    source = as_the_model_takes(whole, source, dtype_of(config))
    first = slice(0, max(2, min(3, len(source.train))))
    given = given_for(whole, source.train[first])
    if task.targets == "class" and given.dim() > 1:
        source = as_indices(source, given.shape[1])
    task = _objective(config, task.fitted(source.train.y, source.classes), loss, metrics)
    everything = [np.arange(len(source.train))] * config.clients
    parts = _partition(config, source, task) if alone is None else everything
    parts, own_tests, held_out = own_rows(config, source, parts, alone)
    owners = [np.concatenate(parts)] if algorithm.traits.central else parts
    few = source.train[first]
    counts = _occurrences(config, task, source, owners, given.shape[1:])
    check_output(given, few, task, source.class_names)
    try_metrics(task, given, source.test.y if len(source.test) else few.y, source.class_names)
    check_trained(config, whole)
    check_averaged(algorithm, averaging_rule(config), whole)
    depths = _depths(config, algorithm, whole, model, few, machines)
    split = depths.deepest.parts
    check_parts(config, algorithm, split, (depths.deepest.name,))
    check_start(config, algorithm)
    sizes = [len(p) for p in owners]
    rounds, per_epoch = _rounds(config, algorithm, sizes)
    check_starved(config, sizes)
    check_single_rows(config, algorithm, split, sizes, rounds, few.rows)
    check_rate(config, algorithm)
    depths = recompute(depths, whole, config.gradient_checkpointing)
    split = depths.deepest.parts
    for part in depths.modules:
        part.to(device)
        if isinstance(part, Part) and config.precision == "bfloat16":
            part.narrow_to = torch.bfloat16
    source, example = source.to(device), few.to(device).rows
    make_client, make_server = _optimizers(config)
    check_cacheable(config, algorithm, split, example, anew=not source.train.in_memory)
    check_groups(
        make_client.groups, [name for part in split.all for name, p in part.named_parameters() if p.requires_grad]
    )
    pace = paced(config, algorithm, source, sizes, rounds, per_epoch, lambda: _forward_flops(split, example))
    work = _work(config, algorithm, sizes, rounds)
    typical = source.train[slice(0, _TYPICAL)].rows if source.train.in_memory else example
    width = task.width(source.train.y, source.classes)
    heads = _heads(config, algorithm, split, example, width, given)
    head = None if heads is None else heads("head")
    choice = Choice(config, algorithm, split, (make_client, make_server), example, work, typical, head)
    ranks = _ranks(config, algorithm, whole, mixed=depths.mixed)
    chosen = one_by_one(config, split) if depths.mixed else _chosen(choice, ways)
    split = chosen.split
    if not depths.mixed:
        depths = replace(depths, each={name: replace(d, parts=split) for name, d in depths.each.items()})
    local_epochs, local_steps = algorithm.part_of_round
    place, on_disk = placed(config, split, algorithm.traits, chosen.ways.engine) if alone is None else (None, "")
    setup = Clients(
        _ClientModels(config, depths, make_model, len(owners), heads, ranks),
        with_targets(source.train, owners, attacks, width if task.targets == "class" else 0),
        owners,
        make_client,
        lr=config.client_lr,
        batch=config.batch,
        seed=config.seed,
        shape=_shape(algorithm.traits),
        participation=1.0 if algorithm.traits.central else config.participation,
        local_epochs=local_epochs,
        local_steps=local_steps,
        alike=config.start == "equal" and not ranks,
        eval_clients=pace.clients,
        judge_by=config.judge,
        task=task,
        class_names=source.class_names,
        rule=averaging_rule(config),
        shifts=_shifts(config, counts, device),
        sampling=config.sampling,
        carries=algorithm.traits.asynchronous,
        cuts=depths.numbers,
        beside=_blocks(config, depths, make_model, make_client) if depths.mixed else None,
        place=place,
        ranks=ranks,
    )
    return Prepared(
        config,
        algorithm,
        source,
        split,
        example,
        setup,
        chosen,
        make_server,
        parts,
        rounds,
        per_epoch,
        machines,
        coding,
        making,
        {k: samples.to(device) for k, samples in own_tests.items() if k not in attacks.hostile},
        pace,
        tuple(
            filter(
                None,
                (attacks.remark(config.clients), held_out, pace.remark, chosen.remark, _told(config, depths), on_disk),
            )
        ),
        counts,
        screening_of(config),
        attacks,
        heads,
        depths,
    )


def _chosen(choice: Choice, ways: Ways | None) -> Chosen:
    """How everything is computed; with several ranks, as chosen by rank 0."""
    if not world().several:
        return choice.made(ways)

    def first() -> tuple[dict[str, Any], str]:
        made = choice.made(ways)
        return made.ways.stored(), made.remark

    stored, remark = world().first(first)
    return replace(choice.made(Ways.of(stored)), remark=remark)


def _ranks(config: RunConfig, algorithm: Algorithm, whole: nn.Module, *, mixed: bool) -> tuple[int, ...]:
    """The rank of each client's adapters, if they differ; otherwise empty. Raises ConfigError."""
    ranks: tuple[int, ...] = getattr(whole, "client_ranks", ())
    if not ranks:
        return ()
    if len(ranks) != config.clients:
        raise ConfigError(f"lora_ranks are {len(ranks)} for {config.clients} clients: give one for each")
    if len(set(ranks)) == 1 or algorithm.traits.central:
        return ()
    odd = {
        algorithm.traits.one_rank: bool(algorithm.traits.one_rank),
        "clients have different cuts": mixed,
        f"averaging = {config.averaging!r} averages factors, and not their products": (
            AVERAGE in algorithm.traits.needs and not averaging_rule(config).by_name
        ),
    }
    if reasons := [why for why, there in odd.items() if there]:
        raise ConfigError(
            f"lora_ranks = {list(ranks)} is not possible with {config.algorithm}: {reasons[0]}; give one lora_rank"
            + (", or averaging = 'products'" if "factors" in reasons[0] else "")
        )
    return ranks


def _of_rank(parts: Parts, rank: int) -> Parts:
    """The parts, of which the client's have adapters of that rank."""
    client, tail = (None if part is None else replica(part) for part in (parts.client, parts.tail))
    for part in (client, tail):
        if part is not None:
            shrink(part, of_rank(part, rank))
    assert client is not None, "there always is one"
    return replace(parts, client=client, tail=tail, likeness=None)


def _told(config: RunConfig, depths: Depths) -> str:
    """The clients' cuts, if they are not one cut for all by its name."""
    return remark(depths.names, config.cut_by)


def _depths(
    config: RunConfig, algorithm: Algorithm, whole: nn.Module, model: Model | None, few: Samples, machines: Fleet | None
) -> Depths:
    """The model, cut for all clients. Raises ConfigError without a name, CutError if it cannot be cut there."""
    traits = algorithm.traits
    clients = 1 if traits.central else config.clients
    if traits.whole or traits.u_shaped:
        cuts = _cut_names(config, traits, model, whole)
        return one_depth(cuts[0], cut(whole, cuts, few.inputs, untie=config.untie), clients)
    default = default_cut(config.model) if model is None else None
    dtype = torch.float64 if config.precision == "float64" else torch.float32
    allotment = Allotment(config, whole, few.inputs, few.y[:1].nbytes, dtype, machines)
    names = allotment.cuts(default) or _cut_names(config, traits, model, whole)
    names = names[:1] * clients if len(set(names)) == 1 else names
    if len(set(names)) == 1:
        return one_depth(names[0], cut(whole, names[0], few.inputs, untie=config.untie), clients)
    if traits.one_cut:
        raise ConfigError(f"{config.algorithm} needs one cut for all clients: {traits.one_cut}; name one")
    if world().several:
        raise ConfigError(
            f"a list of cuts is not possible with {world().size} ranks: name one cut for all, or start one process"
        )
    refuse_mixed(
        config,
        {
            "untie": lambda: config.untie,
            "attack": lambda: bool(config.attack),
            "cache_features": lambda: config.cache_features,
            "judge": lambda: config.judge == "average",
        },
    )
    return cut_each(whole, names, few.inputs)


def _blocks(
    config: RunConfig, depths: Depths, make_model: Callable[..., nn.Module], make_optimizer: MakeOptimizer
) -> Blocks:
    """The blocks that the server computes for clients whose cut is not the deepest."""

    def make(client: int) -> nn.Module | None:
        between = depths.of(client).between
        if between is None:
            return None
        made = replica(between)
        if config.start == "independent":
            fresh = make_model("model", client).state_dict()
            load_moving(made, {name: fresh[name] for name in moving(made)})
        return made

    return Blocks(make, make_optimizer, len(depths.names), lambda client: trains(depths.of(client).parts.client))


def _traced(config: RunConfig, machines: Fleet | None, source: Source) -> Fleet | None:
    """The machines, with the links of a trace, if there is one. Raises ConfigError."""
    if machines is None or config.trace is None:
        return machines
    names = source.owner_names if config.partition == "column" else ()
    return replace(machines, trace=read_trace(config.trace, config.clients, names, config.trace_period))


def _occurrences(
    config: RunConfig, task: Task, source: Source, owners: list[np.ndarray], given: Sequence[int]
) -> list[list[int]]:
    """How often each client has each class, [C][K], if logits are adjusted; `given` is the shape of a row's outputs.
    Raises ConfigError.
    """
    if config.logit_adjust == "none" or not config.tau:
        return []
    check_adjustable(config, task, source.train.y, given)
    found = []
    for rows in owners:
        own = task.occurrences(source.train.y[torch.from_numpy(rows)], given[0])
        assert own is not None, "it was checked"
        found.append([int(n) for n in own])
    return found


def _shifts(config: RunConfig, counts: list[list[int]], device: torch.device) -> Tensor | None:
    """The shifts that clients add to the scores in their own losses, [C, K]."""
    if not counts or config.logit_adjust == "server":
        return None
    return log_prior(torch.tensor(counts, dtype=torch.float64), config.tau).to(device, dtype_of(config))


def _forward_flops(split: Parts, example: Rows) -> float:
    """FLOPs of a row's forward pass, as far as they are known."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return count(split, example).whole.forward


def _objective(config: RunConfig, task: Task, loss: Loss | None, metrics: Mapping[str, Any] | None) -> Task:
    """The task with the user's own loss, and with the requested metrics. Raises ConfigError."""
    if loss is not None:
        task = with_loss(task, loss, config.given)
    return asking(task, config.metrics, config.primary_metric, metrics, config.options_of)


def _codecs(config: RunConfig) -> tuple[Codec, Codec]:
    """(up, down). Raises ConfigError."""
    found = []
    for option in ("up_codec", "down_codec"):
        try:
            found.append(Codec.parse(getattr(config, option)))
        except ConfigError as error:
            raise ConfigError(f"{option}: {error}") from None
    return found[0], found[1]


def _device(config: RunConfig) -> torch.device:
    """The requested device, set up for the precision. Raises ConfigError if there is no such device."""
    try:
        device = torch.device(config.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"device = {config.device!r} cannot be used here ({reason}): choose cpu") from None
    if device.type == "mps" and config.precision == "float64":
        raise ConfigError("precision = 'float64' is not available on mps: choose float32, or device = 'cpu'")
    if config.precision == "tf32" and device.type != "cuda":
        raise ConfigError(f"precision = 'tf32' works only with CUDA and has no effect on {device.type}: choose float32")
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.precision == "tf32"
    return device


def load_source(config: RunConfig, data: Data | None, task: Task | None = None) -> Source:
    """The data set of the run, floating point numbers in the run's type. Raises DataError."""
    dtype, task = dtype_of(config), task or config.thing("task", config.task)
    held_out: dict[str, Any] = {"validation": config.validation, "test": config.test, "seed": config.seed}
    held_out["test_seed"] = config.test_seed
    wanted: dict[str, Any] = {"targets": task.targets, "ignored": task.ignored, **_where_read(config)}
    if isinstance(data, Source):
        source = replace(fitting(data, task.targets), test_drawn=False)  # the same rows for every seed
    elif data is not None:
        columns = {name: getattr(config, name) for name in {"label_column", "client_column"} & config.given}
        if config.data_format != "auto":
            columns = {**reading_options(config), "data_format": config.data_format}
        source = from_memory(data, **held_out, given=config.given, **wanted, **columns)
        _refuse_dealing(config, data, source)
    else:
        source = load(
            config.data,
            data_format=config.data_format,
            class_names=config.class_names,
            **held_out,
            given=config.given,
            **wanted,
            **reading_options(config),
        )
    if config.test_seed is not None and not source.test_drawn:
        raise ConfigError(
            f"test_seed = {config.test_seed} has no effect on {source.name}, which has its own test set: leave it out"
        )
    if config.data_workers and config.data_in_memory == "always":
        raise ConfigError(
            f"data_workers = {config.data_workers} has no effect with data_in_memory = 'always': leave one of them out"
        )
    if config.data_in_memory == "never" and source.train.in_memory:
        raise ConfigError(
            f"data_in_memory = 'never' has no effect on {source.name}: only a map-style Dataset gives one item at a "
            "time; leave it out"
        )
    return replace(
        source,
        train=source.train.to(dtype),
        validation=source.validation.to(dtype),
        test=source.test.to(dtype),
    )


def _refuse_dealing(config: RunConfig, data: Data, source: Source) -> None:
    """Raises ConfigError if data sets that each belong to a client would be dealt to others."""
    if isinstance(data, list | Mapping) and source.owner_names and config.partition != "column":
        raise ConfigError(
            f"partition = {config.partition!r} would deal the rows of {len(source.owner_names)} clients again: pass "
            f"partition='column' and clients={len(source.owner_names)}"
        )


def own_source(config: RunConfig, path: str) -> Source:
    """A client's own data, read as the configuration says, all of them for training. Their test rows are kept if the
    client is tested on its own rows. Raises DataError, ConfigError.
    """
    task: Task = config.thing("task", config.task)
    return load_whole(
        path,
        data_format=config.data_format,
        class_names=config.class_names,
        targets=task.targets,
        ignored=task.ignored,
        seed=config.seed,
        with_test=config.evaluate_on != "global",
        **_where_read(config),
        **reading_options(config),
    )


def _where_read(config: RunConfig) -> dict[str, Any]:
    """How items of data sets are read, and the folder of the model, which has the tokenizer for text."""
    folder = plugins.argument_of("model", config.model)
    return {"data_in_memory": config.data_in_memory, "data_workers": config.data_workers, "model_folder": folder}


def reading_options(config: RunConfig) -> dict[str, Any]:
    """The options of the data's format, as far as they differ from their defaults: only some formats have them."""
    names = {"label_column", "client_column"}.union(*(entry.option_names for entry in config.reading()))
    return {name: getattr(config, name) for name in names & config.given}


def deal(config: RunConfig, data: Data | None = None) -> list[np.ndarray]:
    """The rows of each client, as `assemble` deals them. Raises DataError, ConfigError."""
    task: Task = config.thing("task", config.task)
    return _partition(config, load_source(config, data, task), task)


def _partition(config: RunConfig, source: Source, task: Task) -> list[np.ndarray]:
    column, y = source.client_column, source.train.y
    if task.targets != "class" and plugins.load("partition", config.partition).by_class:
        raise ConfigError(
            f"partition = {config.partition!r} divides samples by class, but the task {config.task!r} has no classes: "
            "choose iid, quantity, shards or column"
        )
    return partition(
        y if y.dim() == 1 else torch.zeros(len(y), dtype=torch.long),
        config.clients,
        config.partition,
        seed=config.seed,
        client_column=None if column is None else column.numpy(),
        samples_per_client=config.samples_per_client,
        **{name: getattr(config, name) for name in plugins.find("partition", config.partition).option_names},
    )


def _counts(source: Source, parts: list[np.ndarray]) -> np.ndarray:
    """Samples of each class that each client holds, [C, K]; all samples, [C, 1], if classes have no names."""
    if source.classes and source.train.y.dim() == 1:
        return class_counts(source.train.y, parts, source.classes)
    return np.array([[len(part)] for part in parts], np.int64)


def _making(config: RunConfig, model: Model | None, source: Source, task: Task, cuts: tuple[str, ...]) -> Making:
    """How the model is made for these data and this cut."""
    shape, width = _input_shape(source), task.width(source.train.y, source.classes)
    make = _maker(config, model, shape, width, cuts)
    if config.weights is None:
        return Making(make, shape, width)
    weights, path = read_weights(config.weights), config.weights

    def loaded(*name: str | int) -> nn.Module:
        made = make(*name)
        load_weights(made, weights, path, strict=config.weights_strict)
        return made

    return Making(loaded, shape, width, weights)


def _maker(
    config: RunConfig, model: Model | None, shape: tuple[int, ...], width: int, cuts: tuple[str, ...]
) -> Callable[..., nn.Module]:
    """A function (*name) -> a model, freshly initialised under the seed called `name`."""
    if isinstance(model, nn.Module):
        if config.start == "independent":
            raise ConfigError(
                "start = 'independent' needs to make a new model per client: give a function that returns "
                "one instead of a module"
            )
        return lambda *name: _made(deep_copy(model), config)
    own = {} if model is not None else config.options_of(plugins.find("model", config.model))

    def make(*name: str | int) -> nn.Module:
        with seeds.torch_seeded(config.seed, *name):
            if model is None:
                made = build(config.model, shape, width, at=cuts, **own)
            else:
                made = make_own(model, shape, width, at=cuts)
        return _made(made, config)

    return make


def _made(model: nn.Module, config: RunConfig) -> nn.Module:
    """A model in the run's type, with the configured parameters frozen. Raises ConfigError."""
    freeze(model, config.freeze)
    return typed(model, config)


def _input_shape(source: Source) -> tuple[int, ...]:
    """The shape of one sample's inputs; of the first, if a sample has several."""
    return tuple(source.train.form.rows[0].shape[1:])


def _shape(traits: Traits) -> Shape:
    if traits.whole:
        return "whole"
    return "u-shaped" if traits.u_shaped else "split"


def _named_cuts(config: RunConfig, traits: Traits, model: Model | None) -> tuple[str, ...]:
    """The modules after which the model is cut, as far as they are named; none for whole models."""
    if traits.whole or config.cut_by or len(set(config.cuts)) > 1:  # no cut is common to all clients
        return ()
    first = config.cuts[0] if config.cuts else default_cut(config.model) if model is None else None
    return tuple(name for name in (first, config.tail_cut) if name) if first else ()


def _cut_names(config: RunConfig, traits: Traits, model: Model | None, whole: nn.Module) -> tuple[str, ...]:
    """Where to cut: nowhere (whole models), once, or twice (U-shaped). Raises ConfigError without a name."""
    if traits.whole:
        return ("output",)
    if not (named := _named_cuts(config, traits, model)):
        raise ConfigError(
            f"{config.algorithm} needs cut: name the module of your model after which it is cut ({places(whole)})"
        )
    return named


def _work(config: RunConfig, algorithm: Algorithm, sizes: list[int], rounds: int) -> Work:
    """How much a simulation computes."""
    share = 1.0 if algorithm.traits.central else config.participation
    return Work(len(sizes), max(1, round(share * len(sizes))), trained_rows(config, algorithm, sizes, rounds))


def _optimizers(config: RunConfig) -> tuple[MakeOptimizer, MakeOptimizer]:
    """The makers of client and server optimisers. Raises ConfigError."""
    groups = tuple(map(ParamGroup.of, config.param_groups))
    client = make_optimizer(
        config.client_optimizer,
        config.client_lr,
        config.client_optimizer_options,
        groups=groups,
        clip=config.client_clip_grad_norm,
        accumulate=config.accumulate,
    )
    name = config.server_optimizer or config.client_optimizer
    options = config.server_optimizer_options
    if options is None:
        options = config.client_optimizer_options if name == config.client_optimizer else {}
    server = make_optimizer(
        name,
        config.server_lr or config.client_lr,
        options,
        groups=groups,
        clip=config.server_clip_grad_norm,
        accumulate=config.server_accumulate or config.accumulate,
    )
    return client, server


class _ClientModels(Sequence[ClientModel]):
    """Every client's (lower part, tail or auxiliary head), made on demand: equal copies, or each initialised
    separately. `make_head` makes a head from a seed's name, if the algorithm has heads.
    """

    def __init__(
        self,
        config: RunConfig,
        depths: Depths,
        make_model: Callable[..., nn.Module],
        clients: int,
        make_head: Callable[..., nn.Module] | None,
        ranks: Sequence[int] = (),
    ) -> None:
        self.ranks = ranks
        self.config, self.depths, self.make_model, self.clients = config, depths, make_model, clients
        self.make_head = make_head

    def __len__(self) -> int:
        return self.clients

    def __getitem__(self, client: Any) -> Any:
        if not 0 <= client < self.clients:
            raise IndexError(client)
        parts = self.depths.of(client).parts
        ends = [end for end in (parts.client, parts.tail) if end is not None]
        lower, tail = (*replica(nn.ModuleList(ends)), None)[:2]  # together: they may share weights
        if self.config.start == "independent":
            fresh = self.make_model("model", client).state_dict()
            for part in (lower, tail):
                if part is not None:
                    load_moving(part, {name: fresh[name] for name in moving(part)})
        if self.ranks:
            narrow(nn.ModuleList([part for part in (lower, tail) if part is not None]), self.ranks[client])
        if self.make_head is not None:
            own = (client,) if self.config.start == "independent" else ()
            return lower, self.make_head("head", *own)
        return lower, tail


def _heads(
    config: RunConfig, algorithm: Algorithm, split: Parts, example: Rows, classes: int, given: Tensor
) -> Callable[..., nn.Module] | None:
    """A function (*name) -> an auxiliary head, if the algorithm needs one; `given` is the shape of the whole model's
    output. Raises ConfigError for heads that do not fit.
    """
    if LEARN not in algorithm.traits.needs:
        return None
    client = deep_copy(split.client).eval()
    with torch.no_grad():
        smashed: Rows = client(example)
    device, what = example[0].device, f"`head` of the algorithm {config.algorithm!r}"

    def make(*name: str | int) -> nn.Module:
        with seeds.torch_seeded(config.seed, *name):
            with own_code(algorithm, what):
                head = algorithm.head(smashed, classes)
            if not isinstance(head, nn.Module):
                raise ConfigError(f"{what} gives {type(head).__name__}: return a torch.nn.Module of the smashed data")
            with own_code(head, what):
                head = AuxiliaryHead(head, smashed)
            head = typed(head, config).to(device)
        return head.requires_grad_(False) if algorithm.traits.heads_come_down else head

    check_head(make("head"), what, smashed, given)
    return make


def _raw_bytes(source: Source, rows: np.ndarray) -> int:
    """The data that centralised learning uploads once: the training inputs and labels."""
    return len(rows) * (sum(x.nbytes for x in source.train.form.rows) + source.train.y[:1].nbytes)


def _rounds(config: RunConfig, algorithm: Algorithm, sizes: list[int]) -> tuple[int, int]:
    """(rounds to do, rounds of about one epoch). Raises DataError if a client has no sample."""
    if not all(sizes):
        raise DataError(f"client {sizes.index(0)} has no samples: use fewer clients or another partition")
    local_epochs, local_steps = algorithm.part_of_round
    if local_steps:
        fixed = config.sampling == "fixed"
        batches = math.ceil(max(sizes) / config.batch) if fixed else steps_per_epoch(sizes, config.batch)
        per_epoch = max(1, batches // local_steps)
        rounds = math.ceil(config.epochs * batches / local_steps)
    else:
        per_epoch, rounds = 1, math.ceil(config.epochs / local_epochs)
    return config.rounds or rounds, per_epoch


def schedules(config: RunConfig) -> tuple[Schedule, Schedule]:
    """How the clients' and the server's rates change. Raises ConfigError."""
    return _schedule(config, config.lr_schedule), _schedule(config, config.server_lr_schedule or config.lr_schedule)


def averaging_rule(config: RunConfig) -> Averaging:
    """How client models are averaged. Raises ConfigError."""
    return _rule(config, "averaging", Averaging)


def screening_of(config: RunConfig) -> Screening:
    """The screening of rows before the server uses them. Raises ConfigError."""
    return _rule(config, "screening", Screening)


def _rule(config: RunConfig, kind: str, base: type[R]) -> R:
    """The thing that the option `kind` names, derived from `base` and checked. Raises ConfigError."""
    named, form = getattr(config, kind), plugins.KINDS[kind]
    rule = config.thing(kind, named)
    if not isinstance(rule, base):
        raise ConfigError(f"the {form.word} {named!r} is not derived from {form.group}.{base.__name__}")
    with own_code(rule, f"`check` of the {form.word} {named!r}"):
        rule.check(config.given)
    return rule


def _schedule(config: RunConfig, name: str) -> Schedule:
    """The schedule of that name, or one from a plain function of the progress."""
    made = config.thing("schedule", name)
    if isinstance(made, FunctionType):
        options = config.options_of(plugins.find("schedule", name))
        return FunctionSchedule(function=partial(made, **options) if options else made, name=name)
    if not isinstance(made, Schedule):
        raise ConfigError(f"the schedule {name!r} is not derived from cutlayer.schedules.Schedule: derive it")
    return made
