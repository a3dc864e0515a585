"""Computation, time and energy of a report's entries, as text; and what it takes to reach an accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from cutlayer.report.collect import Report, ReportEntry, StoredRun
from cutlayer.summary import mean_of_known
from cutlayer.text import format_bytes, format_duration, format_quantity, format_rate

NOT_KNOWN = "not known"


def clocked(report: Report) -> bool:
    """Whether any run has virtual time."""
    return any(run.evaluations[-1].get("virtual_seconds") is not None for e in report.entries for run in e.runs)


def line(entry: ReportEntry) -> dict[str, str]:
    """Means over the finished runs of an entry."""

    def mean(name: str) -> float | None:
        return mean_of_known([result.get(name) for result in entry.facts])

    return {
        "title": entry.row.title,
        "client_flops": flops(mean("client_flops")),
        "server_flops": flops(mean("server_flops")),
        "time": duration(mean("virtual_seconds")),
        "marginal": joules(mean("clients_marginal_joules")),
        "total": joules(mean("clients_joules")),
        "server": joules(mean("server_joules")),
        "measured": joules(mean("measured_joules"), "not measured"),
    }


def reached(report: Report) -> dict[str, Any] | None:
    """What each entry takes to reach the accuracy that all reach at their best, rounded down to a whole percent."""
    best = [max(e["test_score"] for e in run.evaluations) for entry in report.entries for run in entry.runs]
    if len(report.entries) < 2 or min(map(len, (r.evaluations for e in report.entries for r in e.runs))) < 2:
        return None
    target = math.floor(100 * min(best) + 1e-9)
    lines = [_reached(entry, target / 100) for entry in report.entries]
    return {"target": f"{target} % test accuracy", "lines": lines}


def _reached(entry: ReportEntry, target: float) -> dict[str, str]:
    firsts = [_first(run, target) for run in entry.runs]

    def mean(of: Callable[[dict[str, Any]], float | None]) -> float | None:
        return mean_of_known([of(first) for first in firsts])

    unicast = mean(lambda e: e["bytes_up"] + e["bytes_down"])
    broadcast = mean(lambda e: e["bytes_up"] + e["bytes_down_broadcast"] if "bytes_down_broadcast" in e else None)
    return {
        "title": entry.row.title,
        "epochs": format_rate(mean(lambda e: e["epochs"]) or 0.0),
        "unicast": format_bytes(round(unicast or 0)),
        "broadcast": NOT_KNOWN if broadcast is None else format_bytes(round(broadcast)),
        "time": duration(mean(lambda e: e.get("virtual_seconds"))),
        "marginal": joules(mean(lambda e: e.get("clients_marginal_joules"))),
        "total": joules(mean(lambda e: e.get("clients_joules"))),
    }


def _first(run: StoredRun, target: float) -> dict[str, Any]:
    """The first evaluation of `run` with that test accuracy."""
    return next(e for e in run.evaluations if e["test_score"] >= target)


def flops(value: float | None) -> str:
    """Floating point operations."""
    return NOT_KNOWN if value is None else format_quantity(value, "FLOP")


def joules(value: float | None, unknown: str = NOT_KNOWN) -> str:
    """An energy."""
    return unknown if value is None else format_quantity(value, "J")


def duration(value: float | None) -> str:
    """A time."""
    return NOT_KNOWN if value is None else format_duration(value)
