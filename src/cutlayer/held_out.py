"""The test rows and the frequency of evaluation: each client's own test rows, and evaluations that cost less than
training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch

from cutlayer import seeds
from cutlayer.algorithms import Algorithm
from cutlayer.data import Source
from cutlayer.data.samples import Samples
from cutlayer.errors import DataError
from cutlayer.options import RunConfig

_FREE, _FREE_FLOPS = 500_000, 20e9  # rows of all evaluations together, and their FLOPs, that are always acceptable
_SHARE = 0.2  # of training that evaluation may take by default
_TRAINING = 3  # forward passes that cost as much as a training step on a row
_AT_THE_END = 300_000  # rows of the last evaluation that are always acceptable
_FEWEST = 5  # clients' models, of those that are not all evaluated, if there can be some evaluations then
_POINTS = 4  # evaluations before the last one that are worth more than more models in each


def own_rows(
    config: RunConfig, source: Source, parts: list[np.ndarray], alone: int | None = None
) -> tuple[list[np.ndarray], Mapping[int, Samples], str]:
    """(each client's training rows, each client's own test rows, a line about them). If the data name the owners of
    test rows, and clients are owners, these are used; otherwise a share of the client's own rows. `alone`: all data,
    including their test rows, belong to this client.

    Raises DataError for a client with too few rows.
    """
    if config.evaluate_on == "global":
        return parts, {}, ""
    if alone is not None:
        if len(source.test):
            return parts, {alone: source.test}, ""
        rows, held = _held_out(config, source, alone, parts[alone], "add rows to its data, at least two in all")
        return [rows] * len(parts), {alone: held}, ""
    column, tested = source.client_column, source.test_clients
    if config.partition == "column" and column is not None and tested is not None:
        owners = np.unique(column.cpu().numpy())
        found = {k: source.test.share(torch.nonzero(tested == int(owner)).flatten()) for k, owner in enumerate(owners)}
        own = {k: samples for k, samples in found.items() if len(samples)}
        without = f"; {len(found) - len(own)} of {len(found)} have none" if len(own) < len(found) else ""
        if not own:
            raise DataError(
                "no client has test rows of its own: choose evaluate_on = global, or hold out more (test = 0.2)"
            )
        return parts, own, f"Each client's model is tested on its owner's test rows{without} (evaluate_on)"
    left, own = [], {}
    for k, rows in enumerate(parts):
        kept, own[k] = _held_out(config, source, k, rows, "use fewer clients")
        left.append(kept)
    total = sum(map(len, own.values()))
    done = f"Held out {config.own_test:.0%} of each client's rows for its own test, {total:,} in all (own_test)"
    return left, own, done


def _held_out(
    config: RunConfig, source: Source, client: int, rows: np.ndarray, remedy: str
) -> tuple[np.ndarray, Samples]:
    """The client's `rows` in two: those that it trains on, and its own test. Raises DataError."""
    share = config.own_test
    count = max(1, round(share * len(rows)))
    if len(rows) <= count:
        raise DataError(
            f"client {client} has {len(rows)} rows, too few to hold out {share:g} of them for its own test: {remedy}, "
            "or evaluate_on = global"
        )
    drawn = seeds.generator(config.seed, "own test rows", client).permutation(len(rows))
    at = np.sort(drawn[:count])
    held = source.train.share(torch.from_numpy(rows[at]).to(source.train.y.device))
    return np.delete(rows, at), held


class Pace(NamedTuple):
    """Rounds between evaluations, how many clients' models are judged in each and in the last one (None: all), and what
    was chosen, in a line.
    """

    every: int
    clients: int | None
    last: int | None
    remark: str = ""


def paced(
    config: RunConfig,
    algorithm: Algorithm,
    source: Source,
    sizes: list[int],
    rounds: int,
    per_epoch: int,
    flops: Callable[[], float],
) -> Pace:
    """How often and for how many clients' models a run is evaluated: as configured, or so that evaluation takes less
    than a fifth of the training. The last evaluation covers all clients' models, unless there are very many. The cost
    is counted in rows that pass through models, not in time, so it does not depend on the machine. `flops`: those of a
    row's forward pass.
    """
    every, clients = config.eval_every or per_epoch, config.eval_clients
    if config.eval_every is not None or config.evaluate_on == "own":
        return Pace(every, clients, clients)
    held_out = len(source.validation) + len(source.test)
    traits = algorithm.traits
    one_model = traits.models_cross or traits.gradients_cross or traits.central or len(sizes) == 1
    judged = 1 if one_model and config.judge != "ensemble" else min(clients or len(sizes), len(sizes))
    allowed = _SHARE * _TRAINING * trained_rows(config, algorithm, sizes, rounds)
    wanted = math.ceil(rounds / every) * judged * held_out
    if wanted > allowed:  # the size of the model only matters here
        allowed = max(allowed, min(_FREE, _FREE_FLOPS / max(1.0, flops())))
    if wanted <= allowed:
        return Pace(every, clients, clients)
    last = judged
    if judged * held_out > max(_AT_THE_END, allowed / 2):
        last = max(_FEWEST, int(max(_AT_THE_END, allowed / 2) / held_out))
    before = int(max(allowed - last * held_out, allowed / 2) / held_out)  # models judged before the last evaluation
    some, times = _shared_out(before, min(judged, last), math.ceil(rounds / every) - 1)
    every = max(every, math.ceil(rounds / (times + 1)))
    return Pace(every, some, last, _remark(some if rounds > every else 0, last, judged, len(sizes), every))


def _shared_out(models: int, most: int, times: int) -> tuple[int, int]:
    """(how many of `most` models each evaluation judges, how many evaluations there are, of `times`) if `models` can be
    judged in all of them together: a few models each, before there are fewer evaluations; then fewer models.
    """
    if most == 1 or models // max(1, times) >= min(_FEWEST, most):
        return min(most, max(1, models // max(1, times))), min(times, models)
    some = max(1, min(_FEWEST, most, models // _POINTS))
    return some, min(times, models // some)


def _remark(some: int, last: int, judged: int, clients: int, every: int) -> str:
    """The omissions, in a line."""
    asked = "(eval_clients, eval_every)"
    at_the_end = f"{last} of {clients} clients' models" if last < judged else f"all {judged} models"
    if not some:
        what = at_the_end if judged > 1 else "the model"
        return f"Evaluating {what} at the end only: more would take over a fifth of the training {asked}"
    often = "every round" if every == 1 else f"every {every} rounds"
    if judged == 1 or some == judged:
        return f"Evaluating the models {often}, so that it takes less than a fifth of the training {asked}"
    return (
        f"Evaluating {some} of {clients} clients' models {often}, so that it takes less than a fifth of the training, "
        f"and {at_the_end} at the end {asked}"
    )


def trained_rows(config: RunConfig, algorithm: Algorithm, sizes: list[int], rounds: int) -> float:
    """The approximate number of training rows in all rounds."""
    local_epochs, local_steps = algorithm.part_of_round
    each = local_steps * config.batch * len(sizes) if local_steps else (local_epochs or 1) * sum(sizes)
    return rounds * each * (1.0 if algorithm.traits.central else config.participation)
