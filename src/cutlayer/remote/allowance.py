"""How much a client answers, by its own configuration: counted over restarts, and refused beyond.

What the study asks for follows from the client's own file: its rounds, and the batches of a round. A client answers
that, with room for what is repeated after restarts (`ROOM`), and no more, unless its table [budget] says otherwise.
What was spent is kept in the client's folder, so that a restart does not begin anew.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from cutlayer.defences import dp
from cutlayer.defences.noise import Noise
from cutlayer.errors import BudgetError, RunFolderError
from cutlayer.files import put_whole, unwritable
from cutlayer.options import BudgetConfig
from cutlayer.text import format_duration

ROOM = (2, 5)
"""Times the study's rounds, and rounds more: for those that are repeated after restarts and faults."""

PIECES = 100
"""Requests to evaluate in a round, where the server's test rows are not known: each has up to 1024 rows."""


@dataclass(frozen=True)
class Extent:
    """What the client's own configuration says of the training: its rounds (None: they depend on other clients' data),
    the batches of one, requests to evaluate in each, models that are given in each; whether smashed data are sent.
    """

    rounds: int | None
    quota: int
    evaluations: int
    models: int
    sends: bool

    @property
    def passes(self) -> int:
        """Forward passes of a round whose smashed data are sent."""
        return self.quota if self.sends else 0


@dataclass(frozen=True)
class Allowance:
    """The most that a client answers: rounds begun, forward passes whose smashed data are sent, batches trained on,
    requests to evaluate, models given; seconds of work, times that a sample is sent (None: no limit). `total`: rounds
    of the study that a server may speak of (None: any).
    """

    rounds: int
    passes: int
    batches: int
    evaluations: int
    models: int
    seconds: float | None = None
    releases: int | None = None
    total: int | None = None

    @classmethod
    def of(cls, study: Extent, budget: BudgetConfig, noise: Noise | None = None) -> Allowance:
        """What the table [budget] says, and where it says nothing, what the study needs, with room for restarts."""
        known = study.rounds if study.rounds is not None else (budget.max_rounds or 1 << 20)
        rounds = budget.max_rounds or ROOM[0] * known + ROOM[1]
        return cls(
            rounds=rounds,
            passes=_either(budget.max_passes, rounds * study.passes),
            batches=_either(budget.max_batches, rounds * study.quota),
            evaluations=_either(budget.max_evaluations, (rounds + 1) * study.evaluations),
            models=_either(budget.max_models, (rounds + 1) * study.models),
            seconds=budget.max_seconds,
            releases=None if budget.max_epsilon is None else most_releases(noise, budget),
            total=study.rounds if budget.max_rounds is None else budget.max_rounds,
        )


def _either(given: int | None, derived: int) -> int:
    return derived if given is None else given


def statement(noise: Noise, releases: int, delta: float) -> dp.Statement:
    """What the noise guarantees if every sample is sent so often."""
    assert noise.clip is not None, "noise needs a clip"
    if noise.laplace_noise:
        return dp.laplace(noise.scale, noise.clip, releases)
    return dp.gaussian(noise.scale, noise.clip, releases, delta)


def most_releases(noise: Noise | None, budget: BudgetConfig) -> int:
    """How often a sample can be sent before its epsilon is above the budget's."""
    if noise is None or budget.max_epsilon is None or statement(noise, 1, budget.delta).epsilon > budget.max_epsilon:
        return 0
    low, high = 1, 2
    while statement(noise, high, budget.delta).epsilon <= budget.max_epsilon:
        low, high = high, 2 * high
        if high > 1 << 40:
            return low
    while high - low > 1:
        middle = (low + high) // 2
        within = statement(noise, middle, budget.delta).epsilon <= budget.max_epsilon
        low, high = (middle, high) if within else (low, middle)
    return low


@dataclass
class Account:
    """What a client has answered so far, over all its processes. `releases`: how often a sample was sent, at most."""

    rounds: int = 0
    passes: int = 0
    batches: int = 0
    evaluations: int = 0
    models: int = 0
    seconds: float = 0.0
    releases: int = 0


_WORDS = {
    "rounds": "rounds begun",
    "passes": "forward passes on its own rows",
    "batches": "batches trained on",
    "evaluations": "requests to evaluate",
    "models": "models given",
}
SPENT = "spent.json"
_SIZE = 512  # bytes of the file: it is written over in place


