"""What an algorithm sends and computes in an epoch, as the algorithm itself states it. `plan` reads nothing else about
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Pattern = Literal["gather", "rounds", "relay", "steps", "local"]
"""Which side waits for which. gather: the raw data go to the server, which computes alone; rounds: clients train whole
models, then all wait for the slowest; relay: one client after another; steps: every step waits for the slowest client;
local: clients train their parts on losses of their own, and all wait for the slowest once a round.
"""


@dataclass(frozen=True)
class Epoch:
    """An epoch of C equal clients.

    Sizes in bytes: `smashed` and `gradient` of one sample at the cut (up, down), `features` and `returned` at a second
    cut (down, up), `label` and `raw` of one sample, `model` and `client_model` with their buffers, `client_gradient` of
    what clients train, an auxiliary `head`. A codec may add something for each batch of a client (scales that its
    samples share): `smashed_besides` and so on.
    """

    clients: int
    samples_per_client: int
    batch: int
    smashed: int
    gradient: int
    label: int
    raw: int
    model: int
    client_model: int
    client_gradient: int = 0
    features: int = 0
    returned: int = 0
    head: int = 0
    smashed_besides: int = 0
    gradient_besides: int = 0
    features_besides: int = 0
    returned_besides: int = 0

    @property
    def batches(self) -> int:
        """Of each client."""
        return -(-self.samples_per_client // self.batch)

    def uploaded(self, every: int) -> int:
        """Samples of a client that go up in an epoch, if the first of each `every` batches does."""
        if every == 1:
            return self.samples_per_client
        starts = range(0, self.samples_per_client, self.batch * every)
        return sum(min(self.batch, self.samples_per_client - start) for start in starts)

    @property
    def samples(self) -> int:
        """Of all clients, |D|."""
        return self.clients * self.samples_per_client


@dataclass(frozen=True)
class Traffic:
    """What is sent and computed in an epoch of equal clients, if all take part in every round.

    With the pattern steps, relay or local, the smashed data of every sample go up, with their labels unless `labels` is
    False, and cut gradients come down unless `gradients` is False; `sharing` clients receive one common gradient in a
    step instead of their own. `tails`: the server's features go down in between, and their gradients come up.
    `averaged`: bytes of the model that each client sends and receives once an epoch. `moved`: bytes of the model that
    goes from one client to the next (relay). `server_passes`: how often the server's part trains on each sample.
    `answers_apart`: the gradients that come down belong to another loss than the server's own, so it back-propagates to
    the cut twice. `every`: one of this number of batches of a client goes up, the first (local). `given`: additional
    bytes that each client receives in every `given_every`th epoch, from the first on (local). `summed`: bytes of the
    weight gradient that each client sends in every step, and of the sum that each receives.
    """

    pattern: Pattern
    labels: bool = True
    tails: bool = False
    gradients: bool = True
    sharing: int = 0
    averaged: int = 0
    moved: int = 0
    server_passes: float = 1.0
    answers_apart: bool = False
    summed: int = 0
    every: int = 1
    given: int = 0
    given_every: int = 1
