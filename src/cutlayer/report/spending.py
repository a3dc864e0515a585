"""Computation, time and energy of a report's entries, as text; and the costs of reaching a score."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from cutlayer.report import availability, staleness
from cutlayer.report.collect import Measure, Report, ReportEntry, StoredRun
from cutlayer.summary import mean_of_known
from cutlayer.text import format_bytes, format_duration, format_quantity, format_rate

NOT_KNOWN = "not known"


def clocked(report: Report) -> bool:
    """Whether any run has virtual time."""
    return any(run.evaluations[-1].get("virtual_seconds") is not None for e in report.entries for run in e.runs)


def traced(report: Report) -> bool:
    """Whether the links of any run follow a trace."""
    return any(result.get("reachable") is not None for e in report.entries for result in e.facts)


def stale(report: Report) -> bool:
    """Whether the clients of any run work at their own pace."""
    return any(result.get("batch_age") is not None for e in report.entries for result in e.facts)


def line(entry: ReportEntry) -> dict[str, Any]:
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
        "availability": availability.means(mean("reachable"), mean("idle_seconds"), mean("link_seconds")),
        "ages": staleness.means(mean("batch_age"), mean("model_age")),
        "waits": staleness.waits(mean("idle_seconds")),
    }


def reached(report: Report) -> dict[str, Any] | None:
    """The costs of each entry to reach the score that all entries reach at their best, rounded in the easier direction:
    a fraction to a whole percent, anything else to two digits.
    """
    if len(report.entries) < 2 or min(map(len, (r.evaluations for e in report.entries for r in e.runs))) < 2:
        return None
    measure = report.measure
    tops = [max((e["test_score"] for e in r.evaluations), key=measure.rank) for x in report.entries for r in x.runs]
    if not all(measure.rank(top)[0] for top in tops) or any(e.measure != measure for e in report.entries):
        return None
    target = _rounded(min(tops, key=measure.rank), measure)
    lines = [_reached(entry, target) for entry in report.entries]
    name = f"{target:.0%}".replace("%", " %") if measure.share else f"{target:.4g}"
    return {"target": f"{name} test {measure.title}", "title": measure.title, "lines": lines}


def _rounded(score: float, measure: Measure) -> float:
    unit = 0.01 if measure.share else 10.0 ** (math.floor(math.log10(abs(score))) - 1) if score else 1.0
    steps = score / unit
    return unit * (math.floor(steps + 1e-7) if measure.maximise else math.ceil(steps - 1e-7))


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
    """The first evaluation of `run` with that test score."""
    least = run.measure.rank(target)
    return next(e for e in run.evaluations if run.measure.rank(e["test_score"]) >= least)


def flops(value: float | None) -> str:
    """Floating point operations."""
    return NOT_KNOWN if value is None else format_quantity(value, "FLOP")


def joules(value: float | None, unknown: str = NOT_KNOWN) -> str:
    """An energy."""
    return unknown if value is None else format_quantity(value, "J")


def duration(value: float | None) -> str:
    """A time."""
    return NOT_KNOWN if value is None else format_duration(value)
