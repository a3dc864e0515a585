"""The server's cohort of clients on other machines: the seam over a network.

Every verb is one exchange: requests to all clients concerned, and the answers that arrive. A client that does not
answer in time, or is gone, did not take part; algorithms read this from the results. A backward pass is sent together
with the next request, so a step costs one round trip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, MutableSequence, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeVar

import msgspec
import numpy as np
import torch
from torch import Tensor

from cutlayer.adapters import cropped, filled
from cutlayer.averaging import average
from cutlayer.cohort import Footprint, Held, Predict, Summed, Tell
from cutlayer.data.samples import AtClient, Samples
from cutlayer.data.sampling import Turns
from cutlayer.engine.local import Client, named_as_whole, outputs_with
from cutlayer.engine.simulated import Local, Routine, Shape, together
from cutlayer.errors import AbsentError, NonFiniteError, StepLostError, TrainingError, WireError
from cutlayer.frozen import load_moving, resting, trains
from cutlayer.gradients import summed
from cutlayer.models.parts import Crossing
from cutlayer.remote import announced
from cutlayer.remote.carrier import Carrier, Lost, Request
from cutlayer.remote.underway import Underway
from cutlayer.remote.vetting import Vetting, largest, outlying
from cutlayer.remote.worker import expected_state, flattened, restore, state_of
from cutlayer.scoring import ROWS_PER_PASS, Outputs, evaluation, judged
from cutlayer.stored import Amount, Count, Digits, Stored, below, checked, fit, fits, sized
from cutlayer.tasks import Value
from cutlayer.types import CutGradients, Evaluation, Round, Rows, Smashed, Step, TailGradients, aligned, by_cut
from cutlayer.verbs import CLIENT_VERBS
from cutlayer.wire import RAW, Codec, Frame, decode, decode_named, described, encode, encode_named, payload_sizes
from cutlayer.wire import messages as m
from cutlayer.wire.conversation import ANSWERS
from cutlayer.wire.tensors import Buffer

_ACKNOWLEDGED = (m.Saved, m.Settled)  # answers to posted requests: they only say that these are done
T = TypeVar("T")


@dataclass(frozen=True)
class End:
    """The tensors that cross at a cut, and a client of one kind (with one cut, or one rank of adapters), of which the
    server knows only shapes and names.
    """

    crossing: Sequence[Crossing]
    twin: Client


@dataclass(frozen=True)
class Remote(Routine):
    """How a group of clients is set up, as the server sees it. `samples` are n_k; `twin` is a client like theirs, of
    which the server knows only shapes and names; `crossing` and `returning` go up and down at the cuts; `targets` and
    `outputs` are a row's target and output; `masses` the total weights of each client's samples; `wanting` are the
    clients that want the server's part at the end. `tests`: the number of own test rows that each client has held out;
    `scores` have the form of the scores that it reports for them. `class_counts` [C][K]: the samples per class that
    clients announce, if the server adjusts logits by them. If clients differ in their cuts, or in the ranks of their
    adapters, `kinds` [C] says how, `ends` [kinds] belong to each kind, and `twin` is of the largest.

    Every exchange has `deadline` seconds (None: no limit), and longer if fewer than `quorum` (a fraction) have answered
    by then. A client that sends NaN, a wrong shape or an invalid message is excluded from the run; or it may return
    ("readmit"), or it ends the run ("stop"). Local training has `per_batch` seconds more for each step. A client may
    have `most_samples` (None: many times those of the others).
    """

    samples: MutableSequence[int]
    twin: Client
    crossing: Sequence[Crossing]
    targets: Crossing
    outputs: Crossing
    masses: MutableSequence[float]
    up: Codec = RAW
    down: Codec = RAW
    deadline: float | None = None
    quorum: float = 0.5
    faulty: Literal["exclude", "readmit", "stop"] = "exclude"
    per_batch: float = 0.0
    most_samples: int | None = None
    returning: Sequence[Crossing] = field(default=())
    wanting: set[int] = field(default_factory=set)
    tests: MutableSequence[int] = field(default_factory=list)
    scores: Mapping[str, Value] = field(default_factory=dict)
    class_counts: MutableSequence[list[int]] = field(default_factory=list)
    ends: Sequence[End] = ()
    kinds: Sequence[int] = ()

    def kind(self, client: int) -> int:
        """The kind of a client: 0 if all are alike."""
        return self.kinds[client] if self.kinds else 0

    def end(self, client: int) -> End:
        """The tensors that cross at a client's cut, and a client like it."""
        return self.ends[self.kind(client)] if self.kinds else End(self.crossing, self.twin)

    @property
    def ranked(self) -> bool:
        """Whether clients differ in the ranks of their adapters."""
        return bool(self.kinds) and not self.cuts

    @cached_property
    def counts_alike(self) -> bool:
        """Whether every row has weight 1."""
        return self.task.weights(torch.zeros(1, *self.targets.shape, dtype=self.targets.dtype)) is None


_NAMES = {"class_counts": "class counts", "twins_optimizer": "twin's optimizer", "at_work": "at work"}


class _RemoteState(Stored, rename=_NAMES):
    step: Count
    samples: list[Count]
    masses: list[Amount]
    tests: list[Count]
    holder: Count | None
    alike: bool
    average: dict[str, Tensor]
    stale: list[Count]
    excluded: dict[Digits, str]
    class_counts: list[list[Count]] = msgspec.field(default_factory=list)
    handed: list[Tensor] = msgspec.field(default_factory=list)
    at_work: dict[Digits, Count] = msgspec.field(default_factory=dict)
    twins_optimizer: dict[str, Tensor] | None = None


