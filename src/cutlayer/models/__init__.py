"""Models that can be cut: the zoo, a user's own, and `cut` for any module."""

from cutlayer.models.cut import cut, cut_points
from cutlayer.models.making import build, make, model
from cutlayer.models.parts import Crossing, Part, Parts

__all__ = ["Crossing", "Part", "Parts", "build", "cut", "cut_points", "make", "model"]
