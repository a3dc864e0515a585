"""Quantities for people, and foreign text made harmless."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB", "EB")


def plain(text: object) -> str:
    """Foreign text on one line that cannot control a terminal: control characters, line breaks, invisible characters
    and those that turn the direction of writing are shown as escapes (\\n, \\x1b, \\u202e). Doing it twice changes
    nothing more.

    Use it for all text of another machine, before it is printed, logged, stored or raised.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def plain_lines(text: object) -> str:
    """Text of our own that may quote others: as `plain`, but its lines stay lines."""
    return "\n".join(plain(line) for line in str(text).split("\n"))


def format_bytes(n: int) -> str:
    """Bytes in powers of 1000 with three significant digits: 999 B, 1.00 kB, 12.3 MB."""
    if n < 1000:
        return f"{n} B"
    # 999.5 would be printed as 1000 of its unit: it is 1.00 of the next one.
    power = next((p for p in range(1, len(_UNITS)) if n < 999.5 * 1000**p), len(_UNITS) - 1)
    value, unit = n / 1000**power, _UNITS[power]
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {unit}"


_PREFIXES = ("n", "µ", "m", "", "k", "M", "G", "T", "P", "E", "Z", "Y")  # noqa: RUF001 (the micro sign is meant)


def format_quantity(value: float, unit: str) -> str:
    """A quantity with three significant digits and the SI prefix that suits it: 12.3 MJ, 4.50 GFLOP, 0 J."""
    if value == 0:
        return f"0 {unit}"
    power = math.floor(math.log10(abs(value)) / 3 + 1e-9)
    if abs(value) >= 999.5 * 1000.0**power:  # otherwise it would be printed as 1000 of its unit
        power += 1
    power = min(max(power, -3), len(_PREFIXES) - 4)
    return f"{format_rate(value / 1000.0**power)} {_PREFIXES[power + 3]}{unit}"


_TIMES = ((365.25 * 86400, "years"), (86400.0, "days"), (3600.0, "h"), (60.0, "min"))


def format_duration(seconds: float) -> str:
    """A time with three significant digits in the unit that suits it: 12.3 ms, 45.0 s, 3.20 h, 12.0 days."""
    for size, unit in _TIMES:
        if seconds >= 2 * size:
            return f"{format_rate(seconds / size)} {unit}"
    return format_quantity(seconds, "s")


def remaining(seconds: float) -> str:
    """A rough time: about 41 minutes."""
    if seconds < 60:
        return "less than a minute"
    for name, length, most in (("minute", 60, 100), ("hour", 3600, 48)):
        count = round(seconds / length)
        if count < most:
            return f"about {count} {name}{'s' * (count > 1)}"
    return f"about {round(seconds / 86400)} days"


def format_rate(value: float) -> str:
    """A rate with three significant digits, thousands apart: 0.482, 25.3, 1,240."""
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}" if value >= 0.9995 else f"{value:.3g}"


def format_figure(mean: float | None, std: float | None = None, *, share: bool) -> str:
    """A score without its unit, with its spread if there is one: a fraction in percent, 87.31 ± 0.42; otherwise
    53.1.
    """
    if mean is None:
        return "not defined"
    scale, form = (100, ".2f") if share else (1, ".4g")
    return f"{scale * mean:{form}}" + ("" if std is None else f" ± {scale * std:{form if share else '.2g'}}")


def attacked(title: str, attacks: Sequence[str]) -> str:
    """The title of a run, with what hostile clients do in it."""
    return f"{title} (attacked: {', '.join(attacks)})" if attacks else title


def spoken(metric: str) -> str:
    """A metric's name in a sentence."""
    return metric.replace("_", " ")


def with_unit(metric: str, *, share: bool) -> str:
    """The label of a column or an axis: "accuracy (%)", "rmse"."""
    return f"{spoken(metric)} (%)" if share else spoken(metric)


def listed(names: list[str]) -> str:
    """Names in a sentence: a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def shortened(text: str, length: int) -> str:
    """`text`, cut with an ellipsis if it is longer than `length`."""
    return text if len(text) <= length else text[: length - 1] + "…"


def format_score(metric: str, score: float | None, *, share: bool) -> str:
    """A metric and its value: "accuracy 91.20 %" for a fraction, "rmse 53.1" for anything else."""
    return f"{spoken(metric)} {format_figure(score, share=share)}" + (" %" if share and score is not None else "")


def flag_words(name: str, value: Any) -> list[str]:
    """An option as words of a command line."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
