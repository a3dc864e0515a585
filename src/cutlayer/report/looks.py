"""Colours and line styles: an algorithm has the look that it was registered with, in every picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cutlayer import plugins

Look = tuple[str, str]  # colour, line style

# Okabe and Ito's palette without yellow, which is too pale for a line on white.
PALETTE = {
    "vermillion": "#D55E00",
    "blue": "#0072B2",
    "green": "#009E73",
    "orange": "#E69F00",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "black": "#000000",
    "grey": "#777777",
}
BLACK, BLUE, VERMILLION, GREEN = (PALETTE[name] for name in ("black", "blue", "vermillion", "green"))
COLOURS = tuple(PALETTE.values())
DARK = "invert(0.88) hue-rotate(180deg)"
"""The CSS filter of pictures on a dark page: white becomes nearly black, and colours keep their hue."""
FREE: Look = (PALETTE["grey"], "-.")  # of an algorithm without one, if only one can be shown


def look_of(facts: Mapping[str, Any]) -> Look | None:
    """The look that a registration states; None if it states none."""
    colour = facts.get("colour") or ""
    return (PALETTE.get(colour, colour), facts.get("line") or "-") if colour else None


def look_of_algorithm(name: str) -> Look:
    """The look of an algorithm that can be found."""
    return look_of(plugins.find("algorithm", name).facts) or FREE


def title_of_algorithm(name: str) -> str:
    """The title of an algorithm that can be found."""
    return plugins.find("algorithm", name).title
