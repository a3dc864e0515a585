"""The subject of an examination: one client of a trained run, as its smashed data show it to the server.

Shape legend: n private training samples of the client, N auxiliary samples, s... one sample's smashed data.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cutlayer import checkpoint, defences, seeds
from cutlayer.build import Training, assemble, deal
from cutlayer.data.samples import Inputs, Samples, Source, each
from cutlayer.data.sampling import per_epoch as steps_per_epoch
from cutlayer.defences import dp
from cutlayer.defences.noise import Noise
from cutlayer.defences.pipeline import Defences
from cutlayer.errors import ConfigError, DataError, RunFolderError
from cutlayer.files import read_records
from cutlayer.folder import CHECKPOINT, EVALUATIONS, SNAPSHOTS, stored_config
from cutlayer.leakage.inputs import Client, smash
from cutlayer.leakage.recovery import counting_places
from cutlayer.leakage.seen import Seen, Words
from cutlayer.models.parts import load_own
from cutlayer.options import RunConfig
from cutlayer.plugins import label
from cutlayer.run import RunState, Snapshot, fingerprint, without_own
from cutlayer.stored import checked, reading
from cutlayer.types import Rows, as_tuple
from cutlayer.wire import Codec
from cutlayer.wire.coding import written

Sending = Callable[[Inputs], Tensor]
"""A client part as a function: inputs [R, ...] to smashed data [R, s...]."""

_AUXILIARY = 1000


@dataclass(frozen=True)
class Moment:
    """A run after `rounds` rounds: its configuration, its parts, the models of its clients, the value of its leading
    metric on the test samples at the last evaluation so far (None: there was none).
    """

    out: Path
    config: RunConfig
    training: Training
    rounds: int
    score: float | None
    models: dict[int, dict[str, Tensor]]
    server: nn.Module | None

    @property
    def accuracy(self) -> float | None:
        """The score in [0, 1], where it is an accuracy."""
        return self.score if self.training.task.leading == "accuracy" else None

    @property
    def classes(self) -> bool:
        """Whether each sample's label is one class, so that labels can be distinguished."""
        return self.training.task.targets == "class"

    @property
    def tokens(self) -> bool:
        """Whether inputs are tokens, which are recovered or not, and have no squared error."""
        return not self.training.source.train.form.rows[0].is_floating_point()

    @property
    def vocabulary(self) -> int:
        """The number of tokens: those that a language model scores, or that the data have."""
        source, task = self.training.source, self.training.task
        most = max(int(part.rows[0].max()) for part in (source.train, source.validation, source.test) if len(part)) + 1
        return max(most, self.training.making.outputs) if task.targets == "classes" else most

    @property
    def task_title(self) -> str:
        """The kind of targets, as a clause that says why measures about classes are missing."""
        what = {"class": "one class per sample", "classes": "several classes per sample", "numbers": "numbers"}
        return f"the targets of the task {label(self.config.task)!r} are {what[self.training.task.targets]}"

    def model_of(self, client: int) -> dict[str, Tensor]:
        """The model that sees this client's data: its own, or the travelling one."""
        return self.models[client] if client in self.models else next(iter(self.models.values()))


@dataclass(frozen=True)
class Subject:
    """One client at one moment.

    It owns `owned` samples; `samples` are n of these, `z` [n, s...] their smashed data as they are sent. `client` makes
    smashed data of any inputs, as the client would send them, `bare` without noise and quantisation; `defence` is what
    lies between. `begun` and `begun_bare` are the same with the weights that the run began with.
    `auxiliary` are N samples that no client has. `server` goes from smashed data to the model's outputs (None where it
    has no such part). `fresh` is the client's part with new weights, which takes inputs to smashed data: a guess at the
    architecture.
    """

    moment: Moment
    name: int
    owned: int
    samples: Samples
    z: Tensor
    client: Sending
    bare: Sending
    defence: Client
    begun: Sending
    begun_bare: Sending
    auxiliary: Samples
    server: nn.Module | None
    fresh: nn.Module

    @property
    def statement(self) -> dp.Statement | None:
        """The guarantee of its noise over all epochs (None: it adds no noise)."""
        noise = defences.of(self.moment.config).get(Noise)
        if noise is None or noise.clip is None or not noise.scale:
            return None
        mechanism = dp.laplace if noise.laplace_noise else dp.gaussian
        return mechanism(noise.scale, noise.clip, self.releases, labels=self.labelled)

    def seen(self, *, begun: bool, seed: int) -> Seen:
        """What an attacker on tokens has who knows the client part, or (`begun`) the one that the run began with."""
        form, client, bare = self.samples.inputs, self.client, self.bare
        if begun:
            client, bare = self.begun, self.begun_bare
        words = Words.of(self.auxiliary.inputs)
        return Seen(
            z=self.z,
            mask=Words.of(form).mask,
            auxiliary=words,
            learnt=self.counting(self.auxiliary),
            client=lambda words: client(words.given(form)),
            bare=lambda words: bare(words.given(form)),
            vocabulary=self.moment.vocabulary,
            seed=seed,
        )

    def counting(self, samples: Samples) -> Tensor:
        """Which places of tokens are not padding: [n, T] of bool."""
        training = self.moment.training
        padding = training.source.preprocessing.get("padding")
        return counting_places(samples, training.task, None if padding is None else int(padding))

    @property
    def labelled(self) -> bool:
        """Whether labels go up with the smashed data."""
        return self.moment.training.parts.tail is None

    @property
    def releases(self) -> int:
        """How often each sample has been sent, at most: once per pass through the client's data, the last one counted
        whole, as if the client had taken part in every round.
        """
        config, training = self.moment.config, self.moment.training
        per_epoch = math.ceil(self.owned / config.batch)
        if config.sampling != "fixed":
            per_epoch = steps_per_epoch(training.clients.samples, config.batch)
        local_epochs, local_steps = training.algorithm.part_of_round
        per_round = local_steps or per_epoch * local_epochs
        return math.ceil(self.moment.rounds * per_round / per_epoch)


