"""Checks of the model, the cut and the batch size, before anything is trained or written.

Every check raises ConfigError or CutError with the value, the reason and the remedy.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from cutlayer import defences, plugins, seeds
from cutlayer.algorithms import Algorithm, traits_of
from cutlayer.averagings import Averaging
from cutlayer.cohort import draw_participants
from cutlayer.copies import deep_copy
from cutlayer.data.samples import Samples, Source, called
from cutlayer.data.sampling import proportional, starved
from cutlayer.engine.stackable import close, drawing, exact, jittered
from cutlayer.errors import ConfigError, CutError, CutlayerWarning
from cutlayer.frozen import replica, trains
from cutlayer.models import Parts
from cutlayer.models.parts import one_line
from cutlayer.options import RunConfig
from cutlayer.tasks import Task
from cutlayer.types import Rows, as_tuple
from cutlayer.verbs import AVERAGE, LEARN

_SEEN = 256  # rows that are checked if not all are in memory
_LARGEST_RATE = 30  # as a power of ten: larger rates overflow float32 at the first step


def as_the_model_takes(model: nn.Module, source: Source, dtype: torch.dtype) -> Source:
    """Whole numbers unchanged if the model takes them (it embeds tokens), and as real numbers otherwise. Raises
    ConfigError for tokens without a row in the model's embedding.
    """
    if all(x.is_floating_point() for x in source.train.form.rows):
        return source
    seen = source.train if source.train.in_memory else source.train[:_SEEN]
    whole = [x for x in seen.rows if not x.is_floating_point()]
    few = source.train[:2]
    if _refusal(model, few):
        changed = source.real(dtype)
        return source if _refusal(model, changed.train[:2]) else changed  # neither fits: `check_output` says why
    for x in whole:
        row = x.reshape(len(x), -1).amax(1).argmax()
        if reason := _refusal(model, seen[torch.stack([row, row])]):
            raise ConfigError(
                f"the model does not take the inputs of row {int(row)} (from 0), which go up to {int(x[row].max())}: "
                f"{reason}; give it a larger vocabulary"
            )
    return source


def check_text(model: nn.Module, source: Source, task: Task) -> None:
    """Check that rows of tokens fit the model's context, its padding and the task. Raises ConfigError."""
    about = source.preprocessing
    if about.get("kind") != "text":
        return
    if getattr(task, "next_token", False):
        raise ConfigError(
            "next_token = True would predict the token after the next one: the targets of text already are the tokens "
            "that follow; leave it out"
        )
    config, length = getattr(model, "config", None), source.train.form.rows[0].shape[1]
    context = getattr(config, "max_position_embeddings", None)
    if isinstance(context, int) and length > context:
        raise ConfigError(
            f"sequence_length = {length} is more than the {context} tokens that the model can process: lower it"
        )
    padding = getattr(config, "pad_token_id", None)
    if task.targets != "classes" and padding is not None and padding != about["padding"]:
        raise ConfigError(
            f"the model takes token {padding} for padding, but the tokenizer takes token {about['padding']}: name the "
            "same pad_token in both folders, since a classifier reads the last token before the padding"
        )


def _refusal(model: nn.Module, few: Samples) -> str:
    """Why the model does not take these inputs; empty if it does."""
    probe = replica(model).eval()
    try:
        with torch.no_grad():
            called(probe, few.inputs)
    except Exception as error:  # the user's module: anything can come out
        return one_line(error)
    return ""


def given_for(model: nn.Module, samples: Samples) -> torch.Tensor:
    """The model's first output for a few samples, in evaluation mode: [n, ...]. Raises ConfigError."""
    probe, shapes = replica(model).eval(), [tuple(x.shape[1:]) for x in samples.rows]
    what = shapes[0] if len(shapes) == 1 else shapes
    try:
        with torch.no_grad(), _sentences("the model does not take these inputs", what):
            given = called(probe, samples.inputs)
    finally:
        del probe
    readable = isinstance(given, torch.Tensor | Sequence | Mapping) or hasattr(given, "logits")
    first = as_tuple(given)[:1] if readable else ()
    if not first or first[0].dim() == 0 or len(first[0]) != len(samples):
        shape = tuple(first[0].shape) if first else type(given).__name__
        raise ConfigError(
            f"the model turns {len(samples)} samples into {shape}, not into [{len(samples)}, ...]: return one row per "
            "sample"
        )
    if not first[0].is_floating_point():
        raise ConfigError(f"the model gives {first[0].dtype}, which has no gradients: return real numbers")
    return first[0]


