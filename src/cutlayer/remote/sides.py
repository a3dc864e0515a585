"""Builds a remote run's two sides from a configuration: the server's training, and a client's worker.

Both sides use the same configuration, and both check this (`wire.handshake`). A client keeps its share of the data, or
its own data, and its part of the model, and releases the rest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cutlayer import defences, plugins
from cutlayer.adapters import numbers, of_rank, shrink
from cutlayer.algorithms import Algorithm
from cutlayer.build import Data, Model, Prepared, Training, prepare
from cutlayer.cohort import Tell
from cutlayer.data.samples import AtClient, Samples, Source
from cutlayer.defences.noise import Noise
from cutlayer.defences.pipeline import Defences
from cutlayer.engine.between import Blocks
from cutlayer.engine.local import Client
from cutlayer.engine.simulated import ClientModel
from cutlayer.errors import ConfigError
from cutlayer.frozen import digest
from cutlayer.models.parts import Crossing
from cutlayer.models.weights import digest_of
from cutlayer.options import NAMING, BudgetConfig, RunConfig, about
from cutlayer.remote import announced
from cutlayer.remote.allowance import PIECES, SPENT, Allowance, Extent, Purse, statement
from cutlayer.remote.audit import Audit
from cutlayer.remote.carrier import Carrier
from cutlayer.remote.far import End, Remote, RemoteCohort
from cutlayer.remote.vetting import Vetting
from cutlayer.remote.worker import Duty, Keeping, OwnTest, Watching, Worker
from cutlayer.run import Run
from cutlayer.scoring import ROWS_PER_PASS, reported, try_metrics
from cutlayer.server import Server
from cutlayer.tasks import Task, Value
from cutlayer.trained import describe
from cutlayer.types import as_tuple
from cutlayer.verbs import FORWARD
from cutlayer.wire import agree, described, fingerprint, specs
from cutlayer.wire import messages as m
from cutlayer.wire.handshake import CUT, RANK
from cutlayer.wire.names import named

Greet = Callable[[m.Hello, int], m.Welcome | m.Refused]
_NAME = "client-"
_PROBE = 8  # rows that models are tried on
_TESTED = "Each client's model is tested on its own rows; a client with data of its own holds them out (evaluate_on)"


def client_name(client: int) -> str:
    """The name of client number `client`, also in certificates."""
    return f"{_NAME}{client}"


def client_number(name: str) -> int:
    """The number of the client called `name`. Raises ConfigError."""
    number = name.removeprefix(_NAME)
    if not name.startswith(_NAME) or not (number.isascii() and number.isdigit()):
        raise ConfigError(f"client = {name!r} is not a client name: clients are called client-0, client-1 and so on")
    return int(number)


def remote_training(
    config: RunConfig,
    hub: Carrier,
    samples: MutableSequence[int],
    *,
    run: str = "",
    deadline: float | None = None,
    quorum: float = 0.5,
    faulty: Literal["exclude", "readmit", "stop"] = "exclude",
    per_batch: float = 0.0,
    most_samples: int | None = None,
    tell: Tell | None = None,
    ready: Callable[[frozenset[int]], None] | None = None,
    model: Model | None = None,
    data: Data | None = None,
) -> tuple[Training, RemoteCohort, Greet]:
    """The server's side: a training whose cohort uses `hub`, and the function that greets client k with a Welcome or a
    Refused. `samples` are the clients' n_k; 0 means the number that the client announces when it joins.

    Raises UsageError as `assemble` does; ConfigError for centralised learning, which has no clients, and if client
    models would have to leave their machines only to be judged.
    """
    chosen: Algorithm = config.thing("algorithm", config.algorithm)
    if config.judge == "average" and not (chosen.traits.models_cross or config.traits.central):
        raise ConfigError(
            f"judge = 'average' needs all client models on one machine, but with {config.algorithm} they never leave "
            "their clients' machines, and would have to: choose mean or ensemble"
        )
    p = _of_own_ranks(prepare(_remotely(config), model, data))
    _check_kept(p)
    kinds, ends = _kinds(p), _ends(p)
    setup = Remote(
        samples=samples,
        twin=ends[_largest(p)].twin,
        crossing=p.split.crossing,
        ends=ends,
        kinds=kinds,
        returning=p.split.returning,
        targets=Crossing(tuple(p.source.train.y.shape[1:]), p.source.train.y.dtype),
        outputs=_outputs(p),
        masses=[0.0] * len(samples),
        **p.clients.routine,
        up=p.coding.up,
        down=p.coding.down,
        deadline=deadline,
        quorum=quorum,
        faulty=faulty,
        per_batch=per_batch,
        most_samples=most_samples,
        tests=[0] * len(samples),
        scores=_reported(p) if config.evaluate_on != "global" else {},
        class_counts=[[0] * len(own) for own in p.class_counts] if p.adjusts_at_server else [],
    )
    cohort = RemoteCohort(hub, setup, tell=tell, ready=ready)
    lr = config.server_lr or config.client_lr
    server = Server(p.split.server, p.make_server, lr, p.server_seed, p.clients.task)
    probe = (p.source.test if len(p.source.test) else p.source.train)[:_PROBE]
    blocks = p.clients.beside if isinstance(p.clients.beside, Blocks) else None
    cohort.vet = Vetting(server, p.clients.task, p.algorithm.traits.needs, probe, setup.twin.module, blocks)
    each, shares = [terms(p, run, client) for client in _first_of_each_kind(p)], config.share_server_model

    def greet(hello: m.Hello, client: int) -> m.Welcome | m.Refused:
        ours = each[setup.kind(client)]
        if refused := agree(hello.terms, ours):
            return refused
        if client in cohort.excluded:
            why = f"client {client} is excluded from the run: {cohort.excluded[client]}"
            return m.Refused("excluded", why)
        if refused := _unfit_tests(config, setup, hello, fresh=cohort.fresh, client=client):
            return refused
        if refused := _unfit_counts(setup, hello, fresh=cohort.fresh, client=client):
            return refused
        if sentence := announced.impossible(hello.samples, hello.mass, most_samples, alike=setup.counts_alike):
            return m.Refused("client", f"client {client} {sentence}")
        if not cohort.fresh and (sentence := cohort.claims_too_much(client, hello.samples, hello.mass)):
            return m.Refused("client", sentence)
        if not samples[client] or cohort.fresh:  # before anything is trained, a client may return with other data
            samples[client], setup.masses[client] = hello.samples, hello.mass
        if (hello.samples, hello.mass) != (samples[client], setup.masses[client]):
            sentence = f"client {client} has {hello.samples} samples, {samples[client]} were announced"
            if hello.samples == samples[client]:
                sentence = f"the samples of client {client} count {hello.mass:g} together, not {setup.masses[client]:g}"
            return m.Refused("client", sentence + ": give it the data of this run")
        setup.tests[client] = hello.tests
        if setup.class_counts:
            setup.class_counts[client] = list(hello.counts)
        (setup.wanting.add if hello.wants_server and shares else setup.wanting.discard)(client)
        return m.Welcome(client, len(samples), cohort.step, ours, shares_server=shares)

    training = p.training(cohort, server, "remote", tell, setup.class_counts)
    tests = OwnTests(p.own_tests, setup.tests, p.source.train.form)
    held = _TESTED if config.evaluate_on != "global" else ""
    remarks = tuple(filter(None, (held, p.pace.remark, p.chosen.remark)))
    return replace(training, own_tests=tests, remarks=remarks), cohort, greet


class OwnTests(Mapping[int, Samples]):
    """Each client's own test rows: those that a client with its own data has held out (`counts` says how many), or
    those that the server has `dealt`. `like` is a sample of their form.
    """

    def __init__(self, dealt: Mapping[int, Samples], counts: Sequence[int], like: Samples) -> None:
        self._dealt, self._counts, self._like = dealt, counts, like

    def __getitem__(self, client: int) -> Samples:
        if not self._counts[client]:
            return self._dealt[client]
        none = self._like[:0]
        return AtClient(none.inputs, none.y, client, self._counts[client])

    def __iter__(self) -> Iterator[int]:
        return (k for k, count in enumerate(self._counts) if count or k in self._dealt)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _reported(p: Prepared) -> dict[str, Value]:
    """The form of the scores that clients report for their own test rows, with the values of an arbitrary model."""
    targets, outputs = (p.source.test if len(p.source.test) else p.source.train).y, _outputs(p)
    nothing = torch.zeros(len(p.example[0]), *outputs.shape, dtype=outputs.dtype, device=targets.device)
    return reported(try_metrics(p.clients.task, nothing, targets, p.source.class_names))


def _unfit_tests(config: RunConfig, setup: Remote, hello: m.Hello, *, fresh: bool, client: int) -> m.Refused | None:
    """Why a client cannot be tested on its own rows as it states; None if it can."""
    if not fresh and hello.tests != setup.tests[client]:
        sentence = f"client {client} has {hello.tests} test rows of its own, {setup.tests[client]} were announced"
        return m.Refused("client", sentence + ": give it the data of this run")
    if not hello.tests:
        return None
    if sorted(hello.metrics) != sorted(setup.scores):
        theirs, ours = (_listed(sorted(names), 1000) for names in (hello.metrics, setup.scores))
        sentence = (
            f"metrics are {theirs} for the client and {ours} for the server: a client that is tested on data of its "
            "own reports them, so start both with the same metrics"
        )
        return m.Refused("step", sentence)
    if config.judge != "mean" and not config.traits.models_cross:
        return m.Refused("step", _others_models(config))
    return None


def _unfit_counts(setup: Remote, hello: m.Hello, *, fresh: bool, client: int) -> m.Refused | None:
    """Why the class counts that a client announces cannot be right, or are not those of this run; None if they can be
    right.
    """
    known = setup.class_counts[client] if setup.class_counts else []
    if len(hello.counts) != len(known) or sum(hello.counts) > hello.samples:
        sentence = (
            f"client {client} announces {sum(hello.counts)} samples of {len(hello.counts)} classes, of {hello.samples} "
            f"samples in all, where {len(known)} classes are expected (logit_adjust)"
        )
        return m.Refused("client", sentence + ": start server and clients with the same configuration")
    if not fresh and any(known) and list(hello.counts) != known:
        return m.Refused("client", f"client {client} has other classes than it announced: give it the data of this run")
    return None


def _others_models(config: RunConfig) -> str:
    return (
        f"judge = {config.judge!r} asks what all clients' models say of each client's own test rows, but the rows of a "
        "client with data of its own stay with it: choose judge = mean, or evaluate_on = global"
    )


def worker_of(
    config: RunConfig,
    client: int,
    *,
    name: str,
    run: str = "",
    token: str = "",
    folder: Path | None = None,
    watch: Watching = "off",
    noise_seed: int | None = None,
    model: Model | None = None,
    data: Data | None = None,
    own: Source | None = None,
    budget: BudgetConfig | None = None,
    audit: Audit | None = None,
) -> Worker:
    """A client's side: client number `client` of the configuration, with its share of the data, or with its `own` data.
    The draws of its defences are named by `noise_seed`. By default this is the configuration's seed, as in a
    simulation; but the server knows this seed and could subtract the noise. If clients are tested on their own rows,
    those of `own` data are the data's test rows, or a share that is held out. `budget` limits its answers, by its own
    file; it records requests in `audit`.

    Raises UsageError as `assemble` does; ConfigError for a number that is not a client's, for a watch over targets that
    are not classes, and for a task that must be fitted to training data that the server does not see.
    """
    if not 0 <= client < config.clients:
        raise ConfigError(f"client = {client} is not one of the {config.clients} clients, 0 to {config.clients - 1}")
    tested = own is not None and config.evaluate_on != "global"
    if tested and config.judge != "mean" and not config.traits.models_cross:
        raise ConfigError(_others_models(config))
    alone = None if own is None else client
    p = _of_own_ranks(prepare(_remotely(config), model, data if own is None else own, alone=alone))
    _check_kept(p)
    _check_watch(p.clients.task, config, watch)
    if own is not None:
        _check_fitted(config, p.clients.task)
    lower, tail = p.clients.models[client]
    share, protection = torch.from_numpy(p.clients.rows[client]), defences.of(config)
    budget = budget or BudgetConfig()
    noise = protection.get(Noise)
    noise = noise if noise is not None and noise.scale else None
    if noise_seed is not None:  # otherwise the server can draw the same noise, and there is no guarantee
        _check_promise(config, protection, budget)
    _check_epsilon(budget, noise)
    test = _own_test(p, client) if tested else None
    study = study_of(p, len(share), test, dealt=own is None)
    allowance = Allowance.of(study, budget, noise)
    return Worker(
        Duty(
            name=name,
            index=client,
            samples=p.source.train.share(share),
            lower=lower,
            tail=tail,
            make_optimizer=p.clients.make_optimizer,
            task=p.clients.task,
            lr=config.client_lr,
            batch=config.batch,
            seed=config.seed,
            terms=terms(p, run, client if _kinds(p) else 0),
            crossing=p.parts_of(client).crossing,
            returning=p.split.returning,
            up=p.coding.up,
            down=p.coding.down,
            defences=protection if noise_seed is None else replace(protection, seed=noise_seed, secret=True),
            token=token,
            folder=folder,
            watch=watch,
            shares=p.algorithm.shares_gradients,
            needs=p.algorithm.traits.needs,
            seeks=config.cache_features,
            moves_optimizer=p.algorithm.moves_optimizer,
            quota=study.quota,
            study=study,
            rows=_rows(p, len(share)),
            whole=_keeping(p, own=model is not None) if config.share_server_model and folder is not None else None,
            shift=None if p.clients.shifts is None else p.clients.shifts[client],
            class_counts=p.class_counts[client] if p.adjusts_at_server else (),
            own_test=test,
            purse=Purse(name, allowance, len(share), None if folder is None else folder / SPENT),
            audit=audit,
            noise=noise,
            delta=budget.delta,
        )
    )


def _check_promise(config: RunConfig, protection: Defences, budget: BudgetConfig) -> None:
    """Raises ConfigError, before anything is sent, if models would leave that reveal what the noise on smashed data
    hides.
    """
    traits = config.traits
    if protection.noisy and (traits.models_cross or traits.gradients_cross) and not budget.give_model_despite_noise:
        raise ConfigError(
            f"noise is added to smashed data, but {config.algorithm} has each client give its model or gradient, which "
            "is computed from its rows without noise and reveals what the noise hides: choose an algorithm whose "
            "models stay, or set give_model_despite_noise = true in [budget] if you accept that"
        )


def _check_epsilon(budget: BudgetConfig, noise: Noise | None) -> None:
    """Raises ConfigError for a limit on epsilon that cannot be kept."""
    if budget.max_epsilon is None:
        return
    if noise is None:
        raise ConfigError(
            f"max_epsilon = {budget.max_epsilon} cannot be kept without noise: give clip and gaussian_noise, or leave "
            "it out"
        )
    if (once := statement(noise, 1, budget.delta).epsilon) > budget.max_epsilon:
        raise ConfigError(
            f"max_epsilon = {budget.max_epsilon} is less than sending each sample once costs, {once:.4g}: add more "
            "noise, or raise it"
        )


def study_of(p: Prepared, samples: int, test: OwnTest | None, *, dealt: bool) -> Extent:
    """The training of a client with this number of samples, by the configuration. `dealt`: its data are a share of the
    configuration's, so the sizes of all clients and the server's test rows are known.
    """
    config, traits = p.config, p.algorithm.traits
    quota = _quota(p, samples)
    depends = config.rounds is None and p.algorithm.part_of_round[1] is not None
    held_out = [p.source.validation, *([p.source.test] if config.evaluate_on != "own" else []), *p.own_tests.values()]
    pieces = sum(-(-len(rows) // ROWS_PER_PASS) for rows in held_out) if dealt else PIECES
    pieces *= 2 if traits.u_shaped else 1
    pieces += 0 if test is None else -(-len(test.samples) // ROWS_PER_PASS)
    models = quota + config.clients + 1 if traits.models_cross else 0  # lent to each client that is tested
    return Extent(None if depends and not dealt else p.rounds, quota, pieces, models, FORWARD in traits.needs)


def _rows(p: Prepared, samples: int) -> int | None:
    """The most rows that a client with this number of samples trains on in a round, if the server determines the batch
    sizes; otherwise None.
    """
    c = p.clients
    if c.sampling == "fixed":
        return None
    return c.local_steps * c.batch * p.config.clients if c.local_steps else c.local_epochs * samples


def _quota(p: Prepared, samples: int) -> int:
    """The most batches that a client with this number of samples trains on in a round."""
    clients = p.clients
    if clients.sampling != "fixed":  # a batch may be a single row
        return clients.local_steps or clients.local_epochs * samples
    return int(clients.quota(np.array([-(-samples // clients.batch)]))[0])


def _own_test(p: Prepared, client: int) -> OwnTest:
    """The test rows of a client with its own data."""
    return OwnTest(p.own_tests[client], list(_reported(p)), p.clients.shape, _outputs(p), p.source.class_names)


def _keeping(p: Prepared, *, own: bool) -> Keeping:
    """The facts that a client needs to keep the whole model: how it is made, and the form of the server's part."""
    about = describe(p.config, p.source, p.making, own=own, cuts=() if p.depths is None else p.depths.names)
    return Keeping({**about, "clients": len(p.partition)}, described(p.split.server.state_dict()), p.clients.shape)


