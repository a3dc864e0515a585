"""The messages between a server and its clients, without the tensors that travel behind them.

Every field has a type and a bound, so a message that can be read is well formed. A change of a field, its meaning or
its bounds needs a new PROTOCOL.

Shape legend: R = `rows` of the message, s... one sample's shape at the cut, f... at the second cut, K classes.
"Behind it" says which tensors follow; `step` numbers the steps of a run, from 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from cutlayer.errors import WireError
from cutlayer.models.parts import Crossing
from cutlayer.wire.tensors import TYPES

PROTOCOL = 6

Count = Annotated[int, Meta(ge=0, le=(1 << 53))]
Protocol = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
Size = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]
Name = Annotated[str, Meta(max_length=256)]
Text = Annotated[str, Meta(max_length=4096)]
Factor = Annotated[float, Meta(ge=0, le=1e300)]  # not NaN
Mass = Annotated[float, Meta(ge=0, le=1e300)]  # total weight of rows in a mean: their number, if all count equally
Shape = Annotated[list[Size], Meta(max_length=16)]
Sizes = Annotated[list[Size], Meta(max_length=1 << 16)]
LocalStep = tuple[float, Size, Mass]  # (mean loss, rows, total weight of these)
Score = float | Annotated[list[float | None], Meta(max_length=1 << 16)] | None  # None: not defined
Scalar = bool | int | float | Text | None
Option = (
    bool
    | int
    | float
    | Text
    | Annotated[list[Scalar], Meta(max_length=256)]
    | Annotated[dict[Name, Scalar], Meta(max_length=256)]
    | None
)
Reason = Literal[
    "protocol",
    "run",
    "token",
    "client",
    "taken",
    "full",
    "state",
    "data",
    "model",
    "crossing",
    "algorithm",
    "step",
    "codec",
    "excluded",
]


class Struct(msgspec.Struct, forbid_unknown_fields=True):
    """Parts of messages."""


class Message(msgspec.Struct, forbid_unknown_fields=True, tag_field="type"):
    """Base of all messages. Each has a tag, which is its name on the wire and in error messages."""

    @classmethod
    def called(cls) -> str:
        """Its tag."""
        return str(cls.__struct_config__.tag)


class TensorSpec(Struct):
    """A tensor that crosses a cut: the shape of one row, and the type by its name in torch."""

    shape: Shape
    dtype: Name


class StepTerms(Struct):
    """The definition of a step: rows per batch, the codecs for both directions, and all other `options` of the
    training, as texts.
    """

    batch: Size
    up: Name = "raw"
    down: Name = "raw"
    options: Annotated[dict[Name, Text], Meta(max_length=64)] = {}


class Names(Struct):
    """The names behind the numbers in the data, in order (see `names.named`): how many there are (0: none are known), a
    digest of all, and the first of them.
    """

    count: Count = 0
    digest: Name = ""
    first: Annotated[list[Name], Meta(max_length=1024)] = []


class Terms(Struct):
    """What both sides must agree on, word for word, before anything is trained (see `handshake.agree`). `classes` and
    `features`: the names of the labels and of the columns of the data.
    """

    run: Name
    algorithm: Name
    part: Name  # the fingerprint of the client's part of the model
    crossing: Annotated[list[TensorSpec], Meta(max_length=256)]
    returning: Annotated[list[TensorSpec], Meta(max_length=256)]
    step: StepTerms
    classes: Names = msgspec.field(default_factory=Names)
    features: Names = msgspec.field(default_factory=Names)
    protocol: Protocol = PROTOCOL


# Client to server


class Hello(Message, tag="Hello"):
    """The first message: the client's name and its terms of the run. The client has `samples` training samples (n_k)
    with the total weight `mass`, and a state after `step` steps (0: a fresh one). `wants_server`: it requests the
    server's part of the model at the end. `tests`: the number of test rows that a client with its own data has held
    out, for which it reports the `metrics` (0: none). `counts`: the number of its training samples of each class, if
    the server adjusts logits by them.
    """

    client: Name
    terms: Terms
    samples: Count
    mass: Mass
    step: Count = 0
    token: Text = ""
    wants_server: bool = False
    tests: Count = 0
    metrics: Annotated[list[Name], Meta(max_length=256)] = []
    counts: Annotated[list[Count], Meta(max_length=1 << 16)] = []

    def __repr__(self) -> str:  # is written to logs, so without the token
        return f"Hello(client={self.client!r}, samples={self.samples}, step={self.step}, terms={self.terms})"


class SmashedUp(Message, tag="Smashed"):
    """Answers Forward. Behind it: smashed data, each [R, s...], and the targets [R, t...] if they were asked for."""

    step: Count
    rows: Size


class TailUp(Message, tag="TailGradients"):
    """Answers Tail: the mean loss over the rows, whose total weight is `mass`. Behind it: dLoss/d(features), each
    [R, f...].
    """

    step: Count
    rows: Size
    loss: float
    mass: Mass


class Settled(Message, tag="Settled"):
    """Answers Settle: all earlier requests are done."""

    step: Count


class Fitted(Message, tag="Fitted"):
    """Answers Fit and Learn: (mean loss, rows, their total weight) of each local step."""

    step: Count
    losses: Annotated[list[LocalStep], Meta(max_length=1 << 16)]


class ModelUp(Message, tag="Model"):
    """Answers GiveModel. Behind it: the state of the client's model, named tensors."""

    step: Count


