"""Ampere: the two blocks of the model are trained one after the other (arXiv 2507.07130).

In the first rounds, as in CSE-FSL without a server:
    1. every client, in parallel, for each of its batches:  (w_k, a_k) <- step on CE(a_k(f(w_k; x)), y)
    2. w <- sum_k (n_k / n) w_k;  a <- sum_k (n_k / n) a_k
Then, once:
    3. every client sends the smashed data of all its rows, with their labels
In that round and the last ones:
    4. the server, for each batch of the pooled and shuffled rows:  v <- v - eta_s dCE(g(v; s), y)/dv
Smashed data cross once in the whole training, and nothing comes down but averaged models.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cutlayer import seeds
from cutlayer.algorithms.common import sample_weights
from cutlayer.algorithms.contract import algorithm
from cutlayer.algorithms.heads import WithHead
from cutlayer.cohort import Cohort
from cutlayer.errors import ConfigError
from cutlayer.plugins import option
from cutlayer.server import Server
from cutlayer.types import Round, Step
from cutlayer.verbs import AVERAGE, FORWARD, LEARN


@algorithm(
    "ampere",
    title="Ampere",
    summary="clients first train on auxiliary heads, then send all smashed data once, and the server trains on them",
    paper="arXiv 2507.07130",
    needs={FORWARD, LEARN, AVERAGE},
    client_part="it trains the client models on auxiliary heads and averages them",
    server_part="it trains the server model last, and alone",
    colour="grey",
    line=":",
)
class Ampere(WithHead):
    """Ampere."""

    client_share: float = option(0.5, gt=0, lt=1, shared=False)
    """Fraction of the rounds in which the clients train. In the others, the server trains."""
    pool_batch: int = option(64, ge=1, shared=False)
    """Batch size of the server, which draws from the pooled rows of all clients."""

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        """One round of Ampere: the clients', or the server's."""
        if this.index < self._rounds_of_clients(this):
            steps = clients.learn(this.steps)
            yield from steps
            clients.average(sample_weights(clients, {k for step in steps for k in step.clients}))
            return
        self._pool(server, clients, this)
        yield from self._train(server, this)

    def _rounds_of_clients(self, this: Round) -> int:
        """How many rounds are the clients'. Raises ConfigError if none would be left for the server."""
        if this.total < 2:
            raise ConfigError(
                "rounds = 1 is not enough for ampere, which first trains the clients' parts and then the server's: "
                "give 2 or more (rounds, epochs)"
            )
        return min(max(1, round(self.client_share * this.total)), this.total - 1)

    def _pool(self, server: Server, clients: Cohort, this: Round) -> None:
        """Participants that have not sent their data yet send them all; the server keeps them."""
        new = [k for k in this.clients if f"{k} labels" not in server.kept]
        while new and (smashed := clients.forward(new)):
            for k in smashed.clients:
                own = smashed.only(k)
                rows = {f"{k} smashed {i}": r for i, r in enumerate(own.rows)} | {f"{k} labels": own.labels}
                for name, tensor in rows.items():
                    before = [server.kept[name]] if name in server.kept else []
                    server.kept[name] = torch.cat([*before, tensor.detach()])

    def _train(self, server: Server, this: Round) -> Iterator[Step]:
        """An epoch of the server on the pooled rows."""
        who = sorted({int(name.split()[0]) for name in server.kept})
        width = sum(name.startswith(f"{who[0]} smashed") for name in server.kept)
        rows = tuple(torch.cat([server.kept[f"{k} smashed {i}"] for k in who]) for i in range(width))
        labels = torch.cat([server.kept[f"{k} labels"] for k in who])
        order = torch.randperm(len(labels), generator=seeds.torch_generator(this.seed, "pool", this.index))
        for at in order.to(labels.device).split(self.pool_batch):
            loss = server.step_on(tuple(r[at] for r in rows), labels[at])
            yield Step(loss.detach().view(1), (), len(at), server_lr=server.lr * server.lr_factor)