class RemoteCohort:
    """All clients on the other side of a hub. `tell` is called for rounds, and for clients that connect, do not answer
    or are excluded. `ready` is called before each round and returns when enough clients are connected. If the run needs
    one of certain clients, `ready` is called with these and gives them time to return. `can`: the verbs of the seam
    that it offers.
    """

    can: ClassVar[frozenset[str]] = CLIENT_VERBS

    def __init__(
        self,
        hub: Carrier,
        setup: Remote,
        *,
        tell: Tell | None = None,
        ready: Callable[[frozenset[int]], None] | None = None,
    ) -> None:
        self.hub, self.setup = hub, setup
        self._tell = tell or (lambda happened, facts: None)
        self._ready = ready or (lambda _: None)
        self._step = 0  # numbers exchanges that belong together
        self._quota = np.zeros(len(setup.samples), np.int64)
        self._participants: tuple[int, ...] = ()
        self._lr_factor = 1.0  # of this round
        self._in_step = False  # all clients take the same steps, and so does the twin
        self._turns: Turns | None = None  # of this round, if batches do not have b rows
        self._takes: dict[int, list[int]] = {}  # the sizes of the batches that are now requested
        self._holder: int | None = None
        self._asked: tuple[int, ...] = ()  # of the last forward pass
        self._sought: dict[int, int] = {}  # client -> number of the batch that is requested next
        self._waiting: set[int] = set()  # of these, those whose batch still waits for its backward pass
        self._sizes: dict[int, int] = {}
        self._later: dict[int, list[Request]] = {}  # goes out with the next exchange
        self._underway = Underway(hub)  # forward passes of clients that work at their own pace
        self._arrived: dict[int, _Came] = {}  # of these, the results that have arrived, in order
        self._forwards: dict[int, int] = {}  # the step of each client's last forward pass
        self._at_work: set[int] = set()  # have begun from a model that may be old by now, and continue with it
        self._to_keep: dict[int, int] = {}  # of these, those that are to save their state in between, after this step
        self._kept_at: dict[int, int] = {}  # of these, those that have saved it, and the batches that were left then
        self._others_have_it = False  # clients that are not at work have the average, or get it before anything else
        self._average: dict[str, Tensor] | None = None
        self._stale: set[int] = set()  # have missed an averaging
        self.excluded: dict[int, str] = {}  # why
        self.denied: frozenset[int] = frozenset()  # refused, as long as the server's operator says so
        self._likes: dict[int, dict[str, Crossing]] = {}  # of each kind of clients
        self._footprints: dict[int, Footprint] = {}  # likewise
        self._begun = False  # a round, in this process
        self._posts: dict[int, m.BeginRound] = {}  # of this round
        self._alike = setup.alike  # all models are known to be equal
        self._claims_told = False  # what clients have
        self._faulty: set[int] = set()  # have sent something wrong since the round began
        self._handed: Sequence[Buffer] = ()  # the travelling model, and its optimiser's state, as its holder got them
        self._last = Smashed((), torch.empty(0), (), ())  # of the last forward pass
        self._named: set[int] = set()  # clients known to have models that moved much further than the others'
        self.vet: Vetting | None = None
        """Tests what clients send."""
        twin = setup.twin
        self._first = {name: t.clone() for name, t in state_of(twin.module).items()} if setup.alike else None
        self._buffered = not trains(twin.module) and any(True for _ in twin.module.buffers())

    @property
    def samples(self) -> Sequence[int]:
        """n_k of each enrolled client."""
        return self.setup.samples

    @property
    def masses(self) -> Sequence[float]:
        """The total weight of each enrolled client's training samples, as announced."""
        return self.setup.masses

    @property
    def shape(self) -> Shape:
        """What the clients hold."""
        return self.setup.shape

    @property
    def holder(self) -> int | None:
        """The client that holds the travelling model."""
        return self._holder

    def footprint(self, client: int) -> Footprint:
        """Bytes of the client's model and optimiser state (which it has once it has stepped)."""
        kind = self.setup.kind(client)
        if kind not in self._footprints:
            twin = self.setup.end(client).twin
            state = {} if twin.optimizer is None else expected_state(twin.optimizer)
            own = twin.footprint()
            self._footprints[kind] = Footprint(own.model, sum(t.nbytes for t in state.values()), own.gradient)
        return self._footprints[kind]

    def _like(self, client: int) -> dict[str, Crossing]:
        """The form of a client's model."""
        kind = self.setup.kind(client)
        if kind not in self._likes:
            self._likes[kind] = described(state_of(self.setup.end(client).twin.module))
        return self._likes[kind]

    def begin_round(self, index: int, total: int, lr_factor: float) -> Round:
        """Draw the participants. Those that are connected get their number of batches, and a model that they missed."""
        s = self.setup
        self._wait()
        if not self._claims_told:
            self._claims_told = True
            self._tell_claims()
        self._begun = True
        going_on = {k: int(self._quota[k]) for k in sorted(self._at_work) if self._quota[k]}
        drawn = tuple(sorted({*s.participants(index, len(s.samples)), *going_on}))
        connected = self.hub.connected
        here = tuple(k for k in drawn if k in connected)
        if not here:  # enough clients are connected, but none of those whose turn it is
            here = tuple(sorted(connected))[: len(drawn)]
        facts = {"drawn": len(drawn), "connected": len(connected), "needed": self._needed(here)}
        self._tell("round", {"round": index, "participants": list(here), **facts})
        if not here:
            raise AbsentError(
                f"none of the {len(drawn)} clients drawn for round {index} is connected: start them, or have more take "
                "part (participation)"
            )
        self._participants = here
        self._faulty.clear()
        self._quota[list(here)] = s.quota(np.array([-(-s.samples[k] // s.batch) for k in here]))
        self._turns = s.turns(index, here, s.samples)
        if self._turns is not None:
            self._quota[list(here)] = list(self._turns.batches.values())
        for k, left in going_on.items():
            self._quota[k] = left
        self._lr_factor = lr_factor
        due = {k: int(self._quota[k]) - (k in self._busy) for k in here}
        self._posts = {k: m.BeginRound(index, total, lr_factor, batches) for k, batches in due.items() if batches}
        for k, post in self._posts.items():
            self._post(k, post)
        if not s.carries:
            self._catch_up(here)
        sizes = () if self._turns is None else self._turns.sizes
        return Round(index, total, here, tuple(self._quota[list(here)].tolist()), s.seed, sizes)

    def _tell_claims(self) -> None:
        """Tell the share of the whole that each client has. Raises TrainingError if an absurd claim ends the run."""
        for k in sorted(self._known):
            if why := self.claims_too_much(k, self.samples[k], self.masses[k]):
                if self.setup.faulty == "stop":
                    raise TrainingError(why)
                self.setup.samples[k], self.setup.masses[k] = 0, 0.0
                self._dismiss(k, why)
        if self._known != self.hub.connected:  # too few may be left
            self._wait()
        parts = announced.shares({k: self.masses[k] for k in sorted(self._known)})
        most = max(parts, key=parts.__getitem__, default=0)
        facts = {str(k): {"samples": self.samples[k], "share": float(f"{part:.4g}")} for k, part in parts.items()}
        self._tell("shares", {"largest": f"client-{most} has {100 * parts.get(most, 0):.3g} %", "clients": facts})

    @property
    def _known(self) -> set[int]:
        """Clients whose numbers of samples are known, without the excluded ones."""
        return {k for k, n in enumerate(self.samples) if n and k not in self.excluded}

    def claims_too_much(self, client: int, samples: int, mass: float) -> str | None:
        """Why a client cannot have this many more samples than the others; None if it can."""
        if self.setup.most_samples is not None:
            return None
        known = self._known - {client}
        masses = {**{k: self.masses[k] for k in known}, client: mass}
        return announced.excessive(client, masses, {**{k: self.samples[k] for k in known}, client: samples})

    def seek(self, client: int, batch: int) -> None:
        """The next batch of `client` is its batch number `batch`."""
        self._sought[client] = batch

    def forward(self, clients: Sequence[int] | None = None, *, labels: bool = True) -> Smashed:
        """Every participant (or each of `clients`) that has batches left in this round sends smashed data and
        labels.
        """
        wanted = self._participants if clients is None else clients
        if clients is None and self._turns is not None:
            wanted = self._next_turn(self._turns)
        # A travelling model has one holder, and only that client's forward pass uses it.
        due = [k for k in wanted if self._quota[k] > 0 and self._holder in (None, k)]
        self._tell_sizes(dict.fromkeys(due, 1))

        def read(client: int, frame: Frame) -> _Came:
            return self._smashed(client, frame, labels)

        if self._arrived.keys() & set(due):
            asked = [k for k in due if k in self._arrived]
            return self._received(asked, {k: self._arrived.pop(k) for k in asked}, labels)
        while True:
            connected = self.hub.connected
            asked = [k for k in due if k in connected]
            self._catch_up(asked)
            step = self._step = self._step + 1
            requests: dict[int, list[Request]] = {
                k: [(m.Forward(step, labels, self._sought.get(k), *self._takes.get(k, ())), ())] for k in asked
            }
            answers = self._exchange(asked, requests.__getitem__, read, quorum=True)
            if answers or not due or self.hub.connected:
                break
            self._come_back(due)
        self._forwards |= dict.fromkeys(asked, step)
        return self._received(asked, answers, labels)

    def _received(self, asked: Sequence[int], answers: Mapping[int, _Came], labels: bool) -> Smashed:
        """The result of the forward pass of the clients that were `asked`."""
        smashed = self._vetted({k: answers[k] for k in asked if k in answers}, labels)
        self._quota[list(asked)] -= 1
        self._sought.clear()
        self._asked = smashed.clients
        if self._buffered:  # they become different even without a step
            self._alike = len(self.samples) == 1
        self._waiting = set(self._asked)
        self._sizes = dict(zip(smashed.clients, smashed.sizes, strict=True))
        self._last = smashed
        return smashed

    def arrivals(self, clients: Sequence[int], count: int) -> tuple[int, ...]:
        """Request a batch from those of `clients` that do not work on one yet. Returns the first `count` clients whose
        batches arrive, in the order of arrival. It does not wait for clients that are gone, and for each next batch
        only until the deadline. Clients that need longer continue, and send theirs later.
        """
        self._at_work |= set(clients)
        while True:
            self._ask_for_batches(clients)
            while self._underway.clients & set(clients) and len(self._arrived.keys() & set(clients)) < count:
                if not self._take_one(clients):
                    break
            if self._arrived.keys() & set(clients) or self.hub.connected or not clients:
                return tuple(k for k in self._arrived if k in clients)[:count]
            self._come_back(clients)

    def _ask_for_batches(self, clients: Sequence[int]) -> None:
        """Request the next batch of those of `clients` that are connected and do not work on one."""
        new = [k for k in clients if k in self.hub.connected - self._busy and self._quota[k] > 0]
        self._catch_up(new)
        self._step += 1
        self._forwards |= dict.fromkeys(new, self._step)
        ask: Request = (m.Forward(self._step, labels=True), ())
        requests: dict[int, list[Request]] = {}
        for k in new:
            keep = self._to_keep.pop(k, None)
            saves: list[Request] = [] if keep is None else [(m.Save(keep, "prepare"), ())]
            requests[k] = [*self._later.pop(k, ()), *saves, ask]

        def read(client: int, frame: Frame) -> _Came | Frame:
            return frame if type(frame.message) in _ACKNOWLEDGED else self._smashed(client, frame, labels=True)

        if requests:
            self._underway.start(requests, read)

    def _take_one(self, clients: Collection[int]) -> bool:
        """Wait until one more batch has arrived, or its client is lost. False after the deadline; then `clients` are
        late.
        """
        taken = self._underway.take(self.setup.deadline)
        if taken is None:
            for k in sorted(self._underway.clients & set(clients)):
                self._tell("late", {"client": k, "why": "its next batch has not come by the deadline; it works on"})
            return False
        client, came = taken
        if isinstance(came, Lost):
            self._lose(client, came)
        else:
            self._arrived[client] = came[-1]
            self._note_kept(client, [frame.message for frame in came[:-1]])
        return True

    def _note_kept(self, client: int, said: Sequence[m.Message]) -> None:
        """A client at work has answered whether it has saved its state, before it drew the batch that has arrived."""
        for message in said:
            if isinstance(message, m.Saved) and message.phase == "prepare" and message.kept:
                self._kept_at[client] = int(self._quota[client])  # the next prepare replaces the old one by it

    @property
    def _busy(self) -> set[int]:
        """Clients that work on a batch, or whose batch has arrived and waits. They cannot receive other requests."""
        return self._underway.clients | self._arrived.keys()

    def _next_turn(self, turns: Turns) -> tuple[int, ...]:
        """The clients of the next step for which one of them is connected, if any client is."""
        while (wanted := turns.together()) and self.hub.connected and not self.hub.connected & set(wanted):
            pass
        return wanted

    def _vetted(self, came: dict[int, _Came], labels: bool) -> Smashed:
        """The received rows, without those of clients that make a step of the server impossible."""
        smashed = self._together(came, labels)
        if self.vet is None or not came:
            return smashed
        sizes = [one.sizes for one in came.values()]
        if not (spoilers := self.vet.of_rows(smashed, sizes)):
            return smashed
        for k in spoilers:
            self._expel(k, "smashed data", max(came[k].sizes))
        return self._together({k: one for k, one in came.items() if k not in spoilers}, labels)

    def _together(self, came: Mapping[int, _Came], labels: bool) -> Smashed:
        """The rows of several clients, one after another."""
        if not came:
            return Smashed((), torch.empty(0), (), ())
        sizes = tuple(len(one.rows[0]) for one in came.values())
        if self.setup.cuts:
            return self._of_each_cut(came, sizes, labels)
        rows = _joined([one.rows for one in came.values()])
        y = rows[-1] if labels else torch.empty(sum(sizes), 0)
        weights = self.setup.task.weights(y) if labels else None
        written = _written(list(came.values()))
        return Smashed(rows[: len(self.setup.crossing)], y, tuple(came), sizes, written, weights)

    def _of_each_cut(self, came: Mapping[int, _Came], sizes: tuple[int, ...], labels: bool) -> Smashed:
        """The same if clients have different cuts."""
        own = {k: one.rows[: len(self.setup.end(k).crossing)] for k, one in came.items()}
        y = torch.cat([one.rows[-1] for one in came.values()]) if labels else torch.empty(sum(sizes), 0)
        written = dict(zip(came, _written(list(came.values())), strict=False))
        parts = by_cut(own, self.setup.cuts, written)
        return Smashed((), y, tuple(came), sizes, (), self.setup.task.weights(y) if labels else None, parts)

    def _smashed(self, client: int, frame: Frame, labels: bool) -> _Came:
        """One client's smashed data, and its labels if they were requested. Raises WireError."""
        s, n = self.setup, frame.message.rows
        if client in self._takes and n != self._takes[client][0]:
            raise WireError(f"a batch of {n} rows came, where {self._takes[client][0]} were asked for")
        if client not in self._takes and not 0 < n <= s.batch:
            raise WireError(f"a batch of {n} rows came, of at most {s.batch} were agreed")
        crossing = s.end(client).crossing
        like = [*crossing, *([s.targets] if labels else [])]
        rows = decode(frame.body, like, n, [*[s.up] * len(crossing), *([RAW] if labels else [])])
        size = (
            _check_finite(rows[: len(crossing)], "smashed data", client),
            _check_finite(rows[len(crossing) :], "targets", client),
        )
        if labels and (odd := s.task.foreign(rows[-1], s.outputs.shape)):
            raise WireError(f"the targets of client {client} hold {odd}: give the client targets of the same task")
        return _Came(rows, sum(payload_sizes(frame.body)[: len(crossing)]) if s.up.zstd else 0, sizes=size)

    def tail(self, features: Smashed) -> TailGradients:
        """Each client's tail finishes its rows of `features` with the client's own mean loss."""
        like = [c for c in self.setup.returning if c.differentiable]

        def request(k: int) -> list[Request]:
            rows = features.only(k).rows
            return [(m.Tail(self._step, len(rows[0])), encode(rows, self.setup.down))]

        def read(k: int, frame: Frame) -> _Came:
            loss, mass = frame.message.loss, frame.message.mass
            self._check_mass(k, self._sizes[k], mass)
            rows = decode(frame.body, like, self._sizes[k], self.setup.up)
            size = _check_finite((*rows, torch.tensor(loss)), "cut gradients", k)
            written = sum(payload_sizes(frame.body)) if self.setup.up.zstd else 0
            return _Came(rows, written, loss, mass, (size, 0.0))

        answers = self._exchange(features.clients, request, read)
        if self.vet is not None and answers:
            spoilers = self.vet.of_tails(
                self._last, self._finished(answers), [one.sizes[0] for one in answers.values()]
            )
            for k in spoilers:
                self._expel(k, "cut gradients", answers.pop(k).sizes[0])
        if not answers:
            raise StepLostError(features.clients)
        return self._finished({k: answers[k] for k in features.clients if k in answers})

    def _finished(self, answers: Mapping[int, _Came]) -> TailGradients:
        """The results of the tails of several clients."""
        who, came = tuple(answers), list(answers.values())
        rows = _joined([one.rows for one in came])
        losses = torch.tensor([one.loss for one in came], dtype=rows[0].dtype)
        masses = tuple(one.mass for one in came)
        return TailGradients(rows, losses, who, tuple(self._sizes[k] for k in who), _written(came), masses)

    def backward(self, gradients: CutGradients) -> None:
        """Every client of the last `forward` back-propagates its gradient, which is sent with the next request."""
        self._alike = len(self.samples) == 1
        self._waiting.clear()
        for part in gradients.parts or (gradients,):
            self._post_back(part)

    def _post_back(self, gradients: CutGradients) -> None:
        """Cut gradients of one kind of client are sent with the next request."""
        common: list[Buffer] = encode(gradients.common, self.setup.down) if gradients.active else []
        ends = np.cumsum(gradients.sizes).tolist()
        spans = {k: slice(end - n, end) for k, n, end in zip(gradients.clients, gradients.sizes, ends, strict=True)}
        for k in self._asked:
            step = self._forwards[k]
            if gradients.common and k in gradients.active:
                self._post(k, m.Backward(step, "common", len(gradients.common[0])), common)
            elif k in spans or k in gradients.active:
                own = [rows[spans[k]] for rows in gradients.own]
                self._post(k, m.Backward(step, "own", self._sizes[k]), encode(own, self.setup.down))

    def backward_together(self, gradients: CutGradients) -> Summed:
        """Every client of the last `forward` sends its weight gradient. All connected clients step with the sum. Other
        clients get the resulting model when they next take part.
        """
        self._waiting.clear()
        ends = np.cumsum(gradients.sizes).tolist()
        spans = {k: slice(end - n, end) for k, n, end in zip(gradients.clients, gradients.sizes, ends, strict=True)}
        common: list[Buffer] = encode(gradients.common, self.setup.down) if gradients.active else []

        def ask(k: int) -> list[Request]:
            give: Request = (m.GiveGradient(self._step), ())
            if gradients.common and k in gradients.active:
                return [(m.Backward(self._step, "common", len(gradients.common[0]), hold=True), common), give]
            own = encode([rows[spans[k]] for rows in gradients.own], self.setup.down)
            return [(m.Backward(self._step, "own", self._sizes[k], hold=True), own), give]

        asked = [k for k in self._asked if k in spans or k in gradients.active]
        given = self._exchange(asked, ask, self._gradient)
        gave = tuple(k for k in asked if k in given)
        if not gave:
            raise StepLostError(self._asked)
        total, last = summed([given[k] for k in gave]), not self._quota[list(self._participants)].any()
        took, body = tuple(sorted(self.hub.connected)), encode_named(total)
        for k in took:
            self._post(k, m.TakeGradient(self._step, self._lr_factor, last), body)
        twin = self.setup.twin
        twin.take(total, self.setup.lr * self._lr_factor, last=last)
        self._average, self._in_step = state_of(twin.module), True
        self._stale |= set(range(len(self.samples))) - set(took)
        if any(True for _ in twin.module.buffers()):  # running statistics are each client's own
            self._alike = len(self.samples) == 1
        return Summed(gave, took)

    def _gradient(self, client: int, frame: Frame) -> dict[str, Tensor]:
        """A client's weight gradient. Raises WireError."""
        trained = {name: p for name, p in self.setup.twin.module.named_parameters() if p.requires_grad}
        gradient = decode_named(frame.body, described(trained))
        _check_finite(tuple(gradient.values()), "weight gradient", client)
        return gradient

    def learn(self, steps: int) -> list[Step]:
        """Each participant takes up to `steps` steps on its auxiliary head's loss."""
        due = {k: min(steps, (k in self._waiting) + int(self._quota[k])) for k in self._participants}
        due = {k: n for k, n in due.items() if n and k not in self.excluded}
        if not due:
            return []
        self._tell_sizes({k: n - (k in self._waiting) for k, n in due.items()})
        self._step += 1
        step = self._step

        def read(client: int, frame: Frame) -> list[Local]:
            return self._local_steps(client, frame, due[client])

        longest = max(due.values())

        def ask(k: int) -> list[Request]:
            return [(m.Learn(step, due[k], self._takes.get(k, [])), ())]

        taken = self._exchange(tuple(due), ask, read, quorum=True, batches=longest)
        for k, n in due.items():
            self._quota[k] -= n - (k in self._waiting)
        self._waiting.clear()
        self._alike = len(self.samples) == 1
        return [together(taken, t) for t in range(max(map(len, taken.values()), default=0))]

    def align(self, heads: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Each client of `heads` receives its head with the next request. A client that is gone keeps its old head."""
        for k in heads.keys() & self.hub.connected:
            self._post(k, m.TakeHead(self._step), encode_named(heads[k]))

    def fit(self) -> list[Step]:
        """Each participant takes all its local steps of this round."""
        self._step += 1
        due = [k for k in self._participants if self._quota[k]]
        longest = max(int(self._quota[k]) for k in due)
        self._tell_sizes({k: int(self._quota[k]) for k in due})

        def ask(k: int) -> list[Request]:
            return [(m.Fit(self._step, self._takes.get(k, [])), ())]

        taken = self._patiently(due, lambda: self._exchange(due, ask, self._fitted, quorum=True, batches=longest))
        self._alike = len(self.samples) == 1
        return [together(taken, t) for t in range(max(map(len, taken.values()), default=0))] if taken else []

    def _fitted(self, client: int, frame: Frame) -> list[Local]:
        """The local steps of a client's round. Raises WireError."""
        return self._local_steps(client, frame, int(self._quota[client]))

    def _at_most_b(self, steps: Sequence[Local]) -> bool:
        """Whether a client's batches, whose sizes it chose itself, are possible."""
        return self._turns is not None or all(0 < step.rows <= self.setup.batch for step in steps)

    def _tell_sizes(self, batches: Mapping[int, int]) -> None:
        """Note the sizes of each client's next batches, if they do not have b rows."""
        self._takes = {} if self._turns is None else {k: self._turns.some(k, n) for k, n in batches.items()}

    def _local_steps(self, client: int, frame: Frame, asked: int) -> list[Local]:
        """The local steps that were requested from a client. Raises WireError."""
        steps = [Local(*step) for step in frame.message.losses]
        told = self._takes.get(client)
        fits = [step.rows for step in steps][-len(told) :] == told if told else self._at_most_b(steps)
        if len(steps) != asked or not fits:
            raise WireError(f"{len(steps)} local steps came, {asked} were asked for, or their rows are not")
        for step in steps:
            self._check_mass(client, step.rows, step.mass)
        _check_finite((torch.tensor([step.loss for step in steps]),), "losses", client)
        return steps

    def _check_mass(self, client: int, rows: int, mass: float) -> None:
        """Check that the total weight of rows is the announced one, or part of it. Raises WireError."""
        whole = rows if self.setup.counts_alike else self.masses[client] * (1 + 1e-6)
        if not 0 <= mass <= whole or (self.setup.counts_alike and mass != rows):
            raise WireError(f"{rows} rows of client {client} count {mass:g} together, it says, of at most {whole:g}")

    def average(self, weights: Mapping[int, float]) -> tuple[int, ...]:
        """Send the weighted mean of the models of `weights` to all clients: now, or when they next take part. Returns
        the clients whose models arrived. Does nothing if no client has trained.
        """
        if not weights:
            return ()
        models: dict[int, dict[str, Tensor]] | None = self._vetted_models(weights)
        if not models and not (self.setup.carries and self.hub.connected):  # others that are at work continue
            models = self._patiently(weights, lambda: self._vetted_models(weights))
        if not models:
            return ()
        here = [k for k in weights if k in models]
        self._average = self._averaged([models[k] for k in here], [weights[k] for k in here])
        self._post_average(here)
        if self.setup.beside is not None:
            self.setup.beside.take(self._average)
        self._at_work -= set(weights)
        self._kept_at = {k: left for k, left in self._kept_at.items() if k in self._at_work}
        self._to_keep = {k: step for k, step in self._to_keep.items() if k in self._at_work}
        self._stale = set(range(len(self.samples))) - set(here) - self._at_work
        # Clients that have missed it get it before anything else, each the part of its own rank.
        self._alike = not (self._at_work or self.setup.ranked)
        self._others_have_it = bool(self._at_work)
        return tuple(here)

    def _post_average(self, clients: Iterable[int]) -> None:
        """Each of `clients` receives its part of the average: all of it, unless clients have different cuts or
        ranks.
        """
        assert self._average is not None, "models have been averaged"
        bodies: dict[int, list[Buffer]] = {}
        for k in clients:
            kind = self.setup.kind(k)
            if kind not in bodies:
                own = {n: cropped(self._average[n], like.shape).contiguous() for n, like in self._like(k).items()}
                bodies[kind] = encode_named(own)
            self._post(k, m.TakeModel(self._step), bodies[kind])

    def _completed(self, models: dict[int, dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
        """The clients' models, including blocks that the server holds for them if they have different cuts, and with
        factors of the largest rank if their adapters have different ranks.
        """
        if (beside := self.setup.beside) is None:
            whole = state_of(self.setup.twin.module) if self.setup.ranked else {}
            return {k: filled(model, whole) for k, model in models.items()} if whole else models
        return {k: {**models[k], **blocks} for k, blocks in beside.states(list(models)).items()}

    def _vetted_models(self, weights: Mapping[int, float]) -> dict[int, dict[str, Tensor]]:
        """The models that clients of `weights` sent, without those that spoil the average."""
        models = self._completed(self._models([k for k in weights if k not in self.excluded]))
        if self.vet is None or not models:
            return models
        if (before := self._average or self._first) and len(models) > 2:
            self._name_outlying(outlying(models, before))

        def mean(who: Sequence[int]) -> Mapping[str, Tensor]:
            if len(who) == 1:
                return models[who[0]]
            return self._averaged([models[k] for k in who], [weights[k] for k in who])

        for k in self.vet.of_models(models, mean):
            self._expel(k, "model", largest(list(models.pop(k).values())))
        return models

    def hand_over(self, client: int, *, optimizer: bool) -> None:
        """The travelling model moves to `client`; before any client holds it, it is `client`'s own model. If `client`
        is not connected, but others are, the model stays where it is. If its holder is excluded, it moves on as that
        holder received it. Raises TrainingError if its holder does not return.
        """
        holder = self._holder
        if not self.hub.connected:
            self._come_back({client} if holder is None else {client, holder})
        if client not in self.hub.connected:
            return
        if holder is not None and holder != client:
            asks: list[Request] = [(m.GiveModel(self._step), ())]
            asks += [(m.GiveOptimizer(self._step), ())] if optimizer else []
            given = self._patiently([holder], lambda: self._all([holder], lambda k: asks, self._given))
            self._handed = given[holder] if given else self._handed
            for take, body in zip((m.TakeModel, m.TakeOptimizer), self._handed, strict=False):
                self._post(client, take(self._step), [body])
        self._holder = client

    def _move_on(self) -> None:
        """If the holder of the travelling model is unfit, another client gets the model as the holder received it."""
        if self._holder in self._unfit:
            if not self.hub.connected:
                self._come_back(range(len(self.samples)))
            others = self.hub.connected - {self._holder}
            if not others:
                raise AbsentError(
                    f"client {self._holder} holds the model and sends wrong data, and no other client is connected"
                )
            self.hand_over(min(others), optimizer=len(self._handed) > 1)

    @property
    def _unfit(self) -> set[int]:
        """Clients that are excluded, or have sent something wrong since the round began. They receive no further
        requests.
        """
        return {*self.excluded, *self._faulty}

    def _given(self, client: int, frame: Frame) -> Buffer:
        """Check that the state to pass on is as expected. Raises WireError."""
        model = isinstance(frame.message, m.ModelUp)
        twin = self.setup.twin.optimizer
        like = self._like(client) if model else described({} if twin is None else expected_state(twin))
        tensors = decode_named(frame.body, like)
        _check_finite(tuple(tensors.values()), "model" if model else "optimiser state", client)
        return frame.body

    def evaluate(self, samples: Samples, predict: Predict, clients: Sequence[int] | None = None) -> Evaluation:
        """Evaluate every connected client's model with the server: the held-out inputs go to the client, and its
        outputs come back.
        """
        if isinstance(samples, AtClient):
            return self._tested(samples, predict)
        if clients is not None and self._holder is None and not self._one:
            clients = [k for k in clients if k in self.hub.connected]
            if not clients:
                return Evaluation({}, 0)
        found = None
        while found is None:
            self._move_on()
            among = range(len(self.samples)) if self._holder is None else [self._holder]
            found = self._patiently(among, lambda: self._evaluated(samples, predict, clients))
        return found

    def _evaluated(self, samples: Samples, predict: Predict, clients: Sequence[int] | None = None) -> Evaluation | None:
        """None if no client answered."""
        everyone = [self._holder] if self._holder is not None else self._judged()
        looked_at = everyone[:1] if self._alike else everyone
        if self._others_have_it:  # the server has the average; clients at work continue
            looked_at = sorted(self.hub.connected - self._at_work)[:1]
        if clients is not None:
            everyone = list(clients)
            looked_at = looked_at if self._one or self._holder is not None else everyone
        self._catch_up(looked_at)

        def outputs_of(models: Sequence[int], part: Samples, start: int) -> Outputs:
            given = self._outputs(models, part, start, predict)
            return list(given), torch.cat(list(given.values())) if given else torch.empty(0)

        one = None
        if self.setup.judge_by == "average" and not self._one and self._holder is None:
            if (one := self._averaged_twin()) is None:
                return None
        elif self._others_have_it and not looked_at and self._average is not None:  # the clients that have it are gone
            one, looked_at = self.setup.twin, everyone
            load_moving(one.module, self._average)
        if one is not None:
            looked_at = looked_at[:1]

            def outputs_of(models: Sequence[int], part: Samples, start: int) -> Outputs:
                return list(models), outputs_with(one, self.shape, part.rows, predict)

        found = self.setup.judge(samples, looked_at, outputs_of)
        shared = self._one or self.setup.judge_by != "mean" or (clients is not None and self._holder is not None)
        return evaluation(found, everyone if shared else list(found), len(samples)) if found else None

    def _averaged_twin(self) -> Client | None:
        """A client with the weighted mean of the models of the connected clients, which they send because the algorithm
        averages them anyway. None if none answered.
        """
        models = self._completed(self._models(sorted(self.hub.connected)))
        if not models:
            return None
        twin = self.setup.twin
        load_moving(twin.module, self._averaged(list(models.values()), [self.masses[k] for k in models]))
        return twin

    def _averaged(self, models: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
        """The average of models that all started from the last average."""
        return average(models, weights, self.setup.rule, self._average or self._first)

    def _tested(self, samples: AtClient, predict: Predict) -> Evaluation:
        """The scores of the client that owns these test rows. It computes them itself from the outputs. None if it is
        gone.
        """
        k, s = samples.client, self.setup
        if k in self._at_work:
            return Evaluation({}, 0)
        if not self.hub.connected:
            self._come_back(range(len(self.samples)))
        if s.judge_by != "mean" and not self._alike and self._holder is None and len(self.samples) > 1:
            raise TrainingError(
                f"judge = {s.judge_by!r} asks what all clients' models say of the test rows of client {k}, which stay "
                "with it: choose judge = mean, or evaluate_on = global"
            )
        self._lend(k)
        self._catch_up([k])
        finish = self._smashed_tests(k, len(samples), predict) if self.shape != "whole" else []
        if finish is None:
            return Evaluation({}, 0)
        asked: list[Request] = [*finish, (m.GiveScores(self._step), ())]
        scores = self._exchange([k], lambda _: asked, self._scores, quorum=True)
        return Evaluation(scores, len(samples) if scores else 0)

    def _lend(self, client: int) -> None:
        """If one model travels, `client` gets its present state for the test. The client's own model would be replaced
        anyway when the travelling model reaches it.
        """
        if self._holder is None or self._holder == client or client not in self.hub.connected:
            return
        self._move_on()
        holder = self._holder
        if models := self._patiently([holder], lambda: self._models([holder])):
            self._post(client, m.TakeModel(self._step), encode_named(models[holder]))

    def _smashed_tests(self, client: int, count: int, predict: Predict) -> list[Request] | None:
        """Have a client send the smashed data of its own `count` test rows, and send the outputs back. Returns the
        requests that are still to be sent; None if the client is gone.
        """
        finish: list[Request] = []
        for start in range(0, count, ROWS_PER_PASS):
            rows = min(ROWS_PER_PASS, count - start)
            smashed = self._smashed_test(client, finish, m.OwnForward(self._step, rows, start))
            if smashed is None:
                return None
            with torch.no_grad():
                given = predict([client], smashed)
            body = encode(given, self.setup.down.evaluating) if self.shape == "u-shaped" else encode(given[:1])
            finish = [(m.OwnFinish(self._step, rows, start), body)]
        return finish

    def _smashed_test(self, client: int, before: list[Request], request: m.OwnForward) -> Rows | None:
        """The smashed data of some of a client's own test rows; `before` is sent first. None if it is gone."""
        like = self.setup.end(client).crossing

        def read(k: int, answer: Frame) -> Rows:
            return _finite(aligned(decode(answer.body, like, request.rows, self.setup.up.evaluating)), k)

        return self._exchange([client], lambda k: [*before, (request, ())], read, quorum=True).get(client)

    def _scores(self, client: int, frame: Frame) -> dict[str, Value]:
        """A client's scores of its model on its own test rows. Raises WireError if their form is not as agreed."""
        found, like = frame.message.scores, self.setup.scores
        if frame.message.rows != self.setup.tests[client] or found.keys() != like.keys():
            raise WireError(
                f"{len(found)} scores of {frame.message.rows} own test rows came, or others than those {len(like)} of "
                f"{self.setup.tests[client]} rows that were agreed"
            )
        scores = {name: tuple(v) if isinstance(v, list) else v for name, v in found.items()}
        for name, value in scores.items():
            each = [x for x in (value if isinstance(value, tuple) else [value]) if x is not None]
            if not all(map(math.isfinite, each)) or not _alike(value, like[name]) or (name == "loss" and not each):
                raise WireError(
                    f"the score {name!r} of client {client} is not finite, or not of the kind that was agreed: look at "
                    "its data and its rate"
                )
        return {name: scores[name] for name in like}

    @property
    def _one(self) -> bool:
        """Whether one model is judged for all clients: they have it, or will receive it before anything else."""
        return self._alike or self._others_have_it

    def model_state(self, client: int) -> Mapping[str, Tensor]:
        """One client's parameters and buffers, under the names of the whole model."""
        if client in self._at_work:
            raise AbsentError(f"client {client} is at work: its model is with it until it is averaged")
        self._catch_up([client])
        models = self._models([client])
        if client not in models:
            raise AbsentError(f"client {client} is not connected: its model is with it")
        return named_as_whole({**resting(self.setup.end(client).twin.module), **models[client]}, self.shape)

    def held(self) -> Held:
        """The average of the client models, if averaging was the last change to them; otherwise no model."""
        if self._average is None or not self._one:
            return Held({}, False)
        return Held({0: named_as_whole({**resting(self.setup.twin.module), **self._average}, self.shape)}, True)

    def state(self) -> dict[str, Any]:
        """The server's state. When this returns, every connected client has written its own state beside its old one.
        It replaces the old one with the next request.
        """
        asks: list[Request] = [(m.Save(self._step, "prepare"), ())]
        answered = self._all(sorted(self.hub.connected - self._busy), lambda k: asks, _itself)
        kept = [k for k, said in answered.items() if said and said[-1].message.kept]
        for k in kept:
            self._post(k, m.Save(self._step, "commit"))
        for k in sorted(answered.keys() - set(kept)):
            why = "its disk is full: it goes on, but after a restart from the state that it kept before"
            self._tell("not kept", {"client": k, "why": why})
        # Busy clients save theirs in between; a state that they saved before, at work, is the one that they return
        # with.
        self._to_keep = dict.fromkeys(self._at_work & self._busy, self._step)
        self._kept_at |= {k: int(self._quota[k]) for k in kept if k in self._at_work}
        at_work = {k: left for k, left in self._kept_at.items() if left}
        # Others that have saved nothing of this step return with an earlier model.
        away = set(range(len(self.samples))) - set(kept) if self._average is not None else set()
        return {
            "step": self._step,
            "samples": list(self.samples),
            "masses": list(self.masses),
            "tests": list(self.setup.tests),
            "class counts": [list(own) for own in self.setup.class_counts],
            "holder": self._holder,
            "alike": self._one,  # except for clients at work
            "average": self._average or {},
            **self._twins_optimizer(),
            "stale": sorted((self._stale | away) - at_work.keys()),
            **({"at work": {str(k): left for k, left in sorted(at_work.items())}} if at_work else {}),
            "excluded": {str(k): why for k, why in self.excluded.items()},
            "handed": [torch.frombuffer(bytearray(body), dtype=torch.uint8) for body in self._handed if len(body)],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take a state that `state()` returned, before clients join. They then go back to the same step."""
        found = checked(state, _RemoteState, "the clients")
        count = len(self.setup.samples)
        for name in ("samples", "masses", "tests"):
            sized(getattr(found, name), count, name)
        excluded, at_work = list(map(int, found.excluded)), list(map(int, found.at_work))
        for name, numbers in (("stale", found.stale), ("excluded", excluded), ("at work", at_work)):
            below(numbers, count, name)
        below([] if found.holder is None else [found.holder], count, "holder")
        for body in found.handed:
            fits(body, body.new_empty(body.numel(), dtype=torch.uint8), "handed")
        if found.class_counts:
            sized(found.class_counts, count, "class counts")
        if found.average:
            fit(found.average, state_of(self.setup.twin.module), "the average")
        self._step, self._holder = found.step, found.holder
        self._kept_at = {int(k): left for k, left in found.at_work.items()}
        self._at_work = set(self._kept_at)
        for k, left in self._kept_at.items():
            self._quota[k] = left
        self._alike, self._others_have_it = found.alike and not self._at_work, bool(self._at_work)
        self.setup.samples[:], self.setup.masses[:] = found.samples, found.masses
        self.setup.tests[:] = found.tests
        self.setup.class_counts[:] = found.class_counts
        self._average, self._stale = dict(found.average) or None, set(found.stale)
        if found.twins_optimizer is not None and self._average is not None:
            twin, self._in_step = self.setup.twin, True
            load_moving(twin.module, self._average)
            if twin.optimizer is not None and found.twins_optimizer:
                restore(twin.optimizer, b"".join(encode_named(found.twins_optimizer)))
        self.excluded = {int(k): why for k, why in found.excluded.items()}
        self._handed = [body.numpy().tobytes() for body in found.handed]

    def _twins_optimizer(self) -> dict[str, Any]:
        """The state of the optimiser whose steps all clients take."""
        if not self._in_step:
            return {}
        optimizer = self.setup.twin.optimizer
        return {"twin's optimizer": {} if optimizer is None else flattened(optimizer)}

    def finish(self) -> None:
        """Send the posted requests, at the very end."""
        self._all((), lambda k: [], _nothing)

    def share(self, server: Mapping[str, Tensor], rounds: int) -> dict[int, int]:
        """Send the server's part of the model to the connected clients that want it. Returns the bytes sent to each
        client that confirmed that it has saved the model.
        """
        wanting = sorted((self.setup.wanting & self.hub.connected) - self._busy)
        self._catch_up(wanting)
        body = encode_named(server)
        asks: list[Request] = [(m.TakeServer(self._step, rounds), body), (m.Settle(self._step), ())]
        kept = self._all(wanting, lambda k: asks, _nothing) if wanting else {}
        return dict.fromkeys(kept, sum(t.nbytes for t in server.values()))

    @property
    def fresh(self) -> bool:
        """Whether nothing has been trained, in this process or before."""
        return not self._begun and self._step == 0

    @property
    def step(self) -> int:
        """The step that clients join at."""
        return self._step

    @property
    def out(self) -> frozenset[int]:
        """Clients that cannot take part: they are excluded or denied."""
        return self.denied | self.excluded.keys()

    def _wait(self, wanted: Iterable[int] = ()) -> None:
        """Wait until enough clients are connected, and one of those `wanted` has had time to return. It is not known
        what returning clients have missed. Raises TrainingError.
        """
        self._ready(frozenset(wanted))
        new = set(self.hub.arrivals())
        for k in sorted(new):
            self._tell("came", {"client": k})
            # A forward pass ends with its connection, so its backward pass has no meaning any more.
            if k in self._later:
                self._later[k] = [post for post in self._later[k] if not isinstance(post[0], m.Backward)]
        if self._begun and self._average is not None:
            self._stale |= new
            self._kept_at = {k: left for k, left in self._kept_at.items() if k not in new}

    def _patiently(self, clients: Collection[int], attempt: Callable[[], T | None]) -> T | None:
        """The result of `attempt`. If all of `clients` are gone (because the server's own network failed), wait for
        them and try again: a client that had done its part, but could not answer, answers then. None if all of them
        have sent something wrong, but not all clients of the run.

        Raises TrainingError if none of them returns.
        """
        while not (found := attempt()):
            if set(clients) <= self._unfit and len(self._unfit) < len(self.samples):
                return None
            if not self._come_back(clients):
                gone = ", ".join(map(str, clients))
                raise AbsentError(
                    f"clients {gone} are lost, and no others can do their part: the run goes on from its checkpoint "
                    "when they are back"
                )
        return found

    def _come_back(self, clients: Iterable[int]) -> frozenset[int]:
        """Wait until enough clients are connected. Returns those of `clients` that are, which now know the round.
        Raises TrainingError.
        """
        if self.out >= set(clients):
            raise TrainingError("all clients that could continue are excluded or denied: the record says why")
        self._wait(clients)
        back = self.hub.connected.intersection(clients)
        for k in back & self._posts.keys():
            self._post(k, self._posts[k])
        self._catch_up(back)
        return back

    def _catch_up(self, clients: Collection[int]) -> None:
        """Those of `clients` that have missed an averaging get its result."""
        if missed := self._stale & set(clients) & self.hub.connected:
            assert self._average is not None, "what was missed is an average"
            twin = self.setup.twin
            for k in missed:
                self._post_average([k])
                if self._in_step and twin.optimizer is not None:
                    self._post(k, m.TakeOptimizer(self._step), encode_named(flattened(twin.optimizer)))
            self._stale -= missed

    def _judged(self) -> list[int]:
        """The clients whose models are evaluated: all requested clients that are connected, or if there are none, all
        connected clients.
        """
        asked = judged(len(self.samples), self.setup.eval_clients, self.setup.seed)
        connected = self.hub.connected
        return [k for k in asked if k in connected] or sorted(connected)

    def _outputs(self, clients: Sequence[int], part: Samples, start: int, predict: Predict) -> dict[int, Tensor]:
        """The outputs [n, ...] of each client's model, with the server's if there is one, on held-out rows from number
        `start` on.
        """
        s, n = self.setup, len(part)
        body = encode(part.rows)
        outputs = [s.outputs]

        def ask(
            request: m.Evaluate,
            body: Callable[[int], Sequence[Buffer]],
            like: Callable[[int], Sequence[Crossing]],
            codec: Codec,
        ) -> dict[int, Rows]:
            def read(k: int, answer: Frame) -> Rows:
                rows = aligned(decode(answer.body, like(k), n, codec))
                return rows if math.isfinite(largest(rows)) else self._judge_by_itself(rows, k, part, predict)

            return self._exchange(clients, lambda k: [(request, body(k))], read, quorum=True)

        if self.shape == "whole":
            whole = ask(m.Evaluate(self._step, "whole", n), lambda k: body, lambda k: outputs, RAW)
            return {k: rows[0] for k, rows in whole.items()}
        lower = m.Evaluate(self._step, "lower", n, start=start)
        smashed = ask(lower, lambda k: body, lambda k: s.end(k).crossing, s.up.evaluating)
        given = {k: predict([k], rows) for k, rows in smashed.items()}
        if self.shape == "split":
            return {k: rows[0] for k, rows in given.items()}
        clients = list(given)
        tail = m.Evaluate(self._step, "tail", n)
        said = ask(tail, lambda k: encode(given[k], s.down.evaluating), lambda k: outputs, RAW)
        return {k: rows[0] for k, rows in said.items()}

    def _judge_by_itself(self, rows: Rows, client: int, part: Samples, predict: Predict) -> Rows:
        """Find out why results of an evaluation are not finite. Raises NonFiniteError if the average, which all clients
        have, gives such results on this side, too; otherwise WireError.
        """
        if self._alike and self._average is not None:
            twin = self.setup.twin
            load_moving(twin.module, self._average)
            if not math.isfinite(largest([outputs_with(twin, self.shape, part.rows, predict)])):
                raise NonFiniteError("average of the clients' models, judged on held-out rows,")
        return _finite(rows, client)

    def _models(self, clients: Sequence[int]) -> dict[int, dict[str, Tensor]]:
        def read(k: int, frame: Frame) -> dict[str, Tensor]:
            model = decode_named(frame.body, self._like(k))
            _check_finite(tuple(model.values()), "model", k)
            return model

        return self._exchange(clients, lambda k: [(m.GiveModel(self._step), ())], read, quorum=True)

    def _post(self, client: int, message: m.Message, body: Sequence[Buffer] = ()) -> None:
        self._later.setdefault(client, []).append((message, body))

    def _needed(self, clients: Collection[int]) -> int:
        """How many of `clients` are a quorum."""
        return max(1, math.ceil(self.setup.quorum * len(clients)))

    def _exchange(
        self,
        clients: Collection[int],
        ask: Callable[[int], list[Request]],
        read: Callable[[int, Frame], T],
        *,
        quorum: bool = False,
        batches: int = 0,
    ) -> dict[int, T]:
        """The result of `read` for the one answer that each of `clients` gives; `quorum`: not all are needed;
        `batches`: the number of batches that they train on first.
        """
        answered = self._all(clients, ask, read, quorum=quorum, batches=batches)
        return {k: answers[0] for k, answers in answered.items()}

    def _all(
        self,
        clients: Collection[int],
        ask: Callable[[int], list[Request]],
        read: Callable[[int, Frame], T],
        *,
        quorum: bool = False,
        batches: int = 0,
    ) -> dict[int, list[T]]:
        """Send requests to `clients`, and all posted requests. Raises NonFiniteError and WireError if a client is
        faulty and this ends the run.
        """
        posted, self._later = self._later, {}
        asked = {k: ask(k) for k in clients}
        for k in posted.keys() - asked.keys():  # a client that fails in a backward pass must be noticed
            if any(isinstance(message, m.Backward) for message, _ in posted[k]):
                posted[k].append((m.Settle(self._step), ()))
        requests = {k: [*posted.get(k, []), *asked.get(k, [])] for k in {*clients, *posted}}
        due = {k: sum(type(message) in ANSWERS for message, _ in requests) for k, requests in asked.items()}

        def on_answer(k: int, frame: Frame) -> T | Frame:
            return frame if type(frame.message) in _ACKNOWLEDGED else read(k, frame)

        deadline = self.setup.deadline
        answered = self.hub.exchange(
            requests,
            deadline=None if deadline is None else deadline + batches * self.setup.per_batch,
            quorum=self._needed(clients) if quorum and self.setup.deadline is not None else None,
            voters=clients,
            on_answer=on_answer,
        )
        self._check_divergence(answered)
        found: dict[int, list[Any]] = {}
        for k, came in answered.items():
            if isinstance(came, Lost):
                self._lose(k, came)
            elif k in clients:
                found[k] = came[len(came) - due[k] :]
        return {k: found[k] for k in clients if k in found}

    def _check_divergence(self, answered: Mapping[int, list[Any] | Lost]) -> None:
        """Raises NonFiniteError if several clients, and all that are left, have failed with such numbers at once, since
        then it is not the fault of each client.
        """
        failed = [k for k, came in answered.items() if isinstance(came, Lost) and came.kind == NonFiniteError.__name__]
        if len(failed) > 1 and len(failed) == len(answered):
            raise NonFiniteError("weight gradient or loss", tuple(sorted(failed)))

    def _lose(self, client: int, lost: Lost) -> None:
        """A client has not answered. Raises NonFiniteError or WireError if it is faulty and this ends the run."""
        if client in self.excluded:  # which was reported already
            return
        faulty = lost.reason == "garbage" or lost.kind == NonFiniteError.__name__
        if faulty and self.setup.faulty == "stop":
            if lost.kind == NonFiniteError.__name__:
                raise NonFiniteError("weight gradient or loss", (client,))
            raise WireError(f"client {client}: {lost.sentence}")
        self._faulty |= {client} if faulty else set()
        self._tell(lost.reason, {"client": client, "why": lost.sentence})
        if faulty and self.setup.faulty == "exclude":
            self._exclude(client, lost.sentence)

    def _expel(self, client: int, what: str, size: float) -> None:
        """A client has sent numbers with which training cannot continue. Raises NonFiniteError if this ends the run."""
        if self.setup.faulty == "stop":
            raise NonFiniteError(f"step with the {what}", (client,))
        self._dismiss(
            client,
            f"numbers as large as {size:.3g} came in the {what} of client {client}, with which no step is possible: "
            "look at its data and its rate",
        )

    def _dismiss(self, client: int, why: str) -> None:
        """Close the connection of a client that has sent something impossible, and exclude it if so configured."""
        self._later.pop(client, None)
        self._faulty.add(client)
        self.hub.dismiss(client, why)
        self._tell("garbage", {"client": client, "why": why})
        if self.setup.faulty == "exclude":
            self._exclude(client, why)

    def _exclude(self, client: int, why: str) -> None:
        self.excluded[client] = why
        self._tell("excluded", {"client": client, "why": why})

    def _name_outlying(self, found: Mapping[int, float]) -> None:
        """Report, once, clients whose models have moved much further than those of the others."""
        for k in found.keys() - self._named:
            self._tell("deviates", {"client": k, "what": "model", "times": float(f"{found[k]:.3g}")})
        self._named = set(found)


@dataclass(frozen=True)
class _Came:
    """What a client has sent: its rows, their bytes (if these depend on the numbers, because of the codec), its loss,
    the total weight of its rows, and the largest numbers in rows and targets.
    """

    rows: Rows
    written: int = 0
    loss: float = 0.0
    mass: float = 0.0
    sizes: tuple[float, float] = (0.0, 0.0)


def _alike(value: Value, like: Value) -> bool:
    """Whether two scores have the same form: one number, or the same number of values."""
    if value is None or not isinstance(like, tuple):
        return not isinstance(value, tuple)
    return isinstance(value, tuple) and len(value) == len(like)


def _joined(rows: Sequence[Rows]) -> Rows:
    return tuple(torch.cat(parts) for parts in zip(*rows, strict=True))


def _written(came: Sequence[_Came]) -> tuple[int, ...]:
    sizes = tuple(one.written for one in came)
    return sizes if any(sizes) else ()


def _finite(rows: Rows, client: int) -> Rows:
    """The same rows. Raises WireError."""
    _check_finite(rows, "results in evaluation", client)
    return rows


def _check_finite(tensors: Sequence[Tensor], what: str, client: int) -> float:
    """The largest number. Raises WireError if one is NaN or infinite."""
    size = largest(tensors)
    if not math.isfinite(size):
        raise WireError(f"the {what} of client {client} hold NaN or infinite numbers: look at its data and its rate")
    return size


def _itself(client: int, frame: Frame) -> Frame:
    return frame


def _nothing(client: int, frame: Frame) -> None:
    """Reads an answer that only says that a request is done."""
