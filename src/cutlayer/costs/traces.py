"""Traces: the times when each client can be reached, with the speed of its link, read from a CSV file.

A row says that `client` (its number, or its name if the data name the clients) can be reached in [from, to), in virtual
seconds, and then sends `up` and receives `down` Mbit/s. At times without a row, the client cannot be reached. The trace
repeats after the period. Without a period, each client's last row must have no end (`to` is inf), so that a run never
waits without end.

Shape legend: C clients.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from cutlayer.errors import ConfigError, unknown
from cutlayer.text import shortened

COLUMNS = ("client", "from", "to", "up", "down")
_MBPS = 1e6  # bit/s
_SHOWN = 40  # shown characters of a wrong value
_DIGITS = 9  # of a client's number
_LEAST = 1e-9  # Mbit/s
_ROUNDING = 1e-9  # the fraction of an interval that rounding may add to a message


class Passing(NamedTuple):
    """The time of a message: seconds on air, and seconds without a link before it and in between."""

    on_air: float
    waited: float


@dataclass(frozen=True)
class Reachable:
    """When one client can be reached: intervals in order, in seconds, with its rates in bit/s."""

    begins: tuple[float, ...]
    ends: tuple[float, ...]
    up: tuple[float, ...]
    down: tuple[float, ...]

    def until(self, time: float) -> float:
        """Seconds before `time` in which the client can be reached, in the first period."""
        pairs = zip(self.begins, self.ends, strict=True)
        return math.fsum(min(end, time) - begin for begin, end in pairs if begin < time)


@dataclass(frozen=True)
class Trace:
    """The times when each of C clients can be reached, repeated after each `period` (inf: no repetition)."""

    clients: tuple[Reachable, ...]
    period: float = math.inf

    @property
    def digest(self) -> str:
        """A name for the content of the trace."""
        return hashlib.sha256(repr((self.clients, self.period)).encode()).hexdigest()

    def waits(self, time: float) -> npt.NDArray[np.float64]:
        """Seconds [C] from `time` on until each client can be reached: 0 where it can be reached now."""
        return np.array([max(0.0, next(self._on(client, time))[0] - time) for client in self.clients])

    def passing(
        self, direction: Literal["up", "down"], client: int, time: float, bits: float, most: float = math.inf
    ) -> Passing:
        """The time of `bits` to or from a client from `time` on, at no more than `most` bit/s."""
        one = self.clients[client]
        rates = getattr(one, direction)
        on_air, waited, now, left = 0.0, 0.0, time, bits
        for count, (begin, end, number) in enumerate(self._on(one, time)):
            if count > len(rates):  # a whole period was not enough
                many, passed = self._periods(one, rates, left, most)
                rest = self.passing(direction, client, now + many * self.period, left - passed, most)
                on_air += many * one.until(self.period) + rest.on_air
                return Passing(on_air, waited + many * (self.period - one.until(self.period)) + rest.waited)
            rate = min(rates[number], most)
            waited += max(0.0, begin - now)
            needed = left / rate
            if needed <= (end - begin) * (1 + _ROUNDING):
                return Passing(on_air + needed, waited)
            on_air += end - begin
            left -= (end - begin) * rate
            now = end
        raise AssertionError("a client's last interval has no end")

    def _periods(self, one: Reachable, rates: Sequence[float], bits: float, most: float) -> tuple[int, float]:
        """How many whole periods `bits` take before the last one, for any start within a period; and the bits that pass
        in them.
        """
        lengths = (end - begin for begin, end in zip(one.begins, one.ends, strict=True))
        each = math.fsum(length * min(rate, most) for length, rate in zip(lengths, rates, strict=True))
        many = max(0, math.floor(bits / each) - 1)
        return many, many * each

    def _on(self, one: Reachable, time: float) -> Iterator[tuple[float, float, int]]:
        """A client's intervals from `time` on: (begin, end, which one)."""
        repeats = not math.isinf(self.period)
        cycle, local = divmod(time, self.period) if repeats else (0.0, time)
        first = bisect_right(one.ends, local)
        while True:
            offset = cycle * self.period if repeats else 0.0
            for number in range(first, len(one.ends)):
                begin, end = max(time, offset + one.begins[number]), offset + one.ends[number]
                if end > begin:
                    yield begin, end, number
            if not repeats:
                return
            cycle, first = cycle + 1, 0

    def share(self, until: float) -> npt.NDArray[np.float64]:
        """The fraction [C] of the time before `until` in which each client can be reached; at `until` 0, whether it can
        be reached then.
        """
        if until <= 0:
            return np.where(self.waits(0.0) == 0, 1.0, 0.0)
        cycles, rest = divmod(until, self.period) if not math.isinf(self.period) else (0.0, until)
        found = [(cycles * one.until(self.period) if cycles else 0.0) + one.until(rest) for one in self.clients]
        return np.array(found) / until


class _Row(NamedTuple):
    """An interval as the file gives it, and in which line."""

    line: int
    begin: float
    end: float
    up: float
    down: float


