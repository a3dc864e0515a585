"""What a run is judged on and how often: each client's own test rows, and evaluations that do not dwarf training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch

from cutlayer import seeds
from cutlayer.algorithms import Algorithm
from cutlayer.data import Source
from cutlayer.data.samples import Samples
from cutlayer.errors import DataError
from cutlayer.options import RunConfig
from cutlayer.verbs import AVERAGE, HAND_OVER

_FREE = 500_000  # rows of all evaluations together that are never too many
_SHARE = 0.2  # of training that evaluation may take, unasked
_TRAINING = 3  # forward passes that a training step on a row is worth
_LEAST = 5  # clients' models, of those that are not all evaluated


def own_rows(
    config: RunConfig, source: Source, parts: list[np.ndarray]
) -> tuple[list[np.ndarray], Mapping[int, Samples], str]:
    """(the rows that each client trains on, each client's own test rows, what was done, in a line). Where the data say
    whose the test rows are, and a client is an owner, they are the owner's; else a share of the client's own rows.

    Raises DataError for a client with too few rows.
    """
    if config.evaluate_on == "global":
        return parts, {}, ""
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
    left, own, share = [], {}, config.own_test
    for k, rows in enumerate(parts):
        count = max(1, round(share * len(rows)))
        if len(rows) <= count:
            raise DataError(
                f"client {k} has {len(rows)} rows, too few to hold out {share:g} of them for its own test: use fewer "
                "clients, or evaluate_on = global"
            )
        drawn = seeds.generator(config.seed, "own test rows", k).permutation(len(rows))
        at = np.sort(drawn[:count])
        own[k] = source.train.share(torch.from_numpy(rows[at]).to(source.train.y.device))
        left.append(np.delete(rows, at))
    total = sum(map(len, own.values()))
    return left, own, f"Held out {share:.0%} of each client's rows for its own test, {total:,} in all (own_test)"


class Pace(NamedTuple):
    """Rounds between evaluations, how many clients' models are judged (None: all), and what was chosen, in a line."""

    every: int
    clients: int | None
    remark: str = ""


def paced(
    config: RunConfig, algorithm: Algorithm, source: Source, sizes: list[int], rounds: int, per_epoch: int
) -> Pace:
    """How often and on how many clients' models a run is evaluated: as asked for, or so that evaluation takes less than
    a fifth of the training. That is judged by rows that pass through models, not by a clock, so that it does not
    depend on the machine.
    """
    every, clients = config.eval_every or per_epoch, config.eval_clients
    if config.eval_every is not None or config.evaluate_on == "own":
        return Pace(every, clients)
    held_out = len(source.validation) + len(source.test)
    one_model = bool({AVERAGE, HAND_OVER} & algorithm.traits.needs) or algorithm.traits.central or len(sizes) == 1
    judged = 1 if one_model and config.judge != "ensemble" else min(clients or len(sizes), len(sizes))
    allowed = max(_FREE, _SHARE * _TRAINING * _trained(config, algorithm, sizes, rounds))
    evaluations = math.ceil(rounds / every)
    if evaluations * judged * held_out <= allowed:
        return Pace(every, clients)
    if clients is None and judged > _LEAST:
        judged = clients = max(_LEAST, int(allowed / (evaluations * held_out)))
    if evaluations * judged * held_out > allowed:
        most = max(1, int(allowed / (judged * held_out)))
        every = min(rounds, math.ceil(rounds / most))
    whose = f"{clients} of {len(sizes)} clients' models" if clients and clients < len(sizes) else "the models"
    often = "every round" if every == 1 else f"every {every} rounds"
    return Pace(
        every,
        clients,
        f"Evaluating {whose} {often}, so that it takes less than a fifth of the training (eval_clients, eval_every)",
    )


def _trained(config: RunConfig, algorithm: Algorithm, sizes: list[int], rounds: int) -> float:
    """Rows that are trained on in all rounds, about."""
    local_epochs, local_steps = algorithm.part_of_round
    each = local_steps * config.batch * len(sizes) if local_steps else (local_epochs or 1) * sum(sizes)
    return rounds * each * (1.0 if algorithm.traits.central else config.participation)