class OptimizerUp(Message, tag="Optimizer"):
    """Answers GiveOptimizer. Behind it: the state of the client's optimiser, named tensors."""

    step: Count


class GradientUp(Message, tag="Gradient"):
    """Answers GiveGradient. Behind it: the gradient of the trained parameters, named tensors."""

    step: Count


class EvaluationRows(Message, tag="EvaluationRows"):
    """Answers Evaluate and OwnForward: the outputs of the client's part in evaluation mode. Behind it: tensors of R
    rows.
    """

    step: Count
    rows: Size


class ScoresUp(Message, tag="Scores"):
    """Answers GiveScores: the metrics, by name, of the model on the client's own `rows` test rows."""

    step: Count
    rows: Count
    scores: Annotated[dict[Name, Score], Meta(max_length=256)]


class Saved(Message, tag="Saved"):
    """Answers Save: the state after `step` steps is written beside the old one (prepare), or in its place (commit).
    `kept`: false if the client's disk is full; it keeps the state that it saved before.
    """

    step: Count
    phase: Literal["prepare", "commit"]
    kept: bool = True


class Failed(Message, tag="Failed"):
    """The client cannot continue. This is its last message. `kind` is the name of the error, such as NonFiniteError."""

    step: Count
    kind: Name
    sentence: Text


# Server to client


class Welcome(Message, tag="Welcome"):
    """Answers a Hello that was accepted: the client is number `index` of `clients`, and the run continues after `step`
    steps.

    `terms` are the server's own, for the client to check in turn; `config` the options that the client needs.
    `shares_server`: the server will send its part of the model at the end, to clients that want it.
    """

    index: Size
    clients: Size
    step: Count
    terms: Terms
    config: Annotated[dict[Name, Option], Meta(max_length=256)] = {}
    shares_server: bool = False


class Refused(Message, tag="Refused"):
    """Answers a Hello that was refused: the reason and the remedy. This is the server's last message."""

    reason: Reason
    sentence: Text


class BeginRound(Message, tag="BeginRound"):
    """The client takes part in round `index` of `total`, with `batches` batches at its base rate times `lr_factor`."""

    index: Count
    total: Count
    lr_factor: Factor
    batches: Count


class Forward(Message, tag="Forward", omit_defaults=True):
    """Draw the next batch, or batch number `batch`, or the next `take` rows, run the model on it, send smashed data;
    with `labels` or without (U-shaped split).
    """

    step: Count
    labels: bool = True
    batch: Count | None = None
    take: Size | None = None


class Tail(Message, tag="Tail"):
    """U-shaped split: finish the forward pass. Behind it: the server's features, each [R, f...]."""

    step: Count
    rows: Size


class Backward(Message, tag="Backward"):
    """Back-propagate and step. Behind it: cut gradients, each [R, s...].

    `own`: R is the client's batch. `common`: the one gradient that several clients share; a client uses the first rows,
    or the only one for each of its rows. Has no answer of its own: a client that answers the next request, which may be
    Settle, has done this. `hold`: do not step; GiveGradient follows.
    """

    step: Count
    mode: Literal["own", "common"]
    rows: Size
    hold: bool = False


class Settle(Message, tag="Settle"):
    """Answer when all earlier requests are done."""

    step: Count


class Fit(Message, tag="Fit"):
    """Train the whole model alone, for the batches of this round; `step` is the first of the local steps. `sizes`: the
    number of rows of each batch, if the server determines it.
    """

    step: Count
    sizes: Sizes = []