def share(run: Run, cohort: RemoteCohort) -> dict[int, int]:
    """Send the server's part of a finished run to the clients that want it, and count this. Returns the bytes sent to
    each.
    """
    sent = cohort.share(run.training.server.model.state_dict(), run.rounds)
    for client, count in sent.items():
        run.training.ledger.add("down", "server model", client, count)
    run.count_again()
    return sent


def _check_watch(task: Task, config: RunConfig, watch: Watching) -> None:
    """Check that a watch is possible: it compares gradients by class, and models with the client's own. Raises
    ConfigError.
    """
    if watch != "off" and task.targets != "class" and not config.traits.models_cross:
        raise ConfigError(
            f"watch = {watch!r} has nothing to look at: it compares gradients by class, and the targets of the task "
            f"{plugins.label(config.task)!r} are not one class per sample; leave it out"
        )


def _check_fitted(config: RunConfig, fitted: Task) -> None:
    """Check that values that a task derives from the training data are the same for all. Raises ConfigError."""
    asked: Task = config.thing("task", config.task)
    changed = [o.name for o in asked.entry.options if getattr(asked, o.name) != getattr(fitted, o.name)]
    if not changed:
        return
    by = next((name for name in changed if name in config.given), changed[0])
    found = [name for name in changed if name != by]
    instead = f"give {' and '.join(found)} to server and clients instead" if found else "leave it out"
    raise ConfigError(
        f"{by} = {getattr(asked, by)} is derived from all training data, but clients bring their own data, so no side "
        f"has all of them: {instead}"
    )


