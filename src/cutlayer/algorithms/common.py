"""Small things that several algorithms share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from cutlayer import seeds
from cutlayer.cohort import Cohort
from cutlayer.options import RunConfig
from cutlayer.server import ServerStep
from cutlayer.types import Round, Smashed, Step


def sample_weights(clients: Cohort, who: Iterable[int]) -> dict[int, int]:
    """FedAvg's weights: n_k for each client of `who` (averaging divides by their sum)."""
    samples = clients.samples
    return {k: samples[k] for k in sorted(who)}


def visits(options: RunConfig, this: Round) -> Iterator[int]:
    """Sequential learning: whose turn each step of the round is.

    `hand_over="epoch"`: a client does all its batches, then the next. `"batch"`: one batch each in turn; clients with
    fewer batches drop out of the later turns.
    """
    batches = dict(zip(this.clients, this.batches, strict=True))
    order = list(this.clients)
    if options.visit_order == "random":
        seeds.generator(this.seed, "visits", this.index).shuffle(order)
    if options.hand_over == "epoch":
        yield from (k for k in order for _ in range(batches[k]))
    else:
        yield from (k for turn in range(this.steps) for k in order if turn < batches[k])


def report(step: ServerStep, smashed: Smashed, active: tuple[int, ...] = ()) -> Step:
    """The record of one server step."""
    return Step(step.means, smashed.clients, len(smashed), active, step.lr)