class Purse:
    """What a client may still answer: an allowance, and what is spent of it, kept at `path` (None: in this process
    alone). `name` is the client's, `samples` how many it has.
    """

    def __init__(self, name: str, allowance: Allowance, samples: int, path: Path | None = None) -> None:
        """Raises RunFolderError where what was kept cannot be read."""
        self.name, self.allowance, self.spent = name, allowance, Account()
        self._sent = np.zeros(samples, np.int64)  # how often each sample was, in this process
        self._file: int | None = None
        self._path = path
        if path is not None:
            self.spent = _read(path)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self._before = self.spent.releases

    def spend(self, what: str, count: int = 1) -> None:
        """Raises BudgetError if that is more than is left, and then spends nothing."""
        limit, spent = getattr(self.allowance, what), getattr(self.spent, what)
        if spent + count > limit:
            raise BudgetError(
                f"the server asks for more than the budget of {self.name}: of {limit} {_WORDS[what]}, {spent} are "
                f"spent, and {count} more would be too many; if the study needs more, raise max_{what} in [budget] of "
                "this client's own file, else do not join this server"
            )
        setattr(self.spent, what, spent + count)

    def check_total(self, rounds: int) -> None:
        """Raises BudgetError for a server that speaks of more rounds than the study has."""
        total = self.allowance.total
        if total is not None and rounds > total:
            raise BudgetError(
                f"the server says that the run has {rounds} rounds, but in this client's own file it has {total}: give "
                "server and clients the same file, or raise max_rounds in [budget]"
            )

    def send(self, rows: np.ndarray) -> None:
        """The smashed data of these samples are sent once more. Raises BudgetError where that is once too often."""
        most = self._before + int(self._sent[rows].max(initial=0)) + 1
        limit = self.allowance.releases
        if limit is not None and most > limit:
            raise BudgetError(
                f"the server asks for rows of {self.name} that were sent {most - 1} times: once more would cost more "
                "than max_epsilon of its [budget]"
            )
        self.spend("passes")
        self._sent[rows] += 1
        self.spent.releases = max(self.spent.releases, most)

    def standing(self, noise: Noise | None = None, delta: float = 1e-5) -> dict[str, tuple[float, float | None]]:
        """(spent, allowed; None: without a limit) by item: those of `Account`, and with `noise` epsilon at `delta`."""
        items = {f.name: (getattr(self.spent, f.name), getattr(self.allowance, f.name)) for f in fields(Account)}
        if noise is not None:
            spent, most = self.spent.releases, self.allowance.releases
            items["epsilon"] = (
                statement(noise, spent, delta).epsilon if spent else 0.0,
                statement(noise, most, delta).epsilon if most else (None if most is None else 0.0),
            )
        return items

    def work(self, seconds: float) -> None:
        """Time was spent on a request, which is not answered yet: what was spent on it is kept first."""
        self.spent.seconds += seconds
        self._keep()

    def check_time(self, more: float = 0.0) -> None:
        """Raises BudgetError once the time is spent, `more` seconds included."""
        limit = self.allowance.seconds
        if limit is not None and self.spent.seconds + more > limit:
            raise BudgetError(
                f"{self.name} has worked for {format_duration(self.spent.seconds + more)}, and its budget is "
                f"{format_duration(limit)}: raise max_seconds in [budget] of its own file if the study needs longer"
            )

    def close(self) -> None:
        """Keep what is spent, on the disk."""
        if self._file is not None:
            self._keep()
            os.fsync(self._file)
            os.close(self._file)
            self._file = None

    def _keep(self) -> None:
        if self._file is None or self._path is None:
            return
        try:
            put_whole(self._file, json.dumps(vars(self.spent)).ljust(_SIZE).encode())
        except OSError as error:
            raise unwritable(self._path, error) from None


def _read(path: Path) -> Account:
    """What was spent. Raises RunFolderError where the file is damaged."""
    try:
        found: Any = json.loads(path.read_text("utf-8") or "{}")
        counts = {f.name: int(found.get(f.name, 0)) for f in fields(Account) if f.name != "seconds"}
        spent = Account(**counts, seconds=float(found.get("seconds", 0.0)))
    except FileNotFoundError:
        return Account()
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        spent = Account(rounds=-1)
    if min(asdict(spent).values()) < 0 or spent.seconds != spent.seconds:
        raise RunFolderError(
            f"{str(path)!r}, which says what this client has answered, is damaged: restore it, or remove it to reset "
            "the budget"
        )
    return spent
