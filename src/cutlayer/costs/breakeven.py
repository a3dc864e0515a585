"""The points at which split learning and federated learning cost the same: in closed form, checked with `expect` on
both sides.

Per epoch, with C clients, n samples of each, N = C n; s, g, l bytes of a sample's smashed data, cut gradient and
label; W and w bytes of the model and of the client's part; a = 1 if client models are averaged (SFL), else 0; phi
the active fraction of SplitAvg (SGL, SGLR), else 0, and A = phi C:

| convention | split | federated |
|---|---|---|
| wire-unicast | N (s + g + l) + 2 a C w | 2 C W |
| wire-broadcast | N (s + l) + n g (C - A + [A > 0]) + a (C + 1) w | (C + 1) W |
| paper | N s + n g (C - A) + g [A > 0] + 2 a C w | 2 C W |

and 2 (C - 1) w more if one model travels (SSL). If clients have different cuts, split learning costs the sum over them,
and only n, the time and epochs are examined. All are linear in n. With N fixed, they are also linear in C, except
SplitAvg under wire-broadcast, which is quadratic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from typing import Literal, cast

from cutlayer.algorithms import Algorithm, traffic_of
from cutlayer.costs.expect import Expected, Mixture, Workload, expect
from cutlayer.costs.fleet import Fleet
from cutlayer.costs.ledger import CONVENTIONS, Convention
from cutlayer.text import format_bytes
from cutlayer.traffic import Pattern, Traffic

Quantity = Literal["samples per client", "clients", "model bytes", "time", "epochs"]
Side = Literal["below", "above", "always", "never"]

_FAR = 10**15  # more clients, samples or bytes than anything has


@dataclass(frozen=True)
class BreakEven:
    """The number of `quantity` (all else as planned) up to which, or from which on, `algorithm` costs less than
    federated learning.

    `exact` is the closed form. `last` is the last whole number before the order changes; `dearer` says on which side
    of it `algorithm` costs more: "above" or "below" it, or "always", "never" (`last` is then None). `against` is the
    title of the federated algorithm, `against_name` its name.
    `convention` is None for time; `total` is the number of all clients' samples if it is fixed.
    """

    algorithm: str
    title: str
    against: str
    against_name: str
    quantity: Quantity
    convention: Convention | None
    dearer: Side
    last: int | None
    exact: float | None
    total: int | None = None

    @property
    def where(self) -> str:
        """The numbers at which it costs no more than the federated one."""
        if self.last is None:
            return "never" if self.dearer == "always" else "always"
        model = self.quantity == "model bytes"
        if self.dearer == "above":
            return f"up to {format_bytes(self.last) if model else f'{self.last:,}'}"
        return f"above {format_bytes(self.last)}" if model else f"from {self.last + 1:,}"


def lines(found: Sequence[BreakEven]) -> list[tuple[Convention | None, list[str], dict[Quantity, str]]]:
    """For a table: under each convention (None: time) the titles of those that cost no more at the same numbers, and
    at which numbers of each quantity.
    """
    cells: dict[tuple[Convention | None, str], dict[Quantity, str]] = {}
    for b in found:
        cells.setdefault((b.convention, b.title), {})[b.quantity] = b.where
    groups: dict[tuple[object, ...], tuple[Convention | None, list[str], dict[Quantity, str]]] = {}
    for (convention, title), own in cells.items():
        groups.setdefault((convention, *own.items()), (convention, [], own))[1].append(title)
    return sorted(groups.values(), key=lambda line: [b.convention for b in found].index(line[0]))


@dataclass(frozen=True)
class Duel:
    """A `split` algorithm against a `federated` one (or, of epochs, any against one that gathers the data)."""

    split: Algorithm
    federated: Algorithm

    def moves(self, work: Workload) -> Traffic:
        """The traffic of the split algorithm in an epoch."""
        found = traffic_of(self.split, work)
        assert found is not None, "only planned algorithms are compared"
        return found


def break_evens(algorithms: Sequence[tuple[Algorithm, Workload | Mixture]], fleet: Fleet | None) -> list[BreakEven]:
    """All of those `algorithms` that cut the model, with what they train, against the first that trains whole models in
    rounds, if there is one: under each convention, and in time with a fleet.
    """
    stated = [(a, work, pattern) for a, work in algorithms if (pattern := _pattern(a, work))]
    federated = next((a for a, _, pattern in stated if pattern == "rounds"), None)
    if federated is None:
        return []
    found = []
    for algorithm, work, pattern in stated:
        if pattern not in ("steps", "relay"):
            continue
        duel = Duel(algorithm, federated)
        for convention in CONVENTIONS:
            found.append(samples_per_client(duel, work, convention))
            if isinstance(work, Workload):
                found += [clients(duel, work, convention), model_size(duel, work, convention)]
        if fleet is not None:
            found.append(duration(duel, work, fleet))
    return found


def _pattern(algorithm: Algorithm, work: Workload | Mixture) -> Pattern | None:
    """The waiting pattern; None for an algorithm that does not state it."""
    traffic = traffic_of(algorithm, work if isinstance(work, Workload) else work.kinds[-1])
    return None if traffic is None else traffic.pattern


def data_break_evens(algorithms: Sequence[tuple[Algorithm, Workload | Mixture]]) -> list[BreakEven]:
    """All of those `algorithms` that leave the data where they are, against the first that sends them to the server, if
    there is one: up to how many epochs they move fewer bytes, since data are sent once.
    """
    stated = [(a, work, pattern) for a, work in algorithms if (pattern := _pattern(a, work))]
    central = next((a for a, _, pattern in stated if pattern == "gather"), None)
    if central is None:
        return []
    others = [Duel(a, central) for a, _, pattern in stated if pattern != "gather"]
    works = {a.entry.name: work for a, work, _ in stated}
    return [epochs(duel, works[duel.split.entry.name], c) for duel in others for c in CONVENTIONS if c != "paper"]


def epochs(duel: Duel, work: Workload | Mixture, convention: Convention) -> BreakEven:
    """The number of epochs up to which an algorithm sends at most the bytes of sending the data once."""
    each = bytes_of(expect(duel.split, work), convention)
    exact = bytes_of(expect(duel.federated, work), convention) / each if each else math.inf

    def dearer(n: int) -> bool:
        return _difference(duel, work.varied(epochs=n), convention) > 0

    return _settled(duel, "epochs", convention, dearer, exact)


def samples_per_client(duel: Duel, work: Workload | Mixture, convention: Convention) -> BreakEven:
    """The number of samples per client above which a split algorithm costs more than a federated one."""
    if isinstance(work, Workload):
        per_sample, fixed = _linear(duel, work, convention)
        fixed -= _federated(work.clients, work.model, convention)
    else:
        batch = work.kinds[-1].batch
        first, second = (_difference(duel, work.varied(samples_per_client=n * batch), convention) for n in (1, 2))
        per_sample, fixed = (second - first) / batch, float(2 * first - second)
    exact = -fixed / per_sample if per_sample else math.inf

    def dearer(n: int) -> bool:
        return _difference(duel, work.varied(samples_per_client=n), convention) > 0

    return _settled(duel, "samples per client", convention, dearer, exact)


def clients(duel: Duel, work: Workload, convention: Convention) -> BreakEven:
    """The number of clients above which a split algorithm costs less than a federated one, for as many samples in all
    as planned.

    Under wire-broadcast whole models go down once for all, but a travelling model from one client to the next: with
    more than half of the whole in the client's part, it is the one that costs more above that number.
    """
    n, whole, t = work.samples, work.model, duel.moves(work)
    s, g = _rows(work, t), _back(work, t)
    label = 0 if convention == "paper" else work.label * t.labels
    own, moves = t.averaged, 2 * t.moved
    phi = duel.moves(replace(work, clients=_FAR)).sharing / _FAR
    each = 1 if convention == "wire-broadcast" else 2  # models down once, or once per client
    once = phi > 0
    # In total: constant + curved / C on one side, rise x C on the other.
    curved = 0.0
    if convention == "wire-unicast":
        constant = float(n * (s + g + label))
    elif convention == "wire-broadcast":
        constant, curved = n * (s + label + (1 - phi) * g) + own - whole, float(n * g * once)
    else:
        constant = n * (s + (1 - phi) * g) + g * once
    constant, rise = constant - moves, each * (whole - own) - moves
    exact = (constant + math.sqrt(constant**2 + 4 * rise * curved)) / (2 * rise) if rise > 0 else math.inf

    def difference(c: int) -> int:
        # A part of a sample is fine if only bytes are counted.
        dealt = replace(work, clients=c, samples_per_client=cast(int, Fraction(n, c)))
        return _difference(duel, dealt, convention)

    if rise < 0:
        return _settled(duel, "clients", convention, lambda c: difference(c) > 0, constant / rise, total=n)
    return _settled(duel, "clients", convention, lambda c: difference(c) < 0, exact, total=n, says_cheaper=True)


def model_size(duel: Duel, work: Workload, convention: Convention) -> BreakEven:
    """The size of the model in bytes above which a split algorithm costs less than fl, the client's part as it is."""
    per_sample, fixed = _linear(duel, work, convention)
    copies = _federated(work.clients, 1, convention)
    exact = (work.samples_per_client * per_sample + fixed) / copies

    def cheaper(size: int) -> bool:
        return _difference(duel, replace(work, model=size), convention) < 0

    return _settled(duel, "model bytes", convention, cheaper, exact, says_cheaper=True)


