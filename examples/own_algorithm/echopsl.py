"""EchoPSL: parallel split learning in which the server trains again on smashed data that it has kept.

One step:
    1. every client i, in parallel: s_i = f(w_ci, x_i); upload (s_i, y_i)
    2. server: ONE loss on the concatenated rows; w_s <- w_s - eta_s g_s
    3. every client i: back-propagate its own cut gradient; w_ci <- w_ci - eta_c g_ci
    4. server, while the clients continue: a few more steps, each on equally many rows, drawn from the last steps

Rows of earlier steps come from earlier client models, which differ little within a round. Client models are never
exchanged, and no additional bytes cross. Without step 4, the algorithm is PSL. The idea is experience replay (arXiv
1811.11682).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import count

import torch
from torch import Tensor

from cutlayer import seeds
from cutlayer.algorithms import Algorithm, algorithm
from cutlayer.algorithms.common import report
from cutlayer.cohort import Cohort
from cutlayer.gradients import own
from cutlayer.plugins import option
from cutlayer.server import Server
from cutlayer.traffic import Epoch, Traffic
from cutlayer.types import Round, Rows, Smashed, Step, select
from cutlayer.verbs import BACKWARD, FORWARD


@algorithm(
    "echopsl",
    title="EchoPSL",
    summary="PSL whose server trains again on rows that it has kept in the round",
    paper="arXiv 1811.11682",
    needs={FORWARD, BACKWARD},
    colour="#8c564b",
)
class EchoPsl(Algorithm):
    """Parallel split learning with a server that keeps rows."""

    memory: int = option(4, ge=1, shared=False)
    """The number of steps of the round whose rows are kept, including the last one."""
    echoes: int = option(1, ge=0, shared=False, planned=True)
    """Further steps of the server after each step, on equally many rows."""

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        """One round (a local epoch) of EchoPSL. Kept rows are discarded at its end."""
        kept: deque[Smashed] = deque(maxlen=self.memory)
        for turn in count():
            if not (smashed := clients.forward()):
                return
            step = server.step(smashed)
            clients.backward(own(step.gradient, smashed))
            kept.append(smashed)
            for echo in range(self.echoes):
                draw = seeds.torch_generator(this.seed, "echo", this.index, turn, echo)
                server.step_on(*drawn(list(kept), len(smashed), draw))
            yield report(step, smashed)

    def traffic(self, epoch: Epoch) -> Traffic:
        """The same as PSL, but the server processes more rows."""
        return Traffic("steps", server_passes=1.0 + self.echoes)


def drawn(kept: Sequence[Smashed], count: int, draw: torch.Generator) -> tuple[Rows, Tensor]:
    """`count` different rows from several steps, and their labels."""
    rows: Rows = tuple(torch.cat(parts) for parts in zip(*(smashed.rows for smashed in kept), strict=True))
    labels = torch.cat([smashed.labels for smashed in kept])
    at = torch.randperm(len(labels), generator=draw)[:count].sort().values
    return tuple(select(r, at) for r in rows), labels[at.to(labels.device)]
