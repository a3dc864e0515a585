"""Cyclical split learning: the server trains first and answers afterwards (arXiv 2511.18611).

One step:
    1. every client i, in parallel: s_i = f(w_ci, x_i); upload (s_i, y_i)
    2. server: pool and shuffle the rows of all; one epoch of mini-batches: w_s <- w_s - eta_s g_s for each
    3. server, frozen: the loss of every client's original batch; its gradient of s_i
    4. every client i: back-propagate what it received; w_ci <- w_ci - eta_c g_ci

cyclepsl    each client receives its own gradient, as in PSL
cyclesfl    the same, and client models are averaged every round, as in SFL
cyclesglr   the active clients receive one common gradient, as in SGLR

With one mini-batch of all rows, step 2 is the server step of PSL; the gradients of step 3 are still those of the new
server.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count

import torch

from cutlayer import seeds
from cutlayer.algorithms.common import LocalWork, Scaled, sample_weights
from cutlayer.algorithms.contract import algorithm
from cutlayer.algorithms.sglr import SplitAvg, SplitLr
from cutlayer.algorithms.splitfed import AVERAGES
from cutlayer.cohort import Cohort
from cutlayer.gradients import own
from cutlayer.plugins import option
from cutlayer.server import Server, ServerStep
from cutlayer.traffic import Epoch, Traffic
from cutlayer.types import Round, Smashed, Step, select
from cutlayer.verbs import AVERAGE, BACKWARD, FORWARD


class Cycle(Scaled):
    """Algorithms whose server trains an epoch of mini-batches before it answers."""

    server_batch: int = option(32, ge=1, shared=False)
    """Largest number of rows in a mini-batch of the server."""
    running_statistics: bool = option(True, shared=False)
    """Let the frozen server's batch normalisation use its running statistics. Otherwise it uses the statistics of all
    rows, as in the authors' code."""

    def cycle(self, server: Server, smashed: Smashed, this: Round, turn: int, factor: float = 1.0) -> ServerStep:
        """Steps 2 and 3: train at rate lr x schedule x `factor`, then the gradients of the frozen server."""
        self.train(server, smashed, this, turn, factor)
        step = server.gradients(smashed, running_statistics=self.running_statistics)
        return replace(step, lr=server.lr * server.lr_factor * factor)

    def train(self, server: Server, smashed: Smashed, this: Round, turn: int, factor: float) -> None:
        """An epoch of the server on the rows of all clients, in the order of step `turn` of the round.

        Mini-batches are as equal as possible, since batch normalisation could not train on a last one with a single
        row.
        """
        draw = seeds.torch_generator(this.seed, "cycle", this.index, turn)
        order = torch.randperm(len(smashed), generator=draw)
        for drawn in order.tensor_split(-(-len(order) // self.server_batch)):
            at = drawn.sort().values  # the rows of a mini-batch are random, their order has no meaning
            rows, labels = tuple(select(r, at) for r in smashed.rows), smashed.labels[at.to(smashed.labels.device)]
            server.step_on(rows, labels, factor)


def record(step: ServerStep, smashed: Smashed, active: tuple[int, ...] = ()) -> Step:
    """The record of a step: the losses whose gradients the clients received."""
    return Step(step.means, smashed.clients, len(smashed), active, step.lr)


@algorithm(
    "cyclepsl",
    title="CyclePSL",
    summary="PSL whose server trains an epoch of mini-batches on the pooled rows before it answers",
    paper="arXiv 2511.18611",
    needs={FORWARD, BACKWARD},
    spreads="gathered",
    colour="blue",
    line=":",
)
class CyclePsl(Cycle):
    """Parallel split learning with a server that trains first."""

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        """One round (a local epoch) of CyclePSL."""
        for turn in count():
            if not (smashed := clients.forward()):
                return
            step = self.cycle(server, smashed, this, turn)
            clients.backward(own(step.gradient, smashed, self.gradient_scale))
            yield record(step, smashed)

    def traffic(self, epoch: Epoch) -> Traffic:
        """As PSL; the server goes through every row twice: to train, and to answer."""
        return Traffic("steps", server_passes=2.0)


@algorithm(
    "cyclesfl",
    title="CycleSFL",
    summary="SFL whose server trains an epoch of mini-batches on the pooled rows before it answers",
    paper="arXiv 2511.18611",
    needs={FORWARD, BACKWARD, AVERAGE},
    spreads="gathered",
    client_part=AVERAGES,
    colour="grey",
    line="--",
)
class CycleSfl(Cycle, LocalWork):
    """SplitFed learning with a server that trains first."""

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        """One round of CycleSFL."""
        trained: set[int] = set()
        for turn in count():
            if not (smashed := clients.forward()):
                break
            step = self.cycle(server, smashed, this, turn)
            clients.backward(own(step.gradient, smashed, self.gradient_scale))
            trained |= set(smashed.clients)
            yield record(step, smashed)
        clients.average(sample_weights(clients, trained))

    def traffic(self, epoch: Epoch) -> Traffic:
        """As SFL; the server goes through every row twice."""
        return Traffic("steps", averaged=epoch.client_model, server_passes=2.0)


@algorithm(
    "cyclesglr",
    title="CycleSGLR",
    summary="SGLR whose server trains an epoch of mini-batches on the pooled rows before it answers",
    paper="arXiv 2511.18611",
    needs={FORWARD, BACKWARD},
    spreads="gathered",
    client_part="SplitAvg averages the gradients that reach the client models",
    colour="vermillion",
    line=":",
)
class CycleSglr(Cycle, SplitAvg, SplitLr):
    """SGLR with a server that trains first."""

    alpha: float = option(0.0, ge=0)
    """Rate exponent: the server's learning rate is server_lr x C^alpha (eq. 13). The default is 0, since the
    mini-batches here do not grow with the number of clients."""

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        """One round (a local epoch) of CycleSGLR."""
        for turn in count():
            if not (smashed := clients.forward()):
                return
            step = self.cycle(server, smashed, this, turn, self.split_lr(smashed, enrolled=len(clients.samples)))
            active = self.draw_active(smashed.clients, this, turn)
            clients.backward(self.split_average(step.gradient, smashed, active))
            yield record(step, smashed, active)

    def traffic(self, epoch: Epoch) -> Traffic:
        """As SGLR; the server goes through every row twice."""
        return replace(super().traffic(epoch), server_passes=2.0)