class Learn(Message, tag="Learn"):
    """Train the part of the model on the auxiliary head's loss for this number of batches. A batch that was sent and
    waits for its gradient is the first. `step` is the first of the local steps. Answered as Fit is. `sizes`: the number
    of rows of each drawn batch, if the server determines it.
    """

    step: Count
    batches: Count
    sizes: Sizes = []


class TakeHead(Message, tag="TakeHead"):
    """Take the auxiliary head that the server has fitted for this client. Behind it: its tensors by name."""

    step: Count


class GiveGradient(Message, tag="GiveGradient"):
    """Send the weight gradient of the backward pass whose step is on hold."""

    step: Count


class TakeGradient(Message, tag="TakeGradient"):
    """Step with this gradient at the base rate times `lr_factor`; `last`: no more batches of the round belong to the
    step. Behind it: named tensors. Has no answer.
    """

    step: Count
    lr_factor: Factor
    last: bool


class GiveModel(Message, tag="GiveModel"):
    """Send the model."""

    step: Count


class TakeModel(Message, tag="TakeModel"):
    """Replace the model. Behind it: named tensors. Has no answer."""

    step: Count


class TakeServer(Message, tag="TakeServer"):
    """The trained server's part of the model, after `round` rounds: only for a client that wants it. Behind it: named
    tensors. Has no answer.
    """

    step: Count
    round: Count


class GiveOptimizer(Message, tag="GiveOptimizer"):
    """Send the optimiser's state."""

    step: Count


class TakeOptimizer(Message, tag="TakeOptimizer"):
    """Replace the optimiser's state. Behind it: named tensors. Has no answer."""

    step: Count


class Evaluate(Message, tag="Evaluate"):
    """Run a part of the model in evaluation mode, without changing the state of training. Behind it: the part's inputs
    of R rows (samples for `lower` and `whole`, features for `tail`). `start`: number of the first row in its data set,
    which names the client's noise.
    """

    step: Count
    part: Literal["lower", "tail", "whole"]
    rows: Size
    start: Count = 0


class OwnForward(Message, tag="OwnForward"):
    """Run the client's lower part in evaluation mode on its own test rows, R of them from number `start` on, and send
    smashed data.
    """

    step: Count
    rows: Size
    start: Count


class OwnFinish(Message, tag="OwnFinish"):
    """Judge the client's own test rows, R of them from number `start` on. Behind it: the outputs of the server's part
    for their smashed data (in the U-shaped split, features). Has no answer.
    """

    step: Count
    rows: Size
    start: Count


class GiveScores(Message, tag="GiveScores"):
    """Send the metrics of all own test rows. A client with a whole model computes its outputs first, by itself."""

    step: Count


class Save(Message, tag="Save"):
    """Save the state after `step` steps, in two phases, so that all clients save it or none. First write it beside the
    old one; when all clients have done so, replace the old one.
    """

    step: Count
    phase: Literal["prepare", "commit"]


class Bye(Message, tag="Bye"):
    """The end of the run. This is the server's last message."""

    reason: Text


FromClient = (
    Hello
    | SmashedUp
    | TailUp
    | Settled
    | Fitted
    | ModelUp
    | OptimizerUp
    | GradientUp
    | EvaluationRows
    | ScoresUp
    | Saved
    | Failed
)
FromServer = (
    Welcome
    | Refused
    | BeginRound
    | Forward
    | Tail
    | Backward
    | Settle
    | Fit
    | Learn
    | GiveGradient
    | TakeGradient
    | TakeHead
    | GiveModel
    | TakeModel
    | TakeServer
    | GiveOptimizer
    | TakeOptimizer
    | Evaluate
    | OwnForward
    | OwnFinish
    | GiveScores
    | Save
    | Bye
)
Direction = Literal["to server", "to client"]


def failed(step: int, error: BaseException) -> Failed:
    """A client's message about an error after which it cannot continue, shortened to the limit of a message."""
    return Failed(step, type(error).__name__[:256], str(error)[:4096])


def specs(crossings: Iterable[Crossing]) -> list[TensorSpec]:
    """The form of a crossing tensor in messages. Raises WireError for a type that cannot be sent."""
    names = {dtype: name for name, dtype in TYPES.items()}
    found = []
    for c in crossings:
        if c.dtype not in names:
            raise WireError(f"tensors of {c.dtype} cannot be sent: let one of {', '.join(TYPES)} cross the cut")
        found.append(TensorSpec(shape=list(c.shape), dtype=names[c.dtype]))
    return found
