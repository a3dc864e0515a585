"""SplitFed learning (Thapa et al., arXiv 2004.12088): split learning whose models are averaged. Four readings.

sfl    as arXiv 2112.05929 writes it: PSL; client models averaged every step or every round
sflv1  a server copy per client; after the local steps both sides are averaged, w <- sum_k (n_k / n) w_k
sflv2  one server model, stepped on one client's rows after another's, in random order; client models averaged per round
sflv3  V1's mirror: server copies averaged per round, client models never   (Gawali et al., arXiv 2012.12591)

V1 computes exactly what FedAvg computes, whatever the cut.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

from cutlayer import seeds
from cutlayer.algorithms.common import report, sample_weights
from cutlayer.cohort import Cohort
from cutlayer.gradients import own
from cutlayer.options import RunConfig
from cutlayer.server import Server
from cutlayer.types import CutGradients, Round, Step


def sfl(options: RunConfig, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
    """One round of SFL: PSL plus averaging of the client models."""
    trained: set[int] = set()
    while smashed := clients.forward():
        step = server.step(smashed)
        clients.backward(own(step.gradient, smashed, options.gradient_scale))
        trained |= set(smashed.clients)
        if options.average_every == "step":
            clients.average(sample_weights(clients, smashed.clients))
        yield report(step, smashed)
    if options.average_every == "round":
        clients.average(sample_weights(clients, trained))


def sflv1(options: RunConfig, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
    """One round of SplitFed V1."""
    trained = yield from _with_server_copies(server, clients)
    clients.average(sample_weights(clients, trained))
    server.average_copies(sample_weights(clients, trained))


def sflv2(options: RunConfig, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
    """One round of SplitFed V2."""
    trained: set[int] = set()
    turn = 0
    while smashed := clients.forward():
        order = seeds.generator(this.seed, "server order", this.index, turn).permutation(smashed.clients)
        step = server.step_in_turn(smashed, [int(k) for k in order])
        clients.backward(CutGradients(step.gradient, smashed.clients, smashed.sizes))
        trained |= set(smashed.clients)
        turn += 1
        yield report(step, smashed)
    clients.average(sample_weights(clients, trained))


def sflv3(options: RunConfig, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
    """One round of SplitFed V3."""
    trained = yield from _with_server_copies(server, clients)
    server.average_copies(sample_weights(clients, trained))


def _with_server_copies(server: Server, clients: Cohort) -> Generator[Step, None, set[int]]:
    """Every client trains with the server copy of its own. Returns the clients that did."""
    trained: set[int] = set()
    while smashed := clients.forward():
        step = server.step_copies(smashed)
        clients.backward(CutGradients(step.gradient, smashed.clients, smashed.sizes))
        trained |= set(smashed.clients)
        yield report(step, smashed)
    return trained
