"""How many requests a client answers, by its own configuration. They are counted over restarts, and refused beyond the
limit.

The client's own file determines the requests of the study: its rounds, and the batches of a round. A client answers
these, with room for repetitions after restarts (`ROOM`), unless its table [budget] says otherwise. The client's folder
keeps what was spent, so a restart does not begin at zero.
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
"""A factor of the study's rounds, and a number of additional rounds, for repetitions after restarts and faults."""

PIECES = 100
"""Requests to evaluate in a round, if the number of the server's test rows is not known: each has up to 1024 rows."""


@dataclass(frozen=True)
class Extent:
    """The training by the client's own configuration: its rounds (None: they depend on other clients' data), and for
    each round its batches, requests to evaluate, and models sent; and whether smashed data are sent.
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
    """The limits of a client: rounds begun, forward passes whose smashed data are sent, batches trained on, requests to
    evaluate, models sent, seconds of work, and times that a sample is sent (None: no limit). `total`: rounds of the
    study that a server may announce (None: any number).
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
        """The limits of the table [budget]; for those that it does not give, what the study needs, with room for
        restarts.
        """
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
    """The guarantee of the noise if every sample is sent this number of times."""
    assert noise.clip is not None, "noise needs a clip"
    if noise.laplace_noise:
        return dp.laplace(noise.scale, noise.clip, releases)
    return dp.gaussian(noise.scale, noise.clip, releases, delta)


def most_releases(noise: Noise | None, budget: BudgetConfig) -> int:
    """How often a sample can be sent before its epsilon exceeds the budget."""
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
_SIZE = 512  # bytes of the file, which is overwritten in place


class Purse:
    """What a client may still answer: an allowance, and how much of it is spent, stored at `path` (None: only in this
    process). `name` is the client's, `samples` the number of its samples.
    """

    def __init__(self, name: str, allowance: Allowance, samples: int, path: Path | None = None) -> None:
        """Raises RunFolderError if the stored account cannot be read."""
        self.name, self.allowance, self.spent = name, allowance, Account()
        self._sent = np.zeros(samples, np.int64)  # how often each sample was sent in this process
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
        """Raises BudgetError if a server announces more rounds than the study has."""
        total = self.allowance.total
        if total is not None and rounds > total:
            raise BudgetError(
                f"the server says that the run has {rounds} rounds, but in this client's own file it has {total}: give "
                "server and clients the same file, or raise max_rounds in [budget]"
            )

    def send(self, rows: np.ndarray) -> None:
        """The smashed data of these samples are sent once more. Raises BudgetError if that exceeds the limit."""
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
        """Note the time spent on a request, and store it before the request is answered."""
        self.spent.seconds += seconds
        self._keep()

    def check_time(self, more: float = 0.0) -> None:
        """Raises BudgetError if the time is spent, including `more` seconds."""
        limit = self.allowance.seconds
        if limit is not None and self.spent.seconds + more > limit:
            raise BudgetError(
                f"{self.name} has worked for {format_duration(self.spent.seconds + more)}, and its budget is "
                f"{format_duration(limit)}: raise max_seconds in [budget] of its own file if the study needs longer"
            )

    def close(self) -> None:
        """Store what is spent on the disk."""
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
    """What was spent. Raises RunFolderError if the file is damaged."""
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