def check_output(outputs: torch.Tensor, samples: Samples, task: Task, names: Sequence[str]) -> None:
    """Check that the model's outputs fit the task and the targets; `names` are those of the classes. Raises
    ConfigError; warns of a softmax at the end.
    """
    with torch.no_grad():
        task.check_outputs(outputs, samples.y, names)
    _warn_of_probabilities(outputs, task)


def _warn_of_probabilities(outputs: torch.Tensor, task: Task) -> None:
    """Warn of a model that ends in softmax or sigmoid, which learns badly from losses that expect raw scores."""
    if not task.wants_scores:
        return
    within = bool(((outputs >= 0) & (outputs <= 1)).all())
    if (
        within
        and outputs.dim() > 1
        and outputs.shape[1] > 1
        and torch.allclose(outputs.sum(1), torch.ones_like(outputs.sum(1)), atol=1e-4)
    ):
        warnings.warn(
            CutlayerWarning(
                "the model's outputs are probabilities that add up to 1, but the loss takes raw scores: leave out the "
                "softmax at its end"
            ),
            stacklevel=2,
        )


@contextmanager
def _sentences(what: str, value: object) -> Iterator[None]:
    """Turn any error of a user's module into one sentence."""
    try:
        yield
    except Exception as error:  # the user's module: anything can come out
        reason = one_line(error)
        raise ConfigError(f"{what} (shape per sample {value}): {reason}; choose a model that fits the data") from None


def check_adjustable(config: RunConfig, task: Task, targets: torch.Tensor, given: Sequence[int]) -> None:
    """Check that logits can be adjusted: every row has one class; `given` is the shape of a row's outputs. Raises
    ConfigError.
    """
    if len(given) != 1 or task.occurrences(targets[:0], given[0]) is None:
        raise ConfigError(
            f"logit_adjust = {config.logit_adjust!r} needs one class per row, which the targets of the task "
            f"{plugins.label(config.task)!r} are not: leave it out, or choose the task classification"
        )


def check_start(config: RunConfig, algorithm: Algorithm) -> None:
    """Check that clients that all take the same steps start equal. Raises ConfigError."""
    if algorithm.traits.gradients_cross and config.start != "equal":
        raise ConfigError(
            f"start = {config.start!r} is not possible with {config.algorithm}, whose clients all step with one sum of "
            "gradients: choose equal"
        )


def check_head(head: nn.Module, what: str, smashed: Rows, given: torch.Tensor) -> None:
    """Check that an auxiliary head takes smashed data and returns scores of the model's shape `given`. `what` is its
    name in a sentence. Raises ConfigError.
    """
    shapes = ", ".join(str(tuple(r.shape[1:])) for r in smashed)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            rows = as_tuple(deep_copy(head).eval()(tuple(r.clone() for r in smashed)))
    except Exception as error:  # the user's module: anything can come out
        raise ConfigError(
            f"{what} does not take smashed data of shape {shapes} ({one_line(error)}): make one that does, or cut "
            "elsewhere"
        ) from None
    shape = tuple(rows[0].shape) if rows else None
    if shape != (expected := (len(smashed[0]), *given.shape[1:])):
        raise ConfigError(
            f"{what} gives {shape or 'no tensor'} for smashed data of shape {shapes}, but the model {expected}: "
            "make one that gives scores as the model does"
        )
    if not any(True for _ in head.parameters()):
        raise ConfigError(
            f"{what} has no parameters, so it cannot learn to predict the server's gradients: add a layer"
        )