def _of_own_ranks(p: Prepared) -> Prepared:
    """The same with clients whose adapters have only the factors of their own rank, if ranks differ."""
    if not p.clients.ranks:
        return p
    models = _OfOwnRanks(p)
    models.check()
    return replace(p, clients=replace(p.clients, models=models))


class _OfOwnRanks(Sequence[ClientModel]):
    """Every client's parts, with the factors of its own rank."""

    def __init__(self, p: Prepared) -> None:
        self._models, self._ranks, self._example = p.clients.models, p.clients.ranks, p.example

    def __len__(self) -> int:
        return len(self._models)

    def __getitem__(self, client: Any) -> Any:
        lower, tail = self._models[client]
        for part in (lower, tail):
            if part is not None:
                shrink(part, of_rank(part, self._ranks[client]))
        return lower, tail

    def check(self) -> None:
        """Raises ConfigError if a client's lower part does not compute the same with fewer rows and columns as with
        zeros in their places.
        """
        client = min(range(len(self)), key=self._ranks.__getitem__)
        given = []
        for lower, _ in (self._models[client], self[client]):
            with torch.no_grad():
                try:
                    given.append(as_tuple(lower.eval()(self._example)))
                except RuntimeError:  # its code contains the shapes
                    given.append(())
        if not given[0] or len(given[0]) != len(given[1]) or not all(map(_close, *given)):
            raise ConfigError(
                f"lora_ranks = {list(self._ranks)} is not possible on clients on other machines with this model: its "
                "client part, as it is cut, computes with factors of one rank alone; give one lora_rank"
            )