def duration(duel: Duel, work: Workload | Mixture, fleet: Fleet) -> BreakEven:
    """The number of samples per client from which on an epoch takes longer (or shorter) than in federated learning.

    Both are linear in the number of whole batches, which gives the point; `expect` then finds it to the sample.
    """

    @cache
    def longer(n: int) -> float:
        """Seconds, without rounding."""
        dealt = work.varied(samples_per_client=n)
        found, other = (expect(a, dealt, fleet).seconds for a in (duel.split, duel.federated))
        assert found is not None
        assert other is not None
        return found - other if abs(found - other) > 1e-12 * other else 0.0

    b = work.batch if isinstance(work, Workload) else work.kinds[-1].batch
    slope = (longer(2 * b) - longer(b)) / b
    at_none = longer(b) - slope * b  # as if clients had no samples
    exact = -at_none / slope if slope else math.inf
    first = longer(1) > 0
    return _settled(
        duel,
        "time",
        None,
        lambda n: (longer(n) > 0) != first,
        exact if exact > 0 else math.inf,
        says_cheaper=first,
    )


def _settled(
    duel: Duel,
    quantity: Quantity,
    convention: Convention | None,
    changed: Callable[[int], bool],
    exact: float,
    *,
    total: int | None = None,
    says_cheaper: bool = False,
) -> BreakEven:
    """The break-even near the closed form's `exact`, found by asking `changed(n)`: has the order changed at n?

    Active clients are whole numbers and so are samples: the change may lie a little beside the closed form. At the
    change, the algorithm becomes cheaper (`says_cheaper`) or more expensive.
    """
    who = duel.split.entry.name, duel.split.entry.title, duel.federated.entry.title, duel.federated.entry.name
    if changed(1):
        return BreakEven(*who, quantity, convention, "never" if says_cheaper else "always", None, None, total)
    if not changed(_FAR):
        return BreakEven(*who, quantity, convention, "always" if says_cheaper else "never", None, None, total)
    guess = max(1, min(_FAR, math.floor(exact))) if math.isfinite(exact) else _FAR
    step = 1
    if changed(guess):
        high = guess
        while changed(max(1, high - step)):
            high, step = high - step, 2 * step
        low = max(1, high - step)
    else:
        low = guess
        while not changed(min(_FAR, low + step)):
            low, step = low + step, 2 * step
        high = min(_FAR, low + step)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if changed(middle) else (middle, high)
    return BreakEven(*who, quantity, convention, "below" if says_cheaper else "above", low, exact, total)


