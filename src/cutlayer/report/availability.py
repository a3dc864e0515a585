"""The effect of a trace on the clients of a run: how much of the time they could be reached, and how long they
waited.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cutlayer.report.collect import Report
from cutlayer.summary import mean_of_known
from cutlayer.text import format_duration

HEADS = ("a client can be reached", "waits", "of that for its link")
"""The columns of `means`."""
_SHOWN = 40  # a longer table shows the clients that could be reached least and most


def means(reachable: float | None, idle: float | None, link: float | None) -> tuple[str, str, str]:
    """A client's means, as text; an en dash if a run had no trace."""
    if reachable is None or idle is None or link is None:
        return ("\N{EN DASH}",) * 3
    return _percent(reachable), format_duration(idle), format_duration(link)


def line(found: Mapping[str, Any]) -> str:
    """The effect of a trace on one run, in sentences."""
    reachable = found["reachable"]
    least = min(range(len(reachable)), key=lambda k: (reachable[k], k))
    mean = means(*(mean_of_known(found[name]) for name in ("reachable", "idle_seconds", "link_seconds")))
    text = (
        f"A client can be reached {mean[0]} of the time (client {least}, the least: {_percent(reachable[least])}) and "
        f"waits {mean[1]}, {mean[2]} of it for its link (means)."
    )
    return f"{text} {late(found)}".rstrip()


def late(found: Mapping[str, Any]) -> str:
    """How many rounds began late, in a sentence; empty if none did."""
    if not (count := found["late_rounds"]):
        return ""
    rounds = "One round" if count == 1 else f"{count} rounds"
    return f"{rounds} began late, {format_duration(found['late_seconds'])} in all, since no client could be reached."


def table(report: Report) -> dict[str, Any] | None:
    """Each client of a single run that had a trace: all if they are few, else those that could be reached least and
    most.
    """
    run = report.entries[0].runs[0]
    found = None if report.comparison or run.result is None else run.result.get("availability")
    if not found:
        return None
    reachable = found["reachable"]
    order = sorted(range(len(reachable)), key=lambda k: (reachable[k], k))
    shown = sorted(order) if len(order) <= _SHOWN else order[: _SHOWN // 2] + order[-_SHOWN // 2 :]
    lines = [
        (
            run.called(k),
            _percent(reachable[k]),
            str(found["rounds"][k]),
            format_duration(found["idle_seconds"][k]),
            format_duration(found["link_seconds"][k]),
        )
        for k in shown
    ]
    return {"lines": lines, "left_out": len(order) - len(shown), "late": late(found)}


def _percent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %")
