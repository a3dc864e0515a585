"""The messages between a server and its clients: what each says besides the tensors that travel behind it.

Everything has a type and a bound, so that a message that can be read is well formed. A change of any field, its meaning
or its bounds needs a new PROTOCOL.

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
Mass = Annotated[float, Meta(ge=0, le=1e300)]  # what rows count in a weighted mean: their number, if all count alike
Shape = Annotated[list[Size], Meta(max_length=16)]
Sizes = Annotated[list[Size], Meta(max_length=1 << 16)]
LocalStep = tuple[float, Size, Mass]  # (mean loss, rows, what these count together)
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
    """Base of all messages. Each has a tag, which is what it is called on the wire and in error messages."""

    @classmethod
    def called(cls) -> str:
        """Its tag."""
        return str(cls.__struct_config__.tag)


class TensorSpec(Struct):
    """A tensor that crosses a cut: the shape of one row, and the type by its name in torch."""

    shape: Shape
    dtype: Name


class StepTerms(Struct):
    """What a step means: rows per batch, the codecs of what goes up and down, and all other `options` that both sides
    train by, as texts.
    """

    batch: Size
    up: Name = "raw"
    down: Name = "raw"
    options: Annotated[dict[Name, Text], Meta(max_length=64)] = {}


class Names(Struct):
    """What numbers in the data stand for, in order (see `names.named`): how many names there are (0: none are known),
    a digest of all, and the first of them.
    """

    count: Count = 0
    digest: Name = ""
    first: Annotated[list[Name], Meta(max_length=1024)] = []


class Terms(Struct):
    """What both sides must agree on, word for word, before anything is trained (see `handshake.agree`). `classes` and
    `features`: what the labels and the columns of the data are called.
    """

    run: Name
    algorithm: Name
    part: Name  # the fingerprint of what the client holds
    crossing: Annotated[list[TensorSpec], Meta(max_length=256)]
    returning: Annotated[list[TensorSpec], Meta(max_length=256)]
    step: StepTerms
    classes: Names = msgspec.field(default_factory=Names)
    features: Names = msgspec.field(default_factory=Names)
    protocol: Protocol = PROTOCOL


# Client to server


class Hello(Message, tag="Hello"):
    """The first message: who the client is, and what it takes the run to be. It has `samples` training samples (n_k),
    which count `mass` together, and a state after `step` steps (0: a fresh one). `wants_server`: it would like to have
    the server's part of the model at the end. `tests`: a client with data of its own has held out so many test rows of
    them, of which it reports the `metrics` (0: it has none). `counts`: how many of its training samples are of each
    class, where the server adjusts logits by it.
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

    def __repr__(self) -> str:  # goes to logs: without the token
        return f"Hello(client={self.client!r}, samples={self.samples}, step={self.step}, terms={self.terms})"


class SmashedUp(Message, tag="Smashed"):
    """Answers Forward. Behind it: smashed data, each [R, s...], and the targets [R, t...] if they were asked for."""

    step: Count
    rows: Size


class TailUp(Message, tag="TailGradients"):
    """Answers Tail: the mean loss over the rows, which count `mass` together. Behind it: dLoss/d(features), each
    [R, f...].
    """

    step: Count
    rows: Size
    loss: float
    mass: Mass


class Settled(Message, tag="Settled"):
    """Answers Settle: all that was asked before is done."""

    step: Count


class Fitted(Message, tag="Fitted"):
    """Answers Fit and Learn: (mean loss, rows, what these count) of each local step."""

    step: Count
    losses: Annotated[list[LocalStep], Meta(max_length=1 << 16)]


class ModelUp(Message, tag="Model"):
    """Answers GiveModel. Behind it: the state of the client's model, named tensors."""

    step: Count


class OptimizerUp(Message, tag="Optimizer"):
    """Answers GiveOptimizer. Behind it: the state of the client's optimiser, named tensors."""

    step: Count


class GradientUp(Message, tag="Gradient"):
    """Answers GiveGradient. Behind it: the gradient of what is trained, named tensors."""

    step: Count


class EvaluationRows(Message, tag="EvaluationRows"):
    """Answers Evaluate and OwnForward: what the client's part gives in evaluation mode. Behind it: tensors of R
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
    `kept`: false where the client's disk is full: it goes on with what it kept before.
    """

    step: Count
    phase: Literal["prepare", "commit"]
    kept: bool = True


class Failed(Message, tag="Failed"):
    """The client cannot go on: the last that it says. `kind` is the name of the error, e.g. NonFiniteError."""

    step: Count
    kind: Name
    sentence: Text


# Server to client


class Welcome(Message, tag="Welcome"):
    """Answers a Hello that was accepted: the client is number `index` of `clients`, the run goes on after `step` steps.

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
    """Answers a Hello that was not: what is wrong, and what to do about it. The last that the server says."""

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
    or the only one for each of its rows. Has no answer of its own: whoever answers the next request, which may be
    Settle, has done this. `hold`: do not step; GiveGradient follows.
    """

    step: Count
    mode: Literal["own", "common"]
    rows: Size
    hold: bool = False


class Settle(Message, tag="Settle"):
    """Say when all that was asked before is done."""

    step: Count


class Fit(Message, tag="Fit"):
    """Train the whole model alone, for the batches of this round; `step` is the first of the local steps. `sizes`: of
    how many rows each batch is, where the server says that.
    """

    step: Count
    sizes: Sizes = []


class Learn(Message, tag="Learn"):
    """Train the part of the model on the auxiliary head's loss for so many batches; one that was sent and waits for its
    gradient is the first. `step` is the first of the local steps. Answered as Fit is. `sizes`: of how many rows
    each batch that is drawn is, where the server says that.
    """

    step: Count
    batches: Count
    sizes: Sizes = []


class TakeHead(Message, tag="TakeHead"):
    """Take the auxiliary head that the server has fitted for this client. Behind it: its tensors by name."""

    step: Count


class GiveGradient(Message, tag="GiveGradient"):
    """Send the weight gradient of the backward pass that is held."""

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
    """Run a part of the model in evaluation mode, leaving the state of training as it is. Behind it: tensors of R rows,
    what the part receives: samples for `lower` and `whole`, features for `tail`. `start`: number of the first row in
    its data set, by which a client's noise is named.
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
    """Judge the client's own test rows, R of them from number `start` on. Behind it: what the server's part gives for
    their smashed data, outputs or, in the U-shaped split, features. Has no answer.
    """

    step: Count
    rows: Size
    start: Count


class GiveScores(Message, tag="GiveScores"):
    """Send the metrics of all own test rows. A client with a whole model computes its outputs first, by itself."""

    step: Count


class Save(Message, tag="Save"):
    """Keep the state after `step` steps, in two phases, so that all clients keep it or none: first write it beside the
    old one, then, when all have, put it in its place.
    """

    step: Count
    phase: Literal["prepare", "commit"]


class Bye(Message, tag="Bye"):
    """The end: the last that the server says."""

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
    """What a client says of an error that it cannot go on from, shortened to what a message holds."""
    return Failed(step, type(error).__name__[:256], str(error)[:4096])


def specs(crossings: Iterable[Crossing]) -> list[TensorSpec]:
    """What crosses, as messages say it. Raises WireError for a type that does not travel."""
    names = {dtype: name for name, dtype in TYPES.items()}
    found = []
    for c in crossings:
        if c.dtype not in names:
            raise WireError(f"tensors of {c.dtype} cannot be sent: let one of {', '.join(TYPES)} cross the cut")
        found.append(TensorSpec(shape=list(c.shape), dtype=names[c.dtype]))
    return found
