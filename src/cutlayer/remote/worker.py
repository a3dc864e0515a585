"""The client's side: one client, which answers a fixed list of requests and never runs code that it receives.

It holds its data, its part of the model and its optimiser, and nothing of the server's part. It refuses every request
that its own algorithm does not need (`_SERVED`): the model leaves it only if the algorithm averages models or hands
them over. Between rounds, its state can be written beside the old one (prepare) and then replace it (commit), so that
all clients keep the same round or none does.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from cutlayer import checkpoint
from cutlayer.data.batches import Batches, Clocks
from cutlayer.data.samples import Samples
from cutlayer.defences.noise import Noise
from cutlayer.defences.pipeline import Defences, Guarded
from cutlayer.defences.watch import Watch, look_at
from cutlayer.engine.local import Client
from cutlayer.engine.simulated import Local, Shape, mass_of
from cutlayer.errors import (
    CutlayerError,
    DiskFullError,
    DistrustError,
    ForbiddenError,
    NonFiniteError,
    RunFolderError,
    WireError,
)
from cutlayer.folder import LAST
from cutlayer.frozen import load_moving, moving, trains
from cutlayer.models.parts import Crossing
from cutlayer.optim import MakeOptimizer, as_tensor, load_optimizer, restore_optimizer
from cutlayer.remote.allowance import Extent, Purse, statement
from cutlayer.remote.answers import Answers
from cutlayer.remote.audit import Audit
from cutlayer.remote.carrier import Answer, StoppedError
from cutlayer.scoring import ROWS_PER_PASS, Outputs, Tally, evaluate, reported
from cutlayer.stored import Count, all_finite, checked, fit, reading
from cutlayer.tasks import Task, Value
from cutlayer.text import listed, plain
from cutlayer.trained import TrainedModel
from cutlayer.types import Rows, aligned, as_tuple, joined
from cutlayer.verbs import (
    ALIGN,
    AVERAGE,
    BACKWARD,
    BACKWARD_TOGETHER,
    CLIENT_VERBS,
    FIT,
    FORWARD,
    HAND_OVER,
    LEARN,
    TAIL,
    VERBS,
    Traits,
)
from cutlayer.wire import RAW, Codec, Frame, agree, decode, decode_named, described, encode, encode_named
from cutlayer.wire import messages as m
from cutlayer.wire.tensors import Buffer

log = logging.getLogger(__name__)

Watching = Literal["off", "warn", "leave"]
_BLIND = 100  # backward passes after which a watch reports that it has seen nothing


@dataclass(frozen=True)
class Keeping:
    """For a client that wants to keep the whole model: facts `about` it (see `trained`), the names, shapes and types of
    the `server`'s part, and what the client holds.
    """

    about: Mapping[str, Any]
    server: Mapping[str, Crossing]
    shape: Shape


@dataclass(frozen=True)
class OwnTest:
    """For a client that is tested on some of its own data: the `samples` that it has held out, the `metrics` that it
    reports for them, what clients hold, the form of the model's output for a row (`outputs`), and the `names` of the
    classes. The samples and their targets stay here.
    """

    samples: Samples
    metrics: Sequence[str]
    shape: Shape
    outputs: Crossing
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Duty:
    """The setup of a client: its name and number, private data, its parts of the model, and the terms on which both
    sides agree. `folder` is for its state (None: nothing is stored). `watch`: the reaction if the gradients do not look
    like the task's. `shares`: the algorithm may send a gradient that several clients share. `needs`: the verbs that the
    algorithm uses; requests for other verbs are refused. `whole`: the client wants the server's part at the end, to
    keep the whole model in its folder. `own_test`: it is tested on its own rows. `seeks`: the server may request a
    batch by its number (cache_features). `moves_optimizer`: the optimiser's state travels with the model. `quota`: the
    batches of a round by the client's own configuration (None: not known); `study`: the training by that configuration.
    `purse`: what it may still answer; `audit`: its record of requests. `noise`: the noise on smashed data, whose
    epsilon is stated at `delta`. `rows`: the server determines the rows of a batch, and a round has at most this number
    (None: batches have b rows). `shift` [K] is added to the scores in losses that are computed here; `class_counts` [K]
    are for a server that adjusts logits by them.
    """

    name: str
    index: int
    samples: Samples
    lower: nn.Module
    tail: nn.Module | None
    make_optimizer: MakeOptimizer
    task: Task
    lr: float
    batch: int
    seed: int
    terms: m.Terms
    crossing: Sequence[Crossing]
    returning: Sequence[Crossing] = ()
    up: Codec = RAW
    down: Codec = RAW
    defences: Defences = field(default_factory=Defences)
    token: str = field(default="", repr=False)
    folder: Path | None = None
    watch: Watching = "off"
    shares: bool = False
    needs: frozenset[str] = VERBS
    whole: Keeping | None = None
    own_test: OwnTest | None = None
    seeks: bool = False
    moves_optimizer: bool = True
    quota: int | None = None
    rows: int | None = None
    shift: Tensor | None = None
    class_counts: Sequence[int] = ()
    study: Extent | None = None
    purse: Purse | None = None
    audit: Audit | None = None
    noise: Noise | None = None
    delta: float = 1e-5

    @property
    def traits(self) -> Traits:
        """What follows from the algorithm's needs."""
        return Traits(self.needs)


