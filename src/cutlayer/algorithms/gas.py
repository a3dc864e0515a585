"""GAS: generative activation-aided asynchronous split federated learning (arXiv 2409.01251).

P_k are the shares of the classes at client k (`cutlayer.adjustment`). Some of the participants work at a time, each at
its own pace. Whenever something arrives at the server:
    a batch of client k   G_k = d/ds_k mean CE(g(v; s_k) + tau log P_k, y_k) goes back, and
                          w_k <- w_k - eta (ds_k/dw_k)^T G_k at the client, which goes on;
                          (s_k, y_k) enters the activation buffer
    buffer full           for each label y: update mean mu_y and variance var_y with the rows of the buffer;
                          fill it up with rows drawn from N(mu_y, var_y) until all labels are equally frequent;
                          v <- v - eta dv mean CE(g(v; s), y) on all of them; empty it
    local steps done      w_k enters the model buffer; a client that rests begins from the last average
    model buffer full     w <- sum n_k w_k / sum n_k of the models in it, which ends the round; others go on
The drawn rows only train the server.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from cutlayer import seeds
from cutlayer.algorithms.ages import Ages
from cutlayer.algorithms.buffered import Buffer
from cutlayer.algorithms.common import LocalWork, sample_weights
from cutlayer.algorithms.contract import algorithm
from cutlayer.algorithms.gaussians import LabelGaussians
from cutlayer.algorithms.splitfed import AVERAGES
from cutlayer.cohort import Cohort
from cutlayer.errors import ConfigError
from cutlayer.gradients import own
from cutlayer.plugins import option
from cutlayer.server import Server
from cutlayer.types import Round, Rows, Step
from cutlayer.verbs import ARRIVALS, AVERAGE, BACKWARD, FORWARD


@algorithm(
    "gas",
    title="GAS",
    summary="asynchronous SFL with buffers of batches and models; rows drawn for each label fill up the batches",
    paper="arXiv 2409.01251",
    needs={FORWARD, ARRIVALS, BACKWARD, AVERAGE},
    presets={"logit_adjust": "client"},
    client_part=AVERAGES,
    colour="purple",
    line="--",
)
class Gas(LocalWork):
    """Generative activation-aided asynchronous split federated learning."""

    working: int | None = option(None, ge=1, shared=False)
    """Number of clients that work at the same time. Default: half of the participants, as in the paper (10 of 20)."""
    buffer_batches: int | None = option(None, ge=1, shared=False)
    """Number of batches in the activation buffer at which the server takes a step. Default: the number of clients that
    work at the same time."""
    buffer_models: int | None = option(None, ge=1, shared=False)
    """Number of models in the model buffer at which they are averaged. Default: the number of clients that work at the
    same time."""
    answer: Literal["arrival", "full"] = option("arrival", shared=False)
    """When a client gets its gradient: as soon as its batch arrives (arrival), or together with all others once the
    activation buffer is full (full)."""
    generate: Literal["complete", "seen", "never"] = option("complete", shared=False)
    """When rows are drawn: once rows of every label have arrived (complete), for the labels seen so far (seen), or
    never."""
    fill: Literal["share", "most"] = option("share", shared=False)
    """Rows of each label in a full buffer. share: an equal share of the received rows; of a more frequent label, the
    first ones. most: as many as the most frequent label has."""
    statistics: Literal["growing", "equal"] = option("growing", shared=False)
    """Weight of a row in means and variances: the number of server steps before it plus 1 (growing), or the same for
    all (equal)."""
    decay: float = option(1.0, gt=0, le=1, shared=False)
    """Factor by which the weight of earlier rows shrinks with every server step. 1: no decay."""

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        """One round of GAS: until the model buffer is full."""
        ages, buffer = Ages(server.kept, len(clients.samples)), Buffer(server.kept)
        working = self.working or (len(this.clients) + 1) // 2
        full, models = self.buffer_batches or working, self.buffer_models or working
        left = dict(zip(this.clients, this.batches, strict=True))
        queue = [k for k in server.kept.get("queue", torch.empty(0)).tolist() if k in left]
        resting = _shuffled(this, [k for k in this.clients if k not in queue])
        done: list[int] = []
        crowd = working
        while len(done) < models:
            while resting and len(queue) < crowd:
                ages.begun(resting[0])
                queue.append(resting.pop(0))
            arrived = clients.arrivals(queue, 1 if self.answer == "arrival" else full - len(buffer.batches))
            crowd = working if arrived else len(queue) + 1  # if none of them arrives, another client begins
            if not arrived and not resting:
                break  # all others wait for the average, or are gone
            if not arrived:
                continue
            smashed = clients.forward(arrived)
            queue = [k for k in queue if k in smashed.clients or k not in arrived]  # the others' models were not usable
            if not smashed:
                continue
            losses = server.gradients(smashed)
            buffer.add(smashed, [ages.since(k) for k in smashed.clients], losses.means[1:])
            clients.backward(own(losses.gradient, smashed))
            for k in smashed.clients:
                ages.answered(k)
                queue.remove(k)
                left[k] -= 1
                (queue if left[k] else done).append(k)
            if len(buffer.batches) >= full:
                yield self._server_step(server, buffer, ages, this)
        if buffer.told < len(buffer.batches):
            yield buffer.record(0.0)
        ages.averaged(clients.average(sample_weights(clients, done)))
        server.kept["queue"] = torch.tensor(queue, dtype=torch.int64)

    def _server_step(self, server: Server, buffer: Buffer, ages: Ages, this: Round) -> Step:
        """The buffer is full: update the Gaussians, fill it up, step, empty it."""
        rows, labels = buffer.rows, buffer.labels
        if self.generate != "never":
            _check(server, rows)
            gaussians = LabelGaussians(server.kept, server.outputs)
            weight = 1.0 + ages.steps if self.statistics == "growing" else 1.0
            gaussians.update(rows, labels, weight, self.decay)
            draw = seeds.torch_generator(this.seed, "gas", ages.steps)
            rows, labels = self.filled(rows, labels, gaussians, draw)
        server.step_on(rows, labels)
        ages.stepped(buffer.batches)
        step = buffer.record(server.lr * server.lr_factor)
        buffer.clear()
        return step

    def filled(
        self, rows: Rows, labels: Tensor, gaussians: LabelGaussians, draw: torch.Generator
    ) -> tuple[Rows, Tensor]:
        """Rows [R, s...] and labels [R] in which all known labels are equally frequent."""
        known = gaussians.known
        if self.generate == "complete" and len(known) < gaussians.labels:
            return rows, labels
        there = labels.cpu()
        counts = torch.bincount(there, minlength=gaussians.labels)
        each = int(counts.max()) if self.fill == "most" else -(-len(there) // len(known))
        real = torch.cat([(there == y).nonzero()[:each, 0] for y in known.tolist()]).to(labels.device)
        made = torch.repeat_interleave(known, (each - counts[known]).clamp(min=0))
        drawn = gaussians.draw(made, draw)
        both = tuple(torch.cat([r[real], d.to(r)]) for r, d in zip(rows, drawn, strict=True))
        return both, torch.cat([labels[real], made.to(labels)])

    def staleness(self, server: Server) -> dict[str, Any]:
        """The ages of batches when the server stepped on them, and of models when they were averaged."""
        return Ages(server.kept, 0).summary()


def _shuffled(this: Round, clients: Sequence[int]) -> list[int]:
    """The clients in the order in which they begin to work in this round."""
    return [int(k) for k in seeds.generator(this.seed, "begin to work", this.index).permutation(list(clients))]


def _check(server: Server, rows: Rows) -> None:
    """Raises ConfigError for rows that do not allow a Gaussian per label."""
    if server.task.targets != "class":
        raise ConfigError("gas draws rows for each class, and this task has no classes: set generate = never")
    if not all(r.is_floating_point() for r in rows):
        raise ConfigError(
            "gas draws smashed data, but what crosses holds whole numbers too: cut elsewhere, or set generate = never"
        )
