"""Models that can be cut: the zoo, and `cut` for any module."""

from cutlayer.models.cut import cut, cut_points
from cutlayer.models.parts import Crossing, Part, Parts
from cutlayer.models.zoo import build

__all__ = ["Crossing", "Part", "Parts", "build", "cut", "cut_points"]