def moments(out: Path, snapshots: bool = False) -> list[Moment]:
    """A run at its last checkpoint; with `snapshots`, at each of these before.

    Raises RunFolderError if there are no client models to examine; ConfigError if its algorithm never sends smashed
    data; DataError if inputs are neither one tensor of real numbers per sample nor tokens.
    """
    config = RunConfig.of(without_own(stored_config(out), out, model=None, data=None, loss=None))
    if config.traits.whole:
        what = "everybody's data" if config.traits.central else "whole models (gradient inversion attacks these)"
        raise ConfigError(
            f"{str(out)!r} is a run of {config.algorithm}, whose clients send no smashed data but {what}: name runs of "
            "split algorithms"
        )
    if not (out / CHECKPOINT).exists():
        raise RunFolderError(f"{str(out)!r} has no stored client models: let the run reach its first checkpoint")
    with reading(out / CHECKPOINT):
        state = checked(checkpoint.read(out / CHECKPOINT), RunState)
    if state.fingerprint.get("engine") == "remote":
        raise RunFolderError(
            f"{str(out)!r} has no stored client models, since they stay with the clients: train the same configuration "
            "with `cutlayer run` to examine it"
        )
    training = assemble(config)
    if training.depths is not None and training.depths.mixed:
        raise ConfigError(
            f"{str(out)!r} is a run whose clients have different cuts ({', '.join(training.depths.each)}): each would "
            "be attacked at another place; name runs with one cut for all"
        )
    ours, theirs = fingerprint(training), state.fingerprint
    if ours["data set"] != theirs.get("data set") or ours["model"] != theirs.get("model"):
        raise RunFolderError(
            f"{str(out)!r} was trained on other data, or with another model, than its configuration names now: put "
            "back what it was trained with"
        )
    _check_inputs(out, training.source.train.form)
    evaluations = list(read_records(out / EVALUATIONS))
    found = []
    paths = sorted((out / SNAPSHOTS).glob("round-*.safetensors")) if snapshots else []
    if snapshots and not paths:
        raise RunFolderError(f"{str(out)!r} has no snapshots: train it with snapshot_every = N")
    for path in paths:
        with reading(path):
            snapshot = checked(checkpoint.read(path), Snapshot)
        if snapshot.rounds < state.rounds:
            models = {int(k): dict(model) for k, model in snapshot.models.items()}
            found.append(_moment(out, config, training, snapshot.rounds, evaluations, models, None))
    with reading(out / CHECKPOINT):
        training.clients.load(state.clients)
        training.server.load(state.server)
    holder = training.clients.holder
    whose = range(config.clients) if holder is None else [holder]
    models = {k: dict(training.clients.model_state(k)) for k in whose}
    found.append(_moment(out, config, training, state.rounds, evaluations, models, training.server.model))
    return found


def _check_inputs(out: Path, samples: Samples) -> None:
    """Check that inputs are one tensor of real numbers per sample, or tokens. Raises DataError."""
    first, *others = samples.rows
    if not first.is_floating_point() and first.dim() == 2 and _is_mask(samples.inputs, others):
        return
    if others:
        raise DataError(
            f"{str(out)!r} has {1 + len(others)} tensors of inputs per sample: what leaks is measured for one tensor "
            "of real numbers, or for tokens with an attention mask; name runs with such data"
        )
    if not first.is_floating_point():
        kind, shape = str(first.dtype).removeprefix("torch."), tuple(first.shape[1:])
        raise DataError(
            f"{str(out)!r} has inputs of type {kind} and shape {shape}: whole numbers are read as tokens, of which a "
            "sample is one row; name runs whose inputs are real numbers, or rows of tokens"
        )


def _is_mask(inputs: Inputs, others: Sequence[Tensor]) -> bool:
    """Whether the only other tensor besides the first is one mask of its shape."""
    if not others:
        return True
    named = not isinstance(inputs, Mapping) or "mask" in list(inputs)[1]
    return named and len(others) == 1 and others[0].dim() == 2 and not others[0].is_floating_point()


