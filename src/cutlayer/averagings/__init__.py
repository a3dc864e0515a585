"""How client models become one: one file per rule."""

from cutlayer.averagings.rule import Averaging, averaging

__all__ = ["Averaging", "averaging"]
