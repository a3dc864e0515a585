"""The age of clients' batches and models when the server used them, if clients work at their own pace."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from cutlayer.report.collect import Report
from cutlayer.text import format_duration

HEADS = ("age of a batch", "of a model")
"""The columns of `means`, counted in server steps and in averagings."""
_SHOWN = 40  # a longer table shows the oldest and the newest
_DASH = "\N{EN DASH}"


def means(batch_age: float | None, model_age: float | None) -> tuple[str, str]:
    """The mean ages of all batches and models, as text; an en dash if clients wait for one another."""
    return _figure(batch_age), _figure(model_age)


def waits(idle: float | None) -> str:
    """How long a client waits, as text."""
    return _DASH if idle is None else format_duration(idle)


def line(found: Mapping[str, Any]) -> str:
    """The ages in one run, in one or two sentences."""
    batches, models = (
        f"{_figure(found[f'{one}_age'])} (at most {_most(found[f'{all_}_most'])})"
        for one, all_ in (("batch", "batches"), ("model", "models"))
    )
    text = f"Batches were {batches} server steps old when used, models {models} averagings, in the mean."
    if not (idle := found.get("idle_seconds")):
        return text
    return f"{text} A client waits {format_duration(fmean(idle))} in the mean, {format_duration(max(idle))} at most."


def table(report: Report) -> dict[str, Any] | None:
    """Each client of a single run whose clients worked at their own pace: all if they are few, else those whose batches
    were the oldest and the newest.
    """
    run = report.entries[0].runs[0]
    found = None if report.comparison or run.result is None else run.result.get("staleness")
    if not found:
        return None
    mean = found["batches_mean"]
    order = sorted(range(len(mean)), key=lambda k: (-1.0 if mean[k] is None else -mean[k], k))
    shown = sorted(order) if len(order) <= _SHOWN else order[: _SHOWN // 2] + order[-_SHOWN // 2 :]
    idle = found.get("idle_seconds")
    lines = [(run.called(k), *_cells(found, k), *(() if idle is None else (format_duration(idle[k]),))) for k in shown]
    return {"lines": lines, "left_out": len(order) - len(shown), "timed": idle is not None}


def _cells(found: Mapping[str, Any], client: int) -> list[str]:
    """The number and ages of one client's batches and models: count, mean and largest."""
    kinds = [(f"{what}", f"{what}_mean", f"{what}_most") for what in ("batches", "models")]
    return [
        text
        for count, mean, most in kinds
        for text in (str(found[count][client]), _figure(found[mean][client]), _most([found[most][client]]))
    ]


def _figure(age: float | None) -> str:
    return _DASH if age is None else f"{age:.3g}"


def _most(ages: list[int | None]) -> str:
    return str(max((age for age in ages if age is not None), default=_DASH))