def check_parts(config: RunConfig, algorithm: Algorithm, split: Parts, cuts: tuple[str, ...]) -> None:
    """Check that both sides have something on which the algorithm can act. Raises CutError."""
    facts = algorithm.entry.facts
    for part, reason, side in (
        (split.client, facts["client_part"], "client"),
        (split.server, facts["server_part"], "server"),
    ):
        if reason and any(True for _ in part.parameters()) and not trains(part):
            raise CutError(
                f"{config.algorithm} cannot work with a frozen {side} part: {reason}, but nothing of it is trained; "
                f"freeze less of it, or choose {_modest()}"
            )
        if reason and not any(True for _ in part.parameters()):
            where = "later" if side == "client" else "earlier"
            raise CutError(
                f"{config.algorithm} cannot work with cut = {cuts[0]!r}: {reason}, but the {side} part has no "
                f"parameters; cut {where}, or choose an algorithm that does not need them, such as {_modest()}"
            )


def _modest() -> str:
    """The simplest algorithm that trains with parameters on only one side: the one with the fewest options."""
    entries = plugins.index("algorithm").values()
    modest = [e for e in entries if not (e.facts["client_part"] or e.facts["server_part"])]
    split = [e for e in modest if traits_of(e).split and not traits_of(e).u_shaped]
    return min(split, key=lambda e: len(e.options)).name


def check_trained(config: RunConfig, model: nn.Module) -> None:
    """Check that something is left to train. Raises ConfigError."""
    if any(True for _ in model.parameters()) and not trains(model):
        what = f"freeze = {config.freeze!r}" if config.freeze else "the model, all of whose parameters are frozen,"
        raise ConfigError(f"{what} leaves nothing to train: freeze less")


