"""An upper estimate of a run's memory before it begins, so that several runs at once are known to fit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from cutlayer.build import Training
from cutlayer.data.samples import Samples
from cutlayer.engine.choice import memory_limit
from cutlayer.engine.stackable import made_per_row
from cutlayer.engine.states import PER_MODEL, bytes_of_client, weight_bytes
from cutlayer.engine.states import room as room
from cutlayer.errors import ConfigError
from cutlayer.options import RunConfig
from cutlayer.text import format_bytes
from cutlayer.types import Rows

_PROCESS = {"cpu": 300_000_000, "cuda": 700_000_000}  # Python with torch; on the GPU, CUDA's own memory
_DATA = 3  # the read data, the converted data, and each client's part
_STEP = 3  # the forward pass's tensors, their gradients, and temporary memory of operations
_PASS = 12  # largest tensors of a forward pass in evaluation, measured: convolutions make copies of their inputs
_JUDGED = 2048  # rows of a pass in evaluation


def footprint(training: Training, config: RunConfig, jobs: int = 1) -> int:
    """The most bytes of the run, in its own process beside `jobs` - 1 others; with a GPU, the GPU's memory."""
    process = _PROCESS["cpu" if config.device == "cpu" else "cuda"]
    return (
        process
        + _DATA * _of_data(training)
        + PER_MODEL * _of_models(training, config)
        + _of_rows(training, config, jobs)
    )


def fitting(needs: Mapping[str, int], most: int, free: int | None) -> int:
    """How many runs certainly fit at once, at least 1 and at most `most`. `needs` are the bytes of each run."""
    largest = sorted(needs.values(), reverse=True)
    if free is None:
        return most
    return max([1, *(n for n in range(2, most + 1) if sum(largest[:n]) <= free)])


def refuse_unless_fitting(needs: Mapping[str, int], jobs: int, free: int | None) -> None:
    """Raises ConfigError if `jobs` runs at once may not fit. A single run is always tried."""
    jobs = min(jobs, len(needs))
    fit = fitting(needs, jobs, free)
    if free is None or fit >= jobs:
        return
    name = max(needs, key=lambda n: needs[n])
    together = sum(sorted(needs.values(), reverse=True)[:jobs])
    raise ConfigError(
        f"jobs = {jobs} may need more memory than is free: {format_bytes(together)} for {jobs} runs at once (at most "
        f"{format_bytes(needs[name])} for {name}), where {format_bytes(free)} are free; use jobs = {fit}"
    )


def _of_data(training: Training) -> int:
    source = training.source
    splits = (source.train, source.validation, source.test, *training.own_tests.values())
    return sum(_bytes(split) for split in splits if split.in_memory)


def _bytes(samples: Samples) -> int:
    return sum(x.nbytes for x in samples.rows) + samples.y.nbytes


def _of_models(training: Training, config: RunConfig) -> int:
    """The weights of all clients that are in memory, of the server and of its copies; and a whole model, which copies
    are made of.
    """
    parts, traits = training.parts, training.algorithm.traits
    held = 1 if traits.central else config.clients
    if training.place is not None:
        held = max(1, round(config.participation * held))
    return sum(map(weight_bytes, parts.all)) + held * bytes_of_client(parts, traits)


def _of_rows(training: Training, config: RunConfig, jobs: int) -> int:
    """The memory of a training step of all participants, or of a pass of evaluation, whichever is more."""
    parts, rows = training.parts, training.example
    client, widest = made_per_row(parts.client, rows)
    crossing = _forward(parts.client, rows)
    above = [made_per_row(parts.server, crossing)]
    if parts.tail is not None:
        above.append(made_per_row(parts.tail, _forward(parts.server, crossing)))
    alone = training.algorithm.traits.central or training.algorithm.traits.takes_turns
    batch = config.batch * (1 if alone else max(1, round(config.participation * config.clients)))
    below = batch * client
    if training.engine == "stacked":  # runs forward passes twice if they would take more
        below = min(below, round(memory_limit(config, jobs)))
    step = _STEP * (below + batch * sum(made for made, _ in above))
    judged = min(_JUDGED, max(map(len, (training.source.test, training.source.validation)), default=0))
    return max(step, _PASS * judged * max([widest, *(w for _, w in above)]))


def _forward(part: nn.Module, rows: Rows) -> Rows:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        given: Rows = part(rows)
    return given
