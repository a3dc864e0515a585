"""Tests, on a copy of the server and before any client receives a result, whether received data can be trained on.

Numbers can be finite and still so large that the step ends in infinities for all clients. This is only possible with
numbers that are larger than all numbers that worked before, so most steps need no test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from cutlayer.data.samples import Samples
from cutlayer.eager import backward
from cutlayer.engine.between import Blocks
from cutlayer.errors import NonFiniteError, TrainingError
from cutlayer.frozen import load_moving, replica
from cutlayer.server import Server
from cutlayer.tasks import Task
from cutlayer.types import Rows, Smashed, TailGradients, as_real, as_tuple, is_continuous
from cutlayer.verbs import ARRIVALS, FORWARD, STEP_COPIES, STEP_EACH, TAIL

ROOM = 2.0
"""The factor by which numbers may exceed all that worked before without a test."""

TAME = 32.0
"""Steps on numbers up to this size are not tested."""

STRANGE = 10.0
"""A client is named if its model has moved this many times as far as the others' (their median)."""


def largest(tensors: Sequence[Tensor]) -> float:
    """The largest absolute value among real numbers and parts of complex ones; NaN or infinity if one of them is."""
    found = 0.0
    for tensor in tensors:
        if not is_continuous(tensor) or not tensor.numel():
            continue
        least, most = torch.aminmax(as_real(tensor.detach()))
        size = max(-least.item(), most.item())
        if not math.isfinite(size):
            return size
        found = max(found, size)
    return found


def _have_squares(rows: Rows) -> bool:
    """Whether the squares of all differences of these numbers are finite."""
    real = [r for r in rows if is_continuous(r)]
    return all(2 * largest([r]) < math.sqrt(torch.finfo(r.dtype).max) for r in real)


@dataclass
class Proven:
    """The largest numbers of one kind that worked."""

    sizes: np.ndarray = field(default_factory=lambda: np.full(1, TAME / ROOM))

    def exceeded(self, sizes: np.ndarray) -> np.ndarray:
        """Which of the clients have numbers [C, n] that are too large to accept without a test: [C]."""
        found: np.ndarray = (sizes > ROOM * self.sizes).astype(bool).max(axis=1)
        return found

    def grow(self, sizes: np.ndarray) -> None:
        """Note that these numbers worked."""
        self.sizes = np.maximum(self.sizes, sizes.max(0))