def _close(one: Tensor, other: Tensor) -> bool:
    """Whether results differ only by rounding."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-5, equal_nan=True)


def _kinds(p: Prepared) -> tuple[int, ...]:
    """The kind of each client [C], by its cut or by the rank of its adapters; empty if all are alike."""
    return tuple(p.clients.cuts) or numbers(p.clients.ranks)


def _largest(p: Prepared) -> int:
    """The kind of clients that has everything that any kind has."""
    return max(numbers(p.clients.ranks)) if p.clients.ranks else p.deepest


def _first_of_each_kind(p: Prepared) -> list[int]:
    """A client of each kind, in order; client 0 if all are alike."""
    kinds = _kinds(p)
    return [kinds.index(number) for number in range(max(kinds) + 1)] if kinds else [0]


def _ends(p: Prepared) -> list[End]:
    """The tensors that cross at each of the cuts, and a client of each kind."""
    make, task = p.clients.make_optimizer, p.clients.task
    firsts = _first_of_each_kind(p)
    return [End(p.parts_of(k).crossing, Client(k, *p.clients.models[k], make, task)) for k in firsts]


def terms(p: Prepared, run: str, client: int = 0) -> m.Terms:
    """The terms on which both sides must agree; if clients have different cuts or ranks, those of the server and this
    client.
    """
    config = p.config
    held = [part for part in p.clients.models[client] if part is not None]
    return m.Terms(
        run=run,
        algorithm=plugins.registered_name("algorithm", config.algorithm),
        part=fingerprint(*held),
        crossing=specs(p.parts_of(client).crossing),
        returning=specs(p.split.returning),
        step=m.StepTerms(
            batch=config.batch,
            up=p.coding.up.agreed,
            down=p.coding.down.agreed,
            options=shared_options(p, client),
        ),
        classes=named(p.source.class_names),
        features=named(feature_names(p.source)),
    )


def shared_options(p: Prepared, client: int = 0) -> dict[str, str]:
    """The options that affect a client's training, except those that have their own fields in the terms. Options and
    their owners declare this. Each side decides itself where its data are, how they are protected and on which device
    they are computed.
    """
    config = p.config
    common = {n: getattr(config, n) for n, f in RunConfig.model_fields.items() if about(f, "shared")}
    named = [("schedule", "lr_schedule", config.lr_schedule), ("task", "task", config.task)]
    if plugins.is_reference(config.client_optimizer) or plugins.known("optimizer", config.client_optimizer):
        named.append(("optimizer", "client_optimizer", config.client_optimizer))
    own = plugins.find("algorithm", config.algorithm).options
    named += [(NAMING[o.name], o.name, v) for o in own if o.name in NAMING and (v := getattr(config, o.name))]
    common |= {option: plugins.registered_name(kind, reference) for kind, option, reference in named}
    things: dict[str, Any] = {}
    for kind, _, reference in (("algorithm", "algorithm", config.algorithm), *named):
        entry = plugins.find(kind, reference)
        # A task may have derived options from the data: both sides must have derived the same.
        holder = p.clients.task if kind == "task" else config
        things |= {o.name: getattr(holder, o.name) for o in entry.options if o.shared}
        if code := plugins.fingerprint(kind, reference):
            things[f"code of the {plugins.KINDS[kind].word}"] = code
    if p.clients.cuts and p.depths is not None:
        things[CUT] = p.depths.names[client]
    if p.clients.ranks:
        things[RANK] = p.clients.ranks[client]
    if frozen := digest(*p.clients.models[client]):
        things["frozen parameters"] = frozen
    if p.making.weights:
        held = {name for part in p.clients.models[client] if part is not None for name in part.state_dict()}
        things["digest of the client's starting weights"] = digest_of(p.making.weights, held)
    return {name: str(value) for name, value in {**common, **things}.items()}


def feature_names(source: Source) -> list[str]:
    """The names of the columns of the inputs, in order, if they have names. For a table, a text column has one name per
    category. For inputs of several named tensors, these are the names of the tensors.
    """
    columns = source.preprocessing.get("columns", ())
    if columns:
        return [name for column in columns for name in _columns_of(column)]
    inputs = source.train.form.inputs
    return list(map(str, inputs)) if isinstance(inputs, Mapping) else []


def _columns_of(column: Mapping[str, Any]) -> list[str]:
    name, categories = str(column["name"]), column.get("categories")
    return [name] if categories is None else [f"{name} = {category}" for category in categories]


def _listed(names: Sequence[str], limit: int = 3000) -> str:
    """The names as a text that fits into a message: if there are very many, the first ones and a digest of all."""
    text = ", ".join(names)
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
    return text if len(text) <= limit else f"{text[: limit - 100]}... ({len(names)} in all, SHA-256 {digest})"


def _remotely(config: RunConfig) -> RunConfig:
    """The configuration as both sides use it: models unchanged, even if another form were faster on one machine."""
    if config.traits.central:
        raise ConfigError(
            f"{config.algorithm} trains one model on the pooled data, so it has no remote clients; choose another "
            "algorithm"
        )
    if config.attack:
        raise ConfigError(
            f"attack = {', '.join(config.attack)} simulates hostile clients and has no place in a deployment; leave it "
            "out, or use `cutlayer run`"
        )
    if config.trace is not None:
        raise ConfigError(
            f"trace = {config.trace!r} is for simulations: clients on other machines have links of their own; leave it "
            "out, or use `cutlayer run`"
        )
    if config.snapshot_every is not None:
        raise ConfigError(
            f"snapshot_every = {config.snapshot_every} has no effect on clients on other machines: their models stay "
            "with them; leave it out"
        )
    return config.model_copy(update={"engine": "local"})


def _check_kept(p: Prepared) -> None:
    """Raises ConfigError if clients would keep a whole model while the server holds blocks for them."""
    if p.clients.cuts and p.config.share_server_model:
        raise ConfigError(
            "share_server_model = True is not possible where clients have different cuts: name one cut for all, or "
            "leave it out"
        )


def _outputs(p: Prepared) -> Crossing:
    """The form of the model's output for a row."""
    with torch.no_grad():
        probe = [part.eval() for part in p.split.all]
        rows = probe[0](p.example)
        for part in probe[1:]:
            rows = part(rows)
    first = as_tuple(rows)[0]
    return Crossing(tuple(first.shape[1:]), first.dtype)
