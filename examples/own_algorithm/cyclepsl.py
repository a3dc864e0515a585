"""CyclePSL: parallel split learning whose server trains first and answers afterwards (arXiv 2511.18611).

One step:
    1. every client i, in parallel: s_i = f(w_ci, x_i); upload (s_i, y_i)
    2. server: pool and shuffle the rows of all; one epoch of mini-batches: w_s <- w_s - eta_s g_s for each
    3. server, frozen: the loss of every client's original batch; its gradient of s_i, in the client's own scale
    4. every client i: back-propagate it; w_ci <- w_ci - eta_c g_ci
Client models are never exchanged. With one mini-batch of all rows, step 2 is the server step of PSL; the gradients of
step 3 are still those of the new server.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import torch

from cutlayer import seeds
from cutlayer.algorithms import Algorithm, algorithm
from cutlayer.cohort import Cohort
from cutlayer.gradients import own
from cutlayer.plugins import option
from cutlayer.server import Server
from cutlayer.traffic import Epoch, Traffic
from cutlayer.types import CutGradients, Round, Smashed, Step, select
from cutlayer.verbs import BACKWARD, FORWARD


@algorithm(
    "cyclepsl",
    title="CyclePSL",
    summary="PSL whose server trains an epoch of mini-batches on the pooled rows before it answers",
    paper="arXiv 2511.18611",
    needs={FORWARD, BACKWARD},
    colour="#8c564b",
)
class CyclePsl(Algorithm):
    """Parallel split learning with a server that trains first."""

    server_batch: int = option(32, ge=1, shared=False)
    """Rows of a mini-batch of the server, at most."""
    running_statistics: bool = option(True, shared=False)
    """Batch normalisation of the frozen server uses its running statistics. Otherwise it uses those of all rows, as in
    the authors' code."""

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        """One round (a local epoch) of CyclePSL."""
        for turn in count():
            if not (smashed := clients.forward()):
                return
            self.train(server, smashed, this, turn)
            gradients, means = self.answer(server, smashed)
            clients.backward(gradients)
            yield Step(means, smashed.clients, len(smashed), server_lr=server.lr * server.lr_factor)

    def train(self, server: Server, smashed: Smashed, this: Round, turn: int) -> None:
        """An epoch of the server on the rows of all clients, in the order of step `turn` of the round.

        Mini-batches are as equal as can be, since batch normalisation could not train on a last one of a single row.
        """
        draw = seeds.torch_generator(this.seed, "cycle", this.index, turn)
        order = torch.randperm(len(smashed), generator=draw)
        for drawn in order.tensor_split(-(-len(order) // self.server_batch)):
            at = drawn.sort().values  # who is in a mini-batch is random, their order in it has no meaning
            server.step_on(tuple(select(r, at) for r in smashed.rows), smashed.labels[at.to(smashed.labels.device)])

    def answer(self, server: Server, smashed: Smashed) -> tuple[CutGradients, torch.Tensor]:
        """The frozen server's gradients for the clients, in their own scale, and the losses [1 + C] behind them."""
        step = server.gradients(smashed, running_statistics=self.running_statistics)
        return own(step.gradient, smashed), step.means

    def traffic(self, epoch: Epoch) -> Traffic:
        """As PSL; the server goes through every row twice: to train, and to answer."""
        return Traffic("steps", server_passes=2.0)