def read_trace(path: str, clients: int, names: Sequence[str] = (), period: float | None = None) -> Trace:
    """The trace in that file, for `clients`, whose `names` come from the data, if it has any. Raises ConfigError with
    the value, the reason and the remedy.
    """
    rows: dict[int, list[_Row]] = {}
    numbers = {name: number for number, name in enumerate(names)}
    for line, values in _lines(path):
        where = f"the trace {path!r}, line {line}"
        rows.setdefault(_client(values["client"], clients, numbers, where), []).append(_row(values, line, where))
    if absent := sorted(set(range(clients)) - set(rows)):
        raise ConfigError(
            f"the trace {path!r} has no row for client {_called(absent[0], names)}, which could never be reached: give "
            f"it one, or train with the clients that have some ({len(rows)} of {clients})"
        )
    found = [_ordered(path, _called(k, names), rows[k], period) for k in range(clients)]
    return Trace(tuple(found), math.inf if period is None else period)


def _lines(path: str) -> list[tuple[int, dict[str, str]]]:
    """The rows of the file with their lines, by column."""
    try:
        with Path(path).expanduser().open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            head = [name.strip() for name in next(reader, [])]
            rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except OSError as error:
        raise ConfigError(f"cannot read the trace {path!r}: {error.strerror}; check the path") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"the trace {path!r} is not a CSV file in UTF-8 ({error}): save it as one") from None
    for name in COLUMNS:
        if head.count(name) != 1:
            what = "has no column" if name not in head else "has more than one column"
            raise ConfigError(f"the trace {path!r} {what} {name!r}: its first line has to name {', '.join(COLUMNS)}")
    return [(line, {name: row[head.index(name)].strip() for name in COLUMNS}) for line, row in _whole(path, head, rows)]


def _whole(path: str, head: Sequence[str], rows: list[tuple[int, list[str]]]) -> list[tuple[int, list[str]]]:
    """The rows, each of which has a value for each column."""
    for line, row in rows:
        if len(row) != len(head):
            raise ConfigError(
                f"the trace {path!r}, line {line}, has {len(row)} values for {len(head)} columns: give each column one"
            )
    return rows


def _client(text: str, clients: int, names: Mapping[str, int], where: str) -> int:
    """The number of a client, given by its name in the data or by its number."""
    if text in names:
        return names[text]
    if text.isascii() and text.isdecimal() and len(text) <= _DIGITS and int(text) < clients:
        return int(text)
    if names:
        raise ConfigError(f"{where}: {unknown('client', shortened(text, _SHOWN), names)}")
    which = "there is only client 0" if clients == 1 else f"the clients are 0 to {clients - 1}"
    raise ConfigError(
        f"{where}: client = {shortened(text, _SHOWN)!r} is not one of the run's: {which}; correct it, or set clients"
    )


def _called(client: int, names: Sequence[str]) -> str:
    return repr(names[client]) if client < len(names) else str(client)


def _row(values: dict[str, str], line: int, where: str) -> _Row:
    """An interval with its rates in bit/s."""
    begin, end = _number(values, "from", where), _number(values, "to", where)
    if not begin < end:
        raise ConfigError(f"{where}: from = {begin:g} is not before to = {end:g}: give an interval longer than 0")
    rates = [_number(values, name, where) for name in ("up", "down")]
    for name, rate in zip(("up", "down"), rates, strict=True):
        if rate < _LEAST:
            raise ConfigError(
                f"{where}: {name} = {rate:g} carries nothing: give a rate above 0 in Mbit/s, or leave out the "
                "row for a time without a link"
            )
    return _Row(line, begin, end, rates[0] * _MBPS, rates[1] * _MBPS)


def _number(values: dict[str, str], name: str, where: str) -> float:
    """A number of 0 or more; only `to` may be inf."""
    unit = "Mbit/s" if name in ("up", "down") else "seconds"
    last = ", or inf for a client that can be reached from then on" if name == "to" else ""
    try:
        number = float(values[name])
    except ValueError:
        number = math.nan
    if math.isnan(number) or number < 0 or (math.isinf(number) and name != "to"):
        given, reason = shortened(values[name], _SHOWN), "negative" if number < 0 else "not a finite number"
        raise ConfigError(f"{where}: {name} = {given!r} is {reason}: give {unit} as a number of 0 or more{last}")
    return number


def _ordered(path: str, client: str, rows: list[_Row], period: float | None) -> Reachable:
    """One client's intervals in order. Raises ConfigError if two overlap, or if the client can no longer be reached at
    the end.
    """
    rows = sorted(rows, key=lambda row: row.begin)
    for one, other in itertools.pairwise(rows):
        if other.begin < one.end:
            raise ConfigError(
                f"the trace {path!r}: the rows of client {client} in lines {one.line} and {other.line} overlap, from "
                f"{other.begin:g} to {min(one.end, other.end):g} s: let one end where the other begins"
            )
    last = rows[-1]
    if period is None and not math.isinf(last.end):
        raise ConfigError(
            f"the trace {path!r} leaves client {client} without a link for good after {last.end:g} s (line "
            f"{last.line}): let it repeat, e.g. trace_period = {last.end:g}, or let that row end at inf"
        )
    if period is not None and last.end > period:
        raise ConfigError(
            f"trace_period = {period:g} ends before the row of client {client} in line {last.line} of {path!r}, which "
            f"lasts until {last.end:g} s: choose a longer period, or shorten the row"
        )
    return Reachable(
        tuple(row.begin for row in rows),
        tuple(row.end for row in rows),
        tuple(row.up for row in rows),
        tuple(row.down for row in rows),
    )
