"""FSL-SAGE: federated split learning via smashed activation gradient estimation (arXiv 2505.23182).

CSE-FSL with other heads: client k's head a_k is not a classifier in its own right but a model of the server's gradient,
    g^(s, y) = d/ds CE(a_k(s), y)   for   g(s, y) = d/ds CE(g(v; s), y),
which the server fits and the client only uses. One round is that of CSE-FSL, but
    1. a client steps w_k alone:  w_k <- w_k - eta_c (ds/dw_k)^T g^(s, y)
    2. the server keeps (s, y, g) of each upload, for each client the last 1000 rows
    3. w <- sum_k (n_k / n) w_k; heads are not averaged
    4. every tenth round, for each client:  a_k <- argmin sum |g^(s, y) - g|^2 over its rows, in a few epochs of
       batches; a_k goes down
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from cutlayer import seeds
from cutlayer.algorithms.common import sample_weights
from cutlayer.algorithms.contract import algorithm
from cutlayer.algorithms.heads import SeldomSending
from cutlayer.cohort import Cohort
from cutlayer.gradients import column, spread
from cutlayer.plugins import option
from cutlayer.server import Server, ServerStep
from cutlayer.tasks import Task
from cutlayer.traffic import Epoch, Traffic
from cutlayer.types import Round, Rows, Smashed, Step, as_tuple
from cutlayer.verbs import ALIGN, AVERAGE, FORWARD, LEARN, STEP_EACH


@algorithm(
    "fsl-sage",
    title="FSL-SAGE",
    summary="CSE-FSL with heads that estimate the server's gradients; the server fits the heads and sends them down",
    paper="arXiv 2505.23182",
    needs={FORWARD, LEARN, ALIGN, AVERAGE, STEP_EACH},
    client_part="it trains the client models on estimated gradients and averages them",
    colour="grey",
    line="--",
)
class FslSage(SeldomSending):
    """FSL-SAGE."""

    align_every: int = option(10, ge=1, planned=True)
    """Rounds between two fittings of the heads. The first is at the end of the first round."""
    align_rows: int = option(1000, ge=1, shared=False)
    """Number of each client's latest rows that the server keeps to fit its head."""
    align_epochs: int = option(5, ge=1, shared=False)
    """Passes over these rows in a fitting."""
    align_batch: int = option(100, ge=1, shared=False)
    """Batch size of a fitting."""
    align_lr: float = option(1e-3, gt=0, shared=False)
    """Adam's learning rate in a fitting."""
    align_scale: Literal["row", "mean"] = option("row", shared=False)
    """Which gradients are compared: those of each row's own loss (row), or those of mean losses, over the upload and
    over the batch of the fitting (mean)."""

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        """One round of FSL-SAGE."""
        trained: set[int] = set()
        for smashed, step, record in self.local_steps_and_uploads(server, clients, this):
            self._keep(server, smashed, step)
            trained |= set(smashed.clients)
            yield record
        clients.average(sample_weights(clients, trained))
        if this.index % self.align_every == 0:
            clients.align({k: self._fitted(server, k, this) for k in sorted(trained)})

    def traffic(self, epoch: Epoch) -> Traffic:
        """As CSE-FSL, but heads only come down in every tenth round."""
        return Traffic(
            "local",
            gradients=False,
            every=self.upload_every,
            averaged=epoch.client_model,
            given=epoch.head,
            given_every=self.align_every,
        )

    def _keep(self, server: Server, smashed: Smashed, step: ServerStep) -> None:
        """The rows of an upload, with their labels and gradients."""
        gradient = step.gradient
        if self.align_scale == "row":
            masses = spread(smashed.masses, smashed.sizes)
            gradient = tuple(g * column(masses, g) for g in gradient)
        for k in smashed.clients:
            rows = {"smashed": smashed.only(k).rows, "labels": (smashed.only(k).labels,)}
            rows["gradients"] = smashed.take(gradient, {k})
            for what, tensors in rows.items():
                for i, new in enumerate(tensors):
                    name = f"{k} {what} {i}"
                    kept = [server.kept[name]] if name in server.kept else []
                    server.kept[name] = torch.cat([*kept, new.detach()])[-self.align_rows :].clone()

    def _fitted(self, server: Server, client: int, this: Round) -> dict[str, Tensor]:
        """The head of a client, fitted to its rows from where the last fitting ended."""
        assert server.make_head is not None, "an algorithm that needs LEARN has auxiliary heads"
        head, name = server.make_head("head").requires_grad_(True), f"{client} head "
        if before := {n.removeprefix(name): t for n, t in server.kept.items() if n.startswith(name)}:
            head.load_state_dict(before)
        rows, labels, gradients = (_kept(server, client, what) for what in ("smashed", "labels", "gradients"))
        with seeds.torch_seeded(this.seed, "align", client, this.index, device=labels[0].device):
            self.fit(head, server.task, rows, labels[0], gradients)
        state = {n: t.detach() for n, t in head.state_dict().items()}
        server.kept |= {f"{name}{n}": t.clone() for n, t in state.items()}
        return state

    def fit(self, head: nn.Module, task: Task, rows: Rows, labels: Tensor, gradients: Rows) -> None:
        """Fit `head` to the `gradients` of smashed data `rows` [n, s...] with `labels` [n]: squared errors."""
        optimizer = torch.optim.Adam(head.parameters(), self.align_lr)
        head.train()
        for _ in range(self.align_epochs):
            for at in torch.randperm(len(labels)).split(self.align_batch):
                estimated = self.estimate(head, task, tuple(r[at] for r in rows), labels[at])
                errors = [(e - g[at]).square().sum() for e, g in zip(estimated, gradients, strict=True)]
                optimizer.zero_grad()
                torch.stack(errors).sum().div(len(at)).backward()
                optimizer.step()

    def estimate(self, head: nn.Module, task: Task, rows: Rows, labels: Tensor) -> Rows:
        """The gradients of the head's loss with respect to the `rows`: each [n, s...], with a graph."""
        leaves = tuple(r.detach().requires_grad_(r.is_floating_point()) for r in rows)
        losses, weights = task.row_losses(as_tuple(head(leaves)), labels), task.weights(labels)
        loss = losses.sum() if weights is None else (losses * weights.to(losses.dtype)).sum()
        if self.align_scale == "mean":
            loss = loss / (len(labels) if weights is None else weights.sum().clamp(min=torch.finfo(loss.dtype).tiny))
        floats = [leaf for leaf in leaves if leaf.is_floating_point()]
        found = torch.autograd.grad(loss, floats, create_graph=True, allow_unused=True)
        return tuple(torch.zeros_like(leaf) if g is None else g for leaf, g in zip(floats, found, strict=True))


def _kept(server: Server, client: int, what: str) -> Rows:
    """The tensors of that kind that the server keeps for a client."""
    prefix = f"{client} {what} "
    names = [name for name in server.kept if name.startswith(prefix)]
    return tuple(server.kept[name] for name in sorted(names, key=lambda name: int(name.removeprefix(prefix))))
