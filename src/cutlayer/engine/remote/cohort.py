"""The server's cohort of clients on other machines: the seam, spoken over a wire.

Every verb is one exchange: requests to all clients that it concerns, answers from those that give one. Who does not
answer in time, or is gone, did not take part: algorithms read that from what comes back. A backward pass is sent
together with the next request, so that a step costs one journey there and back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, MutableSequence, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cutlayer.averaging import average
from cutlayer.cohort import Footprint, Predict
from cutlayer.data.samples import Samples
from cutlayer.engine.base import EVALUATION_ROWS, Routine, Shape, evaluation, judged, together
from cutlayer.engine.local import Client
from cutlayer.engine.remote.exchange import Lost, Request
from cutlayer.engine.remote.worker import expected_state, state_of
from cutlayer.errors import NonFiniteError, TrainingError, WireError
from cutlayer.gradients import row_losses
from cutlayer.models.parts import Crossing
from cutlayer.types import CutGradients, Evaluation, Round, Smashed, Step, TailGradients
from cutlayer.wire import RAW, Codec, Frame, decode, decode_named, described, encode, encode_named
from cutlayer.wire import messages as m
from cutlayer.wire.tensors import Buffer


class Hub(Protocol):
    """What carries the requests (see `hub.py`)."""

    @property
    def connected(self) -> frozenset[int]:
        """Clients that can be asked something now."""

    def arrivals(self) -> Mapping[int, m.Hello]:
        """Who has come, or come back, since this was asked last; they are connected from then on."""

    def exchange(
        self,
        requests: Mapping[int, Sequence[Request]],
        *,
        deadline: float | None = None,
        quorum: int | None = None,
    ) -> Mapping[int, list[Frame] | Lost]:
        """Send each client its requests, in order; the answers of those that gave them all, or why there are none."""


@dataclass(frozen=True)
class Remote(Routine):
    """How a group of clients is set up, as the server sees it. `samples` are n_k; `twin` is a client like theirs, of
    which the server knows shapes and names alone; `crossing` and `returning` go up and down at the cuts.

    `deadline` seconds are given for every exchange (None: as long as it takes), unless fewer than `quorum` (a fraction)
    have answered by then.
    """

    samples: MutableSequence[int]
    twin: Client
    crossing: Sequence[Crossing]
    classes: int
    up: Codec = RAW
    down: Codec = RAW
    deadline: float | None = None
    quorum: float = 0.5
    returning: Sequence[Crossing] = field(default=())


class RemoteCohort:
    """All clients on the other side of a hub. `notice` hears of each that gave no answer; `ready` is called before each
    round, and comes back when enough clients are there.
    """

    def __init__(
        self,
        hub: Hub,
        setup: Remote,
        *,
        notice: Callable[[int, Lost], None] | None = None,
        ready: Callable[[], None] | None = None,
    ) -> None:
        self.hub, self.setup = hub, setup
        self._notice = notice or (lambda client, lost: None)
        self._ready = ready or (lambda: None)
        self._step = 0  # numbers exchanges that belong together
        self._quota = np.zeros(len(setup.samples), np.int64)
        self._participants: tuple[int, ...] = ()
        self._holder: int | None = None
        self._asked: tuple[int, ...] = ()  # of the last forward pass
        self._sizes: dict[int, int] = {}
        self._later: dict[int, list[Request]] = {}  # goes out with the next exchange
        self._average: dict[str, Tensor] | None = None
        self._stale: set[int] = set()  # have missed an averaging
        self._like = described(state_of(setup.twin.module))
        self._begun = False  # a round, in this process
        self._alike = setup.alike  # all models are known to be equal

    @property
    def samples(self) -> Sequence[int]:
        """n_k of each enrolled client."""
        return self.setup.samples

    @property
    def shape(self) -> Shape:
        """What the clients hold."""
        return self.setup.shape

    @property
    def holder(self) -> int | None:
        """Who holds the one model that travels."""
        return self._holder

    def footprint(self, client: int) -> Footprint:
        """Bytes of the client's model and optimiser state (which it has once it has stepped)."""
        return self._footprint

    @cached_property
    def _footprint(self) -> Footprint:
        """Of every client alike."""
        twin = self.setup.twin
        state = {} if twin.optimizer is None else expected_state(twin.optimizer)
        return Footprint(twin.footprint().model, sum(t.nbytes for t in state.values()))

    def begin_round(self, index: int, total: int, lr_factor: float) -> Round:
        """Draw the participants; those that are connected get their number of batches, and a model they missed."""
        s = self.setup
        self._ready()
        new = set(self.hub.arrivals())
        if self._begun and self._average is not None:
            self._stale |= new  # what those who come back have missed is not known
        self._begun = True
        drawn = s.participants(index, len(s.samples))
        connected = self.hub.connected
        here = tuple(k for k in drawn if k in connected)
        if not here:
            raise TrainingError("no client is connected: wait for one, or look at why they have gone")
        self._participants = here
        self._quota[list(here)] = s.quota(np.array([-(-s.samples[k] // s.batch) for k in here]))
        for k in here:
            self._post(k, m.BeginRound(index, total, lr_factor, int(self._quota[k])))
        self._catch_up(here)
        return Round(index, total, here, tuple(self._quota[list(here)].tolist()), s.seed)

    def forward(self, clients: Sequence[int] | None = None, *, labels: bool = True) -> Smashed:
        """Every participant with batches left in this round (or those of `clients`) sends smashed data and labels."""
        wanted = self._participants if clients is None else clients
        connected = self.hub.connected
        asked = [k for k in wanted if self._quota[k] > 0 and k in connected]
        self._quota[asked] -= 1
        step = self._step = self._step + 1
        answers = self._exchange(asked, lambda k: [(m.Forward(step, labels), ())], quorum=True)
        self._asked = tuple(k for k in asked if k in answers)
        if not self._asked:
            return Smashed((), torch.empty(0), (), ())
        like = [*self.setup.crossing, *([Crossing((), torch.int64)] if labels else [])]
        codecs = [*[self.setup.up] * len(self.setup.crossing), *([RAW] if labels else [])]
        sizes = {k: answers[k].message.rows for k in self._asked}
        rows = [decode(answers[k].body, like, sizes[k], codecs) for k in self._asked]
        self._sizes = sizes
        came = tuple(torch.cat(parts) for parts in zip(*rows, strict=True))
        y = came[-1] if labels else torch.empty(sum(sizes.values()), 0)
        return Smashed(came[: len(self.setup.crossing)], y, self._asked, tuple(sizes.values()))

    def tail(self, features: Smashed) -> TailGradients:
        """Each client's tail finishes its rows of `features` with the client's own mean loss."""
        like = [c for c in self.setup.returning if c.differentiable]

        def request(k: int) -> list[Request]:
            rows = features.only(k).rows
            return [(m.Tail(self._step, len(rows[0])), encode(rows, self.setup.down))]

        answers = self._exchange(features.clients, request)
        who = tuple(k for k in features.clients if k in answers)
        if not who:
            raise TrainingError("no client has finished the forward pass: all are gone")
        sizes = tuple(self._sizes[k] for k in who)
        rows = [decode(answers[k].body, like, self._sizes[k], self.setup.up) for k in who]
        cat = tuple(torch.cat(parts) for parts in zip(*rows, strict=True))
        losses = torch.tensor([answers[k].message.loss for k in who], dtype=cat[0].dtype)
        return TailGradients(cat, losses, who, sizes)

    def backward(self, gradients: CutGradients) -> None:
        """Every client of the last `forward` back-propagates what it is sent; it goes out with the next request."""
        self._alike = len(self.samples) == 1
        common: list[Buffer] = encode(gradients.common, self.setup.down) if gradients.active else []
        ends = np.cumsum(gradients.sizes).tolist()
        spans = {k: slice(end - n, end) for k, n, end in zip(gradients.clients, gradients.sizes, ends, strict=True)}
        for k in self._asked:
            if k in gradients.active:
                self._post(k, m.Backward(self._step, "common", len(gradients.common[0])), common)
            elif k in spans:
                own = [rows[spans[k]] for rows in gradients.own]
                self._post(k, m.Backward(self._step, "own", self._sizes[k]), encode(own, self.setup.down))

    def fit(self) -> list[Step]:
        """Each participant takes all its local steps of this round."""
        self._step += 1
        answers = self._exchange(self._participants, lambda k: [(m.Fit(self._step), ())], quorum=True)
        self._alike = len(self.samples) == 1
        taken = {k: [(loss, rows) for loss, rows in answers[k].message.losses] for k in answers}
        if not taken:
            raise TrainingError("no client has trained: all are gone")
        return [together(taken, t) for t in range(max(map(len, taken.values())))]

    def average(self, weights: Mapping[int, float]) -> None:
        """The weighted mean of the models of `weights`, for everybody: now, or when they next take part."""
        models = self._models(list(weights))
        here = [k for k in weights if k in models]
        if not here:
            raise TrainingError("no client has sent its model: all are gone")
        self._average = average([models[k] for k in here], [weights[k] for k in here])
        body = encode_named(self._average)
        for k in here:
            self._post(k, m.TakeModel(self._step), body)
        self._stale |= set(range(len(self.samples))) - set(here)
        self._alike = True  # who has missed it gets it before anything else

    def hand_over(self, client: int, *, optimizer: bool) -> None:
        """The travelling model moves to `client`; before anyone holds it, it is `client`'s own."""
        holder = self._holder
        if holder is not None and holder != client:
            asks: list[Request] = [(m.GiveModel(self._step), ())]
            asks += [(m.GiveOptimizer(self._step), ())] if optimizer else []
            given = self._all([holder], lambda k: asks)
            if holder not in given:
                raise TrainingError(f"client {holder} is gone with the one model: the run goes on from its checkpoint")
            model, *state = given[holder]
            decode_named(model.body, self._like)  # what is passed on is what was expected
            self._post(client, m.TakeModel(self._step), [model.body])
            for frame in state:
                self._post(client, m.TakeOptimizer(self._step), [frame.body])
        self._holder = client

    def evaluate(self, samples: Samples, predict: Predict) -> Evaluation:
        """Every connected client's model with the server: the held-out inputs go to the client, what it gives comes
        back.
        """
        everyone = [self._holder] if self._holder is not None else self._judged()
        looked_at = everyone[:1] if self._alike else everyone
        self._catch_up(looked_at)
        totals = dict.fromkeys(looked_at, (0, 0.0))
        for start in range(0, len(samples), EVALUATION_ROWS):
            part = samples[start : start + EVALUATION_ROWS]
            outputs = self._outputs(list(totals), part, predict)
            totals = {
                k: (
                    totals[k][0] + int((o.argmax(1) == part.y).sum()),
                    totals[k][1] + float(row_losses(o, part.y).sum()),
                )
                for k, o in outputs.items()
            }
        if not totals:
            raise TrainingError("no client's model could be evaluated: all are gone")
        found = {k: (correct / len(samples), loss / len(samples)) for k, (correct, loss) in totals.items()}
        return evaluation(found, everyone if self._alike else list(found), len(samples))

    def model_state(self, client: int) -> Mapping[str, Tensor]:
        """One client's parameters and buffers, under the names of the whole model."""
        self._catch_up([client])
        models = self._models([client])
        if client not in models:
            raise TrainingError(f"client {client} is not connected: its model is with it")
        return {name.split(".", 1)[1]: tensor for name, tensor in models[client].items()}

    def state(self) -> dict[str, Any]:
        """What the server keeps; every connected client has written its own state beside its old one when this is
        back, and puts it in its place with the next request.
        """
        self._exchange(sorted(self.hub.connected), lambda k: [(m.Save(self._step, "prepare"), ())])
        for k in self.hub.connected:
            self._post(k, m.Save(self._step, "commit"))
        return {
            "step": self._step,
            "samples": list(self.samples),
            "holder": self._holder,
            "alike": self._alike,
            "average": self._average or {},
            "stale": sorted(self._stale),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take a state that `state()` returned: before clients join, who then go back to the same step."""
        self._step, self._holder, self._alike = state["step"], state["holder"], state["alike"]
        self.setup.samples[:] = state["samples"]
        self._average, self._stale = dict(state["average"]) or None, set(state["stale"])

    def finish(self) -> None:
        """Send what has been posted: the last of all."""
        self._all((), lambda k: [])

    @property
    def step(self) -> int:
        """The step that clients join at."""
        return self._step

    def _catch_up(self, clients: Collection[int]) -> None:
        """Those of `clients` that have missed an averaging get what came of it."""
        if missed := self._stale & set(clients) & self.hub.connected:
            assert self._average is not None, "what was missed is an average"
            body = encode_named(self._average)
            for k in missed:
                self._post(k, m.TakeModel(self._step), body)
            self._stale -= missed

    def _judged(self) -> list[int]:
        """Whose models are evaluated: all that are asked for and connected; failing that, all that are connected."""
        asked = judged(len(self.samples), self.setup.eval_clients, self.setup.seed)
        return [k for k in asked if k in self.hub.connected] or sorted(self.hub.connected)

    def _outputs(self, clients: Sequence[int], part: Samples, predict: Predict) -> dict[int, Tensor]:
        """The logits [n, K] of each client's model, with the server's where there is one, on held-out rows."""
        n, dtype = len(part), part.x.dtype
        body = encode([part.x])
        whole = self.shape == "whole"
        request = m.Evaluate(self._step, "whole" if whole else "lower", n)
        answers = self._exchange(clients, lambda k: [(request, body)])
        logits = [Crossing((self.setup.classes,), dtype)]
        if whole:
            return {k: decode(a.body, logits, n)[0] for k, a in answers.items()}
        given = {k: predict([k], decode(a.body, self.setup.crossing, n)) for k, a in answers.items()}
        if self.shape == "split":
            return {k: rows[0] for k, rows in given.items()}
        tail = m.Evaluate(self._step, "tail", n)
        answers = self._exchange(list(given), lambda k: [(tail, encode(given[k]))])
        return {k: decode(a.body, logits, n)[0] for k, a in answers.items()}

    def _models(self, clients: Sequence[int]) -> dict[int, dict[str, Tensor]]:
        answers = self._exchange(clients, lambda k: [(m.GiveModel(self._step), ())])
        return {k: decode_named(a.body, self._like) for k, a in answers.items()}

    def _post(self, client: int, message: m.Message, body: Sequence[Buffer] = ()) -> None:
        self._later.setdefault(client, []).append((message, body))

    def _exchange(
        self, clients: Collection[int], ask: Callable[[int], list[Request]], *, quorum: bool = False
    ) -> dict[int, Frame]:
        """The one answer that each of `clients` gives to what it is asked. `quorum`: not all are needed."""
        return {k: frames[0] for k, frames in self._all(clients, ask, quorum=quorum).items()}

    def _all(
        self, clients: Collection[int], ask: Callable[[int], list[Request]], *, quorum: bool = False
    ) -> dict[int, list[Frame]]:
        """Ask `clients`, and send what has been posted for anybody. Raises NonFiniteError where a client reports it."""
        posted, self._later = self._later, {}
        asked = {k: ask(k) for k in clients}
        requests = {k: [*posted.get(k, []), *asked.get(k, [])] for k in {*clients, *posted}}
        needed = None
        if quorum and self.setup.deadline is not None:
            needed = max(1, int(np.ceil(self.setup.quorum * len(clients))))
        found: dict[int, list[Frame]] = {}
        answered = self.hub.exchange(requests, deadline=self.setup.deadline, quorum=needed)
        for k, came in answered.items():
            if isinstance(came, Lost):
                if came.kind == NonFiniteError.__name__:
                    raise NonFiniteError("weight gradient or loss", (k,))
                self._notice(k, came)
            elif k in clients:
                due = len(asked[k])
                if len(came) < due:
                    raise WireError(f"client {k} gave {len(came)} answers, {due} were due")
                found[k] = came[-due:]
        return {k: found[k] for k in clients if k in found}