class Vetting:
    """Tests received data. `needs`: the algorithm's verbs; `probe`: some rows for testing models; `module`: a client's
    part of the model, "lower" and perhaps "tail", at the deepest of their cuts; `blocks`: the layers that the server
    computes for clients with other cuts.
    """

    def __init__(
        self,
        server: Server,
        task: Task,
        needs: frozenset[str],
        probe: Samples,
        module: nn.ModuleDict,
        blocks: Blocks | None = None,
    ) -> None:
        self._blocks = blocks
        self._server, self._task, self._needs, self._probe = server, task, needs, probe
        self._module = replica(module)
        self._rows, self._tails, self._models = Proven(), Proven(), Proven()

    def of_rows(self, smashed: Smashed, sizes: Sequence[tuple[float, float]]) -> tuple[int, ...]:
        """The clients whose rows must be left out so that the server's step is possible; none if it is possible with
        all rows. `sizes` are the largest numbers in each client's rows and targets. Raises TrainingError if it is not
        possible with any client's rows, or with those of the usual size.
        """

        def goes(who: Sequence[int]) -> bool:
            own = self._lifted(smashed, who)
            # Rows that wait in buffers may enter variances, which are squares.
            return own is not None and (ARRIVALS not in self._needs or _have_squares(own.rows)) and self._step(own)

        return self._culprits(self._rows, smashed.clients, np.array(sizes), goes)

    def _lifted(self, smashed: Smashed, who: Sequence[int]) -> Smashed | None:
        """The rows of some clients as the server's model receives them, after the blocks that it holds for them. None
        if a client's blocks fail on its rows.
        """
        if self._blocks is None:
            return _of(smashed, who)
        blocks, asked = self._blocks, set(who)
        own = {k: part.only(k).rows for part in smashed.parts for k in part.clients if k in asked}
        if not all(blocks.bear(k, rows) for k, rows in own.items()):
            return None
        lifted = [blocks.lifted(k, own[k]) for k in smashed.clients if k in own]
        rows = tuple(torch.cat(tensors) for tensors in zip(*lifted, strict=True))
        return replace(_of(replace(smashed, rows=(), parts=()), who), rows=rows)

    def of_tails(self, smashed: Smashed, tail: TailGradients, sizes: Sequence[float]) -> tuple[int, ...]:
        """The same for the gradients that the clients' tails sent back."""

        def goes(who: Sequence[int]) -> bool:
            return self._back(_of(smashed, who), _tail_of(tail, who))

        return self._culprits(self._tails, tail.clients, np.array(sizes)[:, None], goes)

    def of_models(
        self, models: Mapping[int, Mapping[str, Tensor]], mean: Callable[[Sequence[int]], Mapping[str, Tensor]]
    ) -> tuple[int, ...]:
        """The clients whose models must be left out so that the average is usable: `mean` computes the average
        of some.
        """
        sizes = np.array([[largest(list(model.values()))] for model in models.values()])

        def goes(who: Sequence[int]) -> bool:
            return self._serves(mean(who))

        return self._culprits(self._models, tuple(models), sizes, goes)

    def _culprits(
        self, proven: Proven, clients: Sequence[int], sizes: np.ndarray, goes: Callable[[Sequence[int]], bool]
    ) -> tuple[int, ...]:
        strange = proven.exceeded(sizes)
        if not strange.any():
            return ()
        if goes(clients):
            proven.grow(sizes)
            return ()
        order = np.argsort(-sizes.max(1), kind="stable")
        suspects = [clients[i] for i in order if strange[i]]
        bad = [k for k in suspects if not goes([k])]
        rest = [k for k in clients if k not in bad]
        while rest and not goes(rest):  # each one works alone, but not all together
            left = [k for k in suspects if k in rest]
            if not left:
                break
            bad.append(left[0])
            rest.remove(left[0])
        else:
            if rest:
                proven.grow(sizes[[k in rest for k in clients]])
            if rest or (len(clients) == 1 and self._fits()):  # of one client alone: the server is well, so it is not
                return tuple(sorted(bad))
        raise TrainingError(
            f"no step is possible on what clients {', '.join(map(str, clients))} sent (the largest number is "
            f"{sizes.max():.3g}), whichever of them is left out: training has diverged; try lower rates (client_lr, "
            "server_lr)"
        )

    def _serves(self, state: Mapping[str, Tensor]) -> bool:
        """Whether a step is possible from this model."""
        return _all_finite(list(state.values())) and self._fits(state)

    def _fits(self, state: Mapping[str, Tensor] | None = None) -> bool:
        """Whether a step on the probe is possible from a model (None: the clients' initial model)."""
        module = replica(self._module)
        if state is not None:
            load_moving(module, state)
        parts, y = module.eval(), self._probe.y
        given = as_tuple(parts["lower"](self._probe.rows))
        sent = Smashed(_detached(given), y, (0,), (len(y),), (), self._task.weights(y))
        if not _all_finite(given):
            return False
        if FORWARD in self._needs and TAIL not in self._needs:
            return self._step(sent)
        if TAIL in self._needs:
            given = _detached(self._server.trial().forward(sent))
        if "tail" in parts:
            given = as_tuple(parts["tail"](given))
        loss = self._task.row_losses(given, y).mean()
        backward([loss], [torch.ones_like(loss)])
        return _all_finite([loss, *(p.grad for p in module.parameters() if p.grad is not None)])

    def _step(self, smashed: Smashed) -> bool:
        """Whether the server can step on the rows, and once more on the same."""
        clients = smashed.clients
        try:
            if STEP_COPIES in self._needs:
                return all(self._twice(self._server.trial(k), [smashed.only(k)]) for k in clients)
            if STEP_EACH in self._needs:
                return self._twice(self._server.trial(), [smashed.only(k) for k in clients])
            if TAIL in self._needs:
                outputs = self._server.trial().forward(smashed)
                ones = TailGradients(_ones(outputs), torch.ones(len(clients)), clients, smashed.sizes)
                return _all_finite(outputs) and self._back(smashed, ones)
            return self._twice(self._server.trial(), [smashed])
        except NonFiniteError:
            return False

    def _twice(self, server: Server, steps: Sequence[Smashed]) -> bool:
        """Whether a server takes these steps, and could take them again."""
        taken = [server.step(one) for one in steps]
        taken += [server.gradients(one) for one in steps]
        return _all_finite([t for step in taken for t in (step.means, *step.gradient)]) and _all_finite(server.moved)

    def _back(self, smashed: Smashed, tail: TailGradients) -> bool:
        """Whether the server can back-propagate these gradients, and compute forward once more."""
        server = self._server.trial()
        try:
            server.forward(smashed)
            step = server.backward(smashed, tail)
            return _all_finite([step.means, *step.gradient, *server.moved, *server.forward(smashed)])
        except NonFiniteError:
            return False