class Worker:
    """One client. `handle` answers one request; requests come in order. If `stop` is set, local training ends between
    two batches.
    """

    def __init__(self, duty: Duty) -> None:
        self.duty = duty
        self.client = Client(duty.index, duty.lower, duty.tail, duty.make_optimizer, duty.task, duty.shift)
        self._batches = Batches([np.arange(len(duty.samples))], duty.batch, duty.seed, [duty.index])
        self._rate = duty.lr
        self._quota = 0  # batches of this round
        self._left = 0  # of these, those that have not been drawn
        self._drawn = torch.empty(0, dtype=torch.int64)  # the numbers of the last batch's rows
        self._rows_left = 0  # that batches may have, if the server determines them
        self._pending: _Pending = "nothing"  # what the last batch waits for
        self._began = 0.0  # when the last request came
        self.stop: threading.Event | None = None
        self.steps = 0  # of the run, at the last saved state
        self._seen = 0  # the step of the last request: the progress of this process
        self._joined = False  # it was welcomed before, even if it only waited
        self._guarded: Guarded | None = None
        # The last step of local training, and its losses.
        self._fitted: tuple[int, list[Local]] | None = None
        self.watch = Watch()
        self.answers = Answers()  # since this process started
        self._warned = self._warned_of_model = False
        self._passes = 0  # backward passes since the watch began
        # What comes down: nothing, if the lower part is not trained.
        self._gradients = [c for c in duty.crossing if c.differentiable and trains(duty.lower)]
        self._tally: Tally | None = None  # of the own test rows that have been judged so far
        self._tallied = 0  # their number

    def hello(self) -> m.Hello:
        """The Hello, with this client's name and its terms of the run."""
        d = self.duty
        mass, own = mass_of(d.task, d.samples.y), d.own_test
        return m.Hello(
            client=d.name,
            terms=d.terms,
            samples=len(d.samples),
            mass=mass,
            step=self.steps,
            token=d.token,
            wants_server=d.whole is not None,
            tests=0 if own is None else len(own.samples),
            metrics=[] if own is None else list(own.metrics),
            counts=list(d.class_counts),
        )

    def welcome(self, welcome: m.Welcome) -> m.Refused | None:
        """Check the server's terms, and return to the state from which the run continues."""
        if refused := agree(welcome.terms, self.duty.terms, "the server", "the client"):
            return refused
        if welcome.index != self.duty.index:
            sentence = f"the server counts {self.duty.name} as number {welcome.index}, not {self.duty.index}"
            return m.Refused("client", sentence)
        try:
            self._return_to(welcome.step)
        except RunFolderError as error:
            return m.Refused("state", str(error))
        self._joined = True
        if self.duty.audit is not None:
            self.duty.audit.event("joined", step=welcome.step, clients=welcome.clients)
        if self.duty.whole is not None and not welcome.shares_server:
            log.warning("%s: the server keeps its part of the model: it has no share_server_model", self.duty.name)
        return None

    def handle(self, frame: Frame) -> Answer | None:
        """Answer a request; None if it has no answer. For any request, raises only CutlayerError: ForbiddenError for
        requests that this client does not permit, WireError for those that cannot be answered, NonFiniteError,
        DistrustError.
        """
        audit = self.duty.audit
        self._began = time.perf_counter()
        try:
            answer = self._answered(frame)
        except Exception as error:
            self.answers.refused(frame)
            if audit is not None:
                audit.refused(frame, error)
            named = self._named(frame, error)
            raise named from (error.__cause__ if named is error else error)
        finally:
            if self.duty.purse is not None:
                self.duty.purse.work(time.perf_counter() - self._began)
        self.answers.answered(frame, answer)
        if audit is not None:
            audit.answered(frame, answer)
        return answer

    @property
    def name(self) -> str:
        """The client's."""
        return self.duty.name

    def budget(self) -> dict[str, tuple[float, float | None]]:
        """(spent, allowed; None: without a limit) of each item of its budget; with noise, epsilon too."""
        d = self.duty
        return {} if d.purse is None else d.purse.standing(d.noise, d.delta)

    def _named(self, frame: Frame, error: Exception) -> CutlayerError:
        """The error as one of Cutlayer's own; logs that the client leaves."""
        if isinstance(error, (ForbiddenError, DistrustError)):
            log.error("%s leaves: %s", self.duty.name, error)
        if isinstance(error, CutlayerError):
            return error
        return WireError(  # of torch, or of the user's own code
            f"{type(frame.message).__name__} cannot be answered ({type(error).__name__}: {plain(error)}): look at what "
            "the server sends, and at this client's data and model"
        )

    def _answered(self, frame: Frame) -> Answer | None:
        message = frame.message
        served = _SERVED.get(type(message))
        if served is None:
            raise WireError(f"{type(message).__name__} is not a request that a client answers")
        self._check_needed(message, served)
        if self.duty.purse is not None:
            self.duty.purse.check_time()
        self._seen = getattr(message, "step", self._seen)
        return served.method(self, message, frame.body)

    def _check_needed(self, message: m.Message, served: _Served) -> None:
        """Raises ForbiddenError if this client's own algorithm does not need the request."""
        needs = self.duty.needs
        if served.verbs and not served.verbs & needs:
            found = ", ".join(sorted(needs & CLIENT_VERBS)) or "nothing"
            raise ForbiddenError(
                f"the server asks for {type(message).__name__}, which {self.duty.terms.algorithm} does not need (it "
                f"needs {found}): give server and clients the same algorithm, or do not join this server"
            )
        if why := served.unfit(self, message):
            raise ForbiddenError(f"the server asks for {type(message).__name__}{why}")

    def _begin_round(self, message: m.BeginRound, body: memoryview) -> None:
        if message.index >= message.total:
            raise WireError(f"the server begins round {message.index} of {message.total}: rounds are counted from 0")
        if (purse := self.duty.purse) is not None:
            purse.check_total(message.total)
            purse.spend("rounds")
            self._tell_privacy()
        self.client.stepping.settle()
        self._rate, self._quota = self.duty.lr * message.lr_factor, message.batches
        self._left, self._rows_left = message.batches, self.duty.rows or 0

    def _too_long(self, message: m.BeginRound) -> str:
        """Why a round is refused: it is longer than in this client's own configuration."""
        quota = self.duty.quota
        if quota is None or message.batches <= quota:
            return ""
        return (
            f" with {message.batches} batches, where this client's own configuration has {quota} in a round: give "
            "server and clients the same file, or do not join this server"
        )

    def _tell_privacy(self) -> None:
        """Log the privacy cost of the smashed data sent so far, if noise is added to them."""
        if sentence := self.privacy:
            log.info("%s: %s", self.duty.name, sentence)

    @property
    def privacy(self) -> str:
        """The privacy cost of the smashed data sent so far; empty if no noise is added, or nothing was sent."""
        d = self.duty
        if d.noise is None or d.purse is None or not d.purse.spent.releases:
            return ""
        return f"privacy spent so far: {statement(d.noise, d.purse.spent.releases, d.delta)}"

    def close(self) -> None:
        """The end of this process: what was spent is stored and logged."""
        self._tell_privacy()
        if self.duty.purse is not None:
            self.duty.purse.close()
        if self.duty.audit is not None:
            spent = {} if self.duty.purse is None else asdict(self.duty.purse.spent)
            self.duty.audit.event("ended", spent=spent)
            self.duty.audit.close()

    def _settle(self, message: m.Settle, body: memoryview) -> Answer:
        return m.Settled(message.step), ()

    def _spend(self, what: str, count: int = 1) -> None:
        """Raises BudgetError if this exceeds the client's budget."""
        if self.duty.purse is not None:
            self.duty.purse.spend(what, count)

    def _give_model(self, message: m.GiveModel, body: memoryview) -> Answer:
        self._spend("models")
        self.client.stepping.settle()
        return m.ModelUp(message.step), encode_named(state_of(self.client.module))

    def _take_model(self, message: m.TakeModel, body: memoryview) -> None:
        self.client.stepping.settle()
        module = self.client.module
        own = state_of(module)
        received = _finite(decode_named(body, described(own)), "the model")
        if self.duty.watch != "off":
            self._look_at_model(received, own)
        load_moving(module, received)

    def _look_at_model(self, received: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        """Watch a model that is to replace this client's. Raises DistrustError if the client is to leave."""
        look = look_at(received, own)
        if not look.suspicious or self._warned_of_model:
            return
        sentence = (
            f"the model that the server sends does not look like one of the study: it is {look.distance:.3g} times as "
            f"far from {self.duty.name}'s own as that is from nothing, and {look.passing:.0%} of the rows of "
            f"{look.name!r} pass one input on unchanged, where in its own it is {look.own:.0%}"
        )
        if self.duty.watch == "leave":
            raise DistrustError(f"{sentence}; {self.duty.name} leaves, as --watch leave says")
        self._warned_of_model = True
        log.warning("%s: %s", self.duty.name, sentence)

    def _take_head(self, message: m.TakeHead, body: memoryview) -> None:
        """Take the auxiliary head that the server has fitted. Raises WireError."""
        head = self.client.tail
        assert head is not None, "an algorithm that needs ALIGN has auxiliary heads"
        head.load_state_dict(_finite(decode_named(body, described(head.state_dict())), "the auxiliary head"))

    def _take_server(self, message: m.TakeServer, body: memoryview) -> None:
        """Keep the whole model: the server's part with this client's own. Raises WireError, RunFolderError."""
        d = self.duty
        if d.whole is None or d.folder is None:
            raise ForbiddenError(
                "the server sends its part of the model, which this client's configuration does not want "
                "(share_server_model)"
            )
        server = _finite(decode_named(body, d.whole.server), "the server's part of the model")
        parts = (
            {"lower": d.lower} if d.whole.shape != "u-shaped" or d.tail is None else {"lower": d.lower, "tail": d.tail}
        )
        own = {name: tensor for part in parts.values() for name, tensor in part.state_dict().items()}
        TrainedModel.of_client(d.whole.about, d.index, own, server, message.round).write(d.folder / LAST)
        log.info("%s: the whole model is kept in %s", d.name, d.folder)

    def _unmoved(self, message: m.Message) -> str:
        """Why an optimiser's state is not sent."""
        if self.duty.moves_optimizer or (isinstance(message, m.TakeOptimizer) and self.duty.traits.gradients_cross):
            return ""
        return (
            ", but by this client's configuration the optimiser's state stays with it (hand_over_optimizer): give "
            "server and clients the same file, or do not join this server"
        )

    def _give_optimizer(self, message: m.GiveOptimizer, body: memoryview) -> Answer:
        optimizer = self.client.optimizer
        return m.OptimizerUp(message.step), encode_named({} if optimizer is None else flattened(optimizer))

    def _take_optimizer(self, message: m.TakeOptimizer, body: memoryview) -> None:
        if self.client.optimizer is not None:
            restore(self.client.optimizer, body)

    def _draw(self, size: int | None = None) -> tuple[Samples, int]:
        self._spend("batches")
        samples = self.duty.samples
        foreseen = size is None and samples.ahead > 0
        if foreseen:
            samples.foresee(self._batches.coming([0], [self._left], 1 + samples.ahead))
        rows, sizes, clocks = self._batches.draw([0], None if size is None else [size])
        self._drawn = rows
        self._left -= 1
        self._rows_left -= size or 0
        batch = samples.batch(rows, self._batches.epochs([0], sizes, clocks), sizes.tolist() if foreseen else ())
        return batch, int(clocks[0])

    def _unfit_forward(self, message: m.Forward) -> str:
        """Why no smashed data are sent: labels stay here, the client chooses its batches, or the round is over."""
        if message.labels and self.duty.traits.u_shaped:
            return f" with labels, which stay with the clients in {self.duty.terms.algorithm}: do not join this server"
        if message.batch is not None and not self.duty.seeks:
            return (
                f" of batch number {message.batch}, but a client draws its batches itself unless features are cached "
                "(cache_features): do not join this server"
            )
        return self._unfit_sizes([] if message.take is None else [message.take], 1) or self._unfit_round(message)

    def _unfit_sizes(self, sizes: Sequence[int], batches: int) -> str:
        """Why batches of these sizes are not drawn (without sizes: the client chooses them)."""
        if self.duty.rows is None:
            return f" of {sizes[0]} rows, but a client draws batches of {self.duty.batch} (sampling)" if sizes else ""
        if len(sizes) != batches or not all(sizes) or sum(sizes) > self._rows_left:
            return (
                f" on {len(sizes)} batches of {sum(sizes)} rows, where {batches} are due and {self._rows_left} rows are"
                " left of the round (sampling): do not join this server"
            )
        return ""

    def _unfit_round(self, message: m.Message) -> str:
        """Why nothing is trained now: no round has begun, or all its batches were drawn."""
        if self._left > 0:
            return ""
        begun = f"after all {self._quota} batches of the round" if self._quota else "without a round begun"
        return f" {begun}: a client trains on the batches of a round, no others"

    def _unfit_fit(self, message: m.Fit) -> str:
        if self._done(message.step):
            return ""
        return self._unfit_round(message) or self._unfit_sizes(message.sizes, self._left if self.duty.rows else 0)

    def _unfit_learn(self, message: m.Learn) -> str:
        most = self._left + (self._pending == "gradient")
        if self._done(message.step):
            return ""
        if 0 < message.batches <= most:
            drawn = message.batches - (self._pending == "gradient")
            return self._unfit_sizes(message.sizes, drawn if self.duty.rows else 0)
        return f" on {message.batches} batches, where {most} are left of the round: it trains on those, no others"

    def _done(self, step: int) -> bool:
        """Whether the local training of that step was already done, and only its answer was lost."""
        return self._fitted is not None and self._fitted[0] == step

    def _forward(self, message: m.Forward, body: memoryview) -> Answer:
        if message.batch is not None:
            self._batches.drawn[0] = message.batch
        batch, clock = self._draw(message.take)
        if self.duty.purse is not None:
            self.duty.purse.send(self._drawn.numpy())
        smashed = self.client.forward(batch, self.duty.seed, clock)
        self._pending, self._guarded = "tail" if self.duty.traits.u_shaped else "gradient", None
        sent = [s.detach() for s in smashed]
        if self.duty.defences.active:
            self._guarded = self.duty.defences.step(
                tuple(sent), [batch.rows], [self.duty.index], [len(batch.y)], [clock]
            )
            sent = list(self._guarded.rows)
        codecs = [self.duty.up] * len(sent)
        if message.labels:
            sent, codecs = [*sent, batch.y], [*codecs, RAW]
        return m.SmashedUp(message.step, len(batch.y)), encode(sent, codecs)

    def _backward(self, message: m.Backward, body: memoryview) -> None:
        size = len(self.client.labels)
        if message.mode == "common" and not self.duty.shares:
            raise ForbiddenError("a gradient came that clients share: the configuration's algorithm sends each its own")
        if self._pending != "gradient":
            raise WireError(f"a gradient came where {_DUE[self._pending]} is due: steps come in order")
        if message.rows != size and not (message.mode == "common" and (message.rows == 1 or message.rows > size)):
            raise WireError(f"a gradient of {message.rows} rows came for a batch of {size}")
        gradient = decode(body, self._gradients, message.rows, self.duty.down)
        if gradient and self.duty.watch != "off" and self.duty.task.targets == "class":
            self._look(gradient if message.mode == "own" else None)
        if message.mode == "common":
            gradient = tuple(g.expand(size, *g.shape[1:]) if len(g) == 1 else g[:size] for g in gradient)
        if self._guarded is not None:
            gradient = self._guarded.back(gradient)
        self._pending = "held" if message.hold else "nothing"
        self.client.backward(gradient)
        if not message.hold:
            self.client.step(self._rate, last=self._left <= 0)

    def _unfit_backward(self, message: m.Backward) -> str:
        verb = BACKWARD_TOGETHER if message.hold else BACKWARD
        if verb in self.duty.needs:
            return ""
        what = "and a weight gradient" if message.hold else "and a step"
        return f" {what}, which {self.duty.terms.algorithm} has not"

    def _give_gradient(self, message: m.GiveGradient, body: memoryview) -> Answer:
        if self._pending != "held":
            raise WireError(f"a weight gradient is asked for where {_DUE[self._pending]} is due: steps come in order")
        self._pending = "nothing"
        return m.GradientUp(message.step), encode_named(self.client.gradient())

    def _take_gradient(self, message: m.TakeGradient, body: memoryview) -> None:
        like = described({name: p for name, p in self.client.module.named_parameters() if p.requires_grad})
        gradient = _finite(decode_named(body, like), "the sum of gradients")
        self.client.take(gradient, self.duty.lr * message.lr_factor, last=message.last)

    def _look(self, own: Rows | None) -> None:
        """Watch a gradient that is only for this client (None: it is shared). Raises DistrustError if the client is to
        leave.
        """
        self._passes += 1
        if own is not None:
            sent = self.client.smashed if self._guarded is None else self._guarded.rows
            self.watch.observe(joined(own), joined(sent), self.client.labels)
        if self._warned:
            return
        if self.watch.suspicious:
            sentence = (
                f"the server's gradients do not look like those of the task: over {self.watch.observed} batches labels "
                f"explain them with a score of {self.watch.score:.2f}, where 0.5 is chance"
            )
            if self.duty.watch == "leave":
                raise DistrustError(f"{sentence}; {self.duty.name} leaves, as --watch leave says")
        elif self._passes == _BLIND and not self.watch.observed:
            sentence = (
                f"the watch has seen nothing in {_BLIND} batches: their gradients were shared, or no two samples of a "
                "batch had the same label, or all"
            )
        else:
            return
        self._warned = True
        log.warning("%s: %s", self.duty.name, sentence)

    def _tail(self, message: m.Tail, body: memoryview) -> Answer:
        client, d, size = self.client, self.duty, len(self.client.labels)
        if self._pending != "tail" or message.rows != size:
            due = _DUE[self._pending] if self._pending != "tail" else f"a batch of {size} rows"
            raise WireError(f"features of {message.rows} rows came where {due} is due: steps come in order")
        features = decode(body, d.returning, message.rows, d.down)
        loss, rows = client.finish(features, d.seed)
        self._pending = "gradient"
        return m.TailUp(message.step, message.rows, loss.item(), client.mass), encode(rows, d.up)

    def _fit(self, message: m.Fit, body: memoryview) -> Answer:
        if self._fitted is None or not self._done(message.step):
            self._fitted = message.step, self._train(list(message.sizes))
        return m.Fitted(message.step, [(s.loss, s.rows, s.mass) for s in self._fitted[1]]), ()

    def _learn(self, message: m.Learn, body: memoryview) -> Answer:
        if self._fitted is None or not self._done(message.step):
            self._fitted = message.step, self._learn_alone(message.batches, list(message.sizes))
        return m.Fitted(message.step, [(s.loss, s.rows, s.mass) for s in self._fitted[1]]), ()

    def _learn_alone(self, batches: int, sizes: list[int]) -> list[Local]:
        """Local steps on the auxiliary head's loss."""
        taken: list[Local] = []
        self._pending = "nothing"
        while len(taken) < batches:
            self._pause()
            if not self.client.smashed:
                batch, clock = self._draw(sizes.pop(0) if sizes else None)
                self.client.forward(batch, self.duty.seed, clock)
            try:
                taken.append(self.client.learn_alone(self.duty.seed, self._rate, last=self._left <= 0))
            except NonFiniteError as error:
                raise error.at(len(taken)) from None
        return taken

    def _train(self, sizes: list[int]) -> list[Local]:
        """The local steps of this round."""
        taken: list[Local] = []
        while self._left > 0:
            self._pause()
            batch, clock = self._draw(sizes.pop(0) if sizes else None)
            outputs = self.client.forward(batch, self.duty.seed, clock)
            try:
                taken.append(self.client.learn(outputs, self._rate, last=self._left <= 0))
            except NonFiniteError as error:
                raise error.at(len(taken)) from None
        return taken

    def _pause(self) -> None:
        """Called between two batches of local training. Raises StoppedError if this process is to end."""
        if self.stop is not None and self.stop.is_set():
            raise StoppedError("stopped between two batches")
        if self.duty.purse is not None:
            self.duty.purse.check_time(time.perf_counter() - self._began)

    def _unfit_part(self, message: m.Evaluate) -> str:
        """Why a part of the model is not evaluated: the client does not have this part, or sends its outputs in another
        way.
        """
        traits = self.duty.traits
        parts = ["whole"] if traits.whole else ["lower", "tail"] if traits.u_shaped else ["lower"]
        if message.part in parts:
            return ""
        if message.part == "tail":
            return " of a tail, which only clients of a U-shaped split have"
        return f" of the part {message.part!r}: a client of {self.duty.terms.algorithm} has {listed(parts)}"

    def _evaluate(self, message: m.Evaluate, body: memoryview) -> Answer:
        d, c = self.duty, self.client
        if not 0 < message.rows <= ROWS_PER_PASS:
            raise WireError(
                f"the server asks to evaluate {message.rows} rows at once: they are 1 to {ROWS_PER_PASS} in a piece"
            )
        self._spend("evaluations")
        c.stepping.settle()
        c.module.eval()
        with torch.no_grad():
            if message.part == "tail" and c.tail is not None:
                features = aligned(decode(body, d.returning, message.rows, d.down.evaluating))
                given, codec = as_tuple(c.tail(features))[:1], RAW
            else:
                inputs = [Crossing(tuple(x.shape[1:]), x.dtype) for x in d.samples.form.rows]
                x = aligned(decode(body, inputs, message.rows))
                given, codec = as_tuple(c.lower(x)), d.up.evaluating
                if message.part == "whole":
                    given, codec = given[:1], RAW
                if message.part == "lower" and d.defences.active:
                    given = d.defences.evaluation(given, [d.index], message.start)
        return m.EvaluationRows(message.step, message.rows), encode(given, codec)

    @property
    def _own_test(self) -> OwnTest:
        """Raises ForbiddenError for a client that is not tested on its own rows."""
        if self.duty.own_test is None:
            raise ForbiddenError(
                "the server asks about test rows of the client's own, of which this client has held out none "
                "(evaluate_on)"
            )
        return self.duty.own_test

    def _own_rows(self, message: m.OwnForward | m.OwnFinish) -> Samples:
        """The requested own test rows. They are requested in fixed pieces, so that no row is sent with other noise
        because of its neighbours. Raises WireError.
        """
        own, start = self._own_test, message.start
        if own.shape == "whole":
            raise ForbiddenError(f"the server asks for {type(message).__name__}, but this client holds the whole model")
        if start % ROWS_PER_PASS or not message.rows or message.rows != min(ROWS_PER_PASS, len(own.samples) - start):
            raise WireError(
                f"the server asks about {message.rows} own test rows from {start} on, of {len(own.samples)}: they are "
                f"asked about in pieces of {ROWS_PER_PASS}"
            )
        return own.samples[start : start + message.rows]

    def _own_forward(self, message: m.OwnForward, body: memoryview) -> Answer:
        c, d = self.client, self.duty
        part = self._own_rows(message)
        self._spend("evaluations")
        c.stepping.settle()
        c.module.eval()
        with torch.no_grad():
            given = as_tuple(c.lower(part.rows))
            if d.defences.active:
                given = d.defences.own_test(given, d.index)
        return m.EvaluationRows(message.step, message.rows), encode(given, d.up.evaluating)

    def _own_finish(self, message: m.OwnFinish, body: memoryview) -> None:
        c, d, own = self.client, self.duty, self._own_test
        part = self._own_rows(message)
        if message.start == 0:
            self._tally, self._tallied = Tally(d.task, [d.index], own.names), 0
        if self._tally is None or message.start != self._tallied:
            raise WireError(
                f"the server sends outputs for own test rows from {message.start} on, where {self._tallied} are due"
            )
        with torch.no_grad():
            if c.tail is not None and own.shape == "u-shaped":
                outputs = as_tuple(c.tail(aligned(decode(body, d.returning, message.rows, d.down.evaluating))))[0]
            else:
                (outputs,) = aligned(decode(body, [own.outputs], message.rows))
            self._tally.add([d.index], outputs.to(part.y.device), part.y)
        self._tallied += message.rows

    def _give_scores(self, message: m.GiveScores, body: memoryview) -> Answer:
        d, own = self.duty, self._own_test
        if own.shape == "whole":
            self._spend("evaluations")
            found = evaluate(d.task, own.samples, [d.index], self._own_outputs, names=own.names)
        elif self._tally is None or self._tallied != len(own.samples):
            raise WireError(
                f"the server asks for scores after {self._tallied} of {len(own.samples)} own test rows: they are of all"
            )
        else:
            found, self._tally, self._tallied = self._tally.scores(), None, 0
        return m.ScoresUp(message.step, len(own.samples), as_scores(reported(found[d.index]))), ()

    def _own_outputs(self, models: Sequence[int], part: Samples, start: int) -> Outputs:
        """The outputs of this client's whole model for own test rows."""
        self.client.stepping.settle()
        self.client.module.eval()
        return models, as_tuple(self.client.lower(part.rows))[0]

    def _save(self, message: m.Save, body: memoryview) -> Answer:
        folder = self.duty.folder
        if folder is not None:
            self._commit(folder)  # at "prepare", too: the server has continued from the state prepared before
        if message.phase == "commit":
            self.steps = message.step
        elif folder is not None:
            try:
                checkpoint.write(folder / _PREPARED, self._state(message.step))
            except DiskFullError as error:  # the state in memory is still good: the next checkpoint may find space
                log.error(
                    "%s: %s; until then it goes on, but after a restart only from its state before this one",
                    self.duty.name,
                    str(error).partition("; make room")[0] + "; make room",
                )
                return m.Saved(message.step, message.phase, kept=False), ()
        return m.Saved(message.step, message.phase), ()

    def _commit(self, folder: Path) -> None:
        """Replace the saved state by the prepared one, if there is one."""
        if (folder / _PREPARED).exists():
            (folder / _PREPARED).replace(folder / _KEPT)

    def _state(self, step: int) -> dict[str, Any]:
        c = self.client
        c.stepping.settle()
        return {
            "step": step,
            **self._batches.state(),
            "model": c.module.state_dict(),
            "optimizer": c.optimizer.state_dict() if c.optimizer else {},
        }

    def _return_to(self, step: int) -> None:
        """Take the state from which the run continues after `step` steps.

        A client that only lost its connection continues as it is. If the server has returned to an earlier step, or
        this process is new, it takes the state saved after exactly that step; if the run continued without this client,
        the last state that it saved before. Raises RunFolderError if there is no such state, or if a state that both
        sides saved is of a later step, which is not overwritten.

        A state of a later step that was only prepared belongs to a checkpoint that the server never wrote, and is
        dropped.
        """
        if (self._joined or self._seen) and self._seen <= step:
            return
        states, folder = self._states(), self.duty.folder
        kept = {state.step: state for state in states.values()}
        if _KEPT in states and (last := states[_KEPT].step) > step:
            raise RunFolderError(
                f"{str(folder)!r} holds the state of {self.duty.name} after step {last}, but the run goes on after "
                f"step {step}: it is another run, or the server has lost its folder; join from another folder, or "
                "remove this one to begin anew"
            )
        if folder is not None and any(at > step for at in kept):
            (folder / _PREPARED).unlink(missing_ok=True)
        if step == self._seen == 0 and step not in kept:
            if folder is not None:  # to return to if the server begins again before it has saved anything
                checkpoint.write(folder / _KEPT, self._state(step))
        elif step in kept:
            self._take(kept[step])
        elif earlier := [at for at in kept if at < step]:
            self._take(kept[max(earlier)])
        else:
            raise RunFolderError(
                f"the run goes on after step {step}, but {self.duty.name} kept no state of that step: "
                "join from its own folder"
            )

    def _states(self) -> dict[str, _ClientState]:
        """The states in the folder, by their files' names. Raises RunFolderError."""
        folder = self.duty.folder
        paths = [] if folder is None else [folder / _PREPARED, folder / _KEPT]
        return {path.name: self._stored(path) for path in paths if path.exists()}

    def _stored(self, path: Path) -> _ClientState:
        """A state of this client. Raises RunFolderError if the file contains something else."""
        with reading(path, _BACK):
            found = checked(checkpoint.read(path), _ClientState)
            found.check(1)
            fit(found.model, self.client.module.state_dict(), "the model")
            restore_optimizer(copy.deepcopy(self.client.optimizer), found.optimizer, "the optimiser")
            return found

    def _take(self, state: _ClientState) -> None:
        self._fitted = None
        self._batches.load(state)
        self.client.module.load_state_dict(state.model)
        if self.client.optimizer:
            load_optimizer(self.client.optimizer, state.optimizer)
        self.steps = self._seen = state.step


class _ClientState(Clocks, kw_only=True):
    step: Count
    model: dict[str, Tensor]
    optimizer: dict[str, Any]


_BACK = "restore it from a copy, or begin the run anew with another folder"
_PREPARED, _KEPT = "client-next.safetensors", "client.safetensors"


_Pending = Literal["nothing", "tail", "gradient", "held"]
_DUE: dict[_Pending, str] = {
    "nothing": "a forward pass",
    "tail": "the tail's turn",
    "gradient": "a gradient",
    "held": "GiveGradient",
}


def _fits(worker: Worker, message: m.Message) -> str:
    """No objection."""
    return ""


def _finite(tensors: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    """The same tensors. Raises WireError if a number is NaN or infinite."""
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise WireError(f"{what} that the server sends holds NaN or infinite numbers in {name!r}: it is refused")
    return tensors


@dataclass(frozen=True)
class _Served:
    """How a request is answered, and which verbs of the seam it serves. One of them must be among the algorithm's
    needs; without verbs, it is always permitted. `unfit` says why this particular request is not permitted, as the end
    of a sentence; it is empty if it is permitted.
    """

    method: Callable[[Worker, Any, memoryview], Answer | None]
    verbs: frozenset[str] = frozenset()
    unfit: Callable[[Worker, Any], str] = _fits


_SERVED: dict[type[m.Message], _Served] = {
    m.BeginRound: _Served(Worker._begin_round, unfit=Worker._too_long),
    m.Forward: _Served(Worker._forward, frozenset({FORWARD}), Worker._unfit_forward),
    m.Tail: _Served(Worker._tail, frozenset({TAIL})),
    m.Backward: _Served(Worker._backward, frozenset({BACKWARD, BACKWARD_TOGETHER}), Worker._unfit_backward),
    m.GiveGradient: _Served(Worker._give_gradient, frozenset({BACKWARD_TOGETHER})),
    m.TakeGradient: _Served(Worker._take_gradient, frozenset({BACKWARD_TOGETHER})),
    m.Fit: _Served(Worker._fit, frozenset({FIT}), Worker._unfit_fit),
    m.Learn: _Served(Worker._learn, frozenset({LEARN}), Worker._unfit_learn),
    m.TakeHead: _Served(Worker._take_head, frozenset({ALIGN})),
    m.GiveModel: _Served(Worker._give_model, frozenset({AVERAGE, HAND_OVER})),
    m.TakeModel: _Served(Worker._take_model, frozenset({AVERAGE, HAND_OVER, BACKWARD_TOGETHER})),
    m.TakeServer: _Served(Worker._take_server),
    m.GiveOptimizer: _Served(Worker._give_optimizer, frozenset({HAND_OVER}), Worker._unmoved),
    m.TakeOptimizer: _Served(Worker._take_optimizer, frozenset({HAND_OVER, BACKWARD_TOGETHER}), Worker._unmoved),
    m.Settle: _Served(Worker._settle),
    m.Evaluate: _Served(Worker._evaluate, unfit=Worker._unfit_part),
    m.OwnForward: _Served(Worker._own_forward),
    m.OwnFinish: _Served(Worker._own_finish),
    m.GiveScores: _Served(Worker._give_scores),
    m.Save: _Served(Worker._save),
}
"""All requests that a client answers."""


def as_scores(scores: Mapping[str, Value]) -> dict[str, m.Score]:
    """Scores in the form of a message."""
    return {name: _numbers(value) if isinstance(value, tuple) else value for name, value in scores.items()}


def _numbers(values: Sequence[Value]) -> list[float | None]:
    return [value if isinstance(value, float | int) else None for value in values]


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters and buffers by name, without frozen ones: everything that is sent."""
    return {name: tensor.detach() for name, tensor in moving(module).items()}


def flattened(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's state as named tensors: "<number of the parameter>/<name>", plain numbers as tensors too."""
    return {key: as_tensor(value) for key, value in _values(optimizer).items()}


def _values(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimiser's state as a flat mapping."""
    state = optimizer.state_dict()["state"]
    return {f"{number}/{name}": v for number, values in state.items() for name, v in values.items() if v is not None}


def restore(optimizer: torch.optim.Optimizer, body: Buffer) -> None:
    """Take a state from `flattened` of an optimiser of the same kind, whose parameters have the same shapes.

    Raises WireError if the state is not of this form, or contains NaN.
    """
    expected = _values(_stepped(optimizer))
    like = described({key: as_tensor(value) for key, value in expected.items()})
    tensors = _finite(decode_named(body, like), "the optimiser's state")
    grouped: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        number, name = key.split("/", 1)
        grouped.setdefault(int(number), {})[name] = tensor if isinstance(expected[key], Tensor) else tensor.item()
    load_optimizer(optimizer, {**optimizer.state_dict(), "state": grouped})


def expected_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The form of the state after steps were taken: that of a copy of the optimiser after one step."""
    return flattened(_stepped(optimizer))


def _stepped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """A copy of an optimiser that has taken a step."""
    twin = copy.deepcopy(optimizer)
    for group in twin.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    twin.step()
    return twin