def bytes_of(costs: Expected, convention: Convention) -> int:
    """Up and down of all clients under a convention."""
    return {"wire-unicast": costs.unicast, "wire-broadcast": costs.broadcast, "paper": costs.paper}[convention]


def _difference(duel: Duel, work: Workload | Mixture, convention: Convention) -> int:
    """The additional bytes of the split algorithm."""
    return bytes_of(expect(duel.split, work), convention) - bytes_of(expect(duel.federated, work), convention)


def _federated(c: int, model: int, convention: Convention) -> int:
    return (c + 1 if convention == "wire-broadcast" else 2 * c) * model


def _rows(work: Workload, t: Traffic) -> float:
    """Bytes of one sample that cross independent of its gradient: smashed data, and the tensors for tails and back. It
    includes the sample's share of the bytes that codecs write for a whole batch.
    """
    tails, besides = work.features + work.returned, work.features_besides + work.returned_besides
    return work.smashed + tails * t.tails + (work.smashed_besides + besides * t.tails) / work.batch


def _back(work: Workload, t: Traffic) -> float:
    """Bytes of one sample's cut gradient, with its share of the bytes that codecs write for a whole batch."""
    return (work.gradient + work.gradient_besides / work.batch) * t.gradients


def _linear(duel: Duel, w: Workload, convention: Convention) -> tuple[float, float]:
    """(a, b): all clients' bytes are a x samples per client + b."""
    c, t = w.clients, duel.moves(w)
    gradient = _back(w, t)
    a, b = c * (_rows(w, t) + gradient), 0.0
    if convention != "paper":
        a += c * w.label * t.labels
    if t.sharing and convention == "wire-broadcast":
        a -= (t.sharing - 1) * gradient
    if t.sharing and convention == "paper":
        a, b = a - t.sharing * gradient, gradient
    b += _federated(c, t.averaged, convention) + 2 * (c - 1) * t.moved
    return a, b