def outlying(models: Mapping[int, Mapping[str, Tensor]], before: Mapping[str, Tensor]) -> dict[int, float]:
    """The clients whose models have moved from `before` many times as far as the others' (their median, of at least
    two), with the factor.
    """
    names = [name for name, tensor in before.items() if is_continuous(tensor)]
    was = [as_real(before[name]) for name in names]
    moved = {k: _distance([as_real(model[name]) for name in names], was) for k, model in models.items()}
    found = {}
    for k, distance in moved.items() if len(moved) > 2 else ():
        usual = float(np.median([d for other, d in moved.items() if other != k]))
        if 0 < STRANGE * usual < distance:
            found[k] = distance / usual
    return found


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return math.sqrt(
        sum(float(torch.linalg.vector_norm(x - y, dtype=torch.float64)) ** 2 for x, y in zip(a, b, strict=True))
    )


def _all_finite(tensors: Sequence[Tensor]) -> bool:
    return math.isfinite(largest(tensors))


def _ones(outputs: Rows) -> Rows:
    return tuple(torch.ones_like(o) / len(o) for o in outputs if o.requires_grad)


def _detached(rows: Rows) -> Rows:
    return tuple(r.detach() for r in rows)


def _of(smashed: Smashed, clients: Sequence[int]) -> Smashed:
    """The rows of some clients."""
    who = set(clients)
    if who >= set(smashed.clients):
        return smashed
    at = torch.from_numpy(np.repeat([k in who for k in smashed.clients], smashed.sizes).nonzero()[0])
    sizes = smashed.sizes_of(who)
    weights = None if smashed.weights is None else smashed.weights[at]
    rows = smashed.take(smashed.rows, who)
    return Smashed(rows, smashed.labels[at], tuple(sizes), tuple(sizes.values()), (), weights)


def _tail_of(tail: TailGradients, clients: Sequence[int]) -> TailGradients:
    """The gradients of some clients' tails."""
    who = [i for i, k in enumerate(tail.clients) if k in set(clients)]
    parts = [rows.split(list(tail.sizes)) for rows in tail.rows]
    return TailGradients(
        tuple(torch.cat([part[i] for i in who]) for part in parts),
        tail.losses[who],
        tuple(tail.clients[i] for i in who),
        tuple(tail.sizes[i] for i in who),
        (),
        tuple(tail.masses[i] for i in who) if tail.masses else (),
    )
