"""How old was what clients sent when the server used it, where clients work at their own pace."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from cutlayer.text import format_duration


def line(found: Mapping[str, Any]) -> str:
    """What it came to in one run, in a sentence or two."""
    batches, models = (_ages(found, what) for what in ("batches", "models"))
    text = f"Batches were {batches} server steps old when used, models {models} averagings (mean and most)."
    if (idle := found.get("idle_seconds")) is None:
        return text
    return f"{text} A client waits {format_duration(fmean(idle))} in the mean, {format_duration(max(idle))} at most."


def _ages(found: Mapping[str, Any], what: str) -> str:
    """The mean over the clients, and the most of any; an en dash if nothing was used."""
    means, most = ([age for age in found[f"{what}_{name}"] if age is not None] for name in ("mean", "most"))
    return f"{fmean(means):.2g} ({max(most)})" if means else "\N{EN DASH}"