def _moment(
    out: Path,
    config: RunConfig,
    training: Training,
    rounds: int,
    evaluations: Sequence[dict[str, Any]],
    models: dict[int, dict[str, Tensor]],
    server: nn.Module | None,
) -> Moment:
    until = [e["test_score"] for e in evaluations if e["round"] <= rounds]
    return Moment(out, config, training, rounds, until[-1] if until else None, models, server)


def subjects(moment: Moment, clients: int, samples: int, auxiliary: int | None, seed: int) -> Iterator[Subject]:
    """Up to `clients` of the moment's clients, each with up to `samples` of its private samples; all attacked with the
    same `auxiliary` samples, drawn from the held-out ones (None: up to 1000).

    Raises DataError if fewer are held out.
    """
    config = moment.config
    source = moment.training.source
    held = len(source.validation) + len(source.test)
    if auxiliary is None:
        auxiliary = min(_AUXILIARY, held)
    if auxiliary > held:
        raise DataError(
            f"auxiliary = {auxiliary}, but the run held out {held} samples that no client has: ask for fewer, or "
            "train with a larger test or validation set"
        )
    drawn = seeds.generator(seed, "leakage", "auxiliary").permutation(held)[:auxiliary]
    known = _held_out(source, torch.from_numpy(drawn))
    rows = deal(config, source)
    order = seeds.generator(seed, "leakage", "clients").permutation(config.clients).tolist()
    travels = moment.training.clients.holder is not None  # the one model sees the data of all clients
    chosen = sorted([k for k in order if travels or k in moment.models][:clients])
    server = _served(moment)
    for k in chosen:
        own = seeds.generator(seed, "leakage", "samples", k).permutation(rows[k])[:samples]
        private = source.train[torch.from_numpy(own).to(source.train.y.device)]
        yield _subject(moment, k, len(rows[k]), private, known, server, seed)


def _held_out(source: Source, rows: Tensor) -> Samples:
    """The rows with these numbers of validation and test set, counted on from one to the other."""
    device, validation = source.test.y.device, rows < len(source.validation)
    first = source.validation[rows[validation].to(device)]
    then = source.test[rows[~validation].to(device) - len(source.validation)]
    pairs = iter(list(zip(first.rows, then.rows, strict=True)))
    found = Samples(each(first.inputs, lambda _: torch.cat(next(pairs))), torch.cat([first.y, then.y]))
    at = torch.cat([torch.nonzero(validation)[:, 0], torch.nonzero(~validation)[:, 0]])
    return found[at.argsort().to(device)]


def _subject(
    moment: Moment, name: int, owned: int, private: Samples, known: Samples, server: nn.Module | None, seed: int
) -> Subject:
    config, parts = moment.config, moment.training.parts
    bare, begun, fresh = (_Lower(copy.deepcopy(parts.client)).eval() for _ in range(3))
    load_own(bare.part, moment.model_of(name))
    bare.requires_grad_(False)
    begun.requires_grad_(False)
    with seeds.torch_seeded(seed, "leakage", "fresh"):
        for module in fresh.modules():
            # asked of the class: what stands for a layer of another part answers with that layer's methods
            if callable(reset := getattr(type(module), "reset_parameters", None)):
                reset(module)
    defence = _Defended(defences.of(config), Codec.parse(config.up_codec).plain, config.batch)

    def client(x: Inputs) -> Tensor:
        return defence(bare(x))

    def earlier(x: Inputs) -> Tensor:
        return defence(begun(x))

    z = smash(client, private.inputs, seed, "private", name)
    return Subject(moment, name, owned, private, z, client, bare, defence, earlier, begun, known, server, fresh)


class _Defended:
    """A client's changes to smashed data [n, s...] before they are sent: its defences, and its codec, which writes a
    batch at a time. A gradient passes through the codec unchanged.
    """

    def __init__(self, defences: Defences, codec: Codec, batch: int) -> None:
        self.defences, self.codec, self.batch = defences, codec, batch

    def __call__(self, z: Tensor) -> Tensor:
        (sent,) = self.defences.fresh((z,))
        if not self.codec.lossy:
            return sent
        coded = torch.cat([written(self.codec, rows.detach())[0] for rows in sent.split(self.batch)])
        return sent + (coded - sent).detach()


class _Lower(nn.Module):
    """A client part that gives one tensor: the one that crosses, or all real ones of several, flattened."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Inputs) -> Tensor:
        real = [r for r in self.part(x) if r.is_floating_point()]
        return real[0] if len(real) == 1 else torch.cat([r.flatten(1) for r in real], 1)


class _Server(nn.Module):
    """A server part that takes the one tensor that crosses, and gives all outputs of the model."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, z: Tensor) -> Rows:
        return as_tuple(self.part((z,)))


def _served(moment: Moment) -> nn.Module | None:
    parts = moment.training.parts
    if moment.server is None or parts.tail is not None or len(parts.crossing) != 1:
        return None
    return _Server(copy.deepcopy(moment.server)).eval()