def check_averaged(algorithm: Algorithm, rule: Averaging, model: nn.Module) -> None:
    """Check that the averaging rule has an effect on the trained parameters. Raises ConfigError."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    if (AVERAGE in algorithm.traits.needs) and (why := rule.obstacle(names)):
        raise ConfigError(
            f"averaging = {rule.entry.name!r} has no effect, since {why}: give lora_rank, or choose another rule, such "
            "as mean"
        )


def check_cacheable(config: RunConfig, algorithm: Algorithm, split: Parts, rows: Rows, *, anew: bool) -> None:
    """Check that rows that the server keeps (`cache_features`) are the same in every epoch; items that are read `anew`
    may differ. Raises ConfigError.
    """
    if config.cache_features and config.sampling != "fixed":
        raise ConfigError(
            f"cache_features is not possible with sampling = {config.sampling!r}, whose batches are not the same in "
            "every epoch: choose fixed, or leave cache_features out"
        )
    if config.cache_features and anew:
        raise ConfigError(
            "cache_features is not possible: items are read again for each batch, perhaps with random transforms; "
            "pass data_in_memory = 'always'"
        )
    if config.cache_features and (why := _changing(config, algorithm, split, rows)):
        raise ConfigError(f"cache_features is not possible: {why}")


def _changing(config: RunConfig, algorithm: Algorithm, split: Parts, rows: Rows) -> str:
    """Why smashed data of a row change, and the remedy; empty if they do not change."""
    if trains(split.client):
        return "the clients' part is trained; freeze it, e.g. with freeze, or cut earlier"
    if algorithm.traits.asynchronous:
        return f"the clients of {config.algorithm} work at their own pace; choose {_modest()}"
    if algorithm.traits.u_shaped or LEARN in algorithm.traits.needs:
        return f"the clients of {config.algorithm} train on the batch themselves; choose {_modest()}"
    if defences.of(config).active:
        return "defences change smashed data anew in every step; leave them out"
    if config.client_device is not None:
        return "the virtual clock assumes a forward pass in every step; leave client_device out"
    twin = exact(split.client).train()
    before = {name: b.clone() for name, b in twin.named_buffers()}
    wide = jittered(rows)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), drawing(rows[0].device) as drew:
        together = as_tuple(twin(wide))
    if drew:
        return "the clients' part draws random numbers (dropout); cut before it, or leave it out"
    if any(not torch.equal(b, before[name]) for name, b in twin.named_buffers()):
        return "the clients' part keeps running statistics (batch normalisation); cut before it"
    with torch.no_grad():
        apart = [as_tuple(twin(tuple(r[i : i + 1] for r in wide))) for i in range(len(wide[0]))]
    alone = [torch.cat(parts) for parts in zip(*apart, strict=True)]
    if not close(list(zip(together, alone, strict=True))):
        return "rows influence each other in the clients' part; cut before that"
    return ""


def check_starved(config: RunConfig, sizes: list[int]) -> None:
    """Warns if a client's proportional share of a step is less than one row. Raises ConfigError if clients do not step
    together.
    """
    if config.sampling != "fixed" and config.traits.asynchronous:
        raise ConfigError(
            f"sampling = {config.sampling!r} deals the rows of common steps, but the clients of {config.algorithm} "
            "work at their own pace: choose fixed"
        )
    if config.sampling == "proportional" and (few := starved(sizes, config.batch)):
        warnings.warn(
            CutlayerWarning(
                f"sampling = 'proportional' leaves client {few[0]} ({sizes[few[0]]} of {sum(sizes)} samples) less than "
                f"one row of a step's {len(sizes) * config.batch}, so it brings one row and finishes earlier: choose a "
                "larger batch, or sampling = global"
            ),
            stacklevel=3,
        )


def check_single_rows(
    config: RunConfig, algorithm: Algorithm, split: Parts, sizes: list[int], rounds: int, example: Rows
) -> None:
    """Check that batch normalisation over features never gets a single row, on which it cannot train. Raises
    ConfigError.
    """
    alone = _with_single_rows(config, sizes)
    if not alone:
        return
    probe = deep_copy(split)
    for part in probe.all:
        part.train()
    client = alone[0]
    try:
        with seeds.torch_seeded(config.seed, "probe"):
            rows = probe.client(tuple(x[:1] for x in example))
            if probe.tail is not None:
                probe.tail(probe.server(rows))
            elif algorithm.traits.server_sees_one_client:
                probe.server(rows)
            elif (lonely := _alone_in_union(config, algorithm, sizes, alone, rounds)) is not None:
                client = lonely
                probe.server(rows)
    except ValueError as error:
        raise ConfigError(
            f"batch = {config.batch} leaves client {client} ({sizes[client]} samples) a batch of one sample, "
            f"with which this model cannot train ({error}): choose another batch"
            f"{'' if config.sampling == 'fixed' else ', or sampling = fixed'}"
        ) from None


def _with_single_rows(config: RunConfig, sizes: list[int]) -> list[int]:
    """The clients that may have a batch of one row."""
    if config.sampling == "global":
        return list(range(len(sizes)))
    batches = [config.batch] * len(sizes)
    if config.sampling == "proportional":
        batches = proportional(sizes, config.batch).tolist()
    return [k for k, (n, b) in enumerate(zip(sizes, batches, strict=True)) if n % b == 1 or b == 1]


def _alone_in_union(
    config: RunConfig, algorithm: Algorithm, sizes: list[int], alone: list[int], rounds: int
) -> int | None:
    """A client whose single row is in some step the only one that the server receives; None if there is none."""
    if algorithm.traits.whole:
        return None
    _, local_steps = algorithm.part_of_round
    if config.trace is not None:  # any reachable client may be the only one
        return alone[0]
    for index in range(rounds if config.participation < 1 else 1):
        here = draw_participants(config.seed, index, len(sizes), config.participation)
        if config.sampling == "global":
            if sum(sizes[k] for k in here) % (len(here) * config.batch) == 1:
                return here[0]
            continue
        share = proportional(sizes, config.batch).tolist() if config.sampling == "proportional" else None
        batches = {k: math.ceil(sizes[k] / (share[k] if share else config.batch)) for k in here}
        if local_steps:
            batches = dict.fromkeys(here, local_steps)
        longest = [k for k in here if batches[k] == max(batches.values())]
        if len(longest) == 1 and longest[0] in alone:
            return longest[0]
    return None


def check_rate(config: RunConfig, algorithm: Algorithm) -> None:
    """Check that the server's rate stays finite. Raises ConfigError."""
    base, (option, powers) = config.server_lr or config.client_lr, algorithm.rate_growth(config.clients)
    if powers and math.log10(base) + powers > _LARGEST_RATE:
        raise ConfigError(
            f"{option} makes the server's rate {base:g} x 10^{powers:.4g} with {config.clients} clients, more than "
            f"1e{_LARGEST_RATE}: choose a smaller value, such as 1"
        )
