"""Common parts of algorithms whose clients train on the loss of an auxiliary head: the head, and the times of
uploads.
"""

from __future__ import annotations

from collections.abc import Generator
from itertools import count

from torch import nn

from cutlayer import plugins, seeds
from cutlayer.algorithms.common import LocalWork, report
from cutlayer.algorithms.contract import Algorithm
from cutlayer.cohort import Cohort
from cutlayer.data.own import own_code
from cutlayer.plugins import option
from cutlayer.server import Server, ServerStep
from cutlayer.types import Round, Rows, Smashed, Step


class WithHead(Algorithm):
    """Algorithms whose clients have auxiliary heads."""

    aux: str | None = option(None, shared=False)
    """The auxiliary head: path/to/file.py:make, a function of examples of the smashed data (a tuple of tensors) and the
    number of classes. It returns a module that is called with these tensors, one after another. Default: global average
    pooling and one linear layer."""

    def head(self, smashed: Rows, classes: int) -> nn.Module:
        """As the option says."""
        if self.aux is None:
            return super().head(smashed, classes)
        make = plugins.load("head", self.aux)
        with own_code(make, f"the auxiliary head {self.aux!r}"):
            made: nn.Module = make(smashed, classes)
        return made


class SeldomSending(WithHead, LocalWork):
    """Algorithms whose clients send the first of every h batches, and get no gradient back."""

    upload_every: int = option(5, ge=1, planned=True)
    """h: a client sends the first of every h local batches."""

    def local_steps_and_uploads(
        self, server: Server, clients: Cohort, this: Round
    ) -> Generator[tuple[Smashed, ServerStep, Step]]:
        """A round: the server steps on the clients' uploads in the order of arrival. Every client takes h local steps,
        the first of them on the batch that it has sent.
        """
        for turn in count():
            if not (smashed := clients.forward()):
                return
            arrivals = seeds.generator(this.seed, "arrivals", this.index, turn).permutation(smashed.clients)
            step = server.step_in_turn(smashed, [int(k) for k in arrivals])
            clients.learn(self.upload_every)
            yield smashed, step, report(step, smashed)
