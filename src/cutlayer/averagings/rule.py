"""What an averaging rule is: how the models of several clients become one.

A rule of your own is a subclass of `Averaging` under `@averaging("name")`, in a file that the configuration names:
`averaging = "path/to/file.py:Name"`. Its options are declared with `plugins.option`.

Shape legend: K received models, d numbers of a model (parameters and real buffers, in the order of its state).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, TypeVar

from cutlayer import plugins

if TYPE_CHECKING:
    from torch import Tensor


class Averaging(plugins.Thing):
    """Base of averaging rules. One that does not define `combine` is the weighted mean."""

    relative: ClassVar[bool] = False
    """Whether `combine` looks at `origin`."""
    by_name: ClassVar[bool] = False
    """Whether tensors are combined by their names (`combine_named`), instead of all numbers in the same way
    (`combine`).
    """

    def combine(self, models: Tensor, shares: Tensor, origin: Tensor | None) -> Tensor:
        """One model [d] from those of K clients [K, d], whose weights `shares` [K] add up to 1.

        `origin` [d] is what the clients had after the last averaging; before the first, the model that all started
        from. It is None if they started from different ones, or if the rule is not `relative`.
        """
        return shares.to(models.dtype) @ models

    def combine_named(self, models: Mapping[str, Tensor], shares: Tensor) -> dict[str, Tensor]:
        """The same for a rule that is `by_name`: tensors [K, ...] by their names in the model, to one tensor [...] by
        each name.
        """
        raise TypeError(f"the averaging rule {self.entry.name!r} does not look at names")

    def obstacle(self, names: Sequence[str]) -> str:
        """Why the rule has no effect on a model that trains parameters of these names, as a clause; empty if it has."""
        return ""

    @property
    def plain(self) -> bool:
        """Whether it is the weighted mean, which engines compute in their own way."""
        return type(self).combine is Averaging.combine and not self.by_name


R = TypeVar("R", bound=type[Averaging])


def averaging(name: str, *, title: str = "", paper: str = "") -> Callable[[R], R]:
    """A decorator that registers a subclass of `Averaging`."""

    def decorate(made: R) -> R:
        return plugins.register("averaging", name, title=title, paper=paper)(made)

    return decorate
