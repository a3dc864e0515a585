"""SplitFed learning (Thapa et al., arXiv 2004.12088): split learning whose models are averaged. Four readings.

sfl    as arXiv 2112.05929 writes it: PSL; client models averaged every step or every round
sflv1  a server copy per client; after the local steps both sides are averaged, w <- sum_k (n_k / n) w_k
sflv2  one server model, stepped on one client's rows after another's, in random order, batch by batch or client
       by client (server_order); client models averaged per round
sflv3  V1's mirror: server copies averaged per round, client models never   (Gawali et al., arXiv 2012.12591)

V1 computes exactly the same as FedAvg, with any cut.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from typing import Literal

from cutlayer import seeds
from cutlayer.algorithms.common import LocalWork, Scaled, report, sample_weights
from cutlayer.algorithms.contract import algorithm
from cutlayer.cohort import Cohort
from cutlayer.gradients import own
from cutlayer.plugins import option
from cutlayer.server import Server
from cutlayer.traffic import Epoch, Traffic
from cutlayer.types import CutGradients, Round, Step
from cutlayer.verbs import AVERAGE, BACKWARD, BACKWARD_TOGETHER, FORWARD, STEP_COPIES, STEP_EACH

AVERAGES = "it averages the client models"


@algorithm(
    "sfl",
    title="SFL",
    summary="PSL plus averaging of the client models every step or round",
    paper="arXiv 2112.05929",
    needs={FORWARD, BACKWARD, AVERAGE},
    spreads="apart",
    client_part=AVERAGES,
    colour="green",
)
class Sfl(Scaled, LocalWork):
    """SplitFed as the SGLR paper writes it."""

    average_every: Literal["step", "round", "gradients"] = option("round", planned=True)
    """When client models are averaged: after each step, or at the end of each round. gradients: never; instead, in each
    step all clients, even those without rows in it, step with the sum of the clients' gradients of the joint loss."""

    @property
    def needs(self) -> frozenset[str]:
        """Models or gradients leave a client."""
        return super().needs if self.average_every != "gradients" else frozenset({FORWARD, BACKWARD_TOGETHER})

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        """One round of SFL: PSL plus averaging of the client models."""
        if self.average_every == "gradients":
            yield from in_step(server, clients)
            return
        trained: set[int] = set()
        while smashed := clients.forward():
            step = server.step(smashed)
            clients.backward(own(step.gradient, smashed, self.gradient_scale))
            trained |= set(smashed.clients)
            if self.average_every == "step":
                clients.average(sample_weights(clients, smashed.clients))
            yield report(step, smashed)
        if self.average_every == "round":
            clients.average(sample_weights(clients, trained))

    @property
    def averages_every_step(self) -> bool:
        """As the option says."""
        return self.average_every == "step"

    def traffic(self, epoch: Epoch) -> Traffic:
        """As PSL, and the client models up and down, once a round; or gradients, once a step."""
        if self.average_every == "gradients":
            return Traffic("steps", summed=epoch.client_gradient)
        return Traffic("steps", averaged=epoch.client_model)


@algorithm(
    "sflv1",
    title="SplitFed V1",
    summary="a server copy per client; client models and server copies are averaged every round",
    paper="arXiv 2004.12088",
    needs={FORWARD, BACKWARD, AVERAGE, STEP_COPIES},
    spreads="apart",
    client_part=AVERAGES,
    colour="green",
    line="--",
)
class SflV1(LocalWork):
    """SplitFed V1."""

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        """One round of SplitFed V1."""
        trained = yield from _with_server_copies(server, clients)
        clients.average(sample_weights(clients, trained))
        server.average_copies(sample_weights(clients, trained))

    @property
    def averages_every_step(self) -> bool:
        """With one local step."""
        return self.local_steps == 1

    def traffic(self, epoch: Epoch) -> Traffic:
        """As SFL."""
        return Traffic("steps", averaged=epoch.client_model)


@algorithm(
    "sflv2",
    title="SplitFed V2",
    summary="one server model takes steps client by client in random order; client models are averaged every round",
    paper="arXiv 2004.12088",
    needs={FORWARD, BACKWARD, AVERAGE, STEP_EACH},
    spreads="gathered",
    client_part=AVERAGES,
    colour="green",
    line="-.",
)
class SflV2(LocalWork):
    """SplitFed V2."""

    server_order: Literal["interleaved", "sequential"] = option("interleaved")
    """The order of the server's steps: a batch of every client in turn (interleaved), or all batches of one client
    before those of the next (sequential)."""

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        """One round of SplitFed V2."""
        in_order = self._sequential if self.server_order == "sequential" else self._interleaved
        trained = yield from in_order(server, clients, this)
        clients.average(sample_weights(clients, trained))

    def _interleaved(self, server: Server, clients: Cohort, this: Round) -> Generator[Step, None, set[int]]:
        """Batch by batch, each time in another order. Returns the clients that trained."""
        trained: set[int] = set()
        turn = 0
        while smashed := clients.forward():
            step = server.step_in_turn(smashed, _shuffled(this, turn, smashed.clients))
            clients.backward(CutGradients(step.gradient, smashed.clients, smashed.sizes))
            trained |= set(smashed.clients)
            turn += 1
            yield report(step, smashed)
        return trained

    def _sequential(self, server: Server, clients: Cohort, this: Round) -> Generator[Step, None, set[int]]:
        """Client by client, each through its part of the round. Returns the clients that trained."""
        trained: set[int] = set()
        for client in _shuffled(this, 0, this.clients):
            while smashed := clients.forward([client]):
                step = server.step_in_turn(smashed, smashed.clients)
                clients.backward(CutGradients(step.gradient, smashed.clients, smashed.sizes))
                trained |= set(smashed.clients)
                yield report(step, smashed)
        return trained

    def traffic(self, epoch: Epoch) -> Traffic | None:
        """As SFL. Client by client, the time depends on the drawn order, so there is no statement."""
        return Traffic("steps", averaged=epoch.client_model) if self.server_order == "interleaved" else None


@algorithm(
    "sflv3",
    title="SplitFed V3",
    summary="a server copy per client; server copies are averaged every round, client models never",
    paper="arXiv 2012.12591",
    needs={FORWARD, BACKWARD, STEP_COPIES},
    spreads="apart",
    server_part="it averages the server copies",
    colour="green",
    line=":",
)
class SflV3(LocalWork):
    """SplitFed V3."""

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        """One round of SplitFed V3."""
        trained = yield from _with_server_copies(server, clients)
        server.average_copies(sample_weights(clients, trained))

    def traffic(self, epoch: Epoch) -> Traffic:
        """As PSL."""
        return Traffic("steps")


def in_step(server: Server, clients: Cohort) -> Iterator[Step]:
    """A round in which all clients step with the sum of their gradients of the one loss."""
    while smashed := clients.forward():
        step = server.step(smashed)
        clients.backward_together(own(step.gradient, smashed, "union"))
        yield report(step, smashed)


def _shuffled(this: Round, turn: int, clients: Iterable[int]) -> list[int]:
    """The clients in a random order, that of a turn of the round."""
    return [int(k) for k in seeds.generator(this.seed, "server order", this.index, turn).permutation(list(clients))]


def _with_server_copies(server: Server, clients: Cohort) -> Generator[Step, None, set[int]]:
    """Every client trains with its own copy of the server. Returns the clients that trained."""
    trained: set[int] = set()
    while smashed := clients.forward():
        step = server.step_copies(smashed)
        clients.backward(CutGradients(step.gradient, smashed.clients, smashed.sizes))
        trained |= set(smashed.clients)
        yield report(step, smashed)
    return trained
